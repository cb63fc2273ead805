"""No text of a spec becomes code: programs, launcher and README of hostile texts are those of harmless ones, but for constants.

Where a spec takes text is found in its schema. A bundle of hostile texts is compared with one of harmless texts in the same
places; the launcher is executed with stand-ins for `python` and `torchrun`, beside a command `canary` that hostile texts call.
"""

import ast
import copy
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import Bundle, emit_bundle
from trainwright.compiler.emit_manifest import LAUNCHER_OF_KIND
from trainwright.compiler.errors import CompileError
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import read_plan, write_plan
from trainwright.compiler.resolve import resolve_spec
from trainwright.compiler.schema import spec_schema
from trainwright.compiler.write import write_bundle
from trainwright.runtime.manifest import Stage, read_manifest

# Between them these render every template, with everything that a template shows of a spec.
_WHOLE: dict[str, Any] = {
    "name": "whole",
    "model": {"family": "llama", "size": "1.1M", "context_length": 256, "vocab_size": 2048, "precision": "fp32"},
    "data": {
        "root": "data",
        "sources": [
            {"name": "one", "path": "one/*.txt", "weight": 1.0},
            {"name": "two", "path": "two.txt", "weight": 2.0},
        ],
        "tokens": "2.9M",
    },
    "training": {"global_batch": "16 sequences"},
    "compute": {"device": "cpu", "nodes": 1, "devices_per_node": 2},
    "cluster": {"price": "$1/device-hour", "costs": [{"name": "staff", "amount": "$5"}]},
    "stages": {
        **{kind: {"kind": kind} for kind in ("ingest", "curate", "tokenizer", "tokenize", "pretrain")},
        "sft": {"kind": "sft", "from": "pretrain", "data": "chat.jsonl", "chat_template": "chat.jinja"},
        "dpo": {"kind": "dpo", "from": "sft", "data": "pairs.jsonl"},
        "evaluate": {
            "kind": "evaluate",
            "from": "dpo",
            "tasks": {"exam": {"data": "exam.jsonl"}},
            "gates": {"accuracy/exam": 0.25},
        },
        "export": {"kind": "export", "from": "evaluate"},
        # Models that are compared come from the same one, so both texts are this one.
        "again": {"kind": "sft", "from": "a/model", "data": "more.jsonl"},
        "look": {"kind": "evaluate", "compare": ["a/model"]},
    },
}
_NODES: dict[str, Any] = copy.deepcopy(_WHOLE) | {
    "model": {**_WHOLE["model"], "initial": "a/start", "precision": "bf16"},
    "compute": {"device": "h100-sxm-80gb", "nodes": 2, "devices_per_node": 8},
}
del _NODES["data"]["sources"][0]["weight"], _NODES["data"]["sources"][1]["weight"]
BASES = {"whole": _WHOLE, "nodes": _NODES}

Place = tuple[str | int, ...]  # the keys and indices that lead to a text; "*" before a key: the key itself

# Whatever is looked up must be known: a hostile text there is refused, as every text with a pattern, a unit or a list of words.
LOOKED_UP = {("model", "family"), ("compute", "device"), ("scaling", "law")}
TITLES = {("cluster", "costs", 0, "name")}  # one line of printable characters: some hostile texts are none

PIECES = [
    *(
        "$(canary)",
        "`canary`",
        ";canary;",
        "\ncanary\n",
        "&& canary ",
        "| canary #",
        "${IFS}",
        "$HOME",
        "\\",
        "'",
        '"',
        '"""',
    ),
    *(
        "'''",
        "')\n__import__('os').system('canary')\n('",
        '"); canary(); ("',
        "{{ 7 * 7 }}",
        "{% include 'x' %}",
        "{# #}",
    ),
    *(
        "../",
        "/",
        "..",
        "-",
        "--",
        "~",
        "*",
        "\n# heading\n",
        "|x|y|\n",
        "\n\n",
        "`",
        "```\n",
        "<!--",
        "-->",
        "[a](b)",
        "\r",
    ),
    *(
        "\t",
        "\x1b[0m",
        "\x85",
        "\u2028",
        "\u202e",
        "é",
        "中",
        "\U0001f600",
        "%s",
        "{x}",
        "EOF\n",
        "\x7f",
        "#",
        "!",
        "&",
        " ",
    ),
]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=6).map("".join)
ALL_AT_ONCE = (
    '/\'"\'; canary; $(canary)`canary`\ncanary\n{{ 7 * 7 }}{% raw %}../../|#\\\U0001f600"""\n# heading\n|x|y|\n'
)


