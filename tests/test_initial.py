"""A pretraining that starts from another model, exported and imported; and what is refused before processes meet."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mini
import pytest
from safetensors.torch import load_file

WORLDS = Path(__file__).parent / "worlds"
# All stages by one process, which imports once. Prints the exit code of each, and what it said.
PROGRAM = f"""
import contextlib, dataclasses, io, json, shutil, sys, traceback, warnings
from pathlib import Path
sys.path.insert(0, {str(WORLDS)!r})
warnings.simplefilter("ignore")
import torch
from safetensors.torch import load_file, save_file
from world_support import Case, literals
from trainwright.runtime.megatron import parallel
from trainwright.runtime.stages import export, ingest, pretrain, tokenize, tokenizer

said = {{}}

def call(name, verb, **arguments):
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            verb(**arguments)
        except SystemExit as error:
            code = error.code
        except Exception:
            traceback.print_exc()
            code = -1
    if parallel.parallel_state.model_parallel_is_initialized():
        parallel.stop()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    said[name] = [code, out.getvalue()]

written, embedding = literals(Case(tied=True))
embedding = dataclasses.replace(embedding, vocab_size=512, padded_vocab_size=512)

def train(stage, initial, name="", hidden_size=64, steps=30, tokens="tokenize", tokens_of="tokenizer"):
    model = dataclasses.replace(written.model, hidden_size=hidden_size)
    call(
        name or stage,
        pretrain.run,
        stage=stage,
        run_id="3f9c2a71",
        seed=1,
        parallel=pretrain.Parallel(),
        model=model,
        embedding=embedding,
        layer_spec="local",
        ddp=written.ddp,
        optimizer=written.optimizer,
        schedule=pretrain.Schedule("constant", steps, 0),
        data=pretrain.Data(tokens, tokens_of, "ingest", ("docs",), None, global_batch=8, micro_batch=8),
        validation=pretrain.Validation(every_steps=100, sequences=4, baseline="none", sample_tokens=0),
        checkpoint=pretrain.Checkpoint(every_steps=100, keep_last=1),
        initial=initial and pretrain.Initial(path=initial),
    )

split = ingest.Split(validation=0.1, test=0.1, seed=1)
call("ingest", ingest.run, stage="ingest", sources=(ingest.Source(name="docs", path="corpus/*.jsonl"),), split=split)
call("tokenizer", tokenizer.run, stage="tokenizer", inputs="ingest", vocab_size=512)
call("tokenize", tokenize.run, stage="tokenize", inputs="ingest", tokenizer="tokenizer")
train("base", None)
call(
    "export", export.run, stage="export", initial="base", model=written.model, embedding=embedding, layer_spec="local",
    tolerance=1e-4
)
EXPORTED = "work/export/output/model"
call("taken", tokenizer.run, stage="taken", inputs="ingest", vocab_size=512, initial=EXPORTED)
call("narrow", tokenizer.run, stage="narrow", inputs="ingest", vocab_size=300, initial=EXPORTED)
train("again", EXPORTED, steps=3)
train("again", EXPORTED, steps=3, name="resumed")
train("canonical", "work/again/initial", steps=1)
train("step", "work/base", steps=1)
train("absent", "nowhere/model")
train("wide", EXPORTED, hidden_size=128)

for name, change in (
    ("cut", lambda weights: weights | {{"decoder.layers.1.mlp.linear_fc2.weight": torch.zeros(64, 120)}}),
    ("lacking", lambda weights: {{key: value for key, value in weights.items() if "layers.2" not in key}}),
):
    shutil.copytree("work/again/initial", name)
    save_file(change(load_file(f"{{name}}/model.safetensors")), f"{{name}}/model.safetensors")
    train(f"of-{{name}}", name)
shutil.copytree(EXPORTED, "torn")
with open("torn/model.safetensors", "r+b") as file:
    file.truncate(10_000)
