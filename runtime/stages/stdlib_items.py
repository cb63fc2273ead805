"""The functions, methods and classes of the running interpreter's library whose docstrings begin with a sentence."""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainwright.runtime.stages.connectors import Rejected, docstrings, parse_module, stdlib_files, stdlib_group
from trainwright.runtime.stages.repeats import normalise
from trainwright.runtime.stages.split import SplitRule

FEWEST_WORDS, MOST_WORDS = 4, 30
SENTENCE = re.compile(r".*?[.!?](?=\s|$)")
# A signature ("S.pop([index]) -> item"), a doctest or a production of a grammar is no sentence.
NO_SENTENCE = re.compile(r"^[\w.]+\(|->|=>|<=>|>>>|::=|\s=\s")


@dataclass(frozen=True)
class Item:
    """A documented function, method or class. `arguments` are names, without `self`."""

    name: str  # dotted, with its module
    module: str
    call: str  # without the module: "Queue.put(item, block)"; a class without __init__ is its bare name
    kind: str  # "function" | "method" | "class"
    arguments: tuple[str, ...]
    summary: str
    group: str
    file: str
    line: int


@dataclass(frozen=True)
class _Module:
    group: str
    text: str  # its docstrings, normalised
    items: tuple[Item, ...]
    rejected: tuple[Rejected, ...]


def read_items(rule: SplitRule) -> tuple[dict[str, list[Item]], list[Rejected]]:
    """The items of each split in the order of files and lines, and what is no item.

    Every summary occurs once, and no held-out one in a docstring of a training group.
    """
    modules = _read_modules()
    splits = {module.group: rule.of(module.group, "") for module in modules}
    trained = f" {' '.join(module.text for module in modules if splits[module.group] == 'train')} "
    rejected = [item for module in modules for item in module.rejected]
    items: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    summaries: set[str] = set()
    names: set[str] = set()
    for split, kept in items.items():
        for item in (item for module in modules if splits[module.group] == split for item in module.items):
            normalised = normalise(item.summary)
            if split != "train" and f" {normalised} " in trained:
                rejected.append(_reject(item, "held out, and its summary stands in a training docstring"))
            elif normalised in summaries or item.name in names:
                rejected.append(_reject(item, "its summary or name occurred before"))
            else:
                summaries.add(normalised)
                names.add(item.name)
                kept.append(item)
    return items, rejected


@functools.cache  # the library does not change while a process runs, and an evaluation asks for it three times
def _read_modules() -> tuple[_Module, ...]:
    return tuple(module for path, name in stdlib_files() if (module := _read_module(path, name)) is not None)


def _read_module(path: Path, name: str) -> _Module | None:
    """None for a file that is no module of this Python version in UTF-8: ingest sets it aside."""
    try:
        tree = parse_module(path.read_bytes().decode("utf-8"))
    except (UnicodeDecodeError, SyntaxError):
        return None
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = [_item(node, parents, module, name) for node, parents in _definitions(tree.body, ())]
    return _Module(
        group=stdlib_group(name),
        text=normalise(docstrings(tree)),
        items=tuple(item for item in found if isinstance(item, Item)),
        rejected=tuple(item for item in found if isinstance(item, Rejected)),
    )


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(body: list[ast.stmt], parents: tuple[str, ...]) -> Iterator[tuple[_Definition, tuple[str, ...]]]:
    """Documented definitions, and the classes that each is in; those inside functions are nobody's interface."""
    for node in body:
        if isinstance(node, _Definition):
            if ast.get_docstring(node):
                yield node, parents
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, (*parents, node.name))
        elif isinstance(node, ast.If | ast.Try):  # for a platform, or where an accelerated module is missing
            handlers = node.handlers if isinstance(node, ast.Try) else []
            final = node.finalbody if isinstance(node, ast.Try) else []
            for part in (node.body, *(handler.body for handler in handlers), node.orelse, final):
                yield from _definitions(part, parents)


def _item(node: _Definition, parents: tuple[str, ...], module: str, file: str) -> Item | Rejected:
    summary = summarise(ast.get_docstring(node) or "")
    if NO_SENTENCE.search(summary):
        return Rejected(file, node.lineno, "its docstring begins with no sentence", summary)
    if not FEWEST_WORDS <= len(summary.split()) <= MOST_WORDS:
        return Rejected(file, node.lineno, f"no summary of {FEWEST_WORDS} to {MOST_WORDS} words", summary)
    path = ".".join((*parents, node.name))
    arguments = _arguments(node, is_method=bool(parents))
    return Item(
        name=f"{module}.{path}",
        module=module,
        call=path if arguments is None else f"{path}({', '.join(arguments)})",
        kind="class" if isinstance(node, ast.ClassDef) else "method" if parents else "function",
        arguments=arguments or (),
        summary=summary,
        group=stdlib_group(file),
        file=file,
        line=node.lineno,
    )


def summarise(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line; the whole paragraph where no sentence ends."""
    paragraph = " ".join(docstring.strip().split("\n\n", 1)[0].split())
    sentence = SENTENCE.match(paragraph)
    return sentence.group() if sentence else paragraph


def _arguments(node: _Definition, *, is_method: bool) -> tuple[str, ...] | None:
    """Names; of a class, those of its own __init__, and None where it has none."""
    if isinstance(node, ast.ClassDef):
        functions = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__")
        init = next(functions, None)
        return None if init is None else _arguments(init, is_method=True)
    plain = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in node.decorator_list)
    if is_method and not static:
        plain = plain[1:]
    starred = [f"*{node.args.vararg.arg}"] if node.args.vararg else []
    named = [argument.arg for argument in node.args.kwonlyargs]
    double = [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
    return (*plain, *starred, *named, *double)


def _reject(item: Item, reason: str) -> Rejected:
    return Rejected(item.file, item.line, reason, item.summary)
