"""Tokenised examples of a tuning stage on disk, written by one rank and read by all.

`work/<stage>/data/<split>/` holds arrays: `tokens.npy` and `counts.npy` (1: the token is a target of the loss) of all
sequences end to end, `ends.npy` (where each sequence ends), and for training the packs: `items.npy` (sequences, pack after
pack) and `pack_ends.npy`. They are mapped, not read: a rank holds what it trains on.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from trainwright.runtime.errors import RunError
from trainwright.runtime.megatron.packing import Sequence as Tokens
from trainwright.runtime.megatron.packing import packed_row
from trainwright.runtime.workspace import write_json

PREPARED = "prepared.json"


class Examples:
    """The sequences of one split, by number, and their packs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens, self._counts, self._ends = (_map(folder, name) for name in ("tokens", "counts", "ends"))

    @cached_property
    def _packs(self) -> tuple[Any, Any]:
        return _map(self._folder, "items"), _map(self._folder, "pack_ends")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Tokens:
        begin, end = _span(self._ends, index)
        return Tokens(tuple(self._tokens[begin:end].tolist()), tuple(self._counts[begin:end].tolist()))

    @property
    def num_packs(self) -> int:
        return len(self._packs[1])

    def pack(self, index: int) -> list[int]:
        """Numbers of the sequences in a pack."""
        items, ends = self._packs
        begin, end = _span(ends, index)
        found: list[int] = items[begin:end].tolist()
        return found


def write_examples(folder: Path, sequences: Iterable[Tokens]) -> tuple[list[int], int]:
    """Write the sequences, which need not be in memory together; (positions that each takes, targets of all)."""
    folder.mkdir(parents=True)
    tokens, counts, ends, positions = array("i"), array("b"), array("q"), []
    for item in sequences:
        tokens.extend(item.tokens)
        counts.extend(item.counts)
        ends.append(len(tokens))
        positions.append(item.positions)
    marks = np.asarray(counts, np.int8)
    for name, values in (("tokens", np.asarray(tokens, np.int32)), ("counts", marks), ("ends", np.asarray(ends))):
        save_array(folder / f"{name}.npy", values)
    return positions, int(marks.sum(dtype=np.int64))


def write_packs(folder: Path, packs: Sequence[Sequence[int]]) -> None:
    """Write which of the sequences in `folder` share a row."""
    save_array(folder / "items.npy", np.fromiter((item for pack in packs for item in pack), np.int64))
    save_array(folder / "pack_ends.npy", np.cumsum([len(pack) for pack in packs], dtype=np.int64))


def save_array(path: Path, values: Any) -> None:
    """Write an array as .npy; it is there whole or not at all, also where the machine loses power."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def prepare(folder: Path, wanted: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Have rank 0 `make` the examples in a new folder, unless those for `wanted` (what they depend on) are there; its facts.

    All ranks call it together, and all raise what rank 0 raised. Killed half-way, it leaves nothing that counts.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = _facts(folder, wanted) or _make(folder, wanted, make)
        except RunError as error:
            box[0] = error
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], RunError):
        raise box[0]
    facts: dict[str, Any] = box[0]
    return facts


def content_id(folder: Path) -> str:
    """16 hex digits of the prepared examples, on rank 0 (the one that compares); "" elsewhere."""
    if dist.get_rank() != 0:
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*/*.npy")):  # not what was computed from them, which rounding may change
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PackedStream:
    """Training batches: every epoch all packs once, in an order that depends on the seed and not on the layout."""

    examples: Examples
    pack_length: int  # tokens
    epochs: int
    global_batch: int  # packs
    micro_batch: int  # packs
    pad: int
    seed: int

    @property
    def steps(self) -> int:
        """The last step may hold fewer packs than the others: no example is left out."""
        return -(-self.examples.num_packs * self.epochs // self.global_batch)

    def packs(self, step: int) -> list[int]:
        """The packs of a step (from 0); -1 fills up the last."""
        count = self.examples.num_packs
        numbers = range(step * self.global_batch, (step + 1) * self.global_batch)
        places = (divmod(number, count) for number in numbers)
        return [int(_order(self.seed, epoch, count)[place]) if epoch < self.epochs else -1 for epoch, place in places]

    def items(self, step: int, rank: int, size: int) -> list[list[int]]:
        """The sequences of each micro-batch of data-parallel rank `rank` of `size`.

        Micro-batch i of all ranks together is a contiguous part of the global batch, as in pretraining.
        """
        packs, share = self.packs(step), self.micro_batch * size
        result = []
        for begin in range(0, self.global_batch, share):
            mine = packs[begin + rank * self.micro_batch : begin + (rank + 1) * self.micro_batch]
            result.append([item for pack in mine if pack >= 0 for item in self.examples.pack(pack)])
        return result

    def row(self, items: Sequence[int]) -> dict[str, Any]:
        """A micro-batch: one row of `micro_batch` packs."""
        length = self.micro_batch * self.pack_length
        row: dict[str, Any] = packed_row([self.examples[item] for item in items], length, self.pad)
        return row

    def batches(self, step: int, rank: int, size: int) -> list[dict[str, Any]]:
        """This rank's micro-batches of a step."""
        return [self.row(items) for items in self.items(step, rank, size)]


@lru_cache(maxsize=2)  # of the epoch, and of the next one where a step holds packs of both
def _order(seed: int, epoch: int, count: int) -> Any:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _facts(folder: Path, wanted: str) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
        facts: dict[str, Any] = found["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if found["wanted"] == wanted else None


def _make(folder: Path, wanted: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts = make(folder)
    write_json(folder / PREPARED, {"wanted": wanted, "facts": facts})
    return facts


def _map(folder: Path, name: str) -> Any:
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def _span(ends: Any, index: int) -> tuple[int, int]:
    return int(ends[index - 1]) if index else 0, int(ends[index])
