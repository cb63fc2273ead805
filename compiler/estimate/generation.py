"""Seconds that a model takes to write answers: decoding priced by the bytes it reads, the reading of prompts by FLOPs.

A decoding step reads every weight and the keys and values of all sequences to make one token of each (roofline: Williams et al.
2009; of transformers: Pope et al. 2022, arXiv 2211.05102, section 2). Lengths of answers are taken as exponential and cut at the
longest that is allowed, so the last answers of a batch are written in small batches, at the full price of the weights.
"""

from dataclasses import dataclass

import numpy as np

from trainwright.compiler.estimate.flops import forward_flops_per_token
from trainwright.compiler.estimate.layouts import BYTES, Floats
from trainwright.compiler.estimate.params import (
    count_parameters,
    expert_parameters,
    key_size,
    position_parameters,
)
from trainwright.compiler.estimate.placement import num_mixtures
from trainwright.compiler.estimate.step_time import LINK_EFFICIENCY
from trainwright.compiler.facts import Device
from trainwright.compiler.plan import Shape

# Share of the data sheet's bandwidth that decoding reaches: gpt-fast reads Llama 2 7B at 1,397 of an A100's 2,039 GB/s, and 70B
# on two at 1,482 each (its README, batch 1).
BANDWIDTH_SHARE = 0.7
# Latency of an all-reduce of a few tokens in a node: gpt-fast's times for 7B on 2, 4 and 8 devices and for 70B on 4 and 8 leave 9
# to 29 us for each of two a layer.
ALL_REDUCE_S = 20e-6
# What an engine does between two steps (scheduling, sampling, passing tokens on). NeMo RL's four GRPO runs
# (tests/published/costs.yaml) are met best with it; compiled loops and C++ engines have next to none.
ENGINE_STEP_S = 5e-3
# Of a device's memory for weights, keys and values: vLLM's default `gpu_memory_utilization`. Training states are elsewhere then.
MEMORY_SHARE = 0.9
_POSITIONS = 256  # at which a batch is looked at, from its first token to the longest answer


@dataclass(frozen=True)
class Engine:
    """What decodes: a group of `tensor` devices that share the weights, one copy of the model."""

    shape: Shape
    device: Device
    precision: str  # "bf16" | "fp32", of weights, keys and values
    devices_per_node: int
    tensor: int
    step_s: float = ENGINE_STEP_S  # beside the devices' work, a step


@dataclass(frozen=True)
class Answers:
    """What one group writes at once: mean lengths in tokens. Samples of a prompt share what was read of it."""

    sequences: float
    prompts: float  # different ones
    prompt_tokens: float
    answer_tokens: float
    max_answer_tokens: float


def key_value_bytes_per_token(engine: Engine) -> float:
    """Bytes of keys and values that a device keeps a token of a sequence; past one head a device they are held twice."""
    shape = engine.shape
    if shape.kv_lora_rank:  # the compressed keys and values, and the part of the keys with positions, on every rank
        return shape.num_layers * float(shape.kv_lora_rank + shape.qk_rope_head_dim) * BYTES[engine.precision]
    split = min(engine.tensor, shape.num_query_groups)
    return 2.0 * shape.num_layers * key_size(shape) * BYTES[engine.precision] / split


def weight_bytes(engine: Engine) -> float:
    """Bytes of weights that a device holds."""
    return float(count_parameters(engine.shape, 0)) * BYTES[engine.precision] / engine.tensor


def read_parameters(shape: Shape, sequences: Floats) -> Floats:
    """Parameters that a step reads for `sequences` tokens: not the embedding it looks up in, and of the experts those that the
    tokens are sent to, if each token's are drawn evenly: E (1 - (1 - k / E)^b) of E."""
    skipped = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    every = np.full_like(
        sequences, count_parameters(shape, 0) - position_parameters(shape, 0) - skipped, dtype=np.float64
    )
    if not shape.num_experts:
        return every
    idle = (1 - shape.experts_per_token / shape.num_experts) ** sequences
    return every - num_mixtures(shape) * expert_parameters(shape) * shape.num_experts * idle


