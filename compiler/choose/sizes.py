"""A family's sizes as columns: what a search over sizes is solved on, before it is rounded to a shape that can be built.

Row i is a model of `total[i]` parameters whose hidden size is a real number; its depth, heads and FFN follow the family's rules.
Real shapes are then chosen by `shape.py`, and tokens counted by their exact FLOPs.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.choose.shape import head_dim_for, width_per_layer
from trainwright.compiler.estimate.layouts import Floats
from trainwright.compiler.facts import Family

SMALLEST, LARGEST = 1e4, 1e15  # parameters
ROWS_A_DECADE = 200  # neighbours are 1.2 % apart: losses between them are interpolated to 1e-8
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
        rising = np.maximum.accumulate(self.counted(counts))  # where a family ceases to tie, some counts step down
        return np.asarray(np.exp(np.interp(np.log(size), np.log(rising), np.log(self.total))))


def tabulate_sizes(family: Family, num_experts: int, vocab_size: int, context_length: int) -> Sizes:
    """The sizes of a family; `num_experts` replaces the rules' (0: dense)."""
    rules = family.rules
    total = np.geomspace(SMALLEST, LARGEST, int(ROWS_A_DECADE * np.log10(LARGEST / SMALLEST)) + 1)
    width = np.array([width_per_layer(rules, size) for size in total])
    copies = np.where(total <= rules.tied_up_to, 1.0, 2.0)
    matrices = 3.0 if rules.gated else 2.0
    positions = context_length if rules.positions == "learned" else 0

    def layer(hidden: Floats, experts: float) -> Floats:
        """Matrices of a layer with so many experts: queries are as wide as the layer, keys as the family's groups."""
        keys = np.minimum(hidden, rules.query_groups * np.array([head_dim_for(size) for size in total]))
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
