"""Parameters counted without their memory: of emitted programs of published models, and of small ones as they are trained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from test_emitted_configs import run_to_the_verb
from test_families import PUBLISHED, make_plan, write_spec
from world_support import FAMILIES, Case, build, literals, model, parallel, run_world

from trainwright.compiler.emit import emit_bundle
from trainwright.runtime.megatron.count import count_whole

# Megatron-Core, of its own defaults.
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")
SLOW = ("deepseek-v2", "kimi-k2", "qwen3-235b-a22b")  # 3 to 6 s each: tens of thousands of modules


def check_published(reference: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, slow: bool) -> None:
    """The models of emitted programs, with the published vocabulary, have the published parameters."""
    entries = YAML(typ="safe").load(reference / "models.yaml")
    programs: dict[str, dict[str, Any]] = {}
    for name, (family, size) in PUBLISHED.items():
        if (name in SLOW) is slow:
            plan = make_plan(write_spec(folder, family, size))
            programs[name] = run_to_the_verb(emit_bundle(plan).files["05_pretrain.py"].decode(), monkeypatch)

    def count() -> dict[str, int]:
        counted = {}
        for name, handed in programs.items():
            vocabulary = handed["embedding"].vocab_size
            unpadded = replace(handed["embedding"], padded_vocab_size=vocabulary)
            counted[name] = count_whole(handed["model"], unpadded)
        return counted

    assert run_world(1, count)[0] == {name: entries[name]["parameters"] for name in programs}


def test_published_models_have_the_parameters_of_their_checkpoints(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_published(reference, tmp_path, monkeypatch, slow=False)


@pytest.mark.full
def test_large_published_models_have_the_parameters_of_their_checkpoints(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 15 s."""
    check_published(reference, tmp_path, monkeypatch, slow=True)


def test_a_layout_does_not_change_the_count_and_it_is_that_of_the_trained_model() -> None:
    def count() -> list[tuple[str, int, int, int]]:
        found = []
        for family in FAMILIES:
            whole = model.count_parameters(build(Case(family=family)))
            experts = {"data": 2, "expert": 2} if "num_moe_experts" in FAMILIES[family] else {}
            cut = Case(family=family, tensor=2, pipeline=2, **experts)
            counted = [count_whole(*_program(case)) for case in (Case(family=family), cut)]
            found.append((family, whole, *counted))
            parallel.stop()
        return found

    for family, whole, *counted in run_world(1, count)[0]:
        assert counted == [whole, whole], family


def _program(case: Case) -> tuple[Any, model.Embedding]:
    written, embedding = literals(case)
    return written.model, embedding
