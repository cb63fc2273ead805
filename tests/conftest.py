"""Options and fixtures that all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None)  # the same examples every time, on any machine
settings.load_profile("seeded")

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write tests/golden anew instead of comparing with it"
    )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The project's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data, where there is one; tests that read it skip without."""
    folder = os.environ.get("TRAINWRIGHT_REFERENCE")
    if not folder:
        pytest.skip("TRAINWRIGHT_REFERENCE is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that `saved_models.py` writes; tests leave its models as they are. About 20 s."""
    folder = tmp_path_factory.mktemp("saved")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "saved_models.py", folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
