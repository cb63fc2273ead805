"""Tables of the reference folder, which tests find through the fixture `reference`."""

import csv
from pathlib import Path


def scaling_rows(reference: Path, name: str) -> list[dict[str, str]]:
    """The rows of scaling/NAME.csv by column."""
    with (reference / "scaling" / f"{name}.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))
