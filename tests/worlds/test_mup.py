"""The coordinate check of muP (Yang et al. 2022, appendix D.1): training moves activations as far at every width."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from world_support import HEAD_DIM, Case, build, parallel, run_world, text, train

from trainwright.runtime.megatron.parameters import Groups

BASE = 64  # hidden_size
STEPS = 4


def measure(hidden_size: int, scaled: bool, optimizer: str) -> dict[str, float]:
    """Root mean squares after STEPS steps at the base's learning rate. Of what changed: in the hidden states after the first
    layer, in the attention of the second, in the final norm, and in the logits by what the output layer learnt."""
    width = hidden_size / BASE
    heads = hidden_size // HEAD_DIM
    options: dict[str, Any] = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": 2 * hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": heads // 2,
        "softmax_scale": HEAD_DIM**-0.5,  # sqrt(the base's) / head_dim
        "init_method_std": 0.08 if scaled else 0.08 / math.sqrt(width),
        "embedding_init_method_std": 0.08,
    }
    case = Case(layers=2, optimizer=optimizer, options=tuple(options.items()), distributed_optimizer=False)
    if scaled:
        case = replace(case, groups=Groups(undecayed=("biases", "norms"), width=width))
    built = build(case)
    gpt = built.gpt
    watched = {
        "hidden": gpt.decoder.layers[0],
        "attention": gpt.decoder.layers[1].self_attention,
        "norm": gpt.decoder.final_layernorm,
        "logits": gpt.output_layer,
    }
    seen: dict[str, torch.Tensor] = {}
    for name, module in watched.items():
        module.register_forward_hook(partial(_keep, seen, name))
    row = text(0, 0, 1)[0]

    def forward() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            gpt(row["tokens"], row["position_ids"], None)
        return dict(seen)

    before, output = forward(), gpt.output_layer.weight.detach().clone()
    train(built, [0] * STEPS)
    after = forward()
    before["logits"] = after["norm"] @ output.T * built.embedding.output_multiplier
    parallel.stop()
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def _keep(seen: dict[str, torch.Tensor], name: str, module: Any, arguments: Any, output: Any) -> None:
    seen[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()


@pytest.mark.parametrize(("optimizer", "widths"), [("adam", (64, 128, 256, 512)), ("lion", (64, 512))])
def test_training_moves_activations_as_far_at_every_width(optimizer: str, widths: tuple[int, ...]) -> None:
    def work() -> list[list[dict[str, float]]]:
        return [[measure(width, scaled, optimizer) for width in widths] for scaled in (True, False)]

    [(mup, standard)] = run_world(1, work)
    for name in mup[0]:
        changes, grown = ([one[name] for one in ones] for ones in (mup, standard))
        print(name, [f"{change:.3f}" for change in changes], [f"{change:.3f}" for change in grown])
        assert changes[0] == pytest.approx(grown[0], rel=1e-5), "at the base's width both are the same"
        assert max(changes) <= 1.6 * min(changes), name
        if name in ("hidden", "logits"):
            assert grown[-1] >= 2.5 * grown[0], name
