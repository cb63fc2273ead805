"""Learning rate, batch, weight decay, schedule: a spec in, a plan's training section out; and the laws' golden values."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from benchmark_modules import load_benchmark
from hypothesis import given
from hypothesis import strategies as st
from reference_tables import scaling_rows

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose import choose_plan
from trainwright.compiler.choose.hyperparameters import describe_run
from trainwright.compiler.emit import emit_bundle
from trainwright.compiler.errors import CompileError, IllegalPlanError, InfeasibleError, SpecError
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import find_family, find_hyperparameter_law, load_hyperparameter_laws
from trainwright.compiler.laws.rates import (
    Run,
    apply_power,
    batch_overhead,
    law_batch,
    law_rate,
    law_timescale,
    scale_rate,
    weight_decay,
)
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan
from trainwright.compiler.resolve import resolve_spec

ROOT = Path(__file__).resolve().parents[1]
ONE_NODE = ROOT / "specs" / "one_node.yaml"
# 1.1B parameters on 20B tokens: near the ranges of the laws, and far from any limit of the devices.
SMALL = ("compute.budget=", "model.size=1.1B", "data.tokens=20B", "model.vocab_size=32000", "model.context_length=2048")


def plan_of(*overrides: str, spec: Path = ONE_NODE) -> Plan:
    plan = choose_plan(resolve_spec(load_spec(spec, (*SMALL, *overrides) if spec == ONE_NODE else overrides)))
    assert check_plan(plan) == []
    return plan


def why(plan: Plan, leaf: str) -> str:
    return plan.reasons[f"training.{leaf}"].text


def run_of(parameters: float, tokens: float, expansion: float = 1.0, flops: float = 0.0) -> Run:
    return Run(parameters, parameters, parameters, flops or 6 * parameters, tokens, expansion)


# ---- the laws


@pytest.mark.parametrize(
    ("prefix", "law", "compute", "column", "rows"),
    [
        ("steplaw", "step_law", law_rate, "lr", 5),
        ("steplaw", "step_law", law_batch, "batch_tokens", 5),
        ("porian lr", "porian2024", law_rate, "lr", 5),
        ("bjorck", "bjorck2024", law_rate, "lr", 5),
        ("power_lines", "power_lines2025", law_timescale, "tau", 5),
    ],
)
def test_golden_values_by_parameters_and_tokens(
    reference: Path, prefix: str, law: str, compute: object, column: str, rows: int
) -> None:
    golden = [row for row in _golden(reference) if row["law"].startswith(prefix)]
    assert len(golden) == rows
    runs = [run_of(*_numbers(row["input"])) for row in golden]
    computed = [float(compute(find_hyperparameter_law(law), run)) for run in runs]  # type: ignore[operator]
    assert computed == pytest.approx([float(row[column]) for row in golden], rel=1e-5)


def test_golden_values_of_porians_batch_and_of_experts(reference: Path) -> None:
    for row in _golden(reference):
        parameters = _numbers(row["input"])[0]
        if row["law"].startswith("porian lr"):
            batch = float(law_batch(find_hyperparameter_law("porian2024"), run_of(parameters, 1.0)))
            assert batch / 2048 == pytest.approx(float(row["batch_seqs"]), rel=1e-5)
        if row["law"].startswith("joint_moe"):
            law = find_hyperparameter_law("ludziejewski2025")
            rates = law_rate(law, run_of(parameters, 1.0, np.array([1.0, 8.0])))  # type: ignore[arg-type]
            assert list(rates) == pytest.approx([float(row["lr_E1"]), float(row["lr_E8"])], rel=1e-5)


def test_golden_values_by_compute_and_of_the_critical_batch(reference: Path) -> None:
    law, kaplan = find_hyperparameter_law("deepseek_llm"), find_hyperparameter_law("kaplan2020")
    found = 0
    for row in _golden(reference):
        if row["law"].startswith("deepseek_llm"):
            run = run_of(1.0, float(row["input"].removeprefix("C=")), flops=1.0)  # C = M D
            computed = (float(law_rate(law, run)), float(law_batch(law, run)))
            assert computed == pytest.approx([float(row["lr"]), float(row["batch_tokens"])], rel=1e-5)
            found += 1
        if row["law"].startswith("kaplan B_crit"):
            assert kaplan.batch is not None
            critical = apply_power(kaplan.batch, {"L": np.float64(row["input"].removeprefix("L="))})  # type: ignore[dict-item]
            assert float(critical) == pytest.approx(float(row["tokens"]), rel=1e-5)
            found += 1
    assert found == 7 + 5


def test_every_law_says_something_has_a_source_and_the_range_that_it_was_fitted_on() -> None:
    for law in load_hyperparameter_laws().values():
        assert law.learning_rate or law.batch or law.timescale
        assert "arXiv" in law.source
        assert law.fitted
        assert all(low < high for low, high in law.fitted.values())


@given(batch=st.floats(1e3, 1e9), own=st.floats(1e3, 1e9), critical=st.floats(1e3, 1e9), factor=st.floats(1.01, 100))
def test_a_larger_batch_needs_more_tokens_and_the_laws_own_none(
    batch: float, own: float, critical: float, factor: float
) -> None:
    assert batch_overhead(own, own, critical) == 0
    assert batch_overhead(factor * batch, own, critical) > batch_overhead(batch, own, critical) > -1
    assert batch_overhead(critical, 0.0, critical) == pytest.approx(1)  # twice the least number of tokens
    assert scale_rate(batch, own) == pytest.approx(math.sqrt(min(1.0, batch / own)))


@given(batch=st.floats(1e3, 1e8), rate=st.floats(1e-6, 1e-1), tokens=st.floats(1e6, 1e14), share=st.floats(0.01, 1))
def test_weight_decay_makes_adamw_forget_over_the_share_of_the_run(
    batch: float, rate: float, tokens: float, share: float
) -> None:
    decay = float(weight_decay(batch, rate, tokens, share))
    steps_to_forget, steps = 1 / (rate * decay), tokens / batch
    assert steps_to_forget / steps == pytest.approx(share)


def test_the_regret_of_laws_on_the_runs_of_step_law(reference: Path) -> None:
    """As a report on the same data computed it, grid by grid; its Porian counts no output layer either."""
    bench = load_benchmark("rates")
    grids = bench.load_grids(reference)
    assert (len(grids), sum(len(grid.trials) for grid in grids)) == (17, 1911)
    stated: dict[str, list[float]] = {}
    for row in scaling_rows(reference, "hp_law_regret"):
        stated.setdefault(row["law"], []).append(float(row["regret_nearest"]))
    names = {"step_law": "steplaw", "deepseek_llm": "deepseek(C=MD)", "porian2024": "porian(N no head)"}
    for law, name in names.items():
        assert sorted(bench.law_regrets(grids, law)) == pytest.approx(sorted(stated[name]), abs=1e-9)
    for (rate, batch), name in zip(bench.CONSTANTS.values(), ("const 1e-3, 0.5M", "const 3e-4, 4M"), strict=True):
        assert sorted(grid.regret(rate, batch) for grid in grids) == pytest.approx(sorted(stated[name]), abs=1e-9)
    step = bench.law_regrets(grids, "step_law")
    assert (sum(step) / len(step), max(step)) == pytest.approx((0.00096, 0.0031), rel=0.01)


def test_the_rule_for_a_forced_batch_is_the_best_of_the_simple_ones(reference: Path) -> None:
    bench = load_benchmark("rates")
    grids = bench.load_grids(reference)
    means = {
        name: tuple(float(np.mean(bench.rule_regrets(grids, rule, above=above))) for above in (False, True))
        for name, rule in bench.RULES.items()
    }
    below, above = means["the root below, unchanged above"]
    assert below == min(mean for mean, _ in means.values())
    assert above == min(mean for _, mean in means.values())
    assert (below, above) == pytest.approx((0.00091, 0.00095), abs=0.00001)
    assert means["the root of the ratio"][1] == pytest.approx(0.00742, abs=0.00001)


def test_the_rates_of_the_laws_spread_nine_fold() -> None:
    run = run_of(1e9, 2e10)
    rates = [float(law_rate(law, run)) for law in load_hyperparameter_laws().values() if law.learning_rate]
    assert len(rates) == 5
    assert max(rates) / min(rates) == pytest.approx(9.4, abs=0.1)


def test_what_the_laws_count_of_a_shape() -> None:
    """GPT-3 175B has no gate and as many key heads as heads: DeepSeek's M is 72 L d^2 + 12 L d s there."""
    layers, width, context = 96, 12288, 2048
    shape = find_family("gpt3").published["175B"]
    run = describe_run(shape, context, 3e11)
    assert run.body == 12 * layers * width**2
    assert run.without_embedding == run.body + shape.vocab_size * width
    assert run.used == count_parameters(shape, context)
    assert run.flops == 72 * layers * width**2 + 12 * layers * width * context
    assert (run.tokens, run.expansion) == (3e11, 1.0)


