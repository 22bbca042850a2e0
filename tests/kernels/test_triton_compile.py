"""The GPU kernels built for a Hopper card without one, and the command that checks them on one.

In processes of their own: in this one, triton may have been imported as an interpreter.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Of flash-linear-attention, the heads of the functions that are called, as in fla-core 0.6.0.
FLA = """
def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None):
    return q * k * v * beta[..., None], None
def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None):
    return q * k * v * (g + beta)[..., None], None
def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None):
    return q * k * v * g[..., None], None
"""
SCANS = ["selective_scan"] * 4 + ["short_conv"] * 4
GPU = Path(__file__).parents[2] / "kernels" / "gpu.py"


def run(*arguments, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, GPU, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_kernels_compile_for_hopper_within_its_limits(tmp_path):
    results = tmp_path / "gpu.jsonl"
    done = run("compile", "--width", "16", MAD_KERNELS_RESULTS=str(results))
    assert done.returncode in (0, 1), done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["operator"] for row in rows] == ["delta_rule"] * 16 + SCANS
    assert all(0 < row["registers"] <= 255 and row["shared_bytes"] < 232_448 for row in rows)
    assert all(row["spill_bytes"] < 64 for row in rows if row["dtype"] == "bfloat16")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_every_step_of_the_command_runs_in_a_rehearsal(tmp_path):
    fla = tmp_path / "fla" / "ops"
    fla.mkdir(parents=True)
    (fla.parent / "__init__.py").touch()  # or an installed one would come first
    (fla / "__init__.py").touch()
    for module in ("delta_rule", "gated_delta_rule", "simple_gla"):
        (fla / f"{module}.py").write_text(FLA)
    results = tmp_path / "gpu.jsonl"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("rehearse", MAD_KERNELS_RESULTS=str(results), PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not results.exists()
    assert "Error" not in done.stdout
    for name in ("delta_rule, decay", "ssd", "selective_scan", "short_conv", "sdpa", "fla ssd"):
        assert f" {name} " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    results = tmp_path / "gpu.jsonl"
    done = run(MAD_KERNELS_RESULTS=str(results))
    assert (done.returncode, results.exists()) == (2, False)
    assert "needs a CUDA device" in done.stderr


def test_it_refuses_the_interpreter_and_unknown_words():
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "unset it" in done.stderr
    assert "invalid choice" in run("fast").stderr