def decoding_step_s(engine: Engine, sequences: Floats, context: Floats) -> Floats:
    """Seconds to add one token to each of `sequences` that are `context` tokens long."""
    shape, device, tensor = engine.shape, engine.device, engine.tensor
    width = BYTES[engine.precision]
    read = width * read_parameters(shape, sequences) / tensor + key_value_bytes_per_token(engine) * sequences * context
    memory_s = read / (device.memory_bandwidth_bytes_per_s * BANDWIDTH_SHARE)
    # The last token looks at the whole context, where the mean one of a training row looks at half of it.
    flops = sequences * forward_flops_per_token(shape, 2 * context)
    compute_s = flops / (tensor * device.peak_flops_per_s[engine.precision] * device.efficiency)
    reduce_s = np.zeros_like(memory_s)
    if tensor > 1:
        inside = tensor <= engine.devices_per_node
        link = (device.intra_node_bytes_per_s if inside else device.inter_node_bytes_per_s) * LINK_EFFICIENCY
        moved = 2 * (tensor - 1) / tensor * sequences * shape.hidden_size * width
        reduce_s = 2 * shape.num_layers * (ALL_REDUCE_S + moved / link)
    return np.maximum(memory_s, compute_s) + reduce_s + engine.step_s


def reading_s(engine: Engine, prompts: float, tokens: float) -> float:
    """Seconds to read `prompts` of `tokens` each."""
    rate = engine.tensor * engine.device.peak_flops_per_s[engine.precision] * engine.device.efficiency
    return prompts * tokens * float(forward_flops_per_token(engine.shape, tokens)) / rate


def fits(engine: Engine, answers: Answers) -> bool:
    """Whether the weights and one sequence of the greatest length have room."""
    longest = answers.prompt_tokens + answers.max_answer_tokens
    return key_value_bytes_per_token(engine) * longest <= _free_bytes(engine)


def concurrent_sequences(engine: Engine, answers: Answers) -> float:
    """Sequences that are written at once: all, or as many as have room at their mean length. At least one."""
    _, left = _lengths(answers)
    mean = answers.prompt_tokens + _mean_age(answers, left)
    room = _free_bytes(engine) // (key_value_bytes_per_token(engine) * mean)
    return max(1.0, min(answers.sequences, room))


def generation_s(engine: Engine, answers: Answers) -> float:
    """Seconds until the last answer of a group is written; as one ends, the next begins, until none is left to begin."""
    at_once = concurrent_sequences(engine, answers)
    positions, left = _lengths(answers)
    some_left = 1 - (1 - left) ** at_once
    # Given that any is left, so many are; 0 / 0 where none can be.
    writing = np.divide(at_once * left, some_left, out=np.ones_like(left), where=some_left > 0)
    step_s = decoding_step_s(engine, np.maximum(writing, 1.0), answers.prompt_tokens + positions)
    last_s = float(np.sum(some_left * step_s)) * answers.max_answer_tokens / _POSITIONS
    context = answers.prompt_tokens + _mean_age(answers, left)
    full = decoding_step_s(engine, np.array([at_once]), np.array([context]))
    before_s = (answers.sequences - at_once) / at_once * answers.answer_tokens * float(full[0])
    return reading_s(engine, answers.prompts, answers.prompt_tokens) + before_s + last_s


def _free_bytes(engine: Engine) -> float:
    return MEMORY_SHARE * engine.device.memory_bytes - weight_bytes(engine)


def _lengths(answers: Answers) -> tuple[Floats, Floats]:
    """(positions in an answer, share of the answers that are at least so long)."""
    longest, mean = answers.max_answer_tokens, min(answers.answer_tokens, answers.max_answer_tokens)
    positions = (np.arange(_POSITIONS) + 0.5) / _POSITIONS * longest
    # The scale x of which x (1 - exp(-longest / x)), the mean of what is left after the cut, is `mean`; rate 0: all are cut.
    low, high = 0.0, 1e4 / mean
    for _ in range(200):
        rate = (low + high) / 2
        shortened = -np.expm1(-longest * rate) / rate if rate else longest
        low, high = (rate, high) if shortened > mean else (low, rate)
    return positions, np.exp(-high * positions)


def _mean_age(answers: Answers, left: Floats) -> float:
    """Tokens that an answer has at a random moment of its writing."""
    positions = (np.arange(_POSITIONS) + 0.5) / _POSITIONS * answers.max_answer_tokens
    return float(np.sum(positions * left) / np.sum(left))
