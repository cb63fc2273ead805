"""The training section of a plan: batch, steps, learning rate and their companions; pins first, then laws, then customs."""

import math
from dataclasses import replace
from typing import TypeVar

from trainwright.compiler.choose.batch import batch_units, choose_global_batch
from trainwright.compiler.choose.customs import (
    LION_BETA2,
    SCHEDULE,
    USUAL,
    suggest_beta2,
    suggest_decay_steps,
    suggest_init_std,
    suggest_lion_rate,
    suggest_min_learning_rate,
    suggest_warmup_steps,
)
from trainwright.compiler.choose.hyperparameters import (
    Laws,
    Suggestion,
    choose_laws,
    describe_run,
    suggest_batch_tokens,
    suggest_learning_rate,
    suggest_weight_decay,
    transfer_init_std,
    transfer_learning_rate,
    warn_of_laws,
)
from trainwright.compiler.choose.kernels import FEWEST_SEQUENCES, SHARE_OF_VALIDATION, choose_cadence
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.limits import limits_of, place
from trainwright.compiler.choose.ramp_up import choose_ramp, why_steps
from trainwright.compiler.errors import IllegalPlanError
from trainwright.compiler.laws.rates import Run
from trainwright.compiler.plan import Shape, Training, Validation
from trainwright.compiler.ramp import ramped_steps, trained_tokens
from trainwright.compiler.ranges import Range
from trainwright.compiler.resolve import ResolvedSpec
from trainwright.compiler.units import format_count

T = TypeVar("T")

DEFAULT_SEED = 1234  # Megatron-LM's
SAMPLE_TOKENS = 48
BIAS_RATE, MTP_LOSS = 1e-3, 0.3
UNDECAYED = ("biases", "norms")
NO_DROPOUT = "large models see few tokens twice: Llama, GPT-3, Chinchilla train without"
ROUNDING_WORTH_A_WARNING = 0.1  # of the tokens


def choose_training(
    spec: ResolvedSpec, ledger: Ledger, shape: Shape, tokens: int, context: int, precision: str
) -> tuple[Training, list[str]]:
    """The training section for a shape and a number of tokens, and warnings where a law is used outside its range.

    Raises IllegalPlanError for a warm-up, or a warm-up and a decay, that leave nothing of the run; for a floor above the peak.
    """
    given, laws, run = spec.training, choose_laws(spec.scaling), describe_run(shape, context, tokens)
    global_batch = _global_batch(spec, ledger, laws, run, shape, context)
    tokens_per_step = ledger.note(
        "training.tokens_per_step", global_batch * context, "derived", f"{global_batch} sequences x {context} tokens"
    )
    steps = _steps(spec, tokens, tokens_per_step)

    def number(name: str, suggestion: Suggestion, allowed: Range, kind: str = "default") -> float:
        return ledger.note(
            f"training.{name}", allowed.clip(suggestion.value), kind, suggestion.text, pin=f"training.{name}"
        )

    rules = spec.model.family.rules
    custom = f"{spec.model.family.name}: {spec.model.family.source}" if shape.num_experts else "a dense model"

    def note(name: str, value: T, text: str) -> T:
        stated: T = given.further.get(name, value)
        return ledger.note(f"training.{name}", stated, "default", text, pin=f"training.{name}")

    if laws.base:
        peak, std = transfer_learning_rate(laws.base[0], shape.hidden_size, run), "law"
        initial = transfer_init_std(laws.base[0], shape.hidden_size)
    else:
        peak, std = suggest_learning_rate(laws.rate, run, tokens_per_step), "default"
        initial = suggest_init_std(shape.hidden_size)
    optimizer = _optimizer(spec, ledger)
    if optimizer == "lion":
        peak = suggest_lion_rate(peak)
    rate = number("learning_rate", peak, given.learning_rate, "law")
    _require_floor(spec, rate)
    schedule = ledger.note(
        "training.schedule", given.schedule.pick("cosine"), "default", SCHEDULE, pin="training.schedule"
    )
    warmup = _warmup(spec, ledger, suggest_warmup_steps(laws, run, steps, tokens_per_step), steps)
    training = Training(
        context_length=context,
        precision=ledger.note(
            "training.precision",
            precision,
            "default",
            "bf16 where the device has it, fp32 on a CPU",
            pin="model.precision",
        ),
        initial=ledger.note("training.initial", spec.model.initial, "default", "random weights", pin="model.initial"),
        global_batch=global_batch,
        tokens_per_step=tokens_per_step,
        steps=steps,
        optimizer=optimizer,
        learning_rate=rate,
        min_learning_rate=number(
            "min_learning_rate", suggest_min_learning_rate(rate, schedule), given.min_learning_rate, "derived"
        ),
        schedule=schedule,
        warmup_steps=warmup,
        decay_steps=_decay(spec, ledger, schedule, steps, warmup),
        decay_style=ledger.note(
            "training.decay_style",
            "minus_sqrt" if schedule == "wsd" else "none",
            "derived",
            "1 - the root of the share that is done: better than linear (Hägele et al. 2024, arXiv 2405.18392)"
            if schedule == "wsd"
            else f"only wsd has a decay of its own; the schedule is {schedule}",
        ),
        beta1=number("beta1", USUAL["beta1"], given.beta1),
        beta2=number(
            "beta2", LION_BETA2 if optimizer == "lion" else suggest_beta2(laws, run, tokens_per_step), given.beta2
        ),
        epsilon=number("epsilon", USUAL["epsilon"], given.epsilon),
        weight_decay=number(
            "weight_decay", suggest_weight_decay(run, tokens_per_step, rate), given.weight_decay, "law"
        ),
        undecayed=_undecayed(ledger, given.further.get("undecayed")),
        clip_grad=number("clip_grad", USUAL["clip_grad"], given.clip_grad),
        init_std=number("init_std", initial, given.init_std, std),
        mup_width=_mup_width(ledger, laws, shape),
        hidden_dropout=note("hidden_dropout", 0.0, NO_DROPOUT),
        attention_dropout=note("attention_dropout", 0.0, NO_DROPOUT),
        z_loss=note("z_loss", 0.0, "not asked for"),
        balancing=note("balancing", rules.balancing, custom),
        aux_loss=note("aux_loss", rules.aux_loss, custom),
        bias_rate=note(
            "bias_rate",
            BIAS_RATE if shape.router_bias else 0.0,
            "DeepSeek-V3 (arXiv 2412.19437), section 4.2" if shape.router_bias else "no router has a bias",
        ),
        router_z_loss=note("router_z_loss", 0.0, "not asked for"),
        mtp_loss=note(
            "mtp_loss",
            MTP_LOSS if shape.mtp_layers else 0.0,
            "DeepSeek-V3 (arXiv 2412.19437), section 4.2: 0.3 at first"
            if shape.mtp_layers
            else "no multi-token prediction",
        ),
        **choose_ramp(spec, ledger, global_batch, context),
        seed=ledger.note(
            "training.seed", int(spec.seed.clip(DEFAULT_SEED)), "default", "Megatron-LM's default", pin="seed"
        ),
    )
    if training.ramp_start:
        training = replace(training, steps=math.ceil(ramped_steps(training, steps)))
    ledger.note("training.steps", None, "derived", why_steps(training, tokens))
    rate_is_ours, batch_is_ours = not given.learning_rate.pinned, not given.global_batch.pinned
    warnings = warn_of_laws(laws, run, tokens_per_step, rate=rate_is_ours, batch=batch_is_ours)
    trained = trained_tokens(training)
    if abs(trained / tokens - 1) > ROUNDING_WORTH_A_WARNING:
        warnings.append(
            f"{tokens:,} tokens are {tokens / tokens_per_step:.3g} steps of {tokens_per_step:,}: whole steps train {trained:,}"
        )
    return training, warnings


