"""The test of equality bites for mixtures, latent attention and prediction of further tokens: without any one collective of
theirs, or with an expert's tokens sent to another rank, it fails."""

from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from mutations import Mutation, Wrong
from test_mutations import BUFFER, CLIP, GATHER_BACKWARD, NORMS, mutate
from torch import Tensor
from world_support import Case, run_cases, run_reference

from trainwright.runtime.megatron import model

STEPS = 4
SPREAD = Case(family="mixtral", steps=STEPS, data=2, expert=2, distributed_optimizer=False)
GATHERED = Case(
    family="mixtral",
    steps=STEPS,
    data=2,
    expert=2,
    distributed_optimizer=False,
    options=(("moe_token_dispatcher_type", "allgather"),),
)
CUT = Case(family="mixtral", steps=STEPS, tensor=2, expert_tensor=2, distributed_optimizer=False)
WHOLE = Case(family="mixtral", steps=STEPS, tensor=2, distributed_optimizer=False)
SHARDED = Case(family="mixtral", steps=STEPS, tensor=2)
BIASED = Case(family="kimi", steps=STEPS, data=2, expert=2, distributed_optimizer=False)
LATENT = Case(family="latent", steps=STEPS, tensor=2, distributed_optimizer=False)
FURTHER = Case(family="deepseek", steps=STEPS, pipeline=2, distributed_optimizer=False)

SAME_EXPERT = parallel_state.get_expert_data_parallel_group
ALL_EXPERTS = parallel_state.get_expert_tensor_model_pipeline_parallel_group
ONE_EXPERT = parallel_state.get_expert_tensor_parallel_group
FIGURES = "experts.py:_sum_over_world"


def to_another_rank(routed: tuple[Tensor, Tensor], router: TopKRouter, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Each expert's tokens go to the one of the same place on the next expert rank."""
    probabilities, chosen = routed
    local = router.num_experts // parallel_state.get_expert_model_parallel_world_size()
    return probabilities.roll(local, dims=1), chosen.roll(local, dims=1)


MUTATIONS: list[tuple[Case, Mutation | Wrong]] = [
    # experts spread over ranks, all-to-all
    (SPREAD, Mutation("experts: tokens to experts", "all_to_all", ("_AllToAll.forward", "token_dispatch"))),
    (SPREAD, Mutation("experts: tokens from experts", "all_to_all", ("_AllToAll.forward", "token_combine"))),
    (SPREAD, Mutation("experts: gradients to and from experts", "all_to_all", ("_AllToAll.backward",))),
    (SPREAD, Mutation("experts: gradient norm", "all_reduce", (CLIP,), group=ALL_EXPERTS)),
    (SPREAD, Mutation("experts: reported losses of routers", "all_reduce", (FIGURES,))),
    (SPREAD, Wrong("experts: tokens sent to another rank", TopKRouter, "routing", to_another_rank)),
    # the same, all-gather
    (GATHERED, Mutation("experts, gathered: which token goes where", "all_gather", ("token_dispatch",), turn=0)),
    (GATHERED, Mutation("experts, gathered: probabilities", "all_gather", ("token_dispatch",), turn=1)),
    (GATHERED, Mutation("experts, gathered: tokens", "all_gather", ("token_dispatch",), turn=2)),
    (GATHERED, Mutation("experts, gathered: outputs", "reduce_scatter", ("token_combine",))),
    (GATHERED, Mutation("experts, gathered: gradients of tokens", "reduce_scatter", (GATHER_BACKWARD,))),
    (
        GATHERED,
        Mutation(
            "experts, gathered: gradients of outputs",
            "all_gather",
            ("_ReduceScatterToSequenceParallelRegion.backward",),
        ),
    ),
    # each expert cut over tensor ranks
    (CUT, Mutation("cut experts: tokens", "all_gather", ("dispatch_postprocess",), group=ONE_EXPERT)),
    (CUT, Mutation("cut experts: outputs", "reduce_scatter", ("combine_preprocess",), group=ONE_EXPERT)),
    (CUT, Mutation("cut experts: gradients of tokens", "reduce_scatter", (GATHER_BACKWARD,), group=ONE_EXPERT)),
    (
        CUT,
        Mutation(
            "cut experts: gradients of outputs",
            "all_gather",
            ("_ReduceScatterToSequenceParallelRegion.backward",),
            group=ONE_EXPERT,
        ),
    ),
    # whole experts on every tensor rank
    (WHOLE, Mutation("whole experts: gradients over tensor ranks", "all_reduce", (BUFFER,), group=SAME_EXPERT)),
    (WHOLE, Mutation("whole experts: gradients of norms and routers", "all_reduce", (NORMS,))),
    (WHOLE, Mutation("balance: tokens an expert", "all_reduce", ("get_tokens_per_expert_and_token_count",))),
    (SHARDED, Mutation("whole experts: gradients' reduce-scatter", "reduce_scatter", (BUFFER,), group=SAME_EXPERT)),
    (SHARDED, Mutation("whole experts: parameters' all-gather", "all_gather", (BUFFER,), group=SAME_EXPERT)),
    # balance by a bias
    (BIASED, Mutation("experts' bias: tokens an expert", "all_reduce", ("get_updated_expert_bias",))),
    # latent attention
    (LATENT, Mutation("latent: gradient of the shared rotary key", "all_reduce", ("_SumGradient.backward",))),
    (LATENT, Mutation("latent: down-projection", "all_gather", ("get_query_key_value_tensors",))),
    (
        LATENT,
        Mutation("latent: gradient of the compressed", "all_gather", ("_ScatterToSequenceParallelRegion.backward",)),
    ),
    # further tokens
    (FURTHER, Mutation("further tokens: embedding's gradients", "all_reduce", ("_allreduce_embedding_grad",))),
    (FURTHER, Mutation("further tokens: reported loss", "all_reduce", (FIGURES,))),
]


@pytest.mark.full
def test_without_a_collective_of_experts_worlds_are_not_equal(capsys: pytest.CaptureFixture[str]) -> None:
    """About two minutes on two free cores."""
    references = {case.family: run_reference(case) for case, _ in MUTATIONS}
    rows = []
    for case in dict.fromkeys(case for case, _ in MUTATIONS):
        mutations = [mutation for which, mutation in MUTATIONS if which == case]
        (as_it_is, _), *said = mutate(case, [None, *mutations], references[case.family])
        assert not as_it_is, f"{case} is not equal to one process as it is: {as_it_is}"
        rows += [(mutation.name, hits, text) for mutation, (text, hits) in zip(mutations, said, strict=True)]
    width = max(len(name) for name, _, _ in rows)
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:<{width}}  {hits:5d} hits  {text}" for name, hits, text in rows))
    assert not [name for name, hits, _ in rows if hits == 0], "a mutation that never struck says nothing"
    assert not [name for name, _, text in rows if not text], "the test of equality does not see these"


@pytest.mark.full
def test_experts_that_are_not_marked_train_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core 0.16.1 as it is, with tensor 2 and expert_tensor 1. About 3 s."""
    reference = run_reference(WHOLE)
    monkeypatch.setattr(model, "mark_experts", lambda chunks: None)
    [difference] = run_cases([WHOLE], {WHOLE: reference})
    assert "experts" in difference.gradient_name
    assert difference.gradient > 0.1
