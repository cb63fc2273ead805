"""Programs of every family and layout, as emitted: Megatron-Core builds their configs, and the runtime finds no contradiction."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle, not_emitted
from trainwright.compiler.export_rules import foreign_to_export
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan
from trainwright.compiler.plan_stages import Export
from trainwright.compiler.resolve import resolve_spec
from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron import huggingface
from trainwright.runtime.megatron.model_files import describe
from trainwright.runtime.megatron.parallel import check_model
from trainwright.runtime.megatron.platform import Literals, Platform, current
from trainwright.runtime.stages import pretrain

# Megatron-Core, of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")

SPEC = """\
name: x
model: {model}
data: {{sources: [{{name: prose, connector: 'python-stdlib:prose'}}], tokens: {tokens}}}
compute: {compute}
training: {training}
layout: {layout}
stages: {{pretrain: {{}}}}
"""
SMALL = "vocab_size: 2048, context_length: 512"
EIGHT_LAYERS = "shape: {num_layers: 8, hidden_size: 128, ffn_hidden_size: 384, num_attention_heads: 4}"
CPUS, H100S = "{{device: cpu, nodes: 1, devices_per_node: {0}}}", "{device: h100, nodes: 64, devices_per_node: 8}"
SIXTEEN = "{global_batch: 16 sequences}"
# What is asked for: model, devices, training, layout; and fields of the config that follow.
PROGRAMS: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "gpt3": (f"{{family: gpt3, size: 5M, {SMALL}}}", CPUS.format(2), SIXTEEN, "{}", {"add_bias_linear": True}),
    "alibi": (f"{{family: gpt3, size: 5M, {SMALL}, positions: alibi}}", CPUS.format(2), SIXTEEN, "{}", {}),
    "gemma": (
        f"{{family: gemma, size: 20M, {SMALL}}}",
        CPUS.format(2),
        SIXTEEN,
        "{}",
        {"layernorm_zero_centered_gamma": True},
    ),
    "qwen2": (f"{{family: qwen2, size: 3M, {SMALL}}}", CPUS.format(2), SIXTEEN, "{}", {"add_qkv_bias": True}),
    "mixtral": (
        f"{{family: mixtral, size: 3M, {SMALL}}}",
        CPUS.format(4),
        SIXTEEN,
        "{expert: 2, expert_tensor: 2, tensor: 2}",
        {"num_moe_experts": 8, "expert_model_parallel_size": 2, "moe_layer_freq": [1, 1]},
    ),
    "llama4": (
        f"{{family: llama4, size: 20M, {SMALL}}}",
        CPUS.format(2),
        SIXTEEN,
        "{expert: 2}",
        {"moe_apply_probs_on_input": True, "qk_l2_norm": True},
    ),
    "deepseek_v3": (
        f"{{family: deepseek_v3, size: 5M, {SMALL}}}",
        CPUS.format(2),
        SIXTEEN,
        "{expert: 2}",
        {"moe_router_enable_expert_bias": True, "moe_router_num_groups": 8, "multi_latent_attention": True},
    ),
    "interleaved": (
        f"{{family: llama, {EIGHT_LAYERS}, {SMALL}}}",
        CPUS.format(8),
        SIXTEEN,
        "{tensor: 2, pipeline: 2, virtual_pipeline: 2, micro_batch: 1}",
        {"virtual_pipeline_model_parallel_size": 2, "batch_p2p_comm": False},
    ),
    "context": (
        f"{{family: llama, {EIGHT_LAYERS}, {SMALL}}}",
        CPUS.format(4),
        SIXTEEN,
        "{tensor: 2, context: 2}",
        {"context_parallel_size": 2},
    ),
    "405B": (
        "{family: llama, size: 405B}",
        "{device: h100, nodes: 2048, devices_per_node: 8}",
        "{}",
        "{}",
        {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
    ),
    "671B": ("{family: deepseek_v3, size: 671B}", H100S.replace("64", "512"), "{}", "{}", {"num_moe_experts": 256}),
    "fp8": (
        "{family: llama, size: 8B}",
        H100S,
        "{}",
        "{fp8: hybrid, fp8_recipe: tensorwise}",
        {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    ),
    "fsdp": ("{family: llama, size: 8B}", H100S, "{}", "{fsdp: optim_grads_params}", {}),
    "trained otherwise": (
        f"{{family: llama, size: 3M, {SMALL}}}",
        CPUS.format(2),
        "{global_batch: 16 sequences, optimizer: lion, hidden_dropout: 0.1, ramp: {start: 4, increment: 4, tokens: 100k}}",
        "{gradient_dtype: bf16, recompute: full, recompute_method: block}",
        {"hidden_dropout": 0.1, "recompute_method": "block"},
    ),
}


def make_plan(folder: Path, name: str) -> Plan:
    model, compute, training, layout, _ = PROGRAMS[name]
    tokens = "10M" if "cpu" in compute else "100B"
    spec = folder / "spec.yaml"
    spec.write_text(SPEC.format(model=model, compute=compute, training=training, layout=layout, tokens=tokens))
    return choose_plan(resolve_spec(load_spec(spec, ())))


def run_to_the_verb(source: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an emitted program hands to `pretrain.run`."""
    handed: dict[str, Any] = {}
    monkeypatch.setattr(pretrain, "run", lambda **given: handed.update(given))
    exec(compile(source, "05_pretrain.py", "exec"), {"__name__": "__main__"})
    return handed


