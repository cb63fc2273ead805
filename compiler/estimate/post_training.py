"""Tokens and FLOPs of a tuning stage: what passes through the model forward and backward, forward alone, and token by token.

A forward pass is a third of `model_flops_per_token`, about 2 N a token. SFT, reward models: forward and backward, 6 N. DPO: the
same over both answers, and 2 N once for the reference, which is kept. PPO (Ouyang et al. 2022, arXiv 2203.02155): generation,
which leaves the old log-probabilities, then 2 N each for the reward, the reference and the old values, then 6 N of the policy and
6 N of the value network a pass over the batch. GRPO (Shao et al. 2024, arXiv 2402.03300): generation, the old log-probabilities,
the reference where there is a KL term, then 6 N a pass.
"""

from dataclasses import dataclass

from trainwright.compiler.estimate.flops import forward_flops_per_token
from trainwright.compiler.plan import Shape


@dataclass(frozen=True)
class Work:
    """Tokens and FLOPs of a whole stage, by how they pass through a model."""

    trained_tokens: float  # forward and backward; once for each pass over them, and for each network that is trained
    scored_tokens: float  # forward alone; once for each network that looks at them
    generated_tokens: float
    trained_flops: float
    scored_flops: float
    generated_flops: float  # prompts read included

    @property
    def flops(self) -> float:
        return self.trained_flops + self.scored_flops + self.generated_flops


def sft_work(shape: Shape, conversations: float, tokens: float, epochs: int) -> Work:
    """`conversations` of `tokens` on average, packed: no padding counts."""
    trained = conversations * tokens * epochs
    return Work(trained, 0.0, 0.0, 3 * trained * _forward(shape, tokens), 0.0, 0.0)


def reward_work(shape: Shape, pairs: float, prompt_tokens: float, answer_tokens: float, epochs: int) -> Work:
    """Both answers of each pair, each with its prompt, through a model with a scalar head."""
    length = prompt_tokens + answer_tokens
    trained = 2 * pairs * length * epochs
    return Work(trained, 0.0, 0.0, 3 * trained * _forward(shape, length, output_layer=False), 0.0, 0.0)


def dpo_work(shape: Shape, pairs: float, prompt_tokens: float, answer_tokens: float, epochs: int) -> Work:
    """Both answers of each pair, each with its prompt; the reference's log-probabilities are computed once, before training."""
    length = prompt_tokens + answer_tokens
    scored = 2 * pairs * length
    forward = _forward(shape, length)
    return Work(scored * epochs, scored, 0.0, 3 * scored * epochs * forward, scored * forward, 0.0)


@dataclass(frozen=True)
class Networks:
    """Which passes a reinforced stage needs beside those of its policy; all networks have the policy's shape."""

    reference: bool  # forward: the model that it starts from
    reward: bool  # forward, with a scalar head
    value: bool  # forward, and trained, with a scalar head
    old_policy: bool  # forward: log-probabilities of the answers as they were drawn


def reinforced_work(
    shape: Shape,
    networks: Networks,
    prompts: float,
    samples: float,
    prompt_tokens: float,
    answer_tokens: float,
    inner_epochs: int,
) -> Work:
    """`prompts` visited in all, each answered `samples` times; a prompt is read once for them, and trained on with each."""
    length, episodes = prompt_tokens + answer_tokens, prompts * samples
    tokens = episodes * length
    policy, scalar = _forward(shape, length), _forward(shape, length, output_layer=False)
    trained = tokens * inner_epochs
    of_policy, of_scalar = networks.reference + networks.old_policy, networks.reward + networks.value
    generated = episodes * answer_tokens
    # The mean written token looks back on its prompt and half of its answer, all of it: twice what `_forward` counts of a length.
    writing = _forward(shape, 2 * prompt_tokens + answer_tokens)
    return Work(
        trained_tokens=trained * (1 + networks.value),
        scored_tokens=tokens * (of_policy + of_scalar),
        generated_tokens=generated,
        trained_flops=3 * trained * (policy + networks.value * scalar),
        scored_flops=tokens * (of_policy * policy + of_scalar * scalar),
        generated_flops=generated * writing + prompts * prompt_tokens * _forward(shape, prompt_tokens),
    )


def _forward(shape: Shape, length: float, output_layer: bool = True) -> float:
    return float(forward_flops_per_token(shape, length, output_layer))
