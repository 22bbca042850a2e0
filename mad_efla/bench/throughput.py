"""Training steps per second of a device, in every way to make many runs there.

    form      one run in one process: plain, static, graph (see `step.py`)
    shared    N processes with a run each, as `--per-device N` has it
    stacked   N runs of one shape in one program: their weights stacked, `torch.func.vmap` over them

The first setting of each mixer is measured in all of these, the others in the form that runs train
by; the time of a whole plan follows. Every measurement is a mapping, to be written as a JSON line.
Steps count per run: 4 runs that make 100 steps each in a second are 400.
"""

import functools
import platform
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from mad_efla.execution import processes
from mad_efla.plan.run import RunConfig
from mad_efla.runs.folder import RunFolder
from mad_efla.tasks import IGNORE
from mad_efla.training import devices, model, step
from mad_efla.training.loop import Loop

CHECKED = 20  # steps after which a form's weights are held against those of the plain one
_WARM_UP = 2 * step.WARM_UP

Row = dict[str, Any]


def measure(runs: list[RunConfig], device: str, seconds: float, at_once: list[int]) -> Iterator[Row]:
    """Measure runs of a plan, and estimate the time of them all.

    Args:
        runs: All runs of the plan; one of each mixer and setting is measured.
        device: `cpu` or `cuda`.
        seconds: To time each measurement for.
        at_once: Numbers N of runs to share the device, and to be stacked.

    Yields:
        Measurements, then an estimate for each mixer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shapes: dict[str, dict[tuple[str, str], RunConfig]] = {}
        for run in runs:
            shapes.setdefault(run.mixer, {}).setdefault((run.task.name, run.setting), run)
        for mixer, found in shapes.items():
            own = [r for r in runs if r.mixer == mixer]
            yield from _mixer(own, found, device, seconds, at_once)
    finally:
        torch.set_num_threads(threads)


def _mixer(
    runs: list[RunConfig], shapes: dict[tuple[str, str], RunConfig], device: str, seconds: float, at_once: list[int]
) -> Iterator[Row]:
    used = step.form(torch.device(device))
    speeds: dict[tuple[str, str], float] = {}
    gains = {"alone": 1.0}
    for key, run in shapes.items():
        whole = not speeds
        forms = [f for f in step.FORMS if device == "cuda" or f != "graph"] if whole else [used]
        for row in _forms(run, device, seconds, forms):
            yield row
            if row["how"] == used:
                speeds[key] = row.get("steps_per_second", 0.0)
        if not whole or not speeds[key]:
            continue
        for how, ways in (("shared", _shared), ("stacked", _stacked)):
            for n in at_once:
                measured = functools.partial(ways, run, n, device, seconds)
                row = _tried(run, device, how, measured)
                row["runs"] = n
                yield row
                gains[f"{n} {how}"] = row.get("steps_per_second", 0.0) / speeds[key]
    yield _estimate(runs, speeds, gains, device)


def _estimate(runs: list[RunConfig], speeds: dict[tuple[str, str], float], gains: dict[str, float], device: str) -> Row:
    """Estimate the training steps of all runs; evaluations and data are left out."""
    possible = {way: gain for way, gain in gains.items() if not way.endswith("stacked")}
    best = max(possible, key=lambda way: possible[way])
    row = _label(runs[0], device) | {"kind": "estimate", "runs": len(runs)}
    del row["setting"], row["task"]
    row |= {"steps": sum(r.steps for r in runs), "best": best, "gains": gains}
    if all(speeds.values()):
        alone = sum(r.steps / speeds[r.task.name, r.setting] for r in runs)
        row |= {"hours_alone": alone / 3600, "hours": alone / 3600 / possible[best]}
    return row


def _forms(run: RunConfig, device: str, seconds: float, names: list[str]) -> Iterator[Row]:
    with TemporaryDirectory() as scratch:
        loop = _loop(run, Path(scratch), device)
        plain: dict[str, Tensor] | None = None
        for name in names:

            def timed(name: str = name) -> Row:
                nonlocal plain
                loop.model = model.build(run).to(device)
                start = _weights(loop.model)
                data = loop.splits["train"]
                loop.step = 0
                loop.stepper = step.FORMS[name](loop.model, run.train, run.optim, *data)
                for _ in range(CHECKED):
                    loop.train_step()
                weights = _weights(loop.model)
                plain = plain or weights
                found: Row = {"steps_per_second": _speed(loop.train_step, device, seconds)}
                if len(names) > 1:
                    off, moved = _distance(weights, plain), _distance(plain, start)
                    found["off_plain"] = off / moved
                loop.losses.clear()
                return found

            yield _tried(run, device, name, timed)


def _tried(run: RunConfig, device: str, how: str, measured: Callable[[], Row]) -> Row:
    row = _label(run, device) | {"kind": "steps", "how": how, "runs": 1}
    try:
        return row | measured()
    except Exception as error:  # one way's failure is a result, not the end
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _label(run: RunConfig, device: str) -> Row:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    return {
        "machine": name,
        "torch": torch.__version__,
        "task": run.task.name,
        "setting": run.setting,
        "mixer": run.mixer,
        "batch": run.train.batch_size,
        "length": run.task.input_length,
        "vocabulary": run.task.vocabulary,
        "width": run.model.width,
        "precision": run.train.precision,
    }


def _loop(run: RunConfig, scratch: Path, device: str) -> Loop:
    folder = RunFolder(scratch, run.fingerprint)
    folder.create(run)
    return Loop(run, folder, torch.device(device))


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in module.named_parameters()}


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name] - b[name]).double().square().sum() for name in a)) ** 0.5


def _speed(make: Callable[[], object], device: str, seconds: float) -> float:
    """Count steps per second, over at least `seconds` and 5 steps."""
    for _ in range(_WARM_UP):
        make()
    _wait(device)
    steps, begun = 0, time.perf_counter()
    while steps < 5 or time.perf_counter() - begun < seconds:
        make()
        steps += 1
        if steps % 10 == 0:
            _wait(device)  # as the loop does when it logs
    _wait(device)
    return steps / (time.perf_counter() - begun)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------ several processes


def _shared(run: RunConfig, n: int, device: str, seconds: float) -> Row:
    ready, speeds = processes.context.Barrier(n), processes.context.SimpleQueue()
    workers = [
        processes.start(_share, _seeded(run, i), device, seconds, ready, speeds, device=device) for i in range(n)
    ]
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"{sum(bool(w.exitcode) for w in workers)} of {n} processes failed")
    return {"steps_per_second": sum(speeds.get() for _ in workers)}


def _share(
    environment: dict[str, str], run: RunConfig, device: str, seconds: float, ready: Barrier, speeds: Any
) -> None:
    processes.begin(environment, signal.SIG_DFL)
    torch.set_num_threads(1)
    if device == "cuda":
        devices.take()
    with TemporaryDirectory() as scratch:
        try:
            loop = _loop(run, Path(scratch), device)
            for _ in range(_WARM_UP):
                loop.train_step()
            _wait(device)
            ready.wait(300)  # nobody is timed while another still starts
            speeds.put(_speed(loop.train_step, device, seconds))
        except BaseException:
            ready.abort()  # the others wait for nobody
            raise


def _seeded(run: RunConfig, i: int) -> RunConfig:
    return run.model_copy(update={"seed": run.seed + i})


# ------------------------------------------------------------------ one program


class Stacked:
    """A step of several runs of one shape at once: weights stacked, the model mapped over them.

    Runs may differ in data and weights, not in the fields of the optimiser.

    Args:
        steps: A static step of each run, before its first.
    """

    def __init__(self, steps: list[step.Static]):
        if any(s.optim.grad_clip is not None for s in steps):
            raise ValueError("optim.grad_clip: a stacked step has no norm of each run; leave it out")
        self.steps, first = steps, steps[0]
        columns = [dict(s.module.named_parameters()) for s in steps]
        self.parameters = {
            name: torch.stack([c[name].detach() for c in columns]).requires_grad_() for name in columns[0]
        }
        decayed = [name for name, x in columns[0].items() if x.ndim >= 2]
        others = [name for name in columns[0] if name not in decayed]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.parameters[n] for n in names], "weight_decay": decay}
                for names, decay in ((decayed, first.optim.weight_decay), (others, 0.0))
            ],
            lr=first.rate,
            betas=first.optim.betas,
            fused=True,
            capturable=first.capturable,
        )
        K = max(s.positions.shape[1] for s in steps)
        self.data = [(s.inputs, _widened(s.positions, K, 0), _widened(s.answers, K, IGNORE)) for s in steps]
        self.gradients = vmap(grad_and_value(self._loss))

    def update(self, rows: Tensor) -> Tensor:
        """Make one step of each run on its row of row numbers; return the losses."""
        batches = [[x[own] for x in data] for data, own in zip(self.data, rows, strict=True)]
        inputs, positions, answers = (torch.stack(parts) for parts in zip(*batches, strict=True))
        gradients, losses = self.gradients(self.parameters, inputs, positions, answers.flatten(1))
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient
        self.optimizer.step()
        return losses.detach()

    def _loss(self, parameters: dict[str, Tensor], inputs: Tensor, positions: Tensor, answers: Tensor) -> Tensor:
        first = self.steps[0]
        return first.loss(lambda *x: functional_call(first.module, parameters, x), inputs, positions, answers)


def _widened(x: Tensor, width: int, value: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[1]), value=value)


def _stacked(run: RunConfig, n: int, device: str, seconds: float) -> Row:
    with TemporaryDirectory() as scratch:
        loops = [_loop(_seeded(run, i), Path(scratch), device) for i in range(n)]
        stacked = Stacked([step.Static(x.model, run.train, run.optim, *x.splits["train"]) for x in loops])
        widest = min(len(s.answers) for s in stacked.steps)
        rows = torch.arange(min(run.train.batch_size, widest), device=device).repeat(n, 1)

        def make() -> Tensor:
            return stacked.update(rows)

        for _ in range(step.WARM_UP):
            make()
        if device == "cuda":
            make = step.cuda_graph(make)
        return {"steps_per_second": n * _speed(make, device, seconds)}
