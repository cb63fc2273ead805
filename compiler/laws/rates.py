"""Published laws for learning rate, batch and weight decay, and what a batch costs that is not the best. Arrays in, arrays out.

A law is a power of each quantity (`facts.PowerLaw`), so its value and its printed arithmetic come from the same numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainwright.compiler.facts import HyperparameterLaw, PowerLaw
from trainwright.compiler.laws.find import find_law
from trainwright.compiler.laws.law import Floats, Number


@dataclass(frozen=True)
class Run:
    """What the laws ask of a run. Floats, or columns of them; of a mixture of experts, what one token uses."""

    body: Number  # parameters without embedding and output layer
    without_embedding: Number  # the body and the output layer
    used: Number  # all parameters, a tied embedding once
    flops: Number  # M: non-embedding training FLOPs a token, attention counted full
    tokens: Number  # D, of the whole run
    expansion: Number  # E: experts for each that a token uses; 1: dense


def law_parameters(law: HyperparameterLaw, run: Run) -> Floats:
    """N as the law counts it; of a law that counts FLOPs a token, M."""
    return np.asarray(getattr(run, law.counts), dtype=np.float64)


def law_quantities(law: HyperparameterLaw, run: Run) -> Mapping[str, Floats]:
    """The quantities of a power law by name, without unit: N, D, C, E, D/N, and L of `final_loss`."""
    parameters, tokens = law_parameters(law, run), np.asarray(run.tokens, dtype=np.float64)
    return {
        "N": parameters,
        "D": tokens,
        "C": np.asarray(run.flops, dtype=np.float64) * tokens,
        "E": np.asarray(run.expansion, dtype=np.float64),
        "D/N": tokens / parameters,
        "L": final_loss(run),
    }


def final_loss(run: Run) -> Floats:
    """Loss at the end of the run by kaplan2020 (nats a token): the only loss that its critical batch may be asked with."""
    return find_law("kaplan2020").loss(np.asarray(run.body, dtype=np.float64), np.asarray(run.tokens, dtype=np.float64))


def apply_power(power: PowerLaw, quantities: Mapping[str, Floats]) -> Floats:
    """The law's value: a learning rate, tokens a step, or a share of the run."""
    value = np.asarray(power.coefficient * power.tokens, dtype=np.float64)
    for name, exponent in power.exponents.items():
        value = value * _counted(power, name, quantities[name]) ** exponent
    return value


def law_rate(law: HyperparameterLaw, run: Run) -> Floats:
    """Peak learning rate at the law's own batch. Raises ValueError for a law without one, as the next two do."""
    return apply_power(_stated(law, law.learning_rate), law_quantities(law, run))


def law_batch(law: HyperparameterLaw, run: Run) -> Floats:
    """Tokens a step; kaplan2020's is the critical batch."""
    return apply_power(_stated(law, law.batch), law_quantities(law, run))


def law_timescale(law: HyperparameterLaw, run: Run) -> Floats:
    """The share of the run over which AdamW is to forget."""
    return apply_power(_stated(law, law.timescale), law_quantities(law, run))


def describe_law(law: HyperparameterLaw, power: PowerLaw | None, run: Run) -> str:
    """The arithmetic of one value: "1.79 x 7e+09^-0.713 x 1.4e+12^0.307"."""
    power, quantities = _stated(law, power), law_quantities(law, run)
    factors = [
        f"{float(_counted(power, name, quantities[name])):.4g}{'e9' if power.unit == 1e9 else ''}^{exponent:.4g}"
        for name, exponent in power.exponents.items()
    ]
    counted = [f"{power.tokens:g} tokens"] if power.tokens != 1.0 else []
    return " x ".join([f"{power.coefficient:.5g}", *factors, *counted])


def scale_rate(batch_tokens: Number, own_tokens: Number) -> Floats:
    """What the rate of a law is multiplied by at another batch than its own: the root of the ratio below it, 1 above.

    The root is Adam's rule for noisy gradients (Malladi et al. 2022, arXiv 2205.10287). Above its own batch a law's rate is not
    raised: on the 1,911 dense runs of Step Law that costs 0.10 % of the loss in the mean, the root 0.74 % (benchmarks/rates.py).
    """
    return np.sqrt(np.minimum(1.0, np.asarray(batch_tokens, dtype=np.float64) / own_tokens))


def batch_overhead(batch_tokens: Number, own_tokens: Number, critical: Number) -> Floats:
    """Extra tokens for the same loss, relative to the law's own batch; negative below it, where more steps are paid instead.

    tokens(B) = least tokens x (1 + B / critical batch) (McCandlish et al. 2018, arXiv 1812.06162).
    """
    batch, own = np.asarray(batch_tokens, dtype=np.float64), np.asarray(own_tokens, dtype=np.float64)
    return (1.0 + batch / critical) / (1.0 + own / critical) - 1.0


def weight_decay(batch_tokens: Number, learning_rate: Number, tokens: Number, timescale: Number) -> Floats:
    """lambda = B / (eta D tau): AdamW forgets over `timescale` of the run (Wang and Aitchison 2024, arXiv 2405.13698)."""
    return np.asarray(batch_tokens, dtype=np.float64) / (np.asarray(learning_rate) * tokens * timescale)


def _counted(power: PowerLaw, name: str, value: Floats) -> Floats:
    return value / power.unit if name in ("N", "D") else value


def _stated(law: HyperparameterLaw, power: PowerLaw | None) -> PowerLaw:
    if power is None:
        raise ValueError(f"{law.name} does not say it")
    return power
