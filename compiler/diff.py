"""Two plans side by side: the decided leaves that differ, what that does to the estimates, and which programs' code differs."""

import ast
import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainwright.compiler.diff_side import Files, Side, compiled
from trainwright.compiler.plan import DECIDED, Plan, Reason
from trainwright.runtime.manifest import program_identity

# What an item of a list is known by, so that one more item does not make all that follow it differ.
_LABELS = ("stage", "name", "metric")


@dataclass(frozen=True)
class Change:
    """A decided leaf that differs; None: that side has no such leaf. A reason: "kind: text", "" without one."""

    path: str  # lists of named items by name: "stages[sft].retries"
    a: Any
    b: Any
    why_a: str
    why_b: str


@dataclass(frozen=True)
class Figure:
    """An estimate on both sides, in the base unit of `kind`; None: not known there."""

    name: str
    kind: str  # of units.format_quantity, or "nats", "rate" (tokens/s)
    a: float | None
    b: float | None
    always: bool  # shown even where it is the same
    comparable: bool = True  # losses by two laws are not

    @property
    def change(self) -> float | None:
        """(b - a) / a."""
        return (self.b - self.a) / self.a if self.a and self.b is not None and self.comparable else None


@dataclass(frozen=True)
class ProgramChange:
    """A stage whose program does something else, by `program_identity`: docstring, comments and formatting do not count."""

    stage: str
    a: str  # the file; "": none
    b: str
    removed: tuple[str, ...]  # lines of A's code
    added: tuple[str, ...]  # lines of B's code
    fault: str  # where one is missing or does not parse


@dataclass(frozen=True)
class Difference:
    """Everything in which two sides differ. `programs`, `edited_a` and `edited_b` are empty unless one of them is a bundle."""

    a: Side
    b: Side
    changes: tuple[Change, ...]
    figures: tuple[Figure, ...]
    warnings_a: tuple[str, ...]  # that A alone has
    warnings_b: tuple[str, ...]
    programs: tuple[ProgramChange, ...]
    edited_a: tuple[str, ...]  # files that are not as compiled, nor as on the other side
    edited_b: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Nothing differs but how the plans came to be."""
        found = (self.changes, self.programs, self.edited_a, self.edited_b, self.warnings_a, self.warnings_b)
        return not any(found) and all(figure.a == figure.b for figure in self.figures)


def compare(a: Side, b: Side) -> Difference:
    """What is different in `b`."""
    one, other = a.plan, b.plan
    programs: tuple[ProgramChange, ...] = ()
    edited_a: tuple[str, ...] = ()
    edited_b: tuple[str, ...] = ()
    if a.files is not None or b.files is not None:
        files_a, files_b = compiled(a), compiled(b)
        if files_a is not None and files_b is not None:
            programs = tuple(_programs(files_a, files_b))
        edited_a, edited_b = _edited(files_a, files_b), _edited(files_b, files_a)
    warnings_a, warnings_b = one.estimates.warnings, other.estimates.warnings
    return Difference(
        a=a,
        b=b,
        changes=tuple(_changes(one, other)),
        figures=tuple(_figures(one, other)),
        warnings_a=tuple(text for text in warnings_a if text not in warnings_b),
        warnings_b=tuple(text for text in warnings_b if text not in warnings_a),
        programs=programs,
        edited_a=edited_a,
        edited_b=edited_b,
    )


def write_difference(found: Difference) -> str:
    """As one JSON object."""
    raw: dict[str, Any] = {
        **{
            side: {"path": given.path, "kind": given.kind, "name": given.plan.name, "run_id": given.plan.run_id}
            for side, given in (("a", found.a), ("b", found.b))
        },
        "same": found.same,
        "changes": [dataclasses.asdict(change) for change in found.changes],
        "estimates": [
            {"name": figure.name, "unit": figure.kind, "a": figure.a, "b": figure.b, "change": figure.change}
            for figure in found.figures
        ],
        "warnings": {"a": found.warnings_a, "b": found.warnings_b},
        "programs": [dataclasses.asdict(program) for program in found.programs],
        "edited": {"a": found.edited_a, "b": found.edited_b},
    }
    return json.dumps(raw, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _changes(one: Plan, other: Plan) -> Iterator[Change]:
    if one.name != other.name:
        yield Change("name", one.name, other.name, "", "")
    for part in DECIDED:
        left, right = (dict(_leaves(getattr(plan, part), part, part, plan.reasons)) for plan in (one, other))
        for path in (*right, *(path for path in left if path not in right)):
            (a, why_a), (b, why_b) = left.get(path, _ABSENT), right.get(path, _ABSENT)
            if a != b:
                yield Change(path, a, b, why_a, why_b)


_ABSENT: tuple[Any, str] = (None, "")


def _leaves(value: Any, path: str, place: str, reasons: Mapping[str, Reason]) -> Iterator[tuple[str, tuple[Any, str]]]:
    """(path, (value, reason)) of every leaf. `place`: the path by which `reasons` know it, which counts the items of lists. A
    list of named items is also a leaf itself: their names."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}", f"{place}.{field.name}", reasons)
        return
    labels = [_label(item) for item in value] if isinstance(value, tuple) else []
    if not all(labels) or not labels:
        reason = reasons.get(place) or reasons.get(f"{place}[0]")
        yield path, (value, f"{reason.kind}: {reason.text}" if reason is not None else "")
        return
    yield path, (tuple(labels), "")
    for index, (label, item) in enumerate(zip(labels, value, strict=True)):
        # Two cost lines may have the same name.
        known = label if labels.count(label) == 1 else f"{label} {labels[: index + 1].count(label)}"
        yield from _leaves(item, f"{path}[{known}]", f"{place}[{index}]", reasons)


