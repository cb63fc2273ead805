"""A bundle on disk: its manifest, the files edited since it was compiled, and the choice of stages for one run."""

import difflib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainwright.runtime.errors import BundleError
from trainwright.runtime.manifest import (
    MANIFEST_FILE,
    Manifest,
    ManifestError,
    Stage,
    file_hash,
    program_identity,
    read_manifest,
)

LAUNCHERS = ("python", "torchrun")
_WRITTEN = "the folder that `trainwright compile` wrote"


@dataclass(frozen=True)
class Bundle:
    """A folder whose manifest this runtime reads and whose programs are all there."""

    path: Path
    manifest: Manifest

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.manifest.stages

    def program_id(self, stage: Stage) -> str:
        """`program_identity` of the program as it is on disk now. Raises BundleError where it does not parse."""
        try:
            return program_identity((self.path / stage.program).read_text(encoding="utf-8"))
        except SyntaxError as error:
            raise BundleError(
                f"{stage.program}:{error.lineno or 1}: {error.msg}; correct the edit, or move the file away and compile"
                f" again: `trainwright compile SPEC -o {self.path}`"
            ) from error
        except (ValueError, OSError) as error:  # ValueError: not UTF-8, or a null byte
            raise BundleError(
                f"{stage.program}: cannot be read ({error}); make it readable, or move it away and"
                f" compile again: `trainwright compile SPEC -o {self.path}`"
            ) from error


def open_bundle(path: Path) -> Bundle:
    """Read `path`'s manifest. Raises BundleError where there is none, it is damaged or of another version, or lacks a program."""
    file = path / MANIFEST_FILE
    # The same folder may be refused by `compile`, which overwrites nothing that it cannot tell to be its own.
    anew = (
        "compile its spec into another folder (`trainwright compile SPEC -o FOLDER`) and run that;"
        f" --work {path / 'work'} goes on with what is done"
    )
    try:
        manifest = read_manifest(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path}: {_no_bundle(path)}") from None
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}); make it readable") from error
    except (ManifestError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: {error}; {anew}") from error
    fault = _fault(path, manifest)
    if fault:
        raise BundleError(f"{file}: {fault}; {anew}")
    return Bundle(path=path, manifest=manifest)


def _no_bundle(path: Path) -> str:
    """Why `path` is none, and what to do; only commands that will not be refused."""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        folder = path.with_suffix("")
        if folder.exists() and not (folder / MANIFEST_FILE).exists():
            folder = path.with_name(f"{path.stem}-bundle")
        return (
            f"is a spec, not a bundle; compile it, then run what that wrote:\n"
            f"trainwright compile {path} -o {folder}\ntrainwright run {folder}"
        )
    if os.path.isfile(path):
        inside = (path.parent / MANIFEST_FILE).is_file()
        return f"is a file, a bundle is a folder; name {path.parent if inside else _WRITTEN}"
    if glob.glob("*", root_dir=path, include_hidden=True):
        return f"no {MANIFEST_FILE} there, so it is not a bundle; name {_WRITTEN}"
    what = f"no {MANIFEST_FILE} there, so it is not a bundle" if os.path.isdir(path) else "there is no such folder"
    return f"{what}; make a bundle with `trainwright compile SPEC -o {path}`"


def _fault(path: Path, manifest: Manifest) -> str:
    """What keeps the stages from being executed, or ""."""
    seen: set[str] = set()
    if "\0" in manifest.data_root:
        return f"it is damaged (data_root {manifest.data_root!r})"
    for name in (MANIFEST_FILE, *manifest.files):
        real = os.path.realpath(path / name)
        if not real.startswith(os.path.realpath(path) + os.sep):
            return f"{name} leads out of the bundle, to {real}: a bundle is whole in itself; put the file in the link's place"
    for stage in manifest.stages:
        # A name is a folder below work/, a program a file of the bundle: neither may lead elsewhere.
        if Path(stage.name).name != stage.name or not stage.name.isprintable() or stage.name in ("", "..", *seen):
            return f"it is damaged (stage name {stage.name!r})"
        if stage.launcher not in LAUNCHERS:
            return f"stage {stage.name} has the launcher {stage.launcher!r}; known are {' and '.join(LAUNCHERS)}"
        if Path(stage.program).name != stage.program or not (path / stage.program).is_file():
            return f"the program {stage.program} of stage {stage.name} is missing"
        if min(stage.nodes, stage.processes_per_node) < 1:
            return f"stage {stage.name} has {stage.nodes} nodes of {stage.processes_per_node} processes"
        late = [need for need in stage.needs if need not in seen]
        if late:
            return f"stage {stage.name} needs {late[0]}, which does not stand before it"
        seen.add(stage.name)
    return ""


def edited_files(bundle: Bundle) -> list[str]:
    """Names of the bundle's files that are not as compiled, each with what happened to it."""
    notes = []
    for name, compiled in sorted(bundle.manifest.files.items()):
        try:
            if file_hash((bundle.path / name).read_bytes()) != compiled:
                notes.append(f"edited by hand: {name}")
        except OSError:
            notes.append(f"missing from the bundle: {name}")
    return notes


def choose_stages(bundle: Bundle, only: Sequence[str], start: str) -> tuple[list[Stage], set[str]]:
    """(stages to consider, in order; names of those that run even if nothing changed). Raises BundleError for unknown names.

    `only` and `start` exclude each other: the one picks among what is not done, the other has done things done again.
    """
    if only and start:
        raise BundleError("--only and --from cannot be combined; give one of them")
    names = [stage.name for stage in bundle.stages]
    for name in (*only, *([start] if start else [])):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BundleError(f"{bundle.path}: no stage is called {name!r}; {hint}its stages are {', '.join(names)}")
    chosen = [stage for stage in bundle.stages if not only or stage.name in only]
    forced = set(names[names.index(start) :]) if start else set()
    return chosen, forced
