"""What a stage's program imports and the installation may lack: found before the first stage starts, not hours later."""

import importlib.util
from collections.abc import Iterable

from trainwright.runtime.errors import MissingExtra
from trainwright.runtime.manifest import Stage

EXTRA_OF_PACKAGE = {"datatrove": "data", "rensa": "data", "lm_eval": "eval", "datasets": "eval"}
OTHER_EXTRA = "run"


def require_packages(stages: Iterable[Stage]) -> None:
    """Raises MissingExtra that lists the packages of all the stages that are not installed. Imports none of them."""
    absent: dict[str, list[str]] = {}
    for stage in stages:
        named = [*stage.packages, *(["torch"] if stage.launcher == "torchrun" else [])]
        for package in named:
            if importlib.util.find_spec(package.split(".")[0]) is None:
                absent.setdefault(package, []).append(stage.name)
    if absent:
        lines = [f"{package} (for {', '.join(dict.fromkeys(names))})" for package, names in absent.items()]
        raise MissingExtra(f"not installed: {'; '.join(lines)}; {_fix(absent)}")


def missing_package(stage: Stage, package: str) -> MissingExtra:
    """The error of a stage whose program found that `package` (a dotted name) is not installed."""
    return MissingExtra(f"{stage.name}: the package {package} is not installed; {_fix([package])}")


def _fix(packages: Iterable[str]) -> str:
    extras = sorted({EXTRA_OF_PACKAGE.get(package.split(".")[0], OTHER_EXTRA) for package in packages})
    return f"install what is missing with: pip install 'trainwright[{','.join(extras)}]'"
