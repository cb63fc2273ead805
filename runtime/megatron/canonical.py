"""The canonical checkpoint: a folder with the weights of one model, that any layout loads.

model.safetensors   named, whole tensors, as GPTModel of one process has them (pieces.py); several files where they are large
model.json          which model they are (model_files.py), beside what goes along with any checkpoint

It holds no state of an optimizer: it is where a training begins. Step folders (checkpoint.py) are where one goes on.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron.model import Embedding, Model
from trainwright.runtime.megatron.model_files import ModelFiles, check_same_model, write_model_files
from trainwright.runtime.megatron.pieces import OUTPUT_LAYER, WORD_EMBEDDINGS, Cut, Piece, pieces
from trainwright.runtime.megatron.weight_files import SHARD_BYTES, WeightReader, WeightWriter

SHOWN = 3  # tensors that an error names


def load_canonical(model: Model, folder: Path) -> None:
    """Load the weights of a canonical folder; each rank reads its own parts. The optimizer's state stays new.

    Rows of the vocabulary's padding that the folder lacks become the last token's, as in Megatron-LM's conversions. Raises
    CheckpointError for another model's, and for damage.
    """
    check_same_model(model.config, model.embedding, folder)
    reader = WeightReader(folder)
    held = list(pieces(model))
    check_tensors(reader.shapes, {piece.name: piece.whole_shape for piece in held}, model.embedding, folder, part=True)
    with torch.no_grad():
        for piece in held:
            piece.tensor.copy_(_read(reader, piece, model.embedding))
    if model.optimizer is not None:
        model.optimizer.reload_model_params()  # the optimizer's own copies of the weights


def check_tensors(
    there: Mapping[str, Sequence[int]],
    here: Mapping[str, Sequence[int]],
    embedding: Embedding,
    folder: Path,
    *,
    part: bool = False,
) -> None:
    """Raise CheckpointError, with the first tensors that differ, where the shapes in a folder are not the model's.

    `part`: `here` is what one rank holds, and `there` may hold more. The vocabulary may be padded otherwise.
    """
    found = []
    for name in sorted({*here, *(() if part else there)}, key=_natural):
        theirs, ours = _shape(there.get(name)), _shape(here.get(name))
        if theirs != ours and not _differ_in_padding(name, there.get(name), here.get(name), embedding):
            found.append(f"{name}: {theirs} there, {ours} here")
    if found:
        more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
        raise CheckpointError(
            f"the weights in {folder} are of another model: {'; '.join(found[:SHOWN])}{more}. Start from a checkpoint of this "
            "model, or write the values that it was trained with"
        )


def write_canonical(model: Model, folder: Path, files: ModelFiles, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a canonical folder from a model in any layout. All ranks call it together; rank 0 writes, one tensor after the
    other, each sent to it once. The folder gets its name when it is whole; what was there is replaced."""
    scratch = folder.with_name(f"{folder.name}.partial")
    writer = None
    if dist.get_rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        writer = WeightWriter(scratch, shard_bytes)
    if model.overlaps_param_gather:
        for chunk in model.ddp:
            chunk.start_param_sync(force_sync=True)
    _send_all(model, writer)
    if writer:
        writer.close()
        write_model_files(scratch, model, files)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    dist.barrier()


def _read(reader: WeightReader, piece: Piece, embedding: Embedding) -> Tensor:
    """This rank's part of a tensor, from the file."""
    if piece.name in (WORD_EMBEDDINGS, OUTPUT_LAYER):
        return _read_rows(reader, piece, embedding)
    parts = [reader.read(piece.name, index) for index in piece.cut.slices(piece.whole_shape)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, piece.cut.dimension)


def _read_rows(reader: WeightReader, piece: Piece, embedding: Embedding) -> Tensor:
    """This rank's rows of the vocabulary."""
    rows, columns = piece.cut.slices(piece.whole_shape)[0]
    there = reader.shapes[piece.name][0]
    parts = [reader.read(piece.name, (slice(rows.start, min(rows.stop, there)), columns))] if rows.start < there else []
    padding = rows.stop - max(rows.start, there)
    if padding > 0:
        last = slice(embedding.vocab_size - 1, embedding.vocab_size)
        parts.append(reader.read(piece.name, (last, columns)).expand(padding, -1))
    return torch.cat(parts)


def _differ_in_padding(
    name: str, there: Sequence[int] | None, here: Sequence[int] | None, embedding: Embedding
) -> bool:
    if name not in (WORD_EMBEDDINGS, OUTPUT_LAYER) or there is None or here is None:
        return False
    return len(there) == 2 and there[0] >= embedding.vocab_size and there[1] == here[1]


def _shape(shape: Sequence[int] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) or "a number"


@dataclass(frozen=True)
class _Transfer:
    """A whole tensor, and which rank sends which part of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[int, tuple[Cut, tuple[int, ...]]]  # {rank: (cut, the part's shape)}


def _send_all(model: Model, writer: WeightWriter | None) -> None:
    """Send each tensor to rank 0, whose `writer` takes it. Sends and receives follow one order, which all ranks know."""
    mine = {piece.name: piece for piece in pieces(model) if _is_first_replica(piece)}
    for transfer in _transfers(mine):
        part = mine[transfer.name].tensor.detach() if dist.get_rank() in transfer.parts else None
        if writer is None:
            if part is not None:
                dist.send(part.contiguous(), 0)
            continue
        whole = torch.empty(transfer.shape, dtype=transfer.dtype)
        for rank, (cut, shape) in transfer.parts.items():
            if rank == 0:
                received = part
            else:
                received = torch.empty(shape, dtype=transfer.dtype, device=model.platform.device)
                dist.recv(received, rank)
            assert received is not None
            blocks = [received] if cut.degree == 1 else received.chunk(cut.blocks, cut.dimension)
            for index, block in zip(cut.slices(transfer.shape), blocks, strict=True):
                whole[index] = block.to("cpu")
        writer.add(transfer.name, whole)


def _transfers(mine: Mapping[str, Piece]) -> list[_Transfer]:
    """What all ranks hold together: each part once, from the first rank that has it."""
    announced = [(name, piece.cut, tuple(piece.tensor.shape), piece.tensor.dtype) for name, piece in mine.items()]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, announced)
    parts: dict[str, dict[int, tuple[Cut, tuple[int, ...]]]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for rank, held in enumerate(everyone):
        for name, cut, shape, dtype in held:
            known = parts.setdefault(name, {})
            if all(cut != other for other, _ in known.values()):
                known[rank] = (cut, shape)
                dtypes[name] = dtype
    return [
        _Transfer(name, cut.whole(shape), dtypes[name], parts[name])
        for name in sorted(parts, key=_natural)
        for cut, shape in [next(iter(parts[name].values()))]
    ]


def _is_first_replica(piece: Piece) -> bool:
    """Of the ranks that hold the same part for other data, the first; experts are laid out on groups of their own."""
    if ".local_experts." in piece.name:
        return bool(parallel_state.get_expert_data_parallel_rank() == 0)
    return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10; the embedding before the layers."""
    first = ("embedding", "decoder", "mtp", "output_layer")
    place = next((number for number, part in enumerate(first) if name.startswith(part)), len(first))
    return [(place, "")] + [(int(word), "") if word.isdigit() else (0, word) for word in re.split(r"(\d+)", name)]