# ---- which law a plan takes


def test_step_law_gives_rate_and_batch_unless_the_spec_says_otherwise() -> None:
    plan = plan_of()
    training, text = plan.training, why(plan, "learning_rate")
    body = float(re.search(r"1.79 x (\S+)\^-0.713", text)[1])  # type: ignore[index]
    assert training.learning_rate == pytest.approx(1.79 * body**-0.713 * 2e10**0.307, rel=0.05)  # whole sequences
    assert training.tokens_per_step == pytest.approx(0.58 * 2e10**0.571, rel=0.1)
    assert text.startswith("step_law: 1.79 x ")
    assert why(plan, "global_batch").startswith("step_law: 0.58 x 2e+10^0.571 = 441,892 tokens a step; others: ")
    assert re.search(r"others: \S+ \(ludziejewski2025\) to \S+ \(porian2024\)$", text)
    assert plan.estimates.batch_overhead == 0
    assert not [warning for warning in plan.estimates.warnings if "step_law" in warning]


@pytest.mark.parametrize("law", ["step_law", "deepseek_llm", "porian2024", "bjorck2024", "ludziejewski2025"])
def test_each_law_of_the_rate_can_be_taken(law: str) -> None:
    plan = plan_of(f"scaling.learning_rate={law}", "scaling.batch=step_law")
    assert plan.reasons["training.learning_rate"].kind == "law"
    assert why(plan, "learning_rate").startswith(f"{law}: ")
    assert f"({law})" not in why(plan, "learning_rate")  # the range is that of the others
    assert why(plan, "global_batch").startswith("step_law: ")


