"""`trainwright diff`: two specs, plans or bundles, through the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAINWRIGHT = str(Path(sys.executable).with_name("trainwright"))
TINY = str(ROOT / "specs" / "tiny.yaml")
NODES = str(ROOT / "specs" / "many_nodes.yaml")
PROGRAM = "05_pretrain.py"


def trainwright(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [TRAINWRIGHT, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def found(*arguments: str | Path, code: int = 1) -> dict[str, Any]:
    result = trainwright("diff", *arguments, "--json")
    assert (result.returncode, result.stderr) == (code, ""), result.stdout + result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    assert answer["same"] == (code == 0)
    return answer


def changes(answer: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {change["path"]: (change["a"], change["b"]) for change in answer["changes"]}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff") / "bundle"
    assert trainwright("compile", TINY, "-o", folder).returncode == 0
    return folder


@pytest.fixture
def bundle(compiled: Path, tmp_path: Path) -> Path:
    """A bundle to edit."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in compiled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.full
def test_a_spec_its_plan_and_its_bundle_are_the_same(compiled: Path) -> None:
    """About 3 s."""
    for other in (TINY, compiled / "plan.json", compiled):
        answer = found(TINY, other, code=0)
        assert (answer["changes"], answer["programs"], answer["edited"]) == ([], [], {"a": [], "b": []})
        assert all(figure["a"] == figure["b"] for figure in answer["estimates"])
    assert [answer[side]["kind"] for side in "ab"] == ["spec", "bundle"]
    assert trainwright("diff", compiled, compiled).stdout.endswith("\nno difference\n")


def test_a_changed_layout_shows_leaves_reasons_and_what_it_does(compiled: Path) -> None:
    answer = found(compiled / "plan.json", TINY, "--set", "layout.tensor=2")
    assert changes(answer)["layout.tensor"] == (1, 2)
    assert changes(answer)["layout.data"] == (2, 1)
    assert not any(path.startswith(("shape.", "training.", "estimates")) for path in changes(answer))
    (tensor,) = (change for change in answer["changes"] if change["path"] == "layout.tensor")
    assert tensor["why_b"] == "pinned: layout.tensor at --set layout.tensor=2"
    plans = [json.loads((compiled / "plan.json").read_text())]
    plans.append(json.loads(trainwright("plan", TINY, "--set", "layout.tensor=2", "--json").stdout))
    a, b = (plan["estimates"] for plan in plans)
    figures = {figure["name"]: figure for figure in answer["estimates"]}
    for name, values in {
        "step": (a["step_s"], b["step_s"]),
        "memory": (a["memory"]["total"], b["memory"]["total"]),
        "time in all": (a["totals"]["duration_s"], b["totals"]["duration_s"]),
    }.items():
        assert (figures[name]["a"], figures[name]["b"]) == values
        assert figures[name]["change"] == pytest.approx(values[1] / values[0] - 1)
    assert answer["a"]["run_id"] == answer["b"]["run_id"]


def test_money_and_loss_are_side_by_side() -> None:
    answer = found(NODES, NODES, "--set", "data.tokens=2.8T", "--set", "compute.budget=60 days")
    figures = {figure["name"]: figure for figure in answer["estimates"]}
    assert figures["money of pretrain"]["change"] == pytest.approx(1.0, abs=1e-4)
    assert figures["money in all"]["change"] > 0.99
    assert figures["loss"]["unit"] == "nats"
    assert -0.1 < figures["loss"]["change"] < 0
    assert answer["a"]["run_id"] != answer["b"]["run_id"]
    text = trainwright("diff", NODES, NODES, "--set", "data.tokens=2.8T", "--set", "compute.budget=60 days").stdout
    assert re.search(r"^money of pretrain +\$\S+ +\$\S+ +\+100 %$", text, re.MULTILINE)
    assert "another run: B trains another model than A" in text


def test_losses_by_two_laws_have_no_difference() -> None:
    answer = found(NODES, NODES, "--set", "scaling.law=hoffmann2022_3")
    (loss,) = (figure for figure in answer["estimates"] if figure["name"] == "loss")
    assert loss["a"] != loss["b"]
    assert loss["change"] is None


def test_items_of_lists_go_by_their_names() -> None:
    """What is put in front of the others does not make them differ."""
    sources = "[{name: new, path: new.txt, weight: 1}, {name: web, path: 'corpus/web/*.jsonl', weight: 0.6}"
    sources += ", {name: code, path: 'corpus/code/*.jsonl', weight: 0.4, filters: code}]"
    changed = changes(found(NODES, NODES, "--set", f"data.sources={sources}"))
    assert changed["data.sources[new].path"] == (None, "new.txt")
    assert changed["data.sources[web].weight"] == (0.6, 0.3)
    assert "data.sources[web].path" not in changed
    text = trainwright("diff", NODES, NODES, "--set", f"data.sources={sources}").stdout
    assert re.search(r"^data\.sources +\+ new$", text, re.MULTILINE)


