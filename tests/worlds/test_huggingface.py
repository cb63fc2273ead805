"""Hugging Face models, real ones of `transformers`, as Megatron-Core's GPTModel, and back: same logits, same tensors."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
from safetensors.torch import load_file, save_file
from world_support import model, parallel, platform, run_world

from trainwright.runtime.errors import CheckpointError, Unsupported
from trainwright.runtime.megatron import huggingface
from trainwright.runtime.megatron.canonical import load_canonical
from trainwright.runtime.megatron.loop import forward_logits
from trainwright.runtime.megatron.model_files import (
    SavedModel,
    describe,
    differences,
    files_of,
    read_model,
    write_model,
)
from trainwright.runtime.megatron.weight_files import INDEX, WEIGHTS, WeightReader
from trainwright.runtime.stages.export_check import open_transformers
from trainwright.runtime.stages.export_folder import write_weights
from trainwright.runtime.step_folders import is_canonical

TOKENS = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(5))
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,  # at which 8,192 positions, Llama 3's old context, are far from all of a head's waves
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
DEEPSEEK = {
    **SHAPE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SHAPE, "head_dim": 24, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama3": ("LlamaConfig", {**SHAPE, "rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {**SHAPE, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3Config", {**SHAPE, "head_dim": 32}),
    "mixtral": ("MixtralConfig", {**SHAPE, "num_local_experts": 4, "tie_word_embeddings": False}),
    "qwen3 moe": ("Qwen3MoeConfig", {**SHAPE, **QWEN_EXPERTS, "norm_topk_prob": True}),
    "qwen3 moe with a dense layer, not renormalised": (
        "Qwen3MoeConfig",
        {**SHAPE, **QWEN_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
    "deepseek": ("DeepseekV3Config", DEEPSEEK),
    "deepseek with full queries and one group": (
        "DeepseekV3Config",
        {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 300}),
    "gpt2 with exact gelu, untied": (
        "GPT2Config",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "n_inner": 96,
            "vocab_size": 300,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
}


@dataclass(frozen=True)
class Theirs:
    """A model of `transformers`, saved."""

    folder: Path
    logits: torch.Tensor  # [tokens, vocabulary]


def save(folder: Path, kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Theirs:
    """A model whose tensors are all random, and large enough that each has a say in the logits."""
    transformers = open_transformers()
    built = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in [*built.named_parameters(), *built.named_buffers()]:
            if "inv_freq" in name:
                continue
            mean, spread = (1.0, 0.2) if tensor.dim() == 1 and name.endswith("weight") else (0.0, 0.1)
            tensor.copy_(mean + spread * torch.randn(tensor.shape, generator=generator))
    built.to(dtype).save_pretrained(folder)
    return Theirs(folder, read_logits(folder))


def read_logits(folder: Path) -> torch.Tensor:
    loaded, info = open_transformers().AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        logits: torch.Tensor = loaded.eval()(TOKENS[None]).logits[0]
    return logits


def ignore(done: int, total: int) -> None:
    return None


def build_saved(saved: SavedModel, **more: Any) -> model.Model:
    """One process's GPTModel of what a model.json says."""
    kind = MLATransformerConfig if saved.config.get("multi_latent_attention") else TransformerConfig
    config = kind(**{**saved.config, "hidden_dropout": 0.0, "attention_dropout": 0.0, **more})
    here = parallel.start(parallel.Parallel(), seed=1)
    used, _ = here.adapt(platform.Literals(config, None, None, "local"))
    return model.build_frozen(used, saved.embedding, here)


