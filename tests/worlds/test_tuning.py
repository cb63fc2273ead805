"""Tuning on packed rows: as the same sequences one by one would, in every layout, though micro-batches and ranks hold unlike
numbers of targets."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tuning_tasks import BETA, NLL, PACKED, PADDED, PAIRS, ROWS, packed, pairs, reference
from world_support import (
    TEXT,
    Case,
    Record,
    Task,
    build,
    compare,
    named,
    parallel,
    run_reference,
    run_world,
    train,
)

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.packing import Sequence

STEPS = 5
TENSOR = Case(tensor=2, distributed_optimizer=False)
LAYOUTS = {
    1: [Case(distributed_optimizer=False), Case(distributed_optimizer=False, recompute=True)],
    2: [
        TENSOR,
        replace(TENSOR, sequence_parallel=False),
        replace(TENSOR, family="gpt", tied=True),
        Case(pipeline=2, distributed_optimizer=False),
        Case(pipeline=2, distributed_optimizer=False, family="gpt", tied=True),
        Case(data=2, distributed_optimizer=False),
        Case(data=2, overlap=True),
    ],
    4: [replace(TENSOR, pipeline=2)],
}


def test_micro_batches_and_ranks_hold_unlike_numbers() -> None:
    """Else a loss that weighs them alike would look right."""
    for step in range(STEPS):
        targets = [int(batch["loss_mask"].sum()) for batch in packed(step, 0, 1)]
        assert len(set(targets)) == ROWS
        assert sum(targets[0::2]) != sum(targets[1::2])
        assert len({len(row) for row in pairs(step)}) > 1


@pytest.fixture(scope="module", params=[PADDED, PAIRS], ids=lambda task: task.name)
def references(request: pytest.FixtureRequest) -> dict[tuple[str, bool], Record]:
    """What one process trains, by family and tied embeddings: sequences in rows of their own, or packed pairs."""
    kinds = (("llama", False), ("gpt", True))
    return {
        (family, tied): run_reference(Case(family=family, tied=tied, steps=STEPS, task=request.param))
        for family, tied in kinds
    }


@pytest.mark.parametrize("size", LAYOUTS)
def test_every_layout_trains_as_one_process(size: int, references: dict[tuple[str, bool], Record]) -> None:
    task = PAIRS if references["llama", False].figures[0] else PACKED
    cases = [replace(case, steps=STEPS, task=task) for case in LAYOUTS[size]]

    def work() -> list[tuple[str, list[str], list[Any]]]:
        found = []
        for case in cases:
            whole = references[case.family, case.tied]
            record = train(build(case, whole.initial), range(case.steps), case.task)
            difference = compare(record, whole)
            found.append((str(difference), difference.violations(), record.figures))
            parallel.stop()
        return found

    ranks = run_world(size, work)
    for case, (said, violations, figures) in zip(cases, ranks[0], strict=True):
        print(f"{case}: {said}")
        assert violations == [], case
        for step, whole in zip(figures, references[case.family, case.tied].figures, strict=True):
            assert step == pytest.approx(whole, abs=1e-4), case
    assert all(rank == ranks[0] for rank in ranks)


def test_the_preference_loss_is_that_of_the_paper() -> None:
    """Loss, figures and gradients of a step, against the formula on sequences one by one, by autograd."""

    def both() -> tuple[Record, dict[str, torch.Tensor], float, dict[str, float]]:
        case = Case(distributed_optimizer=False, task=PAIRS)
        record = train(build(case), [0], PAIRS)
        parallel.stop()
        built = build(case)
        built.ddp[0].zero_grad_buffer()

        def log_probability(item: Sequence) -> torch.Tensor:
            tokens, positions = torch.tensor([item.tokens]), torch.arange(item.positions)[None]
            nats = built.ddp[0](tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
            return -(nats * torch.tensor(item.counts[1:])).sum()

        losses, margins, likelihoods = [], [], []
        for row in pairs(0):
            for chosen, rejected in zip(row[0::2], row[1::2], strict=True):
                known_chosen, known_rejected = reference([chosen, rejected])
                ours = log_probability(chosen)
                margin = (ours - known_chosen) - (log_probability(rejected) - known_rejected)
                loss = -torch.log(torch.sigmoid(BETA * margin)) - NLL * ours / sum(chosen.counts)
                losses.append(loss)
                margins.append(float(margin.detach()))
                likelihoods.append(float(ours.detach()))
        total = torch.stack(losses).mean()
        total.backward()  # type: ignore[no-untyped-call]
        number = len(margins)
        figures = {
            "margin": sum(margins) / number,
            "accuracy": sum(margin > 0 for margin in margins) / number,
            "chosen_log_probability": sum(likelihoods) / number,
        }
        return record, {name: parameter.main_grad for name, parameter in named(built)}, float(total.detach()), figures

    [(record, gradients, loss, figures)] = run_world(1, both)
    assert 0 < figures["accuracy"] < 1
    assert record.losses[0] == pytest.approx(loss, rel=1e-6)
    assert record.figures[0] == pytest.approx(figures, rel=1e-5)
    for name, gradient in gradients.items():
        distance = (record.gradients[name] - gradient).norm() / gradient.norm()
        assert float(distance) < 1e-5, name


@pytest.mark.parametrize("task", [PACKED, PAIRS], ids=lambda task: task.name)
def test_packed_rows_need_the_loss_by_tokens(task: Task) -> None:
    def refused() -> str:
        with pytest.raises(Unsupported) as caught:
            train(build(Case(task=TEXT)), [0], task)
        return str(caught.value)

    [message] = run_world(1, refused)
    assert "write calculate_per_token_loss=True" in message
