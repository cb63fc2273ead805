"""Typed access to `data/*.yaml`: devices, model families, scaling laws, post-training recipes. The only reader of that folder.

A fact carries its source. Look-ups raise `UnknownNameError`, which suggests the nearest names. Everything is read once.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, TypeVar

from ruamel.yaml import YAML

from trainwright.compiler.errors import UnknownNameError
from trainwright.compiler.plan import Shape

GIB = 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class Device:
    """One accelerator (a GPU, or a CPU core). Rates are dense, links in one direction, all per device."""

    name: str
    kind: str  # "cuda" | "cpu"
    description: str
    peak_flops_per_s: Mapping[str, float]  # by precision: "bf16", "fp32"
    memory_bytes: int  # what PyTorch calls the total capacity
    fp8: bool  # its matrix products take 8-bit floats
    memory_bandwidth_bytes_per_s: float
    intra_node_bytes_per_s: float
    inter_node_bytes_per_s: float
    power_w: float  # at full load: the board or module alone
    efficiency: float  # share of the peak that products reach inside a step, before bubble and exposed communication
    sources: Mapping[str, str]  # by field name; peaks as "peak_flops_per_s.bf16"


@dataclass(frozen=True)
class Rules:
    """How a family makes a shape of a size nobody published. See data/model_families.yaml for each field."""

    gated: bool
    activation: str
    normalization: str
    norm_epsilon: float
    positions: str
    rotary_base: int
    linear_bias: bool
    qkv_bias: bool
    qk_norm: bool
    vocab_size: int
    context_length: int
    query_groups: int
    ffn_ratio: tuple[float, float, float]  # lowest, usual, highest ffn_hidden_size / hidden_size
    tied_up_to: float  # parameters
    width_per_layer: tuple[tuple[float, float], ...]  # (parameters, hidden_size / num_layers), rising
    num_experts: int
    experts_per_token: int
    expert_ratio: float  # expert_ffn_hidden_size / ffn_hidden_size of a chosen shape
    shared_ratio: float  # shared_ffn_hidden_size / expert_ffn_hidden_size
    balancing: str  # how the family's experts were balanced: "none" (dense) | "aux_loss" | "seq_aux_loss" | "bias"
    aux_loss: float  # weight of that loss
    shape: Mapping[str, Any]  # further fields of a Shape, alike in every size: those that differ from PLAIN


NARROW_TILE = 64  # elements: what the width of an expert is a multiple of, where the family's is a share of the FFN's
# Fields of a Shape that most families leave as they are.
PLAIN: Mapping[str, Any] = MappingProxyType(
    {
        "zero_centered_norm": False,
        "rotary_scaling": 0.0,
        "no_rope_every": 0,
        "qk_l2_norm": False,
        "q_lora_rank": 0,
        "kv_lora_rank": 0,
        "qk_rope_head_dim": 0,
        "v_head_dim": 0,
        "shared_ffn_hidden_size": 0,
        "first_dense_layers": 0,
        "moe_every": 1,
        "router_pre_softmax": False,
        "router_scaling": 1.0,
        "router_groups": 0,
        "router_group_topk": 0,
        "router_bias": False,
        "router_on_input": False,
        "mtp_layers": 0,
    }
)


# Fields of a Shape that stand in Rules by themselves.
OF_RULES = (
    *("gated", "activation", "normalization", "norm_epsilon", "positions", "rotary_base"),
    *("linear_bias", "qkv_bias", "qk_norm", "num_experts", "experts_per_token"),
)
_DENSE: dict[str, Any] = {
    "num_experts": 0,
    "experts_per_token": 0,
    "expert_ratio": 1.0,
    "shared_ratio": 0.0,
    "balancing": "none",
    "aux_loss": 0.0,
    "shape": {},
}


@dataclass(frozen=True)
class Family:
    """A model family: rules, and published shapes by size name ("8B")."""

    name: str
    description: str
    source: str
    rules: Rules
    published: Mapping[str, Shape]


# What a law may call the size of a model.
COUNTS = (
    "total",  # every parameter
    "embedding_once",  # every parameter; of embedding and output layer, one
    "without_embedding",  # the layers' matrices and the output layer
    "body",  # the layers' matrices
    "active",  # parameters that a token uses; embedding and output layer both, even where they are one
    "flops",  # DeepSeek's M: training FLOPs a token of the layers, attention counted full
)


FITTED = ("fitted_parameters", "fitted_tokens", "fitted_flops", "fitted_tokens_per_parameter")


@dataclass(frozen=True)
class LawFacts:
    """A scaling law as published, or as `trainwright fit` wrote it; ranges are (lowest, highest) fitted."""

    name: str
    form: str  # "additive" | "repeated" | "experts" | "frontier" | "kaplan": which formula the constants belong to
    source: str
    counts: str  # what N is: one of COUNTS
    flops: str  # what C is, in words
    loss_unit: str  # "": a law without a loss
    constants: Mapping[str, float]
    fitted_parameters: tuple[float, float]
    fitted_tokens: tuple[float, float]
    fitted_flops: tuple[float, float]
    fitted_tokens_per_parameter: tuple[float, float]
    draws: Mapping[str, tuple[float, ...]]  # constants of bootstrap draws, in one order; empty: none


@dataclass(frozen=True)
class PowerLaw:
    """coefficient x the product of quantities to a power; quantities as in data/hyperparameter_laws.yaml: N, D, C, E, L, D/N."""

    coefficient: float
    exponents: Mapping[str, float]
    unit: float  # N and D are counted in it: 1, or 1e9
    tokens: float  # of what a batch is counted in: 1, or those of a sequence


@dataclass(frozen=True)
class HyperparameterLaw:
    """A published law for learning rate, batch or the timescale of weight decay."""

    name: str
    source: str
    counts: str  # what N is: "body", "without_embedding", "flops" as in COUNTS, or "used": all that a token uses
    learning_rate: PowerLaw | None
    batch: PowerLaw | None
    timescale: PowerLaw | None  # of AdamW, as a share of the run
    own_batch: (
        float  # tokens a step of the fitted runs, where there is a rate and no law for the batch; 0.0: not stated
    )
    beta2: Mapping[str, float]  # "N", "up_to", "above": Adam's second moment by size; empty: not stated
    fitted: Mapping[str, tuple[float, float]]  # by quantity


@dataclass(frozen=True)
class Cited:
    """A published number. `parameters`: the size of the model that it was published for; 0.0: whatever the size."""

    value: float
    source: str
    parameters: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What published recipes do in one kind of tuning, by the names of data/recipes.yaml."""

    schedule: str  # "cosine" | "constant"
    schedule_source: str
    numbers: Mapping[str, Cited]
    by_size: Mapping[str, tuple[Cited, ...]]  # rising in parameters


