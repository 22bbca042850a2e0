"""The GPU kernels on their device: accuracy against float64 first, then timings; unattended.

    python kernels/gpu.py             both, under 8 minutes; stops after accuracy if any case fails
    python kernels/gpu.py accuracy    values and gradients against the float64 token loop
    python kernels/gpu.py timings     ours, softmax attention and flash-linear-attention
    python kernels/gpu.py compile     registers, spills and shared memory for sm_90; needs no GPU

Every measurement is one JSON line in kernels/results/gpu.jsonl; a table goes to the terminal.
Times are medians of CUDA events, forward and backward together, in milliseconds. A token-head is
one token of one head.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import mad_kernels as mk  # noqa: E402

RESULTS = Path(os.environ.get("MAD_KERNELS_RESULTS", ROOT / "results" / "gpu.jsonl"))
DTYPES = (torch.bfloat16, torch.float32)
# B, L, H, D
TIMED = (
    (128, 128, 4, 32),
    (128, 128, 8, 16),
    (128, 128, 1, 128),
    (8, 2048, 16, 64),
    (8, 2048, 16, 128),
)
# float32 products are three tf32 ones; bfloat16 ones round their operands to tf32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
NAMES = ("o", "final_state", "q", "k", "v", "erase", "write", "log_decay", "initial_state")


def accuracy_cases() -> Iterator[tuple[str, Callable, list[Tensor | None]]]:
    """Yield a name, an operator and its tensors in float64, the initial state last."""
    for decay in (False, True):
        for L in (1, 15, 16, 17, 100):
            for Dk, Dv in ((20, 9), (16, 64), (128, 100)):
                tensors = delta_inputs(2, L, 3, Dk, Dv, decay=decay)
                yield f"delta_rule L{L} Dk{Dk} Dv{Dv} decay={decay}", mk.delta_rule, tensors
    for B, L, H, D in ((8, 128, 4, 32), (8, 128, 8, 16), (8, 128, 1, 128), (2, 512, 2, 64)):
        tensors = delta_inputs(B, L, H, D, D, decay=True)
        yield f"delta_rule B{B} L{L} H{H} D{D}", mk.delta_rule, tensors
    for kinds in (1, 4):
        tensors = delta_inputs(2, 130, 2, 32, 32, decay=False)
        k = tensors[1]
        assert k is not None
        tensors[1] = k[:, torch.arange(130) % kinds]
        tensors[3] = torch.full_like(k[..., 0], 0.999)
        yield f"delta_rule {kinds} repeated keys", mk.delta_rule, tensors
    for groups in (1, 2, 4):
        for L in (17, 128):
            yield f"ssd L{L} G{groups}", mk.ssd, ssd_inputs(2, L, 4, groups, 64, 16)


def delta_inputs(B: int, L: int, H: int, Dk: int, Dv: int, *, decay: bool) -> list[Tensor | None]:
    """Draw q, k, v, erase, write, log_decay and a state in float64."""
    g = torch.Generator().manual_seed(L)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    k = normalize(normal(B, L, H, Dk), dim=-1)
    erase, write, gate = torch.rand(3, B, L, H, generator=g, dtype=torch.float64)
    state = normal(B, H, Dk, Dv)
    log_decay = -gate.square() if decay else None
    return [normal(B, L, H, Dk), k, normal(B, L, H, Dv), erase, write, log_decay, state]


def ssd_inputs(B: int, L: int, H: int, G: int, P: int, N: int) -> list[Tensor | None]:
    """Draw x, dt, a, b, c and a state in float64."""
    g = torch.Generator().manual_seed(L)
    shapes = [(B, L, H, P), (B, L, H), (H,), (B, L, G, N), (B, L, G, N), (B, H, N, P)]
    x, dt, a, b, c, S = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    return [x, dt.abs(), -a.abs(), b, c, S]


def value_and_gradients(operator: Callable, tensors: list[Tensor | None], backend: str):
    """Run an operator and its backward for a fixed random loss."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    *arguments, S = leaves
    o, final = operator(*arguments, initial_state=S, output_final_state=True, backend=backend)
    g = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in (o, final)]
    terms = [(x.double() * w.to(x.device)).sum() for x, w in zip((o, final), weights, strict=True)]
    loss = terms[0] + terms[1]
    return [o, final, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


def check_accuracy() -> bool:
    """Compare every case on the device with the float64 token loop; say whether all are in bounds.

    Both see the same rounded inputs. Errors are relative L2.
    """
    good = True
    for dtype in DTYPES:
        worst = 0.0
        for name, operator, tensors in accuracy_cases():
            rounded = [None if x is None else x.to(dtype) for x in tensors]
            wide = [None if x is None else x.double() for x in rounded]
            device = [None if x is None else x.cuda() for x in rounded]
            want = value_and_gradients(operator, wide, "reference")
            got = value_and_gradients(operator, device, "triton")
            again = value_and_gradients(operator, device, "triton")
            errors = [
                ((x.double().cpu() - y).norm() / y.norm().clamp_min(1e-30)).item()
                for x, y in zip(got, want, strict=True)
            ]
            same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
            passed = same and max(errors) <= TOLERANCE[dtype]  # a NaN is not at most anything
            good, worst = good and passed, max(worst, *errors)
            record("accuracy", case=name, dtype=str(dtype), errors=errors, same_bits=same)
            if not passed:
                show = ", ".join(f"{error:.1e}" for error in errors)
                print(f"FAILED {name} {dtype}: equal bits {same}, errors {show}")
        print(f"accuracy {dtype}: worst error {worst:.1e}, allowed {TOLERANCE[dtype]:.0e}")
    return good


def contenders(
    B: int, L: int, H: int, D: int, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and one forward and backward of every operator that runs here."""
    drawn = delta_inputs(B, L, H, D, D, decay=True)
    q, k, v, erase, write, decay = (
        x.to("cuda", dtype).requires_grad_() for x in drawn[:6] if x is not None
    )
    d_o = torch.randn_like(v)
    leaves = [q, k, v, erase, write, decay]

    def step(operator: Callable[[], Tensor], leaves: list[Tensor], d_o: Tensor = d_o):
        return lambda: torch.autograd.grad(operator(), leaves, d_o)

    def ours(*gates: Tensor) -> Callable[[], Tensor]:
        return lambda: mk.delta_rule(q, k, v, erase, write, *gates, backend="triton")[0]

    yield "ours", step(ours(), leaves[:5])
    yield "ours, decay", step(ours(decay), leaves)
    heads = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    d_heads = d_o.transpose(1, 2).contiguous()
    yield (
        "sdpa",
        step(
            lambda: scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True),
            heads,
            d_heads,
        ),
    )
    try:
        from fla.ops.delta_rule import chunk_delta_rule  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    if dtype == torch.bfloat16:  # it refuses float32
        yield "fla", step(lambda: chunk_delta_rule(q, k, v, erase)[0], leaves[:4])


def milliseconds(run: Callable[[], object], repeats: int = 30) -> float:
    """Give the median time of `run` by CUDA events, after 5 runs to warm up."""
    for _ in range(5):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def as_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Capture `run` as a CUDA graph, and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def take_timings() -> None:
    """Time every contender at every shape and dtype, eager and as a CUDA graph."""
    print(f"{'shape':<20}{'dtype':<10}{'operator':<14}{'eager ms':>10}{'graph ms':>10}{'ns/th':>8}")
    for B, L, H, D in TIMED:
        for dtype in DTYPES:
            for name, run in contenders(B, L, H, D, dtype):
                times: dict[str, float | str] = {}
                try:
                    times["eager"] = milliseconds(run)
                    times["graph"] = milliseconds(as_graph(run))
                except RuntimeError as error:  # one contender's failure is a result, not the end
                    times["error"] = str(error).splitlines()[0]
                shape, short = f"B{B} L{L} H{H} D{D}", str(dtype).removeprefix("torch.")
                record("timing", shape=shape, dtype=short, operator=name, milliseconds=times)
                print(timing_row(shape, short, name, times, B * L * H))


def timing_row(shape: str, dtype: str, name: str, times: dict, token_heads: int) -> str:
    """Lay out one line of the table."""
    cells = [
        f"{times[mode]:>10.3f}" if mode in times else f"{'-':>10}" for mode in ("eager", "graph")
    ]
    best = times.get("graph", times.get("eager"))
    each = f"{best / token_heads * 1e6:>8.2f}" if best else f"{'-':>8}"
    return f"{shape:<20}{dtype:<10}{name:<14}{''.join(cells)}{each}  {times.get('error', '')}"


def compile_for_hopper(width: int | None) -> list[dict]:
    """Compile the table's kernels for sm_90 and read their resources; no GPU is needed.

    A width that is not None picks one row of the table.
    """
    from mad_kernels.delta_rule import triton as kernels

    rows = []
    picked = {D: tiles for D, tiles in kernels.TILES.items() if width in (None, D)}
    for D, tiles in picked.items():
        for dtype in DTYPES:
            for decay in (False, True):
                pair = (kernels.forward_kernel, kernels.backward_kernel)
                for kernel, tile in zip(pair, tiles, strict=True):
                    direction = "forward" if kernel is pair[0] else "backward"
                    flags: dict[str, bool | int | str] = {
                        "SAVE": True,
                        "FINAL": True,
                        "ERASE": True,
                        "DECAY": decay,
                    }
                    widths = {"H": 4, "G": 4, "Dk": D, "Dv": D, "BK": D, "BV": min(D, tile.columns)}
                    known = flags | widths | {"C": tile.C, "LEVELS": tile.C.bit_length() - 1}
                    known["PRODUCT"] = kernels.PRODUCTS[dtype]
                    used = resources(kernel, known, dtype, tile.warps, tile.stages)
                    label = {"D": D, "dtype": str(dtype).removeprefix("torch."), "decay": decay}
                    rows.append(label | {"kernel": direction, **tile._asdict(), **used})
    return rows


def resources(
    kernel, known: dict[str, bool | int | str], dtype: torch.dtype, warps: int, stages: int
) -> dict[str, int]:
    """Compile one kernel and ask the assembler for registers, spills and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = {name: known[name] for name in kernel.arg_names if name in known}
    wide = re.compile(r"(state|final|states|U|T|d_state|d_final)_ptr")
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in known:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            short = "fp32" if wide.fullmatch(name) or dtype == torch.float32 else "bf16"
            signature[name] = f"*{short}"
        else:
            signature[name] = "i32"
        if name.endswith("_ptr"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.ptx"
        code.write_text(built.asm["ptx"])
        command = [ptxas, "-v", "-arch=sm_90a", code, "-o", code.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [re.search(p, report) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    registers, spills = (int(match[1]) if match else -1 for match in found)
    return {"registers": registers, "spill_bytes": spills, "shared_bytes": built.metadata.shared}


def report_compilation(width: int | None) -> bool:
    """Print and record the resources of every kernel of the table; say whether none spills."""
    rows = compile_for_hopper(width)
    print("  ".join(rows[0]))
    for row in rows:
        record("compile", **row)
        print("  ".join(str(x).ljust(len(name)) for name, x in row.items()))
    return all(row["spill_bytes"] == 0 for row in rows)


def record(kind: str, **fields: object) -> None:
    """Append one JSON line to the results."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"kind": kind, "machine": machine, **fields}) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 means a check failed, 2 that it could not run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = ("all", "accuracy", "timings", "compile")
    parser.add_argument("what", nargs="?", default="all", choices=choices)
    parser.add_argument("--width", type=int, choices=(16, 32, 64, 128), help="of heads to compile")
    given = parser.parse_args(arguments)
    what = given.what
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("gpu.py: TRITON_INTERPRET=1 interprets kernels on the CPU: unset it", file=sys.stderr)
        return 2
    if what == "compile":
        return 0 if report_compilation(given.width) else 1
    if not torch.cuda.is_available():
        print(f"gpu.py: {what} needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    if what in ("all", "accuracy") and not check_accuracy():
        print("gpu.py: stopped, no timing of kernels that are wrong", file=sys.stderr)
        return 1
    if what in ("all", "timings"):
        take_timings()
    return 0


if __name__ == "__main__":
    sys.exit(main())
