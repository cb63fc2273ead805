"""The course of the learning rate over whole runs, through Megatron-Core's own scheduler."""

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.schedule import DECAY_STYLES, LearningRate, Schedule

PEAK, FLOOR = 2e-3, 1e-4


def course(schedule: Schedule, finished: int = 0, floor: float = FLOOR) -> list[float]:
    """The rates of the steps after `finished`; the optimizer's groups have them too."""
    optimizer = SimpleNamespace(param_groups=[{"wd_mult": 1.0}, {"wd_mult": 0.0}])
    config = SimpleNamespace(lr=PEAK, min_lr=floor, weight_decay=0.05)
    rate = LearningRate(schedule, optimizer, config, finished_steps=finished)
    rates = []
    for _ in range(finished, schedule.steps):
        rates.append(rate.advance())
        assert [group["lr"] for group in optimizer.param_groups] == [rates[-1]] * 2
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    return rates


def test_wsd_is_warm_up_then_the_peak_then_one_minus_the_root_of_the_share_that_is_done() -> None:
    rates = course(Schedule("wsd", 20, 4, 5, "minus_sqrt"))
    assert rates[:4] == pytest.approx([PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])
    assert rates[4:15] == [PEAK] * 11
    assert rates[15:] == pytest.approx([FLOOR + (PEAK - FLOOR) * (1 - math.sqrt(done / 5)) for done in range(1, 6)])
    assert rates[-1] == FLOOR
    assert course(Schedule("wsd", 20, 4, 5, "minus_sqrt"), floor=0.0)[-1] == 0.0


def test_wsd_without_a_decay_is_constant_and_may_be_decay_alone() -> None:
    assert course(Schedule("wsd", 6, 2, 0, "minus_sqrt")) == course(Schedule("constant", 6, 2))
    falling = course(Schedule("wsd", 6, 2, 4, "minus_sqrt"))
    assert falling[1] == PEAK
    assert all(later < sooner for sooner, later in itertools.pairwise(falling[1:]))


def test_linear_is_warm_up_then_a_line_to_the_floor() -> None:
    rates = course(Schedule("linear", 10, 4))
    assert rates == pytest.approx(
        [PEAK * s / 4 for s in range(1, 5)] + [PEAK + (FLOOR - PEAK) * s / 6 for s in range(1, 7)]
    )
    assert rates[-1] == FLOOR


@given(data=st.data(), kind=st.sampled_from(["cosine", "linear", "wsd", "constant"]), steps=st.integers(1, 60))
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(data: st.DataObject, kind: str, steps: int) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    decay = (data.draw(st.integers(0, steps - warmup)), data.draw(st.sampled_from(DECAY_STYLES)))
    schedule = Schedule(kind, steps, warmup, *(decay if kind == "wsd" else (0, "none")))
    whole = course(schedule)
    assert max(whole) <= PEAK * (1 + 1e-12)
    assert min(whole[warmup:], default=PEAK) >= FLOOR * (1 - 1e-12)
    finished = data.draw(st.integers(0, steps))
    assert course(schedule, finished) == whole[finished:]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule("line", 10, 2), "schedule.kind='line' is unknown: write 'cosine', 'linear', 'constant', 'wsd'"),
        (Schedule("cosine", 10, 10), "10 warm-up steps do not fit in 10 steps"),
        (Schedule("wsd", 10, 2, 3), "schedule.decay_style='none' is unknown"),
        (Schedule("wsd", 10, 2, 9, "minus_sqrt"), "2 warm-up steps and 9 of decay do not fit in 10"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule: Schedule, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        course(schedule)
