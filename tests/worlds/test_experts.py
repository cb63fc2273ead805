"""Mixtures of experts, latent attention and prediction of further tokens train in every layout as in one process.

Nothing is dropped: an expert takes all tokens that are sent to it.
"""

import pytest
from world_support import LAYOUT_OPTIONS, Case, Record, run_cases, run_reference

STEPS = 4

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
    case("qwen3moe", tensor=2, context=2, expert=4, options=ALLGATHER, **WHOLE),
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


def test_four_processes(references: dict[object, Record]) -> None:
    check(FOUR, references)
