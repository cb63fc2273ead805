"""Norms and core attention of the local layer spec.

Megatron-Core's own local norm refuses sequence parallelism, and its local attention materialises the scores of every
pair of positions; both are submodules of the layer spec, so these two take their place.
"""

import contextlib
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as the model's config says.

    Its parameters are marked so that Megatron-Core sums their gradients over tensor ranks under sequence parallelism.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **ignored: object) -> None:
        super().__init__()
        if config.layernorm_zero_centered_gamma:
            raise ValueError("layernorm_zero_centered_gamma needs Transformer Engine's layer spec")
        self.eps = eps
        self.shape = (hidden_size,)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device()))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype, device=_device()))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        if self.bias is None:
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class CausalAttention(torch.nn.Module):
    """Causal attention through torch's scaled_dot_product_attention: fused on CPU, flash kernels on CUDA; GQA."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.dropout: float = config.attention_dropout if attention_dropout is None else attention_dropout
        # Under sequence parallelism Megatron-Core's block draws everything from that generator already: taken again, it
        # would begin anew in every layer, and a recomputed layer would drop out others than it did.
        self.generator = contextlib.nullcontext if config.sequence_parallel else get_cuda_rng_tracker().fork

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
        dimension b.
        """
        if attention_mask is not None:
            raise ValueError("only the causal mask is supported")
        if packed_seq_params is not None:
            ends = packed_seq_params.cu_seqlens_q.tolist()
            lengths = [end - begin for begin, end in itertools.pairwise(ends)]
            pieces = zip(*(torch.split(x.unsqueeze(1), lengths) for x in (query, key, value)), strict=True)
            # A call a sequence computes nothing for padding, and is faster than calls of padded batches (2 CPU cores).
            return torch.cat([self._attend(*piece) for piece in pieces]).squeeze(1)
        if key.shape[0] != query.shape[0]:
            return self._continue(query, key, value)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `forward`, of whole sequences."""
        sequence, batch, heads, _ = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = key.shape[2] != heads
        if self.training and self.dropout > 0:
            # heads differ from rank to rank, so the mask is drawn from the tensor-parallel generator
            with self.generator():
                out = F.scaled_dot_product_attention(
                    q, k, v, dropout_p=self.dropout, is_causal=True, scale=self.scale, enable_gqa=grouped
                )
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)

    def _continue(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `forward` without dropout, for queries that follow cached positions."""
        sequence, batch, heads, _ = query.shape
        before = key.shape[0] - sequence
        # torch's own causal mask starts at the first key, whatever the number of queries
        mask = torch.ones(sequence, key.shape[0], dtype=torch.bool, device=query.device).tril(before)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=key.shape[2] != heads
        )
        return out.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


def _device() -> Any:
    """Where Megatron-Core builds its own parameters: this process's CUDA device, or the CPU."""
    return torch.cuda.current_device()