@dataclass(frozen=True)
class ConnectorVolume:
    """How much a connector makes; tokens are means."""

    examples: int  # trained on
    prompt_tokens: int
    answer_tokens: int
    source: str


def load_devices() -> Mapping[str, Device]:
    """Every known device by its full name."""
    return _devices()[0]


def load_families() -> Mapping[str, Family]:
    """Every known model family by name."""
    return _families()


def find_device(name: str) -> Device:
    """The device of that name or alias ("h100" is h100-sxm-80gb). Raises UnknownNameError."""
    devices, aliases = _devices()
    return _find("device", aliases.get(name.lower(), name.lower()), devices, known=(*devices, *aliases))


def find_family(name: str) -> Family:
    """The model family of that name. Raises UnknownNameError."""
    return _find("model family", name.lower(), _families())


def find_law_facts(name: str) -> LawFacts:
    """The scaling law of that name. Raises UnknownNameError."""
    return _find("scaling law", name, _scaling_laws())


def load_law_facts() -> Mapping[str, LawFacts]:
    """Every known scaling law by name."""
    return _scaling_laws()


def make_law_facts(name: str, raw: Mapping[str, Any], draws: Mapping[str, tuple[float, ...]]) -> LawFacts:
    """A law from plain data; a range that the source does not give is unlimited."""
    limits = {key: tuple(float(bound) for bound in raw.get(key, (0.0, math.inf))) for key in FITTED}
    return LawFacts(
        name=name,
        form=raw["form"],
        source=" ".join(raw["source"].split()),
        counts=raw["counts"],
        flops=raw["flops"],
        loss_unit=" ".join(raw.get("loss_unit", "").split()),
        constants=MappingProxyType({key: float(value) for key, value in raw["constants"].items()}),
        draws=MappingProxyType(dict(draws)),
        **limits,  # type: ignore[arg-type] # two bounds each
    )


