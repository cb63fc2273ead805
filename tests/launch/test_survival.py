"""What ends a run that nobody wanted to end: kills, full and read-only disks, a vanished folder, what is not installed."""

import errno
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_support import COPY_INPUT, LEAVE, SLEEP_ONCE, Made, asleep, is_alive, started, wait_for

from trainwright.runtime import cli, disk, errors
from trainwright.runtime.launch import packages
from trainwright.runtime.workspace import write_json

COUNT_ATTEMPTS = """
starts = WORK / "starts"
number = len(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text("x" * number)
"""
FILL = """
if "FULL" in os.environ:
    try:
        with (WORK / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
    except OSError:
        if QUIET:
            os._exit(1)
        raise
"""


def files_of(made: Made, *names: str) -> dict[str, Any]:
    return {name: json.loads((made.path / "work" / name).read_text()) for name in names}


# Retries


def test_a_stage_is_started_again_as_often_as_it_may(bundle: Made) -> None:
    """Killed, then failed, then through: two retries, with a pause that grows, going on where it was."""
    body = (
        COUNT_ATTEMPTS + "if number == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nif number == 2:\n    sys.exit(3)\n"
    )
    bundle.add("flaky", body + LEAVE, retries=2)
    said = bundle.run()
    pauses = re.findall(
        r"^flaky: failed \((.*)\); starts again in (\d\.0 s) \(retry (\d of 2)\)$", said.out, re.MULTILINE
    )
    killed = "rank 0 of 1 was killed by SIGKILL (often the out-of-memory killer: see dmesg)"
    assert pauses == [(killed, "2.0 s", "1 of 2"), ("rank 0 of 1 ended with exit code 3", "4.0 s", "2 of 2")]
    assert bundle.state("flaky")["attempts"] == 3
    assert bundle.state("flaky")["state"] == "done"
    assert (bundle.path / "work/flaky/log/rank-0.log").read_text().count("=== flaky: attempt ") == 3


def test_retries_of_the_command_line_replace_the_bundles(bundle: Made) -> None:
    bundle.add("failing", "sys.exit(3)\n", retries=9)
    assert "starts again" not in bundle.run("--retries", "0", code=22).out
    assert bundle.run("--retries", "1", code=22).out.count("(retry 1 of 1)") == 1
    assert bundle.state("failing")["attempts"] == 3


@pytest.mark.parametrize(
    "code", [kind.exit_code for kind in errors.RunError.__subclasses__() if kind.exit_code not in (22, 23)]
)
def test_a_users_own_error_is_not_tried_again(bundle: Made, code: int) -> None:
    bundle.add("wrong", f'print("error: that is no data", file=sys.stderr)\nsys.exit({code})\n', retries=3)
    said = bundle.run(code=code)
    assert said.err.startswith("error: wrong: that is no data\n")
    assert bundle.state("wrong")["attempts"] == 1
    assert bundle.state("wrong")["note"] == "that is no data"


def test_a_killed_torchrun_is_tried_again_when_its_ranks_are_gone(bundle: Made) -> None:
    bundle.add("world", SLEEP_ONCE, ranks=2, retries=1)
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, 2))
        ranks = [row["pid"] for row in bundle.trace()]
        agent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(agent, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "world: failed (torchrun was killed by SIGKILL" in out
    assert not any(is_alive(pid) for pid in ranks)


# What depends on a failure


def test_what_needs_a_failed_gate_is_not_run_by_its_name_either(bundle: Made) -> None:
    gate = 'leave("0.24")\nprint("error: accuracy 0.24 is below 0.40", file=sys.stderr)\nsys.exit(30)\n'
    bundle.add("evaluate", gate)
    bundle.add("export", LEAVE, needs=("evaluate",))
    assert "error: evaluate: accuracy 0.24 is below 0.40" in bundle.run(code=30).err
    err = bundle.run("--only", "export", code=21).err
    assert err == (
        "error: export: needs stage evaluate, which is not done (it is failed: accuracy 0.24 is below 0.40); run that first:"
        " --only evaluate\n"
    )
    assert bundle.ran() == ["evaluate"]


# Kills


def test_a_process_that_a_killed_rank_forked_does_not_meet_the_next_attempt(bundle: Made) -> None:
    """As a checkpoint's writers are: the kernel tells them nothing of their parent's death."""
    orphan = (
        "if os.fork() == 0:\n    (WORK / 'orphan').write_text(str(os.getpid()))\n    time.sleep(120)\n    os._exit(0)\n"
    )
    bundle.add(
        "writer",
        f'if not (WORK / "asleep-0").exists():\n    {orphan.replace(chr(10), chr(10) + "    ")}\n' + SLEEP_ONCE,
    )
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, 1) and (bundle.path / "work/orphan").exists())
        process.kill()
        process.wait()
    pid = int((bundle.path / "work/orphan").read_text())
    assert is_alive(pid)
    assert f"processes of an earlier attempt are left and are ended: {pid}\n" in bundle.run().out
    assert not is_alive(pid)


