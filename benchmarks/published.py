"""What others published, beside what this planner computes: claim, source, published, computed, error.

    python benchmarks/published.py

Claims stand in tests/published/*.yaml, each with its source and the tolerance that tests/test_published.py holds it to.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from trainwright.compiler.choose import cluster
from trainwright.compiler.choose.bands import bands_of_answer
from trainwright.compiler.choose.question import Question, answer
from trainwright.compiler.choose.sizes import Sizes
from trainwright.compiler.estimate import cost, flops, generation, memory, params, post_training, step_time
from trainwright.compiler.estimate.layouts import Layouts, Workload, one_layout
from trainwright.compiler.facts import (
    HyperparameterLaw,
    find_device,
    find_family,
    find_hyperparameter_law,
    make_shape,
)
from trainwright.compiler.laws import rates
from trainwright.compiler.laws.additive import AdditiveLaw
from trainwright.compiler.laws.experts import ExpertsLaw
from trainwright.compiler.laws.find import find_law
from trainwright.compiler.laws.law import Law
from trainwright.compiler.laws.repeated import RepeatedDataLaw
from trainwright.compiler.plan import Layout, Shape

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "published"


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


def _law(of: Mapping[str, Any]) -> Law:
    """The law of a claim, for its experts or unique tokens; absent: the planner's default."""
    law = find_law(of.get("law", "epoch2024"))
    if isinstance(law, ExpertsLaw):
        return law.with_experts(of["experts"])
    return law.with_unique_tokens(of.get("unique_tokens", math.inf)) if isinstance(law, RepeatedDataLaw) else law


def _best(of: Mapping[str, Any]) -> tuple[float, float]:
    parameters, tokens = _law(of).frontier(float(of["flops"]))
    return float(parameters), float(tokens)


def _best_loss(of: Mapping[str, Any]) -> float:
    return float(_law(of).loss(*_best(of)))


def _size_exponent(of: Mapping[str, Any]) -> float:
    """a of N ~ C^a between two computes."""
    low, high = (float(flops) for flops in of["between_flops"])
    sizes = [float(_law(of).frontier(flops)[0]) for flops in (low, high)]
    return math.log(sizes[1] / sizes[0]) / math.log(high / low)


def _ideal_sizes() -> Sizes:
    """Sizes of which every parameter costs 6 FLOPs a token, and nothing else does: what closed forms count."""
    total = np.geomspace(1e4, 1e15, 2201)
    columns = {field.name: total for field in dataclasses.fields(Sizes)}
    return Sizes(**{**columns, "flops_per_token": 6 * total})


def _question(of: Mapping[str, Any]) -> Question:
    """What a claim pins; `quality_of`: the loss of a model of that size on its best tokens."""
    pinned = {name: float(value) for name, value in of["pinned"].items()}
    if "quality_of" in of:
        size = float(of["quality_of"])
        pinned["target_loss"] = float(_law(of).loss(size, _law(of).tokens_for(size)))
    return Question(**pinned)


def _answer(of: Mapping[str, Any]) -> tuple[float, float]:
    """(parameters, tokens) by the planner's own search."""
    parameters, tokens = answer(_law(of), _ideal_sizes(), _question(of))
    return float(parameters[0]), float(tokens[0])


def _more_tokens(of: Mapping[str, Any]) -> float:
    """Times the tokens of the model whose quality is asked."""
    return _answer(of)[1] / float(_law(of).tokens_for(float(of["quality_of"])))


def _life_cost(of: Mapping[str, Any]) -> float:
    """Times the FLOPs of training and inference of the model whose quality is asked."""
    other = float(of["quality_of"])
    runs = (_answer(of), (other, float(_law(of).tokens_for(other))))
    ours, theirs = (size * (6 * tokens + 2 * _question(of).inference_tokens) for size, tokens in runs)
    return ours / theirs


