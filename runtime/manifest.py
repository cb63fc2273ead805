"""The contract between compile and run: what `manifest.json` in a bundle holds. Standard library only.

Compatibility rule: adding a field with a default keeps SCHEMA_VERSION; anything else raises it. Within a version a reader
drops the keys that it does not know and takes the default of a field that is absent. A runtime reads its own version only.
"""

import ast
import hashlib
import json
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Stage:
    """One stage instance: the program that does it, what it reads and what it leaves."""

    name: str  # the instance: folder `work/<name>/`
    kind: str  # which stage it is: module `trainwright.runtime.stages.<kind>`
    program: str  # file in the bundle
    program_id: str  # program_identity() as compiled; another on disk means edited by hand
    launcher: str  # "python" (one process) or "torchrun"
    nodes: int
    processes_per_node: int
    needs: tuple[str, ...]  # instances whose `output/` it reads
    inputs: tuple[str, ...]  # the user's paths and globs as written, and "connector:<name>"
    outputs: tuple[str, ...]  # relative to `work/<name>/`
    implied: bool  # nobody wrote it in the spec; others need it
    retries: int = 0  # how often it is started again after a failure that is nobody's mistake
    packages: tuple[str, ...] = ()  # top-level packages that its program imports and the base installation lacks


@dataclass(frozen=True)
class Manifest:
    """A bundle's table of contents. `stages` stand in an order in which they can be executed."""

    schema_version: int
    name: str
    run_id: str  # identity of what is trained; decides whether a checkpoint may be resumed
    data_root: str  # as the user wrote it; "." where absent: relative inputs are resolved against it at run time
    stages: tuple[Stage, ...]
    files: dict[str, str]  # sha256 of every other file of the bundle, by name
    seal: str = ""  # sha256 of all else that the manifest says; "": written before there were seals


class ManifestError(ValueError):
    """The text is no manifest that this version can read; the message says why."""


def write_manifest(manifest: Manifest) -> str:
    """The manifest, sealed, as JSON text: sorted keys, two spaces, a newline at the end."""
    plain = asdict(manifest)
    return json.dumps(plain | {"seal": _seal(plain)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _seal(raw: dict[str, Any]) -> str:
    """Of what JSON says, whatever its spaces and order."""
    others = {key: value for key, value in raw.items() if key != "seal"}
    return file_hash(json.dumps(others, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(text: str) -> Manifest:
    """The inverse of `write_manifest`. Raises ManifestError for other versions, damaged text and one that was edited."""
    try:
        raw: dict[str, Any] = json.loads(text)
        version = raw["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError(f"it is not a manifest ({type(error).__name__}: {error})") from error
    if version != SCHEMA_VERSION:
        raise ManifestError(f"it has schema version {version!r}; this trainwright reads version {SCHEMA_VERSION}")
    try:
        manifest = read_record(Manifest, raw)
    except ManifestError as error:
        raise ManifestError(f"it is damaged ({error})") from error
    if manifest.seal and manifest.seal != _seal(raw):
        raise ManifestError(
            f"it was edited after it was compiled (its seal is {manifest.seal[:12]}..., of what it says now "
            f"{_seal(raw)[:12]}...): what a run does is said by the spec and the programs, which may be edited, not here"
        )
    return manifest


_Record = TypeVar("_Record")
_WORDS: dict[Any, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def read_record(kind: type[_Record], raw: object, place: str = "") -> _Record:
    """An instance of the dataclass `kind` from parsed JSON: unknown keys are dropped, absent ones take their default.

    Raises ManifestError with the field's name (below `place`, "" for the top) where a value is not what its annotation says.
    Annotations are made of str, int, float, bool, None, dataclasses, `tuple[X, ...]`, `dict[str, X]` and unions.
    """
    if not isinstance(raw, dict):
        raise _mismatch(place or "the whole", "an object", raw)
    hints, values = get_type_hints(kind), {}
    for item in fields(kind):  # type: ignore[arg-type]  # a dataclass, as every caller's is
        where = f"{place}.{item.name}" if place else item.name
        if item.name in raw:
            values[item.name] = _value(hints[item.name], raw[item.name], where)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ManifestError(f"{where} is missing")
    return kind(**values)


def _value(hint: Any, raw: object, where: str) -> Any:
    parts = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(raw, list):
            raise _mismatch(where, "a list", raw)
        return tuple(_value(parts[0], value, f"{where}[{index}]") for index, value in enumerate(raw))
    if get_origin(hint) is dict:
        if not isinstance(raw, dict):
            raise _mismatch(where, "an object", raw)
        return {key: _value(parts[1], value, f"{where}.{key}") for key, value in raw.items()}
    if type(None) in parts:
        return None if raw is None else _value(parts[0], raw, where)
    if hint not in _WORDS:
        return read_record(hint, raw, where)
    # JSON's true and false are no numbers, its NaN and Infinity none to calculate with; 1 is also 1.0.
    number = float if type(raw) is int and hint is float else type(raw)
    if number is not hint or (isinstance(raw, int | float) and not abs(raw) <= sys.float_info.max):
        raise _mismatch(where, _WORDS[hint], raw)
    return raw


def _mismatch(where: str, wanted: str, raw: object) -> ManifestError:
    text = json.dumps(raw)
    return ManifestError(f"{where} should be {wanted}, not {text if len(text) <= 40 else text[:40] + '...'}")


def file_hash(content: bytes) -> str:
    """sha256 of a file's content, as `Manifest.files` holds it."""
    return hashlib.sha256(content).hexdigest()


def program_identity(source: str) -> str:
    """16 hex digits that identify what a program does: its code without docstring, comments and formatting.

    A better estimate in the docstring therefore retrains nothing. Raises SyntaxError when the program does not parse.
    """
    tree = ast.parse(source)
    if tree.body and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant):
        tree.body = tree.body[1:]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
