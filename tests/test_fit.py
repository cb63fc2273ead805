"""`trainwright fit`: runs in, a law, plots and further runs out; every bad table of runs in one message."""

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from benchmark_modules import load_benchmark
from ruamel.yaml import YAML

from trainwright.compiler import cli
from trainwright.compiler.errors import InfeasibleError, RunsError
from trainwright.compiler.fit import approach3
from trainwright.compiler.fit.approach2 import fit_minima
from trainwright.compiler.fit.approach3 import DELTA, Floats, Problem, follow
from trainwright.compiler.fit.bootstrap import bootstrap, draw_weights
from trainwright.compiler.fit.optimum import best_at
from trainwright.compiler.fit.result import CONSTANTS, Fit, fit_runs
from trainwright.compiler.fit.runs import FEWEST_RUNS, Runs, read_runs
from trainwright.compiler.fit.suggest import expected_sd, suggest
from trainwright.compiler.laws.find import load_law_file

# Hoffmann et al. 2022, the TeX source of appendix D.3, as Besiroglu et al. 2024's notebook quotes it.
TRUE = {"A": 406.4010175, "B": 410.7228269, "E": 1.693373681, "alpha": 0.33917084, "beta": 0.2849083}
OTHERS = (
    {"A": 120.0, "B": 900.0, "E": 1.1, "alpha": 0.25, "beta": 0.33},
    {"A": 4000.0, "B": 3000.0, "E": 2.4, "alpha": 0.5, "beta": 0.4},
    {"A": 15.0, "B": 60.0, "E": 0.7, "alpha": 0.15, "beta": 0.21},
)
# Fit.at and the bootstrap need no more to be themselves.
FEW_DRAWS = 100


def loss_of(constants: dict[str, float], params: Floats, tokens: Floats) -> Floats:
    return np.asarray(
        constants["E"] + constants["A"] / params ** constants["alpha"] + constants["B"] / tokens ** constants["beta"]
    )


def isoflop_runs(
    constants: dict[str, float],
    flops: Iterable[float],
    *,
    noise: float = 0.0,
    seed: int = 0,
    sizes: int = 7,
    within: float = 8.0,
    off_centre: float = 1.0,
) -> tuple[Floats, Floats, Floats]:
    """(params, tokens, loss): at each budget, sizes from 1 / within to within times the best; noise: sd of ln L."""
    params, tokens = [], []
    for budget in flops:
        best = float(best_at(constants, budget)["params"]) * off_centre
        for size in best * np.geomspace(1 / within, within, sizes):
            params.append(size)
            tokens.append(budget / (6 * size))
    n, d = np.array(params), np.array(tokens)
    return n, d, loss_of(constants, n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, len(n)))


def as_runs(columns: tuple[Floats, Floats, Floats]) -> Runs:
    params, tokens, loss = columns
    return Runs("runs.csv", params, tokens, loss, 6 * params * tokens, tuple(range(2, 2 + len(params))), ())


def write_csv(path: Path, columns: Iterable[Iterable[float]], header: str = "params,tokens,loss") -> Path:
    lines = [header, *(",".join(repr(float(value)) for value in row) for row in zip(*columns, strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


Fitted = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trainwright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fitted:
    """(exit code, stdout, stderr) of the command, in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        monkeypatch.setattr(sys, "argv", ["trainwright", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            cli.main()
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
        return int(stopped.value.code or 0), texts[0], texts[1]

    return call


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A table that determines its law."""
    return write_csv(tmp_path / "runs.csv", isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 5), noise=0.003))


# ---- approach 3


@pytest.mark.parametrize("constants", [TRUE, *OTHERS])
def test_known_constants_come_back_from_losses_without_noise(constants: dict[str, float]) -> None:
    problem = Problem.of(*isoflop_runs(constants, np.geomspace(1e18, 1e21, 6)))
    theta, objective = approach3.fit(problem)
    found = problem.constants(theta)
    assert {name: float(found[name]) for name in CONSTANTS} == pytest.approx(constants, rel=1e-6)
    assert objective < 1e-15


def test_no_start_of_the_whole_grid_ends_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approach3, "STARTS", 121)
    for seed in range(3):
        problem = Problem.of(*isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 4), noise=0.01, seed=seed))
        starts = approach3._grid_starts(problem)
        _, lowest = follow(problem, starts, np.ones((len(starts), len(problem.x))))
        monkeypatch.setattr(approach3, "STARTS", 12)
        _, found = approach3.fit(problem)
        monkeypatch.setattr(approach3, "STARTS", 121)
        assert found <= lowest.min() * (1 + 1e-9)


