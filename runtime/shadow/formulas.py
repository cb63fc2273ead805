"""FLOPs of operations, 2 a multiply-add: matrix products, and attention as the project counts it.

Attention is causal everywhere: of a chunk of q queries that ends with its last key, over k keys, q k - q^2 / 2 pairs count (half
of a square), forward 2 products, backward 4: torch's own formulas ignore causality, and have none for the CPU's kernel. What a
flash kernel computes again in its backward pass is not counted, as in Megatron-LM's count.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch

Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]
_aten = torch.ops.aten


def attention_flops(batch: int, heads: int, queries: int, keys: int, key_width: int, value_width: int) -> int:
    """Of one forward pass: queries x keys, and scores x values, causal."""
    pairs2 = 2 * queries * keys - queries * queries  # twice the pairs
    return batch * heads * pairs2 * (key_width + value_width)


def _product(left: Any, right: Any) -> int:
    return int(2 * prod(left.shape) * right.shape[-1])


def _core(query: Any, key: Any, value: Any) -> int:
    batch, heads, queries, width = query.shape
    return attention_flops(batch, heads, queries, key.shape[2], width, value.shape[3])


def scores_formula(widths: Iterable[int]) -> Formula:
    """FLOPs of a product of batches. They are met in attention alone, whose scores are held where no kernel takes it (latent
    attention on a CPU, keys wider than values). Of a product's three sizes one is a head's width, of `widths`; the others are
    q and k."""
    known = set(widths)

    def flops(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        left, right = args[-2:]
        sizes = [left.shape[1], left.shape[2], right.shape[2]]
        for place, width in enumerate(sizes):
            queries, keys = sorted(sizes[:place] + sizes[place + 1 :])
            if width in known and keys % queries == 0:
                return int(left.shape[0] * width * (2 * queries * keys - queries * queries))
        return _product(left, right)

    return flops


FORMULAS: dict[Any, Formula] = {
    _aten.mm: lambda args, kwargs, out: _product(args[0], args[1]),
    _aten.addmm: lambda args, kwargs, out: _product(args[1], args[2]),
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda args, kwargs, out: _core(*args[:3]),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args, kwargs, out: 2 * _core(*args[1:4]),
}
