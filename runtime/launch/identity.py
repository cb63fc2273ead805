"""What a stage read and left, as hashes: what decides whether it is done."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from trainwright.runtime.disk import unusable_work
from trainwright.runtime.errors import DataError, Unsupported
from trainwright.runtime.launch.saved import model_id
from trainwright.runtime.launch.state import StageState
from trainwright.runtime.manifest import Stage
from trainwright.runtime.workspace import StageFolder, write_json

HASHES_FILE = "hashes.json"
CONNECTOR = "connector:"
# A connector reads what is installed, not files of the user: what identifies that.
CONNECTOR_VERSIONS: dict[str, Callable[[], str]] = {"python-stdlib": platform.python_version}
RACY_NS = 2_000_000_000  # a file changed this recently may change again within one tick of its file system's clock


class Hashes:
    """sha256 of files, kept in `work/hashes.json` by path, size and modification time, so that each is read once."""

    def __init__(self, work: Path) -> None:
        self._work, self._path = work, work / HASHES_FILE
        self._known: dict[str, list[int | str]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):  # a damaged cache is only slower
            known = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(known, dict):
                self._known = {key: row for key, row in known.items() if isinstance(row, list) and len(row) == 3}

    def file(self, path: Path) -> str:
        """sha256 of the file's content, in hex. Raises DataError where it cannot be read."""
        try:
            return self._hash(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    def _hash(self, path: Path) -> str:
        status = path.stat()
        key = str(path.relative_to(self._work)) if path.is_relative_to(self._work) else str(path)
        known = self._known.get(key)
        if known is not None and known[:2] == [status.st_size, status.st_mtime_ns]:
            return str(known[2])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - status.st_mtime_ns > RACY_NS:
            self._known[key] = [status.st_size, status.st_mtime_ns, digest]
            self._changed = True
        return digest

    def files(self, named: Iterable[tuple[str, Path]]) -> str:
        """16 hex digits of (name, content) of files, whatever their order; "" for none."""
        lines = sorted(f"{self.file(path)}  {name}" for name, path in named)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else ""

    def save(self) -> None:
        """Raises BundleError or DiskFull where it cannot be written."""
        if self._changed:
            with unusable_work(self._work):
                write_json(self._path, self._known)
            self._changed = False


def output_id(folder: StageFolder, hashes: Hashes) -> str:
    """16 hex digits of everything below `output/`; "" where it is empty or gone."""
    found = (Path(parent) / name for parent, _, names in os.walk(folder.output) for name in names)
    return hashes.files((path.relative_to(folder.output).as_posix(), path) for path in found)


def missing_outputs(stage: Stage, folder: StageFolder) -> list[str]:
    """What the stage should have left and did not, relative to its folder."""
    wanted = [*stage.outputs, folder.summary.relative_to(folder.path).as_posix()]
    return [pattern for pattern in wanted if not any(glob.iglob(pattern, root_dir=folder.path, recursive=True))]


def _matches(pattern: str, data_root: Path) -> list[tuple[str, Path]]:
    """The files that the glob names, as it names them and with their path. Raises DataError where one cannot be read."""
    found = []
    for name in glob.glob(pattern, root_dir=data_root, recursive=True):
        path = data_root / name
        try:
            if stat.S_ISREG(path.stat().st_mode):
                path.open("rb").close()
                found.append((name, path))
        except OSError as error:
            raise _unreadable(path, error) from error
    return found


def _unreadable(path: Path, error: OSError) -> DataError:
    what = f"the link to {path.readlink()}" if path.is_symlink() else "it"
    return DataError(f"{path}: {what} cannot be read ({error.strerror}); make it readable, or move it away")


def require_inputs(stage: Stage, data_root: Path) -> None:
    """Raises DataError where one of the user's globs matches nothing or a file that cannot be read, or a folder holds no model.

    Raises Unsupported for a connector that is not known.
    """
    for pattern in stage.inputs:
        if pattern.startswith(CONNECTOR):
            _connector_version(stage, pattern)
        elif (data_root / pattern).is_dir():
            _saved_model(stage, data_root / pattern)
        elif not _matches(pattern, data_root):
            raise DataError(
                f"{stage.name}: no file matches {pattern} below {data_root}; put the files there, say where they are with"
                f" --data-root, or leave the stage out with --only"
            )


def _connector_version(stage: Stage, text: str) -> str:
    name = text.removeprefix(CONNECTOR).split(":")[0]
    if name not in CONNECTOR_VERSIONS:
        raise Unsupported(f"{stage.name}: unknown connector {name!r}; known are {', '.join(CONNECTOR_VERSIONS)}")
    return CONNECTOR_VERSIONS[name]()


def _saved_model(stage: Stage, path: Path) -> str:
    try:
        return model_id(path)
    except DataError as error:
        raise DataError(f"{stage.name}: {error}") from None


def inputs_of(stage: Stage, outputs: dict[str, str], data_root: Path, hashes: Hashes) -> dict[str, str]:
    """The identity of each input: outputs of the stages it needs (`outputs`, by name), files of the user, models that another
    bundle saved, connectors."""
    found = {f"stage:{need}": outputs.get(need, "") for need in stage.needs}
    for text in stage.inputs:
        if text.startswith(CONNECTOR):
            found[text] = _connector_version(stage, text)
        elif (data_root / text).is_dir():
            found[text] = _saved_model(stage, data_root / text)
        else:
            found[text] = hashes.files(_matches(text, data_root))
    return found


def changed_input(before: dict[str, str], after: dict[str, str]) -> str:
    """What changed between two attempts, in words; "" for nothing."""
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        if key.startswith("stage:"):
            return f"the output of {key.removeprefix('stage:')} changed"
        return f"{key} changed" if after.get(key) != "" else f"no file matches {key} here (--data-root?)"
    return ""


def reason_to_run(
    stage: Stage, state: StageState, program_id: str, inputs: dict[str, str], folder: StageFolder, hashes: Hashes
) -> str:
    """Why the stage is not done, in words; "" when it is."""
    if state.state != "done":
        words = {"pending": "it has not run yet", "interrupted": "it was interrupted", "running": "it was interrupted"}
        return words.get(state.state, f"it failed ({state.note})")
    if program_id != state.program_id:
        return "its program changed"
    changed = changed_input(state.inputs, inputs)
    if changed:
        return changed
    missing = missing_outputs(stage, folder)
    if missing:
        return f"its {missing[0]} is gone"
    return "" if output_id(folder, hashes) == state.output_id else "its output changed"
