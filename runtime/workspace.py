"""Where a run keeps its files: `BUNDLE/work/<stage>/{log,checkpoints,output}`, `metrics.jsonl`, `progress.json`.

Programs name other stages, never paths; this module turns names into folders. A program that is started by hand finds its
bundle beside itself; the runner says otherwise through two environment variables.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORK_VARIABLE = "TRAINWRIGHT_WORK"  # default: BUNDLE/work
DATA_ROOT_VARIABLE = "TRAINWRIGHT_DATA_ROOT"  # default: the manifest's data_root, relative to the current folder


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage instance."""

    path: Path

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def output(self) -> Path:
        """What later stages read. Holds `summary.json` last of all: its presence says that the stage is complete."""
        return self.path / "output"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a step (see docs/reference/files.md)."""
        return self.path / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """`{"done": 3, "total": 10, "unit": "documents"}`, replaced whole."""
        return self.path / "progress.json"

    @property
    def summary(self) -> Path:
        """Figures of the finished stage; `key_figure` is the text that the table of stages shows."""
        return self.output / "summary.json"


@dataclass(frozen=True)
class Workspace:
    """The folders of one run of one bundle."""

    bundle: Path
    work: Path
    data_root: Path

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.work / name)


def open_workspace() -> Workspace:
    """The workspace of the program that is running (`sys.argv[0]` lies in the bundle)."""
    bundle = Path(sys.argv[0]).resolve().parent
    work = Path(os.environ.get(WORK_VARIABLE) or bundle / "work").resolve()
    root = os.environ.get(DATA_ROOT_VARIABLE)
    if root is None:
        manifest = bundle / "manifest.json"
        root = json.loads(manifest.read_text())["data_root"] if manifest.exists() else "."
    return Workspace(bundle=bundle, work=work, data_root=Path(root).resolve())


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`: a reader sees the old or the new one, never a piece.

    That also holds where the machine loses power, and where the disk is full (OSError: the old one stays).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def remove_scratch(folder: Path) -> None:
    """Delete what `write_atomically` left in `folder` when its process was killed. Nothing else may write there meanwhile."""
    for path in folder.glob(".*.*"):
        if path.suffix[1:].isdigit():
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of `value` as JSON with sorted keys (equal values give equal bytes)."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


class Progress:
    """Writes `progress.json` at most once a second: what the runner shows while a stage works."""

    def __init__(self, folder: StageFolder, total: int, unit: str) -> None:
        self._path, self._total, self._unit, self._last = folder.progress, total, unit, 0.0

    def update(self, done: int) -> None:
        now = time.monotonic()
        if done >= self._total or now - self._last >= 1.0:
            self._last = now
            write_json(self._path, {"done": done, "total": self._total, "unit": self._unit})
