"""The one place where CPU and CUDA differ: devices, backends, and the literals of a program that a CPU cannot honour.

On CUDA nothing is changed. Without CUDA, Megatron-Core asks for CUDA devices, streams and tensor types all the same;
`install()` answers these questions with CPU ones, so that no file of Megatron-Core is changed.

A dry run (`pretend`) stands for either: nothing is overridden that the platform for which it stands would not override, while
its tensors, which hold no values, are a CPU's.
"""

import copy
import dataclasses
import logging
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.activations import fast_gelu
from torch.overrides import TorchFunctionMode

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.mends import mend

CPU_FUSIONS_OFF = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "apply_rope_fusion",
    "moe_grouped_gemm",  # experts one after the other
    "moe_permute_fusion",
    "moe_router_fusion",
)


@dataclass(frozen=True)
class Literals:
    """What a program states and a platform may have to change. The configs are Megatron-Core's own."""

    model: Any  # TransformerConfig
    ddp: Any  # DistributedDataParallelConfig; None where nothing is trained
    optimizer: Any  # OptimizerConfig; None where nothing is trained
    layer_spec: str  # "local" | "transformer_engine"


@dataclass(frozen=True)
class Override:
    """One literal that this platform runs with another value."""

    name: str
    written: object
    used: object

    def __str__(self) -> str:
        return f"{self.name}={self.written!r} -> {self.used!r}"


@dataclass(frozen=True)
class Platform:
    """Where tensors live, and which torch.distributed backend joins the processes."""

    name: str  # "cpu" | "cuda"
    backend: str  # "gloo" | "nccl" | "fake" (a dry run's)
    device: torch.device

    def memory_bytes(self) -> int:
        """The most memory that this process has held so far: of its device (CUDA's allocator), or resident (CPU)."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB

    def adapt(self, written: Literals) -> tuple[Literals, tuple[Override, ...]]:
        """Copies of the program's literals as this platform runs them, and the list of those that it overrides.

        The copies are the runtime's own: Megatron-Core's schedules read callbacks from the model's config.
        Raises Unsupported where the program asks for Transformer Engine on CUDA and it is not installed.
        """
        used = dataclasses.replace(
            written,
            model=copy.copy(written.model),
            ddp=copy.copy(written.ddp),
            optimizer=copy.copy(written.optimizer),
        )
        if written.ddp is not None and written.ddp.use_megatron_fsdp:
            raise Unsupported(
                "the program says use_megatron_fsdp=True, and this runtime has not been shown to train as one process with it: "
                "write use_megatron_fsdp=False, or leave layout.fsdp out of the spec, for the distributed optimizer"
            )
        if self.name == "cuda":
            if written.model.fp8 and written.layer_spec == "local":
                raise Unsupported(
                    f"the program says fp8={written.model.fp8!r}, and 8-bit products are Transformer Engine's: write "
                    "layer_spec='transformer_engine', or fp8=None"
                )
            if written.layer_spec == "transformer_engine" and find_spec("transformer_engine") is None:
                raise Unsupported(
                    "the program says layer_spec='transformer_engine', but Transformer Engine is not installed: "
                    "pip install 'transformer-engine[pytorch]', or pin layout.layer_spec: local in the spec"
                )
            if written.model.apply_rope_fusion and find_spec("transformer_engine") is None:
                raise Unsupported(
                    "the program says apply_rope_fusion=True, whose kernel is Transformer Engine's, and that is not installed: "
                    "write apply_rope_fusion=False"
                )
            if written.model.moe_grouped_gemm and written.layer_spec == "local":
                raise Unsupported(
                    "the program says moe_grouped_gemm=True, whose kernels are Transformer Engine's: write "
                    "layer_spec='transformer_engine', or moe_grouped_gemm=False"
                )
            fused = _recomputed_by_transformer_engine(written.model)
            if fused and find_spec("transformer_engine") is None:
                raise Unsupported(
                    f"the program says recompute_modules={written.model.recompute_modules}, and Megatron-Core recomputes "
                    f"{' and '.join(fused)} through Transformer Engine, which is not installed: leave them out"
                )
            return used, ()
        overrides = []
        if written.model.fp8:
            overrides.append(Override("model.fp8", written.model.fp8, None))
            used.model.fp8 = None
        if written.layer_spec != "local":
            overrides.append(Override("layer_spec", written.layer_spec, "local"))
            used = dataclasses.replace(used, layer_spec="local")
        gelu = torch.nn.functional.gelu
        if used.model.bias_activation_fusion and used.model.activation_func is gelu:
            # The fused kernel computes the tanh approximation, whatever the config says.
            overrides.append(Override("model.activation_func", gelu.__name__, fast_gelu.__name__))
            used.model.activation_func = fast_gelu
        for name in CPU_FUSIONS_OFF:
            if getattr(used.model, name):
                overrides.append(Override(f"model.{name}", True, False))
                setattr(used.model, name, False)
        model = used.model
        if model.overlap_p2p_comm and model.deallocate_pipeline_outputs:
            # gloo sends in the background from memory that Megatron-Core has freed by then
            overrides.append(Override("model.deallocate_pipeline_outputs", True, False))
            model.deallocate_pipeline_outputs = False
        fused = _recomputed_by_transformer_engine(model)
        if fused:  # what is recomputed is the same: only memory differs
            kept = [name for name in model.recompute_modules if name not in fused]
            overrides.append(Override("model.recompute_modules", model.recompute_modules, kept))
            model.recompute_modules = kept
        return used, tuple(overrides)

    def describe(self, overrides: Iterable[Override]) -> str:
        """The first line of a stage's log."""
        listed = ", ".join(str(override) for override in overrides)
        return f"platform {self.name}: " + (f"overrides {listed}" if listed else "no literal overridden")


