"""The model and its optimizer: GPTModel in Megatron-Core's DDP, with the layer spec that the program asks for."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.platform import Literals, Platform
from trainwright.runtime.megatron.specs import layer_specs


@dataclass(frozen=True)
class Embedding:
    """Vocabulary and positions. Sizes count elements; `sequence_length` counts tokens."""

    vocab_size: int  # what the tokenizer holds
    padded_vocab_size: int  # what the embedding holds, so that it divides by the tensor degree
    sequence_length: int
    positions: str  # "rope" | "learned"
    rotary_base: int  # 0 with learned positions
    tied: bool  # the output layer shares the embedding's weight


@dataclass(frozen=True)
class Model:
    """This rank's part of the model. `gpt` is the bare module, `ddp` what the schedules run: wrapped for data parallelism,
    or, of a frozen model, as it is."""

    config: Any
    embedding: Embedding
    platform: Platform
    gpt: Any
    ddp: Any
    optimizer: Any  # None: the model is frozen

    @property
    def overlaps_param_gather(self) -> bool:
        """The optimizer leaves parameters ungathered until the next forward pass."""
        if self.optimizer is None:
            return False
        ddp = self.ddp.ddp_config
        return bool(ddp.use_distributed_optimizer and ddp.overlap_param_gather)


def build(literals: Literals, embedding: Embedding, platform: Platform) -> Model:
    """Build this rank's part of the model and of its optimizer; the weights are drawn from the seeded generators.

    `literals` are the platform's (`Platform.adapt`). Raises Unsupported for positions that the runtime does not know.
    """
    gpt, module = _build_module(literals, embedding, platform)
    config = literals.model
    ddp = DistributedDataParallel(config=config, ddp_config=literals.ddp, module=module)
    optimizer = get_megatron_optimizer(literals.optimizer, [ddp])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = ddp.no_sync
    return Model(config, embedding, platform, gpt, ddp, optimizer)


def build_frozen(literals: Literals, embedding: Embedding, platform: Platform) -> Model:
    """This rank's part of a model that is only read: no optimizer, no buffers for gradients, no dropout.

    Of `literals` the optimizer and the data-parallel config are not looked at. Raises Unsupported as `build` does.
    """
    gpt, module = _build_module(literals, embedding, platform)
    return Model(literals.model, embedding, platform, gpt, module.eval(), optimizer=None)


def count_parameters(model: Model) -> int:
    """Parameters of the whole model, each counted once: split ones over all ranks, replicas and tied copies left out."""
    count = 0
    for parameter in model.gpt.parameters():
        replica = (
            not getattr(parameter, "tensor_model_parallel", False)
            and parallel_state.get_tensor_model_parallel_rank() != 0
        )
        tied_copy = getattr(
            parameter, "shared", False
        )  # Megatron-Core's mark on the last stage's copy of the embedding
        if not replica and not tied_copy:
            count += parameter.numel()
    total = torch.tensor([count], dtype=torch.int64, device=model.platform.device)
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total)


def _build_module(literals: Literals, embedding: Embedding, platform: Platform) -> tuple[Any, Any]:
    """(the GPTModel, what stands in for it in the model's precision)."""
    config = literals.model
    if embedding.positions not in ("rope", "learned"):
        raise Unsupported(f"embedding.positions={embedding.positions!r} is unknown: write 'rope' or 'learned'")
    rope = embedding.positions == "rope"
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=layer_specs(literals),
        vocab_size=embedding.padded_vocab_size,
        max_sequence_length=embedding.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=embedding.tied,
        position_embedding_type="rope" if rope else "learned_absolute",
        rotary_base=embedding.rotary_base if rope else 10_000,
    ).to(platform.device)
    return gpt, Float16Module(config, gpt) if config.bf16 or config.fp16 else gpt
