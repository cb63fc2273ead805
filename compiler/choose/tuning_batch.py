"""Batches of the tuning stages: what the spec or a recipe wants, in wholes that the plan's layout can divide."""

import math
from dataclasses import dataclass

from trainwright.compiler.choose.kernels import SAVE_EVERY_S, round_down
from trainwright.compiler.choose.ledger import Section
from trainwright.compiler.errors import IllegalPlanError
from trainwright.compiler.facts import Recipe
from trainwright.compiler.plan import Layout, Training
from trainwright.compiler.ranges import list_divisors
from trainwright.compiler.resolve_stages import ResolvedTuning
from trainwright.compiler.units import join_words

SAVE_EVERY_STEPS = 100
# Contexts that a row may fill: a row of reward or dpo holds whole pairs, of which each answer may fill one.
CONTEXTS_A_ROW = {"sft": 1, "reward": 2, "dpo": 2, "ppo": 1, "grpo": 1}
GENERATION_SHARE = 0.75  # of a step's time: 65 to 90 % in published systems, as quoted by others, not checked


@dataclass(frozen=True)
class Batching:
    """What the batches of one tuning stage are chosen by."""

    section: Section  # of its schedule
    given: ResolvedTuning
    recipe: Recipe
    training: Training
    layout: Layout

    @property
    def kind(self) -> str:
        return self.given.stage.kind

    @property
    def contexts(self) -> int:
        return CONTEXTS_A_ROW[self.kind]

    def refuse(self, key: str, text: str) -> IllegalPlanError:
        """The error about a key of the stage, with its place."""
        path = f"{self.section.pin}.{key}"
        return IllegalPlanError(f"{self.section.ledger.pins.get(path, 'the spec')}: {path}: {text}")


def choose_samples(one: Batching) -> int:
    """Answers generated for a prompt: the recipe's, or the number nearest below it that divides a stated batch."""
    given, usual = one.given, int(one.recipe.numbers["samples"].value)
    if usual > 1 and given.global_batch.pinned:
        divisors = list_divisors(int(given.global_batch.low), int(given.global_batch.low))[1:]
        usual = max((divisor for divisor in divisors if divisor <= usual), default=divisors[0])
    return int(given.samples.clip(usual))


def choose_rows(one: Batching, samples: int = 1) -> int:
    """Rows a step: a multiple of the data-parallel degree, and of the samples of a prompt."""
    given, data, usual = one.given, one.layout.data, one.recipe.numbers["global_batch"]
    unit = math.lcm(data, samples)
    packed = one.kind not in ("ppo", "grpo")
    wanted = given.global_batch.clip(min(usual.value, one.training.global_batch) if packed else usual.value)
    if given.global_batch.pinned and given.global_batch_unit == "tokens":
        wanted /= one.contexts * one.training.context_length
    batch = max(1, round(wanted / unit)) * unit
    if given.global_batch.pinned and given.global_batch_unit == "sequences" and batch != wanted:
        near = sorted({max(1, int(wanted // unit)) * unit, -(-int(wanted) // unit) * unit})
        each = f" (and {wanted / samples:.4g} prompts of {samples} samples)" if samples > 1 else ""
        raise one.refuse(
            "global_batch",
            f"{wanted:.0f} sequences / data {data} = {wanted / data:.4g} a device{each}, and only whole ones exist; take"
            f" {' or '.join(map(str, near))}, or pin layout.data",
        )
    multiple = f"data {data}" + (f" and of samples {samples}" if samples > 1 else "")
    rounding = f"; {wanted:.4g} rows, rounded to a multiple of {multiple}" if batch != wanted else ""
    return one.section.note("global_batch", batch, "default", usual.source + rounding, detail=rounding)


def choose_minibatch(one: Batching, batch: int) -> int:
    """Episodes an update: whole updates a batch, and whole episodes a device."""
    usual, data = one.recipe.numbers["minibatch"], one.layout.data
    if one.given.minibatch.pinned:
        stated = int(one.given.minibatch.low)
        if batch % stated or stated % data:
            fitting = [str(size * data) for size in list_divisors(batch // data, batch)]
            raise one.refuse(
                "minibatch",
                f"global_batch {batch} / minibatch {stated} = {batch / stated:.4g} updates, minibatch {stated} / data {data} ="
                f" {stated / data:.4g} episodes a device, and only whole ones exist; take {join_words(fitting)}",
            )
        return stated
    return list_divisors(batch // data, max(1, int(usual.value) // data))[-1] * data


def choose_micro_batch(one: Batching, update: int, of: str) -> int:
    """Rows that a device computes at once: what fits in pretraining, in tokens, if a row does; and whole micro-batches.

    `update`: the rows of an update, `of` the leaf that says so.
    """
    layout, contexts = one.layout, one.contexts
    most, a_device = max(1, layout.micro_batch // contexts), update // layout.data
    fitting = list_divisors(a_device, most)[-1]
    size = "a context" if contexts == 1 else f"{contexts} contexts"
    text = (
        f"the largest divisor of the {a_device} rows a device ({of} {update} / data {layout.data}) with at most the tokens"
        f" of layout.micro_batch {layout.micro_batch}; a row is {size} long"
    )
    return one.section.note("micro_batch", fitting, "derived", text)


def choose_cadence(one: Batching, batch: int, pretraining_step_s: float) -> int:
    """Steps between checkpoints."""
    tokens = batch * one.contexts * one.training.context_length
    step_s, about = pretraining_step_s * tokens / one.training.tokens_per_step, ""
    if one.kind in ("ppo", "grpo"):
        step_s /= 1 - GENERATION_SHARE
        about = f", {GENERATION_SHARE:.0%} of it generation"
    text = (
        f"at most {SAVE_EVERY_S / 60:.0f} minutes of steps of about {step_s:.2g} s{about}, and at most {SAVE_EVERY_STEPS} steps:"
        " how many there are follows from the data, often a few hundred; the last step is always saved"
    )
    every = max(1, min(round_down(SAVE_EVERY_S / step_s), SAVE_EVERY_STEPS))
    return one.section.note("checkpoint_every_steps", every, "derived", text)
