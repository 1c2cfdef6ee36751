"""The routes of a Xet content store: what hf_xet sends files to and fetches them from.

A *chunk* is a piece of content of some 64 KiB, perhaps packed; a *xorb* is a row of chunks; a *shard* tells which
chunks of which xorbs make up a file. Formats: https://huggingface.co/docs/xet. The sum of a file is checked when its
shard arrives; from then on it can be committed, and fetched with and without Xet.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import pyarrow

from .api import MODEL
from .message import Answer, Request
from .store import Refusal

if TYPE_CHECKING:
    from .server import Hub

PREFIX = "/xet/"
STORED, LZ4, LZ4_OF_GROUPED_BYTES = range(3)
END_OF_FILES = b"\xff" * 32


class Chunk(NamedTuple):
    """Where a chunk lies in its xorb: the header starts at `start`, the packed content is `body`."""

    start: int
    body: slice
    scheme: int
    size: int

    def unpack(self, xorb: bytes) -> bytes:
        packed = xorb[self.body]
        if self.scheme == STORED:
            return packed
        content = pyarrow.decompress(packed, self.size, codec="lz4", asbytes=True)
        if self.scheme == LZ4:
            return content
        if self.scheme != LZ4_OF_GROUPED_BYTES:
            raise Refusal(400, f"unknown packing of a chunk: {self.scheme}")
        ungrouped, at = bytearray(self.size), 0
        for remainder in range(4):  # the bytes at positions 0, 4, 8, …, then those at 1, 5, 9, …
            count = len(range(remainder, self.size, 4))
            ungrouped[remainder::4] = content[at : at + count]
            at += count
        return bytes(ungrouped)


def chunks_of(xorb: bytes) -> list[Chunk]:
    """Reads the 8-byte headers: version, packed size (3 bytes), packing, size (3 bytes), little-endian."""
    chunks, at = [], 0
    while at + 8 <= len(xorb) and xorb[at : at + 7] != b"XETBLOB":  # a footer may follow
        packed = int.from_bytes(xorb[at + 1 : at + 4], "little")
        size = int.from_bytes(xorb[at + 5 : at + 8], "little")
        chunks.append(Chunk(at, slice(at + 8, at + 8 + packed), xorb[at + 4], size))
        at += 8 + packed
    return chunks


class Term(NamedTuple):
    """A part of a file: chunks `first` to before `last` of a xorb, `size` bytes when unpacked."""

    xorb: str
    size: int
    first: int
    last: int


def hash_text(raw: bytes) -> str:
    """Returns a Xet hash as text: four little-endian words of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def files_of(shard: bytes) -> Iterator[tuple[str, str | None, list[Term]]]:
    """Yields the Xet hash, the SHA-256 if told, and the terms of each file; every record has 48 bytes."""
    records = (shard[at : at + 48] for at in range(48, len(shard), 48))  # behind the header
    for record in records:
        if record[:32] == END_OF_FILES:
            return
        flags, count = struct.unpack_from("<II", record, 32)
        terms = []
        for _ in range(count):
            term = next(records)
            terms.append(Term(hash_text(term[:32]), *struct.unpack_from("<III", term, 36)))
        if flags & 1 << 31:  # a sum for each term, which we compute from the content itself
            for _ in range(count):
                next(records)
        sha256 = hash_text(next(records)[:32]) if flags & 1 << 30 else None
        yield hash_text(record[:32]), sha256, terms


class ContentStore:
    """Xorbs and files of one hub.

    Attributes:
        number: a part of its address. hf_xet remembers per address what it has sent, so that a hub that was made
            empty needs an address of its own.
        hashes: Xet hashes by SHA-256.
        tokens: the hub token, the repository and "read" or "write", by the token given out for them.
    """

    def __init__(self):
        self.number = secrets.token_hex(4)
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}
        self.hashes: dict[str, str] = {}
        self.tokens: dict[str, tuple[str | None, str, str]] = {}

    def xorb(self, name: str) -> bytes:
        if name not in self.xorbs:
            raise Refusal(404, f"no xorb {name}")
        return self.xorbs[name]

    def content(self, terms: list[Term]) -> bytes:
        parts = []
        for term in terms:
            xorb = self.xorb(term.xorb)
            part = b"".join(chunk.unpack(xorb) for chunk in chunks_of(xorb)[term.first : term.last])
            if len(part) != term.size:
                raise Refusal(400, f"a term has {len(part)} bytes, its shard says {term.size}")
            parts.append(part)
        return b"".join(parts)


