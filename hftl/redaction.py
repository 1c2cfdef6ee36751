"""Redaction of secrets and escaping of terminal control characters, for text that is shown or stored."""

from __future__ import annotations

import os
import re

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_SECRET_NAME = re.compile(r"(TOKEN|API_?KEY|SECRET(_ACCESS)?(_KEY)?|PASSWORD|PASSWD)$")
_MIN_SECRET_LENGTH = 8
"""Characters; shorter values of environment variables are words such as `none` and are not redacted."""
# C0 except tab and newline, DEL, C1, line separators and bidirectional controls
_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """Returns `text` without Hub tokens, credentials in URLs, and values of secret environment variables.

    An environment variable is secret if its name ends in TOKEN, API_KEY, SECRET or PASSWORD.
    """
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET_LENGTH and value in text and _SECRET_NAME.search(name.upper()):
            text = text.replace(value, "***")
    return _TOKEN.sub("hf_***", _URL_CREDENTIALS.sub("***", text))


def sanitize(text: str) -> str:
    r"""Returns `text` redacted, with control characters escaped as `\\x1b`, since labels may hold terminal commands."""
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), redact(text))
