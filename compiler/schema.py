"""The Spec's models as JSON Schema (for editors) and as a reference page (for people)."""

from collections.abc import Iterator
from typing import Any

from trainwright.compiler.spec import Spec
from trainwright.compiler.spec_stages import STAGE_KINDS

SCHEMA_FILE = "trainwright.schema.json"


def spec_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a spec."""
    schema: dict[str, Any] = _plain(Spec.model_json_schema())
    # An instance may have any name; the kinds' names are the ones to complete.
    stages = schema["properties"]["stages"]
    (stage,) = stages["patternProperties"].values()
    stages["properties"] = dict.fromkeys(STAGE_KINDS, stage)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _plain(node: Any) -> Any:
    """Pydantic's schema without what only it needs: titles, null (absent is written by leaving a key out), null defaults."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _plain(item) for key, item in node.items() if not (key == "title" and isinstance(item, str))}
    if node.get("default") in (None, {}):
        node.pop("default", None)
    some = [item for item in node.get("anyOf", []) if item != {"type": "null"}]
    if len(some) == 1:
        del node["anyOf"]
        node = {**some[0], **node}
    return node


def spec_reference() -> str:
    """`docs/reference/spec.md`: every key, its type, range and meaning."""
    lines = [
        "# The spec",
        "",
        "Written by `python -m trainwright.compiler.schema > docs/reference/spec.md` from `compiler/spec.py`; do not edit.",
        "A key that is absent is the planner's to decide, unless it is required. Quantities are strings with units;",
        "multipliers are k, M, B (or G) and T for 1e3, 1e6, 1e9 and 1e12.",
        "",
        "| key | holds | meaning |",
        "|---|---|---|",
    ]
    schema = spec_schema()
    lines += [f"| `{path}` | {kind} | {meaning} |" for path, kind, meaning in _rows(schema, schema, "")]
    return "\n".join(lines) + "\n"


def _rows(node: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    for name, raw in node["properties"].items():
        if path == "stages" and name in STAGE_KINDS:
            continue
        yield from _row(raw, schema, f"{path}.{name}" if path else name, name in node.get("required", ()))


def _row(raw: dict[str, Any], schema: dict[str, Any], path: str, required: bool) -> Iterator[tuple[str, str, str]]:
    held = _follow(raw, schema)
    meaning = raw.get("description", held.get("description", ""))
    yield path, (_kind(held) + (", required" if required else "")).replace(" | ", " or "), meaning
    inner = held
    if held.get("type") == "array":
        inner, path = _follow(held["items"], schema), f"{path}[]"
    elif "patternProperties" in held:
        inner, path = _follow(next(iter(held["patternProperties"].values())), schema), f"{path}.<name>"
    if "properties" in inner:
        yield from _rows(inner, schema, path)


def _follow(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        found: dict[str, Any] = schema["$defs"][node["$ref"].rpartition("/")[2]]
        return found
    return node


def _kind(node: dict[str, Any]) -> str:
    if "x-unit" in node:
        return str(node["x-unit"])
    if "enum" in node:
        return " or ".join(f"`{word}`" for word in node["enum"])
    if node.get("type") == "array":
        words = node["items"].get("enum")
        return f"list of {' | '.join(f'`{word}`' for word in words)}" if words else "list"
    if node.get("type") == "object":
        values: dict[str, Any] = next(iter(node.get("patternProperties", {}).values()), {})
        return "section of numbers" if values.get("type") == "number" else "section"
    if "const" in node:
        return f"`{node['const']}`"
    if node.get("type") == "string":
        return f"text matching `{node['pattern']}`" if "pattern" in node else "text"
    if node.get("type") == "boolean":
        return "true or false"
    low = node.get("minimum", node.get("exclusiveMinimum"))
    high = node.get("maximum", node.get("exclusiveMaximum"))
    kind = "whole number" if node["type"] == "integer" else "number"
    above, below = ("above " if "exclusiveMinimum" in node else ""), ("below " if "exclusiveMaximum" in node else "")
    return f"{kind}, {above}{low:,} to {below}{high:,}"


if __name__ == "__main__":
    print(spec_reference(), end="")
