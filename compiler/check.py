"""What makes a Plan legal: its layout by `layout_rules.py`, and what concerns the whole of it.

Feasibility (memory, time, money) is not legality: `choose/` filters by it. What is legal but has no template yet, `emit` refuses.
"""

from trainwright.compiler.estimate.layouts import one_layout
from trainwright.compiler.facts import find_device
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
    problems += _kernels(plan)
    if plan.shape.rotary_scaling and plan.shape.positions != "rope":
        problems.append(
            f"rotary_scaling: {plan.shape.rotary_scaling:g} stretches rotary frequencies, and positions are"
            f" {plan.shape.positions}"
        )
    if (training.balancing != "none" or training.router_z_loss) and not plan.shape.num_experts:
        problems.append(
            f"balancing: {training.balancing}, router_z_loss {training.router_z_loss:g}: {plan.shape.family} has no experts"
        )
    if training.balancing == "bias" and not plan.shape.router_bias:
        problems.append(
            f"balancing: bias moves the bias of the routers, and those of {plan.shape.family} have none: take aux_loss or none"
        )
    problems += _tuning(plan) + _gates(plan)
    problems += [f"reasons: {path} has none" for path, _ in decided_leaves(plan) if path not in plan.reasons]
    return problems


def _kernels(plan: Plan) -> list[str]:
    """What kernels need of the device, the layer spec and the shape."""
    kernels, layout, shape, device = plan.kernels, plan.layout, plan.shape, find_device(plan.cluster.device)
    engine, problems = kernels.layer_spec == "transformer_engine", []
    if kernels.fp8 != "none":
        if not (device.fp8 and engine and kernels.bf16):
            problems.append(
                f"fp8: {kernels.fp8} needs a device with 8-bit products, Transformer Engine and bf16; here {device.name}, "
                f"{kernels.layer_spec}, {plan.training.precision}"
            )
        widths = {"hidden_size": shape.hidden_size, "ffn_hidden_size": shape.ffn_hidden_size // layout.tensor}
        problems += [
            f"fp8: {name} {width} on a device is no multiple of 16, which 8-bit products take"
            for name, width in widths.items()
            if width % 16
        ]
    if layout.fsdp != "none" and not (device.kind == "cuda" and layout.distributed_optimizer and layout.pipeline == 1):
        problems.append(
            f"fsdp: {layout.fsdp} needs CUDA devices, distributed_optimizer: true and pipeline 1 (Megatron-Core 0.16's FSDP "
            f"replaces the data-parallel wrapper that pipelines schedule); here {device.name}, {layout.distributed_optimizer}, "
            f"pipeline {layout.pipeline}"
        )
    if shape.positions == "alibi" and engine:
        problems.append(
            "positions: alibi is a bias in the runtime's own attention; Transformer Engine's has none: layer_spec local"
        )
    fused = [name for name in ("layernorm", "mla_up_proj", "moe_act") if name in layout.recompute_modules]
    if fused and not engine:
        problems.append(
            f"recompute_modules: {', '.join(fused)} need Transformer Engine in Megatron-Core 0.16; layer_spec is"
            f" {kernels.layer_spec}"
        )
    two = layout.virtual_pipeline > 1 and layout.pipeline == 2
    if two and kernels.batch_p2p_comm:
        problems.append(
            "batch_p2p_comm: with 2 interleaved stages both neighbours are one process, and a batch swaps the two messages"
        )
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
