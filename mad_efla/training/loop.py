"""The training loop: one run, from its configuration to its result.

Every random number comes from the run's seed: the data, the initial weights, the order of examples,
and what layers draw while they train. Scores are taken in evaluation mode.
A run that is stopped writes where it stands and goes on from there; on a CPU, with the same number
of threads, it then ends with the same weights, bit for bit.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mad_efla.plan.run import OptimConfig, RunConfig
from mad_efla.runs.files import now
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.schema import ProbeScore, Result, Row, Scores
from mad_efla.tasks import IGNORE
from mad_efla.training import data, data_cache, devices, model, randomness, step
from mad_efla.training.metrics import Tally

LOG_EVERY = 10  # steps between logged training losses
CHECKPOINT_SECONDS = 60.0
SPECTRUM_LOGS = 16  # at most this many per run, each a tenth of an evaluation
_LOOKED_AT = 2  # sequences of the validation split

Look = Callable[[model.Backbone, Tensor], dict[str, float]]
"""Takes scalars of what the mixers of a model do with their memory on some inputs."""


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Diverged(Exception):
    """The loss stopped being finite at this step."""

    def __init__(self, step: int):
        super().__init__(f"loss not finite at step {step}")
        self.step = step


def train(
    run: RunConfig,
    folder: RunFolder,
    *,
    device: str = "cpu",
    environment: dict[str, str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    look: Look | None = None,
) -> Result:
    """Train a run to its end, or go on with it.

    Args:
        run: What to train.
        folder: Where it stands and where it writes.
        device: `cpu` or `cuda`.
        environment: Recorded with the result.
        stop: Asked after every step; when true, a checkpoint is written and the run interrupted.
        look: Taken of the model now and then, and logged.

    Returns:
        The result, already written.

    Raises:
        Interrupted: `stop` returned true.
    """
    if device == "cuda":
        devices.take()
    with randomness.lent():
        return _train(run, folder, device, environment, stop, look)


def _train(
    run: RunConfig,
    folder: RunFolder,
    device: str,
    environment: dict[str, str] | None,
    stop: Callable[[], bool],
    look: Look | None,
) -> Result:
    loop = Loop(run, folder, torch.device(device), look)
    status, stopped = "finished", None
    try:
        stopped = loop.steps(stop)
        test, validation = loop.score()
        probes = loop.probe()
    except Diverged as error:
        status, stopped, test, validation, probes = "diverged", str(error), None, None, ()
    result = Result(
        fingerprint=run.fingerprint,
        status=status,
        test=test,
        validation=validation,
        chosen_step=loop.chosen_step if test else None,
        steps=loop.step,
        stopped=stopped,
        steps_to_90=loop.steps_to_90,
        ceiling=data.ceiling(run.task, loop.data),
        chance=data.chance(loop.data),
        parameters=model.parameter_count(loop.model),
        state_size=model.state_size(loop.model, run.task.input_length),
        seconds=round(loop.seconds, 3),
        train_seconds=round(loop.train_seconds, 3),
        spent={what: round(seconds, 4) for what, seconds in loop.spent.items()},
        data_digest=loop.data.digest,
        probes=probes,
        environment=(environment or {}) | {"backends": " ".join(sorted(loop.stepper.backends)), "step": loop.form},
        started=loop.started,
        ended=now(),
    )
    folder.finish(result)
    return result


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: Peak, warm-up, schedule and floor.
        step: From 0.
        steps: Of the whole budget.

    Source: Loshchilov and Hutter 2017, arXiv 1608.03983, Eq. 5, one period, annealed every step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    floor = min(config.min_lr, config.lr)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


class Loop:
    """The state of a run in training.

    Args:
        run: What to train.
        folder: Where it writes, and goes on from if it holds a checkpoint.
        device: Where data and model live.
        look: Taken of the model now and then, and logged.
    """

    def __init__(self, run: RunConfig, folder: RunFolder, device: torch.device, look: Look | None = None):
        self._begun = self._saved = time.perf_counter()
        self.run, self.folder, self.device = run, folder, device
        randomness.seed(run.seed)
        self.data = data_cache.load(folder.path.parent / data_cache.FOLDER, run.task, run.seed, run.data)
        self.splits = {
            split: _tensors(getattr(self.data, split), run.train.loss if split == "train" else "")
            for split in data.SPLITS
        }
        self.splits = {s: tuple(t.to(device) for t in ts) for s, ts in self.splits.items()}
        self.spent = {"data": time.perf_counter() - self._begun}  # seconds beside training steps
        self.model = model.build(run).to(device)
        self.form = step.form(device)
        self.stepper = step.FORMS[self.form](self.model, run.train, run.optim, *self.splits["train"])
        self.optimizer = self.stepper.optimizer
        self.spent["model"] = time.perf_counter() - self._begun - self.spent["data"]
        self.step = 0
        self.started = now()
        self.earlier_seconds = 0.0
        self.train_seconds = 0.0
        self.losses: list[Tensor] = []  # of the steps since the last logged one
        self.pending_seconds = 0.0  # spent in them
        self.steps_to_90: int | None = None
        self.chosen_step: int | None = None
        self.chosen_key = (-math.inf, -math.inf)
        self.chosen: dict[str, Tensor] | None = None  # None: the last weights are
        self.scored: dict[str, Scores] = {}  # what is known of them, by split
        self.stopped: str | None = None
        self.look = look  # until it fails
        randomness.seed(run.seed)  # again: data that was there already drew nothing
        self._order: tuple[int, Tensor] | None = None
        self._restore()

    # ---------------------------------------------------------------- steps

    def steps(self, stop: Callable[[], bool]) -> str | None:
        """Train to the end of the budget; return why it ended earlier, if it did."""
        while self.step < self.run.steps and self.stopped is None:
            self.train_step()
            if len(self.losses) == LOG_EVERY or self._evaluation_due():
                self._log_training()
            if self._evaluation_due():
                self._evaluate()
            if stop():
                self._save()
                raise Interrupted(f"stopped after step {self.step}")
            if time.perf_counter() - self._saved > CHECKPOINT_SECONDS:
                self._save()
        return self.stopped

    def score(self) -> tuple[Scores, Scores]:
        """Score the chosen weights on the test and validation splits."""
        if self.chosen is not None:
            self.model.load_state_dict(self.chosen)
        else:
            self.chosen_step = self.step
        for split in ("test", "validation"):
            if split not in self.scored:
                self.scored[split] = self._scores(split)
        start = time.perf_counter()
        self.folder.save_model({k: v.cpu() for k, v in self.model.state_dict().items()})
        self._spend("checkpoint", start)
        return self.scored["test"], self.scored["validation"]

    def probe(self) -> tuple[ProbeScore, ...]:
        """Score the weights on what the task tests beside its test split."""
        found = []
        for name, severity, examples in data.probes(self.run.task, self.data.test, self.run.seed):
            tally = self._tally(*(t.to(self.device) for t in _tensors(examples, "")))
            accuracy, finite = tally.accuracy()
            found.append(ProbeScore(name=name, severity=severity, accuracy=accuracy, finite=finite))
        return tuple(found)

    def train_step(self) -> None:
        """Make one optimiser step."""
        start = time.perf_counter()
        rate = learning_rate(self.run.optim, self.step, self.run.steps)
        self.losses.append(self.stepper(self._batch(), rate))
        self.step += 1
        self.pending_seconds += time.perf_counter() - start

    def _batch(self) -> Tensor:
        epoch, batch = divmod(self.step, self.run.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            rng = data.stream(self.run.seed, "order", epoch)
            order = rng.permutation(self.run.data.train_examples)
            self._order = epoch, torch.from_numpy(order).to(self.device)
        size = self.run.train.batch_size
        return self._order[1][batch * size : (batch + 1) * size]

    def _log_training(self) -> None:
        start = time.perf_counter()
        values = torch.stack(self.losses).tolist()  # the one place that waits for the device
        elapsed = self.pending_seconds + time.perf_counter() - start
        self.train_seconds += elapsed
        self.losses, self.pending_seconds = [], 0.0
        first = self.step - len(values)
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise Diverged(first + offset + 1)
        tokens = self._rows(first) * self.run.task.input_length
        self._log(
            {
                "train/loss": sum(values) / len(values),
                "train/learning_rate": learning_rate(self.run.optim, self.step - 1, self.run.steps),
                "train/tokens_per_second": tokens / elapsed,
            }
        )

    def _rows(self, first: int) -> int:
        """Count the sequences of the steps from `first` on; an epoch's last batch may be short."""
        size, examples = self.run.train.batch_size, self.run.data.train_examples
        batches = (step % self.run.steps_per_epoch for step in range(first, self.step))
        return sum(min(size, examples - batch * size) for batch in batches)

    # ----------------------------------------------------------- evaluation

    def _evaluation_due(self) -> bool:
        return self.step % self.run.eval_every == 0 or self.step == self.run.steps

    def _evaluate(self) -> None:
        train = self.run.train
        validation = self._scores("validation")
        self._log({f"val/{name}": value for name, value in validation.model_dump().items()})
        if self.steps_to_90 is None and validation.token_accuracy >= 0.9:
            self.steps_to_90 = self.step
        if self._look_due():
            self._look()
        seen = {"validation": validation}
        if train.select_split == "none":
            self.scored = seen
            return
        if train.select_split == "test":
            seen["test"] = self._scores("test")
            curve = {f"test_curve/{name}": x for name, x in seen["test"].model_dump().items()}
            self._log(curve)
        scores = seen[train.select_split]
        key = (-scores.loss, 0.0)
        if train.select_metric == "token_accuracy":
            key = (scores.token_accuracy, -scores.loss)
        if key > self.chosen_key:
            self.chosen_key, self.chosen_step, self.scored = key, self.step, seen
            self.chosen = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        reached = getattr(scores, train.stop_metric)
        if train.stop_at is not None and reached >= train.stop_at:
            name = train.stop_metric.replace("_", " ")
            self.stopped = (
                f"solved: {train.select_split} {name} {reached:.4f} reached {train.stop_at} at step {self.step}"
            )

    def _look_due(self) -> bool:
        """Spread the looks evenly over the evaluations; the last one has one."""
        every = self.run.eval_every * -(-self.run.steps // self.run.eval_every // SPECTRUM_LOGS)
        return self.look is not None and (self.step % every == 0 or self.step == self.run.steps)

    def _look(self) -> None:
        """Log what the mixers do with their memory; a mixer that cannot tell stops no run."""
        begun = time.perf_counter()
        inputs = self.splits["validation"][0][:_LOOKED_AT]
        try:
            with self._apart(), self._autocast():
                found = self.look(self.model, inputs) if self.look else {}
        except Exception as error:
            self.look = None
            warnings.warn(f"no spectrum from step {self.step} on: {error!r}", stacklevel=1)
            return
        self._spend("spectrum", begun)
        if found:
            self._log(found)

    def _scores(self, split: str) -> Scores:
        tally = self._tally(*self.splits[split])
        if not math.isfinite(tally.loss.item()):
            raise Diverged(self.step)
        return tally.scores()

    @torch.no_grad()
    def _tally(self, inputs: Tensor, targets: Tensor) -> Tally:
        begun = time.perf_counter()
        tally = Tally(self.run.task.vocabulary, self.device)
        with self._apart():
            for start in range(0, len(inputs), self.run.train.batch_size):
                rows = slice(start, start + self.run.train.batch_size)
                scored = targets[rows] != IGNORE
                with self._autocast():
                    logits = self.model(inputs[rows], scored)
                tally.add(logits, targets[rows][scored].long(), scored.nonzero()[:, 0])
        self._spend("evaluation", begun)
        return tally

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Look at the model in evaluation mode, and leave no trace in the training that goes on."""
        with randomness.untouched():
            self.model.eval()
            try:
                yield
            finally:
                self.model.train()

    def _autocast(self) -> torch.autocast:
        half = self.run.train.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)

    # ---------------------------------------------------------- persistence

    def _log(self, metrics: dict[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        start = time.perf_counter()
        self.folder.append([Row(self.step, now(), finite)])
        self._spend("logging", start)

    def _spend(self, what: str, start: float) -> None:
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Wall time of all attempts so far."""
        return self.earlier_seconds + time.perf_counter() - self._begun

    def _save(self) -> None:
        start = time.perf_counter()
        self.folder.save_checkpoint(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": randomness.state(),
                "chosen": self.chosen,
                "chosen_key": list(self.chosen_key),
                "scored": {split: scores.model_dump() for split, scores in self.scored.items()},
                **{name: getattr(self, name) for name in _COUNTERS},
                "earlier_seconds": self.seconds,
                "spent": self.spent,
                "losses": self.losses,
                "backends": sorted(self.stepper.backends),
            }
        )
        self._spend("checkpoint", start)
        self._saved = time.perf_counter()

    def _restore(self) -> None:
        state: dict[str, Any] | None = self.folder.load_checkpoint()
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.stepper.load(state["optimizer"])
        if isinstance(state["random"], dict):  # of earlier versions: torch's alone
            randomness.restore(state["random"])
        self.chosen = state["chosen"]
        self.chosen_key = tuple(state["chosen_key"])
        self.scored = {split: Scores(**scores) for split, scores in state.get("scored", {}).items()}
        self.stepper.backends |= set(state["backends"])
        self.losses = [loss.to(self.device) for loss in state["losses"]]
        self.earlier_seconds = state["earlier_seconds"]
        for name in _COUNTERS:
            setattr(self, name, state[name])
        for what, seconds in state.get("spent", {}).items():
            self.spent[what] = self.spent.get(what, 0.0) + seconds


_COUNTERS = ("step", "started", "train_seconds", "pending_seconds", "steps_to_90", "chosen_step", "stopped")


def _tensors(examples: data.Examples, loss: str) -> tuple[Tensor, Tensor]:
    """Return inputs and the targets trained or scored on."""
    targets = examples.targets
    if loss == "sequence" and examples.next_tokens is not None:
        targets = examples.next_tokens
    return torch.from_numpy(examples.inputs), torch.from_numpy(targets)
