"""Any combination of acceptable values ends in a legal plan that emits, or in one error of the user's: never in a traceback."""

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.errors import CompileError
from trainwright.compiler.facts import load_devices, load_families
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import read_plan, write_plan
from trainwright.compiler.resolve import resolve_spec

SPECS = Path(__file__).resolve().parents[1] / "specs"
# "" takes the pin away. Edges on purpose: what no sensible person writes is what nobody tried.
VALUES = {
    "model.family": tuple(load_families()),
    "model.size": ("100k", "1M", "300M", "7B", "70B", "1T", "8x7B", ""),
    "model.context_length": ("16", "17", "100", "8192", "1000000", ""),
    "model.precision": ("bf16", "fp32", ""),
    "model.vocab_size": ("261", "2048", "50257", "2000000", ""),
    "data.tokens": ("1M", "2.9M", "1.4T", "1e16", ""),
    "training.global_batch": ("1 sequences", "7 sequences", "1 tokens", "4M tokens", ""),
    "training.learning_rate": ("1e-9", "10", ""),
    "training.min_learning_rate": ("0", "5", ""),
    "training.warmup": ("0 steps", "1e9 steps", "3%", "100%", ""),
    "training.schedule": ("constant", "cosine", "wsd", ""),
    "training.decay": ("0%", "100%", "1 steps", "1e9 steps", ""),
    "scaling.learning_rate": ("step_law", "deepseek_llm", "porian2024", "bjorck2024", "ludziejewski2025", "mup", ""),
    "scaling.batch": ("step_law", "deepseek_llm", "porian2024", "kaplan2020", ""),
    "scaling.mup": ("{hidden_size: 8, learning_rate: 10, init_std: 10}", ""),
    "compute.device": tuple(load_devices()),
    "compute.nodes": ("1", "2", "3", "32", "1000", "55440"),
    "compute.devices_per_node": ("1", "2", "5", "8", "840"),
    "compute.budget": ("1 s", "3 days", "$1", "$2M", "6e23 FLOPs", "1e30 FLOPs", "0.01 device-hours", ""),
    "cluster.price": ("$2/device-hour", ""),
    "layout.tensor": ("1", "2", "3", "16", ""),
    "layout.pipeline": ("1", "2", "7", ""),
    "layout.data": ("1", "4", "256", ""),
    "layout.micro_batch": ("1", "3", "65536", ""),
    "layout.recompute": ("selective", "full", ""),
    "layout.layer_spec": ("local", "transformer_engine", ""),
    "stages": (
        "{ingest: {}}",
        "{pretrain: {}}",
        "{tokenizer: {}, p: {kind: pretrain}}",
        "{sft: {from: ./base, data: a.jsonl}, export: {}}",
        "{pretrain: {}, dpo: {data: a.jsonl}, sft: {from: dpo, data: b.jsonl}, evaluate: {compare: [dpo]}}",
    ),
    "stages.sft.global_batch": ("1 sequences", "7 sequences", "1 tokens", "4M tokens", ""),
    "stages.sft.learning_rate": ("1e-9", "10", ""),
    "stages.sft.min_learning_rate": ("0", "5", ""),
    "stages.sft.warmup": ("0%", "100%", ""),
    "stages.sft.from": ("pretrain", "sft", "./base", "dpo", ""),
    "stages.sft.epochs": ("1", "1000", ""),
    "stages.evaluate": (
        "{}",
        "{from: ./base}",
        "{gates: {perplexity: 40}}",
        "{compare: [sft]}",
        "{tasks: {mc: {data: q.jsonl}}}",
    ),
    "stages.curate.near_duplicates": ("0", "1", "0.5", ""),
    "stages.curate.scrub": ("[]", "[ip]", ""),
    "layout.context": ("1", "2", "3", ""),
    "layout.virtual_pipeline": ("1", "2", ""),
    "layout.expert": ("1", "2", ""),
    "layout.last_stage_layers": ("1", "5", ""),
    "layout.recompute_layers": ("2", ""),
    "layout.gradient_dtype": ("bf16", ""),
    "layout.fp8": ("hybrid", "none"),
    "layout.fsdp": ("optim_grads", "none"),
    "training.optimizer": ("lion", "muon", "adamw"),
    "training.balancing": ("bias", "aux_loss", "none", ""),
    "training.ramp": ("{start: 8, increment: 8, tokens: 1M}", "{start: 7, increment: 3, tokens: 1M}", ""),
    "model.positions": ("alibi", "learned", "rope", ""),
    "model.mtp_layers": ("1", "0", ""),
    "data.sources[0].filters": ("prose", "code", "none", ""),
}
OVERRIDES = st.dictionaries(st.sampled_from(sorted(VALUES)), st.integers(0, 100), min_size=1, max_size=6).map(
    lambda chosen: tuple(f"{path}={VALUES[path][index % len(VALUES[path])]}" for path, index in sorted(chosen.items()))
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(preset=st.sampled_from(["tiny", "one_node", "many_nodes"]), overrides=OVERRIDES)
def test_any_combination_is_a_legal_plan_or_one_error(preset: str, overrides: tuple[str, ...]) -> None:
    try:
        plan = choose_plan(resolve_spec(load_spec(SPECS / f"{preset}.yaml", overrides)))
        bundle = emit_bundle(plan)
    except CompileError:
        return
    assert check_plan(plan) == []
    assert plan.overrides == overrides
    layout, cluster = plan.layout, plan.cluster
    assert layout.tensor * layout.pipeline * layout.context * layout.data == cluster.nodes * cluster.devices_per_node
    assert plan.estimates.memory.total <= plan.estimates.memory.capacity
    assert read_plan(write_plan(plan)) == plan
    assert bundle.files["plan.json"] == write_plan(plan).encode()
