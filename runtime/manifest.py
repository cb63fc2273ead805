"""The contract between compile and run: what `manifest.json` in a bundle holds. Standard library only.

Compatibility rule: adding a field with a default keeps SCHEMA_VERSION; anything else raises it.
A runtime reads its own version only.
"""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

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


@dataclass(frozen=True)
class Manifest:
    """A bundle's table of contents. `stages` stand in an order in which they can be executed."""

    schema_version: int
    name: str
    run_id: str  # identity of what is trained; decides whether a checkpoint may be resumed
    data_root: str  # as the user wrote it; "." where absent: relative inputs are resolved against it at run time
    stages: tuple[Stage, ...]
    files: dict[str, str]  # sha256 of every other file of the bundle, by name


class ManifestError(ValueError):
    """The text is no manifest that this version can read; the message says why."""


def write_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text: sorted keys, two spaces, a newline at the end."""
    return json.dumps(asdict(manifest), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(text: str) -> Manifest:
    """The inverse of `write_manifest`. Raises ManifestError for other versions and damaged text."""
    try:
        raw: dict[str, Any] = json.loads(text)
        version = raw["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(f"it is not a manifest ({type(error).__name__}: {error})") from error
    if version != SCHEMA_VERSION:
        raise ManifestError(f"it has schema version {version!r}; this trainwright reads version {SCHEMA_VERSION}")
    try:
        stages = tuple(_stage(stage) for stage in raw["stages"])
        return Manifest(**{**raw, "stages": stages})
    except (TypeError, KeyError, AttributeError) as error:
        raise ManifestError(f"it is damaged ({type(error).__name__}: {error})") from error


def _stage(raw: dict[str, Any]) -> Stage:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
    return Stage(**fields)


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
