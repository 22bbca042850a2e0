"""The forms of a training step are one step: on a CPU all that can be shown without a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mad_efla.mixers
from mad_efla import plugins
from mad_efla.runs.folder import RunFolder
from mad_efla.tasks import IGNORE
from mad_efla.training import loop, model, step
from tests.tiny import tiny

RATE = 2.0**-7  # a float32, so that a tensor holds it exactly


def loop_of(run, tmp_path, name="run"):
    folder = RunFolder(tmp_path / name, run.fingerprint)
    folder.create(run)
    return loop.Loop(run, folder, torch.device("cpu"))


def made(run, tmp_path, form, steps=12, **options):
    """Make steps of a run in a form, over full and smaller batches; return losses and weights."""
    loop = loop_of(run, tmp_path)
    loop.stepper = step.FORMS[form](loop.model, run.train, run.optim, *loop.splits["train"], **options)
    for _ in range(steps):
        loop.train_step()
    return torch.stack(loop.losses), dict(loop.model.named_parameters())


def equal(first, second):
    (losses, weights), (others, theirs) = first, second
    return torch.equal(losses, others) and all(torch.equal(weights[k], theirs[k]) for k in weights)


def again(run):
    """A capture that stands in for CUDA's: its replay computes anew from the same buffers."""
    run()
    return run


# All positions are scored, so nothing is padded; 64 examples in batches of 24 leave one of 16.
WHOLE = {"train__loss": "sequence", "train__batch_size": 24, "optim__lr": RATE}
WHOLE |= {"optim__schedule": "constant", "optim__weight_decay": 0.1, "optim__grad_clip": 0.5}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["static", "graph"])
def test_the_forms_give_equal_bits_where_nothing_is_padded(tmp_path, form, precision):
    run = tiny(train__precision=precision, **WHOLE)
    options = {"capture": again} if form == "graph" else {}
    assert equal(made(run, tmp_path, form, **options), made(run, tmp_path, "plain"))


@pytest.mark.parametrize("form", ["static", "graph"])
def test_the_forms_differ_by_rounding_where_rows_are_padded(tmp_path, form):
    run = tiny(optim__schedule="cosine")
    options = {"capture": again} if form == "graph" else {}
    losses, weights = made(run, tmp_path, form, **options)
    expected, wanted = made(run, tmp_path, "plain")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    start = dict(model.build(run).named_parameters())
    off = sum((weights[k] - wanted[k]).square().sum() for k in wanted)
    moved = sum((wanted[k] - start[k]).square().sum() for k in wanted)
    assert (off / moved).sqrt() < 1e-3


def test_each_number_of_rows_is_captured_once(tmp_path):
    captured = []

    def capture(run):
        captured.append(len(captured))
        return again(run)

    made(tiny(**WHOLE), tmp_path, "graph", steps=18, capture=capture)
    assert len(captured) == 2


def test_a_replay_that_does_something_else_is_refused(tmp_path):
    def stale(run):
        value = run()
        return lambda: value

    def broken(run):
        return lambda: run() * float("nan")

    for capture in (stale, broken):
        with pytest.raises(RuntimeError, match="something else when it is replayed"):
            made(tiny(**WHOLE), tmp_path, "graph", capture=capture)

    def failing(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match=r"cannot be captured .* MAD_EFLA_STEP=plain trains"):
        made(tiny(**WHOLE), tmp_path, "graph", capture=failing)


def test_a_run_goes_on_in_another_form(tmp_path):
    run = tiny(**WHOLE)
    whole = made(run, tmp_path, "plain")
    first = loop_of(run, tmp_path, "parts")
    first.stepper = step.Static(first.model, run.train, run.optim, *first.splits["train"])
    first.optimizer = first.stepper.optimizer
    for _ in range(5):
        first.train_step()
    first._save()
    second = loop_of(run, tmp_path, "parts")
    assert second.step == 5
    for _ in range(7):
        second.train_step()
    assert equal((torch.stack(second.losses), dict(second.model.named_parameters())), whole)


class Waits(TorchDispatchMode):
    """Note operators whose result has a size or value that the host waits for."""

    NAMES = ("nonzero", "_local_scalar_dense", "masked_select", "bincount", "unique", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        masks = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        if name.strip("_") in {n.strip("_") for n in self.NAMES} or any(
            m is not None and m.dtype == torch.bool for m in masks
        ):
            self.seen.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mixer", plugins.names(mad_efla.mixers))
def test_a_static_step_waits_for_nothing(tmp_path, mixer, monkeypatch):
    loop = loop_of(tiny(mixers=[mixer], model__width=64, optim__grad_clip=1.0), tmp_path)
    plain = loop.stepper
    static = step.Static(loop.model, loop.run.train, loop.run.optim, *loop.splits["train"])
    seen = []
    for form in (static, plain):
        form(torch.arange(4), RATE)
        with Waits() as mode:
            form.update(torch.arange(4, 8))
        seen.append(mode.seen)
    assert seen[0] == set()
    assert seen[1], "the plain step selects by a mask, which this test must notice"


def test_scored_positions_come_first_and_in_order():
    i = IGNORE
    targets = torch.tensor([[i, 4, i, 5, 6], [7, i, i, i, 8], [i, i, 9, i, i]], dtype=torch.int8)
    positions, answers = step.padded(targets)
    assert positions.tolist() == [[1, 3, 4], [0, 4, 0], [2, 0, 0]]
    assert answers.tolist() == [[4, 5, 6], [7, 8, i], [9, i, i]]


def test_the_form_is_named_by_the_variable(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert step.form(cpu) == step.form(cuda) == "plain"
    monkeypatch.setenv(step.VARIABLE, "static")
    assert step.form(cpu) == step.form(cuda) == "static"
    monkeypatch.setenv(step.VARIABLE, "graph")
    assert step.form(cuda) == "graph"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        step.form(cpu)
    monkeypatch.setenv(step.VARIABLE, "grpah")
    with pytest.raises(ValueError, match="'grpah' must be one of plain, static, graph"):
        step.form(cpu)
