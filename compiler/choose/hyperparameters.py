"""Learning rate, batch and weight decay by published laws; each value with its arithmetic and what the other laws say.

The laws disagree (the rates for 1e9 parameters on 2e10 tokens spread 9-fold), so a reason names its law and what the others say.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainwright.compiler.choose.batch import TOLERANCE
from trainwright.compiler.estimate.params import count_active_parameters, count_as
from trainwright.compiler.facts import (
    HyperparameterLaw,
    find_hyperparameter_law,
    load_hyperparameter_laws,
)
from trainwright.compiler.laws.law import Floats
from trainwright.compiler.laws.rates import (
    Run,
    batch_overhead,
    describe_law,
    law_batch,
    law_quantities,
    law_rate,
    law_timescale,
    scale_rate,
    weight_decay,
)
from trainwright.compiler.plan import Shape, Training
from trainwright.compiler.ramp import trained_tokens
from trainwright.compiler.resolve import MupBase, ResolvedScaling
from trainwright.compiler.units import format_quantity

MUP = "mup"
DEFAULT_LAW = "step_law"  # of five laws the least regret on 17 grids of runs, its own (benchmarks/rates.py)
WEIGHT_DECAY_LAW, CRITICAL_BATCH_LAW = "power_lines2025", "kaplan2020"
# Nearly every published run has a weight decay of 0.1; the law may move it to a third or to three times that, no further: its
# timescale was fitted with muP and a linear decay to 0, up to 3.3B parameters.
LEAST_WEIGHT_DECAY, MOST_WEIGHT_DECAY = 0.03, 0.3
MOST_BATCH_TOKENS = (
    2**24
)  # Llama 3 405B's largest (arXiv 2407.21783, section 3.4.1): laws that ask for more are far outside
OVERHEAD_WORTH_A_WARNING = 0.05  # of the tokens
COUNTED = {"N": "parameters", "D": "tokens", "C": "FLOPs", "E": "experts for each that a token uses"}


@dataclass(frozen=True)
class Suggestion:
    """A value and the text of the reason for it."""

    value: float
    text: str


@dataclass(frozen=True)
class Laws:
    """The laws that answer a spec. `base`: one run to transfer the learning rate from, instead of a law; else empty."""

    rate: HyperparameterLaw
    batch: HyperparameterLaw
    base: tuple[MupBase, ...]


@dataclass(frozen=True)
class BatchPrice:
    """What a global batch costs."""

    law: str
    own_tokens: float  # the batch that the law would choose, tokens a step
    critical_tokens: float  # tokens a step at which twice the least number of tokens is needed
    overhead: float  # extra tokens for the same loss, a fraction; 0.0 where the batch is the law's own, rounded
    guessed: bool  # the critical batch is outside the range of the law that states it


def choose_laws(scaling: ResolvedScaling) -> Laws:
    """The laws that a spec names; else Step Law, with N what a token uses.

    A batch law that is not named is the learning rate's where that has one: a law's rate is for its own batch.
    """
    rate = find_hyperparameter_law(DEFAULT_LAW if scaling.learning_rate in ("", MUP) else scaling.learning_rate)
    follows = scaling.learning_rate if rate.batch is not None and scaling.learning_rate != MUP else ""
    batch = find_hyperparameter_law(scaling.batch or follows or DEFAULT_LAW)
    return Laws(rate, batch, scaling.mup if scaling.learning_rate == MUP else ())


def describe_run(shape: Shape, context_length: int, tokens: float) -> Run:
    """What the laws ask of a run."""
    return Run(
        body=count_as("body", shape, context_length),
        without_embedding=count_as("without_embedding", shape, context_length),
        used=float(count_active_parameters(shape, context_length)),
        flops=count_as("flops", shape, context_length),
        tokens=float(tokens),
        expansion=shape.num_experts / shape.experts_per_token if shape.num_experts else 1.0,
    )


def suggest_batch_tokens(law: HyperparameterLaw, run: Run) -> Suggestion:
    """Tokens a step, at most MOST_BATCH_TOKENS."""
    value = float(law_batch(law, run))
    text = f"{law.name}: {describe_law(law, law.batch, run)} = {value:,.0f} tokens a step"
    if law.name == CRITICAL_BATCH_LAW:
        text += " at its own L(N, D)"
    if value > MOST_BATCH_TOKENS:
        text += f", held to {MOST_BATCH_TOKENS:,}, Llama 3 405B's largest"
    others = {name: law_batch(other, run) for name, other in load_hyperparameter_laws().items() if other.batch}
    return Suggestion(min(value, MOST_BATCH_TOKENS), f"{text}; others: {_range(others, law.name, ',.0f')}")


def suggest_learning_rate(law: HyperparameterLaw, run: Run, batch_tokens: float) -> Suggestion:
    """Peak learning rate for the batch that will be used."""
    at_own, own = float(law_rate(law, run)), _own_batch(law, run)
    value = at_own
    text = f"{law.name}: {describe_law(law, law.learning_rate, run)} = {at_own:.4g}"
    if not own:
        text += " at the fixed batch that it was fitted with"
    elif batch_tokens < own:
        value = at_own * float(scale_rate(batch_tokens, own))
        text += f" at its batch of {own:,.0f} tokens; x sqrt({batch_tokens:,.0f} / {own:,.0f}) = {value:.4g}"
    else:
        text += f" at its batch of {own:,.0f} tokens, and no higher for {batch_tokens:,.0f}: Step Law's own runs want no more"
    return Suggestion(value, f"{text}; others: {_range(_rates(run), law.name, '.2g')}")


def transfer_learning_rate(base: MupBase, hidden_size: int, run: Run) -> Suggestion:
    """muP: the base run's rate, which the program divides by the width for hidden matrices (Yang et al. 2022, arXiv 2203.03466,
    table 8)."""
    multiple = hidden_size / base.hidden_size
    value = base.learning_rate
    return Suggestion(
        value,
        f"muP: {value:g} of the base run, which hidden matrices divide by hidden_size {hidden_size} / {base.hidden_size} = "
        f"{multiple:.4g}; it transfers over width alone: the base run has this depth, batch and number of tokens; others: "
        f"{_range(_rates(run), MUP, '.2g')}",
    )


def transfer_init_std(base: MupBase, hidden_size: int) -> Suggestion:
    """muP: the base run's, which the program divides by the root of the width for hidden matrices."""
    value = base.init_std
    return Suggestion(
        value,
        f"muP: {value:g} of the base run, which hidden matrices divide by sqrt({hidden_size} / {base.hidden_size})",
    )


