"""The learning rate over the steps: warm-up, then cosine or linear decay, constant, or constant and a decay at the end."""

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from trainwright.runtime.errors import Unsupported

STYLES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "wsd": "WSD"}  # Megatron-Core's names
DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")


@dataclass(frozen=True)
class Schedule:
    """Steps are optimizer steps. Peak and floor of the learning rate are the optimizer's `lr` and `min_lr`."""

    kind: str  # "cosine" | "linear" | "wsd" | "constant"
    steps: int
    warmup_steps: int
    decay_steps: int = 0  # of wsd: the last ones
    decay_style: str = "none"  # of wsd: one of DECAY_STYLES; "minus_sqrt" is 1 - the root of the share that is done


class LearningRate:
    """Sets learning rate and weight decay of every parameter group before each step.

    Step s (1 to `steps`) trains at peak * s / warmup_steps up to the warm-up's end; then at the peak ("constant"), down half a
    cosine ("cosine") or a line ("linear") that reaches the floor at the last step, or at the peak and over the last decay_steps
    down to the floor, which the last step has ("wsd"). A group with a `max_lr` and `min_lr` of its own has those for peak and
    floor.
    """

    def __init__(self, schedule: Schedule, optimizer: Any, config: Any, *, finished_steps: int) -> None:
        """`config` is Megatron-Core's OptimizerConfig. Raises Unsupported for a schedule that cannot be."""
        check_schedule(schedule)
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr or 0.0,
            lr_warmup_steps=schedule.warmup_steps,
            lr_decay_steps=schedule.steps,
            lr_decay_style=STYLES[schedule.kind],
            wsd_decay_steps=schedule.decay_steps if schedule.kind == "wsd" else None,
            lr_wsd_decay_style=schedule.decay_style if schedule.kind == "wsd" else None,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self._scheduler.step(increment=finished_steps)

    def advance(self) -> float:
        """Set the next step's learning rate and return it. Called before the optimizer's step, so that no step of a warm-up has
        rate 0."""
        self._scheduler.step(increment=1)
        return float(self._scheduler.get_lr({}))


def check_schedule(schedule: Schedule) -> None:
    """Raise Unsupported for a schedule that cannot be."""
    if schedule.kind not in STYLES:
        raise Unsupported(f"schedule.kind={schedule.kind!r} is unknown: write {', '.join(map(repr, STYLES))}")
    if not 0 <= schedule.warmup_steps < schedule.steps:
        raise Unsupported(f"schedule: {schedule.warmup_steps} warm-up steps do not fit in {schedule.steps} steps")
    if schedule.kind != "wsd":
        return
    if schedule.decay_style not in DECAY_STYLES:
        styles = ", ".join(map(repr, DECAY_STYLES))
        raise Unsupported(f"schedule.decay_style={schedule.decay_style!r} is unknown: write {styles}")
    if not 0 <= schedule.decay_steps <= schedule.steps - schedule.warmup_steps:
        raise Unsupported(
            f"schedule: {schedule.warmup_steps} warm-up steps and {schedule.decay_steps} of decay do not fit in {schedule.steps}"
        )
