"""What happens in a process, operation by operation: bytes alive, FLOPs, collectives, and in which module and pass.

A dispatch mode that stands above torch's FakeTensorMode. It never lets a collective reach its group: it notes it and answers.
Tensors that hold values (a program's own small tables, made on the host) keep them; of those that hold none, a number that is
asked for is made up.
"""

import contextlib
import sys
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, ProcessGroup, Work
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainwright.runtime.shadow.formulas import FORMULAS

CUDA_BLOCK = 512  # bytes: CUDA's caching allocator rounds up to it (kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp)
# Collectives whose second argument, not the first, is what a rank gives.
_GIVES_SECOND = (
    *("_allgather_base_", "allgather_into_tensor_coalesced_", "allgather_", "_reduce_scatter_base_"),
    *("reduce_scatter_tensor_coalesced_", "reduce_scatter_", "alltoall_base_", "alltoall_"),
)
_PRIM = "prim"
_Name = TypeVar("_Name")


@dataclass
class Block:
    """A storage: what is allocated and freed."""

    bytes: int
    tensor_bytes: int  # without what CUDA's allocator adds
    born: int  # place in the log
    operation: str
    shape: tuple[int, ...]
    dtype: str
    module: str
    phase: str
    stand_in: bool
    kept_for_backward: bool  # made in a forward pass, or by recomputing one
    died: int = -1  # place in the log; -1: alive
    kind: str = ""  # of what outlives steps


@dataclass(frozen=True)
class Event:
    """An operation or a message, in the order of a history."""

    place: int  # in the log of blocks, before it
    name: str
    module: str
    phase: str
    group: str = ""  # of a message: Megatron-Core's name of it
    ranks: int = 0
    bytes: int = 0  # of a message: what this rank gives


@dataclass(frozen=True)
class Counts:
    """What has been counted up to a moment. `flops` and `collectives` are by (module) and by (operation, group, ranks)."""

    flops: Counter[str] = field(default_factory=Counter)
    messages: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    message_bytes: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def copy(self) -> "Counts":
        return Counts(Counter(self.flops), Counter(self.messages), Counter(self.message_bytes))

    def plus(self, times: int, later: "Counts", earlier: "Counts") -> "Counts":
        """These, and `times` what was counted between two moments."""
        return Counts(
            _plus(self.flops, times, later.flops, earlier.flops),
            _plus(self.messages, times, later.messages, earlier.messages),
            _plus(self.message_bytes, times, later.message_bytes, earlier.message_bytes),
        )


def _plus(total: Counter[_Name], times: int, later: Counter[_Name], earlier: Counter[_Name]) -> Counter[_Name]:
    return Counter({name: total[name] + times * (later[name] - earlier[name]) for name in later | total})


