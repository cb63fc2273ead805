"""Read the sources, divide them once into train, validation and test, and write one JSONL file a split and source.

`work/<stage>/output/{train,validation,test}/<source>.jsonl` holds `{"text", "id", "metadata": {"source", "group",
"path", ...}}`; `set_aside.jsonl` holds what could not be read, with file, line and reason. kept + set aside = in.
`split.json` holds the split of every group, for stages that read other records.

The split. Documents that belong together (one package of the standard library, one `metadata.group` of a JSONL record)
must not be divided, or a later stage meets its held-out text in training. Such groups differ in size by a factor of
1,000, so a threshold on a hash of their names would miss the shares widely. Instead the groups of each source are
taken in the order of a seeded hash, and each goes to the split that still has room for it. A document without a group
joins one of 65,536 buckets by the hash of its text: in a small corpus that is a group of its own; in a large one the
buckets are so small that the result is that of a hash threshold. So exact copies stay together, and the table of
groups stays small however large the corpus is.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages import stage_verb
from trainwright.runtime.stages.connectors import (
    CONNECTORS,
    Document,
    Rejected,
    find_files,
    read_file,
    read_stdlib_file,
    stdlib_files,
)
from trainwright.runtime.stages.corpus import SPLITS, document_file
from trainwright.runtime.stages.split import SPLIT_FILE, SplitRule, bucket, order
from trainwright.runtime.workspace import Progress, StageFolder, open_workspace, write_json


@dataclass(frozen=True)
class Source:
    """One source: files by a glob (relative to the data root), or a connector, exactly one of the two."""

    name: str
    path: str | None = None
    connector: str | None = None


@dataclass(frozen=True)
class Split:
    """Shares of each source's UTF-8 bytes that are held out; the rest is for training."""

    validation: float
    test: float
    seed: int


@dataclass
class Tally:
    """What was counted while reading: UTF-8 bytes by source and group, and rejected documents by reason."""

    group_bytes: dict[str, Counter[str]] = field(default_factory=dict)
    set_aside: Counter[str] = field(default_factory=Counter)


@stage_verb
def run(*, stage: str, sources: Sequence[Source], split: Split) -> None:
    """Ingest `sources` into `work/<stage>/output`.

    Raises DataError when a source matches no file, or nothing in it could be kept.
    """
    workspace = open_workspace()
    folder = workspace.stage(stage)
    spool = folder.path / "spool"
    for path in (folder.output, spool):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    readers = {source.name: _open_source(source, workspace.data_root) for source in sources}

    tally = Tally()
    progress = Progress(folder, sum(len(parts) for parts in readers.values()), "files")
    done = 0
    with open(folder.output / "set_aside.jsonl", "w", encoding="utf-8") as aside:
        for source in sources:
            with open(spool / f"{source.name}.jsonl", "w", encoding="utf-8") as kept:
                for part in readers[source.name]:
                    _read(source.name, part, kept, aside, tally)
                    done += 1
                    progress.update(done)
            if not tally.group_bytes.get(source.name):
                where = f"{source.path!r} in {workspace.data_root}" if source.path else source.connector
                raise DataError(
                    f"source {source.name!r} holds no usable document ({where}): {_reasons(tally.set_aside)}; "
                    f"{folder.output / 'set_aside.jsonl'} shows them"
                )
    assignment = assign(tally.group_bytes, split)
    summary = _distribute(folder, spool, [source.name for source in sources], assignment)
    shutil.rmtree(spool)
    SplitRule(split.seed, split.validation, split.test, assignment).write(folder.output / SPLIT_FILE)
    summary["set_aside"] = dict(tally.set_aside)
    _report(summary)
    write_json(folder.summary, summary)


def _open_source(source: Source, root: Path) -> list[Iterator[Document | Rejected]]:
    """One lazy reader a file."""
    if source.path is not None:
        return [read_file(path, root) for path in find_files(source.path, root)]
    if source.connector not in CONNECTORS:
        raise DataError(f"source {source.name!r}: no connector {source.connector!r}; there are {', '.join(CONNECTORS)}")
    kind = source.connector.split(":")[1]
    return [read_stdlib_file(path, name, kind) for path, name in stdlib_files()]


