"""What constants say of a budget: the best size, tokens and loss. Constants are numbers or a column of draws."""

from collections.abc import Mapping

import numpy as np

from trainwright.compiler.fit.approach3 import Floats

MOST_LOG = 700.0  # beyond, exp is no float64


def size_exponent(constants: Mapping[str, Floats]) -> Floats:
    """a of N = G (C / 6)^a; Hoffmann et al. 2022, equation 4."""
    return np.asarray(constants["beta"] / (constants["alpha"] + constants["beta"]))


def best_at(constants: Mapping[str, Floats] | Mapping[str, float], flops: float) -> dict[str, Floats]:
    """params, tokens, ratio (tokens a parameter) and loss, C = 6 N D; nan where an exponent is not above 0 (equation 4)."""
    A, B, alpha, beta = (np.asarray(constants[name]) for name in ("A", "B", "alpha", "beta"))  # noqa: N806
    falling = (alpha > 0) & (beta > 0)
    alpha, beta = np.where(falling, alpha, np.nan), np.where(falling, beta, np.nan)
    log_params = (np.log(alpha) + np.log(A) - np.log(beta) - np.log(B) + beta * np.log(flops / 6)) / (alpha + beta)
    log_params = np.clip(log_params, -MOST_LOG / 2, MOST_LOG / 2)
    log_tokens = np.log(flops / 6) - log_params
    terms = (np.log(A) - alpha * log_params, np.log(B) - beta * log_tokens)
    loss = constants["E"] + sum(np.exp(np.minimum(term, MOST_LOG)) for term in terms)
    return {
        "params": np.exp(log_params),
        "tokens": np.exp(log_tokens),
        "ratio": np.exp(np.minimum(log_tokens - log_params, MOST_LOG)),
        "loss": loss,
    }
