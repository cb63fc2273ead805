"""The runner, with real bundles of small programs and real processes (torchrun's agent imports torch: 2 to 4 s each time)."""

import contextlib
import dataclasses
import fcntl
import io
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from launch_support import (
    COPY_INPUT,
    LEAVE,
    PRELUDE,
    SLEEP,
    SLEEP_ONCE,
    Made,
    asleep,
    is_alive,
    started,
    wait_for,
)
from rich.console import Console

from trainwright.runtime import cli, errors
from trainwright.runtime.launch import show
from trainwright.runtime.launch.lock import lock_work


def test_stages_run_in_order_with_their_environment(chain: Made) -> None:
    said = chain.run(OMP_NUM_THREADS="")
    rows = chain.trace()
    assert [row["name"] for row in rows] == ["read", "count", "close"]
    assert {row["TRAINWRIGHT_DATA_ROOT"] for row in rows} == {str(chain.path.parent)}
    table = said.out[said.out.index("\nstage ") :]
    assert re.search(r"^close +done +\d+\.\d s +42 documents$", table, re.MULTILINE)
    assert f"report: {chain.path}/work/report.html" in said.out
    assert (chain.path / "work" / "report.html").exists()
    assert chain.state("count") | {"started": "", "ended": "", "duration_s": 0} == {
        "state": "done",
        "attempts": 1,
        "exit_code": 0,
        "program_id": chain.stages[1].program_id,
        "inputs": {"stage:read": chain.state("read")["output_id"]},
        "output_id": chain.state("count")["output_id"],
        "started": "",
        "ended": "",
        "duration_s": 0,
        "note": "",
    }


