"""Bundles of small programs, and how to run them: what the tests of the runner share."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.runtime import manifest as contract

# Appends what it saw to `trace`, so that a test knows which programs were executed, in which order and environment.
PRELUDE = '''"""A program of the test."""
import json, os, signal, sys, time
from pathlib import Path

NAME = {name!r}
WORK = Path(os.environ["TRAINWRIGHT_WORK"])
OUTPUT = WORK / NAME / "output"
RANK = int(os.environ.get("RANK", "0"))


def leave(text, **figures):
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "result.txt").write_text(text)
    (OUTPUT / "summary.json").write_text(json.dumps({{"key_figure": text, **figures}}))


with (WORK / "trace").open("a") as trace:
    seen = {{key: os.environ.get(key) for key in ("TRAINWRIGHT_DATA_ROOT", "OMP_NUM_THREADS", "WORLD_SIZE", "MASTER_PORT")}}
    trace.write(json.dumps({{"name": NAME, "rank": RANK, "pid": os.getpid(), **seen}}) + "\\n")
'''
LEAVE = 'if RANK == 0:\n    leave("42 documents")\n'
COPY_INPUT = (
    'root = Path(os.environ["TRAINWRIGHT_DATA_ROOT"])\n'
    'leave("|".join(path.read_text() for path in sorted(root.glob("corpus/*.txt"))))\n'
)
SLEEP = 'print("before the sleep", flush=True)\nPath(WORK / f"asleep-{RANK}").touch()\ntime.sleep(120)\n'
SLEEP_ONCE = (
    f'if not (WORK / f"asleep-{{RANK}}").exists():\n    {SLEEP.strip().replace(chr(10), chr(10) + "    ")}\n{LEAVE}'
)


@dataclass
class Made:
    """A bundle that the test wrote, and how to run it."""

    path: Path
    stages: list[contract.Stage] = field(default_factory=list)

    def add(
        self,
        name: str,
        body: str,
        needs: tuple[str, ...] = (),
        inputs: tuple[str, ...] = (),
        ranks: int = 0,
        **fields: Any,
    ) -> None:
        """`ranks` 0: launched as one python process; else by torchrun. `fields`: further ones of the manifest's stage."""
        program = f"{len(self.stages) + 1:02}_{name}.py"
        source = PRELUDE.format(name=name) + body
        (self.path / program).write_text(source)
        self.stages.append(
            contract.Stage(
                name=name,
                kind=name,
                program=program,
                program_id=contract.program_identity(source),
                launcher="torchrun" if ranks else "python",
                nodes=1,
                processes_per_node=ranks or 1,
                needs=needs,
                inputs=inputs,
                outputs=("output",),
                implied=False,
                **fields,
            )
        )
        self.seal()

    def seal(self, **changes: Any) -> None:
        """Write the manifest, as `compile` does."""
        files = {path.name: contract.file_hash(path.read_bytes()) for path in self.path.glob("*.py")}
        fields = {
            "schema_version": contract.SCHEMA_VERSION,
            "name": "made",
            "run_id": "0123abcd",
            "data_root": str(self.path.parent),
            "stages": tuple(self.stages),
            "files": files,
        }
        text = contract.write_manifest(contract.Manifest(**{**fields, **changes}))
        (self.path / contract.MANIFEST_FILE).write_text(text)

    def edit_manifest(self, old: str, new: str) -> None:
        """Replace the first `old`, as if `compile` had written `new`: without a seal nobody can tell."""
        file = self.path / contract.MANIFEST_FILE
        said = json.loads(file.read_text().replace(old, new, 1))
        del said["seal"]
        file.write_text(json.dumps(said))

    def program(self, name: str) -> Path:
        return self.path / next(stage.program for stage in self.stages if stage.name == name)

    def edit(self, name: str, old: str, new: str) -> None:
        text = self.program(name).read_text()
        before, found, after = text.rpartition(old)  # the last one: the body stands behind the prelude
        assert found
        self.program(name).write_text(before + new + after)

    def command(self, *arguments: str, verb: str = "run") -> list[str]:
        return [sys.executable, "-m", "trainwright.runtime", verb, str(self.path), *arguments]

    def run(self, *arguments: str, code: int = 0, verb: str = "run", **environment: str) -> "Said":
        done = subprocess.run(
            self.command(*arguments, verb=verb),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **environment},
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not re.search(
            "^Traceback", done.stderr, re.MULTILINE
        )  # a program's own stands indented, as its log's end
        assert "\x1b" not in done.stdout, "not a terminal: plain text"
        return Said(done.stdout, done.stderr)

    def trace(self) -> list[dict[str, Any]]:
        """What the programs wrote since the last call."""
        file = self.path / "work" / "trace"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        return rows

    def ran(self) -> list[str]:
        return [row["name"] for row in self.trace() if row["rank"] == 0]

    def state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.path / "work" / "state.json").read_text())["stages"][name]
        return state


@dataclass
class Said:
    out: str
    err: str


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def asleep(made: Made, ranks: int) -> bool:
    """Whether all of the stage's processes have come to SLEEP."""
    return all((made.path / "work" / f"asleep-{rank}").exists() for rank in range(ranks))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def started(made: Made, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A run in the background; killed at the end if it is still there."""
    process = subprocess.Popen(
        made.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
