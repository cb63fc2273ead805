"""`python -m trainwright.runtime run BUNDLE`: executes a bundle where no compiler is installed."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainwright.runtime.chat import chat_bundle
from trainwright.runtime.cli import dry_run_bundle, run_bundle, status_bundle
from trainwright.runtime.errors import RunError
from trainwright.runtime.reading import error_text
from trainwright.runtime.talk import Choice

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `trainwright compile` wrote.")]
WorkFolder = Annotated[Path | None, typer.Option("--work", help="Where the run keeps its files. Default: BUNDLE/work.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Where relative inputs lie. Default: the spec's.")]


@app.command()
def run(
    bundle: BundleFolder,
    only: Annotated[list[str] | None, typer.Option("--only", help="Just this stage; may be repeated.")] = None,
    start: Annotated[str, typer.Option("--from", help="Run this stage and all after it, even if unchanged.")] = "",
    data_root: DataRoot = None,
    work: WorkFolder = None,
    port: Annotated[int, typer.Option("--port", help="Rendezvous port. Default: a free one.")] = 0,
    retries: Annotated[
        int | None, typer.Option("--retries", min=0, help="Of each stage that fails. Default: the bundle's.")
    ] = None,
) -> None:
    """Execute the stages that are not done; goes on where an earlier run ended."""
    code = run_bundle(
        bundle, only=tuple(only or ()), start=start, data_root=data_root, work=work, port=port, retries=retries
    )
    raise typer.Exit(code)


@app.command("dry-run")
def dry_run(
    bundle: BundleFolder,
    only: Annotated[list[str] | None, typer.Option("--only", help="Just this stage; may be repeated.")] = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--rank", help="Shadow this rank; may be repeated. Default: those that differ.")
    ] = None,
    all_micro_batches: Annotated[
        bool, typer.Option("--all-microbatches", help="Run every micro-batch of a step.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="What this machine lacks is an error, though it is not the plan's.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="How much shadow and plan may differ, relative to the plan.")
    ] = 0.0,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write the first rank's step as a Chrome trace.")
    ] = None,
    data_root: DataRoot = None,
    work: WorkFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check a bundle before it is run: every program on fake tensors, on any rank of its cluster."""
    code = dry_run_bundle(
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
    raise typer.Exit(code)


@app.command()
def status(
    bundle: BundleFolder,
    data_root: DataRoot = None,
    work: WorkFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show the stages' state, and which would run and why."""
    raise typer.Exit(status_bundle(bundle, data_root=data_root, work=work, as_json=as_json))


@app.command()
def chat(
    bundle: BundleFolder,
    stage: Annotated[str, typer.Option("--stage", help="Whose model. Default: the last stage's that is done.")] = "",
    messages: Annotated[list[str] | None, typer.Option("--message", help="Say this and end; may be repeated.")] = None,
    system: Annotated[str, typer.Option("--system", help="What the model is to be.")] = "",
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Among so many likeliest tokens; 0: among all.")] = 50,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides what is chosen.")] = 0,
    work: WorkFolder = None,
) -> None:
    """Talk with the latest model."""
    choice = Choice(temperature=temperature, top_k=top_k, max_tokens=max_tokens, seed=seed)
    code = chat_bundle(bundle, stage=stage, messages=tuple(messages or ()), system=system, choice=choice, work=work)
    raise typer.Exit(code)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot spell a character of the user's data is no reason to fail.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app(prog_name="python -m trainwright.runtime")
    except RunError as error:
        print(error_text(str(error)), file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
