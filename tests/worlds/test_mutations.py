"""The test of equality bites: with any one collective of a layout made a no-op, it fails.

Costs about a minute and a half on two free cores.
"""

import contextlib

import pytest
from mutations import Mutation, applied
from tuning_tasks import PACKED, PAIRS
from world_support import Case, Record, build, compare, dist, run_reference, run_world, train

from trainwright.runtime.errors import Diverged

TENSOR = Case(tensor=2, distributed_optimizer=False)  # sequence parallel
PLAIN_TENSOR = Case(tensor=2, distributed_optimizer=False, sequence_parallel=False)
QWEN = Case(tensor=2, distributed_optimizer=False, sequence_parallel=False, family="qwen")
GPT = Case(tensor=2, distributed_optimizer=False, family="gpt", tied=True)
DATA = Case(data=2)
OVERLAP = Case(data=2, overlap=True)
ORDINARY_DATA = Case(data=2, distributed_optimizer=False)
PIPELINE = Case(pipeline=2, distributed_optimizer=False)
TIED = Case(pipeline=2, distributed_optimizer=False, tied=True)
MIXED = Case(tensor=2, data=2)
PACKED_DATA = Case(data=2, task=PACKED)
PACKED_PIPELINE = Case(pipeline=2, distributed_optimizer=False, task=PACKED)
PAIRED_DATA = Case(data=2, task=PAIRS)
PAIRED_PIPELINE = Case(pipeline=2, distributed_optimizer=False, task=PAIRS)

LINEAR = "layers.py:LinearWithGradAccumulationAndAsyncCommunication"
REDUCE = "_ReduceFromModelParallelRegion.forward"
SCATTER = "_ReduceScatterToSequenceParallelRegion"
EMBEDDING = "VocabParallelEmbedding.forward"
NORMS = "_allreduce_non_tensor_model_parallel_grads"
CLIP = "clip_grads.py:get_grad_norm_fp32"
BUFFER = "param_and_grad_buffer.py"
FINALIZE = "finalize_model_grads.py:finalize_model_grads"

