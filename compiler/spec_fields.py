"""Types of a spec's fields: quantities with units and ranges, names, and what all sections share."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints
from pydantic_core import CoreSchema, core_schema

from trainwright.compiler.units import BUDGET_KINDS, KINDS, Quantity, UnitError, format_quantity, parse_quantity


@dataclass(frozen=True)
class _Measure:
    """Makes a field hold a quantity of an accepted kind, low <= amount <= high in that kind's base unit."""

    accepted: tuple[str, ...]
    bare: str = ""  # the kind of a number without a unit; "": a unit is needed
    low: float = 0.0
    high: float = 1e60
    names: str = ""  # pattern of the names that stand for a quantity, which the facts know; they are kept as written

    def __call__(self, value: object) -> Quantity | str:
        if self.names and isinstance(value, str) and re.fullmatch(self.names, value.strip()):
            return value.strip()
        quantity = parse_quantity(value, self.accepted, self.bare)
        if not self.low <= quantity.amount <= self.high:
            word, bound = ("at least", self.low) if quantity.amount < self.low else ("at most", self.high)
            raise UnitError(f"{value!r} is out of range: it must be {word} {format_quantity(quantity.kind, bound)}")
        return quantity

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: object) -> dict[str, Any]:
        return {
            "type": ["string", "number"] if self.bare else "string",
            "x-unit": " | ".join(KINDS[kind].example for kind in self.accepted),
        }


def section_or_empty(value: object) -> object:
    """A key with nothing after it (`training:`) is an empty section."""
    return {} if value is None else value


def one_line(value: str) -> str:
    """Text for a table: not blank, without line breaks."""
    if not 1 <= len(value) <= 64 or not value.isprintable() or value != value.strip():
        raise UnitError(f"{value!r} is no title: one line of 1 to 64 characters, without spaces around it")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
StageName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
Title = Annotated[str, AfterValidator(one_line)]
Tokens = Annotated[Quantity, _Measure(("tokens",), bare="tokens", low=1, high=1e16)]
Size = Annotated[
    Quantity | str,  # a mixture of experts is called by them: 8x7B
    _Measure(
        ("parameters",),
        bare="parameters",
        low=1000,
        high=1e14,
        names=r"\d+x\d+(\.\d+)?[MBT]|\d+(\.\d+)?[MBT]-A\d+(\.\d+)?[MBT]|[a-z]{3,16}",
    ),
]
Batch = Annotated[Quantity, _Measure(("tokens", "sequences"), low=1, high=1e10)]
Warmup = Annotated[Quantity, _Measure(("steps", "fraction"), high=1e9)]
Cadence = Annotated[Quantity, _Measure(("tokens", "steps"), low=1, high=1e16)]
WarmupShare = Annotated[Quantity, _Measure(("fraction",), bare="fraction", high=1)]
Metric = Annotated[str, StringConstraints(pattern=r"^[a-z_]+(/[A-Za-z0-9._-]+){0,2}$")]
HeldOut = Annotated[Quantity, _Measure(("fraction",), bare="fraction", low=0.001, high=0.4)]
Budget = Annotated[Quantity, _Measure(BUDGET_KINDS, low=1e-3)]
Deadline = Annotated[Quantity, _Measure(("time",), low=1)]
ServedTokens = Annotated[Quantity, _Measure(("tokens",), bare="tokens", low=1, high=1e20)]
Memory = Annotated[Quantity, _Measure(("bytes",), low=1e6, high=1e16)]
Price = Annotated[Quantity, _Measure(("price",), low=1e-4, high=1e5)]
Money = Annotated[Quantity, _Measure(("money",), low=0.01, high=1e15)]
Power = Annotated[Quantity, _Measure(("power",), low=0.1, high=1e5)]
Carbon = Annotated[Quantity, _Measure(("carbon",), high=10)]


class Section(BaseModel):
    """Closed and frozen: an unknown key, another type or nan is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
