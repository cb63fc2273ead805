"""A Hugging Face format: which models it has a place for, what its config.json says of them, and its names of their weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.huggingface.rules import Rule
from trainwright.runtime.megatron.model_files import SavedModel

Json = dict[str, Any]
# Llama 3.1's, which Megatron-Core has as constants (RotaryEmbedding._apply_scaling of 0.16.1).
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Format:
    """`foreign` lists what of a model has no place in the format; `config` and `rules` are of a model that has all its
    place; `model` reads a config.json, and raises Unsupported for what Megatron-Core cannot do."""

    architecture: str  # its class in transformers
    model_type: str
    foreign: Callable[[SavedModel], list[str]]
    config: Callable[[SavedModel], Json]
    model: Callable[[Json], SavedModel]
    rules: Callable[[SavedModel], Iterator[Rule]]
    prefix: str = "model."  # of its names, which checkpoints of the bare model are without

    @property
    def name(self) -> str:
        return self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")


# Whole parts of a model: of two formats the one that has all of these is nearer, whatever it lacks beside them.
PARTS = frozenset({"latent attention", "no latent attention", "a mixture of experts", "no experts"})


def distance(foreign: Sequence[str]) -> tuple[int, int]:
    """How far a model is from a format that lacks what is listed, to be compared."""
    return len(PARTS.intersection(foreign)), len(foreign)


def listed(found: Mapping[str, bool]) -> list[str]:
    """The keys whose value is true."""
    return [what for what, holds in found.items() if holds]


def refuse_if(found: Sequence[str], config: Json) -> None:
    """Raise Unsupported where a config.json asks for what is listed."""
    if found:
        raise Unsupported(
            f"the Hugging Face config ({config['model_type']}) says {'; '.join(found)}, which Megatron-Core's GPTModel, as this "
            "version builds it, does not do: start from another model"
        )


def read_rope(config: Json, default_base: int) -> tuple[int, float]:
    """(base, Llama 3's scaling factor or 0), as transformers 5 writes them (rope_parameters) or 4 does (rope_theta,
    rope_scaling). Raises Unsupported for other scalings."""
    values: Json = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    base = float(values.get("rope_theta") or config.get("rope_theta") or default_base)
    kind = values.get("rope_type", values.get("type", "default"))
    known = kind == "llama3" and all(values.get(name) == value for name, value in LLAMA3_ROPE.items())
    refuse_if(
        listed(
            {
                f"a RoPE base of {base}": not base.is_integer(),
                f"the RoPE scaling {values}": kind != "default" and not known,
                "RoPE over a part of each head": values.get("partial_rotary_factor", 1.0) != 1.0,
            }
        ),
        config,
    )
    return int(base), float(values.get("factor") or 0.0) if known else 0.0


def write_rope(model: SavedModel) -> Json:
    """The base at the top level and the scaling beside it, where transformers 4 and 5 both find them."""
    embedding = model.embedding
    base: Json = {"rope_theta": float(embedding.rotary_base)}
    if not embedding.rotary_scaling:
        return base
    scaling = {"rope_type": "llama3", "factor": float(embedding.rotary_scaling), **LLAMA3_ROPE}
    return base | {"rope_scaling": scaling}
