"""What each emitted program holds and executes on a device of each pipeline rank, counted exactly: a dry run checks it.

The other estimates are columns over layouts, in floats; this one is of the chosen layout alone, in whole numbers. The sums over
ranks are those of `params` and `flops`. Every row of a micro-batch is full, and every expert gets as many tokens.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from trainwright.compiler.estimate.layouts import BYTES, Workload, one_layout
from trainwright.compiler.estimate.memory import MASTER_BYTES, MOMENT_BYTES, Memory, passing_bytes, rank_memory
from trainwright.compiler.estimate.params import (
    attention_parameters,
    expert_parameters,
    ffn_bias_parameters,
    matrices_by_module,
    norm_parameters,
    position_parameters,
    query_size,
    value_size,
)
from trainwright.compiler.estimate.placement import chunks_of, is_mixture
from trainwright.compiler.plan import Layout, ModuleEstimate, RankEstimate, Shape

MODULES = ("embedding", "attention", "ffn", "experts", "shared_experts", "router", "norms", "mtp", "output")


@dataclass(frozen=True)
class Rows:
    """What a program computes at a time: `sequences` of the workload's context length a micro-batch, `micro_batches` of them a
    step and data rank; where it is not `trained` the model is only asked."""

    sequences: int
    micro_batches: int
    trained: bool = True


def estimate_program(workload: Workload, layout: Layout, rows: Rows) -> tuple[RankEstimate, ...]:
    """One estimate for neighbouring pipeline ranks that are alike."""
    ranks = [_estimate_rank(workload, layout, rows, rank) for rank in range(layout.pipeline)]
    merged = []
    for _, alike in groupby(ranks, key=lambda one: replace(one, first=0, last=0)):
        same = list(alike)
        merged.append(replace(same[0], last=same[-1].last))
    return tuple(merged)


def _estimate_rank(workload: Workload, layout: Layout, rows: Rows, rank: int) -> RankEstimate:
    parameters = _Parameters(workload, layout, rank)
    held = parameters.by_module()
    flops = _Flops(workload, layout, rows, rank).by_module()
    of_experts = parameters.experts
    dense = sum(held.values()) - of_experts
    replicas = layout.data * layout.context
    expert_replicas = max(layout.tensor * replicas // (layout.expert * layout.expert_tensor), 1)
    shard = dense + of_experts
    if layout.distributed_optimizer:
        shard = -(-dense // replicas) - (-of_experts // expert_replicas)
    width = BYTES[workload.precision]
    states = MASTER_BYTES[workload.precision] + MOMENT_BYTES[workload.optimizer]
    total = dense + of_experts
    peak, beside = _peak_bytes(workload, layout, rows, rank)
    return RankEstimate(
        first=rank,
        last=rank,
        parameters=total,
        parameter_bytes=width * total,
        gradient_bytes=workload.gradient_bytes * total if rows.trained else 0,
        optimizer_bytes=states * shard if rows.trained else 0,
        peak_bytes=peak,
        overhead_bytes=beside,
        flops=sum(flops.values()),
        modules=tuple(ModuleEstimate(name, held[name], flops[name]) for name in MODULES if held[name] or flops[name]),
    )


def _layers(shape: Shape, layout: Layout, rank: int) -> Iterator[tuple[bool, bool]]:
    """(whether it is a mixture, whether full recompute by blocks names it) of each layer of a pipeline rank."""
    for chunk in chunks_of(shape.num_layers, layout, rank):
        for place, layer in enumerate(chunk):
            yield is_mixture(shape, layer), place < layout.recompute_layers


class _Parameters:
    """Parameters on a device of a pipeline rank, where Megatron-Core's GPTModel puts them."""

    def __init__(self, workload: Workload, layout: Layout, rank: int) -> None:
        self._shape, self._layout, self._rank = workload.shape, layout, rank
        self._context_length, self._local = workload.context_length, workload.local_layers
        self.experts = 0  # in every module, multi-token prediction's too

    def by_module(self) -> Counter[str]:
        shape, layout = self._shape, self._layout
        first, last = self._rank == 0, self._rank == layout.pipeline - 1
        vocabulary = layout.padded_vocab_size * shape.hidden_size // layout.tensor
        held: Counter[str] = Counter()
        self.experts = 0
        for mixture, _ in _layers(shape, layout, self._rank):
            held.update(self._layer(mixture=mixture))
        if first:
            held["embedding"] += vocabulary + position_parameters(shape, self._context_length)
        # The final norm: beside the output layer, with multi-token prediction behind the last layer.
        chunks = chunks_of(shape.num_layers, layout, self._rank)
        if any(shape.num_layers - 1 in chunk for chunk in chunks) if shape.mtp_layers else last:
            held["norms"] += norm_parameters(shape)
        copies = shape.tied_embeddings and (first or shape.mtp_layers)  # the output layer uses a table that is there
        if last and not copies:
            held["output"] += vocabulary
        if last and shape.mtp_layers:
            for _ in range(shape.mtp_layers):
                held["mtp"] += sum(self._layer(mixture=shape.num_experts > 0).values())
                held["mtp"] += 2 * shape.hidden_size**2 // layout.tensor + 3 * norm_parameters(shape)
            # It looks tokens up itself.
            held["embedding"] += 0 if first else vocabulary + position_parameters(shape, self._context_length)
        return held

    def _layer(self, *, mixture: bool) -> Counter[str]:
        shape, layout = self._shape, self._layout
        used = matrices_by_module(shape, mixture=mixture)
        attention, tensor = attention_parameters(shape), np.array(layout.tensor)
        experts = shape.num_experts * expert_parameters(shape) // (layout.expert * layout.expert_tensor)
        biases = ffn_bias_parameters(shape, mixture=mixture)
        self.experts += experts * mixture
        return Counter(
            attention=int(attention.dense_on(tensor, local_layers=self._local)),
            ffn=(used.ffn + biases.sharded) // layout.tensor + biases.replicated,
            experts=experts * mixture,
            shared_experts=used.shared_experts // layout.tensor,
            router=used.router,
            norms=2 * norm_parameters(shape),
        )


