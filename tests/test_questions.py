"""What the spec pins, a law answers the rest: every inverse question, and specs that ask them."""

import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.choose.bands import bands_of_answer
from trainwright.compiler.choose.question import Question, answer, life_flops
from trainwright.compiler.choose.sizes import Sizes, tabulate_sizes
from trainwright.compiler.choose.variants import sizes_of
from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.estimate.flops import model_flops_per_token
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import load_families
from trainwright.compiler.laws.find import find_law
from trainwright.compiler.laws.law import Law
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan
from trainwright.compiler.resolve import resolve_spec

LAW = find_law("epoch2024")


def six_n_d() -> Sizes:
    """Sizes of which every parameter costs 6 FLOPs a token, and nothing else does: what laws' own closed forms count."""
    total = np.geomspace(1e4, 1e15, 2201)
    columns = {field.name: total for field in dataclasses.fields(Sizes)}
    return Sizes(**{**columns, "flops_per_token": 6 * total})


IDEAL = six_n_d()


def ask(law: Law, sizes: Sizes = IDEAL, **pinned: float) -> tuple[float, float]:
    parameters, tokens = answer(law, sizes, Question(**pinned))
    return float(parameters[0]), float(tokens[0])


# ---- one law, 6 N D


@given(exponent=st.floats(17, 28))
def test_a_budget_buys_what_the_closed_form_says(exponent: float) -> None:
    parameters, tokens = ask(LAW, life_flops=10.0**exponent)
    best = LAW.frontier(np.float64(10.0**exponent))
    assert (parameters, tokens) == pytest.approx((float(best[0]), float(best[1])), rel=2e-4)
    assert 6 * parameters * tokens == pytest.approx(10.0**exponent)


@pytest.mark.parametrize(
    ("loss", "flops", "parameters", "tokens"),
    [
        # reference/scaling.md, section 3.0: closed forms of the refit, evaluated apart from this code.
        (2.5, 1.5099e20, 1.0567e9, 2.3816e10),
        (2.0, 2.4305e23, 4.698e10, 8.623e11),
    ],
)
def test_a_loss_costs_what_the_closed_form_says(loss: float, flops: float, parameters: float, tokens: float) -> None:
    found = ask(LAW, target_loss=loss)
    assert found == pytest.approx((parameters, tokens), rel=3e-4)
    assert 6 * found[0] * found[1] == pytest.approx(flops, rel=1e-4)


@given(exponent=st.floats(17, 28))
def test_inverse_questions_agree(exponent: float) -> None:
    parameters, tokens = ask(LAW, life_flops=10.0**exponent)
    loss = float(LAW.loss(np.float64(parameters), np.float64(tokens)))
    assert ask(LAW, parameters=parameters)[1] == pytest.approx(tokens, rel=1e-3)
    assert ask(LAW, tokens=tokens)[0] == pytest.approx(parameters, rel=1e-3)
    assert ask(LAW, target_loss=loss) == pytest.approx((parameters, tokens), rel=2e-3)
    assert ask(LAW, target_loss=loss, parameters=parameters)[1] == pytest.approx(tokens, rel=1e-5)
    assert ask(LAW, target_loss=loss, tokens=tokens)[0] == pytest.approx(parameters, rel=1e-5)
    assert ask(LAW, life_flops=10.0**exponent, parameters=parameters)[1] == pytest.approx(tokens)
    assert ask(LAW, life_flops=10.0**exponent, tokens=tokens)[0] == pytest.approx(parameters)
    assert ask(LAW, training_flops=10.0**exponent) == pytest.approx((parameters, tokens))


