"""A mixer beside its recurrence as the paper writes it: one token after the other, in float64."""

import torch
import torch.nn.functional as F
from torch.func import functional_call

from tests.mixer import example, make
from tests.peer.beside import assert_same, mixer

__all__ = ["assert_is_the_loop", "example", "heads", "make", "mixer", "outer", "rms", "run", "silu_heads"]


def assert_is_the_loop(built, loop, tolerance=1e-12):
    """Compare outputs and every gradient; `loop(x, w)` has the weights by name."""

    def ours(x, **w):
        return functional_call(built, w, (x,))

    tensors = {"x": example(), **dict(built.named_parameters())}
    assert_same(ours, lambda x, **w: loop(x, w), tensors, tolerance)


def heads(z, H):
    return z.unflatten(-1, (H, -1))


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


def rms(o, weight, eps=1e-5):
    return o / (o.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def run(q, S, token):
    """Apply `token(S, t)`, which gives the next state, and read it with each query."""
    outputs = []
    for t in range(q.shape[1]):
        S = token(S, t)
        outputs.append((q[:, t, :, None] @ S).squeeze(-2))
    return torch.stack(outputs, 1)


def silu_heads(x, weight, H, n=1, Dk=None):
    """Project, activate and cut into q, k, v; k and v of n steps have an axis for them."""
    q, k, v = F.silu(x @ weight.T).split(_widths(weight, n, H, Dk), dim=-1)
    return heads(q, H), heads(heads(k, n), H), heads(heads(v, n), H)


def _widths(weight, n, H, Dk):
    total = weight.shape[0]
    Dk = Dk or total // H // (2 * n + 1)
    return H * Dk, n * H * Dk, total - (n + 1) * H * Dk
