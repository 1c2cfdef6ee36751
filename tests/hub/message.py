"""Requests and responses of the Hub server."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .store import HubError, User


@dataclass(frozen=True)
class Request:
    """HTTP request; `user` is the owner of its token, None for an unknown or missing token."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    token: str | None
    user: User | None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def byte_range(self, size: int) -> range:
        """Returns the byte positions of the Range header in content of `size` bytes; all without the header."""
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        if requested is None or (int(requested[1]) >= size > 0):
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return range(int(requested[1]), min(int(requested[2] or size), size - 1) + 1)


@dataclass(frozen=True)
class Response:
    """HTTP response; a body other than bytes is sent as JSON."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def error(cls, error: HubError) -> Response:
        code = {"X-Error-Code": error.code} if error.code else {}
        message = {"X-Error-Message": error.message.splitlines()[-1].encode("ascii", "replace").decode()}
        return cls({"error": error.message}, error.status, {**error.headers, **code, **message})

    @classmethod
    def content(cls, request: Request, data: bytes, headers: Mapping[str, str]) -> Response:
        """Returns a response with `data`, or with the range of the request's Range header."""
        headers = {**headers, "Accept-Ranges": "bytes"}
        if "Range" not in request.headers:
            return cls(data, 200, headers)
        positions = request.byte_range(len(data))
        content_range = f"bytes {positions.start}-{positions.stop - 1}/{len(data)}"
        return cls(data[positions.start : positions.stop], 206, {**headers, "Content-Range": content_range})