@pytest.mark.parametrize("law", ["step_law", "deepseek_llm", "porian2024", "kaplan2020"])
def test_each_law_of_the_batch_can_be_taken(law: str) -> None:
    plan = plan_of(f"scaling.batch={law}")
    assert why(plan, "global_batch").startswith(f"{law}: ")
    assert why(plan, "learning_rate").startswith("step_law: ")
    if law == "kaplan2020":  # the batch that costs twice the least tokens is no best one
        assert plan.estimates.batch_overhead > 0.3
        assert any("is above the" in warning and "of step_law" in warning for warning in plan.estimates.warnings)
    else:
        assert plan.estimates.batch_overhead == 0


def test_a_laws_rate_comes_with_its_batch_where_it_has_one() -> None:
    assert why(plan_of("scaling.learning_rate=deepseek_llm"), "global_batch").startswith("deepseek_llm: ")
    assert why(plan_of("scaling.learning_rate=bjorck2024"), "global_batch").startswith("step_law: ")
    porian = plan_of("scaling.learning_rate=porian2024")
    parameters = float(re.search(r"3.7 x (\S+)\^", why(porian, "learning_rate"))[1])  # type: ignore[index]
    assert porian.training.warmup_steps == pytest.approx(parameters / porian.training.tokens_per_step, abs=1)
    assert porian.training.beta2 == 0.95
    small = plan_of("scaling.learning_rate=porian2024", "model.size=150M", "data.tokens=3B")
    assert small.training.beta2 == 0.99
    assert plan_of("scaling.learning_rate=porian2024", "model.size=300M", "data.tokens=6B").training.beta2 == 0.95
    short = plan_of("scaling.learning_rate=porian2024", "data.tokens=1B").training
    assert short.warmup_steps == short.steps // 2  # parameters / tokens a step would be more


def test_kaplans_batch_is_where_twice_the_least_tokens_are_needed() -> None:
    plan = plan_of("scaling.batch=kaplan2020")
    assert plan.training.tokens_per_step == pytest.approx(plan.estimates.critical_batch_tokens, rel=0.1)
    assert "at its own L(N, D)" in why(plan, "global_batch")


