"""What a rehearsal is: a small spec, the files that it reads, and what it does not keep of what was planned."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from trainwright.compiler.errors import FileError

SPEC_FILE = "rehearsal.yaml"


@dataclass(frozen=True)
class Change:
    """Something that a rehearsal does not keep."""

    what: str
    planned: object
    rehearsed: object
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.planned} -> {self.rehearsed} ({self.why})"


@dataclass
class Rehearsal:
    """`spec` as a user would write it; its relative paths start from the folder of the rehearsal, where `samples` are to lie."""

    spec: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, bytes] = field(default_factory=dict)  # by file name
    changes: list[Change] = field(default_factory=list)

    @property
    def processes(self) -> int:
        return int(self.spec["compute"]["devices_per_node"])

    def change(self, what: str, planned: object, rehearsed: object, why: str) -> None:
        """Say so, if it is one."""
        if planned != rehearsed:
            self.changes.append(Change(what, planned, rehearsed, why))


def write_rehearsal(made: Rehearsal, folder: Path) -> Path:
    """Write the spec and the samples into `folder`; the spec's path. Raises FileError where the folder holds something else."""
    spec = folder / SPEC_FILE
    try:
        if folder.exists() and not spec.exists() and any(folder.iterdir()):
            raise FileError(f"{folder}: not empty, and no rehearsal: name another folder with -o")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in made.samples.items():
            (folder / name).write_bytes(content)
        with spec.open("w", encoding="utf-8") as file:
            YAML().dump(made.spec, file)
    except OSError as error:
        raise FileError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error
    return spec
