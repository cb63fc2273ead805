"""Packing: NeMo's rows, and a packed row through the model as its sequences one by one."""

import collections.abc
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tuning_tasks import PAD, ROW, rows
from world_support import Case, build, parallel, run_reference, run_world

from trainwright.runtime.megatron import packing
from trainwright.runtime.megatron.loop import forward_logits, score_sequences
from trainwright.runtime.megatron.packing import Sequence, pack, packed_row

LENGTHS = [min(64, max(1, round(random.Random(index).gauss(20, 12)))) for index in range(packing.CHUNK + 500)]


def test_every_item_is_in_one_row_that_holds_it(capfd: pytest.CaptureFixture[str]) -> None:
    packs = pack(LENGTHS, 64, seed=7)
    assert sorted(item for row in packs for item in row) == list(range(len(LENGTHS)))
    sizes = [sum(LENGTHS[item] for item in row) for row in packs]
    assert max(sizes) <= 64
    assert sum(sizes) / len(sizes) > 0.98 * 64
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_packing_depends_on_the_seed_and_on_nothing_else() -> None:
    np.random.seed(11)
    expected = np.random.random(3)
    np.random.seed(11)
    packs = pack(LENGTHS[:50], 64, seed=7)
    assert np.random.random(3).tolist() == expected.tolist(), "numpy's global generator is as it was"
    assert pack(LENGTHS[:50], 64, seed=7) == packs
    other = pack(LENGTHS[:50], 64, seed=8)
    assert other != packs
    assert Counter(len(row) for row in other) == Counter(len(row) for row in packs), "the lengths meet as they did"


def test_what_does_not_fit_is_refused() -> None:
    assert pack([], 64, seed=1) == []
    with pytest.raises(ValueError, match="items of 3 to 65 positions cannot be packed into rows of 64"):
        pack([3, 65], 64, seed=1)
    item = Sequence((5, 6, 7), (0, 0, 1))
    with pytest.raises(ValueError, match=r"\[2, 2\] positions, 4 in all, do not fit into a row of 3"):
        packed_row([item, item], 3, PAD)
    with pytest.raises(ValueError, match=r"\[2, 0\] positions"):
        packed_row([item, Sequence((5,), (0,))], 8, PAD)
    with pytest.raises(ValueError, match="the first counts never"):
        Sequence((5, 6), (1, 1))


def test_a_packed_row_holds_inputs_targets_and_positions() -> None:
    row = packed_row([Sequence((5, 6, 7), (0, 0, 1)), Sequence((8, 9), (0, 1))], 5, PAD)
    assert row["tokens"].tolist() == [[5, 6, 8, PAD, PAD]]
    assert row["labels"].tolist() == [[6, 7, 9, PAD, PAD]]
    assert row["position_ids"].tolist() == [[0, 1, 0, 0, 0]]
    assert row["loss_mask"].tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]
    assert row["segments"].tolist() == [2, 1, 2]
    assert packed_row([], 4, PAD)["segments"].tolist() == [4]


def one_by_one(item: Sequence) -> list[Sequence]:
    """The sequence, with each of its tokens as the only target."""
    places = range(1, len(item.tokens))
    return [
        Sequence(item.tokens, tuple(int(place == target) for place in range(len(item.tokens)))) for target in places
    ]


@pytest.mark.parametrize("family", ["llama", "gpt", "qwen"])
def test_a_token_costs_in_a_packed_row_what_it_costs_alone(family: str) -> None:
    """RoPE and learned positions start anew, and nothing is seen of the sequences before: each token's nats, to 1e-5."""
    initial = run_reference(Case(family=family, steps=2)).final
    items = [item for row in rows(0) for item in row][:6]
    targets = [target for item in items for target in one_by_one(item)]

    def alone() -> list[float]:
        built = build(Case(family=family), initial)
        found: list[float] = []
        for item in items:
            log_probabilities = forward_logits(built, torch.tensor(item.tokens[:-1])).double().log_softmax(-1)
            found += log_probabilities.gather(1, torch.tensor(item.tokens[1:])[:, None])[:, 0].tolist()
        return found

    def packed(layouts: collections.abc.Sequence[Case]) -> list[list[float]]:
        found = []
        for case in layouts:
            scores = score_sequences(build(case, initial), targets, row_tokens=ROW)
            found.append([score.log_probability for score in scores])
            parallel.stop()
        return found

    [expected] = run_world(1, alone)
    two = [Case(tensor=2), Case(tensor=2, sequence_parallel=False), Case(pipeline=2)]
    for layouts in ([Case()], two):
        cases = [replace(case, family=family) for case in layouts]
        for case, found in zip(
            cases, run_world(cases[0].layout.world_size, lambda cases=cases: packed(cases))[0], strict=True
        ):
            assert found == pytest.approx(expected, abs=1e-5), case