class Recorder(TorchDispatchMode):
    """`live` and `peak` in bytes; `log` holds the number of each block as it is allocated, and its complement as it is freed."""

    def __init__(self, *, cuda: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cuda = cuda
        self.live = self.peak = 0
        self.peak_at = 0  # place in the log
        self.beside_peak = 0  # bytes of the peak that are of no block, see raise_peak
        self.blocks: list[Block] = []
        self.log: list[int] = []
        self.counts = Counts()
        self.phase = "start"
        self.phases: list[tuple[int, str]] = []  # (place in the log, name)
        self.history: list[Event] | None = None  # of what happens, if anybody wants to know; else None
        self.stand_ins: set[str] = set()
        self.stand_in_flops = self.stand_in_messages = False
        self.modules = Modules()
        self.formulas = dict(FORMULAS)
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._groups: dict[str, tuple[str, int]] = {}
        self._held_back: list[tuple[Any, str, tuple[int, ...], str]] | None = None

    def enter_phase(self, name: str) -> None:
        """From now on, what happens is part of `name`."""
        self.phase = name
        self.phases.append((len(self.log), name))

    def forget_peak(self) -> None:
        """Look for a new peak, count anew, and begin a new history."""
        self.peak, self.peak_at, self.beside_peak = self.live, len(self.log), 0
        self.counts = Counts()
        self.history = None if self.history is None else []

    def raise_peak(self, *, after: int, by: int) -> None:
        """The peak, if whatever is alive after a place in the log had `by` more bytes beside it. They are part of no block."""
        if not by:
            return
        alive = self.live
        most, place = 0, 0
        for number in range(len(self.log) - 1, after - 1, -1):  # backwards: what is alive now is known
            if alive > most:
                most, place = alive, number + 1
            entry = self.log[number]
            alive -= self.blocks[entry].bytes if entry >= 0 else -self.blocks[~entry].bytes
        if most + by > self.peak:
            self.peak, self.peak_at, self.beside_peak = most + by, place, by

    def number_of(self, tensor: Tensor) -> int | None:
        """Of the block that a tensor lies in; None for one that holds values."""
        return self._numbers.get(tensor.untyped_storage())

    @contextlib.contextmanager
    def fused(self) -> Iterator[None]:
        """One kernel: of what is made inside only that is allocated which outlives it."""
        if self._held_back is not None:
            yield
            return
        self._held_back = []
        try:
            yield
        finally:
            held, self._held_back = self._held_back, None
            for reference, operation, shape, dtype in held:
                storage = reference()
                if storage is not None:
                    self._allocate(storage, operation, shape, dtype)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace = func.namespace
        if namespace == _PRIM:  # which device a tensor is on: asked all the time
            return func(*args, **kwargs)
        if namespace == "c10d":
            return self._answer_collective(func, args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _made_up(tensors[0])
        if self.history is not None:
            self._tell(str(func._overloadpacket).removeprefix("aten."))
        out = self.compute(func, args, kwargs)
        formula = self.formulas.get(func._overloadpacket)
        module = None
        if formula is not None:
            module = self.modules.current()
            self.counts.flops[module] += formula(args, kwargs, out)
            self.stand_in_flops |= self.modules.is_stand_in(module)
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor):
                self._note(leaf, func)
            elif isinstance(leaf, tuple | list):
                for part in leaf:
                    if isinstance(part, Tensor):
                        self._note(part, func)
        return out

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation on tensors without values gives. Raises NotShadowed for one that needs values."""
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor, func: Any) -> None:
        if not isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        if storage in self._numbers:
            return
        described = (str(func._overloadpacket).removeprefix("aten."), tuple(tensor.shape), str(tensor.dtype))
        if self._held_back is not None:
            self._numbers[storage] = -1
            self._held_back.append((weakref.ref(storage), *described))
            return
        self._allocate(storage, *described)

    def _allocate(self, storage: Any, operation: str, shape: tuple[int, ...], dtype: str) -> None:
        tensor_bytes = size = storage.nbytes()
        if self.cuda:
            size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
        number, module = len(self.blocks), self.modules.current()
        self._numbers[storage] = number
        self.blocks.append(
            Block(
                bytes=size,
                tensor_bytes=tensor_bytes,
                born=len(self.log),
                operation=operation,
                shape=shape,
                dtype=dtype.removeprefix("torch."),
                module=module,
                phase=self.phase,
                stand_in=self.modules.is_stand_in(module),
                kept_for_backward=torch.is_grad_enabled(),
            )
        )
        self.log.append(number)
        self.live += size
        if self.live > self.peak:
            self.peak, self.peak_at = self.live, len(self.log)
        weakref.finalize(storage, self._free, number)

    def _free(self, number: int) -> None:
        block = self.blocks[number]
        block.died = len(self.log)
        self.log.append(~number)
        self.live -= block.bytes

    def _answer_collective(self, func: Any, args: tuple[Any, ...]) -> Any:
        name = func._schema.name.split("::")[1]
        group, ranks = self._group_of(args)
        if ranks > 1 and name not in ("barrier", "monitored_barrier_"):
            given = args[1] if name in _GIVES_SECOND else args[0]
            size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
            key = (name, group, ranks)
            self.counts.messages[key] += 1
            self.counts.message_bytes[key] += size
            if self.history is not None:
                self._tell(name, group, ranks, size)
            self.stand_in_messages |= self.modules.is_stand_in(self.modules.current())
        work = FakeWork()
        boxed = work.boxed() if hasattr(work, "boxed") else Work.boxed(work)
        return boxed if len(func._schema.returns) == 1 else (args[0], boxed)

    def _tell(self, name: str, group: str = "", ranks: int = 0, size: int = 0) -> None:
        assert self.history is not None
        module = self.modules.current()
        self.history.append(Event(len(self.log), name, module, self.phase, group, ranks, size))

    def _group_of(self, args: tuple[Any, ...]) -> tuple[str, int]:
        for argument in args:
            if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
                group = ProcessGroup.unbox(argument)
                if group.group_name not in self._groups:
                    self._groups[group.group_name] = (group.group_desc or group.group_name, group.size())
                return self._groups[group.group_name]
        return "", 1


class Modules:
    """Which module an operation is part of. In a backward pass: the one whose forward pass made the node of the graph."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}  # by id of a module
        self._stack: list[str] = []
        self._numbers: list[int] = [0]  # autograd's count of nodes, when the module in force changed
        self._in_force: list[str] = [""]
        self._stand_ins: dict[str, str] = {}  # name of a module: its class

    def name(self, module: torch.nn.Module, prefix: str, stand_in: Callable[[torch.nn.Module], bool]) -> None:
        """Call the parts of a model by their names."""
        for name, part in module.named_modules(prefix=prefix):
            self._names[id(part)] = name
            if stand_in(part):
                self._stand_ins[name] = type(part).__name__

    def current(self) -> str:
        """Name of the innermost module at work; "" outside of all."""
        if self._stack:
            return self._stack[-1]
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return ""
        return self._in_force[max(0, bisect_right(self._numbers, node._sequence_nr()) - 1)]

    def is_stand_in(self, name: str) -> bool:
        return name in self._stand_ins

    def stand_in_classes(self) -> set[str]:
        return set(self._stand_ins.values())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While it lasts, modules are followed as they are entered and left."""
        hooks = torch.nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: torch.nn.Module, arguments: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        self._stack.append(name)
        self._change(name)

    def _leave(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is None or not self._stack or self._stack[-1] != name:
            return
        self._stack.pop()
        self._change(self._stack[-1] if self._stack else "")

    def _change(self, name: str) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._in_force.append(name)


def _made_up(tensor: Tensor) -> float | int | bool:
    """A number that is asked of a tensor without values, by who asks: nothing is infinite or no number, what else is 1."""
    if tensor.dtype is torch.bool:
        return False
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/megatron/" in file or "/torch/optim/" in file:
            if "check_for_nan" in frame.f_code.co_name or "found_inf" in frame.f_code.co_name:
                return 0.0
            break
        frame = frame.f_back  # type: ignore[assignment]
    return 1.0 if tensor.is_floating_point() else 1