def through_megatron(theirs: Theirs, work: Path) -> tuple[float, list[str]]:
    """Import, load, compare; export again to `work`/back. Returns (largest difference of logits, fields described
    otherwise by the GPTModel than by the import)."""
    canonical = work / "canonical"
    huggingface.import_folder(theirs.folder, canonical, ignore)

    def read() -> tuple[float, list[str]]:
        saved = read_model(canonical)
        built = build_saved(saved)
        load_canonical(built, canonical)
        distance = float((forward_logits(built, TOKENS) - theirs.logits).abs().max())
        described = describe(built.config, built.embedding)
        back = work / "back"
        back.mkdir()
        format = huggingface.format_of(described)
        reader = WeightReader(canonical)
        dtype = reader.read("decoder.final_layernorm.weight").dtype
        write_weights(back, huggingface.named_weights(reader.read, format, described), dtype)
        config = {"architectures": [format.architecture], "model_type": format.model_type, **format.config(described)}
        (back / "config.json").write_text(json.dumps(config))
        parallel.stop()
        return distance, differences(saved, described)

    return run_world(1, read)[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_and_goes_as_it_is(name: str, tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs", *MODELS[name])
    distance, unlike = through_megatron(theirs, tmp_path)
    print(f"{name}: logits differ by {distance:.1e} in GPTModel, largest {theirs.logits.abs().max():.1f}")
    assert theirs.logits.std() > 0.3
    assert distance <= 1e-4
    assert unlike == []
    assert is_canonical(tmp_path / "canonical")
    before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert float((read_logits(tmp_path / "back") - theirs.logits).abs().max()) <= 1e-5


def test_what_multiplies_the_logits_is_exported_in_the_output_layer(tmp_path: Path) -> None:
    """Of a model that was trained under muP."""
    theirs = save(tmp_path / "theirs", *MODELS["llama3"])
    canonical = tmp_path / "canonical"
    huggingface.import_folder(theirs.folder, canonical, ignore)
    saved = read_model(canonical)
    saved = replace(saved, embedding=replace(saved.embedding, output_multiplier=0.25))
    write_model(canonical, saved)

    def export() -> torch.Tensor:
        built = build_saved(saved)
        load_canonical(built, canonical)
        logits = forward_logits(built, TOKENS)
        format = huggingface.format_of(saved)
        back = tmp_path / "back"
        back.mkdir()
        write_weights(back, huggingface.named_weights(WeightReader(canonical).read, format, saved), torch.float32)
        config = {"architectures": [format.architecture], "model_type": format.model_type, **format.config(saved)}
        (back / "config.json").write_text(json.dumps(config))
        return logits

    [logits] = run_world(1, export)
    assert float((logits - theirs.logits / 4).abs().max()) <= 1e-4
    assert float((read_logits(tmp_path / "back") - logits).abs().max()) <= 1e-4
    with pytest.raises(
        Unsupported, match=r"the model has logits x 0\.25 \(muP\) with an output layer that is the embedding"
    ):
        huggingface.format_of(replace(saved, embedding=replace(saved.embedding, tied=True)))


def test_bf16_and_many_files(tmp_path: Path) -> None:
    """In bf16 each tensor stays what it is, to the bit, and large models come in several files."""
    theirs = save(tmp_path / "theirs", "Qwen2Config", SHAPE, torch.bfloat16)
    weights = load_file(theirs.folder / WEIGHTS)
    names = sorted(weights)
    (theirs.folder / WEIGHTS).unlink()
    files = {f"model-{part + 1:05d}-of-00003.safetensors": names[part::3] for part in range(3)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, theirs.folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (theirs.folder / INDEX).write_text(json.dumps(index))
    distance, unlike = through_megatron(theirs, tmp_path)
    assert (distance <= 1e-4, unlike) == (True, [])
    after = load_file(tmp_path / "back" / WEIGHTS)
    assert after.keys() == weights.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(after[name], weights[name]) for name in names)


def test_weights_of_the_bare_model_with_old_buffers(tmp_path: Path) -> None:
    """As GPT-2's own checkpoint is on the hub: without the prefix, with the causal masks."""
    theirs = save(tmp_path / "theirs", *MODELS["gpt2"])
    weights = {name.removeprefix("transformer."): value for name, value in load_file(theirs.folder / WEIGHTS).items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(weights, theirs.folder / WEIGHTS)
    assert through_megatron(theirs, tmp_path) == (pytest.approx(0.0, abs=1e-4), [])


def test_rope_scaling_is_felt(tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs", *MODELS["llama3"])
    path = theirs.folder / "config.json"
    config = json.loads(path.read_text())
    scaling = config.pop("rope_parameters")
    old = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}  # as transformers 4 wrote it
    path.write_text(json.dumps(config | old))
    assert through_megatron(theirs, tmp_path) == (pytest.approx(0.0, abs=1e-4), [])
    path.write_text(json.dumps(config | {"rope_theta": 10_000.0}))
    (tmp_path / "unscaled").mkdir()
    assert through_megatron(theirs, tmp_path / "unscaled")[0] > 1e-3


def test_the_tokenizer_and_the_chat_template_come_along(tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs", *MODELS["llama"])
    (theirs.folder / "tokenizer.json").write_text('{"model": {}}')
    (theirs.folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    seen: list[tuple[int, int]] = []
    huggingface.import_folder(theirs.folder, tmp_path / "canonical", lambda done, total: seen.append((done, total)))
    files = files_of(tmp_path / "canonical")
    assert (files.tokenizer.read_text(), files.chat_template) == ('{"model": {}}', "{{ messages }}")
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"model_type": "mamba"},
            Unsupported,
            "holds a model of the type mamba, and those that are read are Llama, Qwen2,",
        ),
        (
            {"hidden_act": "gelu", "attention_bias": True},
            Unsupported,
            "llama. says hidden_act gelu; attention_bias, which",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            Unsupported,
            "says the RoPE scaling .*'yarn'.*, which",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, Unsupported, "says quantization_config, which"),
        ({"num_hidden_layers": None}, CheckpointError, "does not say 'num_hidden_layers': copy the folder anew"),
        (
            {"num_hidden_layers": 3},
            CheckpointError,
            r"lacks model\.layers\.2\.input_layernorm\.weight, .* and 6 more of the 30 tensors that a Llama model of its",
        ),
        (
            {"num_hidden_layers": 1},
            CheckpointError,
            r"holds model\.layers\.1\..* and 6 more beside the 12 tensors of a Llama",
        ),
    ],
)
def test_what_cannot_be_read_is_one_message(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    theirs = save(tmp_path / "theirs", "LlamaConfig", SHAPE)
    path = theirs.folder / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(
        json.dumps({name: value for name, value in config.items() if value is not None or name not in change})
    )
    with pytest.raises(error, match=message) as caught:
        huggingface.import_folder(theirs.folder, tmp_path / "canonical", ignore)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "canonical").exists()


def test_files_that_are_no_model_are_one_message(tmp_path: Path) -> None:
    theirs = save(tmp_path / "theirs", "LlamaConfig", SHAPE)
    whole = (theirs.folder / WEIGHTS).read_bytes()
    (theirs.folder / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*: copy it anew"):
        huggingface.import_folder(theirs.folder, tmp_path / "canonical", ignore)
    (theirs.folder / WEIGHTS).rename(theirs.folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"but config\.json, .*pytorch_model\.bin: weights of other formats are not read"
    ):
        huggingface.import_folder(theirs.folder, tmp_path / "canonical", ignore)
    (theirs.folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no config of a model"):
        huggingface.read_folder(theirs.folder)


def test_gelu_means_what_the_kernel_computes() -> None:
    """Megatron-Core's fused kernel of F.gelu is the tanh approximation: a CPU, which has no fused one, computes the same."""

    def check() -> tuple[str, bool]:
        saved = huggingface.FORMATS[-1].model(dict(MODELS["gpt2"][1]) | {"model_type": "gpt2"})
        fields = {**saved.config, "activation_func": torch.nn.functional.gelu}
        written = TransformerConfig(**fields, bias_activation_fusion=True, hidden_dropout=0.0, attention_dropout=0.0)
        here = parallel.start(parallel.Parallel(), seed=1)
        used, overrides = here.adapt(platform.Literals(written, None, None, "local"))
        described = [describe(config, saved.embedding) for config in (written, used.model)]
        return ", ".join(map(str, overrides)), described == [saved, saved]

    [(overrides, same)] = run_world(1, check)
    assert "model.activation_func='gelu' -> 'fast_gelu'" in overrides
    assert same
