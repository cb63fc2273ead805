"""Quantities: strings with units ("1.4T tokens", "21 days", "$2M") to SI base units and back; and how messages count and list.

Multipliers: k, M, B (or G), T are 1e3, 1e6, 1e9, 1e12. Bytes: kB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB of 1024.
Arithmetic is decimal, so "2.9M tokens" is exactly 2,900,000.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal


class UnitError(ValueError):
    """The value is no quantity of an accepted kind; the message lists what is accepted, with an example of each."""


@dataclass(frozen=True)
class Quantity:
    """`amount` in the base unit of `kind`: see KINDS."""

    kind: str
    amount: float

    @property
    def count(self) -> int:
        """The amount of a kind that is counted (tokens, sequences, parameters, steps)."""
        return int(self.amount)


@dataclass(frozen=True)
class _Kind:
    example: str
    units: Mapping[str, Decimal]  # factor of each spelling, in the base unit (the one with factor 1)
    counted: bool = False  # whole numbers only


def _units(text: str) -> dict[str, Decimal]:
    return {word: Decimal(factor) for word, factor in (pair.split("=") for pair in text.split())}


KINDS: Mapping[str, _Kind] = {
    "tokens": _Kind('tokens ("1.4T tokens")', _units("tokens=1 token=1"), counted=True),
    "sequences": _Kind('sequences ("512 sequences")', _units("sequences=1 sequence=1"), counted=True),
    "parameters": _Kind(
        'parameters ("8B", "1.1M parameters")', _units("parameters=1 parameter=1 params=1"), counted=True
    ),
    "steps": _Kind('steps ("2000 steps")', _units("steps=1 step=1"), counted=True),
    "fraction": _Kind('a fraction ("3%", 0.03)', _units("%=0.01")),
    "time": _Kind(
        'a time ("21 days", "36h", "90 minutes")',
        _units(
            "seconds=1 second=1 s=1 minutes=60 minute=60 min=60 m=60 hours=3600 hour=3600 h=3600"
            " days=86400 day=86400 d=86400 weeks=604800 week=604800 w=604800"
        ),
    ),
    "money": _Kind('money ("$2M", "$1500")', {}),
    "price": _Kind('a price ("$2.10/device-hour")', _units("/device-hour=1")),
    "flops": _Kind('FLOPs ("6e23 FLOPs")', _units("FLOPs=1 FLOP=1")),
    "device_hours": _Kind('device-hours ("500k device-hours")', _units("device-hours=1 device-hour=1")),
    "power": _Kind('a power ("700 W", "0.7 kW")', _units("W=1 watts=1 watt=1")),
    "carbon": _Kind('CO2 a kWh ("0.385 kg/kWh", "385 g/kWh")', _units("kg/kWh=1 g/kWh=1e-3")),
    "bytes": _Kind(
        'bytes ("80 GB", "80 GiB")',
        _units("bytes=1 byte=1 B=1 kB=1e3 MB=1e6 GB=1e9 TB=1e12 KiB=1024 MiB=1048576 GiB=1073741824 TiB=1099511627776"),
    ),
}
MULTIPLIERS = {"": Decimal(1), **_units("k=1e3 K=1e3 M=1e6 G=1e9 B=1e9 T=1e12")}
BUDGET_KINDS = ("time", "money", "flops", "device_hours")

_QUANTITY = re.compile(
    r"(?P<dollar>\$?)\s*(?P<number>(?:\d[\d_]*)?\.?\d+(?:[eE][+-]?\d{1,3})?|\d+\.)\s*(?P<rest>\S.*)?"
)


def parse_quantity(value: object, accepted: tuple[str, ...], bare: str = "") -> Quantity:
    """The quantity that `value` (text or a number) states, of one of the `accepted` kinds.

    bare: the kind of a number without a unit; "" refuses one. Raises UnitError.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _refusal(value, accepted, "is not a quantity")
    match = _QUANTITY.fullmatch(str(value).strip())
    if match is None:
        raise _refusal(value, accepted, "is not a quantity")
    kind, factor = _unit(value, match["dollar"], match["rest"] or "", accepted, bare)
    amount = Decimal(match["number"].replace("_", "")) * factor
    if KINDS[kind].counted and amount != amount.to_integral_value():
        raise _refusal(value, accepted, f"is {amount.normalize():f} {kind}, and only whole ones exist")
    if not 0 <= amount < Decimal("1e100"):
        raise _refusal(value, accepted, "is out of any sensible range")
    return Quantity(kind, float(amount))


