"""Errors that a user of a bundle can cause or must know of: one message, one exit code each, never a traceback."""


class RunError(Exception):
    """Base: `message` says what is wrong, where, and the fix."""

    exit_code = 1


class BundleError(RunError):
    """The folder is no bundle, or its manifest is damaged or of another version."""

    exit_code = 20


class DataError(RunError):
    """Inputs are missing, empty or unusable."""

    exit_code = 21


class StageFailed(RunError):
    """A stage's program ended with a non-zero exit code."""

    exit_code = 22


class RankKilled(RunError):
    """A process of a stage was killed by a signal."""

    exit_code = 23


class PortInUse(RunError):
    """The rendezvous port is taken by another process."""

    exit_code = 24


class CheckpointError(RunError):
    """A checkpoint is damaged or belongs to another model."""

    exit_code = 25


class MissingExtra(RunError):
    """A package that this verb needs is not installed."""

    exit_code = 26


class BundleBusy(RunError):
    """Another run is executing this bundle."""

    exit_code = 27


class Unsupported(RunError):
    """A program asks for something that this platform or version cannot do."""

    exit_code = 28


class Diverged(RunError):
    """The loss or the gradients of a training run are no numbers any more."""

    exit_code = 29


class GateFailed(RunError):
    """A model missed a threshold of its evaluation: what depends on it is not run."""

    exit_code = 30


class DiskFull(RunError):
    """A file system has no room left for what a run writes."""

    exit_code = 31


class ExportMismatch(RunError):
    """What was exported does not compute what the trained model computes, or reads text differently."""

    exit_code = 32


class NotReady(RunError):
    """A bundle, or the machine on which it is to run, lacks something: a dry run found it."""

    exit_code = 33


class ShadowDiffers(RunError):
    """A program, run in shadow, does not hold or compute what its plan says."""

    exit_code = 34


class DoesNotFit(RunError):
    """A program needs more memory than a device has."""

    exit_code = 35


INTERRUPTED = 130  # Ctrl-C, as shells count it
