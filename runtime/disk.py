"""A file system that takes no writes: how a full one shows (Python's errors, torch's writers), and the message for the user."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from trainwright.runtime.errors import BundleError, DiskFull, RunError

_NUMBERS = (errno.ENOSPC, errno.EDQUOT)
# As the C library spells these errors, and as torch's writer of zip files does, which swallows the number: a file that is
# shorter than what was written to it (torch 2.13, caffe2/serialize/inline_container.cc).
_WORDS = re.compile(
    "|".join(map(re.escape, map(os.strerror, _NUMBERS))) + r"|inline_container\.cc:\d+\] \. unexpected pos \d"
)
LITTLE_BYTES = 1 << 16  # with less than this free, a failure that says nothing is a full disk's


def is_disk_full(error: BaseException) -> bool:
    """Whether a full file system, or a used-up quota, is why `error` was raised, at any depth of its causes."""
    return any(
        (isinstance(part, OSError) and part.errno in _NUMBERS) or says_disk_full(str(part)) for part in _chain(error)
    )


def says_disk_full(text: str) -> bool:
    """Whether a message or a line of a log is of a full file system."""
    return _WORDS.search(text) is not None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen:
        seen.add(id(part))
        yield part
        part = part.__cause__ or part.__context__


def free_bytes(folder: Path) -> int | None:
    """What an ordinary user may still write to the file system of `folder`, which may be missing; None where unknown."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def disk_full(folder: Path) -> DiskFull:
    """The error to raise where a write below `folder` found no room."""
    free = free_bytes(folder)
    room = "" if free is None else f" ({free:,} bytes are free there)"
    return DiskFull(
        f"{folder}: its file system, or your quota on it, is full{room}; make room, or copy that folder to a larger one"
        " and name it with --work. What is finished is kept: the same command goes on from here"
    )


@contextlib.contextmanager
def unusable_work(work: Path) -> Iterator[None]:
    """An OSError of the block as the user's error that it is: DiskFull, or BundleError with the reason."""
    try:
        yield
    except OSError as error:
        raise _unusable(work, error) from error


def _unusable(work: Path, error: OSError) -> RunError:
    if is_disk_full(error):
        return disk_full(work)
    reason = error.strerror or str(error)
    if os.path.lexists(work) and not os.path.isdir(work):  # Path.is_dir raises where a parent may not be entered
        reason = "it is not a folder"
    elif error.filename and Path(error.filename) != work:
        reason = f"{error.filename}: {reason}"
    return BundleError(f"{work}: cannot be the work folder ({reason}); make it usable, or name another with --work")
