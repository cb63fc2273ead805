"""Dataclasses as JSON and back: one spelling for each value, so that equal plans have equal bytes and hashes."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces. Raises TypeError on a type it does not know, ValueError on nan and infinity."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists; refuses what has no one spelling in JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys of a plan are strings")
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if type(value) in (str, int, bool):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{value} has no JSON spelling")
        return value
    raise TypeError(f"{type(value).__name__} has no canonical JSON: {value!r}")


def build(kind: Any, raw: Any, place: str = "") -> Any:
    """The inverse of `to_plain`: an instance of `kind` from parsed JSON. Raises ValueError, with the place, where it is none."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        if not isinstance(raw, dict) or raw.keys() != hints.keys():
            held = ", ".join(sorted(raw.keys() ^ hints.keys())) if isinstance(raw, dict) else repr(raw)[:40]
            raise ValueError(f"{place or 'the whole'} has not the fields of {kind.__name__}: {held}")
        return kind(**{name: build(hints[name], item, _inside(place, name)) for name, item in raw.items()})
    if get_origin(kind) is tuple and isinstance(raw, list):
        return tuple(build(get_args(kind)[0], item, f"{place}[{index}]") for index, item in enumerate(raw))
    if get_origin(kind) is Mapping and isinstance(raw, dict):
        return {key: build(get_args(kind)[1], item, _inside(place, key)) for key, item in raw.items()}
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind or (kind is float and not math.isfinite(raw)):
        raise ValueError(f"{place} is {repr(raw)[:40]}, where {getattr(kind, '__name__', kind)} belongs")
    return raw


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
