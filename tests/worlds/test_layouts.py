"""Interleaved and uneven pipelines, context parallelism, recompute, and all of them together, train as one process does."""

from dataclasses import replace

import pytest
from tuning_tasks import PACKED, PAIRS
from world_support import Case, build, parallel, run_cases, run_reference, run_world, train

SHORT = 5  # steps: in the first, gradients are compared by name, and after the last, parameters
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}


def case(**fields: object) -> Case:
    """A short case with whole gradients; `options` as a dict."""
    options = fields.pop("options", {})
    assert isinstance(options, dict)
    default = {"steps": SHORT, "distributed_optimizer": False, "options": tuple(options.items())}
    return Case(**{**default, **fields})  # type: ignore[arg-type]


def check(cases: list[Case]) -> None:
    """Train them all in one world, and compare each with one process's run of the same model."""
    kinds = {(c.family, c.tied, c.layers, c.task.name, c.steps): c for c in cases}
    references = {kind: run_reference(c) for kind, c in kinds.items()}
    for one in references.values():
        assert one.losses[0] - min(one.losses) >= 0.01 * len(one.losses), "a run that learns nothing says little"
    differences = run_cases(cases, {c: references[c.family, c.tied, c.layers, c.task.name, c.steps] for c in cases})
    for one, difference in zip(cases, differences, strict=True):
        print(f"{one}: {difference}")
        assert difference.violations() == [], str(one)


def test_two_processes_share_positions() -> None:
    """Also of packed rows, whose sequences are no multiple of 4 positions, and of a loss over pairs of them."""
    check(
        [
            case(context=2),
            case(context=2, family="gpt", tied=True),
            case(context=2, family="bloom"),
            case(context=2, task=PACKED),
            case(context=2, task=PAIRS, distributed_optimizer=True),
        ]
    )


def test_two_processes_share_layers_in_turn_and_unevenly() -> None:
    check(
        [
            case(**INTERLEAVED),
            case(**INTERLEAVED, tied=True),
            case(**INTERLEAVED, options={"overlap_p2p_comm": True}),
            case(pipeline=2, layers=5, options={"num_layers_in_first_pipeline_stage": 3}),
            case(pipeline=2, layers=5, options={"num_layers_in_last_pipeline_stage": 1}),
            case(**INTERLEAVED, layers=6, options={"num_layers_in_first_pipeline_stage": 2}),
            case(pipeline=2, layers=5, options={"account_for_embedding_in_pipeline_split": True}),
            case(
                **INTERLEAVED,
                layers=6,
                options={
                    "account_for_embedding_in_pipeline_split": True,
                    "account_for_loss_in_pipeline_split": True,
                },
            ),
        ]
    )


@pytest.mark.full  # 8 s
def test_four_processes_share_both() -> None:
    check(
        [
            case(context=2, tensor=2),
            case(context=2, **INTERLEAVED, tied=True),
            case(context=2, data=2, task=PACKED, distributed_optimizer=True),
            case(**INTERLEAVED, data=2, distributed_optimizer=True, overlap=True),
            case(**INTERLEAVED, tensor=2),
        ]
    )


def test_eight_processes() -> None:
    check([case(tensor=2, pipeline=2, data=2, steps=2, distributed_optimizer=True)])


