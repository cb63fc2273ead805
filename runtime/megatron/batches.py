"""How many sequences each step trains on: one global batch, or one that grows (ramp-up)."""

from dataclasses import dataclass

from trainwright.runtime.errors import Unsupported


@dataclass(frozen=True)
class Ramp:
    """The global batch begins with `start` sequences and grows by `increment`, at equal distances over the first `sequences`
    sequences (Megatron-LM's rule): before a step, with c sequences trained on and n increments, it is

        start + increment x floor(c x n / sequences),  at most the global batch,  n = (global_batch - start) / increment
    """

    start: int
    increment: int
    sequences: int


class Batches:
    """Sizes of the batches of a run. Steps count from 0."""

    def __init__(self, global_batch: int, ramp: Ramp | None = None) -> None:
        """Raises Unsupported, with the arithmetic, for a ramp that does not lead to the global batch."""
        self._stretches: list[tuple[int, int, int]] = []  # from this step, with so many sequences trained on: this size
        step = trained = 0
        if ramp is not None:
            _check(ramp, global_batch)
            count = (global_batch - ramp.start) // ramp.increment
            while (grown := trained * count // ramp.sequences) < count:
                size = ramp.start + grown * ramp.increment
                self._stretches.append((step, trained, size))
                steps = -(-((grown + 1) * ramp.sequences - trained * count) // (count * size))
                step, trained = step + steps, trained + steps * size
        self._stretches.append((step, trained, global_batch))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size, in order."""
        return tuple(size for _, _, size in self._stretches)

    def size(self, step: int) -> int:
        """Sequences that `step` trains on."""
        return self._stretch(step)[2]

    def before(self, step: int) -> int:
        """Sequences that all steps before `step` trained on."""
        first, trained, size = self._stretch(step)
        return trained + (step - first) * size

    def _stretch(self, step: int) -> tuple[int, int, int]:
        return next(stretch for stretch in reversed(self._stretches) if stretch[0] <= step)


def _check(ramp: Ramp, global_batch: int) -> None:
    if min(ramp.start, ramp.increment, ramp.sequences) < 1 or ramp.start >= global_batch:
        raise Unsupported(
            f"ramp: start {ramp.start}, increment {ramp.increment} and sequences {ramp.sequences} are at least 1, and start is "
            f"below the global_batch, {global_batch}: write others, or ramp=None"
        )
    if (rest := (global_batch - ramp.start) % ramp.increment) != 0:
        raise Unsupported(
            f"ramp: from start {ramp.start} steps of {ramp.increment} do not lead to global_batch {global_batch}: "
            f"{global_batch} - {ramp.start} = {(global_batch - ramp.start) // ramp.increment} x {ramp.increment} + {rest}"
        )
