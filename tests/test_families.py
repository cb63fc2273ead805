"""Model families: published sizes counted exactly, and sizes that nobody published planned and compiled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan, read_plan
from trainwright.compiler.resolve import resolve_spec

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")
# The reference's names of the models whose parameters were counted, and ours.
PUBLISHED = {
    "llama-65b": ("llama1", "65B"),
    "llama2-7b": ("llama2", "7B"),
    "llama2-13b": ("llama2", "13B"),
    "llama2-70b": ("llama2", "70B"),
    "llama3-8b": ("llama", "8B"),
    "llama3-70b": ("llama", "70B"),
    "llama3-405b": ("llama", "405B"),
    "mixtral-8x7b": ("mixtral", "8x7B"),
    "mixtral-8x22b": ("mixtral", "8x22B"),
    "qwen2.5-7b": ("qwen2", "7B"),
    "qwen2.5-32b": ("qwen2", "32B"),
    "qwen3-8b": ("qwen3", "8B"),
    "qwen3-30b-a3b": ("qwen3_moe", "30B-A3B"),
    "qwen3-235b-a22b": ("qwen3_moe", "235B-A22B"),
    "llama4-scout": ("llama4", "scout"),
    "llama4-maverick": ("llama4", "maverick"),
    "deepseek-v2": ("deepseek_v2", "236B"),
    "deepseek-v3": ("deepseek_v3", "671B"),
    "kimi-k2": ("kimi_k2", "1T"),
    "moonlight-16b-a3b": ("moonlight", "16B-A3B"),
}
SPEC = """\
name: family
model: {{family: {family}, size: {size}{more}}}
data: {{sources: [{{name: prose, connector: 'python-stdlib:prose'}}], tokens: {tokens}}}
compute: {{device: {device}, nodes: {nodes}, devices_per_node: {devices}}}
training: {{global_batch: {batch} sequences}}
stages: {{pretrain: {{}}}}
"""


def write_spec(folder: Path, family: str, size: str, *, tiny: bool = False) -> Path:
    path = folder / f"{family}-{size}.yaml"
    large = {"more": "", "tokens": "100B", "device": "h100-sxm-80gb", "nodes": 512, "devices": 8, "batch": 8192}
    more = ", vocab_size: 2048, context_length: 512"
    small = {"more": more, "tokens": "10M", "device": "cpu", "nodes": 1, "devices": 2, "batch": 16}
    path.write_text(SPEC.format(family=family, size=size, **(small if tiny else large)))
    return path


def make_plan(spec: Path) -> Plan:
    return choose_plan(resolve_spec(load_spec(spec, ())))


def test_the_names_are_those_of_the_reference(reference: Path) -> None:
    models = YAML(typ="safe").load((reference / "models.yaml").read_text())
    assert PUBLISHED.keys() == {name for name, model in models.items() if "parameters" in model}


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_a_published_size_has_the_published_parameters(model: str, reference: Path, tmp_path: Path) -> None:
    published = YAML(typ="safe").load((reference / "models.yaml").read_text())[model]
    plan = make_plan(write_spec(tmp_path, *PUBLISHED[model]))
    assert plan.shape.vocab_size == published["vocab"]
    assert plan.estimates.parameters == published["parameters"]
    padding = plan.layout.padded_vocab_size - plan.shape.vocab_size
    assert 0 <= padding < 128 * plan.layout.tensor
    matrices = 1 if plan.shape.tied_embeddings else 2
    assert plan.estimates.padded_parameters == published["parameters"] + matrices * padding * plan.shape.hidden_size
    # The reference counts the active ones without norms.
    assert plan.estimates.active_parameters == pytest.approx(published["active_params_b"] * 1e9, rel=5e-4)


def test_both_counts_stand_in_the_json(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "gpt3", "1.3B")
    done = subprocess.run([TRAINWRIGHT, "plan", spec, "--json"], capture_output=True, text=True, check=True)
    estimates = json.loads(done.stdout)["estimates"]
    assert 0 < estimates["padded_parameters"] - estimates["parameters"] < 128 * 8 * 8192
    assert read_plan(done.stdout).estimates.parameters == estimates["parameters"]


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("deepseek_v2", "10M"),
        ("deepseek_v3", "3M"),
        ("gemma", "20M"),
        ("kimi_k2", "5M"),
        ("llama4", "20M"),
        ("mixtral", "3M"),
        ("moonlight", "5M"),
        ("qwen2", "3M"),
        ("qwen3_moe", "5M"),
    ],
)
def test_a_size_that_nobody_published_is_near_and_compiles(family: str, size: str, tmp_path: Path) -> None:
    plan = make_plan(write_spec(tmp_path, family, size, tiny=True))
    wanted = float(size.removesuffix("M")) * 1e6
    assert plan.estimates.parameters == pytest.approx(wanted, rel=0.35)  # mixtures of many experts come in coarse steps
    program = emit_bundle(plan).files["05_pretrain.py"].decode()
    assert ("num_moe_experts=" in program) == (plan.shape.num_experts > 0)
    assert ("MLATransformerConfig(" in program) == (plan.shape.kv_lora_rank > 0)
