"""Mixtures of experts: what Megatron-Core 0.16.1 leaves to its caller, or does wrong in some layouts."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from trainwright.runtime.megatron.losses import Loss

# The name of a router's loss in Megatron-Core's tracker -> the name that it is reported by.
BALANCING = {
    "aux_loss": ("load_balancing_loss", "balancing_loss"),
    "seq_aux_loss": ("seq_load_balancing_loss", "sequence_balancing_loss"),
}
ROUTER_Z_LOSS = ("z_loss", "router_z_loss")
PREDICTION_LOSS = "further_tokens_loss"
AUXILIARY_FIGURES = (*(reported for _, reported in BALANCING.values()), ROUTER_Z_LOSS[1], PREDICTION_LOSS)


class Router(TopKRouter):  # type: ignore[misc]
    """TopKRouter that never weighs its own losses by tokens: see `router_losses_weighed`."""

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config, pg_collection)
        self.calculate_per_token_loss = False


@contextlib.contextmanager
def router_losses_weighed(config: Any, batches: Sequence[Mapping[str, Tensor]], loss: Loss) -> Iterator[None]:
    """Inside, a step's router losses are means over its micro-batches in every layout. `batches`: this data rank's.

    With calculate_per_token_loss all gradients are in the end divided by the items of the global batch. Megatron-Core
    multiplies a router's loss, a mean already, by the tokens of the micro-batch: right where they are the items and one rank
    has them all. But `tensor x context` ranks have parts of them, answers are fewer than tokens, and pairs fewer still.
    """
    if not config.num_moe_experts or not config.calculate_per_token_loss:
        yield
        return
    items = torch.stack([loss.items(batch).double() for batch in batches]).sum().to(torch.cuda.current_device())
    dist.all_reduce(items, group=parallel_state.get_data_parallel_group())
    weight = float(items) / (len(batches) * int(parallel_state.get_data_parallel_world_size()))
    set_loss_scale = MoEAuxLossAutoScaler.set_loss_scale
    MoEAuxLossAutoScaler.set_loss_scale = staticmethod(lambda scale: set_loss_scale(scale * weight))
    try:
        yield
    finally:
        MoEAuxLossAutoScaler.set_loss_scale = staticmethod(set_loss_scale)


def mark_experts(chunks: Iterable[torch.nn.Module]) -> None:
    """Call it before the chunks are wrapped for data parallelism: says of every expert's parameters that their gradients are
    summed over the ranks that hold the same expert.

    Megatron-Core says it only where experts are spread over ranks. Otherwise, with tensor ranks that each hold whole experts
    (tensor 2, expert_tensor 1), it would sum over data ranks alone, though each tensor rank has seen other tokens; and a
    checkpoint of such an optimizer would not load in a layout that spreads experts.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Of a model that was marked."""
    return not getattr(parameter, "allreduce", True)


def auxiliary_figures(config: Any, loss: Loss, micro_batches: int, device: torch.device) -> dict[str, float]:
    """Means over a step of the losses that routers and the prediction of further tokens add, before their coefficients.

    All ranks call it together and get the same. `micro_batches` are those of a data rank in the step.
    """
    figures: dict[str, float] = {}
    if config.num_moe_experts:
        figures |= _router_figures(config, micro_batches, device)
    if config.mtp_num_layers:
        losses = _sum_over_world(MTPLossLoggingHelper.tracker, config.mtp_num_layers, device)
        MTPLossLoggingHelper.tracker.clear()
        on_last_stage = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
        if loss.further_tokens:
            figures[PREDICTION_LOSS] = losses / (on_last_stage * micro_batches * config.mtp_num_layers)
    return figures


def _router_figures(config: Any, micro_batches: int, device: torch.device) -> dict[str, float]:
    data = int(parallel_state.get_data_parallel_world_size())
    on_stage = dist.get_world_size() // parallel_state.get_pipeline_model_parallel_world_size()
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [number % pattern == 0 for number in range(config.num_layers)]
    mixtures, layers = sum(pattern), config.num_layers
    if config.mtp_num_layers:  # made as the last layer is
        mixtures, layers = mixtures + pattern[-1] * config.mtp_num_layers, layers + config.mtp_num_layers
    wanted = []  # (name in the tracker, name in the report, how many times the ranks together count one micro-batch's loss)
    if config.moe_router_load_balancing_type in BALANCING and config.moe_aux_loss_coeff:
        wanted.append(
            (*BALANCING[config.moe_router_load_balancing_type], data)
        )  # tensor and context ranks hold parts of it
    if config.moe_z_loss_coeff is not None:
        wanted.append((*ROUTER_Z_LOSS, on_stage))  # each rank holds a mean over its own tokens
    tracker = get_moe_layer_wise_logging_tracker()
    figures = {
        name: _sum_over_world(tracker.get(key, {}), layers, device) / (times * micro_batches * mixtures)
        for key, name, times in wanted
    }
    tracker.clear()
    return figures


def _sum_over_world(tracked: Mapping[str, Any], layers: int, device: torch.device) -> float:
    """Of a loss, over all layers: a rank whose stage has no such layer has tracked nothing."""
    total = tracked.get("values", torch.zeros(layers)).to(device, torch.float64).sum()
    dist.all_reduce(total)
    return float(total)
