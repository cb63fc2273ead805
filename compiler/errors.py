"""User-facing errors of the compiler: one message, one exit code each, never a traceback.

The text reads `file:line: field: what is wrong, the arithmetic, the fix` as far as each part is known.
"""


class CompileError(Exception):
    """Base: everything that a spec's author can cause."""

    exit_code = 1


class UsageError(CompileError):
    """The command line is wrong (a `--set` without `=`, a FIELD that no plan has)."""

    exit_code = 2


class SpecError(CompileError):
    """The spec is not readable as one: syntax, an unknown or duplicate key, a wrong type, an impossible unit."""

    exit_code = 3


class UnknownNameError(CompileError):
    """A device, model family or law that the facts do not hold."""

    exit_code = 4


class InfeasibleError(CompileError):
    """No candidate is left: the message names the limit, and by how much the nearest candidate misses it."""

    exit_code = 5


class IllegalPlanError(CompileError):
    """The plan breaks a rule of legality; the message lists every broken one with its arithmetic."""

    exit_code = 6


class NotEmittedError(CompileError):
    """The plan is sound, but no template emits a part of it yet."""

    exit_code = 7


class FileError(CompileError):
    """A file cannot be read or written."""

    exit_code = 8


class RunsError(CompileError):
    """A table of training runs cannot be used: columns, numbers, runs that stand twice, too few, mixed units."""

    exit_code = 9


class NotIdentifiedError(CompileError):
    """The runs do not determine a scaling law that may be extrapolated; the message says by which criterion."""

    exit_code = 10


class MissingExtra(CompileError):
    """A package of an extra is not installed; the message has the command that does. The runtime's code for the same."""

    exit_code = 26
