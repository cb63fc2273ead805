"""Every layout trains as one process does: same data, same initial weights, fp32, full learning rate, no warm-up."""

from dataclasses import replace

import pytest
from world_support import (
    SEQUENCE,
    VOCABULARY,
    Case,
    Difference,
    Record,
    build,
    run_cases,
    run_reference,
    run_world,
    text,
    train,
)


@pytest.fixture(scope="module")
def reference() -> Record:
    record = run_reference(Case())
    fall = record.losses[0] - record.losses[-1]
    assert fall >= 0.5, f"the reference's loss fell by {fall:.2f} only: equality after it would say little"
    return record


def check(case: Case, difference: Difference) -> None:
    print(f"{case}: {difference}")
    assert difference.violations() == []
    # with the distributed optimizer the buffer holds pieces of gradients
    assert bool(difference.gradient_name) is not case.distributed_optimizer


def test_data_hit_every_vocabulary_shard() -> None:
    """A collective of the cross entropy that is broken for one shard is invisible to data that miss the shard."""
    labels = [batch["labels"] for batch in text(0, 0, 1)]
    for half in range(2):
        in_shard = sum(int(((label * 2) // VOCABULARY == half).sum()) for label in labels)
        assert in_shard > SEQUENCE, f"shard {half} of 2 has {in_shard} labels"


def test_two_processes(reference: Record) -> None:
    cases = [
        Case(tensor=2, distributed_optimizer=False),
        Case(tensor=2, distributed_optimizer=False, sequence_parallel=False),
        Case(pipeline=2, distributed_optimizer=False),
        Case(data=2, distributed_optimizer=True, overlap=True),
    ]
    for case, difference in zip(cases, run_cases(cases, dict.fromkeys(cases, reference)), strict=True):
        check(case, difference)


def test_four_processes(reference: Record) -> None:
    cases = [
        Case(tensor=2, pipeline=2, distributed_optimizer=False),
        Case(tensor=2, data=2, distributed_optimizer=True),
    ]
    for case, difference in zip(cases, run_cases(cases, dict.fromkeys(cases, reference)), strict=True):
        check(case, difference)


def test_families_and_tied_embeddings() -> None:
    """LayerNorm, biases, learned positions; QK norm; norms around 1 and wide heads; an embedding shared by the first and last
    stage."""
    cases = [
        Case(tensor=2, family="gpt", tied=True, distributed_optimizer=False),
        Case(tensor=2, family="qwen", distributed_optimizer=False),
        Case(tensor=2, family="gemma", tied=True, distributed_optimizer=False, steps=5),
        Case(pipeline=2, tied=True, distributed_optimizer=False),
    ]
    references = {case: run_reference(case) for case in cases}
    for case, difference in zip(cases, run_cases(cases, references), strict=True):
        check(case, difference)


def test_full_recompute_runs_each_layer_twice_a_micro_batch() -> None:
    def passes(case: Case) -> int:
        built, calls = build(case), []
        built.gpt.decoder.layers[0].self_attention.register_forward_hook(lambda *_: calls.append(1))
        train(built, [0])
        return len(calls)

    [once] = run_world(1, lambda: passes(Case()))
    [twice] = run_world(1, lambda: passes(Case(recompute=True)))
    assert once > 0
    assert twice == 2 * once


def test_full_recompute_changes_nothing(reference: Record) -> None:
    case = Case(recompute=True, distributed_optimizer=False)
    [difference] = run_cases([case], {case: reference})
    assert difference.loss == 0.0
    assert difference.violations() == []


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_full_recompute_drops_out_what_was_dropped_out(sequence_parallel: bool) -> None:
    def work(case: Case) -> tuple[list[float], list[float]]:
        record = train(build(case), range(2))
        return record.losses, record.grad_norms

    case = Case(tensor=2, dropout=0.2, sequence_parallel=sequence_parallel)
    plain, again, none = (
        run_world(2, lambda one=one: work(one))
        for one in (case, replace(case, recompute=True), replace(case, dropout=0.0))
    )
    assert plain == again
    assert plain != none


def test_bf16_trains() -> None:
    """bf16 rounds at other places in another layout, so only losses are compared, to 2e-2."""
    case = Case(tensor=2, bf16=True)
    reference = run_reference(case)
    assert reference.losses[0] - reference.losses[-1] >= 0.5
    [difference] = run_cases([case], {case: reference})
    assert difference.loss <= 2e-2, difference
