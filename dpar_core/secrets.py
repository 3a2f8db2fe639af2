"""Passwords in addresses: what is printed, tracked or written into an artifact goes through here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# s3://KEY:SECRET@bucket, postgresql://user:password@host. A password may hold "/" and "@" that nobody escaped; an address
# that was taken for a path has one "/".
_CREDENTIALS = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s@/?#\"'<>]*:[^\s\"'<>]*@")
_TOKEN = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s:@/?#\"'<>]+@(?=[^\s/]*)")
_QUERY = re.compile(
    r"(?P<name>[?&;](?:[\w.-]*(?:password|passwd|pwd|secret|token|signature|credential|access_?key|api_?key|sig)[\w.-]*)=)"
    r"[^&;\s\"'<>#]*",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Return `text` with the credentials of every address in it replaced by `***`; all else stays as it is.

    Credentials are user and password before an `@`, and query values whose name speaks of a password, key or token.
    """
    text = _CREDENTIALS.sub(r"\g<scheme>***@", text)
    text = _TOKEN.sub(r"\g<scheme>***@", text)
    return _QUERY.sub(r"\g<name>***", text)


def redacted_data(value: Any) -> Any:
    """Return JSON data with `redacted` applied to every string in it, keys too."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted_data(key): redacted_data(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_data(inner) for inner in value]
    return value
