"""The table of legality: each rule refuses what it should, with its arithmetic, over columns and over a plan."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose import choose_plan
from trainwright.compiler.estimate.layouts import one_layout
from trainwright.compiler.facts import find_family
from trainwright.compiler.layout_rules import RULES, Terms, legal_rows, list_violations
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Layout, Plan
from trainwright.compiler.resolve import resolve_spec

TERMS = Terms(
    shape=find_family("llama").published["8B"], context_length=8192, global_batch=512, nodes=4, devices_per_node=8
)
LATENT = {"shape": {"kv_lora_rank": 512}}
MIXTURE = {"shape": {"num_experts": 8, "experts_per_token": 2, "expert_ffn_hidden_size": 14336}}
ON_INPUT = {"shape": MIXTURE["shape"] | {"router_on_input": True, "router_score": "sigmoid"}}
ONE_EXPERT = {"shape": MIXTURE["shape"] | {"experts_per_token": 1, "router_score": "softmax"}}
PAIRS = {"recompute": "full", "recompute_method": "uniform", "recompute_layers": 2}
LEGAL = Layout(
    tensor=4,
    pipeline=2,
    virtual_pipeline=1,
    context=1,
    expert=1,
    data=4,
    micro_batch=2,
    micro_batches=64,
    sequence_parallel=True,
    distributed_optimizer=True,
    recompute="none",
    padded_vocab_size=128256,
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    spec = Path(__file__).resolve().parents[1] / "specs" / "many_nodes.yaml"
    return choose_plan(resolve_spec(load_spec(spec, ())))


def test_a_legal_layout_breaks_nothing() -> None:
    assert list_violations(TERMS, one_layout(LEGAL), 0) == []
    assert legal_rows(TERMS, one_layout(LEGAL)).tolist() == [True]


@pytest.mark.parametrize(
    ("rule", "terms", "changes", "arithmetic"),
    [
        ("devices", {}, {"data": 2}, "tensor 4 x pipeline 2 x context 1 x data 2 = 16 devices, but nodes 4 x devices_per_node 8"),
        ("global_batch", {}, {"micro_batch": 3}, "micro_batch 3 x micro_batches 64 x data 4 = 768 sequences, but global_batch"),
        ("ramp", {"batch_unit": 4}, {}, "multiple of 4 sequences, which micro_batch 2 x data 4 = 8 must divide"),
        ("tensor_in_node", {}, {"tensor": 16}, "devices_per_node 8 / tensor 16 = 0.5 groups a node"),
        ("heads", {}, {"tensor": 3}, "num_attention_heads 32 / tensor 3 = 10.67 heads a device"),
        ("query_groups", {}, {"tensor": 16}, "num_query_groups 8 / tensor 16 = 0.5 key and value heads a device"),
        ("ffn", {}, {"tensor": 3}, "ffn_hidden_size 14336 / tensor 3 = 4779 columns a device"),
        ("layers", {}, {"pipeline": 3}, "num_layers 32 / (pipeline 3 x virtual_pipeline 1) = 10.67 layers a chunk"),
        ("layers", {}, {"virtual_pipeline": 32}, "num_layers 32 / (pipeline 2 x virtual_pipeline 32) = 0.5 layers a chunk"),
        ("interleaving", {}, {"pipeline": 1, "virtual_pipeline": 2}, "virtual_pipeline 2 with pipeline 1 and 64 micro-batches"),
        ("interleaving", {}, {"virtual_pipeline": 2, "micro_batches": 63}, "virtual_pipeline 2 with pipeline 2 and 63"),
        ("sequence", {"context_length": 8190}, {}, "8190 / (1 chunks of context 1 x 4 tensor ranks with sequence_parallel)"),
        ("sequence_parallel", {}, {"tensor": 1}, "sequence_parallel splits over tensor, and tensor is 1"),
        ("experts", {}, {"expert": 2}, "expert 2 must divide num_experts 0 (0: a dense model), and expert 2 x expert_tensor"),
        ("experts", MIXTURE, {"expert": 8, "expert_tensor": 4}, "expert 8 x expert_tensor 4 the devices of a pipeline stage"),
        ("expert_tensor", MIXTURE, {"expert_tensor": 3}, "expert_ffn_hidden_size 14336 / expert_tensor 3 = 4779"),
        ("experts_and_sequence", MIXTURE, {"sequence_parallel": False}, "a mixture with tensor 4 needs sequence_parallel"),
        ("latent_and_sequence", LATENT, {"sequence_parallel": False}, "latent attention with tensor 4 needs sequence_parallel"),
        ("router", ON_INPUT, {}, "experts_per_token 2: the family multiplies the input of a token's one expert by its score"),
        ("router", ONE_EXPERT, {}, "experts_per_token 1: the family's softmax over the chosen experts is 1"),
        ("mtp_and_no_rope", {"shape": {"mtp_layers": 1, "no_rope_every": 4}}, {}, "layers without positions (every 4)"),
        ("mtp_and_recompute", {"shape": {"mtp_layers": 1}}, PAIRS, "mtp_layers 1 with recompute_layers 2"),
        ("mtp_and_context", {"shape": {"mtp_layers": 1}}, {"context": 2}, "mtp_layers 1 with context 2"),
        ("layers", {}, {"embedding_as_layer": True}, "32 + 1 for the embedding / (pipeline 2 x virtual_pipeline 1) = 16.5"),
        ("layers", {}, {"first_stage_layers": 32}, "first_stage_layers 32 - last_stage_layers 0 = 0 on the 1 other"),
        ("stages", {}, {"first_stage_layers": 16, "loss_as_layer": True}, "stages are uneven either by stated numbers"),
        ("stages", {}, {"pipeline": 1, "last_stage_layers": 8}, "last_stage_layers 8, embedding_as_layer False, loss_as_layer"),
        ("recompute", {}, {"recompute": "full"}, "recompute full with recompute_modules none, recompute_method none"),
        ("recompute", {}, {"recompute_modules": ("mlp",)}, "recompute none with recompute_modules mlp"),
        ("recompute_modules", {}, {"recompute": "selective", "recompute_modules": ("moe",)}, "this model has core_attn, layer"),
        ("sequence", {"context_length": 8200}, {"context": 2}, "8200 / (4 chunks of context 2 x 4 tensor ranks with"),
        ("vocabulary", {}, {"padded_vocab_size": 128000}, "padded_vocab_size 128000 must be at least vocab_size 128256"),
        ("vocabulary", {}, {"padded_vocab_size": 128258}, "a multiple of tensor 4"),
        ("shape", {"shape": {"num_query_groups": 12}}, {}, "num_query_groups 12 must divide num_attention_heads 32"),
    ],
)  # fmt: skip
def test_each_rule_prints_its_arithmetic(rule: str, terms: dict, changes: dict, arithmetic: str) -> None:
    shared = replace(TERMS, **(terms | {"shape": replace(TERMS.shape, **terms.get("shape", {}))}))
    table = one_layout(replace(LEGAL, **changes))
    messages = [message for message in list_violations(shared, table, 0) if message.startswith(f"{rule}: ")]
    assert len(messages) == 1
    assert arithmetic in messages[0]
    assert not legal_rows(shared, table)[0]


def test_every_rule_is_broken_above() -> None:
    marks = test_each_rule_prints_its_arithmetic.pytestmark
    tried = {case[0] for mark in marks if mark.name == "parametrize" for case in mark.args[1]}
    assert tried == {rule.name for rule in RULES}


def test_all_violations_are_listed_of_the_row_asked_for() -> None:
    good, bad = one_layout(LEGAL), one_layout(replace(LEGAL, tensor=3, pipeline=5))
    both = type(good)(**{name: np.concatenate([getattr(good, name), getattr(bad, name)]) for name in vars(good)})
    assert legal_rows(TERMS, both).tolist() == [True, False]
    assert list_violations(TERMS, both, 0) == []
    broken = [message.split(":")[0] for message in list_violations(TERMS, both, 1)]
    assert broken == ["devices", "tensor_in_node", "heads", "query_groups", "ffn", "layers", "sequence"]


def test_a_chosen_plan_is_legal_and_a_changed_one_is_not(plan: Plan) -> None:
    assert check_plan(plan) == []
    fewer = replace(plan, cluster=replace(plan.cluster, nodes=plan.cluster.nodes - 1))
    assert [message.split(":")[0] for message in check_plan(fewer)] == ["devices"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_step": 1}, "tokens_per_step: global_batch 512 x context_length 8192 = 4194304, but tokens_per_step is 1"),
        ({"warmup_steps": 10**9}, "warmup_steps: 1000000000 must be at least 0 and below steps 333786"),
        ({"schedule": "wsd", "decay_style": "minus_sqrt", "decay_steps": 332_000}, "decay_steps: warmup_steps 2000 + decay"),
        ({"decay_steps": 10}, "schedule: cosine with decay_steps 10 and decay_style none: wsd, and wsd alone, has a decay"),
        ({"schedule": "wsd"}, "schedule: wsd with decay_steps 0 and decay_style none: wsd, and wsd alone, has a decay"),
        ({"min_learning_rate": 1.0}, "min_learning_rate: 1.0 must be between 0 and learning_rate 0.0003"),
    ],
)  # fmt: skip
def test_training_leaves_must_agree(plan: Plan, changes: dict, message: str) -> None:
    violations = check_plan(replace(plan, training=replace(plan.training, **changes)))
    assert len(violations) == 1
    assert violations[0].startswith(message)


def test_tuning_batches_and_rates_must_agree(plan: Plan) -> None:
    (sft,) = plan.sft
    given = replace(sft.training, global_batch=100, micro_batch=3, min_learning_rate=1.0)
    assert check_plan(replace(plan, sft=(replace(sft, training=given),))) == [
        "sft: global_batch 100 / (micro_batch 3 x data 128) = 0.2604 micro-batches: they must be whole",
        "sft: min_learning_rate 1.0 must be between 0 and learning_rate 5e-06",
    ]


def test_a_gate_is_about_what_its_stage_measures() -> None:
    spec = Path(__file__).resolve().parents[1] / "specs" / "tiny.yaml"
    plan = choose_plan(resolve_spec(load_spec(spec, ())))
    (evaluate,) = plan.evaluate
    assert check_plan(plan) == []
    other = replace(evaluate.gates[0], metric="accuracy/other")
    (message,) = check_plan(replace(plan, evaluate=(replace(evaluate, gates=(other,)),)))
    assert message.startswith("evaluate: the gate accuracy/other is about none of perplexity, ")
    assert message.endswith(", accuracy/python-summaries")


def test_a_leaf_without_a_reason_is_a_violation(plan: Plan) -> None:
    reasons = {path: reason for path, reason in plan.reasons.items() if path != "layout.tensor"}
    assert check_plan(replace(plan, reasons=reasons)) == ["reasons: layout.tensor has none"]