def _read(source: str, part: Iterator[Document | Rejected], kept: IO[str], aside: IO[str], tally: Tally) -> None:
    """Append one file's documents to `kept` (a JSON string of the group, a tab, the record) and the rest to `aside`."""
    group_bytes = tally.group_bytes.setdefault(source, Counter())
    for item in part:
        if isinstance(item, Rejected):
            tally.set_aside[item.reason] += 1
            aside.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
            continue
        content = item.text.encode()
        group = item.group if item.group is not None else bucket(content)
        group_bytes[group] += len(content)
        metadata = {**item.metadata, "source": source, "group": group, "path": item.path}
        record = json.dumps({"text": item.text, "id": item.id, "metadata": metadata}, ensure_ascii=False)
        kept.write(f"{json.dumps(group)}\t{len(content)}\t{record}\n")


def assign(group_bytes: dict[str, Counter[str]], split: Split) -> dict[str, str]:
    """The split of every group. `group_bytes`: source -> group -> UTF-8 bytes.

    Source by source, so that a small source has held-out text as well; a group that several sources share keeps the
    split that the first gave it. Within a source, groups in the order of their seeded hash: into test, else
    validation, while the group fits into what is left of that share, else train.
    """
    assignment: dict[str, str] = {}
    for groups in group_bytes.values():
        room = {"test": split.test * groups.total(), "validation": split.validation * groups.total()}
        for group in groups.keys() & assignment.keys():
            if assignment[group] in room:
                room[assignment[group]] -= groups[group]
        for group in sorted(groups.keys() - assignment.keys(), key=lambda name: order(name, split.seed)):
            assignment[group] = next((name for name in room if groups[group] <= room[name]), "train")
            if assignment[group] in room:
                room[assignment[group]] -= groups[group]
    for name, share in (("test", split.test), ("validation", split.validation)):
        if share > 0:
            _fill_empty(name, assignment, group_bytes, split.seed)
    return assignment


def _fill_empty(name: str, assignment: dict[str, str], group_bytes: dict[str, Counter[str]], seed: int) -> None:
    """Where a source has nothing in split `name` (no group fits its share), move a group there: its smallest in training.

    A group moves only if every source that has it keeps another in the split that it leaves. Where training has none to
    spare, another held-out split gives one.
    """

    def can_leave(group: str) -> bool:
        holders = [groups for groups in group_bytes.values() if group in groups]
        return all(sum(assignment[other] == assignment[group] for other in groups) > 1 for groups in holders)

    for groups in group_bytes.values():
        if any(assignment[group] == name for group in groups):
            continue
        by_size = sorted(groups, key=lambda group: (assignment[group] != "train", groups[group], order(group, seed)))
        smallest = next(filter(can_leave, by_size), None)
        if smallest is not None:
            assignment[smallest] = name


def _distribute(folder: StageFolder, spool: Path, sources: Sequence[str], assignment: dict[str, str]) -> dict[str, Any]:
    """Write each spooled record to the file of its split; the counts by split and source."""
    documents = {split: dict.fromkeys(sources, 0) for split in SPLITS}
    size = {split: dict.fromkeys(sources, 0) for split in SPLITS}
    for split in SPLITS:
        (folder.output / split).mkdir()
    for source in sources:
        with ExitStack() as stack:
            files = {
                split: stack.enter_context(open(document_file(folder.output, split, source), "w", encoding="utf-8"))
                for split in SPLITS
            }
            for line in stack.enter_context(open(spool / f"{source}.jsonl", encoding="utf-8", newline="\n")):
                group, num_bytes, record = line.split("\t", 2)
                split = assignment[json.loads(group)]
                files[split].write(record)
                documents[split][source] += 1
                size[split][source] += int(num_bytes)
        (spool / f"{source}.jsonl").unlink()  # a corpus need not lie on the disk twice
    return {"documents": documents, "bytes": size}


def _report(summary: dict[str, Any]) -> None:
    """Add the key figure to `summary` and print the counts."""
    documents, size = summary["documents"], summary["bytes"]
    for split in SPLITS:
        for source, count in documents[split].items():
            print(f"{split:<10} {source}: {count:,} documents, {size[split][source]:,} bytes")
            if not count:
                print(f"warning: source {source!r} has nothing in {split}: it has too few groups to hold some out")
    num_kept = sum(sum(counts.values()) for counts in documents.values())
    num_aside = sum(summary["set_aside"].values())
    megabytes = sum(sum(counts.values()) for counts in size.values()) / 1e6
    print(f"in {num_kept + num_aside:,} documents = kept {num_kept:,} + set aside {num_aside:,}")
    if num_aside:
        print(f"warning: set aside {_reasons(summary['set_aside'])}; see set_aside.jsonl")
    summary["kept"], summary["in"] = num_kept, num_kept + num_aside
    summary["key_figure"] = f"{num_kept:,} documents, {megabytes:.1f} MB, {num_aside:,} set aside"


def _reasons(set_aside: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(set_aside.items())) or "none found"