def test_a_mixture_of_experts_may_have_the_rate_of_its_own_law() -> None:
    mixture = ("model.family=mixtral", "model.size=8x7B", "data.tokens=300B", "compute.nodes=8")
    plan = plan_of(*mixture, "scaling.learning_rate=ludziejewski2025")
    text = why(plan, "learning_rate")
    assert text.startswith("ludziejewski2025: 4402.8 x ")
    assert " x 4^-0.25 = " in text  # 8 experts, of which a token uses 2
    assert why(plan, "global_batch").startswith("step_law: ")
    assert why(plan_of(*mixture), "learning_rate").startswith("step_law: ")
    small = plan_of("scaling.learning_rate=ludziejewski2025", "training.global_batch=16 sequences")
    assert " at its batch of 256,000 tokens; x sqrt(32,768 / 256,000) = " in why(small, "learning_rate")


def test_a_law_that_asks_for_a_batch_nobody_trained_with_is_held() -> None:
    where = ("model.size=70B", "data.tokens=1.4T", "compute.nodes=64", "model.vocab_size=")
    plan = plan_of(*where, "scaling.batch=porian2024")
    asked, held = re.search(
        r"= ([\d,]+) tokens a step, held to ([\d,]+), Llama 3 405B's", why(plan, "global_batch")
    ).groups()  # type: ignore[union-attr]
    assert int(asked.replace(",", "")) == pytest.approx(2048 * 0.00037 * 7e10**0.703, rel=0.02)
    assert plan.training.tokens_per_step == int(held.replace(",", "")) == 2**24
    assert plan.estimates.batch_overhead == 0  # beside what the planner would take


# ---- a batch that is forced


def test_a_smaller_batch_lowers_the_rate_by_the_root_and_costs_no_tokens() -> None:
    own = plan_of()
    small = plan_of("training.global_batch=64 sequences")
    ratio = small.training.tokens_per_step / 441_892
    at_own = float(re.search(r"= (\S+) at its batch", why(own, "learning_rate"))[1])  # type: ignore[index]
    assert small.training.learning_rate == pytest.approx(at_own * math.sqrt(ratio), rel=1e-3)
    assert small.estimates.batch_overhead < 0
    assert not [warning for warning in small.estimates.warnings if "more tokens" in warning]


def test_a_larger_batch_keeps_the_rate_and_is_priced() -> None:
    own = plan_of()
    large = plan_of("training.global_batch=1024 sequences")
    assert large.training.learning_rate == pytest.approx(own.training.learning_rate, rel=0.05)
    assert "no higher for 2,097,152" in why(large, "learning_rate")
    critical = large.estimates.critical_batch_tokens
    overhead = (1 + 2_097_152 / critical) / (1 + 441_892 / critical) - 1
    assert large.estimates.batch_overhead == pytest.approx(overhead, rel=1e-3)
    [warning] = [warning for warning in large.estimates.warnings if "more tokens" in warning]
    assert f"= {overhead:.1%} more tokens" in warning
    hours, money = re.search(r"worth ([\d.]+) device-hours, \$([\d.]+)", warning).groups()  # type: ignore[union-attr]
    assert float(hours) == pytest.approx(overhead * large.estimates.device_hours, rel=1e-3)
    assert float(money) == pytest.approx(overhead * large.estimates.cost_usd, rel=1e-2)


def test_the_price_of_a_batch_changes_nothing_of_what_is_trained() -> None:
    by_step, by_porian = (
        plan_of("training.global_batch=256 sequences"),
        plan_of("training.global_batch=256 sequences", "scaling.batch=porian2024"),
    )
    assert by_step.run_id == by_porian.run_id
    assert by_step.estimates.batch_overhead > 0 > by_porian.estimates.batch_overhead


def test_a_run_that_is_long_for_its_batch_is_told_of_the_law_of_a_fixed_one() -> None:
    long = plan_of("training.global_batch=512 sequences", "data.tokens=5T")
    [warning] = [warning for warning in long.estimates.warnings if "the batch is fixed at" in warning]
    taken = plan_of("training.global_batch=512 sequences", "data.tokens=5T", "scaling.learning_rate=bjorck2024")
    assert taken.training.learning_rate == pytest.approx(
        float(re.search(r"says (\S+) ", warning)[1]),
        rel=0.05,  # type: ignore[index]
    )
    assert taken.training.learning_rate < long.training.learning_rate
    assert f"a lower rate than {long.training.learning_rate:.2g}; " in warning
    assert not [warning for warning in plan_of().estimates.warnings if "fixed at" in warning]
    small = plan_of("training.global_batch=8 sequences")  # its rate is lower already
    assert small.training.learning_rate < 5.8e-4
    assert not [warning for warning in small.estimates.warnings if "fixed at" in warning]


