"""The model and its optimizer: GPTModel in Megatron-Core's DDP, with the layer spec that the program asks for."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.module import Float16Module

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.experts import is_expert, mark_experts
from trainwright.runtime.megatron.gpt import GPT
from trainwright.runtime.megatron.optimizers import build_optimizer
from trainwright.runtime.megatron.parameters import PLAIN, Groups
from trainwright.runtime.megatron.platform import Literals, Platform
from trainwright.runtime.megatron.specs import layer_specs, prediction_specs

# Embedding.positions -> GPTModel's position_embedding_type; ALiBi is the attention's (layers.py).
POSITIONS = {"rope": "rope", "learned": "learned_absolute", "alibi": "none", "none": "none"}


@dataclass(frozen=True)
class Embedding:
    """Vocabulary and positions. Sizes count elements; `sequence_length` counts tokens."""

    vocab_size: int  # what the tokenizer holds
    padded_vocab_size: int  # what the embedding holds, so that it divides by the tensor degree
    sequence_length: int
    positions: str  # "rope" | "learned" | "alibi" | "none"
    rotary_base: int  # 0 without rope
    tied: bool  # the output layer shares the embedding's weight
    rotary_scaling: float = 0.0  # Llama 3's factor, by which slow frequencies are stretched; 0: none
    output_multiplier: float = 1.0  # of the logits; other than 1 under muP (parameters.py)


@dataclass(frozen=True)
class Model:
    """This rank's part of the model. `chunks` are bare modules, one a virtual pipeline stage, from the first layers to the
    last (one without interleaving); `ddp` is what the schedules run: each wrapped for data parallelism, or, of a frozen model,
    as it is."""

    config: Any
    embedding: Embedding
    platform: Platform
    chunks: tuple[Any, ...]
    ddp: tuple[Any, ...]
    optimizer: Any  # None: the model is frozen

    @property
    def gpt(self) -> Any:
        """The one chunk of a model that is not interleaved."""
        (chunk,) = self.chunks
        return chunk

    @property
    def overlaps_param_gather(self) -> bool:
        """The optimizer leaves parameters ungathered until the next forward pass."""
        if self.optimizer is None:
            return False
        ddp = self.ddp[0].ddp_config
        return bool(ddp.use_distributed_optimizer and ddp.overlap_param_gather)


def build(literals: Literals, embedding: Embedding, platform: Platform, groups: Groups = PLAIN) -> Model:
    """Build this rank's part of the model and of its optimizer; the weights are drawn from the seeded generators.

    `literals` are the platform's (`Platform.adapt`). Raises Unsupported for positions, an optimizer or groups that the runtime
    does not know.
    """
    groups.check(embedding.output_multiplier)
    config = literals.model
    chunks, modules = _build_chunks(literals, embedding, platform)
    for chunk in chunks:
        groups.scale_init(chunk, tied=embedding.tied)
    ddp = tuple(
        # Only the first chunk's gradients are ready while there is something left to overlap with.
        DistributedDataParallel(config=config, ddp_config=literals.ddp, module=module, disable_bucketing=number > 0)
        for number, module in enumerate(modules)
    )
    optimizer = build_optimizer(literals.optimizer, ddp, groups.overrides(literals.optimizer, tied=embedding.tied))
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    no_sync = [chunk.no_sync for chunk in ddp]
    config.no_sync_func = no_sync if len(ddp) > 1 else no_sync[0]
    return Model(config, embedding, platform, chunks, ddp, optimizer)


def build_frozen(literals: Literals, embedding: Embedding, platform: Platform) -> Model:
    """This rank's part of a model that is only read: no optimizer, no buffers for gradients, no dropout.

    Of `literals` the optimizer and the data-parallel config are not looked at. Raises Unsupported as `build` does.
    """
    chunks, modules = _build_chunks(literals, embedding, platform)
    return Model(
        literals.model, embedding, platform, chunks, tuple(module.eval() for module in modules), optimizer=None
    )


def count_parameters(model: Model) -> int:
    """Parameters of the whole model, each counted once: split ones over all ranks, replicas and tied copies left out."""
    count = 0
    for parameter in (parameter for chunk in model.chunks for parameter in chunk.parameters()):
        tied_copy = getattr(
            parameter, "shared", False
        )  # Megatron-Core's mark on the last stage's copy of the embedding
        if not tied_copy and _is_first_replica(parameter):
            count += parameter.numel()
    total = torch.tensor([count], dtype=torch.int64, device=model.platform.device)
    torch.distributed.all_reduce(total)
    return int(total)


def _is_first_replica(parameter: torch.nn.Parameter) -> bool:
    split = getattr(parameter, "tensor_model_parallel", False)
    if is_expert(parameter):
        piece = split or parallel_state.get_expert_tensor_parallel_rank() == 0
        return bool(piece and parallel_state.get_expert_data_parallel_rank() == 0)
    piece = split or parallel_state.get_tensor_model_parallel_rank() == 0
    return bool(piece and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


def _build_chunks(
    literals: Literals, embedding: Embedding, platform: Platform
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(the GPTModels, what stands in for each in the model's precision)."""
    if embedding.positions not in POSITIONS:
        names = ", ".join(map(repr, POSITIONS))
        raise Unsupported(f"embedding.positions={embedding.positions!r} is unknown: write {names}")
    config, virtual = literals.model, literals.model.virtual_pipeline_model_parallel_size
    numbers: list[int | None] = list(range(virtual)) if virtual else [None]
    chunks = tuple(build_chunk(literals, embedding, number).to(platform.device) for number in numbers)
    mark_experts(chunks)
    if config.bf16 or config.fp16:
        return chunks, tuple(Float16Module(config, chunk) for chunk in chunks)
    return chunks, chunks


def build_chunk(literals: Literals, embedding: Embedding, number: int | None) -> Any:
    """The GPTModel of a virtual stage, counted from 0; None without interleaving."""
    rope = embedding.positions == "rope"
    chunk = GPT(
        config=literals.model,
        transformer_layer_spec=layer_specs(literals, embedding.positions, number),
        vocab_size=embedding.padded_vocab_size,
        max_sequence_length=embedding.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
        parallel_output=True,
        share_embeddings_and_output_weights=embedding.tied,
        position_embedding_type=POSITIONS[embedding.positions],
        rotary_base=embedding.rotary_base if rope else 10_000,
        rope_scaling=rope and embedding.rotary_scaling > 0,
        rope_scaling_factor=embedding.rotary_scaling or 1.0,
        mtp_block_spec=prediction_specs(literals, embedding.positions, number),
        vp_stage=number,
    )
    if chunk.post_process and embedding.output_multiplier != 1.0:
        chunk.output_layer.register_forward_pre_hook(partial(_scale_hidden, embedding.output_multiplier))
    return chunk


def _scale_hidden(multiplier: float, module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hidden states that the output layer reads: scaling them scales the logits."""
    hidden, *others = arguments
    return hidden * multiplier, *others
