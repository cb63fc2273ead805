"""The `trainwright` command: parse arguments, call the pipeline, print. `--help` imports neither numpy nor pydantic nor jinja2.

A user's mistake ends as `error: ...` on stderr with the exit code of its class; a traceback is a defect of trainwright.
"""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trainwright.compiler.errors import CompileError, FileError, UsageError

if TYPE_CHECKING:
    from trainwright.compiler.plan import Plan
    from trainwright.compiler.resolve import ResolvedSpec

app = typer.Typer(
    name="trainwright",
    help="Compile a training spec into planned, runnable Megatron-Core programs, and run them.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The click that reads the command line: typer's own copy or the package, by typer's version.
_CommandLineError: Any = typer.BadParameter.__base__
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # of a disk

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec, a YAML file.", show_default=False)]
BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="The folder that `compile` wrote.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Replace a value of the spec, e.g. layout.tensor=2; repeatable.",
        show_default=False,
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Where relative data paths start (default: the spec's data.root).", show_default=False
    ),
]
WorkFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the run keeps its files (default: BUNDLE/work).", show_default=False),
]


def main() -> None:
    """Entry point of the installed command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot spell a character of the user's spec is no reason to fail.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except CompileError as error:
        _fail(str(error), error.exit_code)
    except _CommandLineError as error:
        command = error.ctx.command_path if error.ctx is not None else app.info.name
        _fail(f"{error.format_message().rstrip('.')}; `{command} --help` shows what it takes", UsageError.exit_code)
    except BrokenPipeError:  # `| head` has read enough
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _drop_output()
        _fail(f"the output cannot be written: {error.strerror}; make room, or write elsewhere", FileError.exit_code)
    sys.exit(code)


def _drop_output() -> None:
    """What is still in stdout's buffer goes nowhere, so that the interpreter's last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, exit_code: int) -> NoReturn:
    first, *rest = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in message.split("\n"))
    with contextlib.suppress(OSError):  # the exit code remains
        print(f"error: {first}", *rest, sep="\n       ", file=sys.stderr)
    sys.exit(exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trainwright {metadata.version('trainwright')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Compile a training spec into planned, runnable Megatron-Core programs, and run them."""


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The new spec, or a folder for it.")] = Path("."),
    preset: Annotated[str, typer.Option(metavar="NAME", help="tiny, one_node or many_nodes.")] = "tiny",
) -> None:
    """Write a starter spec, and the schema for editors."""
    from trainwright.compiler.starter import write_starter

    written, schema_file = write_starter(preset, path)
    print(f"wrote {written} and {schema_file}\nnext:  trainwright plan {written}")


@app.command()
def check(spec: SpecFile, overrides: Overrides = None) -> None:
    """Check that a spec has a legal plan that fits.

    Data files that are not there are a warning only: a plan for a cluster may be made on a laptop.
    """
    resolved, plan = _plan(spec, overrides)
    for warning in (*plan.estimates.warnings, *_missing_data(resolved, plan)):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{spec}: ok; `trainwright plan {spec}` shows what it becomes")


@app.command(name="plan")
def show_plan(
    spec: SpecFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of the table.")] = False,
    overrides: Overrides = None,
) -> None:
    """Show what is trained, how, where, at what cost."""
    from trainwright.compiler.explain import show, summary
    from trainwright.compiler.plan import write_plan

    _, plan = _plan(spec, overrides)
    if as_json:
        print(write_plan(plan), end="")
    else:
        show(summary(plan), sys.stdout)


@app.command()
def explain(
    spec: SpecFile,
    field: Annotated[
        str,
        typer.Argument(metavar="FIELD", help="A leaf or part of the plan, e.g. layout or training.learning_rate."),
    ] = "",
    overrides: Overrides = None,
) -> None:
    """Say why each value of the plan is what it is."""
    from trainwright.compiler.explain import explain_all, explain_field, show

    _, plan = _plan(spec, overrides)
    show(explain_field(plan, field) if field else explain_all(plan), sys.stdout)


@app.command(name="compile")
def compile_spec(
    spec: SpecFile,
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="BUNDLE", help="Folder for the bundle: new, empty, or a bundle.", show_default=False
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Write the bundle: programs, plan, launcher."""
    from trainwright.compiler.emit import emit_bundle
    from trainwright.compiler.write import write_bundle

    _, plan = _plan(spec, overrides)
    bundle = emit_bundle(plan)
    write_bundle(bundle, out)
    for warning in plan.estimates.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    stages = [f"{stage.name} (implied)" if stage.implied else stage.name for stage in plan.stages]
    print(f"wrote {out}: {', '.join(sorted(bundle.files))}\nstages {', '.join(stages)}")
    print(f"next:  trainwright run {out}")


@app.command()
def run(
    bundle: BundleFolder,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="Run just this stage; repeatable.", show_default=False)
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            "--from", metavar="STAGE", help="Run this stage and all after it, even if done.", show_default=False
        ),
    ] = "",
    data_root: DataFolder = None,
    work: WorkFolder = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Rendezvous port of the processes; 0: a free one.")] = 0,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="Of each stage that fails (default: the spec's).", show_default=False),
    ] = None,
) -> None:
    """Execute a bundle, from where it stands."""

    def verb(runtime: Any) -> int:
        return int(
            runtime.run_bundle(
                bundle, only=tuple(only or ()), start=start, data_root=data_root, work=work, port=port, retries=retries
            )
        )

    _execute(verb)


