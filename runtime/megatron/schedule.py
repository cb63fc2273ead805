"""The learning rate over the steps: warm-up, then cosine decay or constant."""

from dataclasses import dataclass
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from trainwright.runtime.errors import Unsupported


@dataclass(frozen=True)
class Schedule:
    """Steps are optimizer steps. Peak and floor of the learning rate are the optimizer's `lr` and `min_lr`."""

    kind: str  # "cosine" | "constant"
    steps: int
    warmup_steps: int


class LearningRate:
    """Sets learning rate and weight decay of every parameter group before each step.

    Step s (1 to `steps`) trains at peak * s / warmup_steps up to the warm-up's end; then at the peak ("constant") or down
    half a cosine that reaches the floor at the last step ("cosine").
    """

    def __init__(self, schedule: Schedule, optimizer: Any, config: Any, *, finished_steps: int) -> None:
        """`config` is Megatron-Core's OptimizerConfig. Raises Unsupported for a schedule that cannot be."""
        if schedule.kind not in ("cosine", "constant"):
            raise Unsupported(f"schedule.kind={schedule.kind!r} is unknown: write 'cosine' or 'constant'")
        if not 0 <= schedule.warmup_steps < schedule.steps:
            raise Unsupported(f"schedule: {schedule.warmup_steps} warm-up steps do not fit in {schedule.steps} steps")
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr or 0.0,
            lr_warmup_steps=schedule.warmup_steps,
            lr_decay_steps=schedule.steps,
            lr_decay_style=schedule.kind,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self._scheduler.step(increment=finished_steps)

    def advance(self) -> float:
        """Set the next step's learning rate and return it. Called before the optimizer's step, so that no step has rate 0."""
        self._scheduler.step(increment=1)
        return float(self._scheduler.get_lr({}))
