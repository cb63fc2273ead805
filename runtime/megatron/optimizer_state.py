"""Loading the state of torch's Adam, which Megatron-Core 0.16.1 uses where neither Transformer Engine nor Apex is installed,
and of Lion.

They keep a `step` tensor beside each parameter's moments; the fused Adams that Megatron-Core's loader is written for keep one
number a group. Three places need help; with a fused Adam none of this does anything.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from trainwright.runtime.megatron.lion import Lion
from trainwright.runtime.megatron.optimizers import parts_of


def fill_empty_state(optimizer: Any) -> None:
    """Give every parameter a state of zeros where it has none: the loader takes the number of steps from it.

    `optimizer` is Megatron-Core's (chained) optimizer, before its first step.
    """
    for part in _steps_by_parameter(optimizer):
        if isinstance(part.optimizer, Lion):
            part.optimizer.fill_empty_state()
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def load_optimizer(optimizer: Any, state: Any) -> None:
    """`optimizer.load_state_dict(state)`, after which every parameter counts its own steps."""
    for part in _steps_by_parameter(optimizer):
        if hasattr(part, "_set_main_param_and_optimizer_states"):
            part._set_main_param_and_optimizer_states = MethodType(_set_main_param, part)
    optimizer.load_state_dict(state)
    for part in _steps_by_parameter(optimizer):
        for parameter_state in part.optimizer.state.values():
            # The loader hands one tensor to all parameters, and each of them would add 1 to it in every step.
            parameter_state["step"] = parameter_state["step"].clone()


def _steps_by_parameter(optimizer: Any) -> Iterator[Any]:
    for part in parts_of(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW | Lion):
            yield part


@torch.no_grad()
def _set_main_param(part: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
    """In place of DistributedOptimizer's method of that name, which looks for `step` among the sharded tensors: the
    loader has left it out, because it stands in the group."""
    group, position = part.model_param_group_index_map[model_param]
    main_param = part.optimizer.param_groups[group]["params"][position]
    for name, target in {"param": main_param, **part.optimizer.state[main_param]}.items():
        if name != "step":
            target.copy_(tensors[name])