@pytest.mark.full
def test_what_an_edit_does_to_a_program_counts_and_how_it_looks_does_not(bundle: Path, compiled: Path) -> None:
    """About 3 s."""
    edit(bundle / "06_sft.py", "from trainwright", "# a comment\nfrom trainwright")
    edit(bundle / PROGRAM, "keep_last=3", "keep_last=7")
    for other in (compiled, TINY):
        answer = found(other, bundle)
        (program,) = answer["programs"]
        assert (program["stage"], program["a"], program["b"]) == ("pretrain", PROGRAM, PROGRAM)
        (removed,), (added,) = program["removed"], program["added"]
        assert (removed.replace("keep_last=3", "keep_last=7"), "keep_last=7" in added) == (added, True)
        assert answer["edited"] == {"a": [], "b": [PROGRAM, "06_sft.py"]}
        assert not answer["changes"]
    text = trainwright("diff", compiled, bundle).stdout
    assert f"program {PROGRAM}: code differs, 2 lines\n" in text
    assert text.endswith(f"not as compiled in B: {PROGRAM}, 06_sft.py\n")
    assert found(bundle, bundle, code=0)["edited"] == {"a": [], "b": []}


def test_a_program_that_does_not_parse_is_named_with_its_line(bundle: Path, compiled: Path) -> None:
    (bundle / PROGRAM).write_text("x = 1\ndef main(:\n")
    (program,) = found(compiled, bundle)["programs"]
    assert program["fault"].startswith(f"{PROGRAM}:2: ")


def test_a_stage_more_is_a_program_more(compiled: Path, tmp_path: Path) -> None:
    answer = found(compiled, TINY, "--set", "stages.extra={kind: sft, data: x.jsonl}")
    assert [(program["stage"], program["a"]) for program in answer["programs"]] == [("extra", "")]
    assert changes(answer)["sft[extra].path"] == (None, "x.jsonl")


def refused(code: int, message: str, *arguments: str | Path) -> None:
    result = trainwright("diff", *arguments)
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert message in result.stderr, result.stderr


@pytest.mark.full
def test_what_cannot_be_read_is_more_than_a_difference(bundle: Path, tmp_path: Path) -> None:
    """About 6 s."""
    refused(8, "there is no such file", TINY, tmp_path / "none.yaml")
    refused(20, "it is not a bundle", TINY, tmp_path)
    refused(2, "whose values are decided", TINY, bundle, "--set", "layout.tensor=2")
    (tmp_path / "bad.yaml").write_text("a: 1\n")
    refused(3, "bad.yaml:1: a: unknown key", tmp_path / "bad.yaml", TINY)
    plan = json.loads((bundle / "plan.json").read_text())
    for number, (damage, message) in enumerate(
        [
            ({"schema_version": 1}, "it has schema version 1; this trainwright reads version"),
            ({"layout": {**plan["layout"], "tensor": "two"}}, "layout.tensor is 'two', where int belongs"),
            ({"layout": {"tensor": 1}}, "layout has not the fields of Layout"),
        ]
    ):
        file = tmp_path / f"damaged-{number}.json"
        file.write_text(json.dumps(plan | damage))
        refused(8, message, TINY, file)
    (bundle / "plan.json").write_text("{")
    refused(8, "plan.json: ", bundle, TINY)
    (bundle / "plan.json").unlink()
    refused(8, "has no plan.json", bundle, TINY)
    (bundle / "manifest.json").write_text("{}")
    refused(20, "manifest.json", bundle, TINY)


def test_the_page_shows_what_there_is(request: pytest.FixtureRequest) -> None:
    """`make golden` rewrites it."""
    page = ROOT / "docs" / "diff.md"
    text = page.read_text()
    (command,) = re.findall(r"`trainwright (diff .*)`:\n\n<!-- begin diff -->", text)
    shown = trainwright(*command.split()).stdout
    assert shown
    wanted = re.sub(
        r"(?s)(<!-- begin diff -->\n```\n).*?(```\n<!-- end)", lambda match: match[1] + shown + match[2], text
    )
    if request.config.getoption("--rewrite-golden"):
        page.write_text(wanted)
    else:
        assert text == wanted, "run `make golden` and read the diff"
