"""Scaling laws: what each says of a compute, its inverses, its ranges; and laws of a user's own, from a file to a plan."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from benchmark_modules import load_benchmark
from hypothesis import given
from hypothesis import strategies as st
from reference_tables import scaling_rows

from trainwright.compiler.cli import main
from trainwright.compiler.facts import LawFacts, find_law_facts, load_law_facts
from trainwright.compiler.laws import answers, compare
from trainwright.compiler.laws.additive import AdditiveLaw
from trainwright.compiler.laws.experts import ExpertsLaw
from trainwright.compiler.laws.find import find_law, load_law_file
from trainwright.compiler.laws.law import Floats, Law
from trainwright.compiler.laws.repeated import RepeatedDataLaw

COMPUTE = load_benchmark("published").COMPUTE

# Constants that others printed, beside those that the planner uses: rounded, or from an optimizer that stopped early.
PRINTED = {
    "chinchilla_A3_rounded": {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
    "epoch_published": {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    "epoch_notebook_BFGS": {"A": 482.00572, "B": 2085.4342, "E": 1.81686, "alpha": 0.34781, "beta": 0.36585},
}
GOLDEN = {
    "chinchilla_A3_tex": "hoffmann2022_3",
    "epoch_global_optimum(ours)": "epoch2024",
    "muennighoff_c4": "muennighoff2023",
    "chinchilla_A1(fit to Table 3)": "hoffmann2022_1",
    "chinchilla_A2(fit to Table A3)": "hoffmann2022_2",
    "kaplan N_opt (C_min=C/2, non-embedding)": "kaplan2020",
    "porian_tuned_refinedweb": "porian2024",
    "llama3 tokens (0.537,0.299)": "llama3",
    "deepseek_llm M,D,LR,B": "deepseek_llm",
    "minicpm N/D=K2(C/6)^eta with N,D in billions": "minicpm2024",
}


def printed(name: str) -> AdditiveLaw:
    return AdditiveLaw(find_law_facts("epoch2024"), **PRINTED[name])


def _variants() -> dict[str, Law]:
    """Every law, and bound ones."""
    laws = {name: find_law(name) for name in load_law_facts()}
    for repeated in [law for law in laws.values() if isinstance(law, RepeatedDataLaw)]:
        laws |= {f"{repeated.facts.name}, {each:g} unique": repeated.with_unique_tokens(each) for each in (1e9, 1e11)}
    for mixed in [law for law in laws.values() if isinstance(law, ExpertsLaw)]:
        laws |= {f"{mixed.facts.name}, {each} experts": mixed.with_experts(each) for each in (8, 32)}
    return laws


LAWS = _variants()
WITH_LOSS = [name for name, law in LAWS.items() if law.has_loss]
every_law = pytest.mark.parametrize("name", LAWS)
every_loss = pytest.mark.parametrize("name", WITH_LOSS)
EXPONENTS = st.floats(15, 30)


def is_repeated(law: Law) -> bool:
    return isinstance(law, RepeatedDataLaw) and math.isfinite(law.unique_tokens)


def has_learnt_all(law: Law, tokens: Any) -> bool:
    """Whether passes have all but stopped to count: 100 epochs are 99.8 % of what endless ones are worth."""
    return isinstance(law, RepeatedDataLaw) and bool(np.max(tokens) > 100 * law.unique_tokens)


# ---- against figures from elsewhere


def test_golden_values(reference: Path) -> None:
    """Each law at seven computes: N (or M), D, D / N and loss, evaluated apart from this code."""
    seen = 0
    for row in scaling_rows(reference, "golden_values"):
        name = row["law"]
        if name not in GOLDEN and name not in PRINTED:
            continue  # learning rates and batches: tests/test_hyperparameters.py
        law = find_law(GOLDEN[name]) if name in GOLDEN else printed(name)
        parameters, tokens = law.frontier(float(row["input"].removeprefix("C=")))
        assert float(parameters) == pytest.approx(float(row["M"] or row["N"]), rel=1e-5), row
        # There D is C / (6 N), here the table's own power law.
        close = {"hoffmann2022_1": 1e-2, "hoffmann2022_2": 1e-3}.get(law.facts.name, 1e-5)
        assert float(tokens) == pytest.approx(float(row["D"]), rel=close), row
        if row["ratio"]:
            assert float(tokens / parameters) == pytest.approx(float(row["ratio"]), rel=1e-5), row
        if row["loss"]:
            assert float(law.loss(parameters, tokens)) == pytest.approx(float(row["loss"]), rel=1e-5), row
        seen += 1
    assert seen == 7 * (len(GOLDEN) + len(PRINTED))


def test_rounded_constants_are_other_laws() -> None:
    """At Chinchilla's 5.76e23 FLOPs those that Hoffmann et al. print ask for a fifth fewer parameters than those they used."""
    for name, law, ratio in (
        ("chinchilla_A3_rounded", "hoffmann2022_3", 32.1899 / 40.3609),
        ("epoch_published", "epoch2024", 72.2487 / 73.1904),
        ("epoch_notebook_BFGS", "epoch2024", 72.3527 / 73.1904),
    ):
        sizes = [float(each.frontier(5.76e23)[0]) for each in (printed(name), find_law(law))]
        assert sizes[0] / sizes[1] == pytest.approx(ratio, rel=1e-4)


