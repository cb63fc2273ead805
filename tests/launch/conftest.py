"""Makes the helper module of this folder importable by its tests (importlib mode puts no test folder on the path)."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch_support import COPY_INPUT, LEAVE, Made


@pytest.fixture
def bundle(tmp_path: Path) -> Made:
    path = tmp_path / "bundle"
    path.mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("first")
    return Made(path)


@pytest.fixture
def chain(bundle: Made) -> Made:
    """read -> count -> close: three stages of one process each."""
    bundle.add("read", COPY_INPUT, inputs=("corpus/*.txt",))
    bundle.add("count", 'leave(str(len((WORK / "read/output/result.txt").read_text())))\n', needs=("read",))
    bundle.add("close", LEAVE, needs=("count",))
    return bundle
