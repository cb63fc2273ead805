"""Stand-ins: what a dry run puts in place of what is not there. All of them are in this file.

*Transformer Engine.* The classes and functions that Megatron-Core 0.16.1 subclasses or calls, with the parameters, products and
messages of the real ones, and with the tensors that those keep for their backward pass in bf16, as I read them in Transformer
Engine 2.6 (each class names the file); none was measured against it. They compute no values: they are never to be seen by a run.

*Balanced routing.* How many tokens go to which expert depends on values. Here every expert gets as many (`balance_routing`).
"""

import contextlib
import importlib.machinery
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.runtime.shadow.formulas import FORMULAS, attention_flops

# Megatron-Core asks for a router's kernels from 2.7 on.
VERSION = "2.6.0"
_LIBRARY: Any = torch.library.Library("trainwright_shadow", "DEF")  # type: ignore[no-untyped-call]
_OPERATIONS = torch.ops.trainwright_shadow


def is_stand_in(module: torch.nn.Module) -> bool:
    """Whether a part of a model is, or derives from, a class of this file."""
    return any(base.__module__ == __name__ for base in type(module).__mro__)


# ---- products -------------------------------------------------------------------------------------------------------------


def _gather(x: Tensor, group: Any) -> Tensor:
    whole = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _reduce_scatter(x: Tensor, group: Any) -> Tensor:
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


class _Product(torch.autograd.Function):
    """x [.., in] times weight [out, in], over tensor ranks (pytorch/module/linear.py, _Linear): a column-parallel one gathers x
    before the product, and again for the gradient of the weight; a row-parallel one reduces after it. Keeps x and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: "Linear") -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.has_bias = layer, bias is not None
        read = _gather(x, layer.tp_group) if layer.gathers else x
        rows = read.reshape(-1, read.shape[-1])
        flat = torch.addmm(bias, rows, weight.t()) if bias is not None else rows.mm(weight.t())
        y = flat.view(*read.shape[:-1], weight.shape[0])
        if layer.reduces:
            if layer.sequence_parallel:
                return _reduce_scatter(y, layer.tp_group)
            dist.all_reduce(y, group=layer.tp_group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), layer, gradient = ctx.saved_tensors, ctx.layer, gradients[0]
        if layer.reduces and layer.sequence_parallel:
            gradient = _gather(gradient, layer.tp_group)
        read = _gather(x, layer.tp_group) if layer.gathers else x
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = rows.mm(weight).view(*read.shape)
            if layer.gathers:
                of_x = _reduce_scatter(of_x, layer.tp_group)
            elif layer.column and layer.parallel:
                dist.all_reduce(of_x, group=layer.tp_group)
        of_weight = rows.t().mm(read.reshape(-1, read.shape[-1])) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.has_bias else None
        return of_x, of_weight, of_bias, None


class _Base(torch.nn.Module):
    """pytorch/module/base.py, TransformerEngineBaseModule."""

    def set_tensor_parallel_group(self, group: Any) -> None:
        self.tp_group = group

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def backward_dw(self) -> None:
        pass

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        pass


class Linear(_Base):
    """pytorch/module/linear.py."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **ignored: object,
    ) -> None:
        super().__init__()
        self.column = parallel_mode == "column"
        row = parallel_mode == "row"
        self.in_features, self.out_features = (
            in_features // (tp_size if row else 1),
            out_features // (tp_size if self.column else 1),
        )
        self.use_bias, self.return_bias, self.parallel_mode = bias, return_bias, parallel_mode
        self.tp_group, self.tp_size, self.parallel = tp_group, tp_size, tp_size > 1 and parallel_mode is not None
        self.sequence_parallel = sequence_parallel and self.parallel
        self.gathers, self.reduces = self.column and self.sequence_parallel, row and self.parallel
        self.weight = _parameter((self.out_features, self.in_features), params_dtype, device)
        self._mark(self.weight, split=parallel_mode is not None, dim=1 if row else 0)
        if bias:
            self.bias = _parameter((self.out_features,), params_dtype, device)
            self._mark(self.bias, split=self.column, dim=0)
            if row:
                self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def _mark(self, parameter: Any, *, split: bool, dim: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_stride = split, 1
        parameter.partition_dim = dim if split else -1

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None, **ignored: object) -> Any:
        """x [s, b, in] -> [s, b, out] (with the bias beside it where that is asked for)."""
        bias = self.bias if self.use_bias and not self.return_bias else None
        y = _Product.apply(x, self.weight, bias, self)  # type: ignore[no-untyped-call]
        return (y, self.bias) if self.return_bias else y


