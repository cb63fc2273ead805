"""Named tensors in files of the safetensors format: one, or several with an index where they are large, as Hugging Face has it.

Source: safetensors 0.8 (`safe_open`, whose slices read from the file what was asked for and nothing else).
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.step_folders import INDEX, WEIGHTS
from trainwright.runtime.workspace import write_json

__all__ = ["INDEX", "SHARD_BYTES", "WEIGHTS", "WeightReader", "WeightWriter"]

SHARD_BYTES = 5 * 10**9  # of a file, at most: what Hugging Face's own tools write


class WeightWriter:
    """Takes tensors one after the other and holds those of one file at most: `add` each, then `close`."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._files: list[list[str]] = []  # the names of the tensors in each

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor is copied to the CPU, and kept as it is where it lies there whole already."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._size + size > self._limit:
            self._write()
        self._waiting[name] = tensor.detach().to("cpu").contiguous()
        self._size += size

    def close(self) -> None:
        """Write what is left, and give the files their names."""
        self._write()
        count = len(self._files)
        names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, name in enumerate(names):
            os.replace(self._scratch(number), self._folder / name)
        if count > 1:
            places = {name: file for file, held in zip(names, self._files, strict=True) for name in held}
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": places})

    def _write(self) -> None:
        path = self._scratch(len(self._files))
        save_file(self._waiting, path, metadata={"format": "pt"})
        path.chmod(_usual_mode())
        self._files.append(list(self._waiting))
        self._total += self._size
        self._waiting, self._size = {}, 0

    def _scratch(self, number: int) -> Path:
        return self._folder / f"{WEIGHTS}.{number:05d}"


class WeightReader:
    """The tensors of a folder, read when they are asked for. Raises CheckpointError where files are missing or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._place = _places(folder)  # {tensor: file}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(self._file(file).get_slice(name).get_shape()) for name, file in self._in_their_files()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or the part of it that one slice a dimension names."""
        file = self._file(self._place[name])
        try:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / self._place[name]} is damaged: {error}") from error
        return tensor

    def _in_their_files(self) -> list[tuple[str, str]]:
        """(tensor, file) of all tensors. Raises CheckpointError where a file lacks one that the index sees in it."""
        if not self._place:  # one file: it says itself what it holds
            self._place = dict.fromkeys(self._file(WEIGHTS).keys(), WEIGHTS)
        for file in sorted(set(self._place.values())):
            lacking = {name for name, at in self._place.items() if at == file} - set(self._file(file).keys())
            if lacking:
                raise CheckpointError(
                    f"{self.folder / file} lacks {min(lacking)}, which {INDEX} sees there: copy it anew"
                )
        return list(self._place.items())

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}): copy it anew") from error
        return self._open[name]


def _places(folder: Path) -> dict[str, str]:
    """What an index says; empty where there is one file of weights."""
    if (folder / INDEX).exists():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            places: Mapping[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return dict(places)
        raise CheckpointError(f"{folder / INDEX} is no index of weights: copy it anew")
    if not (folder / WEIGHTS).exists():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else ""
        raise CheckpointError(
            f"{folder} has no {WEIGHTS} and no {INDEX}, but {there or 'nothing'}: weights of other formats are not read; "
            "save them as safetensors"
        )
    return {}


def _usual_mode() -> int:
    """Of a new file, by the user's umask: safetensors leaves its files to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
