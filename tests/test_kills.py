"""Twenty kills, spread over every stage of a bundle: what it ends with is what it ends with when nobody disturbs it.

The moments are drawn from how long the stages took undisturbed, and in the cases that chance would hardly hit, from what lies on
the disk: a checkpoint half written, an output just written and not yet noted. Costs 4 minutes on 2 free cores.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mini import write_project

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")
SEED = 4
EVERY_STEPS = 8  # between checkpoints, so that every training stage writes several

LAUNCHER, STAGE = "launcher", "stage's process"
TIME, STEP = "after some time", "after some steps"
CHECKPOINT, OUTPUT = "while a checkpoint is written", "when the output has been written"
# The moments of the kills, by kind of stage; one that resumes gets further each time.
PLAN = {
    "ingest": (TIME, OUTPUT),
    "curate": (TIME,),
    "tokenizer": (TIME,),
    "tokenize": (TIME, OUTPUT),
    "pretrain": (TIME, STEP, CHECKPOINT, CHECKPOINT),
    "sft": (CHECKPOINT, TIME, STEP),
    "dpo": (STEP, CHECKPOINT, STEP),
    "evaluate": (TIME, TIME, OUTPUT),
    "export": (TIME,),
}
NUM_KILLS = 20
EARLIEST, LATEST = 0.02, 0.5  # of a stage's undisturbed duration
MOST_STEPS = 12  # from the last checkpoint
POLL_S = 0.005


@dataclass(frozen=True)
class Kill:
    """What is killed, and when."""

    stage: str
    target: str
    moment: str
    share: float  # TIME: of the stage's undisturbed duration
    steps: int  # STEP: after the last checkpoint


class Project:
    """A bundle of all stages, and its runs in two work folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        spec = write_project(path)
        done = subprocess.run(
            [TRAINWRIGHT, "compile", spec, "-o", "bundle"], cwd=path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        for program in (path / "bundle").glob("*.py"):
            text = program.read_text()
            program.write_text(re.sub(r"(Checkpoint\(every_steps=)\d+", rf"\g<1>{EVERY_STEPS}", text))
        manifest = json.loads((path / "bundle" / "manifest.json").read_text())
        self.stages: list[str] = [stage["name"] for stage in manifest["stages"]]
        self.kinds: dict[str, str] = {stage["name"]: stage["kind"] for stage in manifest["stages"]}

    def start(self, work: Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [TRAINWRIGHT, "run", "bundle", "--work", work],
            cwd=self.path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


def state_of(work: Path) -> dict[str, Any]:
    """The stages in `state.json`, which can be read whenever one looks."""
    file = work / "state.json"
    stages: dict[str, Any] = json.loads(file.read_text())["stages"] if file.exists() else {}
    return stages


def describe(pid: int, runner: int) -> str:
    """Which process of a run this is."""
    if pid == runner:
        return LAUNCHER
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = dict(item.partition(b"=")[::2] for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        parents_command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except (OSError, IndexError, ValueError):
        return "ended"
    if b"trainwright.runtime.launch.torchrun" in command:
        return "torchrun"
    if parents_command == command:
        return "forked by a rank"
    return f"rank {environment.get(b'RANK', b'0').decode()}"


def processes_in(work: Path, runner: int) -> list[int]:
    """Processes of the stage that is running: of torchrun, of its ranks, and what these have forked."""
    marker = f"TRAINWRIGHT_WORK={work}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != runner:
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return sorted(found)


def plan_kills(project: Project, draw: random.Random) -> list[Kill]:
    kills = []
    for stage in project.stages:
        for moment in PLAN[project.kinds[stage]]:
            target = LAUNCHER if moment == OUTPUT else draw.choice((LAUNCHER, STAGE, STAGE))
            kills.append(Kill(stage, target, moment, draw.uniform(EARLIEST, LATEST), draw.randrange(1, MOST_STEPS + 1)))
    return kills


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a stage's folder that are complete."""
    return [int(step.name[5:]) for step in (folder / "checkpoints").glob("step-*") if not is_torn(step)]


def last_metrics_step(folder: Path, since: float) -> int:
    """The step of the last row that was written after `since`; 0 where there is none yet."""
    metrics = folder / "metrics.jsonl"
    with contextlib.suppress(OSError, IndexError, ValueError):  # it is being written
        if metrics.stat().st_mtime > since:
            return int(json.loads(metrics.read_text().splitlines()[-1])["step"])
    return 0


def is_torn(step: Path) -> bool:
    return not (step / "run.json").exists() or not (step / "metadata.json").exists()


class Kills:
    """Runs a bundle and kills as planned. Where a stage is done before its moment comes, what runs then is killed."""

    def __init__(self, project: Project, work: Path, durations: dict[str, float], draw: random.Random) -> None:
        self.project, self.work, self.durations, self.draw = project, work, durations, draw
        self.log: list[str] = []
        self.done: dict[str, dict[str, Any]] = {}  # stages that were done at a kill, as the state had them
        self.hit: Counter[str] = Counter()

    def execute(self, kill: Kill) -> bool:
        """Start the run and kill; False where it ended by itself before."""
        running = self.project.start(self.work)
        moment = self._moment(kill, running)
        while not moment():
            if running.poll() is not None:
                out = running.communicate()[0]
                assert running.returncode == 0, out
                return False
            time.sleep(POLL_S)
        at = next(
            (name for name, stage in state_of(self.work).items() if stage["state"] == "running"), "between stages"
        )
        target = self._target(kill, running.pid)
        who = describe(target, running.pid)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(target, signal.SIGKILL)
        out = running.communicate()[0]
        if running.returncode == 0:
            return False
        self._check(kill, running.returncode, out, is_runner=target == running.pid)
        self.hit[at] += 1
        self.log.append(f"{at}: {who}, {kill.moment} ({kill.stage})")
        return True

    def _moment(self, kill: Kill, running: "subprocess.Popen[str]") -> Callable[[], bool]:
        """Whether the time has come. A stage that is done before gives its kill to the stage after it."""
        folder = self.work / kill.stage
        torn_before = {step.name for step in (folder / "checkpoints").glob("step-*") if is_torn(step)}
        written_before = (folder / "output" / "summary.json").exists()
        last_step = max(steps_in(folder), default=0) + kill.steps
        started = time.time()
        begun: dict[str, float] = {}  # when stages' processes were seen first

        def seconds_of(stage: str) -> float:
            """How long the stage has been running; below 0 where it is not."""
            if state_of(self.work).get(stage, {}).get("state") != "running":
                return -1.0
            if stage not in begun:
                if not processes_in(self.work, running.pid):
                    return -1.0
                begun[stage] = time.monotonic()
            return time.monotonic() - begun[stage]

        def by_stage() -> bool:
            if kill.moment == CHECKPOINT:
                steps = [step for step in (folder / "checkpoints").glob("step-*") if step.name not in torn_before]
                return any(is_torn(step) and any(step.iterdir()) for step in steps)
            if kill.moment == OUTPUT:
                return not written_before and (folder / "output" / "summary.json").exists()
            if kill.moment == STEP:
                return last_metrics_step(folder, started) >= last_step
            return seconds_of(kill.stage) >= kill.share * self.durations[kill.stage]

        def has_come() -> bool:
            done = state_of(self.work).get(kill.stage, {}).get("state") == "done"
            if not done or (kill.moment == OUTPUT and not written_before):
                return by_stage()
            others = self.project.stages[self.project.stages.index(kill.stage) + 1 :]
            return any(seconds_of(other) >= kill.share * self.durations[other] for other in others)

        return has_come

    def _target(self, kill: Kill, runner: int) -> int:
        others = processes_in(self.work, runner) if kill.target == STAGE else []
        return self.draw.choice(others) if others else runner

    def _check(self, kill: Kill, code: int, out: str, *, is_runner: bool) -> None:
        """Nothing is left over, the state can be read, and nothing that was done has been done again."""
        if is_runner:
            assert code == -signal.SIGKILL, (kill, out)
        else:
            assert code in (22, 23), (kill, out)
            assert "Traceback" not in out.split("error: ")[0], out
        limit = time.monotonic() + 10
        while processes_in(self.work, -1):
            assert time.monotonic() < limit, f"{kill}: processes are left"
            time.sleep(0.02)
        state = state_of(self.work)
        for name, before in self.done.items():
            assert state[name] == before, f"{kill}: {name} was done"
        self.done = {name: stage for name, stage in state.items() if stage["state"] == "done"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("kills"))


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of nested JSON."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, f"{place}/{key}")
    else:
        yield place, value


def figures(work: Path, stages: list[str]) -> dict[str, Any]:
    """All that must not depend on how often a run was killed: summaries, results, the losses and norms of every step."""
    found: dict[str, Any] = {}
    for stage in stages:
        for name in ("summary.json", "results.json"):
            file = work / stage / "output" / name
            if file.exists():
                found.update(numbers(json.loads(file.read_text()), f"{stage}/{name}"))
        metrics = work / stage / "metrics.jsonl"
        for line in metrics.read_text().splitlines() if metrics.exists() else []:
            row = json.loads(line)
            last = "test" if "loss" not in row else ""
            kept = {key: value for key, value in row.items() if key not in ("step_s", "tokens_per_s", "memory_bytes")}
            for key, value in kept.items():
                place = f"{stage}/step {row['step']}{last}/{key}"
                assert place not in found, f"{place} is there twice"
                found[place] = value
    return found


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_figures(project: Project) -> None:
    calm, disturbed = project.path / "calm", project.path / "disturbed"
    begun = time.monotonic()
    running = project.start(calm)
    out = running.communicate()[0]
    assert running.returncode == 0, out
    durations = {name: float(stage["duration_s"]) for name, stage in state_of(calm).items()}
    print(f"undisturbed: {time.monotonic() - begun:.0f} s, {durations}")

    draw = random.Random(SEED)
    kills = Kills(project, disturbed, durations, draw)
    planned = plan_kills(project, draw)
    assert len(planned) == NUM_KILLS
    struck = sum(kills.execute(kill) for kill in planned)
    running = project.start(disturbed)
    out = running.communicate()[0]
    assert running.returncode == 0, out
    print(f"{time.monotonic() - begun:.0f} s with {struck} kills:", *kills.log, sep="\n  ")
    assert struck >= NUM_KILLS - 2, "so many came too late"
    assert len(kills.hit) >= len(project.stages) - 1, f"some stages were not hit: {dict(kills.hit)}"

    expected, found = figures(calm, project.stages), figures(disturbed, project.stages)
    assert found.keys() == expected.keys()
    for place, value in expected.items():
        if isinstance(value, float):
            assert found[place] == pytest.approx(value, rel=1e-5, abs=1e-9), place
        else:
            assert found[place] == value, place
    for stage in project.stages:
        if project.kinds[stage] in ("ingest", "curate", "tokenizer", "tokenize"):
            assert state_of(disturbed)[stage]["output_id"] == state_of(calm)[stage]["output_id"], stage
    assert state_of(disturbed).keys() == state_of(calm).keys()
