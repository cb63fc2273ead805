"""What a chosen plan will do: the estimates that stand in plan.json and in the programs' docstrings."""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from trainwright.compiler.choose.bands import NONE, band_of_loss, bands_of_answer
from trainwright.compiler.choose.candidate import Candidate
from trainwright.compiler.choose.costs import PipelineCosts, rates_of
from trainwright.compiler.choose.hyperparameters import BatchPrice, warn_of_batch
from trainwright.compiler.choose.programs import find_remedies
from trainwright.compiler.choose.warnings import warn_of_target
from trainwright.compiler.estimate.cost import estimate_cost, estimate_mfu
from trainwright.compiler.estimate.flops import executed_flops_per_token, model_flops_per_token
from trainwright.compiler.estimate.memory import estimate_memory
from trainwright.compiler.estimate.params import count_active_parameters, count_as, count_parameters, pad_count
from trainwright.compiler.estimate.step_time import estimate_step_time
from trainwright.compiler.plan import Alternative, Cluster, Estimates, ProgramEstimate, Round, round_leaf
from trainwright.compiler.ramp import whole_steps
from trainwright.compiler.resolve import ResolvedSpec


def make_estimates(
    spec: ResolvedSpec,
    chosen: Candidate,
    rounds: tuple[Round, ...],
    cluster: Cluster,
    costs: PipelineCosts,
    batch: BatchPrice,
    programs: tuple[ProgramEstimate, ...],
) -> Estimates:
    """Estimates of the best layout of the candidate; the layouts after it are the alternatives."""
    workload, ranked, training = chosen.workload, chosen.layouts.ranked, chosen.training
    shape, context = workload.shape, workload.context_length
    time = estimate_step_time(workload, ranked)
    memory = estimate_memory(workload, ranked)
    step_s, tokens = float(time.total[0]), training.tokens_per_step
    parameters = count_parameters(shape, context)
    model_flops = model_flops_per_token(shape, context) * tokens
    cost = estimate_cost(whole_steps(training) * step_s, workload.devices, rates_of(cluster))
    mfu = estimate_mfu(model_flops, step_s, workload.devices, workload.device.peak_flops_per_s[workload.precision])
    unique = spec.data.unique_tokens if math.isfinite(spec.data.unique_tokens) else 0.0
    law, question = chosen.variant.law, chosen.question
    if not spec.model.size_is_open:
        question = replace(question, parameters=float(parameters))
    bands = bands_of_answer(law, chosen.variant.sizes, question)
    return Estimates(
        parameters=parameters,
        padded_parameters=pad_count(shape, parameters, ranked.row(0).padded_vocab_size),
        active_parameters=count_active_parameters(shape, context),
        model_flops_per_step=round_leaf(model_flops),
        executed_flops_per_step=round_leaf(float(executed_flops_per_token(workload, ranked)[0]) * tokens),
        **_by_law(chosen),
        parameters_80=bands.parameters,
        tokens_80=bands.tokens,
        unique_tokens=unique,
        epochs=round_leaf(chosen.trained_tokens / unique) if unique else 0.0,
        inference_flops=round_leaf(chosen.need.inference_flops),
        rounds=rounds,
        critical_batch_tokens=round_leaf(batch.critical_tokens),
        batch_overhead=round_leaf(batch.overhead),
        step_s=round_leaf(step_s),
        step_s_low=round_leaf(float(time.low[0])),
        step_s_high=round_leaf(float(time.high[0])),
        tokens_per_s=round_leaf(tokens / step_s),
        tokens_per_s_per_device=round_leaf(tokens / step_s / workload.devices),
        mfu=round_leaf(mfu),
        memory=memory.row(0, workload.device.memory_bytes),
        train_s=round_leaf(cost.duration_s),
        device_hours=round_leaf(cost.device_hours),
        cost_usd=round_leaf(cost.cost_usd),
        stages=costs.stages,
        cost_lines=costs.lines,
        totals=costs.totals,
        warnings=(
            *chosen.warnings,
            *warn_of_target(law, question.target_loss, bands.unanswered),
            *warn_of_batch(batch, tokens, cost.device_hours, cost.cost_usd),
        ),
        alternatives=tuple(
            Alternative(
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                expert=layout.expert,
                data=layout.data,
                micro_batch=layout.micro_batch,
                recompute=layout.recompute,
                step_s=round_leaf(float(time.total[row])),
                memory_bytes=int(np.rint(memory.total[row])),
            )
            for row in range(1, len(ranked))
            for layout in (ranked.row(row),)
        ),
        programs=programs,
        remedies=find_remedies(chosen),
    )


def _by_law(chosen: Candidate) -> dict[str, Any]:
    """What the law says of the model: its loss, and how far its data leave it open."""
    law = chosen.variant.law
    counted = count_as(law.facts.counts, chosen.shape, chosen.training.context_length)
    loss = 0.0
    if law.has_loss:
        loss = float(law.loss(np.array([counted]), np.array([float(chosen.trained_tokens)]))[0])
    said = 0 < loss < math.log(chosen.shape.vocab_size)  # above it a uniform guess is better
    return {
        "law": law.facts.name,
        "predicted_loss": round_leaf(loss) if said else 0.0,
        "loss_80": band_of_loss(law, counted, float(chosen.trained_tokens)) if said else NONE,
    }
