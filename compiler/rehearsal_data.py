"""What a rehearsal reads: the first lines of the user's own files where they are there, else what stands in for them."""

import glob
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainwright.compiler.plan import Plan, Source
from trainwright.compiler.rehearsal import Rehearsal

SAMPLE_BYTES = 2_000_000  # of each source
LEAST_BYTES = 200_000  # of text, below which a tokenizer may lack some
SAMPLE_RECORDS = 100  # of each file of conversations, pairs or questions


def choose_text(plan: Plan, data_root: Path, made: Rehearsal) -> dict[str, Any]:
    """The spec's section `data`."""
    sources = []
    for source in plan.data.sources:
        given: dict[str, Any] = {"name": source.name, "filters": source.filters}
        if plan.data.mixture == "weighted":
            given["weight"] = source.weight
        sources.append(given | _text_of(source, data_root, made))
    held_out = {"validation": plan.data.validation_fraction or None, "test": plan.data.test_fraction or None}
    return {"sources": sources, **{name: max(share, 0.05) for name, share in held_out.items() if share}}


def _text_of(source: Source, data_root: Path, made: Rehearsal) -> dict[str, str]:
    if source.connector:
        return {"connector": source.connector}
    text = _sample(_matches(source.path, data_root), SAMPLE_BYTES)
    if len(text) >= LEAST_BYTES:
        name = f"{source.name}.{'txt' if source.path.endswith('.txt') else 'jsonl'}"
        made.samples[name] = text
        made.change(f"data.sources.{source.name}", source.path, f"its first {len(text):,} bytes", "small")
        return {"path": name}
    connector = "python-stdlib:code" if source.filters == "code" else "python-stdlib:prose"
    why = "nothing is there" if not text else f"{len(text):,} bytes are too few for a tokenizer"
    made.change(f"data.sources.{source.name}", source.path, connector, why)
    return {"connector": connector}


def _matches(pattern: str, data_root: Path) -> list[Path]:
    found = (data_root / name for name in sorted(glob.glob(pattern, root_dir=data_root, recursive=True)))
    return [path for path in found if path.is_file()]


def _sample(paths: Iterable[Path], size: int, records: int = 0) -> bytes:
    """The first lines of files, up to `size` bytes and `records` lines (0: any number)."""
    lines: list[bytes] = []
    left = size
    for path in paths:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                if left < len(line) or (records and len(lines) >= records):
                    return b"".join(lines)
                lines.append(line if line.endswith(b"\n") else line + b"\n")
                left -= len(line)
    return b"".join(lines)


def choose_records(
    stage: str, kind: str, path: str, connector: str, data_root: Path, made: Rehearsal
) -> dict[str, str]:
    """A file of records: a sample of the user's, or some that are made up."""
    name, text = f"{stage}.jsonl", b""
    if path:
        text = _sample(_matches(path, data_root), SAMPLE_BYTES, SAMPLE_RECORDS)
    if text:
        records = text.count(b"\n")
        made.change(f"stages.{stage}.data", path, f"its first {records:,} records", "small")
    else:
        text = b"".join(json.dumps(_record(kind, number)).encode() + b"\n" for number in range(SAMPLE_RECORDS))
        why = "small" if connector else "nothing is there"
        made.change(f"stages.{stage}.data", path or connector, f"{SAMPLE_RECORDS} made-up records", why)
    made.samples[name] = text
    return {"data": name}


def _record(kind: str, number: int) -> dict[str, Any]:
    """A made-up record of the kind that a stage reads."""
    question, answer = f"What is {number} plus {number + 3}?", f"It is {2 * number + 3}."
    if kind == "sft":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    if kind == "dpo":
        return {"prompt": question, "chosen": answer, "rejected": f"It is {number}."}
    return {"query": question, "choices": [answer, "It is blue."], "answer": 0}