@pytest.mark.parametrize(
    "name", ["hoffmann2022_1", "hoffmann2022_2", "porian2024", "llama3", "kaplan2020", "deepseek_llm"]
)
@given(exponent=st.floats(19, 25))
def test_a_frontier_is_followed_in_the_exact_flops(name: str, exponent: float) -> None:
    law = find_law(name)
    sizes = tabulate_sizes(load_families()["llama2"], 0, 32000, 4096)
    parameters, tokens = ask(law, sizes, life_flops=10.0**exponent)
    cost = float(sizes.at(sizes.flops_per_token, np.array([parameters]))[0]) * tokens
    assert cost == pytest.approx(10.0**exponent, rel=1e-6)
    counted = sizes.at(sizes.counted(law.facts.counts), np.array([parameters]))
    assert float(law.tokens_for(counted)[0]) == pytest.approx(tokens, rel=1e-3)


TABLES = {
    name: tabulate_sizes(family, 0, family.rules.vocab_size, family.rules.context_length)
    for name, family in load_families().items()
    if not family.rules.num_experts
}


@pytest.mark.parametrize("family", TABLES)
@given(exponent=st.floats(18, 27), share=st.sampled_from([0.0, 0.3]))
def test_inverse_questions_agree_in_the_exact_flops_of_a_family(family: str, exponent: float, share: float) -> None:
    """What a budget buys is what its size and its tokens alone ask for, and costs what its loss does. Sizes as the law counts
    them, and within some percent: a family's depth, heads and tying change in steps."""
    sizes, flops = TABLES[family], 10.0**exponent

    def counted(total: float) -> float:
        return float(sizes.at(sizes.counted(LAW.facts.counts), np.array([total]))[0])

    used = share * flops / (2 * ask(LAW, sizes, life_flops=flops)[0])
    parameters, tokens = ask(LAW, sizes, life_flops=flops, inference_tokens=used)
    assert ask(LAW, sizes, parameters=parameters, inference_tokens=used)[1] == pytest.approx(tokens, rel=0.04)
    again = ask(LAW, sizes, tokens=tokens, inference_tokens=used)[0]
    assert counted(again) == pytest.approx(counted(parameters), rel=0.04)
    loss = float(LAW.loss(counted(parameters), tokens))
    question = Question(target_loss=loss, inference_tokens=used)
    cost = life_flops(sizes, question, *answer(LAW, sizes, question))
    assert float(cost[0]) == pytest.approx(flops, rel=2e-3)


# ---- inference


def test_a_model_that_is_used_is_smaller_and_trained_longer() -> None:
    """Sardana and Frankle's example, 7B-Chinchilla quality and 1e11 inference tokens, by the refit: 5.59B, tokens x 1.278."""
    tokens = float(LAW.tokens_for(np.float64(7e9)))
    loss = float(LAW.loss(np.float64(7e9), np.float64(tokens)))
    found = ask(LAW, target_loss=loss, inference_tokens=1e11)
    assert found == pytest.approx((5.59e9, 1.278 * tokens), rel=2e-3)


@given(exponent=st.floats(19, 26), share=st.floats(0.01, 0.9))
def test_the_first_order_condition_holds(exponent: float, share: float) -> None:
    """N dL/dN / (D dL/dD) = 1 + D_inference / (3 D), whatever is pinned (Sardana and Frankle 2023)."""
    flops = 10.0**exponent
    used = share * flops / (2 * ask(LAW, life_flops=flops)[0])
    parameters, tokens = ask(LAW, life_flops=flops, inference_tokens=used)
    question = Question(life_flops=flops, inference_tokens=used)
    cost = life_flops(IDEAL, question, np.array([parameters]), np.array([tokens]))
    assert float(cost[0]) == pytest.approx(flops)
    c = LAW.facts.constants
    slope = c["alpha"] * c["A"] * parameters ** -c["alpha"] / (c["beta"] * c["B"] * tokens ** -c["beta"])
    assert slope == pytest.approx(1 + used / (3 * tokens), rel=2e-3)
    assert ask(LAW, parameters=parameters, inference_tokens=used)[1] == pytest.approx(tokens, rel=5e-3)
    assert ask(LAW, tokens=tokens, inference_tokens=used)[0] == pytest.approx(parameters, rel=5e-3)


# ---- repeated data, experts, draws


