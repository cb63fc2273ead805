"""docs/laws.md and docs/laws.svg: what every scaling law says of two budgets, and how far they disagree.

python -m trainwright.compiler.laws.compare docs
"""

import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from trainwright.compiler.facts import LawFacts, load_law_facts
from trainwright.compiler.laws.answers import DEFAULT, EXPERTS, Row, bands, beyond, rows_at, short, waste
from trainwright.compiler.laws.picture import Dot, draw

BUDGETS = (6e20, 5.76e23)  # FLOPs: a node of H100 for two days; Gopher's and Chinchilla's (arXiv 2203.15556)
UNIQUE_TOKENS = (10e9, 300e9)  # of the row that shows what a limit does, one a budget
WIDTH = 128  # of a line of the page

COUNTED = {
    "total": "every parameter",
    "embedding_once": "every parameter; of embedding and output layer, one",
    "without_embedding": "the layers' matrices and the output layer, without the embedding",
    "body": "the layers' matrices, without embedding and output layer",
    "active": "the parameters that a token uses, embedding and output layer both",
    "flops": "no parameters: M, training FLOPs a token of the layers, attention counted full",
}
LONG = ("sardana2023", "gadre2024")  # names begin so: fitted to models trained far beyond their best number of tokens
FORMS = {
    "additive": "L = E + A / N^alpha + B / D^beta",
    "repeated": "L = E + A / N'^alpha + B / D'^beta, N' and D' less than N and D where unique tokens repeat",
    "experts": "L = a e^delta N^(alpha + gamma ln e) + b e^omega D^(beta + zeta ln e) + c, e the effective number of experts",
    "frontier": "N = k_N C^a, D = k_D C^b",
    "kaplan": "N = k_N C^a, D = k_D C^b; L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D of models stopped early",
}


def page() -> str:
    """docs/laws.md."""
    small, large = tables = [rows_at(flops, unique) for flops, unique in zip(BUDGETS, UNIQUE_TOKENS, strict=True)]
    parts = [
        "# What the scaling laws say, and how far they disagree",
        "<!-- Written by `python -m trainwright.compiler.laws.compare docs`. -->",
        _prose(
            f"""Each law answers the same two budgets: {_flops(BUDGETS[0])} FLOPs, two days of eight H100, and
            {_flops(BUDGETS[1])}, on which Gopher was trained and, as 70B on 1.4T tokens, Chinchilla. A budget is C as the law
            counts it, a size is N as the law counts it, and a loss is that of the law's own corpus and tokenizer: **losses of two
            laws never compare.** `scaling: {{law: NAME}}` in a spec takes one; the planner solves it in the exact FLOPs of real
            shapes, so its sizes differ somewhat from these ([how](sizing.md))."""
        ),
        "![Size and tokens by law](laws.svg)",
        _prose(
            f"""A dot a law, both scales logarithmic. Shaded: the 80 % band of {DEFAULT}, the default. Open dots: N is not every
            parameter of a dense model (DeepSeek's M is drawn as M / 6), or tokens repeat."""
        ),
    ]
    for rows in tables:
        parts += [f"## {_flops(rows[0].flops)} FLOPs", _table(rows), _disagreement(rows)]
    parts += [
        "## Why some rows stand apart",
        _apart(small, large),
        "## The laws",
        *map(_law, load_law_facts().values()),
    ]
    return "\n\n".join(parts) + "\n"


def picture() -> str:
    """docs/laws.svg."""
    tables = [rows_at(flops, unique) for flops, unique in zip(BUDGETS, UNIQUE_TOKENS, strict=True)]
    labels = [row.label.replace(f"{short(UNIQUE_TOKENS[0])} ", "few ") for row in tables[0]]
    dots = [
        [
            Dot(
                row.parameters / (6 if row.facts.counts == "flops" else 1), row.tokens, row.whole
            )  # M = 6 N, without attention
            for row in rows
        ]
        for rows in tables
    ]
    return draw(labels, [f"{_flops(flops)} FLOPs" for flops in BUDGETS], dots, [bands(flops) for flops in BUDGETS])


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| law | N | D | D / N | loss, in its own unit | beyond what it was fitted on | more FLOPs |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        size = f"M = {row.parameters:.3g}".replace("+", "") if row.facts.counts == "flops" else short(row.parameters)
        ratio = "" if row.facts.counts == "flops" else f"{row.tokens / row.parameters:.3g}"
        loss = f"{float(row.law.loss(row.parameters, row.tokens)):.3f}" if row.law.has_loss else ""
        more = f"{100 * waste(row):.1f} %" if row.whole and row.label != DEFAULT else ""
        cells = (row.label, size, short(row.tokens), ratio, loss, beyond(row), more)
        lines.append(f"| {' | '.join(cells)} |")
    note = f"""More FLOPs: what the law's size takes to the loss that it reaches by {DEFAULT}, over what {DEFAULT}'s own best size
        takes, in {DEFAULT}'s loss alone; only where N means the same."""
    return "\n".join(lines) + "\n\n" + _prose(note)


def _disagreement(rows: Sequence[Row]) -> str:
    whole = [row for row in rows if row.whole]
    core = [row for row in whole if not row.label.startswith(LONG)]
    (n_low, n_high), (d_low, d_high) = bands(rows[0].flops)
    return _prose(
        f"""The {len(core)} laws that count all parameters and were fitted near the best sizes ask for {_spread(core, _size)}, and
        {_spread(core, _budget)}. With the {len(whole) - len(core)} that were fitted to models trained long, the sizes lie
        {_factor(whole, _size)} times apart, the tokens {_factor(whole, _budget)} times. Of all {len(rows)} rows, whatever their
        N, tokens go from {_extreme(rows, _budget, min)} to {_extreme(rows, _budget, max)}. The 80 % band of {DEFAULT} is
        {short(n_low)} to {short(n_high)} parameters ({n_high / n_low:.2g} times) and {short(d_low)} to {short(d_high)}
        tokens: the scatter of its own runs, not how far the laws are from each other."""
    )


