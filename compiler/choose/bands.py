"""How sure a law is of what it answers: the same question, asked of each bootstrap draw of its constants."""

from typing import NamedTuple

import numpy as np

from trainwright.compiler.choose.question import Question, answer
from trainwright.compiler.choose.sizes import Sizes
from trainwright.compiler.estimate.layouts import Floats
from trainwright.compiler.laws.law import Law
from trainwright.compiler.plan import Interval, round_leaf

SHARES = (10, 90)  # percentiles of an 80 % band
NONE = Interval(0.0, 0.0)


class Bands(NamedTuple):
    """80 % bands of total parameters and tokens, and the share of the draws without an answer: their irreducible loss, say, is
    above the target."""

    parameters: Interval
    tokens: Interval
    unanswered: float


def bands_of_answer(law: Law, sizes: Sizes, question: Question) -> Bands:
    """What the law's data leave open; NONE without draws, for what is pinned, and for what follows from the pins and a limit,
    whatever the law.

    It holds the scatter of the runs that the law was fitted on, and not whether the law is the right one.
    """
    draws = law.draws()
    if draws is None:
        return Bands(NONE, NONE, 0.0)
    total, tokens = answer(draws, sizes, question)
    return Bands(
        NONE if question.parameters else _interval(total),
        NONE if question.tokens else _interval(tokens),
        float(np.isnan(tokens).mean()),
    )


def band_of_loss(law: Law, counted: float, tokens: float) -> Interval:
    """80 % band of the loss of one model, in the law's own N; NONE without draws."""
    draws = law.draws()
    return NONE if draws is None else _interval(draws.loss(np.array([counted]), np.array([tokens])))


def _interval(values: Floats) -> Interval:
    """NONE where so many draws have no answer that the upper end of the band lies among them."""
    known = values[np.isfinite(values)]
    if len(known) < SHARES[1] / 100 * len(values) or known.max() <= known.min() * (1 + 1e-9):
        return NONE
    low, high = np.percentile(known, SHARES)
    return Interval(round_leaf(float(low)), round_leaf(float(high)))
