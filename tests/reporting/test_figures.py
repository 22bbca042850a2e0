"""Figures: the data handed to them, equal bytes for equal data, and the command that writes them."""

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
import torch

from mad_efla import spectrum
from mad_efla.config import ConfigError
from mad_efla.reporting import figures, renderers, tables
from mad_efla.reporting.figures import artifacts, quartiles, spectra
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.sweeps import read_sweeps
from mad_efla.spectrum import Diagnosis, Gain, LayerDiagnosis
from mad_efla.training.loop import train
from tests.cli.test_cli import SWEEP, call, folders
from tests.spectrum.test_spectrum import decaying, delta, randn
from tests.tiny import tiny

B, L, H, N = 2, 40, 3, 5
EVERY = ["eigenvalues", "exactness", "forgetting", "reach", "state"]


def layer(dynamics, **changes):
    values = {
        "mixer": "made",
        "kind": "state",
        "gain": Gain(torch.ones(B, L), torch.ones(B, L)),
        "tokens": spectrum.per_token(dynamics),
        "products": spectrum.products(dynamics),
        "state": spectrum.state_spectrum(dynamics),
        "keys": spectrum.key_overlap(dynamics),
        "reach": spectrum.reach(dynamics),
    }
    return LayerDiagnosis(**values | changes)


def diagnosis(*layers):
    return Diagnosis(layers=list(layers), gain=Gain(torch.ones(B, L), torch.ones(B, L)))


def constant(rate, heads=H):
    """A state that every token multiplies by exp(-rate)."""
    return decaying(torch.full((B, L, heads, N), -float(rate), dtype=torch.float64))


# ------------------------------------------------------------------ data


def test_a_known_decay_is_what_the_curves_show():
    made = layer(constant(0.1))
    x = quartiles.x_shares(made.tokens)
    assert np.allclose(x.x, 0.1)
    assert x.middle[[0, -1]].tolist() == [0, 1]
    left = quartiles.products_left(made.products)
    assert np.allclose(left.middle, np.exp(-0.1 * left.x))
    assert np.array_equal(left.low, left.high)
    remembering = quartiles.remembering(made.products)
    assert np.array_equal(remembering.middle, remembering.x < 10 - 1e-9)


def test_the_last_share_is_that_of_horizons_beyond_the_longest_lag():
    rates = torch.tensor([0.2, 0.01, 0.5, 0.04], dtype=torch.float64)  # horizons 5, 100, 2, 25
    made = layer(decaying(-rates[None, None, :, None].expand(B, L, 4, N)))
    shares = quartiles.remembering(made.products)
    assert shares.x[[0, -1]] == pytest.approx([1, L / 2])
    at = np.interp([1.5, 3, 10, L / 2], shares.x, shares.middle)
    assert at.tolist() == [1, 0.75, 0.5, 0.5]
    assert shares.middle[-1] == made.scalars()["horizon_beyond"]


def test_eigenvalues_fall_into_the_bins_of_their_head_and_never_outside():
    keys = torch.nn.functional.normalize(randn(B, L, 3, N), dim=-1)
    beta = torch.tensor([0.5, 2.0, 9.0], dtype=torch.float64).expand(B, L, 3)
    tokens = spectrum.per_token(delta(keys, beta, "euler"))  # eigenvalues 0.5, -1, -8
    centres = np.arange(-5, 6) / 4
    shares = quartiles.eigenvalue_shares(tokens, centres)
    assert [int(row.argmax()) for row in shares] == [7, 1, 0]
    assert np.array_equal(shares.max(1), np.ones(3))
    assert centres[[7, 1]].tolist() == [0.5, -1]


def test_x_is_read_off_at_its_share():
    keys = torch.nn.functional.normalize(randn(B, L, 4, N), dim=-1)
    beta = torch.tensor([0.5, 1, 3, 5], dtype=torch.float64).expand(B, L, 4)
    shares = quartiles.x_shares(spectrum.per_token(delta(keys, beta)))
    below = [shares.middle[shares.x <= limit].max() for limit in (0.75, 2, 4, 6)]
    assert below == pytest.approx([0.25, 0.5, 0.75, 1])


