"""What mixtures of experts, latent attention and the prediction of further tokens ask of a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainwright.runtime.errors import Unsupported

if TYPE_CHECKING:
    from trainwright.runtime.megatron.parallel import Parallel


def check_family(parallel: Parallel, model: Any) -> None:
    """Raise Unsupported, with the reason and the fix, where the model's family does not go with the layout.

    `model` is Megatron-Core's TransformerConfig.
    """
    if model.num_moe_experts is not None:
        _check_experts(parallel, model)
    elif parallel.expert > 1 or parallel.expert_tensor > 1:
        raise Unsupported(f"a dense model has no experts to spread: write expert=1, expert_tensor=1 ({parallel})")
    if model.multi_latent_attention and parallel.tensor > 1 and not model.sequence_parallel:
        raise Unsupported(
            f"latent attention with tensor {parallel.tensor} needs sequence_parallel=True: without it Megatron-Core sums the "
            "gradients of the queries' norm, which every tensor rank holds whole, over the tensor ranks"
        )
    if model.mtp_num_layers:
        _check_prediction(parallel, model)


def _check_experts(parallel: Parallel, model: Any) -> None:
    if model.expert_tensor_parallel_size != parallel.expert_tensor:
        raise Unsupported(
            f"model=expert_tensor_parallel_size={model.expert_tensor_parallel_size}, but the layout has expert_tensor "
            f"{parallel.expert_tensor}"
        )
    if parallel.tensor > 1 and not model.sequence_parallel:
        raise Unsupported(f"a mixture of experts with tensor {parallel.tensor} needs sequence_parallel=True")
    for name, value, degree, divisor in (
        ("num_moe_experts", model.num_moe_experts, "expert", parallel.expert),
        ("moe_ffn_hidden_size", model.moe_ffn_hidden_size, "expert_tensor", parallel.expert_tensor),
        ("moe_shared_expert_intermediate_size", model.moe_shared_expert_intermediate_size, "tensor", parallel.tensor),
    ):
        if value and value % divisor:
            raise Unsupported(
                f"{name} {value} is not divisible by {degree} {divisor}: "
                f"{value} = {value // divisor} x {divisor} + {value % divisor}"
            )
    stage, experts = parallel.tensor * parallel.context * parallel.data, parallel.expert * parallel.expert_tensor
    if stage % experts:
        raise Unsupported(
            f"expert {parallel.expert} x expert_tensor {parallel.expert_tensor} = {experts} processes hold all experts of a "
            f"stage once, and a stage has tensor {parallel.tensor} x context {parallel.context} x data {parallel.data} "
            f"= {stage}: {experts} must divide {stage}"
        )
    pattern = model.moe_layer_freq
    if isinstance(pattern, list) and len(pattern) != model.num_layers:
        raise Unsupported(
            f"moe_layer_freq has {len(pattern)} entries for {model.num_layers} layers: one a layer, 1 or 0"
        )


def _check_prediction(parallel: Parallel, model: Any) -> None:
    if parallel.context > 1:
        raise Unsupported(
            f"mtp_num_layers={model.mtp_num_layers} with context {parallel.context}: Megatron-Core divides the loss of further "
            "tokens by the tokens of each context rank, which are not the same number, so its gradients would depend on the "
            "layout; write mtp_num_layers=None, or compile with context 1"
        )
    if model.recompute_granularity == "full" and model.recompute_num_layers != 1:
        raise Unsupported(
            f"mtp_num_layers={model.mtp_num_layers} with full recompute needs recompute_num_layers=1, not "
            f"{model.recompute_num_layers}: Megatron-Core recomputes these layers one by one"
        )