@pytest.mark.parametrize(
    ("overrides", "batch", "data"),
    [
        (("compute.nodes=64", "layout.data=512"), 512, 512),
        (("compute.nodes=2048", "layout.pipeline=2"), 1024, 1024),  # 8 key heads: tensor 8 x pipeline 2
        (("compute.nodes=7", "compute.devices_per_node=7", "layout.micro_batch=8"), 392, 49),
    ],
)
def test_devices_that_take_more_at_once_force_the_batch(overrides: tuple[str, ...], batch: int, data: int) -> None:
    plan = plan_of(*overrides)
    assert (plan.training.global_batch, plan.layout.data) == (batch, data)
    assert plan.reasons["training.global_batch"].kind == "law"
    assert re.search(r"takes [\d,]+ or more at once: the devices force the batch", why(plan, "global_batch"))
    assert f"no higher for {2048 * batch:,}" in why(plan, "learning_rate")
    assert plan.estimates.batch_overhead > 0.05
    assert [warning for warning in plan.estimates.warnings if "more tokens" in warning]


def test_a_batch_that_the_user_stated_is_forced_by_no_device() -> None:
    for stated in ("64 sequences", "131072 tokens"):
        with pytest.raises(InfeasibleError, match="but global_batch is 64"):
            plan_of("compute.nodes=64", "layout.data=512", f"training.global_batch={stated}")


@pytest.mark.parametrize(("batch", "told"), [("288 sequences", False), ("320 sequences", True)])
def test_a_price_below_a_twentieth_of_the_tokens_is_worth_no_word(batch: str, told: bool) -> None:
    plan = plan_of(f"training.global_batch={batch}")
    assert (plan.estimates.batch_overhead > 0.05) == told
    assert bool([warning for warning in plan.estimates.warnings if "more tokens" in warning]) == told


def test_laws_outside_the_range_that_they_were_fitted_on_say_so() -> None:
    def outside(*overrides: str) -> list[str]:
        return [warning for warning in plan_of(*overrides).estimates.warnings if "outside its range" in warning]

    [warning] = outside("model.size=3B")
    assert warning.startswith("step_law is used outside its range, for ")
    assert warning.endswith(" parameters (fitted: 2.15e+08 to 1.07e+09): learning rate and batch are guesses")
    [warning] = outside("data.tokens=200B", "training.learning_rate=1e-3")
    assert warning.endswith(" 2e+11 tokens (fitted: 4e+09 to 1e+11): batch is a guess")
    [warning] = outside("scaling.learning_rate=bjorck2024", "model.size=500M")
    assert "(fitted: 7.6e+08 up): learning rate is a guess" in warning


# ---- muP

MUP = (
    "scaling.learning_rate=mup",
    "scaling.mup.hidden_size=256",
    "scaling.mup.learning_rate=0.008",
    "scaling.mup.init_std=0.02",
)
SHAPE = "model.shape={{num_layers: 12, hidden_size: {0}, ffn_hidden_size: {1}, num_attention_heads: 8}}"


def test_mup_halves_the_rate_at_twice_the_width() -> None:
    at = {width: plan_of("model.size=", SHAPE.format(width, 3 * width), *MUP).training for width in (256, 512, 1024)}
    for (
        width,
        training,
    ) in at.items():  # the program divides matrices' rates by the width, and their deviations by its root
        assert (training.learning_rate, training.init_std, training.mup_width) == (0.008, 0.02, width / 256)
        # small Llamas tie the output layer to the embedding, which an export of muP has no place for
        plan = plan_of("model.size=", SHAPE.format(width, 3 * width), *MUP, "stages={pretrain: {}}")
        program = emit_bundle(plan).files["05_pretrain.py"].decode()
        assert f"width={width / 256!r}," in program
        assert f"output_multiplier={256 / width!r}," in program


