"""Makes the helper modules of this folder importable by its tests (importlib mode puts no test folder on the path)."""

import os
import sys
import warnings
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these worlds are of CPU processes, also on a machine with a GPU
sys.path.insert(0, str(Path(__file__).parent))

with warnings.catch_warnings():  # what Megatron-Core warns of as it is imported, here once for all tests of the folder
    warnings.simplefilter("ignore")
    import trainwright.runtime.megatron.checkpoint
    import trainwright.runtime.megatron.loop  # noqa: F401