def test_chinchillas_tables(reference: Path) -> None:
    """Tables 3 and A3: approaches 1 and 2 by their power laws, approach 3 by no published constants better than 20 %."""
    misprints = []
    for row in scaling_rows(reference, "chinchilla_table3_A3"):
        size, flops, tokens = (float(row[key]) for key in ("params", "flops_printed", "tokens_printed"))
        if row["approach"] == "3":
            found = float(find_law("hoffmann2022_3").tokens_for(size))
            assert found == pytest.approx(tokens, rel=0.20), row
            if 6 * size * found != pytest.approx(flops, rel=0.20):
                misprints.append(size)
            continue
        best = find_law(f"hoffmann2022_{row['approach']}").frontier(flops)
        assert float(best[0]) == pytest.approx(size, rel=0.035), row
        rounded = 0.05e12 if tokens >= 1e12 else 0.05e9
        assert abs(float(best[1]) - tokens) <= 0.035 * tokens + rounded, row
    assert misprints == [175e9]


def test_how_chinchilla_counts(reference: Path) -> None:
    """All 50 models of table A9, all 6 ratios of table A4."""
    models = scaling_rows(reference, "chinchilla_tableA9_models")
    assert len(models) == 50
    for row in models:
        model, size = {key: int(value) for key, value in row.items()}, 1e6 * int(row["params_million"])
        close = 0.002 if size > 250e6 else 0.01
        assert COMPUTE["chinchilla_parameters"]({"model": model}) == pytest.approx(size, rel=close), row
    ratios = scaling_rows(reference, "chinchilla_tableA4_flop_ratio")
    assert len(ratios) == 6
    for row in ratios:
        model = {key: int(row[key]) for key in ("d_model", "ffw_size", "kv_size", "num_heads", "num_layers")}
        model |= {"n_heads": model["num_heads"], "n_layers": model["num_layers"]}
        ratio = COMPUTE["chinchilla_flops_ratio"]({"model": model})
        assert ratio == pytest.approx(float(row["flop_ratio_ours_over_6ND"]), abs=0.006), row


def test_cerebras_law(reference: Path) -> None:
    """Seven losses of Cerebras-GPT by the authors' own law of compute (arXiv 2304.03208), in their FLOPs."""
    rows = scaling_rows(reference, "cerebras_pythia_pile_losses")
    models = [row for row in rows if row["model"].startswith("Cerebras")]
    assert len(models) == 7
    for row in models:
        found = (float(row["reported_train_flops"]) / 5.984e22) ** -0.0737 + 0.5066
        assert found == pytest.approx(float(row["pile_test_xent_paper(gpt2-vocab nats/token)"]), rel=0.0105), row


