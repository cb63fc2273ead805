"""A fit as a law file: what a spec names under `scaling.law`, one YAML mapping like an entry of data/scaling_laws.yaml."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from trainwright.compiler.errors import FileError
from trainwright.compiler.fit.approach3 import DELTA
from trainwright.compiler.fit.optimum import FORM
from trainwright.compiler.fit.result import CONSTANTS, Fit

MOST_DRAWS = 400
DIGITS = 9  # significant
FIRST_LINE = "# Written by `trainwright fit`; a spec names it under scaling.law."


def law_of(fit: Fit, name: str, counts: str) -> dict[str, Any]:
    """The law file's content. `counts`: what the table's column params holds (facts.COUNTS); C = 6 N D; ranges are the runs'."""
    runs = fit.runs
    name_of_runs, version = Path(runs.file).name, metadata.version("trainwright")
    falling = (fit.draws[:, 3:] > 0).all(axis=1)  # the few others have no optimum
    draws = fit.problem.constants(fit.draws[falling][:MOST_DRAWS])
    return {
        "name": name,
        "form": FORM["form"],
        "source": f"{len(runs)} runs of {name_of_runs}, fitted by trainwright {version}: approach 3 of Hoffmann et al. 2022 "
        f"(arXiv 2203.15556), the global optimum of the sum of Huber losses of ln L, threshold {DELTA:g}",
        "counts": counts,
        "flops": FORM["flops"],
        "loss_unit": f"that of {name_of_runs}, its corpus and tokenizer: no loss of another compares",
        "constants": {key: _rounded(fit.constants[key]) for key in CONSTANTS},
        "fitted_parameters": _range(runs.params),
        "fitted_tokens": _range(runs.tokens),
        "fitted_flops": _range(runs.model_flops),
        "fitted_tokens_per_parameter": _range(runs.tokens / runs.params),
        "draws": {key: [_rounded(value) for value in draws[key]] for key in CONSTANTS},
    }


def write_law(law: Mapping[str, Any], path: Path) -> None:
    """Write the law file, whole or not at all. Raises FileError."""
    lines = [FIRST_LINE]
    for key, value in law.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {_yaml(item)}" for name, item in value.items())]
        else:
            lines.append(f"{key}: {_yaml(value)}")
    write_whole(path, ("\n".join(lines) + "\n").encode())


def require_replaceable(path: Path) -> None:
    """Raises FileError where something stands at `path` that `trainwright fit` has not written."""
    try:
        if path.is_dir():
            raise FileError(f"{path}: is a folder; name a file with -o")
        if path.exists() and not path.read_bytes().startswith(FIRST_LINE.encode()):
            raise FileError(
                f"{path}: exists, and is no law file that `trainwright fit` wrote; name another file with -o"
            )
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """A file that appears with all its content, or not at all. Raises FileError."""
    fresh = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            fresh = file.name
            file.write(content)
        Path(fresh).chmod(0o666 & ~_umask())
        os.replace(fresh, path)
    except OSError as error:
        if fresh:
            with suppress(OSError):
                Path(fresh).unlink(missing_ok=True)
        raise FileError(f"{path}: cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _range(values: Any) -> list[float]:
    return [_rounded(values.min()), _rounded(values.max())]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _yaml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    # With a point before the exponent: YAML 1.1 reads 1e+18 as text.
    text = repr(value)
    return text if "e" not in text or "." in text else text.replace("e", ".0e")
