"""The optimizers of a program: Megatron-Core's own AdamW, and Lion, which Megatron-Core 0.16.1 does not know.

A program says `OptimizerConfig(optimizer="lion", adam_beta1=.., adam_beta2=..)`. Megatron-Core builds what is around an update
(groups, shards of the distributed optimizer, fp32 copies of bf16 weights, clipping) with Adam in the middle, which has no state
yet, and Lion takes its place.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import get_megatron_optimizer

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.lion import Lion

OPTIMIZERS = ("adam", "lion")


def check_optimizer(config: Any) -> None:
    """Raise Unsupported for an optimizer that the runtime does not know. `config` is Megatron-Core's OptimizerConfig."""
    if config.optimizer not in OPTIMIZERS:
        known = " or ".join(map(repr, OPTIMIZERS))
        raise Unsupported(f"optimizer={config.optimizer!r} is unknown to this runtime: write {known}")
    if config.optimizer == "lion" and config.optimizer_cpu_offload:
        raise Unsupported("optimizer_cpu_offload=True is for Adam, and the optimizer is 'lion': write False")


def build_optimizer(config: Any, chunks: Sequence[Any], overrides: Mapping[Any, Any]) -> Any:
    """Megatron-Core's optimizer over DDP-wrapped model chunks. `config` is its OptimizerConfig, `overrides` its
    `config_overrides`. Raises Unsupported as `check_optimizer`."""
    check_optimizer(config)
    if config.optimizer == "adam":
        return get_megatron_optimizer(config, list(chunks), dict(overrides))
    around = copy.copy(config)
    around.optimizer = "adam"
    optimizer = get_megatron_optimizer(around, list(chunks), dict(overrides))
    for part in parts_of(optimizer):
        _put_lion(part, config)
    return optimizer


def parts_of(optimizer: Any) -> Iterator[Any]:
    """Megatron-Core keeps an optimizer each for dense parameters and for those of experts. Those without parameters on this
    rank are left out."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None:
            yield part


def _put_lion(part: Any, config: Any) -> None:
    adam = part.optimizer
    lion = Lion(
        [torch.nn.Parameter(torch.zeros(1))], config.lr, (config.adam_beta1, config.adam_beta2), config.weight_decay
    )
    # Set, not given: in fp32 the distributed optimizer's shards are views, which a constructor refuses.
    lion.param_groups = [
        {**lion.defaults, **{name: value for name, value in group.items() if name not in adam.defaults}}
        for group in adam.param_groups
    ]
    part.optimizer = lion
    part.init_state_fn = lambda optimizer, config=None: optimizer.fill_empty_state()
    if hasattr(part, "get_parameter_state_dp_zero"):
        part.get_parameter_state_dp_zero = partial(_gather_state, part.get_parameter_state_dp_zero)
        part._get_main_param_and_optimizer_states = partial(_with_second, part._get_main_param_and_optimizer_states)


def _with_second(read: Callable[[Any], dict[str, Any]], parameter: Any) -> dict[str, Any]:
    """DistributedOptimizer gathers two moments by name, whatever the optimizer has: the second is a stand-in."""
    tensors = read(parameter)
    return {**tensors, "exp_avg_sq": tensors["exp_avg"]}


def _gather_state(gather: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """DistributedOptimizer's method of that name, less the stand-in: a checkpoint holds one moment."""
    state = gather(*arguments, **settings)
    for buffer in (state or {}).values():
        for tensors in buffer.values() if isinstance(buffer, dict) else ():
            tensors.pop("exp_avg_sq", None)
    return state