def test_a_process_whose_parent_died_before_it_could_ask_for_its_death_becomes_nothing(tmp_path: Path) -> None:
    """The kill that hits between fork and prctl: it is told its parent's number, and finds another one."""
    for parent, code in ((os.getpid(), 0), (os.getpid() + 1, 1)):
        lock, log = tmp_path / "lock", tmp_path / f"{code}.log"
        child = [
            sys.executable,
            "-P",
            "-m",
            "trainwright.runtime.launch.child",
            str(parent),
            str(lock),
            str(log),
            "header",
        ]
        done = subprocess.run([*child, "/bin/echo", "became it"], check=False)
        assert done.returncode == code
        assert log.exists() == (code == 0)
    assert (tmp_path / "0.log").read_text() == "header\nbecame it\n"


def test_a_finished_program_is_not_run_again_because_the_runner_was_killed_before_it_was_noted(bundle: Made) -> None:
    """Between the end of the program and the note of it stands the hashing of its output, which may take long."""
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",))
    bundle.run()
    done = files_of(bundle, "state.json")["state.json"]
    identity = done["stages"]["read"]["output_id"]
    running = {**done["stages"]["read"], "state": "running", "output_id": "", "exit_code": 0}
    write_json(bundle.path / "work/state.json", {**done, "stages": {"read": running}})
    bundle.trace()
    said = bundle.run()
    assert "read: done in" in said.out
    assert bundle.ran() == []
    assert bundle.state("read")["output_id"] == identity
    write_json(bundle.path / "work/state.json", {**done, "stages": {"read": running}})
    (bundle.path / "work/read/output/summary.json").unlink()
    assert "read: goes on: it was interrupted" in bundle.run().out, "it left no result: it was not finished"
    assert bundle.ran() == ["read"]


def test_scratch_files_of_killed_writers_are_removed(chain: Made) -> None:
    chain.run()
    scratch = [
        chain.path / "work" / name for name in (".state.json.4711", ".hashes.json.4711", "read/.progress.json.4711")
    ]
    for path in scratch:
        path.write_text("{")
    chain.run("--from", "read")
    assert not any(path.exists() for path in scratch)


def test_a_work_folder_that_disappears_stops_the_run_and_is_not_made_anew(bundle: Made, tmp_path: Path) -> None:
    bundle.add("sleeper", SLEEP_ONCE)
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, 1))
        pids = [row["pid"] for row in bundle.trace()]
        (bundle.path / "work").rename(tmp_path / "moved")
        _, err = process.communicate(timeout=30)
    assert process.returncode == 20
    assert err.startswith(f"error: {bundle.path}/work: was deleted or moved while a run was executing there")
    assert not any(is_alive(pid) for pid in pids)
    assert not (bundle.path / "work").exists()
    (tmp_path / "moved").rename(bundle.path / "work")
    assert "sleeper: goes on: it was interrupted" in bundle.run().out


def test_a_killed_writer_of_a_checkpoint_ends_its_rank(bundle: Made) -> None:
    """Megatron-Core would wait for it for ever; one that ends by itself is nothing to worry about."""
    body = """
import multiprocessing
from trainwright.runtime.megatron.writers import writers_watched

context = multiprocessing.get_context("fork")
with writers_watched():
    context.Process(target=os._exit, args=(3,)).start()
    time.sleep(1.5)
print("one has ended", flush=True)
with writers_watched():
    context.Process(target=lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    time.sleep(60)
"""
    bundle.add("train", body, retries=1)
    said = bundle.run(code=23)
    assert said.err.startswith("error: train: a process that wrote the checkpoint was killed by SIGKILL")
    assert (bundle.path / "work/train/log/rank-0.log").read_text().count("one has ended") == 2, "it was tried again"


