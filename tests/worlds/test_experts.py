"""Mixtures of experts, latent attention and prediction of further tokens train in every layout as in one process.

Nothing is dropped: an expert takes all tokens that are sent to it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from tuning_tasks import PAD, PAIRS, ROW, rows
from world_support import LAYOUT_OPTIONS, TEXT, Case, Record, Task, build, literals, run_cases, run_reference, run_world

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron.families import check_family
from trainwright.runtime.megatron.losses import Loss, Totals
from trainwright.runtime.megatron.packing import packed_row
from trainwright.runtime.megatron.pieces import Cut, pieces

STEPS = 4


def even_rows(step: int, data_rank: int, data_size: int) -> list[dict[str, Tensor]]:
    return [packed_row(items, ROW + 3, PAD) for items in rows(step)[data_rank::data_size]]


EVEN = Task("even rows", even_rows)
WHOLE = {"distributed_optimizer": False}  # the buffer holds whole gradients, so those of step 1 are compared
ALLGATHER = (("moe_token_dispatcher_type", "allgather"),)
FULL_QUERIES = (("q_lora_rank", None),)


def case(family: str, **what: object) -> Case:
    return Case(family=family, steps=STEPS, **what)  # type: ignore[arg-type]


TWO = [
    case("mixtral", data=2, expert=2),
    case("mixtral", tensor=2, **WHOLE),
    case("qwen3moe", tensor=2, expert_tensor=2, **WHOLE),
    case("qwen3moe", data=2, expert=2, options=ALLGATHER, **WHOLE),
    case("llama4", tensor=2, expert=2, **WHOLE),
    case("llama4", pipeline=2, **WHOLE),
    case("deepseek", tensor=2, expert=2, **WHOLE),
    case("deepseek", pipeline=2, tied=True, **WHOLE),
    case("kimi", data=2, expert=2, overlap=True),
    case("latent", tensor=2, **WHOLE),
    case("mixtral", context=2, expert=2, **WHOLE),
    case("kimi", context=2, **WHOLE),
    case("llama4", pipeline=2, virtual_pipeline=2, tied=True, **WHOLE),
]
FOUR = [
    case("mixtral", tensor=2, data=2, expert=2, expert_tensor=2),
    case("kimi", pipeline=2, data=2, expert=2, options=FULL_QUERIES, **WHOLE),
    case("deepseek", tensor=2, pipeline=2, expert=2),
]

RECOMPUTED_MIXTURES = (("recompute_granularity", "selective"), ("recompute_modules", ("moe", "core_attn")))
BY_SOFTMAX = (  # DeepSeek-V2's router
    ("moe_router_score_function", "softmax"),
    ("moe_router_pre_softmax", True),
    ("moe_router_enable_expert_bias", False),
    ("moe_router_topk", 4),
    ("moe_router_num_groups", 4),
    ("moe_router_group_topk", 2),
)
MORE_OF_TWO = [
    case("kimi", tensor=2, expert=2, options=BY_SOFTMAX, **WHOLE),
    case("mixtral", data=2, **WHOLE),
    case("mixtral", tensor=2, expert_tensor=2, options=ALLGATHER, **WHOLE),
    case("mixtral", tensor=2, expert=2, overlap=True),
    case("mixtral", pipeline=2, virtual_pipeline=2, overlap=True),
    case("qwen3moe", tensor=2, **WHOLE),
    case("qwen3moe", context=2, **WHOLE),
    case("llama4", tensor=2, expert_tensor=2, **WHOLE),
    case("llama4", tensor=2, options=ALLGATHER, **WHOLE),
    case("llama4", data=2, expert=2, recompute=True, **WHOLE),
    case("llama4", context=2, expert=2, **WHOLE),
    case("deepseek", tensor=2, expert_tensor=2, tied=True, **WHOLE),
    case("deepseek", data=2, expert=2, recompute=True, **WHOLE),
    case("deepseek", pipeline=2, virtual_pipeline=2, **WHOLE),
    case("kimi", tensor=2, **WHOLE),
    case("kimi", data=2, expert=2, options=(*ALLGATHER, *RECOMPUTED_MIXTURES), **WHOLE),
    case("latent", context=2, **WHOLE),
    case("latent", pipeline=2, virtual_pipeline=2, tied=True, **WHOLE),
]
MORE_OF_FOUR = [
    case("qwen3moe", tensor=2, context=2, expert=4, options=ALLGATHER, **WHOLE),
    case("mixtral", data=4, expert=2),
    case("llama4", data=4, expert=4, overlap=True),
    case("kimi", tensor=2, context=2, expert=2, expert_tensor=2),
    case("kimi", tensor=4, expert=2, expert_tensor=2, **WHOLE),
    case("deepseek", pipeline=2, virtual_pipeline=2, data=2, expert=2, tied=True),
    case("mixtral", pipeline=2, context=2, expert=2, **WHOLE),
]
EIGHT = [
    case("mixtral", tensor=2, pipeline=2, data=2, expert=2),
    case("kimi", pipeline=2, context=2, data=2, expert=4),
    case("deepseek", tensor=2, data=4, expert=4, expert_tensor=2),
]


@pytest.fixture(scope="module")
def references() -> dict[object, Record]:
    return {}


def reference_of(case: Case, references: dict[object, Record]) -> Record:
    """Trained once a model."""
    key = case.family, case.tied, case.task, tuple(option for option in case.options if option[0] not in LAYOUT_OPTIONS)
    if key not in references:
        references[key] = run_reference(case)
        fall = references[key].losses[0] - references[key].losses[-1]
        assert fall >= 0.2, f"{case}: the reference's loss fell by {fall:.2f} only: equality after it would say little"
    return references[key]


def check(cases: list[Case], references: dict[object, Record]) -> None:
    wholes = {case: reference_of(case, references) for case in cases}
    for case, difference in zip(cases, run_cases(cases, wholes), strict=True):
        print(f"{case}: {difference}")
        assert difference.violations() == [], str(case)
        assert bool(difference.gradient_name) is not case.distributed_optimizer


def test_two_processes(references: dict[object, Record]) -> None:
    check(TWO, references)


@pytest.mark.full  # 7 s
def test_four_processes(references: dict[object, Record]) -> None:
    check(FOUR, references)


def test_ranks_draw_the_same_weights_of_what_they_both_hold_and_others_of_the_rest() -> None:
    """Of a mixture spread over 2 expert ranks and cut over 2 tensor ranks, with 2 replicas of everything."""

    def work() -> list[tuple[tuple[str, Cut], Tensor]]:
        built = build(case("kimi", tensor=2, data=2, expert=2, expert_tensor=1))
        return [((piece.name, piece.cut), piece.tensor.detach().clone()) for piece in pieces(built)]

    held: dict[tuple[str, Cut], list[Tensor]] = {}
    for rank in run_world(4, work):
        for key, tensor in rank:
            held.setdefault(key, []).append(tensor)
    assert {len(copies) for copies in held.values()} == {2, 4}
    assert all(torch.equal(copy, copies[0]) for copies in held.values() for copy in copies)
    drawn = [copies[0].flatten()[:4].tolist() for copies in held.values() if copies[0].dim() > 1]
    assert len({tuple(values) for values in drawn}) == len(drawn)


@pytest.mark.full
@pytest.mark.parametrize("cases", [MORE_OF_TWO, MORE_OF_FOUR, EIGHT], ids=["two", "four", "eight"])
def test_more_layouts(cases: list[Case], references: dict[object, Record]) -> None:
    """About 40 + 40 + 40 s on two free cores."""
    check(cases, references)


@pytest.mark.full
def test_bf16_trains() -> None:
    """The experts' bias stays in fp32. About 10 s."""
    mixed = case("kimi", data=2, expert=2, bf16=True)
    reference = run_reference(mixed)
    [difference] = run_cases([mixed], {mixed: reference})
    assert difference.loss <= 2e-2, difference
    assert difference.grad_norm <= 5e-2, difference


