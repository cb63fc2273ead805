"""Programs drawn at random: what each holds and executes in shadow is what its plan says, exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("shadow_many.py")


@pytest.mark.full
@pytest.mark.parametrize(
    ("platform", "layer_spec", "seed"), [("cuda", "transformer_engine", 1), ("cuda", "local", 2), ("cpu", "local", 3)]
)
def test_drawn_programs_agree_with_their_plans(tmp_path: Path, platform: str, layer_spec: str, seed: int) -> None:
    """About 30 s each: 9 programs of ten families, layouts and recompute by a seeded rule."""
    count = 9
    done = subprocess.run(
        [sys.executable, SCRIPT, str(seed), str(count), platform, layer_spec, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert len(found) >= count
    wrong = [one for one in found if one["error"] or one["differences"]]
    assert not wrong, json.dumps(wrong[:3], indent=2)