@pytest.mark.parametrize("name", PROGRAMS)
def test_configs_are_built_and_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, name)
    handed = run_to_the_verb(emit_bundle(plan).files["05_pretrain.py"].decode(), monkeypatch)
    config, wanted = handed["model"], PROGRAMS[name][-1]
    assert {field: getattr(config, field) for field in wanted} == wanted
    assert config.num_layers == plan.shape.num_layers
    assert handed["parallel"].world_size == plan.cluster.nodes * plan.cluster.devices_per_node
    embedding = handed["embedding"]
    check_model(
        handed["parallel"],
        config,
        sequence_length=embedding.sequence_length,
        padded_vocab_size=embedding.padded_vocab_size,
    )
    if name == "fsdp":
        assert handed["ddp"].use_megatron_fsdp
        assert handed["ddp"].data_parallel_sharding_strategy == "optim_grads_params"


def test_a_config_that_cannot_be_is_one_message(tmp_path: Path) -> None:
    source = emit_bundle(make_plan(tmp_path, "context")).files["05_pretrain.py"].decode()
    program = tmp_path / "05_pretrain.py"
    program.write_text(source.replace("num_attention_heads=4", "num_attention_heads=5"))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == Unsupported.exit_code
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: a config of the program cannot be built: num_attention_heads (5) must be a multiple of"
    )


EXPORTS = {
    "llama": "Llama",
    "llama1": "Llama",
    "gpt3": "GPT2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "deepseek_v3": "DeepseekV3",
    "moonlight": "DeepseekV3",
    "gemma": "",
    "llama4": "",
    "deepseek_v2": "",
}


@pytest.mark.parametrize("family", EXPORTS)
def test_the_compiler_refuses_what_the_runtime_cannot_export(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both name the same format, and the same of a model that has no place in it."""
    spec = tmp_path / "spec.yaml"
    model = f"{{family: {family}, size: 20M, {SMALL}}}"
    spec.write_text(SPEC.format(model=model, compute=CPUS.format(1), training=SIXTEEN, layout="{}", tokens="10M"))
    plan = choose_plan(resolve_spec(load_spec(spec, ())))
    handed = run_to_the_verb(emit_bundle(plan).files["05_pretrain.py"].decode(), monkeypatch)
    described = describe(handed["model"], handed["embedding"])
    nearest, foreign = foreign_to_export(plan.shape, plan.training)
    if EXPORTS[family]:
        assert (nearest, foreign) == (EXPORTS[family], [])
        assert huggingface.format_of(described).name == nearest
        assert not_emitted(replace(plan, export=(Export("export", 1e-4),))) == []
        return
    with pytest.raises(Unsupported) as caught:
        huggingface.format_of(described)
    assert f"the model has {', '.join(foreign)}: Hugging Face's {nearest} format" in str(caught.value)
    [refusal] = not_emitted(replace(plan, export=(Export("export", 1e-4),)))
    assert f"stages.export: {family} has {', '.join(foreign)}: of the Hugging Face formats {nearest} is" in refusal


def test_an_initial_model_gives_weights_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "spec.yaml"
    model = f"{{family: llama, {EIGHT_LAYERS}, {SMALL}, initial: models/tiny}}"
    spec.write_text(SPEC.format(model=model, compute=CPUS.format(1), training=SIXTEEN, layout="{}", tokens="10M"))
    plan = choose_plan(resolve_spec(load_spec(spec, ())))
    bundle = emit_bundle(plan)
    handed = run_to_the_verb(bundle.files["05_pretrain.py"].decode(), monkeypatch)
    assert handed["initial"] == pretrain.Initial(path="models/tiny")
    assert 'initial="models/tiny",' in bundle.files["03_tokenizer.py"].decode()
    reading = {stage.name for stage in bundle.manifest.stages if "models/tiny" in stage.inputs}
    assert reading == {"tokenizer", "pretrain"}
    other = choose_plan(resolve_spec(load_spec(spec, ("model.initial=models/other",))))
    assert other.run_id != plan.run_id


def test_a_cpu_leaves_8_bit_floats_out_and_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def literals(name: str) -> Literals:
        source = emit_bundle(make_plan(tmp_path, name)).files["05_pretrain.py"].decode()
        handed = run_to_the_verb(source, monkeypatch)
        return Literals(handed["model"], handed["ddp"], handed["optimizer"], handed["layer_spec"])

    here: Platform = current()
    used, overrides = here.adapt(literals("fp8"))
    assert used.model.fp8 is None
    assert "model.fp8='hybrid' -> None" in here.describe(overrides)
    with pytest.raises(Unsupported, match=r"use_megatron_fsdp=True.*leave layout\.fsdp out of the spec"):
        here.adapt(literals("fsdp"))
