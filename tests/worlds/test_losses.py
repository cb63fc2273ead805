"""The z-loss: from one pass over the cut vocabulary, the same in every layout, and beside the loss, not in it."""

from dataclasses import replace

import pytest
import torch
from world_support import VOCABULARY, Case, Task, build, run_cases, run_reference, run_world, text, train

from trainwright.runtime.megatron import parallel
from trainwright.runtime.megatron.cross_entropy import cross_entropy
from trainwright.runtime.megatron.loop import forward_logits, train_step
from trainwright.runtime.megatron.losses import text_loss, token_loss

COEFFICIENT = 0.02  # large, so that what is lost of it shows
PENALISED = Case(steps=5, task=Task("z-loss", text, text_loss(COEFFICIENT), per_token=False))


def test_values_and_gradients_are_those_of_the_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 2, 16, generator=generator)
    labels = torch.randint(0, 16, (5, 2), generator=generator)
    weights = torch.rand(2, 5, 2, generator=generator)
    whole = logits.double().requires_grad_()
    log_z = whole.logsumexp(-1)
    nats = log_z - whole.gather(-1, labels[..., None])[..., 0]
    (nats * weights[0] + log_z.square() * weights[1]).sum().backward()
    assert whole.grad is not None

    def mine() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parallel.start(parallel.Parallel(tensor=2), seed=1)
        part = logits.chunk(2, -1)[torch.distributed.get_rank()].clone().requires_grad_()
        nats, log_z = cross_entropy(1.0 * part, labels)
        (nats * weights[0] + log_z.square() * weights[1]).sum().backward()
        assert part.grad is not None
        return nats.detach(), log_z.detach(), part.grad

    ranks = run_world(2, mine)
    for rank in ranks:
        assert torch.allclose(rank[0], nats.float(), atol=1e-5)
        assert torch.allclose(rank[1], log_z.float(), atol=1e-5)
    assert torch.allclose(torch.cat([rank[2] for rank in ranks], -1), whole.grad.float(), atol=1e-5)


def test_the_penalty_is_reported_beside_the_loss() -> None:
    def measure() -> tuple[float, float, float, float]:
        built = build(PENALISED)
        rows = text(0, 0, 1)
        log_z = torch.stack([forward_logits(built, row).logsumexp(-1) for batch in rows for row in batch["tokens"]])
        first = train_step(built, rows, text_loss(COEFFICIENT))
        parallel.stop()
        plain = train_step(build(Case()), rows, token_loss)
        assert plain.figures == {}
        assert first.grad_norm != pytest.approx(plain.grad_norm, rel=1e-3)  # it is differentiated
        return first.loss, plain.loss, first.figures["z_loss"], COEFFICIENT * float(log_z.square().mean())

    [(loss, plain, penalty, expected)] = run_world(1, measure)
    assert loss == pytest.approx(plain, rel=1e-6)
    assert penalty == pytest.approx(expected, rel=1e-5)
    assert text_loss(0.0) is token_loss


def test_it_holds_the_normaliser_near_one() -> None:
    def measure() -> tuple[float, float]:
        strong = Task("z-loss", text, text_loss(1.0), per_token=False)
        figures = train(build(Case(task=strong)), range(10), strong).figures
        return figures[0]["z_loss"], figures[-1]["z_loss"]

    [(first, last)] = run_world(1, measure)
    assert first == pytest.approx(torch.tensor(float(VOCABULARY)).log().square().item(), rel=0.1)
    assert last < 0.6 * first


@pytest.mark.full
def test_it_is_of_the_next_token_where_further_ones_are_predicted() -> None:
    """DeepSeek's: latent attention, experts and one further token, whose loss takes no penalty."""
    reference = run_reference(replace(PENALISED, family="deepseek"))
    cases = [replace(PENALISED, family="deepseek", pipeline=2), replace(PENALISED, family="deepseek", data=2, expert=2)]
    for case, difference in zip(cases, run_cases(cases, dict.fromkeys(cases, reference)), strict=True):
        assert difference.violations() == [], case


@pytest.mark.parametrize(
    "degrees",
    [
        [{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"context": 2}],
        pytest.param([{"tensor": 2, "pipeline": 2}], marks=pytest.mark.full),
    ],
    ids=["2 processes", "4 processes"],
)
def test_every_layout_is_equal_to_one_process(degrees: list[dict[str, int]]) -> None:
    reference = run_reference(replace(PENALISED, tied=True))
    cases = [replace(PENALISED, tied=True, **degree) for degree in degrees]
    for case, difference in zip(cases, run_cases(cases, dict.fromkeys(cases, reference)), strict=True):
        print(case, difference)
        assert difference.violations() == [], case