MUTATIONS = [
    # activations, tensor parallel
    (
        PLAIN_TENSOR,
        Mutation("tensor: forward all-reduce", "all_reduce", (REDUCE,), but_not=EMBEDDING),
    ),
    (PLAIN_TENSOR, Mutation("tensor: embedding all-reduce", "all_reduce", (EMBEDDING,))),
    (TENSOR, Mutation("sequence: forward all-gather", "all_gather", (f"{LINEAR}.forward",))),
    (
        TENSOR,
        Mutation(
            "sequence: forward reduce-scatter",
            "reduce_scatter",
            (f"{SCATTER}.forward",),
            but_not=EMBEDDING,
        ),
    ),
    (TENSOR, Mutation("sequence: embedding reduce-scatter", "reduce_scatter", (EMBEDDING,))),
    (TENSOR, Mutation("cross entropy: maximum", "all_reduce", ("cross_entropy.py",), turn=0)),
    (TENSOR, Mutation("cross entropy: predicted logit", "all_reduce", ("cross_entropy.py",), turn=1)),
    (TENSOR, Mutation("cross entropy: sum of exponentials", "all_reduce", ("cross_entropy.py",), turn=2)),
    # gradients, tensor parallel
    (PLAIN_TENSOR, Mutation("tensor: backward all-reduce", "all_reduce", (f"{LINEAR}.backward",))),
    (
        TENSOR,
        Mutation("sequence: backward all-gather", "all_gather", (f"{SCATTER}.backward",)),
    ),
    (TENSOR, Mutation("sequence: backward reduce-scatter", "reduce_scatter", (f"{LINEAR}.backward",))),
    (TENSOR, Mutation("sequence: all-gather for weight gradients", "all_gather", (f"{LINEAR}.backward",))),
    (TENSOR, Mutation("sequence: norms' gradients", "all_reduce", (NORMS,))),
    (QWEN, Mutation("QK norms' gradients", "all_reduce", (NORMS,))),
    (
        GPT,
        Mutation(
            "sequence: backward all-gather of learned positions",
            "all_gather",
            ("_ScatterToSequenceParallelRegion.backward",),
        ),
    ),
    # pipeline
    (PIPELINE, Mutation("pipeline: activations", "receive", ("recv_forward", "send_backward_recv_forward"))),
    (PIPELINE, Mutation("pipeline: gradients", "receive", ("recv_backward", "send_forward_recv_backward"))),
    (TIED, Mutation("pipeline: tied embedding's gradients", "all_reduce", ("_allreduce_embedding_grad",))),
    # data parallel
    (ORDINARY_DATA, Mutation("data: gradients' all-reduce", "all_reduce", (BUFFER,))),
    (DATA, Mutation("data: gradients' reduce-scatter", "reduce_scatter", (BUFFER,))),
    (DATA, Mutation("data: parameters' all-gather", "all_gather", (BUFFER,))),
    (OVERLAP, Mutation("data, overlapped: gradients' reduce-scatter", "reduce_scatter", (BUFFER,))),
    (OVERLAP, Mutation("data, overlapped: parameters' all-gather", "all_gather", (BUFFER,))),
    (MIXED, Mutation("tensor x data: gradients' reduce-scatter", "reduce_scatter", (BUFFER,))),
    (MIXED, Mutation("tensor x data: parameters' all-gather", "all_gather", (BUFFER,))),
    # norms, losses
    (TENSOR, Mutation("gradient norm over tensor ranks", "all_reduce", (CLIP,))),
    (PIPELINE, Mutation("gradient norm over pipeline stages", "all_reduce", (CLIP,))),
    (DATA, Mutation("gradient norm over data ranks", "all_reduce", (CLIP,))),
    (DATA, Mutation("reported loss over data ranks", "all_reduce", ("loop.py:_sum_over_ranks",))),
    # the number of items that the loss is a mean over
    (PACKED_DATA, Mutation("number of targets over data ranks", "all_reduce", (FINALIZE,))),
    (PACKED_PIPELINE, Mutation("number of targets over pipeline stages", "broadcast", (FINALIZE,))),
    (PAIRED_DATA, Mutation("number of pairs over data ranks", "all_reduce", (FINALIZE,))),
    (PAIRED_PIPELINE, Mutation("number of pairs over pipeline stages", "broadcast", (FINALIZE,))),
]


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, bool, str], Record]:
    kinds = {kind(case): case for case, _ in MUTATIONS}
    return {which: run_reference(case) for which, case in kinds.items()}


def kind(case: Case) -> tuple[str, bool, str]:
    return case.family, case.tied, case.task.name


def mutate(case: Case, mutation: Mutation | None, reference: Record) -> tuple[str, int]:
    """(what the test of equality says, "" when it passes; how often the mutation struck, on all ranks)."""

    def work() -> tuple[str, int]:
        built = build(case, reference.initial)
        with applied(mutation) if mutation else contextlib.nullcontext(None) as hits:
            try:
                record = train(built, range(case.steps), case.task)
            except Diverged as error:
                return f"stopped: {error}", hits.count if hits else 0
        found = compare(record, reference).violations()
        counts: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(counts, hits.count if hits else 0)
        return "; ".join(found), sum(counts)

    return run_world(case.layout.world_size, work)[0]


@pytest.mark.full
def test_without_a_collective_worlds_are_not_equal(
    references: dict[tuple[str, bool, str], Record], capsys: pytest.CaptureFixture[str]
) -> None:
    for case in dict.fromkeys(case for case, _ in MUTATIONS):
        said, _ = mutate(case, None, references[kind(case)])
        assert not said, f"{case} is not equal to one process as it is: {said}"
    rows = []
    for case, mutation in MUTATIONS:
        said, hits = mutate(case, mutation, references[kind(case)])
        rows.append((mutation.name, str(case), hits, said))
    width = max(len(row[0]) for row in rows)
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:<{width}}  {hits:5d} hits  {said}" for name, _, hits, said in rows))
    assert not [row for row in rows if row[2] == 0], "a mutation that never struck says nothing"
    assert not [row for row in rows if not row[3]], "the test of equality does not see these"
