"""A cluster that is not there: process groups of any size in one process, and CUDA's compiler.

Set up before Megatron-Core is imported: some of it decides at its import.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainwright.runtime.shadow.recorder import Recorder

_recorder: Recorder | None = None


def record_into(recorder: Recorder | None) -> None:
    """Which recorder fused kernels tell; None: none."""
    global _recorder
    _recorder = recorder


def fuse_compiled_functions() -> None:
    """What is given to torch.compile becomes one kernel: it allocates what outlives it. On CUDA, Megatron-Core's fusions are."""

    def compile_function(function: Callable[..., Any] | None = None, **settings: object) -> Callable[..., Any]:
        if function is None:
            return compile_function
        original = function

        def fused(*args: Any, **kwargs: Any) -> Any:
            if _recorder is None:
                return original(*args, **kwargs)
            with _recorder.fused():
                return original(*args, **kwargs)

        return fused

    torch.compile = compile_function  # type: ignore[assignment]


def join_world(rank: int, world_size: int) -> None:
    """Make this process rank `rank` of a world in which nobody else is. Messages are the recorder's to answer."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def leave_world() -> None:
    """Forget all groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def answer_for_others() -> None:
    """Whatever ranks tell each other as Python objects, all say what this one says; groups of another backend are fakes too."""
    from megatron.core import parallel_state

    def gather(objects: list[Any], mine: Any, group: Any = None) -> None:
        objects[:] = [mine] * len(objects)

    def broadcast(objects: list[Any], *_: Any, **__: Any) -> None:
        return None

    dist.all_gather_object = gather  # type: ignore[assignment]
    dist.broadcast_object_list = broadcast  # type: ignore[assignment]
    create = parallel_state.create_group

    def create_group(ranks: Any = None, *args: Any, backend: Any = None, **kwargs: Any) -> Any:
        # Of a large world most groups are others': tens of thousands.
        return create(ranks, *args, backend=None, **kwargs) if ranks is None or dist.get_rank() in ranks else None

    parallel_state.create_group = create_group
    torch.nn.Module._apply = _convert  # type: ignore[method-assign]


def _convert(module: torch.nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Module._apply by new parameters: torch's own swaps their contents, which tensors without storage refuse."""
    for child in module.children() if recurse else ():
        _convert(child, function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            converted = function(parameter)
        if converted is not parameter:
            new = torch.nn.Parameter(converted, parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)
            module._parameters[name] = new
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else function(buffer)
    return module
