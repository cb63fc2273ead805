"""The batch that grows: as the user states it, in whole sequences and increments."""

from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.limits import place
from trainwright.compiler.errors import IllegalPlanError
from trainwright.compiler.plan import Training
from trainwright.compiler.resolve import ResolvedSpec


def choose_ramp(spec: ResolvedSpec, ledger: Ledger, global_batch: int, context: int) -> dict[str, int]:
    """`ramp_start`, `ramp_increment` and `ramp_sequences` of the plan (sequences); 0 without a ramp.

    Raises IllegalPlanError for a ramp that does not lead to the global batch in whole increments."""
    names = ("ramp_start", "ramp_increment", "ramp_sequences")
    if not spec.training.ramp:
        for name in names:
            ledger.note(f"training.{name}", None, "default", "not asked for")
        return dict.fromkeys(names, 0)
    (stated,) = spec.training.ramp
    sequences = max(1, round(stated.tokens / context))
    if stated.start >= global_batch or (global_batch - stated.start) % stated.increment:
        raise IllegalPlanError(
            f"{place(spec, 'training.ramp.start')}: from {stated.start} sequences by {stated.increment} the batch does not come"
            f" to global_batch {global_batch}: {global_batch} - {stated.start} = {global_batch - stated.start}, which must be a"
            " multiple of increment above 0"
        )
    keys = ("start", "increment", "tokens")
    values = (stated.start, stated.increment, sequences)
    for name, key in zip(names, keys, strict=True):
        detail = f"; {sequences:,} sequences of {context}" if key == "tokens" else ""
        ledger.note(f"training.{name}", None, "pinned", "", pin=f"training.ramp.{key}", detail=detail)
    return dict(zip(names, values, strict=True))


def why_steps(training: Training, tokens: int) -> str:
    """Why a run has its steps."""
    if training.ramp_start:
        return (
            f"{tokens:,} tokens, of which the first {training.ramp_sequences * training.context_length:,} in batches that grow"
            f" from {training.ramp_start} sequences to {training.global_batch}, then {training.tokens_per_step:,} a step"
        )
    return f"{tokens:,} tokens / {training.tokens_per_step:,} a step"
