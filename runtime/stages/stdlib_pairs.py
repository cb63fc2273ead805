"""Questions and answers from the docstrings of the running interpreter's library: the connectors `python-stdlib:questions`,
`:preferences` and `:choices`.

The question names a function, method or class, its arguments and its module; the first sentence of its docstring is the
answer (`stdlib_items`). The group is that of the module, so that a model pretrained on the connectors for text has not read
the held-out items.

Whatever is chosen (wording, wrong answers, their order) depends on hashes of the items' names alone: equal libraries and
splits give equal records.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from trainwright.runtime.stages.connectors import Rejected
from trainwright.runtime.stages.record_types import Conversation, Found, Message, Preference, Question
from trainwright.runtime.stages.repeats import normalise
from trainwright.runtime.stages.split import SplitRule
from trainwright.runtime.stages.stdlib_items import Item, read_items

QUESTIONS = (
    "What does the {kind} `{call}` of the module `{module}` do?",
    "What is the {kind} `{call}` in `{module}` for?",
    "Describe the {kind} `{call}` of Python's module `{module}` in one sentence.",
)
FOLLOWED_UP = 8  # one in so many conversations has a second question, whose answer stands in the first
NUM_CHOICES = 4
LIKE_LENGTH = 24  # neighbours in the order of length
ALIKE = 0.5  # Jaccard similarity of the words from which on another summary may be right as well
KINDS = ("other", "other", "truncated", "shuffled")

T = TypeVar("T", Preference, Question)


def read_conversations(rule: SplitRule) -> Iterator[Found[Conversation] | Rejected]:
    """The user asks what an item does, the assistant answers with its summary; at times a second question follows."""
    items, rejected = read_items(rule)
    yield from rejected
    for item in (item for part in items.values() for item in part):
        messages = (Message("user", _question(item)), Message("assistant", item.summary), *_follow_up(item))
        yield Found(Conversation(messages, item.name, item.group), item.file, item.line)


def read_preferences(rule: SplitRule) -> Iterator[Found[Preference] | Rejected]:
    """Chosen: the summary. Rejected: half of the time another item's of like length, else the summary cut short or its words
    in another order; the kind is fixed by the item."""

    def make(item: Item, others: Sequence[str]) -> Preference | None:
        kind = KINDS[_number(item, "kind") % len(KINDS)]
        spoilt = {"truncated": _truncate, "shuffled": _shuffle}
        rejected = spoilt[kind](item) if kind in spoilt else next(iter(others), None)
        if rejected is None:
            return None
        prompt = (Message("user", _question(item)),)
        return Preference(prompt, item.summary, rejected, kind, item.name, item.group)

    yield from _with_others(rule, 1, make)


def read_questions(rule: SplitRule) -> Iterator[Found[Question] | Rejected]:
    """Which of four summaries is the item's? The wrong ones are other items', of like length."""

    def make(item: Item, others: Sequence[str]) -> Question | None:
        if len(others) < NUM_CHOICES - 1:
            return None
        answer = _number(item, "place") % NUM_CHOICES
        choices = (*others[:answer], item.summary, *others[answer:])
        return Question(_question(item), choices, answer, item.name, item.group)

    yield from _with_others(rule, NUM_CHOICES - 1, make)


def _with_others(
    rule: SplitRule, count: int, make: Callable[[Item, Sequence[str]], T | None]
) -> Iterator[Found[T] | Rejected]:
    """What `make` makes of each item and of at most `count` summaries that answer another question of its split."""
    items, rejected = read_items(rule)
    yield from rejected
    for part in items.values():
        ordered = sorted(part, key=lambda item: (len(item.summary), item.name))
        words = [frozenset(normalise(item.summary).split()) for item in ordered]
        for place, item in enumerate(ordered):
            near = _window(item, place, len(ordered))
            wrong = [other for other in near if _is_wrong(ordered[other], item, words[other], words[place])]
            wrong.sort(key=lambda other: _number(item, ordered[other].name))
            record = make(item, [ordered[other].summary for other in wrong[:count]])
            if record is None:
                yield Rejected(item.file, item.line, "too few other summaries of like length", item.summary)
            else:
                yield Found(record, item.file, item.line)


def _window(item: Item, place: int, count: int) -> range:
    """The places of LIKE_LENGTH items beside that at `place`, of `count` in the order of length.

    Where it stands among them is drawn: in the middle of them, the answer of middling length would often be the right one.
    """
    first = place - _number(item, "window") % (LIKE_LENGTH + 1)
    first = max(0, min(first, count - LIKE_LENGTH - 1))
    return range(first, min(count, first + LIKE_LENGTH + 1))


def _is_wrong(other: Item, item: Item, other_words: frozenset[str], words: frozenset[str]) -> bool:
    """Whether the other's summary is surely no answer for `item`: methods of one name often do one thing."""
    if other.name.rpartition(".")[2] == item.name.rpartition(".")[2]:
        return False
    return len(words & other_words) < ALIKE * len(words | other_words)


def _question(item: Item) -> str:
    template = QUESTIONS[_number(item, "question") % len(QUESTIONS)]
    return template.format(kind=item.kind, call=item.call, module=item.module)


def _follow_up(item: Item) -> tuple[Message, ...]:
    """A second question, about what the first has named: so the answer is known, and it takes both turns to give it."""
    if _number(item, "follow up") % FOLLOWED_UP:
        return ()
    if not item.arguments:
        return Message("user", "Which module is it in?"), Message("assistant", f"It is in the module `{item.module}`.")
    named = [f"`{argument}`" for argument in item.arguments]
    listed = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    return Message("user", "Which arguments does it take?"), Message("assistant", f"It takes {listed}.")


def _truncate(item: Item) -> str:
    """The summary without its end: 40 to 80 % of its words."""
    words = item.summary.split()
    fewest, most = max(2, len(words) * 2 // 5), max(2, len(words) * 4 // 5)
    kept = words[: fewest + _number(item, "cut") % (most - fewest + 1)]
    return " ".join(kept).rstrip(".,;:")


def _shuffle(item: Item) -> str | None:
    """The summary's words in another order; None where all are one word."""
    words = item.summary.split()
    order = sorted(range(len(words)), key=lambda place: _number(item, f"word {place}"))
    shuffled = [words[place] for place in order]
    if shuffled == words:
        shuffled = [*words[1:], words[0]]
    return None if shuffled == words else " ".join(shuffled)


def _number(item: Item, what: str) -> int:
    """A number that is fixed for an item and what it is to decide."""
    return int.from_bytes(hashlib.blake2b(f"{item.name}\0{what}".encode(), digest_size=8).digest())
