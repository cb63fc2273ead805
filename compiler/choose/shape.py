"""A model's shape for a parameter count: the published one where a family has it, else the nearest that the family's rules allow.

Loss depends weakly on shape (Kaplan et al. 2020, section 3.1), so a rule is enough: hidden_size / num_layers, FFN ratio and
head size as the family's published models have them, and the combination nearest to the count.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainwright.compiler.errors import InfeasibleError
from trainwright.compiler.estimate.params import count_parameters
from trainwright.compiler.facts import PLAIN, Family, Rules, make_shape
from trainwright.compiler.plan import Reason, Shape
from trainwright.compiler.ranges import Range
from trainwright.compiler.resolve import PinnedShape

SMALL_HEAD, LARGE_HEAD = 64, 128
SMALL = 4e8  # parameters below which heads are 64 wide, above 128 (Chinchilla, GPT-3, Pythia, Llama)
TILE = 128  # elements: what one device keeps of a width is a multiple of it, so that matrix products fill their tiles
MOST_TILED = 8  # devices: beyond a node's fast links widths are not split
# Any number of heads up to 8, 10, multiples of 4 up to 32, of 8 above: they divide by the tensor degrees that a width needs.
HEADS = (*range(1, 9), 10, *range(12, 33, 4), *range(40, 1025, 8))
# Weights of the three departures in ln units: from the count, from the family's width per layer, from its FFN ratio.
COUNT_WEIGHT, WIDTH_WEIGHT, FFN_WEIGHT = 2.0, 0.2, 0.1
KV_RANK, Q_RANK = 1 / 4, 0.3  # of latent attention, as shares of the hidden size: Moonlight 16B, DeepSeek-V2 236B
RANK_STEP = 16  # elements: what a rank is a multiple of
FARTHEST = 1.5  # times the wanted count: a shape beyond it is not what was asked for
SAME_COUNT = 0.005  # a published shape whose exact count is this near is the one meant (46.7B is Mixtral 8x7B)


@dataclass(frozen=True)
class ShapeChoice:
    """`error` is (parameters - target) / target; `reasons` are by plan path ("shape.num_layers")."""

    shape: Shape
    parameters: int
    error: float
    reasons: Mapping[str, Reason]


def choose_shape(family: Family, target: float, vocab_size: int, context_length: int) -> ShapeChoice:
    """The shape of `target` parameters. `vocab_size` replaces the family's; `context_length` counts for learned positions."""
    for size, published in family.published.items():
        shape = replace(published, vocab_size=vocab_size)
        if _is_meant(size, count_parameters(shape, context_length), target):
            return _published(family, size, shape, target, context_length)
    return _nearest(family, target, vocab_size, context_length)


def find_published(family: Family, size: Range) -> tuple[Shape, ...]:
    """The published shape that a pinned size means, with its own vocabulary; none: nobody published it."""
    context_length = family.rules.context_length
    return tuple(
        shape
        for name, shape in family.published.items()
        if _is_meant(name, count_parameters(shape, context_length), size.low)
    )[:1]


def choose_shape_within(
    family: Family, target: float, vocab_size: int, context_length: int, most_parameters: float
) -> ShapeChoice:
    """As `choose_shape`; where the nearest shape has more than `most_parameters`, the nearest to a target that is lower by the
    excess. A target above the limit is not lowered."""
    choice, wanted = choose_shape(family, target, vocab_size, context_length), target
    while target <= most_parameters < choice.parameters:
        wanted *= most_parameters / choice.parameters
        choice = choose_shape(family, wanted, vocab_size, context_length)
    return choice


def pinned_shape(family: Family, given: PinnedShape, vocab_size: int, context_length: int) -> ShapeChoice:
    """The shape that the user stated; what the statement leaves open follows from the family's rules."""
    stated = asdict(given)
    stated |= stated.pop("further")
    size = (given.num_layers, given.hidden_size, given.num_attention_heads, given.head_dim)
    numbers = {**scaled_down(family.rules, *size), **stated, "vocab_size": vocab_size}
    tied = count_parameters(make_shape(family.name, family.rules, numbers), context_length) <= family.rules.tied_up_to
    shape = make_shape(family.name, family.rules, {**numbers, "tied_embeddings": tied})
    parameters = count_parameters(shape, context_length)
    fact = Reason("fact", f"as every {family.name} model: {family.source}")
    derived = {f"shape.{name}": Reason("derived", "follows from the stated shape") for name in numbers}
    derived["shape.tied_embeddings"] = Reason(
        "derived", f"{family.name} ties up to {family.rules.tied_up_to:.2g} parameters"
    )
    return _choice(family, shape, parameters, parameters, {**dict.fromkeys(_paths(), fact), **derived})