@app.command("dry-run")
def dry_run(
    bundle: BundleFolder,
    only: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="Look at just this stage; repeatable.", show_default=False)
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option(
            "--rank", metavar="N", help="Shadow this rank; repeatable (default: those that differ).", show_default=False
        ),
    ] = None,
    all_micro_batches: Annotated[
        bool,
        typer.Option("--all-microbatches", help="Run every micro-batch of a step; else the steady state is scaled."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="What this machine lacks is an error, though it is not the plan's.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="How much shadow and plan may differ, relative to the plan: for edited programs."),
    ] = 0.0,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the first rank's step as a Chrome trace (Perfetto).", show_default=False
        ),
    ] = None,
    data_root: DataFolder = None,
    work: WorkFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    rehearsal: Annotated[
        bool, typer.Option("--rehearse", help="Then run every stage for real, small, on CPU processes: minutes.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FOLDER", help="Of the rehearsal (default: BUNDLE-rehearsal).", show_default=False
        ),
    ] = None,
) -> None:
    """Check a bundle before it is run: every program on fake tensors, on any rank of its cluster."""

    def verb(runtime: Any) -> int:
        code = runtime.dry_run_bundle(
            bundle,
            only=tuple(only or ()),
            ranks=tuple(ranks or ()),
            all_micro_batches=all_micro_batches,
            strict=strict,
            tolerance=tolerance,
            trace=trace,
            data_root=data_root,
            work=work,
            as_json=as_json,
        )
        if code or not rehearsal:
            return int(code)
        return _rehearse(runtime, bundle, out or bundle.with_name(f"{bundle.resolve().name}-rehearsal"), data_root)

    if rehearsal and as_json:
        raise UsageError("--rehearse prints a run, --json one object: give one of them")
    _execute(verb)


def _rehearse(runtime: Any, bundle: Path, folder: Path, data_root: Path | None) -> int:
    """Shrink the bundle's plan, compile that into `folder`, and run it."""
    from trainwright.compiler.emit import emit_bundle
    from trainwright.compiler.plan import read_plan
    from trainwright.compiler.rehearsal import write_rehearsal
    from trainwright.compiler.rehearse import rehearse
    from trainwright.compiler.write import write_bundle

    plan = read_plan((bundle / "plan.json").read_text(encoding="utf-8"))
    made = rehearse(plan, (data_root or Path(plan.data.root)).resolve(), max(2, min(8, 2 * (os.cpu_count() or 1))))
    print(f"\nrehearsal in {folder}: every stage, small, on {made.processes} CPU processes; not kept:")
    for change in made.changes:
        print(f"  {change}")
    _, small = _plan(write_rehearsal(made, folder), None)
    write_bundle(emit_bundle(small), folder / "bundle")
    return int(runtime.run_bundle(folder / "bundle", data_root=folder))


