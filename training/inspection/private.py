"""Secrets and personal data that patterns find, and their masking: nothing of this kind is ever shown in full."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """What one kind looks like. Only texts that hold one of `hints` are searched; `check` has the last word."""

    kind: str
    regex: re.Pattern[str]
    hints: tuple[str, ...] = ()
    check: Callable[[str], bool] = bool


def find_private(text: str) -> list[tuple[str, str]]:
    """(kind, the text itself) of every secret and piece of personal data in a text."""
    return [(kind, text[start:end]) for start, end, kind in private_places(text)]


def mask_private(text: str) -> str:
    """The text with every secret and piece of personal data masked."""
    done, pieces = 0, []
    for start, end, kind in private_places(text):
        pieces += [text[done:start], mask(kind, text[start:end])]
        done = end
    return "".join([*pieces, text[done:]])


def mask(kind: str, found: str) -> str:
    """What may be shown of it: its kind, its length and, of a long one, its first characters."""
    start = found[:4] if len(found) >= 16 and kind not in _SHOW_NOTHING else ""
    return f"{start}…[{kind}, {len(found)} characters]"


def private_places(text: str) -> list[tuple[int, int, str]]:
    """(start, end, kind) in the text's order. Where two overlap, the kind that stands first in PATTERNS is meant."""
    places: list[tuple[int, int, str]] = []
    for pattern in PATTERNS:
        if pattern.hints and not any(hint in text for hint in pattern.hints):
            continue
        for match in pattern.regex.finditer(text):
            apart = all(match.end() <= start or match.start() >= end for start, end, _ in places)
            if apart and pattern.check(match.group()):
                places.append((*match.span(), pattern.kind))
    return sorted(places)


def passes_luhn(text: str) -> bool:
    """Whether the digits of a card number have the right check digit (ISO/IEC 7812-1)."""
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(digits) >= 13 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def is_iban(text: str) -> bool:
    """Whether an IBAN has the right check digits (ISO 13616: modulo 97 is 1)."""
    plain = re.sub(r"\s", "", text)
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in moved)) % 97 == 1


def _is_somebodys(address: str) -> bool:
    """Not one of the domains that are reserved for examples (RFC 2606)."""
    domain = address.rpartition("@")[2].lower()
    return not re.search(r"(^|\.)(example\.(com|net|org)|example|test|invalid|localhost)$", domain)


def _is_phone(text: str) -> bool:
    return 8 <= sum(char.isdigit() for char in text) <= 15


def _is_random(text: str) -> bool:
    value = re.split(r"[:=]\s*[\"']?", text, maxsplit=1)[-1]
    return any(char.isdigit() for char in value) and any(char.isalpha() for char in value)


def _pattern(kind: str, regex: str, *hints: str, check: Callable[[str], bool] = bool) -> Pattern:
    return Pattern(kind, re.compile(regex), hints, check)


_KEY = "API key"
_SHOW_NOTHING = (
    "private key",
    "password in a URL",
    "password or token",
    "card number",
    "phone number",
    "e-mail address",
)
# The forms of keys are those that their issuers document.
PATTERNS: tuple[Pattern, ...] = (
    _pattern(
        "private key",
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        "PRIVATE KEY",
    ),
    _pattern("password in a URL", r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]+:[^\s/@]+@[^\s/]+", "://"),
    _pattern(_KEY, r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", "AKIA", "ASIA"),
    _pattern(_KEY, r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{22,}\b", "gh", "github_pat_"),
    _pattern(_KEY, r"\bglpat-[\w-]{20,}", "glpat-"),
    _pattern(_KEY, r"\bxox[abeprs]-[\w-]{10,}", "xox"),
    _pattern(_KEY, r"\bAIza[\w-]{35}", "AIza"),
    _pattern(_KEY, r"\bsk-(?=[\w-]*\d)[\w-]{20,}", "sk-"),
    _pattern(_KEY, r"\b[rs]k_live_\w{20,}\b", "k_live_"),
    _pattern(_KEY, r"\bhf_[A-Za-z0-9]{30,}\b", "hf_"),
    _pattern(_KEY, r"\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[\w-]{50,}", "npm_", "pypi-"),
    _pattern(_KEY, r"\bSG\.[\w-]{22}\.[\w-]{43}\b", "SG."),
    _pattern("token (JWT)", r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{5,}", "eyJ"),
    _pattern(
        "password or token",
        r"(?i)\b(?:api[_-]?key|secret[_-]?key|access[_-]?token|passw(?:or)?d)[\"']?\s*[:=]\s*[\"']?[^\s\"',;]{8,}",
        ":",
        "=",
        check=_is_random,
    ),
    _pattern(
        "e-mail address", r"\b[\w.+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b", "@", check=_is_somebodys
    ),
    _pattern("IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", check=is_iban),
    _pattern(
        "card number",
        r"(?<![\d.,-])(?<!\d )(?:3[47]\d\d[ -]?\d{6}[ -]?\d{5}"
        r"|(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6011|65\d\d)(?:[ -]?\d{4}){3})(?![ .,-]?\d)",
        check=passes_luhn,
    ),
    _pattern(
        "phone number",
        r"(?<![\w.+/-])\+\d{1,3}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}(?![\w-])"
        r"|(?<![\w.+/-])(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}(?![\w-])",
        "+",
        "-",
        ".",
        check=_is_phone,
    ),
)
