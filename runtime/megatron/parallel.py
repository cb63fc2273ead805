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
from trainwright.runtime.megatron.families import check_family
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
        others = {"virtual_pipeline": self.virtual_pipeline, "expert": self.expert, "expert_tensor": self.expert_tensor}
        also = ", ".join(f"{name} {n}" for name, n in others.items() if n > 1)
        processes = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        return f"{factors} = {processes}" + (f" ({also})" if also else "")


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
            f"start the program with torchrun --nproc-per-node {parallel.world_size} (times --nnodes), or compile for the "
            f"devices that you have; {running} would fit {', or '.join(map(str, _fitting(parallel, running)))}"
        )
    if platform.backend == "nccl":
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
    """Raise Unsupported, with the arithmetic, where a (hand-edited) program contradicts itself, or would train wrong.

    `model` is Megatron-Core's TransformerConfig; `sequence_length` counts tokens. Needs no process group.
    """
    for name, degree in (
        ("tensor_model_parallel_size", parallel.tensor),
        ("pipeline_model_parallel_size", parallel.pipeline),
        ("virtual_pipeline_model_parallel_size", parallel.virtual_pipeline),
        ("context_parallel_size", parallel.context),
        ("expert_model_parallel_size", parallel.expert),
    ):
        if (getattr(model, name) or 1) != degree:
            raise Unsupported(f"model={name}={getattr(model, name)}, but the layout ({parallel}) has {degree}")
    check_family(parallel, model)
    if model.pipeline_model_parallel_layout is None:  # else Megatron-Core has checked it
        _check_layers(parallel, model)
    _check_messages(parallel, model)
    chunks = 2 * parallel.context if parallel.context > 1 else 1  # context.py
    cuts = parallel.context * (parallel.tensor if model.sequence_parallel else 1)
    for name, value, divisor, why in (
        ("num_attention_heads", model.num_attention_heads, parallel.tensor, "tensor"),
        ("num_query_groups", model.num_query_groups, parallel.tensor, "tensor"),
        ("ffn_hidden_size", model.ffn_hidden_size, parallel.tensor, "tensor"),
        ("padded_vocab_size", padded_vocab_size, parallel.tensor, "tensor"),
        ("sequence_length", sequence_length, chunks, "2 x context"),
        ("sequence_length", sequence_length, cuts, "context x tensor, with sequence_parallel"),
    ):
        if value % divisor:
            raise Unsupported(
                f"{name} {value} is not divisible by {divisor} ({why}; the layout is {parallel}): "
                f"{value} = {value // divisor} x {divisor} + {value % divisor}"
            )


def check_batch(parallel: Parallel, *, global_batch: int, micro_batch: int, name: str = "global_batch") -> None:
    """Raise Unsupported, with the arithmetic, where a global batch (sequences) cannot be cut into micro-batches of that size.
    `name`: what the message calls it."""
    share = micro_batch * parallel.data
    if global_batch % share:
        raise Unsupported(
            f"{name} {global_batch} is not a multiple of micro_batch {micro_batch} x data {parallel.data} = {share}"
        )
    count = global_batch // share
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        raise Unsupported(
            f"{name} {global_batch} is {count} x micro_batch {micro_batch} x data {parallel.data}, and of an interleaved "
            f"pipeline the number of micro-batches must be a multiple of pipeline {parallel.pipeline}"
        )


def _check_layers(parallel: Parallel, model: Any) -> None:
    """That every stage, and every chunk of it, gets whole layers."""
    layers, stages, chunks = model.num_layers, parallel.pipeline, parallel.virtual_pipeline
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    if first is None and last is None:
        extra = {
            "the embedding": model.account_for_embedding_in_pipeline_split,
            "the loss": model.account_for_loss_in_pipeline_split,
        }
        counted = layers + sum(extra.values())
        if counted % (stages * chunks):
            also = "".join(f" + {name}" for name, is_counted in extra.items() if is_counted)
            equals = f" = {counted}" if also else ""
            raise Unsupported(
                f"num_layers {layers}{also}{equals} is not divisible by {stages * chunks} (pipeline {stages} x virtual_pipeline "
                f"{chunks}): {counted} = {counted // (stages * chunks)} x {stages * chunks} + {counted % (stages * chunks)}"
            )
        return
    given = {name: n for name, n in (("first", first), ("last", last)) if n is not None}
    rest, others = layers - sum(given.values()), stages - len(given)
    if rest < 0 or others < 0 or (rest % others if others else rest):  # Megatron-Core would drop the rest in silence
        raise Unsupported(
            f"num_layers {layers} less those of the {' and the '.join(f'{name} stage ({n})' for name, n in given.items())} "
            f"leaves {rest} for {others} other pipeline stages: they must get as many each"
        )
    for name, n in (*given.items(), ("other", rest // others if others else 0)):
        if n % chunks:
            raise Unsupported(
                f"{n} layers of the {name} pipeline stage do not divide into virtual_pipeline {chunks} chunks"
            )


def _check_messages(parallel: Parallel, model: Any) -> None:
    """That what pipeline stages send reaches the chunk that it is meant for."""
    if parallel.virtual_pipeline > 1:
        if parallel.pipeline == 1:
            raise Unsupported(f"virtual_pipeline {parallel.virtual_pipeline} needs a pipeline of at least 2 stages")
        if model.batch_p2p_comm and parallel.pipeline == 2:
            raise Unsupported(
                "batch_p2p_comm=True swaps the messages of an interleaved pipeline of 2 stages, where the next stage is also "
                "the one before (Megatron-Core 0.16.1): write batch_p2p_comm=False"
            )
    elif model.overlap_p2p_comm:
        raise Unsupported("overlap_p2p_comm=True needs an interleaved pipeline: write overlap_p2p_comm=False")
    if model.overlap_p2p_comm and model.batch_p2p_comm:
        raise Unsupported(
            "overlap_p2p_comm=True and batch_p2p_comm=True exclude each other: write batch_p2p_comm=False"
        )


def _fitting(parallel: Parallel, processes: int) -> list[Parallel]:
    """The layouts of so many processes whose model is cut as much as possible, and in no way more than in this one."""
    found = [
        Parallel(tensor, pipeline, processes // (tensor * pipeline * context), context=context)
        for tensor in range(1, parallel.tensor + 1)
        for pipeline in range(1, parallel.pipeline + 1)
        for context in range(1, parallel.context + 1)
        if not parallel.tensor % tensor + parallel.pipeline % pipeline + parallel.context % context
        and not processes % (tensor * pipeline * context)
    ]
    least = min(layout.data for layout in found)
    return [layout for layout in found if layout.data == least]