def test_unique_tokens_make_the_model_smaller_and_the_passes_many() -> None:
    """scaling.md, section 3.2: 5.76e23 FLOPs and 1e11 unique tokens -> 48.3B, 19.9 epochs, L 2.0608; 70.0B without the limit."""
    law = find_law("muennighoff2023")
    assert ask(law, life_flops=5.76e23)[0] == pytest.approx(70.0e9, rel=1e-3)
    bound = law.with_unique_tokens(1e11)  # type: ignore[attr-defined]
    parameters, tokens = ask(bound, life_flops=5.76e23)
    assert (parameters, tokens / 1e11) == pytest.approx((48.3e9, 19.9), rel=3e-3)
    assert float(bound.loss(np.float64(parameters), np.float64(tokens))) == pytest.approx(2.0608, abs=1e-4)


def test_a_band_holds_the_answer_and_widens_with_the_distance() -> None:
    """scaling.md, section 1.4, 80 %: D/N at 5.88e23 10.0 to 28.2, at 1e26 6.6 to 30.3."""
    widths = []
    for flops, low, high in ((5.88e23, 10.0, 28.2), (1e26, 6.6, 30.3)):
        question = Question(life_flops=flops)
        parameters, tokens = answer(LAW, IDEAL, question)
        sizes, budgets, _ = bands_of_answer(LAW, IDEAL, question)
        assert sizes.low < parameters[0] < sizes.high
        assert budgets.low < tokens[0] < budgets.high
        assert (budgets.low / sizes.high, budgets.high / sizes.low) == pytest.approx((low, high), rel=0.1)
        widths.append(math.log(sizes.high / sizes.low))
    assert widths[1] > widths[0]
    pinned, *_ = bands_of_answer(LAW, IDEAL, Question(parameters=1e9))
    assert (pinned.low, pinned.high) == (0.0, 0.0)


@pytest.mark.parametrize("family", ["llama", "llama2", "gpt3", "qwen3"])
def test_the_table_of_sizes_follows_real_shapes(family: str) -> None:
    """The search's real-valued sizes are within some percent of the published shapes: in FLOPs, and as laws count them."""
    facts = load_families()[family]
    rules = facts.rules
    table = tabulate_sizes(facts, 0, rules.vocab_size, rules.context_length)
    for shape in facts.published.values():
        total = np.array([float(count_parameters(shape, rules.context_length))])
        exact = sizes_of(shape, rules.context_length)
        for name in ("embedding_once", "without_embedding", "body", "active", "flops", "flops_per_token"):
            found = table.at(getattr(table, name), total)
            assert found == pytest.approx(getattr(exact, name), rel=0.4 if family == "qwen3" else 0.1), name


# ---- specs


def planned(tmp_path: Path, **sections: Any) -> Plan:
    lines = {
        "name": "x",
        "model": "{family: llama2}",
        "data": "{sources: [{name: web, path: web/*.jsonl}]}",
        "compute": "{device: h100, nodes: 1, devices_per_node: 8}",
        "stages": "{pretrain: {}}",
        **sections,
    }
    path = tmp_path / "spec.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return choose_plan(resolve_spec(load_spec(path, ())))


NODE = "device: h100, nodes: 1, devices_per_node: 8"
SOURCES = "sources: [{name: web, path: web/*.jsonl}]"


def test_the_exact_flops_of_the_shape_fill_the_budget(tmp_path: Path) -> None:
    plan = planned(tmp_path, compute=f"{{{NODE}, budget: 1e21 FLOPs}}")
    spent = plan.estimates.model_flops_per_step * plan.training.steps
    assert 1e21 - plan.estimates.model_flops_per_step <= spent <= 1e21 * (1 + 1e-6)
    each = model_flops_per_token(plan.shape, plan.training.context_length)
    assert plan.data.budget_tokens * each == pytest.approx(1e21, rel=1e-5)
    assert plan.estimates.parameters_80.low < plan.estimates.parameters < plan.estimates.parameters_80.high
    assert plan.estimates.loss_80.low < plan.estimates.predicted_loss < plan.estimates.loss_80.high


