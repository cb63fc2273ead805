"""What is done with a trained mixture: evaluated, scored, continued, counted, saved, and loaded in another layout."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_checkpoint import open_checkpoints
from world_support import (
    VOCABULARY,
    Case,
    Record,
    build,
    compare,
    model,
    parallel,
    run_reference,
    run_world,
    text,
    train,
)

from trainwright.runtime.megatron import packing
from trainwright.runtime.megatron.canonical import load_canonical, write_canonical
from trainwright.runtime.megatron.generate import open_cached
from trainwright.runtime.megatron.loop import Score, evaluate_nats, forward_logits, score_sequences
from trainwright.runtime.megatron.model_files import ModelFiles
from trainwright.runtime.megatron.pieces import pieces
from trainwright.runtime.megatron.weight_files import WEIGHTS

DEEPSEEK, MIXTRAL, LLAMA4, KIMI = (Case(family=name) for name in ("deepseek", "mixtral", "llama4", "kimi"))


def sequence(first: int, length: int) -> packing.Sequence:
    tokens = [(first + 7 * place) % VOCABULARY for place in range(length)]
    return packing.Sequence(tuple(tokens), (0, *[1] * (length - 1)))


def measure(built: model.Model) -> tuple[float, torch.Tensor, list[Score], int]:
    nats, _ = evaluate_nats(built, text(99, 0, 1)[:3])
    logits = forward_logits(built, torch.arange(7, 7 + 13))
    scores = score_sequences(built, [sequence(3, 9), sequence(50, 21), sequence(8, 2)], row_tokens=24, greedy=True)
    return nats, logits, scores, model.count_parameters(built)


def in_order(cases: Sequence[Case], initial: dict[str, dict[str, torch.Tensor]]) -> list[Any]:
    found = []
    for case in cases:
        built = build(case, initial.get(case.family))
        train(built, [0])
        found.append(measure(built))
        train(built, [1])  # training goes on after it
        parallel.stop()
    return found


@pytest.mark.full  # 8 s
def test_evaluation_scores_logits_and_count_are_those_of_one_process() -> None:
    cases = [
        replace(DEEPSEEK, tensor=2, expert=2),
        replace(DEEPSEEK, pipeline=2),
        replace(MIXTRAL, data=2, expert=2, overlap=True),
        replace(MIXTRAL, tensor=2),
        replace(LLAMA4, context=2, expert=2),
    ]
    families = {case.family: Case(family=case.family) for case in cases}

    def one() -> tuple[dict[str, dict[str, torch.Tensor]], list[Any]]:
        initial = {}
        for name, case in families.items():
            initial[name] = train(build(case), []).initial
            parallel.stop()
        return initial, in_order(list(families.values()), initial)

    initial, found = run_world(1, one)[0]
    expected = dict(zip(families, found, strict=True))
    for rank in run_world(2, lambda: in_order(cases, initial)):
        for case, (nats, logits, scores, count) in zip(cases, rank, strict=True):
            whole_nats, whole_logits, whole_scores, whole_count = expected[case.family]
            assert nats == pytest.approx(whole_nats, rel=1e-5), case
            assert float((logits - whole_logits).norm() / whole_logits.norm()) < 1e-4, case
            for score, whole in zip(scores, whole_scores, strict=True):
                assert score.log_probability == pytest.approx(whole.log_probability, rel=1e-4), case
                assert (score.tokens, score.is_greedy) == (whole.tokens, whole.is_greedy), case
            assert count == whole_count, case


@pytest.mark.full  # 10 s
def test_a_mixture_goes_on_in_another_layout(tmp_path: Path) -> None:
    """MLA, experts with their bias, shared experts, MTP with a tied embedding: each layout trains a step, and saves."""
    tied = replace(DEEPSEEK, tied=True)
    go_on(
        [
            replace(tied, tensor=2, pipeline=2, expert=2),
            replace(tied, pipeline=2, virtual_pipeline=2, overlap=True),
            replace(tied, data=2, expert=2),
            tied,
            replace(tied, tensor=2, expert_tensor=2),
        ],
        tmp_path,
    )


def go_on(way: Sequence[Case], folder: Path) -> None:
    reference = run_reference(replace(way[0], steps=len(way)))
    for step, case in enumerate(way):

        def work(case: Case = case, step: int = step) -> Record:
            checkpoints = open_checkpoints(folder)
            built = build(case, None if step else reference.initial)
            found = checkpoints.prepare()
            if found:
                checkpoints.load(built, found)
            record = train(built, [step])
            checkpoints.save(built, step + 1)
            here = slice(step, step + 1)
            rest = replace(
                reference,
                losses=reference.losses[here],
                grad_norms=reference.grad_norms[here],
                figures=reference.figures[here],
                gradients={},
            )
            if step == len(way) - 1:
                assert compare(record, rest).violations() == [], case
            return record

        record = run_world(case.layout.world_size, work)[0]
        assert record.losses == pytest.approx(reference.losses[step : step + 1], rel=1e-4), case
        assert record.grad_norms == pytest.approx(reference.grad_norms[step : step + 1], rel=1e-4), case


@pytest.mark.parametrize("case", [DEEPSEEK, LLAMA4], ids=str)
def test_kept_keys_and_values_give_the_logits_of_the_whole_text(case: Case, tmp_path: Path) -> None:
    """Latent attention's; and layers with and without positions."""

    def work() -> float:
        built = build(case)
        train(built, [0])
        path = open_checkpoints(tmp_path).save(built, 1)
        tokens = [int(token) for token in text(5, 0, 1)[0]["tokens"][0][:12]]
        expected = forward_logits(built, torch.tensor(tokens))
        parallel.stop()
        cached = open_cached(path)
        worst = 0.0
        for read in (5, 6, 7, 12):
            logits = cached.next_logits(tokens[:read])
            worst = max(worst, float((logits - expected[read - 1]).norm() / expected[read - 1].norm()))
        return worst

    assert run_world(1, work)[0] < 1e-5


