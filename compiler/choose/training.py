"""The training section of a plan: batch, steps, learning rate and their companions; pins first, then laws, then customs."""

from trainwright.compiler.choose.batch import choose_global_batch
from trainwright.compiler.choose.hyperparameters import (
    USUAL,
    Suggestion,
    list_law_extrapolations,
    suggest_batch_tokens,
    suggest_learning_rate,
    suggest_min_learning_rate,
    suggest_warmup_steps,
)
from trainwright.compiler.choose.kernels import FEWEST_SEQUENCES, SHARE_OF_VALIDATION, choose_cadence
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.choose.limits import limits_of
from trainwright.compiler.errors import IllegalPlanError
from trainwright.compiler.estimate.params import count_body_parameters
from trainwright.compiler.facts import HyperparameterLaw, find_hyperparameter_law
from trainwright.compiler.plan import Shape, Training, Validation
from trainwright.compiler.ranges import Range
from trainwright.compiler.resolve import ResolvedSpec

HYPERPARAMETER_LAW = "step_law"
DEFAULT_SEED = 1234  # Megatron-LM's
SAMPLE_TOKENS = 48
ROUNDING_WORTH_A_WARNING = 0.1  # of the tokens


def choose_training(
    spec: ResolvedSpec, ledger: Ledger, shape: Shape, tokens: int, context: int, precision: str
) -> tuple[Training, list[str]]:
    """The training section for a shape and a number of tokens, and warnings where a law is used outside its range.

    Raises IllegalPlanError for a stated warm-up that is longer than the run.
    """
    given, law = spec.training, find_hyperparameter_law(HYPERPARAMETER_LAW)
    global_batch = _global_batch(spec, ledger, law, tokens, context)
    tokens_per_step = ledger.note(
        "training.tokens_per_step", global_batch * context, "derived", f"{global_batch} sequences x {context} tokens"
    )
    steps = ledger.note(
        "training.steps",
        _steps(spec, tokens, tokens_per_step),
        "derived",
        f"{tokens:,} tokens / {tokens_per_step:,} a step",
    )
    body = count_body_parameters(shape)

    def number(name: str, suggestion: Suggestion, allowed: Range, kind: str = "default") -> float:
        return ledger.note(
            f"training.{name}", allowed.clip(suggestion.value), kind, suggestion.text, pin=f"training.{name}"
        )

    rate = number(
        "learning_rate", suggest_learning_rate(law, body, tokens, tokens_per_step), given.learning_rate, "law"
    )
    training = Training(
        context_length=context,
        precision=ledger.note(
            "training.precision",
            precision,
            "default",
            "bf16 where the device has it, fp32 on a CPU",
            pin="model.precision",
        ),
        global_batch=global_batch,
        tokens_per_step=tokens_per_step,
        steps=steps,
        optimizer=ledger.note("training.optimizer", "adam", "default", "AdamW: GPT-3, Llama 2 and 3"),
        learning_rate=rate,
        min_learning_rate=number(
            "min_learning_rate", suggest_min_learning_rate(rate), given.min_learning_rate, "derived"
        ),
        schedule=ledger.note(
            "training.schedule",
            given.schedule.pick("cosine"),
            "default",
            "cosine that ends with the tokens (Hoffmann et al. 2022, appendix B)",
            pin="training.schedule",
        ),
        warmup_steps=_warmup(spec, ledger, steps),
        beta1=number("beta1", USUAL["beta1"], given.beta1),
        beta2=number("beta2", USUAL["beta2"], given.beta2),
        epsilon=number("epsilon", USUAL["epsilon"], given.epsilon),
        weight_decay=number("weight_decay", USUAL["weight_decay"], given.weight_decay),
        clip_grad=number("clip_grad", USUAL["clip_grad"], given.clip_grad),
        init_std=number("init_std", USUAL["init_std"], given.init_std),
        seed=ledger.note(
            "training.seed", int(spec.seed.clip(DEFAULT_SEED)), "default", "Megatron-LM's default", pin="seed"
        ),
    )
    rate_is_ours, batch_is_ours = not given.learning_rate.pinned, not given.global_batch.pinned
    warnings = list_law_extrapolations(law, body, tokens) if rate_is_ours or batch_is_ours else []
    trained = steps * tokens_per_step
    if abs(trained / tokens - 1) > ROUNDING_WORTH_A_WARNING:
        warnings.append(
            f"{tokens:,} tokens are {tokens / tokens_per_step:.3g} steps of {tokens_per_step:,}: whole steps train {trained:,}"
        )
    return training, warnings


def choose_validation(spec: ResolvedSpec, ledger: Ledger, training: Training) -> Validation:
    """How often a run is validated and on how much, what it is compared with, and the sample at its end."""
    cadence = choose_cadence(training.steps, training.global_batch, len(spec.data.sources))
    pretrain = next((stage.name for stage in spec.stages.written if stage.kind == "pretrain"), "pretrain")
    return Validation(
        every_steps=ledger.note(
            "validation.every_steps",
            cadence.every_steps,
            "derived",
            f"{cadence.count} times in {training.steps:,} steps",
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


def _global_batch(spec: ResolvedSpec, ledger: Ledger, law: HyperparameterLaw, tokens: int, context: int) -> int:
    given, devices = spec.training, spec.compute.devices
    pin = "training.global_batch"
    if given.global_batch.pinned and given.global_batch_unit == "sequences":
        return ledger.note(pin, int(given.global_batch.low), "pinned", "", pin=pin)
    suggestion = suggest_batch_tokens(law, tokens)
    wanted = given.global_batch.clip(suggestion.value)
    batch = choose_global_batch(wanted / context, devices, stated=given.global_batch.pinned)
    rounding = f"; {wanted / context:.4g} sequences of {context}, rounded so that {devices} devices can divide them"
    return ledger.note(pin, batch, "law", suggestion.text + rounding, pin=pin, detail=rounding)


def _steps(spec: ResolvedSpec, tokens: int, tokens_per_step: int) -> int:
    """Whole steps: the nearest number, or what a limit pays for in full."""
    if spec.data.tokens.pinned or not limits_of(spec):
        return max(1, round(tokens / tokens_per_step))
    return max(1, tokens // tokens_per_step)


def _warmup(spec: ResolvedSpec, ledger: Ledger, steps: int) -> int:
    given = spec.training
    suggestion = suggest_warmup_steps(steps)
    if not given.warmup.pinned:
        value = suggestion.value
    else:
        value = given.warmup.low if given.warmup_unit == "steps" else given.warmup.low * steps
    if round(value) > steps:
        place = spec.pins.get("training.warmup", "the spec")
        raise IllegalPlanError(
            f"{place}: training.warmup: {value:,.0f} steps of warm-up are more than the run's {steps:,} steps; "
            "shorten it, or state it as a share of the steps"
        )
    return ledger.note("training.warmup_steps", round(value), "default", suggestion.text, pin="training.warmup")
