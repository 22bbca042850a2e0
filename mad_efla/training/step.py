"""One optimiser step, in three forms that call the same `update`: from batch numbers to a loss.

    plain      scored positions by a mask; the learning rate from the host. What every device runs.
    static     every shape follows from the number of rows: scored positions as numbers, padded by
               ignored targets; the learning rate in a tensor. Nothing is read back from the device.
    graph      static, captured once per number of rows as a CUDA graph, and replayed: one launch
               instead of hundreds. A capture is checked when it is made.

On a CPU plain and static give equal bits where every row has equally many scored positions and the
rate is a float32; otherwise they differ by rounding, since padded sums are partitioned otherwise.

MAD_EFLA_STEP names another form for all runs. The graph form has not been run on a GPU yet, so it
runs where it is asked for; `make gpu-train` compares and times all forms there.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mad_efla.plan.run import OptimConfig, TrainConfig
from mad_efla.tasks import IGNORE
from mad_kernels import record_backends

VARIABLE = "MAD_EFLA_STEP"
WARM_UP = 3  # steps of a number of rows before it is captured: they compile and allocate
TOLERANCE = 1e-3  # of a replayed step, relative to how far a step moves things


class Plain:
    """A step whose shapes follow the data.

    Args:
        module: The model, on its device.
        train: Precision.
        optim: AdamW's fields.
        inputs: Token ids of all examples, or real numbers, `N L`.
        targets: Their answers, `IGNORE` where nothing is scored, `N L`.
        capturable: Keep everything that a step changes on the device.

    Attributes:
        backends: Backends of operators that ran.
    """

    def __init__(
        self,
        module: nn.Module,
        train: TrainConfig,
        optim: OptimConfig,
        inputs: Tensor,
        targets: Tensor,
        *,
        capturable: bool = False,
    ):
        self.module, self.optim = module, optim
        self.half = train.precision == "bfloat16"
        self.inputs, self.targets = inputs, targets
        self.backends: set[str] = set()
        self.capturable = capturable
        self.optimizer = _adamw(module, optim, capturable)

    def __call__(self, rows: Tensor, rate: float) -> Tensor:
        """Make one step on these rows, at this learning rate; return the loss before it."""
        self.set_rate(rate)
        return self.update(rows)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of an optimiser of any form."""
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["capturable"] = self.capturable

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, where they are scored, and the answers there."""
        inputs, targets = self.inputs[rows], self.targets[rows]
        scored = targets != IGNORE
        return inputs, scored, targets[scored].long()

    def update(self, rows: Tensor) -> Tensor:
        """Make one step at the learning rate that is set."""
        inputs, scored, answers = self.batch(rows)
        self.optimizer.zero_grad(set_to_none=True)
        with record_backends() as ran:
            loss = self.loss(self.module, inputs, scored, answers)
        loss.backward()
        if self.optim.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.optim.grad_clip)
        self.optimizer.step()
        self.backends |= ran
        return loss.detach()

    def loss(self, module: Callable[..., Tensor], inputs: Tensor, scored: Tensor, answers: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch, in float32 or wider."""
        # Casts are kept for one forward; in a graph they must be made anew by each replay.
        with torch.autocast(
            inputs.device.type, dtype=torch.bfloat16, enabled=self.half, cache_enabled=not isinstance(self, Static)
        ):
            logits = module(inputs, scored)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, answers, ignore_index=IGNORE)


class Static(Plain):
    """A step whose shapes follow from the number of rows alone; arguments as of `Plain`."""

    def __init__(self, module: nn.Module, train: TrainConfig, optim: OptimConfig, inputs: Tensor, targets: Tensor):
        cuda = inputs.device.type == "cuda"
        super().__init__(module, train, optim, inputs, targets, capturable=cuda)
        # float32: the device's AdamW reads no other.
        self.rate = torch.full((), optim.lr, dtype=torch.float32, device=inputs.device)
        self._share_rate()
        self.positions, self.answers = padded(targets)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step, without waiting for the device."""
        self.rate.fill_(rate)

    def load(self, state: dict[str, Any]) -> None:
        """Take over the state of an optimiser of any form."""
        super().load(state)
        self._share_rate()

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, numbers of scored positions, and the answers there, padded."""
        return self.inputs[rows], self.positions[rows], self.answers[rows].flatten()

    def _share_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


Replay = Callable[[], Tensor]