@pytest.mark.full
def test_more_processes_share_everything() -> None:
    """About 90 s."""
    check(
        [
            case(context=4),
            case(context=4, task=PACKED),
            case(context=2, data=2, family="bloom", task=PACKED),
            case(context=2, data=2, family="gpt", task=PACKED),
            case(context=2, tensor=2, family="qwen"),
            case(context=2, data=2, overlap=True, distributed_optimizer=True),
            case(context=2, tensor=2, family="bloom"),
            case(context=2, tensor=2, task=PAIRS),
            case(context=2, tensor=2, sequence_parallel=False),
            case(pipeline=4, virtual_pipeline=2, layers=8),
            case(pipeline=4, layers=7, options={"num_layers_in_first_pipeline_stage": 1}),
        ]
    )
    check(
        [
            case(context=2, tensor=2, **INTERLEAVED, steps=2),
            case(context=2, data=2, **INTERLEAVED, steps=2, overlap=True, distributed_optimizer=True),
            case(context=2, tensor=2, data=2, steps=2, task=PACKED, distributed_optimizer=True),
            case(tensor=2, data=2, **INTERLEAVED, steps=2, distributed_optimizer=True),
            case(data=4, pipeline=2, steps=2, overlap=True, distributed_optimizer=True),
        ]
    )


RECOMPUTED = {
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)},
    "feed-forward": {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    "uniform, of 2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "block, 1": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("options", RECOMPUTED.values(), ids=RECOMPUTED)
def test_recomputed_modules_run_twice_and_change_nothing(options: dict[str, object]) -> None:
    """Which module runs how often, and the losses, to the last bit."""

    def passes(which: Case) -> tuple[list[int], list[float], list[float]]:
        built, calls = build(which), [0] * 5
        layers = [layer for chunk in built.chunks for layer in chunk.decoder.layers]
        watched = [layer.self_attention.linear_qkv for layer in (layers[0], layers[-1])]
        watched += [
            layers[0].self_attention.core_attention,
            layers[0].mlp.linear_fc1,
            layers[0].self_attention.linear_proj,
        ]
        for index, module in enumerate(watched):
            module.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
        record = train(built, range(2))
        return calls, record.losses, record.grad_norms

    plain, again = (run_world(1, lambda which=which: passes(which))[0] for which in (case(), case(options=options)))
    assert plain[1:] == again[1:]
    more = [twice // once for once, twice in zip(plain[0], again[0], strict=True)]
    expected = {
        ("core_attn",): [1, 1, 2, 1, 1],
        ("mlp",): [1, 1, 1, 2, 1],
        "uniform": [2, 2, 2, 2, 2],
        "block": [2, 1, 2, 2, 2],
    }
    assert more == expected[options.get("recompute_modules", options.get("recompute_method"))]  # type: ignore[index]


def test_recompute_in_layouts() -> None:
    check(
        [
            case(**INTERLEAVED, options=RECOMPUTED["block, 1"]),
            case(context=2, options=RECOMPUTED["core attention"] | {"recompute_modules": ("core_attn", "mlp")}),
            case(tensor=2, options=RECOMPUTED["uniform, of 2"], steps=2),
        ]
    )


def test_bf16_with_fp32_masters_trains_alike() -> None:
    """bf16 rounds at other places in another layout: losses to 2e-2, norms to 5e-2; gradients are summed in fp32 or bf16."""
    cases = [
        case(context=2, bf16=True, distributed_optimizer=True),
        case(**INTERLEAVED, bf16=True, bf16_gradients=True, distributed_optimizer=True),
    ]
    reference = run_reference(cases[0])
    for one, difference in zip(cases, run_cases(cases, dict.fromkeys(cases, reference)), strict=True):
        print(f"{one}: {difference}")
        assert difference.loss <= 2e-2, one
        assert difference.grad_norm <= 5e-2, one


@pytest.mark.parametrize("degrees", [{"context": 2}, INTERLEAVED], ids=["context", "interleaved"])
def test_full_recompute_drops_out_what_was_dropped_out(degrees: dict[str, int]) -> None:
    plain = case(**degrees, dropout=0.2, steps=2)

    def work() -> list[tuple[list[float], list[float]]]:
        said = []
        for one in (plain, replace(plain, recompute=True), replace(plain, dropout=0.0)):
            record = train(build(one), range(2))
            said.append((record.losses, record.grad_norms))
            parallel.stop()
        return said

    for dropped, again, none in run_world(2, work):
        assert dropped == again
        assert dropped != none