class _Normalise(torch.autograd.Function):
    """pytorch/module/rmsnorm.py, layernorm.py: keeps x and its rows' scale (LayerNorm: and mean) in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        statistics = [
            torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(1 if bias is None else 2)
        ]
        ctx.save_for_backward(x, weight, *statistics)
        ctx.has_bias = bias is not None
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *_ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight) if ctx.has_bias else None


class RMSNorm(_Base):
    """pytorch/module/rmsnorm.py."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **ignored: object,
    ) -> None:
        super().__init__()
        self.weight = _parameter((hidden_size,), params_dtype, device)
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.bias: torch.nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[.., hidden] -> [.., hidden]."""
        return _Normalise.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class LayerNorm(RMSNorm):
    """pytorch/module/layernorm.py."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, sequence_parallel: bool = False, **settings: Any) -> None:
        super().__init__(hidden_size, eps, sequence_parallel, **settings)
        self.bias = _parameter((hidden_size,), self.weight.dtype, self.weight.device)
        self.bias.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


class LayerNormLinear(Linear):
    """pytorch/module/layernorm_linear.py: a norm and a product; both keep what they read (ln_out is kept, not computed again)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **settings: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **settings)
        self.layer_norm_weight = _parameter((in_features,), params_dtype, device)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_bias: torch.nn.Parameter | None = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = _parameter((in_features,), params_dtype, device)
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None, **ignored: object) -> Any:
        """As Linear's."""
        return super().forward(
            _Normalise.apply(x, self.layer_norm_weight, self.layer_norm_bias)  # type: ignore[no-untyped-call]
        )


class GroupedLinear(_Base):
    """pytorch/module/grouped_linear.py: a product an expert; keeps what each reads. Messages are the dispatcher's."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **ignored: object,
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias, self.return_bias, self.parallel_mode = (
            num_gemms,
            bias,
            return_bias,
            parallel_mode,
        )
        if parallel_mode == "column":
            out_features //= tp_size
        if parallel_mode == "row":
            in_features //= tp_size
        for number in range(num_gemms):
            self.register_parameter(f"weight{number}", _parameter((out_features, in_features), params_dtype, device))
            if bias:
                self.register_parameter(f"bias{number}", _parameter((out_features,), params_dtype, device))

    def forward(self, x: Tensor, m_splits: Sequence[int], is_first_microbatch: bool | None = None) -> Any:
        """x [tokens of all experts, in] -> [.., out]. `m_splits`: how many tokens are each expert's."""
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        biases = [getattr(self, f"bias{number}") for number in range(self.num_gemms)] if self.use_bias else []
        added = [] if self.return_bias else biases
        y = _GroupedProduct.apply(x, [int(rows) for rows in m_splits], len(weights), *weights, *added)  # type: ignore[no-untyped-call]
        return (y, biases) if self.return_bias else y


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], experts: int, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parameters[:experts])
        ctx.rows, ctx.has_bias = rows, len(parameters) > experts
        y = x.new_empty(x.shape[0], parameters[0].shape[0])
        for part, into, weight in zip(torch.split(x, rows), torch.split(y, rows), parameters[:experts], strict=True):
            torch.mm(part, weight.t(), out=into)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        parts = torch.split(gradients[0], ctx.rows)
        of_x = torch.empty_like(x)
        for part, into, weight in zip(parts, torch.split(of_x, ctx.rows), weights, strict=True):
            torch.mm(part, weight, out=into)
        of_weights = [part.t().mm(read) for part, read in zip(parts, torch.split(x, ctx.rows), strict=True)]
        of_biases = [part.sum(0) for part in parts] if ctx.has_bias else []
        return of_x, None, None, *of_weights, *of_biases


def _parameter(shape: tuple[int, ...], dtype: torch.dtype | None, device: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))


