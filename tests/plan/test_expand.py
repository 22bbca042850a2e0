"""Task files x a plan, all or nothing."""

import pytest

from mad_efla import config
from mad_efla.config import ConfigError
from mad_efla.plan import expand
from mad_efla.training import fits
from tests.tiny import PLAN, TASK

MAD = ("recall", "noisy_recall", "fuzzy_recall", "selective_copying", "compression", "memorization")


def expanded(tmp_path, plan=PLAN, task=TASK, sets=()):
    (tmp_path / "task.yaml").write_text(task)
    (tmp_path / "plan.yaml").write_text(plan)
    return expand.expand("task.yaml", "plan.yaml", sets, "float32")


def refused(tmp_path, **kwargs):
    with pytest.raises(ConfigError) as error:
        fits.check(expanded(tmp_path, **kwargs))
    return str(error.value)


def test_a_sweep_is_every_mixer_setting_point_and_seed(tmp_path):
    plan = PLAN.replace("baseline", "all") + "grid: {optim.lr: [1e-3, 1e-2], optim.weight_decay: [0, 0.1]}\n"
    found = expanded(tmp_path, plan)
    assert len(found.runs) == 2 * 2 * 4 * 2
    assert [r.setting for r in found.runs[::16]] == ["baseline", "vocab_size=10"]
    assert {r.optim.lr for r in found.runs} == {1e-3, 1e-2}
    assert len({r.fingerprint for r in found.runs}) == len(found.runs)
    assert set(expand.differences(found.runs)) == {
        "mixer",
        "setting",
        "seed",
        "task.vocab_size",
        "optim.lr",
        "optim.weight_decay",
    }
    assert set(fits.check(found).sizes) == {r.fingerprint for r in found.runs}


def test_named_settings_override_anything(tmp_path):
    plan = PLAN.replace(
        "settings: baseline", "settings:\n  recall:\n    easy: {task.seq_len: 8, train.steps: 5}\n    hard: {}"
    )
    found = expanded(tmp_path, plan)
    assert [(r.setting, r.task.seq_len, r.steps) for r in found.runs[::4]] == [("easy", 8, 5), ("hard", 12, 20)]
    message = refused(tmp_path, plan=plan.replace("recall:", "recal:"))
    assert "settings has none for task 'recall'; did you mean 'recal'?" in message


def test_fields_can_hold_for_one_task_only(tmp_path):
    plan = PLAN + "per_task:\n  recall: {train.steps: 7}\n  other: {train.steps: 9}\n"
    assert {r.steps for r in expanded(tmp_path, plan).runs} == {7}
    message = refused(tmp_path, plan=plan.replace("train.steps: 7", "task.no: 7"))
    assert "plan.yaml:11: task.no: unknown key" in message


def test_set_overrides_runs_plan_and_grid(tmp_path):
    plan = PLAN + "grid: {optim.lr: [1e-3, 1e-2]}\n"
    found = expanded(tmp_path, plan, sets=["optim.lr=0.5", "seeds=[7]", "mixers=[efla]"])
    assert [(r.optim.lr, r.seed, r.mixer) for r in found.runs] == [(0.5, 7, "efla")]


def test_equal_runs_are_made_once(tmp_path):
    found = expanded(tmp_path, PLAN.replace("baseline", "all"), sets=["task.vocab_size=8"])
    assert len(found.runs) == 4


def test_the_same_sweep_has_the_same_id_in_any_order(tmp_path):
    first = expanded(tmp_path)
    swapped = PLAN.replace("[0, 1]", "[1, 0]")
    assert expanded(tmp_path, swapped).id == first.id
    assert expanded(tmp_path, sets=["seeds=[0]"]).id != first.id


def test_auto_precision_is_settled_before_the_fingerprint(tmp_path):
    plan = PLAN.replace("train: {", "train: {precision: auto, ")
    named = PLAN.replace("train: {", "train: {precision: float32, ")
    assert [r.fingerprint for r in expanded(tmp_path, plan).runs] == [
        r.fingerprint for r in expanded(tmp_path, named).runs
    ]