def test_errors_are_those_of_the_step_and_unit_keys_bound_them():
    keys, beta = randn(B, L, H, N), torch.full((B, L, H), 0.5, dtype=torch.float64)
    raw = spectrum.per_token(delta(keys, beta))
    curve = quartiles.error_shares(raw, "euler")
    for at, share in zip(curve.x[1:-1], curve.middle[1:-1], strict=True):
        over = (spectrum.step_error(raw.x, "euler") >= at).double().mean().item()
        assert over == pytest.approx(share, abs=1 / raw.x.numel() + 1e-9)
    unit = spectrum.per_token(delta(torch.nn.functional.normalize(keys, dim=-1), beta))
    assert quartiles.error_shares(unit, "euler").x == pytest.approx(math.exp(-0.5) - 0.5)
    assert quartiles.error_shares(unit, "rk4").x.max() < quartiles.error_shares(unit, "rk2").x.min()


def test_steps_are_compared_only_where_a_flow_is_integrated(tmp_path):
    decaying = diagnosis(layer(constant(0.1)))
    assert "exactness" not in spectra.figures({"decaying": decaying})


def test_orthogonal_keys_have_equal_gram_eigenvalues_and_a_repeated_key_has_one():
    dynamics = constant(0.0)
    keys = torch.eye(N, dtype=torch.float64).repeat(L // N, 1)[None, :, None]
    for k, expected in ((keys, [1] * N), (keys[:, :1], [N] + [0] * (N - 1))):
        dynamics.k[:] = k
        spread = quartiles.key_spread(spectrum.key_overlap(dynamics))
        assert spread.x.tolist() == [1, 2, 3, 4, 5]
        assert spread.middle == pytest.approx(expected, abs=1e-12)


def test_a_state_of_one_direction_has_rank_one_and_a_zero_state_none():
    dynamics = constant(0.0)
    dynamics.k[:] = dynamics.k[:, :1]
    state = spectrum.state_spectrum(dynamics)
    assert quartiles.rank_over_time(state).middle == pytest.approx(1.0)
    assert quartiles.rank_over_time(state).x[-1] == L
    assert quartiles.state_sizes(state).middle == pytest.approx([1, 0, 0, 0], abs=1e-12)
    dynamics.k[:] = 0
    state = spectrum.state_spectrum(dynamics)
    assert not quartiles.rank_over_time(state).middle.any()
    assert not quartiles.state_sizes(state).middle.any()


def test_a_state_that_keeps_all_alike_looks_back_half_way():
    dynamics = constant(0.0)
    for tensor in (dynamics.k, dynamics.q, dynamics.v):
        tensor[:] = 1
    reach = spectrum.reach(dynamics)
    distance, width = quartiles.reach_distance(reach), quartiles.reach_width(reach)
    assert distance.middle == pytest.approx((distance.x - 1) / 2)
    assert width.middle == pytest.approx(width.x)


def test_quartiles_are_over_sequences_and_gain_is_over_tokens():
    gain = torch.arange(1.0, 6)[:, None].expand(5, 4)
    size = quartiles.gain_size(gain)
    assert [float(q[0]) for q in size[1:]] == [4, 6, 8]


def test_names_hold_the_mixer_and_what_differs():
    first, second = tiny(seed=0), tiny(seed=1)
    assert spectra.names([first]) == [first.mixer]
    assert spectra.names([first, second]) == [f"{first.mixer} seed={s}" for s in (0, 1)]
    other = tiny(train__steps=40)
    assert spectra.names([first, other]) == [f"{r.mixer} {r.fingerprint[:6]}" for r in (first, other)]


# ------------------------------------------------------------------ figures


def written(path, diagnoses):
    paths = [p for n, f in spectra.figures(diagnoses).items() for p in figures.save(f, path / n)]
    return {p.name: p.read_bytes() for p in paths}


def test_equal_data_give_equal_bytes_and_other_data_others(tmp_path):
    keys = randn(B, L, H, N)
    made = {"a": diagnosis(layer(delta(keys, torch.full((B, L, H), 0.3).double())))}
    first, again = written(tmp_path / "1", made), written(tmp_path / "2", made)
    assert first == again
    assert sorted(first) == [f"{n}.{e}" for n in EVERY for e in ("png", "svg")]
    unlike = delta(2 * keys, torch.full((B, L, H), 0.6).double())
    other = written(tmp_path / "3", {"a": diagnosis(layer(unlike))})
    assert all(first[name] != other[name] for name in first)
    for name, text in first.items():
        if name.endswith("svg"):
            assert ET.fromstring(text).tag.endswith("svg")
            assert b"<dc:date>" not in text


def test_what_a_layer_lacks_is_left_out(tmp_path):
    state, attention = layer(constant(0.1)), {"kind": "attention", "tokens": None}
    attention |= {"products": None, "state": None, "keys": None}
    mixed = diagnosis(layer(constant(0.1), **attention), state)
    deep = diagnosis(state, state, layer(constant(2.0)))
    assert len(written(tmp_path / "mixed", {"mixed": mixed, "deep": deep})) == 8
    bare = diagnosis(layer(constant(0.1), **attention | {"kind": "none", "reach": None}))
    assert list(written(tmp_path / "bare", {"bare": bare})) == ["reach.png", "reach.svg"]
    (drawn,) = spectra.figures({"bare": bare}).values()
    assert len(drawn.axes) == 1


def test_an_overview_has_a_column_for_all_that_there_is():
    state = layer(constant(0.1))
    looked = layer(constant(0.1), kind="attention", tokens=None, products=None, state=None)
    bare = {"kind": "none", "tokens": None, "products": None, "state": None, "reach": None}
    columns = {4: [state, looked], 1: [looked]}
    for count, layers in columns.items():
        figure = spectra.overview("made", diagnosis(*layers))
        assert len(figure.axes) == count * len(layers)
    assert spectra.overview("made", diagnosis(layer(constant(0.1), **bare))) is None


def test_a_sweep_has_its_best_runs_drawn_and_none_twice(files):
    call(*SWEEP)
    done = {f.fingerprint: f.result().validation.token_accuracy for f in folders(files)}
    (record,) = read_sweeps(files / "runs")
    written = artifacts.of_sweep(files / "runs", record)
    drawn = [f for f in folders(files) if (f.figures / "spectrum.png").exists()]
    for mixer in ("efla(heads=2)", "deltanet(heads=2)"):
        (own,) = (f.fingerprint for f in drawn if f.run().mixer == mixer)
        rest = [done[f.fingerprint] for f in folders(files) if f.run().mixer == mixer]
        assert done[own] == max(rest)
    assert len(drawn) == 2
    assert len(written) == 1 + 2 * len(drawn)
    again = artifacts.of_sweep(files / "runs", record)
    assert [path.name for path in again] == ["leaderboard.png"]
    scalars = json.loads((drawn[0].figures / "spectrum.json").read_text())
    assert 0 < scalars["spectrum/layer0/eigenvalue_mean"] < 1


def test_extremes_can_be_drawn(tmp_path):
    grown = constant(-50.0)  # singular values up to exp(1000)
    forgotten = layer(constant(math.inf), gain=Gain(torch.zeros(B, L), torch.full((B, L), 1e30)))
    made = {"grown": diagnosis(layer(grown)), "forgotten": diagnosis(forgotten)}
    assert len(written(tmp_path, made)) == 8
    broken = LayerDiagnosis(mixer="m", kind="state", finite=False, gain=forgotten.gain)
    nan = Gain(torch.full((B, L), math.nan), torch.full((B, L), math.inf))
    assert written(tmp_path, {"broken": Diagnosis(layers=[broken], gain=nan)})


def test_more_runs_than_can_be_told_apart_are_refused():
    one = diagnosis(layer(constant(0.1)))
    many = {str(n): one for n in range(figures.MANY)}
    looks = figures.lines(list(many))
    assert len({x.color for x in looks.values()}) == len({x.dashes for x in looks.values()}) == 8
    with pytest.raises(ConfigError, match="9 runs in one figure: 8 can be told apart"):
        spectra.figures(many | {"one more": one})


def test_the_callers_settings_come_back(tmp_path):
    with matplotlib.rc_context({"axes.linewidth": 7, "savefig.dpi": 20}):
        before = dict(matplotlib.rcParams)
        written(tmp_path, {"a": diagnosis(layer(constant(0.1)))})
        assert dict(matplotlib.rcParams) == before


# ------------------------------------------------------------------ table


def test_the_table_shows_differences_from_one_run():
    made = {
        "one": {"spectrum/x": 1.0, "spectrum/layer0/x": 1.5, "spectrum/layer10/y": 4.0},
        "two": {"spectrum/x": 3.0, "spectrum/layer0/x": 1.25, "spectrum/layer2/y": 7.0},
    }
    table = tables.spectra(made, "one")
    written = zip(*renderers.cells(table), strict=True)
    columns = {c.name: list(words) for c, words in zip(table.columns, written, strict=True)}
    assert columns[""] == ["layer0/x", "layer2/y", "layer10/y", "x"]
    assert columns["one"] == ["1.5", "", "4", "1"]
    assert columns["two"] == ["1.25", "7", "", "3"]
    assert columns["difference"] == ["-0.25", "", "", "+2"]
    assert len(tables.spectra(made, None).columns) == 4


# ------------------------------------------------------------------ the command


def test_the_command_prints_a_table_and_writes_figures(files):
    call(*SWEEP)
    first, _, second, _ = folders(files)
    arguments = ["spectrum", first.fingerprint[:6], second.fingerprint, "--examples", "3"]
    done = call(*arguments, "--against", second.fingerprint[:8], "--to", "a/b")
    paths = [line for line in done.stdout.splitlines() if line.startswith("a/b")]
    assert paths == [
        f"a/b/{name}.{ending}"
        for name in ("eigenvalues", "exactness", "forgetting", "state", "reach")
        for ending in ("png", "svg")
    ]
    assert all((files / path).stat().st_size > 5_000 for path in paths)
    for words in ("efla(heads=2)", "deltanet(heads=2)", "difference", "layer0/x_mean"):
        assert words in done.stdout
    assert done.stderr == ""
    call(*arguments, "--against", second.fingerprint, "--to", "c")
    for path in paths:
        assert (files / path).read_bytes() == (files / path.replace("a/b", "c")).read_bytes()


def test_examples_are_the_beginning_of_the_test_split_and_the_seed_moves_gains(files):
    run = tiny(train__steps=2, train__eval_every=1)
    folder = RunFolder(files / "runs", run.fingerprint)
    folder.create(run)
    train(run, folder)
    few, all_, more = (spectra.diagnose(folder, n, 0) for n in (3, 32, 1000))
    for found, rows in ((few, 3), (all_, 32), (more, 32)):
        assert len(found.layers[0].gain.token) == rows
    assert torch.equal(few.layers[0].tokens.beta, all_.layers[0].tokens.beta[:3])
    assert torch.equal(all_.gain.noise, more.gain.noise)
    assert not torch.equal(all_.gain.noise, spectra.diagnose(folder, 32, 1).gain.noise)


def test_what_cannot_be_shown_is_refused_with_status_2(files):
    call(*SWEEP)
    folder, other, *_ = folders(files)
    assert "zzz: no such run" in call("spectrum", "zzz", code=2).stderr
    assert "4 runs begin so" in call("spectrum", "", code=2).stderr
    assert "no such run" in call("spectrum", other.fingerprint, "--against", "zzz", code=2).stderr
    assert "Missing argument" in call("spectrum", code=2).stderr
    assert "0 is not in the range" in call("spectrum", "a", "--examples", "0", code=2).stderr
    (folder.path / "result.json").unlink()
    refused = call("spectrum", folder.fingerprint, code=2).stderr
    assert "is interrupted; only finished runs have weights" in refused
    (files / "taken").write_text("")
    refused = call("spectrum", other.fingerprint, "--to", "taken/x", code=2).stderr
    assert "name another folder" in refused
    assert not (files / "figures").exists()


def test_no_window_system_is_asked_for_and_other_commands_do_without_matplotlib(files):
    call(*SWEEP)
    name = folders(files)[0].fingerprint
    code = (
        "import sys, mad_efla.cli\n"
        "try: mad_efla.cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('matplotlib' in sys.modules)\n"
    )
    elsewhere = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    for arguments, expected in ((["logs", name], "False"), (["spectrum", name], "True")):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=elsewhere | {"MPLBACKEND": "tkagg"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].startswith(expected)
    assert (files / "figures" / "state.svg").exists()
