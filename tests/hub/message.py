"""A request as the routes see it, and what they answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .store import Refusal, User


@dataclass(frozen=True)
class Request:
    """A request; `user` is whom its token stands for, if anyone."""

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

    def bytes_of(self, size: int) -> range:
        """Returns the positions that the Range header asks for in content of `size` bytes; all without the header."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        if asked is None or (int(asked[1]) >= size > 0):
            raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        return range(int(asked[1]), min(int(asked[2] or size), size - 1) + 1)


@dataclass(frozen=True)
class Answer:
    """An answer: bytes, or anything else to be sent as JSON."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def refusal(cls, refusal: Refusal) -> Answer:
        code = {"X-Error-Code": refusal.code} if refusal.code else {}
        message = {"X-Error-Message": refusal.message.splitlines()[-1].encode("ascii", "replace").decode()}
        return cls({"error": refusal.message}, refusal.status, {**refusal.headers, **code, **message})

    @classmethod
    def content(cls, request: Request, data: bytes, headers: Mapping[str, str]) -> Answer:
        """Answers with `data`, or with the part of it that the request's Range header names."""
        headers = {**headers, "Accept-Ranges": "bytes"}
        if "Range" not in request.headers:
            return cls(data, 200, headers)
        part = request.bytes_of(len(data))
        position = f"bytes {part.start}-{part.stop - 1}/{len(data)}"
        return cls(data[part.start : part.stop], 206, {**headers, "Content-Range": position})
