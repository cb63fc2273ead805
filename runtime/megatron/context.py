"""Context parallelism: the positions of a row shared out to the ranks of a group.

Every sequence is cut into 2 x ranks chunks, of which rank r holds chunk r and chunk 2 x ranks - 1 - r: one of the front and one
of the back, so that under a causal mask all ranks compute as much. Megatron-Core's RoPE and Transformer Engine's attention take
it for granted. The loss is not shared out: every rank gathers the nats of the whole row.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

READ = ("tokens", "labels", "position_ids", "loss_mask")  # by the model, of a batch


@dataclass(frozen=True)
class Part:
    """What one context rank computes of a batch: of all its sequences two chunks, all ranks as many positions."""

    batch: Mapping[str, Tensor]  # what the model reads; with `segments`, their lengths over all ranks
    places: Tensor | None  # of each position of the whole row: where it lies in the ranks' parts, one after the other


def degree() -> int:
    """How many ranks share the positions of a row."""
    return int(parallel_state.get_context_parallel_world_size())


def is_first() -> bool:
    """Whether this rank speaks for its context group."""
    return int(parallel_state.get_context_parallel_rank()) == 0


def chunks_of(ranks: int) -> int:
    """Into how many chunks `ranks` context ranks cut a sequence."""
    return 2 * ranks if ranks > 1 else 1


def multiple_of(config: Any) -> int:
    """What the length of a row must be a multiple of: 2 chunks a context rank, which sequence parallelism cuts evenly."""
    tensor = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return math.lcm(chunks_of(degree()), degree() * tensor)


def length_of(config: Any, segments: Sequence[int]) -> int:
    """How long a row of such sequences becomes when each is padded to whole chunks, and the row to `multiple_of`."""
    chunks = chunks_of(degree())
    total = sum(-(-segment // chunks) * chunks for segment in segments)
    return -(-total // multiple_of(config)) * multiple_of(config)


def part_of(batch: Mapping[str, Tensor], length: int) -> Part:
    """This rank's part of a batch whose rows become `length` positions long (`length_of`, or a greater multiple).

    A row without `segments` is one sequence. What is missing is filled with zeros, in packed rows as a segment of its own.
    """
    ranks, rank, row = degree(), int(parallel_state.get_context_parallel_rank()), batch["tokens"].shape[1]
    if ranks == 1 and length == row:
        return Part(batch, None)
    segments = batch["segments"].tolist() if "segments" in batch else [row]
    padded = [-(-segment // chunks_of(ranks)) * chunks_of(ranks) for segment in segments]
    if "segments" not in batch:
        padded = [length]
    elif length > sum(padded):
        padded.append(length - sum(padded))
    begins = itertools.accumulate(padded, initial=0)
    new_places = torch.cat([torch.arange(begin, begin + size) for begin, size in zip(begins, segments, strict=False)])
    old_places = torch.full((length,), row)  # of padding: beyond the row's end
    old_places[new_places] = torch.arange(row)
    order = torch.stack([positions(padded, ranks, other) for other in range(ranks)])
    mine = old_places[order[rank]]
    read = {name: torch.nn.functional.pad(batch[name], (0, 1))[:, mine] for name in READ if name in batch}
    if "segments" in batch:
        read["segments"] = torch.tensor(padded, dtype=torch.int32)
    return Part(read, order.flatten().argsort()[new_places])


def positions(lengths: Sequence[int], ranks: int, rank: int) -> Tensor:
    """Which positions of a row rank `rank` holds, in its order: int64 [sum(lengths) / ranks].

    `lengths` are those of the row's sequences, each a multiple of `chunks_of(ranks)`.
    """
    if ranks == 1:
        return torch.arange(sum(lengths))
    held = []
    for begin, length in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
        size = length // (2 * ranks)
        front, back = begin + rank * size, begin + (2 * ranks - 1 - rank) * size
        held += [torch.arange(front, front + size), torch.arange(back, back + size)]
    return torch.cat(held)


def in_order(gathered: Tensor) -> Tensor:
    """One sequence, from the parts of all ranks [ranks, length / ranks, ...] to its order [length, ...]."""
    ranks, held = gathered.shape[:2]
    chunks = gathered.view(ranks, 2, held // 2, *gathered.shape[2:])
    return torch.cat((chunks[:, 0].flatten(0, 1), chunks[:, 1].flip(0).flatten(0, 1)))


def whole_rows(values: Tensor, part: Part) -> Tensor:
    """[b, this rank's positions] -> [b, whole row] on every rank. Backward: each rank takes the gradient of its own values."""
    if part.places is None:
        return values
    group = parallel_state.get_context_parallel_group()
    gathered: Tensor = gather_from_tensor_model_parallel_region(values, group=group)
    return gathered[:, part.places.to(values.device)]
