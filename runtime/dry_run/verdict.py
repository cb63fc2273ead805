"""Whether a program fits into a device, and what would help where it does not."""

from dataclasses import dataclass

from trainwright.runtime.dry_run.execute import Shadow
from trainwright.runtime.dry_run.planned import Planned, Remedy


@dataclass(frozen=True)
class Verdict:
    """Of one stage. Bytes a device: the most that the shadow found, with what the driver and the allocator take beside it, as the
    plan has it. `ranks` are those that do not fit; `remedies`, in the order in which to try them, what would."""

    fits: bool
    needed_bytes: int
    capacity_bytes: int
    ranks: tuple[int, ...]
    measured: bool  # False: it was not shadowed, the plan's estimate alone speaks
    remedies: tuple[Remedy, ...]

    @property
    def missing_bytes(self) -> int:
        """Of the fullest device; negative: room that is left."""
        return self.needed_bytes - self.capacity_bytes


def judge(shadow: Shadow, planned: Planned) -> Verdict | None:
    """None where nothing is known of the stage: its program failed on every rank, and no peak is planned."""
    memory = planned.estimates.memory
    needs = {result.place.rank: result.peak_bytes + memory.overhead for result in shadow.results}
    program = planned.program(shadow.stage.name)
    if not needs and program is not None and shadow.not_shadowed:
        most = max(rank.peak_bytes for rank in program.ranks)
        return _verdict(most, memory.capacity, (), planned, measured=False)
    if not needs:
        return None
    over = tuple(rank for rank, bytes_ in needs.items() if bytes_ > memory.capacity)
    return _verdict(max(needs.values()), memory.capacity, over, planned, measured=True)


def _verdict(needed: int, capacity: int, ranks: tuple[int, ...], planned: Planned, *, measured: bool) -> Verdict:
    fits = needed <= capacity
    remedies = () if fits else planned.estimates.remedies
    return Verdict(fits, needed, capacity, ranks, measured, remedies)
