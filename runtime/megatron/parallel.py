"""The process group and Megatron-Core's parallel groups, from the environment that torchrun sets."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.platform import Platform, current

# Rank 0 alone builds indices of a whole corpus while the others wait; a process that dies is torchrun's to notice.
PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Parallel:
    """The layout: tensor x pipeline x context x data processes. The experts of a mixture are laid out on the same processes
    anew: expert_tensor x expert x pipeline of them hold all experts once."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int = 1  # chunks a pipeline stage
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1  # 1 in a dense model

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        degrees = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context, "data": self.data}
        factors = " x ".join(f"{name} {n}" for name, n in degrees.items() if n > 1 or name != "context")
        return f"{factors} = {self.world_size} process{'es' if self.world_size > 1 else ''}"


def start(parallel: Parallel, seed: int) -> Platform:
    """Join the processes and build Megatron-Core's groups; seed the generators. Returns this process's platform.

    Without torchrun's variables the program is one process. A process group that exists already is used as it is.
    Raises Unsupported when the number of processes is not the layout's.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    platform = current(local_rank)
    running = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if running != parallel.world_size:
        raise Unsupported(
            f"the layout is {parallel}, but {running} {'is' if running == 1 else 'are'} running: "
            f"start the program with torchrun --nproc-per-node {parallel.world_size} (times --nnodes), "
            "or compile for the devices that you have"
        )
    if platform.name == "cuda":
        local, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if local > devices:
            raise Unsupported(
                f"{local} processes of this node need a CUDA device each, and there are {devices}: compile for the devices that "
                "you have, or set CUDA_VISIBLE_DEVICES to nothing to run on the CPU"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(platform.backend, timeout=PATIENCE)
        else:
            dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    # Another stage draws other weights; the data ranks of a stage draw the same (Megatron-LM's convention: +100 a stage).
    stage_seed = seed + 100 * int(parallel_state.get_pipeline_model_parallel_rank())
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
    return platform


def stop() -> None:
    """Leave Megatron-Core's groups; the process group stays, for another layout over the same processes."""
    parallel_state.destroy_model_parallel()


def data_rank() -> tuple[int, int]:
    """(this process's data-parallel rank, number of data-parallel ranks)."""
    return int(parallel_state.get_data_parallel_rank()), int(parallel_state.get_data_parallel_world_size())


def check_model(parallel: Parallel, model: Any, *, sequence_length: int, padded_vocab_size: int) -> None:
    """Raise Unsupported, with the arithmetic, where a (hand-edited) program contradicts itself.

    `model` is Megatron-Core's TransformerConfig; `sequence_length` counts tokens.
    """
    for name, degree in (
        ("tensor_model_parallel_size", parallel.tensor),
        ("pipeline_model_parallel_size", parallel.pipeline),
        ("context_parallel_size", parallel.context),
        ("expert_model_parallel_size", 1),
    ):
        if getattr(model, name) != degree:
            raise Unsupported(f"model={name}={getattr(model, name)}, but the layout ({parallel}) has {degree}")
    if model.num_moe_experts is not None:
        raise Unsupported("mixtures of experts are not supported yet: dense models only")
    for name, value, divisor in (
        ("num_layers", model.num_layers, parallel.pipeline),
        ("num_attention_heads", model.num_attention_heads, parallel.tensor),
        ("num_query_groups", model.num_query_groups, parallel.tensor),
        ("padded_vocab_size", padded_vocab_size, parallel.tensor),
        ("sequence_length", sequence_length, parallel.tensor if model.sequence_parallel else 1),
    ):
        if value % divisor:
            raise Unsupported(
                f"{name} {value} is not divisible by {divisor} ({parallel}): "
                f"{value} = {value // divisor} x {divisor} + {value % divisor}"
            )
