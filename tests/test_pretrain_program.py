"""A pretraining program with everything that training can be told at once: what it leaves, and that it resumes exactly."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainwright.runtime.megatron.batches import Batches, Ramp
from trainwright.runtime.stages.token_files import tokenizer_id

# What importing megatron-core and torch says.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
]

VOCABULARY, SEQUENCE, STEPS = 64, 16, 8
COUNTS = {"code": 2000, "prose": 90}  # the second one is read several times
PROGRAM = """\
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.stages import pretrain

if __name__ == "__main__":
    pretrain.run(
        stage="pretrain", run_id="0", seed=1, parallel=pretrain.Parallel(),
        model=TransformerConfig(
            num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, num_query_groups=1, kv_channels=16,
            normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
            init_method_std=0.05, softmax_scale=0.25, hidden_dropout=0.1, attention_dropout=0.1, bf16=True,
            params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, calculate_per_token_loss=True,
        ),
        embedding=pretrain.Embedding(
            vocab_size=64, padded_vocab_size=64, sequence_length=16, positions="rope", rotary_base=10_000, tied=False,
            output_multiplier=0.5,
        ),
        layer_spec="local",
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        optimizer=OptimizerConfig(
            optimizer="lion", lr=2e-3, min_lr=2e-4, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.98, clip_grad=1.0, bf16=True,
            params_dtype=torch.bfloat16, use_distributed_optimizer=True,
        ),
        groups=pretrain.Groups(undecayed=("norms", "embeddings"), width=2.0),
        z_loss=1e-2,
        schedule=pretrain.Schedule("linear", 8, 2),
        data=pretrain.Data(
            inputs="tokenize", tokenizer="tokenizer", split="ingest", sources=("code", "prose"), weights=(0.6, 0.4),
            global_batch=8, micro_batch=2, ramp=pretrain.Ramp(start=2, increment=2, sequences=12),
        ),
        validation=pretrain.Validation(every_steps=4, sequences=2, baseline="bigram", sample_tokens=0),
        checkpoint=pretrain.Checkpoint(every_steps=3, keep_last=9),
    )
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """What the stages before pretraining leave."""
    from trainwright.runtime.megatron.data import TokenFile

    output = tmp_path / "tokenize" / "output"
    generator = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        (output / split).mkdir(parents=True)
        for source, count in COUNTS.items():
            file = TokenFile(output / split / source, VOCABULARY)
            for begin in range(0, count, 45):
                steps = 3 * np.arange(min(45, count - begin))
                file.add_document(((generator.integers(0, VOCABULARY) + steps) % VOCABULARY).tolist())
            file.finish()
    for stage in ("tokenizer", "ingest"):
        (tmp_path / stage / "output").mkdir(parents=True)
        (tmp_path / stage / "output" / "summary.json").write_text("{}")
    tokenizer = tmp_path / "tokenizer" / "output" / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}')
    (tmp_path / "ingest" / "output" / "split.json").write_text("{}")
    by_split = dict.fromkeys(("train", "validation", "test"), COUNTS)
    summary = {
        "tokens": by_split,
        "bytes": by_split,
        "documents": by_split,
        "vocab_size": VOCABULARY,
        "end_of_text": 0,
        "token_dtype": "uint16",
        "tokenizer": tokenizer_id(tokenizer),
    }
    (output / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def run(work: Path) -> list[dict[str, float]]:
    """Run the program; the rows of its metrics."""
    program = work / "05_pretrain.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "TRAINWRIGHT_WORK": str(work), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (work / "pretrain" / "metrics.jsonl").read_text().splitlines()]


def test_a_program_trains_as_it_says_and_resumes_in_the_middle_of_its_ramp(work: Path) -> None:
    rows = [row for row in run(work) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    batches = Batches(8, Ramp(2, 2, 12))
    assert batches.sizes[:-1] == (2, 4, 6)
    assert [row["tokens"] for row in rows] == [batches.before(step) * SEQUENCE for step in range(1, STEPS + 1)]
    peak, floor = 2e-3, 2e-4
    rates = [peak / 2, peak] + [peak + (floor - peak) * done / 6 for done in range(1, 7)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(rates)
    assert all(row["z_loss"] == pytest.approx(1e-2 * math.log(VOCABULARY) ** 2, rel=0.3) for row in rows)
    assert rows[0]["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.05), "the penalty is not in it"
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"validation/code", "validation/prose"} <= set(rows[3])
    summary = json.loads((work / "pretrain" / "output" / "summary.json").read_text())
    assert {"test/loss/code", "test/loss/prose", "bigram/perplexity"} <= set(summary)

    for step in (6, 8):
        shutil.rmtree(work / "pretrain" / "checkpoints" / f"step-{step:06d}")
    (work / "pretrain" / "output" / "summary.json").unlink()
    again = [row for row in run(work) if "loss" in row]
    assert batches.size(3) < 8, "that was in the ramp"
    for name in ("step", "tokens", "loss", "grad_norm", "learning_rate", "z_loss"):
        assert [row[name] for row in again[-5:]] == [row[name] for row in rows[-5:]], name
