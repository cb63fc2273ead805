"""Parameters that differ from the others: which are not decayed, and what a width changes under muP.

muP is the maximal update parametrisation of Yang et al. 2022 (arXiv:2203.03466), in the form of its table 8, for Adam and for
Lion, whose updates do not depend on the size of a gradient either. `width` is hidden_size / that of the base model, whose
hyperparameters are the program's: `lr`, `min_lr`, `init_method_std`, `weight_decay`. Against the base's

    matrices of the layers    learning rate / width, standard deviation of the init / sqrt(width)
    routers of experts        learning rate / width, standard deviation of the init / width
    embeddings, output layer  as they are; the logits x 1 / width (`Embedding.output_multiplier`, a literal of the program)
    norms and biases          as they are

and the scale of attention's scores is sqrt(the base's head_dim) / head_dim (`TransformerConfig.softmax_scale`, a literal too):
1 / sqrt(head_dim) where heads grow in number only. Weight decay is multiplied by the width where the rate is divided by it, so
that a step decays all weights by the base's share (as in the authors' package, `MuAdamW`). Adam's eps stays as it is.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import ParamKey
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from torch import Tensor

from trainwright.runtime.errors import Unsupported

KINDS = ("biases", "norms", "embeddings")
_EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight")
_OUTPUT, _ROUTER = "output_layer.weight", ".router.weight"


@dataclass(frozen=True)
class Groups:
    """`undecayed`: kinds of parameters without weight decay, of KINDS (an output layer that shares the embedding's weight is
    one of the embeddings). `width`: of muP, as above; 1.0: no muP."""

    undecayed: tuple[str, ...] = ("biases", "norms")
    width: float = 1.0

    def check(self, output_multiplier: float) -> None:
        """Raise Unsupported for an unknown kind, and where the program's output multiplier is not the width's."""
        unknown = [kind for kind in self.undecayed if kind not in KINDS]
        if unknown:
            raise Unsupported(f"groups.undecayed has {unknown[0]!r}: write some of {', '.join(map(repr, KINDS))}")
        if self.width <= 0 or abs(output_multiplier * self.width - 1) > 1e-6:
            raise Unsupported(
                f"groups.width={self.width} goes with embedding.output_multiplier=1 / width, and it is {output_multiplier}: "
                "in muP the logits are divided by the width"
            )

    def overrides(self, config: Any, *, tied: bool) -> dict[Any, Any]:
        """`config_overrides` for Megatron-Core's optimizer. `config` is its OptimizerConfig; `tied`: the output layer shares the
        embedding's weight."""
        found = {}
        for decayed, narrowed in itertools.product((True, False), repeat=2):
            kind = (decayed, narrowed)
            setting = self._setting(decayed, narrowed, config)
            if setting:
                predicate = ParamWithNamePredicate(str(kind), partial(self._is_of, kind, tied))
                found[ParamKey(with_name_predicate=predicate)] = setting
        return found

    def _setting(self, decayed: bool, narrowed: bool, config: Any) -> dict[str, float]:
        setting: dict[str, float] = {} if decayed else {"wd_mult": 0.0}
        if narrowed and self.width != 1.0:
            setting["max_lr"], setting["min_lr"] = config.lr / self.width, (config.min_lr or 0.0) / self.width
            # It changes nothing, but a checkpoint tells groups apart by it and by wd_mult alone.
            setting["lr_mult"] = 1 / self.width
            if decayed:
                setting["wd_mult"] = self.width
        return setting

    def _is_of(self, kind: tuple[bool, bool], tied: bool, parameter: Tensor, name: str) -> bool:
        return self._kind(parameter, name, tied) == kind

    def _kind(self, parameter: Tensor, name: str, tied: bool) -> tuple[bool, bool]:
        """(decayed, its learning rate and init shrink with the width)."""
        if name.endswith(_EMBEDDINGS) or (tied and name.endswith(_OUTPUT)):
            return "embeddings" not in self.undecayed, False
        if parameter.dim() == 1:
            return ("norms" if "norm" in name else "biases") not in self.undecayed, False
        return True, not name.endswith(_OUTPUT)

    @torch.no_grad()
    def scale_init(self, module: Any, *, tied: bool) -> None:
        """Bring weights that were drawn with the base's standard deviation to the width's."""
        if self.width == 1.0:
            return
        for name, parameter in module.named_parameters():
            if self._kind(parameter, name, tied)[1]:
                parameter.mul_(1 / self.width if name.endswith(_ROUTER) else self.width**-0.5)


PLAIN = Groups()
