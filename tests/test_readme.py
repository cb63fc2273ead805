"""The README shows the tiny spec, what `explain` says of it, and the program that it becomes, as they are.

`make golden` rewrites these parts of it.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def explained(repository: Path) -> str:
    command = [Path(sys.executable).with_name("trainwright"), "explain", "specs/tiny.yaml"]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=repository).stdout


def test_the_readme_shows_what_there_is(repository: Path, request: pytest.FixtureRequest) -> None:
    table = explained(repository)
    (program,) = (repository / "tests" / "golden" / "tiny").glob("*_pretrain.py")
    blocks = {
        "spec": ("yaml", (repository / "specs" / "tiny.yaml").read_text()),
        "explain": ("", "\n".join(line.rstrip() for line in table.splitlines()) + "\n"),
        "program": ("python", program.read_text()),
    }
    readme = repository / "README.md"
    text = wanted = readme.read_text()
    for name, (language, content) in blocks.items():
        pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        assert pattern.search(wanted), f"README.md has no part {name}"
        block = f"```{language}\n{content}```\n"
        wanted = pattern.sub(lambda match, block=block: match[1] + block + match[2], wanted)
    if request.config.getoption("--rewrite-golden"):
        readme.write_text(wanted)
    else:
        assert text == wanted, "run `make golden` and read the diff"
