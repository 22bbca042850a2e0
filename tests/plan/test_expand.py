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
    assert "plan.yaml:5: settings.recal: no such task; did you mean 'recall'?" in message
    message = refused(tmp_path, plan=plan.replace("recall:", "parity:").replace("task.seq_len: 8, ", ""))
    assert "settings has none for task 'recall'" in message


def test_fields_can_hold_for_one_task_only(tmp_path):
    plan = PLAN + "per_task:\n  recall: {train.steps: 7}\n  parity: {train.steps: 9}\n"
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
        ("protocol=mad", "plan.yaml:6: model.width=16 departs from protocol 'mad', which fixes it to 128"),
        ("task.name=parity", "task.name is no field of a run; it belongs to the task file"),
        ("seed=3", "seed is no field of a run; seeds are listed in `seeds`, as in seeds=[3]"),
        ("setting=hard", "settings are picked by `settings`, as in settings=hard"),
        ("code={}", "--set code={}: code: unknown key"),
        ("lr=3", "did you mean 'optim.lr'?"),
        ("settings=hard", "--set settings=hard: task recall has no such setting under plan plan; known: baseline"),
        ("optim.lr=[]", "--set optim.lr=[]: grid.optim.lr=[] must list at least one value"),
        ("optim.betas=[0.9]", "--set optim.betas=[0.9]: optim.betas"),
        ("mixers.hedas=4", "no mixer that is meant has a field hedas. efla has heads, "),
        ("mixers.elfa.heads=4", "the plan has no mixer elfa; did you mean 'efla'?"),
        ("mixers[2].heads=4", "mixers[2].heads: the plan has 2 mixers, 0 to 1"),
        ("mixers[0].width=4", "no mixer that is meant has a field width. efla has heads, "),
        ("mixers.heads=many", '--set mixers.heads=many: mixers[0].heads="many": input should be'),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("per_task: {recal: {train.steps: 7}}", "plan.yaml:10: per_task.recal: no such task; did you mean 'recall'?"),
        ("per_task: {parity: {train.step: 7}}", "plan.yaml:10: train.step: unknown key; did you mean 'steps'?"),
        ("per_task: {parity: {task.vocab_size: 7}}", "plan.yaml:10: task.vocab_size: unknown key"),
        ("per_task: {parity: {train: {step: 7}}}", "plan.yaml:10: train.step: unknown key"),
        ("per_task: {'no.such:Task': {}}", "plan.yaml:10: per_task.no.such:Task: task 'no.such:Task'"),
        ("grid: {mixers: [[efla], [mamba2]]}", "plan.yaml:10: mixers is no field of a run; it would take the place of"),
        ("grid: {seed: [1, 2]}", "plan.yaml:10: seed is no field of a run; seeds are listed in `seeds`"),
        ("grid: {seeds: [[1], [2]]}", "seeds is no field of a run; it belongs to the plan"),
        ("grid: {task.name: [parity]}", "task.name is no field of a run"),
        ("grid: {protocol: [mad]}", "protocol is no field of a run; it belongs to the plan"),
        ("grid: {lr: [0.1]}", "plan.yaml:10: lr: unknown key; did you mean 'optim.lr'?"),
        ("grid: {optim: [{rl: 0.1}]}", "plan.yaml:10: optim.rl: unknown key; did you mean 'lr'?"),
        ("grid: {mixers.gla.heads: [2]}", "plan.yaml:10: mixers.gla.heads: the plan has no mixer gla"),
        ("zip: {optim.rl: [0.1]}", "plan.yaml:10: optim.rl: unknown key"),
        ("cells:\n- {optim.lr: 0.1}\n- {train.stop: 3}", "plan.yaml:12: train.stop: unknown key"),
        ("sample: {method: random, count: 2, over: {optim.rl: {log: [1, 2]}}}", "plan.yaml:10: optim.rl: unknown key"),
        (
            "sample: {method: random, count: 2, over: {optim.lr: {lgo: [1, 2]}}}",
            "plan.yaml:10: sample.over.optim.lr.lgo: unknown key; did you mean 'log'?",
        ),
        ("choose: {seed: [5]}", "plan.yaml:10: choose.seed: unknown key; did you mean 'seeds'?"),
        ("train: {step: 3}", "duplicate key"),
    ],
)
def test_every_key_of_every_mapping_of_a_plan_must_mean_something(tmp_path, text, message):
    assert message in refused(tmp_path, plan=PLAN + text + "\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{recall: {easy: {}}, pariti: {easy: {}}}", "settings.pariti: no such task; did you mean 'parity'?"),
        ("{recall: {easy: {}}, parity: {easy: {task.vocab_size: 8}}}", "task.vocab_size: unknown key"),
        ("{recall: {easy: {seeds: [3]}}}", "seeds is no field of a run"),
        ("{recall: {}}", "settings.recall={} must have a setting"),
    ],
)
def test_settings_of_tasks_that_are_not_swept_are_checked_too(tmp_path, settings, message):
    assert message in refused(tmp_path, plan=PLAN.replace("baseline", settings))


