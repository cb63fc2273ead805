"""Plan in, bundle out, beyond the golden ones: what stages read, and programs of stages with everything or with nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainwright.compiler.choose import choose_plan
from trainwright.compiler.emit import Bundle, emit_bundle
from trainwright.compiler.errors import NotEmittedError
from trainwright.compiler.load import load_spec
from trainwright.compiler.resolve import resolve_spec

TINY = Path(__file__).resolve().parents[1] / "specs" / "tiny.yaml"
ELSEWHERE = (
    "stages={sft: {from: ../base/work/pretrain, data: 'chat/*.jsonl', chat_template: chat/template.jinja, retries: 2},"
    " look: {kind: evaluate, from: sft, compare: [../base/work/pretrain],"
    " tasks: {mc: {data: mc.jsonl}, stdlib: {connector: 'python-stdlib:choices'}}}, plain: {kind: evaluate, from: ./base}}"
)


def emitted(*overrides: str) -> Bundle:
    return emit_bundle(choose_plan(resolve_spec(load_spec(TINY, overrides))))


def test_the_manifest_says_what_of_the_user_s_each_stage_reads() -> None:
    stages = {stage.name: stage for stage in emitted(ELSEWHERE).manifest.stages}
    assert stages["sft"].inputs == ("chat/*.jsonl", "chat/template.jinja", "../base/work/pretrain")
    assert stages["look"].inputs == (
        "chat/*.jsonl",
        "mc.jsonl",
        "connector:python-stdlib:choices",
        "../base/work/pretrain",
    )
    assert stages["plain"].inputs == ("./base",)
    assert (stages["sft"].retries, stages["look"].retries) == (2, 0)
    assert (stages["sft"].needs, stages["look"].needs, stages["plain"].needs) == ((), ("sft",), ())


def test_programs_with_everything_or_nothing_are_formatted(tmp_path: Path) -> None:
    for name, content in emitted(ELSEWHERE).files.items():
        (tmp_path / name).write_bytes(content)
    ruff = [sys.executable, "-m", "ruff"]
    for arguments in (["check"], ["format", "--check"]):
        command = [*ruff, *arguments, "--isolated", "--no-cache", *map(str, tmp_path.glob("*.py"))]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_an_export_is_one_process_whatever_the_layout() -> None:
    bundle = emitted("layout.tensor=2")
    (export,) = (stage for stage in bundle.manifest.stages if stage.kind == "export")
    assert (export.launcher, export.processes_per_node) == ("python", 1)
    assert b"tensor_model_parallel_size=1," in bundle.files[export.program]
    assert b"tensor_model_parallel_size=2," in bundle.files["06_sft.py"]


@pytest.mark.parametrize("family", ["llama", "llama2", "qwen3", "gpt3"])
def test_these_families_are_exported(family: str) -> None:
    assert "09_export.py" in emitted(f"model.family={family}").files


def test_what_has_no_place_in_the_exported_format_is_refused_at_compile_time() -> None:
    """Only the export is: such a model is tuned like any other."""
    family = ("model.family=gpt3", "model.positions=alibi")
    with pytest.raises(NotEmittedError) as caught:
        emitted(*family)
    _, line = str(caught.value).splitlines()
    assert line.startswith(
        "  stages.export: gpt3 has alibi positions: of the Hugging Face formats GPT2 is nearest, and has no"
    )
    assert line.endswith(
        "nor have Llama, Qwen2, Qwen3, Mixtral, Qwen3Moe and DeepseekV3; leave the stage out, or take a family "
        "like llama, qwen3, mixtral, deepseek_v3 or gpt3"
    )
    stages = "stages={pretrain: {}, sft: {data: chat.jsonl}, dpo: {data: pairs.jsonl}, evaluate: {}}"
    assert "07_dpo.py" in emitted(*family, stages).files
