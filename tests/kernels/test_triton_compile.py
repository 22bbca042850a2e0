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
    assert len(rows) == 8
    assert all(0 < row["registers"] <= 255 and row["shared_bytes"] < 232_448 for row in rows)
    assert all(row["spill_bytes"] == 0 for row in rows if row["dtype"] == "bfloat16")


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
