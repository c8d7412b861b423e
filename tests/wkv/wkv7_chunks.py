"""WKV7 in chunks of tokens (the WY form) with tensors.

Within a chunk, with c the sum of w since the later of the chunk's and the document's start, the
decays go into the keys:

    R' = r e^c     A' = a e^(c of the token before)     K' = k e^−c     B' = b e^−c

so that products of rows are those of tokens after decay. M(x, y) = x yᵀ below the diagonal, M₊
includes it, and both are 0 for tokens of different documents. X is the state at the later of the
chunk's and the document's start: S, or the initial state after a reset. With rows of tokens,

    U = (1 − M(A', B'))⁻¹ (A' Xᵀ + M(A', K') V)        U: S_{t−1} a_t of every token
    Y = R' Xᵀ + M₊(R', K') V + M₊(R', B') U
    S ← X e^c + Vᵀ K" + Uᵀ B"             c of the last token; K" = k e^(c of the last − c)
"""

import torch


def masks(reset, length, device):
    """Same document, on and below the diagonal [B, T, T]; tokens before the first reset [B, T]."""
    document = reset.cumsum(1)
    same = document[:, :, None] == document[:, None]
    return same & torch.ones(length, length, dtype=torch.bool, device=device).tril(), document == 0


class Chunk:
    """Everything about a chunk that both directions need. Inputs [B, H, T, N]; reset [B, T]."""

    def __init__(self, r, w, k, v, a, b, S, initial, reset):
        same, early = masks(reset, r.shape[2], r.device)
        self.low, self.early = same[:, None], early[:, None, :, None]
        self.strict = self.low & ~torch.eye(r.shape[2], dtype=torch.bool, device=r.device)
        # c restarts with every document
        c = torch.einsum("bts,bhsn->bhtn", same.to(w.dtype), w)
        self.own = c.exp()
        self.before = (c - w).exp()
        self.rest = (c[:, :, -1:] - c).exp() * (self.low[:, :, -1, :, None])  # 0 in earlier documents
        self.inverse = (-c).exp()
        self.R, self.A, self.K, self.B = r * self.own, a * self.before, k * self.inverse, b * self.inverse
        self.K2, self.B2 = k * self.rest, b * self.rest
        self.last = self.own[:, :, -1:]
        self.resets = reset.any(1)[:, None, None, None]
        self.S, self.initial, self.V = S, initial, v
        self.AB, self.AK = self.AB_of(self.A, self.B), self.AB_of(self.A, self.K)
        self.RK, self.RB = self.R @ self.K.mT * self.low, self.R @ self.B.mT * self.low
        one = torch.eye(r.shape[2], dtype=r.dtype, device=r.device)
        self.inverted = torch.linalg.inv(one - self.AB)
        self.U = self.inverted @ (self.from_state(self.A) + self.AK @ v)

    def AB_of(self, x, y):
        return x @ y.mT * self.strict

    def from_state(self, x):
        """x Xᵀ"""
        return torch.where(self.early, x @ self.S.mT, x @ self.initial.mT)

    def forward(self):
        y = self.from_state(self.R) + self.RK @ self.V + self.RB @ self.U
        X = torch.where(self.resets, self.initial, self.S)
        return y, X * self.last + self.V.mT @ self.K2 + self.U.mT @ self.B2

    def backward(self, r, k, a, b, gy, G):
        """Gradients of r, w, k, v, a, b, S and initial from those of y and the next state, G."""
        gU = self.RB.mT @ gy + self.B2 @ G.mT
        Z = self.inverted.mT @ gU  # gradient of A' Xᵀ + M(A', K') V
        gv = self.RK.mT @ gy + self.K2 @ G.mT + self.AK.mT @ Z
        gRK, gRB = gy @ self.V.mT * self.low, gy @ self.U.mT * self.low
        gAK, gAB = Z @ self.V.mT * self.strict, Z @ self.U.mT * self.strict

        def to_state(x):
            """x X"""
            return torch.where(self.early, x @ self.S, x @ self.initial)

        gr = (to_state(gy) + gRK @ self.K + gRB @ self.B) * self.own
        ga = (to_state(Z) + gAK @ self.K + gAB @ self.B) * self.before
        K2, B2 = self.V @ G, self.U @ G  # gradients of K", B"
        gk = (gRK.mT @ self.R + gAK.mT @ self.A) * self.inverse + K2 * self.rest
        gb = (gRB.mT @ self.R + gAB.mT @ self.A) * self.inverse + B2 * self.rest
        X = torch.where(self.resets, self.initial, self.S)
        # c of every token; c of the last one also decays the state and is in K" and B"
        gc = gr * r - gk * k - gb * b
        gc[:, :, -1:] += (K2 * self.K2 + B2 * self.B2).sum(2, keepdim=True)
        gc[:, :, -1:] += self.last * (G * X).sum(2, keepdim=True)
        before = ga * a  # c − w
        gw = torch.einsum("bts,bhtn->bhsn", self.low[:, 0].to(gc.dtype), gc + before) - before
        early = self.early.to(gy.dtype)
        gS = (gy * early).mT @ self.R + (Z * early).mT @ self.A
        ginitial = (gy * (1 - early)).mT @ self.R + (Z * (1 - early)).mT @ self.A
        through = G * self.last
        return (
            gr,
            gw,
            gk,
            gv,
            ga,
            gb,
            gS + torch.where(self.resets, torch.zeros_like(G), through),
            ginitial + torch.where(self.resets, through, torch.zeros_like(G)),
        )


def chunks(length, size):
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def wkv7(r, w, k, v, a, b, state, reset, initial, gy, gstate, size=16):
    """y, the last state, and the gradients of all inputs, in chunks of `size` tokens."""
    tensors = [x.transpose(1, 2) for x in (r, w, k, v, a, b)]
    saved, S, ys = [], state, []
    for part in chunks(r.shape[1], size):
        saved.append(Chunk(*(x[:, :, part] for x in tensors), S, initial, reset[:, part]))
        y, S = saved[-1].forward()
        ys.append(y)
    G, ginitial, grads = gstate, torch.zeros_like(gstate), []
    for part, chunk in reversed(list(zip(chunks(r.shape[1], size), saved, strict=True))):
        r, _, k, _, a, b = (x[:, :, part] for x in tensors)
        *grad, G, more = chunk.backward(r, k, a, b, gy.transpose(1, 2)[:, :, part], G)
        ginitial = ginitial + more
        grads.append(grad)
    whole = [torch.cat(x[::-1], 2).transpose(1, 2) for x in zip(*grads, strict=True)]
    return torch.cat(ys, 2).transpose(1, 2), S, *whole, G, ginitial
