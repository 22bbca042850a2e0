"""Mamba-3: against its equation, token by token, its eigenvalues, and what they are good for."""

import math

import pytest
import torch
import torch.nn.functional as F

from mad_efla import spectrum
from tests.mixers.loops import assert_is_the_loop, example, heads, make, mixer, outer, rms

H = 4


def turned(z, angle):
    """Turn pairs of channels, as complex numbers; those beyond the angles stay."""
    pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
    angle = F.pad(angle, (0, pairs.shape[-1] - angle.shape[-1]))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def loop(N, pairs):
    """As published: b and c turned by the angles so far, two writes a token."""

    def run_loop(x, w):
        D = x.shape[-1]
        z, u, b, c = (x @ w["inp.weight"].T).split((D, D, N, N), dim=-1)
        dt, a, trap, theta = (x @ w["gates.weight"].T).split((H, H, H, pairs), dim=-1)
        b, c = (rms(y, w[f"norm_{n}.weight"])[..., None, :] + heads(w[f"bias_{n}"], H) for n, y in (("b", b), ("c", c)))
        u, dt, share = heads(u, H), F.softplus(dt + w["dt_bias"]), torch.sigmoid(trap)
        alpha = torch.exp(-torch.where(a >= 0, 1 + a, 1 / (1 - a)) * dt)
        S = x.new_zeros(len(x), H, N, D // H)
        phase, k_last, u_last, outputs = 0, torch.zeros_like(b[:, 0]), torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            angle = math.pi * torch.tanh(theta[:, t, None]) * dt[:, t, :, None]
            phase = torch.remainder(phase + angle, 2 * math.pi)
            k, q = turned(b[:, t], phase), turned(c[:, t], phase)
            early = ((1 - share) * dt * alpha)[:, t, :, None, None]
            late = (share * dt)[:, t, :, None, None]
            S = alpha[:, t, :, None, None] * S + early * outer(k_last, u_last)
            S = S + late * outer(k, u[:, t])
            y = (q[..., None, :] @ S).squeeze(-2) + w["d"][:, None] * u[:, t]
            outputs.append(y)
            k_last, u_last = k, u[:, t]
        y = torch.stack(outputs, 1).flatten(2) * F.silu(z)
        return y @ w["out.weight"].T

    return run_loop


@pytest.mark.parametrize(("N", "rotary", "pairs"), [(16, 0.5, 4), (6, 0.5, 1), (8, 1.0, 4)])
def test_it_is_its_equation(N, rotary, pairs):
    built = mixer("mamba3", heads=H, state_dim=N, rotary=rotary)
    assert_is_the_loop(built, loop(N, pairs))


def test_eigenvalues_are_its_decays_and_angles():
    built, x = mixer("mamba3", heads=H), example()
    d = built.dynamics(x)
    found = spectrum.per_token(d)
    log_decay, _, _, angle = built._gates(x)
    torch.testing.assert_close(found.eigenvalue, log_decay.exp())
    torch.testing.assert_close(found.angle[..., :4].abs(), angle.abs())
    assert (found.angle[..., 4:] == 0).all()
    assert (found.angle[..., :4].abs() > 0.01).any()


def test_the_spectrum_s_state_is_what_the_next_token_finds():
    built, x = mixer("mamba3"), example()
    *_, (S, log_size) = spectrum.states(built.dynamics(x))
    state = tuple(s.double() for s in built.initial_state(len(x), x.device))
    for t in range(x.shape[1]):
        _, state = built.step(x[:, t], state)
    # No token follows the last one, so only its own weight is there, in both.
    torch.testing.assert_close(S * log_size.exp()[..., None, None], state[0])


def test_a_turning_state_holds_a_parity():
    """One head of one pair, set by hand: a one turns it by half a circle, the first token writes."""
    built = make("mamba3", {"heads": 1, "state_dim": 2, "rotary": 1.0})
    bits = torch.randint(0, 2, (400,), generator=torch.Generator().manual_seed(0))
    bits[0] = 0
    x = torch.zeros(1, 400, built.d_model, dtype=torch.float64)
    x[0, :, 0], x[0, 0, 1], x[0, :, 2] = bits, 1.0, 1.0
    with torch.no_grad():
        for name, p in built.named_parameters():
            if not name.startswith(("bias", "norm")):
                p.zero_()
        D = built.d_model
        built.inp.weight[0, 2] = built.out.weight[0, 0] = 1.0  # the gate, and what is read
        built.inp.weight[D, 1] = 1.0  # u, of the first token
        built.dt_bias.fill_(math.log(math.e - 1))  # dt = 1
        built.gates.weight[1, 2] = -1e6  # decay at its floor
        built.gates.weight[2, 2] = 50.0  # lambda = 1
        built.gates.weight[3, 0] = 50.0  # half a circle
        y = built(x)[0, :, 0]
    odd = bits.cumsum(0) % 2 == 1
    assert ((y < 0) == odd).all()
    assert (y.abs() > 0.9 * y[0].abs()).all()


def test_it_starts_as_published():
    built = make("mamba3", {}, d_model=128)
    assert built.gate_widths == (8, 8, 8, 4)
    assert (built.bias_b == 1).all()
    assert (built.bias_c == 1).all()
    steps = F.softplus(built.dt_bias)
    assert 0.999e-3 < steps.min() < steps.max() < 1.001e-1


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"heads": 5}, "heads=5 must divide the inner width 32"), ({"state_dim": 2}, "no pair to turn")],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make("mamba3", fields)
