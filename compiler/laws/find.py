"""Laws by name, and laws of the user's own from files that `trainwright fit` wrote."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from trainwright.compiler.errors import FileError, SpecError
from trainwright.compiler.facts import COUNTS, FITTED, LawFacts, find_law_facts, make_law_facts
from trainwright.compiler.laws.additive import CONSTANTS, AdditiveLaw
from trainwright.compiler.laws.experts import ExpertsLaw
from trainwright.compiler.laws.frontier import FrontierLaw, KaplanLaw
from trainwright.compiler.laws.law import Law
from trainwright.compiler.laws.repeated import RepeatedDataLaw

FORMS: Mapping[str, Callable[[LawFacts], Law]] = {
    "additive": AdditiveLaw,
    "repeated": RepeatedDataLaw,
    "experts": ExpertsLaw,
    "frontier": FrontierLaw,
    "kaplan": KaplanLaw,
}
EXPONENTS = (0.01, 10.0)  # of losses in text 0.05 to 0.6; far outside, sizes have no number
_TEXTS = ("name", "form", "source", "counts", "flops", "loss_unit")
_KEYS = (*_TEXTS, *FITTED, "constants", "draws")


def find_law(name: str) -> Law:
    """The law of that name. Raises UnknownNameError."""
    facts = find_law_facts(name)
    return FORMS[facts.form](facts)


def load_law_file(path: Path) -> Law:
    """The law in a file. Raises FileError (it cannot be read), SpecError (it is no law file: what is missing or wrong)."""
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise FileError(f"the law file {path} cannot be read: {reason}") from error
    except (YAMLError, ValueError) as error:
        raise SpecError(f"the law file {path} is no YAML: {str(error).splitlines()[0]}") from error
    problem = _problem(raw)
    if problem:
        raise SpecError(f"the law file {path}: {problem}; `trainwright fit RUNS.csv -o {path.name}` writes one")
    draws = {key: tuple(map(float, values)) for key, values in raw.get("draws", {}).items()}
    return AdditiveLaw(make_law_facts(raw["name"], raw, draws))


def _problem(raw: Any) -> str:
    """What is wrong with a law file; "" if nothing is."""
    if not isinstance(raw, dict):
        return "it holds no mapping of a law's name, form, constants and ranges"
    if unknown := [key for key in raw if key not in _KEYS]:
        return f"{unknown[0]} is no key of a law file"
    if missing := [key for key in (*_TEXTS, "constants") if key not in raw]:
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if wrong := [key for key in _TEXTS if not isinstance(raw[key], str)]:
        return f"{wrong[0]} is no text"
    if raw["form"] != "additive":
        return f"form {raw['form']} is not additive, the one form that runs are fitted to"
    if raw["counts"] not in COUNTS:
        return f"counts {raw['counts']} is none of {', '.join(COUNTS)}"
    return _number_problem(raw)


def _number_problem(raw: Mapping[str, Any]) -> str:
    constants, draws = raw["constants"], raw.get("draws", {})
    if not isinstance(constants, dict) or set(constants) != set(CONSTANTS):
        return f"constants must be {', '.join(CONSTANTS)}, each once"
    for name, value in constants.items():
        if not _is_number(value) or value <= 0:
            return f"constants.{name}: {value!r} is no number above 0"
    for name in ("alpha", "beta"):
        if not EXPONENTS[0] <= constants[name] <= EXPONENTS[1]:
            return f"constants.{name}: {constants[name]!r} is no exponent between {EXPONENTS[0]:g} and {EXPONENTS[1]:g}"
    for name in FITTED:
        given = raw.get(name, [0.0, 1.0])
        if not isinstance(given, list) or len(given) != 2 or not all(map(_is_number, given)) or given[0] > given[1]:
            return f"{name}: {given!r} is no range [lowest, highest]"
    if not isinstance(draws, dict) or (draws and set(draws) != set(CONSTANTS)):
        return f"draws must hold {', '.join(CONSTANTS)}, each a list"
    lists = list(draws.values())
    if any(
        not isinstance(column, list) or not all(_is_number(value) and value > 0 for value in column) for column in lists
    ):
        return "draws holds something that is no list of numbers above 0"
    if len({len(column) for column in lists}) > 1:
        return f"draws has columns of different lengths ({', '.join(str(len(column)) for column in lists)})"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