def _general_gemm(
    weight: Tensor, x: Tensor, out_dtype: torch.dtype | None = None, layout: str = "TN", **settings: Any
) -> tuple[Tensor, ...]:
    """pytorch/cpp_extensions/gemm.py: column-major names, so "TN" is x times the weight transposed, "NN" x times the weight, "NT"
    the transposed x times the other. A kernel reads bf16 and writes `out_dtype`: nothing is converted before it."""
    shapes = {
        "TN": (x.shape[0], weight.shape[0]),
        "NN": (x.shape[0], weight.shape[1]),
        "NT": (x.shape[1], weight.shape[1]),
    }
    if layout not in shapes:
        raise NotImplementedError(f"general_gemm with layout {layout!r}")
    return (_OPERATIONS.product(weight, x, list(shapes[layout]), x.numel() * shapes[layout][1], out_dtype or x.dtype),)


# ---- attention ------------------------------------------------------------------------------------------------------------


class _Attend(torch.autograd.Function):
    """Flash attention (pytorch/attention/dot_product_attention/backends.py): keeps q, k, v, out and the rows' log-sum-exp in
    fp32. Over context ranks (context_parallel.py, AttnFuncWithCPAndKVP2P): keys and values go round the ring, those that came
    last are kept; in the backward pass their gradients go with them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], group: Any) -> Tensor:
        ranks = group.size() if group is not None else 1
        if ranks > 1:
            q, (k, v) = q.contiguous(), _round_the_ring(torch.cat((k.flatten(), v.flatten())), group, k, v)
        out, statistics = _OPERATIONS.attend(q, k, v, lengths, ranks)
        ctx.save_for_backward(q, k, v, out, statistics)
        ctx.lengths, ctx.group, ctx.ranks = lengths, group, ranks
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        q, k, v, out, statistics = ctx.saved_tensors
        if ctx.ranks > 1:
            _round_the_ring(k.new_empty(2 * (k.numel() + v.numel())), ctx.group, k, v)
        of_q, of_k, of_v = _OPERATIONS.attend_backward(gradients[0], q, k, v, out, statistics, ctx.lengths, ctx.ranks)
        return of_q, of_k, of_v, None, None


def _round_the_ring(sent: Tensor, group: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Every context rank's keys and values, one after the other, in buffers that are held until the pass ends."""
    rank, ranks = group.rank(), group.size()
    buffers = [sent]
    after, before = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    for _ in range(ranks - 1):
        buffers.append(torch.empty_like(sent))
        dist.isend(buffers[-2], after, group=group)
        dist.irecv(buffers[-1], before, group=group)
    keys = buffers[-1][: k.numel()].view(k.shape)
    return keys, buffers[-1][k.numel() : k.numel() + v.numel()].view(v.shape)


