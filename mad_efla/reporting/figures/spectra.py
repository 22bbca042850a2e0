"""Figures of what trained mixers do with their memory, from `spectrum.diagnose`, run beside run.

    eigenvalues   what a token leaves of the state along its key, head by head
    exactness     what each way to integrate the delta rule gets wrong on these keys
    forgetting    x of single tokens; what products of transitions leave; how long heads remember
    state         directions in use over time; singular values at the end; spread of the keys
    reach         how far back outputs look, attention's too; gain of each layer
    overview      of one run: products, rank, reach and eigenvalues in one figure

Rows are layers. A mixer is shown wherever a quantity exists for it, and a figure that would be
empty is not drawn. Colour and dashes name the run, the same in all figures.
"""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mad_efla import spectrum
from mad_efla.config import ConfigError
from mad_efla.plan.run import RunConfig
from mad_efla.reporting.figures import Line, lines, style
from mad_efla.reporting.figures.layers import GREY, draw, drawn_looks, explain, line_notes, note, page, plain_numbers
from mad_efla.reporting.figures.quantities import FORGETTING, REACH, STATE
from mad_efla.reporting.figures.quartiles import gain_size
from mad_efla.reporting.figures.tokens import eigenvalues, exactness, integrated, strip_column
from mad_efla.runs.archive import ArchivedRun
from mad_efla.runs.folder import RunFolder
from mad_efla.spectrum import Diagnosis, LayerDiagnosis
from mad_efla.training import data, model

_OVERVIEW = [FORGETTING[1], STATE[0], REACH[0]]
_ROOM = 2.15  # inches for a column of an overview


def diagnose(folder: RunFolder | ArchivedRun, examples: int, seed: int) -> Diagnosis:
    """Diagnose a finished run on the beginning of its test split, on the CPU in float32.

    Args:
        folder: Of the run.
        examples: Sequences; no more than its test split has are taken.
        seed: Draws the noise and the replaced token.

    Raises:
        ConfigError: The run has no weights to look at.
    """
    run, status = folder.run(), folder.status()
    if status != "finished":
        raise ConfigError(f"{folder.fingerprint}: is {status}; only finished runs have weights")
    sizes = {"train_examples": 1, "validation_examples": 1}  # the test split is drawn before them
    sizes["test_examples"] = min(examples, run.data.test_examples)
    test = data.make(run.task, run.seed, run.data.model_copy(update=sizes)).test
    built = model.build(run)
    built.load_state_dict(folder.load_model())
    generator = torch.Generator().manual_seed(seed)
    return spectrum.diagnose(built.eval(), torch.as_tensor(test.inputs), generator=generator)


def names(runs: list[RunConfig]) -> list[str]:
    """Name each run by its mixer and by what else tells it from the others."""
    columns = [
        [run.task.name for run in runs],
        [run.setting for run in runs],
        [f"lr={run.optim.lr:g}" for run in runs],
        [f"seed={run.seed}" for run in runs],
    ]
    told = [column for column in columns if len(set(column)) > 1]
    found = [" ".join(parts) for parts in zip([run.mixer for run in runs], *told, strict=True)]
    return [
        name if found.count(name) == 1 else f"{name} {run.fingerprint[:6]}"
        for name, run in zip(found, runs, strict=True)
    ]


def figures(diagnoses: dict[str, Diagnosis]) -> dict[str, Figure]:
    """Draw every figure that has something to show.

    Args:
        diagnoses: By the runs' names, in the order of the legend.

    Raises:
        ConfigError: There are more runs than can be told apart.
    """
    looks = lines(list(diagnoses))
    depth = max(len(d.layers) for d in diagnoses.values())
    rows = [{name: d.layers[i] for name, d in diagnoses.items() if i < len(d.layers)} for i in range(depth)]
    found = {}
    with style():
        if any(layer.tokens for row in rows for layer in row.values()):
            found["eigenvalues"] = eigenvalues(rows)
        if any(integrated(layer) for row in rows for layer in row.values()):
            found["exactness"] = exactness(rows)
        for name, every in (("forgetting", FORGETTING), ("state", STATE)):
            panels = [p for p in every if any(p.parts(row) for row in rows)]
            if panels:
                figure, grid = page(len(panels), depth)
                draw(figure, grid, panels, rows, looks)
                explain(figure, drawn_looks(panels, rows, looks), line_notes(looks))
                found[name] = figure
        found["reach"] = _reach(rows, diagnoses, looks)
    return found