def test_threads_are_set_unless_the_user_did(bundle: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.add("one", LEAVE)
    bundle.add("two", LEAVE, ranks=2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    bundle.run()
    rows = bundle.trace()
    cores = str(len(os.sched_getaffinity(0)))
    assert [(row["name"], row["OMP_NUM_THREADS"]) for row in rows] == [("one", cores), ("two", "1"), ("two", "1")]
    bundle.run("--from", "one", OMP_NUM_THREADS="3")
    assert {row["OMP_NUM_THREADS"] for row in bundle.trace()} == {"3"}


def test_torchrun_gives_each_rank_a_log_and_keeps_earlier_attempts(bundle: Made) -> None:
    bundle.add("world", 'print("from", RANK)\nprint("to stderr", RANK, file=sys.stderr)\n' + LEAVE, ranks=2)
    bundle.run()
    rows = bundle.trace()
    assert sorted((row["rank"], row["WORLD_SIZE"]) for row in rows) == [(0, "2"), (1, "2")]
    assert len({row["MASTER_PORT"] for row in rows}) == 1
    bundle.run("--from", "world")
    for rank in (0, 1):
        lines = (bundle.path / "work" / "world" / "log" / f"rank-{rank}.log").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == [
            "=== world: attempt 1",
            f"from {rank}",
            f"to stderr {rank}",
            "=== world: attempt 2",
            f"from {rank}",
            f"to stderr {rank}",
        ]


def test_an_unchanged_bundle_runs_nothing_again(chain: Made) -> None:
    chain.run()
    assert chain.ran() == ["read", "count", "close"]
    said = chain.run()
    assert chain.ran() == []
    assert said.out.count("unchanged, done at") == 3
    assert "every stage is done" in chain.run(verb="status").out


def test_a_changed_program_runs_again_and_what_follows_only_if_its_output_changed(chain: Made) -> None:
    chain.run()
    chain.trace()
    chain.edit("count", "leave(str(len(", "leave(str(2 * len(")
    assert (
        "count: would run: its program changed\nclose: would run if the output of count" in chain.run(verb="status").out
    )
    said = chain.run()
    assert "edited by hand: 02_count.py" in said.out
    assert "count: runs again: its program changed" in said.out
    assert "close: runs again: the output of count changed" in said.out
    assert chain.ran() == ["count", "close"]
    chain.edit("count", "leave(", "same = 1\nleave(")
    chain.run()
    assert chain.ran() == ["count"], "the same output: nothing follows"


def test_what_a_done_stage_left_is_kept_when_it_runs_again(chain: Made) -> None:
    """An edited program may find its checkpoints (another layout resumes them); a forced run begins with nothing."""
    chain.run()
    (chain.path / "work" / "count" / "checkpoints").mkdir()
    chain.edit("count", "leave(str(", 'assert not (WORK / "count/output").exists()\nleave("n" + str(')
    chain.run()
    assert (chain.path / "work/count/previous-1/output/result.txt").read_text() == "5"
    assert (chain.path / "work/count/checkpoints").is_dir()
    assert (chain.path / "work/count/output/result.txt").read_text() == "n5"
    chain.run("--from", "count")
    assert (chain.path / "work/count/previous-2/checkpoints").is_dir()
    assert not (chain.path / "work/count/checkpoints").exists()


def test_an_edit_of_a_docstring_is_said_and_runs_nothing(chain: Made) -> None:
    chain.run()
    chain.trace()
    chain.edit("read", '"""A program of the test."""', '"""Expected: 3 s."""')
    assert "edited by hand: 01_read.py" in chain.run().out
    assert chain.ran() == []


def test_a_changed_input_file_runs_the_stage_that_reads_it(chain: Made) -> None:
    chain.run()
    chain.trace()
    corpus = chain.path.parent / "corpus"
    os.utime(corpus / "a.txt", (1, 1))
    chain.run()
    assert chain.ran() == [], "touched, not changed"
    (corpus / "b.txt").write_text("!")
    said = chain.run()
    assert "read: runs again: corpus/*.txt changed" in said.out
    assert chain.ran() == ["read", "count", "close"]
    corpus.rename(corpus.with_name("away"))
    assert "read: would run: no file matches corpus/*.txt here" in chain.run(verb="status").out


def test_a_file_changed_within_the_clock_tick_is_seen(chain: Made) -> None:
    """Same size, same modification time: while a file is recent (here: always), its content is read again."""
    file = chain.path.parent / "corpus" / "a.txt"
    stamp = (time.time_ns() // 10**9 + 3600) * 10**9
    os.utime(file, ns=(stamp, stamp))
    chain.run()
    file.write_text("FIRST")
    os.utime(file, ns=(stamp, stamp))
    chain.trace()
    chain.run()
    assert chain.ran()[:1] == ["read"]


@pytest.mark.parametrize(
    ("path", "why"), [("result.txt", "its output changed"), ("summary.json", "summary.json is gone")]
)
def test_a_deleted_output_runs_its_stage_again(chain: Made, path: str, why: str) -> None:
    chain.run()
    chain.trace()
    (chain.path / "work" / "count" / "output" / path).unlink()
    assert why in chain.run().out
    assert chain.ran() == ["count"]


def test_only_and_from(chain: Made) -> None:
    said = chain.run("--only", "count", code=21)
    assert "count: needs stage read, which is not done (it is pending); run that first: --only read" in said.err
    chain.run("--only", "read")
    chain.run("--only", "count")
    assert chain.ran() == ["read", "count"]
    said = chain.run("--from", "count")
    assert "count: runs again: --from count" in said.out
    assert chain.ran() == ["count", "close"]


def test_an_unknown_stage_name_suggests_the_nearest(chain: Made) -> None:
    said = chain.run("--only", "cuont", code=20)
    assert "no stage is called 'cuont'; did you mean count? its stages are read, count, close" in said.err
    assert not (chain.path / "work").exists()


def test_data_root_and_work_are_taken_from_the_command_line(chain: Made, tmp_path: Path) -> None:
    (tmp_path / "other" / "corpus").mkdir(parents=True)
    (tmp_path / "other" / "corpus" / "c.txt").write_text("elsewhere")
    chain.run("--data-root", str(tmp_path / "other"), "--work", str(tmp_path / "w"))
    assert (tmp_path / "w" / "read" / "output" / "result.txt").read_text() == "elsewhere"
    assert not (chain.path / "work").exists()


def test_missing_data_is_refused_before_anything_starts(chain: Made) -> None:
    (chain.path.parent / "corpus" / "a.txt").unlink()
    said = chain.run(code=21)
    assert f"error: read: no file matches corpus/*.txt below {chain.path.parent}" in said.err
    assert chain.ran() == []


def test_a_failing_stage_ends_the_run_with_its_log(chain: Made) -> None:
    chain.edit(
        "count", "leave(str(", 'print("\\n".join(f"line {n}" for n in range(30)))\nraise ValueError("no")\nleave(str('
    )
    said = chain.run(code=22)
    assert "error: count: rank 0 of 1 ended with exit code 1; its log ends so:" in said.err
    assert "ValueError: no" in said.err
    assert "line 29" in said.err
    assert "line 9\n" not in said.err
    assert f"log: {chain.path}/work/count/log/rank-0.log" in said.err
    assert re.search(r"^count +failed ", said.out, re.MULTILINE)
    assert chain.state("count")["state"] == "failed"
    assert chain.state("count")["exit_code"] == 1
    assert chain.state("read")["state"] == "done"
    chain.trace()
    chain.edit("count", 'raise ValueError("no")\n', "")
    said = chain.run()
    assert "count: goes on: it failed (rank 0 of 1 ended with exit code 1)" in said.out
    assert chain.ran() == ["count", "close"], "what was finished is not lost"


def test_a_stages_own_error_is_passed_on(bundle: Made) -> None:
    error = 'print("error: step-7 is damaged\\n  delete it", file=sys.stderr)'
    body = f"if RANK == 1:\n    {error}\n    sys.exit(25)\ntime.sleep(60)\n"
    bundle.add("world", body, ranks=2)
    said = bundle.run(code=25)
    log = bundle.path / "work/world/log/rank-1.log"
    assert said.err == f"error: world: step-7 is damaged\n         delete it\n         log: {log}\n"


def test_a_program_that_leaves_no_result_has_failed(bundle: Made) -> None:
    bundle.add("empty", 'print("nothing to do")\n')
    assert "ended without an error, but it left no output" in bundle.run(code=22).err


def test_a_killed_rank_is_named(bundle: Made) -> None:
    """Rank 0 fails because of it, and first in rank order; the killed one is the one to blame."""
    body = (
        'if RANK == 1:\n    print("the last words", flush=True)\n    (WORK / "dead").touch()\n'
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        'while not (WORK / "dead").exists():\n    time.sleep(0.01)\nraise ConnectionError("peer is gone")\n'
    )
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",))
    bundle.add("world", body, needs=("read",), ranks=2)
    said = bundle.run(code=23)
    assert "error: world: rank 1 of 2 was killed by SIGKILL (often the out-of-memory killer: see dmesg)" in said.err
    assert "the last words" in said.err
    assert bundle.state("world")["exit_code"] == -signal.SIGKILL
    bundle.trace()
    bundle.program("world").write_text(PRELUDE.format(name="world") + LEAVE)
    bundle.run()
    assert bundle.ran() == ["world"]


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_an_interrupted_run_ends_its_processes_and_goes_on(bundle: Made, number: signal.Signals, ranks: int) -> None:
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",))
    bundle.add("sleeper", SLEEP_ONCE, needs=("read",), ranks=ranks)
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, ranks or 1))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    assert "interrupted; the same command goes on from here" in out
    assert bundle.state("sleeper")["state"] == "interrupted"
    assert not any(is_alive(row["pid"]) for row in bundle.trace())
    assert "sleeper: goes on: it was interrupted" in bundle.run().out
    assert bundle.ran() == ["sleeper"]
    assert bundle.state("sleeper")["attempts"] == 2


def test_a_second_ctrl_c_does_not_wait(bundle: Made) -> None:
    bundle.add("deaf", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP)
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, 1))
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None, "it waits for the stage to end by itself"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert not is_alive(bundle.trace()[0]["pid"])
    assert bundle.state("deaf")["state"] == "interrupted"


