"""How many parameters a program's model has, without its memory: built whole, on torch's meta device."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode

from trainwright.runtime.megatron.model import Embedding, build_chunk
from trainwright.runtime.megatron.parallel import Parallel, start
from trainwright.runtime.megatron.platform import Literals

WHOLE = {  # of a TransformerConfig: how the model is cut, in one process
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
}


def count_whole(config: Any, embedding: Embedding, layer_spec: str = "local") -> int:
    """Trainable parameters of the whole model of a program, as Megatron-Core builds it, whatever its layout; the vocabulary as
    `embedding.padded_vocab_size` says. Buffers, as the bias of experts, are none.

    `config` is Megatron-Core's TransformerConfig. Joins a world of one process where Megatron-Core's groups are not there yet;
    raises ValueError where there are others.
    """
    if not parallel_state.model_parallel_is_initialized():
        start(Parallel(), seed=0)
    elif torch.distributed.get_world_size() > 1:
        raise ValueError("parameters are counted in one process")
    whole = copy.copy(config)
    for name, value in WHOLE.items():
        setattr(whole, name, value)
    with torch.device("meta"), _OnMeta():
        built = build_chunk(Literals(whole, None, None, layer_spec), embedding, None)
    return sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)


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
