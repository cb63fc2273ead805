"""What a program's whole model consists of, without its memory: built on torch's meta device."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import HashStore
from torch.overrides import TorchFunctionMode

from trainwright.runtime.megatron.model import Embedding, build_chunk
from trainwright.runtime.megatron.parallel import Parallel, start
from trainwright.runtime.megatron.platform import Literals

# Of a TransformerConfig: the model in one process, of modules that need no kernels.
WHOLE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
    "perform_initialization": False,
    "moe_grouped_gemm": False,
    "fp8": None,
}


def count_whole(config: Any, embedding: Embedding) -> int:
    """Trainable parameters of the whole model of a program, as Megatron-Core builds it of local layers, whatever its layout;
    the vocabulary as `embedding.padded_vocab_size` says. Buffers, as the bias of experts, are none.

    `config` is Megatron-Core's TransformerConfig. Joins a world of one process where Megatron-Core's groups are not there yet;
    raises ValueError where there are others.
    """
    if not parallel_state.model_parallel_is_initialized():
        start(Parallel(), seed=0)
    elif dist.get_world_size() > 1:
        raise ValueError("parameters are counted in one process")
    built = _build_whole(config, embedding)
    return sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)


def whole_shapes(config: Any, embedding: Embedding) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a program's whole model, under the names of one process (pieces.py), buffers included.

    Needs no process group, and leaves none: other processes may still be starting. Raises ValueError where one is there.
    """
    if dist.is_initialized():
        raise ValueError("the processes have met already: each knows its own tensors")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # of this process alone
    try:
        parallel_state.initialize_model_parallel()
        state = _build_whole(config, embedding).state_dict()
        return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _build_whole(config: Any, embedding: Embedding) -> Any:
    whole = copy.copy(config)
    for name, value in WHOLE.items():
        setattr(whole, name, value)
    with torch.device("meta"), _OnMeta():
        return build_chunk(Literals(whole, None, None, "local"), embedding, None)


class _OnMeta(TorchFunctionMode):
    """Takes a tensor that is asked for on a device to the meta device instead: Megatron-Core names one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not kwargs or kwargs.get("device") is None:
            return func(*args, **(kwargs or {}))
        return func(*args, **{**kwargs, "device": "meta"})