def nominal_parameters(size: str) -> float:
    """What a size's name says: "8B" is 8e9, "0.6B" 6e8; 0.0 for a name that says no count ("8x7B")."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MBT])", size)
    return float(match[1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[match[2]] if match else 0.0


def _is_meant(size: str, exact: int, target: float) -> bool:
    return math.isclose(nominal_parameters(size), target, rel_tol=1e-9) or abs(target / exact - 1) < SAME_COUNT


def _published(family: Family, size: str, shape: Shape, target: float, context_length: int) -> ShapeChoice:
    parameters = count_parameters(shape, context_length)
    text = f"{family.name} {size} as published: {family.source}"
    reasons = {path: Reason("fact", text) for path in _paths()}
    return _choice(family, shape, parameters, target, reasons)


def _nearest(family: Family, target: float, vocab_size: int, context_length: int) -> ShapeChoice:
    rules = family.rules
    wanted = width_per_layer(rules, target)

    def departure(shape: Shape) -> tuple[float, int]:
        count = count_parameters(shape, context_length)
        departures = (
            COUNT_WEIGHT * abs(math.log(count / target)),
            WIDTH_WEIGHT * abs(math.log(shape.hidden_size / shape.num_layers / wanted)),
            FFN_WEIGHT * abs(math.log(shape.ffn_hidden_size / shape.hidden_size / rules.ffn_ratio[1])),
        )
        return (round(sum(departures), 9), shape.hidden_size)

    shape = min(_candidates(family, target, vocab_size, wanted), key=departure, default=None)
    parameters = count_parameters(shape, context_length) if shape else 0
    if shape is None or not target / FARTHEST <= parameters <= target * FARTHEST:
        nearest = f"the nearest has {parameters:,}" if shape else "there is none near it"
        raise InfeasibleError(
            f"no {family.name} shape with a vocabulary of {vocab_size:,} has about {target:,.0f} parameters: {nearest}; "
            "the fix: another model.size, data.tokens or compute.budget, a smaller model.vocab_size, or a stated model.shape"
        )
    return _choice(family, shape, parameters, target, _reasons(family, shape, target, parameters, wanted))


def width_per_layer(rules: Rules, parameters: float) -> float:
    """The family's usual hidden_size / num_layers at a parameter count: interpolated in log(parameters), constant outside."""
    points = rules.width_per_layer
    if parameters <= points[0][0]:
        return points[0][1]
    for (low, narrow), (high, wide) in itertools.pairwise(points):
        if parameters <= high:
            return narrow + (wide - narrow) * math.log(parameters / low) / math.log(high / low)
    return points[-1][1]


def _candidates(family: Family, target: float, vocab_size: int, wanted: float) -> Iterator[Shape]:
    rules = family.rules
    head_dim = head_dim_for(target)
    # A layer has about 13 hidden_size^2 parameters; a large vocabulary leaves less for the layers than that.
    usual = (target * wanted / 13) ** (1 / 3)
    for heads in HEADS:
        hidden = heads * head_dim
        if not usual / 4 <= hidden <= max(usual * 2, head_dim):
            continue
        for ffn in _ffn_sizes(rules, hidden):
            for layers in _layer_counts(hidden, wanted):
                numbers = {
                    "num_layers": layers,
                    "hidden_size": hidden,
                    "ffn_hidden_size": ffn,
                    "num_attention_heads": heads,
                    "num_query_groups": query_groups(rules, heads),
                    "head_dim": head_dim,
                    "vocab_size": vocab_size,
                    "tied_embeddings": target <= rules.tied_up_to,
                    **scaled_down(rules, layers, hidden, heads, head_dim),
                }
                yield make_shape(family.name, rules, numbers)