@pytest.mark.parametrize("limit", ["budget: 2 days", "budget: $1k", "budget: 400 device-hours"])
def test_time_money_and_device_hours_settle_at_the_layouts_own_utilisation(tmp_path: Path, limit: str) -> None:
    plan = planned(tmp_path, compute=f"{{{NODE}, {limit}}}", cluster="{price: $2.50/device-hour}")
    taken = {
        "days": plan.estimates.train_s / 86400 / 2,
        "$": plan.estimates.cost_usd / 1000,
        "hours": plan.estimates.device_hours / 400,
    }
    share = next(share for word, share in taken.items() if word in limit)
    assert 0.97 < share <= 1 + 1e-6
    rounds = plan.estimates.rounds
    assert len(rounds) > 1
    assert rounds[-1].flops_per_s == pytest.approx(rounds[-1].reached_flops_per_s, rel=0.02)
    assert all(before.reached_flops_per_s == after.flops_per_s for before, after in itertools.pairwise(rounds))


@pytest.mark.parametrize("minutes", [2.5088, 8.7269, 17.0, 75.164])
def test_a_batch_that_alternates_with_the_utilisation_settles_within_the_limit(tmp_path: Path, minutes: float) -> None:
    """A longer run has a larger batch and another layout: some budgets have no utilisation that gives itself back."""
    plan = planned(tmp_path, model="{family: llama2, size: 1B}", compute=f"{{{NODE}, budget: {minutes} minutes}}")
    assert 0.75 < plan.estimates.train_s / (60 * minutes) <= 1 + 1e-6
    assert not any("did not settle" in warning for warning in plan.estimates.warnings)
    # A tenth more of utilisation would not have been kept.
    rates = [one.flops_per_s for one in plan.estimates.rounds if one.reached_flops_per_s < one.flops_per_s * (1 - 1e-3)]
    assert (
        min(rate for rate in rates if rate > plan.estimates.rounds[-1].flops_per_s)
        < 1.1 * plan.estimates.rounds[-1].flops_per_s
    )


def test_of_the_rounds_that_keep_a_limit_the_one_that_trains_most_is_taken(tmp_path: Path) -> None:
    """3 hours of 16,384 devices in 4 stages settle on no FLOP/s: a longer run takes a larger batch."""
    compute, layout = "{device: h100, nodes: 2048, devices_per_node: 8, budget: 3 hours}", "{pipeline: 4}"
    plan = planned(tmp_path, compute=compute, layout=layout)
    assert len(plan.estimates.rounds) > 10
    assert 0.97 < plan.estimates.train_s / 10_800 <= 1
    assert plan.estimates.model_flops_per_step * plan.training.steps > 1.2e22
    assert plan.estimates.parameters_80.low < plan.estimates.parameters < plan.estimates.parameters_80.high


@pytest.mark.parametrize(
    ("limit", "billions"), [("1e22 FLOPs", (150, 170, 200, 300)), ("100 device-hours", (10, 20, 40))]
)
def test_with_the_tokens_pinned_the_shape_keeps_the_limit(
    tmp_path: Path, limit: str, billions: tuple[int, ...]
) -> None:
    """Shapes come in steps: one that takes more than the limit gives way to the next smaller."""
    for tokens in billions:
        plan = planned(tmp_path, data=f"{{{SOURCES}, tokens: {tokens}B}}", compute=f"{{{NODE}, budget: {limit}}}")
        flops = plan.estimates.model_flops_per_step * plan.training.steps
        share = flops / 1e22 if "FLOPs" in limit else plan.estimates.device_hours / 100
        assert 0.85 < share <= 1 + 1e-6, tokens