def test_the_objective_is_hoffmanns() -> None:
    columns = isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 4), noise=0.01)
    problem = Problem.of(*columns)
    theta, objective = approach3.fit(problem)
    constants = {name: float(value) for name, value in problem.constants(theta).items()}
    size = np.abs(np.log(loss_of(constants, *columns[:2])) - np.log(columns[2]))
    assert objective == pytest.approx(float(np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum()), rel=1e-9)


def test_gradient_and_hessian_are_the_objectives() -> None:
    problem = Problem.of(*isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 3), noise=0.05))
    theta = theta_of(problem)[None] + 0.01
    weights = np.random.default_rng(0).integers(0, 3, (1, len(problem.x))).astype(float)
    step, delta = 1e-6, 0.03
    gradient, hessian, _ = approach3._derivatives(problem, theta, weights, delta)
    for index, moved in enumerate(step * np.eye(5)):
        above, below = (approach3._objective(problem, theta + sign * moved, weights, delta)[0] for sign in (1, -1))
        assert gradient[0, index] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-9)
        up, down = (approach3._derivatives(problem, theta + sign * moved, weights, delta)[0][0] for sign in (1, -1))
        assert hessian[0, index] == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-7)


def test_a_loss_far_off_hardly_moves_the_fit() -> None:
    params, tokens, loss = isoflop_runs(TRUE, np.geomspace(1e18, 1e21, 6), noise=0.001)
    loss[17] *= 1.3
    problem = Problem.of(params, tokens, loss)
    found = problem.constants(approach3.fit(problem)[0])
    assert float(found["alpha"]) == pytest.approx(TRUE["alpha"], abs=0.01)


def test_the_runs_of_besiroglu(reference: Path) -> None:
    """The global optimum of 240 runs, and of all 245, to which a grid of 4,500 starts leads too; below half a second."""
    benchmark = load_benchmark("fit_speed")
    every = benchmark.load_runs(reference, left_out=0)
    expected = {"A": 477.825868, "B": 2143.417361, "E": 1.817218099, "alpha": 0.347310499, "beta": 0.367172433}
    for columns, constants, most in (
        (benchmark.load_runs(reference), expected, 0.0010182741),
        (every, {"A": 495.726, "B": 12845.61, "E": 1.891338, "alpha": 0.349313, "beta": 0.453049}, 0.00182601053),
    ):
        problem = Problem.of(*columns)
        theta, objective = approach3.fit(problem)
        assert {name: float(value) for name, value in problem.constants(theta).items()} == pytest.approx(
            constants, rel=2e-6
        )
        assert objective <= most
    assert len(every[0]) == 245


# ---- bootstrap


def test_every_draw_is_at_its_own_optimum() -> None:
    problem = Problem.of(*isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 4), noise=0.01))
    points = bootstrap(problem, approach3.fit(problem)[0], FEW_DRAWS, seed=3)
    weights = draw_weights(np.random.default_rng(3), len(problem.x), FEW_DRAWS)
    for index in range(0, FEW_DRAWS, 20):
        rows = np.repeat(np.arange(len(problem.x)), weights[index].astype(int))
        drawn = Problem.of(*(np.exp(column[rows]) for column in _columns(problem)))
        _, lowest = approach3.fit(drawn)
        _, found = approach3.minimise(problem, points[index : index + 1], weights[index : index + 1], DELTA)
        assert found[0] == pytest.approx(lowest, rel=1e-6)


def test_the_seed_decides_the_draws() -> None:
    problem = Problem.of(*isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 4), noise=0.01))
    theta, _ = approach3.fit(problem)
    once, again, other = (bootstrap(problem, theta, FEW_DRAWS, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, other)


def test_intervals_cover_the_truth() -> None:
    """Of 60 tables with noise, the 80 % interval of the best size holds the truth in 80 %, give or take."""
    budget = 1e21
    truth = float(best_at(TRUE, budget)["params"])
    inside = 0
    for seed in range(60):
        runs = as_runs(isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 6), noise=0.01, seed=seed))
        low, high = fit_runs(runs, FEW_DRAWS, seed).at(budget)["params"].interval_80
        inside += low <= truth <= high
    assert 36 <= inside <= 57


def test_the_planners_draws_are_the_first_of_the_bootstrap(reference: Path) -> None:
    text = resources.files("trainwright.compiler.data").joinpath("epoch2024_draws.csv").read_text(encoding="utf-8")
    header, *lines = text.splitlines()
    assert header.split(",") == list(CONSTANTS)
    stored = np.array([[float(cell) for cell in line.split(",")] for line in lines])
    assert stored.shape == (400, 5)
    problem = Problem.of(*load_benchmark("fit_speed").load_runs(reference))
    points = problem.constants(bootstrap(problem, approach3.fit(problem)[0], 20, seed=0))
    np.testing.assert_allclose(np.column_stack([points[name] for name in CONSTANTS]), stored[:20], rtol=1e-6)