@app.command()
def status(
    bundle: BundleFolder,
    data_root: DataFolder = None,
    work: WorkFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the stages of a bundle: done or to do."""
    _execute(lambda runtime: int(runtime.status_bundle(bundle, data_root=data_root, work=work, as_json=as_json)))


@app.command()
def chat(
    bundle: BundleFolder,
    stage: Annotated[
        str,
        typer.Option(metavar="NAME", help="Whose model (default: the last stage's that is done).", show_default=False),
    ] = "",
    messages: Annotated[
        list[str] | None,
        typer.Option(
            "--message", metavar="TEXT", help="Say this and end after the answer; repeatable.", show_default=False
        ),
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is to be.", show_default=False)] = "",
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among so many likeliest tokens; 0: among all.")] = 50,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is chosen.")] = 0,
    work: WorkFolder = None,
) -> None:
    """Talk with the latest model of a bundle."""

    def verb(_: Any) -> int:
        from trainwright.runtime.chat import chat_bundle
        from trainwright.runtime.talk import Choice

        choice = Choice(temperature=temperature, top_k=top_k, max_tokens=max_tokens, seed=seed)
        return chat_bundle(bundle, stage=stage, messages=tuple(messages or ()), system=system, choice=choice, work=work)

    _execute(verb)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A spec, a plan.json, or a bundle.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another, of any of these.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PATH=VALUE", help="Replace a value of B, a spec; repeatable.", show_default=False
        ),
    ] = None,
) -> None:
    """Show what two plans differ in, and what that does to time, memory, money and loss.

    Exit code 0: no difference; 1: there is one.
    """

    def verb(_: Any) -> int:
        from trainwright.compiler.diff import compare, write_difference
        from trainwright.compiler.diff_side import read_side
        from trainwright.compiler.diff_table import difference_table
        from trainwright.compiler.explain import show

        with _progress("planning"):
            found = compare(read_side(a), read_side(b, tuple(overrides or ())))
        if as_json:
            print(write_difference(found), end="")
        else:
            show(difference_table(found), sys.stdout)
        return 0 if found.same else 1

    _execute(verb)


@app.command()
def fit(
    runs: Annotated[
        Path,
        typer.Argument(metavar="RUNS", help="A CSV with the columns params, tokens and loss.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="LAW", help="Write the law file that a spec can name.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw residuals and contours: .png or .svg.", show_default=False),
    ] = None,
    suggest: Annotated[
        str, typer.Option(metavar="FLOPS", help="Plan further runs for so many FLOPs in all.", show_default=False)
    ] = "",
    target: Annotated[
        str,
        typer.Option(
            metavar="FLOPS", help="The run that the law is for (default: 10 x the largest).", show_default=False
        ),
    ] = "",
    counts: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="What params counts: embedding_once (without an output layer of its own), total, without_embedding, body.",
        ),
    ] = "embedding_once",
    bootstraps: Annotated[int, typer.Option(min=100, max=100_000, help="Draws that the intervals rest on.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Decides the draws.")] = 0,
) -> None:
    """Fit a scaling law to your own runs."""
    from trainwright.compiler.errors import NotIdentifiedError
    from trainwright.compiler.explain import show
    from trainwright.compiler.fit.command import Question, answer

    with _bar("bootstrap draws", bootstraps) as advance:
        found = answer(Question(runs, out, plot, suggest, target, counts, bootstraps, seed), advance)
    if as_json:
        print(found.json())
    else:
        show(found.table, sys.stdout)
    for path in found.written:
        print(f"wrote {path}", file=sys.stderr if as_json else sys.stdout)
    if found.refusal:
        sys.stdout.flush()
        raise NotIdentifiedError(found.refusal)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a spec."""
    from trainwright.compiler.schema import spec_schema

    print(json.dumps(spec_schema(), indent=2))


def _plan(spec: Path, overrides: list[str] | None) -> tuple["ResolvedSpec", "Plan"]:
    from trainwright.compiler.load import load_spec
    from trainwright.compiler.resolve import resolve_spec

    resolved = resolve_spec(load_spec(spec, tuple(overrides or ())))
    with _progress("planning"):
        from trainwright.compiler.choose import choose_plan

        return resolved, choose_plan(resolved)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """A spinner while something may take seconds; nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar that is told of each part done; nothing where nobody watches."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def _missing_data(resolved: "ResolvedSpec", plan: "Plan") -> list[str]:
    """The user's paths that a stage reads and that match no file, from the current folder."""
    import glob

    root = Path(resolved.data.root)
    ingested = resolved.data.sources if any(stage.kind == "ingest" for stage in plan.stages) else ()
    sources = ((f"data.sources[{index}].path", source.path) for index, source in enumerate(ingested))
    return [
        f"{resolved.pins[place]}: {place}: no file matches {root / path};"
        " the run needs them, under the current folder or `trainwright run --data-root DIR`"
        for place, path in (("model.initial", resolved.model.initial), *sources, *resolved.stages.paths())
        if path and not glob.glob(str(root / path), recursive=True)
    ]


def _execute(verb: Callable[[Any], int]) -> None:
    """Call a verb of the runtime and end with its exit code."""
    from trainwright.runtime.errors import RunError

    try:
        from trainwright.runtime import cli as runtime

        code = verb(runtime)
    except RunError as error:
        _fail(str(error), error.exit_code)
    else:
        raise typer.Exit(code)