def test_overtrained_models_by_both_of_gadres_forms() -> None:
    """L = E + (a M^eta + b M^-eta) C^-eta is the additive law, with a 212, b 367, eta 0.136, E 1.84 to three digits."""
    law = find_law("gadre2024")
    assert isinstance(law, AdditiveLaw)
    eta = float(law.alpha) / 2
    a, b = float(law.A) * 6**eta, float(law.B) * 6**eta
    assert (a, b, eta, float(law.E)) == pytest.approx((212, 367, 0.136, 1.84), rel=4e-3)
    for flops, ratio in ((1e19, 20.0), (1e21, 320.0), (8e21, 640.0)):
        size = math.sqrt(flops / (6 * ratio))
        whole = float(law.E) + (a * ratio**eta + b * ratio**-eta) * flops**-eta
        assert float(law.loss(size, ratio * size)) == pytest.approx(whole, rel=1e-12)


# ---- what holds for every law


@every_law
@given(exponent=EXPONENTS)
def test_sizes_and_tokens_of_the_frontier_are_each_others(name: str, exponent: float) -> None:
    law = LAWS[name]
    parameters, tokens = law.frontier(10.0**exponent)
    assert parameters > 0
    assert np.isfinite(tokens)
    if not has_learnt_all(law, tokens):
        close = 1e-4 if is_repeated(law) else 1e-12  # a search has no closed form's digits
        assert float(law.tokens_for(parameters)) == pytest.approx(float(tokens), rel=close)
        assert float(law.parameters_for(tokens)) == pytest.approx(float(parameters), rel=close)


@every_loss
@given(exponent=EXPONENTS, off=st.floats(-2, 2))
def test_what_reaches_a_loss_has_it(name: str, exponent: float, off: float) -> None:
    """Sizes up to 100 times off the best, either way."""
    law = LAWS[name]
    best, best_tokens = law.frontier(10.0**exponent)
    parameters, tokens = best * 10**off, best_tokens / 10**off
    loss = law.loss(parameters, tokens)
    assert loss > law.least_loss()
    if not has_learnt_all(law, [tokens, parameters * 20]):
        # A term that is a millionth of the loss has lost six digits of what decides it.
        assert float(law.tokens_for_loss(loss, parameters)) == pytest.approx(float(tokens), rel=1e-6)
        assert float(law.parameters_for_loss(loss, tokens)) == pytest.approx(float(parameters), rel=1e-6)


@every_loss
def test_no_size_reaches_what_is_below_its_floor(name: str) -> None:
    law = LAWS[name]
    floor = float(law.loss(1e9, 1e60))
    for tokens_or_size in (law.tokens_for_loss(floor * 0.999, 1e9), law.parameters_for_loss(law.least_loss(), 1e10)):
        assert np.isnan(tokens_or_size)
    found = law.tokens_for_loss(np.array([floor * 0.9, floor * 1.01, floor * 1.1]), 1e9)
    assert np.isnan(found[0])
    assert found[1] > found[2] > 0


@every_law
def test_more_compute_is_a_larger_model_on_more_tokens_with_less_loss(name: str) -> None:
    law = LAWS[name]
    parameters, tokens = law.frontier(np.geomspace(1e15, 1e30, 301))
    counts = ~np.array([has_learnt_all(law, each) for each in tokens])
    assert counts.sum() > 80
    assert (np.diff(parameters[counts]) > 0).all()
    assert (np.diff(tokens) > 0).all()
    if law.has_loss:
        losses = law.loss(parameters, tokens)
        assert (np.diff(losses) <= 0).all()
        assert (np.diff(losses[counts]) < 0).all()


@every_loss
@given(exponent=st.floats(17, 26), off=st.floats(-1, 1))
def test_the_frontier_is_the_least_loss(name: str, exponent: float, off: float) -> None:
    law = LAWS[name]
    if law.minimises:
        best, tokens = law.frontier(10.0**exponent)
        other = law.loss(best * 10**off, tokens / 10**off)
        assert law.loss(best, tokens) <= other * (1 + 1e-12)


