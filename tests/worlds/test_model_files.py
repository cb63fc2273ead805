"""A checkpoint as the beginning of something else: found by name or path, its weights in any layout, its model as it says."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_checkpoint import IDENTITY
from tuning_tasks import rows
from world_support import SEQUENCE, VOCABULARY, Case, build, build_frozen, parallel, run_world, snapshot, train

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron.checkpoint import (
    Checkpoints,
    ModelFiles,
    files_of,
    find_model,
    load_weights,
    read_model,
)
from trainwright.runtime.megatron.loop import Score, score_sequences
from trainwright.runtime.workspace import Workspace

SAVED_BY = Case(tensor=2, pipeline=2, tied=True)
ITEMS = [item for row in rows(0) for item in row]
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}é"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's work folder: two checkpoints of a stage `sft`, saved at tensor 2 x pipeline 2, the newer with a scar."""
    folder = tmp_path_factory.mktemp("run") / "work"
    given = folder.parent / "given"
    given.mkdir()
    (given / "vocabulary.json").write_text('{"model": {}}')
    (given / "rule.json").write_text('{"seed": 1}')

    def save() -> list[Score]:
        built = build(SAVED_BY)
        files = ModelFiles(given / "vocabulary.json", given / "rule.json", TEMPLATE)
        kept = Checkpoints(folder / "sft" / "checkpoints", IDENTITY, keep_last=2, log=print, files=files)
        train(built, range(2))
        kept.save(built, 2)
        scores = score_sequences(built, ITEMS, row_tokens=60)
        train(built, range(2, 3))
        kept.save(built, 3)
        return scores

    scores = run_world(SAVED_BY.layout.world_size, save)[0]
    (folder / "scores.json").write_text(json.dumps([score.log_probability for score in scores]))
    (folder / "sft" / "checkpoints" / "step-000003" / "run.json").unlink()
    return folder


@pytest.fixture
def workspace(work: Path) -> Workspace:
    return Workspace(bundle=work.parent, work=work, data_root=work.parent)


@pytest.fixture
def step(work: Path) -> Path:
    return work / "sft" / "checkpoints" / "step-000002"


@pytest.mark.parametrize("initial", ["sft", "work/sft", "./work/sft/checkpoints", "work/sft/checkpoints/step-000002/"])
def test_the_newest_complete_checkpoint_is_found(initial: str, workspace: Workspace, step: Path) -> None:
    assert find_model(workspace, initial) == step


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ("dpo", "stage dpo has no complete checkpoint; .*/work/dpo/checkpoints holds nothing: run the stage dpo first"),
        ("work/none", "/work/none is not a folder: name a step folder, a checkpoints folder, or"),
        ("given/", "/given has no complete checkpoint; .*/given holds rule.json, vocabulary.json: name"),
        ("work/sft/checkpoints/step-000003", "step-000003 is torn .*: name the step before it, or its parent folder"),
        ("torn/", "/torn has no complete checkpoint; .*/torn holds step-000003 .torn.: name"),
    ],
)
def test_a_path_without_a_model_says_what_is_there(
    initial: str, message: str, workspace: Workspace, work: Path
) -> None:
    torn = work.parent / "torn"
    shutil.copytree(work / "sft" / "checkpoints" / "step-000003", torn / "step-000003", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=message):
        find_model(workspace, initial)


def test_a_checkpoint_holds_what_a_later_stage_needs(step: Path) -> None:
    files = files_of(step)
    assert files.tokenizer.read_text() == '{"model": {}}'
    assert files.split is not None
    assert files.split.read_text() == '{"seed": 1}'
    assert files.chat_template == TEMPLATE
    saved = read_model(step)
    assert saved.config["activation_func"] is torch.nn.functional.silu
    assert (saved.config["num_layers"], saved.config["num_query_groups"]) == (4, 2)
    assert (saved.embedding.vocab_size, saved.embedding.tied) == (VOCABULARY, True)
    assert not {name for name in saved.config if "parallel" in name or "dtype" in name}


def test_its_weights_load_into_every_layout_with_any_optimizer(step: Path, work: Path) -> None:
    expected = pytest.approx(json.loads((work / "scores.json").read_text()), abs=1e-4)

    def load(cases: list[Case]) -> None:
        for case in cases:
            built = build(case)
            load_weights(built, step)
            assert [score.log_probability for score in score_sequences(built, ITEMS, row_tokens=60)] == expected, case
            train(built, [0])
            parallel.stop()
            frozen = build_frozen(case)
            load_weights(frozen, step)
            assert [score.log_probability for score in score_sequences(frozen, ITEMS, row_tokens=60)] == expected, case
            parallel.stop()

    plain = Case(tied=True, distributed_optimizer=False)
    run_world(1, lambda: load([plain, Case(tied=True)]))
    run_world(
        2, lambda: load([replace(plain, pipeline=2), Case(tied=True, tensor=2), Case(tied=True, data=2, overlap=True)])
    )


@pytest.mark.parametrize("distributed", [False, True])
def test_the_optimizer_trains_the_loaded_weights(distributed: bool, step: Path) -> None:
    """In bf16 the optimizer has weights of its own, in fp32: a step that left them as drawn would undo the loading."""

    def distance() -> float:
        built = build(Case(tied=True, bf16=True, distributed_optimizer=distributed))
        load_weights(built, step)
        before = snapshot(built)
        for group in built.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        built.ddp[0].zero_grad_buffer()
        built.optimizer.step()
        after = snapshot(built)
        return max(float((after[name] - before[name]).norm() / before[name].norm()) for name in before)

    assert run_world(1, distance) == [0.0]


@pytest.mark.parametrize(
    ("case", "differences"),
    [
        (Case(family="qwen", tied=True), "qk_layernorm: False there, True here. Write"),
        (Case(), "tied: True there, False here. Write"),
        (
            Case(family="gpt", tied=True),
            "num_query_groups: 2 there, 4 here; normalization: RMSNorm there, LayerNorm here; ",
        ),
    ],
)
def test_another_model_is_refused_with_each_difference(case: Case, differences: str, step: Path) -> None:
    def refused() -> str:
        with pytest.raises(CheckpointError) as caught:
            load_weights(build_frozen(case), step)
        return str(caught.value)

    [message] = run_world(1, refused)
    assert f"step-000002 is of another model: {differences}" in message


def test_a_model_with_rope_may_be_used_at_another_length(step: Path) -> None:
    def load(length: int) -> None:
        built = build_frozen(Case(tied=True))
        load_weights(replace(built, embedding=replace(built.embedding, sequence_length=length)), step)

    run_world(1, lambda: load(2 * SEQUENCE))


def test_what_is_missing_or_damaged_is_one_message(step: Path, tmp_path: Path) -> None:
    copy = tmp_path / step.name
    shutil.copytree(step, copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json: copy there the one"):
        files_of(copy)
    (copy / "model.json").write_text('{"config": {}}')
    with pytest.raises(CheckpointError, match=r"model\.json does not describe a model"):
        read_model(copy)
    shutil.copy(step / "model.json", copy)

    def refused() -> str:
        built = build_frozen(Case(tied=True))
        for piece in copy.glob("*.distcp"):
            piece.write_bytes(piece.read_bytes()[:1000])
        with pytest.raises(CheckpointError) as caught:
            load_weights(built, copy)
        return str(caught.value)

    [text] = run_world(1, refused)
    assert re.search(r"is damaged: \w+Error\b.*\. Start from", text), text
    assert "\n" not in text