def test_a_deadline_is_a_budget_of_time(tmp_path: Path) -> None:
    by_deadline = planned(tmp_path, objective="{deadline: 2 days}")
    by_budget = planned(tmp_path, compute=f"{{{NODE}, budget: 2 days}}")
    assert (by_deadline.shape, by_deadline.training) == (by_budget.shape, by_budget.training)
    both = planned(tmp_path, compute=f"{{{NODE}, budget: 9 days}}", objective="{deadline: 2 days}")
    assert both.training == by_deadline.training


def test_a_target_loss_is_reached_by_the_cheapest_run(tmp_path: Path) -> None:
    plan = planned(tmp_path, objective="{target_loss: 2.4}")
    assert plan.estimates.predicted_loss == pytest.approx(2.4, abs=2e-4)
    cost = plan.estimates.model_flops_per_step * plan.training.steps
    for size in (0.6, 1.7):
        other = planned(
            tmp_path,
            model=f"{{family: llama2, size: {int(plan.estimates.parameters * size)}}}",
            objective="{target_loss: 2.4}",
        )
        assert other.estimates.predicted_loss == pytest.approx(2.4, abs=2e-4)
        assert other.estimates.model_flops_per_step * other.training.steps > cost
    by_tokens = planned(
        tmp_path, data=f"{{{SOURCES}, tokens: {plan.data.budget_tokens}}}", objective="{target_loss: 2.4}"
    )
    assert by_tokens.estimates.parameters == pytest.approx(plan.estimates.parameters, rel=0.1)


def test_a_target_near_the_irreducible_loss_is_not_sure_to_be_reached(tmp_path: Path) -> None:
    asked = {"compute": "{device: h100, nodes: 128, devices_per_node: 8}", "model": "{family: llama2, size: 70B}"}
    sure, unsure = (planned(tmp_path, **asked, objective=f"{{target_loss: {target}}}") for target in (1.99, 1.91))
    assert not [warning for warning in sure.estimates.warnings if "refits" in warning]
    assert sure.estimates.tokens_80.high > sure.data.budget_tokens
    [warning] = [warning for warning in unsure.estimates.warnings if "refits" in warning]
    assert "no run reaches a loss of 1.91" in warning
    assert unsure.estimates.tokens_80.high == 0, "it has no upper end"


def test_kaplans_loss_answers_what_its_frontier_does_not(tmp_path: Path) -> None:
    asked = {"scaling": "{law: kaplan2020}", "objective": "{target_loss: 2.4}"}
    by_size = planned(tmp_path, model="{family: llama2, size: 1B}", **asked)
    assert by_size.estimates.predicted_loss == pytest.approx(2.4, abs=2e-4)
    by_tokens = planned(tmp_path, data=f"{{{SOURCES}, tokens: {by_size.data.budget_tokens}}}", **asked)
    assert by_tokens.estimates.parameters == pytest.approx(by_size.estimates.parameters, rel=0.1)
    with pytest.raises(InfeasibleError, match="kaplan2020 says which size is best for a budget"):
        planned(tmp_path, **asked)


def test_inference_tokens_shrink_the_model_and_share_the_budget(tmp_path: Path) -> None:
    plain = planned(tmp_path, compute=f"{{{NODE}, budget: 1e21 FLOPs}}")
    used = planned(tmp_path, compute=f"{{{NODE}, budget: 1e21 FLOPs}}", scaling="{inference_tokens: 50B}")
    assert used.estimates.parameters < 0.9 * plain.estimates.parameters
    spent = used.estimates.model_flops_per_step * used.training.steps + used.estimates.inference_flops
    assert spent == pytest.approx(1e21, rel=0.01)
    assert used.data.budget_tokens / used.estimates.parameters > plain.data.budget_tokens / plain.estimates.parameters


