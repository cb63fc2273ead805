"""Decisions: shapes by the family, layouts by search. Sizes: test_questions.py; rates: test_hyperparameters.py."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trainwright.compiler.choose.layout import LayoutChoice, choose_layout, enumerate_layouts, pad_vocabulary
from trainwright.compiler.choose.shape import choose_shape, nominal_parameters, tiled_up_to
from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.estimate.layouts import RECOMPUTE, Workload
from trainwright.compiler.estimate.memory import estimate_memory
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.estimate.step_time import estimate_step_time
from trainwright.compiler.facts import (
    find_device,
    find_family,
    load_devices,
    load_families,
)
from trainwright.compiler.layout_rules import Terms, legal_rows
from trainwright.compiler.plan import Shape
from trainwright.compiler.ranges import Choice
from trainwright.compiler.resolve_layout import ResolvedLayout

# ---- shapes


@given(family=st.sampled_from(["llama", "llama2", "gpt3", "qwen3"]), exponent=st.floats(6.5, 11))
def test_a_chosen_shape_is_near_its_count_and_divisible(family: str, exponent: float) -> None:
    target = 10.0**exponent
    choice = choose_shape(find_family(family), target, 2048, 2048)
    shape = choice.shape
    assert choice.parameters == count_parameters(shape, 2048)
    assert abs(choice.error) < 0.1
    for tensor in (1, 2, 4, 8):
        if tensor <= tiled_up_to(shape.hidden_size):
            assert shape.ffn_hidden_size % (128 * tensor) == 0
            assert shape.hidden_size % (128 * tensor) == 0 or tensor == 1
    assert shape.num_attention_heads % shape.num_query_groups == 0
    assert shape.head_dim in (64, 128)
    assert {f"shape.{name}" for name in Shape.__dataclass_fields__} == set(choice.reasons)


@pytest.mark.parametrize("family", ["llama", "gpt3", "qwen3"])
def test_a_chosen_shape_has_the_proportions_of_its_family(family: str) -> None:
    rules = find_family(family).rules
    shape = choose_shape(find_family(family), 5e9, rules.vocab_size, 2048).shape
    assert (
        rules.ffn_ratio[0] <= shape.ffn_hidden_size / shape.hidden_size <= rules.ffn_ratio[2] + 128 / shape.hidden_size
    )
    assert 70 <= shape.hidden_size / shape.num_layers <= 170
    assert shape.head_dim == 128
    assert (shape.gated, shape.normalization, shape.qk_norm) == (rules.gated, rules.normalization, rules.qk_norm)


def test_the_shape_of_the_demo() -> None:
    choice = choose_shape(find_family("llama"), 1.1e6, 2048, 256)
    shape = choice.shape
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (4, 128, 384)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.head_dim) == (2, 2, 64)
    assert shape.tied_embeddings
    assert choice.parameters == 2048 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128
    assert choice.reasons["shape.num_layers"].kind == "search"


@pytest.mark.parametrize(
    ("family", "size"), [(family.name, size) for family in load_families().values() for size in family.published]
)
def test_a_published_size_is_the_published_shape(family: str, size: str) -> None:
    facts = find_family(family)
    published = facts.published[size]
    context = facts.rules.context_length
    exact = choose_shape(facts, count_parameters(published, context), published.vocab_size, context)
    assert exact.shape == published
    assert exact.error == 0
    assert exact.reasons["shape.num_layers"].kind == "fact"
    if nominal := nominal_parameters(size):  # "8x7B" names no count
        named = choose_shape(facts, nominal, 2048, context)
        assert named.shape == replace(published, vocab_size=2048)
        assert named.reasons["shape.vocab_size"].kind == "derived"


def test_a_size_below_the_vocabulary_alone_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="nearest has"):
        choose_shape(find_family("llama"), 1e5, 128256, 8192)


# ---- layouts


def _open(workload: Workload, **pins: tuple) -> ResolvedLayout:
    devices = [degree for degree in range(1, workload.devices + 1) if workload.devices % degree == 0]
    free = {
        "tensor": tuple(degree for degree in devices if workload.devices_per_node % degree == 0),
        "pipeline": tuple(devices),
        "data": tuple(devices),
        "micro_batch": (1, 2, 4, 8),
        "recompute": RECOMPUTE,
        "layer_spec": ("local",),
    }
    return ResolvedLayout(**{name: Choice(values) for name, values in (free | pins).items()})


def _workload(
    family: str = "llama", size: str = "8B", device: str = "h100", nodes: int = 4, **changes: object
) -> Workload:
    base = Workload(
        shape=find_family(family).published[size],
        context_length=4096,
        precision="bf16",
        device=find_device(device),
        devices_per_node=8,
        nodes=nodes,
        fused_activation=True,
        overlap=True,
    )
    return replace(base, **changes)


def _search(workload: Workload, global_batch: int = 256, **pins: tuple) -> LayoutChoice:
    return choose_layout(workload, global_batch, _open(workload, **pins))


@settings(max_examples=60)
@given(
    model=st.sampled_from([("llama", "8B"), ("llama", "70B"), ("llama2", "13B"), ("qwen3", "0.6B"), ("gpt3", "175B")]),
    device=st.sampled_from(sorted(load_devices())),
    nodes=st.sampled_from([1, 2, 3, 8, 16]),
    devices_per_node=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1, 4).map(lambda power: 3 * 4**power),
    context=st.sampled_from([256, 2048, 8192]),
    precision=st.sampled_from(["bf16", "fp32"]),
)
def test_the_chosen_layout_is_legal_fits_and_is_the_fastest(
    model: tuple[str, str], device: str, nodes: int, devices_per_node: int, batch: int, context: int, precision: str
) -> None:
    workload = _workload(
        *model, device, nodes, devices_per_node=devices_per_node, context_length=context, precision=precision
    )
    table_of = Terms(workload.shape, context, batch, nodes, devices_per_node)
    table = enumerate_layouts(table_of, _open(workload))
    legal = legal_rows(table_of, table)
    fits = legal & (estimate_memory(workload, table).total <= workload.device.memory_bytes)
    if not fits.any():
        with pytest.raises(InfeasibleError):
            _search(workload, batch)
        return
    choice = _search(workload, batch)
    best = choice.ranked.row(0)
    assert best.tensor * best.pipeline * best.context * best.data == nodes * devices_per_node
    assert best.micro_batch * best.micro_batches * best.data == batch
    assert legal_rows(table_of, choice.ranked).all()
    assert (estimate_memory(workload, choice.ranked).total <= workload.device.memory_bytes).all()
    step_s = estimate_step_time(workload, table).total[fits]
    assert choice.step_s == pytest.approx(step_s.min(), rel=2e-9)
    assert (choice.legal, choice.fitting) == (legal.sum(), fits.sum())
    assert (np.diff(estimate_step_time(workload, choice.ranked).total) >= -2e-9 * choice.step_s).all()
    assert len(choice.ranked) <= 6


def test_the_order_of_candidates_does_not_matter() -> None:
    workload = _workload()
    free = _open(workload)
    choices = {name: choice for name, choice in vars(free).items() if isinstance(choice, Choice)}
    backwards = replace(free, **{name: Choice(choice.values[::-1]) for name, choice in choices.items()})
    one, other = (choose_layout(workload, 256, candidates).ranked for candidates in (free, backwards))
    assert [one.row(index) for index in range(len(one))] == [other.row(index) for index in range(len(other))]


def test_ties_go_to_the_larger_micro_batch_and_less_recompute() -> None:
    """On one device without tensor or pipeline parallelism the step time of every micro-batch is the same."""
    workload = _workload("qwen3", "0.6B", nodes=1, devices_per_node=1)
    best = _search(workload, 8).ranked.row(0)
    assert (best.tensor, best.pipeline, best.data, best.micro_batch, best.recompute) == (1, 1, 1, 8, "none")


def test_recompute_buys_memory_when_nothing_else_does() -> None:
    workload = _workload("qwen3", "0.6B", nodes=1, devices_per_node=1, context_length=65536)
    assert _search(workload, 1).ranked.row(0).recompute == "full"


def test_pins_are_kept_and_counted() -> None:
    choice = _search(_workload(), tensor=(8,), micro_batch=(2,))
    assert all((choice.ranked.tensor == 8) & (choice.ranked.micro_batch == 2))
    assert f"of {choice.candidates:,} candidates {choice.legal:,} are legal" in choice.reasons["layout.tensor"].text
    assert {path.removeprefix("layout.") for path in choice.reasons} == set(choice.ranked.row(0).__dataclass_fields__)


def test_what_does_not_fit_says_by_how_much() -> None:
    with pytest.raises(InfeasibleError) as caught:
        _search(_workload("llama", "405B", nodes=1))
    text = str(caught.value)
    assert "no layout fits: the smallest of" in text
    assert "GiB of 79.1 GiB on a device" in text
    needed = float(text.split(" needs ")[1].split(" GiB")[0])
    over = float(text.split("on a device (")[1].split(" GiB too much")[0])
    assert needed - 79.1 == pytest.approx(over, abs=0.11)
    assert "num_layers 126 on 8 devices: 1, 2" in text


def test_what_is_illegal_names_the_nearest_candidates_violations() -> None:
    with pytest.raises(InfeasibleError) as caught:
        _search(_workload(), tensor=(3,))
    assert "no legal layout among" in str(caught.value)
    assert "num_attention_heads 32 / tensor 3 = 10.67 heads a device" in str(caught.value)


@given(vocab=st.integers(1, 10**6), tensor=st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_the_padded_vocabulary_divides(vocab: int, tensor: int) -> None:
    padded = int(pad_vocabulary(vocab, np.array([tensor]))[0])
    assert padded % tensor == 0
    assert padded % 128 == 0
    assert vocab <= padded < vocab + 128 * tensor
    assume(tensor in (1, 2, 4, 8))
    assert padded == int(pad_vocabulary(vocab, np.array([1]))[0])  # a checkpoint moves between these degrees


def test_faster_links_and_larger_devices_never_make_the_step_slower() -> None:
    for (small, large), nodes in itertools.product([("h100", "h200"), ("a100", "h100"), ("h200", "b200")], (1, 8)):
        slow, fast = (_search(_workload(device=device, nodes=nodes)).step_s for device in (small, large))
        assert fast <= slow
