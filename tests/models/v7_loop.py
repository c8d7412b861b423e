"""RWKV-7 written from its description, token by token in plain torch: an oracle for gradients, in
the dtype of its weights.
"""

import math

import torch
import torch.nn.functional as F


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

    def shift(x):
        return F.pad(x, (0, 0, 1, -1)) - x

    x = norm("blocks.0.ln0", p["emb.weight"][tokens])
    v_first = None
    for i in range(1 + max(int(key.split(".")[1]) for key in p if key.startswith("blocks."))):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        q = {key.removeprefix(f"{att}."): value for key, value in p.items() if key.startswith(f"{att}.")}
        heads = q["r_k"].shape
        h = norm(f"blocks.{i}.ln1", x)
        mixed = {c: h + shift(h) * q[f"x_{c}"] for c in "rwkvag"}
        r, k, v = (linear(f"{att}.{m}", mixed[m[0]]) for m in ("receptance", "key", "value"))
        decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(q["w0"] + torch.tanh(mixed["w"] @ q["w1"]) @ q["w2"]))
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(q["v0"] + mixed["v"] @ q["v1"] @ q["v2"])
        rate = torch.sigmoid(q["a0"] + mixed["a"] @ q["a1"] @ q["a2"])
        gate = torch.sigmoid(mixed["g"] @ q["g1"]) @ q["g2"]
        removal = (k * q["k_k"]).unflatten(-1, heads)
        removal = removal / removal.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        k = k * (1 + (rate - 1) * q["k_a"])
        r, k, v, decay, rate = (t.unflatten(-1, heads) for t in (r, k, v, decay, rate))
        start = q.get("time_state", torch.zeros(heads[0], heads[1], heads[1], dtype=x.dtype))
        S = start.expand(len(x), -1, -1, -1)  # [B, H, value, key]
        out = []
        for t in range(tokens.shape[1]):
            taken = (S * -removal[:, t, :, None]).sum(-1)
            S = (
                S * decay[:, t, :, None]
                + taken[..., None] * (removal * rate)[:, t, :, None]
                + v[:, t, ..., None] * k[:, t, :, None]
            )
            out.append((S * r[:, t, :, None]).sum(-1))
        y = torch.stack(out, 1)
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
        y = y.flatten(2) * q["ln_x.weight"] + q["ln_x.bias"]
        y = y + ((r * k * q["r_k"]).sum(-1, keepdim=True) * v).flatten(2)
        x = x + linear(f"{att}.output", y * gate)
        f = norm(f"blocks.{i}.ln2", x)
        x = x + linear(f"{ffn}.value", F.relu(linear(f"{ffn}.key", f + shift(f) * p[f"{ffn}.x_k"])) ** 2)
    return norm("ln_out", x) @ p["head.weight"].T
