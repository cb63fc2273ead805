"""Values beside the reasons for them, while a plan is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from trainwright.compiler.plan import Reason, round_leaf

T = TypeVar("T")


@dataclass
class Ledger:
    """Collects one Reason a leaf. `pins` maps spec paths to the place where the user wrote them."""

    pins: Mapping[str, str]
    reasons: dict[str, Reason] = field(default_factory=dict)

    def note(self, leaf: str, value: T, kind: str, text: str, *, pin: str = "", detail: str = "") -> T:
        """Record why `leaf` has `value`; a pin of the user at the spec's path `pin` is the reason before any other, and
        `detail` says what became of it."""
        place = self.pins.get(pin)
        self.reasons[leaf] = Reason("pinned", f"{pin} at {place}{detail}") if place else Reason(kind, text)
        if isinstance(value, float):
            rounded: T = round_leaf(value)  # type: ignore[assignment] # a float is rounded to a float
            return rounded
        return value


@dataclass(frozen=True)
class Section:
    """A ledger below one place in the plan (`leaf`) and one in the spec (`pin`), where names are mostly the same."""

    ledger: Ledger
    leaf: str
    pin: str

    def note(self, name: str, value: T, kind: str, text: str, *, key: str = "", detail: str = "") -> T:
        """As `Ledger.note`; `key` is the name in the spec, where it is another."""
        pin = f"{self.pin}.{key or name}"
        return self.ledger.note(f"{self.leaf}.{name}", value, kind, text, pin=pin, detail=detail)