def overview(name: str, diagnosis: Diagnosis) -> Figure | None:
    """Draw the most telling of these for one run; None where its mixers have nothing to show."""
    looks, rows = lines([name]), [{name: layer} for layer in diagnosis.layers]
    panels = [p for p in _OVERVIEW if any(p.parts(row) for row in rows)]
    strips = any(layer.tokens for layer in diagnosis.layers)
    if not panels:
        return None
    with style():
        figure, grid = page(len(panels), len(rows), wide=strips)
        figure.set_figwidth(_ROOM * max(2, len(panels) + strips))
        draw(figure, grid, panels, rows, looks)
        if strips:
            strip_column(figure, grid, len(panels), diagnosis)
        figure.suptitle(name, fontsize="medium", weight="bold")
        rings = any(layer.kind == "attention" for layer in diagnosis.layers)
        note(figure, [*line_notes(looks), *(["rings: attention, by its own weights"] * rings)])
    return figure


def _reach(rows: list[dict[str, LayerDiagnosis]], diagnoses: dict[str, Diagnosis], looks: dict[str, Line]) -> Figure:
    """Draw reach, where there is any, and gain beside it."""
    panels = [p for p in REACH if any(p.parts(row) for row in rows)]
    figure, grid = page(len(panels), len(rows), wide=1)
    draw(figure, grid, panels, rows, looks)
    _gains(figure.add_subplot(grid[:, -1]), diagnoses, looks)
    notes = line_notes(looks) if panels else []
    if any(layer.kind == "attention" for row in rows for layer in row.values()):
        notes.append("rings: attention, by its own weights")
    explain(figure, looks, [*notes, "points and bars: medians and quartiles over sequences"])
    return figure


def _gains(ax: Axes, diagnoses: dict[str, Diagnosis], looks: dict[str, Line]) -> None:
    """Draw the gain of each layer and of the model, a row each; the runs one under the other."""
    depth = max(len(d.layers) for d in diagnoses.values())
    apart = 0.12 / len(diagnoses)
    for n, (name, found) in enumerate(diagnoses.items()):
        shift = ((n + 0.5) / len(diagnoses) - 0.5) * 0.8
        places = [*enumerate(layer.gain for layer in found.layers), (depth, found.gain)]
        for i, gain in places:
            for size, y, face in (
                (gain_size(gain.token), i + shift - apart, looks[name].color),
                (gain_size(gain.noise), i + shift + apart, "white"),
            ):
                ax.hlines(y, size.low, size.high, color=looks[name].color, linewidth=1)
                ax.plot(
                    size.middle,
                    [y],
                    "D",
                    color=looks[name].color,
                    markerfacecolor=face,
                    markersize=3.5,
                    markeredgewidth=0.8,
                )
    ax.axvline(1, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    if high < 32 * low:
        ax.set_xscale("log", base=2)
    plain_numbers(ax.xaxis)
    ax.set_yticks(range(depth + 1), [*(f"layer {i}" for i in range(depth)), "model"])
    ax.set_ylim(depth + 0.5, -0.5)
    for i in range(depth):
        ax.axhline(i + 0.5, color="0.85", linewidth=0.6, zorder=0)
    ax.tick_params("y", length=0)
    ax.set_title("gain of a change of its input,\nruns in the legend's order", loc="left")
    ax.set_xlabel("out over in, both relative\n(filled: a token, hollow: noise)")
