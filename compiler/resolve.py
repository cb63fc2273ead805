"""Spec + facts -> ResolvedSpec: names become facts, quantities SI base units, and every open question an explicit set or range.

Fields that contradict each other are refused here, all of them in one message.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from trainwright.compiler.contradictions import find_contradictions
from trainwright.compiler.document import Document
from trainwright.compiler.errors import CompileError, SpecError, UnknownNameError
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import Device, Family, find_device, find_family
from trainwright.compiler.laws.find import find_law, load_law_file
from trainwright.compiler.laws.law import Law
from trainwright.compiler.load import LoadedSpec
from trainwright.compiler.plan import CostLine, Source
from trainwright.compiler.ranges import Choice, Range, open_choice, open_range
from trainwright.compiler.resolve_layout import ResolvedLayout, resolve_layout
from trainwright.compiler.resolve_stages import ResolvedStages, resolve_stages
from trainwright.compiler.spec import DataSpec, ModelSpec, PowerSpec, Spec
from trainwright.compiler.units import Quantity, format_quantity

# Fields of `model.shape` that few families have.
FURTHER = (
    *("experts_per_token", "expert_ffn_hidden_size", "shared_ffn_hidden_size", "first_dense_layers", "moe_every"),
    *("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"),
)


@dataclass(frozen=True)
class PinnedShape:
    """Dimensions that the user stated; counts of elements."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    further: Mapping[str, int]  # stated fields of mixtures, latent attention and multi-token prediction


@dataclass(frozen=True)
class ResolvedModel:
    family: Family
    size: Range  # parameters
    shape: tuple[PinnedShape, ...]  # one when pinned, else empty
    context_length: Range  # tokens
    precision: Choice[str]
    initial: str  # a path as written; "": random weights
    vocab_size: Range
    num_experts: Range  # pinned of a dense family: 0

    @property
    def size_is_open(self) -> bool:
        """Neither a size nor a shape is stated."""
        return not self.size.pinned and not self.shape


@dataclass(frozen=True)
class ResolvedData:
    root: str  # as written; "." where absent
    sources: tuple[Source, ...]  # weights sum to 1, or are all 0.0
    mixture: str  # "weighted" | "by_tokens"
    tokens: Range
    unique_tokens: float  # that the sources hold; infinite: no limit is stated
    validation_fraction: Range
    validation_every: tuple[Quantity, ...]  # one when stated, else empty
    test_fraction: Range


# Settings of `training` that most runs leave alone.
FURTHER_TRAINING = (
    *("undecayed", "hidden_dropout", "attention_dropout", "z_loss", "balancing", "aux_loss", "bias_rate"),
    *("router_z_loss", "mtp_loss"),
)


@dataclass(frozen=True)
class StatedRamp:
    """A batch that grows: sequences, and the tokens over which it does."""

    start: int
    increment: int
    tokens: float


@dataclass(frozen=True)
class ResolvedTraining:
    global_batch_unit: str  # "tokens" | "sequences"
    global_batch: Range  # in that unit
    learning_rate: Range
    min_learning_rate: Range
    schedule: Choice[str]
    warmup_unit: str  # "steps" | "fraction" (of the steps)
    warmup: Range
    decay_unit: str  # likewise
    decay: Range  # of a wsd schedule
    weight_decay: Range
    beta1: Range
    beta2: Range
    epsilon: Range
    clip_grad: Range
    init_std: Range
    optimizer: str  # "adam" | "lion" | "muon"; "adam" where absent
    further: Mapping[str, Any]  # stated settings of FURTHER_TRAINING
    ramp: tuple[StatedRamp, ...]  # one when stated, else empty


@dataclass(frozen=True)
class ResolvedCompute:
    device: Device
    nodes: int
    devices_per_node: int
    devices: int  # nodes x devices_per_node
    budget: Quantity  # kind "time" (s) | "money" (USD) | "flops" | "device_hours" | "none" (amount 0.0)
    price_usd_per_device_hour: float  # 0.0: not stated


