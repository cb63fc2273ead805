"""One module a stage: an emitted program calls its verb `run(stage=..., ...)`. Stages meet only through files."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from trainwright.runtime.errors import INTERRUPTED, RunError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def stage_verb(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `verb` end its process as a user expects: a RunError as `error: <message>` on stderr and its exit code.

    Ctrl-C exits with `errors.INTERRUPTED`. Any other exception is a defect of ours and keeps its traceback.
    """

    @functools.wraps(verb)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return verb(*args, **kwargs)
        except RunError as error:
            sys.stdout.flush()  # the log keeps its order
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.stdout.flush()
            print("error: interrupted", file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED)

    return call
