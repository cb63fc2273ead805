"""Rehearsals: whatever is planned shrinks to something legal that keeps its kinds of layers and its layout; one is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan
from trainwright.compiler.rehearsal import write_rehearsal
from trainwright.compiler.rehearse import rehearse
from trainwright.compiler.resolve import resolve_spec

TRAINWRIGHT = str(Path(sys.executable).with_name("trainwright"))
SPEC = """\
name: large
model: {{{model}, context_length: 4096}}
data:
  sources:
    - {{name: web, path: 'corpus/*.jsonl', weight: 3}}
    - {{name: code, path: 'code/*.jsonl', weight: 1, filters: code}}
  tokens: 1T
training: {{global_batch: 1024 sequences, learning_rate: 1e-4{training}}}
compute: {{device: h100, nodes: {nodes}, devices_per_node: 8}}
layout: {{{layout}}}
stages:
  pretrain: {{}}
  sft: {{data: 'chat/*.jsonl'}}
  dpo: {{data: 'pairs/*.jsonl', nll: 0.2}}
  evaluate: {{compare: [pretrain], tasks: {{quiz: {{data: quiz.jsonl}}}}, gates: {{accuracy/quiz: 0.3}}}}
"""
DENSE = "tensor: 8, pipeline: 4, virtual_pipeline: 5, recompute: full, recompute_method: block, recompute_layers: 2"
PLANS = {
    "dense, interleaved": ("family: llama, size: 70B", DENSE, ", schedule: wsd", 64),
    "uneven": ("family: llama, size: 405B", "tensor: 8, pipeline: 16", "", 256),
    "mixture": ("family: mixtral, size: 8x7B", "tensor: 2, pipeline: 4, expert: 8, context: 2", "", 16),
    "latent": ("family: deepseek_v3, size: 671B, mtp_layers: 1", "tensor: 4, pipeline: 16, expert: 64", "", 256),
    "biases": (
        "family: gpt3, size: 175B",
        "tensor: 8, pipeline: 8, recompute: selective, recompute_modules: [mlp]",
        "",
        64,
    ),
    "no positions": ("family: llama4, size: 400B", "tensor: 8, pipeline: 4, expert: 32", "", 64),
    "tied": ("family: qwen3, size: 0.6B", "tensor: 2", ", optimizer: lion, balancing: none", 1),
}


def planned(folder: Path, name: str) -> Plan:
    model, layout, training, nodes = PLANS[name]
    training = training.replace(", balancing: none", "")
    (folder / "spec.yaml").write_text(SPEC.format(model=model, layout=layout, training=training, nodes=nodes))
    return choose_plan(resolve_spec(load_spec(folder / "spec.yaml", ())))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_what_is_planned_shrinks_and_keeps_its_kinds(tmp_path: Path, name: str, processes: int) -> None:
    plan = planned(tmp_path, name)
    made = rehearse(plan, tmp_path, processes)
    small = choose_plan(resolve_spec(load_spec(write_rehearsal(made, tmp_path / "rehearsal"), ())))
    assert check_plan(small) == []
    emit_bundle(small)
    assert small.cluster.devices_per_node <= processes
    assert small.training.steps == 20
    degrees = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data")
    kept = [degree for degree in degrees if getattr(small.layout, degree) > 1]
    assert all(getattr(plan.layout, degree) > 1 for degree in kept)
    said = [change.what for change in made.changes]
    assert all(f"layout.{degree}" in said for degree in degrees if getattr(plan.layout, degree) > 2)
    if processes == 8:
        wanted = [degree for degree in ("pipeline", "tensor", "expert") if getattr(plan.layout, degree) > 1]
        assert set(wanted) <= set(kept)
    for field in ("recompute", "recompute_method", "recompute_modules"):
        assert getattr(small.layout, field) == getattr(plan.layout, field)
    for field in (
        "gated",
        "activation",
        "normalization",
        "positions",
        "qk_norm",
        "no_rope_every",
        "moe_every",
        "router_bias",
    ):
        assert getattr(small.shape, field) == getattr(plan.shape, field)
    for field in (
        "num_experts",
        "kv_lora_rank",
        "q_lora_rank",
        "mtp_layers",
        "shared_ffn_hidden_size",
        "first_dense_layers",
    ):
        assert (getattr(small.shape, field) > 0) == (getattr(plan.shape, field) > 0), field
    assert [stage.name for stage in small.stages] == [stage.name for stage in plan.stages]
    assert (small.training.schedule, small.training.optimizer) == (plan.training.schedule, plan.training.optimizer)
    assert "stages.evaluate.gates" in said


def test_data_are_the_users_own_where_they_are_there(tmp_path: Path) -> None:
    plan = planned(tmp_path, "tied")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"text": "' + "word " * 100 + '"}\n' * 1)
    (tmp_path / "corpus" / "b.jsonl").write_text(('{"text": "' + "word " * 100 + '"}\n') * 5000)
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "a.jsonl").write_text('{"messages": []}\n' * 500)
    made = rehearse(plan, tmp_path, 2)
    assert 1_900_000 < len(made.samples["web.jsonl"]) <= 2_000_000
    assert made.samples["sft.jsonl"].count(b"\n") == 100
    web, code = made.spec["data"]["sources"]
    assert (web["path"], web["weight"]) == ("web.jsonl", 0.75)
    assert code["connector"] == "python-stdlib:code"
    said = {change.what: str(change) for change in made.changes}
    assert "nothing is there" in said["data.sources.code"]
    assert said["stages.dpo.data"] == "stages.dpo.data: pairs/*.jsonl -> 100 made-up records (nothing is there)"


@pytest.mark.full
def test_a_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    """About 100 s."""
    spec = SPEC.format(model=PLANS["tied"][0], layout="tensor: 2", training="", nodes=1)
    (tmp_path / "spec.yaml").write_text(spec)
    for command in (
        ["compile", "spec.yaml", "-o", "bundle"],
        ["dry-run", "bundle", "--only", "evaluate", "--rehearse"],
    ):
        done = subprocess.run(
            [TRAINWRIGHT, *command], cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal in bundle-rehearsal: every stage, small, on 4 CPU processes; not kept:" in done.stdout
    for stage in ("ingest", "curate", "tokenizer", "tokenize", "pretrain", "sft", "dpo", "evaluate"):
        assert (tmp_path / "bundle-rehearsal" / "bundle" / "work" / stage / "output" / "summary.json").is_file()
