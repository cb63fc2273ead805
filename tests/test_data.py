"""What training and evaluation read from token files: the same sequences in every layout, every held-out token once."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainwright.compiler.ramp import trained_tokens
from trainwright.runtime.errors import DataError, Unsupported
from trainwright.runtime.megatron.batches import Batches, Ramp

# What importing megatron-core and torch says.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Transformer Engine and Apex are not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron"),
]

LENGTH = 16  # tokens a sequence
STEPS, GLOBAL_BATCH = 12, 8
DOCUMENTS = {"code": 60, "prose": 25, "few": 2}  # a token is unique in the corpus, so it names its place
KEYS = {"tokens", "labels", "loss_mask", "position_ids"}


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one process."""
    import torch.distributed as dist

    meeting_point = tmp_path_factory.mktemp("world") / "store"
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_split(folder: Path, split: str, documents: dict[str, list[list[int]]]) -> None:
    from trainwright.runtime.megatron.data import TokenFile

    (folder / split).mkdir(parents=True)
    for source, rows in documents.items():
        writer = TokenFile(folder / split / source, 60_000)
        for row in rows:
            writer.add_document(row)
        writer.finish()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A tokenize output folder, and the training stream of each source."""
    folder = tmp_path_factory.mktemp("tokenize") / "output"
    rng = np.random.default_rng(0)
    token = 1
    documents: dict[str, list[list[int]]] = {}
    for source, count in DOCUMENTS.items():
        documents[source] = []
        for size in rng.integers(1, 60, size=count):
            documents[source].append(list(range(token, token + int(size))))
            token += int(size)
    write_split(folder, "train", documents)
    write_split(folder, "validation", {"code": [[5, 6, 7], [8] * 30], "prose": [[9]]})
    (folder / "summary.json").write_text(json.dumps({"vocab_size": 60_000, "end_of_text": 0}))
    return folder, {source: np.concatenate([np.array(row) for row in rows]) for source, rows in documents.items()}


def stream(
    folder: Path,
    sources: tuple[str, ...],
    weights: tuple[float, ...] | None,
    *,
    steps: int = STEPS,
    sequence_length: int = LENGTH,
    global_batch: int = GLOBAL_BATCH,
    ramp: Ramp | None = None,
    seed: int = 7,
) -> Any:
    from trainwright.runtime.megatron.data import build_training_stream

    return build_training_stream(
        folder,
        sources,
        weights,
        steps=steps,
        sequence_length=sequence_length,
        batches=Batches(global_batch, ramp),
        seed=seed,
    )


def global_batch(stream: Any, step: int, micro_batch: int, data_size: int) -> list[tuple[int, ...]]:
    """All sequences of a step, in the order: micro-batch, rank, row."""
    ranks = [stream.batch(step, micro_batch, rank, data_size) for rank in range(data_size)]
    rows: list[tuple[int, ...]] = []
    for micro_batches in zip(*ranks, strict=True):
        for batch in micro_batches:
            assert set(batch) == KEYS
            assert {tuple(value.shape) for value in batch.values()} == {(micro_batch, LENGTH)}
            assert batch["loss_mask"].min() == 1
            assert batch["position_ids"].tolist() == [list(range(LENGTH))] * micro_batch
            for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
                assert tokens[1:] == labels[:-1]
                rows.append((*tokens, labels[-1]))
    return rows


LAYOUTS = [(1, 1), (8, 1), (2, 2), (1, 4), (2, 4), (1, 8)]


@pytest.mark.parametrize("weights", [None, (0.8, 0.2)])
def test_a_step_holds_the_same_sequences_in_every_layout_and_in_any_order(
    corpus: tuple[Path, dict[str, np.ndarray]], weights: tuple[float, ...] | None
) -> None:
    folder, _ = corpus
    first = stream(folder, ("code", "prose"), weights)
    expected = [global_batch(first, step, GLOBAL_BATCH, 1) for step in range(STEPS)]
    assert len({row for rows in expected for row in rows}) > 0.9 * STEPS * GLOBAL_BATCH  # not one batch twelve times
    resumed = stream(folder, ("code", "prose"), weights)  # what a process that resumes builds
    for step in reversed(range(STEPS)):
        for micro_batch, data_size in LAYOUTS:
            assert global_batch(resumed, step, micro_batch, data_size) == expected[step]
    other = stream(folder, ("code", "prose"), weights, seed=8)
    assert [global_batch(other, step, GLOBAL_BATCH, 1) for step in range(STEPS)] != expected


def test_a_batch_that_grows_reads_the_same_sequences_in_order(corpus: tuple[Path, dict[str, np.ndarray]]) -> None:
    """All sequences of a run are those of a run with the whole batch from the start, whatever the layout and the first step."""
    folder, _ = corpus
    sources, weights = ("code", "prose"), (0.7, 0.3)
    batches = Batches(GLOBAL_BATCH, Ramp(start=2, increment=2, sequences=24))
    assert [batches.size(step) for step in range(9)] == [2, 2, 2, 2, 4, 4, 6, 6, 8]
    assert batches.sizes == (2, 4, 6, 8)
    assert [batches.before(step) for step in (0, 4, 5, 9)] == [0, 8, 12, 36]
    growing = stream(folder, sources, weights, ramp=Ramp(2, 2, 24), steps=12)
    total = batches.before(12)
    whole = stream(folder, sources, weights, steps=total, global_batch=1)
    rows = [row for step in range(12) for row in global_batch(growing, step, 2, 1)]
    assert rows == [row for step in range(total) for row in global_batch(whole, step, 1, 1)]
    resumed = stream(folder, sources, weights, ramp=Ramp(2, 2, 24), steps=12)
    for step in (11, 5, 4):
        assert global_batch(resumed, step, 1, 2) == rows[batches.before(step) : batches.before(step + 1)]


@given(
    start=st.integers(1, 40), increment=st.integers(1, 40), count=st.integers(1, 30), per_increment=st.integers(1, 300)
)
def test_a_ramp_is_megatrons(start: int, increment: int, count: int, per_increment: int) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    whole = start + count * increment
    megatron = RampupBatchsizeNumMicroBatchesCalculator(whole, 1, 1, False, 1, start, increment, count * per_increment)
    batches = Batches(whole, Ramp(start, increment, count * per_increment))
    trained = 0
    for step in range(60):
        megatron.update(trained, consistency_check=True)
        assert (batches.before(step), batches.size(step)) == (trained, megatron.current_global_batch_size)
        trained += batches.size(step)
    assert batches.sizes[-1] == whole


@given(start=st.integers(1, 40), increment=st.integers(1, 40), count=st.integers(1, 30), sequences=st.integers(1, 9000))
def test_a_plan_counts_a_ramp_as_the_run_does(start: int, increment: int, count: int, sequences: int) -> None:
    whole = start + count * increment
    batches = Batches(whole, Ramp(start, increment, sequences))
    ramp = {"ramp_start": start, "ramp_increment": increment, "ramp_sequences": sequences}
    for steps in (sequences, sequences + 7):  # the ramp is over by then
        training: Any = SimpleNamespace(**ramp, global_batch=whole, context_length=1, steps=steps)
        assert trained_tokens(training) == batches.before(steps)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (Ramp(2, 4, 24), r"steps of 4 do not lead to global_batch 8: 8 - 2 = 1 x 4 \+ 2"),
        (Ramp(8, 2, 24), "start is below the global_batch, 8"),
        (Ramp(2, 0, 24), "increment 0"),
        (Ramp(2, 2, 0), "sequences 0"),
    ],
)
def test_a_ramp_that_does_not_lead_to_the_batch_is_refused(ramp: Ramp, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        Batches(GLOBAL_BATCH, ramp)


def test_sequences_are_pieces_of_the_documents_and_an_epoch_reads_each_token_once(
    corpus: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, streams = corpus
    tokens = streams["code"]
    steps = (len(tokens) - 1) // LENGTH
    epoch = stream(folder, ("code",), None, steps=steps, global_batch=1)
    inputs: Counter[int] = Counter()
    for step in range(steps):
        (batch,) = epoch.batch(step, 1, 0, 1)
        inputs.update(batch["tokens"].flatten().tolist())
    assert set(inputs) <= set(tokens.tolist())
    assert set(inputs.values()) == {1}
    assert len(inputs) == steps * LENGTH > len(tokens) - LENGTH - 1


def test_a_source_that_is_used_up_starts_anew(corpus: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, streams = corpus
    tokens = streams["few"]
    steps = 3 * len(tokens) // LENGTH
    epochs = stream(folder, ("few",), None, steps=steps, global_batch=2)
    seen: Counter[int] = Counter()
    for step in range(steps):
        (batch,) = epochs.batch(step, 2, 0, 1)
        seen.update(batch["tokens"].flatten().tolist())
    assert set(seen) == set(tokens.tolist())
    assert max(seen.values()) - min(seen.values()) <= 2
    assert min(seen.values()) >= 4


def test_a_source_is_read_whole_before_any_of_it_is_read_again(corpus: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, streams = corpus
    tokens = streams["prose"]
    an_epoch = (len(tokens) - 1) // LENGTH
    for epochs in (2.0, 3.4, 5.9):
        steps = int(epochs * an_epoch)
        built = stream(folder, ("prose",), None, steps=steps, global_batch=1)
        rows = [tuple(global_batch(built, step, 1, 1)[0]) for step in range(steps)]
        orders = []
        for epoch in range(int(epochs)):
            passed = rows[epoch * an_epoch : (epoch + 1) * an_epoch]
            seen = Counter(token for row in passed for token in row[:-1])
            # a sequence begins in one pass and ends in the next, and passes are not a whole number of sequences
            assert len(seen) >= len(tokens) - (epoch + 2) * LENGTH
            assert sum(count - 1 for count in seen.values()) <= (epoch + 2) * LENGTH
            orders.append(passed)
        assert all(sorted(one) != sorted(other) for one, other in itertools.pairwise(orders)), (
            "documents change their order"
        )


def shares(
    folder: Path, sources: tuple[str, ...], weights: tuple[float, ...] | None, home: dict[int, str]
) -> Counter[str]:
    built = stream(folder, sources, weights)
    rows = [row for step in range(STEPS) for row in global_batch(built, step, GLOBAL_BATCH, 1)]
    return Counter(home[row[0]] for row in rows)


def test_sequences_are_drawn_by_weight_or_else_by_tokens(corpus: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, streams = corpus
    home = {int(token): source for source, tokens in streams.items() for token in tokens}
    total = STEPS * GLOBAL_BATCH
    weighted = shares(folder, ("code", "prose"), (0.3, 0.7), home)
    assert weighted["prose"] == pytest.approx(0.7 * total, abs=1)
    assert weighted.total() == total
    unnormalised = shares(folder, ("code", "prose"), (3.0, 7.0), home)
    assert unnormalised == weighted
    natural = shares(folder, ("code", "prose"), None, home)
    both = len(streams["code"]) + len(streams["prose"])
    assert natural["code"] == pytest.approx(total * len(streams["code"]) / both, abs=1)


def test_small_sources_can_be_blended_to_their_last_sequence(corpus: tuple[Path, dict[str, np.ndarray]]) -> None:
    """A third of such blends stop with an IndexError when Megatron's own builder says how much of each to build."""
    folder, _ = corpus
    sources = ("few",) * 9
    rng = np.random.default_rng(0)
    for steps in (2, 5, 7):
        weights = tuple(rng.dirichlet(np.full(len(sources), 0.3)).tolist())
        built = stream(folder, sources, weights, steps=steps)
        for step in range(steps):
            assert len(global_batch(built, step, GLOBAL_BATCH, 1)) == GLOBAL_BATCH


