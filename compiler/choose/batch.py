"""The global batch in whole sequences, such that layouts can divide it."""

import math
from collections.abc import Collection

import numpy as np

from trainwright.compiler.choose.layout import enumerate_layouts
from trainwright.compiler.layout_rules import Terms, legal_rows
from trainwright.compiler.plan import Shape
from trainwright.compiler.ranges import list_divisors
from trainwright.compiler.resolve import ResolvedSpec

# A batch within 10 % of the optimum costs next to nothing: the basin is about an octave wide (Step Law, 2503.04715).
TOLERANCE = 0.10


def choose_global_batch(target: float, devices: int, units: Collection[int] = (), *, stated: bool) -> int:
    """Sequences a step near `target`: the nearest multiple of the coarsest granule that stays within TOLERANCE of it.

    Granules are devices x 8, 4, 2 (not for a batch that the user stated: it is moved no further than it must), devices, and
    then the divisors of devices: a coarse one divides by more data-parallel degrees and micro-batches. A batch that none of
    `units` divides (none given: any will do) is no choice; where no granule gives one, the devices force it: the nearest
    multiple of a unit, unless the user stated the batch.
    """
    multiples = [] if stated else [devices * 8, devices * 4, devices * 2]
    for granule in [*multiples, *reversed(list_divisors(devices, devices))]:
        batch = _nearest(target, granule)
        if abs(batch / target - 1) <= TOLERANCE and _divided(batch, units):
            return batch
    if stated or not units or _divided(_nearest(target, 1), units):
        return _nearest(target, 1)
    return min((_nearest(target, unit) for unit in sorted(units)), key=lambda batch: abs(math.log(batch / target)))


def batch_units(spec: ResolvedSpec, shape: Shape, context_length: int) -> frozenset[int]:
    """Sequences that data parallelism x micro-batch take at once, of every layout that is legal but for the batch."""
    devices = spec.compute.devices
    any_batch = devices * math.lcm(*spec.layout.micro_batch.values)
    terms = Terms(shape, context_length, any_batch, spec.compute.nodes, spec.compute.devices_per_node)
    table = enumerate_layouts(terms, spec.layout)
    legal = table.take(legal_rows(terms, table))
    return frozenset(int(unit) for unit in np.unique(legal.data * legal.micro_batch))


def _nearest(target: float, unit: int) -> int:
    return max(1, round(target / unit)) * unit


def _divided(batch: int, units: Collection[int]) -> bool:
    return not units or any(batch % unit == 0 for unit in units)
