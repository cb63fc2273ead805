"""ALiBi and Llama 3's RoPE against plain formulas and transformers'."""

import pytest
import torch
from torch import Tensor
from world_support import Case, build, build_frozen, literals, model, parallel, run_world

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.generate import CachedModel
from trainwright.runtime.megatron.layers import alibi_slopes
from trainwright.runtime.megatron.loop import forward_logits
from trainwright.runtime.megatron.platform import Literals
from trainwright.runtime.megatron.specs import layer_specs


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12])
def test_slopes_are_those_of_bloom(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    biases = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)  # of positions 0, 1, 2
    assert alibi_slopes(heads) == pytest.approx(biases[:, 0, 1].tolist())


def plain_alibi(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[s, b, heads, d] with one key and value head each, key by key."""
    sequence, _, heads, size = query.shape
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) / size**0.5
    for head, slope in enumerate(alibi_slopes(heads)):
        for i in range(sequence):
            for j in range(sequence):
                scores[:, head, i, j] += -slope * (i - j) if j <= i else -torch.inf
    return torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), value).flatten(2)


def test_alibi_is_the_plain_formula() -> None:
    """Also of the last queries alone, as with a key-value cache, and with fewer groups than heads."""

    def work() -> tuple[Tensor, ...]:
        attention = build(Case(family="bloom")).gpt.decoder.layers[0].self_attention.core_attention
        generator = torch.Generator().manual_seed(3)
        query, key, value = (torch.randn(7, 2, 4, 16, generator=generator) for _ in range(3))
        whole, last = attention(query, key, value), attention(query[5:], key, value)
        grouped = attention(query, key[:, :, ::2], value[:, :, ::2])
        plain = plain_alibi(query, key, value)
        shared = (x[:, :, ::2].repeat_interleave(2, dim=2) for x in (key, value))
        return whole - plain, last - plain[5:], grouped - plain_alibi(query, *shared)

    for difference in run_world(1, work)[0]:
        assert difference.abs().max() < 1e-5


def test_kept_keys_and_values_are_at_their_distance() -> None:
    def work() -> tuple[Tensor, Tensor]:
        built = build_frozen(Case(family="bloom"))
        cached, tokens = CachedModel(built), [7 * place % 256 for place in range(12)]
        steps = [cached.next_logits(tokens[:length]) for length in (5, 9, 10, 12)]
        whole = forward_logits(built, torch.tensor(tokens))
        return torch.stack(steps), whole[[4, 8, 9, 11]]

    [(steps, whole)] = run_world(1, work)
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-5)


def test_alibi_needs_the_runtimes_own_attention() -> None:
    written, _ = literals(Case(family="bloom"))
    with pytest.raises(Unsupported, match="layer_spec='transformer_engine' has another: write layer_spec='local'"):
        layer_specs(Literals(written.model, None, None, "transformer_engine"), "alibi", None)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rope_is_that_of_llama_3(factor: float) -> None:
    """Frequencies of 64 dimensions at base 500,000: some are kept, some stretched, some in between."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def work() -> Tensor:
        here = parallel.start(parallel.Parallel(), seed=1)
        written, _ = literals(Case())
        written.model.kv_channels = 64
        embedding = model.Embedding(256, 256, 32, "rope", 500_000, tied=True, rotary_scaling=factor)
        built = model.build_frozen(Literals(written.model, None, None, "local"), embedding, here)
        frequencies: Tensor = built.gpt.rotary_pos_emb.inv_freq
        return frequencies

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling=scaling,
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    [found] = run_world(1, work)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    plain = 500_000.0 ** (-torch.arange(0, 64, 2) / 64)
    ratios = plain / found
    assert ratios.min() == pytest.approx(1.0)
    assert ratios.max() == pytest.approx(factor)
    assert ((ratios > 1.01) & (ratios < factor * 0.99)).any()
