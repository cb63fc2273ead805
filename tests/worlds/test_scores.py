"""Scores of sequences: the same in every layout, of a frozen model as of one that trains."""

from dataclasses import replace

import pytest
import torch
from tuning_tasks import rows
from world_support import (
    SEQUENCE,
    VOCABULARY,
    Case,
    Record,
    build,
    build_frozen,
    parallel,
    run_reference,
    run_world,
    train,
)

from trainwright.runtime.megatron.loop import Score, forward_logits, score_sequences
from trainwright.runtime.megatron.model import Model
from trainwright.runtime.megatron.packing import Sequence

LONGEST = Sequence(tuple(range(SEQUENCE + 1)), (0,) * SEQUENCE + (1,))  # as many positions as the model has
ITEMS = [item for step in (0, 2) for row in rows(step) for item in row] + [Sequence((7,), (0,)), LONGEST]


@pytest.fixture(scope="module")
def reference() -> Record:
    return run_reference(Case(steps=3))


FEWER = VOCABULARY - 56  # what the tokenizer holds: the model's last ids are padding, and never the likeliest


def open_model(case: Case, initial: dict[str, torch.Tensor]) -> Model:
    built = build(case, initial)
    return replace(built, embedding=replace(built.embedding, vocab_size=FEWER))


def greedy_items(built: Model) -> list[Sequence]:
    """Every third item ends as the model would end it."""
    items = list(ITEMS)
    for index in range(0, len(items), 3):
        tokens, count = items[index].tokens, len(items[index].tokens)
        if count > 1:
            last = int(forward_logits(built, torch.tensor(tokens[:-1]))[-1, :FEWER].argmax())
            items[index] = Sequence((*tokens[:-1], last), (0,) * (count - 1) + (1,))
    return items


def by_hand(built: Model, items: list[Sequence]) -> list[Score]:
    """From the logits of one sequence after the other."""
    scores = []
    for item in items:
        log_probability, greedy = 0.0, True
        if item.positions:
            logits = forward_logits(built, torch.tensor(item.tokens[:-1])).double()
            for place in (index for index, counts in enumerate(item.counts) if counts):
                log_probability += float(logits[place - 1].log_softmax(-1)[item.tokens[place]])
                greedy = greedy and int(logits[place - 1, :FEWER].argmax()) == item.tokens[place]
        scores.append(Score(log_probability, sum(item.counts), greedy))
    return scores


@pytest.mark.full  # 8 s
def test_scores_are_those_of_the_logits_in_every_layout(reference: Record) -> None:
    def expected() -> tuple[list[Sequence], list[Score]]:
        built = open_model(Case(), reference.final)
        items = greedy_items(built)
        return items, by_hand(built, items)

    [(items, wanted)] = run_world(1, expected)
    assert any(max(item.tokens) >= FEWER for item in items)
    assert 3 < sum(score.is_greedy for score in wanted) < len(items) - 3

    def check(case: Case) -> None:
        built = open_model(case, reference.final)
        for row_tokens in (40, 1, 4096):  # some, one and all in a row: with data 2 a rank has no row
            found = score_sequences(built, items, row_tokens=row_tokens, greedy=True)
            assert [score.log_probability for score in found] == pytest.approx(
                [score.log_probability for score in wanted], abs=1e-4
            )
            assert [(score.tokens, score.is_greedy) for score in found] == [
                (score.tokens, score.is_greedy) for score in wanted
            ]
        plain = score_sequences(built, items, row_tokens=40)
        assert [score.log_probability for score in plain] == pytest.approx(
            [score.log_probability for score in wanted], abs=1e-4
        )
        assert not any(score.is_greedy for score in plain)
        assert score_sequences(built, [], row_tokens=40) == []
        train(built, [0])  # training goes on after it
        parallel.stop()

    def check_all(cases: list[Case]) -> None:
        for case in cases:
            check(case)

    run_world(1, lambda: check(Case()))
    two = [Case(tensor=2), Case(tensor=2, sequence_parallel=False), Case(pipeline=2), Case(data=2, overlap=True)]
    two += [Case(context=2), Case(pipeline=2, virtual_pipeline=2)]
    run_world(2, lambda: check_all(two))
    run_world(4, lambda: check_all([Case(tensor=2, data=2), Case(context=2, pipeline=2, virtual_pipeline=2)]))


def test_a_frozen_model_says_the_same(reference: Record) -> None:
    def both(case: Case) -> tuple[list[Score], list[Score], torch.Tensor, torch.Tensor]:
        built = build(case, reference.final)
        scores, logits = score_sequences(built, ITEMS, row_tokens=60), forward_logits(built, torch.arange(9))
        parallel.stop()
        frozen = build_frozen(case, reference.final)
        assert frozen.optimizer is None
        assert not any(hasattr(parameter, "main_grad") for parameter in frozen.gpt.parameters())
        result = score_sequences(frozen, ITEMS, row_tokens=60), forward_logits(frozen, torch.arange(9))
        assert not frozen.gpt.training
        return scores, result[0], logits, result[1]

    for case in (Case(tensor=2), Case(pipeline=2, overlap=True)):
        for scores, frozen_scores, logits, frozen_logits in run_world(2, lambda case=case: both(case)):  # type: ignore[misc]
            assert frozen_scores == scores
            assert torch.equal(frozen_logits, logits)


def test_a_sequence_beyond_the_models_positions_is_refused() -> None:
    def refused() -> str:
        built = build(Case())
        with pytest.raises(ValueError) as caught:
            score_sequences(built, [Sequence((*LONGEST.tokens, 1), (*LONGEST.counts, 1))], row_tokens=4096)
        return str(caught.value)

    assert run_world(1, refused) == [f"a sequence takes {SEQUENCE + 1} positions, and the model has {SEQUENCE}"]
