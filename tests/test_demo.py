"""What `make demo` promises: specs/tiny.yaml becomes a model that answers, measured on packages that no stage trained on.

About 9 minutes on 2 free cores.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")
pytestmark = [pytest.mark.full, pytest.mark.timeout(2400)]
MOST_LIKELIHOOD_LOST = 5  # nats of the chosen answers' mean log-probability, by alignment


@pytest.fixture(scope="module")
def demo(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The work folder of an executed tiny bundle, and what was printed."""
    bundle = tmp_path_factory.mktemp("demo") / "bundle"
    said = ""
    for command in (
        ["compile", repository / "specs" / "tiny.yaml", "-o", bundle],
        ["run", bundle],
        ["chat", bundle, "--message", "What does the function `os.path.join(path, *paths)` do?"],
    ):
        done = subprocess.run([TRAINWRIGHT, *command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    return bundle / "work", said


@pytest.fixture(scope="module")
def results(demo: tuple[Path, str]) -> Any:
    found = json.loads((demo[0] / "evaluate" / "output" / "results.json").read_text())
    for model, metrics in found["metrics"].items():
        print(model, {name: round(metric["value"], 4) for name, metric in metrics.items()})
    print({name: difference for name, difference in found["differences"]["sft"].items() if "accuracy" in name})
    return found


def test_every_stage_ends_in_the_table_and_the_page(demo: tuple[Path, str]) -> None:
    work, said = demo
    assert all(
        json.loads((work / "state.json").read_text())["stages"][name]["state"] == "done" for name in said_stages(said)
    )
    assert len(said_stages(said)) == 9
    page = (work / "report.html").read_text()
    assert "accuracy/python-summaries" in page
    assert "<svg" in page or "Plotly" in page


def said_stages(said: str) -> list[str]:
    """The stages that the printed table calls done; lines of progress ("ingest: done in 3 s") are none of its rows."""
    rows = [line.split() for line in said.splitlines()]
    return [row[0] for row in rows if len(row) > 1 and row[1] == "done" and not row[0].endswith(":")]


def test_the_split_is_kept_by_every_stage(demo: tuple[Path, str]) -> None:
    """No group of the test pairs is one that a document of the training split comes from."""
    work, _ = demo
    trained = set()
    for path in (work / "curate" / "output" / "train").glob("*.jsonl"):
        trained |= {json.loads(line)["metadata"]["group"] for line in path.read_text().splitlines()}
    groups = json.loads((work / "dpo" / "checkpoints" / newest(work / "dpo") / "split.json").read_text())["groups"]
    assert trained <= {group for group, split in groups.items() if split == "train"}


def newest(stage: Path) -> str:
    return max(path.parent.name for path in (stage / "checkpoints").glob("step-*/run.json"))


def test_pretraining_beats_the_bigram(demo: tuple[Path, str], results: Any) -> None:
    ours, bigram = results["metrics"]["pretrain"], results["baselines"]["bigram"]
    for figure in ("perplexity", "bits_per_byte"):
        assert ours[figure]["high"] < bigram[figure]
    own = json.loads((demo[0] / "pretrain" / "output" / "summary.json").read_text())
    assert own["test/perplexity"] == pytest.approx(ours["perplexity"]["value"], rel=1e-4)


def test_tuning_lowers_the_loss_on_the_assistants_tokens(results: Any) -> None:
    assert results["metrics"]["sft"]["loss/sft"]["high"] < results["metrics"]["pretrain"]["loss/sft"]["low"]


def test_alignment_raises_preference_accuracy_and_keeps_the_answers_likely(results: Any) -> None:
    gained = results["differences"]["sft"]
    assert gained["preference_accuracy/dpo"]["n"] >= 500
    assert gained["preference_accuracy/dpo"]["low"] > 0
    assert gained["chosen_log_probability/dpo"]["value"] > -MOST_LIKELIHOOD_LOST
    assert {f"preference_accuracy/dpo/{kind}" for kind in ("other", "truncated", "shuffled")} <= gained.keys()


def test_the_aligned_model_knows_which_summary_belongs_to_a_function(results: Any) -> None:
    assert results["metrics"]["dpo"]["accuracy/python-summaries"]["low"] > 0.25


def test_the_export_computes_what_was_trained(demo: tuple[Path, str]) -> None:
    summary = json.loads((demo[0] / "export" / "output" / "summary.json").read_text())
    assert summary["largest_logit_difference"] <= 1e-4
    assert (demo[0] / "export" / "output" / "model" / "model.safetensors").exists()