def _first_order(of: Mapping[str, Any]) -> float:
    """alpha A N^-alpha / (beta B D^-beta) over 1 + D_inference / (3 D)."""
    law, (parameters, tokens) = _law(of), _answer(of)
    assert isinstance(law, AdditiveLaw)
    slopes = law.alpha * law.A * parameters**-law.alpha / (law.beta * law.B * tokens**-law.beta)
    return float(slopes / (1 + _question(of).inference_tokens / (3 * tokens)))


def _tokens_a_parameter_band(of: Mapping[str, Any]) -> tuple[float, float]:
    """80 % band of D / N for a compute, where more parameters are fewer tokens."""
    sizes, budgets, _ = bands_of_answer(_law(of), _ideal_sizes(), _question(of))
    return budgets.low / sizes.high, budgets.high / sizes.low


def _chinchilla_parameters(of: Mapping[str, Any]) -> float:
    """As its table A9 counts: the embedding once, and of each layer a fifth attention matrix for relative positions."""
    model = of["model"]
    attention = 5 * model["d_model"] * model["n_heads"] * model["kv_size"]
    layer = attention + 2 * model["d_model"] * model["ffw_size"]
    return float(32000 * model["d_model"] + model["n_layers"] * layer)


def _chinchilla_flops_ratio(of: Mapping[str, Any]) -> float:
    """FLOPs by its appendix F, over 6 N a token. Its table A4 is met at 2,048 tokens, with no FLOPs of embedding and logits."""
    model, tokens = of["model"], 2048
    width = model["n_heads"] * model["kv_size"]
    matrices = 2 * tokens * model["d_model"] * (3 * width + width + 2 * model["ffw_size"])
    attention = 2 * 2 * tokens**2 * width + 3 * model["n_heads"] * tokens**2
    return 3 * model["n_layers"] * (matrices + attention) / (6 * _chinchilla_parameters(of) * tokens)


def _rates(of: Mapping[str, Any]) -> tuple[HyperparameterLaw, rates.Run]:
    """A law and a run, of which a claim gives what the law asks: whatever it counts as parameters, they are `parameters`."""
    count = of.get("parameters", 1.0)
    flops_per_token = of.get("flops_per_token", 6 * count)
    run = rates.Run(count, count, count, flops_per_token, of.get("tokens", 1.0), of.get("expansion", 1.0))
    return find_hyperparameter_law(of["law"]), run


def _of_runs(of: Mapping[str, Any]) -> list[cost.RunCost]:
    """Of each run (device-hours, W a device), at LLaMA's PUE and carbon."""
    rates = [cost.Rates(0.0, power_w, cluster.PUE, cluster.CARBON_KG_PER_KWH) for _, power_w in of["runs"]]
    return [cost.estimate_cost(3600.0 * hours, 1, each) for (hours, _), each in zip(of["runs"], rates, strict=True)]


def _hours(of: Mapping[str, Any], of_flops: float) -> float:
    return cost.passes_s(of_flops, 1, find_device(of["device"]).peak_flops_per_s["bf16"], of["utilisation"]) / 3600


def _decoded_tokens_per_s(of: Mapping[str, Any]) -> float:
    engine = generation.Engine(_family_shape(of)[0], find_device("a100"), "bf16", 8, of["tensor"], step_s=0.0)
    sequences, answer = of["sequences"], of["answer_tokens"]
    answers = generation.Answers(sequences, sequences, of["prompt_tokens"], answer, answer)
    return float(sequences * answer / generation.generation_s(engine, answers))


PROMPTS, SAMPLES, PROMPT_TOKENS, LONGEST = 64, 32, 150, 4096  # a step of the published runs of GRPO


def _rollout_s(of: Mapping[str, Any]) -> float:
    engine = generation.Engine(_family_shape(of)[0], find_device("h100"), "bf16", 8, of["tensor"])
    groups = of["devices"] // of["tensor"]
    sequences, prompts = PROMPTS * SAMPLES / groups, max(1.0, PROMPTS / groups)
    answers = generation.Answers(sequences, prompts, PROMPT_TOKENS, of["answer_tokens"], LONGEST - PROMPT_TOKENS)
    return generation.generation_s(engine, answers)


