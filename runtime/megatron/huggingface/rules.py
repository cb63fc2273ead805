"""How one tensor of ours and one or several of a Hugging Face format stand for each other, element by element.

Each rule goes both ways and changes no element, so that what was imported is exported bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """`export` takes our tensor, whole, and gives theirs in the order of `theirs`; `adopt` is its inverse."""

    ours: str  # the name in a canonical checkpoint
    theirs: tuple[str, ...]
    export: Callable[[Tensor], Sequence[Tensor]]
    adopt: Callable[[Sequence[Tensor]], Tensor]


def same(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), lambda tensor: (tensor,), lambda tensors: tensors[0])


def transposed(ours: str, theirs: str) -> Rule:
    """Of GPT-2's Conv1D, whose weights are [in, out]."""
    return Rule(ours, (theirs,), lambda tensor: (tensor.t(),), lambda tensors: tensors[0].t())


def upon_each_other(ours: str, first: str, second: str) -> Rule:
    """Gate and up projection, which are one linear layer in Megatron-Core."""
    return Rule(ours, (first, second), lambda tensor: tensor.chunk(2), lambda tensors: torch.cat(list(tensors)))


def vocabulary(ours: str, theirs: str, rows: int) -> Rule:
    """An embedding whose padding, the rows from `rows` on, is not theirs."""
    return Rule(ours, (theirs,), lambda tensor: (tensor[:rows],), lambda tensors: tensors[0])


@dataclass(frozen=True)
class Heads:
    """The heads of an attention: Megatron-Core's rows of queries, keys and values stand together by query group: its query
    heads, then its key head, then its value head."""

    groups: int
    a_group: int  # query heads
    size: int

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[groups * (a_group + 2) * size, ...] -> queries, keys, values, each with its heads one after the other."""
        rest = joined.shape[1:]
        groups = joined.reshape(self.groups, self.a_group + 2, self.size, *rest)
        queries, keys, values = groups[:, : self.a_group], groups[:, self.a_group], groups[:, self.a_group + 1]
        return queries.reshape(-1, *rest), keys.reshape(-1, *rest), values.reshape(-1, *rest)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        queries, keys, values = tensors
        rest = queries.shape[1:]
        parts = [
            queries.reshape(self.groups, self.a_group, self.size, *rest),
            keys.reshape(self.groups, 1, self.size, *rest),
            values.reshape(self.groups, 1, self.size, *rest),
        ]
        return torch.cat(parts, 1).reshape(-1, *rest)

    def apart(self, ours: str, queries: str, keys: str, values: str) -> Rule:
        return Rule(ours, (queries, keys, values), self.split, self.join)

    def one_conv(self, ours: str, theirs: str) -> Rule:
        """GPT-2's c_attn: queries, keys and values side by side in one Conv1D."""
        return Rule(
            ours,
            (theirs,),
            lambda tensor: (torch.cat(self.split(tensor)).t(),),
            lambda tensors: self.join(tensors[0].t().chunk(3)),
        )
