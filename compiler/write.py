"""A Bundle onto disk: new files beside the old ones first, then moved in one by one, the manifest last.

A run's `work/` stays. Programs that the old bundle had and the new one lacks are removed, by the old manifest. What a person
edited is never overwritten.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from trainwright.compiler.emit import EXECUTABLE, Bundle
from trainwright.compiler.errors import FileError
from trainwright.runtime.manifest import MANIFEST_FILE, file_hash


def write_bundle(bundle: Bundle, folder: Path) -> None:
    """Write the bundle to `folder`, which is new, empty, or holds a bundle. Raises FileError before anything is changed."""
    old = _old_files(folder)
    edited = [
        name
        for name, digest in old.items()
        if (held := _hash(folder / name)) not in ("", digest) and held != bundle.manifest.files.get(name)
    ]
    if edited:
        names = ", ".join(str(folder / name) for name in edited)
        raise FileError(
            f"{names}: edited by hand since it was compiled; move it away, or compile to another folder (-o), to keep the edits"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_files(bundle, folder)
        for name in old.keys() - bundle.files.keys():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: the bundle cannot be written: {error.strerror or error}") from error


def _replace_files(bundle: Bundle, folder: Path) -> None:
    # Within the folder, so that each move stays on one file system and is atomic.
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        for name, content in bundle.files.items():
            (fresh / name).write_bytes(content)
            if name in EXECUTABLE:
                (fresh / name).chmod((fresh / name).stat().st_mode | 0o111)
        for name in sorted(bundle.files, key=lambda name: (name == MANIFEST_FILE, name)):
            os.replace(fresh / name, folder / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _old_files(folder: Path) -> Mapping[str, str]:
    """Hashes by name of the bundle that `folder` holds; none when it is new or empty. Raises FileError for anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return {}
    if not folder.is_dir():
        raise FileError(f"{folder}: a file stands where the bundle should go; name another folder with -o")
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        # A name with a separator would reach outside the folder.
        if all(isinstance(digest, str) and Path(name).name == name for name, digest in files.items()):
            return dict(files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise FileError(
        f"{folder}: not empty, and no bundle (no readable {MANIFEST_FILE}); name another folder with -o, or empty it"
    )


def _hash(path: Path) -> str:
    """Of a file's content; "" where there is none."""
    return file_hash(path.read_bytes()) if path.is_file() else ""
