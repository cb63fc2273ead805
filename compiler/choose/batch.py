"""The global batch in whole sequences, such that layouts can divide it."""

# A batch within 10 % of the optimum costs next to nothing: the basin is about an octave wide (Step Law, 2503.04715).
TOLERANCE = 0.10


def choose_global_batch(target: float, devices: int) -> int:
    """Sequences a step near `target`: the nearest multiple of the coarsest granule that stays within TOLERANCE of it.

    Granules are devices x 8, 4, 2, 1, then the divisors of devices: a coarse one divides by more data-parallel degrees and
    micro-batches.
    """
    divisors = [divisor for divisor in range(devices, 0, -1) if devices % divisor == 0]
    for granule in [devices * 8, devices * 4, devices * 2, *divisors]:
        batch = max(1, round(target / granule)) * granule
        if abs(batch / target - 1) <= TOLERANCE:
            return batch
    return max(1, round(target))
