"""A spec's text as plain data in which every value knows its place: YAML 1.2 from a file, then `--set path=value` over it.

Built from YAML's node tree, not by a constructor: duplicate keys are errors, tags are refused, and a place is kept for each path.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from trainwright.compiler.errors import FileError, SpecError, UsageError

_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_STEP = re.compile(r"(?:^|\.)(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")


@dataclass
class Document:
    """`data`: mappings, lists and scalars. `where`: path ("data.sources[0].weight") -> "file:line" or "--set path=value"."""

    file: str  # as the user wrote it
    data: dict[str, Any]
    where: dict[str, str]
    overrides: tuple[str, ...] = field(default=())

    def place(self, path: str) -> str:
        """Where `path` stands; for one that is absent, where the nearest part around it stands."""
        while path and path not in self.where:
            path = parent(path)
        return self.where.get(path, f"{self.file}:1")


def parent(path: str) -> str:
    """The path of what holds `path`; "" for the top."""
    return path[: path.rindex("[")] if path.endswith("]") else path.rpartition(".")[0]


def join(parts: Iterable[str | int]) -> str:
    """("data", "sources", 0, "weight") -> "data.sources[0].weight"."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def load_document(path: Path, overrides: tuple[str, ...] = ()) -> Document:
    """The file with the overrides applied.

    Raises FileError, SpecError (syntax; every duplicate key and tag), UsageError (a malformed `--set`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileError(
            f"{path}: there is no such file{_nearest_file(path)}; `trainwright init` writes a starter spec"
        ) from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: byte {error.start} is not UTF-8; save the spec as UTF-8 text") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error
    data, where = _parse(text, str(path))
    if not isinstance(data, dict):
        held = "nothing" if data is None else _word(data)
        raise SpecError(f"{path}:1: a spec is a mapping of keys such as `name:` and `model:`; the file holds {held}")
    document = Document(str(path), data, where, overrides)
    for override in overrides:
        _apply(document, override)
    return document


def _nearest_file(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def _parse(text: str, source: str, line_of: bool = True) -> tuple[Any, dict[str, str]]:
    """(data, places) of YAML text. `line_of`: places are `source:line`, otherwise `source` itself."""
    try:
        node = YAML(typ="rt", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{source}:{mark.line + 1}" if line_of and mark is not None else source
        raise SpecError(f"{at}: {_syntax_problem(error)}") from error
    except YAMLError as error:  # a control character, which has no mark
        raise SpecError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise SpecError(f"{source}: nested too deeply to be a spec") from error
    builder = _Builder(source, line_of)
    data = None if node is None else builder.build(node, "", ())
    if builder.problems:
        raise SpecError("\n".join(builder.problems))
    return data, builder.where


def _syntax_problem(error: MarkedYAMLError) -> str:
    problem = " ".join(str(error.problem or error.context).split())
    if "'\\t'" in problem or "tab" in problem:
        return "a tab in the indentation; YAML is indented with spaces"
    if "mapping values are not allowed" in problem:
        return "not YAML: a second `: ` in one line; put a text that holds one in quotes, and one key on a line"
    if "another document" in problem:
        return "a second document (`---`); a spec is one document"
    return f"not YAML: {problem}"


@dataclass
class _Builder:
    source: str
    line_of: bool
    where: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, node: Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}" if self.line_of else self.source

    def build(self, node: Node, path: str, around: tuple[int, ...]) -> Any:
        self.where.setdefault(path, self.place(node))
        if id(node) in around:
            self.problems.append(f"{self.place(node)}: {path or 'the spec'}: an alias (*) that contains itself")
            return None
        around = (*around, id(node))
        kind = str(node.ctag).removeprefix("tag:yaml.org,2002:")
        if isinstance(node, MappingNode) and kind == "map":
            return self._mapping(node, path, around)
        if isinstance(node, SequenceNode) and kind == "seq":
            return [self.build(item, f"{path}[{index}]", around) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and kind in _SCALARS:
            if _UNUSABLE.search(node.value):
                self.problems.append(
                    f"{self.place(node)}: {path}: {node.value!a} holds a character that no path or program can hold"
                    " (a null byte, or half of a pair of surrogates); take it out"
                )
                return None
            try:
                return _scalar(kind, node.value)
            except ValueError:  # an explicit tag: !!int x
                self.problems.append(f"{self.place(node)}: {path}: {node.value!r} is no {kind}")
                return None
        self.problems.append(
            f"{self.place(node)}: {path or 'the spec'}: the tag {kind!r}; a spec holds plain values only"
        )
        return None

    def _mapping(self, node: MappingNode, path: str, around: tuple[int, ...]) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.problems.append(f"{self.place(key_node)}: {path or 'the spec'}: a key that is no word")
                continue
            key = str(key_node.value)
            key_path = f"{path}.{key}" if path else key
            if key in built:
                first = self.where[key_path]
                self.problems.append(
                    f"{self.place(key_node)}: {key_path}: the key stands here a second time (first: {first}); keep one"
                )
                continue
            # The key's line, which is where a person looks, and not that of a value on the next line.
            self.where[key_path] = self.place(key_node)
            built[key] = self.build(value_node, key_path, around)
        return built


_SCALARS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")


def _scalar(kind: str, text: str) -> Any:
    """A YAML 1.2 scalar (core schema); dates and `<<` are not in that schema, so they are text."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        digits = text.replace("_", "")
        base = {"0x": 16, "0o": 8, "0b": 2}.get(digits.lstrip("+-")[:2].lower(), 10)
        return int(digits, base)
    if kind == "float":
        plain = text.replace("_", "").lower()
        return float(plain.replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _apply(document: Document, override: str) -> None:
    """One `--set path=value`: the value replaces what stands at the path, or adds it."""
    place = f"--set {override}"
    path, equals, text = override.partition("=")
    steps = list(_steps(path.strip()))
    if not equals or not steps:
        raise UsageError(f"{place}: not of the form path=value, such as --set training.learning_rate=3e-4")
    value, places = _parse(text, place, line_of=False)
    holder: Any = document.data
    for index, step in enumerate(steps[:-1]):
        holder = _enter(holder, step, join(steps[: index + 1]), place)
    last, full = steps[-1], join(steps)
    if isinstance(last, int):
        _enter(holder, last, full, place)
        holder[last] = value
    elif isinstance(holder, dict):
        holder[last] = value
    else:
        raise UsageError(f"{place}: {join(steps[:-1])} holds {_word(holder)}, which has no keys")
    for known in [known for known in document.where if known == full or known.startswith((f"{full}.", f"{full}["))]:
        del document.where[known]
    for below in places:
        document.where[full + (below if below.startswith("[") or not below else f".{below}")] = place


def _steps(path: str) -> Iterator[str | int]:
    """ "data.sources[0].weight" -> "data", "sources", 0, "weight"; nothing when the path is malformed."""
    matches = list(_STEP.finditer(path))
    if "".join(match[0] for match in matches) != path:
        return
    for match in matches:
        yield match["key"] if match["key"] is not None else int(match["index"])


def _enter(holder: Any, step: str | int, path: str, place: str) -> Any:
    """What stands at `step` of `holder`; a mapping that is missing is made."""
    if isinstance(step, int):
        if not isinstance(holder, list):
            raise UsageError(f"{place}: {parent(path)} holds {_word(holder)}, which has no items")
        if step >= len(holder):
            raise UsageError(f"{place}: there is no {path}: {parent(path)} has {len(holder)} items, counted from [0]")
        return holder[step]
    if not isinstance(holder, dict):
        raise UsageError(f"{place}: {parent(path)} holds {_word(holder)}, which has no keys")
    if holder.get(step) is None:
        holder[step] = {}
    return holder[step]


def _word(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else f"the value {value!r}"
