"""mLSTM: against its equation, token by token, with its running maximum, and where it starts."""

import pytest
import torch

from tests.mixers.loops import assert_is_the_loop, example, heads, make, mixer, outer

H = 4


def parts(x, w):
    q, k, v = (heads(z, H) for z in (x @ w["qkv.weight"].T).chunk(3, dim=-1))
    i, f = (15 * torch.tanh((x @ w[f"{gate}.weight"].T + w[f"{gate}.bias"]) / 15) for gate in ("input", "forget"))
    return q / q.shape[-1] ** 0.5, k, v, i, torch.nn.functional.logsigmoid(f)


def plain(x, w):
    """The memory as it stands."""
    q, k, v, i, log_f = parts(x, w)
    S, n, outputs = 0, 0, []
    for t in range(x.shape[1]):
        f_t, i_t = log_f[:, t, :, None].exp(), i[:, t, :, None].exp()
        S = f_t[..., None] * S + i_t[..., None] * outer(k[:, t], v[:, t])
        n = f_t * n + i_t * k[:, t]
        read = (q[:, t, :, None] @ S).squeeze(-2)
        size = (q[:, t] * n).sum(-1, keepdim=True).abs()
        outputs.append(read / torch.maximum(size, torch.ones_like(size)))
    return finish(x, w, torch.stack(outputs, 1))


def stabilised(x, w):
    """The same divided by exp(m), m the largest logit still remembered, as published."""
    q, k, v, i, log_f = parts(x, w)
    S, n, m, outputs = 0, 0, torch.zeros_like(i[:, 0]), []
    for t in range(x.shape[1]):
        before, m = m, torch.maximum(log_f[:, t] + m, i[:, t])
        f_t, i_t = (log_f[:, t] + before - m).exp()[..., None], (i[:, t] - m).exp()[..., None]
        S = f_t[..., None] * S + i_t[..., None] * outer(k[:, t], v[:, t])
        n = f_t * n + i_t * k[:, t]
        read = (q[:, t, :, None] @ S).squeeze(-2)
        size = (q[:, t] * n).sum(-1, keepdim=True).abs()
        outputs.append(read / torch.maximum(size, (-m).exp()[..., None]))
    return finish(x, w, torch.stack(outputs, 1))


def finish(x, w, o):
    o = o - o.mean(-1, keepdim=True)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["norm.weight"]
    return (torch.sigmoid(x @ w["gate.weight"].T) * o.flatten(2)) @ w["out.weight"].T


@pytest.mark.parametrize("loop", [plain, stabilised])
def test_it_is_its_equation(loop):
    assert_is_the_loop(mixer("mlstm", heads=H, conv=0), loop)


def test_gates_at_their_cap_overflow_nothing_in_float32():
    built = make("mlstm", {}, dtype=torch.float32)
    x = example(dtype=torch.float32).repeat(1, 40, 1).requires_grad_()
    with torch.no_grad():
        built.input.bias.fill_(1e4)
        built.forget.bias.fill_(1e4)
    y = built(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in built.parameters())
    wide = make("mlstm", {}, dtype=torch.float64)
    wide.load_state_dict(built.state_dict())
    error = (wide(x.double()) - y).norm() / y.norm()
    assert error < 1e-5


def test_gates_start_as_published():
    built = make("mlstm", {})
    assert built.input.weight.abs().max() == built.forget.weight.abs().max() == 0
    torch.testing.assert_close(built.forget.bias, torch.linspace(3, 6, 8).double())
    assert built.input.bias.abs().max() < 0.5