@every_law
def test_arrays_equal_scalars(name: str) -> None:
    law = LAWS[name]
    flops = np.geomspace(1e17, 1e25, 5)
    parameters, tokens = law.frontier(flops)

    def agree(ask: Callable[..., Floats], *columns: Floats) -> None:
        together = ask(*columns)
        assert np.shape(together) == (5,)
        alone = [ask(*(float(column[i]) for column in columns)) for i in range(5)]
        assert all(np.shape(each) == () for each in alone)
        assert together == pytest.approx(np.array([float(each) for each in alone]), rel=1e-12, nan_ok=True)

    for which in (0, 1):
        agree(lambda each, which=which: law.frontier(each)[which], flops)  # type: ignore[misc]
    agree(law.tokens_for, parameters)
    agree(law.parameters_for, tokens)
    if law.has_loss:
        agree(law.loss, parameters, tokens)
        agree(law.tokens_for_loss, law.loss(parameters, tokens), parameters)
        agree(law.parameters_for_loss, law.loss(parameters, tokens), tokens)


@pytest.mark.parametrize("name", [name for name in LAWS if name not in WITH_LOSS])
def test_a_law_of_sizes_states_no_loss(name: str) -> None:
    law = LAWS[name]
    assert not law.minimises
    assert law.facts.loss_unit == ""
    for ask in (
        lambda: law.loss(1e9, 1e10),
        lambda: law.tokens_for_loss(2.0, 1e9),
        lambda: law.parameters_for_loss(2.0, 1e10),
        law.least_loss,
    ):
        with pytest.raises(ValueError, match=f"{law.facts.name} states no loss"):
            ask()


@every_loss
def test_a_loss_has_a_unit(name: str) -> None:
    assert "nats a token" in LAWS[name].facts.loss_unit


def test_bootstrap_draws_surround_the_law() -> None:
    law = find_law("epoch2024")
    draws = law.draws()
    assert isinstance(draws, AdditiveLaw)
    for column, value in ((getattr(draws, key), value) for key, value in law.facts.constants.items()):
        assert column.shape == (400,)
        assert np.percentile(column, 10) < value < np.percentile(column, 90)
    assert draws.draws() is None
    for flops in (1e20, 1e24):
        sizes, _ = draws.frontier(flops)
        assert sizes.shape == (400,)
        assert np.percentile(sizes, 10) < law.frontier(flops)[0] < np.percentile(sizes, 90)
        # (n, 1) sizes against (k,) draws: what the planner's search asks.
        assert draws.loss(np.geomspace(1e8, 1e10, 7)[:, None], np.array(1e10)).shape == (7, 400)
    assert [name for name in load_law_facts() if find_law(name).draws() is not None] == ["epoch2024"]


@pytest.mark.parametrize(
    ("parameters", "tokens", "flops", "said"),
    [
        (1e9, 2e10, 1.2e20, []),
        (9e6, 1e9, 5.4e16, ["1.05e+07 to 6.9e+09 parameters; 9e+06 is outside"]),
        (7e9, 1.4e11, 5.9e21, ["1.05e+07 to 6.9e+09 parameters; 7e+09 is outside"]),
        (2e7, 5e7, 6e15, ["5.2e+07 to 9.3e+11 tokens; 5e+07 is outside", "20 to 640 tokens a parameter; here are 2.5"]),
        (6e9, 1e12, 3.6e22, ["5.2e+07 to 9.3e+11 tokens; 1e+12 is outside"]),
        (1e8, 7e10, 4.2e19, ["20 to 640 tokens a parameter; here are 700"]),
        (6e9, 9e11, 2.5e23, ["up to 8e+21 FLOPs; 2.5e+23 are more than 30 times as many, where frontiers bend"]),
        (1e8, 1e12, 6e24, ["tokens; 1e+12", "a parameter; here are 1e+04", "FLOPs; 6e+24"]),
    ],
)
def test_a_law_warns_outside_what_it_was_fitted_on(
    parameters: float, tokens: float, flops: float, said: list[str]
) -> None:
    warnings = find_law("gadre2024").extrapolations(parameters, tokens, flops)
    assert len(warnings) == len(said)
    for warning, fragment in zip(warnings, said, strict=True):
        assert warning.startswith("gadre2024 was fitted")
        assert fragment in warning


def test_the_default_warns_of_models_trained_longer_than_its_runs() -> None:
    """Size and tokens apart are within what it was fitted on."""
    warnings = find_law("epoch2024").extrapolations(6e7, 3.1e11, 1.2e20)
    assert warnings == ["epoch2024 was fitted on 0.456 to 341 tokens a parameter; here are 5167"]
    assert find_law("epoch2024").extrapolations(6e7, 6e7 * 340, 7.4e18) == []


