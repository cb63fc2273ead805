"""What tuning and evaluation learn from and measure on: conversations, preferences and questions."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

ROLES = ("system", "user", "assistant")

T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Message:
    """One turn; `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns that alternate between user and assistant after at most one system message; the last is the assistant's."""

    messages: tuple[Message, ...]
    id: str
    group: str | None


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, whose last message is the user's. `kind` says how the rejected one came about, or is ""."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    kind: str
    id: str
    group: str | None


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` is the place of the right choice, from 0."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    id: str
    group: str | None


@dataclass(frozen=True)
class Found(Generic[T]):
    """A usable record, and where it stands (`line` from 1)."""

    record: T
    file: str
    line: int


@dataclass(frozen=True)
class Records(Generic[T]):
    """The records of a source by split.

    `counts` says what became of each: "in" = "kept" + all "set aside: <reason>" + all "dropped: <reason>".
    """

    train: list[T] = field(default_factory=list)
    validation: list[T] = field(default_factory=list)
    test: list[T] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