def test_a_killed_runner_leaves_no_process_and_the_next_run_goes_on(bundle: Made) -> None:
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",))
    bundle.add("sleeper", SLEEP_ONCE, needs=("read",), ranks=2)
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, 2))
        assert "a run is executing now" in bundle.run(verb="status").out
        process.kill()
        process.wait()
    pids = [row["pid"] for row in bundle.trace()]
    wait_for(lambda: not any(is_alive(pid) for pid in pids), seconds=10)
    assert re.search(r"^sleeper +interrupted ", bundle.run(verb="status").out, re.MULTILINE)
    said = bundle.run()
    assert "sleeper: an earlier run was killed while this stage was running" in said.out
    assert bundle.ran() == ["sleeper"]


def test_an_interrupted_stage_whose_input_changed_begins_afresh(bundle: Made) -> None:
    """It would otherwise resume work on the old input."""
    bundle.add("read", COPY_INPUT + 'if "second" not in os.environ:\n    sys.exit(3)\n', inputs=("corpus/*.txt",))
    bundle.run(code=22)
    assert "read: goes on" in bundle.run(code=22).out
    assert (bundle.path / "work/read/output").exists()
    (bundle.path.parent / "corpus" / "a.txt").write_text("another")
    said = bundle.run(second="1")
    assert "read: runs again: it failed" in said.out
    assert (bundle.path / "work/read/previous-2/output/result.txt").read_text() == "first"


