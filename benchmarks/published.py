"""What others published, beside what this planner computes: claim, source, published, computed, error.

    python benchmarks/published.py

Claims stand in tests/published/*.yaml, each with its source and the tolerance that tests/test_published.py holds it to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from trainwright.compiler.choose import budget, hyperparameters
from trainwright.compiler.estimate import flops, memory, params, step_time
from trainwright.compiler.estimate.layouts import Layouts, Workload, one_layout
from trainwright.compiler.facts import find_device, find_family, find_hyperparameter_law, find_loss_law, make_shape
from trainwright.compiler.plan import Layout, Shape

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "published"
LOSS, RATES = find_loss_law("chinchilla_refit"), find_hyperparameter_law("step_law")


@dataclass(frozen=True)
class Claim:
    """One published number. `tolerance` is the largest relative error allowed; `computes` names a function of COMPUTE."""

    claim: str
    source: str
    computes: str
    of: Mapping[str, Any]
    published: float
    tolerance: float

    @property
    def computed(self) -> float:
        return COMPUTE[self.computes](self.of)

    @property
    def error(self) -> float:
        return self.computed / self.published - 1


def load_claims() -> list[Claim]:
    """Every claim of the folder, by file and line."""
    yaml = YAML(typ="safe", pure=True)
    return [
        Claim(**raw) for path in sorted(FOLDER.glob("*.yaml")) for raw in yaml.load(path.read_text(encoding="utf-8"))
    ]


def _family_shape(of: Mapping[str, Any]) -> tuple[Shape, int]:
    family = find_family(of["family"])
    return family.published[of["size"]], of.get("context_length", family.rules.context_length)


def _run(of: Mapping[str, Any]) -> tuple[Workload, Layouts]:
    """A run of a model given by its numbers: Llama-like where the FFN is gated, GPT-like otherwise (bf16)."""
    numbers = dict(of["shape"])
    family = find_family("llama" if numbers.pop("gated") else "gpt3")
    shape = make_shape(family.name, family.rules, numbers)
    workload = Workload(
        shape=shape,
        context_length=of["context_length"],
        precision="bf16",
        device=find_device(of["device"]),
        devices_per_node=8,
        nodes=of["nodes"],
        fused_activation=True,
        overlap=of["overlap"],
    )
    tensor = of["layout"]["tensor"]
    padded = -(-shape.vocab_size // (128 * tensor)) * 128 * tensor
    return workload, one_layout(Layout(expert=1, padded_vocab_size=padded, **of["layout"]))


def _allocated_gib(of: Mapping[str, Any]) -> float:
    workload, layouts = _run(of)
    total = memory.estimate_memory(workload, layouts).total[0] - memory.BASE_BYTES[workload.device.kind]
    return float(total) / 2**30


def _step_s(of: Mapping[str, Any]) -> float:
    return float(step_time.estimate_step_time(*_run(of)).total[0])


def _best_loss(of: Mapping[str, Any]) -> float:
    return budget.predict_loss(LOSS, *budget.choose_parameters_and_tokens(LOSS, of["flops"]))


def _learning_rate(of: Mapping[str, Any]) -> float:
    batch = hyperparameters.suggest_batch_tokens(RATES, of["tokens"]).value
    return hyperparameters.suggest_learning_rate(RATES, of["parameters"], of["tokens"], batch).value


COMPUTE: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "parameters": lambda of: params.count_parameters(*_family_shape(of)),
    "active_parameters": lambda of: params.count_active_parameters(*_family_shape(of)),
    "flops_per_token": lambda of: flops.model_flops_per_token(*_family_shape(of)),
    "flops_of_run": lambda of: flops.model_flops_per_token(*_family_shape(of)) * of["tokens"],
    "best_parameters": lambda of: budget.choose_parameters_and_tokens(LOSS, of["flops"])[0],
    "best_tokens": lambda of: budget.choose_parameters_and_tokens(LOSS, of["flops"])[1],
    "best_loss": _best_loss,
    "tokens_for_parameters": lambda of: budget.choose_tokens(LOSS, of["parameters"]),
    "parameters_for_tokens": lambda of: budget.choose_parameters(LOSS, of["tokens"]),
    "learning_rate": _learning_rate,
    "batch_tokens": lambda of: hyperparameters.suggest_batch_tokens(RATES, of["tokens"]).value,
    "allocated_gib": _allocated_gib,
    "step_s": _step_s,
}


def main() -> None:
    table = Table("claim", "source", "published", "computed", "error", "allowed")
    for claim in load_claims():
        table.add_row(
            claim.claim,
            claim.source,
            f"{claim.published:,.7g}",
            f"{claim.computed:,.7g}",
            f"{100 * claim.error:+.2f} %",
            f"{100 * claim.tolerance:g} %",
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