def token(hub: Hub, request: Request, repo_id: str, right: str, revision: str) -> Answer:
    (hub.store.writable if right == "write" else hub.store.fetchable)(repo_id, request.user)
    given = secrets.token_hex(8)
    hub.xet.tokens[given] = (request.token, repo_id, right)
    url, expires = f"{hub.url}{PREFIX}{hub.xet.number}", int(time.time()) + 3600
    # hf_xet reads the body, huggingface_hub the headers.
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": given, "X-Xet-Token-Expiration": str(expires)}
    return Answer({"casUrl": url, "accessToken": given, "exp": expires}, headers=headers)


def check(hub: Hub, request: Request, number: str, right: str) -> None:
    """Refuses tokens that this store did not give out, or whose hub token has been revoked since."""
    hub_token, repo_id, given = hub.xet.tokens.get(request.token or "", (None, "", ""))
    if number != hub.xet.number or not given or (hub_token is not None and hub_token not in hub.users):
        raise Refusal(401, "this Xet token is not valid")
    user = hub.users.get(hub_token or "")
    (hub.store.writable if right == "write" else hub.store.fetchable)(repo_id, user)


def put_xorb(hub: Hub, request: Request, number: str, name: str) -> Answer:
    check(hub, request, number, "write")
    hub.xet.xorbs[name] = request.body
    return Answer({"was_inserted": True})


def put_shard(hub: Hub, request: Request, number: str) -> Answer:
    check(hub, request, number, "write")
    for name, told, terms in files_of(request.body):
        content = hub.xet.content(terms)
        sha256 = hashlib.sha256(content).hexdigest()
        if told not in (None, sha256):
            raise Refusal(400, f"file {name} has the SHA-256 {sha256}, its shard says {told}")
        hub.xet.files[name], hub.xet.hashes[sha256], hub.store.sent[sha256] = terms, name, content
    return Answer({"result": 1})


def reconstruction(hub: Hub, request: Request, number: str, name: str) -> Answer:
    """Tells from which bytes of which xorbs the asked part of a file is made."""
    check(hub, request, number, "read")
    if name not in hub.xet.files:
        raise Refusal(404, f"no file {name}")
    asked = request.bytes_of(sum(term.size for term in hub.xet.files[name]))
    terms, sources, offset, at = [], {}, 0, 0
    for term in hub.xet.files[name]:
        begin, at = at, at + term.size
        if at <= asked.start or begin >= asked.stop:
            continue
        if not terms:
            offset = asked.start - begin
        chunks = {"start": term.first, "end": term.last}
        terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": chunks})
        needed = chunks_of(hub.xet.xorb(term.xorb))[term.first : term.last]
        position = {"start": needed[0].start, "end": needed[-1].body.stop - 1}
        source = {"range": chunks, "url": f"{hub.url}{PREFIX}{number}/data/{term.xorb}", "url_range": position}
        if source not in sources.setdefault(term.xorb, []):
            sources[term.xorb].append(source)
    return Answer({"offset_into_first_range": offset, "terms": terms, "fetch_info": sources})


def xorb_data(hub: Hub, request: Request, number: str, name: str) -> Answer:
    return Answer.content(request, hub.xet.xorb(name), {})  # the public hub's address is signed: no token


STORE = f"{PREFIX}([0-9a-f]+)"
ROUTES = [
    ("GET", f"{MODEL}/xet-(read|write)-token/([^/]+)", token),
    ("POST", f"{STORE}/v1/xorbs/default/([0-9a-f]{{64}})", put_xorb),
    ("POST", f"{STORE}/v1/shards", put_shard),
    ("GET", f"{STORE}/v1/reconstructions/([0-9a-f]{{64}})", reconstruction),
    ("GET", f"{STORE}/data/([0-9a-f]{{64}})", xorb_data),
]
