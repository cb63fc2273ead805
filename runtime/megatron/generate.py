"""A sample of text from the model as it is being trained, in any layout. No key-value cache: each token is a whole pass."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.runtime.megatron.loop import forward_logits
from trainwright.runtime.megatron.model import Model


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
    """Up to `num_tokens` token ids after `prompt` (at least one id); ends before an end-of-text.

    All ranks call this together and all get the same tokens. Temperature 0 takes the likeliest token. What has run out
    of the model's last `sequence_length` tokens is forgotten.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = torch.tensor(tokens[-model.embedding.sequence_length :], dtype=torch.int64)
        logits = forward_logits(model, context)[-1, : model.embedding.vocab_size]
        token = choose_token(logits, temperature, top_k, generator)
        agreed = torch.tensor([token], device=model.platform.device)
        dist.broadcast(agreed, src=0)  # data ranks may differ in a last bit, and must stop together
        token = int(agreed)
        if token == end_of_text:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def choose_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token by its logits [vocab_size]: among the `top_k` likeliest, at `temperature`. Drawn on the CPU, in float64."""
    logits = logits.detach().to("cpu", torch.float64)
    if temperature == 0:
        return int(logits.argmax())
    best, ids = logits.topk(min(top_k, len(logits)))
    chosen = torch.multinomial(torch.softmax(best / temperature, dim=0), num_samples=1, generator=generator)
    return int(ids[chosen])
