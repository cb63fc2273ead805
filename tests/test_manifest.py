"""Reading a manifest: the inverse of writing one, tolerant of additions, with the field's name where something is wrong."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainwright.runtime.manifest import ManifestError, read_manifest, read_record, write_manifest


@pytest.fixture
def raw(repository: Path) -> dict[str, Any]:
    """A manifest that compile wrote, parsed."""
    parsed: dict[str, Any] = json.loads((repository / "tests/golden/many_nodes/manifest.json").read_text())
    return parsed


def test_reading_undoes_writing(raw: dict[str, Any]) -> None:
    manifest = read_manifest(json.dumps(raw))
    assert json.loads(write_manifest(manifest)) == raw
    assert read_manifest(write_manifest(manifest)) == manifest


def test_unknown_keys_are_dropped(raw: dict[str, Any]) -> None:
    del raw["seal"]  # whoever writes more seals more
    expected = read_manifest(json.dumps(raw))
    raw["added"] = 1
    for stage in raw["stages"]:
        stage["added"] = {"later": [1]}
    assert read_manifest(json.dumps(raw)) == expected


@dataclass(frozen=True)
class Part:
    size: int
    share: float | None = None
    added: str = "absent"


def test_a_field_with_a_default_may_be_absent() -> None:
    assert read_record(Part, {"size": 1}) == Part(1)
    assert read_record(Part, {"size": 1, "share": 2, "added": "x"}) == Part(1, 2, "x")
    assert read_record(Part, {"size": 1, "share": None}) == Part(1)
    with pytest.raises(ManifestError, match=r"^size is missing$"):
        read_record(Part, {"share": 1.5})


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(data_root=7), "data_root should be a text, not 7"),
        (lambda raw: raw.update(files=[]), "files should be an object, not []"),
        (lambda raw: raw["files"].update(x=1), "files.x should be a text, not 1"),
        (lambda raw: raw.update(stages={}), "stages should be a list, not {}"),
        (lambda raw: raw.update(stages=["x"]), 'stages[0] should be an object, not "x"'),
        (lambda raw: raw.update(schema_version=True), "schema_version should be a whole number, not true"),
        (lambda raw: raw.update(schema_version=1.0), "schema_version should be a whole number, not 1.0"),
        (lambda raw: raw.pop("run_id"), "run_id is missing"),
        (lambda raw: raw["stages"][1].update(inputs=5), "stages[1].inputs should be a list, not 5"),
        (lambda raw: raw["stages"][1].update(inputs=[None]), "stages[1].inputs[0] should be a text, not null"),
        (lambda raw: raw["stages"][1].update(nodes="x"), 'stages[1].nodes should be a whole number, not "x"'),
        (lambda raw: raw["stages"][1].update(nodes=True), "stages[1].nodes should be a whole number, not true"),
        (lambda raw: raw["stages"][1].update(implied=0), "stages[1].implied should be true or false, not 0"),
        (lambda raw: raw["stages"][1].pop("program"), "stages[1].program is missing"),
        (lambda raw: raw.update(name=["x" * 99]), 'name should be a text, not ["' + "x" * 38 + "..."),
    ],
)
def test_a_value_of_another_type_is_named(raw: dict[str, Any], change: Change, message: str) -> None:
    change(raw)
    with pytest.raises(ManifestError) as caught:
        read_manifest(json.dumps(raw))
    assert str(caught.value) == f"it is damaged ({message})"


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"schema_version"', "{}", "[" * 100_000])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ManifestError, match="it is not a manifest"):
        read_manifest(text)


def test_no_number_of_state_is_beyond_calculation() -> None:
    for text in ("NaN", "Infinity", "1e999", "1" + "0" * 400):
        with pytest.raises(ManifestError, match="share should be a number"):
            read_record(Part, json.loads(f'{{"size": 1, "share": {text}}}'))