def suggest_weight_decay(run: Run, batch_tokens: float, learning_rate: float) -> Suggestion:
    """The weight decay that makes AdamW forget over the law's share of the run, within LEAST and MOST_WEIGHT_DECAY."""
    law = find_hyperparameter_law(WEIGHT_DECAY_LAW)
    timescale = float(law_timescale(law, run))
    value = float(weight_decay(batch_tokens, learning_rate, run.tokens, timescale))
    text = (
        f"{law.name}: AdamW's timescale {describe_law(law, law.timescale, run)} = {timescale:.4g} of the run; "
        f"{batch_tokens:,.0f} / ({learning_rate:.4g} x {float(run.tokens):.4g} x {timescale:.4g}) = {value:.4g}"
    )
    held = min(max(value, LEAST_WEIGHT_DECAY), MOST_WEIGHT_DECAY)
    if held != value:
        text += f", held to {held:g}: within three times of the 0.1 of GPT-3, Chinchilla, Llama 2 and 3"
    outside = _outside(law, run)
    return Suggestion(held, f"{text}; {outside}" if outside else text)


def price_batch(scaling: ResolvedScaling, shape: Shape, training: Training) -> BatchPrice:
    """What the global batch costs beside the law's own, by kaplan2020's critical batch."""
    run = describe_run(shape, training.context_length, trained_tokens(training))
    law = choose_laws(scaling).batch
    if law.name == CRITICAL_BATCH_LAW:  # it is no best batch, but the one that costs twice the least tokens
        law = find_hyperparameter_law(DEFAULT_LAW)
    own = suggest_batch_tokens(law, run).value
    critical = float(law_batch(find_hyperparameter_law(CRITICAL_BATCH_LAW), run))
    rounded = abs(training.tokens_per_step / own - 1) <= TOLERANCE
    overhead = 0.0 if rounded else float(batch_overhead(training.tokens_per_step, own, critical))
    guessed = bool(_outside(find_hyperparameter_law(CRITICAL_BATCH_LAW), run))
    return BatchPrice(law.name, own, critical, overhead, guessed)


