"""Evaluation: intervals, gates, and multiple choice through lm-evaluation-harness."""

import math

import numpy as np
import pytest

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages import intervals
from trainwright.runtime.stages.gates import Gate, check_gates, judge
from trainwright.runtime.stages.intervals import Figure, Items

# ---- intervals ----


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert intervals.wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_a_mean_has_the_interval_of_the_normal_distribution() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, 900)
    found = intervals.estimate(values, Items(np.ones(900)), seed=1, name="x")
    half = 1.96 * values.std(ddof=1) / 30
    assert found.value == pytest.approx(values.mean())
    assert found.n == 900
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_items_count_by_their_weight_and_a_perplexity_is_of_the_weighted_mean() -> None:
    nats, tokens = np.array([30.0, 20.0, 8.0, 12.0]), np.array([10.0, 10.0, 2.0, 3.0])
    assert intervals.estimate(nats, Items(tokens), seed=1, name="x").value == pytest.approx(70 / 25)
    perplexity = intervals.estimate(nats, Items(tokens, exponential=True), seed=1, name="x")
    assert perplexity.value == pytest.approx(math.exp(70 / 25))
    assert math.exp(2.0) <= perplexity.low < perplexity.value < perplexity.high <= math.exp(4.0)
    scaled = intervals.estimate(nats, Items(tokens, scale=0.5), seed=1, name="x")
    assert scaled.value == pytest.approx(70 / 50)


def test_paired_models_differ_surely_where_each_alone_is_unsure() -> None:
    """Items differ by far more than the models do; drawn together, that cancels."""
    generator = np.random.default_rng(2)
    hard = generator.normal(0.0, 10.0, 500)
    better, worse = hard + 1.0 + generator.normal(0.0, 0.5, 500), hard
    items = Items(np.ones(500))
    found = intervals.difference(better, worse, items, seed=1, name="x")
    half = 1.96 * 0.5 / math.sqrt(500)
    assert found.value == pytest.approx((better - worse).mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.2 * half)
    alone = [intervals.estimate(values, items, seed=1, name="x") for values in (better, worse)]
    assert alone[0].low < alone[1].high


def test_sources_are_drawn_each_for_itself() -> None:
    values, source = np.repeat([1.0, 5.0], 50), np.repeat([0, 1], 50)
    within = intervals.estimate(values, Items(np.ones(100), strata=source), seed=1, name="x")
    assert within == Figure(3.0, 3.0, 3.0, 100), "no source varies within itself"
    assert intervals.estimate(values, Items(np.ones(100)), seed=1, name="x").low < 2.8


def test_draws_depend_on_seed_and_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values, items = np.arange(40.0), Items(np.ones(40))
    found = intervals.estimate(values, items, seed=1, name="x")
    assert intervals.estimate(values, items, seed=1, name="x") == found
    assert intervals.estimate(values, items, seed=2, name="x") != found
    assert intervals.estimate(values, items, seed=1, name="y") != found
    monkeypatch.setattr(intervals, "DRAWS_IN_MEMORY", 100)
    pieces = intervals.estimate(values, items, seed=1, name="x")
    assert pieces.low == pytest.approx(found.low)
    assert pieces.high == pytest.approx(found.high)


# ---- gates ----


def test_a_gate_says_by_how_much_it_was_missed() -> None:
    gate = Gate("accuracy/python-summaries", 0.3)
    verdict = judge(gate, Figure(0.241, 0.211, 0.273, 750), higher_is_better=True)
    assert not verdict.passed
    assert verdict.margin == pytest.approx(-0.059)
    assert str(verdict) == (
        "accuracy/python-summaries: 0.241 [0.211, 0.273] is below 0.3 by 0.059 (95 % interval excludes the threshold)"
    )
    unsure = judge(gate, Figure(0.29, 0.26, 0.32, 750), higher_is_better=True)
    assert not unsure.passed
    assert "includes the threshold" in str(unsure)
    assert judge(gate, Figure(0.3, 0.26, 0.32, 750), higher_is_better=True).passed, "at the threshold"


def test_lower_is_better_for_a_perplexity() -> None:
    figure = Figure(45.2, 44.0, 46.5, 1800)
    assert judge(Gate("perplexity", 50.0), figure, higher_is_better=False).passed
    verdict = judge(Gate("perplexity", 40.0), figure, higher_is_better=False)
    assert not verdict.passed
    assert "45.2 [44.0, 46.5] is above 40 by 5.200" in str(verdict)


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (
            Gate("accuracy/python-sumaries", 0.3),
            ["did you mean accuracy/python-summaries?", "perplexity, perplexity/code"],
        ),
        (Gate("taste", 0.3), ["gate taste: this evaluation has no such metric; it measures accuracy/python-summaries"]),
        (Gate("perplexity", math.nan), ["gate perplexity: the threshold nan is no number"]),
    ],
)
def test_a_gate_on_no_metric_lists_those_that_exist(gate: Gate, words: list[str]) -> None:
    known = ("perplexity", "perplexity/code", "accuracy/python-summaries")
    with pytest.raises(DataError) as raised:
        check_gates([Gate("perplexity", 50.0), gate], known)
    for word in words:
        assert word in str(raised.value)
