"""Starter specs for `trainwright init`: the commented files of `specs/`, and the schema that lets an editor complete them."""

import difflib
import json
from importlib import resources
from pathlib import Path

from trainwright.compiler.errors import FileError, UsageError
from trainwright.compiler.schema import SCHEMA_FILE, spec_schema


def write_starter(preset: str, path: Path) -> tuple[Path, Path]:
    """(spec, schema) as written; `path` is the spec or a folder for it. Raises UsageError, FileError; overwrites no spec."""
    presets = {
        Path(entry.name).stem: entry
        for entry in resources.files("trainwright.specs").iterdir()
        if entry.name.endswith(".yaml")
    }
    if preset not in presets:
        near = difflib.get_close_matches(preset, presets, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(presets))}"
        raise UsageError(f"--preset {preset}: there is no such preset; {hint}")
    spec = path / f"{preset}.yaml" if path.is_dir() else path
    schema = spec.with_name(SCHEMA_FILE)
    text = f"# yaml-language-server: $schema={SCHEMA_FILE}\n{presets[preset].read_text(encoding='utf-8')}"
    try:
        spec.parent.mkdir(parents=True, exist_ok=True)
        with spec.open("x", encoding="utf-8") as file:
            file.write(text)
        schema.write_text(json.dumps(spec_schema(), indent=2) + "\n", encoding="utf-8")
    except FileExistsError as error:
        raise FileError(f"{spec}: exists already, and is left as it is; name another file") from error
    except OSError as error:
        raise FileError(f"{spec}: cannot be written: {error.strerror or error}") from error
    return spec, schema
