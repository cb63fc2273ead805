"""Dry runs as a user meets them: a spec is compiled, its bundle dry-run, and what is said of it compared with counts by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAINWRIGHT = str(Path(sys.executable).with_name("trainwright"))
# One device, two micro-batches of 4 sequences a step.
HAND = """\
name: hand
model:
  family: llama
  shape: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}
  context_length: 64
  vocab_size: 512
  precision: fp32
data: {sources: [{name: docs, path: 'corpus/*.jsonl'}], tokens: 1M}
training: {global_batch: 8 sequences, learning_rate: 1e-3}
compute: {device: cpu, nodes: 1, devices_per_node: 1}
layout: {micro_batch: 4}
stages: {pretrain: {}, evaluate: {}, export: {}}
"""
PIPELINE = """\
name: pipeline
model:
  family: llama
  shape: {num_layers: 8, hidden_size: 128, ffn_hidden_size: 256, num_attention_heads: 4}
  context_length: 128
  vocab_size: 1024
data: {sources: [{name: docs, path: 'corpus/*.jsonl'}], tokens: 100M}
training: {global_batch: SEQUENCES sequences, learning_rate: 1e-3}
compute: {device: h100, nodes: 1, devices_per_node: 4}
layout: {pipeline: 4, virtual_pipeline: CHUNKS, micro_batch: 1}
stages: {pretrain: {}}
"""


def trainwright(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [TRAINWRIGHT, *arguments], env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout
    return done


def compiled(folder: Path, spec: str) -> Path:
    (folder / "spec.yaml").write_text(spec)
    trainwright("compile", folder / "spec.yaml", "-o", folder / "bundle")
    return folder / "bundle"


def dry_run(bundle: Path, *arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = json.loads(trainwright("dry-run", bundle, "--json", *arguments, code=code).stdout)[
        "stages"
    ]
    return stages


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("hand"), HAND)


def edit(bundle: Path, old: str, new: str, name: str = "05_pretrain.py") -> None:
    text = (bundle / name).read_text()
    assert old in text
    (bundle / name).write_text(text.replace(old, new, 1))


@pytest.fixture
def edited(hand: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to edit."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in hand.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_small_model_is_counted_as_by_hand(hand: Path, tmp_path: Path) -> None:
    (stage,) = dry_run(hand, "--only", "pretrain", "--trace", tmp_path / "trace.json")
    (rank,) = stage["ranks"]
    # Queries, keys, values and output; gate, up and down; two norms a layer.
    attention, ffn = 4 * 64 * 64, 3 * 64 * 128
    layers = 2 * (attention + ffn + 2 * 64)
    parameters = 512 * 64 + layers + 64  # the output layer is the embedding's table
    assert rank["parameters"] == parameters
    padded = -(-parameters // 128) * 128  # Megatron-Core's buffers (param_and_grad_buffer.py)
    assert rank["static_bytes"]["parameters"] == 4 * padded
    assert rank["static_bytes"]["gradients"] == 4 * padded
    assert (
        rank["static_bytes"]["optimizer"] == 8 * parameters
    )  # two moments; no copy of weights that are fp32 themselves
    # 2 a multiply-add, once forward and twice backward. Causal attention: 64 x 64 / 2 pairs, products of 64 + 64 columns.
    tokens = 8 * 64
    by_hand = {
        "attention": 2 * (6 * tokens * attention + 8 * 6 * (64 * 64 // 2) * (64 + 64)),
        "ffn": 2 * 6 * tokens * ffn,
        "output": 6 * tokens * 64 * 512,
    }
    assert {part["module"]: part["flops"] for part in rank["modules"] if part["flops"]} == by_hand
    assert rank["flops"] == sum(by_hand.values())
    assert sum(rank["peak"]["by_kind"].values()) == rank["peak"]["bytes"]
    assert set(rank["sources"].values()) == {"measured"}, "the real operations ran: no stand-in"
    assert all(one["agrees"] for one in rank["comparisons"])
    assert stage["verdict"]["fits"]
    check_trace(json.loads((tmp_path / "trace.json").read_text()), rank)


def check_trace(trace: dict[str, Any], rank: dict[str, Any]) -> None:
    """What Perfetto needs of trace_event JSON; slices of a track nest; the counter reaches the peak and no more."""
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    names = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert set(names) == {"passes", "modules", "operations", "collectives"}
    for track in names.values():
        open_until: list[int] = []
        slices = [event for event in events if event["ph"] == "X" and event["tid"] == track]
        for event in sorted(slices, key=lambda event: (event["ts"], -event["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            assert not open_until or event["ts"] + event["dur"] <= open_until[-1]
            open_until.append(event["ts"] + event["dur"])
    passes = [event["name"] for event in events if event["ph"] == "X" and event["tid"] == names["passes"]]
    assert [name for name in passes if name.startswith("forward")] == [
        f"forward pass of micro-batch {number}" for number in (0, 1)
    ]
    assert max(sum(event["args"].values()) for event in events if event["ph"] == "C") == rank["peak"]["bytes"]


@pytest.mark.full
def test_every_stage_is_shown_with_a_verdict(hand: Path) -> None:
    """About 8 s. The corpus is not there, on a machine that is the plan's."""
    done = trainwright("dry-run", hand, code=33)
    assert "no file matches corpus/*.jsonl" in done.stderr
    out = done.stdout
    assert "export: 07_export.py: Megatron-Core accepts its configs" in out
    for text in ("pretrain fits: ", "evaluate fits: ", "rank 0 of 1 (pipeline 0", "largest at the peak", "peak: "):
        assert text in out
    assert "DIFFERS" not in out


