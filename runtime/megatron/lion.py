"""Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2): the sign of an average of gradients, with one moment a parameter."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """In each step, with the gradient g, the moment m and the learning rate lr:

        p = p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

    The state has the names of torch's Adam, `exp_avg` and `step`, because Megatron-Core's checkpoints look for them; a group
    keeps the number of steps too, as Transformer Engine's Adam does.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Raises ValueError for a coefficient that cannot be."""
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: lr={lr} and weight_decay={weight_decay} are at least 0, betas={betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def fill_empty_state(self) -> None:
        """Give every parameter a state of zeros where it has none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
        return state

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        state = self._state_of(parameter)
        state["step"].fill_(group["step"])
        moment = state["exp_avg"]
        direction = moment.lerp(gradient, 1 - beta1).sign_()
        parameter.mul_(1 - rate * group["weight_decay"]).sub_(direction, alpha=rate)
        moment.lerp_(gradient, 1 - beta2)