def load_hyperparameter_laws() -> Mapping[str, HyperparameterLaw]:
    """Every known law for learning rate, batch or weight decay, by name."""
    return _hyperparameter_laws()


def find_hyperparameter_law(name: str) -> HyperparameterLaw:
    """The law for learning rate and batch of that name. Raises UnknownNameError."""
    return _find("hyperparameter law", name, _hyperparameter_laws())


def find_recipe(kind: str) -> Recipe:
    """The recipe of a kind of tuning: sft, reward, dpo, ppo, grpo."""
    return _recipes()[0][kind]


def find_connector_volume(connector: str) -> ConnectorVolume:
    """How much a connector of conversations or pairs makes."""
    return _recipes()[1][connector]


def _find(kind: str, name: str, facts: Mapping[str, T], known: tuple[str, ...] = ()) -> T:
    if name in facts:
        return facts[name]
    near = difflib.get_close_matches(name, known or facts, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownNameError(f"no {kind} is called {name!r}: {hint}known: {', '.join(sorted(facts))}")


@cache
def _read(file: str) -> Any:
    # Pure: the C reader follows YAML 1.1, where 1e6 is a string.
    text = resources.files("trainwright.compiler.data").joinpath(file).read_text(encoding="utf-8")
    return YAML(typ="safe", pure=True).load(text)


@cache
def _devices() -> tuple[Mapping[str, Device], Mapping[str, str]]:
    raw = _read("accelerators.yaml")
    devices = {name: _device(name, facts) for name, facts in raw.items()}
    aliases = {alias: name for name, facts in raw.items() for alias in facts["aliases"]}
    return MappingProxyType(devices), MappingProxyType(aliases)


def _device(name: str, raw: Mapping[str, Any]) -> Device:
    numbers = {
        "memory_bytes": ("memory_gib", GIB),
        "memory_bandwidth_bytes_per_s": ("memory_bandwidth", 1),
        "intra_node_bytes_per_s": ("intra_node_bandwidth", 1),
        "inter_node_bytes_per_s": ("inter_node_bandwidth", 1),
        "power_w": ("power_w", 1),
        "efficiency": ("efficiency", 1),
    }
    values: dict[str, Any] = {field: float(raw[key]["value"]) * factor for field, (key, factor) in numbers.items()}
    sources = {field: raw[key]["source"] for field, (key, _) in numbers.items()}
    peaks = raw["peak_flops_per_s"]
    return Device(
        name=name,
        kind=raw["kind"],
        description=raw["description"],
        peak_flops_per_s=MappingProxyType({precision: float(peak["value"]) for precision, peak in peaks.items()}),
        memory_bytes=int(values.pop("memory_bytes")),
        fp8=raw.get("fp8", False),
        **values,
        sources=MappingProxyType(sources | {f"peak_flops_per_s.{key}": peak["source"] for key, peak in peaks.items()}),
    )


@cache
def _families() -> Mapping[str, Family]:
    return MappingProxyType({name: _family(name, raw) for name, raw in _read("model_families.yaml").items()})


def _family(name: str, raw: Mapping[str, Any]) -> Family:
    given: dict[str, Any] = _DENSE | dict(raw["rules"])
    given["ffn_ratio"] = tuple(float(ratio) for ratio in given["ffn_ratio"])
    given["tied_up_to"] = float(given["tied_up_to"])
    given["width_per_layer"] = tuple((float(size), float(width)) for size, width in given["width_per_layer"].items())
    rules = Rules(**given)
    published = {size: make_shape(name, rules, dict(numbers)) for size, numbers in raw["sizes"].items()}
    return Family(name, raw["description"], raw["source"], rules, MappingProxyType(published))


def make_shape(family: str, rules: Rules, numbers: Mapping[str, Any]) -> Shape:
    """A shape from a family's rules and the numbers that a publication (or a chooser) states.

    `numbers` holds num_layers, hidden_size, ffn_hidden_size, num_attention_heads and num_query_groups; head_dim (default
    hidden_size / num_attention_heads), tied_embeddings (default: whether the family ties at every size), vocab_size and any
    other field of a Shape may be among them.
    """
    experts = rules.num_experts > 0
    width = numbers["ffn_hidden_size"] * rules.expert_ratio if experts else 0
    narrow = round(width / NARROW_TILE) * NARROW_TILE or max(8, int(width) // 8 * 8)
    expert = int(numbers.get("expert_ffn_hidden_size", narrow)) if experts else 0
    defaults = {
        "head_dim": numbers["hidden_size"] // numbers["num_attention_heads"],
        "vocab_size": rules.vocab_size,
        "tied_embeddings": rules.tied_up_to >= 1e15,
        "expert_ffn_hidden_size": expert,
        "shared_ffn_hidden_size": round(expert * rules.shared_ratio),
        "router_score": "softmax" if experts else "none",
    }
    of_rules = {name: getattr(rules, name) for name in OF_RULES}
    return Shape(family=family, **(dict(PLAIN) | of_rules | defaults | dict(rules.shape) | dict(numbers)))


@cache
def _scaling_laws() -> Mapping[str, LawFacts]:
    raw = _read("scaling_laws.yaml")
    return MappingProxyType(
        {name: make_law_facts(name, law, _draws(law["draws"]) if "draws" in law else {}) for name, law in raw.items()}
    )


def _draws(file: str) -> dict[str, tuple[float, ...]]:
    """Columns of a table of bootstrap draws, by its first line."""
    text = resources.files("trainwright.compiler.data").joinpath(file).read_text(encoding="utf-8")
    names, *rows = (line.split(",") for line in text.split())
    return {name: tuple(float(row[column]) for row in rows) for column, name in enumerate(names)}


@cache
def _hyperparameter_laws() -> Mapping[str, HyperparameterLaw]:
    raw = _read("hyperparameter_laws.yaml")
    return MappingProxyType({name: _hyperparameter_law(name, facts) for name, facts in raw.items()})


def _hyperparameter_law(name: str, raw: Mapping[str, Any]) -> HyperparameterLaw:
    return HyperparameterLaw(
        name=name,
        source=raw["source"],
        counts=raw["counts"],
        learning_rate=_power_law(raw.get("learning_rate")),
        batch=_power_law(raw.get("batch")),
        timescale=_power_law(raw.get("timescale")),
        own_batch=float(raw.get("own_batch", 0.0)),
        beta2=MappingProxyType(raw.get("beta2", {})),
        fitted=MappingProxyType(
            {quantity: (float(low), float(high)) for quantity, (low, high) in raw["fitted"].items()}
        ),
    )


def _power_law(raw: Mapping[str, Any] | None) -> PowerLaw | None:
    if raw is None:
        return None
    numbers = {key: float(value) for key, value in raw.items()}
    logarithm = numbers.pop("log_coefficient", None)
    coefficient = numbers.pop("coefficient") if logarithm is None else math.exp(logarithm)
    unit, tokens = numbers.pop("unit", 1.0), numbers.pop("tokens", 1.0)
    return PowerLaw(coefficient, MappingProxyType(numbers), unit, tokens)


@cache
def _recipes() -> tuple[Mapping[str, Recipe], Mapping[str, ConnectorVolume]]:
    raw = dict(_read("recipes.yaml"))
    volumes = {name: ConnectorVolume(**volume) for name, volume in raw.pop("connectors").items()}
    return MappingProxyType({kind: _recipe(dict(recipe)) for kind, recipe in raw.items()}), MappingProxyType(volumes)


def _recipe(raw: dict[str, Any]) -> Recipe:
    schedule = raw.pop("schedule")
    return Recipe(
        schedule=schedule["value"],
        schedule_source=schedule["source"],
        numbers=MappingProxyType({name: Cited(**one) for name, one in raw.items() if not isinstance(one, list)}),
        by_size=MappingProxyType(
            {name: tuple(Cited(**one) for one in many) for name, many in raw.items() if isinstance(many, list)}
        ),
    )
