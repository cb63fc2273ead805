"""The report page: what a run left, as one file."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from trainwright.runtime.manifest import SCHEMA_VERSION, Manifest, Stage
from trainwright.runtime.report.curves import MAX_POINTS, curve, perplexity_nats, read_metrics
from trainwright.runtime.report.page import write_report
from trainwright.runtime.workspace import Workspace

EVIL = "<script>document.title = 'ran'</script>"
SOURCE = "<b onclick=1>prose</b>"
STEPS = 300


def a_stage(name: str, needs: tuple[str, ...] = ()) -> Stage:
    return Stage(name, name, f"{name}.py", "0" * 16, "python", 1, 1, needs, (), ("output",), implied=False)


MANIFEST = Manifest(
    schema_version=SCHEMA_VERSION,
    name=EVIL,
    run_id="3f9c2a71",
    data_root=".",
    stages=(a_stage("ingest"), a_stage("pretrain", ("ingest",))),
    files={},
)
PLAN = {
    "cluster": {"device": f"cpu {EVIL}"},
    "estimates": {"tokens_per_s": 4321.0, "parameters": 1234567},
    "training": {"steps": STEPS},
}


def a_row(step: int) -> dict[str, Any]:
    row = {"step": step, "tokens": step * 4096, "loss": 7.25 - step / 100, "learning_rate": 0.003, "grad_norm": 1.5}
    row |= {"tokens_per_s": 4000.5}
    return row | ({"validation/code": 3.375, f"validation/{SOURCE}": 4.4375} if step % 100 == 0 else {})


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A run whose ingest is done and whose pretrain is done too, with curves, a baseline and a sample."""
    place = Workspace(bundle=tmp_path, work=tmp_path / "work", data_root=tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    for name in ("ingest", "pretrain"):
        place.stage(name).output.mkdir(parents=True)
    place.stage("ingest").summary.write_text(
        json.dumps({"key_figure": f"5 documents {EVIL}", "documents": {"code": 5}})
    )
    figure = {"key_figure": "test perplexity 24.2", "sample": f"def f(): {EVIL}", "test": {"bits_per_byte": 1.93}}
    place.stage("pretrain").summary.write_text(json.dumps(figure))
    rows = [*map(a_row, range(1, STEPS + 1)), {"step": STEPS, "test/perplexity": 24.2, "bigram/perplexity": 89.2}]
    place.stage("pretrain").metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {"state": "done", "attempts": 2, "duration_s": 3723.0, "note": ""}
    (tmp_path / "work" / "state.json").write_text(json.dumps({"stages": {"ingest": done, "pretrain": done}}))
    return place


class Page(HTMLParser):
    """The page's text outside scripts, and its elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words, self._inside = "", ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words += f"{data} "


def traces(text: str) -> dict[str, dict[str, Any]]:
    """Every trace that the page hands to plotly, by name."""
    found: dict[str, dict[str, Any]] = {}
    for match in re.finditer(r'Plotly\.newPlot\(\s*"[^"]+",\s*', text):
        data, _ = json.JSONDecoder().raw_decode(text[match.end() :])
        found |= {trace["name"]: trace for trace in data}
    return found


def test_the_page_holds_the_curves(workspace: Workspace) -> None:
    text = write_report(workspace.bundle, MANIFEST, workspace).read_text()
    drawn = traces(text)
    assert drawn["training"]["y"] == [7.25 - step / 100 for step in range(1, STEPS + 1)]
    assert drawn["training"]["x"] == [step * 4096 for step in range(1, STEPS + 1)]
    assert drawn["validation/code"]["y"] == [3.375] * 3
    assert drawn["bigram model, test: 4.491"]["y"] == pytest.approx([4.49088, 4.49088], abs=1e-5)  # ln 89.2
    assert drawn["test, after training: 3.186"]["y"] == pytest.approx([3.18635, 3.18635], abs=1e-5)  # ln 24.2
    assert drawn["expected by the plan: 4321"]["y"] == [4321.0, 4321.0]
    assert drawn["measured"]["y"] == [4000.5] * STEPS
    assert {"learning rate", "gradient norm"} <= drawn.keys()


def test_the_page_escapes_every_text(workspace: Workspace) -> None:
    path = write_report(workspace.bundle, MANIFEST, workspace)
    page = Page(path)
    assert EVIL not in path.read_text()
    assert page.words.count(EVIL) == 5  # title, heading, device, key figure, sample
    assert not any("onclick" in attributes for _, attributes in page.elements)
    assert "validation/&lt;b onclick=1&gt;prose&lt;/b&gt;" in traces(path.read_text()), "plotly reads HTML in names"


def test_the_page_needs_no_network(workspace: Workspace) -> None:
    page = Page(write_report(workspace.bundle, MANIFEST, workspace))
    assert not [one for one in page.elements if one[0] == "link" or {"src", "href"} & one[1].keys()]


def test_the_page_states_the_stages_and_figures(workspace: Workspace) -> None:
    words = " ".join(Page(write_report(workspace.bundle, MANIFEST, workspace)).words.split())
    for text in ("run 3f9c2a71", "parameters 1,234,567", "pretrain done 2 1 h 2 min test perplexity 24.2"):
        assert text in words
    assert "test.bits_per_byte 1.93" in words
    assert "documents.code 5" in words


def test_a_run_that_has_not_begun_has_a_page_too(tmp_path: Path) -> None:
    place = Workspace(bundle=tmp_path, work=tmp_path / "work", data_root=tmp_path)
    path = write_report(tmp_path, MANIFEST, place)
    words = Page(path).words
    assert "No stage has written metrics yet" in words
    assert words.count("pending") == 2
    assert path.stat().st_size < 20_000, "no plotly without charts"


def test_a_run_that_failed_says_why_and_has_its_curves(workspace: Workspace) -> None:
    state = {"state": "failed", "attempts": 1, "duration_s": 2.0, "note": "rank 1 of 2 was killed by SIGKILL"}
    (workspace.work / "state.json").write_text(json.dumps({"stages": {"pretrain": state}}))
    with workspace.stage("pretrain").metrics.open("a") as file:
        file.write('{"step": 301, "loss": NaN}\n{"step": 302, "lo')  # diverged, and killed while it wrote
    path = write_report(workspace.bundle, MANIFEST, workspace)
    page = Page(path)
    assert "rank 1 of 2 was killed by SIGKILL" in page.words
    assert "test perplexity 24.2" not in page.words, "a figure of an earlier attempt"
    assert len(traces(path.read_text())["training"]["y"]) == STEPS


def figure(value: float, half: float, n: int = 750, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, **more}


RESULTS = {
    "model": "dpo",
    "about": {
        "accuracy/quiz": {"items": "questions", "interval": "Wilson", "chance": 0.25},
        "perplexity": {"items": "windows of 256 tokens", "interval": "bootstrap", "chance": None},
    },
    "metrics": {
        "dpo": {
            "perplexity": figure(45.25, 1.0, 1800, higher_is_better=False),
            "accuracy/quiz": figure(0.365, 0.035, higher_is_better=True),
        },
        SOURCE: {
            "perplexity": figure(44.25, 1.0, 1800, higher_is_better=False),
            "accuracy/quiz": figure(0.27, 0.03, higher_is_better=True),
        },
    },
    "differences": {SOURCE: {"perplexity": figure(1.0, 0.25, 1800), "accuracy/quiz": figure(0.095, 0.1)}},
    "baselines": {"bigram": {"perplexity": 89.24}},
    "gates": [
        {
            "metric": "accuracy/quiz",
            "threshold": 0.5,
            **figure(0.365, 0.035),
            "margin": -0.135,
            "passed": False,
            "clear": True,
        },
        {"metric": "perplexity", "threshold": 60, **figure(45.25, 1.0), "margin": 14.75, "passed": True, "clear": True},
    ],
}


@pytest.fixture
def evaluated(workspace: Workspace) -> tuple[Workspace, Manifest]:
    """The run, and an evaluation that failed by a gate: figures, and no summary."""
    folder = workspace.stage("evaluate")
    folder.output.mkdir(parents=True)
    (folder.output / "results.json").write_text(json.dumps(RESULTS))
    state = json.loads((workspace.work / "state.json").read_text())
    state["stages"]["evaluate"] = {"state": "failed", "attempts": 1, "duration_s": 60.0, "note": "a gate failed"}
    (workspace.work / "state.json").write_text(json.dumps(state))
    return workspace, replace(MANIFEST, stages=(*MANIFEST.stages, a_stage("evaluate", ("pretrain",))))


def test_the_page_holds_the_evaluation(evaluated: tuple[Workspace, Manifest]) -> None:
    workspace, manifest = evaluated
    path = write_report(workspace.bundle, manifest, workspace)
    page = Page(path)
    words = " ".join(page.words.split())
    for text in (
        "accuracy/quiz 750 questions 0.365 [0.330, 0.400] 0.270 [0.240, 0.300] +0.095 [-0.005, +0.195]",
        "perplexity 1,800 windows of 256 tokens 45.2 [44.2, 46.2] 44.2 [43.2, 45.2] +1.000 [+0.750, +1.250]",
        f"dpo - {SOURCE}",
        "bigram, on the same tokens: perplexity 89.2",
        "gate failed accuracy/quiz: 0.365 [0.330, 0.400], threshold 0.5, missed by 0.135; the 95 % interval excludes",
        "gate passed perplexity: 45.2 [44.2, 46.2], threshold 60, by 14.8",
    ):
        assert text in words
    marked = [attributes.get("class") for tag, attributes in page.elements if tag == "td"]
    assert marked.count("worse") == 1, "a higher perplexity"
    assert marked.count("better") == 0, "an interval that holds 0"


def test_the_page_draws_shares_beside_chance(evaluated: tuple[Workspace, Manifest]) -> None:
    workspace, manifest = evaluated
    drawn = traces(write_report(workspace.bundle, manifest, workspace).read_text())
    assert drawn["dpo"]["y"] == [0.365]
    assert drawn["dpo"]["error_y"]["array"] == pytest.approx([0.035])
    assert drawn["&lt;b onclick=1&gt;prose&lt;/b&gt;"]["y"] == [0.27], "plotly reads HTML in names"
    assert drawn["chance"]["y"] == [0.25, 0.25, None]


@pytest.mark.parametrize("text", ["{}", '{"model": "dpo"}', "[]", '{"model": "dpo", "metrics": {}}', "{"])
def test_results_that_hold_nothing_are_no_section(evaluated: tuple[Workspace, Manifest], text: str) -> None:
    workspace, manifest = evaluated
    (workspace.stage("evaluate").output / "results.json").write_text(text)
    assert "gate" not in Page(write_report(workspace.bundle, manifest, workspace)).words.replace("a gate failed", "")


def test_every_training_stage_has_its_curves_and_no_share_is_drawn_as_a_loss(
    evaluated: tuple[Workspace, Manifest],
) -> None:
    workspace, manifest = evaluated
    rows = [
        {"step": 1, "loss": 0.69, "accuracy": 0.5, "margin": 0.25},
        {"step": 2, "loss": 0.6, "validation/preference_accuracy": 0.625, "validation/chosen_log_probability": -72.5},
    ]
    workspace.stage("evaluate").metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(workspace.bundle, manifest, workspace).read_text()
    charts = re.findall(r"<h3>([^<]*)</h3>", text)
    assert charts.count("Loss") == 2
    assert {"Preference", "Margin", "Chosen answers"} <= set(charts)
    loss = re.search(r'"chart-evaluate-0",\s*(\[.*?\]),\s*\{', text, re.DOTALL)
    assert loss is not None
    assert [trace["name"] for trace in json.loads(loss[1])] == ["training"]


def test_a_step_done_again_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 2, "loss": 3.5},
        {"step": 2, "bigram/perplexity": 1.0},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = read_metrics(file)
    assert curve(metrics, "loss").values == (5.0, 3.5)
    assert curve(metrics, "loss").tokens == ()
    assert perplexity_nats(metrics, "bigram") == 0.0
    assert perplexity_nats(metrics, "test") is None


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 10 * MAX_POINTS + 4)]
    thin = curve(rows, "loss")
    assert len(thin.values) <= MAX_POINTS + 1
    assert (thin.values[0], thin.values[-1]) == (1.0, 10 * MAX_POINTS + 3.0)


def test_the_report_imports_no_torch() -> None:
    code = "import sys; import trainwright.runtime.report.page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.full
def test_a_browser_draws_the_page(evaluated: tuple[Workspace, Manifest], tmp_path: Path) -> None:
    """Costs about 5 s."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    workspace, manifest = evaluated
    path = write_report(workspace.bundle, manifest, workspace)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *options, "--virtual-time-budget=10000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    drawn = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    for name in ("training", "bigram model, test: 4.491", "expected by the plan: 4321", "chance"):
        assert re.search(rf'<text class="legendtext"[^>]*>{re.escape(name)}', drawn), name
    assert len(re.findall(r'<path class="js-line" d="M', drawn)) >= 4
    assert len(re.findall(r'<g class="point"><path', drawn)) == 2, "a bar a model"
    assert "<title>ran</title>" not in drawn
