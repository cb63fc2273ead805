"""The test of equality bites: with any one collective of a layout made a no-op, or positions or scales wrong, it fails."""

import contextlib
from dataclasses import replace

import pytest
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
from mutations import Mutation, Wrong, applied
from torch import Tensor
from tuning_tasks import PACKED, PAIRS
from world_support import (
    GLOBAL_BATCH,
    MICRO_BATCH,
    Case,
    Record,
    Task,
    build,
    compare,
    dist,
    parallel,
    run_reference,
    run_world,
    text,
    train,
)

from trainwright.runtime.errors import Diverged
from trainwright.runtime.megatron import context, layers, loop
from trainwright.runtime.megatron.losses import text_loss

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

CONTEXT = Case(context=2, steps=4, distributed_optimizer=False)
SHARDED_CONTEXT = Case(context=2, steps=4)
PACKED_CONTEXT = Case(context=2, steps=4, distributed_optimizer=False, task=PACKED)
INTERLEAVED = Case(pipeline=2, virtual_pipeline=2, steps=4, distributed_optimizer=False, tied=True)
INTERLEAVED_DATA = Case(pipeline=2, virtual_pipeline=2, data=2, steps=4)
Z_LOSS = Case(tensor=2, distributed_optimizer=False, task=Task("z-loss", text, text_loss(0.02), per_token=False))
SINGLE = Case(steps=4, distributed_optimizer=False)

LINEAR = "layers.py:LinearWithGradAccumulationAndAsyncCommunication"
REDUCE = "_ReduceFromModelParallelRegion.forward"
SCATTER = "_ReduceScatterToSequenceParallelRegion"
EMBEDDING = "VocabParallelEmbedding.forward"
NORMS = "_allreduce_non_tensor_model_parallel_grads"
CLIP = "clip_grads.py:get_grad_norm_fp32"
BUFFER = "param_and_grad_buffer.py"
GATHER_BACKWARD = "_GatherFromSequenceParallelRegion.backward"
SHARE = "layers.py:CausalAttention._share"
WHOLE = "context.py:whole_rows"
FINALIZE = "finalize_model_grads.py:finalize_model_grads"


def first_chunks(found: Tensor, embedding: Tensor, *_: object, **__: object) -> Tensor:
    """Of the positions 0, 1, 2, ... whichever chunks this rank holds."""
    return embedding[: len(found)]


def first_positions(found: Tensor, rank: int, size: int, x: Tensor, frequencies: Tensor, offset: int = 0) -> Tensor:
    return frequencies[: len(found)]


def as_gathered(found: Tensor, gathered: Tensor) -> Tensor:
    """One rank's chunks after the other's."""
    return gathered.flatten(0, 1)


