"""What makes a plan legal: a table of rules over columns. The search reads it with a million rows, `check_plan` with one.

A rule says what must hold and prints every factor and result when it doesn't. Feasibility (memory, time, money) is not legality:
`choose/` filters by it. What is legal but has no template yet, `emit` refuses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.layouts import Bools, Layouts, one_layout
from trainwright.compiler.metrics import list_metrics
from trainwright.compiler.plan import Layout, Plan, Shape, decided_leaves
from trainwright.compiler.plan_stages import Reinforced, Tuned


@dataclass(frozen=True)
class Terms:
    """What every row of a table of layouts has in common, as far as legality depends on it."""

    shape: Shape
    context_length: int  # tokens a sequence
    global_batch: int  # sequences a step
    nodes: int
    devices_per_node: int


@dataclass(frozen=True)
class Rule:
    """`holds` says of each row whether it is legal; `message` says of one illegal row what is wrong, with its arithmetic."""

    name: str
    holds: Callable[[Terms, Layouts], Bools]
    message: Callable[[Terms, Layout], str]


def _ones(layouts: Layouts) -> Bools:
    return np.ones(len(layouts), dtype=np.bool_)


RULES: tuple[Rule, ...] = (
    Rule(
        "devices",
        lambda terms, rows: (
            rows.tensor * rows.pipeline * rows.context * rows.data == terms.nodes * terms.devices_per_node
        ),
        lambda terms, row: (
            f"tensor {row.tensor} x pipeline {row.pipeline} x context {row.context} x data {row.data} = "
            f"{row.tensor * row.pipeline * row.context * row.data} devices, but nodes {terms.nodes} x devices_per_node "
            f"{terms.devices_per_node} = {terms.nodes * terms.devices_per_node}"
        ),
    ),
    Rule(
        "global_batch",
        lambda terms, rows: rows.micro_batch * rows.micro_batches * rows.data == terms.global_batch,
        lambda terms, row: (
            f"micro_batch {row.micro_batch} x micro_batches {row.micro_batches} x data {row.data} = "
            f"{row.micro_batch * row.micro_batches * row.data} sequences, but global_batch is {terms.global_batch}"
        ),
    ),
    Rule(
        "tensor_in_node",
        lambda terms, rows: terms.devices_per_node % rows.tensor == 0,
        lambda terms, row: (
            f"devices_per_node {terms.devices_per_node} / tensor {row.tensor} = {terms.devices_per_node / row.tensor:.4g} "
            "groups a node: tensor parallelism stays inside a node, so tensor must divide devices_per_node"
        ),
    ),
    Rule(
        "heads",
        lambda terms, rows: terms.shape.num_attention_heads % rows.tensor == 0,
        lambda terms, row: (
            f"num_attention_heads {terms.shape.num_attention_heads} / tensor {row.tensor} = "
            f"{terms.shape.num_attention_heads / row.tensor:.4g} heads a device: tensor must divide the heads"
        ),
    ),
    Rule(
        # Megatron-Core would replicate fewer groups than ranks; the runtime has not been shown equal to one process there.
        "query_groups",
        lambda terms, rows: terms.shape.num_query_groups % rows.tensor == 0,
        lambda terms, row: (
            f"num_query_groups {terms.shape.num_query_groups} / tensor {row.tensor} = "
            f"{terms.shape.num_query_groups / row.tensor:.4g} key and value heads a device: tensor must divide them"
        ),
    ),
    Rule(
        "ffn",
        lambda terms, rows: terms.shape.ffn_hidden_size % rows.tensor == 0,
        lambda terms, row: (
            f"ffn_hidden_size {terms.shape.ffn_hidden_size} / tensor {row.tensor} = "
            f"{terms.shape.ffn_hidden_size / row.tensor:.4g} columns a device: tensor must divide the FFN"
        ),
    ),
    Rule(
        "layers",
        lambda terms, rows: terms.shape.num_layers % (rows.pipeline * rows.virtual_pipeline) == 0,
        lambda terms, row: (
            f"num_layers {terms.shape.num_layers} / (pipeline {row.pipeline} x virtual_pipeline {row.virtual_pipeline}) = "
            f"{terms.shape.num_layers / (row.pipeline * row.virtual_pipeline):.4g} layers a chunk: they must divide evenly"
        ),
    ),
    Rule(
        "interleaving",
        lambda _, rows: (
            (rows.virtual_pipeline == 1) | ((rows.pipeline > 1) & (rows.micro_batches % rows.pipeline == 0))
        ),
        lambda _, row: (
            f"virtual_pipeline {row.virtual_pipeline} with pipeline {row.pipeline} and {row.micro_batches} micro-batches: "
            "interleaving needs pipeline > 1 and micro-batches that are a multiple of pipeline"
        ),
    ),
    Rule(
        "sequence",
        lambda terms, rows: (
            terms.context_length % (rows.context * np.where(rows.sequence_parallel, rows.tensor, 1)) == 0
        ),
        lambda terms, row: (
            f"context_length {terms.context_length} / (context {row.context} x tensor {row.tensor} with sequence_parallel) = "
            f"{terms.context_length / (row.context * row.tensor):.4g} tokens a device: they must divide evenly"
        ),
    ),
    Rule(
        "sequence_parallel",
        lambda _, rows: ~rows.sequence_parallel | (rows.tensor > 1),
        lambda _, row: f"sequence_parallel splits over tensor, and tensor is {row.tensor}: it needs tensor > 1",
    ),
    Rule(
        "experts",
        lambda terms, rows: (
            (max(terms.shape.num_experts, 1) % rows.expert == 0) & (rows.data * rows.context % rows.expert == 0)
        ),
        lambda terms, row: (
            f"expert {row.expert} must divide num_experts {terms.shape.num_experts} and data {row.data} x context {row.context}"
        ),
    ),
    Rule(
        "vocabulary",
        lambda terms, rows: (
            (rows.padded_vocab_size >= terms.shape.vocab_size) & (rows.padded_vocab_size % rows.tensor == 0)
        ),
        lambda terms, row: (
            f"padded_vocab_size {row.padded_vocab_size} must be at least vocab_size {terms.shape.vocab_size} and a multiple of "
            f"tensor {row.tensor}"
        ),
    ),
    Rule(
        "shape",
        lambda terms, rows: (
            (
                terms.shape.num_attention_heads % terms.shape.num_query_groups == 0
                and terms.shape.experts_per_token <= terms.shape.num_experts
            )
            & _ones(rows)
        ),
        lambda terms, _: (
            f"num_query_groups {terms.shape.num_query_groups} must divide num_attention_heads "
            f"{terms.shape.num_attention_heads}, and experts_per_token {terms.shape.experts_per_token} be at most num_experts "
            f"{terms.shape.num_experts}"
        ),
    ),
)


def legal_rows(terms: Terms, layouts: Layouts) -> Bools:
    """Which rows break no rule."""
    legal = _ones(layouts)
    for rule in RULES:
        legal &= rule.holds(terms, layouts)
    return legal


def list_violations(terms: Terms, layouts: Layouts, index: int) -> list[str]:
    """Every rule that one row breaks, as `name: arithmetic`."""
    one = layouts.take(np.array([index]))
    row = one.row(0)
    return [f"{rule.name}: {rule.message(terms, row)}" for rule in RULES if not rule.holds(terms, one)[0]]


def check_plan(plan: Plan) -> list[str]:
    """Every rule that a plan breaks; empty when it is legal."""
    terms = Terms(
        shape=plan.shape,
        context_length=plan.training.context_length,
        global_batch=plan.training.global_batch,
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
