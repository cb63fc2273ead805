"""Three complete bundles, byte for byte. `make golden` rewrites them; a person reads the diff."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import EXECUTABLE, Bundle, emit_bundle
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import leaves, read_plan, write_plan
from trainwright.compiler.resolve import resolve_spec
from trainwright.runtime.manifest import file_hash, program_identity, read_manifest

SPECS = ("tiny", "one_node", "many_nodes")


def compiled(repository: Path, name: str) -> Bundle:
    return emit_bundle(choose_plan(resolve_spec(load_spec(repository / "specs" / f"{name}.yaml"))))


@pytest.fixture(scope="module", params=SPECS)
def golden(request: pytest.FixtureRequest, repository: Path) -> Path:
    folder = repository / "tests" / "golden" / request.param
    if request.config.getoption("--rewrite-golden"):
        bundle = compiled(repository, request.param)
        for old in folder.glob("*"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in bundle.files.items():
            (folder / name).write_bytes(content)
            (folder / name).chmod(0o755 if name in EXECUTABLE else 0o644)
    return folder


def test_the_spec_compiles_to_the_golden_bytes(golden: Path, repository: Path) -> None:
    bundle = compiled(repository, golden.name)
    assert {file.name: file.read_bytes() for file in golden.iterdir()} == dict(bundle.files)


def test_the_bytes_do_not_depend_on_the_process(golden: Path, repository: Path, tmp_path: Path) -> None:
    """Another hash seed, another current folder, another locale: the same bundle."""
    trainwright = Path(sys.executable).with_name("trainwright")
    command = [trainwright, "compile", str(repository / "specs" / f"{golden.name}.yaml"), "-o", "bundle"]
    subprocess.run(
        command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"}, capture_output=True
    )
    assert {file.name: file.read_bytes() for file in (tmp_path / "bundle").iterdir()} == {
        file.name: file.read_bytes() for file in golden.iterdir()
    }


def test_programs_are_formatted_and_lint_clean(golden: Path) -> None:
    for arguments in (["check"], ["format", "--check"]):
        command = [
            sys.executable,
            "-m",
            "ruff",
            *arguments,
            "--isolated",
            "--no-cache",
            *map(str, sorted(golden.glob("*.py"))),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_literal_of_a_program_is_a_leaf_of_its_plan(golden: Path) -> None:
    """Numbers and strings in programs stand in plan.json; what does not is a word of Megatron-Core, listed here."""
    plan = read_plan((golden / "plan.json").read_text())
    values = {repr(value) for _, value in leaves(plan) if not isinstance(value, dict)}
    values |= {"0.0", "None", "'__main__'"}  # dropout; absence in Megatron's words; the guard
    values |= {"'selective'", "'core_attn'", "'full'", "'uniform'", "1"}  # recompute in Megatron's words
    for program in sorted(golden.glob("*.py")):
        body = ast.parse(program.read_text()).body[1:]
        constants = [node for part in body for node in ast.walk(part) if isinstance(node, ast.Constant)]
        missing = {
            f"{program.name}:{node.lineno}: {node.value!r}" for node in constants if repr(node.value) not in values
        }
        assert not missing


def test_the_plan_round_trips(golden: Path) -> None:
    text = (golden / "plan.json").read_text()
    assert write_plan(read_plan(text)) == text


def test_the_manifest_holds_what_lies_beside_it(golden: Path) -> None:
    manifest = read_manifest((golden / "manifest.json").read_text())
    on_disk = {file.name: file_hash(file.read_bytes()) for file in golden.iterdir() if file.name != "manifest.json"}
    assert on_disk == manifest.files
    for stage in manifest.stages:
        assert program_identity((golden / stage.program).read_text()) == stage.program_id
    assert manifest.run_id == read_plan((golden / "plan.json").read_text()).run_id


def test_the_launcher_is_valid_shell(golden: Path) -> None:
    subprocess.run(["bash", "-n", str(golden / "launch.sh")], check=True)
