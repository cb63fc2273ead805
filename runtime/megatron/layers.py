"""Norms and core attention of the local layer spec.

Megatron-Core's own local norm refuses sequence parallelism, and its local attention materialises the scores of every
pair of positions; both are submodules of the layer spec, so these two take their place.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from trainwright.runtime.megatron.context import in_order


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as the model's config says; with layernorm_zero_centered_gamma (Gemma's)
    the normalised vector is multiplied by 1 + weight.

    Its parameters are marked so that Megatron-Core sums their gradients over tensor ranks under sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **ignored: object) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (hidden_size,)
        self.centre = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        initial = torch.full(self.shape, 1.0 - self.centre, dtype=config.params_dtype, device=_device())
        self.weight = torch.nn.Parameter(initial)
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=_device()))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        weight = self.weight + self.centre if self.centre else self.weight
        if self.bias is None:
            return F.rms_norm(x, self.shape, weight, self.eps)
        return F.layer_norm(x, self.shape, weight, self.bias, self.eps)


class CausalAttention(torch.nn.Module):
    """Causal attention through torch's scaled_dot_product_attention: fused on CPU, flash kernels on CUDA; GQA, ALiBi.

    Under context parallelism (context.py) the ranks gather keys and values, and each attends with its own queries alone.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        alibi: bool = False,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.dropout: float = config.attention_dropout if attention_dropout is None else attention_dropout
        # Under sequence parallelism Megatron-Core's block draws everything from that generator already: taken again, it
        # would begin anew in every layer, and a recomputed layer would drop out others than it did.
        self.generator = contextlib.nullcontext if config.sequence_parallel else get_cuda_rng_tracker().fork
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context = groups.cp
        self.slopes: list[float] = []
        if alibi:
            heads = config.num_attention_heads // groups.tp.size()  # a rank's, beside each other
            self.slopes = alibi_slopes(config.num_attention_heads)[groups.tp.rank() * heads :][:heads]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **ignored: object,
    ) -> Tensor:
        """query [s, b, heads, d], key and value [k, b, groups, d] (this rank's heads) -> [s, b, heads * d].

        The mask is always causal, over whole sequences; `attention_mask` must be None. With a key-value cache k > s: the
        queries are those of the last s positions. Packed sequences, which attend each to itself alone, have no
        dimension b. Under context parallelism s and k are this rank's.
        """
        if attention_mask is not None:
            raise ValueError("only the causal mask is supported")
        if packed_seq_params is None:
            attended = self._share if self.context.size() > 1 else self._attend
            return attended(query, key, value)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [(end - begin) // self.context.size() for begin, end in itertools.pairwise(ends)]
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        # A call a sequence computes nothing for padding, and is faster than calls of padded batches (2 CPU cores).
        if self.context.size() > 1:
            return self._share(query, key, value, lengths).squeeze(1)
        pieces = zip(*(torch.split(x, lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*piece) for piece in pieces]).squeeze(1)

    def _share(self, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int] = ()) -> Tensor:
        """As `forward`, of this context rank's part of sequences, of which it holds `lengths` (default: one sequence)."""
        ranks, rank, outputs = self.context.size(), self.context.rank(), []
        # backward: each rank gets the sum of all ranks' gradients of its own keys and values
        both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=self.context)
        gathered = both.view(ranks, *key.shape[:3], -1)
        begin = 0
        for held in lengths or [len(query)]:
            keys, values = in_order(gathered[:, begin : begin + held]).tensor_split((key.shape[3],), dim=-1)
            chunks = query[begin : begin + held].chunk(2)
            for chunk, number in zip(chunks, (rank, 2 * ranks - 1 - rank), strict=True):
                end = (number + 1) * len(chunk)
                outputs.append(self._attend(chunk, keys[:end], values[:end]))
            begin += held
        return torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `forward`, of whole sequences, or of the last queries of some."""
        sequence, batch, heads, _ = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        mask = self._mask(query, len(key))
        # heads differ from rank to rank, so what is dropped out is drawn from the tensor-parallel generator
        with self.generator() if dropout else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=key.shape[2] != heads,
            )
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)

    def _mask(self, query: Tensor, keys: int) -> Any:
        """What is added to the scores, or which of them count, of the last len(query) of `keys` positions; None: torch's own
        causal mask, which starts at the first key whatever the number of queries."""
        queries, device = len(query), query.device
        if self.slopes:
            distance = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
            bias = torch.tensor(self.slopes, device=device)[:, None, None] * distance
            return bias.masked_fill(distance > 0, -math.inf).to(query.dtype)[None]
        return None if queries == keys else causal_lower_right(queries, keys)  # a flash kernel knows it


def alibi_slopes(heads: int) -> list[float]:
    """By how much a head's scores fall with each position of distance (Press, Smith and Lewis 2022).

    For a power of two: 2^(-8 / heads), its square, and so on; else those of the power of two below, then every other one of the
    power above.
    """
    power = 1 << heads.bit_length() - 1
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * (heads - power), 2)]


def _device() -> Any:
    """Where Megatron-Core builds its own parameters: this process's CUDA device, or the CPU."""
    return torch.cuda.current_device()