def test_a_model_that_is_used_much_still_meets_the_deadline(tmp_path: Path) -> None:
    """The cheapest for its life takes 6 days to train; a larger one takes little more than a day."""
    used = {"objective": "{target_loss: 2.4, deadline: 1.2 days}", "scaling": "{inference_tokens: 10T}"}
    plan = planned(tmp_path, **used)
    assert 0.9 < plan.estimates.train_s / (1.2 * 86400) <= 1
    free = planned(tmp_path, **used | {"objective": "{target_loss: 2.4}"})
    assert free.estimates.parameters < plan.estimates.parameters
    assert free.estimates.train_s > 5 * 86400
    with pytest.raises(
        InfeasibleError, match=r"add devices \(2\.\d\d times as many"
    ):  # of the least that any size takes
        planned(tmp_path, **used | {"objective": "{target_loss: 2.4, deadline: 0.5 days}"})


def test_the_limit_that_binds_is_named_with_what_inference_leaves_of_it(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        compute=f"{{{NODE}, budget: 1.2e21 FLOPs}}",
        objective="{deadline: 3 days}",  # 1.1e21 FLOPs: fewer, but for training alone
        scaling="{inference_tokens: 300B}",
    )
    text = plan.reasons["data.budget_tokens"].text
    assert text.startswith("(1.2e+21 FLOPs - ")
    total, inference, each = (
        float(number) for number in re.findall(r"\d\.\d+e\+\d+", text)[:2] + re.findall(r"/ (\S+)", text)
    )
    assert (total - inference) / each == pytest.approx(plan.data.budget_tokens, rel=1e-3)


def test_what_follows_from_pins_alone_has_no_band(tmp_path: Path) -> None:
    by_size = planned(tmp_path, model="{family: llama2, size: 1B}", compute=f"{{{NODE}, budget: 1e20 FLOPs}}").estimates
    by_tokens = planned(
        tmp_path, data=f"{{{SOURCES}, tokens: 10B}}", compute=f"{{{NODE}, budget: 1e20 FLOPs}}"
    ).estimates
    by_memory = planned(tmp_path, compute=f"{{{NODE}, budget: 1e22 FLOPs}}", scaling="{serving_memory: 4 GB}").estimates
    for estimates in (by_size, by_tokens, by_memory):
        assert (estimates.parameters_80.high, estimates.tokens_80.high) == (0.0, 0.0)
        assert estimates.loss_80.low < estimates.predicted_loss < estimates.loss_80.high


def test_a_frontier_answers_what_takes_no_loss(tmp_path: Path) -> None:
    """With size or tokens pinned, a budget leaves nothing for a law to weigh against inference."""
    asked = {"compute": f"{{{NODE}, budget: 1e22 FLOPs}}", "scaling": "{law: porian2024, inference_tokens: 300B}"}
    by_size = planned(tmp_path, model="{family: llama2, size: 1B}", **asked)
    spent = by_size.estimates.model_flops_per_step * by_size.training.steps + by_size.estimates.inference_flops
    assert spent == pytest.approx(1e22, rel=1e-2)
    by_tokens = planned(tmp_path, data=f"{{{SOURCES}, tokens: 200B}}", **asked)
    spent = by_tokens.estimates.model_flops_per_step * by_tokens.training.steps + by_tokens.estimates.inference_flops
    assert spent == pytest.approx(1e22, rel=0.1)
    with pytest.raises(InfeasibleError, match="no loss that could be weighed against inference tokens"):
        planned(tmp_path, **asked)


def test_unique_tokens_are_counted_in_epochs(tmp_path: Path) -> None:
    plan = planned(tmp_path, compute=f"{{{NODE}, budget: 1e21 FLOPs}}", data=f"{{{SOURCES}, unique_tokens: 8B}}")
    assert plan.estimates.law == "muennighoff2023"
    assert plan.estimates.epochs == pytest.approx(plan.training.steps * plan.training.tokens_per_step / 8e9, rel=1e-5)
    assert plan.estimates.epochs > 4
    assert any("epochs of data.unique_tokens" in warning for warning in plan.estimates.warnings)
    fresh = planned(tmp_path, compute=f"{{{NODE}, budget: 1e21 FLOPs}}", scaling="{law: muennighoff2023}")
    assert plan.estimates.parameters < fresh.estimates.parameters
    assert plan.estimates.predicted_loss > fresh.estimates.predicted_loss
    for tokens, warned in (("16B", ""), ("80B", "worth visibly less"), ("400B", "teach nothing")):
        texts = [*planned(tmp_path, data=f"{{{SOURCES}, unique_tokens: 8B, tokens: {tokens}}}").estimates.warnings]
        assert [text.rsplit(" (", 1)[0].endswith(warned) for text in texts if "epochs" in text] == [True] * bool(warned)
    again = planned(tmp_path, compute=f"{{{NODE}, budget: 1e21 FLOPs}}", data=f"{{{SOURCES}, unique_tokens: 80B}}")
    assert again.run_id == fresh.run_id, "what sources hold is no part of what is trained"


