"""Compile every spec at another revision and here, and compare the bundles: a refactor shows no difference.

    python benchmarks/replay.py main

Exit code 1 where a bundle differs. The other revision is checked out into a temporary worktree and compiled by its own code.
"""

import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("compiler", "runtime", "specs", "templates")
COMPILE = "import sys; from trainwright.compiler.cli import main; sys.argv = ['trainwright', 'compile', *sys.argv[1:]]; main()"


def package_tree(source: Path, tree: Path) -> Path:
    """A folder to put on PYTHONPATH in which `trainwright.*` is the code of `source`."""
    (tree / "trainwright").mkdir(parents=True)
    for folder in FOLDERS:
        (tree / "trainwright" / folder).symlink_to(source / folder)
    return tree


def compile_all(source: Path, out: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package_tree(source, out / "packages"))}
    for spec in sorted((ROOT / "specs").glob("*.yaml")):
        command = [sys.executable, "-c", COMPILE, str(spec), "-o", str(out / spec.stem)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{spec.name} does not compile with {source}:\n{result.stderr}")


def main(revision: str) -> int:
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        other, there, here = Path(scratch, "other"), Path(scratch, "there"), Path(scratch, "here")
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(other), revision],
            check=True,
            capture_output=True,
        )
        try:
            compile_all(other, there)
            compile_all(ROOT, here)
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(other)], check=True)
        different = 0
        for spec in sorted((ROOT / "specs").glob("*.yaml")):
            old, new = there / spec.stem, here / spec.stem
            names = sorted({file.name for folder in (old, new) for file in folder.iterdir()})
            same, changed, missing = filecmp.cmpfiles(old, new, names, shallow=False)
            different += len(changed) + len(missing)
            console.print(
                f"{spec.stem}: {len(same)} files the same, different: {', '.join(changed + missing) or 'none'}"
            )
            for name in changed:
                subprocess.run(["diff", "-u", str(old / name), str(new / name)])
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "main"))
