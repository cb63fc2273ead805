"""Sampling from a real model of one process, with a key-value cache and without (worlds of several are in the pretrain tests)."""

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
from trainwright.runtime.megatron.generate import CachedModel, choose_token, generate, sample

here = parallel.start(parallel.Parallel(tensor=1, pipeline=1, data=1), seed=1)
config = TransformerConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, normalization="RMSNorm", add_bias_linear=False,
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
        vocab_size={VOCAB_SIZE}, padded_vocab_size=64, sequence_length={SEQUENCE_LENGTH}, positions=sys.argv[1],
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

fed = []  # how many tokens each pass reads
built.gpt.embedding.register_forward_hook(lambda module, args, out: fed.append(len(out)))
cached = CachedModel(built)

def draw_cached(count, temperature=0.0, **changes):
    generator = torch.Generator().manual_seed(1)
    return list(generate(cached.next_logits, {PROMPT}, num_tokens=count, temperature=temperature,
                         generator=generator, **(dict(ends=(), top_k=40) | changes)))

def distance(tokens):
    # of a cache that has read other texts before, from one pass over all of this text
    with torch.no_grad():
        whole = built.gpt(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1, :{VOCAB_SIZE}]
    return float((cached.next_logits(tokens) - whole).abs().max())

def refused(tokens):
    try:
        cached.next_logits(tokens)
    except ValueError as error:
        return str(error)

room = {SEQUENCE_LENGTH} - len({PROMPT}) + 1  # the last token chosen is not read
cached_greedy = draw_cached(room)
passes = list(fed)
fed.clear()
cached_drawn = draw_cached(room, temperature=1.0)
distances = dict(longer=distance([7, 8, 9]), extended=distance([7, 8, 9, *range(12)]), branched=distance([7, 8, 1, 2, 3]),
                 shorter=distance([7, 8]), again=distance([7, 8]))

# Ctrl-C between two layers: the first has the keys of another text already, the second not.
cached.next_logits([7, 8, 1, 2, 3])
def stop_here(module, args):
    raise KeyboardInterrupt
handle = built.gpt.decoder.layers[1].register_forward_pre_hook(stop_here)
try:
    cached.next_logits([7, 8, 30, 31, 32])
except KeyboardInterrupt:
    handle.remove()
distances["interrupted"] = distance([7, 8, 1, 2, 3, 9])

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
    from_all=[choose_token(logits, 2.0, 0, generator) for _ in range(4000)],
    cached_greedy=cached_greedy,
    cached_drawn=cached_drawn,
    cached_stopped=draw_cached(room, ends=(-1, stop)),
    uncached_drawn=draw(temperature=1.0, num_tokens=room, seed=1),
    passes=passes,
    distances=distances,
    refused=[refused([]), refused([1] * ({SEQUENCE_LENGTH} + 1))],
)
print("RESULT" + json.dumps(result))
"""


@pytest.fixture(scope="module", params=["rope", "learned"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = tmp_path_factory.mktemp("generate") / "program.py"
    Path(program).write_text(PROGRAM)
    done = subprocess.run([sys.executable, program, request.param], capture_output=True, text=True, check=False)
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
    drawn = result["from_all"]
    assert [drawn.count(token) / len(drawn) for token in range(4)] == pytest.approx(
        [0.101, 0.167, 0.276, 0.455], abs=0.03
    )


def test_with_a_cache_the_same_tokens_are_chosen(result: dict[str, Any]) -> None:
    room = len(result["cached_greedy"])
    assert room == SEQUENCE_LENGTH - len(PROMPT) + 1
    assert result["cached_greedy"] == result["greedy"][:room]
    assert result["cached_drawn"] == result["uncached_drawn"] != result["cached_greedy"]
    assert result["cached_stopped"] == result["stopped"]


def test_with_a_cache_each_token_is_read_once(result: dict[str, Any]) -> None:
    assert result["passes"] == [len(PROMPT)] + [1] * (SEQUENCE_LENGTH - len(PROMPT))


def test_the_cache_goes_on_from_what_two_texts_share(result: dict[str, Any]) -> None:
    """Also after a pass that was interrupted between two layers."""
    assert result["distances"] == pytest.approx(dict.fromkeys(result["distances"], 0.0), abs=1e-4)


def test_the_cache_refuses_what_the_model_cannot_read(result: dict[str, Any]) -> None:
    assert result["refused"] == ["0 tokens: the model reads 1 to 24", "25 tokens: the model reads 1 to 24"]
