"""What an installed trainwright holds, and what importing it costs."""

import subprocess
import sys
import tomllib
from pathlib import Path


def test_every_subpackage_is_listed(repository: Path) -> None:
    listed = set(tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {
        "trainwright." + ".".join(folder.parent.relative_to(repository).parts)
        for top in ("compiler", "runtime", "specs", "templates")
        for folder in (repository / top).rglob("__init__.py")
    }
    assert listed == on_disk


def test_data_files_are_found_where_the_package_is_installed() -> None:
    code = (
        "from importlib.resources import files\n"
        "assert files('trainwright.templates').joinpath('pretrain.py.j2').is_file()\n"
        "assert files('trainwright.specs').joinpath('tiny.yaml').is_file()\n"
        "assert files('trainwright.compiler.data').joinpath('accelerators.yaml').is_file()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_the_planner_and_the_manifest_need_no_torch() -> None:
    code = (
        "import sys\n"
        "import trainwright.compiler.emit, trainwright.compiler.choose, trainwright.compiler.explain\n"
        "import trainwright.runtime.cli, trainwright.runtime.report\n"
        "assert 'torch' not in sys.modules and 'scipy' not in sys.modules, sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