def unscaled(found: tuple[Tensor, Tensor, Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the loss as if one context rank had it."""
    return found[0] / context.degree(), *found[1:]


def times_micro_batches(found: tuple[Tensor, Tensor, Tensor], *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the loss as if it were the only micro-batch's."""
    return found[0] * (GLOBAL_BATCH // MICRO_BATCH), *found[1:]


MUTATIONS: list[tuple[Case, Mutation | Wrong]] = [
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
    *(
        (Z_LOSS, Mutation(f"z-loss: {name}", "all_reduce", ("cross_entropy.py:_CrossEntropy",), turn=turn))
        for turn, name in enumerate(("maximum", "predicted logit", "sum of exponentials"))
    ),
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
    # context parallel
    (CONTEXT, Mutation("context: keys and values", "all_gather", (SHARE,))),
    (CONTEXT, Mutation("context: gradients of keys and values", "reduce_scatter", (GATHER_BACKWARD,))),
    (CONTEXT, Mutation("context: nats of whole rows", "all_gather", (WHOLE,))),
    (CONTEXT, Mutation("context: gradients' all-reduce", "all_reduce", (BUFFER,))),
    (SHARDED_CONTEXT, Mutation("context: gradients' reduce-scatter", "reduce_scatter", (BUFFER,))),
    (SHARDED_CONTEXT, Mutation("context: parameters' all-gather", "all_gather", (BUFFER,))),
    (SHARDED_CONTEXT, Mutation("context: gradient norm", "all_reduce", (CLIP,))),
    (CONTEXT, Mutation("context: reported loss", "all_reduce", ("loop.py:_sum_over_ranks",))),
    (PACKED_CONTEXT, Mutation("context: keys and values of packed rows", "all_gather", (SHARE,))),
    (PACKED_CONTEXT, Mutation("context: number of targets", "all_reduce", (FINALIZE,))),
    (
        CONTEXT,
        Wrong("context: RoPE of the first chunks", rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", first_chunks),
    ),
    (
        PACKED_CONTEXT,
        Wrong("context: RoPE of packed rows", rope_utils, "_get_thd_freqs_on_this_cp_rank", first_positions),
    ),
    (CONTEXT, Wrong("context: chunks out of order", layers, "in_order", as_gathered)),
    (CONTEXT, Wrong("context: loss not scaled", loop, "_measure", unscaled)),
    # interleaved pipeline
    (INTERLEAVED, Mutation("interleaved: activations", "receive", ("recv_forward", "send_forward_recv_forward"))),
    (INTERLEAVED, Mutation("interleaved: gradients", "receive", ("recv_backward", "send_backward_recv_backward"))),
    (
        INTERLEAVED,
        Mutation("interleaved: both ways at once", "receive", ("send_forward_backward_recv_forward_backward",)),
    ),
    (INTERLEAVED, Mutation("interleaved: tied embedding's gradients", "all_reduce", ("_allreduce_embedding_grad",))),
    (INTERLEAVED, Mutation("interleaved: gradient norm", "all_reduce", (CLIP,))),
    (INTERLEAVED_DATA, Mutation("interleaved x data: gradients' reduce-scatter", "reduce_scatter", (BUFFER,))),
    (INTERLEAVED_DATA, Mutation("interleaved x data: parameters' all-gather", "all_gather", (BUFFER,))),
    # micro-batches
    (SINGLE, Wrong("micro-batches: loss not scaled", loop, "_measure", times_micro_batches)),
]


def kind(case: Case) -> tuple[str, bool, str, int]:
    """What one process's run depends on."""
    return case.family, case.tied, case.task.name, case.steps


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, bool, str, int], Record]:
    kinds = {kind(case): case for case, _ in MUTATIONS}
    return {which: run_reference(case) for which, case in kinds.items()}


def mutate(case: Case, mutations: list[Mutation | Wrong | None], reference: Record) -> list[tuple[str, int]]:
    """Of each mutation (what the test of equality says, "" when it passes; how often it struck, on all ranks), in one world."""

    def one(mutation: Mutation | Wrong | None) -> tuple[str, int]:
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

    def work() -> list[tuple[str, int]]:
        said = []
        for mutation in mutations:
            said.append(one(mutation))
            parallel.stop()
        return said

    return run_world(case.layout.world_size, work)[0]


@pytest.mark.full
def test_without_a_collective_worlds_are_not_equal(
    references: dict[tuple[str, bool, str, int], Record], capsys: pytest.CaptureFixture[str]
) -> None:
    """About 80 s on two free cores."""
    rows = []
    for case in dict.fromkeys(case for case, _ in MUTATIONS):
        mutations = [mutation for which, mutation in MUTATIONS if which == case]
        (as_it_is, _), *said = mutate(case, [None, *mutations], references[kind(case)])
        assert not as_it_is, f"{case} is not equal to one process as it is: {as_it_is}"
        rows += [(mutation.name, hits, text) for mutation, (text, hits) in zip(mutations, said, strict=True)]
    width = max(len(name) for name, _, _ in rows)
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:<{width}}  {hits:5d} hits  {text}" for name, hits, text in rows))
    assert not [name for name, hits, _ in rows if hits == 0], "a mutation that never struck says nothing"
    assert not [name for name, _, text in rows if not text], "the test of equality does not see these"


@pytest.mark.full
def test_what_is_refused_or_overridden_would_train_wrong() -> None:
    """Batched messages of two interleaved stages (refused by check_model), and sending over gloo what is freed (overridden on
    CPU). About 5 s."""
    swapped = replace(INTERLEAVED, tied=False, options=(("batch_p2p_comm", True),))
    freed = replace(swapped, options=(("overlap_p2p_comm", True),))
    reference = run_reference(swapped)

    def work() -> list[list[str]]:
        said = []
        for case in (swapped, freed):
            built = build(case, reference.initial)
            built.config.deallocate_pipeline_outputs = case is freed
            try:
                said.append(compare(train(built, range(case.steps)), reference).violations())
            except Diverged as error:
                said.append([str(error)])
            parallel.stop()
        return said

    assert all(run_world(2, work)[0])
