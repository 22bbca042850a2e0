"""The GPU kernels on their device: accuracy against float64 first, then timings; unattended.

    python kernels/gpu.py             both, under 8 minutes; stops after accuracy if any case fails
    python kernels/gpu.py accuracy    values and gradients against the float64 token loop
    python kernels/gpu.py timings     ours, softmax attention and flash-linear-attention
    python kernels/gpu.py compile     registers, spills and shared memory for sm_90; needs no GPU
    python kernels/gpu.py rehearse    both on tiny shapes in triton's interpreter; needs no GPU

Every measurement is one JSON line in kernels/results/gpu.jsonl; a table goes to the terminal. A
rehearsal writes none: it shows that nothing crashes, and its times are the interpreter's.
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
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

import mad_kernels as mk  # noqa: E402

RESULTS = Path(os.environ.get("MAD_KERNELS_RESULTS", ROOT / "results" / "gpu.jsonl"))
DTYPES = (torch.bfloat16, torch.float32)
# B, L, H, D: MAD's shapes, and longer ones as others time them.
TIMED = ((128, 128, 4, 32), (128, 128, 8, 16), (128, 128, 1, 128), (8, 2048, 16, 64), (8, 2048, 16, 128))
REHEARSED = ((1, 20, 2, 16),)
# float32 products are three tf32 ones; bfloat16 ones round their operands to tf32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
OPERATORS = ("delta_rule", "selective_scan", "short_conv")  # with kernels of their own
# What is float32 whatever the dtype of values: states, what is kept, shares of a gradient.
FLOAT32 = re.compile(r"(state|final|states|P|T|U|d_X|d_state|d_final|d_states|d_a|d_b|d_c|d_weight|d_bias)_ptr")
NAMES = ("o", "final_state", "q", "k", "v", "erase", "write", "log_decay", "initial_state")


class Stage(NamedTuple):
    """Where cases run, and how large they are."""

    device: str
    rehearsed: bool


GPU, REHEARSAL = Stage("cuda", False), Stage("cpu", True)


def accuracy_cases(stage: Stage) -> Iterator[tuple[str, Callable, list[Tensor | None]]]:
    """Yield a name, an operator and its tensors in float64, the initial state last."""
    lengths = (17,) if stage.rehearsed else (1, 15, 16, 17, 100)
    widths = ((20, 9),) if stage.rehearsed else ((20, 9), (16, 64), (128, 100))
    for decay, L, (Dk, Dv) in product((False, True), lengths, widths):
        tensors = delta_inputs(2, L, 3, Dk, Dv, decay=decay)
        yield f"delta_rule L{L} Dk{Dk} Dv{Dv} decay={decay}", mk.delta_rule, tensors
    for kinds in (1, 4):
        L = 20 if stage.rehearsed else 130
        tensors = delta_inputs(2, L, 2, 32, 32, decay=False)
        k = tensors[1]
        assert k is not None
        tensors[1] = k[:, torch.arange(L) % kinds]
        tensors[3] = torch.full_like(k[..., 0], 0.999)
        yield f"delta_rule {kinds} repeated keys", mk.delta_rule, tensors
    for groups, L in product((1, 2, 4), lengths[-2:]):
        yield f"ssd L{L} G{groups}", mk.ssd, ssd_inputs(2, L, 4, groups, 64, 16)
    for L, (D, N) in product(lengths, ((20, 6), (70, 16), (3, 128))):
        yield f"selective_scan L{L} D{D} N{N}", mk.selective_scan, scan_inputs(2, L, D, N)
    for L, K, silu in product(lengths, (1, 4), (False, True)):
        operator = silu_conv if silu else plain_conv
        yield f"short_conv L{L} K{K} silu={silu}", operator, conv_inputs(2, L, 70, K)
    if stage.rehearsed:
        return
    for B, L, H, D in ((8, 128, 4, 32), (8, 128, 8, 16), (8, 128, 1, 128), (2, 512, 2, 64)):
        tensors = delta_inputs(B, L, H, D, D, decay=True)
        yield f"delta_rule B{B} L{L} H{H} D{D}", mk.delta_rule, tensors
    yield "selective_scan B8 L512 D256 N16", mk.selective_scan, scan_inputs(8, 512, 256, 16)
    yield "short_conv B8 L512 D256 K4", silu_conv, conv_inputs(8, 512, 256, 4)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, **options):
    """Convolve, with the bias by place."""
    return mk.short_conv(x, weight, bias, **options)


def silu_conv(x: Tensor, weight: Tensor, bias: Tensor, **options):
    """Convolve and activate."""
    return mk.short_conv(x, weight, bias, activation="silu", **options)


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


def scan_inputs(B: int, L: int, D: int, N: int) -> list[Tensor | None]:
    """Draw x, dt, a, b, c and a state in float64."""
    g = torch.Generator().manual_seed(L)
    shapes = [(B, L, D), (B, L, D), (D, N), (B, L, N), (B, L, N), (B, D, N)]
    x, dt, a, b, c, S = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    return [x, dt.abs(), -a.abs(), b, c, S]


def conv_inputs(B: int, L: int, D: int, K: int) -> list[Tensor | None]:
    """Draw x, weight, bias and a state in float64."""
    g = torch.Generator().manual_seed(L)
    shapes = [(B, L, D), (D, K), (D,), (B, D, K - 1)]
    return [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]


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


def check_accuracy(stage: Stage) -> bool:
    """Compare every case on the device with the float64 token loop; say whether all are in bounds.

    Both see the same rounded inputs. Errors are relative L2.
    """
    good = True
    for dtype in DTYPES:
        worst = 0.0
        for name, operator, tensors in accuracy_cases(stage):
            rounded = [None if x is None else x.to(dtype) for x in tensors]
            wide = [None if x is None else x.double() for x in rounded]
            device = [None if x is None else x.to(stage.device) for x in rounded]
            want = value_and_gradients(operator, wide, "reference")
            got = value_and_gradients(operator, device, "triton")
            again = value_and_gradients(operator, device, "triton")
            errors = [
                ((x.double().cpu() - y).norm() / y.norm().clamp_min(1e-30)).item() if y.numel() else 0.0
                for x, y in zip(got, want, strict=True)
            ]
            same = all(torch.equal(x, y) for x, y in zip(got, again, strict=True))
            passed = same and max(errors) <= TOLERANCE[dtype]  # a NaN is not at most anything
            good, worst = good and passed, max(worst, *errors)
            fields = {"case": name, "dtype": str(dtype), "errors": errors, "same_bits": same}
            record("accuracy", stage, **fields)
            if not passed:
                show = ", ".join(f"{error:.1e}" for error in errors)
                print(f"FAILED {name} {dtype}: equal bits {same}, errors {show}")
        print(f"accuracy {dtype}: worst error {worst:.1e}, allowed {TOLERANCE[dtype]:.0e}")
    return good


def contenders(
    shape: tuple[int, int, int, int], dtype: torch.dtype, stage: Stage
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and one forward and backward of every operator that runs here."""
    B, L, H, D = shape
    given = {"device": stage.device, "dtype": dtype}
    drawn = [x for x in delta_inputs(B, L, H, D, D, decay=True)[:6] if x is not None]
    leaves = [x.to(**given).requires_grad_() for x in drawn]
    q, k, v, _, write, _ = leaves
    d_o = torch.randn_like(v)
    rate = -torch.ones(H, **given).requires_grad_()

    def step(operator: Callable[..., Tensor], *leaves: Tensor, d_o: Tensor = d_o):
        return lambda: torch.autograd.grad(operator(*leaves), leaves, d_o)

    def ours(operator: Callable, *leaves: Tensor, backend: str = "triton", d_o: Tensor = d_o):
        return step(lambda *x: operator(*x, backend=backend)[0], *leaves, d_o=d_o)

    yield "delta_rule", ours(mk.delta_rule, *leaves[:5])
    yield "delta_rule, decay", ours(mk.delta_rule, *leaves)
    yield "ssd", ours(mk.ssd, v, write, rate, k, q)
    wide = [x.to(**given).requires_grad_() for x in scan_inputs(B, L, H * D, 16) if x is not None]
    d_x = d_o.flatten(2)
    yield "selective_scan", ours(mk.selective_scan, *wide[:5], d_o=d_x)
    taps = [x.to(**given).requires_grad_() for x in conv_inputs(B, L, H * D, 4) if x is not None]
    yield "short_conv", ours(silu_conv, *taps[:3], d_o=d_x)
    yield "short_conv, library", ours(silu_conv, *taps[:3], backend="fused", d_o=d_x)
    heads = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    d_heads = d_o.transpose(1, 2).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    yield "sdpa", step(attend, *heads, d_o=d_heads)
    if dtype == torch.bfloat16:  # its delta rule refuses float32
        for name, operator, tensors in flash_linear_attention(leaves):
            yield f"fla {name}", step(lambda *x, run=operator: run(*x)[0], *tensors)


