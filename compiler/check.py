"""What makes a Plan legal: its layout by `layout_rules.py`, and what concerns the whole of it.

Feasibility (memory, time, money) is not legality: `choose/` filters by it. What is legal but has no template yet, `emit` refuses.
"""

from trainwright.compiler.estimate.layouts import one_layout
from trainwright.compiler.layout_rules import Terms, list_violations
from trainwright.compiler.metrics import list_metrics
from trainwright.compiler.plan import Plan, decided_leaves
from trainwright.compiler.plan_stages import Reinforced, Tuned
from trainwright.compiler.ramp import batch_unit


def check_plan(plan: Plan) -> list[str]:
    """Every rule that a plan breaks; empty when it is legal."""
    terms = Terms(
        shape=plan.shape,
        context_length=plan.training.context_length,
        global_batch=plan.training.global_batch,
        batch_unit=batch_unit(plan.training),
        nodes=plan.cluster.nodes,
        devices_per_node=plan.cluster.devices_per_node,
    )
    return list_violations(terms, one_layout(plan.layout), 0) + _whole_plan(plan)


def _whole_plan(plan: Plan) -> list[str]:
    """What a plan must satisfy beside its layout."""
    problems = []
    training = plan.training
    product = training.global_batch * training.context_length
    if product != training.tokens_per_step:
        problems.append(
            f"tokens_per_step: global_batch {training.global_batch} x context_length {training.context_length} = {product}, "
            f"but tokens_per_step is {training.tokens_per_step}"
        )
    if not 0 <= training.warmup_steps < training.steps:
        problems.append(f"warmup_steps: {training.warmup_steps} must be at least 0 and below steps {training.steps}")
    elif training.warmup_steps + training.decay_steps > training.steps:
        problems.append(
            f"decay_steps: warmup_steps {training.warmup_steps} + decay_steps {training.decay_steps} = "
            f"{training.warmup_steps + training.decay_steps}, but steps is {training.steps}"
        )
    if (training.schedule == "wsd") != (training.decay_style != "none") or (
        training.schedule != "wsd" and training.decay_steps
    ):
        problems.append(
            f"schedule: {training.schedule} with decay_steps {training.decay_steps} and decay_style {training.decay_style}: "
            "wsd, and wsd alone, has a decay of its own"
        )
    if not 0 <= training.min_learning_rate <= training.learning_rate:
        problems.append(
            f"min_learning_rate: {training.min_learning_rate} must be between 0 and learning_rate {training.learning_rate}"
        )
    if training.balancing == "bias" and not plan.shape.router_bias:
        problems.append(
            f"balancing: bias moves the bias of the routers, and those of {plan.shape.family} have none: take aux_loss or none"
        )
    problems += _tuning(plan) + _gates(plan)
    problems += [f"reasons: {path} has none" for path, _ in decided_leaves(plan) if path not in plan.reasons]
    return problems


def _tuning(plan: Plan) -> list[str]:
    problems, data = [], plan.layout.data
    tuned: tuple[Tuned, ...] = (*plan.sft, *plan.reward, *plan.dpo, *plan.ppo, *plan.grpo)
    for stage in tuned:
        given, update, of = stage.training, stage.training.global_batch, "global_batch"
        if isinstance(stage, Reinforced):
            update, of = stage.minibatch, "minibatch"
            problems += _episodes(stage)
        if update % (given.micro_batch * data):
            rows = update / (given.micro_batch * data)
            problems.append(
                f"{stage.stage}: {of} {update} / (micro_batch {given.micro_batch} x data {data}) = "
                f"{rows:.4g} micro-batches: they must be whole"
            )
        if not 0 <= given.min_learning_rate <= given.learning_rate:
            problems.append(
                f"{stage.stage}: min_learning_rate {given.min_learning_rate} must be between 0 and learning_rate "
                f"{given.learning_rate}"
            )
    return problems


def _episodes(stage: Reinforced) -> list[str]:
    """A batch of episodes is whole prompts of whole samples, in whole minibatches."""
    batch, product = stage.training.global_batch, stage.prompts * stage.volume.samples
    problems = []
    if product != batch:
        problems.append(
            f"{stage.stage}: prompts {stage.prompts} x samples {stage.volume.samples} = {product} episodes, but global_batch is"
            f" {batch}"
        )
    if batch % stage.minibatch:
        problems.append(
            f"{stage.stage}: global_batch {batch} / minibatch {stage.minibatch} = {batch / stage.minibatch:.4g} updates: they"
            " must be whole"
        )
    return problems


def _gates(plan: Plan) -> list[str]:
    """Every gate is about a metric that its stage measures."""
    problems = []
    for stage in plan.evaluate:
        metrics = list_metrics(
            sources=[source.name for source in plan.data.sources] if stage.text else (),
            conversations=[records.name for records in stage.conversations],
            preferences={records.name: records.connector for records in stage.preferences},
            tasks=[task.name for task in stage.tasks],
        )
        problems += [
            f"{stage.stage}: the gate {gate.metric} is about none of {', '.join(metrics)}"
            for gate in stage.gates
            if gate.metric not in metrics
        ]
    return problems
