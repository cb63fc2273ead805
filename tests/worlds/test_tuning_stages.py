"""Tuning stages executed, on a small model: stopped and started again, on changed files, on little data."""

import dataclasses
import json
import os
import re
import sys
from collections import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from world_support import Case, literals, run_world

from trainwright.runtime.errors import DataError, Unsupported
from trainwright.runtime.megatron import model, parallel
from trainwright.runtime.megatron.checkpoint import Checkpoints, Identity, ModelFiles
from trainwright.runtime.megatron.packing import Sequence
from trainwright.runtime.stages import dpo, sft
from trainwright.runtime.stages.chat import DEFAULT_TEMPLATE
from trainwright.runtime.stages.examples import Examples, PackedStream, write_examples, write_packs
from trainwright.runtime.stages.tokenizer import train as train_tokenizer
from trainwright.runtime.stages.tuning import Training
from trainwright.runtime.workspace import DATA_ROOT_VARIABLE, Workspace, write_json

VOCABULARY, SEQUENCE = 280, 96
CASE = Case(distributed_optimizer=False)
SFT, DPO = "sft", "dpo"


class Stopped(Exception):
    """Stands for a kill: raised after the first checkpoint."""


def embedding() -> model.Embedding:
    return dataclasses.replace(
        literals(CASE)[1], vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, sequence_length=SEQUENCE
    )


