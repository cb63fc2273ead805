"""What published recipes do in tuning, where a spec is silent.

Rates are shares of the peak at which a model of the size is pretrained, so that they scale with it as the published ones do:
Llama 2 70B pretrains at 1.5e-4 and is tuned at 2e-5, Llama 3 405B at 8e-5 and 1e-5; Tulu 3's DPO has a tenth of the rate of its
SFT at 8B (5e-7 of 5e-6) and at 70B (2e-7 of 2e-6).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trainwright.compiler.choose.hyperparameters import Suggestion

ROWS = 128  # a step


@dataclass(frozen=True)
class Recipe:
    """The usual values of one kind of tuning."""

    epochs: Suggestion
    rate_share: Suggestion  # learning_rate / training.learning_rate
    global_batch: Suggestion  # rows
    warmup: Suggestion  # fraction of the steps


_BATCH = Suggestion(
    ROWS, "Tulu 3 and Zephyr: 128 sequences; here rows that are packed full, so at most the pretraining's batch"
)
RECIPES: Mapping[str, Recipe] = {
    "sft": Recipe(
        epochs=Suggestion(2, "Llama 2, Tulu 3 and OLMo 2 tune for 2 epochs"),
        rate_share=Suggestion(0.1, "Llama 2 70B: 2e-5 after 1.5e-4, Llama 3 405B: 1e-5 after 8e-5"),
        global_batch=_BATCH,
        warmup=Suggestion(0.03, "Tulu 3 and OLMo 2: 3 % of the steps"),
    ),
    "dpo": Recipe(
        epochs=Suggestion(1, "Tulu 3, OLMo 2 and Zephyr see each pair once"),
        rate_share=Suggestion(0.01, "a tenth of SFT's, as in Tulu 3: 5e-7 of 5e-6 at 8B, 2e-7 of 2e-6 at 70B"),
        global_batch=_BATCH,
        warmup=Suggestion(0.1, "Tulu 3 and Zephyr: 10 % of the steps"),
    ),
}
MIN_RATE = Suggestion(0.0, "down to 0 by the end: Tulu 3 (linearly), Zephyr (cosine)")
SCHEDULE = "Llama 2's SFT and Zephyr's DPO"
WEIGHT_DECAY = Suggestion(0.0, "Tulu 3 tunes without: few steps, near a model that is good already")
BETA = Suggestion(0.1, "Rafailov et al. 2023 (arXiv 2305.18290), Llama 3")
NLL = Suggestion(0.0, "none in Rafailov et al. 2023; Llama 3 adds 0.2, where chosen answers become too improbable")
