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
from trainwright.compiler.choose.kernels import choose_cadence
from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.estimate.params import count_body_parameters
from trainwright.compiler.facts import HyperparameterLaw, find_hyperparameter_law
from trainwright.compiler.plan import Shape, Training
from trainwright.compiler.resolve import Range, ResolvedSpec

HYPERPARAMETER_LAW = "step_law"
DEFAULT_SEED = 1234  # Megatron-LM's
SAMPLE_TOKENS = 48


def choose_training(
    spec: ResolvedSpec, ledger: Ledger, shape: Shape, tokens: int, context: int, precision: str
) -> tuple[Training, list[str]]:
    """The training section for a shape and a number of tokens, and warnings where a law is used outside its range."""
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
    cadence = choose_cadence(steps, global_batch, len(spec.data.sources))
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
        validation_every_steps=ledger.note(
            "training.validation_every_steps", cadence.every_steps, "derived", f"about ten in {steps:,} steps"
        ),
        validation_sequences=ledger.note(
            "training.validation_sequences",
            cadence.sequences,
            "derived",
            "validations cost at most 2 % of the training FLOPs",
        ),
        baseline=_baseline(spec, ledger),
        sample_tokens=ledger.note("training.sample_tokens", SAMPLE_TOKENS, "default", "a text sample ends the run"),
    )
    rate_is_ours, batch_is_ours = not given.learning_rate.pinned, not given.global_batch.pinned
    warnings = list_law_extrapolations(law, body, tokens) if rate_is_ours or batch_is_ours else []
    return training, warnings


def _global_batch(spec: ResolvedSpec, ledger: Ledger, law: HyperparameterLaw, tokens: int, context: int) -> int:
    given, devices = spec.training, spec.compute.devices
    pin = "training.global_batch"
    if given.global_batch.pinned and given.global_batch_unit == "sequences":
        return ledger.note(pin, int(given.global_batch.low), "pinned", "", pin=pin)
    suggestion = suggest_batch_tokens(law, tokens)
    wanted = given.global_batch.clip(suggestion.value)
    batch = choose_global_batch(wanted / context, devices)
    text = f"{suggestion.text}; {wanted / context:.4g} sequences, rounded so that {devices} devices can divide them"
    return ledger.note(pin, batch, "law", text, pin=pin)


def _steps(spec: ResolvedSpec, tokens: int, tokens_per_step: int) -> int:
    """Whole steps: the nearest number, or what a budget pays for in full."""
    if spec.data.tokens.pinned or spec.compute.budget.kind == "none":
        return max(1, round(tokens / tokens_per_step))
    return max(1, tokens // tokens_per_step)


def _warmup(spec: ResolvedSpec, ledger: Ledger, steps: int) -> int:
    given = spec.training
    suggestion = suggest_warmup_steps(steps)
    if not given.warmup.pinned:
        value = suggestion.value
    else:
        value = given.warmup.low if given.warmup_unit == "steps" else given.warmup.low * steps
    return ledger.note("training.warmup_steps", round(value), "default", suggestion.text, pin="training.warmup")


def _baseline(spec: ResolvedSpec, ledger: Ledger) -> str:
    pretrain = next((name for name, kind in spec.stages if kind == "pretrain"), "pretrain")
    return ledger.note(
        "training.baseline", spec.baseline.pick("none"), "default", "not asked for", pin=f"stages.{pretrain}.baseline"
    )
