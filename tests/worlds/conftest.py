"""Makes the helper modules of this folder importable by its tests (importlib mode puts no test folder on the path)."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

with warnings.catch_warnings():  # what Megatron-Core warns of as it is imported, here once for all tests of the folder
    warnings.simplefilter("ignore")
    import trainwright.runtime.megatron.checkpoint
    import trainwright.runtime.megatron.loop  # noqa: F401
