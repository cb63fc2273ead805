"""Core attention of multi-head latent attention (MLA): DeepSeek's, whose keys and values come out of one small vector a token.

Keys are wider than values, and the part of a key that carries its position is one vector that all heads share.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from trainwright.runtime.megatron.layers import CausalAttention


class LatentAttention(CausalAttention):
    """CausalAttention under tensor parallelism: the gradient of the shared part of the keys is summed over tensor ranks.

    With its local layer spec Megatron-Core 0.16.1 gathers that part on every rank, hands it to this rank's heads, and takes
    the gradient from these heads alone. (Transformer Engine's gathers it along the sequence, whose backward pass sums.)
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.own = config.qk_head_dim  # of a key: the part of one head alone

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query and key [.., heads, d], value [.., heads, v], otherwise as CausalAttention's -> [s, b, heads * v]."""
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1 and torch.is_grad_enabled():
            shared: Tensor = _SumGradient.apply(key[..., self.own :], group)  # type: ignore[no-untyped-call]
            key = torch.cat((key[..., : self.own], shared), dim=-1)
        return super().forward(query, key, value, *args, **kwargs)


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a group.

    Not Megatron-Core's `copy_to_tensor_model_parallel_region`: it sums a copy of a gradient that is not contiguous, as the one
    of a concatenation is not, and passes on the gradient itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
