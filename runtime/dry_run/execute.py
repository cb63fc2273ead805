"""Runs the programs of a bundle in shadow: a child process each, as many at once as there are cores."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainwright.runtime.dry_run.planned import Planned, PlannedProgram
from trainwright.runtime.errors import RunError
from trainwright.runtime.launch.bundle import Bundle
from trainwright.runtime.manifest import Stage, read_record
from trainwright.runtime.shadow.result import RankResult

_CHILD = (sys.executable, "-P", "-m", "trainwright.runtime.shadow.child")


@dataclass(frozen=True)
class Failure:
    """A rank on which the program could not be run."""

    rank: int
    message: str


@dataclass(frozen=True)
class Shadow:
    """What the shadow of one stage's program found."""

    stage: Stage
    results: tuple[RankResult, ...]
    failures: tuple[Failure, ...]
    not_shadowed: str = ""  # why, where a dry run cannot stand for it
    configs_built: bool = False  # of a stage of one process: Megatron-Core accepts its configs, and that is all


class BadRank(RunError):
    """`--rank` names one that the layout has not."""

    exit_code = 2


def shadowed_stages(bundle: Bundle, only: Sequence[str] = ()) -> list[Stage]:
    """Stages whose programs train or ask a model on all devices; of these, those in `only`, if it names any."""
    return [stage for stage in bundle.stages if stage.launcher == "torchrun" and (not only or stage.name in only)]


def configured_stages(bundle: Bundle, only: Sequence[str] = ()) -> list[Stage]:
    """Stages of one process whose programs build a model's config: it is looked at, and nothing is shadowed."""
    return [
        stage
        for stage in bundle.stages
        if stage.launcher != "torchrun"
        and (not only or stage.name in only)
        and "TransformerConfig(" in (bundle.path / stage.program).read_text(encoding="utf-8")
    ]


def choose_ranks(stage: Stage, planned: Planned, wanted: Sequence[int]) -> tuple[int, ...]:
    """`wanted`, or the first device of each pipeline rank that differs: first, middle, last, and where none of these has experts
    (or all have), one that has (or has not). Raises BadRank."""
    world = stage.nodes * stage.processes_per_node
    for rank in wanted:
        if not 0 <= rank < world:
            raise BadRank(f"--rank {rank}: {stage.name} runs on {world:,} devices, whose ranks are 0 to {world - 1:,}")
    if wanted:
        return tuple(dict.fromkeys(wanted))
    # Megatron-Core numbers pipeline ranks last: each has the next `world / pipeline` ranks.
    pipeline = planned.layout.pipeline
    chosen = [0, pipeline // 2, pipeline - 1]
    chosen += _with_and_without_experts(planned.program(stage.name), chosen)
    return tuple(number * (world // pipeline) for number in sorted(set(chosen)))


def _with_and_without_experts(program: PlannedProgram | None, chosen: Sequence[int]) -> list[int]:
    ranks = program.ranks if program else ()
    more: list[int] = []
    for wanted in (True, False):
        having = [rank for rank in ranks if any(part.module == "experts" for part in rank.modules) is wanted]
        if having and not any(rank.first <= number <= rank.last for rank in having for number in chosen):
            more.append(having[0].first)
    return more


def shadow_stages(
    bundle: Bundle,
    planned: Planned,
    work: Sequence[tuple[Stage, tuple[int, ...]]],
    *,
    all_micro_batches: bool = False,
    trace: Path | None = None,
    done: Callable[[Stage], None] = lambda stage: None,
) -> list[Shadow]:
    """Shadow each stage's program on the ranks beside it; of a stage of one process build the configs.

    `trace`: a file for the step of the first stage's first rank; `done` is called as a rank is through, in any thread.
    """
    children: list[subprocess.Popen[str]] = []
    lock = threading.Lock()

    def run(number: int) -> Shadow:
        stage, ranks = work[number]
        request = {
            "program": str((bundle.path / stage.program).resolve()),
            "stage": stage.name,
            "kind": stage.kind,
            "platform": planned.platform,
            "world_size": stage.nodes * stage.processes_per_node,
            "ranks": list(ranks),
            "all_micro_batches": all_micro_batches,
            "trace": str(trace.resolve()) if trace is not None and number == 0 else "",
            "configs_only": stage.launcher != "torchrun",
        }
        with lock:
            child = subprocess.Popen(
                _CHILD,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            children.append(child)
        return _read_answers(child, request, stage, done)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        try:
            return list(pool.map(run, range(len(work))))
        finally:  # Ctrl-C: nothing goes on
            with lock:
                for child in children:
                    child.kill()


def _read_answers(
    child: "subprocess.Popen[str]", request: dict[str, Any], stage: Stage, done: Callable[[Stage], None]
) -> Shadow:
    assert child.stdin is not None
    assert child.stdout is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(child.stderr or ()), daemon=True)
    reader.start()
    child.stdin.write(json.dumps(request))
    child.stdin.close()
    results: list[RankResult] = []
    failures: list[Failure] = []
    not_shadowed, configs_built = "", False
    for line in child.stdout:
        answer = json.loads(line)
        if "result" in answer:
            results.append(read_record(RankResult, answer["result"]))
        elif "not_shadowed" in answer:
            not_shadowed = answer["not_shadowed"]
        elif "built" in answer:
            configs_built = True
        else:
            failures.append(Failure(answer["rank"], answer["error"]))
        done(stage)
    ended = child.wait()
    reader.join()
    missing = len(request["ranks"]) - len(results) - len(failures)
    if missing and not (not_shadowed or configs_built):
        rank = request["ranks"][len(results) + len(failures)]
        how = f"was killed by signal {-ended}" if ended < 0 else f"ended with {ended}"
        last = "".join(said).strip().splitlines()[-1:] or ["it said nothing"]
        failures.append(Failure(rank, f"the process that shadows it {how}: {last[0]}"))
    return Shadow(stage, tuple(results), tuple(failures), not_shadowed, configs_built)