def test_an_index_that_a_killed_run_left_behind_is_built_again(corpus: tuple[Path, dict[str, np.ndarray]]) -> None:
    from trainwright.runtime.megatron.data import index_cache

    folder, _ = corpus
    expected = global_batch(stream(folder, ("code", "prose"), None, seed=99), 3, 4, 2)
    cache = max((path for path in index_cache(folder).iterdir()), key=lambda path: path.stat().st_mtime_ns)
    assert folder not in index_cache(folder).parents
    (cache / "complete.json").unlink()
    arrays = sorted(cache.glob("*.npy"))
    assert arrays
    for array in arrays:
        array.write_bytes(array.read_bytes()[:40])
    assert global_batch(stream(folder, ("code", "prose"), None, seed=99), 3, 4, 2) == expected


def test_a_source_shorter_than_a_sequence_is_refused_with_the_arithmetic(
    corpus: tuple[Path, dict[str, np.ndarray]],
) -> None:
    folder, streams = corpus
    length = len(streams["few"])
    message = f"source 'few' has {length} training tokens; one sequence takes {length} \\+ 1 = {length + 1}"
    with pytest.raises(DataError, match=message):
        stream(folder, ("code", "few"), None, sequence_length=length)
    assert stream(folder, ("code", "few"), None, sequence_length=length - 1).batch(0, 1, 0, 1)
    with pytest.raises(DataError, match=r"source 'absent' has no tokens in train .*absent\.idx"):
        stream(folder, ("absent",), None)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(2, 70), sequence_length=st.integers(1, 40), count=st.integers(1, 5), extra=st.integers(0, 3)
)
def test_held_out_windows_predict_every_token_but_the_first_once(
    num_tokens: int, sequence_length: int, count: int, extra: int
) -> None:
    from trainwright.runtime.megatron.data import HeldOut

    tokens = np.arange(100, 100 + num_tokens, dtype=np.uint16)
    held = HeldOut(tokens, sequence_length, end_of_text=0)
    before: list[int] = []
    after: list[int] = []
    for start in range(0, held.num_windows + extra, count):
        batch = held.batch(start, count)
        assert set(batch) == KEYS
        assert {tuple(value.shape) for value in batch.values()} == {(count, sequence_length)}
        kept = batch["loss_mask"] == 1
        before += batch["tokens"][kept].tolist()
        after += batch["labels"][kept].tolist()
        assert batch["loss_mask"][~kept].sum() == 0
        assert batch["position_ids"].tolist() == [list(range(sequence_length))] * count
    assert before == tokens[:-1].tolist()
    assert after == tokens[1:].tolist()
    assert held.num_tokens == num_tokens - 1
    assert held.batch(held.num_windows, 2)["loss_mask"].sum() == 0
    assert held.batch(held.num_windows - 1, 1)["loss_mask"].sum() > 0


def test_a_held_out_stream_is_the_file_of_its_source(corpus: tuple[Path, dict[str, np.ndarray]]) -> None:
    from trainwright.runtime.megatron.data import build_heldout

    folder, _ = corpus
    held = build_heldout(folder, "validation", "code", sequence_length=LENGTH)
    batch = held.batch(0, held.num_windows)
    assert batch["labels"][batch["loss_mask"] == 1].tolist() == [6, 7, *[8] * 30]
    with pytest.raises(DataError, match="source 'prose' has 1 token in validation"):
        build_heldout(folder, "validation", "prose", sequence_length=LENGTH)
    with pytest.raises(DataError, match="source 'few' has no tokens in validation"):
        build_heldout(folder, "validation", "few", sequence_length=LENGTH)
