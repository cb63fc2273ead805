"""Megatron-Core's GPTModel, with the prediction of further tokens (MTP) as training alone needs it."""

import copy
from typing import Any

from megatron.core.models.gpt import GPTModel


class GPT(GPTModel):  # type: ignore[misc]
    """GPTModel 0.16.1 whose layers that predict further tokens leave the rest of the model as it is.

    - They are passed over where nothing is trained: they add nothing to the logits, and without labels they fail.
    - With tied embeddings on several pipeline stages the last stage holds a copy of the embedding for them, and that is the
      output layer's weight too: the one of its own that it is given besides is never trained, and no checkpoint can be saved.
    """

    config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mtp_process and self.post_process and self.share_embeddings_and_output_weights:
            self.output_layer.weight = None

    def _postprocess(self, *args: Any, mtp_in_postprocess: bool | None = None, **kwargs: Any) -> Any:
        if not self.mtp_process or self.training:
            return super()._postprocess(*args, mtp_in_postprocess=mtp_in_postprocess, **kwargs)
        config = self.config
        self.config = copy.copy(config)
        self.config.mtp_num_layers = None
        try:
            return super()._postprocess(*args, mtp_in_postprocess=False, **kwargs)
        finally:
            self.config = config
