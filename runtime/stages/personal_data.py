"""Personal data in a text, replaced by placeholders: e-mail and public IP addresses, payment cards, IBANs.

Regular expressions find candidates, validators decide. datatrove's PIIFormatter is not used: it takes `a@b.T` and
`logo@2x.png` for addresses and the first four numbers of version 1.2.3.4.5 for an IP, knows no IPv6, and counts nothing.

What stays: addresses that belong to nobody (private, loopback, link-local, multicast and documentation ranges; RFC 2606's
example domains), and four numbers that are marked as a version or a section. A version of four numbers below 256 without
any mark cannot be told from an address, and is replaced.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

Kind = str  # "email" | "ip" | "card" | "iban"
KINDS: tuple[Kind, ...] = ("email", "ip", "card", "iban")

_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+([A-Za-z]{2,24})"
    r"(?![\w(\[@-]|\.\w)",
    re.ASCII,
)
# RFC 2606 and 6761: never anybody's.
_EXAMPLE = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)$", re.IGNORECASE)
# What follows a dot in file names with an @ (icons, packages, units of systemd), and is no top-level domain.
_SUFFIXES = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "js", "css", "json", "html", "service"))

_IPV4 = re.compile(r"(?<![\w.-])(?<!\w/)(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\w)", re.ASCII)
_VERSION_BEFORE = re.compile(
    r"(?:(?<![a-z])(?:v|ver|versions?|releases?|rev|revision|sections?|sec|chapter|clause|appendix|table|figure|paragraph)"
    r"_*[\"']?\.?\s*[:=]?|[=<>~^]=|§)\s*[\"']?$",
    re.IGNORECASE,
)
_CONTEXT = 24  # characters before a candidate in which its mark stands

# 2000::/3 is all of IPv6 that is given to anybody (IANA), so that `a::b` of C++ is none; three groups at least, so that the
# slice [2000::2] is none.
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,33}[0-9A-Fa-f](?!\w|:[0-9A-Fa-f:])", re.ASCII)
_IPV6_GROUPS = 3

_SEPARATOR = r"[ -]"
_CARD = re.compile(
    r"(?<![\w.-])(?:\d{13,19}"
    rf"|\d{{4}}({_SEPARATOR})\d{{4}}\1\d{{4}}\1\d{{4}}"
    rf"|\d{{4}}({_SEPARATOR})\d{{6}}\2\d{{4,5}})(?![\w-]|\.\d)",
    re.ASCII,
)
# Issuer's numbers by ISO/IEC 7812 and the lengths that they issue: Visa, Mastercard, American Express, Discover, Diners
# Club, JCB, UnionPay.
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)

_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}", re.ASCII)
# Characters of an IBAN by country: SWIFT's IBAN registry.
_IBAN_LENGTHS = {
    15: "NO",
    16: "BE",
    18: "DK FI FO GL NL SD",
    19: "MK SI",
    20: "AT BA EE KZ LT LU XK",
    21: "CH HR LI LV",
    22: "BG BH CR DE GB GE IE ME RS VA",
    23: "AE GI IL IQ OM TL",
    24: "AD CZ ES MD PK RO SA SE SK TN VG",
    25: "LY PT ST",
    26: "IS TR",
    27: "BI DJ FR GR IT MC MR SM",
    28: "AL AZ BY CY DO GT HU LB NI PL",
    29: "BR EG PS QA UA",
    30: "JO KW MU",
    31: "MT SC",
    32: "LC",
    33: "RU",
}
_IBAN_LENGTH = {country: length for length, countries in _IBAN_LENGTHS.items() for country in countries.split()}


def scrub(text: str, kinds: Sequence[Kind]) -> tuple[str, Counter[Kind]]:
    """`text` with every find of `kinds` (of KINDS) replaced by <EMAIL>, <IP>, <CARD> or <IBAN>, and how many of each."""
    counts: Counter[Kind] = Counter()
    for kind in kinds:
        for pattern, replacer in _REPLACERS[kind]:
            text = pattern.sub(partial(_replace, kind, replacer, counts), text)
    return text, counts


# What stands in for a match: the placeholder, perhaps with what follows it; None keeps the match.
_Replacer = Callable[[re.Match[str], str], str | None]


def _replace(kind: Kind, replacer: _Replacer, counts: Counter[Kind], match: re.Match[str]) -> str:
    replacement = replacer(match, f"<{kind.upper()}>")
    if replacement is None:
        return match[0]
    counts[kind] += 1
    return replacement


def _email(match: re.Match[str], placeholder: str) -> str | None:
    local, domain = match[0].split("@")
    is_shared = local == "git"  # the address of a repository, not of a person
    return None if is_shared or _EXAMPLE.search(domain) or match[1].lower() in _SUFFIXES else placeholder


def _ipv4(match: re.Match[str], placeholder: str) -> str | None:
    before = match.string[max(0, match.start() - _CONTEXT) : match.start()]
    return placeholder if _is_public(match[0]) and not _VERSION_BEFORE.search(before) else None


def _ipv6(match: re.Match[str], placeholder: str) -> str | None:
    groups = sum(bool(group) for group in match[0].split(":"))
    return placeholder if groups >= _IPV6_GROUPS and _is_public(match[0]) else None


def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast


def _card(match: re.Match[str], placeholder: str) -> str | None:
    digits = re.sub(_SEPARATOR, "", match[0])
    return placeholder if _ISSUER.fullmatch(digits) and _passes_luhn(digits) else None


def _passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1: from the right, every second digit counts double (its digits' sum); the total ends in 0."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _iban(match: re.Match[str], placeholder: str) -> str | None:
    """The match runs on into capitals that follow: the country says how many characters belong to the number."""
    length = _IBAN_LENGTH.get(match[0][:2], 0)
    ends = [i + 1 for i, character in enumerate(match[0]) if character != " "]
    if not 0 < length <= len(ends):
        return None
    number, rest = match[0][: ends[length - 1]], match[0][ends[length - 1] :]
    following = rest or match.string[match.end() : match.end() + 1]
    if following[:1].isalnum() or not _passes_mod_97(number.replace(" ", "")):
        return None
    return placeholder + rest


def _passes_mod_97(number: str) -> bool:
    """ISO 13616: country and check digits to the end, letters as 10 to 35, remainder 1."""
    return int("".join(str(int(character, 36)) for character in number[4:] + number[:4])) % 97 == 1


_REPLACERS: dict[Kind, tuple[tuple[re.Pattern[str], _Replacer], ...]] = {
    "email": ((_EMAIL, _email),),
    "ip": ((_IPV6, _ipv6), (_IPV4, _ipv4)),
    "card": ((_CARD, _card),),
    "iban": ((_IBAN, _iban),),
}
