"""What every scaling law, free or bound, says of a budget, and what its choice costs by the default's own loss."""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.facts import LawFacts, load_law_facts
from trainwright.compiler.laws.additive import AdditiveLaw
from trainwright.compiler.laws.experts import ExpertsLaw
from trainwright.compiler.laws.find import find_law
from trainwright.compiler.laws.law import Law
from trainwright.compiler.laws.repeated import RepeatedDataLaw
from trainwright.compiler.units import format_quantity

DEFAULT = "epoch2024"
EXPERTS = (8, 32)
SHARES = (10, 90)  # percentiles of an 80 % band
WHOLE = ("total", "embedding_once")  # as good as one meaning: a second embedding is 2 % of a 7B model


@dataclass(frozen=True)
class Row:
    """What one law, free or bound, says of a budget in its own count."""

    label: str
    law: Law
    flops: float
    parameters: float
    tokens: float

    @property
    def facts(self) -> LawFacts:
        return self.law.facts

    @property
    def whole(self) -> bool:
        """Whether its size compares with the default's: a dense model, on fresh tokens."""
        return self.facts.counts in WHOLE and self.label == self.facts.name


def rows_at(flops: float, unique_tokens: float) -> list[Row]:
    """Every law in the order of its facts, and after a law its bound forms."""
    rows = []
    for name in load_law_facts():
        law = find_law(name)
        variants: dict[str, Law] = {name: law}
        if isinstance(law, RepeatedDataLaw):
            variants[f"{name}, {short(unique_tokens)} unique tokens"] = law.with_unique_tokens(unique_tokens)
        if isinstance(law, ExpertsLaw):
            variants |= {f"{name}, {experts} experts": law.with_experts(experts) for experts in EXPERTS}
        for label, variant in variants.items():
            parameters, tokens = variant.frontier(flops)
            rows.append(Row(label, variant, flops, float(parameters), float(tokens)))
    return rows


def bands(flops: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The default's 80 % bands of (N, D)."""
    draws = find_law(DEFAULT).draws()
    assert draws is not None
    (n_low, n_high), (d_low, d_high) = (np.percentile(column, SHARES).tolist() for column in draws.frontier(flops))
    return (n_low, n_high), (d_low, d_high)


def waste(row: Row) -> float:
    """Extra FLOPs of a run off the default's frontier: along it, loss above E goes with C^-(alpha beta / (alpha + beta))."""
    law = find_law(DEFAULT)
    assert isinstance(law, AdditiveLaw)
    best = law.loss(*law.frontier(6 * row.parameters * row.tokens)) - law.E
    own = law.loss(row.parameters, row.tokens) - law.E
    return float((own / best) ** ((law.alpha + law.beta) / (law.alpha * law.beta)) - 1)


def beyond(row: Row) -> str:
    """By how much N, D, D / N and C are outside the fitted range; the plan warns of C beyond 30 times."""
    facts = row.facts
    asked = {
        "N": (row.parameters, facts.fitted_parameters),
        "D": (row.tokens, facts.fitted_tokens),
        "D / N": (row.tokens / row.parameters, facts.fitted_tokens_per_parameter),
        "C": (row.flops, facts.fitted_flops),
    }
    if all(limits == (0.0, np.inf) for _, limits in asked.values()):
        return "not stated"
    over = [f"{name} {times(value / high)}" for name, (value, (_, high)) in asked.items() if value > high]
    under = [f"{name} {times(low / value)} below" for name, (value, (low, _)) in asked.items() if value < low]
    return ", ".join(over + under) or "no"


def short(count: float) -> str:
    """ "2.15B", "529M"."""
    return format_quantity("parameters", float(f"{count:.3g}"))


def times(factor: float) -> str:
    """ "4.5 x", "192 x"."""
    return f"{factor:,.0f} x" if factor >= 10 else f"{factor:.2g} x"
