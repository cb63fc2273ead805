"""`python -m trainwright.runtime run BUNDLE`: executes a bundle where no compiler is installed."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from trainwright.runtime.cli import run_bundle, status_bundle
from trainwright.runtime.errors import RunError
from trainwright.runtime.reading import error_text

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
) -> None:
    """Execute the stages that are not done; goes on where an earlier run ended."""
    code = run_bundle(bundle, only=tuple(only or ()), start=start, data_root=data_root, work=work, port=port)
    raise typer.Exit(code)


@app.command()
def status(bundle: BundleFolder, data_root: DataRoot = None, work: WorkFolder = None) -> None:
    """Show the stages' state, and which would run and why."""
    raise typer.Exit(status_bundle(bundle, data_root=data_root, work=work))


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
