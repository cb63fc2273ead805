"""What earlier attempts of a stage left: moved out of the program's way, and deleted when it is old.

`previous-<n>/` in the stage's folder holds what attempt n left. The newest `KEEP` stay.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from trainwright.runtime.disk import unusable_work
from trainwright.runtime.workspace import StageFolder

PREFIX = "previous-"
KEEP = 2


def set_aside(folder: StageFolder, attempt: int, *, all_of_it: bool) -> Path | None:
    """Move what earlier attempts left to `previous-<attempt>/`: the output, or all but the logs. That folder, or None where
    there was nothing. Raises BundleError or DiskFull where it cannot be moved.

    A program resumes what it finds. It must not find the work on other inputs, nor may that be lost.
    """
    with unusable_work(folder.path):
        if not folder.path.is_dir():
            return None
        names = sorted(path.name for path in folder.path.iterdir())
        stays = [folder.log.name] if all_of_it else [name for name in names if name != folder.output.name]
        found = [name for name in names if name not in stays and not name.startswith(PREFIX)]
        if not found:
            return None
        number = attempt
        # Attempts are counted anew where state.json was deleted.
        while (target := folder.path / f"{PREFIX}{number}").exists():
            number += 1
        target.mkdir()
        for name in found:
            (folder.path / name).rename(target / name)
    return target


def delete_old(folder: StageFolder, in_use: Iterable[Path]) -> list[Path]:
    """Delete all but the newest `KEEP` of the stage's `previous-<n>/`, and return those that were there.

    Call it when the stage is done anew. One that `in_use` leads into (paths that stages of this bundle read) stays.
    """
    used = [Path(os.path.realpath(path)) for path in in_use]
    found = [path for path in folder.path.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    found.sort(key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)
    old = [
        path for path in found[KEEP:] if not any(Path(os.path.realpath(path)) in (use, *use.parents) for use in used)
    ]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return old