class DotProductAttention(_Base):
    """pytorch/attention/dot_product_attention/dot_product_attention.py, through a flash kernel, which needs no mask."""

    def __init__(self, num_attention_heads: int, kv_channels: Any, cp_group: Any = None, **ignored: object) -> None:
        super().__init__()
        self.cp_group = cp_group

    def set_context_parallel_group(self, group: Any, *ignored: object) -> None:
        self.cp_group = group

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        **ignored: object,
    ) -> Tensor:
        """query [s, b, heads, d], packed [tokens, heads, d] -> [s, b, heads * d], packed [tokens, heads * d]."""
        if qkv_format == "thd" and cu_seqlens_q is not None:
            ends = cu_seqlens_q.tolist()
            lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        else:
            ranks = self.cp_group.size() if self.cp_group is not None else 1
            lengths = [query.shape[0] * ranks] * query.shape[1]
        out: Tensor = _Attend.apply(query, key, value, lengths, self.cp_group)  # type: ignore[no-untyped-call]
        return out.flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], ranks: int) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, lengths: list[int], ranks: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _product(weight: Tensor, x: Tensor, shape: list[int], multiply_adds: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(shape, dtype=dtype)


def _define_operations() -> None:
    schemas = {
        "attend(Tensor q, Tensor k, Tensor v, int[] lengths, int ranks) -> (Tensor, Tensor)": _attend,
        "attend_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, int[] lengths, int ranks)"
        " -> (Tensor, Tensor, Tensor)": _attend_backward,
        "product(Tensor weight, Tensor x, int[] shape, int multiply_adds, ScalarType dtype) -> Tensor": _product,
    }
    for schema, function in schemas.items():
        _LIBRARY.define(schema)
        name = schema.partition("(")[0]
        _LIBRARY.impl(name, function, "Meta")

    def core(q: Tensor, v: Tensor, lengths: list[int], ranks: int) -> int:
        heads, width = q.shape[-2:]
        squares = sum(attention_flops(1, heads, length, length, width, v.shape[-1]) for length in lengths)
        return squares // ranks

    FORMULAS[_OPERATIONS.attend] = lambda args, kwargs, out: core(args[0], args[2], args[3], args[4])
    FORMULAS[_OPERATIONS.attend_backward] = lambda args, kwargs, out: 2 * core(args[1], args[3], args[6], args[7])
    FORMULAS[_OPERATIONS.product] = lambda args, kwargs, out: 2 * args[3]


_define_operations()


class _Rotate(torch.autograd.Function):
    """pytorch/attention/rope.py, FusedRoPEFunc: keeps the angles alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(gradients[0], memory_format=torch.contiguous_format), None


def apply_rotary_pos_emb(x: Tensor, angles: Tensor, **ignored: object) -> Tensor:
    """pytorch/attention/rope.py, fused."""
    return _Rotate.apply(x, angles)  # type: ignore[no-any-return, no-untyped-call]


def mask_of_last(cuda: bool) -> Callable[[int, int], Tensor | None]:
    """What stands for torch's causal_lower_right, a kind of tensor that has to hold values: which of `keys` positions each of
    the last `queries` sees. A CPU makes a table of it (torch/nn/attention/bias.py, _materialize), a CUDA kernel knows it."""
    if cuda:
        return lambda queries, keys: None
    return lambda queries, keys: torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


# ---- optimizer ------------------------------------------------------------------------------------------------------------


class FusedAdam(torch.optim.Optimizer):
    """pytorch/optimizers/fused_adam.py: one kernel updates in place; two moments in fp32."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **ignored: object,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                    state[name].mul_(1.0)
                parameter.mul_(1.0)


class FusedSGD(torch.optim.SGD):
    """pytorch/optimizers/fused_sgd.py; named by Megatron-Core, not used by an emitted program."""


def multi_tensor_applier(operation: Any, overflow: Tensor, lists: Any, *settings: Any) -> Any:
    """pytorch/optimizers/multi_tensor_apply.py."""
    return operation(65536, overflow, lists, *settings)


def multi_tensor_l2norm(chunk: int, overflow: Tensor, lists: Any, *ignored: object) -> tuple[Tensor, None]:
    """csrc/multi_tensor/l2norm: one number."""
    return torch.empty(1, dtype=torch.float32, device=lists[0][0].device), None


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: Any, scale: Any, *ignored: object) -> None:
    """csrc/multi_tensor/scale: in place."""
    for tensor in lists[1]:
        tensor.mul_(scale)


# ---- the package ----------------------------------------------------------------------------------------------------------


class _Fp8State:
    is_fp8_enabled = staticmethod(lambda: False)
    is_fp8_calibration = staticmethod(lambda: False)
    reset = staticmethod(lambda: None)


class _Named(torch.nn.Module):
    """Named by Megatron-Core where it builds what no emitted program asks for."""

    def __init__(self, *ignored: object, **also: object) -> None:
        super().__init__()


class _Recipe:
    def __init__(self, **settings: object) -> None:
        self.__dict__.update(settings)


class _RngStates:
    """pytorch/distributed.py, CudaRNGStatesTracker."""


class _Quantised(torch.Tensor):
    """For isinstance() alone: nothing is of 8 bits."""


@contextlib.contextmanager
def _fp8_autocast(enabled: bool = False, **ignored: object) -> Iterator[None]:
    if enabled:
        raise NotImplementedError("fp8")
    yield


