"""Whether what a tokenize stage left is whole, and is what a model can read: asked before any process waits for another.

Every question costs a few reads a file, however large it is. Megatron-Core's index (`.idx`, little-endian): a magic word, a
version, the code of the type of a token; the numbers n of sequences and m of documents; n lengths (4 bytes each), n byte
offsets (8), m document numbers (8).
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainwright.runtime.errors import DataError
from trainwright.runtime.reading import END_BYTES
from trainwright.runtime.stages.corpus import SPLITS

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")  # version, type, sequences, documents
TOKEN_TYPES: dict[int, type[np.integer[Any]]] = {4: np.int32, 8: np.uint16}  # those that `tokenize` writes


@dataclass(frozen=True)
class TokenFiles:
    """The output of one tokenize stage."""

    stage: str
    folder: Path  # the stage's output
    summary: Mapping[str, Any]  # the stage's summary.json

    def check(
        self, sources: Iterable[str], *, vocab_size: int, tokenizer: Path, splits: Iterable[str] = SPLITS
    ) -> None:
        """Raise DataError where the token files of these sources are missing, cut short, hold ids that a vocabulary of that
        size does not have (the first and last 64 KiB of each file are looked at), or were encoded with another tokenizer."""
        self._check_tokenizer(tokenizer, vocab_size)
        for split in splits:
            counts = self.summary["tokens"][split]
            for source in sources:
                if source not in counts:
                    raise DataError(
                        f"stage {self.stage!r} has no source {source!r}, it has {', '.join(counts)}: an edited program? "
                        "write one of these"
                    )
                if counts[source]:
                    self._check_file(self.folder / split / source, counts[source], vocab_size)

    def _check_tokenizer(self, tokenizer: Path, vocab_size: int) -> None:
        held = self.summary["vocab_size"]
        if held > vocab_size:
            raise DataError(
                f"the tokenizer has {held} tokens, and the model's vocab_size is {vocab_size}: an edited program? make them the "
                "same"
            )
        encoded, here = self.summary.get("tokenizer"), tokenizer_id(tokenizer)
        if encoded != here:
            raise DataError(
                f"the tokens of stage {self.stage!r} were encoded with another tokenizer than {tokenizer} ({encoded} there, "
                f"{here} here): {self._again()}"
            )

    def _check_file(self, prefix: Path, count: int, vocab_size: int) -> None:
        data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (data, index):
            if not path.is_file():
                raise DataError(f"{path} is missing: {self._again()}")
        kind = self._check_index(index, data.stat().st_size)
        held, size = data.stat().st_size, np.dtype(kind).itemsize
        if held != count * size:
            raise DataError(
                f"{data} holds {held:,} bytes, and {count:,} tokens of {size} bytes are {count * size:,}: it was cut short, or "
                f"is of another run; {self._again()}"
            )
        largest = max(int(part.max()) for part in _ends(data, kind))
        if largest >= vocab_size:
            raise DataError(
                f"{data} holds the token id {largest}, and the model's vocab_size is {vocab_size}: {self._again()} with the "
                "model's tokenizer"
            )

    def _check_index(self, index: Path, data_bytes: int) -> type[np.integer[Any]]:
        """The type of its tokens, where the index is whole."""
        begin = len(MAGIC) + HEADER.size
        with index.open("rb") as file:
            head = file.read(begin)
            if len(head) < begin or not head.startswith(MAGIC):
                raise DataError(f"{index} is not the index of a token file: {self._again()}")
            _, code, sequences, documents = HEADER.unpack(head[len(MAGIC) :])
            size, expected = index.stat().st_size, begin + 12 * sequences + 8 * documents
            if size != expected or code not in TOKEN_TYPES or not sequences:
                raise DataError(
                    f"{index} holds {size:,} bytes, and by its first ones it should hold {begin} + 12 x {sequences:,} sequences "
                    f"+ 8 x {documents:,} documents = {expected:,}: it was cut short; {self._again()}"
                )
            file.seek(begin + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(begin + 12 * sequences - 8)
            (offset,) = struct.unpack("<q", file.read(8))
        kind = TOKEN_TYPES[code]
        end = offset + length * np.dtype(kind).itemsize
        if end != data_bytes:
            raise DataError(
                f"{index} ends at byte {end:,} of its .bin, which holds {data_bytes:,}: one of them was cut short, or they are "
                f"of two runs; {self._again()}"
            )
        return kind

    def _again(self) -> str:
        return f"delete {self.folder} and run stage {self.stage!r} again"


def tokenizer_id(path: Path) -> str:
    """16 hex digits of a tokenizer.json: another one has others. Raises DataError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): run the stage that trains the tokenizer first") from error


def _ends(path: Path, kind: type[np.integer[Any]]) -> list[np.ndarray[Any, Any]]:
    count, most = path.stat().st_size // np.dtype(kind).itemsize, END_BYTES // np.dtype(kind).itemsize
    tokens = np.memmap(path, dtype=kind, mode="r")
    return [tokens[:most], tokens[max(0, count - most) :]]
