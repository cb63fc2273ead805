"""Draws plans and shadows their programs: `python tests/shadow_many.py SEED COUNT PLATFORM LAYER_SPEC FOLDER`.

A line of JSON for each rank: what was drawn, and where shadow and plan disagree. One process imports torch and Megatron-Core once
and forks for every rank; `trainwright dry-run` itself, which starts anew each time, is tested elsewhere.
"""

import contextlib
import faulthandler
import io
import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.errors import CompileError
from trainwright.compiler.load import load_spec
from trainwright.compiler.resolve import resolve_spec
from trainwright.runtime.dry_run.compare import compare
from trainwright.runtime.dry_run.planned import read_planned
from trainwright.runtime.manifest import read_record
from trainwright.runtime.shadow import child
from trainwright.runtime.shadow.result import RankResult

DENSE = ("llama", "gemma", "gpt3", "qwen3", "qwen2")
LATENT = ("deepseek_v2", "deepseek_v3")
MIXTURES = ("llama4", "mixtral", "qwen3_moe", *LATENT)
PATIENCE_S = 60


def draw(rng: random.Random, platform: str, layer_spec: str) -> dict[str, Any]:
    """A spec; not every one is legal."""
    family = rng.choice((*DENSE, *MIXTURES))
    tensor, pipeline = rng.choice([1, 1, 2, 4]), rng.choice([1, 1, 2, 4])
    context, data = rng.choice([1, 1, 1, 2]), rng.choice([1, 2, 4])
    devices = {"device": "cpu" if platform == "cpu" else "h100", "nodes": 1}
    sequences = 8 * data * rng.choice([1, 2, 3])
    return {
        "name": "drawn",
        "model": _model(rng, family),
        "data": {"sources": [{"name": "docs", "path": "corpus/*.jsonl"}], "tokens": "100M"},
        "training": {"global_batch": f"{sequences} sequences", "learning_rate": 1e-3},
        "compute": {**devices, "devices_per_node": tensor * pipeline * context * data},
        "layout": {
            "tensor": tensor,
            "pipeline": pipeline,
            "context": context,
            "layer_spec": layer_spec,
            **_layout(rng, family, tensor, pipeline),
        },
        "stages": {"pretrain": {}, "sft": {"data": "a.jsonl"}, "dpo": {"data": "b.jsonl"}, "evaluate": {}},
    }


def _model(rng: random.Random, family: str) -> dict[str, Any]:
    heads = rng.choice([4, 8])
    shape = {
        "num_layers": rng.choice([4, 6, 8]),
        "hidden_size": rng.choice([128, 256]),
        "ffn_hidden_size": rng.choice([256, 384]),
        "num_attention_heads": heads,
        "head_dim": rng.choice([32, 64]),
    }
    if family not in LATENT:
        shape["num_query_groups"] = rng.choice([heads, heads // 2, 4])
    else:
        shape |= {"kv_lora_rank": 64, "q_lora_rank": rng.choice([0, 96]), "qk_rope_head_dim": 16}
        shape["v_head_dim"] = rng.choice([32, 64])
    model: dict[str, Any] = {"family": family, "shape": shape, "context_length": rng.choice([128, 256])}
    model |= {"vocab_size": rng.choice([1000, 2048]), "precision": rng.choice(["bf16", "fp32"])}
    if family in MIXTURES:
        shape |= {"experts_per_token": rng.choice([1, 2]), "expert_ffn_hidden_size": 128}
        shape |= {"first_dense_layers": rng.choice([0, 1, 2]), "shared_ffn_hidden_size": rng.choice([0, 128])}
        model["num_experts"] = 8
    if rng.random() < 0.25:
        model["mtp_layers"] = rng.choice([1, 2])
    if rng.random() < 0.15:
        model["positions"] = rng.choice(["learned", "none"])
    return model


def _layout(rng: random.Random, family: str, tensor: int, pipeline: int) -> dict[str, Any]:
    layout: dict[str, Any] = {"micro_batch": rng.choice([1, 2])}
    if pipeline > 1 and rng.random() < 0.4:
        layout["virtual_pipeline"] = 2
    elif pipeline > 1 and rng.random() < 0.3:
        layout["last_stage_layers"] = rng.choice([1, 2])
    if family in MIXTURES:
        layout |= {"expert": rng.choice([1, 2, 4]), "expert_tensor": rng.choice([1, 1, 2])}
    mode = rng.random()
    if mode < 0.25:
        layout["recompute"] = "full"
        if rng.random() < 0.5:
            layout |= {"recompute_method": "block", "recompute_layers": 1}
    elif mode < 0.6:
        modules = ["core_attn", "mlp", "layernorm", *(["moe", "shared_experts", "moe_act"] * (family in MIXTURES))]
        modules += ["mla_up_proj"] * (family in LATENT)
        layout |= {"recompute": "selective", "recompute_modules": rng.sample(modules, rng.choice([1, 2]))}
    if tensor > 1 and rng.random() < 0.2:
        layout["sequence_parallel"] = False
    if rng.random() < 0.2:
        layout["distributed_optimizer"] = False
    return layout


def compile_into(folder: Path, spec: dict[str, Any]) -> None:
    """Raises CompileError."""
    folder.mkdir()
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    plan = choose_plan(resolve_spec(load_spec(folder / "spec.yaml", ())))
    check_plan(plan)
    for name, text in emit_bundle(plan).files.items():
        (folder / name).write_bytes(text)


def in_fork(request: child.Request, rank: int) -> dict[str, Any]:
    """What the child process of a dry run answers for a rank."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
        with os.fdopen(writing, "w") as answers, contextlib.redirect_stdout(io.StringIO()):
            json.dump(child.shadow_rank(request, rank), answers)
            answers.flush()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    os.waitpid(process, 0)
    return json.loads(text) if text else {"error": f"no answer in {PATIENCE_S} s"}


def shadow_one(bundle: Path, platform: str, stage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is found of each distinct rank of a stage."""
    planned = read_planned(bundle)
    pipeline, world = planned.layout.pipeline, stage["nodes"] * stage["processes_per_node"]
    for number in sorted({0, pipeline // 2, pipeline - 1}):
        rank = number * (world // pipeline)
        request = child.Request(str(bundle / stage["program"]), stage["name"], stage["kind"], platform, world, (rank,))
        answer = in_fork(request, rank)
        found: dict[str, Any] = {"stage": stage["name"], "rank": rank, "error": answer.get("error", "")}
        if "result" in answer:
            result = read_record(RankResult, answer["result"])
            program = planned.program(stage["name"])
            assert program is not None
            row = program.rank(result.place.pipeline)
            assert row is not None
            found["differences"] = [str(one) for one in compare(result, row) if not one.agrees]
        yield found


def main() -> None:
    seed, count, platform, layer_spec, folder = sys.argv[1:]
    warnings.filterwarnings("ignore")
    child.set_up(platform, transformer_engine=layer_spec == "transformer_engine")
    rng = random.Random(int(seed))
    drawn = 0
    for number in range(50 * int(count)):
        spec, bundle = draw(rng, platform, layer_spec), Path(folder) / str(number)
        try:
            compile_into(bundle, spec)
        except CompileError:
            continue
        stages = [
            one for one in json.loads((bundle / "manifest.json").read_text())["stages"] if one["launcher"] == "torchrun"
        ]
        for found in shadow_one(bundle, platform, rng.choice([stages[0], *stages])):
            print(json.dumps(found | {"model": spec["model"], "layout": spec["layout"]}), flush=True)
        drawn += 1
        if drawn == int(count):
            break


if __name__ == "__main__":
    main()
