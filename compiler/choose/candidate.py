"""One round of the loop between limits and layout."""

import math
from dataclasses import dataclass

from trainwright.compiler.choose.layout import LayoutChoice
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.limits import Need
from trainwright.compiler.choose.question import FORWARD_SHARE, Question
from trainwright.compiler.choose.variants import Variant
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.layouts import Workload
from trainwright.compiler.plan import Shape, Training
from trainwright.compiler.ramp import trained_tokens, whole_steps


@dataclass(frozen=True)
class Candidate:
    """One round: the question and who answered it, shape, tokens, training, and the layouts that fit, best first."""

    ledger: Ledger
    question: Question
    variant: Variant
    shape: Shape
    tokens: int
    training: Training
    workload: Workload
    layouts: LayoutChoice
    warnings: tuple[str, ...]

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of training."""
        return model_flops_per_token(self.shape, self.training.context_length)

    @property
    def flops_per_s(self) -> float:
        """Model FLOPs a second on all devices: what a second of a limit buys."""
        return self.flops_per_token * self.training.tokens_per_step / self.layouts.step_s

    @property
    def trained_tokens(self) -> int:
        """Tokens of all steps."""
        return trained_tokens(self.training)

    @property
    def need(self) -> Need:
        """What the run takes."""
        return need_of(self.shape, self.training, self.question, self.layouts.step_s)

    def same(self, other: "Candidate") -> bool:
        return self.shape == other.shape and self.training == other.training


def need_of(shape: Shape, training: Training, question: Question, step_s: float = math.nan) -> Need:
    """What a run takes; without the time of a step, in FLOPs alone."""
    each = model_flops_per_token(shape, training.context_length)
    return Need(
        steps=whole_steps(training),
        step_s=step_s,
        training_flops=each * trained_tokens(training),
        inference_flops=FORWARD_SHARE * each * question.inference_tokens,
    )
