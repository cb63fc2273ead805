"""What a training run measures, step by step: `metrics.jsonl` (one JSON object a step) and TensorBoard events."""

import json
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from trainwright.runtime.workspace import StageFolder, write_atomically

TENSORBOARD = "tensorboard"


class Metrics:
    """Appends rows. Opened at `finished_steps`, it drops what a run that was cut off had written of later steps."""

    def __init__(self, folder: StageFolder, finished_steps: int) -> None:
        self._path = folder.metrics
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        write_atomically(self._path, "".join(line for line in lines if _counts(line, finished_steps)))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder.path / TENSORBOARD), purge_step=finished_steps + 1)

    def write(self, row: dict[str, float]) -> None:
        """Add a row; `row["step"]` counts finished steps."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._file.close()
        self._events.close()


def _counts(line: str, finished_steps: int) -> bool:
    """Whether a row stays: of a finished step, whole, and of training (held-out results are measured again)."""
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:
        return False
    return row["step"] <= finished_steps and "loss" in row