def _follow(node: Mapping[str, Any]) -> Mapping[str, Any]:
    return SCHEMA["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


SCHEMA = spec_schema()


def _places(node: Mapping[str, Any], raw: Any, path: Place = ()) -> Iterator[tuple[Place, bool]]:
    """(place, whether any text may stand there, as far as the schema says) of all texts and keys in a spec like `raw`."""
    node = _follow(node)
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if "string" in (node.get("type"), *(node["type"] if isinstance(node.get("type"), list) else ())):
        yield path, not node.keys() & {"enum", "const", "pattern", "x-unit"}
    elif node.get("type") == "array":
        for index in range(len(raw or ())):
            yield from _places(node["items"], raw[index], (*path, index))
    elif "patternProperties" in node:
        (held,) = node["patternProperties"].values()
        for key in raw or ():
            yield (*path, "*", key), False
            yield from _places(held, raw[key], (*path, key))
    for name, held in node.get("properties", {}).items():
        if path != ("stages",) and kind in _follow(held).get("x-kinds", held.get("x-kinds", (kind,))):
            yield from _places(held, (raw or {}).get(name), (*path, name))


@cache
def places(base: str) -> dict[Place, bool]:
    return dict(_places(SCHEMA, BASES[base]))


def free(base: str) -> list[Place]:
    """Where a spec like this takes any text, and has one."""
    return [
        place for place, any_text in places(base).items() if any_text and place not in LOOKED_UP and _held(base, place)
    ]


def _held(base: str, place: Place) -> Any:
    """What a spec holds at a place; None: nothing."""
    held: Any = BASES[base]
    for step in place:
        held = held[step] if isinstance(held, list) else held.get(step) if isinstance(held, dict) else None
    return held


def _with(base: str, texts: Mapping[Place, str]) -> dict[str, Any]:
    spec = copy.deepcopy(BASES[base])
    for place, text in texts.items():
        holder: Any = spec
        keyed = place[-2:-1] == ("*",)
        for step in place[: -2 if keyed else -1]:
            holder = holder.setdefault(step, {}) if isinstance(holder, dict) else holder[step]
        if keyed:
            holder[text] = holder.pop(place[-1])
        else:
            holder[place[-1]] = text
    return spec


def _named(place: Place) -> str:
    path = ""
    for step in place:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _compiled(spec: Mapping[str, Any], folder: Path) -> Bundle:
    """The bundle of a spec that goes the whole way, from a file on."""
    text = json.dumps(spec, ensure_ascii=False)
    file = folder / "spec.yaml"
    # Escaped as YAML does it: characters beyond U+FFFF are two surrogates in JSON.
    file.write_text(re.sub(r"[^\x20-\x7e]", lambda found: f"\\U{ord(found[0]):08x}", text))
    plan = choose_plan(resolve_spec(load_spec(file)))
    assert read_plan(write_plan(plan)) == plan
    return emit_bundle(plan)


@dataclass(frozen=True)
class Compiled:
    bundle: Bundle
    texts: Mapping[Place, str]  # those that were not refused


def _as_far_as_accepted(base: str, texts: Mapping[Place, str], folder: Path) -> Compiled:
    """Compiled with the texts that the compiler accepts. Each refusal names the places of texts that it refuses."""
    left = dict(texts)
    while True:
        try:
            return Compiled(_compiled(_with(base, left), folder), left)
        except CompileError as error:
            refused = {left[place] for place in left if f"{_named(place)}: " in str(error)}
            if not refused:
                raise
            left = {place: text for place, text in left.items() if text not in refused}


@cache
def _harmless(base: str, chosen: frozenset[Place], folder: Path) -> Bundle:
    """With a path of its own in each of the chosen places: what makes a hostile text a path makes these one."""
    texts = {place: f"plain/{_held(base, place)}" for place in chosen - TITLES}
    return _compiled(_with(base, texts), folder)


# ---- what must hold


def _skeleton(tree: ast.AST) -> str:
    """A program but for its texts."""
    blank = copy.deepcopy(tree)
    for node in ast.walk(blank):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(blank)


def _texts(tree: ast.Module) -> list[str]:
    found = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [text for text in found if text != ast.get_docstring(tree, clean=False)]


def check_programs(hostile: Compiled, plain: Bundle) -> None:
    """The same code; where a text differs, it is one of the spec's to the letter, or an identity."""
    given = set(hostile.texts.values())
    for name in (stage.program for stage in plain.manifest.stages):
        tree, expected = (ast.parse(bundle.files[name]) for bundle in (hostile.bundle, plain))
        assert _skeleton(tree) == _skeleton(expected), name
        docstrings = [re.sub(r"run [0-9a-f]{8}", "", ast.get_docstring(each) or "") for each in (tree, expected)]
        assert docstrings[0] == docstrings[1]
        for text, other in zip(_texts(tree), _texts(expected), strict=True):
            assert text == other or text in given or re.fullmatch("[0-9a-f]{8}", text), (name, text)


def check_names(hostile: Compiled, plain: Bundle, folder: Path) -> None:
    """The files of the bundle, and no others, are written; the manifest names no file elsewhere."""
    assert hostile.bundle.files.keys() == plain.files.keys()
    manifest = read_manifest(hostile.bundle.files["manifest.json"].decode())
    assert replace(manifest, seal="") == hostile.bundle.manifest  # sealed as it is written
    named = [*hostile.bundle.files, *manifest.files]
    for stage in manifest.stages:
        named += [stage.name, stage.program, *stage.outputs]
    assert all(Path(name).name == name and name not in ("", "..") for name in named)
    before = _tree(folder)
    write_bundle(hostile.bundle, folder / "bundle")
    assert _tree(folder) - before == {"bundle", *(f"bundle/{name}" for name in hostile.bundle.files)}


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check_readme(hostile: Compiled, plain: Bundle) -> None:
    """The same headings, rows, paragraphs and spans."""
    shapes = []
    for bundle in (hostile.bundle, plain):
        text = bundle.files["README.md"].decode()
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        inner = [[(child.type, child.tag) for child in token.children or ()] for token in tokens]
        shapes.append((len(text.splitlines()), [(token.type, token.tag) for token in tokens], inner))
    assert shapes[0] == shapes[1]


_FAKE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" "$TRAINWRIGHT_DATA_ROOT" >>"$CALLS"
"""


def _launched(bundle: Path, where: Path, scratch: Path) -> tuple[list[str], str]:
    """What `launch.sh` starts when it is called in the folder `where`: all words, but for the data root in its place."""
    fakes, calls = scratch / "fakes", scratch / "calls"
    fakes.mkdir(exist_ok=True)
    for name, text in {"python": _FAKE, "torchrun": _FAKE, "canary": '#!/bin/bash\necho >"$CANARY"\n'}.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    calls.write_bytes(b"")
    environment = {"PATH": f"{fakes}:/usr/bin:/bin", "CALLS": str(calls), "CANARY": str(scratch / "canary")}
    environment |= {"HEAD": "head", "NODE_RANK": "0", "OLDPWD": "/", "CDPATH": "/", "HOME": "/"}
    for flags in (["-n"], []):
        command = ["/bin/bash", *flags, str(bundle / "launch.sh")]
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert not calls.read_bytes() or not flags
    words = calls.read_bytes().decode().split("\0")[:-1]
    (root,) = {word for word in words if word == "" or word.startswith("/")} or {""}
    return [word for word in words if word != root], root


def _command(plain: Bundle, stage: Stage) -> list[str]:
    """The words of the line that starts a stage, as the docstring of its program has them."""
    docstring = ast.get_docstring(ast.parse(plain.files[stage.program])) or ""
    (line,) = re.findall(r"^Run: +(.*)$", docstring, re.MULTILINE)
    return shlex.split(line.replace("$HEAD", "head"))


def check_launcher(hostile: Compiled, base: str, plain: Bundle, folder: Path) -> None:
    """The same commands, with the data root of the spec, and none of a text's own."""
    outside = folder / "started"
    deep = outside / "deep" / "er"  # where `../..` still is within
    deep.mkdir(parents=True)
    root = hostile.texts.get(("data", "root"), BASES[base]["data"]["root"])
    target = Path(os.path.normpath(deep / root))
    inside = target.is_relative_to(outside) and all(len(part.encode()) < 256 for part in target.parts)
    for place in (deep / root, deep / "plain/data"):
        if place != deep / root or inside:
            place.mkdir(parents=True, exist_ok=True)
    expected = [word for stage in plain.manifest.stages for word in _command(plain, stage)]
    before = _tree(outside)
    words, told = _launched(folder / "bundle", deep, folder)
    assert words == expected
    assert not inside or told == str(target).rstrip("\n")  # $(...) drops line ends, which is all it does
    assert _tree(outside) == before
    assert not (folder / "canary").exists()


def check(base: str, texts: Mapping[Place, str], folder: Path, launch: bool = True) -> Compiled:
    """Compile with the texts and hold all that is written against the bundle of harmless ones."""
    folder.mkdir(parents=True)
    hostile = _as_far_as_accepted(base, texts, folder)
    plain = _harmless(base, frozenset(hostile.texts), folder)
    check_programs(hostile, plain)
    check_names(hostile, plain, folder)
    check_readme(hostile, plain)
    if launch:
        check_launcher(hostile, base, plain, folder)
    return hostile


# ---- tests


def test_the_specs_render_every_template_and_fill_every_free_text() -> None:
    """A text that a later version of the spec takes has to be added to a spec above."""
    kinds = {stage["kind"] for stage in _WHOLE["stages"].values()}
    assert kinds == LAUNCHER_OF_KIND.keys()
    any_text = {place for base in BASES for place, accepted in places(base).items() if accepted}
    assert any_text >= LOOKED_UP | TITLES
    filled = {_field(place) for base in BASES for place in free(base)}
    assert {_field(place) for place in any_text - LOOKED_UP} == filled


def _field(place: Place) -> str:
    """The key that a text belongs to."""
    return next(step for step in reversed(place) if isinstance(step, str))


@pytest.mark.parametrize("base", BASES)
def test_a_hostile_text_in_every_free_place_at_once(base: str, tmp_path: Path) -> None:
    """All are accepted there but a title of several lines."""
    texts = {place: f"{_held(base, place)}{ALL_AT_ONCE}" for place in free(base)}
    compiled = check(base, texts, tmp_path / "all")
    assert texts.keys() - compiled.texts.keys() <= TITLES


@pytest.mark.parametrize("root", ["-", "-P", "~", "../..", ".", " ", "tmp", "`", "\x1b[0m"])
def test_a_data_root_is_a_folder_whatever_it_is_called(root: str, tmp_path: Path) -> None:
    """`tmp` is in CDPATH, `-` is OLDPWD."""
    check("whole", {("data", "root"): root}, tmp_path / "root")


def test_a_hostile_text_elsewhere_is_refused_by_name(tmp_path: Path) -> None:
    """Names, quantities, words and keys: alone, or beside a value that is one."""
    _, plain = _refusal_or_files(BASES["whole"], tmp_path)
    for place, any_text in places("whole").items():
        if any_text and place not in LOOKED_UP:
            continue
        held = place[-1] if place[-2:-1] == ("*",) else _held("whole", place) or "x"
        section = _named(place[:-2] if place[-2:-1] == ("*",) else place)
        for text in (f"{held}{ALL_AT_ONCE}", f"../{held}", f"{held}\n"):
            problem, files = _refusal_or_files(_with("whole", {place: text}), tmp_path)
            # White space around a quantity counts for nothing.
            assert section in problem or (text == f"{held}\n" and files == plain), (place, text, problem)


def _refusal_or_files(spec: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, bytes]]:
    try:
        files = _compiled(spec, folder).files
    except CompileError as error:
        return str(error), {}
    return "", {name: content for name, content in files.items() if name.endswith((".py", ".sh", ".md"))}


