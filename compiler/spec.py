"""The Spec: what the user wrote, nothing added. Types, ranges and descriptions only; absent means that the planner decides.

What concerns two fields at once is in `contradictions.py`, a fact in `resolve.py`, the finished plan in `check.py`.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.config import JsonDict
from pydantic_core import CoreSchema, core_schema

from trainwright.compiler.units import BUDGET_KINDS, KINDS, Quantity, UnitError, format_quantity, parse_quantity

# In the order of the pipeline.
StageKind = Literal["ingest", "curate", "tokenizer", "tokenize", "pretrain", "sft", "dpo", "evaluate", "export"]
STAGE_KINDS: tuple[StageKind, ...] = get_args(StageKind)
SINGLE_KINDS: tuple[StageKind, ...] = ("ingest", "curate", "tokenizer", "tokenize", "pretrain")  # once in a plan
MODEL_KINDS: tuple[StageKind, ...] = ("pretrain", "sft", "dpo")  # they leave a checkpoint
TUNING_KINDS: tuple[StageKind, ...] = ("sft", "dpo")
STARTING_KINDS: tuple[StageKind, ...] = ("sft", "dpo", "evaluate", "export")  # they start from a checkpoint


@dataclass(frozen=True)
class _Measure:
    """Makes a field hold a quantity of an accepted kind, low <= amount <= high in that kind's base unit."""

    accepted: tuple[str, ...]
    bare: str = ""  # the kind of a number without a unit; "": a unit is needed
    low: float = 0.0
    high: float = 1e60
    names: str = ""  # pattern of the names that stand for a quantity, which the facts know; they are kept as written

    def __call__(self, value: object) -> Quantity | str:
        if self.names and isinstance(value, str) and re.fullmatch(self.names, value.strip()):
            return value.strip()
        quantity = parse_quantity(value, self.accepted, self.bare)
        if not self.low <= quantity.amount <= self.high:
            word, bound = ("at least", self.low) if quantity.amount < self.low else ("at most", self.high)
            raise UnitError(f"{value!r} is out of range: it must be {word} {format_quantity(quantity.kind, bound)}")
        return quantity

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: object) -> dict[str, Any]:
        return {
            "type": ["string", "number"] if self.bare else "string",
            "x-unit": " | ".join(KINDS[kind].example for kind in self.accepted),
        }


def _section_or_empty(value: object) -> object:
    """A key with nothing after it (`training:`) is an empty section."""
    return {} if value is None else value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Tokens = Annotated[Quantity, _Measure(("tokens",), bare="tokens", low=1, high=1e16)]
