"""RWKV-6 written from its description, token by token in plain torch: an oracle for gradients, in
the dtype of its weights.
"""

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
    for i in range(1 + max(int(key.split(".")[1]) for key in p if key.startswith("blocks."))):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        q = {key.removeprefix(f"{att}.time_"): value for key, value in p.items() if key.startswith(f"{att}.time_")}
        heads = q["faaaa"].shape
        h = norm(f"blocks.{i}.ln1", x)
        low = torch.tanh((h + shift(h) * q["maa_x"]) @ q["maa_w1"]).unflatten(-1, (5, q["maa_w2"].shape[1]))
        mixed = {
            name: h + shift(h) * (q[f"maa_{name}"] + low[:, :, j] @ q["maa_w2"][j]) for j, name in enumerate("wkvrg")
        }
        r, k, v, g = (linear(f"{att}.{m}", mixed[m[0]]) for m in ("receptance", "key", "value", "gate"))
        w = torch.exp(-torch.exp(q["decay"] + torch.tanh(mixed["w"] @ q["decay_w1"]) @ q["decay_w2"]))
        y = wkv(*(t.unflatten(-1, heads) for t in (r, k, v, w)), q["faaaa"], q.get("state"))
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()
        y = y.flatten(2) * p[f"{att}.ln_x.weight"] + p[f"{att}.ln_x.bias"]
        x = x + linear(f"{att}.output", y * g * torch.sigmoid(g))
        f = norm(f"blocks.{i}.ln2", x)
        fk, fr = (linear(f"{ffn}.{m}", f + shift(f) * p[f"{ffn}.time_maa_{m[0]}"]) for m in ("key", "receptance"))
        x = x + torch.sigmoid(fr) * linear(f"{ffn}.value", F.relu(fk) ** 2)
    return norm("ln_out", x) @ p["head.weight"].T


def wkv(r, k, v, w, u, start=None):
    """y [B, T, H, N] of the recurrence, from r, k, v and the decay w [B, T, H, N], u [H, N], and an
    initial state [H, N (value), N (key)].
    """
    start = torch.zeros(*u.shape, u.shape[1], dtype=r.dtype) if start is None else start.transpose(1, 2)
    S, out = start.expand(len(r), -1, -1, -1), []  # [B, H, key, value]
    for t in range(r.shape[1]):
        kv = k[:, t, ..., None] * v[:, t, :, None]
        out.append((r[:, t, ..., None] * (S + u[..., None] * kv)).sum(-2))
        S = w[:, t, ..., None] * S + kv
    return torch.stack(out, 1)