def test_a_package_that_is_not_installed_is_named_with_the_fix(bundle: Made) -> None:
    bundle.add("one", "import no_such_package\n")
    err = bundle.run(code=26).err
    assert "error: one: the package no_such_package is not installed" in err
    assert "pip install 'trainwright[run]'" in err
    assert "Traceback" not in err


def test_a_port_in_use_is_refused_before_anything_starts(bundle: Made) -> None:
    bundle.add("one", LEAVE)
    bundle.add("two", LEAVE, ranks=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = bundle.run("--port", str(port), code=24)
    assert f"error: port {port} cannot be used (Address already in use)" in said.err
    assert "leave --port out" in said.err
    assert bundle.ran() == []
    bundle.run("--port", str(port))
    assert {row["MASTER_PORT"] for row in bundle.trace() if row["name"] == "two"} == {str(port)}


def test_two_runs_of_one_folder_do_not_meet(bundle: Made) -> None:
    """The message names the other run; a runner that was killed holds nothing, and the next one says whose run that was."""
    bundle.add("sleeper", SLEEP_ONCE)
    with started(bundle) as process:
        wait_for(lambda: asleep(bundle, 1))
        who = rf"process {process.pid} on {re.escape(socket.gethostname())} since 20\d\d-\S+\+00:00"
        err = bundle.run(code=27).err
        assert re.fullmatch(
            rf"error: {bundle.path}/work: another run is executing there \({who}\); wait for it, stop it, .*\n", err
        )
        assert re.search(rf"^a run is executing now: {who}$", bundle.run(verb="status").out, re.MULTILINE)
        process.kill()
        process.wait()
    said = bundle.run()
    assert re.search(rf"^an earlier run was killed: {who}$", said.out, re.MULTILINE)
    assert "was killed" not in bundle.run().out, "a run that ended left its lock in order"
    assert (bundle.path / "work/run.lock").read_text() == ""


def test_a_glance_at_the_lock_is_no_other_run(tmp_path: Path) -> None:
    """As `status` takes it, for a moment."""
    with (tmp_path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        moment = threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN))
        moment.start()
        with lock_work(tmp_path):
            moment.join()


