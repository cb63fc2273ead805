"""What no law decides of the optimizer: its schedule, and the field's usual values."""

import math
from collections.abc import Mapping

from trainwright.compiler.choose.hyperparameters import Laws, Suggestion
from trainwright.compiler.laws.rates import Run, law_parameters

MIN_RATE_SHARE = 0.1  # of the peak
WARMUP_SHARE, MOST_WARMUP_STEPS = 0.05, 2000
DECAY_SHARE = 0.2  # of the steps of a wsd schedule
FAST_BETA2_BATCH = 524_288  # tokens a step
USUAL_STD = 0.02

USUAL: Mapping[str, Suggestion] = {
    "beta1": Suggestion(0.9, "AdamW's usual first moment: GPT-3, Llama 2 and 3"),
    "epsilon": Suggestion(1e-8, "AdamW's usual epsilon: GPT-3"),
    "clip_grad": Suggestion(1.0, "global norm 1.0: GPT-3, Llama 2 and 3"),
}
# Lion (Chen et al. 2023, arXiv 2302.06675, section 5): rates 3 to 10 times lower than AdamW's, weight decay as many times higher.
LION_FACTOR = 5.0
LION_BETA2 = Suggestion(0.99, "Lion (arXiv 2302.06675), section 5: 0.9 and 0.99")
SCHEDULE = "cosine that ends with the tokens (Hoffmann et al. 2022, appendix B)"


def suggest_lion_rate(adam: Suggestion) -> Suggestion:
    """Lion's learning rate from AdamW's. Its weight decay follows from the rate: a step decays as much as AdamW's would."""
    value = adam.value / LION_FACTOR
    lower = f"Lion (arXiv 2302.06675), section 5: 3 to 10 times lower than AdamW's, here {LION_FACTOR:g}: {value:.4g}"
    return Suggestion(value, f"{adam.text}; {lower}")


def suggest_beta2(laws: Laws, run: Run, batch_tokens: float) -> Suggestion:
    """Decay of Adam's second moment: slower where a small batch makes each gradient noisier."""
    own = laws.rate.beta2
    if own and not laws.base:
        parameters = float(law_parameters(laws.rate, run))
        small = parameters <= own["N"]
        text = f"{laws.rate.name}: {own['up_to']:g} up to {own['N']:.3g} parameters, else {own['above']:g}; here {parameters:.3g}"
        return Suggestion(own["up_to"] if small else own["above"], text)
    return Suggestion(
        0.95 if batch_tokens >= FAST_BETA2_BATCH else 0.99,
        f"OLMo-core: 0.95 from {FAST_BETA2_BATCH:,} tokens a step, as GPT-3, Llama 2 and 3; below, where gradients are noisier, "
        f"0.99 (Porian et al. 2024); here {batch_tokens:,.0f}",
    )


def suggest_init_std(hidden_size: int) -> Suggestion:
    """Standard deviation of the initial weights."""
    value = math.sqrt(1 / (3 * hidden_size))
    rule = f"sqrt(1 / (3 x hidden_size {hidden_size})) = {value:.4g}"
    if value >= USUAL_STD:
        return Suggestion(USUAL_STD, f"GPT-2's, which is below {rule}, what wider models have")
    return Suggestion(value, f"{rule}, as Megatron-Turing NLG 530B (arXiv 2201.11990: 0.004 at a width of 20,480)")


def suggest_min_learning_rate(learning_rate: float, schedule: str) -> Suggestion:
    """Where the schedule ends."""
    if schedule == "wsd":
        return Suggestion(0.0, "the decay of wsd ends at 0 (Hägele et al. 2024, arXiv 2405.18392)")
    if schedule == "constant":
        return Suggestion(learning_rate, "a constant rate ends as it was")
    value = MIN_RATE_SHARE * learning_rate
    return Suggestion(value, f"{MIN_RATE_SHARE:g} x learning_rate {learning_rate:.4g}, as Chinchilla and Llama 2")


def suggest_warmup_steps(laws: Laws, run: Run, steps: int, batch_tokens: float) -> Suggestion:
    """Steps of linear warm-up; a run of one step has none."""
    if laws.rate.beta2 and not laws.base:  # the law that has a warm-up of its own
        parameters = float(law_parameters(laws.rate, run))
        value = min(max(1, round(parameters / batch_tokens)), steps // 2)
        return Suggestion(
            value,
            f"{laws.rate.name}: as many tokens as parameters, {parameters:.4g} / {batch_tokens:,.0f}; at most half",
        )
    value = min(max(1, min(MOST_WARMUP_STEPS, round(WARMUP_SHARE * steps))), steps - 1)
    return Suggestion(
        value,
        f"{100 * WARMUP_SHARE:.0f} % of {steps:,} steps, which at 20 tokens a parameter is as many tokens as parameters "
        "(Porian et al. 2024),"
        f" {MOST_WARMUP_STEPS:,} at most (Llama 2's warm-up)",
    )


def suggest_decay_steps(steps: int, warmup_steps: int) -> Suggestion:
    """Steps of the decay that ends a wsd schedule: what the warm-up leaves of a short run, at most."""
    value = min(max(1, round(DECAY_SHARE * steps)), steps - warmup_steps)
    return Suggestion(
        value, f"the last {100 * DECAY_SHARE:.0f} % of {steps:,} steps (Hägele et al. 2024, arXiv 2405.18392)"
    )
