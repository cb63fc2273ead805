"""A family's sizes as columns: what a search over sizes is solved on, before it is rounded to a shape that can be built.

Row i is a model of `total[i]` parameters whose hidden size is a real number; its depth, heads and FFN follow the family's rules.
Real shapes are then chosen by `shape.py`, and tokens counted by their exact FLOPs.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.choose.shape import KV_RANK, LARGE_HEAD, Q_RANK, SMALL, SMALL_HEAD, width_per_layer
from trainwright.compiler.estimate.layouts import Floats
from trainwright.compiler.facts import PLAIN, Family

SMALLEST, LARGEST = 1e4, 1e15  # parameters
ROWS_A_DECADE = 200  # neighbours are 1.2 % apart: losses between them are interpolated to 1e-8
APART = (
    40  # rows between which slopes are taken: 1.6 times, across the steps where families change heads or cease to tie
)
ROUNDS = 60  # of the fixed point for the hidden size; each leaves at most 0.6 of the error


@dataclass(frozen=True)
class Sizes:
    """One row a size, rising. Parameters as laws count them (facts.COUNTS), and exact training FLOPs a token."""

    total: Floats
    embedding_once: Floats
    without_embedding: Floats
    body: Floats
    active: Floats
    flops: Floats  # DeepSeek's M
    flops_per_token: Floats  # Megatron's convention, as estimate.flops.model_flops_per_token

    def counted(self, counts: str) -> Floats:
        """The column that a law calls N."""
        column: Floats = getattr(self, counts)
        return column

    def at(self, column: Floats, total: Floats) -> Floats:
        """A column at other totals, interpolated in logarithms."""
        return np.asarray(np.exp(np.interp(np.log(total), np.log(self.total), np.log(column))))

    def total_of(self, counts: str, size: Floats) -> Floats:
        """Total parameters of the models that a law calls `size`."""
        return np.asarray(np.exp(np.interp(np.log(size), np.log(self.counted(counts)), np.log(self.total))))

    def elasticity(self, counts: str) -> Floats:
        """d ln FLOPs a token / d ln N of each row, N as a law counts it: 1 where FLOPs are 6 N."""
        rows = np.arange(len(self.total))
        low, high = np.maximum(rows - APART, 0), np.minimum(rows + APART, len(rows) - 1)
        flops, counted = np.log(self.flops_per_token), np.log(self.counted(counts))
        return np.asarray((flops[high] - flops[low]) / (counted[high] - counted[low]))


def tabulate_sizes(family: Family, num_experts: int, vocab_size: int, context_length: int) -> Sizes:
    """The sizes of a family; `num_experts` replaces the rules' (0: dense)."""
    rules = family.rules
    total = np.geomspace(SMALLEST, LARGEST, int(ROWS_A_DECADE * np.log10(LARGEST / SMALLEST)) + 1)
    width = np.array([width_per_layer(rules, size) for size in total])
    copies = 1 + _past(total, rules.tied_up_to)
    head_dim = SMALL_HEAD + (LARGE_HEAD - SMALL_HEAD) * _past(total, SMALL)
    ffn = (3.0 if rules.gated else 2.0) * rules.ffn_ratio[1]
    positions = context_length if rules.positions == "learned" else 0
    further = {**PLAIN, **rules.shape}
    latent = further["kv_lora_rank"] > 0

    def attention(hidden: Floats) -> Floats:
        """Matrices of a layer's attention: queries are as wide as the layer, keys as the family's groups; of latent attention
        heads as `shape.scaled_down` has them, whose queries and keys are half as wide again."""
        if not latent:
            return np.asarray(2 * hidden * (hidden + np.minimum(hidden, rules.query_groups * head_dim)))
        rank = np.minimum(further["kv_lora_rank"], KV_RANK * hidden)
        queries = 1.5 * hidden**2
        if further["q_lora_rank"]:
            compressed = np.minimum(further["q_lora_rank"], Q_RANK * hidden)
            queries = compressed * (hidden + 1.5 * hidden)
        return np.asarray(queries + hidden * (rank + head_dim / 2) + 2 * rank * hidden + hidden**2)

    def layers(hidden: Floats, experts: float) -> Floats:
        """Matrices of all layers, whose mixtures have so many experts and the shared one."""
        depth = hidden / width
        mixtures = np.zeros_like(depth)
        if num_experts:
            mixtures = np.maximum(depth - np.minimum(further["first_dense_layers"], np.maximum(depth / 8, 1)), 0)
            mixtures = mixtures / further["moe_every"]
        wide = rules.expert_ratio * (experts + rules.shared_ratio)
        return np.asarray(depth * attention(hidden) + ((depth - mixtures) + mixtures * wide) * ffn * hidden**2)

    def count(hidden: Floats) -> Floats:
        return np.asarray((copies * vocab_size + positions) * hidden + layers(hidden, num_experts))

    hidden = (total * width / 13) ** (1 / 3)
    for _ in range(ROUNDS):
        # The count grows with the first to the third power of the hidden size.
        hidden = hidden * (total / count(hidden)) ** (1 / 2.5)
    body = layers(hidden, rules.experts_per_token)
    vocabulary = vocab_size * hidden
    core = (
        hidden / width * hidden * context_length * (1.25 if latent else 1.0)
    )  # num_layers x (queries + values) / 2 x tokens
    return Sizes(
        total=total,
        embedding_once=total - (copies - 1) * vocabulary,
        without_embedding=body + vocabulary,
        body=body,
        active=body + 2 * vocabulary + positions * hidden,
        flops=6 * body + 12 * core,
        flops_per_token=6 * (body + vocabulary) + 6 * core,
    )


def _past(total: Floats, threshold: float) -> Floats:
    """How far sizes are past a threshold, from 0 at half of it to 1 at twice: a family's steps are spread, so that no best size
    sticks to one."""
    if not threshold:
        return np.ones_like(total)
    return np.asarray(np.clip(0.5 + np.log(total / threshold) / (2 * np.log(2)), 0, 1))
