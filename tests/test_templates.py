"""Templates name leaves of the plan; arithmetic, comparison and defaults live in Python."""

from importlib.resources import files

import jinja2
import pytest
from jinja2 import nodes

from trainwright.compiler.emit import LAUNCHER_OF_KIND, python_literal

TEMPLATES = sorted(item.name for item in files("trainwright.templates").iterdir() if item.name.endswith(".j2"))
DECIDING = (nodes.BinExpr, nodes.UnaryExpr, nodes.Compare, nodes.CondExpr, nodes.Call, nodes.Test, nodes.Assign)
SAFE_FILTERS = {"py", "sh", "comment", "markdown"}


def test_there_is_one_template_a_stage_kind() -> None:
    assert {f"{kind}.py.j2" for kind in LAUNCHER_OF_KIND} == {name for name in TEMPLATES if name.endswith(".py.j2")}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_decides_nothing(name: str) -> None:
    source = files("trainwright.templates").joinpath(name).read_text()
    tree = jinja2.Environment(autoescape=False).parse(source)
    found = [f"line {node.lineno}: {type(node).__name__}" for node in tree.find_all(DECIDING)]
    assert not found
    assert {node.name for node in tree.find_all(nodes.Filter)} <= SAFE_FILTERS


@pytest.mark.parametrize(
    "text", ["plain", 'say "hi"', "it's", "both \" and '", "a\\b", "line\nbreak", "é中", "\x00\u2028", "{{ x }}", '"""']
)
def test_a_string_of_a_spec_is_a_literal_in_a_program(text: str) -> None:
    assert eval(python_literal(text)) == text
    assert "\n" not in python_literal(text)
