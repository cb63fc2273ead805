"""Where a plan runs, and what that costs and draws."""

import math

from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.plan import Cluster, CostLine, round_leaf
from trainwright.compiler.resolve import ResolvedSpec

PUE, CARBON_KG_PER_KWH = 1.1, 0.385
_LLAMA = "LLaMA (arXiv 2302.13971), section 6"


def choose_cluster(spec: ResolvedSpec, ledger: Ledger) -> Cluster:
    """Where the plan runs, and what that costs and draws."""
    note, compute, power = ledger.note, spec.compute, spec.power
    device, price = compute.device, compute.price_usd_per_device_hour
    lines = []
    for index, line in enumerate(spec.costs):
        path = f"cluster.costs[{index}]"
        for leaf, key in (("name", "name"), ("amount_usd", "amount"), ("per", "per")):
            note(f"{path}.{leaf}", None, "default", "paid once", pin=f"{path}.{key}")
        lines.append(CostLine(line.name, round_leaf(line.amount_usd), line.per))
    if not lines:
        note("cluster.costs", None, "derived", "the spec has no cost lines")
    return Cluster(
        device=note("cluster.device", device.name, "pinned", "compute.device", pin="compute.device"),
        nodes=note("cluster.nodes", compute.nodes, "pinned", "compute.nodes", pin="compute.nodes"),
        devices_per_node=note(
            "cluster.devices_per_node", compute.devices_per_node, "pinned", "", pin="compute.devices_per_node"
        ),
        price_usd_per_device_hour=note(
            "cluster.price_usd_per_device_hour", price, "default", "no price is stated: no cost", pin="cluster.price"
        ),
        power_w=note(
            "cluster.power_w",
            _stated(power.device_w, device.power_w),
            "fact",
            device.sources["power_w"],
            pin="cluster.power.device",
        ),
        pue=note(
            "cluster.pue", _stated(power.pue, PUE), "default", f"assumed, as in {_LLAMA}", pin="cluster.power.pue"
        ),
        carbon_kg_per_kwh=note(
            "cluster.carbon_kg_per_kwh",
            _stated(power.carbon_kg_per_kwh, CARBON_KG_PER_KWH),
            "default",
            f"assumed: the average of the USA, as in {_LLAMA}",
            pin="cluster.power.carbon",
        ),
        costs=tuple(lines),
    )


def _stated(value: float, default: float) -> float:
    return value if value < math.inf else default
