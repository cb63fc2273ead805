"""One module a stage: an emitted program calls its verb `run(stage=..., ...)`. Stages meet only through files."""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, ParamSpec, TypeVar

from trainwright.runtime.disk import disk_full, is_disk_full
from trainwright.runtime.errors import INTERRUPTED, RunError, Unsupported
from trainwright.runtime.workspace import open_workspace

# The files of Megatron-Core that check what a config says.
CONFIGS = ("transformer_config.py", "model_parallel_config.py", "optimizer_config.py", "data_parallel_config.py")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def stage_verb(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `verb` end its process as a user expects: a RunError as `error: <message>` on stderr and its exit code.

    So does, from here on, a config of the program that Megatron-Core refuses to build. A full disk is DiskFull, whoever found
    it. Ctrl-C exits with `errors.INTERRUPTED`. Any other exception is a defect of ours and keeps its traceback.
    """

    sys.excepthook = _explain

    @functools.wraps(verb)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return verb(*args, **kwargs)
        except RunError as error:
            _end(str(error), error.exit_code)
        except KeyboardInterrupt:
            _end("interrupted", INTERRUPTED)
        except BaseException as error:  # torch's CheckpointException is no Exception
            if isinstance(error, SystemExit) or not is_disk_full(error):
                raise
            full = disk_full(open_workspace().work)
            _end(str(full), full.exit_code)

    return call


def _explain(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """In place of `sys.excepthook`: programs build their configs before they call a verb."""
    frames = traceback.extract_tb(trace)
    if issubclass(kind, ValueError | AssertionError) and frames and frames[-1].filename.endswith(CONFIGS):
        print(f"error: a config of the program cannot be built: {value}", file=sys.stderr, flush=True)
        os._exit(Unsupported.exit_code)
    sys.__excepthook__(kind, value, trace)


def _end(message: str, exit_code: int) -> NoReturn:
    try:
        sys.stdout.flush()  # the log keeps its order
        print(f"error: {message}", file=sys.stderr, flush=True)
    except OSError:  # a log on a full disk: the exit code tells, unless Python's last flush fails as well
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(exit_code)