def test_mup_says_what_is_divided_by_the_width() -> None:
    plan = plan_of("model.size=", SHAPE.format(1024, 4096), *MUP)
    assert "0.008 of the base run, which hidden matrices divide by hidden_size 1024 / 256 = 4" in why(
        plan, "learning_rate"
    )
    assert not [warning for warning in plan.estimates.warnings if "learning rate is a guess" in warning]


# ---- pins, customs


def test_pins_win_over_every_law() -> None:
    pins = {
        "learning_rate": "7e-4",
        "weight_decay": "0.07",
        "beta2": "0.97",
        "init_std": "0.015",
        "clip_grad": "0.8",
        "min_learning_rate": "1e-5",
    }
    overrides = [f"training.{name}={value}" for name, value in pins.items()]
    plan = plan_of(*overrides, "training.global_batch=200 sequences", *MUP)
    assert {name: getattr(plan.training, name) for name in pins} == {name: float(value) for name, value in pins.items()}
    assert plan.training.global_batch == 200
    for name in (*pins, "global_batch"):
        assert plan.reasons[f"training.{name}"].kind == "pinned"


def test_weight_decay_follows_the_timescale_within_three_times_of_the_custom() -> None:
    plan = plan_of()
    share = 1.084 * (2e10 / plan.estimates.parameters) ** -0.527
    expected = plan.training.tokens_per_step / (plan.training.learning_rate * 2e10 * share)
    assert plan.training.weight_decay == pytest.approx(expected, rel=1e-3)
    assert f"= {expected:.4g}"[:6] in why(plan, "weight_decay")
    low = plan_of("training.learning_rate=1e-2")
    assert low.training.weight_decay == 0.03
    assert "held to 0.03: within three times of the 0.1" in why(low, "weight_decay")
    assert plan_of("training.learning_rate=1e-5").training.weight_decay == 0.3


@pytest.mark.parametrize(("batch", "beta2"), [("255 sequences", 0.99), ("256 sequences", 0.95)])
def test_beta2_by_batch(batch: str, beta2: float) -> None:
    assert (
        plan_of(f"training.global_batch={batch}", "layout.data=1", "compute.devices_per_node=1").training.beta2 == beta2
    )


def test_wide_models_start_from_smaller_weights() -> None:
    assert plan_of("model.size=", SHAPE.format(512, 2048)).training.init_std == 0.02
    wide = plan_of("model.size=8B", "compute.nodes=4", "model.vocab_size=")
    assert wide.training.init_std == pytest.approx(math.sqrt(1 / (3 * 4096)), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "steps", "warmup"), [("16k", 1, 0), ("160k", 10, 1), ("11.64M", 710, 36), ("1.6B", 97656, 2000)]
)
def test_warm_up_is_a_share_of_the_run_up_to_a_limit_and_leaves_a_step(tokens: str, steps: int, warmup: int) -> None:
    training = plan_of(f"data.tokens={tokens}", "training.global_batch=8 sequences").training
    assert (training.steps, training.warmup_steps) == (steps, warmup)


def test_the_demo_trains_as_it_was_tried() -> None:
    training = plan_of(spec=ROOT / "specs" / "tiny.yaml").training
    assert (training.learning_rate, training.min_learning_rate, training.tokens_per_step) == (3e-3, 3e-4, 4096)
    assert (training.beta1, training.beta2, training.weight_decay) == (0.9, 0.95, 0.1)
    assert (training.schedule, training.warmup_steps, training.init_std, training.clip_grad) == (
        "cosine",
        35,
        0.02,
        1.0,
    )


# ---- wsd


@pytest.mark.parametrize(
    ("decay", "steps"), [((), 7752), (("training.decay=10%",), 3876), (("training.decay=500 steps",), 500)]
)
def test_wsd_ends_in_a_decay_to_zero(decay: tuple[str, ...], steps: int) -> None:
    plan = plan_of("training.schedule=wsd", *decay, "training.global_batch=252 sequences")
    training = plan.training
    assert (training.schedule, training.decay_style, training.min_learning_rate) == ("wsd", "minus_sqrt", 0.0)
    assert (training.steps, training.decay_steps) == (38752, pytest.approx(steps, abs=2))
    assert plan.reasons["training.decay_steps"].kind == ("pinned" if decay else "default")
    program = emit_bundle(plan).files["05_pretrain.py"].decode()
    assert "kind='wsd'" in program.replace('"', "'")
    assert f"decay_steps={training.decay_steps}," in program
    assert "decay_style='minus_sqrt'" in program.replace('"', "'")


