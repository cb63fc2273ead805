"""Several sequences in one row: each attends to itself alone, and counts its positions from 0.

A packed batch is one row: `tokens`, `labels`, `position_ids` [1, length] (int64), `loss_mask` [1, length] (float32), and
`segments` (int32), the lengths of the sequences in it. What is left of the row is padding: one last segment whose
`loss_mask` is 0. A sequence of n tokens takes n - 1 positions: its last token is only predicted.
"""

import bisect
import contextlib
import logging
import warnings
from collections import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

CHUNK = 2000  # sequences packed together: NeMo's packing takes quadratic time, and a row loses little by it


@dataclass(frozen=True)
class Sequence:
    """Tokens, and which of them are targets of the loss: counts[i] = 1 says that token i is. Never the first."""

    tokens: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.counts) or any(self.counts[:1]):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.counts)} counts, and the first counts never")

    @property
    def positions(self) -> int:
        """How much of a row it takes."""
        return max(0, len(self.tokens) - 1)


def pack(lengths: abc.Sequence[int], pack_length: int, seed: int) -> list[list[int]]:
    """Put items that take `lengths` positions of a row into rows of `pack_length`: the numbers of each row's items.

    NeMo's first fit of the longest first. The same lengths and seed give the same rows; which of the items of one length
    meet is drawn. Raises ValueError for an item that is longer than a row.
    """
    if not lengths:
        return []
    longest = max(lengths)
    if longest > pack_length or min(lengths) < 1:
        raise ValueError(f"items of {min(lengths)} to {longest} positions cannot be packed into rows of {pack_length}")
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    with _nemo(seed) as nemo:
        return [
            row
            for begin in range(0, len(order), CHUNK)
            for row in _pack_chunk(nemo, order[begin : begin + CHUNK], lengths, pack_length)
        ]


def best_fit(sizes: abc.Sequence[int], length: int) -> list[list[int]]:
    """Numbers of the sequences of `sizes` positions, by row of `length`: the longest that is left, then what best fits beside
    it. Those of no position are in none."""
    left = sorted((size, index) for index, size in enumerate(sizes) if size)
    rows = []
    while left:
        size, index = left.pop()
        row, room = [index], length - size
        while (place := bisect.bisect(left, (room, len(sizes)))) > 0:
            size, index = left.pop(place - 1)
            row.append(index)
            room -= size
        rows.append(row)
    return rows


def packed_row(sequences: abc.Sequence[Sequence], length: int, pad: int) -> dict[str, Tensor]:
    """One packed batch that holds the sequences in this order, padded to `length` positions with token `pad`.

    Raises ValueError where they do not fit, or where one has fewer than two tokens.
    """
    used = sum(sequence.positions for sequence in sequences)
    if used > length or not all(sequence.positions for sequence in sequences):
        sizes = [sequence.positions for sequence in sequences]
        raise ValueError(
            f"sequences of {sizes} positions, {used} in all, do not fit into a row of {length}, each in one or more"
        )
    rest = length - used
    filling = [pad] * rest
    segments = [sequence.positions for sequence in sequences] + ([rest] if rest else [])
    positions = [position for sequence in sequences for position in range(sequence.positions)]
    tokens = [token for sequence in sequences for token in sequence.tokens[:-1]]
    labels = [token for sequence in sequences for token in sequence.tokens[1:]]
    counts = [count for sequence in sequences for count in sequence.counts[1:]]
    return {
        "tokens": torch.tensor([tokens + filling]),
        "labels": torch.tensor([labels + filling]),
        "position_ids": torch.tensor([positions + [0] * rest]),  # padding may be longer than learned positions are many
        "loss_mask": torch.tensor([counts + [0] * rest], dtype=torch.float32),
        "segments": torch.tensor(segments, dtype=torch.int32),
    }


def segment_parameters(segments: Tensor, device: torch.device) -> PackedSeqParams:
    """What Megatron-Core wants to know of the segments of a packed batch."""
    ends = torch.nn.functional.pad(segments.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
    # Exactly: told of a longest as long as the row, Megatron-Core's RoPE counts positions over the whole row.
    longest = int(segments.max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _pack_chunk(nemo: Any, items: abc.Sequence[int], lengths: abc.Sequence[int], pack_length: int) -> list[list[int]]:
    # NeMo moves token lists into rows and drops their numbers: lists that hold the item's number say who is where.
    listed = [{"input_ids": [item] * (lengths[item] + 1), "loss_mask": [0] * (lengths[item] + 1)} for item in items]
    by_length, histogram = nemo.create_hist(listed, pack_length)
    assignments, _ = nemo.create_packing_strategy(histogram, pack_length, "first_fit_decreasing")
    rows = nemo.fill_packing_strategy(assignments, by_length, pack_length, 0)
    return [[row["input_ids"][start] for start in row["seq_start_id"]] for row in rows]


@contextlib.contextmanager
def _nemo(seed: int) -> Iterator[Any]:
    """NeMo's packing functions, silent, and drawing from numpy's global generator as seeded; after it, that is as it was."""
    show_warning = warnings.showwarning  # NeMo's import puts its logger there
    from nemo.utils import sequence_packing_utils as nemo  # seconds to import, and one rank packs

    warnings.showwarning = show_warning
    state, progress_bar = np.random.get_state(), nemo.tqdm
    np.random.seed(seed % 2**32)
    nemo.tqdm = lambda items, **_: items
    try:
        with nemo.logging.temp_verbosity(logging.WARNING):
            yield nemo
    finally:
        nemo.tqdm = progress_bar
        np.random.set_state(state)