def _unit(value: object, dollar: str, rest: str, accepted: tuple[str, ...], bare: str) -> tuple[str, Decimal]:
    """(kind, factor) of what stands around the number."""
    if not dollar and not rest and bare:
        return bare, Decimal(1)
    for kind in accepted:
        if bool(dollar) != (kind in ("money", "price")):
            continue
        units = dict(KINDS[kind].units)
        if kind == "money" or kind == bare:
            units[""] = Decimal(1)
        by_case = {spelling.casefold(): factor for spelling, factor in units.items()}
        for multiplier in MULTIPLIERS:
            if not rest.startswith(multiplier) or (multiplier and kind in ("bytes", "carbon", "fraction", "time")):
                continue
            word = rest.removeprefix(multiplier).strip()
            factor = units.get(word)
            # Case carries meaning in bytes (kB) and in a time's letters; long words may be written as one likes.
            if factor is None and len(word) > 2 and kind != "bytes":
                factor = by_case.get(word.casefold())
            if factor is not None:
                return kind, factor * MULTIPLIERS[multiplier]
    unit = f"{dollar}... {rest}".strip() if dollar else rest
    raise _refusal(value, accepted, f"has the unit {unit!r}, which is not accepted here" if unit else "has no unit")


def _refusal(value: object, accepted: tuple[str, ...], problem: str) -> UnitError:
    return UnitError(f"{value!r} {problem}; accepted: {', '.join(KINDS[kind].example for kind in accepted)}")


_STEPS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "time": ((" days", 86400.0), (" hours", 3600.0), (" minutes", 60.0), (" s", 1.0), (" ms", 1e-3)),
    "energy": ((" GWh", 1e6), (" MWh", 1e3), (" kWh", 1.0), (" Wh", 1e-3)),
    "mass": ((" t", 1e3), (" kg", 1.0), (" g", 1e-3)),
    "bytes": ((" GiB", 2.0**30), (" MiB", 2.0**20), (" KiB", 2.0**10), (" bytes", 1.0)),
}
_COUNT_STEPS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
_SUFFIX = {
    "parameters": "",
    "tokens": " tokens",
    "sequences": " sequences",
    "steps": " steps",
    "device_hours": " device-hours",
    "power": " W",
}


def format_quantity(kind: str, amount: float) -> str:
    """A quantity for people, to 4 significant digits (whole numbers below 10,000 and times below 2 units a step finer).

    Beside the kinds that a spec has: energy in kWh, mass in kg.
    """
    if kind == "flops":
        return f"{amount:.4g} FLOPs"
    if kind == "fraction":
        return f"{amount * 100:.4g}%"
    if kind == "carbon":
        return f"{amount:.4g} kg/kWh"
    if kind == "price":
        return f"${amount:.2f}/device-hour" if amount >= 0.01 else f"${amount:.4g}/device-hour"
    if kind in _STEPS:
        steps = _STEPS[kind]
        # "30 hours" reads better than "1.25 days".
        suffix, factor = next((step for step in steps if amount >= 2 * step[1]), steps[-1])
        return f"{_digits(amount / factor)}{suffix}"
    suffix, factor = next((step for step in _COUNT_STEPS if amount >= step[1]), _COUNT_STEPS[-1])
    if amount < 10_000:
        suffix, factor = "", 1.0
    unit = _SUFFIX.get(kind, "")
    return f"{'$' if kind == 'money' else ''}{_digits(amount / factor)}{suffix}{unit.removesuffix('s') if amount == 1 else unit}"


def join_words(words: Iterable[str], last: str = "or") -> str:
    """ "a, b or c", for messages."""
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def format_count(count: int, of: str) -> str:
    """ "1 step", "2,000 steps"."""
    return f"{count:,} {of}{'' if count == 1 else 's'}"


def _digits(value: float) -> str:
    """4 significant digits, without an exponent up to a million billions."""
    rounded = float(f"{value:.4g}")
    if rounded >= 1e15:
        return f"{rounded:g}"
    return f"{rounded:.10f}".rstrip("0").rstrip(".") if rounded < 1e4 else f"{rounded:.0f}"