@pytest.mark.parametrize("text", ["a\x00b", "\ud800", "x/\udfff"])
def test_what_no_file_can_be_called_is_refused(text: str, tmp_path: Path) -> None:
    for place in free("whole"):
        with pytest.raises(CompileError, match="that no path or program can hold"):
            _compiled(_with("whole", {place: text}), tmp_path)


def _some_texts(data: st.DataObject, folder: Path) -> None:
    base = data.draw(st.sampled_from(sorted(BASES)))
    # One text for places with the same one: a stage is compared with the very model that it comes from.
    drawn = data.draw(st.fixed_dictionaries({}, optional={str(_held(base, place)): HOSTILE for place in free(base)}))
    texts = {place: drawn[_held(base, place)] for place in free(base) if _held(base, place) in drawn}
    number = sum(1 for _ in folder.iterdir())
    check(base, texts, folder / str(number))


FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(data=st.data())
def test_hostile_texts_stay_texts(data: st.DataObject, tmp_path: Path) -> None:
    _some_texts(data, tmp_path)


@pytest.mark.full
@settings(FEW, max_examples=120)
@given(data=st.data())
def test_many_hostile_texts_stay_texts(data: st.DataObject, tmp_path: Path) -> None:
    """About 40 s."""
    _some_texts(data, tmp_path)
