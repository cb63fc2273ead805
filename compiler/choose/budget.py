"""How many parameters and tokens a compute budget buys, by a loss law L(N, D) = E + A / N^alpha + B / D^beta with C = 6 N D.

Closed forms: minimise L at fixed C (Hoffmann et al. 2022, equation 4). N* = G (C/6)^a and D* = (C/6)^b / G with
a = beta / (alpha + beta), b = alpha / (alpha + beta), G = (alpha A / (beta B))^(1 / (alpha + beta)). Along the optimum
alpha A N^-alpha = beta B D^-beta.
"""

from trainwright.compiler.facts import LossLaw


def predict_loss(law: LossLaw, parameters: float, tokens: float) -> float:
    """L(N, D) in the law's own unit."""
    return float(law.E + law.A * float(parameters) ** -law.alpha + law.B * float(tokens) ** -law.beta)


def choose_parameters_and_tokens(law: LossLaw, flops: float) -> tuple[float, float]:
    """(N, D) with the least loss among those with 6 N D = `flops`."""
    exponent = law.beta / (law.alpha + law.beta)
    parameters = _scale(law) * (flops / 6) ** exponent
    return parameters, flops / 6 / parameters


def choose_tokens(law: LossLaw, parameters: float) -> float:
    """D for which `parameters` is the best size: the budget at which the law would choose it."""
    return float((law.beta * law.B / (law.alpha * law.A) * parameters**law.alpha) ** (1 / law.beta))


def choose_parameters(law: LossLaw, tokens: float) -> float:
    """N for which `tokens` is the best number of tokens."""
    return float((law.alpha * law.A / (law.beta * law.B) * tokens**law.beta) ** (1 / law.alpha))


def list_extrapolations(law: LossLaw, parameters: float, tokens: float) -> list[str]:
    """A warning for each of N and D outside the range that the law was fitted on."""
    warnings = []
    for name, value, (low, high) in (
        ("parameters", float(parameters), law.fitted_parameters),
        ("tokens", float(tokens), law.fitted_tokens),
    ):
        if not low <= value <= high:
            warnings.append(
                f"{law.name} was fitted on {low:.3g} to {high:.3g} {name}; {value:.3g} is outside: what it says there is a guess"
            )
    return warnings


def _scale(law: LossLaw) -> float:
    return float((law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta)))
