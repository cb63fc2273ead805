"""Published results that the formulas must reproduce: tests/published/*.yaml, and the reference folder's where there is one.

`python benchmarks/published.py` prints the same claims as a table.
"""

from pathlib import Path
from typing import Any

import pytest
from benchmark_modules import load_benchmark
from reference_tables import scaling_rows
from ruamel.yaml import YAML

from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import PLAIN
from trainwright.compiler.plan import Shape

CLAIMS = load_benchmark("published").load_claims()


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.claim for claim in CLAIMS])
def test_claim(claim: Any) -> None:
    assert claim.source
    assert abs(claim.error) <= claim.tolerance + 1e-12, f"computed {claim.computed}, published {claim.published}"


def test_parameter_counts_of_reference_models(reference: Path) -> None:
    """Every model whose exact count the reference states and whose parts a Shape can say (no latent or shared experts)."""
    models = YAML(typ="safe", pure=True).load((reference / "models.yaml").read_text())
    stated = {name: raw for name, raw in models.items() if "parameters" in raw and _is_plain(raw)}
    assert len(stated) >= 14
    counts = {name: count_parameters(_shape_of(name, raw), 0) for name, raw in stated.items()}
    assert counts == {name: raw["parameters"] for name, raw in stated.items()}


def test_flops_of_reference_models(reference: Path) -> None:
    """Megatron's FLOPs a token of Qwen2.5-7B and of a 100M model with a large untied vocabulary (no family has their shapes)."""
    rows = {row["model"]: float(row["megatron"]) for row in scaling_rows(reference, "flops_accounting")}
    qwen = _dense("qwen2.5-7b", 28, 3584, 18944, 28, 4, 152064)
    tiny = _dense("tiny", 10, 640, 2560, 10, 10, 50304, gated=False)
    assert model_flops_per_token(qwen, 4096) == rows["Qwen2.5-7B"]
    assert model_flops_per_token(tiny, 1024) == rows["tiny 100M (d640 L10 V50304)"]


def _is_plain(raw: dict[str, Any]) -> bool:
    experts = raw.get("moe", {"shared_ffn": 0, "dense_first_layers": 0})
    return "mla" not in raw and not experts["shared_ffn"] and not experts["dense_first_layers"]


def _shape_of(name: str, raw: dict[str, Any]) -> Shape:
    experts = raw.get("moe", {"num_experts": 0, "topk": 0, "moe_ffn": 0})
    return Shape(
        family=name,
        num_layers=raw["layers"],
        hidden_size=raw["hidden"],
        ffn_hidden_size=raw["ffn"],
        num_attention_heads=raw["heads"],
        num_query_groups=raw["kv_heads"],
        head_dim=raw["head_dim"],
        vocab_size=raw["vocab"],
        gated=raw["gated"],
        activation="silu",
        normalization="LayerNorm" if raw.get("norm", "").startswith("layernorm") else "RMSNorm",
        norm_epsilon=1e-5,
        positions=raw.get("pos", "rope"),
        rotary_base=10000,
        tied_embeddings=raw["tied"],
        linear_bias=raw.get("bias", False),
        qkv_bias=name.startswith("qwen2"),
        qk_norm=name.startswith("qwen3"),
        num_experts=experts["num_experts"],
        experts_per_token=experts["topk"],
        expert_ffn_hidden_size=experts["moe_ffn"],
        router_score="softmax" if experts["num_experts"] else "none",
        **PLAIN,
    )


def _dense(
    name: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, *, gated: bool = True
) -> Shape:
    keys = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied", "gated")
    return _shape_of(
        name, dict(zip(keys, (layers, hidden, ffn, heads, groups, hidden // heads, vocab, False, gated), strict=True))
    )
