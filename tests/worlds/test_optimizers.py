"""Lion and parameter groups: against written-out updates, in several layouts, saved and loaded in another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.optimizer import OptimizerConfig
from test_checkpoint import open_checkpoints, save_after
from world_support import (
    Case,
    Difference,
    Record,
    build,
    compare,
    run_cases,
    run_reference,
    run_world,
    text,
    train,
)

from trainwright.runtime.errors import Unsupported
from trainwright.runtime.megatron import model, optimizers, parallel
from trainwright.runtime.megatron.lion import Lion
from trainwright.runtime.megatron.loop import train_step
from trainwright.runtime.megatron.parameters import Groups

STEPS, HALF = 6, 3
LION = Case(optimizer="lion", steps=STEPS)
MIXTURE = Case(optimizer="lion", steps=STEPS, family="mixtral")
MUP = Case(steps=STEPS, groups=Groups(undecayed=("biases", "norms", "embeddings"), width=4.0))


def unequal(difference: Difference, case: Case) -> list[str]:
    """`violations`, but: where the two terms of Lion's update cancel to within rounding, its sign may be another in another
    layout. That weight is then 2 x the rate off, and one of 4096 shows in the norm."""
    if case.optimizer == "lion":
        difference = replace(difference, parameter=difference.parameter / 10)
    return difference.violations()


def test_lion_is_the_algorithm_of_its_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(6)]
    gradients[2][0, 0] = 0.0
    rate, beta1, beta2, decay = 0.01, 0.9, 0.97, 0.3
    parameter = torch.nn.Parameter(start.clone())
    lion = Lion([parameter, torch.nn.Parameter(torch.ones(2))], rate, (beta1, beta2), decay)
    expected, moment = start.clone(), torch.zeros_like(start)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        lion.step()
        update = torch.sign(beta1 * moment + (1 - beta1) * gradient)
        expected = expected - rate * (update + decay * expected)
        moment = beta2 * moment + (1 - beta2) * gradient
    assert torch.allclose(parameter, expected, rtol=1e-12, atol=1e-12)
    assert lion.param_groups[0]["params"][1].tolist() == [1.0, 1.0]  # it has no gradient
    with pytest.raises(ValueError, match="betas"):
        Lion([parameter], rate, (0.9, 1.0))


@pytest.mark.parametrize("bf16", [False, True])
def test_lion_under_megatron_moves_every_weight_by_the_rate(bf16: bool) -> None:
    """The first step, without decay: the masters move by -rate x the gradient's sign; and Lion is all that is in it."""

    def first_step() -> list[tuple[str, float]]:
        built = build(replace(LION, bf16=bf16, distributed_optimizer=False))
        for group in built.optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.125, 0.0
        (part,) = optimizers.parts_of(built.optimizer)
        assert isinstance(part.optimizer, Lion)
        masters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        assert {master.dtype for master in masters} == {torch.float32}
        before = [master.clone() for master in masters]
        train_step(built, text(0, 0, 1))
        wrong = []
        for number, (old, master) in enumerate(zip(before, masters, strict=True)):
            state = part.optimizer.state[master]
            assert set(state) == {"step", "exp_avg"}
            expected = old - 0.125 * state["exp_avg"].sign()  # the moment is (1 - beta2) x the first gradient
            wrong.append((str(number), float((master - expected).abs().max())))
        return wrong

    for name, difference in run_world(1, first_step)[0]:
        assert difference == 0.0, name


@pytest.mark.parametrize(
    "cases",
    [
        [replace(LION, data=2, overlap=True), replace(LION, pipeline=2, tied=True), replace(LION, tensor=2)],
        [
            replace(MUP, data=2),
            replace(MUP, tensor=2, distributed_optimizer=False),
            replace(MUP, pipeline=2, tied=True),
        ],
        pytest.param([replace(MIXTURE, data=2, expert=2)], marks=pytest.mark.full),
        pytest.param([replace(MIXTURE, optimizer="adam", groups=MUP.groups, data=2, expert=2)], marks=pytest.mark.full),
    ],
    ids=["lion", "mup", "lion of a mixture", "mup of a mixture"],
)
def test_every_layout_trains_as_one_process(cases: list[Case]) -> None:
    references = {tied: run_reference(replace(cases[0], tied=tied)) for tied in {case.tied for case in cases}}
    for case, difference in zip(cases, run_cases(cases, {c: references[c.tied] for c in cases}), strict=True):
        print(case, difference)
        assert unequal(difference, case) == [], case


@pytest.mark.parametrize(
    "case",
    [replace(LION, data=2, bf16=True), pytest.param(replace(MUP, tensor=2), marks=pytest.mark.full)],
    ids=["lion", "mup"],
)
def test_a_resumed_run_goes_on_as_it_would_have(case: Case, tmp_path: Path) -> None:
    def work() -> tuple[Record, Record]:
        checkpoints = open_checkpoints(tmp_path)
        built = build(case)
        train(built, range(HALF))
        checkpoints.save(built, HALF)
        whole = train(built, range(HALF, STEPS))
        parallel.stop()
        again = build(case)
        found = checkpoints.prepare()
        assert found is not None
        checkpoints.load(again, found)
        return whole, train(again, range(HALF, STEPS))

    for whole, again in run_world(2, work):
        assert again.losses == whole.losses
        for name, tensor in whole.final.items():
            assert torch.equal(again.final[name], tensor), name


