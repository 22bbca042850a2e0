"""Benchmarks of mad_kernels on this machine: JSON lines, one per operator, backend and shape.

    python kernels/bench.py                                     every figure of the README
    python kernels/bench.py --operator delta_rule --shape 128x128x4x32 --rounds 21
    python kernels/bench.py --output kernels/results/cpu.jsonl
    python kernels/bench.py precision kernels/results/precision.png

Time is processor time of one thread, forward and backward together, float32 unless asked
otherwise; every round runs softmax attention (torch's causal scaled_dot_product_attention of the
same shape) and each backend once, in turn, and medians are reported. The ratio is what travels
between machines. Rates count the token form: the operations and the bytes that the equations ask
for, whatever a backend does instead.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import mad_kernels as mk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
GIGA = 1e9


class Case(NamedTuple):
    """One operator on one shape, B x L x H x D, with the most that its ratio may be."""

    operator: str
    shape: tuple[int, int, int, int]
    target: float | None = None


# State width of the two state spaces.
N = 16

CASES = (
    Case("delta_rule", (128, 128, 4, 32), 1.5),
    Case("delta_rule", (128, 128, 2, 64)),
    Case("delta_rule", (128, 128, 1, 128), 2.0),
    Case("delta_rule", (128, 128, 8, 16), 2.0),
    Case("delta_rule", (32, 512, 4, 32), 0.45),
    Case("gated_delta_rule", (128, 128, 4, 32)),
    Case("efla", (128, 128, 4, 32)),
    Case("dplr", (128, 128, 4, 32)),
    Case("dplr", (128, 128, 8, 16)),
    Case("ssd", (32, 128, 4, 64), 1.3),
    Case("ssd", (32, 128, 8, 32)),
    Case("selective_scan", (32, 128, 8, 32)),
)
LONG = (1, 16384, 4, 64)


@click.group(invoke_without_command=True)
@click.option("--operator", type=click.Choice(sorted({c.operator for c in CASES})))
@click.option("--shape", help="BxLxHxD, as 128x128x4x32; an operator is needed too.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--rounds", default=9, show_default=True, help="Rounds measured, after one warm-up.")
@click.option("--memory/--no-memory", default=None, help="Peak memory at L = 16,384.")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the lines here.")
@click.pass_context
def main(context, operator, shape, dtype, rounds, memory, output):
    """Print timings as JSON lines.

    Example: python kernels/bench.py --operator ssd --rounds 5
    """
    if context.invoked_subcommand:
        return
    torch.set_num_threads(1)
    lines = []

    def emit(line: dict) -> None:
        click.echo(json.dumps(line))
        lines.append(line)

    ceilings = measure_ceilings()
    about = machine() | {"dtype": dtype, "rounds": rounds}
    emit({"measure": "ceiling"} | ceilings | machine())
    for case in _wanted(operator, shape):
        for line in measure(case, DTYPES[dtype], rounds, ceilings):
            emit(line | about)
    if memory or (memory is None and operator is None):
        for backend in ("numba", "chunked"):
            emit(measure_memory(backend) | machine())
    if output:
        output.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _wanted(operator: str | None, shape: str | None) -> Sequence[Case]:
    if shape is None:
        return [case for case in CASES if operator in (None, case.operator)]
    sizes = tuple(int(part) for part in shape.split("x") if part.isdigit())
    if operator is None or len(sizes) != 4:
        raise click.UsageError(
            f"--shape {shape} is measured for one operator and has four sizes: "
            f"write --operator delta_rule --shape 128x128x4x32"
        )
    return [Case(operator, sizes)]


# ---- what is measured


def call_of(case: Case, dtype: torch.dtype, backend: str) -> tuple[Callable, list[Tensor]]:
    """Build an operator's call and its inputs, the same for every backend."""
    B, L, H, D = case.shape
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def uniform(*shape):
        return torch.rand(*shape, generator=g)

    options = {"backend": backend}
    if case.operator == "selective_scan":
        channels = H * D
        tensors = [normal(B, L, channels), uniform(B, L, channels), -uniform(channels, N) - 0.1]
        tensors += [normal(B, L, N), normal(B, L, N)]
    elif case.operator == "ssd":
        tensors = [normal(B, L, H, D), uniform(B, L, H), -uniform(H) - 0.1]
        tensors += [normal(B, L, 1, N), normal(B, L, 1, N)]
    elif case.operator == "dplr":
        b = normalize(normal(B, L, H, D), dim=-1)
        tensors = [normal(B, L, H, D) for _ in range(3)]
        tensors += [-uniform(B, L, H, D) / 8, -b * uniform(B, L, H, D), b]
    else:
        tensors = [normal(B, L, H, D), normalize(normal(B, L, H, D), dim=-1), normal(B, L, H, D)]
        scalars = {"delta_rule": 2, "efla": 1, "gated_delta_rule": 1}[case.operator]
        tensors += [uniform(B, L, H) for _ in range(scalars)]
        if case.operator == "gated_delta_rule":
            tensors.append(-uniform(B, L, H) / 8)
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    return lambda *x: getattr(mk, case.operator)(*x, **options)[0], leaves


