"""Evaluation, logits, counting, refusals: the same in every layout."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
import torch
from world_support import (
    SEQUENCE,
    STEPS,
    VOCABULARY,
    Case,
    build,
    dist,
    literals,
    model,
    named,
    parallel,
    platform,
    run_reference,
    run_world,
    text,
    train,
)

from trainwright.runtime.errors import Diverged, Unsupported
from trainwright.runtime.megatron.loop import evaluate_nats, forward_logits, train_step
from trainwright.runtime.megatron.schedule import LearningRate, Schedule

T = TypeVar("T")
LAYOUTS = [
    Case(tensor=2),
    Case(pipeline=2),
    Case(data=2, overlap=True),
    Case(tensor=2, pipeline=2, tied=True),
    Case(pipeline=2, tied=True, family="gpt"),
    Case(pipeline=2, virtual_pipeline=2, tied=True),
    Case(context=2, family="bloom"),
    Case(context=2, tensor=2),
    Case(pipeline=2, virtual_pipeline=2, data=2, overlap=True),
]


def one_process(case: Case) -> Case:
    return Case(tied=case.tied, family=case.family)


def in_both(case: Case, work: Callable[[model.Model], T]) -> tuple[T, list[T]]:
    """`work` in one process and, with the same weights after two steps of training, on every rank of the case."""
    reference = run_reference(one_process(case))

    def trained(which: Case) -> T:
        built = build(which, reference.initial)
        train(built, range(2))
        return work(built)

    return run_world(1, lambda: trained(one_process(case)))[0], run_world(case.layout.world_size, lambda: trained(case))


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_evaluation_logits_and_count_are_those_of_one_process(case: Case) -> None:
    """Three batches, so that two data ranks get unlike numbers; one has masked tokens; a length that tensor 2 does not divide."""

    def measure(built: model.Model) -> tuple[float, int, torch.Tensor, int]:
        held: list[dict[str, torch.Tensor]] = [dict(batch) for batch in text(99, 0, 1)[:3]]
        held[1]["loss_mask"] = held[1]["loss_mask"].clone()
        held[1]["loss_mask"][:, 5:] = 0.0
        nats, tokens = evaluate_nats(built, held)
        logits = forward_logits(built, torch.arange(7, 7 + 13))
        train(built, range(2, 3))  # training goes on after it
        return nats, tokens, logits, model.count_parameters(built)

    (nats, tokens, logits, count), ranks = in_both(case, measure)
    assert tokens == 2 * 2 * SEQUENCE + 2 * 5
    assert logits.shape == (13, VOCABULARY)
    for rank in ranks:
        assert rank[0] == pytest.approx(nats, rel=1e-5)
        assert rank[1] == tokens
        assert float((rank[2] - logits).norm() / logits.norm()) < 1e-4
        assert rank[3] == count


def test_evaluation_is_the_sum_of_log_probabilities() -> None:
    """The nats of a batch, from the logits of its rows."""

    def measure() -> tuple[float, float]:
        built = build(Case())
        held = text(5, 0, 1)[:1]
        expected = 0.0
        for tokens, labels in zip(held[0]["tokens"], held[0]["labels"], strict=True):
            log_probabilities = forward_logits(built, tokens).log_softmax(-1)
            expected -= float(log_probabilities[torch.arange(SEQUENCE), labels].sum())
        return evaluate_nats(built, held)[0], expected

    [(nats, expected)] = run_world(1, measure)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_a_count_of_parameters_is_that_of_the_tensors() -> None:
    def count() -> tuple[int, int]:
        built = build(Case(tied=True))
        return model.count_parameters(built), sum(parameter.numel() for _, parameter in named(built))

    [(counted, held)] = run_world(1, count)
    assert counted == held


def test_a_loss_that_is_no_number_ends_in_one_error_and_updates_nothing() -> None:
    def poison() -> tuple[str, bool]:
        built = build(Case(data=2))
        name, parameter = next(iter(named(built)))
        assert name == "embedding.word_embeddings.weight"
        with torch.no_grad():
            parameter.fill_(math.nan)
        others = [other.clone() for _, other in named(built)][1:]
        with pytest.raises(Diverged) as caught:
            train_step(built, text(0, dist.get_rank(), 2))
        same = all(torch.equal(a, b) for a, (_, b) in zip(others, list(named(built))[1:], strict=True))
        return str(caught.value), same

    for message, same in run_world(2, poison):
        assert message.startswith("the loss is nan: lower the learning rate")
        assert same


def test_a_world_of_another_size_is_refused_with_the_arithmetic() -> None:
    def refused() -> str:
        with pytest.raises(Unsupported) as caught:
            parallel.start(parallel.Parallel(tensor=2, pipeline=1, data=3), seed=1)
        return str(caught.value)

    [message] = run_world(1, refused)
    assert "tensor 2 x pipeline 1 x data 3 = 6 processes, but 1 is running" in message
    assert message.endswith("1 would fit tensor 1 x pipeline 1 x data 1 = 1 process")


@pytest.mark.parametrize(
    ("running", "fitting"),
    [
        (4, "4 would fit tensor 2 x pipeline 1 x context 2 x data 1 = 4 processes"),
        (16, "16 would fit tensor 2 x pipeline 1 x context 2 x data 4 = 16 processes"),
        (36, "36 would fit tensor 2 x pipeline 3 x context 2 x data 3 = 36 processes"),
        (9, "9 would fit tensor 1 x pipeline 3 x data 3 = 9 processes"),
    ],
)
def test_the_layouts_that_fit_the_processes_are_named(
    running: int, fitting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is built: no process group is there to be asked."""
    monkeypatch.setenv("WORLD_SIZE", str(running))
    with pytest.raises(Unsupported) as caught:
        parallel.start(parallel.Parallel(tensor=2, pipeline=3, context=2, data=2), seed=1)
    assert fitting in str(caught.value)
    assert not dist.is_initialized()


