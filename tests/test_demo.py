"""What `make demo` promises: specs/tiny.yaml becomes a model that beats the bigram. About 4 minutes on 2 free cores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TRAINWRIGHT = Path(sys.executable).with_name("trainwright")


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_tiny_model_beats_the_bigram_on_packages_it_never_saw(repository: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "demo"
    for command in (["compile", repository / "specs" / "tiny.yaml", "-o", bundle], ["run", bundle]):
        done = subprocess.run([TRAINWRIGHT, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((bundle / "work" / "pretrain" / "output" / "summary.json").read_text())
    last = json.loads((bundle / "work" / "pretrain" / "metrics.jsonl").read_text().splitlines()[-1])
    print({key: value for key, value in summary.items() if key != "sample"})
    for figure in ("perplexity", "bits_per_byte"):
        assert last[f"test/{figure}"] < last[f"bigram/{figure}"]
    assert summary["key_figure"] in done.stdout
    assert str(bundle / "work" / "report.html") in done.stdout
    assert summary["sample"].split()[0] in done.stdout
    assert (
        "<svg" in (bundle / "work" / "report.html").read_text()
        or "Plotly" in (bundle / "work" / "report.html").read_text()
    )
