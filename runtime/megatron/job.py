"""What the processes of a stage compute, whatever its data holds: the literals of a program, brought together.

A stage says its job before it looks at any data, and opens its model by it. A dry run takes the job over at that moment.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trainwright.runtime.megatron.losses import Loss
from trainwright.runtime.megatron.model import Embedding
from trainwright.runtime.megatron.parallel import Parallel
from trainwright.runtime.megatron.parameters import PLAIN, Groups
from trainwright.runtime.megatron.platform import Literals


@dataclass(frozen=True)
class MicroBatch:
    """`rows` of `length` tokens; where `segments` is not 0, each row is packed with so many sequences of one length."""

    rows: int
    length: int
    segments: int = 0


@dataclass(frozen=True)
class Job:
    """`literals` as the program wrote them. Without a `loss` the model is only asked."""

    parallel: Parallel
    seed: int
    literals: Literals
    embedding: Embedding
    micro_batch: MicroBatch
    micro_batches: int  # of a data rank in a step; where nothing is trained, as few as the schedule takes at a time
    loss: Loss | None
    groups: Groups = PLAIN
    asks_reference: bool = (
        False  # before the first step the model that it starts from is asked what it says of all data
    )


def declare(job: Job) -> Job:
    """The job itself; in a dry run this does not return."""
    if _taker is not None:
        _taker(job)
    return job


def take_over(taker: Callable[[Job], None]) -> None:
    """From here on, hand every job that a stage of this process declares to `taker`, which ends the program by raising."""
    global _taker
    _taker = taker


_taker: Callable[[Job], None] | None = None
