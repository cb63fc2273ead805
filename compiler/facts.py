"""Typed access to `data/*.yaml`: devices, model families, scaling laws. The only reader of that folder.

A fact carries its source. Look-ups raise `UnknownNameError`, which suggests the nearest names. Everything is read once.
"""

import difflib
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
    memory_bandwidth_bytes_per_s: float
    intra_node_bytes_per_s: float
    inter_node_bytes_per_s: float
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


@dataclass(frozen=True)
class Family:
    """A model family: rules, and published shapes by size name ("8B")."""

    name: str
    description: str
    source: str
    rules: Rules
    published: Mapping[str, Shape]


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token; ranges are (lowest, highest) fitted."""

    name: str
    form: str
    source: str
    A: float
    B: float
    E: float
    alpha: float
    beta: float
    parameters: str  # what N counts
    flops: str  # what C counts
    loss_unit: str
    fitted_parameters: tuple[float, float]
    fitted_tokens: tuple[float, float]
    fitted_flops: tuple[float, float]


@dataclass(frozen=True)
class HyperparameterLaw:
    """learning rate = c N^p D^q and batch in tokens = c D^q; ranges are (lowest, highest) fitted."""

    name: str
    form: str
    source: str
    learning_rate: Mapping[str, float]  # coefficient, parameters_exponent, tokens_exponent
    batch_tokens: Mapping[str, float]  # coefficient, tokens_exponent
    parameters: str  # what N counts
    fitted_parameters: tuple[float, float]
    fitted_tokens: tuple[float, float]


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


def find_loss_law(name: str) -> LossLaw:
    """The loss law of that name. Raises UnknownNameError."""
    return _find("loss law", name, _loss_laws())


def find_hyperparameter_law(name: str) -> HyperparameterLaw:
    """The law for learning rate and batch of that name. Raises UnknownNameError."""
    return _find("hyperparameter law", name, _hyperparameter_laws())


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
        **values,
        sources=MappingProxyType(sources | {f"peak_flops_per_s.{key}": peak["source"] for key, peak in peaks.items()}),
    )


@cache
def _families() -> Mapping[str, Family]:
    return MappingProxyType({name: _family(name, raw) for name, raw in _read("model_families.yaml").items()})


def _family(name: str, raw: Mapping[str, Any]) -> Family:
    given: dict[str, Any] = {"num_experts": 0, "experts_per_token": 0} | dict(raw["rules"])
    given["ffn_ratio"] = tuple(float(ratio) for ratio in given["ffn_ratio"])
    given["tied_up_to"] = float(given["tied_up_to"])
    given["width_per_layer"] = tuple((float(size), float(width)) for size, width in given["width_per_layer"].items())
    rules = Rules(**given)
    published = {size: make_shape(name, rules, dict(numbers)) for size, numbers in raw["sizes"].items()}
    return Family(name, raw["description"], raw["source"], rules, MappingProxyType(published))


def make_shape(family: str, rules: Rules, numbers: Mapping[str, Any]) -> Shape:
    """A shape from a family's rules and the numbers that a publication (or a chooser) states.

    `numbers` holds num_layers, hidden_size, ffn_hidden_size, num_attention_heads and num_query_groups; head_dim (default
    hidden_size / num_attention_heads), tied_embeddings (default: whether the family ties at every size) and vocab_size may
    be among them.
    """
    experts = rules.num_experts > 0
    defaults = {
        "head_dim": numbers["hidden_size"] // numbers["num_attention_heads"],
        "vocab_size": rules.vocab_size,
        "tied_embeddings": rules.tied_up_to >= 1e15,
    }
    return Shape(
        family=family,
        gated=rules.gated,
        activation=rules.activation,
        normalization=rules.normalization,
        norm_epsilon=rules.norm_epsilon,
        positions=rules.positions,
        rotary_base=rules.rotary_base,
        linear_bias=rules.linear_bias,
        qkv_bias=rules.qkv_bias,
        qk_norm=rules.qk_norm,
        num_experts=rules.num_experts,
        experts_per_token=rules.experts_per_token,
        expert_ffn_hidden_size=numbers["ffn_hidden_size"] if experts else 0,
        **(defaults | dict(numbers)),
    )


@cache
def _loss_laws() -> Mapping[str, LossLaw]:
    return MappingProxyType({name: LossLaw(name=name, **_ranges(raw)) for name, raw in _laws("loss").items()})


@cache
def _hyperparameter_laws() -> Mapping[str, HyperparameterLaw]:
    laws = _laws("hyperparameters")
    return MappingProxyType({name: HyperparameterLaw(name=name, **_ranges(raw)) for name, raw in laws.items()})


def _laws(kind: str) -> Mapping[str, Mapping[str, Any]]:
    laws: Mapping[str, Mapping[str, Any]] = _read("scaling_laws.yaml")[kind]
    return laws


def _ranges(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
