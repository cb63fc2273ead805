"""tests/cases/*.yaml: a spec and what comes of it, through the command line. One file, one case.

about: one sentence
spec: the text of spec.yaml
set: [path=value, ...]                      optional
expect: {plan: {leaf: value}}               or
expect: {error: [fragments], exit: n}       each fragment stands in what is printed on stderr, in this order
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from trainwright.compiler.cli import main
from trainwright.compiler.plan import leaves, read_plan

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))


def read_case(path: Path) -> dict[str, Any]:
    case: dict[str, Any] = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    assert case.keys() <= {"about", "spec", "set", "expect"}
    return case


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    case = read_case(path)
    (tmp_path / "spec.yaml").write_text(case["spec"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    overrides = [argument for override in case.get("set", ()) for argument in ("--set", override)]
    monkeypatch.setattr(sys, "argv", ["trainwright", "plan", "spec.yaml", "--json", *overrides])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capfd.readouterr()
    expected = case["expect"]
    if "error" in expected:
        assert (stopped.value.code, out) == (expected["exit"], ""), err
        assert err.startswith("error: ")
        assert "Traceback" not in err
        rest = err
        for fragment in expected["error"]:
            assert fragment in rest, f"{fragment!r} does not stand in (the rest of):\n{err}"
            rest = rest[rest.index(fragment) + len(fragment) :]
    else:
        assert stopped.value.code in (0, None), err
        plan = read_plan(out)
        held = dict(leaves(plan)) | {"overrides": plan.overrides}
        wanted = {leaf: tuple(value) if isinstance(value, list) else value for leaf, value in expected["plan"].items()}
        assert {leaf: held.get(leaf) for leaf in wanted} == wanted


def test_what_the_user_wrote_is_pinned_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every training and layout pin reaches a leaf whose reason says that it is pinned, and at which line."""
    for case, part, names in (
        ("every_pin_of_training", "training", {"warmup": "warmup_steps", "decay": "decay_steps"}),
        ("every_pin_of_layout", "layout", {}),
    ):
        spec = read_case(Path(__file__).parent / "cases" / f"{case}.yaml")["spec"]
        (tmp_path / "spec.yaml").write_text(spec, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["trainwright", "plan", "spec.yaml", "--json"])
        with pytest.raises(SystemExit):
            main()
        reasons = json.loads(capfd.readouterr().out)["reasons"]
        written = YAML(typ="safe", pure=True).load(spec)[part]
        for key in written:
            leaf = "kernels.layer_spec" if key == "layer_spec" else f"{part}.{names.get(key, key)}"
            assert reasons[leaf]["kind"] == "pinned", leaf
            assert "spec.yaml:" in reasons[leaf]["text"], leaf