def _update(of: Mapping[str, Any]) -> post_training.Work:
    networks = post_training.Networks(reference=True, reward=False, value=False, old_policy=True)
    shape = _family_shape(of)[0]
    return post_training.reinforced_work(shape, networks, PROMPTS, SAMPLES, PROMPT_TOKENS, of["answer_tokens"], 1)


def _scored_share(of: Mapping[str, Any]) -> float:
    work = _update(of)
    return work.scored_flops / work.trained_flops


def _updating_s(of: Mapping[str, Any]) -> float:
    """At the utilisation of a training step of the layout."""
    shape, context = _family_shape(of)
    numbers = {name: getattr(shape, name) for name in SHAPE_NUMBERS}
    workload, layouts = _run({**of, "shape": numbers | {"gated": True}})
    tokens = of["layout"]["micro_batch"] * of["layout"]["micro_batches"] * of["layout"]["data"] * context
    step_s = float(step_time.estimate_step_time(workload, layouts).total[0])
    return _update(of).trained_flops / (flops.model_flops_per_token(shape, context) * tokens) * step_s


SHAPE_NUMBERS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)
COMPUTE: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "parameters": lambda of: params.count_parameters(*_family_shape(of)),
    "active_parameters": lambda of: params.count_active_parameters(*_family_shape(of)),
    "flops_per_token": lambda of: flops.model_flops_per_token(*_family_shape(of)),
    "flops_of_run": lambda of: flops.model_flops_per_token(*_family_shape(of)) * of["tokens"],
    "best_parameters": lambda of: _best(of)[0],
    "best_tokens": lambda of: _best(of)[1],
    "best_loss": _best_loss,
    "tokens_for_parameters": lambda of: float(_law(of).tokens_for(float(of["parameters"]))),
    "parameters_for_tokens": lambda of: float(_law(of).parameters_for(float(of["tokens"]))),
    "loss": lambda of: float(_law(of).loss(float(of["parameters"]), float(of["tokens"]))),
    "flops_for_parameters": lambda of: 6 * of["parameters"] * float(_law(of).tokens_for(float(of["parameters"]))),
    "size_exponent": _size_exponent,
    "answered_parameters": lambda of: _answer(of)[0],
    "answered_tokens": lambda of: _answer(of)[1],
    "answered_flops": lambda of: 6 * math.prod(_answer(of)),
    "answered_loss": lambda of: float(_law(of).loss(*_answer(of))),
    "answered_epochs": lambda of: _answer(of)[1] / of["unique_tokens"],
    "more_tokens": _more_tokens,
    "life_cost": _life_cost,
    "first_order": _first_order,
    "least_tokens_a_parameter": lambda of: _tokens_a_parameter_band(of)[0],
    "most_tokens_a_parameter": lambda of: _tokens_a_parameter_band(of)[1],
    "chinchilla_parameters": _chinchilla_parameters,
    "chinchilla_flops_ratio": _chinchilla_flops_ratio,
    "learning_rate": lambda of: float(rates.law_rate(*_rates(of))),
    "batch_tokens": lambda of: float(rates.law_batch(*_rates(of))),
    "allocated_gib": _allocated_gib,
    "step_s": _step_s,
    "device_hours": lambda of: sum(run.device_hours for run in _of_runs(of)),
    "energy_mwh": lambda of: sum(run.energy_kwh for run in _of_runs(of)) / 1000,
    "co2_t": lambda of: sum(run.co2_kg for run in _of_runs(of)) / 1000,
    "hours_of_run": lambda of: _hours(of, flops.model_flops_per_token(*_family_shape(of)) * of["tokens"]),
    "hours_of_flops": lambda of: _hours(of, of["flops"]),
    "flops_of_hours": lambda of: of["device_hours"] / _hours(of, 1.0),
    "decoded_tokens_per_s": _decoded_tokens_per_s,
    "rollout_s": _rollout_s,
    "scored_share": _scored_share,
    "updating_s": _updating_s,
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
