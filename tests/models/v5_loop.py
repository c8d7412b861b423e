"""RWKV-5.2 written from its description, token by token in plain torch: an oracle for gradients, in
the dtype of its weights.
"""

import torch
import torch.nn.functional as F
from v6_loop import wkv


def forward(p: dict, tokens: torch.Tensor, lora: tuple | None = None) -> torch.Tensor:
    """Logits [B, T, V] from tensors with upstream's keys.

    Args:
        lora: rank and alpha of the adapter among the tensors.
    """

    def linear(name, x):
        y = x @ p[f"{name}.weight"].T
        if f"{name}.lora_A" in p:
            y = y + lora[1] / lora[0] * (x @ p[f"{name}.lora_A"].T @ p[f"{name}.lora_B"].T)
        return y

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def mixed(x, mix):
        return x * mix + F.pad(x, (0, 0, 1, -1)) * (1 - mix)

    x = norm("blocks.0.ln0", p["emb.weight"][tokens])
    for i in range(1 + max(int(key.split(".")[1]) for key in p if key.startswith("blocks."))):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        h = norm(f"blocks.{i}.ln1", x)
        r, k, v, g = (
            linear(f"{att}.{m}", mixed(h, p[f"{att}.time_mix_{m[0]}"])) for m in ("receptance", "key", "value", "gate")
        )
        u = p[f"{att}.time_faaaa"]
        r, k, v = (t.unflatten(-1, u.shape) for t in (r, k, v))
        y = wkv(r, k, v, torch.exp(-torch.exp(p[f"{att}.time_decay"])).expand_as(r), u, p.get(f"{att}.time_state"))
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
        y = y.flatten(2) * p[f"{att}.ln_x.weight"] + p[f"{att}.ln_x.bias"]
        x = x + linear(f"{att}.output", y * g * torch.sigmoid(g))
        f = norm(f"blocks.{i}.ln2", x)
        fk, fr = (linear(f"{ffn}.{m}", mixed(f, p[f"{ffn}.time_mix_{m[0]}"])) for m in ("key", "receptance"))
        x = x + torch.sigmoid(fr) * linear(f"{ffn}.value", F.relu(fk) ** 2)
    return norm("ln_out", x) @ p["head.weight"].T