train("of-torn", "torn")
call("other", tokenizer.run, stage="other", inputs="ingest", vocab_size=400)
call("tokens", tokenize.run, stage="tokens", inputs="ingest", tokenizer="other")
train("foreign", EXPORTED, tokens="tokens", tokens_of="other")
print("RESULT" + json.dumps(said))
"""


class Runs:
    """What PROGRAM left and said."""

    def __init__(self, work: Path, said: dict[str, tuple[int, str]]) -> None:
        self.work, self.said = work, said

    def ran(self, name: str) -> str:
        code, text = self.said[name]
        assert code == 0, text
        return text

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.work / stage / "metrics.jsonl").read_text().splitlines()]

    def losses(self, stage: str) -> list[float]:
        return [row["loss"] for row in self.rows(stage) if "loss" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("initial")
    mini.write_project(folder)
    (folder / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, folder / "program.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Runs(folder / "work", json.loads(done.stdout.split("RESULT")[1]))


def test_training_goes_on_from_an_exported_model(runs: Runs) -> None:
    runs.ran("base")
    runs.ran("export")
    said = runs.ran("again")
    assert "imported work/export/output/model (Llama) in " in said
    assert "starts from work/export/output/model" in said
    before, after = runs.losses("base"), runs.losses("again")
    assert before[0] > before[-1] + 1
    assert after[0] < before[-1] + 0.5


def test_what_is_trained_is_what_was_imported(runs: Runs) -> None:
    """Whether it comes from a Hugging Face folder, the canonical checkpoint made of it, or the step folder before both."""
    first = runs.losses("again")[0]
    for stage in ("canonical", "step"):
        assert "starts from " in runs.ran(stage)
        assert runs.losses(stage)[0] == pytest.approx(first, rel=1e-5)
    state = load_file(runs.work / "again" / "initial" / "model.safetensors")
    assert state["embedding.word_embeddings.weight"].shape == (512, 64)
    assert "output_layer.weight" not in state


def test_a_resumed_run_neither_imports_nor_starts_again(runs: Runs) -> None:
    said = runs.ran("resumed")
    assert "resuming after step 3" in said
    assert "imported" not in said
    assert "starts from" not in said


def test_the_tokenizer_comes_with_the_model(runs: Runs) -> None:
    assert "took over the tokenizer of " in runs.ran("taken")
    taken, trained = (
        json.loads((runs.work / stage / "output" / "tokenizer.json").read_text())["model"]
        for stage in ("taken", "tokenizer")
    )
    assert taken == trained
    summaries = [
        json.loads((runs.work / stage / "output" / "summary.json").read_text()) for stage in ("taken", "tokenizer")
    ]
    assert summaries[0] == summaries[1]
    assert runs.said["narrow"][0] == 21
    assert "has ids up to 511, and the model's vocab_size is 300: set model.vocab_size to" in runs.said["narrow"][1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "absent",
            "nowhere/model is not a folder: name a Hugging Face folder (config.json and *.safetensors), a canonical",
        ),
        ("wide", "work/export/output/model is of another model: hidden_size: 64 there, 128 here. Write"),
        (
            "of-cut",
            "the weights in {}/cut are of another model: decoder.layers.1.mlp.linear_fc2.weight: 64 x 120 there, 64 x 128 here. ",
        ),
        (
            "of-lacking",
            (
                "lacking are of another model: decoder.layers.2.input_layernorm.weight: none there, 64 here; "
                "decoder.layers.2.mlp.linear_fc1.weight: none there, 256 x 64 here; "
                "decoder.layers.2.mlp.linear_fc2.weight: none there, 64 x 128 here and 3 more. Start"
            ),
        ),
        ("of-torn", "torn/model.safetensors cannot be read ("),
        ("foreign", "is not that of the data, {}/work/other/output/tokenizer.json: "),
    ],
)
def test_another_model_is_refused_before_processes_meet(runs: Runs, name: str, message: str) -> None:
    code, text = runs.said[name]
    assert code == 25, text
    assert message.format(runs.work.parent) in text
    assert "Traceback" not in text
    assert "platform cpu" not in text
    assert text.count("\n") == 1


def test_an_import_that_failed_leaves_no_model(runs: Runs) -> None:
    assert not (runs.work / "of-torn" / "initial").exists()


@pytest.mark.full
def test_a_bundle_starts_from_what_another_exported(tmp_path: Path) -> None:
    """By the command line; the second in a layout that cuts the model. About 80 s on 2 free cores."""
    spec = mini.write_project(tmp_path)
    trainwright = Path(sys.executable).with_name("trainwright")

    def call(*arguments: str, code: int = 0) -> str:
        command = [trainwright, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def losses(bundle: str) -> list[float]:
        lines = (tmp_path / bundle / "work" / "pretrain" / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    base = mini.SPEC.split("stages:")[0]
    spec.write_text(base + "stages: {pretrain: {}, export: {}}\n")
    call("compile", "spec.yaml", "-o", "first")
    call("run", "first")
    spec.write_text(
        base.replace("  precision", "  initial: first/work/export/output/model\n  precision")
        + "stages: {pretrain: {}}\n"
    )
    call("compile", "spec.yaml", "-o", "second", "--set", "layout.tensor=2", "--set", "data.tokens=8192")
    call("run", "second")
    assert losses("second")[0] < losses("first")[-1] + 0.3 < losses("first")[0] - 1
    first, second = (
        tmp_path / bundle / "work" / "tokenizer" / "output" / "tokenizer.json" for bundle in ("first", "second")
    )
    assert json.loads(first.read_text())["model"] == json.loads(second.read_text())["model"]
    shape = "model.shape={num_layers: 3, hidden_size: 64, ffn_hidden_size: 96, num_attention_heads: 2}"
    call("compile", "spec.yaml", "-o", "other", "--set", shape)
    said = call("run", "other", code=25)
    assert "is of another model: num_layers: 2 there, 3 here; ffn_hidden_size: 128 there, 96 here." in said