def warn_of_batch(batch: BatchPrice, tokens_per_step: int, device_hours: float, cost_usd: float) -> list[str]:
    """What a batch above the law's own costs, where it is worth a word. `device_hours` and `cost_usd` are the whole run's."""
    if batch.overhead <= OVERHEAD_WORTH_A_WARNING:
        return []
    hours = format_quantity("device_hours", batch.overhead * device_hours)
    paid = f", {format_quantity('money', batch.overhead * cost_usd)}" if cost_usd else ""
    guess = ", outside its range" if batch.guessed else ""
    batch_size, own, critical = (f"{size:,.0f}" for size in (tokens_per_step, batch.own_tokens, batch.critical_tokens))
    text = (
        f"the batch of {batch_size} tokens is above the {own} of {batch.law}: for the same loss it needs "
        f"(1 + {batch_size} / {critical}) / (1 + {own} / {critical}) - 1 = {batch.overhead:.1%} more tokens (McCandlish et al. "
        f"2018; {critical} is {CRITICAL_BATCH_LAW}'s critical batch{guess}), worth {hours}{paid}; "
        "the predicted loss leaves it out"
    )
    return [text]


def warn_of_laws(laws: Laws, run: Run, batch_tokens: float, *, rate: bool, batch: bool) -> list[str]:
    """Warnings about the laws that gave the learning rate (`rate`) and the batch (`batch`)."""
    used: dict[str, list[str]] = {}
    if rate and not laws.base:
        used.setdefault(laws.rate.name, []).append("learning rate")
    if batch:
        used.setdefault(laws.batch.name, []).append("batch")
    warnings = [
        f"{outside}: {' and '.join(what)} {'are guesses' if len(what) > 1 else 'is a guess'}"
        for name, what in used.items()
        if (outside := _outside(find_hyperparameter_law(name), run))
    ]
    own = _own_batch(laws.rate, run)
    if rate and not laws.base and not batch and 2 * batch_tokens < own:
        fixed = find_hyperparameter_law("bjorck2024")
        taken, lower = suggest_learning_rate(laws.rate, run, batch_tokens).value, float(law_rate(fixed, run))
        if lower < taken:
            warnings.append(
                f"the batch is fixed at {batch_tokens:,.0f} tokens, {laws.rate.name}'s own is {own / batch_tokens:.3g} times "
                f"that: a run that is long for its batch wants a lower rate than {taken:.2g}; {fixed.name}, fitted at a fixed "
                f"batch, says {lower:.2g} (scaling.learning_rate: {fixed.name})"
            )
    return warnings


def _own_batch(law: HyperparameterLaw, run: Run) -> float:
    """Tokens a step for which the law's rate is; 0.0 where it does not say."""
    return law.own_batch if law.batch is None else float(law_batch(law, run))


def _outside(law: HyperparameterLaw, run: Run) -> str:
    """What of the run is outside the range that the law was fitted on; "" where nothing is."""
    values = law_quantities(law, run)
    found = [
        f"{float(values[quantity]):.3g} {COUNTED[quantity]} (fitted: {_span(low, high)})"
        for quantity, (low, high) in law.fitted.items()
        if not low <= float(values[quantity]) <= high
    ]
    return f"{law.name} is used outside its range, for {' and '.join(found)}" if found else ""


def _span(low: float, high: float) -> str:
    if not low:
        return f"up to {high:.3g}"
    return f"{low:.3g} up" if high == math.inf else f"{low:.3g} to {high:.3g}"


def _rates(run: Run) -> Mapping[str, Floats]:
    """The learning rate of every law that has one, each at its own batch."""
    return {name: law_rate(law, run) for name, law in load_hyperparameter_laws().items() if law.learning_rate}


def _range(values: Mapping[str, Floats], but: str, form: str) -> str:
    """The range of what laws other than `but` say: "5.9e-4 (bjorck2024) to 2.1e-3 (porian2024)"."""
    others = {name: float(value) for name, value in values.items() if name != but}
    low, high = min(others, key=others.__getitem__), max(others, key=others.__getitem__)
    return f"{others[low]:{form}} ({low}) to {others[high]:{form}} ({high})"
