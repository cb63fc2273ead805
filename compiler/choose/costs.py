"""What each stage takes, and the whole pipeline: tokens, FLOPs, device-hours, money, energy, CO2, with how each was reckoned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainwright.compiler.choose.ledger import Ledger
from trainwright.compiler.estimate import generation
from trainwright.compiler.estimate.cost import SECONDS_PER_MONTH, Rates, estimate_cost, passes_s
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.generation import BANDWIDTH_SHARE, Answers, Engine
from trainwright.compiler.estimate.layouts import Workload
from trainwright.compiler.estimate.post_training import (
    Networks,
    Work,
    dpo_work,
    reinforced_work,
    reward_work,
    sft_work,
)
from trainwright.compiler.plan import Cluster, CostLine, LineEstimate, StageEstimate, Totals, Training, round_leaf
from trainwright.compiler.plan_stages import Dpo, Ppo, Reinforced, Reward, Sft, StagePlan, Tuned
from trainwright.compiler.ranges import list_divisors
from trainwright.compiler.resolve import ResolvedPower, ResolvedSpec
from trainwright.compiler.units import format_quantity

PUE, CARBON_KG_PER_KWH = 1.1, 0.385
_LLAMA = "LLaMA (arXiv 2302.13971), section 6"
# Kinds of which a plan does not know how much they read.
_UNKNOWN = {
    "evaluate": "not estimated: the plan does not know how much is held out",
    **dict.fromkeys(
        ("ingest", "curate", "tokenizer", "tokenize", "export"), "not estimated: it depends on the data's bytes"
    ),
}
_SAME_SHAPE = "reward model and value network as large as the policy, their memory not laid out"


@dataclass(frozen=True)
class Pretraining:
    """What the stages' estimates rest on: the chosen layout's step, and the share of the peak that model FLOPs take in it."""

    workload: Workload
    training: Training
    step_s: float
    mfu: float


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


@dataclass(frozen=True)
class PipelineCosts:
    """Estimates of each stage in executing order, of each cost line, and their sums."""

    stages: tuple[StageEstimate, ...]
    lines: tuple[LineEstimate, ...]
    totals: Totals


def estimate_pipeline(
    spec: ResolvedSpec, before: Pretraining, cluster: Cluster, stages: Sequence[StagePlan], tuned: Sequence[Tuned]
) -> PipelineCosts:
    """What the stages take one after the other, on all devices each."""
    tunings = {stage.stage: stage for stage in tuned}
    estimates = tuple(_stage(before, cluster, stage, tunings.get(stage.name)) for stage in stages)
    duration_s = sum(stage.train_s + stage.generate_s for stage in estimates)
    lines = tuple(_line(line, duration_s / SECONDS_PER_MONTH) for line in cluster.costs)
    totals = Totals(
        duration_s=round_leaf(duration_s),
        flops=round_leaf(sum(stage.flops for stage in estimates)),
        device_hours=round_leaf(sum(stage.device_hours for stage in estimates)),
        devices_usd=round_leaf(sum(stage.cost_usd for stage in estimates)),
        lines_usd=round_leaf(sum(line.cost_usd for line in lines)),
        energy_kwh=round_leaf(sum(stage.energy_kwh for stage in estimates)),
        co2_kg=round_leaf(sum(stage.co2_kg for stage in estimates)),
        assumption=_power_assumption(spec.power, cluster),
    )
    return PipelineCosts(estimates, lines, totals)


def _power_assumption(power: ResolvedPower, cluster: Cluster) -> str:
    device, pue, carbon = (
        f" ({word})" if value == math.inf else ""
        for word, value in (
            ("data sheet", power.device_w),
            ("assumed", power.pue),
            ("assumed", power.carbon_kg_per_kwh),
        )
    )
    return (
        f"{cluster.power_w:g} W a device at all times{device}, PUE {cluster.pue:g}{pue}, {cluster.carbon_kg_per_kwh:g} kg CO2 a"
        f" kWh{carbon}; hosts and network not counted"
    )


def _stage(before: Pretraining, cluster: Cluster, stage: StagePlan, tuned: Tuned | None) -> StageEstimate:
    if stage.kind == "pretrain":
        return _pretrain(before, cluster, stage)
    if tuned is None:
        nothing = Work(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return _estimate(before, cluster, stage, nothing, 0.0, 0.0, _UNKNOWN[stage.kind])
    if isinstance(tuned, Reinforced):
        return _reinforced(before, cluster, stage, tuned)
    work, text = _supervised(before, tuned)
    return _estimate(before, cluster, stage, work, _passes_s(before, work), 0.0, f"{text}; {_utilisation(before)}")


def _pretrain(before: Pretraining, cluster: Cluster, stage: StagePlan) -> StageEstimate:
    training = before.training
    tokens = float(training.steps * training.tokens_per_step)
    flops = tokens * model_flops_per_token(before.workload.shape, before.workload.context_length)
    text = (
        f"{training.steps:,} steps of {before.step_s:.3g} s, {before.mfu:.1%} of the peak in the planned layout; no validation,"
        " restarts or idle devices"
    )
    work = Work(tokens, 0.0, 0.0, flops, 0.0, 0.0)
    return _estimate(before, cluster, stage, work, training.steps * before.step_s, 0.0, text)


def _supervised(before: Pretraining, tuned: Sft | Reward | Dpo) -> tuple[Work, str]:
    shape, volume, epochs = before.workload.shape, tuned.volume, tuned.training.epochs
    passes = f"{epochs} epoch{'' if epochs == 1 else 's'}, rows packed full"
    if isinstance(tuned, Sft):
        length = volume.prompt_tokens + volume.answer_tokens
        text = f"{volume.examples:,} conversations of {length:,} tokens, {passes}"
        return sft_work(shape, volume.examples, length, epochs), text
    text = (
        f"{volume.examples:,} pairs, prompts of {volume.prompt_tokens:,} and answers of {volume.answer_tokens:,} tokens"
    )
    of = (shape, volume.examples, volume.prompt_tokens, volume.answer_tokens, epochs)
    if isinstance(tuned, Reward):
        return reward_work(*of), f"{text}, {passes}"
    return dpo_work(*of), f"{text}, {passes}; the reference is scored once"


def _reinforced(before: Pretraining, cluster: Cluster, stage: StagePlan, tuned: Reinforced) -> StageEstimate:
    shape, volume = before.workload.shape, tuned.volume
    prompts = volume.examples * tuned.training.epochs
    networks = Networks(
        reference=tuned.kl > 0,
        reward=tuned.reward != "verifier",
        value=isinstance(tuned, Ppo),
        old_policy=not isinstance(tuned, Ppo),
    )
    samples = max(volume.samples, 1)
    answer = min(volume.answer_tokens, tuned.max_answer_tokens)
    work = reinforced_work(shape, networks, prompts, samples, volume.prompt_tokens, answer, tuned.inner_epochs)
    steps = prompts / tuned.prompts
    engine, answers, step_s = _fastest_engine(
        before.workload,
        Answers(tuned.prompts * samples, tuned.prompts, volume.prompt_tokens, answer, tuned.max_answer_tokens),
    )
    train_s, generate_s = _passes_s(before, work), steps * step_s
    at_once = generation.concurrent_sequences(engine, answers)
    text = (
        f"{prompts:,} prompts of {volume.prompt_tokens:,} tokens x {samples} answers of {answer:,} on average (exponential,"
        f" {tuned.max_answer_tokens:,} at most), {steps:,.0f} steps; generation, {generate_s / (generate_s + train_s):.0%} of the"
        f" time, by bandwidth ({BANDWIDTH_SHARE:.0%} of it), tensor {engine.tensor}, {at_once:,.0f} answers at once a group,"
        f" training states set aside; {_utilisation(before)}"
    )
    if networks.value or networks.reward:
        text += f"; {_SAME_SHAPE}"
    return _estimate(before, cluster, stage, work, train_s, generate_s, text)


def _fastest_engine(workload: Workload, batch: Answers) -> tuple[Engine, Answers, float]:
    """(engine, what a group of it writes, seconds) that write a batch soonest: generation is laid out apart from training. Groups
    larger than a node are looked at only where none smaller holds the weights."""
    found: list[tuple[Engine, Answers, float]] = []
    last = None
    for tensor in list_divisors(workload.devices, workload.devices):
        if found and tensor > workload.devices_per_node:
            break
        engine = Engine(workload.shape, workload.device, workload.precision, workload.devices_per_node, tensor)
        groups = workload.devices // tensor
        each = replace(batch, sequences=max(1.0, batch.sequences / groups), prompts=max(1.0, batch.prompts / groups))
        last = (engine, each)
        if generation.fits(engine, each) and workload.shape.num_attention_heads % tensor == 0:
            found.append((engine, each, generation.generation_s(engine, each)))
    if not found and last is not None:
        found.append((*last, generation.generation_s(*last)))
    return min(found, key=lambda one: one[2])


def _passes_s(before: Pretraining, work: Work) -> float:
    device, precision = before.workload.device, before.workload.precision
    flops = work.trained_flops + work.scored_flops
    return passes_s(flops, before.workload.devices, device.peak_flops_per_s[precision], before.mfu)


def _utilisation(before: Pretraining) -> str:
    return f"passes at {before.mfu:.1%} of the peak, as pretraining in the planned layout"


def _estimate(
    before: Pretraining,
    cluster: Cluster,
    stage: StagePlan,
    work: Work,
    train_s: float,
    generate_s: float,
    assumption: str,
) -> StageEstimate:
    cost = estimate_cost(train_s + generate_s, before.workload.devices, rates_of(cluster))
    return StageEstimate(
        name=stage.name,
        kind=stage.kind,
        trained_tokens=round_leaf(work.trained_tokens),
        scored_tokens=round_leaf(work.scored_tokens),
        generated_tokens=round_leaf(work.generated_tokens),
        flops=round_leaf(work.flops),
        train_s=round_leaf(train_s),
        generate_s=round_leaf(generate_s),
        device_hours=round_leaf(cost.device_hours),
        cost_usd=round_leaf(cost.cost_usd),
        energy_kwh=round_leaf(cost.energy_kwh),
        co2_kg=round_leaf(cost.co2_kg),
        assumption=assumption,
    )


def rates_of(cluster: Cluster) -> Rates:
    """What the cluster's devices take and cost."""
    return Rates(cluster.price_usd_per_device_hour, cluster.power_w, cluster.pue, cluster.carbon_kg_per_kwh)


def _line(line: CostLine, months: float) -> LineEstimate:
    if line.per != "month":
        return LineEstimate(line.name, round_leaf(line.amount_usd), "once")
    text = (
        f"{format_quantity('money', line.amount_usd)} a month x {months:.3g} months: the stages that are estimated, one after the"
        " other"
    )
    return LineEstimate(line.name, round_leaf(line.amount_usd * months), text)