def test_a_mixture_of_experts_is_sized_by_its_own_law(tmp_path: Path) -> None:
    """The paper's table 2: at 1e22 FLOPs 4 experts for one used are best in 24 GB, 16 in 80 GB (keys and values counted)."""
    asked = {
        "model": "{family: mixtral, context_length: 4096}",
        "compute": "{device: h100, nodes: 4, devices_per_node: 8, budget: 1e22 FLOPs}",
    }
    plan = planned(tmp_path, **asked)
    assert (plan.estimates.law, plan.shape.num_experts) == ("ludziejewski2025", 8)
    assert plan.estimates.active_parameters < plan.estimates.parameters
    tight, wide = (planned(tmp_path, **asked, scaling=f"{{serving_memory: {memory} GB}}") for memory in (24, 80))
    for chosen, memory in ((tight, 24e9), (wide, 80e9)):
        assert 2 * chosen.estimates.parameters <= memory
    assert tight.shape.num_experts < wide.shape.num_experts
    assert wide.estimates.predicted_loss < tight.estimates.predicted_loss
    assert "least loss within scaling.serving_memory by number of experts" in wide.reasons["shape.num_experts"].text
    reach = {"data": f"{{{SOURCES}, tokens: 100B}}", "objective": "{target_loss: 2.5}"}
    wide, tight = (
        planned(tmp_path, model=asked["model"], **reach, scaling=f"{{serving_memory: {memory} GB}}")
        for memory in (8, 4)
    )
    assert tight.shape.num_experts < wide.shape.num_experts, "the cheapest of those that the memory holds"
    assert 2 * tight.estimates.parameters <= 4e9
    assert not any("experts for each" in warning for warning in wide.estimates.warnings)
    many = planned(
        tmp_path,
        model="{family: mixtral, context_length: 4096, num_experts: 128}",
        compute="{device: h100, nodes: 32, devices_per_node: 8, budget: 1e21 FLOPs}",
    )
    assert any(
        "at most 32 experts for each that a token uses; 64 are outside" in text for text in many.estimates.warnings
    )
    dense = planned(tmp_path, **asked, scaling="{law: epoch2024}")
    assert "epoch2024 was fitted on dense models, and mixtral is a mixture of experts" in dense.estimates.warnings
    pinned = planned(tmp_path, **asked | {"model": "{family: mixtral, context_length: 4096, num_experts: 16}"})
    assert pinned.shape.num_experts == 16
    assert pinned.reasons["shape.num_experts"].kind == "pinned"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"objective": "{target_loss: 1.8}"},
            [
                "spec.yaml:6: objective.target_loss: 1.8 is not above 1.817, the irreducible loss of epoch2024",
                "raise it by more than 0.017",
            ],
        ),
        (
            {"objective": "{target_loss: 2.0}", "model": "{family: llama2, size: 1B}"},
            [
                "objective.target_loss: 2 cannot be reached with",
                "on any number of tokens: epoch2024 leaves 2.183",
                "model.size",
            ],
        ),
        (
            {"objective": "{target_loss: 2.0}", "data": f"{{{SOURCES}, tokens: 5B}}"},
            ["objective.target_loss: 2 cannot be reached with 5e+09 tokens on any number of parameters", "data.tokens"],
        ),
        (
            {
                "objective": "{deadline: 10 hours}",
                "model": "{family: llama2, size: 7B}",
                "data": f"{{{SOURCES}, tokens: 140B}}",
            },
            ["objective.deadline: ", "the deadline is 10 hours", "times as many", "at the same utilisation"],
        ),
        (
            {"objective": "{target_loss: 2.0}", "compute": f"{{{NODE}, budget: 1e20 FLOPs}}"},
            ["compute.budget: ", "the budget is 1e+20 FLOPs", "raise objective.target_loss"],
        ),
        (
            {"objective": "{target_loss: 2.4}", "scaling": "{law: llama3}"},
            ["objective.target_loss: llama3 says which size is best for a budget: it has no loss", "epoch2024"],
        ),
        (
            {
                "model": "{family: mixtral}",
                "objective": "{target_loss: 2.2}",
                "data": f"{{{SOURCES}, tokens: 100B}}",
                "scaling": "{serving_memory: 2 GB}",
            },
            [
                "objective.target_loss: 2.2 cannot be reached with 1e+11 tokens on at most 1e+09 parameters: ludziejewski2025",
                "leaves 2.4",
                "data.tokens or scaling.serving_memory",
            ],
        ),
        (
            {"objective": "{deadline: 2 days}", "data": f"{{{SOURCES}, tokens: 300T}}"},
            ["data.tokens: no llama2 shape", "the size was chosen: 2 days on 8 x h100", "/ 3e+14 tokens"],
        ),
        (
            {
                "objective": "{target_loss: 2.35}",
                "compute": f"{{{NODE}, budget: 1e21 FLOPs}}",
                "scaling": "{inference_tokens: 100B}",
            },
            ["compute.budget: ", "FLOPs of inference need 1.0", "e+21 FLOPs, the budget is 1e+21 FLOPs"],
        ),
        (
            {"compute": f"{{{NODE}, budget: 1 FLOP}}"},
            ["compute.budget", "fewer than 1e+04 parameters", "check the unit"],
        ),
        (
            {"compute": f"{{{NODE}, budget: 1e40 FLOPs}}"},
            ["compute.budget", "more than 1e+15 parameters", "check the unit"],
        ),
        (
            {
                "compute": f"{{{NODE}, budget: 1e20 FLOPs}}",
                "model": "{family: llama2, size: 7B}",
                "scaling": "{inference_tokens: 1e15}",
            },
            ["scaling.inference_tokens: 1e+15 inference tokens take the whole budget", "raise the budget"],
        ),
        (
            {"model": "{family: llama2, size: 70B}", "data": f"{{{SOURCES}, unique_tokens: 100M}}"},
            [
                "data.unique_tokens: 68,976,648,192 parameters are the best size for no number of tokens",
                "state data.tokens",
            ],
        ),
        (
            {"model": "{family: llama2, size: 7B}", "scaling": "{serving_memory: 10 GB}"},
            ["scaling.serving_memory: 6,738,415,616 parameters x 2 bytes = 12.55 GiB", "serving_memory is 9.313 GiB"],
        ),
    ],
)
def test_what_cannot_be_says_why(tmp_path: Path, sections: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InfeasibleError) as refused:
        planned(tmp_path, **sections)
    rest = str(refused.value)
    for fragment in said:
        assert fragment in rest, rest
        rest = rest[rest.index(fragment) + len(fragment) :]


@settings(max_examples=15, deadline=None)
@given(exponent=st.floats(16.5, 25.7))
def test_any_budget_plans_without_overflow(exponent: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    nodes = max(1, min(4096, int(10 ** (exponent - 22))))
    plan = planned(
        tmp_path_factory.mktemp("budget"),
        compute=f"{{device: h100, nodes: {2 ** int(math.log2(nodes))}, devices_per_node: 8, budget: {10.0**exponent:.6g} FLOPs}}",
    )
    assert plan.estimates.model_flops_per_step * plan.training.steps <= 10.0**exponent * (1 + 1e-5)
