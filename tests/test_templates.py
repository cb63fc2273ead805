"""Templates name leaves of the plan; arithmetic, comparison and defaults live in Python."""

import subprocess
import sys
from importlib.resources import files

import jinja2
import pytest
from jinja2 import nodes

from trainwright.compiler.emit import python_literal, tuple_argument
from trainwright.compiler.emit_manifest import LAUNCHER_OF_KIND
from trainwright.compiler.spec_stages import STAGE_KINDS

TEMPLATES = sorted(item.name for item in files("trainwright.templates").iterdir() if item.name.endswith(".j2"))
DECIDING = (nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.CondExpr, nodes.Call, nodes.Test, nodes.Assign)
SAFE_FILTERS = {"py", "argument", "sh", "comment", "markdown"}


def test_there_is_one_template_a_stage_kind() -> None:
    """Beside them only parts, which several of them include. The kinds without one are planned and costed, and not compiled."""
    programs = {
        name.removesuffix(".py.j2") for name in TEMPLATES if name.endswith(".py.j2") and not name.startswith("_")
    }
    assert set(LAUNCHER_OF_KIND) == programs == set(STAGE_KINDS) - {"reward", "ppo", "grpo"}


def test_every_part_is_included() -> None:
    sources = [files("trainwright.templates").joinpath(name).read_text() for name in TEMPLATES]
    trees = [jinja2.Environment(autoescape=False).parse(source) for source in sources]
    included = {node.template.value for tree in trees for node in tree.find_all(nodes.Include)}
    assert included == {name for name in TEMPLATES if name.startswith("_")}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_decides_nothing(name: str) -> None:
    source = files("trainwright.templates").joinpath(name).read_text()
    tree = jinja2.Environment(autoescape=False).parse(source)
    found = [f"line {node.lineno}: {type(node).__name__}" for node in tree.find_all(DECIDING)]
    assert not found
    assert {node.name for node in tree.find_all(nodes.Filter)} <= SAFE_FILTERS


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        'say "hi"',
        "it's",
        "both \" and '",
        "a\\b",
        "line\nbreak",
        "é中",
        "\x00\u2028",
        "\U0001f600\n",
        "{{ x }}",
        '"""',
    ],
)
def test_a_string_of_a_spec_is_a_literal_in_a_program(text: str) -> None:
    assert eval(python_literal(text)) == text
    assert "\n" not in python_literal(text)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((), "names=(),"),
        (("a",), 'names=("a",),'),
        (("a" * 72,), f'names=("{"a" * 72}",),'),
        (("a" * 73,), f'names=(\n        "{"a" * 73}",\n    ),'),
        (("a", 0.5), 'names=(\n        "a",\n        0.5,\n    ),'),
    ],
)
def test_a_tuple_of_a_plan_is_an_argument_of_a_call(values: tuple[object, ...], text: str) -> None:
    """As `ruff format` spells it."""
    assert tuple_argument(values, "names", 4) == text
    program = f"f(\n    {text}\n)\n"
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "-"]
    assert subprocess.run(command, input=program, capture_output=True, text=True).stdout == program
