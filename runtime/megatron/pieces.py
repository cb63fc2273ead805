"""Which tensors a rank holds of a model, under the names of the whole, and which part of each.

The whole is the GPTModel of one process, of the local layer spec. Its names count layers over all pipeline stages and chunks,
and experts over all expert ranks; a tied output layer is its embedding. Source: Megatron-Core 0.16.1, whose linear layers and
embeddings mark what they cut over tensor ranks (`tensor_model_parallel`, `partition_dim`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from trainwright.runtime.megatron.model import Model

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
POSITION_EMBEDDINGS = "embedding.position_embeddings.weight"
# Transformer Engine fuses a norm into the linear layer that follows it.
_UNFUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Cut:
    """Piece `rank` of `degree` equal ones along `dimension`, from each of `blocks` equal blocks of that dimension."""

    dimension: int = 0
    degree: int = 1
    rank: int = 0
    blocks: int = 1  # 2: gate and up projection of a gated FFN stand one upon the other, and are cut each for itself

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the whole tensor of which this piece has `shape`."""
        return tuple(size * self.degree if at == self.dimension else size for at, size in enumerate(shape))

    def slices(self, shape: Sequence[int]) -> list[tuple[slice, ...]]:
        """The indices of this piece in a whole tensor of `shape`: one a block, to be joined along `dimension`."""
        everything = [slice(0, size) for size in shape]
        if self.degree == 1:
            return [tuple(everything)]
        block = shape[self.dimension] // self.blocks
        size = block // self.degree
        found = []
        for number in range(self.blocks):
            first = number * block + self.rank * size
            everything[self.dimension] = slice(first, first + size)
            found.append(tuple(everything))
        return found

    def of(self, whole: Tensor) -> Tensor:
        """This piece of a whole tensor."""
        pieces = [whole[index] for index in self.slices(whole.shape)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dimension)


@dataclass(frozen=True)
class Piece:
    """A tensor of this rank: a parameter, or a buffer that belongs to the model's state."""

    name: str  # of the whole
    tensor: Tensor  # this rank's own, not a copy
    cut: Cut

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self.cut.whole(self.tensor.shape)


def pieces(model: Model) -> Iterator[Piece]:
    """All tensors of this rank, in the order of its chunks' state dicts. A tied output layer on another stage than the
    embedding comes under the embedding's name."""
    gated = bool(model.config.gated_linear_unit)
    for chunk in model.chunks:
        for name, tensor in chunk.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and not name.endswith(
                "_extra_state"
            ):  # Transformer Engine's: not of the model
                whole = _whole_name(chunk, name, tied=model.embedding.tied)
                yield Piece(whole, tensor, _cut(name, tensor, gated=gated))


def parameters(model: Model) -> Iterator[Piece]:
    """The pieces that are trained."""
    return (piece for piece in pieces(model) if isinstance(piece.tensor, torch.nn.Parameter))


def _whole_name(gpt: Any, name: str, *, tied: bool) -> str:
    if tied and name == OUTPUT_LAYER:
        return WORD_EMBEDDINGS
    parts = name.split(".")
    if parts[0] in ("decoder", "mtp") and parts[1] == "layers":
        parts[2] = str(getattr(gpt, parts[0]).layers[int(parts[2])].layer_number - 1)
    if "experts" in parts:
        _name_expert(gpt, parts)
    whole = ".".join(parts)
    for fused, own in _UNFUSED.items():
        whole = whole.replace(fused, own)
    return whole


def _name_expert(gpt: Any, parts: list[str]) -> None:
    """`local_experts.1` of the local layer spec, `linear_fc1.weight1` of Transformer Engine's: the expert's number in all."""
    first = parallel_state.get_expert_model_parallel_rank() * _local_experts(gpt)
    at = parts.index("experts") + 1
    if parts[at] == "local_experts":
        parts[at + 1] = str(first + int(parts[at + 1]))
        return
    kind = parts[-1].rstrip("0123456789")
    parts[at:] = ["local_experts", str(first + int(parts[-1].removeprefix(kind))), parts[at], kind]


def _local_experts(gpt: Any) -> int:
    return int(gpt.config.num_moe_experts) // int(parallel_state.get_expert_model_parallel_world_size())


def _cut(name: str, tensor: Tensor, *, gated: bool) -> Cut:
    if not getattr(tensor, "tensor_model_parallel", False):
        return Cut()
    if "experts" in name.split("."):  # Megatron-Core lays experts out on groups of their own
        degree = int(parallel_state.get_expert_tensor_parallel_world_size())
        rank = parallel_state.get_expert_tensor_parallel_rank()
    else:
        degree = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
    blocks = 2 if gated and "linear_fc1" in name else 1
    return Cut(int(tensor.partition_dim), degree, rank, blocks)  # type: ignore[attr-defined]