def _label(item: object) -> str:
    return str(next((getattr(item, name) for name in _LABELS if hasattr(item, name)), ""))


def _figures(one: Plan, other: Plan) -> Iterator[Figure]:
    left, right = _estimated(one), _estimated(other)
    for name in (*left, *(name for name in right if name not in left)):
        kind, _, always = left.get(name) or right[name]
        a, b = (side[name][1] if name in side else 0.0 for side in (left, right))
        comparable = name != "loss" or one.estimates.law == other.estimates.law
        yield Figure(name, kind, a or None, b or None, always, comparable)


def _estimated(plan: Plan) -> dict[str, tuple[str, float, bool]]:
    """name: (kind, value, whether it is shown where nothing changed); 0.0: not known."""
    e, memory, totals = plan.estimates, plan.estimates.memory, plan.estimates.totals
    pretrained = any(stage.kind == "pretrain" for stage in plan.stages)
    found: dict[str, tuple[str, float, bool]] = {
        "parameters": ("parameters", e.parameters, True),
        "active parameters": ("parameters", e.active_parameters, False),
        "memory": ("bytes", memory.total, True),
        **{
            f"memory: {name}": ("bytes", getattr(memory, name), False)
            for name in ("parameters", "gradients", "optimizer", "activations", "logits", "overhead", "capacity")
        },
        "time in all": ("time", totals.duration_s, True),
        "device-hours in all": ("device_hours", totals.device_hours, True),
        "money in all": ("money", totals.devices_usd + totals.lines_usd, True),
        "FLOPs in all": ("flops", totals.flops, False),
        "energy in all": ("energy", totals.energy_kwh, False),
        "CO2 in all": ("mass", totals.co2_kg, False),
    }
    if pretrained:
        found = {
            "loss": ("nats", e.predicted_loss, True),
            "epochs": ("count", e.epochs, False),
            "step": ("time", e.step_s, True),
            "tokens/s": ("rate", e.tokens_per_s, True),
            "MFU": ("fraction", e.mfu, False),
            "model FLOPs a step": ("flops", e.model_flops_per_step, False),
            "executed FLOPs a step": ("flops", e.executed_flops_per_step, False),
        } | found
    for stage in e.stages:
        found[f"time of {stage.name}"] = ("time", stage.train_s + stage.generate_s, False)
        found[f"money of {stage.name}"] = ("money", stage.cost_usd, False)
    for line in e.cost_lines:
        found[f"money of {line.name}"] = ("money", line.cost_usd, False)
    return found


def _programs(one: Files, other: Files) -> Iterator[ProgramChange]:
    for stage in dict.fromkeys((*one.programs, *other.programs)):
        names = one.programs.get(stage, ""), other.programs.get(stage, "")
        identities, lines, faults = [], [], []
        for name, files in zip(names, (one, other), strict=True):
            try:
                source = files.content[name].decode("utf-8") if name else ""
                identities.append(program_identity(source) if name else "")
                lines.append(_lines(source))
            except KeyError:
                faults.append(f"{name}: is missing")
            except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8, or a null byte
                faults.append(f"{name}:{getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', '') or error}")
        if faults:
            yield ProgramChange(stage, *names, (), (), "; ".join(faults))
        elif identities[0] != identities[1]:
            yield ProgramChange(stage, *names, *_changed(*lines), "")


def _changed(one: list[str], other: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(removed, added)"""
    steps = [
        step for step in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if step[0] != "equal"
    ]
    removed = (line for _, first, last, _, _ in steps for line in one[first:last])
    return tuple(removed), tuple(line for _, _, _, first, last in steps for line in other[first:last])


def _lines(source: str) -> list[str]:
    """The lines below the docstring that hold code, as written."""
    body = ast.parse(source).body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        source = "\n".join(source.split("\n")[body[0].end_lineno :])
    return [line.rstrip() for line in source.split("\n") if line.strip() and not line.lstrip().startswith("#")]


def _edited(files: Files | None, other: Files | None) -> tuple[str, ...]:
    """Files edited by hand, and missing ones, that the other side does not have like this."""
    if files is None:
        return ()
    content = other.content if other is not None else {}
    edited = (name for name in files.edited if files.content[name] != content.get(name))
    return (*edited, *(f"{name} (missing)" for name in files.missing))
