"""Whether a program fits into a device, and what would help where it does not."""

from dataclasses import dataclass

from trainwright.runtime.dry_run.execute import Shadow
from trainwright.runtime.dry_run.planned import Planned, Remedy


@dataclass(frozen=True)
class Verdict:
    """Of one stage. Bytes a device: the most that the shadow found, with what the process and its allocator hold beside it, as
    the plan has it. `ranks` are those that do not fit; `remedies`, in the order in which to try them, what would."""

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
    capacity, program = planned.estimates.memory.capacity, planned.program(shadow.stage.name)
    if shadow.not_shadowed and program is not None:
        most = max(rank.peak_bytes + rank.overhead_bytes for rank in program.ranks)
        return _verdict(most, capacity, (), planned, measured=False)
    needs = {}
    for result in shadow.results:
        rank = program.rank(result.place.pipeline) if program is not None else None
        needs[result.place.rank] = result.peak_bytes + (rank.overhead_bytes if rank is not None else 0)
    if not needs:
        return None
    over = tuple(rank for rank, bytes_ in needs.items() if bytes_ > capacity)
    return _verdict(max(needs.values()), capacity, over, planned, measured=True)


def _verdict(needed: int, capacity: int, ranks: tuple[int, ...], planned: Planned, *, measured: bool) -> Verdict:
    fits = needed <= capacity
    remedies = () if fits else planned.estimates.remedies
    return Verdict(fits, needed, capacity, ranks, measured, remedies)
