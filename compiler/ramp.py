"""How many tokens a run trains on, where its batch grows up to the global batch.

Megatron-LM's rule, as `runtime.megatron.batches` has it: with c sequences trained on, a step has ramp_start + ramp_increment x
floor(c x n / ramp_sequences) sequences, at most the global batch, n = (global_batch - ramp_start) / ramp_increment.
"""

import math

from trainwright.compiler.plan import Training


def batch_unit(training: Training) -> int:
    """Sequences of which every batch of the run is a multiple."""
    return math.gcd(training.global_batch, training.ramp_start, training.ramp_increment)


def trained_tokens(training: Training) -> int:
    """Tokens of all steps."""
    sequences, steps = _before_the_whole_batch(training)
    return (sequences + max(training.steps - steps, 0) * training.global_batch) * training.context_length


def whole_steps(training: Training) -> float:
    """Steps of the whole batch that train on as many tokens: what they cost is a step's cost times this."""
    return trained_tokens(training) / training.tokens_per_step


def ramped_steps(training: Training, steps: float) -> float:
    """Steps of a run with the ramp that train on as much as `steps` of the whole batch."""
    sequences, taken = _before_the_whole_batch(training)
    return steps + taken - sequences / training.global_batch


def _before_the_whole_batch(training: Training) -> tuple[int, int]:
    """(sequences, steps) of the ramp; 0, 0 without one."""
    if not training.ramp_start:
        return 0, 0
    count = (training.global_batch - training.ramp_start) // training.ramp_increment
    sequences = steps = 0
    while (grown := sequences * count // training.ramp_sequences) < count:
        size = training.ramp_start + grown * training.ramp_increment
        taken = -(-((grown + 1) * training.ramp_sequences - sequences * count) // (count * size))
        steps, sequences = steps + taken, sequences + taken * size
    return sequences, steps
