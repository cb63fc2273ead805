"""The stream of training sequences in worlds: every layout trains on the same ones in each step, and goes on with them."""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import open_checkpoints
from torch import Tensor
from world_support import (
    SEQUENCE,
    VOCABULARY,
    Case,
    Task,
    build,
    compare,
    dist,
    parallel,
    run_reference,
    run_world,
    train,
)

from trainwright.runtime.megatron.batches import Batches, Ramp
from trainwright.runtime.megatron.data import TokenFile, TrainingStream, build_training_stream

STEPS = 6
RAMP = Batches(12, Ramp(start=4, increment=4, sequences=16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tokenize stage leaves: two sources of random tokens, the smaller of them seen several times in a run."""
    output = tmp_path_factory.mktemp("tokenize") / "output"
    (output / "train").mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    for source, documents in (("long", 60), ("short", 9)):
        file = TokenFile(output / "train" / source, VOCABULARY)
        for _ in range(documents):
            file.add_document(torch.randint(0, VOCABULARY, (40,), generator=generator).tolist())
        file.finish()
    (output / "summary.json").write_text(json.dumps({"vocab_size": VOCABULARY, "end_of_text": 0}))
    return output


@lru_cache(maxsize=1)
def open_stream(folder: Path) -> TrainingStream:
    """In a rank."""
    return build_training_stream(
        folder, ("long", "short"), (0.4, 0.6), steps=STEPS, sequence_length=SEQUENCE, batches=RAMP, seed=3
    )


def rows_of(batches: list[dict[str, Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in torch.cat((batch["tokens"], batch["labels"]), 1).tolist()]


def fingerprint(rows: list[tuple[int, ...]]) -> str:
    """Of a step's sequences, in whatever order ranks hold them."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def test_a_steps_sequences_are_the_same_in_every_layout(folder: Path) -> None:
    def one_process() -> list[str]:
        return [fingerprint(rows_of(open_stream(folder).batch(step, 1, 0, 1))) for step in range(STEPS)]

    def layouts() -> list[list[str]]:
        found = []
        for layout, micro_batch in (
            (parallel.Parallel(data=4), 1),
            (parallel.Parallel(tensor=2, data=2), 2),
            (parallel.Parallel(pipeline=2, data=2), 1),
            (parallel.Parallel(pipeline=2, virtual_pipeline=2, tensor=2), 4),
            (parallel.Parallel(context=2, data=2), 2),
        ):
            parallel.start(layout, seed=1)
            rank, size = parallel.data_rank()
            hashes = []
            for step in reversed(range(STEPS)):  # from any step on
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(
                    everyone, (rank, rows_of(open_stream(folder).batch(step, micro_batch, rank, size)))
                )
                by_rank: dict[int, list[tuple[int, ...]]] = {}
                for other, rows in everyone:  # ranks of one model replica hold the same
                    assert by_rank.setdefault(other, rows) == rows
                hashes.append(fingerprint([row for rows in by_rank.values() for row in rows]))
            found.append(hashes[::-1])
            parallel.stop()
        return found

    [expected] = run_world(1, one_process)
    assert len(set(expected)) == STEPS
    for hashes in run_world(4, layouts)[0]:
        assert hashes == expected


def test_a_ramp_trains_and_resumes_as_one_process(folder: Path, tmp_path: Path) -> None:
    def deal(step: int, rank: int, size: int) -> list[dict[str, Tensor]]:
        return open_stream(folder).batch(step, 2, rank, size)

    case = Case(steps=STEPS, task=Task("ramp", deal, per_token=False))
    assert [RAMP.size(step) for step in range(STEPS)] == [4, 4, 8, 12, 12, 12]
    reference = run_reference(case)

    def work() -> None:
        here = replace(case, data=2, overlap=True)
        checkpoints = open_checkpoints(tmp_path)
        built = build(here, reference.initial)
        whole = train(built, range(STEPS), here.task)
        assert compare(whole, reference).violations() == []
        parallel.stop()
        cut = build(here, reference.initial)
        train(cut, range(3), here.task)
        checkpoints.save(cut, 3)
        parallel.stop()
        resumed = build(here)
        found = checkpoints.prepare()
        assert found is not None
        checkpoints.load(resumed, found)
        assert train(resumed, range(found.step, STEPS), here.task).losses == whole.losses[3:]

    run_world(2, work)
