"""Learning rate, batch and their companions: from a law where there is one, else the field's usual values.

Step Law (Li et al. 2025, arXiv 2503.04715) gives both from N and D. A batch that the hardware or the user forces moves the
learning rate by the square root of the ratio (Malladi et al. 2022, arXiv 2205.10287, for Adam).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from trainwright.compiler.facts import HyperparameterLaw

MIN_RATE_SHARE = 0.1  # of the peak
WARMUP_SHARE, MOST_WARMUP_STEPS = 0.05, 2000


@dataclass(frozen=True)
class Suggestion:
    """A value and the text of the reason for it."""

    value: float
    text: str


# What no law of this file decides.
USUAL: Mapping[str, Suggestion] = {
    "weight_decay": Suggestion(0.1, "GPT-3, Chinchilla, Llama 2 and 3 use 0.1"),
    "beta1": Suggestion(0.9, "AdamW's usual first moment: GPT-3, Llama 2 and 3"),
    "beta2": Suggestion(0.95, "GPT-3, Llama 2 and 3: 0.999 is too slow for the noise of language models' gradients"),
    "epsilon": Suggestion(1e-8, "AdamW's usual epsilon: GPT-3"),
    "clip_grad": Suggestion(1.0, "global norm 1.0: GPT-3, Llama 2 and 3"),
    "init_std": Suggestion(0.02, "GPT-2's initial standard deviation, Megatron-Core's default"),
}


def suggest_batch_tokens(law: HyperparameterLaw, tokens: float) -> Suggestion:
    """Tokens a step for a run of `tokens`."""
    numbers = law.batch_tokens
    value = numbers["coefficient"] * tokens ** numbers["tokens_exponent"]
    return Suggestion(
        value,
        f"{law.name}: {numbers['coefficient']} x {tokens:.4g}^{numbers['tokens_exponent']} = {value:,.0f} tokens a step",
    )


def suggest_learning_rate(
    law: HyperparameterLaw, body_parameters: float, tokens: float, batch_tokens: float
) -> Suggestion:
    """Peak learning rate for N without embedding and output layer, D tokens, and the batch that will be used."""
    numbers = law.learning_rate
    at_best = (
        numbers["coefficient"]
        * body_parameters ** numbers["parameters_exponent"]
        * tokens ** numbers["tokens_exponent"]
    )
    best_batch = suggest_batch_tokens(law, tokens).value
    value = at_best * math.sqrt(batch_tokens / best_batch)
    return Suggestion(
        value,
        f"{law.name}: {numbers['coefficient']} x {body_parameters:.4g}^{numbers['parameters_exponent']} x "
        f"{tokens:.4g}^{numbers['tokens_exponent']} = {at_best:.4g} at its batch of {best_batch:,.0f} tokens; x sqrt("
        f"{batch_tokens:,.0f} / {best_batch:,.0f}) = {value:.4g}",
    )


def suggest_min_learning_rate(learning_rate: float) -> Suggestion:
    """Where the schedule ends."""
    value = MIN_RATE_SHARE * learning_rate
    return Suggestion(value, f"{MIN_RATE_SHARE:g} x learning_rate {learning_rate:.4g}, as Chinchilla and Llama 2")


def suggest_warmup_steps(steps: int) -> Suggestion:
    """Steps of linear warm-up: at least 1, at most a run's own length."""
    value = max(1, min(MOST_WARMUP_STEPS, round(WARMUP_SHARE * steps)))
    return Suggestion(
        value, f"{100 * WARMUP_SHARE:.0f} % of {steps:,} steps, at most {MOST_WARMUP_STEPS:,} (Llama 2's warm-up)"
    )


def list_law_extrapolations(law: HyperparameterLaw, body_parameters: float, tokens: float) -> list[str]:
    """A warning for each of N and D outside the range that the law was fitted on."""
    return [
        f"{law.name} was fitted on {low:.3g} to {high:.3g} {name}; {value:.3g} is outside: learning rate and batch are guesses"
        for name, value, (low, high) in (
            ("parameters without embeddings", body_parameters, law.fitted_parameters),
            ("tokens", tokens, law.fitted_tokens),
        )
        if not low <= value <= high
    ]
