"""Device-hours, money, energy and CO2 of a time on devices; FLOPs that device-hours buy."""

from dataclasses import dataclass

SECONDS_PER_MONTH = 365.25 * 86400 / 12


@dataclass(frozen=True)
class Rates:
    """What a cluster takes and costs. Energy as in LLaMA (arXiv 2302.13971), section 6: device-hours x power x PUE."""

    price_usd_per_device_hour: float  # 0.0: not stated
    power_w: float  # a device, all the time
    pue: float  # power of the site / power of its computers
    carbon_kg_per_kwh: float  # CO2 equivalent


@dataclass(frozen=True)
class RunCost:
    """`cost_usd` is 0.0 where no price is stated."""

    duration_s: float
    device_hours: float
    cost_usd: float
    energy_kwh: float
    co2_kg: float


def estimate_cost(duration_s: float, devices: int, rates: Rates) -> RunCost:
    """All devices for the whole duration."""
    hours = duration_s / 3600 * devices
    energy = hours * rates.power_w * rates.pue / 1000
    return RunCost(duration_s, hours, hours * rates.price_usd_per_device_hour, energy, energy * rates.carbon_kg_per_kwh)


def estimate_mfu(model_flops_per_step: float, step_s: float, devices: int, peak_flops_per_s: float) -> float:
    """Model FLOPs utilisation: the share of all devices' peak that model FLOPs take (Chowdhery et al. 2022, appendix B)."""
    return model_flops_per_step / (step_s * devices * peak_flops_per_s)


def passes_s(flops: float, devices: int, peak_flops_per_s: float, utilisation: float) -> float:
    """Seconds that model FLOPs take at a utilisation of the peak."""
    return flops / (devices * peak_flops_per_s * utilisation)
