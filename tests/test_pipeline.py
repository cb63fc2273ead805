"""A pretraining run that is killed, resumed, laid out anew and changed, by the runner. About two minutes on 2 free cores."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")
SPEC = """\
name: small
model:
  family: llama
  shape: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2}
  context_length: 64
  vocab_size: 512
  precision: fp32
data:
  sources: [{name: docs, path: 'corpus/*.jsonl', filters: none}]
  tokens: 61440
training: {global_batch: 8 sequences, learning_rate: 5e-3}
compute: {device: cpu, nodes: 1, devices_per_node: 2}
stages: {curate: {near_duplicates: 0}, pretrain: {baseline: bigram}}
"""
STEPS = 120


class Project:
    """A folder with a spec, a corpus and a bundle."""

    def __init__(self, path: Path) -> None:
        self.path, self.work = path, path / "bundle" / "work"
        (path / "spec.yaml").write_text(SPEC)
        (path / "corpus").mkdir()
        texts = [
            f"Line {n} of the story: {n * n} is the square of {n}, and {n + n} its double.\n" * 3 for n in range(600)
        ]
        lines = [json.dumps({"text": text, "id": str(n)}).encode() for n, text in enumerate(texts)]
        lines[7:7] = [b"{not json", b'{"text": "\xff\xfe"}', b'{"id": "no text"}']
        (path / "corpus" / "docs.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [TRAINWRIGHT, *arguments],
            cwd=self.path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def call(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate()
        assert process.returncode == code, out + err
        assert "Traceback" not in err
        return out + err

    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.work / "pretrain" / "metrics.jsonl").read_text().splitlines()]

    def summary(self, stage: str) -> dict[str, object]:
        result: dict[str, object] = json.loads((self.work / stage / "output" / "summary.json").read_text())
        return result


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("project"))
    made.call("compile", "spec.yaml", "-o", "bundle")
    return made


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def ranks_of(program: str) -> list[int]:
    """Processes of torchrun that execute `program`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if any(word.endswith(program) for word in command) and b"LOCAL_RANK=" in environment:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for ranks in /proc")
def test_a_killed_rank_loses_nothing_that_was_saved(project: Project) -> None:
    """Killed in pretraining: an exit code of its own; the next run keeps the data stages and resumes from a checkpoint."""
    running = project.start("run", "bundle")
    wait_for(project.work / "pretrain" / "checkpoints" / "latest.json", running)
    ranks = ranks_of(str(project.path / "bundle" / "05_pretrain.py"))
    assert ranks
    os.kill(ranks[-1], signal.SIGKILL)
    out, err = running.communicate()
    assert running.returncode == 23, out + err
    assert "SIGKILL" in err
    assert "Traceback" not in err
    saved = max(
        int(path.parent.name[5:]) for path in (project.work / "pretrain" / "checkpoints").glob("step-*/run.json")
    )

    said = project.call("run", "bundle")
    for stage in ("ingest", "tokenizer", "tokenize"):
        assert f"{stage}: unchanged" in said
    log = (project.work / "pretrain" / "log" / "rank-0.log").read_text()
    assert f"resuming after step {saved}, from" in log
    rows = project.rows()
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1), STEPS], "each step once, and the test figures"
    assert rows[STEPS - 1]["loss"] < rows[0]["loss"] - 1.0
    project.call("run", "bundle", "--work", "uninterrupted")
    lines = (project.path / "uninterrupted" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    for resumed, whole in zip(rows, map(json.loads, lines), strict=True):
        for key in {"loss", "grad_norm", "learning_rate", "test/perplexity"} & whole.keys():
            assert resumed[key] == pytest.approx(whole[key], rel=1e-5), (key, resumed["step"])


def test_what_could_not_be_read_is_counted_and_set_aside(project: Project) -> None:
    summary = project.summary("ingest")
    aside = [
        json.loads(line) for line in (project.work / "ingest" / "output" / "set_aside.jsonl").read_text().splitlines()
    ]
    assert [line["line"] for line in aside] == [8, 9, 10]
    assert summary["in"] == 603
    assert summary["kept"] == 600


def test_the_result_is_measured_against_the_bigram(project: Project) -> None:
    summary, last = project.summary("pretrain"), project.rows()[-1]
    for key in ("test/perplexity", "test/bits_per_byte", "bigram/perplexity", "bigram/bits_per_byte"):
        assert summary[key] == last[key]
    assert "bigram" in str(summary["key_figure"])
    assert summary["sample"]


def test_another_layout_resumes_the_same_run(project: Project) -> None:
    """Tensor 2 in place of data 2: the same run_id, so the last checkpoint is loaded and nothing is trained again."""
    before = {key: value for key, value in project.summary("pretrain").items() if key.startswith("test/")}
    project.call("compile", "spec.yaml", "-o", "bundle", "--set", "layout.tensor=2")
    said = project.call("run", "bundle")
    assert "pretrain: runs again: its program changed" in said
    log = (project.work / "pretrain" / "log" / "rank-0.log").read_text()
    assert f"resuming after step {STEPS}, from" in log
    after = project.summary("pretrain")
    assert {key: after[key] for key in before} == pytest.approx(before, rel=1e-4)


def test_another_learning_rate_is_another_run(project: Project) -> None:
    """Its checkpoints are not resumed, and not lost."""
    old = project.summary("pretrain")["run_id"]
    project.call(
        "compile", "spec.yaml", "-o", "bundle", "--set", "training.learning_rate=1e-3", "--set", "data.tokens=10240"
    )
    project.call("run", "bundle")
    new = project.summary("pretrain")
    assert new["run_id"] != old
    assert new["step"] == 20
    assert (project.work / "pretrain" / f"checkpoints-{old}").is_dir()
    assert [row["step"] for row in project.rows()] == [*range(1, 21), 20]


def test_a_program_for_cuda_runs_on_a_cpu_and_says_what_it_overrides(project: Project, tmp_path: Path) -> None:
    """Another family (QK norm), bf16, Transformer Engine, overlap, two pipeline stages: the same literals, run with gloo."""
    spec = SPEC.replace("device: cpu", "device: h100").replace("family: llama", "family: qwen3").replace("fp32", "bf16")
    (tmp_path / "spec.yaml").write_text(spec.replace("61440", "10240").replace("corpus/", f"{project.path}/corpus/"))
    for arguments in (("compile", "spec.yaml", "-o", "bundle", "--set", "layout.pipeline=2"), ("run", "bundle")):
        done = subprocess.run([TRAINWRIGHT, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "bundle" / "work" / "pretrain" / "log" / "rank-0.log").read_text().splitlines()
    assert log[1].startswith("platform cpu: overrides layer_spec='transformer_engine' -> 'local'"), log[:5]
    losses = [json.loads(line) for line in (tmp_path / "bundle/work/pretrain/metrics.jsonl").read_text().splitlines()]
    assert losses[19]["loss"] < losses[0]["loss"]
