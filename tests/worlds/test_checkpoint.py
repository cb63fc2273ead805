"""Checkpoints: resuming, another layout, torn and damaged ones, those of another run."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from world_support import STEPS, Case, Record, WorldFailed, build, compare, run_reference, run_world, train

from trainwright.runtime import step_folders
from trainwright.runtime.errors import CheckpointError
from trainwright.runtime.megatron import parallel
from trainwright.runtime.megatron.checkpoint import Checkpoints, Found, Identity, ModelFiles

HALF = STEPS // 2
TOKENIZER = Path(__file__)  # copied as it is: any file does
IDENTITY = Identity(run_id="3f9c2a71", inputs="aaaa")


def open_checkpoints(
    folder: Path, log: list[str] | None = None, identity: Identity = IDENTITY, keep: int = 2
) -> Checkpoints:
    return Checkpoints(
        folder,
        identity,
        keep_last=keep,
        log=(log if log is not None else []).append,
        files=ModelFiles(TOKENIZER, None, ""),
    )


def save_after(case: Case, folder: Path, steps: int, initial: Record | None = None) -> None:
    """Train `steps` steps in a world of this case and save."""

    def work() -> None:
        built = build(case, initial.initial if initial else None)
        train(built, range(steps))
        open_checkpoints(folder).save(built, steps)

    run_world(case.layout.world_size, work)


def resume(case: Case, folder: Path, identity: Identity = IDENTITY) -> tuple[Record, list[str], Found | None]:
    """Load the newest checkpoint in a world of this case and train up to step STEPS."""

    def work() -> tuple[Record, list[str], Found | None]:
        log: list[str] = []
        checkpoints = open_checkpoints(folder, log, identity)
        found = checkpoints.prepare()
        built = build(case)
        if found:
            checkpoints.load(built, found)
        return train(built, range(found.step if found else 0, STEPS)), log, found

    return run_world(case.layout.world_size, work)[0]


@pytest.mark.parametrize("case", [Case(), Case(bf16=True), Case(tensor=2, data=2, overlap=True)], ids=str)
def test_resumed_losses_are_those_of_an_uninterrupted_run(case: Case, tmp_path: Path) -> None:
    def work() -> tuple[Record, Record]:
        checkpoints = open_checkpoints(tmp_path)
        built = build(case)
        first = train(built, range(HALF))
        checkpoints.save(built, HALF)
        whole = train(built, range(HALF, STEPS))
        parallel.stop()
        again = build(case)
        found = checkpoints.prepare()
        assert found is not None
        assert found.step == HALF
        checkpoints.load(again, found)
        assert first.losses[0] > whole.losses[-1] + 0.3  # there was something to lose
        return whole, train(again, range(HALF, STEPS))

    for whole, again in run_world(case.layout.world_size, work):
        assert again.losses == pytest.approx(whole.losses, rel=1e-6)
        assert again.grad_norms == pytest.approx(whole.grad_norms, rel=1e-5)


@pytest.mark.full  # 10 s each
@pytest.mark.parametrize("tied", [False, True])
def test_another_layout_goes_on_as_one_process_would(tied: bool, tmp_path: Path) -> None:
    """By way of several: each trains a step, and saves for the next."""
    way = [
        Case(tensor=2, pipeline=2, tied=tied),
        Case(pipeline=2, virtual_pipeline=2, data=2, overlap=True, tied=tied),
        Case(tensor=2, pipeline=2, tied=tied),
        Case(tensor=2, context=2, tied=tied),
        Case(tied=tied),
        Case(data=2, overlap=True, tied=tied),
    ]
    reference = run_reference(Case(tied=tied, steps=len(way)))
    for step, case in enumerate(way):

        def work(case: Case = case, step: int = step) -> Record:
            checkpoints = open_checkpoints(tmp_path)
            built = build(case, None if step else reference.initial)
            found = checkpoints.prepare()
            if found:
                checkpoints.load(built, found)
            record = train(built, [step])
            checkpoints.save(built, step + 1)
            if step < len(way) - 1:
                return record
            rest = replace(
                reference, losses=reference.losses[step:], grad_norms=reference.grad_norms[step:], gradients={}
            )
            difference = compare(record, rest)
            assert difference.violations() == []
            return record

        record = run_world(case.layout.world_size, work)[0]
        assert record.losses == pytest.approx(reference.losses[step : step + 1], rel=1e-4), case
        assert record.grad_norms == pytest.approx(reference.grad_norms[step : step + 1], rel=1e-4), case


def test_ordinary_optimizer_resumes_too(tmp_path: Path) -> None:
    case = Case(distributed_optimizer=False)
    reference = run_reference(case)
    save_after(case, tmp_path, HALF, reference)
    record, _, _ = resume(case, tmp_path)
    assert record.losses == pytest.approx(reference.losses[HALF:], rel=1e-6)
    with pytest.raises(WorldFailed, match=r"CheckpointError: .* was saved by the ordinary optimizer"):
        resume(Case(data=2), tmp_path)


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """A rank is killed when all of a checkpoint is written but the file that says so."""
    case = Case()
    save_after(case, tmp_path, 2)

    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_in_save() -> None:
        from megatron.core.dist_checkpointing import serialization

        serialization.save_config = die
        built = build(case)
        train(built, range(4))
        open_checkpoints(tmp_path).save(built, 4)

    with pytest.raises(WorldFailed, match="status 9"):
        run_world(1, killed_in_save)
    torn = tmp_path / "step-000004"
    assert list(torn.glob("*.distcp"))
    _, log, found = resume(case, tmp_path)
    assert found == Found(2, tmp_path / "step-000002")
    assert any("step-000004 is torn" in line for line in log), log
    # the step is saved again, into a fresh folder
    save_after(case, tmp_path, 4)
    assert (torn / step_folders.COMPLETE).exists()
    assert resume(case, tmp_path)[2] == Found(4, torn)


@pytest.mark.parametrize("other", [replace(IDENTITY, run_id="00000000"), replace(IDENTITY, inputs="bbbb")])
def test_checkpoints_of_another_run_are_set_aside(other: Identity, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save_after(Case(), folder, 1)
    _, log, found = resume(Case(), folder, other)
    assert found is None
    aside = tmp_path / f"checkpoints-{IDENTITY.run_id}"
    assert (aside / "step-000001" / step_folders.COMPLETE).exists(), "nothing is lost"
    assert any(aside.name in line for line in log), log


def test_another_shape_or_a_damaged_file_is_one_message(tmp_path: Path) -> None:
    save_after(Case(), tmp_path, 1)

    def message(case: Case) -> str:
        def work() -> str:
            checkpoints = open_checkpoints(tmp_path)
            found = checkpoints.prepare()
            assert found is not None
            with pytest.raises(CheckpointError) as caught:
                checkpoints.load(build(case), found)
            return str(caught.value)

        return run_world(1, work)[0]

    for case, difference in (
        (Case(family="qwen"), "qk_layernorm: False there, True here."),
        (Case(tied=True), "tied: False there, True here."),
        (Case(family="gpt"), "num_query_groups: 2 there, 4 here; normalization: RMSNorm there, LayerNorm here; "),
    ):
        text = message(case)
        assert "step-000001 is of another model: " in text
        assert difference in text
        assert "\n" not in text
    for piece in (tmp_path / "step-000001").glob("*.distcp"):
        os.truncate(piece, piece.stat().st_size // 2)
    assert "is damaged" in message(Case())


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    def work() -> None:
        built = build(Case())
        train(built, range(1))
        for step in (1, 2, 3):
            open_checkpoints(tmp_path, keep=2).save(built, step)

    run_world(1, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.json", "step-000002", "step-000003"]
    assert json.loads((tmp_path / "latest.json").read_text()) == {"path": "step-000003", "step": 3}
