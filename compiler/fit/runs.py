"""A CSV of training runs, read and checked: every problem in one message, each as `file:line: column: what; fix`.

Columns: params, tokens, loss; flops, learning_rate and batch may be there. Commas, semicolons or tabs part them. Of runs with
one size and one number of tokens that differ in learning rate or batch, the one with the lowest loss counts: a law is about
tuned runs.
"""

import csv
import difflib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainwright.compiler.errors import FileError, RunsError
from trainwright.compiler.fit.approach3 import Floats
from trainwright.compiler.units import UnitError, format_count, parse_quantity

FEWEST_RUNS = 8  # three more than the law has constants
MOST_PROBLEMS = 10  # that one message lists
FLOPS_FACTOR = 3.0  # that stated FLOPs may be off 6 N D: attention, embeddings and padding make 0.7 to 1.8


@dataclass(frozen=True)
class _Column:
    kinds: tuple[str, ...]  # of units; none: a plain number
    low: float
    high: float
    hint: str  # what a value outside may be

    @property
    def bare(self) -> str:
        return self.kinds[-1] if self.kinds else ""


# In any unit of loss a model that guesses scores log2 of its vocabulary at most: 18 bits a token for 262,144 entries.
COLUMNS = {
    "params": _Column(("parameters",), 1e3, 1e16, "write parameters, as 70000000 or 70M"),
    "tokens": _Column(("tokens",), 1e3, 1e18, "write tokens, as 1400000000 or 1.4B"),
    "loss": _Column(
        (), 1e-3, 18.0, "guessing scores ln(vocabulary), at most 12.5 nats; of a perplexity take the logarithm"
    ),
    "flops": _Column(("flops",), 1e3, 1e40, "write the FLOPs of the whole run, as 6e20"),
    "learning_rate": _Column((), 1e-12, 1e3, "write the peak learning rate"),
    "batch": _Column(("tokens", "sequences"), 1.0, 1e12, "write the sequences or tokens of a step"),
}
REQUIRED = ("params", "tokens", "loss")
SETTINGS = ("learning_rate", "batch")


@dataclass(frozen=True)
class Runs:
    """What the fits read, shape (n,) each. `flops` is 6 N D where the file states none."""

    file: str
    params: Floats
    tokens: Floats
    loss: Floats
    flops: Floats
    lines: tuple[int, ...]  # where each stands
    notes: tuple[str, ...]  # what was left out

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def model_flops(self) -> Floats:
        """6 N D: what a law's C counts, whatever the file states."""
        return 6 * self.params * self.tokens


@dataclass(frozen=True)
class _Row:
    line: int
    values: dict[str, float]

    @property
    def run(self) -> tuple[float, float]:
        return self.values["params"], self.values["tokens"]

    @property
    def settings(self) -> tuple[float | None, ...]:
        return tuple(self.values.get(name) for name in SETTINGS)


def read_runs(path: Path, fewest: int = FEWEST_RUNS) -> Runs:
    """The runs of a file. Raises FileError (it cannot be read), RunsError (it holds no usable runs)."""
    lines = _lines(path)
    header, names, notes = _header(path, lines[0])
    rows: list[_Row] = []
    problems: list[str] = []
    for line, cells in _records(path, lines, header):
        if len(cells) != len(names):
            problems.append(
                f"{path}:{line}: {len(cells)} fields, and the first line names {len(names)}; a number takes no comma inside"
            )
            continue
        values, wrong = _values(dict(zip(names, cells, strict=True)))
        problems += [f"{path}:{line}: {text}" for text in wrong]
        if not wrong:
            rows.append(_Row(line, values))
    rows, repeated, left_out = _tuned(path, rows)
    problems += repeated
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise RunsError("\n".join(problems[:MOST_PROBLEMS] + more))
    if len(rows) < fewest:
        raise RunsError(
            f"{path}: {format_count(len(rows), 'different run')}; a law of five constants takes {fewest} at least: "
            f"`trainwright fit {path} --suggest FLOPS` says which to add"
        )
    params, tokens, loss = (np.array([row.values[name] for row in rows]) for name in REQUIRED)
    flops = np.array([row.values.get("flops", math.nan) for row in rows])
    return Runs(
        file=str(path),
        params=params,
        tokens=tokens,
        loss=loss,
        flops=np.where(np.isnan(flops), 6 * params * tokens, flops),
        lines=tuple(row.line for row in rows),
        notes=(*notes, *left_out),
    )


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunsError(f"{path}: no text in UTF-8 (byte {error.start}); export the table as CSV, UTF-8") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    lines = text.splitlines(keepends=True)
    if not text.strip() or not lines[0].strip():
        raise RunsError(f"{path}:1: no first line with the names of the columns; write {','.join(REQUIRED)}")
    return lines