def refusal(case: Case, **changes: object) -> str:
    """What is said of a case, by a program whose literals or layout are changed."""
    layout, (written, embedding) = case.layout, literals(case)
    sizes = {"sequence_length": embedding.sequence_length, "padded_vocab_size": embedding.padded_vocab_size}
    for name, value in changes.items():
        if name in sizes:
            sizes[name] = int(str(value))
        elif hasattr(layout, name):
            layout = replace(layout, **{name: value})  # type: ignore[arg-type]
        else:
            setattr(written.model, name, value)
    with pytest.raises(Unsupported) as caught:
        parallel.check_model(layout, written.model, **sizes)
    return str(caught.value)


INTERLEAVED = Case(pipeline=2, virtual_pipeline=2)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            Case(tensor=2),
            {"tensor": 4},
            "model=tensor_model_parallel_size=2, but the layout (tensor 4 x pipeline 1 x data 1",
        ),
        (Case(pipeline=2), {"pipeline": 1}, "model=pipeline_model_parallel_size=2, but the layout"),
        (Case(context=2), {"context": 1}, "model=context_parallel_size=2, but the layout"),
        (INTERLEAVED, {"virtual_pipeline": 1}, "model=virtual_pipeline_model_parallel_size=2, but the layout"),
        (INTERLEAVED, {"batch_p2p_comm": True}, "batch_p2p_comm=True swaps the messages"),
        (Case(pipeline=2), {"overlap_p2p_comm": True}, "overlap_p2p_comm=True needs an interleaved pipeline"),
        (Case(tensor=2), {"padded_vocab_size": 255}, "padded_vocab_size 255 is not divisible by 2 (tensor; "),
        (Case(tensor=2), {"num_query_groups": 3}, "num_query_groups 3 is not divisible by 2 (tensor; "),
        (Case(tensor=2), {"ffn_hidden_size": 127}, "ffn_hidden_size 127 is not divisible by 2 (tensor; "),
        (Case(context=2), {"sequence_length": 30}, "sequence_length 30 is not divisible by 4 (2 x context; "),
        (
            Case(context=2, tensor=4, family="gpt"),
            {"sequence_length": 36},
            "sequence_length 36 is not divisible by 8 (context x tensor, with sequence_parallel; the layout is tensor 4",
        ),
        (INTERLEAVED, {"num_layers": 6}, "num_layers 6 is not divisible by 4 (pipeline 2 x virtual_pipeline 2): 6 = 1"),
        (
            Case(pipeline=2),
            {"account_for_loss_in_pipeline_split": True},
            "num_layers 4 + the loss = 5 is not divisible by 2 (pipeline 2 x virtual_pipeline 1): 5 = 2 x 2 + 1",
        ),
        (
            Case(pipeline=2),
            {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 1},
            "num_layers 4 less those of the first stage (2) and the last stage (1) leaves 1 for 0 other pipeline stages",
        ),
        (
            Case(pipeline=3),
            {"num_layers_in_first_pipeline_stage": 1},
            "num_layers 4 less those of the first stage (1) leaves 3 for 2 other pipeline stages",
        ),
        (
            INTERLEAVED,
            {"num_layers_in_first_pipeline_stage": 3},
            "3 layers of the first pipeline stage do not divide into virtual_pipeline 2 chunks",
        ),
    ],
)
def test_a_program_that_contradicts_itself_is_refused(case: Case, changes: dict[str, object], message: str) -> None:
    assert message in refusal(case, **changes)


