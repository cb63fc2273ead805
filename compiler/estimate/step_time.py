"""Seconds of one training step: products at a share of the peak, pipeline bubble, communication, optimizer.

Pipeline: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2 (bubble (p - 1) / (v m)). Tensor parallelism: Shoeybi et al. 2019
(arXiv 1909.08053), two all-reduces a layer forward and two backward; with sequence parallelism the same bytes as all-gather and
reduce-scatter (Korthikanti et al. 2022, section 4.2.2). Ring collectives: Thakur et al. 2005, (n - 1) / n of the buffer a pass.
First form: one efficiency a device stands for the shapes of products, element-wise work and attention; no latencies.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.flops import head_forward_flops, layers_executed_flops, mtp_forward_flops
from trainwright.compiler.estimate.layouts import BYTES, FULL, Floats, Layouts, Workload
from trainwright.compiler.estimate.params import device_parameters
from trainwright.compiler.estimate.placement import ranks_of, stage_layers

# Share of a link's one-way rate that large collectives reach: about what nccl-tests print as bus bandwidth.
LINK_EFFICIENCY = 0.75
# A parameter: gradient, (master) weight and two moments read, the last three written; bf16: the model's weight written too.
OPTIMIZER_TRAFFIC_BYTES = {"bf16": 30, "fp32": 28}
CLIPPING_TRAFFIC_BYTES = 12  # a parameter: gradient read for the norm, scaled, and zeroed
# Against 707 published runs of dense models on A100 and H100 (sources weighted equally) 83 % of these step times lie within 25 %
# of the measured ones; the errors' middle 80 % is -29 % to +22 %.
BAND = 0.25


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, one row a layout; the parts add up to `total`."""

    compute: Floats  # products and attention of every micro-batch on the slowest pipeline rank
    tensor: Floats  # tensor-parallel collectives, not overlapped
    bubble: Floats  # the pipeline filling and draining
    transfer: Floats  # activations between pipeline ranks
    data: Floats  # gradient reduction and parameter gathering, what is left after overlap
    optimizer: Floats

    @property
    def total(self) -> Floats:
        return self.compute + self.tensor + self.bubble + self.transfer + self.data + self.optimizer

    @property
    def low(self) -> Floats:
        return self.total * (1 - BAND)

    @property
    def high(self) -> Floats:
        return self.total * (1 + BAND)


def estimate_step_time(workload: Workload, layouts: Layouts) -> StepTime:
    """Seconds of one step of each layout."""
    shape, device = workload.shape, workload.device
    rate = device.peak_flops_per_s[workload.precision] * device.efficiency * layouts.tensor
    tokens = layouts.micro_batch * workload.context_length / layouts.context
    first, middle, last = (stage_layers(shape.num_layers, layouts, rank) for rank in ranks_of(layouts))
    layer_s = tokens * layers_executed_flops(workload, layouts) / rate / shape.num_layers
    padded = layouts.padded_vocab_size.astype(np.float64)
    heads = head_forward_flops(shape, padded) + mtp_forward_flops(shape, workload.context_length, padded)
    head_s = tokens * 3.0 * heads / rate
    reduce_s = _all_reduce_s(workload, layouts, tokens)
    layer_reduces = np.where(layouts.recompute == FULL, 6, 4)
    slowest = np.maximum(np.maximum(first, middle) * layer_s, last * layer_s + head_s)
    slowest_reduce = (last * layer_reduces + 1) * reduce_s  # and one for the head's input gradient
    mean = (shape.num_layers * (layer_s + layer_reduces * reduce_s) + head_s + 2 * reduce_s) / layouts.pipeline
    bubble = (layouts.pipeline - 1) / layouts.virtual_pipeline * mean
    return StepTime(
        compute=np.asarray(layouts.micro_batches * slowest, dtype=np.float64),
        tensor=layouts.micro_batches * slowest_reduce,
        bubble=bubble,
        transfer=layouts.micro_batches * _transfer_s(workload, layouts, tokens),
        data=_data_s(workload, layouts, slowest + slowest_reduce),
        optimizer=_optimizer_s(workload, layouts),
    )


def _all_reduce_s(workload: Workload, layouts: Layouts, tokens: Floats) -> Floats:
    """One all-reduce of a micro-batch's hidden states over the tensor-parallel group."""
    device = workload.device
    inside = layouts.tensor <= workload.devices_per_node
    link = np.where(inside, device.intra_node_bytes_per_s, device.inter_node_bytes_per_s) * LINK_EFFICIENCY
    passes = 2 * (layouts.tensor - 1) / layouts.tensor
    return passes * tokens * workload.shape.hidden_size * BYTES[workload.precision] / link


def _transfer_s(workload: Workload, layouts: Layouts, tokens: Floats) -> Floats:
    """Activations of one micro-batch to the next pipeline rank and gradients back; more often when interleaved."""
    device = workload.device
    one_node = workload.nodes == 1
    link = (device.intra_node_bytes_per_s if one_node else device.inter_node_bytes_per_s) * LINK_EFFICIENCY
    split = np.where(layouts.sequence_parallel, layouts.tensor, 1)
    message = tokens * workload.shape.hidden_size * BYTES[workload.precision] / split
    return np.where(layouts.pipeline > 1, 2 * layouts.virtual_pipeline * message / link, 0.0)


def _data_s(workload: Workload, layouts: Layouts, micro_batch_s: Floats) -> Floats:
    """Gradients reduced in fp32 and updated weights gathered over the data-parallel group, once a step.

    A group's ranks in one node share that node's network cards. With overlap the reduction hides behind the last micro-batch's
    backward pass (two thirds of its time) and the gathering behind the first one's forward pass (one third).
    """
    device, group = workload.device, layouts.data * layouts.context
    in_node = np.minimum(np.maximum(workload.devices_per_node // layouts.tensor, 1), group)
    across = np.minimum(device.intra_node_bytes_per_s, device.inter_node_bytes_per_s * in_node)
    inside = layouts.tensor * group <= workload.devices_per_node
    link = np.where(inside, device.intra_node_bytes_per_s, across) * LINK_EFFICIENCY
    held = _last_parameters(workload, layouts)
    one_pass = (group - 1) / group * held / link
    reduce_s = 4 * one_pass * np.where(layouts.distributed_optimizer, 1, 2)
    gather_s = BYTES[workload.precision] * one_pass * layouts.distributed_optimizer
    if not workload.overlap:
        return np.asarray(reduce_s + gather_s)
    return np.maximum(reduce_s - micro_batch_s * 2 / 3, 0.0) + np.maximum(gather_s - micro_batch_s / 3, 0.0)


def _optimizer_s(workload: Workload, layouts: Layouts) -> Floats:
    """Adam and clipping, bound by memory bandwidth; the distributed optimizer updates a share."""
    held = _last_parameters(workload, layouts)
    share = np.where(layouts.distributed_optimizer, layouts.data * layouts.context, 1)
    traffic = OPTIMIZER_TRAFFIC_BYTES[workload.precision] / share + CLIPPING_TRAFFIC_BYTES
    return np.asarray(held * traffic / workload.device.memory_bandwidth_bytes_per_s)


def _last_parameters(workload: Workload, layouts: Layouts) -> Floats:
    """Parameters on a device of the last pipeline rank."""
    held = device_parameters(
        workload.shape, workload.context_length, layouts, layouts.pipeline - 1, local_layers=workload.local_layers
    )
    return held.total