def test_the_default_was_fitted_on_what_its_data_hold(reference: Path) -> None:
    """The 240 points, D = C / (6 N): the 5 of the highest losses are left out."""
    points = sorted(scaling_rows(reference, "svg_extracted_data"), key=lambda row: float(row["loss"]))[:-5]
    assert len(points) == 240
    sizes = np.array([float(row["Model Size"]) for row in points])
    flops = np.array([float(row["Training FLOP"]) for row in points])
    tokens, facts = flops / (6 * sizes), find_law_facts("epoch2024")
    for column, limits in (
        (sizes, facts.fitted_parameters),
        (tokens, facts.fitted_tokens),
        (flops, facts.fitted_flops),
    ):
        assert limits == pytest.approx((column.min(), column.max()), rel=0.01)
    ratio = tokens / sizes
    assert facts.fitted_tokens_per_parameter == pytest.approx((ratio.min(), ratio.max()), rel=0.001)


@every_law
def test_a_law_says_what_it_is(name: str) -> None:
    facts = LAWS[name].facts
    assert "arXiv" in facts.source
    for low, high in (facts.fitted_parameters, facts.fitted_tokens, facts.fitted_flops):
        assert 0 <= low < high


# ---- law files

LAW_FILE = """\
name: mine
form: additive
source: "35 runs"
counts: body
flops: 6 N D
loss_unit: nats a token
constants: {A: 406.4, B: 410.7, E: 1.69, alpha: 0.34, beta: 0.28}
fitted_parameters: [1.0e+8, 1.0e+10]
fitted_tokens: [1.0e+9, 1.0e+11]
fitted_flops: [1.0e+18, 1.0e+21]
fitted_tokens_per_parameter: [1, 100]
draws: {A: [400.0, 410.0], B: [410.0, 411.0], E: [1.68, 1.7], alpha: [0.34, 0.34], beta: [0.28, 0.28]}
"""
SPEC = """\
name: x
model: {family: llama2}
data: {sources: [{name: web, path: 'web/*.jsonl'}]}
compute: {device: h100, nodes: 1, devices_per_node: 8, budget: 1e20 FLOPs}
stages: {pretrain: {}}
scaling: {law: laws/my_law.yaml}
"""
Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trainwright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Called:
    """(exit code, stdout, stderr) of the command, in this process and an empty folder, with a spec in `specs`."""
    monkeypatch.chdir(tmp_path)
    Path("specs/laws").mkdir(parents=True)
    Path("specs/spec.yaml").write_text(SPEC, encoding="utf-8")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trainwright", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return call


def test_a_law_file_holds_what_its_text_says(tmp_path: Path) -> None:
    path = tmp_path / "my_law.yaml"
    path.write_text(LAW_FILE, encoding="utf-8")
    law = load_law_file(path)
    assert law.facts == LawFacts(
        name="mine",
        form="additive",
        source="35 runs",
        counts="body",
        flops="6 N D",
        loss_unit="nats a token",
        constants=PRINTED["chinchilla_A3_rounded"],
        fitted_parameters=(1e8, 1e10),
        fitted_tokens=(1e9, 1e11),
        fitted_flops=(1e18, 1e21),
        fitted_tokens_per_parameter=(1.0, 100.0),
        draws={
            "A": (400.0, 410.0),
            "B": (410.0, 411.0),
            "E": (1.68, 1.7),
            "alpha": (0.34, 0.34),
            "beta": (0.28, 0.28),
        },
    )
    path.write_text(
        "".join(LAW_FILE.splitlines(keepends=True)[:7]), encoding="utf-8"
    )  # ranges and draws may be left out
    bare = load_law_file(path)
    assert bare.draws() is None
    assert bare.extrapolations(1.0, 1e30, 1e60) == []