def test_of_runs_that_start_at_the_same_instant_one_executes(chain: Made) -> None:
    chain.edit("read", "leave(", "time.sleep(2)\nleave(")
    runs = [subprocess.Popen(chain.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
    for process in runs:
        process.communicate(timeout=60)
    assert sorted(process.returncode for process in runs) == [0, 27, 27, 27]
    assert chain.ran() == ["read", "count", "close"]


def test_a_manifest_of_another_version_is_refused(chain: Made) -> None:
    chain.seal(schema_version=99)
    said = chain.run(code=20)
    assert "schema version 99; this trainwright reads version 1; compile its spec into another folder" in said.err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("manifest.json", None, "so it is not a bundle"),
        ("manifest.json", "{", "it is not a manifest"),
        ("02_count.py", None, "the program 02_count.py of stage count is missing"),
        ("02_count.py", "x = 1\ndef main(:\n", "02_count.py:2: invalid syntax"),
        ("work/state.json", "{}", "state.json: is damaged (stages is missing); delete it"),
        ("work/state.json", "[" * 100_000, "state.json: is damaged"),
        (
            "work/state.json",
            '{"stages": {"read": {"state": "done", "attempts": "x"}}}',
            'stages.read.attempts should be a whole number, not "x"',
        ),
        (
            "work/state.json",
            '{"stages": {"read": {"state": "done", "duration_s": NaN}}}',
            "stages.read.duration_s should be a number, not NaN",
        ),
    ],
)
def test_a_damaged_bundle_is_refused(chain: Made, name: str, text: str | None, message: str) -> None:
    (chain.path / "work").mkdir()
    if text is None:
        (chain.path / name).unlink()
    else:
        (chain.path / name).write_text(text)
    assert message in chain.run(code=20).err
    assert chain.ran() == []


@pytest.mark.parametrize("verb", ["run", "status"])
def test_a_damaged_manifest_is_refused_with_a_fix_that_works(chain: Made, tmp_path: Path, verb: str) -> None:
    """The fix: another folder, and the old work folder."""
    chain.run()
    chain.trace()
    manifest = chain.path / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"nodes": 1', '"nodes": "x"', 1))
    err = chain.run(code=20, verb=verb).err
    work = chain.path / "work"
    assert err == (
        f'error: {manifest}: it is damaged (stages[0].nodes should be a whole number, not "x"); compile its spec into'
        f" another folder (`trainwright compile SPEC -o FOLDER`) and run that; --work {work} goes on with what is done\n"
    )
    manifest.write_text(whole)
    other = Made(chain.path.rename(tmp_path / "other"), chain.stages)
    said = other.run("--work", str(other.path / "work"), verb=verb)
    assert ("every stage is done" if verb == "status" else "close: unchanged") in said.out


def test_later_additions_to_state_and_manifest_are_passed_over(chain: Made) -> None:
    chain.run()
    chain.trace()
    for name in ("manifest.json", "work/state.json"):
        text = re.sub(r',\s*"seal": "\w+"', "", (chain.path / name).read_text())  # whoever writes more seals more
        (chain.path / name).write_text(
            text.replace('"name": "read"', '"name": "read", "later": 1').replace("{", '{"new": 1, ', 1)
        )
    assert chain.run().out.count("unchanged, done at") == 3


def test_a_damaged_cache_of_hashes_is_only_slower(chain: Made) -> None:
    chain.run()
    for text in ("5", '{"read/output/summary.json": 7}', "["):
        (chain.path / "work/hashes.json").write_text(text)
        assert chain.run().out.count("unchanged, done at") == 3


