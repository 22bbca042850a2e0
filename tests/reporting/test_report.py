"""The report: its numbers are the scores', it needs no other file, and names what is missing."""

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from mad_efla import config
from mad_efla.analysis.leaderboard import leaderboard
from mad_efla.analysis.statistics import Interval
from mad_efla.config import ConfigError
from mad_efla.reporting import charts, figures, page, renderers, report, results
from mad_efla.reporting.figures import spectra, sweeps
from mad_efla.runs.folder import RunFolder
from mad_efla.runs.read import load
from mad_efla.runs.schema import Row, SweepRecord
from mad_efla.runs.sweeps import read_sweeps, write_sweep
from tests import browser
from tests.analysis.test_cells import done
from tests.cli.test_cli import SWEEP, call
from tests.runs.test_folder import result
from tests.tiny import tiny

MIXERS = ("efla", "deltanet")
LENGTHS = (8, 12, 16)
RATES = (0.01, 0.02)


@pytest.fixture(autouse=True)
def without_spectra(monkeypatch):
    """Fabricated runs have no weights, and `tests/test_figures.py` draws spectra."""
    monkeypatch.setattr(spectra, "diagnose", lambda *a: pytest.fail("no weights to look at"))


@pytest.fixture
def without_figures(monkeypatch):
    for name in charts.DRAW:
        monkeypatch.setitem(charts.DRAW, name, lambda chapter: [])


def grid(seeds=(0, 1), rates=RATES, lengths=LENGTHS, mixers=MIXERS, **fields):
    return [
        tiny(
            mixers=[mixer],
            task__seq_len=length,
            seed=seed,
            optim__lr=rate,
            setting="baseline" if length == lengths[0] else f"seq_len={length}",
            **fields,
        )
        for mixer in mixers
        for length in lengths
        for rate in rates
        for seed in seeds
    ]


def accuracy(run):
    """Give every run a score of its own."""
    worse = 0.1 * (run.mixer != "efla") + 0.2 * (run.optim.lr != RATES[0])
    return 0.93 - worse - 0.003 * run.task.seq_len - 0.0171 * run.seed


def finish(out, run, **fields):
    folder = RunFolder(out, run.fingerprint)
    folder.create(run)
    share = accuracy(run)
    folder.append([Row(step, step, {"val/token_accuracy": share * step / 30}) for step in (10, 20, 30)])
    sizes = {"state_size": 256 if run.mixer == "efla" else 512, "ended": 86_400_000}
    folder.finish(done(run, share, share, **(sizes | fields)))


def sweep(out, runs, plan="plan", protocol="custom"):
    record = SweepRecord(
        id=config.digest(plan),
        task="recall",
        plan=plan,
        protocol=protocol,
        command="mad-efla sweep recall",
        fingerprints=tuple(r.fingerprint for r in runs),
        started=1,
        ended=2,
    )
    write_sweep(out, record)


def made(out, runs, **fields):
    for run in runs:
        finish(out, run, **fields)
    sweep(out, runs)
    return out


def html(out):
    return report.write(out, out / "report" / "index.html")[0].read_text()


def titles(text):
    return re.findall(r"<h3>(.*?)</h3>", text)


