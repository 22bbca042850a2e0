"""Diagnostics of the memory: closed forms, dense matrices in float64, long and large inputs."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mad_efla import spectrum
from mad_efla.mixers._dynamics import AttentionTrace, Dynamics
from mad_efla.training import model
from tests.mixer import example, make
from tests.tiny import tiny

B, L, H, N, P = 2, 20, 3, 5, 4


def randn(*shape, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def decaying(log_decay, P=P, seed=0):
    """A diagonal recurrence with random keys, values and queries."""
    k, q = randn(*log_decay.shape, seed=seed), randn(*log_decay.shape, seed=seed + 1)
    return Dynamics(log_decay=log_decay, k=k, q=q, v=randn(*k.shape[:3], P, seed=seed + 2))


def delta(keys, beta, step="exact", log_decay=0.0, P=P):
    """A delta rule on raw keys [B L H N] with beta [B L H]."""
    lambda_ = keys.square().sum(-1)
    eigenvalue = spectrum.step_eigenvalue(beta * lambda_, step)
    b = unit(keys)
    kept = torch.full_like(keys, log_decay)
    return Dynamics(
        log_decay=kept,
        a=-(1 - eigenvalue)[..., None] * kept.exp() * b,
        b=b,
        k=((1 - eigenvalue) / lambda_)[..., None] * keys,
        v=randn(*keys.shape[:3], P, seed=3),
        q=randn(*keys.shape, seed=4),
        step=step,
        key_square=lambda_,
        beta=beta,
    )


def general(seed=0, L=L):
    """A decay per channel and a rank-one part that is not symmetric."""
    dynamics = decaying(-randn(B, L, H, N, seed=seed + 9).abs(), seed=seed)
    b = unit(randn(B, L, H, N, seed=seed + 5))
    return replace(dynamics, a=-b * randn(B, L, H, N, seed=seed + 6).sigmoid(), b=b)


def gated(seed=0, L=L):
    return delta(randn(B, L, H, N, seed=seed), randn(B, L, H, seed=seed + 1).sigmoid(), "exact", -0.1)


KINDS = {
    "diagonal": lambda: decaying(-randn(B, L, H, N).abs()),
    "delta": gated,
    "general": general,
    "channels": lambda: decaying(-randn(B, L, H, N).abs(), P=1),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def dense(dynamics):
    """Every transition as a matrix, [B L H N N]."""
    A = torch.diag_embed(dynamics.log_decay.exp())
    if dynamics.a is None:
        return A
    return A + dynamics.a[..., :, None] * dynamics.b[..., None, :]


def dense_states(dynamics):
    A, S, out = dense(dynamics), 0, []
    for t in range(dynamics.k.shape[1]):
        write = dynamics.k[:, t, :, :, None] * dynamics.v[:, t, :, None, :]
        S = (A[:, t] @ S if t else 0) + write
        out.append(S)
    return torch.stack(out)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- single tokens


@pytest.mark.parametrize("step", ["euler", "rk2", "rk4", "exact", "implicit"])
def test_the_eigenvalue_along_a_key_is_the_step_s(step):
    keys, beta = 1.5 * randn(B, L, H, N), randn(B, L, H, seed=1).exp()
    found = spectrum.per_token(delta(keys, beta, step, log_decay=-0.3))
    x = beta * keys.square().sum(-1)
    close(found.x, x)
    close(found.eigenvalue, math.exp(-0.3) * spectrum.step_eigenvalue(x, step))
    close(found.erase, 1 - spectrum.step_eigenvalue(x, step))


def test_steps_are_the_first_terms_of_the_exponential():
    x = torch.linspace(0, 3, 31, dtype=torch.float64)
    for step, order in (("euler", 1), ("rk2", 2), ("rk4", 4)):
        terms = sum((-x) ** n / math.factorial(n) for n in range(order + 1))
        close(spectrum.step_eigenvalue(x, step), terms)
        close(spectrum.step_error(x, step), (terms - (-x).exp()).abs())
    close(spectrum.step_eigenvalue(x, "implicit"), 1 / (1 + x))
    assert spectrum.step_error(x, "exact").max() == 0


def test_an_euler_step_grows_beyond_its_limit_and_no_earlier():
    below, above = spectrum.EULER_LIMIT - 1e-9, spectrum.EULER_LIMIT + 1e-9
    sizes = spectrum.step_eigenvalue(torch.tensor([below, above], dtype=torch.float64), "euler").abs()
    assert sizes[0] < 1 < sizes[1]
    assert math.exp(-spectrum.SATURATED) < 0.02


def test_kaczmarz_has_no_factor_in_x():
    with pytest.raises(ValueError, match="kaczmarz"):
        spectrum.step_eigenvalue(torch.ones(1), "kaczmarz")


def test_a_step_s_error_is_that_of_what_the_state_answers():
    k, v, S = randn(N), randn(P, seed=1), randn(N, P, seed=2)
    beta, lambda_ = 0.7, k.square().sum()
    x = beta * lambda_
    answers = {}
    for step in ("euler", "exact"):
        alpha = (1 - spectrum.step_eigenvalue(x, step)) / lambda_
        answers[step] = (S + alpha * torch.outer(k, v - S.T @ k)).T @ k / lambda_
    miss = (v - S.T @ k).norm() / lambda_
    close((answers["euler"] - answers["exact"]).norm() / miss, spectrum.step_error(x, "euler"))


@kinds
def test_the_eigenvalue_is_the_share_kept_along_the_key(kind):
    dynamics = KINDS[kind]()
    u = unit(dynamics.k if dynamics.b is None else dynamics.b)
    close(spectrum.per_token(dynamics).eigenvalue, torch.einsum("blhn,blhnm,blhm->blh", u, dense(dynamics), u))


def test_a_diagonal_decay_is_the_exact_flow_of_its_own_x():
    dynamics = decaying(-randn(B, L, H, N).abs())
    close(dynamics.log_decay.exp(), spectrum.step_eigenvalue(spectrum.per_token(dynamics).x, "exact"))
    assert spectrum.per_token(general()).x is None


def test_a_zero_key_and_a_total_decay_give_numbers():
    dynamics = gated()
    nothing = replace(
        dynamics,
        k=torch.zeros_like(dynamics.k),
        b=torch.zeros_like(dynamics.k),
        log_decay=torch.full_like(dynamics.k, -math.inf),
        a=torch.zeros_like(dynamics.k),
    )
    found = spectrum.per_token(nothing)
    assert found.eigenvalue.abs().max() == 0
    assert found.erase.abs().max() == 0


# ---- products of transitions


@kinds
def test_singular_values_are_those_of_the_dense_product(kind):
    dynamics = KINDS[kind]()
    found, A = spectrum.products(dynamics, lags=[1, 4, 7]), dense(KINDS[kind]())
    starts = [0, 4, 9, 13]  # four, spread over the 20 - 7 that have seven tokens ahead
    assert found.log_singular_values.shape == (4, 3, B, H, N)
    for i, start in enumerate(starts):
        product = torch.eye(N, dtype=torch.float64)
        for lag in range(1, 8):
            product = A[:, start + lag - 1] @ product
            if lag in (1, 4, 7):
                sizes = found.log_singular_values[i, [1, 4, 7].index(lag)].exp()
                close(sizes, torch.linalg.svdvals(product), 1e-12)


def test_a_constant_decay_is_recovered_as_horizon_and_exponent():
    rates = torch.tensor([0.08, 0.2, 0.5, 1.0, 1.5])
    dynamics = decaying(-rates.expand(B, 60, H, N))
    found = spectrum.horizon(spectrum.products(dynamics))
    close(found.slowest, torch.full_like(found.slowest, 1 / 0.08), 1e-6)
    close(found.median, torch.full_like(found.median, 1 / 0.5), 1e-6)
    close(spectrum.lyapunov(dynamics), -rates.double().expand(B, H, N), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axes", ["own", "turned"])
def test_a_known_decay_along_orthogonal_keys_is_recovered(dtype, axes):
    # After N tokens every direction has met one key, after 4 N each has met four.
    basis = torch.eye(N).double() if axes == "own" else torch.linalg.qr(randn(N, N))[0]
    keys = (0.9 * basis).repeat(8, 1)[None, :, None].expand(B, -1, H, -1)
    beta = torch.arange(1, N + 1).double() / 10
    whole = delta(keys, beta.repeat(8)[None, :, None].expand(B, -1, H))
    fields = {n: x.to(dtype) if isinstance(x, torch.Tensor) else x for n, x in vars(whole).items()}
    dynamics = Dynamics(**fields)
    lost = (0.81 * beta).expand(B, H, N)
    logs = spectrum.products(dynamics, lags=[N, 4 * N]).log_singular_values[0]
    close(logs[0], -lost, 1e-6)
    close(logs[1], -4 * lost, 1e-6)
    exponents = spectrum.lyapunov(dynamics)
    close(exponents.sum(-1), -lost.sum(-1) / N, 1e-6)
    if axes == "own":
        close(exponents, -lost / N, 1e-6)


def test_horizons_are_the_first_lags_under_1_over_e():
    logs = torch.tensor([[0.0, -0.5, -3.0], [-0.5, -1.5, -9.0], [0.0, 0.0, 0.0]])
    found = spectrum.horizon(spectrum.Products(torch.tensor([2, 4, 8]), logs.double()[None, :, None, None]))
    assert found.median.item() == pytest.approx(3)  # -0.5 at 2, -1.5 at 4
    assert found.slowest.item() == math.inf  # -0.5 at 4, and 0 again at 8
    mean = logs.double().exp().mean(-1).log()
    expected = 2 + 2 * (mean[0] + 1).item() / (mean[0] - mean[1]).item()
    assert found.mean.item() == pytest.approx(expected)


def test_a_memory_that_is_wiped_out_has_no_horizon_and_exponent_minus_infinity():
    dynamics = decaying(torch.full((B, L, H, N), -math.inf))
    assert all(h.max() == 0 for h in spectrum.horizon(spectrum.products(dynamics)))
    assert spectrum.lyapunov(dynamics).max() == -math.inf


def test_one_token_is_a_sequence():
    for dynamics in (decaying(-randn(B, 1, H, N).abs()), gated(L=1)):
        assert spectrum.products(dynamics).lags.tolist() == [1]
        assert spectrum.state_spectrum(dynamics).effective_rank.shape == (1, B, H)
        assert spectrum.reach(dynamics).distance.abs().max() == 0
        assert spectrum.key_overlap(dynamics).square_cosine.abs().max() < 1e-12


@pytest.mark.parametrize("wrong", [[], [0, 1], [2, 2], [3, 1], [L + 1]])
def test_lags_and_times_outside_are_refused(wrong):
    with pytest.raises(ValueError, match="must rise within"):
        spectrum.products(gated(), wrong)
    if wrong not in ([0, 1],):
        with pytest.raises(ValueError, match="must rise within"):
            spectrum.state_spectrum(gated(), wrong)


def test_lyapunov_exponents_of_a_known_product():
    # One matrix again and again: the exponents are the logarithms of its eigenvalues.
    b = unit(randn(1, 1, 1, N, seed=1))
    d = torch.tensor([0.99, 0.8, 0.6, 0.4, 0.2]).double().log().expand(1, 1, 1, N)
    one = replace(decaying(d), a=-0.7 * d.exp() * b, b=b)
    eigenvalues = torch.linalg.eigvals(dense(one)[0, 0, 0])
    assert eigenvalues.imag.abs().max() == 0
    expected = eigenvalues.real.abs().log().sort(descending=True).values
    n = 2_000
    fields = {name: x.expand(1, n, 1, -1) if isinstance(x, torch.Tensor) else x for name, x in vars(one).items()}
    # What is left of the start falls like 1 / L, so take it off: two lengths give the slope.
    long = spectrum.lyapunov(Dynamics(**fields))[0, 0] * n
    half = {n_: x[:, : n // 2] if isinstance(x, torch.Tensor) else x for n_, x in fields.items()}
    short = spectrum.lyapunov(Dynamics(**half))[0, 0] * (n // 2)
    close((long - short) / (n // 2), expected, 1e-6)


@pytest.mark.parametrize(("step", "size"), [("euler", 2.0), ("exact", 0.7)])
def test_nothing_overflows_or_vanishes_over_a_hundred_thousand_tokens(step, size):
    n = 100_000  # exp(709) is the largest number there is
    keys = size * randn(1, n, 1, 3)
    dynamics = delta(keys, torch.ones(1, n, 1).double(), step, P=2)
    exponents = spectrum.lyapunov(dynamics)
    largest = spectrum.products(dynamics, lags=[1, 1000, n]).log_singular_values[0, :, 0, 0, 0]
    assert exponents.isfinite().all()
    assert largest.isfinite().all()
    assert largest[-1].abs() > 20_000
    assert exponents.max().item() == pytest.approx(largest[-1].item() / n, rel=1e-3)
    # The determinant is a product of factors, whatever the directions.
    factors = spectrum.step_eigenvalue(keys.square().sum(-1), step).abs().log()
    close(exponents.sum(), factors.mean(), 1e-5)


@pytest.mark.parametrize("step", ["euler", "exact"])
def test_states_that_grow_without_end_stay_numbers(step):
    n = 3_000
    dynamics = delta(2 * randn(1, n, 1, 3), torch.ones(1, n, 1).double(), step, P=2)
    state, looked = spectrum.state_spectrum(dynamics), spectrum.reach(dynamics)
    for found in (state.log_singular_values[..., 0], *state[2:], *looked[1:]):
        assert found.isfinite().all()
    largest, distance = state.log_singular_values[-1].max(), looked.distance.flatten()
    if step == "euler":  # the first tokens drown all later ones
        assert largest > 2_000
        assert (distance[1:] > looked.times[1:] - 50).all()
    else:
        assert largest < 10
        assert distance.mean() < 10


def test_what_is_written_into_a_huge_state_has_its_size():
    n = 300
    dynamics = delta(2 * randn(1, n, 1, 3), torch.ones(1, n, 1).double(), "euler", P=2)
    dynamics.v[:, -1] *= 1e160
    expected = dense_states(dynamics)
    assert 1e120 < expected[-2].abs().max() < 1e250
    *_, (S, log_size) = spectrum.states(dynamics)
    assert log_size.item() > 200
    torch.testing.assert_close(S * log_size.exp(), expected[-1], rtol=1e-9, atol=0)
    silent = replace(dynamics, v=dynamics.v * (torch.arange(n) < n - 1)[:, None, None])
    assert not torch.allclose(dense_states(silent)[-1], expected[-1], rtol=0.1, atol=0)


# ---- states and keys


@kinds
def test_states_and_their_spectrum_are_the_dense_ones(kind):
    dynamics = KINDS[kind]()
    expected = dense_states(dynamics)
    for (S, log_size), dense_S in zip(spectrum.states(dynamics), expected, strict=True):
        close(S * log_size.exp()[..., None, None], dense_S)
    found = spectrum.state_spectrum(dynamics, [0, 7, L - 1])
    looked = expected[[0, 7, L - 1]]
    if kind == "channels":  # the heads are the columns of one matrix
        looked = looked[..., 0].transpose(-1, -2)[:, :, None]
    sizes = torch.linalg.svdvals(looked)
    close(found.log_singular_values.exp(), sizes)
    p = sizes / sizes.sum(-1, keepdim=True)
    close(found.effective_rank, torch.exp(-(p * p.clamp_min(1e-300).log()).sum(-1)), 1e-6)
    close(found.stable_rank, looked.square().sum((-2, -1)) / sizes[..., 0] ** 2)
    close(found.capacity_used, found.effective_rank / min(looked.shape[-2:]))


def test_orthogonal_keys_fill_the_state_one_direction_each():
    eye = torch.eye(N, dtype=torch.float64)[None, :, None].expand(B, -1, H, -1).contiguous()
    dynamics = replace(decaying(torch.zeros(B, N, H, N).double()), k=eye, v=3 * eye)
    found = spectrum.state_spectrum(dynamics, list(range(N)))
    for t in range(N):
        close(found.effective_rank[t], torch.full((B, H), t + 1.0).double())
        close(found.stable_rank[t], torch.full((B, H), t + 1.0).double())
    close(found.capacity_used[-1], torch.ones(B, H).double())
    keys = spectrum.key_overlap(dynamics)
    close(keys.spectrum, torch.full((B, H, N), 1 / N, dtype=torch.float64))
    close(keys.condition, torch.ones(B, H).double())
    close(keys.effective_rank, torch.full((B, H), float(N)).double())
    assert keys.square_cosine.max() < 1e-12


def test_a_repeated_key_has_one_direction():
    key = randn(1, 1, 1, N).expand(B, L, H, N).contiguous()
    dynamics = replace(decaying(torch.zeros(B, L, H, N).double()), k=key)
    keys = spectrum.key_overlap(dynamics)
    close(keys.spectrum[..., 0], torch.ones(B, H).double())
    close(keys.square_cosine, torch.ones(B, H).double())
    close(keys.effective_rank, torch.ones(B, H).double(), 1e-6)
    assert (keys.condition > 1e14).all()
    close(spectrum.state_spectrum(dynamics).effective_rank, torch.ones(16, B, H).double(), 1e-6)


def test_overlap_is_that_of_the_gram_matrix():
    dynamics = general(L=4)  # fewer keys than directions
    keys = unit(dynamics.k).transpose(1, 2)
    gram = keys @ keys.mT
    found = spectrum.key_overlap(dynamics)
    values = torch.linalg.eigvalsh(gram).flip(-1)
    close(found.spectrum[..., :4], values / 4)
    assert found.spectrum[..., 4:].max() < 1e-12
    close(found.condition, values[..., 0] / values[..., 3], 1e-6)
    cosines = (gram - torch.eye(4, dtype=torch.float64)).square().sum((-2, -1)) / 12
    close(found.square_cosine, cosines)


def test_zero_states_and_zero_keys_have_rank_zero():
    zero = torch.zeros(B, L, H, N).double()
    dynamics = replace(decaying(zero), k=zero)
    found = spectrum.state_spectrum(dynamics)
    assert found.effective_rank.abs().max() == 0
    assert found.stable_rank.abs().max() == 0
    overlap = spectrum.key_overlap(dynamics)
    assert overlap.effective_rank.abs().max() == 0
    assert overlap.condition.isfinite().all()


# ---- reach


@kinds
def test_reach_is_that_of_the_implied_weights(kind):
    dynamics = KINDS[kind]()
    A, times = dense(dynamics), [0, 6, L - 1]
    found = spectrum.reach(dynamics, times)
    for i, t in enumerate(times):
        weights = torch.zeros(B, H, L).double()
        row = dynamics.q[:, t]
        for s in range(t, -1, -1):
            size = dynamics.v[:, s].norm(dim=-1)
            weights[..., s] = (row * dynamics.k[:, s]).sum(-1).abs() * size
            row = torch.einsum("bhnm,bhn->bhm", A[:, s], row)
        p = weights / weights.sum(-1, keepdim=True)
        close(found.distance[i], (p * (t - torch.arange(L))).sum(-1))
        close(found.entropy[i], -(p * p.clamp_min(1e-300).log()).sum(-1))


def test_the_implied_weights_give_the_output():
    dynamics = general()
    outputs = torch.einsum("lbhnp,blhn->blhp", dense_states(dynamics), dynamics.q)
    A, o = dense(dynamics), 0
    row = dynamics.q[:, -1]
    for s in range(L - 1, -1, -1):
        o = o + (row * dynamics.k[:, s]).sum(-1, keepdim=True) * dynamics.v[:, s]
        row = torch.einsum("bhnm,bhn->bhm", A[:, s], row)
    close(o, outputs[:, -1])


@pytest.mark.parametrize("window", [None, 5])
def test_even_attention_has_the_entropy_of_its_number_of_tokens(window):
    n = 150  # three blocks of queries
    even = torch.ones(B, n, H, N)
    trace = AttentionTrace(q=even, k=even, v=even, window=window)
    found = spectrum.reach(trace)
    seen = torch.arange(1, n + 1).double().clamp_max(window or n)
    close(found.entropy, seen.log()[:, None, None].expand(n, B, H))
    close(found.distance, ((seen - 1) / 2)[:, None, None].expand(n, B, H))


def test_attention_weights_are_torch_s():
    q, k, v = (randn(B, L, H, N, seed=s) for s in range(3))
    found = spectrum.reach(AttentionTrace(q=q, k=k, v=v), [3, L - 1])
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(N)
    hidden = torch.ones(L, L).triu(1).bool()
    p = scores.masked_fill(hidden, -math.inf).softmax(-1) * v.norm(dim=-1).mT[:, :, None]
    p = p / p.sum(-1, keepdim=True)
    back = torch.arange(L)[:, None] - torch.arange(L)
    distance = (p * back).sum(-1).movedim(-1, 0)
    close(found.distance, distance[[3, L - 1]])


# ---- gain


def test_gain_of_a_linear_map_is_known():
    x, change = randn(B, L, N), torch.zeros(B, L, N).double()
    change[:, 4] = 0.1
    close(spectrum.perturbation_gain(x, x + change, 7 * x, 7 * (x + change))[:, 4], torch.ones(B).double())

    def later(x):  # three tokens later, in every second sequence twice as much
        return x.roll(3, dims=1) * torch.tensor([1.0, 2.0])[:, None, None]

    gain = spectrum.perturbation_gain(x, x + change, later(x), later(x + change))
    assert gain.nonzero().tolist() == [[0, 7], [1, 7]]
    close(gain[:, 7], torch.ones(B).double())  # relative to the size of the output
    both = spectrum.perturbation_gain(x, x + 0.01 * x, x, x + 0.03 * x)
    close(both.square().sum(-1).sqrt(), torch.full((B,), 3.0).double())
    assert spectrum.perturbation_gain(x, x, x, x).max() == 0
    assert spectrum.perturbation_gain(x, x + change, 0 * x, 0 * x).max() == 0


# ---- mixers hand out what they compute

DELTAS = [
    {"step": step, "keys": keys, "decay": decay}
    for step in ("euler", "rk2", "rk4", "exact", "implicit", "kaczmarz")
    for keys in ("raw", "l2")
    for decay in ("none", "separate", "joint")
    if decay != "joint" or step == "exact"
]


@pytest.mark.parametrize(
    ("name", "fields"),
    [("delta", fields) for fields in DELTAS]
    + [("delta", {"key_dim": 6, "value_dim": 10, "heads": 3, "output_gate": True})]
    + [("mamba2", {}), ("mamba2", {"expand": 2, "state_dim": 4, "conv": 0})]
    + [(name, {}) for name in ("mamba", "gla", "rwkv7", "linear_attention")]
    + [("linear_attention", {"normalizer": True}), ("rwkv7", {"conv": 0})],
)
def test_dynamics_replayed_give_the_mixer_s_output(name, fields):
    mixer, x = make(name, fields), example()
    dynamics, seen = mixer.dynamics(x), {}
    out = mixer._output

    def replayed(*arguments):
        at = 1 if name in ("delta", "gla") else 0
        o = torch.stack(
            [
                torch.einsum("bhnp,bhn->bhp", S, q) * c.exp()[..., None]
                for (S, c), q in zip(spectrum.states(dynamics), dynamics.q.unbind(1), strict=True)
            ],
            dim=1,
        )
        seen["o"] = o
        return out(*arguments[:at], o.reshape(arguments[at].shape), *arguments[at + 1 :])

    expected = mixer(x)
    mixer._output = replayed
    close(mixer(x), expected)
    assert seen


@pytest.mark.parametrize("fields", DELTAS)
def test_a_delta_mixer_s_eigenvalue_is_its_step_s(fields):
    found = spectrum.per_token(dynamics := make("delta", fields).dynamics(example()))
    decay = dynamics.log_decay[..., 0].exp()
    if fields["step"] == "kaczmarz":
        factor = 1 - found.beta * found.key_square / (found.key_square + 1e-6)
    else:
        factor = spectrum.step_eigenvalue(found.x, fields["step"])
    close(found.eigenvalue, decay * factor)
    if fields["keys"] == "l2":
        close(found.key_square, torch.ones_like(found.key_square), 1e-6)


@pytest.mark.parametrize("fields", [{}, {"window": 5}, {"rotary": False}])
def test_attention_hands_out_what_its_weights_come_from(fields):
    mixer, x = make("attention", fields), example()
    trace = mixer.dynamics(x)
    scores = torch.einsum("bthd,bshd->bhts", trace.q, trace.k) / math.sqrt(mixer.Dh)
    back = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    hidden = (back < 0) | (back >= (trace.window or 10**9))
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    o = torch.einsum("bhts,bshd->bthd", weights, trace.v)
    close(mixer._output(o), mixer(x))


# ---- memory and whole models


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation returned with memory of its own."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("rank_one", [False, True])
def test_no_tensor_holds_a_matrix_per_token(rank_one):
    n, heads, width = 192, 4, 32
    keys = randn(2, n, heads, width)
    dynamics = delta(keys, torch.full((2, n, heads), 0.1).double(), log_decay=-0.01, P=width)
    if not rank_one:
        dynamics = replace(dynamics, a=None, b=None)
    with Largest() as seen:
        spectrum.per_token(dynamics)
        spectrum.horizon(spectrum.products(dynamics))
        spectrum.lyapunov(dynamics)
        spectrum.state_spectrum(dynamics)
        spectrum.key_overlap(dynamics)
        spectrum.reach(dynamics)
    assert seen.numel <= 2 * keys.numel()  # a sixteenth of a matrix per token


def test_attention_takes_queries_in_blocks():
    n = 640
    trace = AttentionTrace(q=randn(1, n, 2, 4), k=randn(1, n, 2, 4), v=randn(1, n, 2, 4))
    with Largest() as seen:
        spectrum.reach(trace)
    assert seen.numel == 2 * 64 * n


def built(*mixers, **fields):
    run = tiny(mixers=list(mixers), model__depth=len(mixers), model__width=32, **fields)
    return model.build(run).eval(), torch.randint(
        0, run.task.vocabulary, (3, 12), generator=torch.Generator().manual_seed(0)
    )


def test_a_model_is_diagnosed_layer_by_layer():
    net, tokens = built("efla", "attention", "hyena", "mamba2")
    before = {n: p.clone() for n, p in net.state_dict().items()}
    found = spectrum.diagnose(net, tokens)
    assert [layer.kind for layer in found.layers] == ["state", "attention", "none", "state"]
    assert [layer.mixer for layer in found.layers] == ["efla", "attention", "hyena", "mamba2"]
    x = []
    hook = net.mixers[0].register_forward_pre_hook(lambda m, a: x.append(a[0]))
    net(tokens)
    hook.remove()
    first = spectrum.per_token(net.mixers[0].dynamics(x[0]))
    close(found.layers[0].tokens.eigenvalue, first.eigenvalue)
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_scalars_are_flat_finite_and_named():
    net, tokens = built("efla", "attention")
    scalars = spectrum.diagnose(net, tokens).scalars()
    assert all(isinstance(value, float) and math.isfinite(value) for value in scalars.values())
    assert all(name.startswith("spectrum/") for name in scalars)
    layers = [scalars[f"spectrum/layer{i}/reach_distance"] for i in (0, 1)]
    assert scalars["spectrum/reach_distance"] == pytest.approx(sum(layers) / 2)
    assert "spectrum/layer0/horizon_p50" in scalars
    assert "spectrum/layer1/horizon_p50" not in scalars
    state = scalars["spectrum/layer0/eigenvalue_mean"]
    assert scalars["spectrum/eigenvalue_mean"] == state
    assert 0 < state < 1


def test_a_change_of_a_token_reaches_no_earlier_one():
    net, tokens = built("efla", "attention")
    found = spectrum.diagnose(net, tokens, position=5)
    for gain in (found.gain, *(layer.gain for layer in found.layers)):
        assert gain.token[:, :5].abs().max() == 0
        assert (gain.token[:, 5] > 0).all()
        assert (gain.noise > 0).all()


def test_small_noise_gives_a_gain_that_is_free_of_its_size():
    net, tokens = built("efla")
    net = net.double()
    small, smaller = (spectrum.diagnose(net, tokens, noise=n).gain.noise for n in (1e-4, 1e-5))
    torch.testing.assert_close(small, smaller, rtol=1e-2, atol=1e-3)


def test_equal_seeds_give_equal_scalars():
    net, tokens = built("efla")
    first, again = (spectrum.diagnose(net, tokens).scalars() for _ in range(2))
    other = spectrum.diagnose(net, tokens, generator=torch.Generator().manual_seed(1)).scalars()
    assert first == again
    assert first != other


def test_a_diverged_model_is_diagnosed_as_such():
    net, tokens = built("efla", "efla")
    with torch.no_grad():
        net.mixers[0].qkv.weight[0] = math.inf
    found = spectrum.diagnose(net, tokens)
    assert [layer.finite for layer in found.layers] == [False, False]
    assert found.scalars()["spectrum/finite"] == 0
    assert found.layers[0].tokens is None


def test_positions_outside_and_single_tokens_are_refused():
    net, tokens = built("efla")
    with pytest.raises(ValueError, match=r"position=12 must lie in \[0, 12\)"):
        spectrum.diagnose(net, tokens, position=12)


# ---- from outside


def test_effective_remembrance_sees_exactly_what_a_model_looks_at():
    tokens = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]])

    def last_four(tokens):  # their sum decides between two answers, for sure
        return 1e3 * torch.nn.functional.one_hot(tokens[:, -4:].sum(1) % 2, 2).double()[:, None]

    found = spectrum.effective_remembrance(last_four, tokens, [1, 4, 5])
    assert found.tolist() == [[0, 0], [0, 0], [1, 0]]

    def share_of_ones(tokens):
        p = tokens.double().mean(1)
        return torch.stack([p, 1 - p], -1).log()[:, None]

    found = spectrum.effective_remembrance(share_of_ones, tokens, [2, 4])
    close(found, torch.tensor([[1 / 24, 5 / 24], [1 / 8, 3 / 8]], dtype=torch.float64))


def test_a_gain_has_a_mean_distance():
    gain = torch.tensor([[0.0, 0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    close(spectrum.gain_distance(gain, 2), torch.tensor([2 / 5, 0.0], dtype=torch.float64))


def test_a_layer_of_which_nothing_is_known_has_gains_and_remembrance():
    net, tokens = built("torch.nn:LSTM", "efla")
    found = spectrum.diagnose(net, tokens)
    scalars = found.scalars()
    assert found.layers[0].kind == "none"
    for name in ("layer0/gain_token", "layer0/gain_distance", "gain_distance", "effective_remembrance_p25"):
        assert scalars[f"spectrum/{name}"] > 0
    assert 0 <= scalars["spectrum/effective_remembrance_p75"] <= 1
    again = spectrum.training_scalars(net, tokens)["spectrum/effective_remembrance_p50"]
    assert again == pytest.approx(scalars["spectrum/effective_remembrance_p50"])


# ---- while training


def test_training_scalars_gives_what_the_diagnosis_gives():
    net, tokens = built("efla", "attention", "hyena", "mamba2")
    full, found = spectrum.diagnose(net, tokens).scalars(), spectrum.training_scalars(net, tokens)
    same = {n: v for n, v in found.items() if "horizon" not in n and "reach" not in n}
    assert len(same) == 8
    assert same == {name: pytest.approx(full[name]) for name in same}
    trace = spectrum.diagnose(net, tokens).layers[1].scalars()
    assert found["spectrum/reach_distance"] == pytest.approx(trace["reach_distance"])


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.5])
def test_training_scalars_recovers_a_known_decay(rate, monkeypatch):
    net, tokens = built("gla", task__seq_len=64)
    tokens = tokens.repeat(1, 6)[:, :64]
    constant = decaying(torch.full((B, 64, H, N), -rate, dtype=torch.float64))
    monkeypatch.setattr(net.mixers[0], "dynamics", lambda x: constant)
    found = spectrum.training_scalars(net, tokens)
    assert found["spectrum/eigenvalue_mean"] == pytest.approx(math.exp(-rate), abs=1e-6)
    assert found["spectrum/horizon_p50"] == pytest.approx(min(1 / rate, 32), abs=1e-6)
    assert found["spectrum/horizon_beyond"] == (rate == 0.01)


def test_training_scalars_draws_no_random_number_and_leaves_the_model_alone(monkeypatch):
    net, tokens = built("efla", "attention")
    before = {n: p.clone() for n, p in net.state_dict().items()}
    own = net.mixers[0].dynamics
    monkeypatch.setattr(net.mixers[0], "dynamics", lambda x: own(x + torch.randn(())))
    random = torch.get_rng_state()
    spectrum.training_scalars(net.train(), tokens)
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_training_scalars_looks_in_full_precision_at_what_autocast_made():
    net, tokens = built("efla", "efla")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = spectrum.training_scalars(net, tokens)
    full = spectrum.training_scalars(net, tokens)
    assert half["spectrum/eigenvalue_mean"] == pytest.approx(full["spectrum/eigenvalue_mean"], abs=1e-2)
    assert half["spectrum/eigenvalue_mean"] != full["spectrum/eigenvalue_mean"]


def test_training_scalars_leaves_out_what_there_is_not_and_what_is_not_finite():
    assert list(spectrum.training_scalars(*built("hyena", "identity"))) == ["spectrum/effective_remembrance_p50"]
    net, tokens = built("efla", "efla")
    with torch.no_grad():
        net.mixers[0].qkv.weight[0] = math.inf
    assert spectrum.training_scalars(net, tokens) == {}


@pytest.mark.parametrize("missing", ["a", "b", "beta", "key_square"])
def test_fields_that_go_together_are_asked_for_together(missing):
    with pytest.raises(ValueError, match="go together"):
        replace(gated(), **{missing: None})
