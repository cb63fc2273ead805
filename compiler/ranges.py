"""Candidates of an open question: a set or a range. What the user pinned has one member."""

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from trainwright.compiler.units import Quantity

T = TypeVar("T", str, int)


@dataclass(frozen=True)
class Choice(Generic[T]):
    """Candidates, never none. Pinned: one."""

    values: tuple[T, ...]

    @property
    def pinned(self) -> bool:
        return len(self.values) == 1

    def pick(self, preferred: T) -> T:
        """`preferred` where it is a candidate, else the first."""
        return preferred if preferred in self.values else self.values[0]


@dataclass(frozen=True)
class Range:
    """low <= value <= high. Pinned: low == high."""

    low: float
    high: float

    @property
    def pinned(self) -> bool:
        return self.low == self.high

    def clip(self, value: float) -> float:
        """The nearest value of the range: a pin wins over any figure of the planner's."""
        return min(max(value, self.low), self.high)


# What is open: the planner's figure is clipped into these (units as in the spec). Wide enough that no law is cut in earnest.
OPEN = {
    "seed": Range(0, 2**31 - 1),
    "size": Range(1e4, 1e14),
    "context_length": Range(16, 1e7),
    "vocab_size": Range(261, 2e6),
    "num_experts": Range(2, 1024),
    "tokens": Range(1e3, 1e16),
    "held_out": Range(0.001, 0.4),
    "batch": Range(1, 1e10),
    "fraction": Range(0, 1),
    "learning_rate": Range(1e-7, 1.0),
    "min_learning_rate": Range(0, 1.0),
    "positive": Range(1e-30, 1e6),
    "not_negative": Range(0, 10),
    "epochs": Range(1, 1000),
    "retries": Range(0, 100),
    "num_fewshot": Range(0, 100),
    "samples": Range(1, 4096),
    "length": Range(1, 1e7),
    "examples": Range(1, 1e12),
}


def open_range(pin: Quantity | float | None, name: str) -> Range:
    """The pinned amount alone, or the range of that name in OPEN."""
    if pin is None:
        return OPEN[name]
    amount = float(pin.amount if isinstance(pin, Quantity) else pin)
    return Range(amount, amount)


def open_choice(pin: T | None, free: tuple[T, ...]) -> Choice[T]:
    """The pinned value alone, or the free ones."""
    return Choice(free if pin is None else (pin,))


def list_divisors(number: int, most: int) -> tuple[int, ...]:
    """The divisors of `number` up to `most`, rising."""
    low = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return tuple(sorted(divisor for divisor in {*low, *(number // divisor for divisor in low)} if divisor <= most))
