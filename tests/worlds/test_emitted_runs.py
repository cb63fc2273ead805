"""Spec in, trained model out, in every kind of layout: emitted programs run as they are, from one initial model.

The losses, gradient norms and held-out figures that a layout's run records are those of one process. Costs about two minutes
on two free cores.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from world_support import run_world

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.load import load_spec
from trainwright.compiler.resolve import resolve_spec

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore:full scope is deprecated")]

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")
LAYERS, HIDDEN, HEADS, GROUPS, FFN, VOCABULARY, CONTEXT, STEPS = 4, 64, 4, 2, 128, 512, 64, 6
SHAPE = f"num_layers: {LAYERS}, hidden_size: {HIDDEN}, ffn_hidden_size: {FFN}, num_attention_heads: {HEADS}"
SPEC = """\
name: layouts
model:
  {model}
  context_length: 64
  vocab_size: 512
  precision: fp32{initial}
data:
  sources:
    - {{name: first, path: 'first.jsonl', filters: none, weight: 0.7}}
    - {{name: second, path: 'second.jsonl', filters: none, weight: 0.3}}
  tokens: 3072
training: {{global_batch: 8 sequences, learning_rate: 3e-3, beta2: 0.95, weight_decay: 0.1{training}}}
compute: {{device: cpu, nodes: 1, devices_per_node: {devices}}}
layout: {layout}
stages: {{curate: {{near_duplicates: 0}}, pretrain: {{}}}}
"""
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "intermediate_size": FFN,
    "initializer_range": 0.08,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Kind:
    """A model, as the spec and as transformers say it, and what of it is trained otherwise."""

    model: str
    config: str
    fields: Mapping[str, Any]
    training: str = ""


KINDS = {
    "llama": Kind(
        f"family: llama2\n  shape: {{{SHAPE}, num_query_groups: {GROUPS}}}",
        "LlamaConfig",
        {"num_key_value_heads": GROUPS, "rope_theta": 10_000.0, "rms_norm_eps": 1e-5},
    ),
    "gpt": Kind(
        f"family: gpt3\n  shape: {{{SHAPE.replace(str(FFN), str(4 * HIDDEN))}}}",
        "GPT2Config",
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": CONTEXT,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": Kind(
        f"family: mixtral\n  num_experts: 4\n  shape: {{{SHAPE}, num_query_groups: {GROUPS}}}",
        "MixtralConfig",
        {
            "num_key_value_heads": GROUPS,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-5,
        },
    ),
}
# Kind, devices, layout. The first of each kind is the one process that the others are compared with.
RUNS: dict[str, tuple[str, int, str]] = {
    "llama on one": ("llama", 1, "{micro_batch: 2}"),
    "tensor x pipeline x data": ("llama", 8, "{tensor: 2, pipeline: 2, data: 2, micro_batch: 1}"),
    "context x tensor": ("llama", 4, "{context: 2, tensor: 2, micro_batch: 2}"),
    "interleaved": ("llama", 4, "{pipeline: 2, virtual_pipeline: 2, data: 2, micro_batch: 1}"),
    "uneven stages": ("llama", 2, "{pipeline: 2, first_stage_layers: 3, micro_batch: 2}"),
    "recomputed": (
        "llama",
        2,
        "{tensor: 2, recompute: full, recompute_method: block, recompute_layers: 2, micro_batch: 2}",
    ),
    "ordinary optimizer": ("llama", 2, "{data: 2, distributed_optimizer: false, micro_batch: 2}"),
    "gpt on one": ("gpt", 1, "{micro_batch: 2}"),
    "gpt, tied over stages": ("gpt", 4, "{tensor: 2, pipeline: 2, micro_batch: 2}"),
    "mixtral on one": ("mixtral", 1, "{micro_batch: 2}"),
    "experts x pipeline": ("mixtral", 4, "{expert: 2, pipeline: 2, data: 2, micro_batch: 2}"),
    "folded experts": ("mixtral", 4, "{tensor: 2, data: 2, expert: 2, expert_tensor: 2, micro_batch: 2}"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of two sources, and a bundle whose stages before pretraining are done."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, shift in (("first", 0), ("second", 7)):
        lines = (
            json.dumps(
                {
                    "id": str(n),
                    "text": "\n".join(f"{n + k} and {n * 31 % 997} make {(n + k) * shift}." for k in range(9)),
                }
            )
            for n in range(200)
        )
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "spec.yaml").write_text(
        SPEC.format(model=KINDS["llama"].model, initial="", training="", devices=1, layout="{micro_batch: 2}")
    )
    write_bundle(folder / "spec.yaml", folder / "prepared")
    for stage in ("ingest", "curate", "tokenizer", "tokenize"):
        command = [TRAINWRIGHT, "run", folder / "prepared", "--only", stage, "--data-root", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


def write_bundle(spec: Path, bundle: Path) -> None:
    bundle.mkdir()
    for name, content in emit_bundle(choose_plan(resolve_spec(load_spec(spec, ())))).files.items():
        (bundle / name).write_bytes(content)


def save_initial(kind: Kind, folder: Path) -> None:
    """A model of random weights, as transformers saves it."""
    import transformers

    torch.manual_seed(5)
    fields = kind.fields if kind.config == "GPT2Config" else COMMON | kind.fields
    config = getattr(transformers, kind.config)(**{"vocab_size": VOCABULARY, "initializer_range": 0.08, **fields})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, safe_serialization=True)


def run_program(project: Path, name: str) -> list[dict[str, float]]:
    """The rows that a run records, its program run as it is in a forked world."""
    which, devices, layout = RUNS[name]
    kind, place = KINDS[which], project / name.replace(" ", "-")
    place.mkdir()
    spec = place / "spec.yaml"
    spec.write_text(
        SPEC.format(
            model=kind.model, initial="\n  initial: initial", training=kind.training, devices=devices, layout=layout
        )
    )
    bundle = place / "bundle"
    write_bundle(spec, bundle)
    shutil.copytree(project / "prepared" / "work", bundle / "work")
    save_initial(kind, place / "initial")
    program = bundle / "05_pretrain.py"

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work() -> None:
        rank = dist.get_rank()
        dist.destroy_process_group()  # the program joins the processes itself, by torchrun's variables
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(devices))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TRAINWRIGHT_DATA_ROOT=str(place))
        sys.argv = [str(program)]
        exec(compile(program.read_text(), str(program), "exec"), {"__name__": "__main__"})
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for run_world to leave

    run_world(devices, work)
    return [json.loads(line) for line in (bundle / "work" / "pretrain" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(project: Path) -> dict[str, list[dict[str, float]]]:
    return {RUNS[name][0]: run_program(project, name) for name in RUNS if name.endswith("on one")}


@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith("on one")])
def test_a_layout_trains_as_one_process(
    name: str, project: Path, one_process: dict[str, list[dict[str, float]]]
) -> None:
    wanted, rows = one_process[RUNS[name][0]], run_program(project, name)
    assert len(rows) == len(wanted)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    same = [
        key for row in wanted for key in row if key in ("loss", "grad_norm") or key.startswith(("validation/", "test/"))
    ]
    assert {"loss", "grad_norm", "validation/first", "validation/second", "test/perplexity"} <= {*same}
    for row, expected in zip(rows, wanted, strict=True):
        for key in expected.keys() & {*same}:
            assert row[key] == pytest.approx(expected[key], rel=1e-4), (key, expected["step"])
    losses = [row["loss"] for row in wanted if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