def test_what_a_task_file_varies_is_checked_where_the_plan_does_not_use_it(tmp_path):
    message = refused(tmp_path, task=TASK.replace("task.vocab_size", "task.vocab"))
    assert "task.yaml:4: task.vocab: unknown key; did you mean 'vocab_size'?" in message


def test_a_field_of_mixers_is_set_where_there_is_one(tmp_path):
    mixers = "mixers=[efla, {name: deltanet, heads: 8}, identity, [identity, efla]]"

    def labels(*sets):
        runs = expanded(tmp_path, sets=[mixers, "seeds=[0]", "model.depth=2", *sets]).runs
        return [run.mixer for run in runs]

    four = "efla(heads=4)", "deltanet(heads=4)"
    assert labels("mixers.heads=4") == [*four, "identity", "identity+efla(heads=4)"]
    assert labels("mixers.efla.heads=4") == [four[0], "deltanet", "identity", "identity+efla(heads=4)"]
    assert labels("mixers[1].heads=4") == ["efla", four[1], "identity", "identity+efla"]
    assert labels("mixers[3].heads=4") == ["efla", "deltanet", "identity", "identity+efla(heads=4)"]


def test_a_grid_over_a_mixers_own_field_is_its_own(tmp_path):
    grid = "grid: {mixers.efla.heads: [1, 2, 4]}\nzip: {mixers.deltanet.heads: [1, 4], optim.lr: [0.1, 0.2]}\n"
    found = [(r.mixer, r.optim.lr) for r in expanded(tmp_path, PLAN + grid, sets=["seeds=[0]"]).runs]
    assert found == [(f"efla(heads={h})", lr) for h in (1, 2, 4) for lr in (0.1, 0.2)] + [
        ("deltanet(heads=1)", 0.1),
        ("deltanet(heads=4)", 0.2),
    ]
    settled = expanded(tmp_path, PLAN + grid, sets=["seeds=[0]", "mixers.heads=8", "optim.lr=0.5"]).runs
    assert [(r.mixer, r.optim.lr) for r in settled] == [("efla", 0.5), ("deltanet", 0.5)]


def test_a_list_for_a_field_of_one_value_is_a_grid(tmp_path):
    found = expanded(tmp_path, sets=["optim.lr=[1e-3, 1e-2]", "mixers=[efla]", "seeds=[0]"])
    assert [r.optim.lr for r in found.runs] == [1e-3, 1e-2]
    found = expanded(tmp_path, sets=["mixers.efla.heads=[1, 4]", "seeds=[0]", "optim.betas=[0.5, 0.6]"])
    assert [r.mixer for r in found.runs] == ["efla(heads=1)", "efla(heads=4)", "deltanet(heads=2)"]
    assert {r.optim.betas for r in found.runs} == {(0.5, 0.6)}
    unmatched = PLAN.replace("protocol: custom\n", "unmatched: true\n") + (
        "grid: {optim.lr: [0.1]}\nper_mixer: {efla: {optim.lr: [0.3]}}\n"
    )
    found = expanded(tmp_path, unmatched, sets=["optim.lr=[0.5, 0.6]", "seeds=[0]"])
    assert [r.optim.lr for r in found.runs] == [0.5, 0.6] * 2


def test_set_reaches_into_the_mappings_of_a_plan(tmp_path):
    found = expanded(tmp_path, sets=["grid.optim.lr=[1e-3, 1e-2]", "per_task.recall.train.steps=5", "seeds=[0]"])
    assert {(r.optim.lr, r.steps) for r in found.runs} == {(1e-3, 5), (1e-2, 5)}


def test_settings_are_picked_by_label(tmp_path):
    plan = PLAN.replace("baseline", "{recall: {easy: {task.seq_len: 8}, hard: {}, harder: {task.seq_len: 16}}}")
    assert {r.setting for r in expanded(tmp_path, plan, sets=["settings=hard"]).runs} == {"hard"}
    assert {r.setting for r in expanded(tmp_path, plan, sets=["settings=[easy, hard]"]).runs} == {"easy", "hard"}
    assert {r.setting for r in expanded(tmp_path, plan, sets=["settings=baseline"]).runs} == {"baseline"}
    varied = expanded(tmp_path, PLAN.replace("baseline", "all"), sets=["settings=vocab_size=10"])
    assert {r.task.vocab_size for r in varied.runs} == {10}
    message = refused(tmp_path, plan=plan, sets=["settings=hrad"])
    assert "did you mean 'hard'?" in message


def test_only_the_shipped_plan_has_a_shipped_plans_name(tmp_path):
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "my").mkdir()
    shipped = next(p for p in config.presets("sweeps") if p.stem == "quick")
    names = []
    for path, text in (
        ("my/quick.yaml", PLAN),
        ("quick.yaml", PLAN),
        ("other.yaml", PLAN),
        ("my/other.yaml", PLAN),
        ("my/quick.yaml", shipped.read_text()),
    ):
        (tmp_path / path).write_text(text)
        names.append(expand.expand("task.yaml", path, [], "float32").plan)
    assert names == ["my/quick", "quick.yaml", "other", "my/other", "quick"]
    assert expand.expand("task.yaml", str(shipped), [], "float32").plan == "quick"
    assert expand.expand("task.yaml", str(tmp_path / "my" / "other.yaml"), [], "float32").plan == "my/other"