@dataclass(frozen=True)
class ResolvedPower:
    """Infinite: not stated."""

    device_w: float
    pue: float
    carbon_kg_per_kwh: float


@dataclass(frozen=True)
class ResolvedObjective:
    target_loss: float  # nats a token of the law; 0.0: not stated
    deadline_s: float  # on all devices; infinite: not stated


@dataclass(frozen=True)
class MupBase:
    """The run that a learning rate is transferred from."""

    hidden_size: int
    learning_rate: float
    init_std: float


@dataclass(frozen=True)
class ResolvedScaling:
    law: Law
    inference_tokens: float  # 0.0: not stated
    serving_memory_bytes: float  # infinite: not stated
    learning_rate: str  # a law, or "mup"; "": the default
    batch: str  # a law; "": the default
    mup: tuple[MupBase, ...]  # one when stated, else empty


@dataclass(frozen=True)
class ResolvedSpec:
    name: str
    overrides: tuple[str, ...]
    seed: Range
    model: ResolvedModel
    data: ResolvedData
    training: ResolvedTraining
    compute: ResolvedCompute
    power: ResolvedPower
    costs: tuple[CostLine, ...]
    objective: ResolvedObjective
    scaling: ResolvedScaling
    layout: ResolvedLayout
    stages: ResolvedStages
    pins: Mapping[str, str]  # spec path -> "tiny.yaml:12" or "--set path=value": what the user wrote and where


# By default: the refit of Chinchilla's data; laws that know repeated tokens, and experts.
LAW, REPEATED_LAW, MIXTURE_LAW = "epoch2024", "muennighoff2023", "ludziejewski2025"
_ROTARY_BASE = 10_000  # RoFormer (arXiv 2104.09864), where a family with other positions has none


def resolve_spec(loaded: LoadedSpec) -> ResolvedSpec:
    """Raises SpecError (fields that contradict each other, all of them), UnknownNameError (device, family, size)."""
    spec, document = loaded.spec, loaded.document
    problems = [f"{document.place(path)}: {path}: {text}" for path, text in find_contradictions(spec)]
    if problems:
        raise SpecError("\n".join(problems))
    family, device = _facts(spec, document)
    if spec.model.num_experts and not family.rules.num_experts:
        where = f"{document.place('model.num_experts')}: model.num_experts"
        raise SpecError(f"{where}: {family.name} is dense; remove it, or take a mixture of experts, such as mixtral")
    devices = spec.compute.nodes * spec.compute.devices_per_node
    cuda = device.kind == "cuda"
    price, mup = spec.cluster.price, spec.scaling.mup
    return ResolvedSpec(
        name=spec.name,
        overrides=document.overrides,
        seed=open_range(spec.seed, "seed"),
        model=_model(spec.model, family, _size(spec.model, family, document), cuda),
        data=_data(spec.data),
        training=_training(spec),
        compute=ResolvedCompute(
            device=device,
            nodes=spec.compute.nodes,
            devices_per_node=spec.compute.devices_per_node,
            devices=devices,
            budget=spec.compute.budget or Quantity("none", 0.0),
            price_usd_per_device_hour=price.amount if price is not None else 0.0,
        ),
        power=_power(spec.cluster.power),
        costs=tuple(CostLine(line.name, line.amount.amount, line.per or "") for line in spec.cluster.costs),
        objective=ResolvedObjective(
            target_loss=spec.objective.target_loss or 0.0,
            deadline_s=spec.objective.deadline.amount if spec.objective.deadline is not None else math.inf,
        ),
        scaling=ResolvedScaling(
            law=_law(spec, family, document),
            inference_tokens=spec.scaling.inference_tokens.amount if spec.scaling.inference_tokens is not None else 0.0,
            serving_memory_bytes=(
                spec.scaling.serving_memory.amount if spec.scaling.serving_memory is not None else math.inf
            ),
            learning_rate=spec.scaling.learning_rate or "",
            batch=spec.scaling.batch or "",
            mup=() if mup is None else (MupBase(mup.hidden_size, mup.learning_rate, mup.init_std),),
        ),
        layout=resolve_layout(spec, family, device),
        stages=resolve_stages(spec),
        pins=_pins(document),
    )