def test_from_runs_to_a_law_file_to_a_plan(trainwright: Called) -> None:
    """The spec's law stands beside the spec, wherever the command is called from."""
    truth = AdditiveLaw(find_law_facts("hoffmann2022_3"))
    flops = np.repeat(np.geomspace(1e18, 1e20, 5), 7)
    sizes = truth.frontier(flops)[0] * np.tile(np.geomspace(1 / 8, 8, 7), 5)
    tokens = flops / (6 * sizes)
    losses = truth.loss(sizes, tokens) * np.exp(np.random.default_rng(0).normal(0, 0.002, len(sizes)))
    lines = [
        f"{n!r},{d!r},{loss!r}" for n, d, loss in zip(sizes.tolist(), tokens.tolist(), losses.tolist(), strict=True)
    ]
    Path("runs.csv").write_text("params,tokens,loss\n" + "\n".join(lines) + "\n", encoding="utf-8")
    code, _, err = trainwright("fit", "runs.csv", "-o", "specs/laws/my_law.yaml", "--bootstraps", "100")
    assert (code, err) == (0, ""), err
    code, out, err = trainwright("plan", "specs/spec.yaml", "--json")
    assert (code, err) == (0, ""), err
    estimates = json.loads(out)["estimates"]
    law = load_law_file(Path("specs/laws/my_law.yaml"))
    draws = law.draws()
    assert isinstance(draws, AdditiveLaw)
    assert draws.A.shape == (100,)
    assert estimates["law"] == law.facts.name == "my_law"
    assert estimates["parameters"] == pytest.approx(float(law.frontier(1e20)[0]), rel=0.25)  # exact FLOPs, a real shape
    assert estimates["loss_80"]["low"] < estimates["predicted_loss"] < estimates["loss_80"]["high"]
    assert estimates["predicted_loss"] == pytest.approx(float(truth.loss(*truth.frontier(1e20))), rel=0.01)
    code, out, err = trainwright("plan", "specs/spec.yaml", "--json", "--set", "compute.budget=1e22 FLOPs")
    assert any("my_law was fitted up to 1e+20 FLOPs" in warning for warning in json.loads(out)["estimates"]["warnings"])


def test_a_law_file_that_is_not_there(trainwright: Called) -> None:
    code, out, err = trainwright("plan", "specs/spec.yaml", "--json")
    assert (code, out) == (8, "")
    assert err.splitlines() == [
        "error: specs/spec.yaml:6: scaling.law: the law file specs/laws/my_law.yaml cannot be read: No such file or directory"
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (LAW_FILE, "{", "is no YAML"),
        (LAW_FILE, "a: 1\na: 2\n", "is no YAML"),
        (LAW_FILE, "", "it holds no mapping of a law's name, form, constants and ranges"),
        (LAW_FILE, "params,tokens,loss\n1,2,3\n", "it holds no mapping"),
        ("flops:", "FLOPs:", "FLOPs is no key of a law file"),
        ("name: mine\n", "", "name is missing"),
        ("name: mine\nform: additive\n", "", "name, form are missing"),
        ("name: mine", "name: 7", "name is no text"),
        ("form: additive", "form: frontier", "form frontier is not additive, the one form that runs are fitted to"),
        ("counts: body", "counts: layers", "counts layers is none of total, embedding_once"),
        ("B: 410.7, ", "", "constants must be A, B, E, alpha, beta, each once"),
        ("A: 406.4", "A: 406.4, C: 1", "constants must be A, B, E, alpha, beta, each once"),
        ("{A: 406.4, B: 410.7, E: 1.69, alpha: 0.34, beta: 0.28}", "[1, 2]", "constants must be A, B, E, alpha, beta"),
        ("A: 406.4", "A: -406.4", "constants.A: -406.4 is no number above 0"),
        ("A: 406.4", "A: 0", "constants.A: 0 is no number above 0"),
        ("A: 406.4", "A: much", "constants.A: 'much' is no number above 0"),
        ("E: 1.69,", "E: .nan,", "constants.E: nan is no number above 0"),
        ("E: 1.69,", "E: .inf,", "constants.E: inf is no number above 0"),
        ("E: 1.69,", "E: true,", "constants.E: True is no number above 0"),
        (
            "alpha: 0.34, beta: 0.28}\nf",
            "alpha: 1e-4, beta: 0.28}\nf",
            "constants.alpha: 0.0001 is no exponent between",
        ),
        ("beta: 0.28}\nf", "beta: 34}\nf", "constants.beta: 34 is no exponent between 0.01 and 10"),
        ("[1.0e+8, 1.0e+10]", "[1.0e+10, 1.0e+8]", "fitted_parameters: [10000000000.0, 100000000.0] is no range"),
        ("[1.0e+8, 1.0e+10]", "1.0e+10", "fitted_parameters: 10000000000.0 is no range [lowest, highest]"),
        ("[1.0e+8, 1.0e+10]", "[1.0e+8, many]", "fitted_parameters: [100000000.0, 'many'] is no range"),
        ("[1, 100]", "few", "fitted_tokens_per_parameter: 'few' is no range"),
        ("[400.0, 410.0]", "[400.0]", "draws has columns of different lengths (1, 2, 2, 2, 2)"),
        ("[400.0, 410.0]", "[400.0, -410.0]", "draws holds something that is no list of numbers above 0"),
        ("[400.0, 410.0]", "400.0", "draws holds something that is no list of numbers above 0"),
        ("draws: {A: [400.0, 410.0], ", "draws: {", "draws must hold A, B, E, alpha, beta, each a list"),
    ],
)
def test_a_bad_law_file_ends_in_one_message(old: str, new: str, said: str, trainwright: Called) -> None:
    assert old in LAW_FILE
    Path("specs/laws/my_law.yaml").write_text(LAW_FILE.replace(old, new, 1), encoding="utf-8")
    code, out, err = trainwright("plan", "specs/spec.yaml", "--json")
    assert (code, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: specs/spec.yaml:6: scaling.law: the law file specs/laws/my_law.yaml")
    assert said in err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"name: \x00"])
