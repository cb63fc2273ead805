"""The canonical checkpoint: whole tensors under one process's names, written from any layout and loaded into any other."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from world_support import Case, build, build_frozen, literals, model, parallel, run_world, train

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron.canonical import load_canonical, write_canonical
from trainwright.runtime.megatron.model_files import ModelFiles, files_of, read_model
from trainwright.runtime.megatron.weight_files import INDEX, WEIGHTS, WeightReader
from trainwright.runtime.step_folders import is_canonical


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    (tmp_path / "vocabulary.json").write_text('{"model": {}}')
    return ModelFiles(tmp_path / "vocabulary.json", None, "")


def one_process(case: Case, folder: Path, files: ModelFiles) -> tuple[list[float], dict[str, Tensor]]:
    """Write a canonical folder of a model of `case` after a step. Returns the losses of two steps from there on, and the
    state dict."""

    def work() -> tuple[list[float], dict[str, Tensor]]:
        built = build(case)
        train(built, [0])
        write_canonical(built, folder, files)
        state = {name: value.clone() for name, value in built.gpt.state_dict().items() if value is not None}
        parallel.stop()
        built = build(case)
        load_canonical(built, folder)
        return train(built, [0, 1]).losses, state

    return run_world(1, work)[0]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


@pytest.mark.full  # 10 s
def test_any_layout_loads_it_and_writes_the_same(tmp_path: Path, files: ModelFiles) -> None:
    losses, state = {}, {}
    llama, gpt, qwen = Case(tied=True), Case(family="gpt"), Case(family="qwen", bf16=True)
    mixtral, deepseek = Case(family="mixtral"), Case(family="deepseek", tied=True)
    families = [llama, gpt, qwen, mixtral, deepseek]
    for case in families:
        losses[case.family], state[case.family] = one_process(case, tmp_path / case.family, files)
        assert same(load_file(tmp_path / case.family / WEIGHTS), state[case.family])
        assert read_model(tmp_path / case.family).embedding.tied == case.tied
        assert files_of(tmp_path / case.family).tokenizer.read_text() == '{"model": {}}'

    def check(case: Case) -> None:
        built = build(case)
        load_canonical(built, tmp_path / case.family)
        write_canonical(built, tmp_path / "again", files)
        assert same(load_file(tmp_path / "again" / WEIGHTS), state[case.family]), case
        assert train(built, [0, 1]).losses == pytest.approx(losses[case.family], rel=2e-2 if case.bf16 else 1e-4), case
        parallel.stop()

    def work() -> None:
        check(replace(llama, tensor=2, pipeline=2))
        check(replace(llama, pipeline=2, virtual_pipeline=2, data=2))
        check(replace(llama, tensor=2, context=2))
        check(replace(gpt, tensor=2, pipeline=2))
        check(replace(qwen, data=2, tensor=2))
        check(replace(mixtral, tensor=2, data=2, expert=2, expert_tensor=2))
        check(replace(mixtral, pipeline=2, virtual_pipeline=2, data=2, expert=2))
        check(replace(deepseek, tensor=2, pipeline=2, expert=2))

    run_world(4, work)


def test_large_ones_are_several_files(tmp_path: Path, files: ModelFiles) -> None:
    folder = tmp_path / "canonical"
    case = Case(tied=True)

    def work() -> None:
        built = build(replace(case, pipeline=2))
        write_canonical(built, folder, files, shard_bytes=100_000)
        expected = train(built, [0]).losses
        parallel.stop()
        built = build(replace(case, tensor=2))
        load_canonical(built, folder)
        assert train(built, [0]).losses == pytest.approx(expected, rel=1e-4)

    run_world(2, work)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 4
    index = json.loads((folder / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert is_canonical(folder)
    assert not (tmp_path / "canonical.partial").exists()
    (folder / shards[1]).write_bytes((folder / shards[1]).read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{shards[1]} cannot be read .*: copy it anew"):
        WeightReader(folder)


def test_another_padding_of_the_vocabulary_loads(tmp_path: Path, files: ModelFiles) -> None:
    """Rows that the folder lacks become the last token's; rows that the model lacks are left out."""
    one_process(Case(), tmp_path / "canonical", files)

    def pad() -> None:
        case = Case(tensor=2)
        here = parallel.start(case.layout, seed=1)
        written, embedding = literals(case)
        built = model.build_frozen(here.adapt(written)[0], replace(embedding, padded_vocab_size=384), here)
        load_canonical(built, tmp_path / "canonical")
        write_canonical(built, tmp_path / "padded", files)

    run_world(2, pad)
    whole, padded = (load_file(tmp_path / name / WEIGHTS) for name in ("canonical", "padded"))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert padded[name].shape[0] == 384
        assert torch.equal(padded[name][:256], whole[name])
        assert torch.equal(padded[name][256:], whole[name][-1:].expand(128, -1))

    def back() -> None:
        built = build_frozen(Case())
        load_canonical(built, tmp_path / "padded")
        write_canonical(built, tmp_path / "back", files)

    run_world(1, back)
    assert same(load_file(tmp_path / "back" / WEIGHTS), whole)


def test_another_model_is_refused_by_its_fields_and_by_its_tensors(tmp_path: Path, files: ModelFiles) -> None:
    folder = tmp_path / "canonical"
    one_process(Case(), folder, files)

    def refused(case: Case) -> str:
        built = build_frozen(case)
        with pytest.raises(CheckpointError) as caught:
            load_canonical(built, folder)
        return str(caught.value)

    [message] = run_world(1, lambda: refused(Case(tied=True)))
    assert "is of another model: tied: False there, True here." in message
    described = json.loads((folder / "model.json").read_text())
    described["config"]["ffn_hidden_size"] = 96
    described["config"]["qk_layernorm"] = True
    (folder / "model.json").write_text(json.dumps(described))
    [message] = run_world(1, lambda: refused(Case(family="qwen")))
    assert "ffn_hidden_size: 96 there, 128 here" in message
    described["config"]["ffn_hidden_size"] = 128
    (folder / "model.json").write_text(json.dumps(described))
    [message] = run_world(1, lambda: refused(Case(family="qwen")))
    assert re.search(
        r"the weights in .*canonical are of another model: "
        r"decoder\.layers\.0\.self_attention\.k_layernorm\.weight: none there, 16 here; .* and 5 more\. Start",
        message,
    )
