"""What published recipes (data/recipes.yaml) suggest for a model of a size.

One rule for what depends on the size. A value that was published for a size holds within a factor PLATEAU of it; between two
such ranges it is interpolated, in the logarithms of size and value; beyond the outermost, the nearest holds. Published learning
rates are of models from 1B on: below SMALLEST a rate is a share of the peak at which the model is pretrained instead, for small
models are trained and tuned at much higher rates (Llama 2 70B pretrains at 1.5e-4 and is tuned at 2e-5, Llama 3 405B at 8e-5
and 1e-5).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from trainwright.compiler.facts import Cited, Recipe
from trainwright.compiler.units import format_quantity

SMALLEST = 0.5e9  # parameters: half of the smallest published model's
PLATEAU = 1.25


def suggest_learning_rate(recipe: Recipe, parameters: float, pretraining_rate: float) -> Cited:
    """The peak learning rate for a model of that many parameters that was pretrained at that peak."""
    if parameters >= SMALLEST:
        return suggest_for_size(recipe.by_size["learning_rate"], parameters)
    share = recipe.numbers["rate_share"]
    text = (
        f"{share.value:.3g} x training.learning_rate {pretraining_rate:.4g}; {share.source}; the recipes' own rates are of"
        f" models from {format_quantity('parameters', SMALLEST)} on"
    )
    return Cited(share.value * pretraining_rate, text)


def suggest_for_size(points: Sequence[Cited], parameters: float) -> Cited:
    """The value for a size from those published, which rise in parameters."""
    size = format_quantity("parameters", parameters)
    for point in points:
        if point.parameters / PLATEAU <= parameters <= point.parameters * PLATEAU:
            return point
    smaller = [point for point in points if point.parameters < parameters]
    larger = [point for point in points if point.parameters > parameters]
    if not smaller or not larger:
        nearest = smaller[-1] if smaller else larger[0]
        return replace(nearest, source=f"{nearest.source}: the nearest published to {size}")
    below, above = smaller[-1], larger[0]
    low, high = below.parameters * PLATEAU, above.parameters / PLATEAU
    share = math.log(parameters / low) / math.log(high / low)
    text = (
        f"{below.value:.3g} ({below.source}) and {above.value:.3g} ({above.source}), interpolated for {size} in the logarithms:"
        f" {share:.2f} of the way"
    )
    return Cited(below.value ** (1 - share) * above.value**share, text)
