"""What an evaluate stage measures, by name, and the range of each figure: what its gates can be about."""

from collections.abc import Mapping, Sequence

# Kinds of rejected answers, by the connector that makes them; a file's own kinds are not known before it is read.
PREFERENCE_KINDS: Mapping[str, tuple[str, ...]] = {"python-stdlib:preferences": ("other", "truncated", "shuffled")}
# Lowest and highest value that a gate can be about, by the metric's first word.
RANGES: Mapping[str, tuple[float, float]] = {
    "perplexity": (1.0, 1e12),
    "bits_per_byte": (0.0, 1e3),
    "loss": (0.0, 1e3),
    "preference_accuracy": (0.0, 1.0),
    "chosen_log_probability": (-1e12, 0.0),
    "accuracy": (0.0, 1.0),
}


def list_metrics(
    *,
    sources: Sequence[str],
    conversations: Sequence[str],
    preferences: Mapping[str, str],
    tasks: Sequence[str],
) -> tuple[str, ...]:
    """The metrics of one model. `sources`: of the held-out text, none where it is not measured; `conversations`: stages of
    kind sft; `preferences`: stages of kind dpo, with their connector ("" with a path); `tasks`: names."""
    text = ["perplexity", *(f"perplexity/{name}" for name in sources), "bits_per_byte"] if sources else []
    compared = []
    for name, connector in preferences.items():
        compared += [f"preference_accuracy/{name}", f"chosen_log_probability/{name}"]
        compared += [f"preference_accuracy/{name}/{kind}" for kind in PREFERENCE_KINDS.get(connector, ())]
    return (*text, *(f"loss/{name}" for name in conversations), *compared, *(f"accuracy/{name}" for name in tasks))


def range_of(metric: str) -> tuple[float, float]:
    """The lowest and the highest value of a metric of `list_metrics`."""
    return RANGES[metric.partition("/")[0]]