@pytest.mark.full  # 5 s each
@pytest.mark.parametrize("case", [LION, MUP], ids=["lion", "mup"])
def test_another_layout_goes_on_as_one_process_would(case: Case, tmp_path: Path) -> None:
    reference = run_reference(case)
    rest = Record(losses=reference.losses[HALF:], grad_norms=reference.grad_norms[HALF:], final=reference.final)
    save_after(replace(case, tensor=2), tmp_path, HALF, reference)

    def work() -> None:
        checkpoints = open_checkpoints(tmp_path)
        for other in (replace(case, pipeline=2), replace(case, data=2, overlap=True)):
            built = build(other)
            found = checkpoints.prepare()
            assert found is not None
            checkpoints.load(built, found)
            assert unequal(compare(train(built, range(HALF, STEPS)), rest), other) == [], other
            parallel.stop()

    run_world(2, work)
    (found,) = tmp_path.glob("step-*")
    moments = {key.split(".")[2] for key in load_tensors_metadata(str(found)) if key.startswith("optimizer.state.")}
    assert moments == {"param", "exp_avg"} | ({"exp_avg_sq"} if case.optimizer == "adam" else set())


def test_the_ordinary_optimizer_resumes_lion_too(tmp_path: Path) -> None:
    case = replace(LION, distributed_optimizer=False, bf16=True)
    reference = run_reference(case)
    save_after(case, tmp_path, HALF, reference)

    def work() -> Record:
        checkpoints = open_checkpoints(tmp_path)
        built = build(case)
        found = checkpoints.prepare()
        assert found is not None
        checkpoints.load(built, found)
        return train(built, range(HALF, STEPS))

    assert run_world(1, work)[0].losses == reference.losses[HALF:]


def settings_of(case: Case) -> dict[str, tuple[float, float]]:
    """By parameter: weight decay and learning rate as multiples of the config's."""

    def work() -> dict[str, tuple[float, float]]:
        built = build(case)
        names = {parameter: name for name, parameter in built.gpt.named_parameters()}
        rate = max(group["max_lr"] for group in built.optimizer.param_groups)
        return {
            names[parameter]: (group["wd_mult"], group["max_lr"] / rate)
            for group in built.optimizer.param_groups
            for parameter in group["params"]
        }

    return run_world(1, work)[0]


def test_groups_hold_what_they_are_named_for() -> None:
    plain = Case(family="gpt", distributed_optimizer=False)
    for undecayed in ((), ("biases",), ("norms",), ("embeddings",), ("biases", "norms", "embeddings")):
        for tied in (False, True):
            found = settings_of(replace(plain, tied=tied, groups=Groups(undecayed=undecayed, width=1.0)))
            for name, (decay, rate) in found.items():
                kind = ""
                if "embeddings" in name:
                    kind = "embeddings"
                elif "layernorm" in name:
                    kind = "norms"
                elif name.endswith("bias"):
                    kind = "biases"
                assert decay == (0.0 if kind in undecayed else 1.0), (name, undecayed)
                assert rate == 1.0
    wide = settings_of(replace(plain, groups=Groups(undecayed=("biases",), width=8.0)))
    assert wide["decoder.layers.0.self_attention.linear_qkv.weight"] == (8.0, 1 / 8)
    assert wide["decoder.layers.0.mlp.linear_fc2.weight"] == (8.0, 1 / 8)
    assert wide["decoder.layers.0.mlp.linear_fc2.bias"] == (0.0, 1.0)
    for name in ("embedding.word_embeddings.weight", "embedding.position_embeddings.weight", "output_layer.weight"):
        assert wide[name] == (1.0, 1.0)
    assert wide["decoder.final_layernorm.weight"] == (1.0, 1.0)


def test_a_program_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(
        Unsupported, match=r"groups\.undecayed has 'matrices': write some of 'biases', 'norms', 'embeddings'"
    ):
        Groups(undecayed=("norms", "matrices"), width=1.0).check(1.0)
    with pytest.raises(
        Unsupported, match=r"groups\.width=4\.0 goes with embedding\.output_multiplier=1 / width, and it is 1\.0"
    ):
        Groups(undecayed=(), width=4.0).check(1.0)

    def unknown() -> str:
        with pytest.raises(Unsupported) as caught:
            build(Case(optimizer="sgd"))
        return str(caught.value)

    with pytest.raises(Unsupported, match=r"optimizer_cpu_offload=True is for Adam, and the optimizer is 'lion'"):
        optimizers.check_optimizer(OptimizerConfig(optimizer="lion", lr=1e-3, optimizer_cpu_offload=True))
    assert run_world(1, unknown) == ["optimizer='sgd' is unknown to this runtime: write 'adam' or 'lion'"]


def test_the_default_groups_are_megatrons_own() -> None:
    """What Megatron-Core does when it is told nothing."""

    def work() -> bool:
        built = build(replace(Case(family="gpt"), distributed_optimizer=False))
        told = [(group["wd_mult"], len(group["params"])) for group in built.optimizer.param_groups]
        own = optimizers.get_megatron_optimizer(built.optimizer.config, list(built.ddp))
        return told == [(group["wd_mult"], len(group["params"])) for group in own.param_groups]

    assert run_world(1, work) == [True]
    assert Groups(undecayed=("biases", "norms"), width=1.0) == model.PLAIN
