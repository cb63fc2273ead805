"""The process of a dry run: `python -m trainwright.runtime.shadow.child` reads a request from stdin and answers in lines of JSON.

Each rank is one line: `{"result": {...}}` (result.RankResult), `{"not_shadowed": "why"}`, `{"built": N}` where only configs were
asked for, or `{"error": "...", "rank": N}`. What programs print is dropped.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """One program of a bundle, and the ranks on which it is shadowed."""

    program: str  # a file
    stage: str
    kind: str
    platform: str  # "cuda" | "cpu": which it was planned for
    world_size: int
    ranks: tuple[int, ...]
    all_micro_batches: bool = False
    trace: str = ""  # a file for the trace of the first rank's step; "": none
    configs_only: bool = False  # build the program's configs, and no more


class _Done(BaseException):
    """The program has been shadowed: it need not go on."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    request = json.load(sys.stdin)
    request = Request(**{**request, "ranks": tuple(request["ranks"])})
    for answer in shadow(request):
        print(json.dumps(answer), file=answers, flush=True)
    answers.flush()
    os._exit(0)  # fakes that are still alive need no order in which to go


def shadow(request: Request) -> Iterator[dict[str, Any]]:
    """An answer for every rank."""
    source = Path(request.program).read_text(encoding="utf-8")
    set_up(request.platform, transformer_engine=_asks_for_transformer_engine(source))
    for rank in request.ranks:
        yield shadow_rank(request, rank)


def set_up(platform: str, *, transformer_engine: bool) -> None:
    """Make this process one that shadows programs planned for `platform`, "cuda" or "cpu". Call it before Megatron-Core is
    imported, and once."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no tensor is ever on a device
    warnings.filterwarnings("ignore")
    from trainwright.runtime.shadow import fakes, standins

    if transformer_engine:
        standins.install_transformer_engine()
    if platform == "cuda":
        fakes.fuse_compiled_functions()
    from trainwright.runtime.megatron import layers
    from trainwright.runtime.megatron import platform as platforms

    platforms.pretend(platform)
    fakes.answer_for_others()
    standins.balance_routing()
    vars(layers)["causal_lower_right"] = standins.mask_of_last(cuda=platform == "cuda")


def _asks_for_transformer_engine(source: str) -> bool:
    """Whether a program says layer_spec="transformer_engine". Raises SyntaxError."""
    return any(
        isinstance(node, ast.keyword)
        and node.arg == "layer_spec"
        and isinstance(node.value, ast.Constant)
        and node.value.value == "transformer_engine"
        for node in ast.walk(ast.parse(source))
    )


def shadow_rank(request: Request, rank: int) -> dict[str, Any]:
    """The answer for one rank, in a process that is set up."""
    from trainwright.runtime.errors import RunError
    from trainwright.runtime.megatron.job import Job, take_over
    from trainwright.runtime.shadow import driver, fakes, figures

    found: dict[str, Any] = {}
    trace = request.trace if rank == request.ranks[0] else ""
    traced: list[str] = []

    def taker(job: Job) -> None:
        shadowed = driver.shadow_job(
            job,
            cuda=request.platform == "cuda",
            all_micro_batches=request.all_micro_batches,
            keep_history=bool(trace),
        )
        result = figures.make_result(shadowed, request.stage, request.kind)
        found["result"] = asdict(result)
        if trace:
            traced.append(json.dumps(figures.trace_of(shadowed, f"{request.stage}: {result.place}")))
        raise _Done

    if request.configs_only:
        found["built"] = rank
        _stop_before_the_verb(request.kind)
    take_over(taker)
    said = io.StringIO()
    fakes.join_world(rank, request.world_size)
    try:
        with contextlib.redirect_stderr(said):
            run_program(request.program)
    except _Done:
        return _with_trace(found, rank, trace, *traced)
    except driver.NotShadowed as error:
        return {"not_shadowed": str(error)}
    except SystemExit as ended:
        return {
            "rank": rank,
            "error": said.getvalue().strip().removeprefix("error: ") or f"the program ended with {ended.code}",
        }
    except RunError as error:
        return {"rank": rank, "error": str(error)}
    except Exception as error:
        return {"rank": rank, "error": _explain(error, Path(request.program)), "traceback": traceback.format_exc()}
    finally:
        fakes.leave_world()
    return {
        "rank": rank,
        "error": f"{Path(request.program).name} came to its end and computed nothing that a dry run could shadow",
    }


def _stop_before_the_verb(kind: str) -> None:
    """A program builds its configs as it calls its stage's verb."""

    def run(*args: object, **kwargs: object) -> None:
        raise _Done

    vars(importlib.import_module(f"trainwright.runtime.stages.{kind}"))["run"] = run


def _with_trace(found: dict[str, Any], rank: int, file: str, text: str = "") -> dict[str, Any]:
    if not file:
        return found
    try:
        Path(file).write_text(text)
    except OSError as error:
        return {"rank": rank, "error": f"the trace {file} cannot be written ({error.strerror})"}
    return found


def run_program(path: str) -> None:
    """Run a program as Python would, as `__main__`."""
    import runpy

    before = sys.argv
    sys.argv = [path]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before


def _explain(error: BaseException, program: Path) -> str:
    """The program's own line, and what went wrong: not the machinery of fakes."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == program]
    where = f"{program.name}:{own[-1].lineno}: {own[-1].line}: " if own else f"{program.name}: "
    from torch._subclasses import fake_tensor

    unknown = (
        fake_tensor.UnsupportedOperatorException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.DataDependentOutputException,
    )
    custom = re.search(r"no fake impl registered for <CustomOpDef\(([^)]+)\)>", str(error))
    if isinstance(error, unknown) or custom:
        operation = custom[1] if custom else error.func  # type: ignore[attr-defined]
        return (
            f"{where}the operation {operation} has no fake kernel: a dry run cannot know the shape of what it makes; give it "
            "one with torch.library.register_fake, or keep it out of the model's passes"
        )
    return f"{where}{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()