def test_whole_tensors_load_in_any_layout_and_are_written_the_same(tmp_path: Path) -> None:
    """The experts' bias too, which is no parameter."""
    (tmp_path / "tokenizer").write_text("{}")
    files = ModelFiles(tmp_path / "tokenizer", None, "")

    def one() -> dict[str, torch.Tensor]:
        built = build(KIMI)
        train(built, [0])
        write_canonical(built, tmp_path / "whole", files)
        return built.gpt.state_dict()

    state = run_world(1, one)[0]
    assert any(bool(state[name].any()) for name in state if name.endswith("expert_bias"))

    def again() -> float:
        worst = 0.0
        for case in (replace(KIMI, tensor=2, expert=2), replace(KIMI, tensor=2, expert_tensor=2)):
            built = build(case)
            load_canonical(built, tmp_path / "whole")
            for piece in pieces(built):
                worst = max(worst, float((piece.tensor - piece.cut.of(state[piece.name])).abs().max()))
            write_canonical(built, tmp_path / str(case.expert), files)
            dist.barrier()
            written = load_file(tmp_path / str(case.expert) / WEIGHTS)
            assert written.keys() == {name for name, value in state.items() if value is not None}
            worst = max(worst, *(float((written[name] - state[name]).abs().max()) for name in written))
            parallel.stop()
        return worst

    assert max(run_world(2, again)) == 0.0


def test_llama4_computes_what_transformers_computes() -> None:
    """Every second layer a mixture, of which one expert reads a token multiplied by its score; norms of queries and keys in the
    layers that have positions. Its RoPE turns neighbouring numbers, as rotary_interleaved=True says."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    def work() -> float:
        torch.manual_seed(3)
        theirs = Llama4ForCausalLM(
            Llama4TextConfig(
                vocab_size=VOCABULARY,
                hidden_size=64,
                intermediate_size=64,
                intermediate_size_mlp=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                num_local_experts=8,
                interleave_moe_layer_step=2,
                initializer_range=0.1,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            )
        ).eval()
        ours = build(replace(LLAMA4, options=(("rotary_interleaved", True),)))
        whole = dict(llama4_tensors(theirs.state_dict()))
        with torch.no_grad():
            for piece in pieces(ours):
                piece.tensor.copy_(whole.pop(piece.name))
        assert not whole
        ours.optimizer.reload_model_params()
        tokens = torch.tensor([(3 + 7 * place) % VOCABULARY for place in range(20)])
        with torch.no_grad():
            expected = theirs(tokens[None]).logits[0]
        return float((forward_logits(ours, tokens) - expected).norm() / expected.norm())

    assert run_world(1, work)[0] < 1e-5


def llama4_tensors(theirs: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of transformers' Llama 4 by the names of Megatron-Core's."""
    yield "embedding.word_embeddings.weight", theirs["model.embed_tokens.weight"]
    yield "output_layer.weight", theirs["lm_head.weight"]
    yield "decoder.final_layernorm.weight", theirs["model.norm.weight"]
    for number in range(4):
        here, there = f"decoder.layers.{number}", f"model.layers.{number}"
        yield f"{here}.input_layernorm.weight", theirs[f"{there}.input_layernorm.weight"]
        yield f"{here}.pre_mlp_layernorm.weight", theirs[f"{there}.post_attention_layernorm.weight"]
        yield f"{here}.self_attention.linear_proj.weight", theirs[f"{there}.self_attn.o_proj.weight"]
        parts = [theirs[f"{there}.self_attn.{name}_proj.weight"].view(2, -1, 64) for name in "qkv"]  # by groups
        yield f"{here}.self_attention.linear_qkv.weight", torch.cat(parts, dim=1).flatten(0, 1)
        ffn = f"{there}.feed_forward"
        if number % 2 == 0:
            yield from _gated(f"{here}.mlp", theirs, ffn)
            continue
        yield f"{here}.mlp.router.weight", theirs[f"{ffn}.router.weight"]
        yield from _gated(f"{here}.mlp.shared_experts", theirs, f"{ffn}.shared_expert")
        for expert in range(8):
            name = f"{here}.mlp.experts.local_experts.{expert}"
            yield f"{name}.linear_fc1.weight", theirs[f"{ffn}.experts.gate_up_proj"][expert].T
            yield f"{name}.linear_fc2.weight", theirs[f"{ffn}.experts.down_proj"][expert].T


def _gated(here: str, theirs: dict[str, torch.Tensor], there: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{here}.linear_fc1.weight", torch.cat([theirs[f"{there}.{name}_proj.weight"] for name in ("gate", "up")])
    yield f"{here}.linear_fc2.weight", theirs[f"{there}.down_proj.weight"]
