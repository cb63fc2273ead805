"""A spec file, checked against its models: every problem in one message, each with place, what is wrong, and the fix."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from trainwright.compiler.document import Document, join, load_document
from trainwright.compiler.errors import SpecError
from trainwright.compiler.spec import Spec


@dataclass(frozen=True)
class LoadedSpec:
    """A Spec and where its values were written. `document` has the place of every path."""

    spec: Spec
    document: Document


def load_spec(path: Path, overrides: tuple[str, ...] = ()) -> LoadedSpec:
    """The spec in `path`, with `overrides` ("path=value") over it. Raises FileError, UsageError, SpecError."""
    document = load_document(path, overrides)
    try:
        return LoadedSpec(Spec.model_validate(document.data), document)
    except ValidationError as error:
        # Pydantic counts a list's valid items only, so one that holds a bad item is also reported as empty.
        raws = [raw for raw in error.errors() if not (raw["type"] == "too_short" and raw["input"])]
        problems = sorted((_problem(raw, document) for raw in raws), key=lambda problem: problem.order)
        raise SpecError("\n".join(f"{problem.place}: {problem.text}" for problem in problems)) from error


@dataclass(frozen=True)
class _Problem:
    place: str
    text: str

    @property
    def order(self) -> tuple[str, int]:
        file, _, line = self.place.rpartition(":")
        return (file, int(line)) if line.isdecimal() else (self.place, 0)


def _problem(raw: Mapping[str, Any], document: Document) -> _Problem:
    parts = tuple(part for part in raw["loc"] if part != "[key]")
    path = join(parts)
    place = document.place(path)
    if raw["type"] == "extra_forbidden":
        return _Problem(place, f"{path}: unknown key{_suggestion(parts)}")
    if raw["type"] == "missing":
        held = _description(parts)
        return _Problem(place, f"{path}: is missing; add it: {held}")
    if raw["loc"][-1:] == ("[key]",):
        return _Problem(place, f"{path}: {_KEY_RULES[str(parts[-2])]}")
    meaning = _description(parts) if raw["type"] != "value_error" else ""  # a refused quantity lists what is accepted
    return _Problem(place, f"{path}: {_complaint(raw)}" + (f" ({meaning})" if meaning else ""))


# What the keys of a mapping by names must look like.
_KEY_RULES = {
    "stages": "a stage's name starts with a small letter and holds a-z, 0-9, - and _, 32 at most; rename it",
    "tasks": "a task's name holds letters, digits, . - and _, starting with a letter or digit, 64 at most; rename it",
    "gates": "no metric has such a name; it is a word, or one with the name of what is measured, as accuracy/<task>",
}


def _complaint(raw: Mapping[str, Any]) -> str:
    """What is wrong with a value, in the spec's own words rather than pydantic's."""
    given, context = _shown(raw["input"]), raw.get("ctx", {})
    match raw["type"]:
        case "value_error":
            return str(context["error"])
        case "int_type" | "int_from_float":
            return f"{given} is not a whole number"
        case "float_type":
            return f"{given} is not a number"
        case "finite_number":
            return f"{given} is not a finite number"
        case "string_type":
            return f"{given} is not a text; put it in quotes if it is meant as one"
        case "string_pattern_mismatch":
            return f"{given} is no name: letters, digits, . - and _, starting with a letter or digit, 64 at most"
        case "string_too_short":
            return "the text is empty"
        case "literal_error":
            return _not_among(raw["input"], str(context["expected"]))
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"{given} is out of range: it must be {_BOUND[raw['type']]} {next(iter(context.values())):g}"
        case "tuple_type":
            return f"{given} is not a list"
        case "model_type" | "dict_type":
            return f"{given} is not a section of keys"
        case "too_short":
            return "is empty; write at least one"
        case _:
            return f"{given}: {raw['msg']}"


_BOUND = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def _not_among(given: object, expected: str) -> str:
    near = difflib.get_close_matches(str(given), expected.replace("'", "").replace(" or ", ", ").split(", "), n=1)
    return f"{_shown(given)} is not {expected}" + (f"; did you mean {near[0]}?" if near else "")


def _shown(value: object) -> str:
    """A value as its writer knows it, cut to a line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else "a section" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggestion(parts: tuple[str | int, ...]) -> str:
    """The key of the same section that is nearest; else where the key belongs; else the section's keys."""
    *around, wrong = parts
    model = _model_at(tuple(around))
    names = list(_fields(model)) if model is not None else []
    near = difflib.get_close_matches(str(wrong), names, n=1, cutoff=0.65)
    if near:
        return f"; did you mean {near[0]}?"
    elsewhere = [path for path in _paths(Spec, "") if path.rpartition(".")[2] == wrong]
    if elsewhere:
        return f"; it belongs at {' or '.join(elsewhere)}"
    return f"; {join(around) or 'a spec'} holds {', '.join(names)}"


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """A section's fields by key, as a spec spells it."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _model_at(parts: tuple[str | int, ...]) -> type[BaseModel] | None:
    """The model that validates what stands at `parts`; None where that is no section."""
    model: type[BaseModel] = Spec
    named = False  # whether the next part is a name that the user chose: of a stage, of a task
    for part in parts:
        if isinstance(part, int):
            continue
        if named:
            named = False
            continue
        field = _fields(model).get(part)
        inner = _section(field.annotation) if field is not None else None
        if field is None or inner is None:
            return None
        model, named = inner, _by_name(field.annotation)
    return None if named else model


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model inside a field's type: itself, optional, in a tuple, or as a mapping's values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section(inner)) is not None), None)


def _by_name(annotation: Any) -> bool:
    """Whether a field's type is a mapping by names, optional or not."""
    return get_origin(annotation) is dict or any(_by_name(inner) for inner in get_args(annotation))


def _paths(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in _fields(model).items():
        yield f"{prefix}{name}"
        inner = _section(field.annotation)
        if inner is not None:
            middle = ".<name>." if _by_name(field.annotation) else "[0]." if name == "sources" else "."
            yield from _paths(inner, f"{prefix}{name}{middle}")


def _description(parts: tuple[str | int, ...]) -> str:
    """What the field at `parts` holds; "" where nothing does."""
    words = [part for part in parts if isinstance(part, str)]
    model = _model_at(tuple(words[:-1])) if words else None
    field = _fields(model).get(words[-1]) if model is not None else None
    return (field.description or "") if field is not None else ""