# ---- approach 2


def test_parabolas_find_the_frontier() -> None:
    """Exponents that are equal and sizes on centre: no bias; the exponent stays right off centre too (Czech et al. 2026)."""
    same = TRUE | {"beta": TRUE["alpha"]}
    found = fit_minima(as_runs(isoflop_runs(same, np.geomspace(1e18, 1e21, 5), within=2.0)), FEW_DRAWS, 0)
    assert (found.a, found.note) == (pytest.approx(0.5, abs=1e-6), "")
    for one in found.sets:
        assert one.best_params == pytest.approx(float(best_at(same, one.flops)["params"]), rel=1e-6)
    off = fit_minima(as_runs(isoflop_runs(TRUE, np.geomspace(1e18, 1e21, 5), within=4.0, off_centre=1.5)), FEW_DRAWS, 0)
    assert off.a == pytest.approx(TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"]), abs=1e-3)
    assert off.k * 1e20**off.a == pytest.approx(float(best_at(TRUE, 1e20)["params"]), rel=0.05)


def test_parabolas_with_noise_have_an_interval_around_the_exponent() -> None:
    found = fit_minima(as_runs(isoflop_runs(TRUE, np.geomspace(1e18, 1e21, 6), noise=0.004)), 400, 0)
    low, high = np.nanpercentile(found.draws[:, 1], (2.5, 97.5))
    assert low < TRUE["beta"] / (TRUE["alpha"] + TRUE["beta"]) < high
    assert high - low < 0.2


def test_a_minimum_outside_its_set_does_not_count() -> None:
    budgets = np.geomspace(1e18, 1e20, 3)
    found = fit_minima(as_runs(isoflop_runs(TRUE, budgets, within=2.0, off_centre=6.0)), FEW_DRAWS, 0)
    assert np.isnan(found.a)
    assert all("below its sizes: add smaller models" in one.excluded for one in found.sets)
    assert found.note.startswith("3 sets of 4 sizes or more")
    assert "3 without a minimum inside; a power law takes 3" in found.note
    two = fit_minima(as_runs(isoflop_runs(TRUE, budgets[:2])), FEW_DRAWS, 0)
    assert two.note.startswith("2 sets")


# ---- bad tables

GOOD_ROWS = [f"{n:g},{d:g},{loss:.4f}" for n, d, loss in zip(*isoflop_runs(TRUE, (1e18, 1e19)), strict=True)]


def table(*rows: str, header: str = "params,tokens,loss", start: int = 0) -> str:
    return "\n".join([header, *GOOD_ROWS[start:], *rows]) + "\n"


LAST = len(GOOD_ROWS) + 2  # the line of the first row that a test adds
BAD: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "empty": ("", (":1: no first line with the names of the columns", "params,tokens,loss")),
    "blank": ("\n\n", (":1: no first line",)),
    "binary": (b"\x89PNG\r\n\x1a\n\x00", ("no text in UTF-8 (byte 0)",)),
    "utf-16": (table().encode("utf-16"), ("no text in UTF-8",)),
    "yaml": ("name: x\ndata: {a: 1}\n", (":1: no column params and no column tokens and no column loss", "name: x")),
    "no header": ("\n".join(GOOD_ROWS), (":1: no column params",)),
    "a column missing": (table(header="params,tokens,losses"), (":1: column 'losses': unknown; did you mean loss?",)),
    "no tokens": (
        table(header="params,flops,loss"),
        (":1: no column tokens; the first line names params, flops, loss",),
    ),
    "a column twice": (
        table(header="params,loss,loss"),
        ("column 'loss': stands 2 times; keep one", "no column tokens"),
    ),
    "nan": (table("1e8,2e9,nan"), (f":{LAST}: loss: nan is not above 0 and finite",)),
    "infinite": (table("inf,2e9,3.1"), (f":{LAST}: params: inf is not above 0",)),
    "negative": (table("1e8,-2e9,3.1"), (f":{LAST}: tokens: -2e9 is not above 0",)),
    "zero": (table("1e8,2e9,0"), (f":{LAST}: loss: 0 is not above 0",)),
    "text": (table("1e8,2e9,three"), (f":{LAST}: loss: 'three' is no number; write it in digits",)),
    "nothing": (table("1e8,,3.1"), (f":{LAST}: tokens: is empty; write a number, or remove the line",)),
    "another unit": (table("1e8,2 GB,3.1"), (f":{LAST}: tokens: '2 GB' is no number; write tokens, as 1400000000",)),
    "billions": (
        table("7,140,2.1"),
        (f":{LAST}: params: 7 is outside 1000 to 1e+16; write parameters, as 70000000 or 70M",),
    ),
    "overflow": (table("1e999,2e9,3.1"), (f":{LAST}: params: 1e999 is not above 0 and finite",)),
    "underflow": (table("1e8,2e9,1e-999"), (f":{LAST}: loss: 1e-999 is not above 0",)),
    "perplexity": (
        table("1e8,2e9,24.5"),
        (f":{LAST}: loss: 24.5 is outside 0.001 to 18", "of a perplexity take the logarithm"),
    ),
    "decimal comma": (
        "params;tokens;loss\n" + "1e8;2e9;3,1\n",
        (":2: loss: '3,1' is no number; write a decimal point",),
    ),
    "thousands": (
        table('1e8,"2,000,000,000",3.1'),
        (f":{LAST}: tokens: '2,000,000,000' is no number", "no separators"),
    ),
    "too many fields": (table("1e8,2e9,3.1,4"), (f":{LAST}: 4 fields, and the first line names 3",)),
    "an open quote": (table('1e8,2e9,"3.1'), (":", "not CSV: unexpected end of data")),
    "a run twice": (table(GOOD_ROWS[3]), (f":{LAST}: the same run as line 5 (params, tokens: ", "keep one line")),
    "a run three times": (table(GOOD_ROWS[3], GOOD_ROWS[3]), (f":{LAST}: the same run as line 5", "3 times in all")),
    "flops": (
        table("1e8,2e9,3.1,1e17", header="params,tokens,loss,flops", start=99),
        (":2: flops: 1e+17 is 0.0833 x 6 N D = 6 x 1e+08 x 2e+09 = 1.2e+18",),
    ),
    "a misspelt column": (
        table("1e8,2e9,3.1,1e17", header="params,tokens,loss,flop", start=99),
        ("'flop': unknown; did you mean flops?",),
    ),
    "too few": (
        table(start=len(GOOD_ROWS) - FEWEST_RUNS + 1),
        (f"{FEWEST_RUNS - 1} different runs; a law of five constants takes 8", "--suggest"),
    ),
    "no runs": (table(start=99), ("0 different runs",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_end_in_one_message(case: str, trainwright: Fitted) -> None:
    content, fragments = BAD[case]
    Path("bad.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = trainwright("fit", "bad.csv", "-o", "law.yaml")
    assert (code, out) == (RunsError.exit_code, ""), err
    assert err.startswith("error: bad.csv:")
    for fragment in fragments:
        assert fragment in err
    assert [path.name for path in Path().iterdir()] == ["bad.csv"]


def test_every_problem_is_in_one_message(trainwright: Fitted) -> None:
    Path("bad.csv").write_text(table(*(f"1e8,{index}e9,nan" for index in range(1, 14))))
    code, _, err = trainwright("fit", "bad.csv")
    assert code == RunsError.exit_code
    assert err.count("is not above 0") == 10
    assert err.splitlines()[-1].strip() == "and 3 more"


@pytest.mark.parametrize(
    ("factor", "share", "words"),
    [
        (1 / np.log(2), 0.3, "1 / ln 2 = 1.443, bits among nats"),
        (np.log(2), 0.5, "write all losses in one unit"),
        (0.33, 0.2, "losses a token are 2 to 5 x those a byte"),
    ],
)
def test_mixed_units_are_told(factor: float, share: float, words: str, trainwright: Fitted) -> None:
    params, tokens, loss = isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 5), noise=0.005)
    loss[np.random.default_rng(4).random(len(loss)) < share] *= factor
    code, out, err = trainwright("fit", write_csv(Path("mixed.csv"), (params, tokens, loss)))
    assert (code, out) == (RunsError.exit_code, "")
    assert words in err
    assert "with the factor taken out the law's mean error falls from" in err


@pytest.mark.parametrize(("factor", "said"), [(1 / 3, "0.33"), (3.0, "3 x"), (1 / np.log(2), "1.4")])
def test_one_loss_in_another_unit_is_told(factor: float, said: str, trainwright: Fitted) -> None:
    params, tokens, loss = isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 5), noise=0.005)
    loss[11] *= factor
    code, _, err = trainwright("fit", write_csv(Path("one.csv"), (params, tokens, loss)))
    assert code == RunsError.exit_code
    assert f"one.csv:13: loss: {loss[11]:.4g} is {said}" in err


