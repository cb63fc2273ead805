"""From a spec to a model one can talk to: all nine stages of a mini project, executed. About two minutes on 2 free cores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mini
import pytest

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")


class Project:
    """The mini project, and the command line called in its folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.work = path, path / "bundle" / "work"
        mini.write_project(path)

    def call(self, *arguments: str, code: int = 0) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [TRAINWRIGHT, *arguments],
            cwd=self.path,
            env=environment,
            text=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def output(self, stage: str, name: str = "summary.json") -> Any:
        return json.loads((self.work / stage / "output" / name).read_text())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("stages"))
    made.call("compile", "spec.yaml", "-o", "bundle")
    said = made.call("run", "bundle")
    for stage in ("ingest", "curate", "tokenizer", "tokenize", "pretrain", "sft", "dpo", "evaluate", "export"):
        assert f"{stage}: done" in said
    return made


def test_tuning_lowers_the_loss_on_what_the_assistant_says(project: Project) -> None:
    summary = project.output("sft")
    assert summary["validation/loss"] < summary["before/validation/loss"] - 1
    counts = summary["counts"]
    assert counts["in"] == counts["kept"] == 300
    metrics = project.output("evaluate", "results.json")["metrics"]
    assert metrics["sft"]["loss/sft"]["high"] < metrics["pretrain"]["loss/sft"]["low"]


def test_alignment_moves_away_from_its_reference(project: Project) -> None:
    rows = [json.loads(line) for line in (project.work / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-3), "the first step is taken at the reference"
    assert rows[-1]["margin"] > 1


def test_the_figures_of_an_evaluation_are_the_models(project: Project) -> None:
    """What pretraining measured of its own checkpoint, evaluation measures again through another path."""
    own, measured = project.output("pretrain"), project.output("evaluate", "results.json")
    assert measured["metrics"]["pretrain"]["perplexity"]["value"] == pytest.approx(own["test/perplexity"], rel=1e-4)
    assert measured["baselines"]["bigram"]["perplexity"] == pytest.approx(own["bigram/perplexity"], rel=1e-6)


def test_the_export_is_a_model_that_transformers_loads(project: Project) -> None:
    folder = project.work / "export" / "output" / "model"
    assert project.output("export")["largest_logit_difference"] <= 1e-4
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    generation = json.loads((folder / "generation_config.json").read_text())
    ends = generation["eos_token_id"]
    assert ids["<|im_end|>"] in (ends if isinstance(ends, list) else [ends])


def test_one_can_talk_to_the_latest_model(project: Project) -> None:
    said = project.call("chat", "bundle", "--message", "What is 40 plus 43?", "--temperature", "0")
    assert "It is" in said


def test_done_stages_stay_done_and_a_changed_evaluation_trains_nothing(project: Project) -> None:
    said = project.call("run", "bundle")
    assert all(f"{stage}: unchanged" in said for stage in ("pretrain", "sft", "dpo", "evaluate", "export"))


def test_a_failed_gate_stops_what_depends_on_it(project: Project) -> None:
    project.call("compile", "spec.yaml", "-o", "bundle", "--set", "stages.evaluate.gates.perplexity=1.5")
    said = project.call("run", "bundle", code=30)
    assert "dpo: unchanged" in said
    assert "perplexity" in said
    assert "1.5" in said
    gate = project.output("evaluate", "results.json")["gates"][0]
    assert not gate["passed"]
    said = project.call("run", "bundle", "--only", "export", code=21)
    assert "evaluate" in said


def test_another_bundle_goes_on_from_a_checkpoint(project: Project, tmp_path: Path) -> None:
    """`from` a path, in another layout; and the same path for another model is refused, with what differs."""
    mini.write_project(tmp_path)
    stages = f"{{sft: {{from: {project.work}/pretrain, data: chat.jsonl, epochs: 1, global_batch: 8 sequences}}}}"
    spec = mini.SPEC[: mini.SPEC.index("stages:")] + f"stages: {stages}\n"
    (tmp_path / "spec.yaml").write_text(spec)
    other = Project.__new__(Project)
    other.path, other.work = tmp_path, tmp_path / "bundle" / "work"
    other.call("compile", "spec.yaml", "-o", "bundle", "--set", "layout.tensor=2")
    assert "sft: done" in other.call("run", "bundle", "--only", "sft")
    assert other.output("sft")["validation/loss"] < other.output("sft")["before/validation/loss"]
    other.call("compile", "spec.yaml", "-o", "bundle", "--set", "model.shape.ffn_hidden_size=256")
    said = other.call("run", "bundle", code=25)
    assert "ffn_hidden_size" in said