def test_a_law_file_that_is_no_text(content: bytes, trainwright: Called) -> None:
    Path("specs/laws/my_law.yaml").write_bytes(content)
    code, out, err = trainwright("plan", "specs/spec.yaml", "--json")
    assert (code in (3, 8), out, len(err.splitlines())) == (True, "", 1)
    assert "scaling.law: the law file specs/laws/my_law.yaml" in err


def test_an_unknown_law_is_told_its_neighbours(trainwright: Called) -> None:
    code, _, err = trainwright("plan", "specs/spec.yaml", "--json", "--set", "scaling.law=hofmann2022_1")
    assert code == 4
    assert "scaling.law: no scaling law is called 'hofmann2022_1': did you mean hoffmann2022_1" in err


# ---- the page


def test_the_page_of_laws_is_what_the_code_writes(repository: Path) -> None:
    for file, content in (("laws.md", compare.page()), ("laws.svg", compare.picture())):
        written = (repository / "docs" / file).read_text(encoding="utf-8")
        assert written == content, "run `python -m trainwright.compiler.laws.compare docs` and read the diff"


def test_the_page_names_every_law_and_its_unit() -> None:
    text = " ".join(compare.page().split())
    for facts in load_law_facts().values():
        assert f"### {facts.name} " in text
        assert text.count(f"| {facts.name} |") == 2
        assert facts.source in text
        assert facts.loss_unit in text
    picture = ElementTree.fromstring(compare.picture())
    dots = [each for each in picture.iter() if each.tag.endswith("circle")]
    rows = len(answers.rows_at(1e20, 1e9))
    assert len(dots) == 2 + 2 * 2 * rows  # a key; sizes and tokens at two budgets


def test_what_another_size_costs_is_what_the_planner_would_pay() -> None:
    """By the default's loss: the FLOPs of a law's run over those of the cheapest run to the same loss."""
    default = find_law(answers.DEFAULT)
    c = default.facts.constants
    (row,) = [row for row in answers.rows_at(5.76e23, 1e9) if row.label == "hoffmann2022_3"]
    scale = (c["alpha"] * c["A"] / (c["beta"] * c["B"])) ** (1 / (c["alpha"] + c["beta"]))
    k = c["A"] * scale ** -c["alpha"] + c["B"] * scale ** c["beta"]
    loss = float(default.loss(row.parameters, row.tokens))
    least = 6 * ((loss - c["E"]) / k) ** -((c["alpha"] + c["beta"]) / (c["alpha"] * c["beta"]))
    assert answers.waste(row) == pytest.approx(6 * row.parameters * row.tokens / least - 1, rel=1e-9)
    assert answers.waste(row) == pytest.approx(0.133, abs=0.001)
