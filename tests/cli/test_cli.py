"""The command line as its users meet it: what it prints, and with which exit status."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mad_efla.cli import cli
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.sweeps import read_sweeps

SWEEP = ["sweep", "task.yaml", "--plan", "plan.yaml", "--workers", "0", "--no-tracking"]


def call(*arguments, code=0):
    done = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def folders(path):
    (record,) = read_sweeps(path / "runs")
    return [RunFolder(path / "runs", f) for f in record.fingerprints]


def test_a_sweep_prints_its_table_and_where_things_are(files):
    done = call(*SWEEP)
    assert "recall, plan plan, protocol custom" in done.stdout
    for word in ("efla(heads=2)", "deltanet(heads=2)", "95 % interval", "steps to", "state"):
        assert word in done.stdout
    assert "results: runs" in done.stdout
    assert all(f.status() == "finished" for f in folders(files))
    assert "baseline efla(heads=2) lr=0.01 seed=0: finished: test accuracy" in done.stderr


def test_the_same_sweep_again_makes_nothing_and_prints_the_same_table(files, monkeypatch):
    first = call(*SWEEP)
    monkeypatch.setattr("mad_efla.execution.attempt.train", lambda *a, **k: pytest.fail("made again"))
    again = call(*SWEEP)
    assert again.stdout == first.stdout
    assert again.stderr == ""


def test_adding_a_mixer_makes_only_its_runs(files):
    call(*SWEEP)
    before = {f.path.name: f.result() for f in folders(files)}
    plan = (files / "plan.yaml").read_text()
    (files / "plan.yaml").write_text(plan.replace("mixers: [", "mixers: [{name: mamba2, heads: 2}, "))
    done = call(*SWEEP)
    assert done.stderr.count("finished") == 2
    assert all(RunFolder(files / "runs", name).result() == r for name, r in before.items())


def test_a_dry_run_prints_every_run_and_makes_none(files):
    done = call(*SWEEP, "--dry-run")
    assert "4 runs, 0 of them done" in done.stdout
    assert "about" in done.stdout
    for column in ("mixer", "seed", "steps", "parameters", "state"):
        assert column in done.stdout
    assert not (files / "runs").exists()
    call(*SWEEP)
    assert "4 runs, 4 of them done" in call(*SWEEP, "--dry-run").stdout


def test_a_broken_result_is_said_and_made_again(files):
    call(*SWEEP)
    folder = folders(files)[0]
    whole = folder.result()
    (folder.path / "result.json").write_bytes((folder.path / "result.json").read_bytes()[:50])
    done = call(*SWEEP)
    assert "set aside as result.json.broken-1" in done.stderr
    assert folder.result().test == whole.test


def test_a_broken_checkpoint_is_said_and_the_run_made_again(files, monkeypatch):
    call(*SWEEP)
    folder = folders(files)[0]
    whole = folder.result()
    (folder.path / "result.json").unlink()
    (folder.path / "checkpoint.pt").write_bytes(b"half")
    done = call(*SWEEP)
    assert "checkpoint.pt: is broken; the run goes on from before it; set aside as" in done.stderr
    assert folder.result().test == whole.test


def test_a_server_that_does_not_answer_costs_a_warning(files):
    done = call(*SWEEP[:-1], "--tracking-uri", "http://127.0.0.1:9", "--set", "mixers=[{name: efla, heads: 2}]")
    assert "warning: MLflow at http://127.0.0.1:9 does not answer" in done.stderr
    assert "mad-efla sync" in done.stderr
    assert all(f.status() == "finished" for f in folders(files))
    failed = call("sync", "--tracking-uri", "http://127.0.0.1:9", code=1)
    assert "does not answer" in failed.stderr


def test_cuda_without_cuda_is_status_2(files, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees no CUDA device" in call(*SWEEP, "--device", "cuda", code=2).stderr


def test_a_failed_run_is_shown_with_its_traceback_and_status_1(files, monkeypatch):
    (files / "mine.py").write_text(
        "from mad_efla.mixers.efla import EFLA\n"
        "class Mine(EFLA):\n"
        "    class Config(EFLA.Config):\n"
        "        name: str\n"
        "    def forward(self, x):\n"
        "        if len(x) > 4:  # more rows than the check before the first run has\n"
        "            raise RuntimeError('mine')\n"
        "        return super().forward(x)\n"
    )
    monkeypatch.syspath_prepend(files)
    done = call(*SWEEP, "--set", "mixers=[{name: 'mine:Mine', heads: 2}]", code=1)
    assert "RuntimeError: mine" in done.stderr
    assert "traceback: mad-efla logs" in done.stderr
    sys.modules.pop("mine")


def test_divergence_is_a_row_of_the_table_not_a_failure(files):
    done = call(*SWEEP, "--set", "mixers=[{name: delta, heads: 2, step: euler}]", "--set", "optim.lr=1e4")
    assert "diverged" in done.stdout
    assert "loss not finite at step" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "nothing.yaml"], "nothing.yaml: no such file"),
        (["sweep", "."], "is a directory"),
        (["sweep", "task.yaml", "--plan", "nothing"], "no shipped plan of that name"),
        (["sweep", "task.yaml", "--set", "optim.rl=1"], "optim.rl: unknown key; did you mean 'lr'?"),
        (["sweep", "task.yaml", "--device", "tpu"], "'tpu' is not one of"),
        (["sweep", "task.yaml", "--workers", "-1"], "-1 is not in the range"),
        (["sweep", "task.yaml", "--plan", "plan.yaml", "--out", "task.yaml/x"], "cannot be written"),
        (["sweep"], "Missing argument"),
        (["swep"], "No such command 'swep'"),
        (["list", "nothing"], "'nothing' is not one of"),
        (["show", "nothing"], "no such file"),
        (["show", "recall", "--set", "task.seq_len=7"], "task.seq_len=7 must be even"),
    ],
)
def test_wrong_usage_is_status_2_with_a_reason(files, arguments, message):
    done = call(*arguments, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (files / "runs").exists()


def test_show_draws_tokens_and_the_solvers_answers():
    done = call("show", "recall", "--set", "task.seq_len=16", "--examples", "3")
    lines = done.stdout.splitlines()
    assert sum(line.startswith("tokens") for line in lines) == 3
    scored = [line[8:].split() for line in lines if line.startswith("scored")]
    solver = [line[8:].split() for line in lines if line.startswith("solver")]
    assert scored == solver
    assert all(scored)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tasks", ["recall", "noisy_recall"]),
        ("mixers", ["efla", "deltanet", "mamba2", "attention"]),
        ("plans", ["quick", "mad", "mad_lab"]),
    ],
)
def test_list_names_everything(kind, words):
    text = call("list", kind).stdout
    assert all(word in text for word in words)


def test_help_is_quick_because_it_imports_nothing_heavy():
    code = (
        "import sys, mad_efla.cli\n"
        "sys.argv = ['mad-efla', '--help']\n"
        "try: mad_efla.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'mlflow', 'numpy', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "sweep" in done.stdout


def test_a_run_folder_holds_the_resolved_configuration(files):
    call(*SWEEP)
    for folder in folders(files):
        written = json.loads((folder.path / "config.json").read_text())
        assert written == folder.run().model_dump(mode="json")
        assert written["optim"]["betas"] == [0.9, 0.999]  # a default, written down


def test_the_examples_of_contributing_md_pass_and_run_from_the_users_folder(files):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    block, mixer, task, mean = re.findall(r"```python\n(.*?)```", text, re.S)
    (files / "mean.py").write_text(mean)
    (files / "block.py").write_text(block)
    (files / "decay.py").write_text(mixer)
    (files / "parity.py").write_text(task)
    (files / "parity.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])
    script = Path(sys.executable).with_name("mad-efla")
    for arguments, expected in (
        (["check", "block:Block"], "state unknown"),
        (["check", "decay:Decay"], "holds"),
        (["check", "mean:Mean"], "holds"),
        (["check", "parity:Parity"], "holds"),
        ([*SWEEP, "--set", "mixers=['decay:Decay', 'block:Block']"], "block:Block"),
        (["sweep", "parity.yaml", *SWEEP[2:]], "parity:Parity, plan plan"),
    ):
        done = subprocess.run([script, *arguments], capture_output=True, text=True, cwd=files)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert "FAILS" not in done.stdout


def test_bench_shows_a_ratio_for_each_mixer(files):
    done = call("bench", "step", "task.yaml", "--plan", "plan.yaml", "--rounds", "4")
    assert "ratio to the first" in done.stdout
    rows = [line for line in done.stdout.splitlines() if "heads=2" in line]
    assert len(rows) == 2
    assert rows[0].split("│")[-2].strip() == "1.00"
    assert not (files / "runs").exists()
    call("bench", "step", "task.yaml", "--plan", "plan.yaml", "--rounds", "4", "--to", "steps.jsonl")
    lines = [json.loads(line) for line in Path("steps.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(0 < line["least_products_ms"] <= line["least_step_ms"] for line in lines)


def test_score_reads_what_the_sweep_left(files):
    call(*SWEEP)
    text = call("score").stdout
    for part in ("plan plan, protocol custom", "rank", "Differences in points", "efla(heads=2)"):
        assert part in text
    assert json.loads(call("score", "runs", "--json").stdout)[0]["protocol"] == "custom"
    assert call("score", "--csv").stdout == call("score", "--csv").stdout
    assert r"\toprule" in call("score", "--latex").stdout
    assert "holds no sweep" in call("score", "nowhere", code=2).stderr


def test_status_counts_and_names_what_failed(files, monkeypatch):
    call(*SWEEP)
    bad, _, lost, _ = folders(files)
    for folder in (bad, lost):
        (folder.path / "result.json").unlink()
    bad.fail("failed", "ZeroDivisionError: no such luck", "Traceback: here")
    (lost.path / "metrics.jsonl").unlink()
    lines = call("status").stdout.splitlines()
    assert lines[0] == "recall, plan plan: 4 runs: 1 failed, 2 finished, 1 waiting"
    assert lines[1].endswith("seed=0: ZeroDivisionError: no such luck")
    assert lines[-1].startswith("time left: ")
    assert lines[-1].endswith("of one worker, and none runs")
    with lost.lock():
        lines = call("status").stdout.splitlines()
    assert "1 running" in lines[0]
    assert lines[1].startswith(f"  running: {lost.fingerprint}")
    assert lines[1].endswith("starting")
    assert "on the 1 that run" in lines[-1]


def test_logs_print_figures_and_tracebacks_of_a_run_named_by_its_beginning(files):
    call(*SWEEP)
    folder = folders(files)[0]
    text = call("logs", folder.fingerprint[:6]).stdout
    assert "step 10: train/loss=" in text
    assert "test accuracy" in text
    (folder.path / "result.json").unlink()
    folder.fail("failed", "ValueError: x", "Traceback: in mixer.py")
    text = call("logs", folder.fingerprint).stdout
    assert "failed: ValueError: x" in text
    assert "Traceback: in mixer.py" in text
    assert "no such run" in call("logs", "zzz", code=2).stderr
    assert "4 runs begin so" in call("logs", "", code=2).stderr


@pytest.mark.parametrize("transient", [False, True])
def test_a_failed_run_waits_for_retry_unless_the_cause_lay_outside(files, transient):
    call(*SWEEP)
    folder = folders(files)[0]
    (folder.path / "result.json").unlink()
    folder.fail("failed", "ValueError: x", "", transient=transient)
    again = call(*SWEEP, code=0 if transient else 1)
    assert ("--retry-failed" in again.stderr) != transient
    call(*SWEEP, "--retry-failed")
    assert folder.status() == "finished"


def test_max_hours_ends_as_an_interrupt_and_the_next_call_goes_on(files):
    done = call(*SWEEP, "--max-hours", "1e-9", code=130)
    assert "stopped after 1e-09 hours; the same command goes on" in done.stderr
    assert not any(f.status() == "finished" for f in folders(files))
    call(*SWEEP, "--max-hours", "1")
    assert all(f.status() == "finished" for f in folders(files))


def test_a_budget_says_what_it_holds_before_it_starts_and_goes_on_from_a_shorter_one(files):
    done = call("sweep", "task.yaml", "--plan", "plan.yaml", "--budget", "1h", "--dry-run")
    assert "the budget holds 1 of 1 settings, 20 seeds at the last of them" in done.stderr
    assert "40 runs, 0 of them done" in done.stdout
    call("sweep", "task.yaml", "--plan", "plan.yaml", "--no-tracking", "--set", "seeds=[0]")
    done = call("sweep", "task.yaml", "--plan", "plan.yaml", "--budget", "1h", "--dry-run")
    assert "40 runs, 2 of them done" in done.stdout
    refused = call("sweep", "task.yaml", "--plan", "plan.yaml", "--budget", "0.001s", code=2)
    assert "the least of this plan, 2 seeds at one setting" in refused.stderr
