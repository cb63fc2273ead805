"""The files that data stages share: JSONL by split and source, as `ingest` writes them and later stages read them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainwright.runtime.errors import DataError
from trainwright.runtime.workspace import StageFolder

SPLITS = ("train", "validation", "test")
END_OF_TEXT = "<|endoftext|>"


def read_summary(folder: StageFolder) -> dict[str, Any]:
    """The summary of a finished stage. Raises DataError when that stage has not finished."""
    try:
        summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        name = folder.path.name
        raise DataError(f"stage {name!r} has no readable {folder.summary}; run stage {name!r} first") from error
    return summary


def document_file(output: Path, split: str, source: str) -> Path:
    """Where the documents of one split and source lie."""
    return output / split / f"{source}.jsonl"


def read_texts(path: Path) -> Iterator[str]:
    """The texts of one document file, in its order."""
    with open(path, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            text: str = json.loads(line)["text"]
            yield text