def test_hybrids_are_lists_of_mixers(tmp_path):
    found = expanded(tmp_path, sets=["mixers=[[attention, efla]]", "model.depth=2"])
    assert found.runs[0].mixer == "attention+efla"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PLAN + "grib: {}\n", "plan.yaml:10: grib: unknown key; did you mean 'grid'?"),
        (PLAN.replace("lr: 1e-2", "rl: 1e-2"), "plan.yaml:8: optim.rl: unknown key; did you mean 'lr'?"),
        (PLAN.replace("efla", "elfa"), "plan.yaml:3: mixer 'elfa' is unknown; did you mean 'efla'?"),
        (PLAN.replace("heads: 2", "heads: 3"), "plan.yaml:3: mixer efla(heads=3): heads=3 must divide"),
        (PLAN + "grid:\n  optim.lr: []\n", "plan.yaml:11: grid.optim.lr=[] must list"),
        (PLAN + "grid:\n  optim.lr: [0.1, fast]\n", 'plan.yaml:11: optim.lr="fast"'),
        (PLAN + "grid:\n  optm.lr: [0.1]\n", "plan.yaml:11: optm: unknown key; did you mean 'optim'?"),
        (PLAN.replace("steps: 20, ", ""), "plan.yaml:9: train.steps=None and train.epochs=None"),
        (PLAN.replace("seeds: [0, 1]", "seeds: []"), "plan.yaml:5: seeds=[]"),
        (PLAN.replace("mixers:", "mixer:"), "plan.yaml:2: mixers is missing"),
        (PLAN + "task: {name: recall}\n", "task.name belongs to the task file"),
        (PLAN.replace("protocol: custom", "protocol: quik"), 'plan.yaml:2: protocol="quik"'),
        (PLAN.replace("optim: {lr: 1e-2}", "optim: 3"), "plan.yaml:8: optim=3 must be a mapping"),
    ],
)
def test_a_bad_plan_is_refused_with_its_line(tmp_path, plan, message):
    assert message in refused(tmp_path, plan=plan)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TASK.replace("seq_len: 12", "seq_len: 13"), "task.yaml:2: task.seq_len=13 must be even"),
        (TASK.replace("vocab_size: 8", "vocab_size: 2"), "task.yaml:2: task.vocab_size=2 must be at least 4"),
        (TASK.replace("vary", "vari"), "task.yaml:3: vari: unknown key; did you mean 'vary'?"),
        (TASK.replace("recall", "recoll"), "task.yaml:2: task 'recoll' is unknown; did you mean 'recall'?"),
        (TASK.replace("[10]", "[11, two]"), 'task.yaml:4: task.vocab_size="two"'),
        (TASK.replace("[10]", "10"), "task.yaml:4: vary.task.vocab_size=10 must be a list"),
        (
            TASK.replace("task.vocab_size", "task.vocab"),
            "task.yaml:4: task.vocab: unknown key; did you mean 'vocab_size'?",
        ),
        (
            TASK.replace("task.vocab_size: [10]", "together: [10]"),
            "task.yaml:4: vary.together has 10, which must be a mapping",
        ),
        (TASK.replace("task.vocab_size: [10]", "together: [{}]"), "task.yaml:4: vary.together has {}"),
        (TASK.replace("task.vocab_size: [10]", "together: [{task.vocab: 10}]"), "task.yaml:4: task.vocab: unknown key"),
        ("vary: {}", "task.name=None must be the name of a task"),
    ],
)
def test_a_bad_task_file_is_refused_with_its_line(tmp_path, task, message):
    plan = PLAN.replace("baseline", "all")
    assert message in refused(tmp_path, plan=plan, task=task)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.rl=1", "--set optim.rl=1: optim.rl: unknown key; did you mean 'lr'?"),
        ("optm.lr=1", "--set optm.lr=1: optm: unknown key; did you mean 'optim'?"),
        ("optim.lr=x", '--set optim.lr=x: optim.lr="x": input should be a valid number'),
        ("seeds=3", "--set seeds=3: seeds=3: input should be a valid array"),
        ("lr=3", "--set lr=3: lr: unknown key"),
        ("optim=3", "--set optim=3: optim=3 must be a mapping"),
        ("optim..lr=3", "'optim..lr' is no field"),
        ("protocol=mad", "plan.yaml:6: model.width=16 departs from protocol 'mad'"),
    ],
)
def test_a_bad_override_is_refused_by_name(tmp_path, text, message):
    assert message in refused(tmp_path, sets=[text])