@pytest.mark.parametrize("verb", ["run", "status"])
def test_a_work_folder_that_cannot_be_one_is_refused(chain: Made, tmp_path: Path, verb: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "odd" / "state.json").mkdir(parents=True)
    for name, reason in {
        "file": "it is not a folder",
        "file/below": "Not a directory",
        "loop": "it is not a folder",
        "odd": f"{tmp_path}/odd/state.json: Is a directory",
    }.items():
        err = chain.run("--work", str(tmp_path / name), code=20, verb=verb).err
        assert err.startswith(f"error: {tmp_path / name}: cannot be the work folder (")
        assert reason in err
        assert err.endswith("; make it usable, or name another with --work\n")
    assert chain.run("--work", "/proc/none/of/it", code=20).err.startswith("error: /proc/none/of/it: cannot be")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_work_folder_without_permission_is_refused(chain: Made, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    assert "Permission denied" in chain.run("--work", str(tmp_path / "mine"), code=20).err
    assert "Permission denied" in chain.run("--work", str(tmp_path / "mine" / "below"), code=20).err
    (chain.path / "work").mkdir(mode=0o000)
    for verb in ("run", "status"):
        assert "Permission denied" in chain.run(code=20, verb=verb).err


@pytest.mark.parametrize("verb", ["run", "status"])
def test_an_input_that_cannot_be_read_is_one_message(chain: Made, verb: str) -> None:
    corpus = chain.path.parent / "corpus"
    bad = corpus / "b.txt"
    bad.symlink_to("nowhere.txt")
    err = chain.run(code=21, verb=verb).err
    assert err == (
        f"error: {bad}: the link to nowhere.txt cannot be read (No such file or directory); make it readable, or move it away\n"
    )
    bad.unlink()
    bad.symlink_to("/proc/self/mem")  # a regular file whose reading fails, for root too
    assert "cannot be read (Input/output error)" in chain.run(code=21, verb=verb).err
    bad.unlink()
    if os.geteuid() != 0:
        bad.touch(mode=0o000)
        assert f"error: {bad}: it cannot be read (Permission denied)" in chain.run(code=21, verb=verb).err
    assert chain.ran() == []


def test_what_is_no_bundle_is_refused_with_commands_that_work(tmp_path: Path) -> None:
    spec, folder = tmp_path / "tiny.yaml", tmp_path / "tiny"
    spec.write_text("name: tiny\n")
    commands = "error: {0}: is a spec, not a bundle; compile it, then run what that wrote:\n"
    commands += "       trainwright compile {0} -o {1}\n       trainwright run {1}\n"
    assert Made(spec).run(code=20).err == commands.format(spec, folder)
    assert (
        f"there is no such folder; make a bundle with `trainwright compile SPEC -o {folder}`"
        in Made(folder).run(code=20).err
    )
    folder.mkdir()
    assert (
        f"so it is not a bundle; make a bundle with `trainwright compile SPEC -o {folder}`"
        in Made(folder).run(code=20).err
    )
    (folder / "notes").touch()
    for verb in ("run", "status"):
        err = Made(folder).run(code=20, verb=verb).err
        assert "so it is not a bundle; name the folder that `trainwright compile` wrote\n" in err
    assert Made(spec).run(code=20).err == commands.format(spec, tmp_path / "tiny-bundle"), "compile would refuse tiny"
    assert "name the folder that" in Made(folder / "notes").run(code=20).err
    (folder / "manifest.json").touch()
    assert Made(folder / "notes").run(code=20).err.endswith(f"a bundle is a folder; name {folder}\n")


def test_only_and_from_exclude_each_other(chain: Made) -> None:
    said = chain.run("--only", "close", "--from", "read", code=20)
    assert said.err == "error: --only and --from cannot be combined; give one of them\n"
    with pytest.raises(errors.BundleError, match="cannot be combined"):
        cli.run_bundle(chain.path, only=("close",), start="read")
    assert chain.ran() == []


def test_an_error_cannot_steer_the_terminal(chain: Made) -> None:
    err = chain.run("--data-root", "/none\x1b[2J\nerror: forged", code=21).err
    assert "below /none\\x1b[2J\n       error: forged" in err


def test_a_terminal_that_cannot_spell_a_character_is_no_failure(bundle: Made) -> None:
    bundle.add("talk", 'leave("42 \N{GREEK SMALL LETTER MU}")\n')
    assert "42 \\u03bc" in bundle.run(PYTHONIOENCODING="ascii").out


def test_a_stage_name_cannot_lead_out_of_the_work_folder(bundle: Made) -> None:
    bundle.add("fine", LEAVE)
    bundle.edit_manifest('"name": "fine"', '"name": "../fine"')
    assert "stage name '../fine'" in bundle.run(code=20).err


def test_an_edited_manifest_is_refused(bundle: Made) -> None:
    bundle.add("one", LEAVE)
    manifest = bundle.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"nodes": 1', '"nodes": 2', 1))
    assert "it was edited after it was compiled (its seal is" in bundle.run(code=20).err


@pytest.mark.parametrize("name", ["manifest.json", "01_one.py"])
def test_a_link_out_of_the_bundle_is_refused(bundle: Made, tmp_path: Path, name: str) -> None:
    bundle.add("one", LEAVE)
    outside = (bundle.path / name).rename(tmp_path / "elsewhere")
    (bundle.path / name).symlink_to(outside)
    assert f"{name} leads out of the bundle, to {outside}" in bundle.run(code=20).err


def test_a_bundle_for_many_nodes_is_refused(bundle: Made) -> None:
    bundle.add("read", LEAVE, inputs=("absent/*",))
    bundle.add("one", LEAVE)
    bundle.stages[-1] = dataclasses.replace(bundle.stages[-1], nodes=32)
    bundle.seal()
    assert "one: is for 32 nodes of 1 processes; start" in bundle.run(code=28).err


def test_text_from_a_model_cannot_steer_the_terminal(bundle: Made) -> None:
    bundle.add("talk", 'leave("ok \\x1b[2J", sample="a\\x1b]0;b\\x07 [bold]c[/bold]")\n')
    out = bundle.run().out
    assert "a\N{REPLACEMENT CHARACTER}]0;b\N{REPLACEMENT CHARACTER} [bold]c[/bold]" in out


PROGRESS = """
(WORK / NAME / "progress.json").write_text('{"done": 3, "total": 10, "unit": "documents"}')
(WORK / NAME / "metrics.jsonl").write_text('{"step": 3, "loss": 4.5678, "tokens_per_s": 1234.5}\\n')
time.sleep(2.5)
"""


def test_a_terminal_shows_how_far_a_stage_is(bundle: Made) -> None:
    bundle.add("slow", PROGRESS + LEAVE)
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen(bundle.command(), stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        text = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while block := os.read(screen, 65536):
                text += block
    os.close(screen)
    assert process.returncode == 0
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())
    assert re.search(r"slow .* 3 of 10 documents .* loss 4\.568, 1,23[45] tokens/s", seen)
    assert "stages" in seen
    assert "slow   done" in seen


def test_without_a_terminal_progress_is_a_line_now_and_then(bundle: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, because the interval is half a minute."""
    bundle.add("slow", PROGRESS + LEAVE)
    monkeypatch.setattr(show, "PLAIN_EVERY_S", 1.5)
    out = io.StringIO()
    monkeypatch.setattr(cli, "open_console", lambda: Console(file=out, markup=False, highlight=False, soft_wrap=True))
    assert cli.run_bundle(bundle.path) == 0
    assert re.search(
        r"^slow: 3 of 10 documents; loss 4\.568, 1,23[45] tokens/s \(\d\.\d s\)$", out.getvalue(), re.MULTILINE
    )


def test_the_runner_imports_no_torch() -> None:
    code = "import sys; import trainwright.runtime.__main__; print({'torch', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
