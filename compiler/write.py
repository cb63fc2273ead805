"""A Bundle onto disk: new files beside the old ones first, then moved in one by one, the manifest last.

A run's `work/` stays. Programs that the old bundle had and the new one lacks are removed. What a person edited is never
overwritten, as far as a manifest shows the edit; a compile that was killed midway is finished by the next one.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from trainwright.compiler.emit import EXECUTABLE, Bundle
from trainwright.compiler.errors import FileError
from trainwright.runtime.manifest import MANIFEST_FILE, file_hash

_FRESH = ".new-"  # the folder, inside the bundle's, that a compile writes its files to first
_PROGRAM = re.compile(r"\d{2,}_[a-z][a-z0-9_-]*\.py")
_EMITTED = b"from trainwright.runtime.stages import"  # stands in every program
_WORK = "work"


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write the bundle to `folder`, which is new, empty, or holds a bundle, whole or not.

    Raises FileError before anything is changed.
    """
    try:
        old, left = _old_names(folder, bundle), _leftovers(folder)
        edited = _edited(folder, bundle, left)
    except OSError as error:
        raise FileError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if edited:
        names = ", ".join(str(folder / name) for name in edited)
        raise FileError(
            f"{names}: edited by hand since it was compiled; move it away, or compile to another folder (-o), to keep the edits"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_files(bundle, folder, old - bundle.files.keys())
        for leftover in left:
            shutil.rmtree(leftover)
    except OSError as error:
        raise FileError(f"{folder}: the bundle cannot be written: {error.strerror or error}") from error


def _replace_files(bundle: Bundle, folder: Path, gone: Set[str]) -> None:
    # Within the folder, so that each move stays on one file system and is atomic.
    fresh = Path(tempfile.mkdtemp(prefix=_FRESH, dir=folder))
    try:
        for name, content in bundle.files.items():
            (fresh / name).write_bytes(content)
            if name in EXECUTABLE:
                (fresh / name).chmod((fresh / name).stat().st_mode | 0o111)
        for name in sorted(bundle.files.keys() - {MANIFEST_FILE}):
            os.replace(fresh / name, folder / name)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        # Until here a kill leaves this manifest in `fresh`, where the next compile finds which programs are its own.
        os.replace(fresh / MANIFEST_FILE, folder / MANIFEST_FILE)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _leftovers(folder: Path) -> list[Path]:
    """What compiles that were killed have left in `folder`."""
    return [path for path in sorted(folder.glob(f"{_FRESH}*")) if path.is_dir() and not path.is_symlink()]


def _old_names(folder: Path, bundle: Bundle) -> Set[str]:
    """The files of the bundle that `folder` holds; none when it is new or empty. Raises FileError for anything else."""
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise FileError(f"{folder}: a file stands where the bundle should go; name another folder with -o")
    left = _leftovers(folder)
    listed = _hashes(folder / MANIFEST_FILE)
    if listed is not None:
        moved_in = (item for leftover in left for item in (_hashes(leftover / MANIFEST_FILE) or {}).items())
        return {*listed, *(name for name, digest in moved_in if _hash(folder / name) == digest)}
    # No manifest, or a damaged one: a first compile was killed, say. Nothing but a bundle's files may be there.
    held = {path.name for path in folder.iterdir()} - {path.name for path in left}
    foreign = sorted(name for name in held if not _belongs(folder / name, bundle))
    if not held or (not foreign and (left or any(name == MANIFEST_FILE or _PROGRAM.fullmatch(name) for name in held))):
        return held - {_WORK}
    what = f": {', '.join(foreign)}" if foreign else ""
    raise FileError(
        f"{folder}: not empty, and no bundle (no readable {MANIFEST_FILE}{what}); name another folder with -o, or empty it"
    )


def _belongs(path: Path, bundle: Bundle) -> bool:
    """Whether a bundle may hold this."""
    if path.name == _WORK:
        return path.is_dir()
    if not path.is_file():
        return False
    if _PROGRAM.fullmatch(path.name):
        return _EMITTED in path.read_bytes()
    return path.name in bundle.files


def _edited(folder: Path, bundle: Bundle, left: list[Path]) -> list[str]:
    """Files that are neither what the manifest says, nor what a killed compile has put there, nor what is to be written."""
    known = [_hashes(place / MANIFEST_FILE) or {} for place in (folder, *left)]
    return [
        name
        for name in known[0]
        if (held := _hash(folder / name))
        and held not in (bundle.manifest.files.get(name), *(hashes.get(name) for hashes in known))
    ]


def _hashes(manifest: Path) -> Mapping[str, str] | None:
    """Hashes by file name, by a manifest of any version; None where it cannot be read as one."""
    try:
        files: Any = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        # A name with a separator would reach outside the folder.
        if all(isinstance(digest, str) and Path(name).name == name for name, digest in files.items()):
            return dict(files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None


def _hash(path: Path) -> str:
    """Of a file's content; "" where there is none."""
    return file_hash(path.read_bytes()) if path.is_file() else ""
