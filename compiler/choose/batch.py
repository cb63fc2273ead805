"""The global batch in whole sequences, such that layouts can divide it."""

from trainwright.compiler.ranges import list_divisors

# A batch within 10 % of the optimum costs next to nothing: the basin is about an octave wide (Step Law, 2503.04715).
TOLERANCE = 0.10


def choose_global_batch(target: float, devices: int, *, stated: bool) -> int:
    """Sequences a step near `target`: the nearest multiple of the coarsest granule that stays within TOLERANCE of it.

    Granules are devices x 8, 4, 2 (not for a batch that the user stated: it is moved no further than it must), devices, and
    then the divisors of devices: a coarse one divides by more data-parallel degrees and micro-batches.
    """
    multiples = [] if stated else [devices * 8, devices * 4, devices * 2]
    for granule in [*multiples, *reversed(list_divisors(devices, devices))]:
        batch = max(1, round(target / granule)) * granule
        if abs(batch / target - 1) <= TOLERANCE:
            return batch
    return max(1, round(target))