@pytest.mark.full
def test_an_edited_program_runs_and_differs(edited: Path) -> None:
    """About 10 s."""
    edit(edited, "ffn_hidden_size=128", "ffn_hidden_size=192")
    done = trainwright("dry-run", edited, "--only", "pretrain", code=34)
    assert "edited by hand: 05_pretrain.py" in done.stdout
    assert "parameters of ffn: planned 49,152, in shadow 73,728 (+50.000%)" in done.stderr
    assert "--tolerance allows a difference" in done.stderr
    trainwright("dry-run", edited, "--only", "pretrain", "--tolerance", "0.5")


@pytest.mark.full
def test_a_program_that_does_not_fit_is_told_what_helps(edited: Path) -> None:
    """About 5 s."""
    edit(edited, "micro_batch=4", "micro_batch=16384")
    edit(edited, "global_batch=8", "global_batch=16384")
    done = trainwright("dry-run", edited, "--only", "pretrain", "--tolerance", "1e9", code=35)
    assert "pretrain does not fit by " in done.stdout
    helps = [line.split(": ")[1] for line in done.stdout.splitlines() if "would help" in line]
    assert helps == ["recompute", "micro_batch"], "one device has no second pipeline rank"


@pytest.mark.full
def test_a_program_that_raises_shows_its_own_line_and_the_rank(edited: Path) -> None:
    """About 5 s."""
    edit(edited, "if __name__", "def wrong(x: torch.Tensor) -> torch.Tensor:\n    return x @ x\n\n\nif __name__")
    edit(edited, "activation_func=torch.nn.functional.silu", "activation_func=wrong")
    error = trainwright("dry-run", edited, "--only", "pretrain", code=22).stderr
    assert error.startswith("error: pretrain: rank 0: 05_pretrain.py:")
    assert "return x @ x" in error
    assert "fake" not in error.lower()


@pytest.mark.full
def test_a_config_that_megatron_refuses_shows_its_line(edited: Path) -> None:
    """About 5 s; of a stage of one process, whose configs alone are built."""
    edit(edited, "recompute_granularity=None", 'recompute_granularity="everything"', name="07_export.py")
    error = trainwright("dry-run", edited, "--only", "export", code=22).stderr
    assert error.startswith("error: export: rank 0: 07_export.py:")
    assert "model=TransformerConfig(" in error
    assert "everything" in error


@pytest.mark.full
def test_an_operation_without_a_fake_kernel_names_itself(edited: Path) -> None:
    """About 5 s."""
    custom = (
        '@torch.library.custom_op("mine::gate", mutates_args=())\n'
        "def gate(x: torch.Tensor) -> torch.Tensor:\n    return x.sigmoid()\n\n\nif __name__"
    )
    edit(edited, "if __name__", custom)
    edit(edited, "activation_func=torch.nn.functional.silu", "activation_func=gate")
    error = trainwright("dry-run", edited, "--only", "pretrain", code=22).stderr
    assert "the operation mine::gate has no fake kernel" in error
    assert "torch.library.register_fake" in error


@pytest.mark.full
def test_a_rank_that_is_none_and_a_trace_without_a_folder_are_refused(hand: Path, tmp_path: Path) -> None:
    """About 2 s."""
    assert "whose ranks are 0 to 0" in trainwright("dry-run", hand, "--rank", "1", code=2).stderr
    away = trainwright("dry-run", hand, "--trace", tmp_path / "no" / "trace.json", code=21)
    assert "there is no folder" in away.stderr
    assert (
        "no stage is called 'pretrian'; did you mean pretrain?"
        in trainwright("dry-run", hand, "--only", "pretrian", code=20).stderr
    )


@pytest.mark.full
def test_eight_bit_products_are_not_shadowed_and_said(tmp_path: Path) -> None:
    """About 4 s. What the plan estimates still says whether it fits."""
    spec = PIPELINE.replace("SEQUENCES", "8").replace("CHUNKS", "1")
    bundle = compiled(tmp_path, spec.replace("micro_batch: 1", "micro_batch: 1, fp8: hybrid, fp8_recipe: delayed"))
    (stage,) = dry_run(bundle)
    assert stage["not_shadowed"].startswith("fp8='hybrid'")
    assert (stage["ranks"], stage["verdict"]["measured"]) == ([], False)


@pytest.mark.full
@pytest.mark.parametrize(("sequences", "chunks"), [("27", "1"), ("32", "2")])
def test_scaling_the_steady_state_equals_running_all_of_it(tmp_path: Path, sequences: str, chunks: str) -> None:
    """About 15 s each: FLOPs, messages and the peak of first, middle and last stages, 1F1B and interleaved."""
    bundle = compiled(tmp_path, PIPELINE.replace("SEQUENCES", sequences).replace("CHUNKS", chunks))
    (scaled,), (whole,) = dry_run(bundle), dry_run(bundle, "--all-microbatches")
    assert [rank["place"]["pipeline"] for rank in scaled["ranks"]] == [0, 2, 3]
    for some, every in zip(scaled["ranks"], whole["ranks"], strict=True):
        assert some["ran"] < every["ran"] == int(sequences)
        for figure in ("flops", "modules", "collectives", "static_bytes", "activation_bytes"):
            assert some[figure] == every[figure]
        assert some["peak"]["bytes"] == every["peak"]["bytes"]
