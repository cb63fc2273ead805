"""The formulas: one row or many give the same numbers, parts add up, and hand calculations from the papers hold."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.compiler.errors import UnknownNameError
from trainwright.compiler.estimate.cost import Rates, estimate_cost, estimate_mfu
from trainwright.compiler.estimate.flops import executed_flops_per_token, model_flops_per_token
from trainwright.compiler.estimate.layouts import RECOMPUTE, Layouts, Workload, one_layout
from trainwright.compiler.estimate.memory import (
    estimate_memory,
    layer_activation_bytes_per_token,
    micro_batches_in_flight,
)
from trainwright.compiler.estimate.params import count_parameters, device_parameters, layer_parameters
from trainwright.compiler.estimate.placement import num_mixtures
from trainwright.compiler.estimate.step_time import estimate_step_time
from trainwright.compiler.facts import find_device, find_family, load_devices, load_families
from trainwright.compiler.plan import Layout

SHAPES = {
    f"{family.name} {size}": shape for family in load_families().values() for size, shape in family.published.items()
}


def _workload(model: str = "llama 8B", device: str = "h100", precision: str = "bf16", **changes: object) -> Workload:
    base = Workload(
        shape=SHAPES[model],
        context_length=4096,
        precision=precision,
        device=find_device(device),
        devices_per_node=8,
        nodes=32,
        fused_activation=True,
        overlap=True,
    )
    return replace(base, **changes)


FIRST = np.array([0])


def _layout(**changes: object) -> Layout:
    base = Layout(
        tensor=1,
        pipeline=1,
        virtual_pipeline=1,
        context=1,
        expert=1,
        data=1,
        micro_batch=1,
        micro_batches=1,
        sequence_parallel=False,
        distributed_optimizer=False,
        recompute="none",
        padded_vocab_size=128256,
    )
    return replace(base, **changes)


def _powers(most: int) -> st.SearchStrategy[int]:
    return st.integers(0, most.bit_length() - 1).map(lambda power: 1 << power)


LAYOUTS = st.builds(
    Layout,
    tensor=_powers(8),
    pipeline=_powers(16),
    virtual_pipeline=_powers(4),
    context=_powers(4),
    expert=_powers(8),
    data=_powers(64),
    micro_batch=_powers(8),
    micro_batches=_powers(128),
    sequence_parallel=st.booleans(),
    distributed_optimizer=st.booleans(),
    recompute=st.sampled_from(RECOMPUTE),
    padded_vocab_size=st.integers(1, 2000).map(lambda tiles: 128 * tiles),
)


def _table(rows: list[Layout]) -> Layouts:
    ones = [one_layout(row) for row in rows]
    columns = {field.name: np.concatenate([getattr(one, field.name) for one in ones]) for field in fields(Layouts)}
    return Layouts(**columns)


def _all_estimates(workload: Workload, table: Layouts) -> dict[str, np.ndarray]:
    memory, time = estimate_memory(workload, table), estimate_step_time(workload, table)
    columns = {f"memory.{field.name}": getattr(memory, field.name) for field in fields(memory)}
    columns |= {f"time.{field.name}": getattr(time, field.name) for field in fields(time)}
    return columns | {"flops": executed_flops_per_token(workload, table)}


@given(
    rows=st.lists(LAYOUTS, min_size=1, max_size=20),
    model=st.sampled_from(sorted(SHAPES)),
    device=st.sampled_from(sorted(load_devices())),
    precision=st.sampled_from(["bf16", "fp32"]),
    overlap=st.booleans(),
)
def test_a_row_of_a_batch_is_the_batch_of_that_row(
    rows: list[Layout], model: str, device: str, precision: str, overlap: bool
) -> None:
    workload = _workload(model, device, precision, overlap=overlap)
    together = _all_estimates(workload, _table(rows))
    for index, row in enumerate(rows):
        alone = _all_estimates(workload, one_layout(row))
        for name, column in together.items():
            assert column.shape == (len(rows),), name
            assert column[index] == alone[name][0], name
            assert np.isfinite(column[index]), name
            assert column[index] >= 0, name


@given(row=LAYOUTS)
def test_a_layout_survives_the_table(row: Layout) -> None:
    assert _table([row, row]).row(1) == row


@pytest.mark.parametrize("model", sorted(SHAPES))
def test_parameters_of_all_devices_are_the_model(model: str) -> None:
    shape = SHAPES[model]
    exact = count_parameters(shape, 2048)
    alone = one_layout(_layout(padded_vocab_size=shape.vocab_size))
    assert device_parameters(shape, 2048, alone, FIRST).total[0] == exact
    # Two tensor ranks hold everything once and the replicated part twice.
    mixtures = num_mixtures(shape)
    dense, mixture = (layer_parameters(shape, mixture=mixture) for mixture in (False, True))
    replicated = (shape.num_layers - mixtures) * (dense.replicated + dense.down)
    replicated += mixtures * (mixture.replicated + mixture.down + mixture.expert)
    replicated += shape.hidden_size * (2 if shape.normalization == "LayerNorm" else 1)
    replicated += 2048 * shape.hidden_size * (shape.positions == "learned")
    pair = one_layout(_layout(tensor=2, padded_vocab_size=shape.vocab_size + shape.vocab_size % 2))
    padding = (shape.vocab_size % 2) * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    assert 2 * device_parameters(shape, 2048, pair, FIRST).total[0] == exact + replicated + padding
    # Megatron-Core's own layers split the projections down.
    split = shape.num_layers * dense.down
    local = device_parameters(shape, 2048, pair, FIRST, local_layers=True).total[0]
    assert 2 * local == exact + replicated + padding - split
    # Two pipeline ranks: a tied output layer is a second copy of the embedding.
    stages = one_layout(_layout(pipeline=2, padded_vocab_size=shape.vocab_size))
    both = sum(device_parameters(shape, 2048, stages, np.array([rank])).total[0] for rank in (0, 1))
    assert both == exact + shape.tied_embeddings * shape.vocab_size * shape.hidden_size


def test_weights_and_optimizer_take_the_bytes_of_zero_1() -> None:
    parameters = count_parameters(SHAPES["llama 8B"], 4096)
    memory = estimate_memory(_workload(), _table([_layout(), _layout(data=8, distributed_optimizer=True)]))
    assert memory.parameters.tolist() == [2 * parameters] * 2
    assert memory.gradients.tolist() == [4 * parameters] * 2
    assert memory.optimizer == pytest.approx([12 * parameters, 12 * parameters / 8])
    exact = estimate_memory(_workload(precision="fp32"), one_layout(_layout()))
    assert (exact.parameters + exact.gradients + exact.optimizer)[0] == 16 * parameters


def test_activations_are_korthikantis_without_scores_and_dropout() -> None:
    """Equation 1: 34 s b h + 5 a s^2 b; 2 of the 34 are dropout masks, and flash attention keeps 4 bytes a row and head."""
    shape = SHAPES["gpt3 175B"]
    table = _table([_layout(), _layout(tensor=8), _layout(tensor=8, sequence_parallel=True)])
    hidden, rows = shape.hidden_size, 4 * shape.num_attention_heads
    kept = layer_activation_bytes_per_token(shape, 2, True, table, mixture=False)
    # Equation 2: of the 32 h, 8 h are not split by tensor parallelism; with sequence parallelism all are.
    assert kept == pytest.approx([32 * hidden + rows, 8 * hidden + (24 * hidden + rows) / 8, (32 * hidden + rows) / 8])


def test_micro_batches_in_flight_follow_1f1b() -> None:
    table = _table(
        [
            _layout(pipeline=4, micro_batches=32),
            _layout(pipeline=4, micro_batches=2),
            _layout(pipeline=4, micro_batches=32, virtual_pipeline=2),
        ]
    )
    # Interleaved, first rank: p (1 + (p - 1) / (p v)) of its layers (Korthikanti et al. 2022, section 4.2.3).
    assert micro_batches_in_flight(table, 0 * table.pipeline) == pytest.approx([4, 2, 4 * (1 + 3 / 8)])
    assert micro_batches_in_flight(table, table.pipeline - 1) == pytest.approx([1, 1, 2.5])


def test_full_recompute_repeats_the_layers_and_keeps_their_inputs() -> None:
    workload = _workload()
    modules = {"selective": ("core_attn",)}
    table = _table([_layout(recompute=mode, recompute_modules=modules.get(mode, ())) for mode in RECOMPUTE])
    flops = executed_flops_per_token(workload, table)
    model = model_flops_per_token(workload.shape, 4096)
    head = 6 * workload.shape.hidden_size * workload.shape.vocab_size
    core = 2 * 4096 * 4096 * workload.shape.num_layers
    assert flops == pytest.approx([model, model + core, head + (model - head) * 4 / 3])
    memory = estimate_memory(workload, table)
    assert memory.activations[2] < memory.activations[0] / 10
    assert memory.activations[1] <= memory.activations[0]


@given(row=LAYOUTS, model=st.sampled_from(sorted(SHAPES)))
def test_more_in_a_micro_batch_takes_more_memory_and_more_time(row: Layout, model: str) -> None:
    workload = _workload(model, overlap=False)  # overlapped communication can hide behind the longer micro-batch
    table = _table([row, replace(row, micro_batch=2 * row.micro_batch)])
    assert np.diff(estimate_memory(workload, table).total)[0] > 0
    assert np.diff(estimate_step_time(workload, table).total)[0] > 0


def test_the_bubble_is_the_share_that_narayanan_gives() -> None:
    """Of equal pipeline ranks: (p - 1) / (v m) of the rest. A vocabulary of 128 leaves the last rank no head to speak of."""
    workload = _workload("gpt3 175B", shape=replace(SHAPES["gpt3 175B"], vocab_size=128))
    rows = [_layout(pipeline=8, micro_batches=24, virtual_pipeline=chunks, padded_vocab_size=128) for chunks in (1, 2)]
    time = estimate_step_time(workload, _table(rows))
    assert time.bubble / time.compute == pytest.approx([7 / 24, 7 / 48], rel=1e-3)


def test_collectives_move_the_bytes_of_a_ring() -> None:
    shape = SHAPES["llama 8B"]
    workload = _workload(overlap=False)
    rows = [_layout(tensor=8), _layout(data=8, distributed_optimizer=True), _layout(data=8), _layout(data=256)]
    time = estimate_step_time(workload, _table(rows))
    link = 450e9 * 0.75
    # Per layer two all-reduces forward and two backward, one more for the head; each 2 (t - 1) / t of the buffer.
    assert time.tensor[0] == pytest.approx((4 * 32 + 1) * 2 * 7 / 8 * 4096 * 4096 * 2 / link)
    parameters = count_parameters(shape, 4096)
    assert time.data[1] == pytest.approx(7 / 8 * parameters * (4 + 2) / link)  # fp32 gradients, bf16 weights
    assert time.data[2] == pytest.approx(2 * 7 / 8 * parameters * 4 / link)
    # Eight ranks of the group in a node share its eight network cards of 50 GB/s.
    assert time.data[3] == pytest.approx(2 * 255 / 256 * parameters * 4 / (8 * 50e9 * 0.75))


def test_fullest_rank_is_the_first_or_the_last() -> None:
    """Many micro-batches in flight fill the first rank; a large vocabulary and one micro-batch the last."""
    many = estimate_memory(_workload(), one_layout(_layout(pipeline=8, micro_batches=64)))
    few = estimate_memory(_workload(), one_layout(_layout(pipeline=8, micro_batches=1)))
    assert many.logits[0] == 0
    assert few.logits[0] == 4096 * 128256 * 6


def test_cost_and_utilisation() -> None:
    cost = estimate_cost(3600.0, 8, Rates(2.5, power_w=500.0, pue=1.5, carbon_kg_per_kwh=0.5))
    assert (cost.duration_s, cost.device_hours, cost.cost_usd) == (3600.0, 8.0, 20.0)
    assert (cost.energy_kwh, cost.co2_kg) == (6.0, 3.0)
    assert estimate_mfu(4e15, 2.0, 4, 1e15) == 0.5


def test_every_fact_has_a_source_and_links_rank_as_they_should() -> None:
    for device in load_devices().values():
        assert all(device.sources.values())
        assert set(device.peak_flops_per_s) == {"bf16", "fp32"}
        assert 0 < device.efficiency < 1
        assert 1 <= device.power_w <= 2000
        assert device.memory_bytes > 8 * 2**30
        if device.kind == "cuda":
            assert device.inter_node_bytes_per_s < device.intra_node_bytes_per_s < device.memory_bandwidth_bytes_per_s


def test_names_are_found_by_alias_and_suggested_when_unknown() -> None:
    assert find_device("H100") is find_device("h100-sxm-80gb")
    with pytest.raises(
        UnknownNameError, match=r"no device is called 'h1000': did you mean h100 or .*known: a100-sxm-80gb"
    ):
        find_device("h1000")
    with pytest.raises(UnknownNameError, match=r"no model family is called 'lama': did you mean llama"):
        find_family("lama")
