"""Make a collective do nothing (what others sent never arrives, one's own part stays), or a function do another thing."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

FRAMES = 10  # from the collective outwards


@dataclass(frozen=True)
class Mutation:
    """The calls of `operation` in whose call stack each of `callers` occurs, as part of "file.py:Class.function"."""

    name: str
    operation: str  # "all_reduce" | "all_gather" | "reduce_scatter" | "all_to_all" | "broadcast" | "receive"
    callers: tuple[str, ...]  # for "receive": methods of P2PCommunicator
    turn: int | None = None  # of three calls that follow each other: which
    but_not: str = "(none)"  # a caller that must not occur
    group: Callable[[], Any] | None = None  # only over this group of ranks


@dataclass(frozen=True)
class Wrong:
    """A function of a module or class that is another one: `change` of its own result and its arguments."""

    name: str
    owner: Any
    function: str
    change: Callable[..., Any]


class Hits:
    """Counts the calls that matched."""

    def __init__(self, mutation: Mutation | Wrong) -> None:
        self.mutation, self.count, self._seen = mutation, 0, 0

    def match(self, group: Any) -> bool:
        assert isinstance(self.mutation, Mutation)
        if self.mutation.group is not None and self.mutation.group() != group:
            return False
        frame, callers = sys._getframe(2), ""
        for _ in range(FRAMES):
            if frame is None or frame.f_back is None:
                break
            callers += f" {frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_code.co_qualname}"
            frame = frame.f_back
        if not all(caller in callers for caller in self.mutation.callers) or self.mutation.but_not in callers:
            return False
        if self.mutation.turn is not None:
            self._seen += 1
            if (self._seen - 1) % 3 != self.mutation.turn:
                return False
        self.count += 1
        return True


class _Done:
    def wait(self) -> bool:
        return True


def _in_place(real: Callable[..., Any], hits: Hits) -> Callable[..., Any]:
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hits.match(kwargs.get("group")):
            return _Done() if kwargs.get("async_op") else None
        return real(tensor, *args, **kwargs)

    return call


def _all_gather(real: Callable[..., Any], hits: Hits) -> Callable[..., Any]:
    def call(output: Tensor, mine: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hits.match(kwargs.get("group")):
            return real(output, mine, *args, **kwargs)
        if output.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():  # else in place: already there
            group = kwargs["group"]
            output.zero_()
            output.view(group.size(), *mine.shape)[group.rank()].copy_(mine)
        return _Done() if kwargs.get("async_op") else None

    return call


def _reduce_scatter(real: Callable[..., Any], hits: Hits) -> Callable[..., Any]:
    def call(output: Tensor, mine: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hits.match(kwargs.get("group")):
            return real(output, mine, *args, **kwargs)
        group = kwargs["group"]
        if output.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
            output.copy_(mine.contiguous().view(group.size(), *output.shape)[group.rank()])
        return _Done() if kwargs.get("async_op") else None

    return call


def _all_to_all(real: Callable[..., Any], hits: Hits) -> Callable[..., Any]:
    def call(output: Tensor, mine: Tensor, **kwargs: Any) -> Any:
        group = kwargs["group"]
        if not hits.match(group):
            return real(output, mine, **kwargs)
        received = torch.split(output.zero_(), [int(size) for size in kwargs["output_split_sizes"]])
        sent = torch.split(mine, [int(size) for size in kwargs["input_split_sizes"]])
        received[group.rank()].copy_(sent[group.rank()])
        return None

    return call


def _receive(real: Callable[..., Any], hits: Hits) -> Callable[..., Any]:
    def zero(value: Any) -> None:
        if isinstance(value, Tensor):
            hits.count += 1
            with torch.no_grad():
                value.zero_()
        elif isinstance(value, list | tuple):
            for item in value:
                zero(item)

    def call(self: P2PCommunicator, *args: Any, **kwargs: Any) -> Any:
        received = real(self, *args, **kwargs)
        zero(received)
        return received

    return call


def _changed(real: Callable[..., Any], hits: Hits) -> Callable[..., Any]:
    assert isinstance(hits.mutation, Wrong)
    change = hits.mutation.change

    def call(*args: Any, **kwargs: Any) -> Any:
        hits.count += 1
        return change(real(*args, **kwargs), *args, **kwargs)

    return call


@contextlib.contextmanager
def applied(mutation: Mutation | Wrong) -> Iterator[Hits]:
    """The mutation is in force inside; the yielded Hits say how often it struck on this rank."""
    hits = Hits(mutation)
    sites = [(mutation.owner, mutation.function, _changed)] if isinstance(mutation, Wrong) else _sites(mutation)
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in sites]
    for owner, name, replace in sites:
        setattr(owner, name, replace(getattr(owner, name), hits))
    try:
        yield hits
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _sites(mutation: Mutation) -> list[tuple[Any, str, Callable[..., Any]]]:
    modules = (mappings, layers, param_and_grad_buffer)
    return {
        "all_reduce": [(dist, "all_reduce", _in_place)],
        "broadcast": [(dist, "broadcast", _in_place)],
        "all_to_all": [(dist, "all_to_all_single", _all_to_all)],
        "all_gather": [(module, "dist_all_gather_func", _all_gather) for module in modules],
        "reduce_scatter": [(module, "dist_reduce_scatter_func", _reduce_scatter) for module in modules],
        "receive": [(P2PCommunicator, method, _receive) for method in mutation.callers],
    }[mutation.operation]
