"""Sampling from a real model of one process (worlds of several are in the pretrain tests)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

VOCAB_SIZE, SEQUENCE_LENGTH = 50, 24
PROMPT = [3, 1, 4, 1, 5]

# In a process of its own: making Megatron-Core run on a CPU changes torch for the rest of a process.
PROGRAM = f"""
import json, sys, torch
from trainwright.runtime.megatron import platform
platform.install()
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from trainwright.runtime.megatron import model, parallel
from trainwright.runtime.megatron.generate import choose_token, sample

here = parallel.start(parallel.Parallel(tensor=1, pipeline=1, data=1), seed=1)
config = TransformerConfig(
    num_layers=2, hidden_size=32, num_attention_heads=2, normalization="RMSNorm", add_bias_linear=False,
    gated_linear_unit=True, activation_func=torch.nn.functional.silu, attention_dropout=0.0, hidden_dropout=0.0,
    init_method_std=0.5, bias_dropout_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
    bias_activation_fusion=False, apply_rope_fusion=False,
)
literals, _ = here.adapt(platform.Literals(
    model=config, ddp=DistributedDataParallelConfig(), optimizer=OptimizerConfig(optimizer="adam", lr=1e-3), layer_spec="local",
))
built = model.build(
    literals,
    model.Embedding(
        vocab_size={VOCAB_SIZE}, padded_vocab_size=64, sequence_length={SEQUENCE_LENGTH}, positions="rope",
        rotary_base=10000, tied=False,
    ),
    here,
)
# Ids that only padding has are the likeliest, as far as the output layer goes.
with torch.no_grad():
    built.gpt.output_layer.weight[{VOCAB_SIZE}:] *= 10

def draw(**changes):
    arguments = dict(num_tokens=40, end_of_text=-1, temperature=0.0, top_k=40, seed=0) | changes
    return sample(built, {PROMPT}, **arguments)

def by_hand(count):
    tokens = list({PROMPT})
    for _ in range(count):
        context = torch.tensor([tokens[-{SEQUENCE_LENGTH}:]])
        with torch.no_grad():
            logits = built.gpt(context, torch.arange(context.shape[1])[None], None)
        tokens.append(int(logits[0, -1, :{VOCAB_SIZE}].argmax()))
    return tokens[len({PROMPT}):]

greedy = draw()
stop = next(token for i, token in enumerate(greedy) if token not in greedy[:i] and i >= 2)
logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
generator = torch.Generator().manual_seed(0)
result = dict(
    greedy=greedy,
    by_hand=by_hand(40),
    stop=stop,
    stopped=draw(end_of_text=stop),
    seeds=[draw(temperature=1.0, seed=seed) for seed in (1, 1, 2)],
    only_best=draw(temperature=1.0, top_k=1),
    drawn=[choose_token(logits, 2.0, 3, generator) for _ in range(4000)],
)
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = tmp_path_factory.mktemp("generate") / "program.py"
    Path(program).write_text(PROGRAM)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = json.loads(done.stdout.split("RESULT")[1])
    return loaded


def test_temperature_zero_follows_the_likeliest_token_of_the_vocabulary(result: dict[str, Any]) -> None:
    assert len(result["greedy"]) == 40  # beyond the model's sequence length
    assert result["greedy"] == result["by_hand"]
    assert len(set(result["greedy"])) > 2
    assert result["only_best"] == result["greedy"]


def test_it_ends_before_an_end_of_text(result: dict[str, Any]) -> None:
    assert result["stopped"] == result["greedy"][: result["greedy"].index(result["stop"])]
    assert len(result["stopped"]) >= 2


def test_a_seed_decides_the_sample(result: dict[str, Any]) -> None:
    first, again, other = result["seeds"]
    assert first == again != other
    assert max(first + other) < VOCAB_SIZE


def test_tokens_are_drawn_by_temperature_among_the_best(result: dict[str, Any]) -> None:
    """Of logits 0 to 3 the best three, at temperature 2: e^0.5, e^1, e^1.5 to one another."""
    drawn = result["drawn"]
    shares = [drawn.count(token) / len(drawn) for token in range(4)]
    assert shares == pytest.approx([0.0, 0.186, 0.307, 0.506], abs=0.03)
