"""A family's sizes as columns: what a search over sizes is solved on, before it is rounded to a shape that can be built.

Row i is a model of `total[i]` parameters whose hidden size is a real number; its depth, heads and FFN follow the family's rules.
Real shapes are then chosen by `shape.py`, and tokens counted by their exact FLOPs.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.choose.shape import LARGE_HEAD, SMALL, SMALL_HEAD, width_per_layer
from trainwright.compiler.estimate.layouts import Floats
from trainwright.compiler.facts import Family

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
    matrices = 3.0 if rules.gated else 2.0
    positions = context_length if rules.positions == "learned" else 0

    def layer(hidden: Floats, experts: float) -> Floats:
        """Matrices of a layer with so many experts: queries are as wide as the layer, keys as the family's groups."""
        keys = np.minimum(hidden, rules.query_groups * head_dim)
        return np.asarray(2 * hidden * (hidden + keys) + experts * matrices * rules.ffn_ratio[1] * hidden**2)

    def count(hidden: Floats) -> Floats:
        return np.asarray(
            (copies * vocab_size + positions) * hidden + hidden / width * layer(hidden, max(num_experts, 1))
        )

    hidden = (total * width / 13) ** (1 / 3)
    for _ in range(ROUNDS):
        # The count grows with the first to the third power of the hidden size.
        hidden = hidden * (total / count(hidden)) ** (1 / 2.5)
    body = hidden / width * layer(hidden, rules.experts_per_token if num_experts else 1)
    vocabulary = vocab_size * hidden
    attention = hidden / width * hidden * context_length  # num_layers x queries x tokens
    return Sizes(
        total=total,
        embedding_once=total - (copies - 1) * vocabulary,
        without_embedding=body + vocabulary,
        body=body,
        active=body + 2 * vocabulary + positions * hidden,
        flops=6 * body + 12 * attention,
        flops_per_token=6 * (body + vocabulary) + 6 * attention,
    )


def _past(total: Floats, threshold: float) -> Floats:
    """How far sizes are past a threshold, from 0 at half of it to 1 at twice: a family's steps are spread, so that no best size
    sticks to one."""
    if not threshold:
        return np.ones_like(total)
    return np.asarray(np.clip(0.5 + np.log(total / threshold) / (2 * np.log(2)), 0, 1))