def test_a_batch_that_the_layout_cannot_share_is_refused() -> None:
    layout = parallel.Parallel(pipeline=2, virtual_pipeline=2, data=2)
    parallel.check_batch(layout, global_batch=16, micro_batch=2)
    with pytest.raises(Unsupported, match="global_batch 18 is not a multiple of micro_batch 2 x data 2 = 4"):
        parallel.check_batch(layout, global_batch=18, micro_batch=2)
    with pytest.raises(Unsupported, match="global_batch 12 is 3 x micro_batch 2 x data 2, and of an interleaved"):
        parallel.check_batch(layout, global_batch=12, micro_batch=2)


def test_a_cpu_names_what_it_overrides_and_leaves_the_program_alone() -> None:
    def adapt() -> tuple[str, str, bool, bool, str]:
        here = platform.current()
        written, _ = literals(Case())
        plain = here.describe(here.adapt(written)[1])
        written.model.bias_dropout_fusion = True
        cuda = platform.Literals(written.model, written.ddp, written.optimizer, "transformer_engine")
        used, overrides = here.adapt(cuda)
        return (
            plain,
            here.describe(overrides),
            cuda.model.bias_dropout_fusion,
            used.model.bias_dropout_fusion,
            used.layer_spec,
        )

    [(plain, described, written, used, spec)] = run_world(1, adapt)
    assert plain == "platform cpu: no literal overridden"
    assert described == (
        "platform cpu: overrides layer_spec='transformer_engine' -> 'local', model.bias_dropout_fusion=True -> False"
    )
    assert written is True
    assert used is False
    assert spec == "local"


def test_cuda_runs_the_program_as_written_or_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "find_spec", lambda name: None)
    here = platform.Platform("cuda", "nccl", torch.device("cuda", 0))
    written, _ = literals(Case())
    assert here.describe(here.adapt(written)[1]) == "platform cuda: no literal overridden"
    with pytest.raises(Unsupported, match="Transformer Engine is not installed"):
        here.adapt(platform.Literals(written.model, written.ddp, written.optimizer, "transformer_engine"))
    fused = copy.copy(written.model)
    fused.apply_rope_fusion = True
    with pytest.raises(Unsupported, match="apply_rope_fusion=False"):
        here.adapt(platform.Literals(fused, written.ddp, written.optimizer, "local"))


def test_what_transformer_engine_alone_recomputes_is_kept_on_a_cpu_and_refused_on_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written, _ = literals(
        Case(options=(("recompute_granularity", "selective"), ("recompute_modules", ("layernorm", "mlp"))))
    )
    used, overrides = platform.current().adapt(written)
    assert [str(override) for override in overrides] == ["model.recompute_modules=('layernorm', 'mlp') -> ['mlp']"]
    assert used.model.recompute_modules == ["mlp"]
    monkeypatch.setattr(platform, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="recomputes layernorm through Transformer Engine, which is not installed"):
        platform.Platform("cuda", "nccl", torch.device("cuda", 0)).adapt(written)


def test_a_cpu_keeps_what_gloo_still_sends() -> None:
    options = (("overlap_p2p_comm", True), ("deallocate_pipeline_outputs", True))
    used, overrides = platform.current().adapt(literals(replace(INTERLEAVED, options=options))[0])
    assert [str(override) for override in overrides] == ["model.deallocate_pipeline_outputs=True -> False"]
    assert used.model.deallocate_pipeline_outputs is False


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_learning_rate_warms_up_and_ends_at_its_floor(kind: str) -> None:
    """Warm-up of 4, 10 steps, with wsd a decay over the last 4; a run that resumes after step 8 goes on with the same rates."""

    def rates() -> tuple[list[float], list[float]]:
        built = build(Case())
        config = literals(Case())[0].optimizer
        config.min_lr = config.lr / 10
        for group in built.optimizer.param_groups:
            group["min_lr"] = config.min_lr
        decay = (4, "minus_sqrt") if kind == "wsd" else (0, "none")
        schedule = Schedule(kind, STEPS, 4, *decay)
        whole = LearningRate(schedule, built.optimizer, config, finished_steps=0)
        first = [whole.advance() for _ in range(STEPS)]
        assert built.optimizer.param_groups[0]["lr"] == pytest.approx(first[-1])
        rest = LearningRate(schedule, built.optimizer, config, finished_steps=8)
        return first, [rest.advance() for _ in range(2)]

    [(first, rest)] = run_world(1, rates)
    peak = 3e-3
    assert first[:4] == pytest.approx([peak / 4, peak / 2, peak * 3 / 4, peak])
    expected, floor = [peak] * 6, peak / 10
    if kind == "wsd":
        expected[2:] = [floor + (peak - floor) * (1 - math.sqrt(i / 4)) for i in range(1, 5)]
    if kind == "linear":
        expected = [floor + (peak - floor) * (1 - i / 6) for i in range(1, 7)]
    if kind == "cosine":
        expected = [floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(1, 7)]
    assert first[4:] == pytest.approx(expected)
    assert rest == first[8:]
