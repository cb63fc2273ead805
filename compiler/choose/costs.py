"""What each stage takes, and the whole pipeline: tokens, FLOPs, device-hours, money, energy, CO2, with how each was reckoned."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainwright.compiler.choose.tuning_volume import PARTS
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
from trainwright.compiler.plan import (
    Cluster,
    CostLine,
    LineEstimate,
    Shape,
    StageEstimate,
    Totals,
    Training,
    round_leaf,
)
from trainwright.compiler.plan_stages import Dpo, Ppo, Reinforced, Reward, Sft, StagePlan, Tuned
from trainwright.compiler.ramp import trained_tokens, whole_steps
from trainwright.compiler.ranges import list_divisors
from trainwright.compiler.resolve import ResolvedPower, ResolvedSpec
from trainwright.compiler.units import format_count, format_quantity

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


@dataclass(frozen=True)
class _Context:
    before: Pretraining
    cluster: Cluster
    pins: Mapping[str, str]


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
    context = _Context(before, cluster, spec.pins)
    estimates = tuple(_stage(context, stage, tunings.get(stage.name)) for stage in stages)
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


def _stage(context: _Context, stage: StagePlan, tuned: Tuned | None) -> StageEstimate:
    if stage.kind == "pretrain":
        return _pretrain(context, stage)
    if tuned is None:
        nothing = Work(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return _estimate(context, stage, nothing, 0.0, 0.0, _UNKNOWN[stage.kind])
    if isinstance(tuned, Reinforced):
        return _reinforced(context, stage, tuned)
    work, text = _supervised(context.before.workload.shape, tuned)
    text += f"{_assumed(context, tuned)}; {_utilisation(context.before)}"
    return _estimate(context, stage, work, _passes_s(context.before, work), 0.0, text)


def _pretrain(context: _Context, stage: StagePlan) -> StageEstimate:
    before, training = context.before, context.before.training
    tokens = float(trained_tokens(training))
    flops = tokens * model_flops_per_token(before.workload.shape, before.workload.context_length)
    text = (
        f"{training.steps:,} steps of {before.step_s:.3g} s, {before.mfu:.1%} of the peak in the planned layout; no validation,"
        " restarts or idle devices"
    )
    work = Work(tokens, 0.0, 0.0, flops, 0.0, 0.0)
    return _estimate(context, stage, work, whole_steps(training) * before.step_s, 0.0, text)


def _supervised(shape: Shape, tuned: Sft | Reward | Dpo) -> tuple[Work, str]:
    volume, epochs = tuned.volume, tuned.training.epochs
    passes = f"{format_count(epochs, 'epoch')}, rows packed full"
    if isinstance(tuned, Sft):
        length = volume.prompt_tokens + volume.answer_tokens
        text = f"{volume.examples:,} conversations of {length:,} tokens, {passes}"
        return sft_work(shape, volume.examples, length, epochs), text
    lengths = f"prompts of {volume.prompt_tokens:,} and answers of {volume.answer_tokens:,} tokens"
    text = f"{volume.examples:,} pairs, {lengths}, {passes}"
    of = (shape, volume.examples, volume.prompt_tokens, volume.answer_tokens, epochs)
    if isinstance(tuned, Reward):
        return reward_work(*of), text
    return dpo_work(*of), f"{text}, the reference scored once"


def _assumed(context: _Context, tuned: Sft | Reward | Dpo | Reinforced) -> str:
    """Which of a volume nobody has stated or measured."""
    if not isinstance(tuned, Reinforced) and tuned.connector:
        return ""
    absent = [part for part in PARTS if f"stages.{tuned.stage}.{part}" not in context.pins]
    return f" (assumed: {', '.join(absent)})" if absent else ""


def _reinforced(context: _Context, stage: StagePlan, tuned: Reinforced) -> StageEstimate:
    before, volume = context.before, tuned.volume
    networks = Networks(
        reference=tuned.kl > 0,
        reward=tuned.reward != "verifier",
        value=isinstance(tuned, Ppo),
        old_policy=not isinstance(tuned, Ppo),
    )
    prompts, samples, answer = volume.examples * tuned.training.epochs, volume.samples, volume.answer_tokens
    work = reinforced_work(
        before.workload.shape, networks, prompts, samples, volume.prompt_tokens, answer, tuned.inner_epochs
    )
    batch = Answers(tuned.prompts * samples, tuned.prompts, volume.prompt_tokens, answer, tuned.max_answer_tokens)
    engine, each, batch_s = _fastest_engine(before.workload, batch)
    steps = prompts / tuned.prompts
    train_s, generate_s = _passes_s(before, work), steps * batch_s
    at_once = generation.concurrent_sequences(engine, each)
    share = generate_s / (generate_s + train_s)
    text = (
        f"{prompts:,} prompts of {volume.prompt_tokens:,} tokens x {samples} of {answer:,} on average and"
        f" {tuned.max_answer_tokens:,} at most{_assumed(context, tuned)}, {steps:,.0f} steps; generation, {share:.0%} of the"
        f" time, by bandwidth ({BANDWIDTH_SHARE:.0%} of it), tensor {engine.tensor}, {at_once:,.0f} answers at once a group,"
        f" lengths exponential, training states set aside; {_utilisation(before)}"
    )
    if networks.value or networks.reward:
        text += f"; {_SAME_SHAPE}"
    return _estimate(context, stage, work, train_s, generate_s, text)


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
    context: _Context,
    stage: StagePlan,
    work: Work,
    train_s: float,
    generate_s: float,
    assumption: str,
) -> StageEstimate:
    cost = estimate_cost(train_s + generate_s, context.before.workload.devices, rates_of(context.cluster))
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