def _positioned(family: Family, model: ModelSpec) -> Family:
    """The family with the positions that the user wants, published sizes too."""
    changes: dict[str, Any] = {}
    if model.positions is not None and model.positions != family.rules.positions:
        base = family.rules.rotary_base or _ROTARY_BASE
        changes = {"positions": model.positions, "rotary_base": base if model.positions == "rope" else 0}
    further = dict(family.rules.shape)
    stated = {name: value for name in ("rotary_scaling", "mtp_layers") if (value := getattr(model, name)) is not None}
    rules = replace(family.rules, **changes, shape=further | stated)
    published = {name: replace(shape, **changes, **stated) for name, shape in family.published.items()}
    return replace(family, rules=rules, published=published)


def _facts(spec: Spec, document: Document) -> tuple[Family, Device]:
    problems = []
    for path, name, find in (
        ("model.family", spec.model.family, find_family),
        ("compute.device", spec.compute.device, find_device),
    ):
        try:
            find(name)
        except UnknownNameError as error:
            problems.append(f"{document.place(path)}: {path}: {error}")
    if problems:
        raise UnknownNameError("\n".join(problems))
    return _positioned(find_family(spec.model.family), spec.model), find_device(spec.compute.device)


def _law(spec: Spec, family: Family, document: Document) -> Law:
    """The law that is named, or the one that knows what the spec states. Raises UnknownNameError, SpecError (a law file)."""
    named = spec.scaling.law
    if named is None:
        return find_law(MIXTURE_LAW if family.rules.num_experts else REPEATED_LAW if spec.data.unique_tokens else LAW)
    try:
        if named.endswith((".yaml", ".yml")):
            return load_law_file(Path(document.file).parent / named)
        return find_law(named)
    except CompileError as error:
        raise type(error)(f"{document.place('scaling.law')}: scaling.law: {error}") from error


def _size(model: ModelSpec, family: Family, document: Document) -> Range:
    """Parameters; of a published size that is named, exactly those that it has here. Raises UnknownNameError."""
    size = model.size
    if not isinstance(size, str):
        return open_range(size, "size")
    context_length = model.context_length or family.rules.context_length
    counts = {
        name: count_parameters(replace(shape, vocab_size=model.vocab_size or shape.vocab_size), context_length)
        for name, shape in family.published.items()
    }
    if size not in counts:
        known = ", ".join(f"{name} = {format_quantity('parameters', count)}" for name, count in counts.items())
        raise UnknownNameError(
            f"{document.place('model.size')}: model.size: {family.name} has published no size {size}; give a count of"
            f" parameters, such as 46.7B, or one of its published sizes: {known}"
        )
    return Range(float(counts[size]), float(counts[size]))


def _model(model: ModelSpec, family: Family, size: Range, cuda: bool) -> ResolvedModel:
    shape: tuple[PinnedShape, ...] = ()
    if (given := model.shape) is not None:
        shape = (
            PinnedShape(
                num_layers=given.num_layers,
                hidden_size=given.hidden_size,
                ffn_hidden_size=given.ffn_hidden_size,
                num_attention_heads=given.num_attention_heads,
                num_query_groups=given.num_query_groups or given.num_attention_heads,
                head_dim=given.head_dim or given.hidden_size // given.num_attention_heads,
                further={name: value for name in FURTHER if (value := getattr(given, name)) is not None},
            ),
        )
    return ResolvedModel(
        family=family,
        size=size,
        shape=shape,
        context_length=open_range(model.context_length, "context_length"),
        # Without CUDA, bf16 saves no time, and fp32 is exact to compare.
        precision=open_choice(model.precision, ("bf16", "fp32") if cuda else ("fp32",)),
        initial=model.initial or "",
        vocab_size=open_range(model.vocab_size, "vocab_size"),
        num_experts=open_range(model.num_experts if family.rules.num_experts else 0, "num_experts"),
    )


