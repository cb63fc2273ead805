"""The stages of a Spec: which kinds there are, and the fields of each."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.config import JsonDict

from trainwright.compiler.spec_fields import Batch, Metric, Name, Section, WarmupShare

# In the order of the pipeline.
StageKind = Literal[
    "ingest", "curate", "tokenizer", "tokenize", "pretrain", "sft", "reward", "dpo", "ppo", "grpo", "evaluate", "export"
]
STAGE_KINDS: tuple[StageKind, ...] = get_args(StageKind)
SINGLE_KINDS: tuple[StageKind, ...] = ("ingest", "curate", "tokenizer", "tokenize", "pretrain")  # once in a plan
MODEL_KINDS: tuple[StageKind, ...] = ("pretrain", "sft", "dpo", "ppo", "grpo")  # they leave a language model
PAIR_KINDS: tuple[StageKind, ...] = ("reward", "dpo")  # tuned on pairs of answers
RECORD_KINDS: tuple[StageKind, ...] = ("sft", *PAIR_KINDS)  # tuned on answers that are there
PROMPT_KINDS: tuple[StageKind, ...] = ("ppo", "grpo")  # tuned on answers that they generate, which something scores
TUNING_KINDS: tuple[StageKind, ...] = (*RECORD_KINDS, *PROMPT_KINDS)
STARTING_KINDS: tuple[StageKind, ...] = (*TUNING_KINDS, "evaluate", "export")  # they start from a checkpoint
VERIFIER = "verifier"  # what `reward` calls a program that checks answers


def _of(*kinds: StageKind, description: str, **bounds: Any) -> Any:
    """A field that only stages of these kinds have."""
    extra: JsonDict = {"x-kinds": list(kinds)}
    return Field(default=None, description=f"{', '.join(kinds)}: {description}", json_schema_extra=extra, **bounds)


class TaskSpec(Section):
    """One task with several choices a question: `data` or `connector`."""

    data: str | None = Field(
        default=None,
        min_length=1,
        description="file or glob of .jsonl with {query, choices, answer}, or a YAML task of lm-evaluation-harness on local"
        " data; relative to data.root, kept as written",
    )
    connector: Literal["python-stdlib:choices"] | None = Field(
        default=None, description="questions that are made where the run happens: which summary belongs to a function"
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, le=100, description="answered questions that stand before each (count)"
    )


class StageSpec(Section):
    """One stage instance. Which fields it has depends on its kind."""

    kind: StageKind | None = Field(default=None, description="which stage it is; absent: the instance's name")
    retries: int | None = Field(
        default=None, ge=0, le=100, description="how often the runner starts it again after a failure (count)"
    )
    near_duplicates: float | None = _of(
        "curate",
        ge=0,
        le=1,
        description="similarity (Jaccard, of word shingles) from which a document is a near-duplicate, and dropped; 0: kept",
    )
    scrub: Annotated[tuple[Literal["email", "ip", "card", "iban"], ...], Field(strict=False)] | None = _of(
        "curate", description="personal data that is replaced by placeholders"
    )
    baseline: Literal["bigram", "none"] | None = _of(
        "pretrain", description="the model that the result is compared with on held-out text"
    )
    origin: str | None = _of(
        *STARTING_KINDS,
        alias="from",
        min_length=1,
        description="the stage whose model it takes (of an evaluate stage: the one it evaluated, if it passed its gates), or"
        ' a path to a checkpoint, which holds a "/"; absent: the nearest above it',
    )
    data: str | None = _of(
        *TUNING_KINDS,
        min_length=1,
        description="file or glob of .jsonl, with {messages} for sft, {prompt, chosen, rejected} for reward and dpo, {prompt} for"
        " ppo and grpo (and what a verifier checks an answer by); relative to data.root, kept as written",
    )
    connector: Literal["python-stdlib:questions", "python-stdlib:preferences"] | None = _of(
        *RECORD_KINDS,
        description="records that are made where the run happens: questions for sft, preferences for reward and dpo",
    )
    too_long: Literal["truncate", "drop", "split"] | None = _of(
        *RECORD_KINDS, description="what becomes of a record longer than the context; only a conversation can be split"
    )
    chat_template: str | None = _of(
        "sft",
        min_length=1,
        description="file with a Jinja chat template that has {% generation %} marks; absent: that of the model, else ChatML",
    )
    epochs: int | None = _of(*TUNING_KINDS, ge=1, le=1000, description="passes over the data (count)")
    global_batch: Batch | None = _of(
        *TUNING_KINDS,
        description='a step, as "8 sequences" (rows in which examples are packed, of reward and dpo twice as long; of ppo and'
        " grpo episodes: an answer generated for a prompt)",
    )
    learning_rate: float | None = _of(*TUNING_KINDS, gt=0, le=10, description="peak learning rate (per step)")
    min_learning_rate: float | None = _of(*TUNING_KINDS, ge=0, le=10, description="learning rate at the end (per step)")
    schedule: Literal["cosine", "constant"] | None = _of(
        *TUNING_KINDS, description="course of the learning rate after warm-up"
    )
    warmup: WarmupShare | None = _of(*TUNING_KINDS, description='linear warm-up, as "5%" of the steps')
    weight_decay: float | None = _of(
        *TUNING_KINDS, ge=0, le=10, description="decoupled weight decay of AdamW (per step, times the learning rate)"
    )
    beta: float | None = _of(
        "dpo", gt=0, le=1000, description="strength of the pull to the model that it starts from (1 / nats)"
    )
    nll: float | None = _of(
        "dpo", ge=0, le=1000, description="weight of the chosen answer's negative log-likelihood in the loss; 0: none"
    )
    reward: str | None = _of(
        *PROMPT_KINDS,
        min_length=1,
        description='who scores an answer: a stage of kind reward, a path to a checkpoint of one, which holds a "/", or'
        " verifier (a program that checks it); absent: of ppo the nearest reward stage above it, of grpo a verifier",
    )
    samples: int | None = _of(
        *PROMPT_KINDS, ge=1, le=4096, description="answers generated for a prompt each time it is drawn (count)"
    )
    kl: float | None = _of(
        *PROMPT_KINDS,
        ge=0,
        le=100,
        description="weight of the divergence from the model that it starts from (1 / nats)",
    )
    clip: float | None = _of(
        *PROMPT_KINDS, gt=0, le=100, description="largest change of a token's probability ratio in one update"
    )
    minibatch: int | None = _of(*PROMPT_KINDS, ge=1, le=10**9, description="episodes an update (count)")
    inner_epochs: int | None = _of(
        *PROMPT_KINDS, ge=1, le=100, description="passes over a batch of episodes, in minibatches (count)"
    )
    temperature: float | None = _of(*PROMPT_KINDS, gt=0, le=10, description="temperature of the sampling")
    max_answer_tokens: int | None = _of(
        *PROMPT_KINDS, ge=1, le=10**7, description="where the generation of an answer stops (tokens)"
    )
    examples: int | None = _of(
        *TUNING_KINDS,
        ge=1,
        le=10**12,
        description="conversations, pairs or prompts that are trained on, an epoch (count): prices the stage",
    )
    prompt_tokens: int | None = _of(
        *TUNING_KINDS,
        ge=1,
        le=10**7,
        description="mean length of what is not learned of an example (tokens): prices the stage",
    )
    answer_tokens: int | None = _of(
        *TUNING_KINDS, ge=1, le=10**7, description="mean length of an answer (tokens): prices the stage"
    )
    compare: Annotated[tuple[str, ...], Field(strict=False)] | None = _of(
        "evaluate", description="models that the evaluated one is compared with on the same items: stages, or a path"
    )
    tasks: dict[Name, TaskSpec] | None = _of("evaluate", description="multiple-choice tasks by name")
    gates: dict[Metric, float] | None = _of(
        "evaluate",
        description="by metric, such as accuracy/<task>: the threshold that the model must reach, or what depends on it stops",
    )


def kinds_with(field: str) -> tuple[str, ...]:
    """The stage kinds that have this field of StageSpec."""
    extra = StageSpec.model_fields[field].json_schema_extra
    return tuple(extra["x-kinds"]) if isinstance(extra, dict) else STAGE_KINDS  # type: ignore[arg-type]


def key_of(field: str) -> str:
    """How a field of StageSpec is spelt in a spec: `from` is no name in Python."""
    return StageSpec.model_fields[field].alias or field
