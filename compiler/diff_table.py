"""A difference as text for people: what changed and why, the estimates side by side, programs and files."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from trainwright.compiler.diff import Change, Difference, Figure, ProgramChange
from trainwright.compiler.diff_side import Side
from trainwright.compiler.explain import shown, table
from trainwright.compiler.units import format_count, format_quantity

_LINES = 6  # of a program's code that are shown; --json has all
_CELL = 48  # characters of a value, a text of the user's say; --json has all


def difference_table(found: Difference) -> RenderableType:
    """The sides, then whatever differs between them; "no difference" where nothing does."""
    parts: list[RenderableType] = [table(("", ""), _sides(found), header=False), Text("")]
    if found.same:
        return Group(*parts, Text("no difference"))
    if found.changes:
        parts += [table(("changed", "A", "B", "why in B"), list(_change_rows(found.changes))), Text("")]
    parts += [table(("estimated", "A", "B", "change"), list(_figure_rows(found)))]
    for side, warnings in (("A", found.warnings_a), ("B", found.warnings_b)):
        parts += [Text(f"warning of {side} alone: {text}", style="yellow") for text in warnings]
    if found.programs:
        parts += [Text(""), *(line for program in found.programs for line in _program(program))]
    for side, edited in (("A", found.edited_a), ("B", found.edited_b)):
        if edited:
            parts += [Text(""), Text(f"not as compiled in {side}: {', '.join(edited)}")]
    return Group(*parts)


def _sides(found: Difference) -> list[tuple[str, str]]:
    rows = [(name, _side(side)) for name, side in (("A", found.a), ("B", found.b))]
    if _pretrains(found.a) and _pretrains(found.b):
        same = found.a.plan.run_id == found.b.plan.run_id
        text = (
            "the same run: B may go on from A's checkpoints" if same else "another run: B trains another model than A"
        )
        rows.append(("", text))
    return rows


def _side(side: Side) -> str:
    return f"{side.path} ({side.kind}: {side.plan.name}, run {side.plan.run_id})"


def _pretrains(side: Side) -> bool:
    return any(stage.kind == "pretrain" for stage in side.plan.stages)


def _change_rows(changes: tuple[Change, ...]) -> Iterator[tuple[str, str, str, str]]:
    part = ""
    for change in changes:
        now = change.path.partition(".")[0].partition("[")[0]
        if part and now != part:
            yield "", "", "", ""
        part = now
        # Where both sides give the same reason, it does not say why they differ.
        why = change.why_b if change.why_b != change.why_a else ""
        a, b = _values(change)
        yield change.path, a, b, why


def _values(change: Change) -> tuple[str, str]:
    """Of two lists, what each has alone: they may be long, and alike at the beginning."""
    a, b = change.a, change.b
    if isinstance(a, tuple) and isinstance(b, tuple) and set(a) != set(b):
        alone = ([item for item in one if item not in other] for one, other in ((a, b), (b, a)))
        gone, new = (tuple(items) for items in alone)
        return (_value(f"- {shown(gone)}") if gone else ""), (_value(f"+ {shown(new)}") if new else "")
    return _value(a), _value(b)


def _value(value: object) -> str:
    text = " ".join(shown(value).split()) if value is not None else ""
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."


def _figure_rows(found: Difference) -> Iterator[tuple[str, str, str, str]]:
    for figure in found.figures:
        if (figure.always and (figure.a or figure.b)) or figure.a != figure.b:
            yield figure.name, _amount(figure, figure.a), _amount(figure, figure.b), _relative(figure, found)


def _amount(figure: Figure, value: float | None) -> str:
    if value is None:
        return "-"
    match figure.kind:
        case "nats":
            return f"{value:.4f} nats a token"
        case "rate":
            return f"{format_quantity('parameters', value)} tokens/s"
        case "count":
            return f"{value:.3g}"
        case kind:
            return format_quantity(kind, value)


def _relative(figure: Figure, found: Difference) -> str:
    if figure.a == figure.b:
        return "="
    if not figure.comparable:
        laws = (found.a.plan.estimates.law, found.b.plan.estimates.law)
        return f"by two laws ({laws[0]}, {laws[1]}), whose units differ"
    change = figure.change
    if change is None:
        return ""
    return f"{100 * change:+.3g} %" if -0.9 < change < 9 else f"x {1 + change:.3g}"


def _program(program: ProgramChange) -> Iterator[Text]:
    if not program.a or not program.b:
        here = "B" if program.b else "A"
        yield Text(f"program {program.b or program.a}: in {here} alone")
        return
    name = program.a if program.a == program.b else f"{program.a}, in B {program.b}"
    if program.fault:
        yield Text(f"program {name}: cannot be read: {program.fault}")
        return
    count = len(program.removed) + len(program.added)
    yield Text(f"program {name}: code differs, {format_count(count, 'line')}")
    lines = [*((f"- {line.strip()}") for line in program.removed), *((f"+ {line.strip()}") for line in program.added)]
    if count <= _LINES:
        yield from (Text(f"    {line}") for line in lines)