def _data(data: DataSpec) -> ResolvedData:
    total = sum(source.weight or 0.0 for source in data.sources)
    sources = tuple(
        Source(
            name=source.name,
            path=source.path or "",
            connector=source.connector or "",
            weight=source.weight / total if source.weight is not None else 0.0,
            filters=source.filters or ("code" if source.connector == "python-stdlib:code" else "prose"),
        )
        for source in data.sources
    )
    return ResolvedData(
        root=data.root or ".",
        sources=sources,
        mixture="weighted" if total else "by_tokens",
        tokens=open_range(data.tokens, "tokens"),
        unique_tokens=data.unique_tokens.amount if data.unique_tokens is not None else math.inf,
        validation_fraction=open_range(data.validation, "held_out"),
        validation_every=() if data.validation_every is None else (data.validation_every,),
        test_fraction=open_range(data.test, "held_out"),
    )


def _training(spec: Spec) -> ResolvedTraining:
    given = spec.training
    return ResolvedTraining(
        global_batch_unit=given.global_batch.kind if given.global_batch is not None else "tokens",
        global_batch=open_range(given.global_batch, "batch"),
        learning_rate=open_range(given.learning_rate, "learning_rate"),
        min_learning_rate=open_range(given.min_learning_rate, "min_learning_rate"),
        schedule=open_choice(given.schedule, ("cosine", "linear", "wsd", "constant")),
        warmup_unit=given.warmup.kind if given.warmup is not None else "fraction",
        warmup=open_range(given.warmup, "fraction"),
        decay_unit=given.decay.kind if given.decay is not None else "fraction",
        decay=open_range(given.decay, "fraction"),
        weight_decay=open_range(given.weight_decay, "not_negative"),
        beta1=open_range(given.beta1, "fraction"),
        beta2=open_range(given.beta2, "fraction"),
        epsilon=open_range(given.epsilon, "positive"),
        clip_grad=open_range(given.clip_grad, "positive"),
        init_std=open_range(given.init_std, "positive"),
        optimizer="adam" if given.optimizer in (None, "adamw") else given.optimizer,
        further={name: value for name in FURTHER_TRAINING if (value := getattr(given, name)) is not None},
        ramp=()
        if given.ramp is None
        else (StatedRamp(given.ramp.start, given.ramp.increment, given.ramp.tokens.amount),),
    )


def _power(power: PowerSpec) -> ResolvedPower:
    return ResolvedPower(
        device_w=power.device.amount if power.device is not None else math.inf,
        pue=power.pue if power.pue is not None else math.inf,
        carbon_kg_per_kwh=power.carbon.amount if power.carbon is not None else math.inf,
    )


def _pins(document: Document) -> dict[str, str]:
    """Every value that the user wrote. The file by its last name only: where the compiler is started changes no plan."""
    places = {path: document.where[path] for path in _values(document.data, "") if path in document.where}
    return {
        path: place if place.startswith("--set ") else PurePath(document.file).name + place.removeprefix(document.file)
        for path, place in places.items()
    }


def _values(data: Any, path: str) -> Iterator[str]:
    """The paths at which a value, and not a section, a list or nothing, stands."""
    if isinstance(data, dict):
        for key, item in data.items():
            yield from _values(item, f"{path}.{key}" if path else key)
    elif isinstance(data, list):
        for index, item in enumerate(data):
            yield from _values(item, f"{path}[{index}]")
    elif data is not None:
        yield path