def _recomputed_by_transformer_engine(model: Any) -> list[str]:
    """Those of the modules to recompute that Megatron-Core 0.16.1 drops and recomputes by Transformer Engine's means alone."""
    if model.recompute_granularity != "selective":
        return []
    return [name for name in model.recompute_modules if name in ("layernorm", "mla_up_proj", "moe_act")]


def current(local_rank: int = 0) -> Platform:
    """CUDA where a CUDA device is there, else CPU. `local_rank` numbers the process on its node."""
    if _pretended:
        return Platform(_pretended, "fake", _CPU)
    if torch.cuda.is_available():
        return Platform("cuda", "nccl", torch.device("cuda", local_rank))
    return Platform("cpu", "gloo", _CPU)


def pretend(name: str) -> None:
    """Make this process a dry run for the platform `name`, "cuda" or "cpu". Call it before `install`."""
    global _pretended
    _pretended = name


def install() -> None:
    """Make Megatron-Core run in this process; idempotent; where CUDA is there, it only lets configs be built.

    Call it before the program builds its configs: `TransformerConfig(apply_rope_fusion=True)` refuses to be built
    where Transformer Engine is absent, though a CPU will switch the fusion off, and CUDA refuses it in one message.
    """
    global _installed
    # Megatron-Core 0.16.1 calls some collectives by names that newer torch deprecates.
    for message in (
        r"`torch\.distributed\.\w+` is deprecated",
        "`load_state_dict` is deprecated",
        "Please use DTensor",
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # Its distributed optimizer clears the gradients of views of parameters, which have none.
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning
    )
    _let_rope_fusion_be_written()
    mend(cuda=current().name == "cuda")
    if _installed or (torch.cuda.is_available() and not _pretended):
        return
    _installed = True
    # Megatron-Core hands some functions, activations among them, to torch.compile, which is for CUDA's sake.
    torch.compiler.set_stance("force_eager")
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    _answer_cuda_questions()
    mode: AbstractContextManager[object] = _CpuForCuda()
    mode.__enter__()  # for the rest of the process


_installed = False
_pretended = ""
_CPU = torch.device("cpu")


class _CpuForCuda(TorchFunctionMode):
    """Rewrites what Megatron-Core says to torch about CUDA: device="cuda", Tensor.cuda(), pinned memory, Tensor.type()."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron-Core's optimizers compare with "torch.cuda.FloatTensor"
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if not kwargs:
            return func(*args)
        changed = dict(kwargs)
        if changed.get("pin_memory"):
            changed["pin_memory"] = False
        device = changed.get("device")
        if device is not None and torch.device(device).type == "cuda":
            changed["device"] = _CPU
        return func(*args, **changed)


class _Stream:
    """Stands for a CUDA stream or event: work on a CPU is done when its call returns, so nothing is to be awaited.

    A class, as torch's own are: transformers has it in annotations (`torch.cuda.Stream | None`).
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "_Stream"]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exception: object) -> None:
        return None


def _answer_cuda_questions() -> None:
    from megatron.core.tensor_parallel import random

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    def stream(*args: object, **kwargs: object) -> _Stream:
        return _Stream()

    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(state)

    answers: dict[str, Callable[..., object]] = {
        "current_device": lambda: _CPU,
        "manual_seed": torch.manual_seed,
        "get_rng_state": get_state,
        "set_rng_state": set_state,
    }
    answers |= dict.fromkeys(("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"), nothing)
    answers |= dict.fromkeys(("current_stream", "default_stream", "stream"), stream)
    answers |= dict.fromkeys(("Stream", "Event"), _Stream)
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    # Here the two generators that it tells apart are one.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _let_rope_fusion_be_written() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    def no_fused_rope(*args: object, **kwargs: object) -> None:
        raise Unsupported("apply_rope_fusion needs Transformer Engine")

    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = no_fused_rope  # never called: adapt() switches it off, or refuses it