def write_lines(path: Path, rows: abc.Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_initial(
    place: Workspace, run_id: str, seed: int, *, validation: float = 0.3, test: float = 0.0, splits: bool = True
) -> None:
    """In a rank: the checkpoint that the stages start from, of random weights; with the split of its data, or without."""
    here = parallel.start(CASE.layout, seed)
    used, _ = here.adapt(literals(CASE)[0])
    split = place.bundle / "split.json"
    write_json(split, {"seed": 1, "validation": validation, "test": test, "groups": {}})
    Checkpoints(
        place.stage("pretrain").checkpoints,
        Identity(run_id, "inputs"),
        keep_last=1,
        log=print,
        files=ModelFiles(place.bundle / "tokenizer.json", split if splits else None, ""),
    ).save(model.build(used, embedding(), here), 7)
    parallel.stop()


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """Data of both stages, and an initial model."""
    place = Workspace(bundle=tmp_path, work=tmp_path / "work", data_root=tmp_path)
    talks = [[("user", f"Say {n}!"), ("assistant", f"{n}, as you wish.")] for n in range(40)]
    write_lines(
        tmp_path / "sft.jsonl",
        [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks],
    )
    pairs = [{"prompt": f"Say {n}!", "chosen": f"{n}, as you wish.", "rejected": f"No {n}!"} for n in range(40)]
    write_lines(tmp_path / "dpo.jsonl", pairs)
    train_tokenizer((f"Say {n}! {n}, as you wish." for n in range(40)), VOCABULARY).save(
        str(tmp_path / "tokenizer.json")
    )
    run_world(1, lambda: save_initial(place, "first", seed=1))
    return place


def tune(place: Workspace, stage: str, *, case: Case = CASE, stops: bool = False, **changed: Any) -> dict[str, Any]:
    """In a rank: run the stage, until it is stopped; its figures."""
    sys.argv[0] = str(place.bundle / "program.py")
    os.environ[DATA_ROOT_VARIABLE] = str(place.data_root)
    used, _ = literals(case)
    common: dict[str, Any] = {
        "stage": stage,
        "run_id": "run",
        "seed": 1,
        "initial": "pretrain",
        "parallel": case.layout,
        "model": dataclasses.replace(used.model, calculate_per_token_loss=True),
        "embedding": embedding(),
        "layer_spec": "local",
        "ddp": used.ddp,
        "optimizer": dataclasses.replace(used.optimizer, min_lr=0.0),
        "training": Training(epochs=3, global_batch=2, micro_batch=1, schedule="cosine", warmup=0.1),
        "checkpoint": sft.Checkpoint(every_steps=3, keep_last=1),
    }
    data = {"path": f"{stage}.jsonl", "connector": "", "validation": 0.3, "test": 0.0}
    data["too_long"] = changed.pop("too_long", "truncate")
    template = changed.pop("chat_template", "")
    run: Callable[..., None] = {SFT: sft.run, DPO: dpo.run}[stage].__wrapped__  # type: ignore[attr-defined]
    if stage == SFT:
        common["data"] = sft.Data(**data, chat_template=template)
    else:
        common |= {"data": dpo.Data(**data), "preference": dpo.Preference(beta=0.1, nll=0.5)}
    save = Checkpoints.save

    def save_and_stop(*arguments: Any) -> Path:
        save(*arguments)
        raise Stopped

    if stops:
        Checkpoints.save = save_and_stop  # type: ignore[method-assign]
    try:
        run(**{**common, **changed})
    except Stopped:
        return {}
    finally:
        Checkpoints.save = save  # type: ignore[method-assign]
        parallel.stop()
    return figures(place, stage)


def figures(place: Workspace, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(place.stage(stage).summary.read_text())
    return found


def rows(place: Workspace, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.stage(stage).metrics.read_text().splitlines()]


def in_world(*work: Callable[[], Any], size: int = 1) -> list[Any]:
    """What each piece of work returned on rank 0, one after the other."""

    def all_of_it() -> list[Any]:
        leave = dist.destroy_process_group
        dist.destroy_process_group = lambda group=None: group and leave(group)  # the world's own it ends itself
        return [piece() for piece in work]

    found: list[Any] = run_world(size, all_of_it)[0]
    return found


@pytest.mark.parametrize(
    ("stage", "case"), [(SFT, CASE), pytest.param(DPO, Case(data=2), marks=pytest.mark.full)], ids=str
)
def test_a_stage_whose_file_was_only_touched_goes_on_to_the_same_figures(
    place: Workspace, stage: str, case: Case
) -> None:
    """The examples are prepared anew, and are the same: so the steps count, and the figures before are the initial model's."""
    elsewhere = Workspace(bundle=place.bundle, work=place.bundle / "undisturbed", data_root=place.data_root)
    (elsewhere.work).mkdir()
    (elsewhere.work / "pretrain").symlink_to(place.stage("pretrain").path)

    def undisturbed() -> dict[str, Any]:
        os.environ["TRAINWRIGHT_WORK"] = str(elsewhere.work)
        try:
            return tune(elsewhere, stage, case=case)
        finally:
            del os.environ["TRAINWRIGHT_WORK"]

    def touch() -> None:
        os.utime(place.data_root / f"{stage}.jsonl", ns=(1, 1))

    expected, _, _, found = in_world(
        undisturbed,
        lambda: tune(place, stage, case=case, stops=True),
        touch,
        lambda: tune(place, stage, case=case),
        size=case.layout.world_size,
    )
    assert found == expected
    assert [row["loss"] for row in rows(place, stage)] == [row["loss"] for row in rows(elsewhere, stage)]
    assert found["step"] > 6


def test_another_initial_model_at_the_same_path_is_the_reference(place: Workspace) -> None:
    """Pretrained anew: neither log-probabilities nor figures of the model before it, nor records by its split."""
    first, _, second = in_world(
        lambda: tune(place, DPO), lambda: save_initial(place, "second", seed=2, test=0.2), lambda: tune(place, DPO)
    )
    assert abs(rows(place, DPO)[0]["margin"]) < 1e-3, "the first step is taken at the reference"
    name = "before/validation/chosen_log_probability"
    assert first[name] != second[name]
    assert second["counts"]["trained on"] < first["counts"]["trained on"]


def test_the_reference_is_the_same_in_parts(place: Workspace) -> None:
    file = place.stage(DPO).path / "data" / "reference.npy"

    def in_parts() -> list[float]:
        whole = np.load(file)
        file.unlink()
        dpo.SCORED_AT_ONCE = 8
        tune(place, DPO)
        return [float(value) for value in np.load(file) - whole]

    _, differences = in_world(lambda: tune(place, DPO), in_parts)
    assert len(differences) > 3 * 8
    assert differences == pytest.approx([0.0] * len(differences), abs=1e-4)


def test_an_edited_template_and_another_context_make_other_examples(place: Workspace) -> None:
    template = place.data_root / "mine.jinja"
    template.write_text(DEFAULT_TEMPLATE)

    def edit() -> None:
        template.write_text(
            DEFAULT_TEMPLATE.replace(
                "'<|im_start|>' + message.role", "'<|im_start|>' + message.role + ' says'"
            ).replace("<|im_start|>assistant", "<|im_start|>assistant says")
        )

    def longest(split: str) -> Any:
        ends = np.load(place.stage(SFT).path / "data" / split / "ends.npy")
        return int(np.diff(ends, prepend=0).max()), len(
            np.load(place.stage(SFT).path / "data" / split / "pack_ends.npy")
        )

    def run(length: int) -> Any:
        tune(place, SFT, chat_template="mine.jinja", embedding=dataclasses.replace(embedding(), sequence_length=length))
        return longest("train")

    first, _, second, third = in_world(lambda: run(SEQUENCE), edit, lambda: run(SEQUENCE), lambda: run(SEQUENCE // 2))
    assert second[0] > first[0]
    assert third[1] > second[1], "shorter rows are more"


@pytest.mark.parametrize("stage", [SFT, DPO])
def test_a_single_step_trains_too(place: Workspace, stage: str) -> None:
    training = Training(epochs=1, global_batch=64, micro_batch=1, schedule="cosine", warmup=0.5)
    [found] = in_world(lambda: tune(place, stage, training=training))
    assert found["step"] == 1
    assert rows(place, stage)[0]["learning_rate"] > 0
    name = {SFT: "validation/loss", DPO: "validation/preference_accuracy"}[stage]
    assert name in found
    if stage == SFT:
        assert found[name] < found[f"before/{name}"]


@pytest.mark.parametrize("stage", [SFT, DPO])
def test_ranks_that_have_nothing_to_do_in_the_last_step(place: Workspace, stage: str) -> None:
    """Seven rows of three epochs, four a step: one is left for two ranks. Nothing is held out."""
    records = (place.data_root / f"{stage}.jsonl").read_text().splitlines(keepends=True)
    (place.data_root / f"{stage}.jsonl").write_text("".join(records[: {SFT: 20, DPO: 19}[stage]]))
    training = Training(epochs=3, global_batch=4, micro_batch=1, schedule="constant", warmup=0.0)
    two = Case(data=2, distributed_optimizer=False)
    [_, found] = in_world(
        lambda: save_initial(place, "first", seed=1, validation=0.0), lambda: tune(place, stage, training=training)
    )
    alone = rows(place, stage)
    place.stage(stage).path.rename(place.work / "alone")
    [other] = in_world(lambda: tune(place, stage, case=two, training=training), size=2)
    examples = place.stage(stage).path / "data" / "train"
    assert 3 * len(np.load(examples / "pack_ends.npy")) % 4 == 1
    for mine, its in zip(alone, rows(place, stage), strict=True):
        assert its["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert its["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
    assert found == other
    assert found["key_figure"].endswith("; nothing held out for validation")


def test_a_stage_goes_on_in_another_folder(place: Workspace) -> None:
    """The model brings no split: the stage's own goes along with every checkpoint, wherever the stage is now."""
    in_world(lambda: save_initial(place, "first", seed=1, splits=False))
    begin = place.bundle / "model"
    (place.stage("pretrain").checkpoints / "step-000007").rename(begin)
    moved = Workspace(bundle=place.bundle / "moved", work=place.bundle / "moved" / "work", data_root=place.data_root)
    tuned = in_world(lambda: tune(place, SFT, initial="./model", stops=True))
    assert tuned == [{}]
    moved.bundle.mkdir()
    place.work.rename(moved.work)
    [found] = in_world(lambda: tune(moved, SFT, initial="./model"))
    [step] = (moved.stage(SFT).path / "checkpoints").glob("step-*")
    assert json.loads((step / "split.json").read_text())["validation"] == 0.3
    assert found["step"] == int(step.name[5:])


@pytest.mark.parametrize(("stage", "word"), [(SFT, "truncat"), (DPO, "split")])
def test_an_unknown_word_for_what_is_too_long_is_refused(place: Workspace, stage: str, word: str) -> None:
    def refused() -> str:
        with pytest.raises(Unsupported) as error:
            tune(place, stage, too_long=word)
        return str(error.value)

    [said] = in_world(refused)
    assert said.startswith(f"too_long={word!r} is unknown")
    assert "write 'truncate'" in said


@pytest.mark.parametrize("stage", [SFT, DPO])
def test_nothing_left_to_train_on_says_where_the_records_went(place: Workspace, stage: str) -> None:
    path = place.data_root / f"{stage}.jsonl"
    path.write_text(path.read_text().replace("as you wish.", "as you wish, " * 200))

    def refused() -> str:
        with pytest.raises(DataError) as error:
            tune(place, stage, too_long="drop")
        return str(error.value)

    [said] = in_world(refused)
    found = re.match(
        r"nothing is left for training: \w+: 40 in, 40 kept, (\d+) held out, (\d+) dropped, too long; ", said
    )
    assert found, said
    assert int(found[1]) + int(found[2]) == 40
    assert int(found[1]) > 0


def test_every_epoch_has_each_pack_once_whatever_the_layout(tmp_path: Path) -> None:
    count, epochs, batch = 7, 3, 4
    written = write_examples(tmp_path / "train", (Sequence((1, 2, n), (0, 0, 1)) for n in range(count)))
    assert written == ([2] * count, count)
    write_packs(tmp_path / "train", [[n] for n in range(count)])
    examples = Examples(tmp_path / "train")
    stream = PackedStream(examples, pack_length=4, epochs=epochs, global_batch=batch, micro_batch=1, pad=0, seed=1)
    assert stream.steps == 6
    order = [pack for step in range(stream.steps) for pack in stream.packs(step)]
    assert order[count * epochs :] == [-1, -1, -1]
    parts = [order[begin : begin + count] for begin in range(0, count * epochs, count)]
    assert all(sorted(part) == list(range(count)) for part in parts)
    assert parts[0] != parts[1] != parts[2]
    for step in range(stream.steps):
        [*alone] = stream.items(step, 0, 1)
        ranks = [stream.items(step, rank, 2) for rank in range(2)]
        assert [items for pair in zip(*ranks, strict=True) for items in pair] == alone
    assert stream.batches(stream.steps - 1, 1, 2)[0]["loss_mask"].sum() == 0