def scaled_down(rules: Rules, layers: int, hidden: int, heads: int, head_dim: int) -> dict[str, int]:
    """What of latent attention and of the order of layers cannot be, in a small model, what the family's large ones have.

    Ranks are at most KV_RANK and Q_RANK of the hidden size, which Moonlight's and DeepSeek-V2's keep to; heads keep the published
    ratio of their parts; at most an eighth of the layers are dense first, and at least one.
    """
    published: dict[str, Any] = {**PLAIN, **rules.shape}
    numbers: dict[str, int] = {}
    if published["kv_lora_rank"]:
        numbers = {
            "num_query_groups": heads,
            "kv_lora_rank": min(
                published["kv_lora_rank"], max(RANK_STEP, int(KV_RANK * hidden) // RANK_STEP * RANK_STEP)
            ),
            "q_lora_rank": min(published["q_lora_rank"], max(RANK_STEP, int(Q_RANK * hidden) // RANK_STEP * RANK_STEP)),
            "qk_rope_head_dim": head_dim // 2,
            "v_head_dim": head_dim,
        }
    if published["first_dense_layers"]:
        numbers["first_dense_layers"] = min(published["first_dense_layers"], max(1, layers // 8), layers - 1)
    return numbers


def query_groups(rules: Rules, heads: int) -> int:
    """All heads, or the largest power of two up to the family's limit that divides them."""
    if heads <= rules.query_groups:
        return heads
    return max(1 << power for power in range(rules.query_groups.bit_length()) if heads % (1 << power) == 0)


def head_dim_for(parameters: float) -> int:
    """Width of a head at a parameter count."""
    return SMALL_HEAD if parameters < SMALL else LARGE_HEAD


def tiled_up_to(hidden: int) -> int:
    """The largest tensor degree, a power of two up to MOST_TILED, that splits a width into multiples of TILE; 1 if none does."""
    return max(
        degree
        for degree in (1 << power for power in range(MOST_TILED.bit_length()))
        if degree == 1 or hidden % (degree * TILE) == 0
    )


def with_experts(family: Family, num_experts: int) -> Family:
    """The family with another number of experts a layer, which nobody published; groups that do not divide it are left out."""
    if num_experts == family.rules.num_experts:
        return family
    further = dict(family.rules.shape)
    if further.get("router_groups") and num_experts % further["router_groups"]:
        further |= {"router_groups": 0, "router_group_topk": 0}
    return replace(family, rules=replace(family.rules, num_experts=num_experts, shape=further), published={})


def _ffn_sizes(rules: Rules, hidden: int) -> range:
    """Widths in the range of the family that every tensor degree up to `tiled_up_to` splits into multiples of TILE."""
    step = TILE * tiled_up_to(hidden)
    low = -(-math.ceil(rules.ffn_ratio[0] * hidden) // step) * step
    return range(low, max(low, int(rules.ffn_ratio[2] * hidden)) + 1, step)


def _layer_counts(hidden: int, wanted: float) -> range:
    """Depths within a factor of 2 of the family's, in steps that grow with them, so that pipelines divide them."""
    low, high = max(1, round(hidden / wanted / 2)), max(1, round(hidden / wanted * 2))
    step = 1 if low < 8 else 2 if low < 32 else 4 if low < 64 else 8 if low < 128 else 16
    return range(-(-low // step) * step, high + 1, step)


def _paths() -> list[str]:
    return [f"shape.{name}" for name in Shape.__dataclass_fields__]


def _choice(family: Family, shape: Shape, parameters: int, target: float, reasons: Mapping[str, Reason]) -> ShapeChoice:
    published = {
        one.vocab_size for one in family.published.values() if replace(one, vocab_size=shape.vocab_size) == shape
    }
    if shape.vocab_size not in published | {family.rules.vocab_size}:
        text = f"given, in place of {family.rules.vocab_size} of {family.name}"
        reasons = {**reasons, "shape.vocab_size": Reason("derived", text)}
    return ShapeChoice(shape, parameters, parameters / target - 1, reasons)


def _reasons(family: Family, shape: Shape, target: float, parameters: int, wanted: float) -> dict[str, Reason]:
    fact = Reason("fact", f"as every {family.name} model: {family.source}")
    reasons = dict.fromkeys(_paths(), fact)
    of_count = f"{parameters:,} parameters, {100 * (parameters / target - 1):+.2f} % from {target:,.0f}"
    ratio = shape.hidden_size / shape.num_layers
    search = {
        "num_layers": f"nearest count: {of_count}; {ratio:.0f} wide a layer, where {family.name} has about {wanted:.0f}",
        "hidden_size": f"nearest count: {of_count}",
        "ffn_hidden_size": f"{shape.ffn_hidden_size / shape.hidden_size:.2f} x hidden_size ({family.name}: "
        f"{family.rules.ffn_ratio[0]:.2f} to {family.rules.ffn_ratio[2]:.2f}), a multiple of {TILE} on each device up to "
        f"tensor {tiled_up_to(shape.hidden_size)}",
    }
    derived = {
        "head_dim": f"{shape.head_dim}: 64 below {SMALL:.1g} parameters, 128 above",
        "num_attention_heads": f"hidden_size {shape.hidden_size} / head_dim {shape.head_dim}",
        "num_query_groups": f"of {shape.num_attention_heads} heads: all up to {family.rules.query_groups}, else a power of two",
        "tied_embeddings": f"{family.name} ties embedding and output layer up to {family.rules.tied_up_to:.2g} parameters",
    }
    reasons |= {f"shape.{name}": Reason("search", text) for name, text in search.items()}
    return reasons | {f"shape.{name}": Reason("derived", text) for name, text in derived.items()}