class Page(HTMLParser):
    """Collects text, tags and what is referred to; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.references, self.ids, self.open = [], set(), [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self._note(attrs)

    def _note(self, attrs):
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                self.references.append(value)
            self.references += re.findall(r"url\((.*?)\)", value or "")
            self.ids += [value] * (name == "id")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_numbers_are_those_of_the_scores(tmp_path):
    runs = grid()
    text = "\n".join(Page(html(made(tmp_path, runs))).words)
    (group,) = load(tmp_path)
    board = leaderboard(group)
    intervals = [t.accuracy for t in board.tasks] + [cell.accuracy for cell in board.cells]
    for mean, low, high in intervals:
        assert re.search(rf"\b{100 * mean:.1f}\s+\[{100 * low:.1f}, {100 * high:.1f}\]", text), mean
    (pair,) = board.pairs
    assert "efla - deltanet" in text  # the higher one first
    mean = pair.difference.mean
    assert f"[{100 * mean.low:.1f}, {100 * mean.high:.1f}]" in text
    assert f"{pair.p_corrected:.3g}" in text


def test_both_pages_show_the_same_tables(tmp_path, without_figures):
    runs = grid()
    for run in runs[1:]:
        finish(tmp_path, run)
    sweep(tmp_path, runs)
    (chapter,) = page.chapters(tmp_path)
    wanted = [block for section in chapter.sections() for block in section.blocks if isinstance(block, page.Table)]
    assert len(wanted) >= 5
    words = " ".join(" ".join(Page(html(tmp_path)).words).split())
    text = results.sections(tmp_path)["plan"]
    for table in wanted:
        assert renderers.markdown(table) in text
        assert " ".join(" ".join(Page(str(renderers.html(table))).words).split()) in words


def test_what_a_section_leads_with_stands_above_its_tables_on_both_pages(tmp_path, monkeypatch, without_figures):
    made(tmp_path, grid(rates=RATES[:1], lengths=LENGTHS[:1]))
    sections = page.Chapter.sections
    said = ("One thing is <sure>.", "Another is not.")
    monkeypatch.setattr(page.Chapter, "sections", lambda c: [s._replace(lead=said) for s in sections(c)])
    for text in ("\n".join(Page(html(tmp_path)).words), results.sections(tmp_path)["plan"]):
        places = [text.index(words) for words in (*said, "rank")]
        assert places == sorted(places)


def test_every_figure_that_a_page_names_can_be_drawn_and_is_named(tmp_path):
    (chapter,) = page.chapters(made(tmp_path, grid()))
    chapter = chapter._replace(arms=["a mixer that was probed"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page.tables, "corruption", lambda arms: [])
        named = [b.name for s in chapter.sections() for b in s.blocks if isinstance(b, page.Charts)]
    assert sorted(named) == sorted(charts.DRAW)


def test_commands_are_set_as_code_each_in_a_line_of_its_own(tmp_path, without_figures):
    made(tmp_path, grid(rates=RATES[:1], lengths=LENGTHS[:1]))
    record = read_sweeps(tmp_path)[0].model_copy(
        update={"id": "other", "started": 2, "command": "mad-efla sweep '<b>'"}
    )
    write_sweep(tmp_path, record)
    assert "<code>mad-efla sweep recall</code><br><code>mad-efla sweep &#39;&lt;b&gt;&#39;</code>" in html(tmp_path)
    assert "`mad-efla sweep recall`<br>`mad-efla sweep '<b>'`" in results.sections(tmp_path)["plan"]


def test_a_page_has_every_section_that_runs_can_fill(tmp_path):
    text = html(made(tmp_path, grid()))
    assert titles(text) == [
        "Scores",
        "Settings",
        "Difficulty",
        "Learning",
        "Memory",
        "Learning rate",
        "Paired differences",
        "Protocol and versions",
    ]
    assert "1970-01-02" in text


def test_there_is_no_section_without_something_to_show(tmp_path):
    runs = grid(rates=RATES[:1], lengths=LENGTHS[:1], mixers=MIXERS[:1], seeds=(0,))
    text = html(made(tmp_path, runs))
    assert titles(text) == ["Scores", "Settings", "Learning", "Protocol and versions"]
    sweep(tmp_path, grid(seeds=(7,)), plan="later")
    assert html(tmp_path).count("0 of 12 runs are done") == 1


def test_it_needs_no_other_file_and_runs_nothing(tmp_path):
    found = Page(html(made(tmp_path, grid())))
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    assert found.references
    assert all(reference.startswith("#") for reference in found.references)
    assert len(found.ids) == len(set(found.ids))
    assert {reference[1:] for reference in found.references} <= set(found.ids)


def test_labels_are_escaped(tmp_path):
    runs = grid(rates=RATES[:1])
    runs = [r.model_copy(update={"setting": f"<b onload='x'>&{r.setting}"}) for r in runs]
    for run in runs:
        finish(tmp_path, run)
    sweep(tmp_path, runs, plan="<script>alert(1)</script>")
    text = html(tmp_path)
    assert "<script" not in text
    assert "<b onload" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b onload=&#39;x&#39;&gt;&amp;baseline" in text


def test_equal_files_give_equal_bytes(tmp_path):
    out = made(tmp_path / "runs", grid())
    first, again = (report.write(out, tmp_path / to / "index.html") for to in ("a", "b"))
    assert len(first) > 10
    assert [p.name for p in first] == [p.name for p in again]
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes().splitlines() == other.read_bytes().splitlines(), one.name


def test_what_failed_diverged_or_is_missing_is_named(tmp_path, without_figures):
    runs = grid()
    failed, diverged, stopped, waiting = runs[:4]
    for run in runs[4:]:
        finish(tmp_path, run)
    for run, kind, why in ((failed, "failed", "no <memory>"), (stopped, "interrupted", "Ctrl-C")):
        folder = RunFolder(tmp_path, run.fingerprint)
        folder.create(run)
        folder.fail(kind, why, "trace")
    RunFolder(tmp_path, waiting.fingerprint).create(waiting)
    gone = {"test": None, "validation": None, "stopped": "loss not finite at step 3", "steps": 3}
    folder = RunFolder(tmp_path, diverged.fingerprint)
    folder.create(diverged)
    folder.finish(result(diverged.fingerprint, status="diverged", **gone))
    lost = tiny(seed=99)
    sweep(tmp_path, [*runs, lost])
    text = html(tmp_path)
    assert "Failed and diverged" in titles(text)
    for words in (
        "no &lt;memory&gt;",
        "Ctrl-C",
        "loss not finite at step 3",
        failed.fingerprint,
        diverged.fingerprint,
        "without a folder",
        "1 diverged, 3 missing",
        "21 of 25 runs are done",
    ):
        assert words in text, words


def test_plans_protocols_and_unlike_budgets_are_kept_apart(tmp_path):
    short, long = grid(rates=RATES[:1]), grid(rates=RATES[:1], train__steps=40)
    for run in [*short, *long]:
        finish(tmp_path, run)
    sweep(tmp_path, [*short, *long], plan="both")
    sweep(tmp_path, short, plan="one")
    text = html(tmp_path)
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["both, protocol custom", "one, protocol custom"]
    (both, one) = page.chapters(tmp_path)
    assert len(both.board.cells) == 2 * len(one.board.cells) == 12
    assert both.board.tasks[0].settings == 6


def test_the_command_writes_the_page_and_its_figures(files, monkeypatch):
    monkeypatch.undo()  # these runs have weights, so spectra are drawn
    monkeypatch.chdir(files)
    call(*SWEEP)
    assert call("report").stdout == "runs/report/index.html\n"
    text = (files / "runs" / "report" / "index.html").read_text()
    assert "Spectra" in titles(text)
    written = {p.name for p in (files / "runs" / "report" / "figures").iterdir()}
    assert {"plan-custom-scores.png", "plan-custom-scores.svg"} <= written
    assert len(re.findall(r"<figure class", text)) == len(written) / 2
    call("report", "runs", "--to", "mine/page.html")
    assert (files / "mine" / "page.html").read_text() == text


def test_a_folder_without_sweeps_and_a_page_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no sweep"):
        html(tmp_path)
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(ConfigError, match="name another"):
        html(made(tmp_path, grid(seeds=(0,))))


# ------------------------------------------------------------------ figures


def test_rows_show_means_and_intervals():
    figure = sweeps.rows({"a": Interval(0.5, 0.4, 0.7), "b": Interval(0.2, None, None)}, x_label="x")
    (axes,) = figure.axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]
    ends = [c.get_segments()[0][:, 0].tolist() for c in axes.collections]
    assert ends == [pytest.approx([40, 70]), pytest.approx([20, 20])]


def test_a_heat_map_says_every_score_and_leaves_out_none_there_is_not():
    scored = {("a", "s"): Interval(0.5, 0.4, 0.7), ("b", "t"): Interval(1.0, None, None)}
    (axes,) = sweeps.heat_map(scored).axes
    assert [t.get_text() for t in axes.texts] == ["50.0\n[40.0, 70.0]", "100.0"]


def test_a_narrow_figure_stacks_its_panels():
    curve = sweeps.Curve("a", [1.0, 8.0], [Interval(0.5, 0.4, 0.7), Interval(0.1, 0.0, 0.2)])
    panels = [sweeps.Panel(title, "x", [curve]) for title in "pqr"]
    wide, narrow = (sweeps.curves(panels, ["a"], width=w) for w in (figures.PAGE, 3.5))
    columns = [{round(a.get_subplotspec().colspan.start) for a in f.axes} for f in (wide, narrow)]
    assert columns == [{0, 1, 2}, {0}]
    assert all(isinstance(f, Figure) for f in (wide, narrow))
    assert wide.axes[0].get_xscale() == "log"


def test_a_legend_of_many_long_names_stays_inside_a_figure_of_one_panel():
    names = [f"delta(keys=l2, heads={n})" for n in range(6)]
    content = [sweeps.Curve(name, [1, 2], [Interval(0.5, None, None)] * 2) for name in names]
    figure = sweeps.curves([sweeps.Panel("task", "x", content)], names)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    inside, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= inside.x0 <= inside.x1 <= whole.x1
    assert whole.y0 <= inside.y0 <= inside.y1 <= whole.y1


def test_words_on_an_axis_are_spaced_evenly():
    curve = sweeps.Curve("a", ["False", "True"], [Interval(0.5, None, None)] * 2)
    (axes,) = sweeps.curves([sweeps.Panel("p", "x", [curve])], ["a"]).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["False", "True"]
    assert axes.get_xticks().tolist() == [0, 1]


@pytest.mark.parametrize("least", [0, 100])
def test_memory_has_a_place_for_mixers_that_carry_nothing(least):
    points = [
        sweeps.StatePoint("a", (least, least), Interval(0.1, 0.0, 0.2)),
        sweeps.StatePoint("b", (400, 900), Interval(0.6, 0.5, 0.7)),
    ]
    (axes,) = sweeps.memory([sweeps.Panel("t", "state", points)], ["a", "b"]).axes
    low, high = axes.get_xlim()
    assert low < least
    assert high > 900
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "os"]
    assert marks == pytest.approx([least, 600])


@pytest.mark.browser
@pytest.mark.skipif(bool(browser.missing()), reason=str(browser.missing()))
@pytest.mark.parametrize(("width", "shown"), [(1280, "page"), (390, "phone")])
def test_a_browser_shows_the_figures_that_fit_and_asks_for_nothing(tmp_path, width, shown):
    made(tmp_path, grid())
    path = report.write(tmp_path, tmp_path / "index.html")[0]
    with browser.page(width, 900) as opened:
        asked, said = [], []
        opened.on("request", lambda r: asked.append(r.url))
        opened.on("console", lambda m: said.append(m.text))
        opened.goto(path.as_uri())
        assert asked == [path.as_uri()]
        assert said == []
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        figures_shown = opened.locator(".both .scroll:visible")
        assert figures_shown.count() == opened.locator(".both").count() > 5
        classes = figures_shown.evaluate_all("all => all.map(x => x.className)")
        assert set(classes) == {f"scroll {shown}"}
