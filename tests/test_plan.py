"""Spec in, plan out: reasons, budgets, identity, order of stages."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.compiler.canonical import canonical_json
from trainwright.compiler.choose import choose_plan
from trainwright.compiler.choose.batch import choose_global_batch
from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import REASON_KINDS, Plan, decided_leaves
from trainwright.compiler.ranges import list_divisors
from trainwright.compiler.resolve import resolve_spec

SPECS = Path(__file__).resolve().parents[1] / "specs"


def plan_of(name: str, *overrides: str) -> Plan:
    return choose_plan(resolve_spec(load_spec(SPECS / f"{name}.yaml", overrides)))


@pytest.mark.parametrize("name", ["tiny", "one_node", "many_nodes"])
def test_every_decided_leaf_has_a_reason_and_nothing_else_has(name: str) -> None:
    plan = plan_of(name)
    assert {path for path, _ in decided_leaves(plan)} == set(plan.reasons)
    assert {reason.kind for reason in plan.reasons.values()} <= set(REASON_KINDS)
    assert all(reason.text for reason in plan.reasons.values())


def spent(plan: Plan, kind: str) -> float:
    estimates = plan.estimates
    flops = estimates.model_flops_per_step * plan.training.steps
    return {
        "days": estimates.train_s / 86400,
        "hours": estimates.device_hours,
        "usd": estimates.cost_usd,
        "flops": flops,
    }[kind]


@pytest.mark.parametrize(("budget", "kind", "amount"), [
    ("3 days", "days", 3.0), ("500 device-hours", "hours", 500.0), ("$900", "usd", 900.0), ("2e20 FLOPs", "flops", 2e20)
])  # fmt: skip
def test_an_open_spec_spends_its_budget_and_no_more(budget: str, kind: str, amount: float) -> None:
    plan = plan_of("one_node", f"compute.budget={budget}")
    assert 0.99 * amount <= spent(plan, kind) <= 1.00001 * amount


@settings(max_examples=25)
@given(tokens=st.floats(9.5, 11.2), hours=st.floats(20, 700))
def test_pinned_tokens_and_a_budget_give_a_size_that_the_budget_pays_for(tokens: float, hours: float) -> None:
    """Only a size that no shape has, or that fits no device, is refused."""
    overrides = (f"data.tokens={int(10**tokens)}", f"compute.budget={hours:.1f} device-hours")
    try:
        plan = plan_of("one_node", *overrides)
    except InfeasibleError as error:
        refused = str(error)
    else:
        refused = ""
        assert plan.data.budget_tokens == int(10**tokens)
        assert spent(plan, "hours") <= 1.00001 * hours
    assert not refused or "no layout fits" in refused or "no llama shape" in refused


def test_run_id_is_what_is_trained() -> None:
    tiny = plan_of("tiny").run_id
    same = [
        ("layout.tensor=2",),
        ("layout.micro_batch=4",),
        ("stages={pretrain: {baseline: none}}",),
        ("stages={ingest: {}, pretrain: {baseline: bigram, retries: 3}}",),
        ("stages.sft.epochs=1", "stages.export={}"),
        ("cluster.price=$1/device-hour",),
        ("compute.devices_per_node=1",),
    ]
    assert {plan_of("tiny", *overrides).run_id for overrides in same} == {tiny}
    others = [
        ("training.learning_rate=2e-3",),
        ("seed=7",),
        ("data.tokens=3M",),
        ("model.size=2M",),
        ("stages.curate.near_duplicates=0.7",),
        ("stages.curate.scrub=[email]",),
        ("data.sources[0].filters=none",),
    ]
    assert len({tiny, *(plan_of("tiny", *overrides).run_id for overrides in others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("override", "sft", "dpo"),
    [
        ("stages.sft.epochs=4", True, True),
        ("stages.sft.data=chat.jsonl", True, True),
        ("training.learning_rate=2e-3", True, True),
        ("data.tokens=3M", True, True),
        ("data.test=5%", True, True),
        ("stages.dpo.beta=0.1", False, True),
        ("stages.dpo.learning_rate=1e-4", False, True),
        ("stages.dpo.from=pretrain", False, True),
        ("layout.tensor=2", False, False),
        ("layout.micro_batch=2", False, False),
        ("stages.sft.retries=4", False, False),
        ("stages.evaluate.compare=[sft]", False, False),
        ("stages.pretrain.baseline=none", False, False),
    ],
)
def test_a_tuning_stage_has_an_identity_of_what_it_tunes_and_how(override: str, sft: bool, dpo: bool) -> None:
    """What changes the model that it leaves, and nothing else."""
    overrides = [override, *(["stages.sft.connector="] if "sft.data" in override else [])]
    changed, before = plan_of("tiny", *overrides), plan_of("tiny")
    assert (changed.sft[0].run_id != before.sft[0].run_id, changed.dpo[0].run_id != before.dpo[0].run_id) == (sft, dpo)


def test_a_path_as_written_is_the_identity_of_what_it_holds() -> None:
    """The bundle's own pretraining settings say nothing of a checkpoint that comes from elsewhere; the optimizer's do."""

    def run_id(*overrides: str, path: str = "./base") -> str:
        stages = f"stages={{sft: {{from: {path}, data: chat.jsonl, learning_rate: 1e-4}}}}"
        return plan_of("tiny", stages, *overrides).sft[0].run_id

    assert run_id("data.tokens=3M") == run_id()
    others = [
        run_id(path="./other"),
        run_id("seed=7"),
        run_id("training.beta2=0.9"),
        run_id("model.context_length=128"),
    ]
    assert len({run_id(), *others}) == 5


@pytest.mark.parametrize("batch", ["1 sequences", "3 sequences", "24 sequences", "1 tokens", "100k tokens", ""])
@pytest.mark.parametrize("micro_batch", ["1", "3", "8"])
def test_a_tuning_batch_is_whole_micro_batches_of_at_most_the_tokens_of_pretraining_s(
    batch: str, micro_batch: str
) -> None:
    """A row of DPO is two contexts long; one of them is computed at least."""
    pins = ("compute.devices_per_node=1", "training.global_batch=24 sequences", f"layout.micro_batch={micro_batch}")
    plan = plan_of("tiny", *pins, *(f"stages.{name}.global_batch={batch}" for name in ("sft", "dpo")))
    for stage, contexts in ((plan.sft[0], 1), (plan.dpo[0], 2)):
        given = stage.training
        assert given.global_batch % given.micro_batch == 0
        assert given.micro_batch * contexts <= max(plan.layout.micro_batch, contexts)
        if batch.endswith("sequences"):
            assert given.global_batch == int(batch.split()[0])
        if batch == "100k tokens":
            assert given.global_batch == round(100_000 / 256 / contexts)


def test_a_stated_batch_moves_no_further_than_it_must() -> None:
    assert choose_global_batch(4e6 / 8192, 256, stated=True) == 512  # 488.3: design's example, 4.19M tokens
    assert choose_global_batch(4e6 / 2048, 128, stated=True) == 1920  # 1953.1
    assert choose_global_batch(11.1, 2, stated=False) == 12
    assert choose_global_batch(0.3, 8, stated=False) == 1


@given(st.integers(1, 10**6))
def test_divisors(number: int) -> None:
    divisors = list_divisors(number, number)
    assert list(divisors) == sorted(set(divisors))
    assert all(number % divisor == 0 for divisor in divisors)
    assert len(divisors) == sum(1 for n in range(1, number + 1) if number % n == 0) if number < 3000 else True


def test_stages_that_others_need_are_implied_and_in_order() -> None:
    stages = plan_of("tiny", "stages={pretrain: {}, my-tokens: {kind: tokenize}}").stages
    assert [(stage.name, stage.implied) for stage in stages] == [
        ("ingest", True),
        ("curate", True),
        ("tokenizer", True),
        ("my-tokens", False),
        ("pretrain", False),
    ]
    assert [stage.needs for stage in stages[-2:]] == [("curate", "tokenizer"), ("ingest", "my-tokens", "tokenizer")]


def test_an_evaluation_needs_its_models_and_the_text_of_this_bundle() -> None:
    needs = {stage.name: stage.needs for stage in plan_of("tiny").stages}
    assert needs["evaluate"] == ("dpo", "pretrain", "sft", "tokenize")
    assert needs["export"] == ("dpo", "evaluate"), "the model, and the gates before it"


@pytest.mark.parametrize("value", [{1: 2}, {"a": {1, 2}}, object(), None, float("nan"), float("inf"), b"x"])
def test_canonical_json_refuses_what_has_no_one_spelling(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical_json(value)
