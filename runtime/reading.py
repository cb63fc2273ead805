"""Reading what a run leaves while it may still be written, and wording it for people. Standard library only."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

END_BYTES = 65536  # of each end of a file that is too large to be hashed whole
TAIL_BYTES = 65536  # of a file's end; many times the longest row or traceback line


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is none (yet)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, in order; lines that are none (one that is being written) are left out."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def read_last_row(path: Path) -> dict[str, Any]:
    """The last whole object of a JSON Lines file; empty where there is none."""
    for line in reversed(read_tail(path)):
        try:
            value = json.loads(line)
        except ValueError:  # it is being written
            continue
        return value if isinstance(value, dict) else {}
    return {}


def read_tail(path: Path, start: int = 0) -> list[str]:
    """The file's last whole lines from byte `start` on (the very last may be unfinished); empty where there is no file."""
    try:
        with path.open("rb") as file:
            first = max(start, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(first)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return lines if first == start else lines[1:]


def is_number(value: object) -> bool:
    """Whether `value` is a figure (JSON's true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def printable(text: str) -> str:
    """`text` without what would steer a terminal: a model's sample and a user's log may hold any character."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def error_text(message: str) -> str:
    """An error as both command lines print it: further lines indented below the first, what would steer a terminal escaped."""
    lines = ("".join(char if char.isprintable() else repr(char)[1:-1] for char in line) for line in message.split("\n"))
    return "error: " + "\n       ".join(lines)


def format_duration(seconds: float) -> str:
    """For people: "0.4 s", "4 min 10 s", "3 h 5 min", "2 d 3 h"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit_s, unit, part_s, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= unit_s:
            return f"{whole // unit_s} {unit} {whole % unit_s // part_s} {part}"
    return f"{whole // 60} min {whole % 60} s"


def ends_of_files(folder: Path) -> Iterator[bytes]:
    """What tells one folder of large files from another, to be hashed: of every file, in the order of their names, name and
    size, and the first and last 64 KiB. Raises OSError."""
    for path in sorted(found for found in folder.rglob("*") if found.is_file()):
        size = path.stat().st_size
        yield f"{path.relative_to(folder).as_posix()} {size}\n".encode()
        with path.open("rb") as file:
            yield file.read(END_BYTES)
            file.seek(max(0, size - END_BYTES))
            yield file.read(END_BYTES)
