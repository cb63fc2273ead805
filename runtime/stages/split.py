"""The split that ingest decided once and every stage keeps: `split.json`, and which split a record of any stage belongs to.

A group (one package of the standard library, one `metadata.group` of a JSONL record) is never divided between splits. Text
without a group belongs to a bucket, by a hash of its content, so that exact copies stay together wherever they turn up.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from trainwright.runtime.errors import DataError
from trainwright.runtime.workspace import write_json

SPLIT_FILE = "split.json"
BUCKETS = 65_536


@dataclass(frozen=True)
class SplitRule:
    """Shares of the text that are held out, and the split of every group that ingest has seen."""

    seed: int
    validation: float
    test: float
    groups: dict[str, str]  # group or bucket -> "train", "validation" or "test"

    @classmethod
    def read(cls, path: Path) -> "SplitRule":
        """The rule that `write` left at `path`. Raises DataError when it is missing or damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} is no readable split ({error}); run the ingest stage of its bundle again"
            ) from error

    def write(self, path: Path) -> None:
        """Write the rule as JSON: equal rules give equal bytes."""
        write_json(path, asdict(self))

    def of(self, group: str | None, content: str) -> str:
        """The split of a record: that of its group where ingest met it, else by the seeded hash of its name.

        `content` stands in for a group that is None.
        """
        name = bucket(content.encode()) if group is None else group
        if name in self.groups:
            return self.groups[name]
        place = int.from_bytes(order(name, self.seed)) / 2**128
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


def bucket(content: bytes) -> str:
    """The group of a text that names none."""
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) % BUCKETS
    return f"bucket-{number:05d}"


def order(group: str, seed: int) -> bytes:
    """A seeded hash of a group's name, 16 bytes: in its order groups are taken, by its value unknown ones are placed."""
    return hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()
