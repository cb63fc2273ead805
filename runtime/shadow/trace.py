"""The measured step of a shadow run as a Chrome trace (trace_event JSON), which Perfetto and chrome://tracing open.

A shadow run has no times: an operation or a message takes one unit of the axis, in the order in which the program does them.
Tracks: passes, modules (nested), operations, collectives; counters: bytes alive, by kind.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from trainwright.runtime.shadow.recorder import Block, Event
from trainwright.runtime.shadow.result import KINDS

_TRACKS = ("passes", "modules", "operations", "collectives")
_PASSES, _MODULES, _OPERATIONS, _COLLECTIVES = range(1, 5)


def make_trace(title: str, history: Sequence[Event], blocks: Sequence[Block], log: Sequence[int]) -> dict[str, Any]:
    """The object to write as JSON. `history` is of the measured step; `log` holds a block's number as it is allocated, and the
    complement of it as it is freed; every block has its kind."""
    return {
        "traceEvents": [
            *_names(title),
            *_passes(history),
            *_modules(history),
            *_events(history),
            *_memory(history, blocks, log),
        ],
        "otherData": {"axis": "operations in their order: one unit (shown as a microsecond) each; they are not times"},
    }


def _names(title: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}}
    for number, name in enumerate(_TRACKS, 1):
        yield {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}


def _passes(history: Sequence[Event]) -> Iterator[dict[str, Any]]:
    start = 0
    for name, events in itertools.groupby(history, key=lambda event: event.phase):
        length = sum(1 for _ in events)
        yield _slice(_PASSES, name, start, length)
        start += length


def _modules(history: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Neighbours in one module are one slice; a part of a module lies below it."""
    open_parts: list[tuple[str, int]] = []  # (name, start)
    for now, parts in enumerate([*(_path(event.module) for event in history), []]):
        common = 0
        while common < min(len(parts), len(open_parts)) and parts[common] == open_parts[common][0]:
            common += 1
        while len(open_parts) > common:
            name, start = open_parts.pop()
            yield _slice(_MODULES, name, start, now - start)
        open_parts.extend((name, now) for name in parts[common:])


def _path(module: str) -> list[str]:
    """ "decoder.layers.3.mlp" -> decoder, layers.3, mlp."""
    parts: list[str] = []
    for part in module.split(".") if module else ():
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return parts


def _events(history: Iterable[Event]) -> Iterator[dict[str, Any]]:
    for now, event in enumerate(history):
        if event.group:
            message: dict[str, Any] = {"group": event.group, "ranks": event.ranks, "bytes": event.bytes}
            yield _slice(_COLLECTIVES, event.name, now, 1) | {"args": message | {"module": event.module}}
        else:
            yield _slice(_OPERATIONS, event.name, now, 1) | {"args": {"module": event.module}}


def _memory(history: Sequence[Event], blocks: Sequence[Block], log: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Within a unit the most that is alive; the units' ends say what it leaves by the next one's begin."""
    alive = dict.fromkeys(KINDS, 0)
    places = [event.place for event in history]

    def apply(first: int, last: int) -> dict[str, int]:
        """Bytes by kind where most were alive between two places of the log."""
        most, total = dict(alive), sum(alive.values())
        for entry in log[first:last]:
            block = blocks[entry if entry >= 0 else ~entry]
            alive[block.kind] += block.bytes if entry >= 0 else -block.bytes
            if sum(alive.values()) > total:
                most, total = dict(alive), sum(alive.values())
        return most

    apply(0, places[0] if places else 0)
    before: dict[str, int] = {}
    for now, (first, last) in enumerate(zip(places, [*places[1:], len(log)], strict=True)):
        most = apply(first, last)
        if most != before:
            yield {"ph": "C", "pid": 1, "name": "bytes alive", "ts": now, "args": most}
        before = most


def _slice(track: int, name: str, start: int, length: int) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": track, "name": name or "elsewhere", "ts": start, "dur": length}
