"""What the plan says of each program, device by device, sums up to what it says of the whole model and step."""

import numpy as np
import pytest

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.estimate.layouts import one_layout
from trainwright.compiler.estimate.placement import chunks_of, is_mixture, layers_on
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan, RankEstimate
from trainwright.compiler.resolve import resolve_spec

SPEC = """\
name: sums
model: {{{model}, context_length: 4096, vocab_size: 128000}}
data: {{sources: [{{name: web, path: 'corpus/*.jsonl'}}], tokens: 1T}}
training: {{global_batch: 512 sequences, learning_rate: 1e-4}}
compute: {{device: b200, nodes: {nodes}, devices_per_node: 8}}
layout: {{{layout}}}
stages: {{pretrain: {{}}, sft: {{data: chat.jsonl}}, dpo: {{data: pairs.jsonl}}, evaluate: {{}}}}
"""
MODULES = "recompute: selective, recompute_modules: [core_attn, moe, mla_up_proj]"
PLANS = {
    "dense": ("family: llama, size: 8B", "tensor: 4, pipeline: 2", 4),
    "interleaved, layers stand in": ("family: llama, size: 405B", "tensor: 8, pipeline: 8, virtual_pipeline: 8", 32),
    "uneven, full recompute": ("family: llama, size: 70B", "pipeline: 7, data: 8, tensor: 8, recompute: full", 56),
    "by blocks": (
        "family: llama, size: 70B",
        "pipeline: 4, recompute: full, recompute_method: block, recompute_layers: 5",
        16,
    ),
    "tied": ("family: qwen3, size: 4B", "pipeline: 2, context: 2", 2),
    "mixture": ("family: qwen3_moe, size: 30B-A3B", "tensor: 2, pipeline: 4, expert: 8", 8),
    "latent, predicting further": (
        "family: deepseek_v3, size: 671B, mtp_layers: 1",
        f"tensor: 4, pipeline: 16, expert: 16, {MODULES}",
        64,
    ),
    "learned positions": ("family: gpt3, size: 175B", "tensor: 8, pipeline: 8, recompute: selective", 32),
}


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    model, layout, nodes = PLANS[request.param]
    path = tmp_path_factory.mktemp("sums") / "spec.yaml"
    path.write_text(SPEC.format(model=model, layout=layout, nodes=nodes))
    return choose_plan(resolve_spec(load_spec(path, ())))


def devices(plan: Plan) -> int:
    """Of one pipeline rank."""
    return plan.layout.tensor * plan.layout.context * plan.layout.data


def ranks(plan: Plan, stage: str) -> list[RankEstimate]:
    """One a pipeline rank."""
    (program,) = (program for program in plan.estimates.programs if program.stage == stage)
    return [rank for rank in program.ranks for _ in range(rank.first, rank.last + 1)]


def test_modules_are_all_of_a_rank_and_ranks_all_of_the_pipeline(plan: Plan) -> None:
    assert [program.stage for program in plan.estimates.programs] == ["pretrain", "sft", "dpo", "evaluate"]
    for program in plan.estimates.programs:
        assert [rank.first for rank in program.ranks] == [0, *(rank.last + 1 for rank in program.ranks[:-1])]
        assert program.ranks[-1].last == plan.layout.pipeline - 1
        for rank in program.ranks:
            assert rank.parameters == sum(part.parameters for part in rank.modules)
            assert rank.flops == sum(part.flops for part in rank.modules)


def test_all_devices_execute_what_a_step_takes(plan: Plan) -> None:
    executed = devices(plan) * sum(rank.flops for rank in ranks(plan, "pretrain"))
    assert executed == pytest.approx(plan.estimates.executed_flops_per_step, rel=1e-5), "it is rounded to 6 digits"


def test_devices_hold_the_model_once_and_copies_that_are_known(plan: Plan) -> None:
    """Latent attention's projections down, routers and norms are on every tensor rank; experts are laid out anew."""
    layout, shape = plan.layout, plan.shape
    if shape.mtp_layers:
        return  # experts are in the module mtp too
    held = ranks(plan, "pretrain")
    experts = sum(part.parameters for rank in held for part in rank.modules if part.module == "experts")
    total = experts * layout.expert * layout.expert_tensor
    total += layout.tensor * (sum(rank.parameters for rank in held) - experts)
    model = plan.estimates.padded_parameters
    assert model <= total
    copies = total - model
    vocabulary = layout.padded_vocab_size * shape.hidden_size
    if layout.tensor == 1:
        second_table = shape.tied_embeddings and layout.pipeline > 1
        assert copies == vocabulary * second_table
    else:
        assert copies < 0.05 * model


def test_static_bytes_are_those_of_zero_1(plan: Plan) -> None:
    """Rajbhandari et al. 2020, section 5.1: 2 bytes of a bf16 weight, 4 of its gradient, 12 shared out to the replicas."""
    layout = plan.layout
    for rank in ranks(plan, "sft"):
        assert (rank.parameter_bytes, rank.gradient_bytes) == (2 * rank.parameters, 4 * rank.parameters)
        experts = sum(part.parameters for part in rank.modules if part.module == "experts")
        if not plan.shape.mtp_layers:  # there too
            replicas = layout.data * layout.context
            of_experts = layout.tensor * replicas // (layout.expert * layout.expert_tensor)
            shard = (rank.parameters - experts) / replicas + experts / of_experts
            assert rank.optimizer_bytes == pytest.approx(12 * shard, rel=1e-4)
    for rank in ranks(plan, "evaluate"):
        assert rank.gradient_bytes == rank.optimizer_bytes == 0


def test_rows_of_a_pair_execute_twice_those_of_a_conversation(plan: Plan) -> None:
    (sft,), (dpo,) = ([one.training for one in tuned] for tuned in (plan.sft, plan.dpo))
    for conversation, pair in zip(ranks(plan, "sft"), ranks(plan, "dpo"), strict=True):
        assert pair.flops * sft.global_batch == 2 * conversation.flops * dpo.global_batch


def test_chunks_hold_every_layer_once(plan: Plan) -> None:
    layout, shape = plan.layout, plan.shape
    chunks = [chunks_of(shape.num_layers, layout, rank) for rank in range(layout.pipeline)]
    in_order = [layer for chunk in range(layout.virtual_pipeline) for of_rank in chunks for layer in of_rank[chunk]]
    assert in_order == list(range(shape.num_layers))
    if layout.virtual_pipeline == 1:  # what estimates of many layouts at once say
        table = one_layout(layout)
        for rank, (of_rank,) in enumerate(chunks):
            held = layers_on(shape, table, np.array([rank]))
            mixtures = sum(is_mixture(shape, layer) for layer in of_rank)
            assert (held.all[0], held.mixtures[0]) == (len(of_rank), mixtures)


def test_remedies_need_less_memory(plan: Plan) -> None:
    changes = [remedy.change.partition(":")[0] for remedy in plan.estimates.remedies]
    assert changes == [name for name in ("recompute", "pipeline", "micro_batch") if name in changes], "in this order"
    for remedy in plan.estimates.remedies:
        assert 0 < remedy.memory_bytes < plan.estimates.memory.total
        assert remedy.step_s > 0
    if plan.layout.recompute == "full":
        assert "recompute" not in changes
