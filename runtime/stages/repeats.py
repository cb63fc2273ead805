"""Texts of one split that nearly repeat a text of another.

Two texts are near-duplicates when the sets of their pairs of neighbouring words, case and punctuation aside, have a Jaccard
similarity of at least THRESHOLD: in 20 words, one may differ. The search is exact. A text can be that similar to another
only if at least THRESHOLD of its own pairs occur in it, so most texts are ruled out by their pairs that occur nowhere, and of
the others only the rarest pairs are looked up (prefix filtering: Bayardo, Ma, Srikant 2007, "Scaling up all pairs similarity
search").
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

THRESHOLD = Fraction(4, 5)
WORD = re.compile(r"\w+")


def normalise(text: str) -> str:
    """The words of `text` in lower case, a space between them."""
    return " ".join(WORD.findall(text.casefold()))


def find_repeated(held: Sequence[str], texts: Iterable[str]) -> set[int]:
    """The places in `held` of what at least one of `texts` nearly repeats."""
    sets = [_pairs(text) for text in held]
    frequency = Counter(pair for pairs in sets for pair in pairs)
    places = defaultdict(list)
    for place, pairs in enumerate(sets):
        for pair in pairs:
            places[pair].append(place)
    found: set[int] = set()
    for text in texts:
        pairs = _pairs(text)
        known = sorted((frequency[pair], pair) for pair in pairs if pair in frequency)
        may_lack = len(pairs) - math.ceil(THRESHOLD * len(pairs))
        looked_up = may_lack + 1 - (len(pairs) - len(known))  # one of so many of the rarest is in every near-duplicate
        candidates = {place for _, pair in known[: max(looked_up, 0)] for place in places[pair]}
        found.update(place for place in candidates - found if _similar(pairs, sets[place]))
    return found


def _pairs(text: str) -> set[str]:
    words = WORD.findall(text.casefold())
    if len(words) < 2:
        return {words[0] if words else text.strip()}
    return {f"{first} {second}" for first, second in pairwise(words)}


def _similar(first: set[str], second: set[str]) -> bool:
    common = len(first & second)
    return common >= THRESHOLD * (len(first) + len(second) - common)