def _size(row: Row) -> float:
    return row.parameters


def _budget(row: Row) -> float:
    return row.tokens


def _extreme(rows: Iterable[Row], key: Callable[[Row], float], which: Callable[..., Row]) -> str:
    row = which(rows, key=key)
    return f"{short(key(row))} ({row.label})"


def _factor(rows: Sequence[Row], key: Callable[[Row], float]) -> str:
    return f"{max(map(key, rows)) / min(map(key, rows)):.2g}"


def _spread(rows: Sequence[Row], key: Callable[[Row], float]) -> str:
    unit = "parameters" if key is _size else "tokens"
    return f"{_extreme(rows, key, min)} to {_extreme(rows, key, max)} {unit}, a factor of {_factor(rows, key)}"


def _apart(small: Sequence[Row], large: Sequence[Row]) -> str:
    """One point a law, with its numbers at both budgets."""
    at = {row.label: (row, other) for row, other in zip(small, large, strict=True)}

    def sizes(name: str) -> str:
        return " and ".join(short(row.parameters) for row in at[name])

    def ratios(name: str) -> str:
        return " and ".join(f"{row.tokens / row.parameters:.3g}" for row in at[name])

    def growth(name: str) -> str:
        return f"{at[name][1].parameters / at[name][0].parameters:.0f}"

    few, many = (f"ludziejewski2025, {experts} experts" for experts in EXPERTS)
    limited = at[f"muennighoff2023, {short(UNIQUE_TOKENS[0])} unique tokens"]
    seen = [
        f"{short(unique)} ({row.tokens / unique:.2g} epochs)"
        for row, unique in zip(limited, UNIQUE_TOKENS, strict=True)
    ]
    points = [
        f"""**kaplan2020** leaves embedding and output layer out of N, a large part of a small model; it fitted neither the
        schedule to the length of a run nor the rate to the size; and it grows N with C^0.73: between the two budgets
        {growth("kaplan2020")} times, where {DEFAULT} grows it {growth(DEFAULT)} times.""",
        f"""**ludziejewski2025** counts what a token uses. With {EXPERTS[0]} and {EXPERTS[1]} experts at the smaller budget the
        best active size falls to {short(at[few][0].parameters)} and {short(at[many][0].parameters)} from
        {short(at["ludziejewski2025"][0].parameters)}, and tokens rise; the whole model is several times as large. At the larger
        budget, far above its largest model, that is all but gone. Its dense row is of other data and other tuning than
        Chinchilla's.""",
        """**deepseek_llm** states M, the FLOPs of a token, attention included. Its tokens compare; a size needs a shape.""",
        """**porian2024** leaves the embedding out and keeps the output layer; at these sizes that is a few percent.""",
        f"""**sardana2023** and its parts (`_100`, `_250`, `_500`: at most so many tokens a parameter) are fits to one set of
        models, most of them trained long, and no fits of the best size: D / N of their optimum is {ratios("sardana2023")} for
        all, {ratios("sardana2023_100")} for `_100`. They show how the exponents move with the range of the data. Their constants
        are rounded, which alone moves sizes: Hoffmann et al.'s rounded ones ask for 20 % fewer parameters at
        {_flops(BUDGETS[1])} FLOPs than those they used.""",
        f"""**gadre2024** is for models of 20 tokens a parameter and more; the {ratios("gadre2024").split()[0]} of its optimum is
        outside. Take it to ask what many tokens make of a small model, not which size is best.""",
        f"""**minicpm2024** was fitted with a constant rate and a decay at the end, and asks for {ratios("minicpm2024")} tokens a
        parameter.""",
        f"""**muennighoff2023** with {" and ".join(seen)} unique tokens answers another question: what to do with too little
        text.""",
    ]
    return "\n".join(_prose(f"- {point}", "  ") for point in points)


def _law(facts: LawFacts) -> str:
    fitted = [
        f"{f'{show(low)} to' if low else 'up to'} {show(high)} {what}"
        for what, show, (low, high) in (
            ("parameters", short, facts.fitted_parameters),
            ("tokens", short, facts.fitted_tokens),
            ("FLOPs", _flops, facts.fitted_flops),
            ("tokens a parameter", "{:,.3g}".format, facts.fitted_tokens_per_parameter),
        )
        if np.isfinite(high)
    ]
    constants = ", ".join(f"{name} {value:.6g}" for name, value in facts.constants.items())
    points = [
        f"{FORMS[facts.form]}; {constants}".replace("e+", "e"),
        f"N: {COUNTED[facts.counts]}. C: {facts.flops}",
        f"loss: {facts.loss_unit}" if facts.loss_unit else "states the best size, and no loss",
        f"fitted on: {', '.join(fitted) or 'not stated'}" + (f"; {_draws(facts)}" if facts.draws else ""),
        f"source: {facts.source}",
    ]
    return f"### {facts.name}\n\n" + "\n".join(_prose(f"- {point}", "  ") for point in points)


def _draws(facts: LawFacts) -> str:
    return f"{len(facts.draws['E'])} refits to resampled runs give its bands"


def _prose(text: str, indent: str = "") -> str:
    """One paragraph, its lines wrapped."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _flops(flops: float) -> str:
    return f"{flops:g}".replace("e+", "e")


def main() -> None:
    """Write both into the folder that the command line names."""
    folder = Path(sys.argv[1])
    (folder / "laws.md").write_text(page(), encoding="utf-8")
    (folder / "laws.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
