"""Faults of Megatron-Core 0.16.1 that are mended in this process, and what gloo lacks for mixtures of experts.

Each mend says what goes wrong without it; tests/worlds trains what needs it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.gpt import gpt_model
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer, roll_tensor
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor


def mend(*, cuda: bool) -> None:
    """Idempotent. On every platform: what is wrong there too. Without CUDA: also what gloo and CPU tensors lack."""
    mappings._reduce = _reduce
    gpt_model.roll_tensor = _roll_tensor
    if not hasattr(moe_utils, "te_general_gemm"):  # without Transformer Engine a router looks for it: NameError
        moe_utils.te_general_gemm = None
    if not isinstance(multi_latent_attention.TELinear, type):
        # Without Transformer Engine it takes stand-ins for the real thing: "isinstance() arg 2 must be a type".
        multi_latent_attention.HAVE_TE = False
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:  # neither Transformer Engine nor APEX is there
        clip_grads.l2_norm_impl = _l2_norm
    MultiTokenPredictionLayer._checkpointed_forward = _recompute_further_tokens
    tensor_parallel.checkpoint = _checkpoint
    if cuda:
        return
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_of
    mappings._gather_along_first_dim = _gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_along_first_dim


def _l2_norm(chunk: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """The norm of all tensors together. Megatron-Core's own waits for the device once a tensor, to make a list of numbers."""
    norms = [torch.linalg.vector_norm(tensor) for tensors in lists for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def _reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group. Megatron-Core's sums a copy of a tensor that is not contiguous, and returns the tensor."""
    if group.size() == 1:
        return tensor
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def _roll_tensor(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The loss of further tokens is divided by what this says is the number of targets: 0 / 0 where a row has none."""
    rolled, total = roll_tensor(*args, **kwargs)
    return rolled, total.clamp(min=1)


_checkpoint_all = tensor_parallel.checkpoint


def _checkpoint(function: Callable[..., Any], distribute: bool, *args: Any) -> Any:
    """Compute a function again in the backward pass. Of an FFN with biases Megatron-Core has it return a parameter (the second
    bias, which is added later): torch takes that for one of its results, so that the backward pass calls itself for ever."""
    parameters: dict[int, Any] = {}

    def run(*inputs: Any) -> Any:
        outputs = function(*inputs)
        if not isinstance(outputs, tuple):
            return outputs
        parameters.update((place, out) for place, out in enumerate(outputs) if isinstance(out, torch.nn.Parameter))
        return tuple(None if place in parameters else out for place, out in enumerate(outputs))

    outputs = _checkpoint_all(run, distribute, *args)
    if not parameters:
        return outputs
    return tuple(parameters.get(place, out) for place, out in enumerate(outputs))


_recompute = MultiTokenPredictionLayer._checkpointed_forward


def _recompute_further_tokens(layer: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recompute a layer of multi-token prediction. Megatron-Core's own saves all arguments as tensors, which packed rows'
    lengths are not."""
    given = [*args, *kwargs.values()]
    kept = {place: value for place, value in enumerate(given) if not isinstance(value, Tensor)}

    def run(*tensors: Any) -> Any:
        return forward(*(kept.get(place, value) for place, value in enumerate(tensors)))

    return _recompute(layer, run, *(None if place in kept else value for place, value in enumerate(given)))


def _splits_of(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """In place of maybe_move_tensor_to_cpu, which turns only CUDA tensors into what all_to_all_single takes for splits."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_even_gather = mappings._gather_along_first_dim
_even_reduce_scatter = mappings._reduce_scatter_along_first_dim


def _gather_along_first_dim(
    tensor: Tensor, group: dist.ProcessGroup, output_split_sizes: Sequence[int] | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """Gloo gathers pieces of one size only: each is padded to the largest."""
    if group.size() == 1 or output_split_sizes is None:
        return _even_gather(tensor, group, None, *args, **kwargs)  # type: ignore[no-any-return]
    sizes = [int(size) for size in output_split_sizes]
    padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    # Not split: where no rank has any token, as of a short sample, there is nothing to split.
    gathered = _even_gather(padded, group).view(group.size(), *padded.shape)
    return torch.cat([piece[:size] for piece, size in zip(gathered, sizes, strict=True)])


def _reduce_scatter_along_first_dim(
    tensor: Tensor, group: dist.ProcessGroup, input_split_sizes: Sequence[int] | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """As for gathering: each piece is padded to the largest."""
    if group.size() == 1 or input_split_sizes is None:
        return _even_reduce_scatter(tensor, group, None, *args, **kwargs)  # type: ignore[no-any-return]
    sizes = [int(size) for size in input_split_sizes]
    padded = tensor.new_zeros(group.size(), max(sizes), *tensor.shape[1:])
    for place, piece in zip(padded, torch.split(tensor, sizes), strict=True):
        place[: len(piece)] = piece
    mine: Tensor = _even_reduce_scatter(padded.flatten(0, 1), group)
    return mine[: sizes[group.rank()]]