def test_every_shipped_plan_expands_for_every_task_it_names():
    plans = {path.stem for path in config.presets("sweeps")}
    assert {"quick", "mad", "mad_lab"} <= plans
    for plan in plans:
        task = "digits" if plan.startswith("robustness") else "recall"
        assert expand.expand(task, plan, [], "bfloat16").runs


def test_mad_and_mad_lab_are_the_published_grid_on_every_setting():
    for plan in ("mad", "mad_lab"):
        found = expand.expand("recall", plan, ["mixers=[efla]"], "float32")
        assert len(found.runs) == 11 * 6
        assert {r.train.precision for r in found.runs} == {"bfloat16"}
        assert {(r.optim.lr, r.optim.weight_decay) for r in found.runs} == {
            (lr, wd) for lr in (1e-4, 5e-4, 1e-3) for wd in (0.0, 0.1)
        }


def test_mad_mini_keeps_every_task_and_two_changes_of_every_axis():
    for path in config.presets("tasks"):
        if path.stem not in MAD:
            continue
        document = config.read(path)
        runs = expand.expand(path.stem, "mad_mini", (), "bfloat16").runs
        assert {r.protocol for r in runs} == {"mad-mini"}
        for field, published in document.part("vary").data.items():
            section, key = field.split(".")
            base = getattr(runs[0], section)
            found = {getattr(getattr(r, section), key) for r in runs}
            assert len(found - {getattr(base, key)}) >= 2, field
            assert found <= {getattr(base, key), *published}, field
        per_step = {r.train.batch_size * r.task.input_length for r in runs}
        assert max(per_step) <= 8192


def test_a_plan_says_by_how_much_mixers_miss_equal_terms(tmp_path):
    mixers = "mixers=[efla, attention, mamba2]"
    sweep = expanded(tmp_path, PLAN + "match: state\n", sets=[mixers, "model.width=128"])
    found = fits.check(sweep).matches
    assert [(m.mixer, m.wanted, m.found) for m in found] == [
        ("efla", 2048, 2048),
        ("attention", 2048, 2 * 128 * 11),
        ("mamba2", 2048, 2048),
    ]
    assert found[1].miss == pytest.approx(0.375)
    sweeps = expanded(tmp_path, PLAN + "match: parameters\n", sets=[mixers, "model.width=128"])
    fit = fits.check(sweeps)
    sizes = {r.mixer: fit.sizes[r.fingerprint][0] for r in sweeps.runs}
    assert [(m.wanted, m.found) for m in fit.matches] == [
        (sizes["efla"], sizes[m]) for m in ("efla", "attention", "mamba2")
    ]
    assert fits.check(expanded(tmp_path)).matches == []
    assert 'match="size": input should be' in refused(tmp_path, plan=PLAN + "match: size\n")


def test_limits_are_the_sweeps_and_no_part_of_a_run(tmp_path):
    plan = PLAN + "limits: {minutes: 30, memory_gib: 8}\n"
    found = expanded(tmp_path, plan, sets=["limits.minutes=5"])
    assert (found.limits.minutes, found.limits.memory_gib) == (5, 8)
    plain = expanded(tmp_path)
    assert plain.limits.minutes is plain.limits.memory_gib is None
    assert found.id == plain.id
    message = refused(tmp_path, plan=plan.replace("30", "-1"))
    assert "plan.yaml:10: limits.minutes=-1: input should be greater than 0" in message
    message = refused(tmp_path, plan=plan.replace("minutes", "hours"))
    assert "plan.yaml:10: limits.hours: unknown key" in message