def test_router_losses_weigh_the_same_where_the_loss_is_a_mean_over_tokens() -> None:
    """Here micro-batches hold as many targets, so that both means are the same; in the second Megatron-Core 0.16.1 divides the
    losses of routers by the tensor and context ranks."""
    whole = case("mixtral", **WHOLE)
    reference = run_reference(whole)
    means = [
        replace(whole, tensor=2, task=replace(TEXT, per_token=True)),
        replace(whole, context=2, expert=2, task=replace(TEXT, per_token=True)),
    ]
    for mean, difference in zip(means, run_cases(means, dict.fromkeys(means, reference)), strict=True):
        print(f"{mean}: {difference}")
        assert difference.violations() == [], str(mean)


@pytest.mark.full  # 6 s
def test_packed_rows() -> None:
    """Of a length that ranks share evenly: padding counts among the tokens that experts are balanced over."""
    cases = [
        case("mixtral", tensor=2, task=EVEN, **WHOLE),
        case("deepseek", data=2, expert=2, task=EVEN, **WHOLE),
        case("kimi", context=2, task=EVEN, **WHOLE),
    ]
    for one, difference in zip(cases, run_cases(cases, {one: run_reference(one) for one in cases}), strict=True):
        print(f"{one}: {difference}")
        assert difference.violations() == [], str(one)


