"""Text as it may be shown or stored: without secrets, and with characters that command a terminal written out."""

from __future__ import annotations

import os
import re

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|SECRET(_ACCESS)?(_KEY)?|PASSWORD|PASSWD)$")
_NOT_SECRET = 8
"""Values of the environment shorter than this are words like `none`, and are left alone."""
# C0 but tab and newline, DEL and C1, and the marks that turn the direction of what follows
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """Returns `text` without tokens of the hub, credentials in addresses, and secrets of the environment.

    A secret of the environment is the value of a variable whose name ends in TOKEN, API_KEY, SECRET or PASSWORD.
    """
    for name, value in os.environ.items():
        if len(value) >= _NOT_SECRET and value in text and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, "***")
    return _TOKEN.sub("hf_***", _IN_ADDRESS.sub("***", text))


def sanitize(text: str) -> str:
    r"""Returns `text` redacted, its control characters as `\\x1b`: a label may hold a command to the terminal."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), redact(text))