@contextlib.contextmanager
def _recompute(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    """pytorch/distributed.py, activation_recompute_forward: tells 8-bit products which pass they are in."""
    yield


def install_transformer_engine() -> None:
    """Put the stand-ins where Megatron-Core looks for the package. Call it before Megatron-Core is imported."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    recipes = (
        "DelayedScaling",
        "Float8CurrentScaling",
        "Float8BlockScaling",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
        "Recipe",
    )
    operations = ("Sequential", "FusibleOperation", "SwiGLU", "GEGLU", "ReGLU", "GELU", "ReLU", "SiLU")
    modules: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        "common": {},
        "common.recipe": {name: type(name, (_Recipe,), {}) for name in recipes}
        | {"Format": types.SimpleNamespace(E4M3="e4m3", HYBRID="hybrid")},
        "pytorch": {
            "Linear": Linear,
            "LayerNormLinear": LayerNormLinear,
            "GroupedLinear": GroupedLinear,
            "DotProductAttention": DotProductAttention,
            "RMSNorm": RMSNorm,
            "LayerNorm": LayerNorm,
            "Fp8Padding": _Named,
            "Fp8Unpadding": _Named,
            "fp8_autocast": _fp8_autocast,
        },
        "pytorch.fp8": {"FP8GlobalStateManager": _Fp8State, "fp8_autocast": _fp8_autocast},
        "pytorch.distributed": {
            "CudaRNGStatesTracker": _RngStates,
            "activation_recompute_forward": _recompute,
        },
        "pytorch.attention": {},
        "pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
        "pytorch.optimizers": {
            "FusedAdam": FusedAdam,
            "FusedSGD": FusedSGD,
            "multi_tensor_applier": multi_tensor_applier,
            "multi_tensor_l2norm": multi_tensor_l2norm,
            "multi_tensor_scale": multi_tensor_scale,
        },
        "pytorch.tensor": {"QuantizedTensor": _Quantised},
        "pytorch.tensor.float8_tensor": {"Float8Tensor": _Quantised},
        "pytorch.float8_tensor": {"Float8Tensor": _Quantised},
        "pytorch.ops": {name: type(name, (_Named,), {}) for name in operations},
        "pytorch.cpp_extensions": {"general_gemm": _general_gemm},
        "pytorch.module": {},
        "pytorch.module.base": {
            "TransformerEngineBaseModule": _Base,
            "get_workspace": lambda: None,
            "get_dummy_wgrad": lambda shape, dtype, zero=False: torch.empty(shape, dtype=dtype, device="cuda"),
        },
    }
    for name, contents in modules.items():
        full = f"transformer_engine.{name}".rstrip(".")
        module = types.ModuleType(full)
        module.__spec__ = importlib.machinery.ModuleSpec(full, loader=None, is_package=True)
        module.__path__ = []
        module.__dict__.update(contents)
        sys.modules[full] = module
        parent, _, leaf = full.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


# ---- balanced routing -----------------------------------------------------------------------------------------------------


def balance_routing() -> None:
    """From here on, Megatron-Core's all-to-all dispatcher sends every expert as many tokens. Its own preparation runs, and its
    messages count; then what depends on values is overwritten by numbers that the host knows."""
    from megatron.core.transformer.moe import token_dispatcher

    kind = token_dispatcher.MoEAlltoAllTokenDispatcher
    prepare = kind.preprocess

    def preprocess(self: Any, routing_map: Tensor) -> Any:
        prepared = prepare(self, routing_map)
        here, ranks = len(self.local_expert_indices), self.tp_size * self.ep_size
        if self.drop_and_pad:
            self.num_global_tokens_per_local_expert = np.full(self.num_experts * self.tp_size, self.capacity)
            _order_chunks(self, here)
            return np.full(prepared.shape[0], self.capacity * ranks)
        rows = routing_map.shape[0] * self.config.moe_router_topk
        # Every device of the group first, then its experts: where rows do not divide by all experts, devices still get as many.
        of_device = _evenly(rows, self.ep_size)
        per_expert = np.concatenate([_evenly(int(share), self.num_experts // self.ep_size) for share in of_device])
        mine = per_expert[self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        if ranks > 1:
            self.input_splits = of_device
            self.output_splits = np.full(self.ep_size, mine.sum())
            self.output_splits_tp = np.full(self.tp_size, mine.sum() * self.ep_size)
        self.num_global_tokens_per_local_expert = np.tile(mine, (ranks, 1))
        self.num_out_tokens = rows
        _order_chunks(self, here)
        return mine * ranks

    kind.preprocess = preprocess
    kind._maybe_dtoh_and_synchronize = lambda self, point, tokens_per_expert=None: tokens_per_expert


def _order_chunks(dispatcher: Any, here: int) -> None:
    chunks = np.arange(dispatcher.num_experts * dispatcher.tp_size)
    dispatcher.sort_input_by_local_experts = chunks.reshape(-1, here).T.ravel()
    dispatcher.restore_output_by_local_experts = chunks.reshape(here, -1).T.ravel()


def _evenly(rows: int, parts: int) -> Any:
    return np.diff(np.arange(parts + 1) * rows // parts)


def select_routed(mask: Tensor, source: Tensor, experts_per_token: int) -> Tensor:
    """aten.masked_select of a routing map [experts, tokens]: `experts_per_token` of every token."""
    return source.new_empty(mask.shape[1] * experts_per_token)