def test_router_losses_weigh_the_same_whatever_the_loss_is_a_mean_over() -> None:
    """Targets, or rows (as pairs are): with a loss that says nothing, only the routers' own give gradients."""

    def nothing(items: Callable[[Mapping[str, Tensor]], Tensor]) -> Case:
        loss = Loss(lambda nats, batch: Totals(nats.sum() * 0, items(batch), nats.new_zeros(0)), items=items)
        return case("mixtral", task=replace(EVEN, loss=loss), **WHOLE)

    targets, rows = nothing(lambda batch: batch["loss_mask"].sum()), nothing(lambda batch: torch.tensor(1.0))
    first, second = (run_reference(one).gradients for one in (targets, rows))
    routers = [name for name in first if "router" in name]
    assert len(routers) == 4
    for name in routers:
        assert float(first[name].norm()) > 1e-3
        assert float((first[name] - second[name]).norm() / first[name].norm()) < 1e-5


def test_pairs_do_not_train_the_prediction_of_further_tokens() -> None:
    unbalanced = (("moe_router_load_balancing_type", "none"),)  # else what balances their experts trains them
    spread = case("deepseek", data=2, expert=2, task=PAIRS, options=unbalanced, **WHOLE)
    reference = run_reference(spread)
    [difference] = run_cases([spread], {spread: reference})
    assert difference.violations() == []
    further = {name: float(tensor.norm()) for name, tensor in reference.gradients.items() if name.startswith("mtp.")}
    assert further
    assert not any(further.values())
    assert "further_tokens_loss" not in reference.figures[0]


MISFITS = [
    ("mixtral", {"tensor": 2, "sequence_parallel": False}, "needs sequence_parallel=True"),
    (
        "latent",
        {"tensor": 2, "sequence_parallel": False},
        "latent attention with tensor 2 needs sequence_parallel=True",
    ),
    ("latent", {"expert": 2}, "a dense model has no experts"),
    ("mixtral", {"expert": 3, "data": 3}, "num_moe_experts 8 is not divisible by expert 3: 8 = 2 x 3 + 2"),
    ("mixtral", {"data": 3, "expert_tensor": 3}, "moe_ffn_hidden_size 64 is not divisible by expert_tensor 3"),
    ("mixtral", {"data": 3, "expert": 2}, "2 must divide 3"),
    ("deepseek", {"context": 2}, "further tokens by the tokens of each context rank"),
]


@pytest.mark.parametrize(("family", "degrees", "message"), MISFITS)
def test_what_does_not_fit_a_layout_is_refused(family: str, degrees: dict[str, int], message: str) -> None:
    layout = Case(family=family, **degrees)
    written = (
        replace(layout, expert=1) if family == "latent" else layout
    )  # else Megatron-Core refuses the config itself
    with pytest.raises(Unsupported, match=re.escape(message)):
        check_family(layout.layout, literals(written)[0].model)
