"""One side of a comparison: the plan that a spec, a plan.json or a bundle holds, and the files that go with it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle, not_emitted
from trainwright.compiler.errors import CompileError, FileError, UsageError
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan, read_plan
from trainwright.compiler.resolve import resolve_spec
from trainwright.runtime.launch.bundle import open_bundle
from trainwright.runtime.manifest import PLAN_FILE, Manifest, file_hash


@dataclass(frozen=True)
class Files:
    """What a bundle holds: `programs` by stage, `content` by file name, and which files are not as they were compiled."""

    programs: Mapping[str, str]
    content: Mapping[str, bytes]
    edited: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """`kind`: "spec", "plan" or "bundle". `files`: None for a spec or a plan."""

    path: str
    kind: str
    plan: Plan
    files: Files | None


def read_side(path: Path, overrides: tuple[str, ...] = ()) -> Side:
    """What stands at `path`: a folder is a bundle, a JSON object with a schema_version a plan, all else a spec.

    Raises CompileError and, for a bundle that is damaged or of another version, RunError; UsageError for overrides of no spec.
    """
    if path.is_dir():
        side = _bundle(path)
    elif (text := _json_object(path)) is not None:
        side = Side(str(path), "plan", _plan(path, text), None)
    else:
        return Side(str(path), "spec", _planned(path, overrides), None)
    if overrides:
        raise UsageError(
            f"--set {overrides[0]}: {path} is a {side.kind}, whose values are decided; name its spec instead"
        )
    return side


def compiled(side: Side) -> Files | None:
    """The files of a side: those on disk, or those that its plan compiles to; None where no template emits a part of it."""
    if side.files is not None or not_emitted(side.plan):
        return side.files
    bundle = emit_bundle(side.plan)
    return Files(_programs(bundle.manifest), bundle.files, (), ())


def _planned(path: Path, overrides: tuple[str, ...]) -> Plan:
    try:
        return choose_plan(resolve_spec(load_spec(path, overrides)))
    except CompileError as error:
        # Of two specs, which one has no plan.
        named = str(error).startswith((f"{path}:", "--set"))
        raise error if named else type(error)(f"{path}: {error}") from error


def _json_object(path: Path) -> str | None:
    """The text of a JSON file that holds a plan, of whichever version; None for anything else, a missing file too."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except (OSError, ValueError, RecursionError):
        # A plan.json that an edit has broken is no spec either; YAML's complaint would mislead.
        return text if path.name == PLAN_FILE and path.is_file() else None
    return text if isinstance(raw, dict) and "schema_version" in raw else None


def _plan(path: Path, text: str) -> Plan:
    try:
        return read_plan(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: {error}; write the plan again: `trainwright plan SPEC --json`, or compile its spec"
        ) from error


def _bundle(path: Path) -> Side:
    manifest = open_bundle(path).manifest
    content: dict[str, bytes] = {}
    for name in manifest.files:
        if Path(name).name != name:
            raise FileError(
                f"{path}: its manifest lists {name!r}, which is no file of the bundle; compile its spec again"
            )
        try:
            content[name] = (path / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise FileError(f"{path / name}: cannot be read: {error.strerror or error}") from error
    if PLAN_FILE not in content:
        raise FileError(f"{path}: has no {PLAN_FILE}; compile its spec again")
    try:
        text = content[PLAN_FILE].decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path / PLAN_FILE}: byte {error.start} is not UTF-8; compile its spec again") from error
    edited = tuple(name for name, held in sorted(content.items()) if file_hash(held) != manifest.files[name])
    files = Files(_programs(manifest), content, edited, tuple(sorted(manifest.files.keys() - content.keys())))
    return Side(str(path), "bundle", _plan(path / PLAN_FILE, text), files)


def _programs(manifest: Manifest) -> dict[str, str]:
    return {stage.name: stage.program for stage in manifest.stages}