class _Flops:
    """FLOPs that a device of a pipeline rank executes."""

    def __init__(self, workload: Workload, layout: Layout, rows: Rows, rank: int) -> None:
        self._workload, self._layout, self._rows, self._rank = workload, layout, rows, rank
        self._tokens = rows.sequences * workload.context_length // layout.context  # of a micro-batch

    def by_module(self) -> Counter[str]:
        shape, layout, rows = self._workload.shape, self._layout, self._rows
        passes = 3 if rows.trained else 1
        flops: Counter[str] = Counter()
        for mixture, named in _layers(shape, layout, self._rank):
            flops.update(self._layer(mixture=mixture, named=named))
        if self._rank == layout.pipeline - 1:
            head = 2 * self._tokens * shape.hidden_size * layout.padded_vocab_size // layout.tensor
            flops["output"] += passes * head
            for _ in range(shape.mtp_layers if rows.trained else 0):
                product = 4 * self._tokens * shape.hidden_size**2 // layout.tensor
                again = layout.recompute_method == "uniform"  # by blocks Megatron-Core 0.16 leaves it out
                flops["mtp"] += (passes + again) * product
                flops["mtp"] += sum(self._layer(mixture=shape.num_experts > 0, named=again).values())
                flops["output"] += passes * head
        return Counter({name: rows.micro_batches * amount for name, amount in flops.items()})

    def _layer(self, *, mixture: bool, named: bool) -> Counter[str]:
        """`named`: full recompute by blocks repeats it."""
        shape, layout = self._workload.shape, self._layout
        used = matrices_by_module(shape, mixture=mixture)
        length = self._workload.context_length
        core = (query_size(shape) + value_size(shape)) * self._rows.sequences * length**2
        core //= layout.tensor * layout.context
        forward = Counter(
            core=core,
            up=2 * self._tokens * used.up // layout.tensor,
            attention=2 * self._tokens * (used.attention - used.up + used.down) // layout.tensor,
            ffn=2 * self._tokens * used.ffn // layout.tensor,
            experts=2 * self._tokens * used.experts // layout.tensor,
            shared_experts=2 * self._tokens * used.shared_experts // layout.tensor,
            router=2 * self._tokens * used.router // layout.tensor,
        )
        again = self._recomputed(named=named) if self._rows.trained else Counter()
        passes = 3 if self._rows.trained else 1
        flops = Counter({name: (passes + again[name]) * amount for name, amount in forward.items()})
        flops["attention"] += flops.pop("core") + flops.pop("up")
        return flops

    def _recomputed(self, *, named: bool) -> Counter[str]:
        """How often the forward pass of each part is repeated in the backward pass (Megatron-Core 0.16,
        TransformerConfig.recompute_modules): a part inside of another that are both named, for each."""
        layout = self._layout
        if layout.recompute == "full":
            everything = {"core", "up", "attention", "ffn", "experts", "shared_experts", "router"}
            return Counter(everything if named or layout.recompute_method != "block" else ())
        if layout.recompute != "selective":
            return Counter()
        parts = {
            "core_attn": {"core"},
            "mlp": {"ffn"},
            "moe": {"experts", "shared_experts", "router"},
            "shared_experts": {"shared_experts"},
            "mla_up_proj": {"up"} if self._workload.device.kind == "cuda" else set(),  # a CPU's program leaves it out
        }
        return Counter(part for name in layout.recompute_modules for part in parts.get(name, ()))


def _peak_bytes(workload: Workload, layout: Layout, rows: Rows, rank: int) -> tuple[int, int]:
    """(tensors, what is held beside them)."""
    table = one_layout(replace(layout, micro_batch=rows.sequences, micro_batches=rows.micro_batches))
    column = np.full_like(table.pipeline, rank)
    memory: Memory = rank_memory(workload, table, column)
    passing = passing_bytes(workload, table)
    beside = memory.overhead - passing
    tensors = memory.total - beside
    if not rows.trained:
        # A pass without gradients keeps nothing: one layer works at a time.
        layers = sum(len(chunk) for chunk in chunks_of(workload.shape.num_layers, layout, rank))
        tensors = memory.parameters + memory.activations / max(layers * layout.pipeline, 1) + memory.logits
    return int(np.rint(tensors[0])), int(np.rint(beside[0]))