def test_a_long_warm_up_leaves_wsd_a_shorter_decay() -> None:
    training = plan_of("training.schedule=wsd", "training.warmup=95%").training
    assert training.decay_steps == training.steps - training.warmup_steps == round(0.05 * training.steps)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_other_schedules_have_no_decay_of_their_own(schedule: str) -> None:
    training = plan_of(f"training.schedule={schedule}").training
    assert (training.decay_steps, training.decay_style) == (0, "none")
    share = 1 if schedule == "constant" else 0.1
    assert training.min_learning_rate == pytest.approx(share * training.learning_rate, rel=1e-5)


@given(steps=st.integers(1, 40))
def test_wsd_fits_runs_of_any_length(steps: int) -> None:
    training = plan_of(
        "training.schedule=wsd", "training.global_batch=8 sequences", f"data.tokens={16384 * steps}"
    ).training
    assert training.steps == steps
    assert training.warmup_steps + training.decay_steps <= steps
    assert training.decay_steps >= 1


# ---- bad input


@pytest.mark.parametrize(
    ("overrides", "error", "fragments"),
    [
        (
            ("scaling.learning_rate=mup",),
            SpecError,
            ("scaling.learning_rate: mup", "add scaling.mup: {hidden_size: 256"),
        ),
        (MUP[1:], SpecError, ("scaling.mup: the base run of learning_rate: mup; add learning_rate: mup",)),
        (("scaling.learning_rate=step_lwa",), SpecError, ('"step_lwa" is not', "did you mean step_law?")),
        (("scaling.batch=bjorck2024",), SpecError, ('"bjorck2024" is not', "porian2024")),
        (("scaling.mup={hidden_size: 256}",), SpecError, ("scaling.mup.learning_rate", "scaling.mup.init_std")),
        (("training.decay=20%",), SpecError, ("training.decay: only wsd has a decay of its own", "add schedule: wsd")),
        (
            ("training.decay=20%", "training.schedule=cosine"),
            SpecError,
            ("training.decay: only wsd has a decay of its own; schedule is cosine",),
        ),
        (("training.schedule=wsd", "training.decay=150%"), SpecError, ("training.decay: 150% of the steps",)),
        (
            ("training.schedule=wsd", "training.decay=96%"),
            IllegalPlanError,
            ("training.decay: 2,000 steps of warm-up + ", " of decay = ", "and the run has "),
        ),
        (
            ("training.schedule=wsd", "training.warmup=90%", "training.decay=20%"),
            IllegalPlanError,
            ("training.decay: ", " steps of warm-up + "),
        ),
        (
            ("training.warmup=100%",),
            IllegalPlanError,
            ("training.warmup: ", "leave none of the run's 43,597 steps; shorten it"),
        ),
        (
            ("training.schedule=wsd", "training.decay=0%"),
            IllegalPlanError,
            ("training.decay: none of the run's 43,597 steps",),
        ),
        (
            ("training.min_learning_rate=1e-2",),
            IllegalPlanError,
            (
                "--set training.min_learning_rate=1e-2: training.min_learning_rate: 0.01 is above the 0.000982597 that a law",
            ),
        ),
        (
            ("training.warmup=1e9 steps",),
            IllegalPlanError,
            ("training.warmup: 1,000,000,000 steps of warm-up leave none",),
        ),
    ],
)
def test_bad_input_is_one_message(
    overrides: tuple[str, ...], error: type[CompileError], fragments: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        plan_of(*overrides)
    for fragment in fragments:
        assert fragment in str(caught.value)


# ---- reading


def _golden(reference: Path) -> list[dict[str, str]]:
    return scaling_rows(reference, "golden_values")


def _numbers(text: str) -> list[float]:
    """ "N=1e9 D=2e10" -> [1e9, 2e10]; a law that asks for N alone gets 1 token."""
    numbers = [float(word.split("=")[1]) for word in text.split()]
    return numbers if len(numbers) > 1 else [*numbers, 1.0]
