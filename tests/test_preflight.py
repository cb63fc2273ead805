"""What a dry run says before it runs anything: each thing that can be missing, on the plan's machine and on another."""

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAINWRIGHT = str(Path(sys.executable).with_name("trainwright"))
SPEC = """\
name: pre
model:
  family: llama
  shape: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}
  context_length: 64
  vocab_size: 512
data: {sources: [{name: docs, path: 'corpus/*.jsonl*'}], tokens: TOKENS, validation: 10%, test: 10%}
training: {global_batch: 8 sequences, learning_rate: 1e-3}
compute: {device: DEVICE, nodes: NODES, devices_per_node: 1}
stages: {pretrain: {}}
"""


def compiled(folder: Path, tokens: str = "1M", device: str = "cpu", nodes: int = 1) -> Path:
    spec = SPEC.replace("TOKENS", tokens).replace("DEVICE", device).replace("NODES", str(nodes))
    (folder / "spec.yaml").write_text(spec)
    done = subprocess.run(
        [TRAINWRIGHT, "compile", "spec.yaml", "-o", "bundle"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


def write_corpus(folder: Path, size: int) -> None:
    (folder / "corpus").mkdir()
    (folder / "corpus" / "docs.jsonl").write_text('{"text": "' + "x" * (size - 13) + '"}\n')


def findings(bundle: Path, *arguments: str, code: int = 0, only: str = "ingest") -> dict[str, list[dict[str, Any]]]:
    """By check. `ingest` has no model: nothing is shadowed."""
    done = subprocess.run(
        [TRAINWRIGHT, "dry-run", bundle, "--only", only, "--json", *arguments],
        cwd=bundle.parent,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for one in json.loads(done.stdout)["findings"]:
        found.setdefault(one["check"], []).append(one)
    return found


def test_a_corpus_that_is_large_enough_is_no_trouble(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, tokens="16k")
    write_corpus(tmp_path, 100_000)
    found = findings(bundle, "--strict")
    assert {one["severity"] for several in found.values() for one in several} == {"note"}
    # 100,000 bytes / 4 x 80 % = 20,000 tokens; steps are whole, so that a few tokens less or more than 16,000 are planned
    assert "0.8 epochs" in found["corpus"][0]["message"]


def test_a_corpus_that_is_too_small_is_told_in_epochs(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, tokens="1M")
    write_corpus(tmp_path, 100_000)
    (found,) = findings(bundle)["corpus"]
    assert found["severity"] == "warning"
    assert "the corpus is too small: 9.31e-05 GiB are about 2e+04 training tokens" in found["message"]
    assert "50 epochs" in found["message"]
    assert findings(bundle, "--strict", code=33)["corpus"][0]["severity"] == "error"


def test_missing_inputs_are_errors_on_the_plans_machine_and_warnings_on_another(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (found,) = findings(compiled(here), code=33)["inputs"]
    assert (found["stage"], found["severity"]) == ("ingest", "error")
    assert "no file matches corpus/*.jsonl*" in found["message"]
    other = findings(compiled(there, device="h100"))
    assert {one["severity"] for one in other["inputs"]} == {"warning"}
    assert "the plan is for 1 x 1 h100-sxm-80gb, and this one has 0 CUDA devices" in other["machine"][0]["message"]
    versions = [one["message"] for one in other["versions"]]
    assert any("Transformer Engine" in text for text in versions)
    assert any("NCCL" in text for text in versions)


def test_unreadable_and_compressed_inputs(tmp_path: Path) -> None:
    bundle = compiled(tmp_path)
    (tmp_path / "corpus").mkdir()
    packed = gzip.compress(os.urandom(9_000))
    (tmp_path / "corpus" / "docs.jsonl.gz").write_bytes(packed)
    assert "epochs" in findings(bundle)["corpus"][0]["message"]
    (tmp_path / "corpus" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert "cannot be read" in findings(bundle, code=33)["inputs"][0]["message"]


def test_data_root_says_where_inputs_lie(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, tokens="16k")
    (tmp_path / "far").mkdir()
    write_corpus(tmp_path / "far", 100_000)
    assert "inputs" in findings(bundle, code=33)
    assert "inputs" not in findings(bundle, "--data-root", "far")


def test_edited_files_run_and_missing_ones_do_not(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, tokens="16k")
    write_corpus(tmp_path, 100_000)
    with (bundle / "01_ingest.py").open("a") as program:
        program.write("# mine\n")
    (found,) = findings(bundle)["files"]
    assert (found["severity"], found["message"].split(":")[0]) == ("note", "edited by hand")
    (bundle / "README.md").unlink()
    assert findings(bundle, code=33)["files"][-1]["message"] == "missing from the bundle: README.md"


@pytest.mark.full
def test_room_for_checkpoints_is_counted(tmp_path: Path) -> None:
    """Parameters x (4 of a weight + 8 of two moments) x (3 kept + 1 being written). About 5 s."""
    bundle = compiled(tmp_path, tokens="16k")
    plan = json.loads((bundle / "plan.json").read_text())
    assert (plan["training"]["precision"], plan["kernels"]["checkpoint_keep_last"]) == ("fp32", 3)
    write_corpus(tmp_path, 100_000)
    (found,) = findings(bundle, only="pretrain")["disk"]
    each = 12 * plan["estimates"]["padded_parameters"] / 2**30
    assert f"(1 stages x 4 x {each:,.2f}, 12 bytes a parameter)" in found["message"]


def test_a_taken_port_is_found_where_nodes_meet(tmp_path: Path) -> None:
    bundle = compiled(tmp_path, device="h100", nodes=2)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("", 29500))
        except OSError:
            pytest.skip("port 29500 is taken already")
        taken.listen()
        (found,) = findings(bundle)["port"]
    assert found["severity"] == "warning"
    assert "port 29500 cannot be used" in found["message"]
