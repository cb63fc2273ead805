"""Time and money of a whole run from the time of a step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunCost:
    """`cost_usd` is 0.0 where no price is stated."""

    train_s: float
    device_hours: float
    cost_usd: float


def estimate_cost(steps: int, step_s: float, devices: int, price_usd_per_device_hour: float) -> RunCost:
    """Steps only: no start-up, validation, checkpoints, failures or idle devices."""
    train_s = steps * step_s
    device_hours = train_s / 3600 * devices
    return RunCost(train_s, device_hours, device_hours * price_usd_per_device_hour)


def estimate_mfu(model_flops_per_step: float, step_s: float, devices: int, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation: the share of all devices' peak that model FLOPs take (Chowdhery et al. 2022, appendix B)."""
    return model_flops_per_step / (step_s * devices * peak_flops_per_s)