class Graph(Static):
    """A static step that is captured and replayed; arguments as of `Plain`.

    Args:
        capture: Turns a function of static tensors into its replay; CUDA's by default.
    """

    def __init__(self, *arguments: Any, capture: Callable[[Replay], Replay] | None = None):
        super().__init__(*arguments)
        self.capture = capture or cuda_graph
        if capture is None:
            _leave_the_default_stream()
        self.calls: dict[int, int] = {}
        self.replays: dict[int, tuple[Tensor, Replay]] = {}

    def __call__(self, rows: Tensor, rate: float) -> Tensor:
        """Make one step: as it is written the first times, replayed later."""
        n = len(rows)
        self.set_rate(rate)
        if n not in self.replays:
            self.calls[n] = self.calls.get(n, 0) + 1
            if self.calls[n] <= WARM_UP:
                return self.update(rows)
            self._capture(rows)
        buffer, replay = self.replays[n]
        buffer.copy_(rows)
        return replay().clone()  # the next replay writes over it

    def _capture(self, rows: Tensor) -> None:
        """Capture the step of a number of rows, and hold a replay against the step as written.

        The replay gets other rows than the capture did: what was fixed in it by mistake shows.

        Raises:
            RuntimeError: It cannot be captured, or does something else when replayed.
        """
        weights: list[Tensor] = [*self.module.parameters()]
        moments = _tensors(self.optimizer)
        moved = [*weights, *moments]
        before = _copies(moved)
        others = len(self.inputs) - 1 - rows
        buffer = others.clone()
        try:
            wanted = self.update(buffer).clone()
            after = _copies(moved)
            _restore(moved, before)
            buffer.copy_(rows)
            replay = self.capture(lambda: self.update(buffer))
            _restore(moved, before)  # where a rehearsal's capture makes a step
            buffer.copy_(others)
            found = replay().clone()
        except torch.OutOfMemoryError:
            raise  # is no fault of the step
        except RuntimeError as error:
            raise RuntimeError(
                f"this step cannot be captured as a CUDA graph ({error}); {VARIABLE}=plain trains without"
            ) from error
        n = len(weights)
        off = (
            _off([found], [wanted], [torch.zeros_like(wanted)]),
            _off(weights, after[:n], before[:n]),
            _off(moments, after[n:], before[n:]),
        )
        _restore(moved, before)
        same = all(x <= TOLERANCE for x in off)  # which a NaN is not
        if not same and torch.isfinite(wanted):  # else it has diverged: the loop's business
            raise RuntimeError(
                "this step does something else when it is replayed as a CUDA graph (loss, weights "
                f"and moments off by {off[0]:.1e}, {off[1]:.1e}, {off[2]:.1e}): something in it "
                f"is computed on the host; {VARIABLE}=plain trains without"
            )
        self.replays[len(rows)] = buffer, replay


FORMS: dict[str, type[Plain]] = {"plain": Plain, "static": Static, "graph": Graph}


def form(device: torch.device) -> str:
    """Name the form that runs train by on a device.

    Raises:
        ValueError: MAD_EFLA_STEP names none, or one that cannot run there.
    """
    chosen = os.environ.get(VARIABLE) or "plain"
    if chosen not in FORMS:
        raise ValueError(f"{VARIABLE}={chosen!r} must be one of {', '.join(FORMS)}")
    if chosen == "graph" and device.type != "cuda":
        raise ValueError(f"{VARIABLE}='graph' needs a CUDA device, and this runs on {device}")
    return chosen


def padded(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scored positions of each row and the answers there, `N K`, K of the fullest row.

    Rows with fewer are filled with position 0 and `IGNORE`.
    """
    scored = targets != IGNORE
    K = int(scored.sum(dim=1).max())
    order = scored.long().argsort(dim=1, descending=True, stable=True)[:, :K]
    answers = targets.gather(1, order).long()
    return order.masked_fill(answers == IGNORE, 0), answers


def cuda_graph(run: Replay) -> Replay:
    """Capture a function of static tensors that ran before; return its replay."""
    _leave_the_default_stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _leave_the_default_stream() -> None:
    """Work on another stream from now on: the default one cannot be captured."""
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(side)


def _adamw(module: nn.Module, config: OptimConfig, capturable: bool) -> torch.optim.AdamW:
    """AdamW that decays matrices only, or everything, see `OptimConfig.decay`.

    A layer's mark `_no_weight_decay` on a parameter is honoured where matrices are decayed.
    """
    parameters, every = list(module.parameters()), config.decay == "all"
    decayed = [every or (p.ndim >= 2 and not getattr(p, "_no_weight_decay", False)) for p in parameters]
    groups = [
        {"params": [p for p, d in zip(parameters, decayed, strict=True) if d], "weight_decay": config.weight_decay},
        {"params": [p for p, d in zip(parameters, decayed, strict=True) if not d], "weight_decay": 0.0},
    ]
    fused = not any(p.is_complex() for p in parameters)  # the fused form knows real numbers only
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused, capturable=capturable)


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


@torch.no_grad()
def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@torch.no_grad()
def _off(found: list[Tensor], wanted: list[Tensor], before: list[Tensor]) -> float:
    """Return |found - wanted| / |wanted - before| over all tensors."""
    errors = torch.stack([(x - y).norm() for x, y in zip(found, wanted, strict=True)])
    moves = torch.stack([(x - y).norm() for x, y in zip(wanted, before, strict=True)])
    return float(errors.norm() / moves.norm().clamp_min(1e-12))
