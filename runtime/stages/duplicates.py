"""Exact and near duplicates: who repeats whom, among documents that are too many to compare pair by pair.

Two documents are exact duplicates when their texts are equal but for case and white space. They are near duplicates when
the Jaccard similarity of their sets of word shingles reaches a threshold: MinHash signatures in LSH bands propose pairs
(rensa), and the sets themselves decide, so that the threshold means what it says. Bands are chosen so that a pair at the
threshold is proposed in 999 of 1,000 cases.

Of those that repeat each other, the one that comes first stays. `ranked` brings documents into an order that does not
depend on where they stood: the held-out ones first, then the longest, then by hash.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

RECALL_AT_THRESHOLD = 0.999
DEVIATIONS = (
    3  # of a signature's estimate: a proposed pair whose estimate lies further below the threshold is not looked at
)

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Deduplicate:
    """Which duplicates are dropped."""

    exact: bool
    near_threshold: float  # Jaccard similarity of the shingle sets; 0.0: near duplicates stay
    permutations: int  # length of a signature: 4 bytes each in memory, the error of an estimate is 1 / sqrt of it
    shingle_words: int


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is held of a document in memory: about 1 KB."""

    split: int  # rank of its split: a lower one stays
    num_characters: int
    digest: bytes  # of the text without case and white space
    record: bytes  # digest of the whole record, which orders those of equal text
    signature: Any  # rensa.RMinHash; None where near duplicates stay or there are no words


@dataclass(frozen=True)
class Duplicate:
    """A document that is dropped: `of` is the index of the one that it repeats."""

    of: int
    is_exact: bool
    similarity: float


def shingles(text: str, num_words: int) -> set[str]:
    """Every run of `num_words` words, in lower case; a shorter text is one shingle, a text without words none."""
    words = _WORD.findall(text.lower())
    if len(words) <= num_words:
        return {" ".join(words)} if words else set()
    return set(map(" ".join, zip(*(words[i:] for i in range(num_words)), strict=False)))


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard: shingles in both over shingles in either."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)


class Fingerprinter:
    """Makes fingerprints with one seed and one length."""

    def __init__(self, settings: Deduplicate, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._minhash: Any = import_module("rensa").RMinHash

    def __call__(self, text: str, record: bytes, split: int) -> Fingerprint:
        signature = None
        if self._settings.near_threshold:
            tokens = shingles(text, self._settings.shingle_words)
            if tokens:
                (signature,) = self._minhash.from_token_sets([tokens], self._settings.permutations, self._seed)
        plain = " ".join(text.lower().split())
        return Fingerprint(split, len(plain), _digest(plain.encode()), _digest(record), signature)


def ranked(fingerprints: Sequence[Fingerprint]) -> list[int]:
    """Indices of documents, those first that stay where others repeat them."""

    def rank(index: int) -> tuple[int, int, bytes, bytes]:
        document = fingerprints[index]
        return document.split, -document.num_characters, document.digest, document.record

    return sorted(range(len(fingerprints)), key=rank)


def find_duplicates(
    fingerprints: Sequence[Fingerprint], settings: Deduplicate, read_text: Callable[[int], str]
) -> dict[int, Duplicate]:
    """The documents that repeat one that stays, by index. `read_text` gives the text of an index again."""
    found: dict[int, Duplicate] = {}
    first_with: dict[bytes, int] = {}
    order = ranked(fingerprints)
    near = _Near(order, fingerprints, settings, read_text) if settings.near_threshold else None
    for place, index in enumerate(order):
        digest = fingerprints[index].digest
        if settings.exact and digest in first_with:
            found[index] = Duplicate(first_with[digest], is_exact=True, similarity=1.0)
            continue
        duplicate = near.check(place) if near is not None else None
        if duplicate is not None:
            found[index] = duplicate
        else:
            first_with[digest] = index
    return found


class _Near:
    """The documents that stay, by their place in the order, so that near duplicates of them are found."""

    def __init__(
        self,
        order: Sequence[int],
        fingerprints: Sequence[Fingerprint],
        settings: Deduplicate,
        read_text: Callable[[int], str],
    ) -> None:
        threshold, length = settings.near_threshold, settings.permutations
        self._order, self._fingerprints, self._settings, self._read_text = order, fingerprints, settings, read_text
        self._least_estimate = threshold - DEVIATIONS * math.sqrt(threshold * (1 - threshold) / length)
        self._index: Any = import_module("rensa").RMinHashLSH(threshold, length, num_bands(threshold, length))

    def check(self, place: int) -> Duplicate | None:
        """Which of the documents that stay the one at `place` nearly repeats. If none, it stays as well."""
        signature = self._signature(place)
        if signature is None:
            return None
        proposed = sorted((-signature.jaccard(self._signature(other)), other) for other in self._index.query(signature))
        likely = [other for estimate, other in proposed if -estimate >= self._least_estimate]
        own = self._shingles(place) if likely else set()
        for other in likely:
            exact = similarity(own, self._shingles(other))
            if exact >= self._settings.near_threshold:
                return Duplicate(self._order[other], is_exact=False, similarity=exact)
        self._index.insert(place, signature)
        return None

    def _signature(self, place: int) -> Any:
        return self._fingerprints[self._order[place]].signature

    def _shingles(self, place: int) -> set[str]:
        return shingles(self._read_text(self._order[place]), self._settings.shingle_words)


def num_bands(threshold: float, length: int) -> int:
    """The fewest bands of a signature that propose a pair at `threshold` with RECALL_AT_THRESHOLD; else one a number.

    A band of r numbers agrees with probability threshold^r; a pair is proposed when one of the bands agrees.
    """
    for bands in _divisors(length):
        if 1 - (1 - threshold ** (length // bands)) ** bands >= RECALL_AT_THRESHOLD:
            return bands
    return length


def _divisors(number: int) -> Iterable[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