def flash_linear_attention(leaves: list[Tensor]) -> Iterator[tuple[str, Callable, tuple[Tensor, ...]]]:
    """Yield the operators of fla-core that are nearest to ours, where it is installed."""
    q, k, v, erase, _, decay = leaves
    try:
        from fla.ops import delta_rule, gated_delta_rule, simple_gla  # pyright: ignore
    except ImportError:
        return
    yield "delta_rule", delta_rule.chunk_delta_rule, (q, k, v, erase)
    yield "delta_rule, decay", gated_delta_rule.chunk_gated_delta_rule, (q, k, v, decay, erase)
    yield "ssd", simple_gla.chunk_simple_gla, (q, k, v, decay)


def milliseconds(run: Callable[[], object], stage: Stage, repeats: int = 30) -> float:
    """Give the median time of `run` by CUDA events, after 5 runs to warm up."""
    if stage.rehearsed:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    for _ in range(5):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


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


def take_timings(stage: Stage) -> None:
    """Time every contender at every shape and dtype, eager and as a CUDA graph."""
    print(f"{'shape':<20}{'dtype':<10}{'operator':<22}{'eager ms':>10}{'graph ms':>10}{'ns/th':>8}")
    for sizes, dtype in product(REHEARSED if stage.rehearsed else TIMED, DTYPES):
        B, L, H, D = sizes
        for name, run in contenders(sizes, dtype, stage):
            times: dict[str, float | str] = {}
            try:
                times["eager"] = milliseconds(run, stage)
                if not stage.rehearsed:  # a graph is captured by a device
                    times["graph"] = milliseconds(as_graph(run), stage)
            except Exception as error:  # one contender's failure is a result, not the end
                times["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            shape, short = f"B{B} L{L} H{H} D{D}", str(dtype).removeprefix("torch.")
            fields = {"shape": shape, "dtype": short, "operator": name, "milliseconds": times}
            record("timing", stage, **fields)
            print(timing_row(shape, short, name, times, B * L * H), flush=True)


def timing_row(shape: str, dtype: str, name: str, times: dict, token_heads: int) -> str:
    """Lay out one line of the table."""
    cells = [f"{times[mode]:>10.3f}" if mode in times else f"{'-':>10}" for mode in ("eager", "graph")]
    best = times.get("graph", times.get("eager"))
    each = f"{best / token_heads * 1e6:>8.2f}" if best else f"{'-':>8}"
    return f"{shape:<20}{dtype:<10}{name:<22}{''.join(cells)}{each}  {times.get('error', '')}"


def builds(operator: str, width: int | None) -> Iterator[tuple[dict, Any, dict, torch.dtype]]:
    """Yield a label, a kernel, its options and the dtype of its values, for what is timed."""
    module = import_module(f"mad_kernels.{operator}.triton")
    for dtype in DTYPES:
        label = {"operator": operator, "dtype": str(dtype).removeprefix("torch.")}
        if operator == "delta_rule":
            for D, decay in product((16, 32, 64, 128) if width is None else (width,), (False, True)):
                walk, hold = module.options_of(D, D, erase=True, decay=decay)
                known = {"Dk": D, "Dv": D, "SAVE": True, "FINAL": True}
                known |= {"LEVELS": module.CHUNK.bit_length() - 1}
                known |= {"PRODUCT": module.PRODUCTS[dtype]}
                ways = {"prepare": walk, "forward": hold, "sweep": hold, "gather": walk}
                for name, options in ways.items():
                    kernel = getattr(module, f"{name}_kernel")
                    own = label | {"D": D, "decay": decay, "kernel": name}
                    yield own, kernel, known | options, dtype
            continue
        if operator == "selective_scan":
            BD, BN = module.sizes_of(256, 16)
            known = {"D": 256, "N": 16, "BD": BD, "BN": BN, "C": module.CHUNK}
            known |= {"SAVE": True, "FINAL": True, "num_stages": 1}
        else:
            known = {"D": 256, "K": 4, "BT": module.TOKENS, "BD": module.CHANNELS}
            known |= {"BIAS": True, "SILU": True}
        for name in ("forward", "backward"):
            kernel = getattr(module, f"{name}_kernel")
            yield label | {"kernel": name}, kernel, known | {"num_warps": module.WARPS}, dtype


def resources(kernel, known: dict[str, Any], dtype: torch.dtype) -> dict[str, int]:
    """Compile one kernel for sm_90; ask the assembler for registers, spills and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    options = {name: known[name] for name in ("num_warps", "num_stages") if name in known}
    known = {name: known[name] for name in kernel.arg_names if name in known}
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in known:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if FLOAT32.fullmatch(name) or dtype != DTYPES[0] else "*bf16"
        else:
            signature[name] = "i32"
        if name.endswith("_ptr"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptxas = get_ptxas(90).path  # the assembler that this release compiles with
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.ptx"
        code.write_text(built.asm["ptx"])
        command = [ptxas, "-v", "-arch=sm_90a", code, "-o", code.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = [re.search(p, report) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    registers, spills = (int(match[1]) if match else -1 for match in found)
    shared = built.metadata.shared
    return {"registers": registers, "spill_bytes": spills, "shared_bytes": shared}


def report_compilation(operator: str | None, width: int | None) -> bool:
    """Print and record the resources of kernels; say whether none spills."""
    good = True
    for name in OPERATORS if operator is None else (operator,):
        for label, kernel, known, dtype in builds(name, width):
            sizes = {key: known[key] for key in ("BT", "BK", "BV", "BD", "BN") if key in known}
            row = label | sizes | {"warps": known["num_warps"]} | resources(kernel, known, dtype)
            record("compile", GPU, **row)
            print("  ".join(f"{key} {x}" for key, x in row.items()), flush=True)
            good = good and row["spill_bytes"] == 0
    return good


def record(kind: str, stage: Stage, **fields: object) -> None:
    """Append one JSON line to the results; a rehearsal leaves none."""
    if stage.rehearsed:
        return
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"kind": kind, "machine": machine, **fields}) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 means a check failed, 2 that it could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ("all", "accuracy", "timings", "compile", "rehearse")
    parser.add_argument("what", nargs="?", default="all", choices=choices)
    parser.add_argument("--operator", choices=OPERATORS, help="to compile, all by default")
    parser.add_argument("--width", type=int, choices=(16, 32, 64, 128), help="of heads to compile")
    given = parser.parse_args(arguments)
    what, interpreted = given.what, os.environ.get("TRITON_INTERPRET") == "1"
    if what == "rehearse":
        os.environ["TRITON_INTERPRET"] = "1"  # triton is not imported yet
        good = check_accuracy(REHEARSAL)
        take_timings(REHEARSAL)
        return 0 if good else 1
    if interpreted:
        print("gpu.py: TRITON_INTERPRET=1 interprets kernels on the CPU: unset it", file=sys.stderr)
        return 2
    if what == "compile":
        return 0 if report_compilation(given.operator, given.width) else 1
    if not torch.cuda.is_available():
        print(f"gpu.py: {what} needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    if what in ("all", "accuracy") and not check_accuracy(GPU):
        print("gpu.py: stopped, no timing of kernels that are wrong", file=sys.stderr)
        return 1
    if what in ("all", "timings"):
        take_timings(GPU)
    return 0


if __name__ == "__main__":
    sys.exit(main())
