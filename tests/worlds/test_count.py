"""Parameters counted without their memory: those of published models, and of small ones as they are trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from ruamel.yaml import YAML
from world_support import FAMILIES, Case, build, literals, model, parallel, run_world

from trainwright.runtime.megatron.count import count_whole

SLOW = ("deepseek-v2", "kimi-k2", "qwen3-235b-a22b")  # 3 to 6 s each: tens of thousands of modules


def published_config(name: str, entry: dict[str, Any]) -> Any:
    """Megatron-Core's config of a model of models.yaml."""
    fields: dict[str, Any] = {
        "num_layers": entry["layers"],
        "hidden_size": entry["hidden"],
        "ffn_hidden_size": entry["ffn"],
        "num_attention_heads": entry["heads"],
        "normalization": "RMSNorm",
        "gated_linear_unit": entry["gated"],
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": name.startswith("qwen2.5"),
        "qk_layernorm": name.startswith("qwen3") or "mla" in entry,
    }
    if experts := entry.get("moe"):
        first, every = experts["dense_first_layers"], experts.get("moe_every", 1)
        fields |= {
            "num_moe_experts": experts["num_experts"],
            "moe_router_topk": experts["topk"],
            "moe_router_pre_softmax": True,
            "moe_router_dtype": "fp32",
            "moe_ffn_hidden_size": experts["moe_ffn"],
            "moe_shared_expert_intermediate_size": experts["shared_ffn"] or None,
            "moe_layer_freq": [int(number >= first and (number + 1) % every == 0) for number in range(entry["layers"])],
        }
        if name in ("deepseek-v3", "kimi-k2"):  # their experts' bias is a buffer
            fields |= {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    if latent := entry.get("mla"):
        return MLATransformerConfig(
            **fields,
            q_lora_rank=latent["q_lora_rank"],
            kv_lora_rank=latent["kv_lora_rank"],
            qk_head_dim=latent["qk_nope_dim"],
            qk_pos_emb_head_dim=latent["qk_rope_dim"],
            v_head_dim=latent["v_dim"],
        )
    return TransformerConfig(**fields, num_query_groups=entry["kv_heads"], kv_channels=entry["head_dim"])


def check_published(reference: Path, *, slow: bool) -> int:
    entries = YAML(typ="safe").load(reference / "models.yaml")
    published = {name: entry for name, entry in entries.items() if "parameters" in entry and (name in SLOW) is slow}

    def count() -> dict[str, int]:
        counted = {}
        for name, entry in published.items():
            size, vocabulary = 4096, entry["vocab"]
            embedding = model.Embedding(vocabulary, vocabulary, size, "rope", 10_000, entry["tied"])
            counted[name] = count_whole(published_config(name, entry), embedding)
        return counted

    assert run_world(1, count)[0] == {name: entry["parameters"] for name, entry in published.items()}
    return len(published)


def test_published_models_have_the_parameters_of_their_checkpoints(reference: Path) -> None:
    assert check_published(reference, slow=False) >= 17


@pytest.mark.full
def test_large_published_models_have_the_parameters_of_their_checkpoints(reference: Path) -> None:
    """About 15 s."""
    assert check_published(reference, slow=True) == len(SLOW)


def test_a_layout_does_not_change_the_count_and_it_is_that_of_the_trained_model() -> None:
    def count() -> list[tuple[str, int, int, int]]:
        found = []
        for family in FAMILIES:
            whole = model.count_parameters(build(Case(family=family)))
            experts = {"data": 2, "expert": 2} if "num_moe_experts" in FAMILIES[family] else {}
            cut = Case(family=family, tensor=2, pipeline=2, **experts)
            counted = [count_whole(*_program(case)) for case in (Case(family=family), cut)]
            found.append((family, whole, *counted))
            parallel.stop()
        return found

    for family, whole, *counted in run_world(1, count)[0]:
        assert counted == [whole, whole], family


def _program(case: Case) -> tuple[Any, model.Embedding]:
    written, embedding = literals(case)
    return written.model, embedding