Size = Annotated[
    Quantity | str,  # a mixture of experts is called by them: 8x7B
    _Measure(("parameters",), bare="parameters", low=1000, high=1e14, names=r"\d+x\d+(\.\d+)?[MBT]"),
]
Batch = Annotated[Quantity, _Measure(("tokens", "sequences"), low=1, high=1e10)]
Warmup = Annotated[Quantity, _Measure(("steps", "fraction"), high=1e9)]
WarmupShare = Annotated[Quantity, _Measure(("fraction",), bare="fraction", high=1)]
Metric = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(/[A-Za-z0-9._-]+){0,2}$")]
HeldOut = Annotated[Quantity, _Measure(("fraction",), bare="fraction", low=0.001, high=0.4)]
Budget = Annotated[Quantity, _Measure(BUDGET_KINDS, low=1e-3)]
Price = Annotated[Quantity, _Measure(("price",), low=1e-4, high=1e5)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ShapeSpec(_Section):
    """The model's dimensions, when they are not to be chosen."""

    num_layers: int = Field(ge=1, le=1000, description="transformer layers (count)")
    hidden_size: int = Field(ge=8, le=200_000, description="width of the residual stream (elements)")
    ffn_hidden_size: int = Field(ge=8, le=1_000_000, description="width of the feed-forward layer (elements)")
    num_attention_heads: int = Field(ge=1, le=2048, description="query heads (count)")
    num_query_groups: int | None = Field(
        default=None, ge=1, le=2048, description="key and value heads (count); absent: as many as query heads"
    )
    head_dim: int | None = Field(
        default=None, ge=2, le=1024, description="width of a head (elements); absent: hidden_size / num_attention_heads"
    )


class ModelSpec(_Section):
    """What is trained."""

    family: str = Field(
        description="a known model family, such as llama: it sets norm, activation, positions and biases"
    )
    size: Size | None = Field(
        default=None,
        description="parameters (count), such as 8B, or what the family calls a published size, such as 8x7B; absent: chosen"
        " from the budget or the tokens",
    )
    shape: ShapeSpec | None = Field(
        default=None, description="dimensions, instead of a size; absent: chosen for the size"
    )
    context_length: int | None = Field(default=None, ge=16, le=10_000_000, description="tokens a sequence")
    precision: Literal["bf16", "fp32"] | None = Field(
        default=None, description="number format of parameters and activations in training"
    )
    vocab_size: int | None = Field(
        default=None, ge=261, le=2_000_000, description="entries of the tokenizer (count), before padding"
    )


class SourceSpec(_Section):
    """One source of text: `path` or `connector`."""

    name: Name = Field(description="what reports and files call it")
    path: str | None = Field(
        default=None,
        min_length=1,
        description="file or glob of .jsonl, .jsonl.gz or .txt; relative to data.root, kept as written",
    )
    connector: Literal["python-stdlib:code", "python-stdlib:prose"] | None = Field(
        default=None,
        description="text that is made where the run happens: modules or docstrings of the Python standard library",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="share of the training tokens (any scale); absent on all sources: in proportion to their tokens",
    )
    filters: Literal["prose", "code", "none"] | None = Field(
        default=None,
        description="heuristics by which curate drops documents of low quality; absent: code for a connector of code, else prose",
    )


class DataSpec(_Section):
    """What it is trained on."""

    root: str | None = Field(
        default=None,
        min_length=1,
        description="folder that relative paths start from; absent: where the run is started",
    )
    sources: Annotated[tuple[SourceSpec, ...], Field(strict=False, min_length=1)] = Field(
        description="where the text comes from"
    )
    tokens: Tokens | None = Field(
        default=None, description="tokens to train on (count), such as 1.4T; absent: chosen from the size or the budget"
    )
    validation: HeldOut | None = Field(
        default=None,
        description="part held out for validation (fraction of each source's bytes, in whole groups of documents)",
    )
    test: HeldOut | None = Field(
        default=None,
        description="part held out for the final test (fraction of each source's bytes, in whole groups of documents)",
    )


class TrainingSpec(_Section):
    """How the optimizer goes; what is absent comes from published laws and customs."""

    global_batch: Batch | None = Field(default=None, description='a step, as "4M tokens" or "512 sequences"')
    learning_rate: float | None = Field(default=None, gt=0, le=10, description="peak learning rate (per step)")
    min_learning_rate: float | None = Field(
        default=None, ge=0, le=10, description="learning rate at the end (per step)"
    )
    schedule: Literal["cosine", "constant"] | None = Field(
        default=None, description="course of the learning rate after warm-up"
    )
    warmup: Warmup | None = Field(default=None, description='linear warm-up, as "2000 steps" or "3%" of the steps')
    weight_decay: float | None = Field(
        default=None, ge=0, le=10, description="decoupled weight decay of AdamW (per step, times the learning rate)"
    )
    beta1: float | None = Field(default=None, ge=0, lt=1, description="decay of Adam's first moment (per step)")
    beta2: float | None = Field(default=None, ge=0, lt=1, description="decay of Adam's second moment (per step)")
    epsilon: float | None = Field(default=None, gt=0, le=1, description="Adam's epsilon (in units of the gradient)")
    clip_grad: float | None = Field(
        default=None, gt=0, le=1e6, description="largest global norm of the gradient (in units of the gradient)"
    )
    init_std: float | None = Field(default=None, gt=0, le=10, description="standard deviation of the initial weights")


class ComputeSpec(_Section):
    """What it is trained with."""

    device: str = Field(description="a known device, such as h100-sxm-80gb or cpu")
    nodes: int = Field(ge=1, le=100_000, description="machines (count)")
    devices_per_node: int = Field(ge=1, le=1024, description="devices a machine (count); on cpu: processes")
    budget: Budget | None = Field(
        default=None,
        description='what may be spent: "21 days" on all devices, "$2M", "6e23 FLOPs" or "500k device-hours"',
    )


class ClusterSpec(_Section):
    """What is particular to the user's cluster."""

    price: Price | None = Field(default=None, description='"$2.10/device-hour"; absent: no cost is shown')


class LayoutSpec(_Section):
    """Pins on how the model is laid out on the devices; what is absent is searched."""

    tensor: int | None = Field(default=None, ge=1, le=1024, description="tensor-parallel degree (devices)")
    pipeline: int | None = Field(default=None, ge=1, le=1024, description="pipeline-parallel degree (devices)")
    data: int | None = Field(default=None, ge=1, le=1_000_000, description="data-parallel degree (devices)")
    micro_batch: int | None = Field(
        default=None, ge=1, le=65_536, description="sequences that a device computes at once"
    )
    recompute: Literal["none", "selective", "full"] | None = Field(
        default=None,
        description="activations computed again in the backward pass: none, core attention, or every layer",
    )
    layer_spec: Literal["transformer_engine", "local"] | None = Field(
        default=None,
        description="implementation of the layers; absent: transformer_engine on CUDA devices, local on cpu",
    )


def _of(*kinds: StageKind, description: str, **bounds: Any) -> Any:
    """A field that only stages of these kinds have."""
    extra: JsonDict = {"x-kinds": list(kinds)}
    return Field(default=None, description=f"{', '.join(kinds)}: {description}", json_schema_extra=extra, **bounds)


class TaskSpec(_Section):
    """One task with several choices a question: `data` or `connector`."""

    data: str | None = Field(
        default=None,
        min_length=1,
        description="file or glob of .jsonl with {query, choices, answer}; relative to data.root, kept as written",
    )
    connector: Literal["python-stdlib:choices"] | None = Field(
        default=None, description="questions that are made where the run happens: which summary belongs to a function"
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, le=100, description="answered questions that stand before each (count)"
    )


class StageSpec(_Section):
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
        description="file or glob of .jsonl, with {messages} for sft, {prompt, chosen, rejected} for dpo; relative to"
        " data.root, kept as written",
    )
    connector: Literal["python-stdlib:questions", "python-stdlib:preferences"] | None = _of(
        *TUNING_KINDS, description="records that are made where the run happens: questions for sft, preferences for dpo"
    )
    too_long: Literal["truncate", "drop", "split"] | None = _of(
        *TUNING_KINDS, description="what becomes of a record longer than the context; only a conversation can be split"
    )
    chat_template: str | None = _of(
        "sft",
        min_length=1,
        description="file with a Jinja chat template that has {% generation %} marks; absent: that of the model, else ChatML",
    )
    epochs: int | None = _of(*TUNING_KINDS, ge=1, le=1000, description="passes over the data (count)")
    global_batch: Batch | None = _of(
        *TUNING_KINDS, description='a step, as "8 sequences" (rows in which examples are packed; dpo: twice as long)'
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


class Spec(_Section):
    """A training plan's specification."""

    name: Name = Field(description="what bundle, reports and plan call the run")
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1, description="seed of every random choice")
    model: ModelSpec = Field(description="what is trained")
    data: DataSpec = Field(description="what it is trained on")
    training: Annotated[TrainingSpec, BeforeValidator(_section_or_empty)] = Field(
        default=TrainingSpec(), description="how the optimizer goes"
    )
    compute: ComputeSpec = Field(description="what it is trained with")
    cluster: Annotated[ClusterSpec, BeforeValidator(_section_or_empty)] = Field(
        default=ClusterSpec(), description="what is particular to the cluster"
    )
    layout: Annotated[LayoutSpec, BeforeValidator(_section_or_empty)] = Field(
        default=LayoutSpec(), description="pins on the layout"
    )
    stages: dict[StageName, Annotated[StageSpec, BeforeValidator(_section_or_empty)]] = Field(
        min_length=1, description="stage instances by name; stages that these need and nobody wrote are implied"
    )
