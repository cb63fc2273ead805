"""Where documents come from: files that a glob names, and the connector `python-stdlib`.

A reader yields a `Document` for what it can read and a `Rejected` for what it cannot, in an order that depends on
nothing but names and contents. It holds one document at a time, never a corpus.
"""

import ast
import glob
import gzip
import json
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.runtime.errors import DataError

CONNECTORS = ("python-stdlib:code", "python-stdlib:prose")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")  # Dolma and others name JSON lines .json
EXCERPT_CHARACTERS = 200

# Not text that a model should learn from: tests, generated tables, a deprecated parser's data, and what pip installed.
STDLIB_SKIPPED = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "encodings", "msilib", "site-packages", "dist-packages", "__pycache__")
)
# Modules that repeat each other's text under unrelated names.
STDLIB_TWINS = {"ntpath": "posixpath", "genericpath": "posixpath", "nturl2path": "posixpath"}


@dataclass(frozen=True)
class Document:
    """One text. `group` is what must not be divided between splits; None when the source names none."""

    text: str
    id: str
    path: str
    group: str | None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """Something that was to be a document and is not: `line` counts from 1; 0 where the whole file is meant."""

    file: str
    line: int
    reason: str
    content: str


def excerpt(content: bytes) -> str:
    """The first 200 characters of `content`, printable: bytes outside ASCII are escaped."""
    return content[:EXCERPT_CHARACTERS].decode("ascii", "backslashreplace")[:EXCERPT_CHARACTERS]


def find_files(pattern: str, root: Path) -> list[Path]:
    """The files that `pattern` names, relative to `root`, sorted. Raises DataError when there are none."""
    matches = sorted(glob.glob(pattern, root_dir=root, recursive=True))
    files = [root / match for match in matches if (root / match).is_file()]
    if not files:
        raise DataError(
            f"no file matches {pattern!r} in {root}; put the files there, or say where they are: --data-root DIR of"
            " `trainwright run`, or TRAINWRIGHT_DATA_ROOT for a program or launch.sh"
        )
    return files


def read_file(path: Path, root: Path) -> Iterator[Document | Rejected]:
    """The documents of one file: a JSON object a line for JSONL_SUFFIXES, else the whole file as one text.

    Blank lines are no documents. Raises DataError when the file cannot be opened.
    """
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as stream:
            if not path.name.endswith(JSONL_SUFFIXES):
                yield _plain_text(stream.read(), name)
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _json_line(line, name, number)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Rejected(name, number + 1, "damaged gzip file", f"{type(error).__name__}: {error}; the rest is not read")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; make it readable, or leave it out") from error


def _plain_text(content: bytes, name: str) -> Document | Rejected:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejected(name, 0, "invalid UTF-8", excerpt(content))
    if not text.strip():
        return Rejected(name, 0, "empty text", excerpt(content))
    return Document(text=text, id=name, path=name, group=None)


def _json_line(line: bytes, name: str, number: int) -> Document | Rejected:
    def reject(reason: str) -> Rejected:
        return Rejected(name, number, reason, excerpt(line))

    try:
        decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return reject("invalid UTF-8")
    try:
        record = json.loads(decoded, parse_constant=_refuse_constant)
        if "\\u" in decoded:  # a lone surrogate is legal in JSON, as an escape, and not in UTF-8
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return reject("invalid UTF-8")
    except (ValueError, RecursionError):
        return reject("invalid JSON")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return reject('no string "text"')
    if not record["text"].strip():
        return reject("empty text")
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    identifier, group = record.get("id"), metadata.get("group")
    return Document(
        text=record["text"],
        id=f"{name}:{number}" if identifier is None else str(identifier),
        path=name,
        group=None if group is None else str(group),
        metadata=metadata,
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def stdlib_files() -> list[tuple[Path, str]]:
    """The running interpreter's own modules: (file, name relative to the standard library), sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [(root / name, name) for name in names if not _is_skipped(name)]


def _is_skipped(name: str) -> bool:
    # config-3.x-<platform>/ and _sysconfigdata_* describe one machine, not the library.
    return not STDLIB_SKIPPED.isdisjoint(name.split("/")[:-1]) or name.startswith(("config-", "_sysconfigdata"))


def stdlib_group(name: str) -> str:
    """The top-level package of a module file, so that its implementations share a split.

    Leading underscores and a `_py` prefix go (`_pyio` is `io`, `_pydatetime` is `datetime`, `_strptime` is `strptime`),
    `sre_*` belongs to `re`, and the path modules, which repeat one another's docstrings, are one group.
    """
    top = name.split("/")[0].removesuffix(".py")
    bare = top.removeprefix("_py") if top.startswith("_py") else top.strip("_")
    bare = "re" if bare.startswith("sre_") else bare
    return STDLIB_TWINS.get(bare, bare)


def read_stdlib_file(path: Path, name: str, kind: str) -> Iterator[Document | Rejected]:
    """One module of the standard library as a document: its source (`code`), or all its docstrings (`prose`).

    Nothing for an empty module, and nothing as prose for one without docstrings.
    """
    content = path.read_bytes()
    try:
        source = content.decode("utf-8")
        text = source if kind == "code" else _docstrings(source)
    except UnicodeDecodeError:
        yield Rejected(name, 0, "invalid UTF-8", excerpt(content))
        return
    except SyntaxError:
        yield Rejected(name, 0, "invalid Python", excerpt(content))
        return
    if text.strip():
        yield Document(text=text, id=f"{kind}/{name}", path=name, group=stdlib_group(name))


def _docstrings(source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # ast.walk goes by depth; a reader goes by line
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text) + "\n"