def test_losses_of_one_unit_are_never_called_mixed() -> None:
    """Random laws, ranges and noise, runs scattered."""
    for seed in range(40):
        generator = np.random.default_rng(seed)
        count = int(generator.integers(8, 40))
        params, tokens = 10 ** generator.uniform(5, 10, count), 10 ** generator.uniform(7, 11.5, count)
        alpha, beta = generator.uniform(0.15, 0.6, 2)
        loss = generator.uniform(0.5, 2.5) + generator.uniform(0.5, 6) * (params / 1e7) ** -alpha
        loss = (loss + generator.uniform(0.5, 4) * (tokens / 1e9) ** -beta) * np.exp(generator.normal(0, 0.02, count))
        fit_runs(as_runs((params, tokens, loss)), 1, 0)


# ---- what else a table may look like


def test_byte_order_marks_semicolons_units_and_empty_lines_are_read(tmp_path: Path) -> None:
    rows = [row.replace(",", ";") for row in GOOD_ROWS]
    text = "\ufeffLoss ;Params;tokens;date\r\n\r\n" + "".join(
        f"{row.split(';')[2]};{row.split(';')[0]};{row.split(';')[1]};today\r\n" for row in rows
    )
    (tmp_path / "runs.csv").write_text(text + "3.1;70M;1.4B;today\r\n;;;\r\n", encoding="utf-8", newline="")
    runs = read_runs(tmp_path / "runs.csv")
    assert (len(runs), runs.lines[0], runs.lines[-1]) == (len(GOOD_ROWS) + 1, 3, len(GOOD_ROWS) + 3)
    assert (runs.params[-1], runs.tokens[-1], runs.loss[-1]) == (70e6, 1.4e9, 3.1)
    assert runs.notes == ("columns not read: date",)


