"""Spec in, plan out: what the tuning stages do by published recipes, how much they have to do, and which of it counts."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_tables import scaling_rows

from trainwright.compiler.check import check_plan
from trainwright.compiler.choose import choose_plan
from trainwright.compiler.choose.recipes import suggest_for_size
from trainwright.compiler.errors import CompileError, IllegalPlanError
from trainwright.compiler.facts import find_recipe
from trainwright.compiler.load import load_spec
from trainwright.compiler.plan import Plan, decided_leaves, leaves, read_plan, write_plan
from trainwright.compiler.resolve import resolve_spec

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")
SPEC = """\
name: five
model: {family: llama, size: 8B, context_length: 4096, precision: bf16}
data: {sources: [{name: web, path: web/*.jsonl}], tokens: 200B}
training: {learning_rate: 3e-4, global_batch: 1024 sequences}
compute: {device: h100-sxm-80gb, nodes: 16, devices_per_node: 8}
stages:
  pretrain: {}
  sft: {data: chat.jsonl}
  reward: {data: pairs.jsonl, from: sft}
  dpo: {data: pairs.jsonl, from: sft}
  ppo: {data: prompts.jsonl, from: sft}
  grpo: {data: sums.jsonl, from: dpo}
  evaluate: {from: ppo, compare: [sft, grpo]}
"""
KINDS = ("sft", "reward", "dpo", "ppo", "grpo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def plan_of(folder: Path, *overrides: str) -> Plan:
    return choose_plan(resolve_spec(load_spec(folder / "spec.yaml", overrides)))


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([TRAINWRIGHT, *arguments], cwd=folder, env=environment, text=True, capture_output=True)


def run_ids(plan: Plan) -> dict[str, str]:
    return {kind: getattr(plan, kind)[0].run_id for kind in KINDS}


def test_five_kinds_are_planned_in_order_with_a_reason_for_each_value(folder: Path) -> None:
    plan = plan_of(folder)
    names = [stage.name for stage in plan.stages]
    assert names[names.index("pretrain") :] == ["pretrain", *KINDS, "evaluate"]
    needs = {stage.name: stage.needs for stage in plan.stages}
    assert needs["ppo"] == ("sft", "reward")
    assert needs["grpo"] == ("dpo",)
    assert needs["evaluate"] == ("ppo", "sft", "grpo", "tokenize")
    assert check_plan(plan) == []
    assert {path for path, _ in decided_leaves(plan)} == set(plan.reasons)
    assert read_plan(write_plan(plan)) == plan


# parameters -> peak rates of the recipes' own models: OLMo 2 1B, Tulu 3 8B and 70B; Llama 2 for reward models.
PUBLISHED = {
    "1B": {"sft": 3e-5, "reward": 1e-5, "dpo": 2.5e-6, "ppo": 3e-7, "grpo": 5e-7},
    "8B": {"sft": 5e-6, "reward": 1e-5, "dpo": 5e-7, "ppo": 3e-7, "grpo": 5e-7},
    "70B": {"sft": 2e-6, "reward": 5e-6, "dpo": 2e-7, "ppo": 1e-7},
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_rates_at_the_recipes_sizes_are_the_recipes(folder: Path, size: str) -> None:
    plan = plan_of(folder, f"model.size={size}")
    rates = {kind: getattr(plan, kind)[0].training.learning_rate for kind in PUBLISHED[size]}
    assert rates == PUBLISHED[size]
    recipe = {"1B": "OLMo 2 1B", "8B": "Tulu 3 8B", "70B": "Tulu 3 70B"}[size]
    assert plan.reasons["sft[0].training.learning_rate"].text == recipe


@pytest.mark.parametrize(("leaf", "value", "source"), [
    ("sft[0].training.epochs", 2, "Tulu 3"),
    ("sft[0].training.global_batch", 128, "Tulu 3"),
    ("sft[0].training.warmup", 0.03, "Tulu 3"),
    ("sft[0].training.weight_decay", 0.0, "Tulu 3"),
    ("sft[0].volume.examples", 939_343, "Tulu 3"),
    ("sft[0].volume.prompt_tokens", 536, "Llama 3, table 7"),
    ("reward[0].training.epochs", 1, "overfit"),
    ("reward[0].training.global_batch", 128, "InstructGPT: 64"),
    ("reward[0].training.min_learning_rate", 1e-6, "10 %"),
    ("reward[0].volume.examples", 1_418_091, "Llama 2, table 6"),
    ("dpo[0].training.epochs", 1, "Tulu 3"),
    ("dpo[0].training.warmup", 0.1, "Tulu 3"),
    ("dpo[0].beta", 0.1, "Llama 3"),
    ("dpo[0].volume.examples", 272_898, "Tulu 3 8B"),
    ("ppo[0].training.global_batch", 512, "InstructGPT and Llama 2"),
    ("ppo[0].minibatch", 128, "64 episodes"),
    ("ppo[0].prompts", 512, "InstructGPT"),
    ("ppo[0].inner_epochs", 1, "Llama 2"),
    ("ppo[0].kl", 0.01, "Llama 2 7B and 13B"),
    ("ppo[0].clip", 0.2, "Llama 2"),
    ("ppo[0].training.schedule", "constant", "Llama 2"),
    ("ppo[0].volume.examples", 31_144, "InstructGPT"),
    ("grpo[0].training.global_batch", 512, "DeepSeek-R1-Zero"),
    ("grpo[0].minibatch", 512, "one update"),
    ("grpo[0].prompts", 32, "16 answers"),
    ("grpo[0].volume.samples", 16, "prompts"),
    ("grpo[0].kl", 0.01, "Tulu 3.1 8B"),
    ("grpo[0].temperature", 1.0, "DeepSeek-R1"),
    ("grpo[0].max_answer_tokens", 2048, "Tulu 3.1"),
    ("grpo[0].reward", "verifier", "checks"),
])  # fmt: skip
def test_a_default_is_the_recipe_that_its_reason_names(folder: Path, leaf: str, value: object, source: str) -> None:
    """On 128 data-parallel devices: batches of 64 are rounded up to one row a device."""
    plan = plan_of(folder, "layout.tensor=1", "layout.pipeline=1")
    assert dict(leaves(plan))[leaf] == value
    assert source in plan.reasons[leaf].text


@settings(max_examples=200)
@given(kind=st.sampled_from(KINDS), size=st.floats(8.7, 12.3), step=st.floats(1e-6, 1e-3))
def test_rates_move_with_the_size_without_a_jump_and_stay_among_the_published(
    kind: str, size: float, step: float
) -> None:
    points = find_recipe(kind).by_size["learning_rate"]
    here, there = (suggest_for_size(points, 10 ** (size + by)).value for by in (0, step))
    values = [point.value for point in points]
    assert min(values) * (1 - 1e-9) <= here <= max(values) * (1 + 1e-9)
    # The steepest pair of points is apart by log10(8 / 1.25^2) decades in size, and a factor 6 in rate.
    assert there == pytest.approx(here, rel=10 * step)


def test_rates_between_two_sizes_are_interpolated_and_say_so(folder: Path) -> None:
    plan = plan_of(folder, "model.size=3B")
    assert 5e-6 < plan.sft[0].training.learning_rate < 3e-5
    assert "interpolated for" in plan.reasons["sft[0].training.learning_rate"].text


def test_small_models_are_tuned_at_a_share_of_their_pretraining_rate(folder: Path) -> None:
    plan = plan_of(folder, "model.size=100M", "training.learning_rate=1.5e-3")
    shares = {kind: getattr(plan, kind)[0].training.learning_rate / 1.5e-3 for kind in KINDS}
    assert shares == pytest.approx({"sft": 0.1, "reward": 1 / 30, "dpo": 0.01, "ppo": 0.005, "grpo": 0.01}, rel=1e-5)
    text = plan.reasons["sft[0].training.learning_rate"].text
    assert text.startswith("0.1 x training.learning_rate 0.0015; Llama 2")
    assert "from 500M on" in text


def test_volume_prices_a_stage_and_does_not_change_what_it_is(folder: Path) -> None:
    before = run_ids(plan_of(folder))
    for key in ("examples=1000", "prompt_tokens=100", "answer_tokens=50"):
        assert run_ids(plan_of(folder, *(f"stages.{kind}.{key}" for kind in KINDS))) == before
    assert len(set(before.values())) == len(KINDS)


@pytest.mark.parametrize(("override", "changed"), [
    ("stages.sft.epochs=3", set(KINDS)),
    ("stages.reward.epochs=2", {"reward", "ppo"}),
    ("stages.dpo.beta=0.2", {"dpo", "grpo"}),
    ("stages.ppo.epochs=2", {"ppo"}),
    ("stages.ppo.reward=verifier", {"ppo"}),
    ("stages.ppo.reward=../other/reward", {"ppo"}),
    ("stages.ppo.kl=0.02", {"ppo"}),
    ("stages.ppo.minibatch=128", {"ppo"}),
    ("stages.grpo.samples=8", {"grpo"}),
    ("stages.grpo.temperature=0.9", {"grpo"}),
    ("stages.grpo.max_answer_tokens=1000", {"grpo"}),
    ("stages.grpo.retries=3", set()),
    ("layout.micro_batch=1", set()),
])  # fmt: skip
def test_what_a_stage_learns_from_is_its_identity(folder: Path, override: str, changed: set[str]) -> None:
    pins = ("layout.tensor=1", "layout.pipeline=4", "layout.recompute=none")
    before, after = run_ids(plan_of(folder, *pins)), run_ids(plan_of(folder, *pins, override))
    assert {kind for kind in KINDS if before[kind] != after[kind]} == changed


@pytest.mark.parametrize("context", [16, 256, 700, 4096])
def test_assumed_lengths_fit_the_context(folder: Path, context: int) -> None:
    plan = plan_of(folder, f"model.context_length={context}")
    for kind in KINDS:
        volume = getattr(plan, kind)[0].volume
        assert min(volume.prompt_tokens, volume.answer_tokens) >= 1
        assert volume.prompt_tokens + volume.answer_tokens <= context
    assert plan.grpo[0].max_answer_tokens == min(2048, context // 2)
    assert plan.grpo[0].volume.answer_tokens <= plan.grpo[0].max_answer_tokens


@settings(max_examples=40, deadline=None)
@given(
    data=st.sampled_from([1, 2, 3, 6]),
    batch=st.sampled_from([None, *range(2, 40)]),
    samples=st.sampled_from([None, 2, 3, 8]),
    minibatch=st.sampled_from([None, 1, 2, 6, 12]),
)
def test_a_batch_of_episodes_is_whole_prompts_and_updates_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: int, batch: int | None, samples: int | None, minibatch: int | None
) -> None:
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "spec.yaml").write_text(SPEC)
    overrides = [
        *(
            "model.size=10M",
            "model.vocab_size=2000",
            "compute.nodes=1",
            f"compute.devices_per_node={data}",
            f"layout.data={data}",
        ),
        *("training.global_batch=24 sequences", "data.tokens=10M"),
        *([f"stages.grpo.global_batch={batch} sequences"] if batch else []),
        *([f"stages.grpo.samples={samples}"] if samples else []),
        *([f"stages.grpo.minibatch={minibatch}"] if minibatch else []),
    ]
    if batch and ((samples and batch % samples) or (minibatch and batch % minibatch)):
        return  # refused before: tests/cases
    try:
        plan = plan_of(folder, *overrides)
    except IllegalPlanError as error:
        assert "only whole ones exist; take" in str(error)  # noqa: PT017
        return
    (stage,) = plan.grpo
    assert check_plan(plan) == []
    assert stage.prompts * stage.volume.samples == stage.training.global_batch
    assert stage.volume.samples >= 2
    assert stage.training.global_batch % stage.minibatch == stage.minibatch % (stage.training.micro_batch * data) == 0
    assert batch in (None, stage.training.global_batch)
    assert samples in (None, stage.volume.samples)
    assert minibatch in (None, stage.minibatch)


@pytest.mark.parametrize(("batch", "samples"), [("48", 16), ("24", 12), ("97", 97), ("2", 2)])
def test_samples_are_as_many_as_divide_a_stated_batch(folder: Path, batch: str, samples: int) -> None:
    small = ("model.size=20M", "compute.nodes=1", "compute.devices_per_node=1", "data.tokens=10M")
    plan = plan_of(folder, *small, f"stages.grpo.global_batch={batch} sequences")
    assert (plan.grpo[0].volume.samples, plan.grpo[0].prompts) == (samples, int(batch) // samples)


def test_a_plan_of_broken_episodes_is_illegal(folder: Path) -> None:
    plan = plan_of(folder, "layout.tensor=1", "layout.pipeline=1")
    broken = replace(plan.grpo[0], prompts=31, minibatch=384)
    assert check_plan(replace(plan, grpo=(broken,))) == [
        "grpo: prompts 31 x samples 16 = 496 episodes, but global_batch is 512",
        "grpo: global_batch 512 / minibatch 384 = 1.333 updates: they must be whole",
    ]


VALUES = {
    "model.size": ("20M", "1B", "8B", "70B", "8x7B"),
    "model.context_length": ("16", "4096", "131072"),
    "compute.nodes": ("1", "3", "16", "512"),
    "layout.tensor": ("1", "2", "8"),
    "stages.ppo.global_batch": ("1 sequences", "7 sequences", "512 sequences", "4M tokens"),
    "stages.ppo.minibatch": ("1", "64", "1000000000"),
    "stages.ppo.reward": ("verifier", "reward", "sft", "ppo", "./scorer"),
    "stages.ppo.from": ("sft", "reward", "grpo", "./base"),
    "stages.reward.from": ("sft", "ppo", "evaluate", "./base"),
    "stages.reward.global_batch": ("1 sequences", "1 tokens", "4M tokens"),
    "stages.reward.min_learning_rate": ("0", "5"),
    "stages.grpo.samples": ("1", "2", "3", "4096"),
    "stages.grpo.global_batch": ("2 sequences", "97 sequences", "4096 sequences"),
    "stages.grpo.max_answer_tokens": ("1", "4095", "10000000"),
    "stages.grpo.answer_tokens": ("1", "2048", "10000000"),
    "stages.sft.prompt_tokens": ("1", "4095", "10000000"),
    "stages.sft.too_long": ("split", "drop"),
    "stages.dpo.examples": ("1", "1000000000000"),
    "stages.dpo.epochs": ("1", "1000"),
}
OVERRIDES = st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=5, unique=True).flatmap(
    lambda paths: st.tuples(*(st.sampled_from(VALUES[path]).map(f"{path}={{}}".format) for path in paths))
)


@settings(max_examples=150, deadline=None)
@given(overrides=OVERRIDES)
def test_any_settings_give_a_legal_plan_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, overrides: tuple[str, ...]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "spec.yaml").write_text(SPEC)
    try:
        plan = plan_of(folder, *overrides)
    except CompileError as error:
        assert str(error)  # noqa: PT017
        return
    assert check_plan(plan) == []
    assert read_plan(write_plan(plan)) == plan


def test_the_tiny_example_keeps_what_it_states_and_counts_what_its_connectors_make() -> None:
    plan = choose_plan(resolve_spec(load_spec(Path(__file__).resolve().parents[1] / "specs" / "tiny.yaml", ())))
    sft, dpo = plan.sft[0], plan.dpo[0]
    assert (sft.training.epochs, sft.training.global_batch, sft.training.learning_rate) == (3, 8, 1e-3)
    assert (dpo.training.epochs, dpo.training.global_batch, dpo.training.learning_rate) == (1, 4, 3e-4)
    assert (sft.training.warmup, dpo.training.warmup, sft.training.min_learning_rate) == (0.03, 0.1, 0.0)
    assert (sft.volume.examples, sft.volume.prompt_tokens, sft.volume.answer_tokens) == (4779, 48, 20)
    assert (dpo.volume.examples, dpo.volume.prompt_tokens, dpo.volume.answer_tokens) == (4779, 45, 17)
    assert plan.reasons["sft[0].volume.examples"].kind == "fact"
    assert "Python 3.11" in plan.reasons["sft[0].volume.examples"].text


def test_plan_and_explain_show_the_stages(folder: Path) -> None:
    shown = call(folder, "plan", "spec.yaml").stdout
    assert "512 prompts x 1 sample, scored by reward" in shown
    assert "32 prompts x 16 samples, scored by verifier" in shown
    assert "939,343 conversations of 846 tokens" in shown
    plan = json.loads(call(folder, "plan", "spec.yaml", "--json").stdout)
    assert plan["ppo"][0]["value_model"] is True
    explained = call(folder, "explain", "spec.yaml", "ppo").stdout
    assert "ppo[0].kl = 0.01" in explained
    assert "assumed, for no data is opened" in explained


def test_kinds_without_a_program_are_refused_at_once(folder: Path) -> None:
    done = call(folder, "compile", "spec.yaml", "-o", "bundle")
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
    assert not (folder / "bundle").exists()
    (line,) = [line for line in done.stderr.splitlines() if "program" in line]
    assert line.strip().startswith(
        "stages.reward (reward), stages.ppo (ppo), stages.grpo (grpo): the kinds reward, ppo and"
    )
    assert "leave them out of the spec, and let evaluate do without" in line


# Of data/recipes.yaml: (kind, parameters) -> the row of the table of recipes that its rate is from.
ROWS = {
    ("sft", 1e9): ("OLMo 2", "SFT", "1B"),
    ("sft", 8e9): ("Tulu 3", "SFT", "8B"),
    ("sft", 7e10): ("Tulu 3", "SFT", "70B"),
    ("reward", 7e10): ("Llama 2", "RM", "7-70B"),
    ("dpo", 1e9): ("OLMo 2", "DPO", "1B"),
    ("dpo", 8e9): ("Tulu 3", "DPO", "8B"),
    ("dpo", 7e10): ("Tulu 3", "DPO", "70B/405B"),
    ("ppo", 8e9): ("Tulu 3", "RLVR-PPO", "8B"),
    ("ppo", 7e10): ("Tulu 3", "RLVR-PPO", "70B"),
    ("grpo", 1e9): ("OLMo 2", "RLVR-GRPO", "1B"),
    ("grpo", 8e9): ("Tulu 3.1", "GRPO", "8B"),
    ("grpo", 6.71e11): ("DeepSeek-R1-Zero", "GRPO", "DeepSeek-V3 671B"),
}


def test_rates_stand_in_the_table_of_recipes(reference: Path) -> None:
    rows = scaling_rows(reference, "posttraining_recipes")
    table = {(row["recipe"], row["stage"], row["model"]): row["peak_lr"] for row in rows}
    facts = {(kind, point.parameters): point for kind in KINDS for point in find_recipe(kind).by_size["learning_rate"]}
    assert facts.keys() - ROWS.keys() == {("reward", 7e9), ("reward", 3.4e10)}, "the row's `others`"
    for place, row in ROWS.items():
        assert facts[place].source.startswith(row[0])
        assert facts[place].value in [float(number) for number in re.findall(r"\d+(?:\.\d+)?e-\d+", table[row])]
    assert "1e-5 (others)" in table["Llama 2", "RM", "7-70B"]
    assert facts["reward", 7e9].value == facts["reward", 3.4e10].value == 1e-5
