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
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)  # what a gzip file that is none, or is cut, raises

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


@dataclass(frozen=True)
class JsonLine:
    """One line of a JSON Lines file: any JSON value, and where it stands."""

    value: Any
    file: str
    line: int  # from 1
    content: bytes

    def reject(self, reason: str) -> Rejected:
        """This line as one that cannot be used."""
        return Rejected(self.file, self.line, reason, excerpt(self.content))


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
    if path.name.endswith(JSONL_SUFFIXES):
        for item in read_json_lines(path, root):
            yield _document(item) if isinstance(item, JsonLine) else item
        return
    try:
        content = path.read_bytes() if path.suffix != ".gz" else gzip.decompress(path.read_bytes())
    except DAMAGED as error:
        yield _damaged(_name(path, root), 1, error)
    except OSError as error:
        raise _unreadable(path, error) from error
    else:
        yield _plain_text(content, _name(path, root))


def read_json_lines(path: Path, root: Path) -> Iterator[JsonLine | Rejected]:
    """The JSON values of one file, plain or .gz, a line each; blank lines are none.

    Raises DataError when the file cannot be opened.
    """
    name, number = _name(path, root), 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _json_line(line, name, number)
    except DAMAGED as error:
        yield _damaged(name, number + 1, error)
    except OSError as error:
        raise _unreadable(path, error) from error


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _damaged(name: str, line: int, error: Exception) -> Rejected:
    return Rejected(name, line, "damaged gzip file", f"{type(error).__name__}: {error}; the rest is not read")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror}; make it readable, or leave it out")


def _plain_text(content: bytes, name: str) -> Document | Rejected:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejected(name, 0, "invalid UTF-8", excerpt(content))
    if not text.strip():
        return Rejected(name, 0, "empty text", excerpt(content))
    return Document(text=text, id=name, path=name, group=None)


def _json_line(line: bytes, name: str, number: int) -> JsonLine | Rejected:
    try:
        decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return Rejected(name, number, "invalid UTF-8", excerpt(line))
    try:
        value = json.loads(decoded, parse_constant=_refuse_constant)
        if "\\u" in decoded:  # a lone surrogate is legal in JSON, as an escape, and not in UTF-8
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return Rejected(name, number, "invalid UTF-8", excerpt(line))
    except (ValueError, RecursionError):
        return Rejected(name, number, "invalid JSON", excerpt(line))
    return JsonLine(value, name, number, line)


def _document(item: JsonLine) -> Document | Rejected:
    record = item.value
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return item.reject('no string "text"')
    if not record["text"].strip():
        return item.reject("empty text")
    metadata = metadata_of(record)
    group = metadata.get("group")
    return Document(
        text=record["text"],
        id=id_of(item),
        path=item.file,
        group=None if group is None else str(group),
        metadata=metadata,
    )


def metadata_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record's `metadata`; empty where it has none."""
    metadata = record.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def id_of(item: JsonLine) -> str:
    """The `id` of the line's object, else its file and line."""
    identifier = item.value.get("id")
    return f"{item.file}:{item.line}" if identifier is None else str(identifier)


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
        text = source if kind == "code" else docstrings(parse_module(source))
    except UnicodeDecodeError:
        yield Rejected(name, 0, "invalid UTF-8", excerpt(content))
        return
    except SyntaxError:
        yield Rejected(name, 0, "invalid Python", excerpt(content))
        return
    if text.strip():
        yield Document(text=text, id=f"{kind}/{name}", path=name, group=stdlib_group(name))


def parse_module(source: str) -> ast.Module:
    """The syntax tree of a module. Raises SyntaxError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        return ast.parse(source)


def docstrings(tree: ast.Module) -> str:
    """All docstrings of a module, in its order, a blank line between them."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # ast.walk goes by depth; a reader goes by line
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text) + "\n"