def test_of_several_learning_rates_the_best_counts(tmp_path: Path) -> None:
    rows = [f"{row},{rate},{256}" for row in GOOD_ROWS for rate in (1e-3, 2e-3)]
    rows[5] = rows[5].replace(rows[5].split(",")[2], "0.9")
    header = "params,tokens,loss,learning_rate,batch"
    (tmp_path / "runs.csv").write_text("\n".join([header, *rows]))
    runs = read_runs(tmp_path / "runs.csv")
    assert (len(runs), runs.loss[2], runs.lines[2]) == (len(GOOD_ROWS), 0.9, 7)
    assert runs.notes[0].startswith("28 lines are 14 runs with several learning rates or batches")
    (tmp_path / "runs.csv").write_text("\n".join([header, *rows, rows[4]]))
    with pytest.raises(RunsError, match=r"the same run as line 6 \(params, tokens, learning_rate, batch"):
        read_runs(tmp_path / "runs.csv")


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["nowhere.csv"], 8, "nowhere.csv: cannot be read: No such file"),
        (["."], 8, "cannot be read: Is a directory"),
        (["runs.csv", "-o", "runs.csv"], 8, "exists, and is no law file that `trainwright fit` wrote"),
        (["runs.csv", "-o", "."], 8, "is a folder"),
        (["runs.csv", "--plot", "x.pdf"], 2, "a picture is .png or .svg"),
        (["runs.csv", "--suggest", "cheap"], 2, "--suggest cheap: 'cheap' is not a quantity"),
        (["runs.csv", "--suggest", "1"], 2, "--suggest 1: outside 1000 to 1e+40 FLOPs"),
        (["runs.csv", "--suggest", "1e4"], 5, "FLOPs pay for no sweep: the smallest run near the file's"),
        (["runs.csv", "--target", "1e41"], 2, "--target 1e41: outside"),
        (["runs.csv", "--counts", "most"], 2, "--counts most: a column of params counts one of total, embedding_once"),
        (["runs.csv", "--bootstraps", "10"], 2, "--bootstraps"),
        (["runs.csv", "--seed", "-1"], 2, "--seed"),
    ],
)
def test_a_wrong_command_line_ends_in_one_message(
    arguments: list[str], code: int, fragment: str, good: Path, trainwright: Fitted
) -> None:
    before = good.read_bytes()
    found, out, err = trainwright("fit", *arguments)
    assert (found, out) == (code, ""), err
    assert fragment in err
    assert good.read_bytes() == before


# ---- refusals


