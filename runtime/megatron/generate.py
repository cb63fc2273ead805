"""Text from a model, token by token: as it is being trained, in any layout, or of one process with a key-value cache."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from trainwright.runtime.megatron.checkpoint import load_weights, read_model
from trainwright.runtime.megatron.loop import forward_logits
from trainwright.runtime.megatron.model import Model, build_frozen
from trainwright.runtime.megatron.parallel import Parallel, start
from trainwright.runtime.megatron.platform import Literals, install

# Parameters below which a token's pass is too short to be shared by threads: of a 1.1M model, 2 threads on 2 free cores gave
# 252 tokens/s where one gave 230; on busy cores they wait for each other, 7 tokens/s where one gave 188.
SMALL = 50_000_000

NextLogits = Callable[
    [Sequence[int]], Tensor
]  # token ids of a whole text (at least one) -> logits [vocab_size] of the next


def generate(
    next_logits: NextLogits,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    ends: Collection[int],
    temperature: float,
    top_k: int,
    generator: torch.Generator,
) -> Iterator[int]:
    """Up to `num_tokens` token ids after `prompt` (at least one id), each as soon as it is known; ends before one of `ends`.

    Temperature 0 takes the likeliest token; else one of the `top_k` likeliest (0: of all) is drawn.
    """
    tokens = list(prompt)
    for _ in range(num_tokens):
        token = choose_token(next_logits(tokens), temperature, top_k, generator)
        if token in ends:
            return
        tokens.append(token)
        yield token


def sample(
    model: Model,
    prompt: Sequence[int],
    *,
    num_tokens: int,
    end_of_text: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> list[int]:
    """Up to `num_tokens` token ids after `prompt`, in any layout; ends before an end-of-text. Each token is a whole pass.

    All ranks call this together and all get the same tokens. What has run out of the model's last `sequence_length`
    tokens is forgotten.
    """

    def next_logits(tokens: Sequence[int]) -> Tensor:
        context = torch.tensor(tokens[-model.embedding.sequence_length :], dtype=torch.int64)
        logits = forward_logits(model, context)[-1, : model.embedding.vocab_size].contiguous()
        dist.broadcast(logits, src=0)  # data ranks may differ in a last bit, and must stop together
        return logits

    tokens = generate(
        next_logits,
        prompt,
        num_tokens=num_tokens,
        ends=(end_of_text,),
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(seed),
    )
    return list(tokens)


def choose_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token by its logits [vocab_size]: among the `top_k` likeliest (0: all), at `temperature`. On the CPU, in float64."""
    logits = logits.detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k or len(logits), len(logits)))
    shares = torch.softmax((best - best[0]) / temperature, dim=0)  # the difference first: a tiny temperature overflows
    chosen = torch.multinomial(shares, num_samples=1, generator=generator)
    return int(ids[chosen])


class CachedModel:
    """A whole model in one process that remembers keys and values of the text that it has read.

    A text that begins as the one before costs a pass over what is new in it; any other a pass over the whole.
    """

    def __init__(self, model: Model) -> None:
        self.max_tokens = model.embedding.sequence_length  # of a text
        self._model = model
        self._cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=self.max_tokens)
        self._read: list[int] = []  # the tokens whose keys and values are in the cache

    def next_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits [vocab_size] of the token after `tokens`, at least one and at most `max_tokens` ids."""
        if not 1 <= len(tokens) <= self.max_tokens:
            raise ValueError(f"{len(tokens)} tokens: the model reads 1 to {self.max_tokens}")
        known = 0
        while known < min(len(self._read), len(tokens) - 1) and self._read[known] == tokens[known]:
            known += 1
        self._cache.sequence_len_offset = known
        if known:
            self._cache.enable_decode_mode()
        else:
            self._cache.enable_prefill_mode()
        self._read = self._read[:known]  # an interrupted pass leaves the rest of the cache undefined
        logits = self._forward(list(tokens[known:]), known)
        self._read = list(tokens)
        return logits

    @torch.inference_mode()
    def _forward(self, new: list[int], position: int) -> Tensor:
        device = self._model.platform.device
        self._model.gpt.eval()
        logits: Any = self._model.gpt(
            torch.tensor([new], device=device),
            torch.arange(position, position + len(new), device=device)[None],
            None,
            inference_context=self._cache,
            runtime_gather_output=True,
        )
        chosen: Tensor = logits[0, -1, : self._model.embedding.vocab_size].float()
        return chosen


def open_cached(folder: Path) -> CachedModel:
    """The model of a step folder (checkpoint.py), saved in any layout, whole in this process, in fp32.

    Raises CheckpointError where the folder is damaged.
    """
    install()
    platform = start(Parallel(tensor=1, pipeline=1, data=1), seed=0)
    saved = read_model(folder)
    config = saved.build_config(
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    built = build_frozen(Literals(config, None, None, "local"), saved.embedding, platform)
    load_weights(built, folder)
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in built.gpt.parameters()) < SMALL:
        torch.set_num_threads(1)
    return CachedModel(built)
