"""The playground: one page without a build step, third parties or inline surprises."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FILE = Path(__file__).parent / "playground.html"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@cache
def playground() -> bytes:
    """The page as it lies in the package."""
    return _FILE.read_bytes()