@pytest.mark.parametrize(
    ("columns", "fragment"),
    [
        # One ratio of tokens to params: the terms cannot be told apart.
        ((n := np.geomspace(1e7, 1e9, 10), 20 * n, loss_of(TRUE, n, 20 * n)), "tokens a parameter span 1 x (20 to 20)"),
        # No irreducible loss in the data.
        (isoflop_runs(TRUE | {"E": 1e-9}, np.geomspace(1e18, 1e20, 4), noise=0.004), "sits at its bound 0"),
        # One size, nearly.
        (isoflop_runs(TRUE, np.geomspace(1e18, 1e20, 5), within=1.01, noise=0.01), "tokens a parameter span"),
        # Noise as large as what the runs differ by.
        (isoflop_runs(TRUE, np.geomspace(1e18, 4e18, 3), noise=0.05, sizes=4), "interval of the best size is"),
    ],
)
def test_a_law_that_the_runs_do_not_determine_is_not_written(
    columns: tuple[Floats, Floats, Floats], fragment: str, trainwright: Fitted
) -> None:
    runs = write_csv(Path("runs.csv"), columns)
    code, out, err = trainwright("fit", runs, "-o", "law.yaml", "--bootstraps", FEW_DRAWS, "--json")
    assert code == 10
    assert "do not determine a law that may be extrapolated; law.yaml is not written" in err
    assert fragment in err
    assert "most help: runs of" in err
    assert not Path("law.yaml").exists()
    found = json.loads(out)
    assert found["law"] is None
    assert any(fragment in refusal for refusal in found["refusals"])
    assert len(found["budgets"]) == 1, "nothing beyond the runs"
    assert trainwright("fit", runs, "--bootstraps", FEW_DRAWS)[0] == 10
    assert trainwright("fit", runs, "--bootstraps", FEW_DRAWS, "--suggest", "1e20")[0] == 0


def test_pooled_and_narrow_runs_of_others_are_refused(reference: Path, tmp_path: Path) -> None:
    """Cerebras-GPT with Pythia: E at its bound. Step Law's 17 sizes and lengths: too narrow a range."""
    for name, columns, fragment in (
        (
            "cerebras_pythia_pile_losses",
            ("params_total", "tokens", "pile_test_xent_paper(gpt2-vocab nats/token)"),
            "at its bound",
        ),
        ("steplaw_dense_lr_bs_loss", ("N", "D", "smooth loss", "lr", "bs"), "the best size is"),
    ):
        text = (reference / "scaling" / f"{name}.csv").read_text().splitlines()
        places = [text[0].split(",").index(column) for column in columns]
        rows = [[cell.split(",")[place] for place in places] for cell in text[1:]]
        names = ("params", "tokens", "loss", "learning_rate", "batch")[: len(columns)]
        (tmp_path / "runs.csv").write_text("\n".join(",".join(row) for row in (names, *rows)))
        fit = fit_runs(read_runs(tmp_path / "runs.csv"), 200, 0)
        assert any(fragment in refusal for refusal in fit.refusals), fit.refusals


# ---- output


def test_the_law_file_says_what_was_fitted(good: Path, trainwright: Fitted) -> None:
    code, out, err = trainwright("fit", good, "-o", "deep/mine.yaml", "--bootstraps", 500)
    assert (code, err) == (0, ""), err
    assert out.splitlines()[0] == "L = E + A / N^alpha + B / D^beta"
    assert out.splitlines()[-1] == "wrote deep/mine.yaml"
    law = YAML(typ="safe", pure=True).load(Path("deep/mine.yaml").read_text())
    runs = read_runs(good)
    assert (law["name"], law["form"], law["counts"], law["flops"]) == ("mine", "additive", "embedding_once", "6 N D")
    assert law["fitted_parameters"] == pytest.approx([runs.params.min(), runs.params.max()], rel=1e-8)
    assert law["fitted_flops"] == pytest.approx([1e18, 1e20], rel=1e-8)
    assert law["constants"] == pytest.approx(TRUE, rel=0.5)
    assert set(law["draws"]) == set(CONSTANTS)
    assert {len(values) for values in law["draws"].values()} == {400}
    assert all(isinstance(value, float) for values in law["draws"].values() for value in values)
    # A law file may be written again; the same runs and seed write the same bytes.
    before = Path("deep/mine.yaml").read_bytes()
    assert trainwright("fit", good, "-o", "deep/mine.yaml", "--bootstraps", 500)[0] == 0
    assert Path("deep/mine.yaml").read_bytes() == before
    assert [path.name for path in Path("deep").iterdir()] == ["mine.yaml"]


