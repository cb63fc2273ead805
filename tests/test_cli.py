"""The command line as a user meets it: a process, its output, its exit code, and the files it leaves."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.compiler.plan import decided_leaves, read_plan
from trainwright.runtime.manifest import file_hash, read_manifest

ROOT = Path(__file__).resolve().parents[1]
TRAINWRIGHT = str(Path(sys.executable).with_name("trainwright"))
TINY = str(ROOT / "specs" / "tiny.yaml")
# Slow to import, or nothing that help needs.
HEAVY = ("torch", "scipy", "numpy", "pydantic", "jinja2", "networkx", "ruamel.yaml", "trainwright.runtime.cli")


def trainwright(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRAINWRIGHT, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(result: subprocess.CompletedProcess[str], exit_code: int, *fragments: str) -> None:
    assert (result.returncode, result.stdout) == (exit_code, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "deep" / "bundle"
    result = trainwright("compile", TINY, "-o", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys\n"
        "from trainwright.compiler.cli import main\n"
        "sys.argv = ['trainwright', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.stdout.endswith("\n[]\n"), result.stdout + result.stderr


@pytest.mark.parametrize("verb", ["check", "plan", "explain"])
def test_planning_imports_no_torch(verb: str) -> None:
    assert importlib.util.find_spec("torch") is not None, "without torch here, this test shows nothing"
    probe = (
        "import sys\n"
        "from trainwright.compiler.cli import main\n"
        f"sys.argv = ['trainwright', {verb!r}, {TINY!r}]\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "assert 'trainwright.compiler.choose' in sys.modules\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.stdout.endswith("\nFalse\n"), result.stdout + result.stderr


def test_the_help_of_every_verb_names_its_options() -> None:
    for verb, options in {
        "init": ["--preset"],
        "check": ["--set"],
        "plan": ["--set", "--json"],
        "explain": ["--set"],
        "compile": ["--set", "--out"],
        "run": ["--only", "--from", "--data-root", "--work", "--port"],
        "status": ["--data-root", "--work"],
        "diff": ["--set", "--json"],
        "schema": [],
    }.items():
        result = trainwright(verb, "--help")
        assert result.returncode == 0
        for option in options:
            assert f"{option} " in result.stdout, f"{verb} {option}"


def test_version() -> None:
    result = trainwright("--version")
    assert (result.returncode, result.stdout.split()[0]) == (0, "trainwright")


def test_init_writes_a_spec_that_checks_and_that_an_editor_completes(tmp_path: Path) -> None:
    for preset in ("tiny", "one_node", "many_nodes"):
        assert trainwright("init", f"{preset}/own.yaml", "--preset", preset, cwd=tmp_path).returncode == 0
        first, second = (tmp_path / preset / "own.yaml").read_text().splitlines()[:2]
        schema = first.removeprefix("# yaml-language-server: $schema=")
        assert json.loads((tmp_path / preset / schema).read_text()) == json.loads(trainwright("schema").stdout)
        assert second.startswith("# ")
        result = trainwright("check", f"{preset}/own.yaml", cwd=tmp_path)
        assert result.returncode == 0, result.stderr


def test_init_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("mine")
    refused(trainwright("init", cwd=tmp_path), 8, "tiny.yaml: exists already")
    assert (tmp_path / "tiny.yaml").read_text() == "mine"
    refused(trainwright("init", "--preset", "tny", cwd=tmp_path), 2, "did you mean tiny?")


def test_a_spec_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").touch()
    refused(
        trainwright("plan", "modle.yaml", cwd=tmp_path),
        8,
        "modle.yaml: there is no such file",
        "did you mean model.yaml?",
    )
    refused(trainwright("check", ".", cwd=tmp_path), 8, "cannot be read")


def test_a_spec_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_bytes(b"name: \xff\xfe")
    refused(trainwright("plan", "spec.yaml", cwd=tmp_path), 8, "spec.yaml: byte 6 is not UTF-8")


def test_control_characters_of_a_spec_are_not_sent_to_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text('name: "\\e[31mred"\n')
    result = trainwright("plan", "spec.yaml", cwd=tmp_path)
    refused(result, 3, r"\x1b[31mred")
    assert "\x1b" not in result.stderr


def test_check_warns_of_missing_data_and_passes(tmp_path: Path) -> None:
    result = trainwright("check", str(ROOT / "specs" / "one_node.yaml"), cwd=tmp_path)
    assert result.returncode == 0
    assert "warning: one_node.yaml:19: data.sources[0].path: no file matches corpus/web/*.jsonl.gz" in result.stderr
    (tmp_path / "corpus" / "web").mkdir(parents=True)
    (tmp_path / "corpus" / "web" / "a.jsonl.gz").touch()
    again = trainwright("check", str(ROOT / "specs" / "one_node.yaml"), cwd=tmp_path)
    assert "corpus/web" not in again.stderr
    assert "corpus/code" in again.stderr
    assert re.search(r"warning: one_node.yaml:\d+: stages.dpo.data: no file matches pairs/\*.jsonl;", again.stderr)
    stages = (
        "stages={sft: {from: ../base, data: a.jsonl, chat_template: t.j2}, evaluate: {tasks: {mc: {data: q.jsonl}}}}"
    )
    other = trainwright("check", str(ROOT / "specs" / "one_node.yaml"), "--set", stages, cwd=tmp_path).stderr
    assert [place for place in ("sft.from", "sft.data", "sft.chat_template", "evaluate.tasks.mc.data") if place in other] == [
        "sft.from", "sft.data", "sft.chat_template", "evaluate.tasks.mc.data"
    ]  # fmt: skip
    assert "data.sources" not in other, "nothing ingests them"


def test_plan_in_a_file_is_plain_and_whole() -> None:
    result = trainwright("plan", TINY, COLUMNS="40", FORCE_COLOR="")
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert not any(line != line.rstrip() for line in result.stdout.splitlines())
    plan = read_plan(trainwright("plan", TINY, "--json").stdout)
    lines = result.stdout.splitlines()
    assert lines[0] == f"tiny  (run {plan.run_id})"
    model = next(line for line in lines if line.startswith("model "))
    assert f"{plan.shape.num_layers} layers of {plan.shape.hidden_size}" in model
    assert model.endswith("vocabulary 2048")
    stages = {line.split()[0]: line for line in lines if "implied" in line or "written" in line}
    written = ["pretrain", "sft", "dpo", "evaluate", "export"]
    assert [name for name, line in stages.items() if "implied" in line] == ["ingest", "curate", "tokenizer", "tokenize"]
    assert [name for name, line in stages.items() if "written" in line] == written
    assert "python-stdlib:preferences, 1 epoch of " in stages["dpo"]
    assert stages["evaluate"].endswith("beside pretrain, sft; gates: accuracy/python-summaries 0.25")


def test_plan_of_tuning_alone_tells_of_no_pretraining() -> None:
    result = trainwright("plan", TINY, "--set", "stages={sft: {from: ../base, data: a.jsonl}}")
    assert result.returncode == 0, result.stderr
    names = [line.split("  ")[0] for line in result.stdout.splitlines()[1:] if line]
    assert names[:5] == ["model", "devices", "layout", "step", "memory"]
    assert "sft" in names


def test_one_of_a_kind_is_no_plural() -> None:
    shape = "model.shape={num_layers: 1, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 1}"
    pins = ("model={family: llama, vocab_size: 261, context_length: 16}", shape, "data.tokens=16", "layout.tensor=1")
    one = (*pins, "training={global_batch: 1 sequences}", "compute.devices_per_node=1")
    result = trainwright("plan", TINY, *(argument for pin in one for argument in ("--set", pin)))
    assert result.returncode == 0, result.stderr
    assert "1 layer of 64, ffn 128, 1 head of 64 (" in result.stdout
    assert "1 step x 1 sequence x 16 tokens (16 tokens a step)" in result.stdout
    assert "warm-up 0 steps\n" in result.stdout, "the only step has the peak"
    assert "1 node x 1 x cpu" in result.stdout


def test_explain_gives_a_reason_for_every_leaf() -> None:
    plan = read_plan(trainwright("plan", TINY, "--json").stdout)
    lines = trainwright("explain", TINY).stdout.splitlines()
    assert lines[0].split() == ["leaf", "value", "kind", "why"]
    assert [line.split()[0] for line in lines[1:]] == [path for path, _ in decided_leaves(plan)]
    for line, (path, _) in zip(lines[1:], decided_leaves(plan), strict=True):
        assert line.endswith(plan.reasons[path].text), "a reason is whole, on its leaf's line"


def test_explain_of_a_field() -> None:
    one = trainwright("explain", TINY, "layout.tensor").stdout
    assert one.startswith("layout.tensor = ")
    assert trainwright("explain", TINY, "tensor").stdout == one, "the last name is enough"
    part = trainwright("explain", TINY, "layout").stdout
    assert one in part
    assert "layout.pipeline = " in part
    assert "estimates.step_s = " in trainwright("explain", TINY, "estimates").stdout
    refused(trainwright("explain", TINY, "layout.tensr"), 2, "did you mean layout.tensor")


def test_explain_of_a_stage_by_its_name_in_the_spec() -> None:
    second = ("--set", "stages.again={kind: dpo, from: dpo, connector: 'python-stdlib:preferences'}")
    whole = trainwright("explain", TINY, "again", *second).stdout
    assert re.search(r"^stages\[\d+\]\.kind = dpo ", whole, re.MULTILINE)
    assert "dpo[1].training.epochs = 1 " in whole
    assert "dpo[0]" not in whole
    epochs = trainwright("explain", TINY, "stages.again.epochs", *second).stdout
    assert epochs.startswith("dpo[1].training.epochs = 1 ")
    assert len(epochs.splitlines()) == 2
    refused(trainwright("explain", TINY, "agian", *second), 2, "did you mean again")


def test_compile_leaves_the_manifest_s_files_and_says_what_is_next(bundle: Path) -> None:
    manifest = read_manifest((bundle / "manifest.json").read_text())
    assert {
        name: file_hash(data) for name, data in content(bundle).items() if name != "manifest.json"
    } == manifest.files
    assert os.access(bundle / "launch.sh", os.X_OK)
    result = trainwright("compile", TINY, "-o", str(bundle))
    assert f"next:  trainwright run {bundle}" in result.stdout
    assert "ingest (implied)" in result.stdout


def test_compile_over_a_bundle_keeps_its_run_and_removes_old_programs(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert trainwright("compile", TINY, "-o", str(out)).returncode == 0
    before = content(out)
    (out / "work").mkdir()
    (out / "work" / "state.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    shorter = trainwright("compile", TINY, "-o", str(out), "--set", "stages={ingest: {}}")
    assert shorter.returncode == 0, shorter.stderr
    after = content(out)
    gone = before.keys() - after.keys()
    assert gone
    assert gone == {name for name in before if name.endswith(".py") and name != "01_ingest.py"}
    assert (after["work/state.json"], after["notes.txt"]) == (b"{}", b"mine")
    assert not [name for name in after if name.startswith(".new")]
    assert trainwright("compile", TINY, "-o", str(out)).returncode == 0
    assert {name: data for name, data in content(out).items() if name in before} == before


def test_compile_does_not_overwrite_what_a_person_edited(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    trainwright("compile", TINY, "-o", str(out))
    program = next(out.glob("*_pretrain.py"))
    program.write_text(program.read_text() + "# my change\n")
    before = content(out)
    refused(trainwright("compile", TINY, "-o", str(out), "--set", "seed=5"), 8, f"{program}: edited by hand")
    assert content(out) == before
    program.unlink()
    assert trainwright("compile", TINY, "-o", str(out)).returncode == 0


def killed_at(move: int, out: Path, *arguments: str) -> None:
    """Compile to `out` in a process that dies just before it moves the file number `move` (from 0) into place."""
    probe = (
        "import os, sys\n"
        "from trainwright.compiler.cli import main\n"
        "move, moves = os.replace, []\n"
        "def counted(source, target):\n"
        f"    if len(moves) == {move}: os._exit(9)\n"
        "    moves.append(target)\n"
        "    move(source, target)\n"
        "os.replace = counted\n"
        f"sys.argv = ['trainwright', 'compile', {TINY!r}, '-o', {str(out)!r}, *{arguments!r}]\n"
        "main()"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 9


@pytest.mark.parametrize("move", [0, 3, 7])
def test_a_first_compile_that_was_killed_is_finished_by_the_next(move: int, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    killed_at(move, out)
    assert len([name for name in content(out) if "/" not in name]) == move, "the manifest is the last"
    assert not (out / "manifest.json").exists()
    result = trainwright("compile", TINY, "-o", str(out))
    assert result.returncode == 0, result.stderr
    assert content(out) == content(bundle)


def test_a_recompile_that_was_killed_is_no_edit_by_hand(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert trainwright("compile", TINY, "-o", str(out), "--set", "stages={ingest: {}}").returncode == 0
    killed_at(3, out, "--set", "seed=5")
    assert trainwright("compile", TINY, "-o", str(out), "--set", "stages={ingest: {}}").returncode == 0
    assert {name for name in content(out) if name.endswith(".py")} == {"01_ingest.py"}, "what it brought is removed"
    killed_at(3, out, "--set", "seed=5")
    (out / "01_ingest.py").write_text("# mine\n")
    refused(trainwright("compile", TINY, "-o", str(out)), 8, "01_ingest.py: edited by hand")
    (out / "01_ingest.py").unlink()
    assert trainwright("compile", TINY, "-o", str(out)).returncode == 0
    assert content(out) == content(bundle)


def test_compile_replaces_a_bundle_whose_manifest_is_damaged(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert trainwright("compile", TINY, "-o", str(out), "--set", "stages={data: {kind: ingest}}").returncode == 0
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest[: len(manifest) // 2])
    (out / "work").mkdir()
    (out / "notes.txt").write_text("mine")
    refused(trainwright("compile", TINY, "-o", str(out)), 8, "no readable manifest.json: notes.txt")
    (out / "notes.txt").unlink()
    result = trainwright("compile", TINY, "-o", str(out))
    assert result.returncode == 0, result.stderr
    assert content(out) == content(bundle), "without 01_data.py"
    assert (out / "work").is_dir()


def test_compile_refuses_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    refused(trainwright("compile", TINY, "-o", "home", cwd=tmp_path), 8, "home: not empty, and no bundle")
    refused(
        trainwright("compile", TINY, "-o", "home/thesis.txt", cwd=tmp_path),
        8,
        "a file stands where the bundle should go",
    )
    (tmp_path / "readme").mkdir()
    (tmp_path / "readme" / "README.md").write_text("mine")
    refused(trainwright("compile", TINY, "-o", "readme", cwd=tmp_path), 8, "readme: not empty, and no bundle")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "01_prepare.py").write_text("print('mine')\n")
    refused(trainwright("compile", TINY, "-o", "own", cwd=tmp_path), 8, "no readable manifest.json: 01_prepare.py")
    outside = {"files": {"../thesis.txt": "0" * 64}}
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "manifest.json").write_text(json.dumps(outside))
    (tmp_path / "thesis.txt").write_text("mine")
    assert trainwright("compile", TINY, "-o", "evil", cwd=tmp_path).returncode == 0
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    refused(trainwright("compile", TINY, "-o", "home/thesis.txt/x", cwd=tmp_path), 8)
    assert content(tmp_path / "home") == {"thesis.txt": b"mine"}


def test_a_wrong_command_line_is_exit_code_2() -> None:
    for arguments, fragment in (
        (["plan"], "Missing argument 'SPEC'; `trainwright plan --help`"),
        (["compile", TINY], "Missing option"),
        (["nonsense"], "nonsense"),
        (["plan", TINY, "--nonsense"], "--nonsense"),
        (["run", "x", "--port", "99999"], "`trainwright run --help`"),
    ):
        refused(trainwright(*arguments), 2, fragment)
    alone = trainwright()
    assert (alone.returncode, alone.stdout) == (0, trainwright("--help").stdout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("plan", TINY), ("plan", TINY, "--json"), ("schema",)], ids=" ".join)
def test_a_full_disk_is_one_error(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([TRAINWRIGHT, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (result.returncode, result.stderr.count("\n")) == (8, 1), result.stderr
    assert result.stderr.startswith("error: the output cannot be written: No space left on device")


def test_a_closed_pipe_is_no_traceback() -> None:
    result = subprocess.run(
        ["bash", "-c", f"{TRAINWRIGHT} explain {TINY} | head -1"], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.startswith("leaf")
    assert result.stderr == ""


def test_errors_of_the_runtime_keep_their_exit_code(tmp_path: Path) -> None:
    refused(trainwright("run", str(tmp_path)), 20, "manifest.json")
    refused(trainwright("status", str(tmp_path)), 20, "manifest.json")