def choose_validation(spec: ResolvedSpec, ledger: Ledger, training: Training) -> Validation:
    """How often a run is validated and on how much, what it is compared with, and the sample at its end."""
    every = 0
    for stated in spec.data.validation_every:
        a_step = training.tokens_per_step if stated.kind == "tokens" else 1
        every = min(max(1, round(stated.amount / a_step)), training.steps)
    cadence = choose_cadence(training.steps, training.global_batch, len(spec.data.sources), every)
    pretrain = next((stage.name for stage in spec.stages.written if stage.kind == "pretrain"), "pretrain")
    return Validation(
        every_steps=ledger.note(
            "validation.every_steps",
            cadence.every_steps,
            "derived",
            f"{cadence.count} times in {training.steps:,} steps",
            pin="data.validation_every",
            detail=f"; {cadence.count} times in {training.steps:,} steps of {training.tokens_per_step:,} tokens",
        ),
        sequences=ledger.note(
            "validation.sequences",
            cadence.sequences,
            "derived",
            f"{cadence.count} validations of {cadence.sequences} sequences a source take {100 * cadence.share:.2g} % of the "
            f"training FLOPs (aim: {100 * SHARE_OF_VALIDATION:g} %, at least {FEWEST_SEQUENCES} sequences)",
        ),
        baseline=ledger.note(
            "validation.baseline",
            spec.stages.baseline.pick("none"),
            "default",
            "not asked for",
            pin=f"stages.{pretrain}.baseline",
        ),
        sample_tokens=ledger.note("validation.sample_tokens", SAMPLE_TOKENS, "default", "a text sample ends the run"),
    )


def _optimizer(spec: ResolvedSpec, ledger: Ledger) -> str:
    if spec.training.optimizer == "muon":
        raise IllegalPlanError(
            f"{place(spec, 'training.optimizer')}: muon needs the package emerging-optimizers, which wants Python 3.12, and"
            " Megatron-Core 0.16, which runs on 3.11, has no other; take adamw or lion"
        )
    return ledger.note(
        "training.optimizer",
        spec.training.optimizer,
        "default",
        "AdamW: GPT-3, Llama 2 and 3",
        pin="training.optimizer",
    )