def test_json_holds_the_constants_at_the_top_and_the_law(good: Path, trainwright: Fitted) -> None:
    code, out, err = trainwright("fit", good, "--json", "--target", "1e24", "--suggest", "3e19", "-o", "law.yaml")
    assert (code, err) == (0, "wrote law.yaml\n")
    found = json.loads(out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert all(isinstance(found[name], float) for name in (*CONSTANTS, "objective", "a"))
    for name in (*CONSTANTS, "a"):
        (low_80, high_80), (low_95, high_95) = found["intervals"][name]["80"], found["intervals"][name]["95"]
        assert low_95 <= low_80 <= found[name] <= high_80 <= high_95
    assert [round(budget["flops"] / 1e20, 6) for budget in found["budgets"]] == [1, 10, 30, 1e4]
    assert set(found["budgets"][0]) == {"flops", "params", "tokens", "ratio", "loss"}
    for budget in found["budgets"]:
        assert 6 * budget["params"]["value"] * budget["tokens"]["value"] == pytest.approx(budget["flops"])
    assert len(found["residuals"]) == found["runs"] == 35
    assert found["approach2"]["a"] == pytest.approx(found["a"], abs=0.05)
    assert "1e+24 FLOPs are 1e+04 x the largest run: beyond 30 x the frontier bends" in found["warnings"][0]
    assert found["law"] == YAML(typ="safe", pure=True).load(Path("law.yaml").read_text())
    assert found["suggest"]["flops"] <= 3e19


def test_a_spec_can_name_the_law_file(good: Path, trainwright: Fitted) -> None:
    """What `load_law_file` reads is what was fitted: constants, ranges, and a band from the draws."""
    code, out, _ = trainwright("fit", good, "-o", "mine.yaml", "--json", "--counts", "body")
    assert code == 0
    printed = json.loads(out)
    law = load_law_file(Path("mine.yaml"))
    assert (law.facts.name, law.facts.counts, law.facts.flops) == ("mine", "body", "6 N D")
    assert dict(law.facts.constants) == pytest.approx({name: printed[name] for name in CONSTANTS}, rel=1e-8)
    at = printed["budgets"][1]
    params, tokens = law.frontier(at["flops"])
    assert float(params) == pytest.approx(at["params"]["value"], rel=1e-6)
    assert float(law.loss(params, tokens)) == pytest.approx(at["loss"]["value"], rel=1e-8)
    draws = law.draws()
    assert draws is not None
    sizes, _ = draws.frontier(at["flops"])
    assert sizes.shape == (400,)
    # 400 draws of the 1,000 that are printed.
    assert np.percentile(sizes, (10, 90)) == pytest.approx(at["params"]["80"], rel=0.05)
    assert law.extrapolations(float(params), float(tokens), 31 * 1e20)


@pytest.mark.parametrize("name", ["fit.png", "fit.SVG"])
def test_plots_are_pictures(name: str, good: Path, trainwright: Fitted) -> None:
    code, out, err = trainwright("fit", good, "--plot", name, "--bootstraps", FEW_DRAWS)
    assert (code, err, out.splitlines()[-1]) == (0, "", f"wrote {name}")
    content = Path(name).read_bytes()
    assert len(content) > 10_000
    if name.endswith("png"):
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert ElementTree.fromstring(content).tag.endswith("svg")
        assert "efficient frontier" in content.decode()


def test_a_plot_without_matplotlib_says_how_to_install_it(
    good: Path, trainwright: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = trainwright("fit", good, "--plot", "fit.png")
    assert (code, out) == (26, "")
    assert "pip install 'trainwright[plot]'" in err


def test_fitting_imports_no_scipy_no_torch_no_matplotlib(good: Path) -> None:
    probe = (
        "import sys\n"
        "from trainwright.compiler.cli import main\n"
        f"sys.argv = ['trainwright', 'fit', {str(good)!r}, '--bootstraps', '100']\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "print([name for name in ('scipy', 'torch', 'matplotlib') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert result.stdout.endswith("\n[]\n"), result.stdout + result.stderr


def test_the_page_shows_what_the_command_prints(repository: Path, trainwright: Fitted) -> None:
    page = (repository / "docs" / "fit.md").read_text(encoding="utf-8")
    runs, first, _, second = re.findall(r"```(?:csv|console|yaml)\n(.*?)```", page, re.DOTALL)
    Path("runs.csv").write_text(runs)
    for block in (first, second):
        command, shown = block.split("\n", 1)
        code, out, err = trainwright(*command.removeprefix("$ trainwright ").split())
        assert (code, err) == (0, "")
        assert out.endswith(shown.removeprefix("...\n"))


# ---- further runs


def fitted(columns: tuple[Floats, Floats, Floats]) -> Fit:
    return fit_runs(as_runs(columns), FEW_DRAWS, 0)


def joined(*tables: tuple[Floats, Floats, Floats]) -> tuple[Floats, Floats, Floats]:
    params, tokens, loss = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    return params, tokens, loss


def test_a_sweep_stays_under_its_budget_and_narrows_the_law() -> None:
    """Not only by the formula: of 50 repetitions with noise, the best size at the target is off by what the formula expects."""
    budgets, target, noise = np.geomspace(1e18, 1e19, 4), 1e20, 0.005
    fit = fitted(isoflop_runs(TRUE, budgets, noise=noise))
    truth = np.log(float(best_at(TRUE, target)["params"]))
    errors: list[float] = []
    expected: list[float] = []
    for budget in (0.0, 2e18, 1e20):
        params, tokens = np.empty(0), np.empty(0)
        if budget:
            sweep = suggest(fit.runs, fit.problem, fit.theta, budget, target)
            assert sweep.flops.sum() <= budget
            assert sweep.flops.max() <= budget / 3
            assert sweep.size_sd[1] < sweep.size_sd[0]
            assert sweep.loss_sd[1] < sweep.loss_sd[0]
            params, tokens = sweep.params, sweep.tokens
        off = []
        for seed in range(50):
            factor = np.exp(np.random.default_rng(seed + 100).normal(0, noise, len(params)))
            more = (params, tokens, loss_of(TRUE, params, tokens) * factor)
            problem = Problem.of(*joined(isoflop_runs(TRUE, budgets, noise=noise, seed=seed), more))
            constants = problem.constants(approach3.fit(problem)[0])
            off.append(np.log(float(best_at(constants, target)["params"])) - truth)
            if seed == 0:
                expected.append(float(expected_sd(problem, theta_of(problem), noise, target)[0]))
        errors.append(float(np.sqrt(np.mean(np.square(off)))))
    # The formula is that of least squares; of absolute deviations the variance is pi / 2 times as large.
    assert errors == pytest.approx(np.sqrt(np.pi / 2) * np.array(expected), rel=0.3)
    assert errors[0] > 1.4 * errors[1]
    assert errors[0] > 1.5 * errors[2]


def test_a_sweep_beats_runs_at_one_more_budget_of_the_same_cost() -> None:
    columns = isoflop_runs(TRUE, np.geomspace(1e18, 1e19, 4), noise=0.005)
    fit = fitted(columns)
    budget, target, noise = 2e19, 1e21, 0.005
    sweep = suggest(fit.runs, fit.problem, fit.theta, budget, target)
    count = len(sweep.params)
    planned = (sweep.params, sweep.tokens, loss_of(TRUE, sweep.params, sweep.tokens))
    usual = isoflop_runs(TRUE, [budget / count], sizes=count, within=4.0)
    ours, theirs, none = (
        expected_sd(problem, theta_of(problem), noise, target)
        for problem in (Problem.of(*joined(columns, more)) for more in (planned, usual, tuple(np.empty((3, 0)))))
    )
    assert ours[0] < 0.9 * theirs[0] < 0.9 * none[0]
    assert ours[1] < theirs[1] < none[1]


@pytest.mark.parametrize("budget", [1e19, 1e21, 1e40])
def test_few_runs_take_the_default_laws_constants(budget: float, trainwright: Fitted) -> None:
    write_csv(Path("runs.csv"), isoflop_runs(TRUE, [1e18], sizes=3))
    code, out, err = trainwright("fit", "runs.csv", "--suggest", budget, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["law"] is None
    assert found["refusals"][0].startswith(
        "3 different runs, and a fit takes 8: the sweep starts from the constants of"
    )
    sweep = found["suggest"]
    assert 0 < sweep["flops"] == pytest.approx(sum(run["flops"] for run in sweep["runs"]))
    assert sweep["flops"] <= budget
    assert sweep["log_params_sd"]["after"] < sweep["log_params_sd"]["before"]
    code, out, _ = trainwright("fit", "runs.csv", "--suggest", budget)
    assert code == 0
    assert "runs to add" in out
    assert trainwright("fit", "runs.csv", "--suggest", budget, "-o", "law.yaml")[0] == RunsError.exit_code


def test_a_budget_that_pays_for_nothing_says_what_would() -> None:
    fit = fitted(isoflop_runs(TRUE, np.geomspace(1e18, 1e19, 4)))
    with pytest.raises(
        InfeasibleError, match=r"a third of --suggest and of --target; (\S+) FLOPs are enough"
    ) as raised:
        suggest(fit.runs, fit.problem, fit.theta, 1e9, 1e20)
    enough = float(str(raised.value).rpartition("; ")[2].split()[0])
    assert len(suggest(fit.runs, fit.problem, fit.theta, 1.05 * enough, 1e20).params) >= 1


def theta_of(problem: Problem) -> Floats:
    """The point of the true constants."""
    a, b = np.log(TRUE["A"]) - TRUE["alpha"] * problem.mean_x, np.log(TRUE["B"]) - TRUE["beta"] * problem.mean_y
    return np.array([a, b, np.log(TRUE["E"]), TRUE["alpha"], TRUE["beta"]])


def _columns(problem: Problem) -> tuple[Floats, Floats, Floats]:
    return problem.x + problem.mean_x, problem.y + problem.mean_y, problem.log_loss
