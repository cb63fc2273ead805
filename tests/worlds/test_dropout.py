"""Dropout: what a run draws depends on its seed, the step and the micro-batch, so that it can be repeated and resumed."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_checkpoint import open_checkpoints
from torch import Tensor
from world_support import Case, Record, Task, build, compare, parallel, run_reference, run_world, text, train

from trainwright.runtime.megatron.dropout import Draws
from trainwright.runtime.megatron.loop import evaluate_nats, train_step

STEPS = 4


def dealt(step: int, rank: int, size: int) -> list[dict[str, Tensor]]:
    """Micro-batches as a stream of training deals them: the first ones of all ranks, then the second ones."""
    return text(step, 0, 1)[rank::size]


DROPOUT = Case(dropout=0.2, steps=STEPS, task=Task("dropout", dealt, per_token=False))


def test_data_ranks_drop_out_what_one_process_does() -> None:
    reference = run_reference(DROPOUT)
    none = run_reference(replace(DROPOUT, dropout=0.0))
    assert abs(reference.losses[0] - none.losses[0]) > 1e-3

    def work() -> None:
        case = replace(DROPOUT, data=2, overlap=True)
        difference = compare(train(build(case, reference.initial), range(STEPS), case.task), reference)
        assert difference.violations() == [], difference

    run_world(2, work)


def test_tensor_ranks_share_what_is_dropped_out_of_whole_hidden_states() -> None:
    """Attention's masks are each rank's own, of its own heads; so are those of its part of a sequence in sequence parallelism."""
    case = replace(DROPOUT, options=(("attention_dropout", 0.0),))
    reference = run_reference(case)

    def work() -> None:
        split = replace(case, tensor=2, sequence_parallel=False, distributed_optimizer=False)
        difference = compare(train(build(split, reference.initial), range(STEPS), case.task), reference)
        assert difference.violations() == [], difference

    run_world(2, work)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(replace(DROPOUT, tensor=2), marks=pytest.mark.full),
        replace(DROPOUT, pipeline=2, virtual_pipeline=2, recompute=True),
    ],
    ids=str,
)
def test_a_run_is_repeated_and_resumed_exactly(case: Case, tmp_path: Path) -> None:
    def work() -> tuple[Record, Record, Record]:
        checkpoints = open_checkpoints(tmp_path)
        built = build(case)
        train(built, range(2), case.task)
        checkpoints.save(built, 2)
        rest = train(built, range(2, 4), case.task)
        parallel.stop()
        repeated = build(case)
        train(repeated, range(2), case.task)
        evaluate_nats(repeated, text(9, 0, 1))  # draws nothing
        again = train(repeated, range(2, 4), case.task)
        parallel.stop()
        resumed = build(case)
        found = checkpoints.prepare()
        assert found is not None
        checkpoints.load(resumed, found)
        return rest, again, train(resumed, range(2, 4), case.task)

    for rest, again, resumed in run_world(2, work):
        assert again.losses == rest.losses
        assert resumed.losses == rest.losses
        assert again.grad_norms == pytest.approx(rest.grad_norms, rel=1e-6)
        assert resumed.grad_norms == pytest.approx(rest.grad_norms, rel=1e-6)


def test_every_step_micro_batch_and_seed_draws_anew() -> None:
    """The loss of the same sequences, before anything is learnt."""

    def work() -> list[float]:
        built = build(replace(DROPOUT, distributed_optimizer=False))
        for group in built.optimizer.param_groups:
            group["lr"] = 0.0
        row = text(0, 0, 1)[:1]
        losses = [
            train_step(built, row, draws=draws).loss for draws in (Draws(1, 1), Draws(1, 2), Draws(2, 1), Draws(1, 1))
        ]
        twice = train_step(built, row * 2, draws=Draws(1, 1)).loss
        return [*losses, 2 * twice - losses[0]]  # the last one: of the second of two like micro-batches

    [losses] = run_world(1, work)
    assert losses[3] == losses[0]
    assert len({f"{loss:.5f}" for loss in losses}) == 4