def _undecayed(ledger: Ledger, stated: tuple[str, ...] | None) -> tuple[str, ...]:
    undecayed = UNDECAYED if stated is None else stated
    for index in range(len(undecayed)):
        leaf = f"training.undecayed[{index}]"
        ledger.note(leaf, None, "default", "Megatron-Core's custom, and GPT-3's", pin=leaf)
    if not undecayed:
        ledger.note("training.undecayed", None, "pinned", "", pin="training.undecayed")
    return undecayed


def _mup_width(ledger: Ledger, laws: Laws, shape: Shape) -> float:
    if not laws.base:
        return ledger.note("training.mup_width", 1.0, "default", "scaling.learning_rate is not mup")
    base = laws.base[0].hidden_size
    text = f"muP: hidden_size {shape.hidden_size} / {base} of the base run"
    return ledger.note("training.mup_width", shape.hidden_size / base, "law", text)


def _global_batch(spec: ResolvedSpec, ledger: Ledger, laws: Laws, run: Run, shape: Shape, context: int) -> int:
    given, devices = spec.training, spec.compute.devices
    pin = "training.global_batch"
    if given.global_batch.pinned and given.global_batch_unit == "sequences":
        return ledger.note(pin, int(given.global_batch.low), "pinned", "", pin=pin)
    suggestion = suggest_batch_tokens(laws.batch, run)
    wanted = given.global_batch.clip(suggestion.value)
    units, stated = batch_units(spec, shape, context), given.global_batch.pinned
    batch = choose_global_batch(wanted / context, devices, units, stated=stated)
    rounding = f"; {wanted / context:.4g} sequences of {context}, rounded so that {devices} devices can divide them"
    if units and not stated and wanted < context * min(units):
        rounding = (
            f"; {wanted / context:.4g} sequences of {context}, but every layout on {devices:,} devices takes {min(units):,}"
            " or more at once: the devices force the batch"
        )
    return ledger.note(pin, batch, "law", suggestion.text + rounding, pin=pin, detail=rounding)


def _require_floor(spec: ResolvedSpec, learning_rate: float) -> None:
    floor = spec.training.min_learning_rate
    if floor.pinned and floor.low > learning_rate:
        raise IllegalPlanError(
            f"{place(spec, 'training.min_learning_rate')}: {floor.low:g} is above the {learning_rate:g} that a law gives"
            " for training.learning_rate; lower it, or state training.learning_rate"
        )


def _steps(spec: ResolvedSpec, tokens: int, tokens_per_step: int) -> int:
    """Whole steps: the nearest number, or what a limit pays for in full."""
    if spec.data.tokens.pinned or not limits_of(spec):
        return max(1, round(tokens / tokens_per_step))
    return max(1, tokens // tokens_per_step)


def _warmup(spec: ResolvedSpec, ledger: Ledger, suggestion: Suggestion, steps: int) -> int:
    """Steps of warm-up: fewer than the run has, so that one has the peak."""
    warmup = _stated(spec.training.warmup, spec.training.warmup_unit, steps, suggestion.value)
    if warmup >= steps and spec.training.warmup.pinned and warmup:
        share = ", or state it as a share of the steps" if spec.training.warmup_unit == "steps" else ""
        raise IllegalPlanError(
            f"{place(spec, 'training.warmup')}: {warmup:,} steps of warm-up leave none of the run's"
            f" {format_count(steps, 'step')}; shorten it{share}"
        )
    return ledger.note("training.warmup_steps", warmup, "default", suggestion.text, pin="training.warmup")


def _decay(spec: ResolvedSpec, ledger: Ledger, schedule: str, steps: int, warmup: int) -> int:
    """Steps of the decay of a wsd schedule."""
    if schedule != "wsd":
        return ledger.note(
            "training.decay_steps", 0, "derived", f"only wsd has a decay of its own; the schedule is {schedule}"
        )
    suggestion = suggest_decay_steps(steps, warmup)
    decay = _stated(spec.training.decay, spec.training.decay_unit, steps, suggestion.value)
    if not decay:
        raise IllegalPlanError(
            f"{place(spec, 'training.decay')}: none of the run's {format_count(steps, 'step')} is left for the decay"
            " that ends wsd; lengthen it, or take schedule: constant"
        )
    if warmup + decay > steps:
        in_steps = "steps" in (spec.training.warmup_unit, spec.training.decay_unit)
        raise IllegalPlanError(
            f"{place(spec, 'training.decay', 'training.warmup')}: {warmup:,} steps of warm-up + {decay:,} of decay = "
            f"{warmup + decay:,}, and the run has {format_count(steps, 'step')}; shorten one"
            f"{', or state them as shares of the steps' if in_steps else ''}"
        )
    return ledger.note("training.decay_steps", decay, "default", suggestion.text, pin="training.decay")


def _stated(given: Range, unit: str, steps: int, suggested: float) -> int:
    """Steps that the user stated, or those suggested."""
    if not given.pinned:
        return round(suggested)
    return round(given.low if unit == "steps" else given.low * steps)