def backends_of(operator: str) -> tuple[str, ...]:
    """Name the backends worth timing on a CPU, leaving out those that cannot run."""
    names = ("numba",) if operator == "selective_scan" else ("numba", "chunked")
    return tuple(name for name in names if name != "numba" or _version("numba"))


def attention(case: Case, dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """Build causal softmax attention of a case's shape, in the layout that suits it best."""
    B, L, H, D = case.shape
    leaves = [torch.randn(B, H, L, D).to(dtype).requires_grad_() for _ in range(3)]
    return lambda *x: scaled_dot_product_attention(*x, is_causal=True), leaves


def measure(case: Case, dtype: torch.dtype, rounds: int, ceilings: dict) -> list[dict]:
    """Time attention and every backend in turn; return a line for each backend."""
    calls = {"sdpa": attention(case, dtype)}
    calls |= {name: call_of(case, dtype, name) for name in backends_of(case.operator)}
    pulls = {name: torch.randn_like(run(*leaves)) for name, (run, leaves) in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, (run, leaves) in calls.items():
            start = time.process_time()
            torch.autograd.grad(run(*leaves), leaves, pulls[name])
            if round_:
                times[name].append(time.process_time() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    flops, numbers = _work(case)
    lines = []
    for name in list(calls)[1:]:
        gflops = flops / seconds[name] / GIGA
        gigabytes = numbers * dtype.itemsize / seconds[name] / GIGA
        lines.append(
            {
                "measure": "time",
                "operator": case.operator,
                "backend": name,
                "shape": dict(zip("BLHD", case.shape, strict=True)),
                "ms": round(seconds[name] * 1e3, 3),
                "ms_fastest": round(min(times[name]) * 1e3, 3),
                "sdpa_ms": round(seconds["sdpa"] * 1e3, 3),
                "ratio_to_sdpa": round(seconds[name] / seconds["sdpa"], 3),
                "target": case.target,
                "gflop_per_s": round(gflops, 2),
                "of_matmul": round(gflops / ceilings["matmul_gflop_per_s"], 3),
                "gb_per_s": round(gigabytes, 2),
                "of_copy": round(gigabytes / ceilings["copy_gb_per_s"], 3),
            }
        )
    return lines


def _work(case: Case) -> tuple[int, int]:
    """Count operations of the token form, forward and backward, and numbers that have to move."""
    B, L, H, D = case.shape
    tokens = B * L * H
    if case.operator == "selective_scan":
        # Per state: forward 3 multiply-adds and an exponential; backward those again and 8 more.
        return tokens * D * N * 2 * (4 + 4 + 8), tokens * (3 + 5) * D
    if case.operator == "ssd":
        # Per entry of the state: decay, write, read; their transposes, and a replay.
        return tokens * D * N * 2 * (3 + 9), tokens * (2 + 4) * D
    if case.operator == "dplr":
        # The same with a product for the decay, and d log_decay.
        return tokens * D * D * 2 * (5 + 16), tokens * (8 + 14) * D
    # Forward: recall, write, read. Backward: two sweeps of dS and a replay, three products each.
    return tokens * D * D * 2 * (3 + 9), tokens * (4 + 8) * D


def measure_ceilings() -> dict:
    """Measure this machine's matrix product and copy on one thread."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(1 << 26), torch.empty(1 << 26)
    product = min(_seconds(lambda: torch.mm(a, b)) for _ in range(4))
    copied = min(_seconds(lambda: target.copy_(source)) for _ in range(4))
    return {
        "matmul_gflop_per_s": round(2 * 2048**3 / product / GIGA, 1),
        "copy_gb_per_s": round(2 * source.nbytes / copied / GIGA, 1),
    }


def _seconds(run: Callable) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def machine() -> dict:
    """Say where a line was measured."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return {
        "machine": f"{name}, {torch.backends.cpu.get_cpu_capability()}, 1 thread",
        "torch": torch.__version__,
        "numba": _version("numba"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- memory


def measure_memory(backend: str) -> dict:
    """Run a long sequence in a process of its own and read its peak."""
    command = [sys.executable, __file__, "peak", backend]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@main.command(hidden=True)
@click.argument("backend")
def peak(backend):
    """Print the peak memory of delta_rule at L = 16,384, forward and backward."""
    torch.set_num_threads(1)
    warm = call_of(Case("delta_rule", (1, 64, 1, 16)), torch.float32, backend)
    torch.autograd.grad(warm[0](*warm[1]).sum(), warm[1])  # compiles, which has a peak of its own
    run, leaves = call_of(Case("delta_rule", LONG), torch.float32, backend)
    before = _peak_gigabytes()
    torch.autograd.grad(run(*leaves).sum(), leaves)
    line = {
        "measure": "peak_memory",
        "operator": "delta_rule",
        "backend": backend,
        "shape": dict(zip("BLHD", LONG, strict=True)),
        "dtype": "float32",
        "peak_gb": round(_peak_gigabytes(), 3),
        "before_gb": round(before, 3),
        "limit_gb": 2.0,
    }
    click.echo(json.dumps(line))


def _peak_gigabytes() -> float:
    """Read the high-water mark of this process; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / GIGA


# ---- precision


@main.command()
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--longest", default=4096, show_default=True, help="Tokens; a power of 2.")
def precision(picture, longest):
    """Draw the float32 error of every backend against length; also write it as JSON lines.

    Example: python kernels/bench.py precision kernels/results/precision.png
    """
    torch.set_num_threads(1)
    lengths = [1 << p for p in range(5, longest.bit_length())]
    lines = [line for case in PRECISION for L in lengths for line in errors(case, L)]
    text = "".join(json.dumps(line | machine()) + "\n" for line in lines)
    picture.with_suffix(".jsonl").write_text(text)
    draw(lines, picture)


PRECISION = ("delta_rule", "gated_delta_rule", "ssd", "selective_scan")


def errors(operator: str, L: int) -> list[dict]:
    """Compare float32 backends with the float64 token loop: relative L2 errors."""
    case = Case(operator, (1, L, 2, 32))
    _, leaves = call_of(case, torch.float32, "reference")
    weight = torch.randn(1, L, 2, 32, generator=torch.Generator().manual_seed(1))

    def results(backend, dtype):
        run, _ = call_of(case, dtype, backend)
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = run(*own)
        pulled = torch.autograd.grad(out, own, weight.to(dtype).view_as(out))
        return [x.double() for x in (out.detach(), *pulled)]

    truth = results("reference", torch.float64)
    lines = []
    for backend in ("reference", *reversed(backends_of(operator))):
        relative = [
            ((x - y).norm() / y.norm()).item() for x, y in zip(results(backend, torch.float32), truth, strict=True)
        ]
        line = {"measure": "error", "operator": operator, "backend": backend, "L": L}
        lines.append(line | {"outputs": relative[0], "worst_gradient": max(relative[1:])})
    return lines


def draw(lines: list[dict], picture: Path) -> None:
    """Draw errors against length: a column per operator, outputs above gradients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn

    seaborn.set_theme(style="whitegrid", context="paper", font_scale=1.05)
    names = ("reference", "chunked", "numba")
    colours = dict(zip(names, seaborn.color_palette("colorblind", 3), strict=True))
    longest = max(x["L"] for x in lines)
    marks = {"reference": "o", "chunked": "s", "numba": "^"}
    rows = {"outputs": "outputs", "worst_gradient": "worst gradient"}
    figure, axes = plt.subplots(2, len(PRECISION), figsize=(11, 5), sharex=True, sharey=True, layout="constrained")
    for column, operator in enumerate(PRECISION):
        for row, (field, title) in enumerate(rows.items()):
            axis = axes[row][column]
            for backend in colours:
                own = [x for x in lines if (x["operator"], x["backend"]) == (operator, backend)]
                if not own:
                    continue
                style = {"color": colours[backend], "marker": marks[backend], "markersize": 4}
                axis.loglog([x["L"] for x in own], [x[field] for x in own], label=backend, **style)
            axis.axhline(2e-6, color="0.3", linestyle="--", linewidth=1)
            axis.set_xscale("log", base=2)
            if row == 0:
                axis.set_title(operator)
            else:
                axis.set_xlabel("length L (tokens)")
            if column == 0:
                axis.set_ylabel(f"{title}\nrelative L2 error")
    axes[0][0].text(longest, 1.7e-6, "limit of the tests", va="top", ha="right", color="0.3")
    axes[0][0].legend(loc="center left", bbox_to_anchor=(0, 0.6), title="backend, float32")
    figure.savefig(picture, dpi=160)


if __name__ == "__main__":
    main()