def _header(path: Path, line: str) -> tuple[str, list[str], list[str]]:
    """(what parts the fields, the columns' names, notes on columns that are not read)."""
    separator = max(",;\t", key=line.count)
    names = [name.strip().strip('"').strip().lower() for name in line.strip("\r\n").split(separator)]
    problems = [
        f"column {name!r}: stands {count} times; keep one"
        for name, count in Counter(names).items()
        if count > 1 and name
    ]
    unread = [name for name in names if name not in COLUMNS]
    missing = [name for name in REQUIRED if name not in names]
    for name in unread:
        near = difflib.get_close_matches(name, [column for column in COLUMNS if column not in names], n=1, cutoff=0.75)
        if near:
            problems.append(f"column {name!r}: unknown; did you mean {near[0]}?")
            missing = [column for column in missing if column != near[0]]
    if missing:
        found = ", ".join(name or "an empty one" for name in names)
        problems.insert(0, f"no column {' and no column '.join(missing)}; the first line names {found[:200]}")
    if problems:
        raise RunsError("\n".join(f"{path}:1: {problem}" for problem in problems))
    notes = [f"columns not read: {', '.join(name or '(unnamed)' for name in unread)}"] if unread else []
    return separator, names, notes


def _records(path: Path, lines: list[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of each line after the first that is not empty."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        next(reader)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise RunsError(f"{path}:{reader.line_num}: not CSV: {error}; quotes come in pairs, a line a run") from error


def _values(cells: dict[str, str]) -> tuple[dict[str, float], list[str]]:
    """(numbers by column, what is wrong with the others)."""
    values: dict[str, float] = {}
    wrong: list[str] = []
    for name, column in COLUMNS.items():
        text = cells.get(name, "")
        if not text:
            if name in REQUIRED:
                wrong.append(f"{name}: is empty; write a number, or remove the line")
            continue
        number = _number(text, column)
        if number is None:
            wrong.append(f"{name}: {text[:40]!r} is no number; {_spelling(text, column)}")
        elif not math.isfinite(number) or number <= 0:
            wrong.append(f"{name}: {text[:40]} is not above 0 and finite; remove the line, or write what was measured")
        elif not column.low <= number <= column.high:
            wrong.append(f"{name}: {text[:40]} is outside {column.low:g} to {column.high:g}; {column.hint}")
        else:
            values[name] = number
    if "flops" in values and not wrong:
        expected = 6 * values["params"] * values["tokens"]
        share = values["flops"] / expected
        if not 1 / FLOPS_FACTOR <= share <= FLOPS_FACTOR:
            wrong.append(
                f"flops: {values['flops']:.4g} is {share:.3g} x 6 N D = 6 x {values['params']:.4g} x {values['tokens']:.4g}"
                f" = {expected:.4g}, and no way of counting differs by {FLOPS_FACTOR:g}; correct one of the three"
            )
    return values, wrong


def _number(text: str, column: _Column) -> float | None:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parse_quantity(text, column.kinds, column.bare).amount if column.kinds else None
    except UnitError:
        return None


def _spelling(text: str, column: _Column) -> str:
    if "," in text:
        return "write a decimal point, and no separators of thousands"
    return column.hint if column.kinds else "write it in digits, as 2.97"


def _tuned(path: Path, rows: list[_Row]) -> tuple[list[_Row], list[str], list[str]]:
    """(the best row of each run, problems with runs that stand twice, notes)."""
    groups: dict[tuple[float, float], list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.run, []).append(row)
    problems = []
    for (params, tokens), group in groups.items():
        counts = Counter(row.settings for row in group)
        settings, count = counts.most_common(1)[0]
        if count > 1:
            first, *others = (row.line for row in group if row.settings == settings)
            same = "params, tokens" + "".join(
                f", {name}" for name, value in zip(SETTINGS, settings, strict=True) if value
            )
            problems.append(
                f"{path}:{others[0]}: the same run as line {first} ({same}: {params:.6g}, {tokens:.6g}"
                f"{f', {count} times in all' if count > 2 else ''}); keep one line: of several seeds, the mean of their losses"
            )
    best = [min(group, key=lambda row: row.values["loss"]) for group in groups.values()]
    notes = []
    if len(best) < len(rows):
        notes.append(
            f"{len(rows)} lines are {len(best)} runs with several learning rates or batches: the lowest loss of each counts"
        )
    return best, problems, notes
