"""Texts of one split that nearly repeat a text of another.

Two texts are near-duplicates when the sets of their pairs of neighbouring words, case and punctuation aside, have a Jaccard
similarity of at least 4/5: in 20 words, one may differ. The search is exact. Two sets that are so similar have at least 4/5 of
each in common; so, with the pairs of both in one order, they have one in common among the first fifth of each, and one more
pair. The rarest pairs are first in that order, and few texts share those (prefix filtering: Bayardo, Ma, Srikant 2007, "Scaling
up all pairs similarity search").
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

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
        for _, pair in sorted((frequency[pair], pair) for pair in pairs)[: _looked_up(pairs)]:
            places[pair].append(place)
    found: set[int] = set()
    for text in texts:
        pairs = _pairs(text)
        known = [pair for pair in pairs if pair in frequency]
        looked_up = _looked_up(pairs) - (len(pairs) - len(known))  # those that occur nowhere are the rarest
        if looked_up > 0:
            rarest = sorted((frequency[pair], pair) for pair in known)[:looked_up]
            candidates = {place for _, pair in rarest for place in places.get(pair, ())}
            found.update(place for place in candidates - found if _similar(pairs, sets[place]))
    return found


def _looked_up(pairs: set[str]) -> int:
    """How many of the rarest pairs: all but 4/5, and one."""
    return len(pairs) // 5 + 1


def _pairs(text: str) -> set[str]:
    words = WORD.findall(text.casefold())
    if len(words) < 2:
        return {words[0] if words else text.strip()}
    return {f"{first} {second}" for first, second in pairwise(words)}


def _similar(first: set[str], second: set[str]) -> bool:
    fewer, more = sorted((len(first), len(second)))
    if 5 * fewer < 4 * more:
        return False
    common = len(first & second)
    return 5 * common >= 4 * (fewer + more - common)
