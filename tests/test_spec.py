"""Units, the spec's places and overrides, the resolved form, the reference pages."""

import contextlib
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainwright.compiler.errors as compile_errors
import trainwright.runtime.errors as run_errors
from trainwright.compiler.contradictions import find_contradictions
from trainwright.compiler.errors import SpecError
from trainwright.compiler.load import load_spec
from trainwright.compiler.ranges import Choice, Range
from trainwright.compiler.resolve import resolve_spec
from trainwright.compiler.schema import spec_reference, spec_schema
from trainwright.compiler.units import (
    BUDGET_KINDS,
    KINDS,
    MULTIPLIERS,
    UnitError,
    format_quantity,
    parse_quantity,
)

ROOT = Path(__file__).resolve().parents[1]
SPEC = """\
name: x
model: {family: llama, size: 1.1M}
data:
  sources:
    - name: web
      path: corpus/*.jsonl
compute: {device: cpu, nodes: 1, devices_per_node: 2}
stages: {pretrain: {}}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("21 days", "time", 21 * 86400),
        ("14d", "time", 14 * 86400),
        ("90 minutes", "time", 5400),
        ("36h", "time", 36 * 3600),
        ("1 week", "time", 7 * 86400),
        ("$2M", "money", 2e6),
        ("$1_500", "money", 1500),
        ("6e23 FLOPs", "flops", 6e23),
        ("6e+23 flops", "flops", 6e23),
        ("500k device-hours", "device_hours", 5e5),
    ],
)
def test_the_unit_of_a_budget_says_what_it_is(text: str, kind: str, amount: float) -> None:
    quantity = parse_quantity(text, BUDGET_KINDS)
    assert (quantity.kind, quantity.amount) == (kind, amount)


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        ("1.4T tokens", "tokens", 1_400_000_000_000),
        ("2.9M", "tokens", 2_900_000),
        (2_900_000, "tokens", 2_900_000),
        ("4 M tokens", "tokens", 4_000_000),
        ("1 token", "tokens", 1),
        ("8B", "parameters", 8_000_000_000),
        ("1.1M params", "parameters", 1_100_000),
        ("512 sequences", "sequences", 512),
    ],
)
def test_counts(text: object, kind: str, count: int) -> None:
    assert parse_quantity(text, (kind,), bare=kind).count == count


def test_bytes_of_thousand_and_of_1024() -> None:
    assert parse_quantity("80 GB", ("bytes",)).amount == 80 * 10**9
    assert parse_quantity("80 GiB", ("bytes",)).amount == 80 * 2**30
    with pytest.raises(UnitError, match="'gb'"):
        parse_quantity("80 gb", ("bytes",))  # case tells bits from bytes elsewhere; one spelling


@pytest.mark.parametrize(
    "value", ["", "days", "3", 3, "3 dayz", "3 m tokens", "-1 day", "1,000 days", "1e999 days", True, None, [1]]
)
def test_what_is_no_budget_is_refused_with_examples(value: object) -> None:
    with pytest.raises(UnitError) as refusal:
        parse_quantity(value, BUDGET_KINDS)
    for kind in BUDGET_KINDS:
        assert KINDS[kind].example in str(refusal.value)


@given(
    number=st.decimals(min_value="0.001", max_value="9999", places=3),
    multiplier=st.sampled_from(sorted(MULTIPLIERS)),
    kind=st.sampled_from(["tokens", "sequences", "parameters", "steps"]),
)
def test_a_count_is_exact_or_refused(number: Decimal, multiplier: str, kind: str) -> None:
    exact = number * MULTIPLIERS[multiplier]
    text = f"{number}{multiplier} {kind}"
    if exact == exact.to_integral_value():
        assert parse_quantity(text, (kind,)).count == exact
    else:
        with pytest.raises(UnitError, match="only whole ones exist"):
            parse_quantity(text, (kind,))


@given(amount=st.floats(min_value=1, max_value=1e13), kind=st.sampled_from(sorted(KINDS)))
def test_what_is_shown_can_be_read_back(amount: float, kind: str) -> None:
    """Text for people has 4 significant digits: reading it back differs by half of the last one (a price has whole cents)."""
    amount = float(round(amount)) if KINDS[kind].counted else amount
    shown = format_quantity(kind, amount)
    back = parse_quantity(re.sub(" ms$", "e-3 s", shown), (kind,), bare=kind)
    assert back.kind == kind
    assert back.amount == pytest.approx(amount, rel=5e-3 if kind == "price" else 5.0001e-4)


@pytest.mark.parametrize(
    ("kind", "amount", "text"),
    [
        ("tokens", 1, "1 token"),
        ("tokens", 2, "2 tokens"),
        ("device_hours", 0.5, "0.5 device-hours"),
        ("parameters", 1, "1"),
        ("time", 3, "3 s"),
        ("time", 1e60, "1.157e+55 days"),
    ],
)
def test_what_is_shown(kind: str, amount: float, text: str) -> None:
    assert format_quantity(kind, amount) == text


def test_every_value_knows_its_line_and_every_override_its_option(spec: Path) -> None:
    loaded = load_spec(spec, ("data.sources[0].weight=0.5", "training.learning_rate=3e-4", "compute.nodes=2"))
    document = loaded.document
    assert document.place("data.sources[0].path") == f"{spec}:6"
    assert document.place("data.sources[0].weight") == "--set data.sources[0].weight=0.5"
    assert document.place("compute.device") == f"{spec}:7"
    assert document.place("layout.tensor") == f"{spec}:1"  # absent: nothing around it stands either
    assert loaded.spec.training.learning_rate == 3e-4
    assert loaded.spec.compute.nodes == 2


def test_pins_are_what_was_written_and_name_no_folder(spec: Path) -> None:
    resolved = resolve_spec(load_spec(spec, ("seed=3",)))
    assert resolved.pins == {
        "name": "spec.yaml:1",
        "model.family": "spec.yaml:2",
        "model.size": "spec.yaml:2",
        "data.sources[0].name": "spec.yaml:5",
        "data.sources[0].path": "spec.yaml:6",
        "compute.device": "spec.yaml:7",
        "compute.nodes": "spec.yaml:7",
        "compute.devices_per_node": "spec.yaml:7",
        "seed": "--set seed=3",
    }


def test_pinned_and_free_differ_in_the_size_of_the_set_only(spec: Path) -> None:
    free = resolve_spec(load_spec(spec))
    pinned = resolve_spec(
        load_spec(spec, ("layout={tensor: 2, micro_batch: 4, recompute: full}", "training.warmup=3%", "data.tokens=1B"))
    )
    assert (free.layout.tensor.values, pinned.layout.tensor) == ((1, 2), Choice((2,)))
    assert set(pinned.layout.recompute.values) < set(free.layout.recompute.values)
    assert set(pinned.layout.micro_batch.values) < set(free.layout.micro_batch.values)
    assert pinned.training.warmup == Range(0.03, 0.03)
    assert pinned.data.tokens == Range(1e9, 1e9)
    assert free.data.tokens.low < 1e9 < free.data.tokens.high
    assert not free.data.tokens.pinned
    assert pinned.data.tokens.clip(5) == 1e9
    assert free.training.schedule.pick("constant") == "constant"
    assert pinned.layout.recompute.pick("none") == "full"


def test_degrees_are_divisors_of_what_is_there(spec: Path) -> None:
    layout = resolve_spec(
        load_spec(spec, ("compute.device=h100", "compute.nodes=3", "compute.devices_per_node=6"))
    ).layout
    assert layout.tensor.values == (1, 2, 3, 6)
    assert layout.data.values == layout.pipeline.values == (1, 2, 3, 6, 9, 18)
    many = resolve_spec(load_spec(spec, ("compute.nodes=55440", "compute.devices_per_node=840"))).layout
    assert many.tensor.values[-1] == 840
    assert many.pipeline.values[-1] == 1008, "a pipeline has 1024 stages at most, as where it is pinned"
    assert many.data.values[-1] == 55440 * 840


def test_units_of_the_resolved_form_are_si(spec: Path) -> None:
    resolved = resolve_spec(load_spec(spec, ("compute.budget=2 days", "cluster.price=$1.5/device-hour")))
    assert (resolved.compute.budget.kind, resolved.compute.budget.amount) == ("time", 172800.0)
    assert resolved.compute.price_usd_per_device_hour == 1.5
    assert resolve_spec(load_spec(spec)).compute.budget.kind == "none"


@pytest.mark.parametrize("name", ["tiny", "one_node", "many_nodes"])
def test_presets_contradict_nothing(name: str) -> None:
    assert find_contradictions(load_spec(ROOT / "specs" / f"{name}.yaml").spec) == []


@pytest.mark.parametrize("name", ["one_node", "many_nodes"])
@pytest.mark.parametrize("one_of", ["size", "shape"])
def test_the_open_keys_of_presets_are_right_as_they_stand(name: str, one_of: str, tmp_path: Path) -> None:
    """Without their `#`, all of them are accepted; size and shape answer the same question."""
    text = (ROOT / "specs" / f"{name}.yaml").read_text(encoding="utf-8")
    opened = re.sub(rf"^(\s*)# (?!\s*{one_of})(\s*[a-z_]+:(?: .*)?)$", r"\1\2", text, flags=re.MULTILINE)
    (tmp_path / "spec.yaml").write_text(opened, encoding="utf-8")
    written = resolve_spec(load_spec(tmp_path / "spec.yaml")).pins
    assert len(written) >= len(resolve_spec(load_spec(ROOT / "specs" / f"{name}.yaml")).pins) + 7
    assert {"seed", "training.warmup", "layout.recompute", "data.validation"} <= written.keys()


@given(text=st.text(max_size=60))
def test_any_text_is_a_spec_or_one_message(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(compile_errors.CompileError):
        load_spec(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=4,
)


@given(key=st.sampled_from(re.findall(r"^\| `([^`]+)`", spec_reference(), flags=re.MULTILINE)), value=VALUES)
def test_any_value_at_any_key_is_accepted_or_one_message(
    key: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "whole.yaml"
    path.write_text(SPEC, encoding="utf-8")
    option = key.replace("[]", "[0]").replace("<name>", "pretrain") + "=" + json.dumps(value)
    with contextlib.suppress(compile_errors.CompileError):
        resolve_spec(load_spec(path, (option,)))


def test_deep_nesting_is_refused(spec: Path) -> None:
    spec.write_text("a: " + "[" * 2_000, encoding="utf-8")
    with pytest.raises(SpecError):
        load_spec(spec)


def test_the_schema_describes_every_field() -> None:
    schema = spec_schema()
    for name, model in (("Spec", schema), *schema["$defs"].items()):
        assert model["additionalProperties"] is False
        assert [key for key, field in model["properties"].items() if not field.get("description")] == [], name
    assert '"null"' not in json.dumps(schema), "absent is written by leaving the key out"


def test_the_reference_of_the_spec_is_up_to_date() -> None:
    assert (ROOT / "docs" / "reference" / "spec.md").read_text(encoding="utf-8") == spec_reference()


def test_the_reference_of_exit_codes_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    listed = {(name, int(code)) for code, name in re.findall(r"^\| (\d+) \| `(\w+)`", page, flags=re.MULTILINE)}
    classes = {
        (name, error.exit_code)
        for module in (compile_errors, run_errors)
        for name, error in vars(module).items()
        if isinstance(error, type) and error.exit_code != 1
    }
    assert listed == classes
    assert len({code for _, code in classes}) == len(classes), "an exit code means one thing"
