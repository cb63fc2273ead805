"""Read conversations, preferences and questions, set aside what cannot be used, and divide the rest by the split of the data.

Records come from JSON Lines files (`record_formats` says in which forms) or from a connector. Each goes where its group is;
one without a group, by the hash of what opens it (the first question of a conversation or of a preference's prompt, the query
of a question), so that all answers to one prompt stay together, in every stage.

A held-out record whose answer nearly repeats one of an earlier split (train, then validation, then test) is dropped: the
held-out one, because an answer that is common to many records must not cost the training data all of them. An answer of fewer
than SHORT_WORDS words is compared together with its prompt: "Yes." is no leak.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Generic, TypeVar

from trainwright.runtime.errors import DataError
from trainwright.runtime.stages.connectors import JSONL_SUFFIXES, JsonLine, Rejected, find_files, read_json_lines
from trainwright.runtime.stages.record_formats import Unusable, parse_conversation, parse_preference, parse_question
from trainwright.runtime.stages.record_types import (
    ROLES,
    Conversation,
    Found,
    Message,
    Preference,
    Question,
    Records,
)
from trainwright.runtime.stages.repeats import find_repeated, normalise
from trainwright.runtime.stages.split import SplitRule
from trainwright.runtime.stages.stdlib_pairs import read_conversations, read_preferences, read_questions

__all__ = [
    "ROLES",
    "Conversation",
    "Message",
    "Preference",
    "Question",
    "Records",
    "load_conversations",
    "load_preferences",
    "load_questions",
]

SHORT_WORDS = 8
MOST_REASONS = 20  # that are counted by themselves
REPEATED = "nearly repeats the answer of a record in an earlier split"

T = TypeVar("T", Conversation, Preference, Question)


@dataclass(frozen=True)
class _Kind(Generic[T]):
    """How one kind of record is read and looked at."""

    name: str  # in the plural
    form: str  # what a line looks like
    parse: Callable[[JsonLine], T]
    connectors: Mapping[str, Callable[[SplitRule], Iterator[Found[T] | Rejected]]]
    opening: Callable[[T], str]
    answer: Callable[[T], str]


def _first_question(messages: Sequence[Message]) -> str:
    return next(message.content for message in messages if message.role == "user")


def _answers(record: Conversation) -> str:
    return "\n".join(message.content for message in record.messages if message.role == "assistant")


_CONVERSATIONS = _Kind(
    name="conversations",
    form='{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    parse=parse_conversation,
    connectors={"python-stdlib:questions": read_conversations},
    opening=lambda record: _first_question(record.messages),
    answer=_answers,
)
_PREFERENCES = _Kind(
    name="preferences",
    form='{"prompt": "...", "chosen": "...", "rejected": "..."}',
    parse=parse_preference,
    connectors={"python-stdlib:preferences": read_preferences},
    opening=lambda record: _first_question(record.prompt),
    answer=lambda record: record.chosen,
)
_QUESTIONS = _Kind(
    name="questions",
    form='{"query": "...", "choices": ["...", "..."], "answer": 0}',
    parse=parse_question,
    connectors={"python-stdlib:choices": read_questions},
    opening=lambda record: record.prompt,
    answer=lambda record: record.choices[record.answer],
)


def load_conversations(
    *, path: str = "", connector: str = "", data_root: Path, rule: SplitRule, set_aside: Path
) -> Records[Conversation]:
    """The conversations of the files that `path` names (a glob, relative to `data_root`), or of `connector`.

    What is set aside or dropped is written to `set_aside`: file, line, reason, and how the line begins. Raises DataError
    where no file matches, nothing is usable, or there is no such connector.
    """
    return _load(_CONVERSATIONS, path, connector, data_root, rule, set_aside)


def load_preferences(
    *, path: str = "", connector: str = "", data_root: Path, rule: SplitRule, set_aside: Path
) -> Records[Preference]:
    """As `load_conversations`."""
    return _load(_PREFERENCES, path, connector, data_root, rule, set_aside)


def load_questions(
    *, path: str = "", connector: str = "", data_root: Path, rule: SplitRule, set_aside: Path
) -> Records[Question]:
    """As `load_conversations`."""
    return _load(_QUESTIONS, path, connector, data_root, rule, set_aside)


def _load(kind: _Kind[T], path: str, connector: str, data_root: Path, rule: SplitRule, set_aside: Path) -> Records[T]:
    items = _open_source(kind, path, connector, data_root, rule)
    set_aside.parent.mkdir(parents=True, exist_ok=True)
    aside: Counter[str] = Counter()
    found: dict[str, list[Found[T]]] = {"train": [], "validation": [], "test": []}
    with set_aside.open("w", encoding="utf-8") as file:
        for item in items:
            if isinstance(item, Rejected):
                aside[item.reason] += 1
                _write(item, file)
            else:
                found[rule.of(item.record.group, kind.opening(item.record))].append(item)
        aside = _most_common(aside)
        read = sum(len(part) for part in found.values())
        if not read:
            where = f"{path!r} in {data_root}" if path else f"connector {connector}"
            raise DataError(
                f"no usable {kind.name} in {where}: {_listed(aside)}; {set_aside} shows them. A line is {kind.form}"
            )
        dropped = _drop_repeated(kind, found, file)
    kept = {split: [item.record for item in part] for split, part in found.items()}
    counts = {"in": read + aside.total(), "kept": read - dropped}
    counts |= {f"set aside: {reason}": number for reason, number in sorted(aside.items())}
    if dropped:
        counts[f"dropped: {REPEATED}"] = dropped
    return Records(**kept, counts=counts)


def _open_source(
    kind: _Kind[T], path: str, connector: str, data_root: Path, rule: SplitRule
) -> Iterator[Found[T] | Rejected]:
    if path:
        return (item for file in find_files(path, data_root) for item in _read_file(kind, file, data_root))
    if connector not in kind.connectors:
        raise DataError(f"no connector {connector!r} for {kind.name}; there is {', '.join(kind.connectors)}")
    return kind.connectors[connector](rule)


def _read_file(kind: _Kind[T], path: Path, root: Path) -> Iterator[Found[T] | Rejected]:
    if not path.name.endswith(JSONL_SUFFIXES):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
        yield Rejected(name, 0, f"its name does not end in {', '.join(JSONL_SUFFIXES)}", "")
        return
    for line in read_json_lines(path, root):
        if isinstance(line, Rejected):
            yield line
            continue
        try:
            yield Found(kind.parse(line), line.file, line.line)
        except Unusable as error:
            yield line.reject(str(error))


def _drop_repeated(kind: _Kind[T], found: dict[str, list[Found[T]]], file: IO[str]) -> int:
    """Take what repeats an earlier split out of `found`; how many."""
    dropped = 0
    earlier = [_compared(kind, item.record) for item in found["train"]]
    for split in ("validation", "test"):
        texts = [_compared(kind, item.record) for item in found[split]]
        repeated = find_repeated(texts, earlier)
        for place in sorted(repeated):
            item = found[split][place]
            _write(Rejected(item.file, item.line, REPEATED, texts[place][:200]), file)
        found[split] = [item for place, item in enumerate(found[split]) if place not in repeated]
        earlier += [text for place, text in enumerate(texts) if place not in repeated]
        dropped += len(repeated)
    return dropped


def _compared(kind: _Kind[T], record: T) -> str:
    answer = kind.answer(record)
    short = normalise(answer).count(" ") + 1 < SHORT_WORDS
    return f"{kind.opening(record)}\n{answer}" if short else answer


def _write(rejected: Rejected, file: IO[str]) -> None:
    file.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")


def _most_common(aside: Counter[str]) -> Counter[str]:
    """A reason may quote what it found: of many, the rarest are one."""
    common = aside.most_common()
    rest = sum(number for _, number in common[MOST_REASONS:])
    return Counter(dict(common[:MOST_REASONS])) + Counter({"for other reasons": rest})


def _listed(aside: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in sorted(aside.items())) or "only blank lines"
