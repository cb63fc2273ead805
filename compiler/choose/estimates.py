"""What a chosen plan will do: the estimates that stand in plan.json and in the programs' docstrings."""

import math
from collections.abc import Sequence

import numpy as np

from trainwright.compiler.choose.budget import predict_loss
from trainwright.compiler.choose.costs import PipelineCosts, rates_of
from trainwright.compiler.choose.hyperparameters import BatchPrice, warn_of_batch
from trainwright.compiler.estimate.cost import estimate_cost, estimate_mfu
from trainwright.compiler.estimate.flops import executed_flops_per_token, model_flops_per_token
from trainwright.compiler.estimate.layouts import Layouts, Workload
from trainwright.compiler.estimate.memory import estimate_memory
from trainwright.compiler.estimate.params import count_active_parameters, count_parameters
from trainwright.compiler.estimate.step_time import estimate_step_time
from trainwright.compiler.facts import LossLaw
from trainwright.compiler.plan import Alternative, Cluster, Estimates, Training, round_leaf


def make_estimates(
    workload: Workload,
    ranked: Layouts,
    training: Training,
    law: LossLaw,
    cluster: Cluster,
    costs: PipelineCosts,
    batch: BatchPrice,
    warnings: Sequence[str],
) -> Estimates:
    """Estimates of the first row of `ranked` (best first); the rows after it are the alternatives."""
    shape, context = workload.shape, workload.context_length
    time = estimate_step_time(workload, ranked)
    memory = estimate_memory(workload, ranked)
    step_s, tokens = float(time.total[0]), training.tokens_per_step
    parameters = count_parameters(shape, context)
    model_flops = model_flops_per_token(shape, context) * tokens
    cost = estimate_cost(training.steps * step_s, workload.devices, rates_of(cluster))
    loss = predict_loss(law, parameters, training.steps * tokens)
    mfu = estimate_mfu(model_flops, step_s, workload.devices, workload.device.peak_flops_per_s[workload.precision])
    return Estimates(
        parameters=parameters,
        active_parameters=count_active_parameters(shape, context),
        model_flops_per_step=round_leaf(model_flops),
        executed_flops_per_step=round_leaf(float(executed_flops_per_token(workload, ranked)[0]) * tokens),
        predicted_loss=round_leaf(loss) if loss < math.log(shape.vocab_size) else 0.0,
        law=law.name,
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
        warnings=(*warnings, *warn_of_batch(batch, tokens, cost.device_hours, cost.cost_usd)),
        alternatives=tuple(
            Alternative(
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                data=layout.data,
                micro_batch=layout.micro_batch,
                recompute=layout.recompute,
                step_s=round_leaf(float(time.total[row])),
                memory_bytes=int(np.rint(memory.total[row])),
            )
            for row in range(1, len(ranked))
            for layout in (ranked.row(row),)
        ),
    )
