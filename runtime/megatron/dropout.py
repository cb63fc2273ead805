"""What dropout draws from, so that a run can be repeated and resumed without a state of generators in its checkpoints.

Before each forward pass of a micro-batch the generators are seeded from the run's seed, the step, the number of the micro-batch
in the global batch, the pipeline stage and its chunk, and the context rank. So a resumed run drops out what an uninterrupted one
does, and so do data-parallel layouts of one micro-batch size. Recomputed activations drop out the same (Megatron-Core puts the
generators back). Other layouts draw other masks for the same sequences: pipeline stages each draw their own, and tensor and
context ranks their own parts; their runs agree in the mean only.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


@dataclass(frozen=True)
class Draws:
    """Of one optimizer step."""

    seed: int  # of the run
    step: int

    def begin(self, config: Any, chunk: int, number: int) -> None:
        """Seed the generators for the forward pass of this rank's micro-batch `number` through its chunk `chunk` (from 0), where
        the model (`config` is Megatron-Core's) draws anything. Tensor and expert ranks get generators of their own beside a
        common one, as Megatron-Core has it."""
        if not (config.hidden_dropout or config.attention_dropout or config.moe_input_jitter_eps):
            return
        of_all = number * parallel_state.get_data_parallel_world_size() + parallel_state.get_data_parallel_rank()
        stage, context = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_context_parallel_rank()
        text = f"{self.seed} {self.step} {of_all} {stage} {chunk} {context}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        model_parallel_cuda_manual_seed(int.from_bytes(digest, "big"))