def test_the_writers_of_a_killed_rank_die_with_it(bundle: Made) -> None:
    body = """
from trainwright.runtime.megatron.writers import writers_watched

with writers_watched():
    pid = os.fork()
    if pid == 0:
        time.sleep(120)
    (WORK / "writer").write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    bundle.add("train", body)
    bundle.run(code=23)
    pid = int((bundle.path / "work/writer").read_text())
    wait_for(lambda: not is_alive(pid), seconds=10)


# Disks


def on_small_disk(made: Made, script: str) -> "subprocess.CompletedProcess[str]":
    """Execute a shell script with `work/` a file system of 512 KiB; `run` is the command. What it copies to `kept/` stays."""
    work = made.path / "work"
    work.mkdir()
    (made.path / "kept").mkdir()
    mount = f"mount -t tmpfs -o size=512k none {shlex.quote(str(work))}"
    unshare = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, mount], capture_output=True, check=False).returncode
    ):
        pytest.skip("this machine lets nobody mount a small file system")
    prelude = (
        f'{mount}\nrun() {{ {shlex.join(made.command())} "$@"; echo "code $?"; }}\ncd {shlex.quote(str(made.path))}\n'
    )
    return subprocess.run([*unshare, prelude + script], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("quiet", [False, True])
def test_a_full_disk_is_one_message_and_loses_nothing_finished(bundle: Made, quiet: bool) -> None:
    """`quiet`: the program says nothing of it, since its log is on the same disk."""
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",))
    bundle.add("fill", FILL.replace("QUIET", str(quiet)) + LEAVE, needs=("read",))
    done = on_small_disk(
        bundle,
        "FULL=1 run\nrun\ncp work/state.json kept/1.json\nrm work/ballast\nrun\ncp work/state.json kept/2.json\n"
        "cp work/trace kept/",
    )
    assert re.findall(r"^code (\d+)$", done.stdout, re.MULTILINE) == ["31", "31", "0"], done.stdout + done.stderr
    assert done.stderr.count("error: ") == 2
    first, second = done.stderr.removeprefix("error: ").split("error: ")
    full = r"its file system, or your quota on it, is full \((\d+|\d,\d+) bytes are free there\); make room, or"
    assert re.match(rf"fill: {bundle.path}/work: {full}", first), first
    assert re.search(full, second), "the disk is still full"
    assert "fill: an earlier run could not note how this stage ended" in done.stdout
    assert "Traceback" not in done.stderr
    before, after = (json.loads((bundle.path / "kept" / name).read_text())["stages"] for name in ("1.json", "2.json"))
    assert before["read"] == after["read"], "what was finished is not lost"
    assert after["fill"]["state"] == "done"
    ran = [json.loads(line)["name"] for line in (bundle.path / "kept/trace").read_text().splitlines()]
    assert ran.count("read") == 1


def test_a_read_only_work_folder_is_one_message(chain: Made) -> None:
    done = on_small_disk(
        chain,
        f"run --only read\nmount -o remount,ro work\nrun\n{shlex.join(chain.command(verb='status'))} | grep count\n",
    )
    assert re.findall(r"^code (\d+)$", done.stdout, re.MULTILINE) == ["0", "20"], done.stdout + done.stderr
    assert done.stderr == (
        f"error: {chain.path}/work: cannot be the work folder ({chain.path}/work/run.lock: Read-only file system); make it"
        " usable, or name another with --work\n"
    )
    assert "count: would run: it has not run yet" in done.stdout, "status reads it all the same"


@pytest.mark.parametrize(
    ("writes", "number", "kind"),
    [
        (1, errno.EROFS, errors.BundleError),
        (2, errno.ENOSPC, errors.DiskFull),
        (3, errno.EROFS, errors.BundleError),
        (5, errno.ENOSPC, errors.DiskFull),
    ],
)
def test_a_disk_that_fails_at_any_write_of_the_runner_is_one_message(
    chain: Made, monkeypatch: pytest.MonkeyPatch, writes: int, number: int, kind: type[errors.RunError]
) -> None:
    """In this process: `os.replace` is where a write of the state becomes valid. 2 stages, 3 notes each."""
    replace, done = os.replace, 0

    def failing(source: Path, target: Path) -> None:
        nonlocal done
        done += 1
        if done >= writes:
            raise OSError(number, os.strerror(number), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(kind, match=f"{chain.path}/work: "):
        cli.run_bundle(chain.path)
    monkeypatch.undo()
    assert not list((chain.path / "work").glob(".*")), "no scratch files are left"
    finished = (writes - 1) // 3
    before = [chain.state(name)["output_id"] for name in ("read", "count")[:finished]]
    assert "close: done in" in chain.run().out
    assert [chain.state(name)["output_id"] for name in ("read", "count")[:finished]] == before
    assert [chain.state(name)["attempts"] for name in ("read", "count")[:finished]] == [1] * finished


def test_a_torch_writer_on_a_full_disk_is_recognised() -> None:
    """It raises a RuntimeError about a position."""
    code = (
        "import torch\nfrom trainwright.runtime.stages import stage_verb\n"
        "@stage_verb\ndef save():\n    torch.save(torch.zeros(100_000), '/dev/full')\nsave()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 31
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not disk.says_disk_full("RuntimeError: PytorchStreamReader failed reading zip archive")


# What is not installed


def test_packages_that_are_missing_are_named_before_the_first_stage_starts(bundle: Made) -> None:
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",), packages=("json",))
    bundle.add("tune", LEAVE, needs=("read",), packages=("no_such_package", "json"))
    bundle.add("align", LEAVE, needs=("tune",), packages=("no_such_package", "nor_this"))
    err = bundle.run(code=26).err
    assert err == (
        "error: not installed: no_such_package (for tune, align); nor_this (for align); install what is missing with:"
        " pip install 'trainwright[run]'\n"
    )
    assert bundle.ran() == []
    bundle.run("--only", "read")
    assert bundle.ran() == ["read"], "it lacks nothing"


def test_what_is_done_needs_no_packages(chain: Made) -> None:
    chain.run()
    chain.edit_manifest('"packages": []', '"packages": ["no_such_package"]')
    chain.run()
    chain.edit("read", "leave(", "same = 1\nleave(")
    assert "no_such_package (for read)" in chain.run(code=26).err, "it is not done any more"


def test_each_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, bundle: Made) -> None:
    bundle.add("curate", LEAVE, packages=("datatrove", "rensa"))
    bundle.add("evaluate", LEAVE, packages=("lm_eval",))
    bundle.add("sft", LEAVE, ranks=1, packages=("nemo", "transformers"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingExtra, match=r"pip install 'trainwright\[data\]'$"):
        packages.require_packages(bundle.stages[:1])
    with pytest.raises(errors.MissingExtra, match=r"torch \(for sft\); .*trainwright\[data,eval,run\]'$"):
        packages.require_packages(bundle.stages)
    assert "trainwright[eval]'" in str(packages.missing_package(bundle.stages[1], "lm_eval.api"))
    assert "trainwright[run]'" in str(packages.missing_package(bundle.stages[2], "megatron.core"))


# Models of other bundles


def make_step(folder: Path, step: int, weights: bytes = b"0" * 300_000) -> Path:
    made = folder / f"step-{step:06d}"
    made.mkdir(parents=True)
    (made / "__0_0.distcp").write_bytes(weights)
    for name in ("metadata.json", "run.json"):
        (made / name).write_text(json.dumps({"step": step}))
    return made


@pytest.mark.parametrize(
    "named", ["other/work/pretrain", "other/work/pretrain/checkpoints", "other/work/pretrain/checkpoints/step-000020"]
)
def test_a_stage_that_starts_from_another_bundles_model_runs_again_when_that_changes(bundle: Made, named: str) -> None:
    checkpoints = bundle.path.parent / "other/work/pretrain/checkpoints"
    make_step(checkpoints, 10)
    newest = make_step(checkpoints, 20)
    bundle.add("sft", LEAVE, inputs=(named,))
    bundle.run()
    (make_step(checkpoints, 30) / "run.json").unlink()  # torn: not the newest complete one
    shutil.rmtree(checkpoints / "step-000010")
    assert "sft: unchanged" in bundle.run().out
    (newest / "__0_0.distcp").write_bytes(b"1" + b"0" * 299_999)
    assert f"sft: runs again: {named} changed" in bundle.run().out
    if not named.endswith("20"):
        make_step(checkpoints, 40)
        assert f"sft: would run: {named} changed" in bundle.run(verb="status").out


def test_a_folder_without_a_model_is_refused(bundle: Made) -> None:
    (bundle.path.parent / "models/step-000001").mkdir(parents=True)
    bundle.add("sft", LEAVE, inputs=("models/",))
    err = bundle.run(code=21).err
    models = bundle.path.parent / "models"
    assert err == (
        f"error: sft: {models} has no complete checkpoint; {models} holds step-000001 (torn): name a step folder, a checkpoints"
        f" folder, or the folder of a stage that trains; where data are meant, name the files: {models}/*.jsonl\n"
    )
    shutil.rmtree(bundle.path.parent / "models")
    assert f"error: sft: no file matches models/ below {bundle.path.parent}" in bundle.run(code=21).err
    assert bundle.ran() == []


# What accumulates


def test_of_what_earlier_attempts_left_the_newest_two_stay(chain: Made) -> None:
    """And what a stage of the bundle reads."""
    for number in range(2, 6):
        said = chain.run("--from", "close") if number > 2 else chain.run()
    work = chain.path / "work/close"
    assert sorted(path.name for path in work.glob("previous-*")) == ["previous-2", "previous-3"]
    assert f"close: deleted {work}/previous-1, which newer ones have replaced" in said.out
    make_step(work / "previous-2" / "checkpoints", 1)
    chain.add("tune", LEAVE, inputs=(str(work / "previous-2" / "checkpoints"),))
    chain.run("--from", "close")
    assert sorted(path.name for path in work.glob("previous-*")) == ["previous-2", "previous-3", "previous-4"]


# Status


def test_status_as_json_while_it_runs_and_after(bundle: Made) -> None:
    progress = '(WORK / NAME / "progress.json").write_text(\'{"done": 3, "total": 10, "unit": "documents"}\')\n'
    row = '(WORK / NAME / "metrics.jsonl").write_text(\'{"step": 3, "loss": 4.5678}\\n\')\n'
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",))
    bundle.add("sleeper", progress + row + SLEEP_ONCE, needs=("read",))
    pending = json.loads(bundle.run("--json", verb="status").out)
    assert [(stage["state"], stage["would_run"]) for stage in pending["stages"]] == [
        ("pending", "it has not run yet")
    ] * 2
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, 1))
        during = json.loads(bundle.run("--json", verb="status").out)
        assert during["locked"] is True
        assert during["runner"]["pid"] == process.pid
        read, sleeper = during["stages"]
        assert (read["state"], read["key_figure"], read["would_run"]) == ("done", "first", None)
        assert sleeper["state"] == "running"
        assert sleeper["progress"] == {"done": 3, "total": 10, "unit": "documents"}
        assert 0 < sleeper["duration_s"] < 60
        plain = bundle.run(verb="status").out
        assert re.search(r"^sleeper +running +\d+\.\d s +3 of 10 documents; loss 4\.568$", plain, re.MULTILINE)
        process.kill()
        process.wait()
    killed = json.loads(bundle.run("--json", verb="status").out)
    assert (killed["locked"], killed["runner"]) == (False, None)
    assert killed["stages"][1]["state"] == "interrupted"
    assert killed["stages"][1]["would_run"] == "it was interrupted"
    bundle.run()
    after = json.loads(bundle.run("--json", verb="status").out)
    assert [
        (stage["name"], stage["state"], stage["attempts"], stage["exit_code"], stage["would_run"])
        for stage in after["stages"]
    ] == [
        ("read", "done", 1, 0, ""),
        ("sleeper", "done", 2, 0, ""),
    ]
    assert after["work"] == str(bundle.path / "work")
    assert after["run_id"] == "0123abcd"
