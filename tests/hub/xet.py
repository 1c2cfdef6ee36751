"""Routes of a Xet content store, for uploads and downloads by hf_xet.

A *chunk* is about 64 KiB of content, possibly compressed. A *xorb* is a sequence of chunks. A *shard* lists the chunks
and xorbs of files. The upload of a shard verifies the SHA-256 of its files; afterwards a file can be committed, and
downloaded with and without Xet.

Source: https://huggingface.co/docs/xet (formats).
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
from .message import Request, Response
from .store import HubError

if TYPE_CHECKING:
    from .server import Hub

PREFIX = "/xet/"
STORED, LZ4, LZ4_OF_GROUPED_BYTES = range(3)
END_OF_FILES = b"\xff" * 32


class Chunk(NamedTuple):
    """Position of a chunk in its xorb: the header starts at `start`, the compressed content is `body`."""

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
            raise HubError(400, f"unknown compression scheme of a chunk: {self.scheme}")
        ungrouped, at = bytearray(self.size), 0
        for remainder in range(4):  # bytes at positions 0, 4, 8, …, then those at 1, 5, 9, …
            count = len(range(remainder, self.size, 4))
            ungrouped[remainder::4] = content[at : at + count]
            at += count
        return bytes(ungrouped)


def parse_chunks(xorb: bytes) -> list[Chunk]:
    """Parses 8-byte headers: version, compressed size (3 bytes), scheme, size (3 bytes), little-endian."""
    chunks, at = [], 0
    while at + 8 <= len(xorb) and xorb[at : at + 7] != b"XETBLOB":  # a footer may follow
        packed = int.from_bytes(xorb[at + 1 : at + 4], "little")
        size = int.from_bytes(xorb[at + 5 : at + 8], "little")
        chunks.append(Chunk(at, slice(at + 8, at + 8 + packed), xorb[at + 4], size))
        at += 8 + packed
    return chunks


class Term(NamedTuple):
    """Segment of a file: chunks `first` (inclusive) to `last` (exclusive) of a xorb, `size` decompressed bytes."""

    xorb: str
    size: int
    first: int
    last: int


def hash_text(raw: bytes) -> str:
    """Returns a Xet hash as hexadecimal text: four little-endian 64-bit words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def parse_files(shard: bytes) -> Iterator[tuple[str, str | None, list[Term]]]:
    """Yields Xet hash, SHA-256 (None if missing) and terms of each file; a record has 48 bytes."""
    records = (shard[at : at + 48] for at in range(48, len(shard), 48))  # after the header
    for record in records:
        if record[:32] == END_OF_FILES:
            return
        flags, count = struct.unpack_from("<II", record, 32)
        terms = []
        for _ in range(count):
            term = next(records)
            terms.append(Term(hash_text(term[:32]), *struct.unpack_from("<III", term, 36)))
        if flags & 1 << 31:  # skip the checksum of each term; the file's SHA-256 is verified
            for _ in range(count):
                next(records)
        sha256 = hash_text(next(records)[:32]) if flags & 1 << 30 else None
        yield hash_text(record[:32]), sha256, terms


class ContentStore:
    """Xorbs and files of one Hub server.

    Attributes:
        number: Component of the URL. hf_xet caches uploads per URL, so a reset server needs a new one.
        hashes: Xet hashes by SHA-256.
        tokens: (Hub token, repository, "read" or "write") by Xet token.
    """

    def __init__(self):
        self.number = secrets.token_hex(4)
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}
        self.hashes: dict[str, str] = {}
        self.tokens: dict[str, tuple[str | None, str, str]] = {}

    def xorb(self, name: str) -> bytes:
        if name not in self.xorbs:
            raise HubError(404, f"no xorb {name}")
        return self.xorbs[name]

    def content(self, terms: list[Term]) -> bytes:
        segments = []
        for term in terms:
            xorb = self.xorb(term.xorb)
            segment = b"".join(chunk.unpack(xorb) for chunk in parse_chunks(xorb)[term.first : term.last])
            if len(segment) != term.size:
                raise HubError(400, f"a term has {len(segment)} bytes, its shard has {term.size}")
            segments.append(segment)
        return b"".join(segments)


def token(hub: Hub, request: Request, repo_id: str, right: str, revision: str) -> Response:
    (hub.store.writable if right == "write" else hub.store.fetchable)(repo_id, request.user)
    access_token = secrets.token_hex(8)
    hub.xet.tokens[access_token] = (request.token, repo_id, right)
    url, expires = f"{hub.url}{PREFIX}{hub.xet.number}", int(time.time()) + 3600
    # hf_xet reads the body, huggingface_hub the headers
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": access_token, "X-Xet-Token-Expiration": str(expires)}
    return Response({"casUrl": url, "accessToken": access_token, "exp": expires}, headers=headers)


def check(hub: Hub, request: Request, number: str, right: str) -> None:
    """Raises HubError for tokens that this store did not issue, or whose Hub token was revoked."""
    hub_token, repo_id, granted = hub.xet.tokens.get(request.token or "", (None, "", ""))
    if number != hub.xet.number or not granted or (hub_token is not None and hub_token not in hub.users):
        raise HubError(401, "this Xet token is not valid")
    user = hub.users.get(hub_token or "")
    (hub.store.writable if right == "write" else hub.store.fetchable)(repo_id, user)


def put_xorb(hub: Hub, request: Request, number: str, name: str) -> Response:
    check(hub, request, number, "write")
    hub.xet.xorbs[name] = request.body
    return Response({"was_inserted": True})


def put_shard(hub: Hub, request: Request, number: str) -> Response:
    check(hub, request, number, "write")
    for name, expected, terms in parse_files(request.body):
        content = hub.xet.content(terms)
        sha256 = hashlib.sha256(content).hexdigest()
        if expected not in (None, sha256):
            raise HubError(400, f"file {name} has the SHA-256 {sha256}, its shard has {expected}")
        hub.xet.files[name], hub.xet.hashes[sha256], hub.store.uploaded[sha256] = terms, name, content
    return Response({"result": 1})


def reconstruction(hub: Hub, request: Request, number: str, name: str) -> Response:
    """Returns the byte ranges of xorbs that contain the requested range of a file."""
    check(hub, request, number, "read")
    if name not in hub.xet.files:
        raise HubError(404, f"no file {name}")
    requested = request.byte_range(sum(term.size for term in hub.xet.files[name]))
    terms, sources, offset, at = [], {}, 0, 0
    for term in hub.xet.files[name]:
        begin, at = at, at + term.size
        if at <= requested.start or begin >= requested.stop:
            continue
        if not terms:
            offset = requested.start - begin
        chunks = {"start": term.first, "end": term.last}
        terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": chunks})
        term_chunks = parse_chunks(hub.xet.xorb(term.xorb))[term.first : term.last]
        positions = {"start": term_chunks[0].start, "end": term_chunks[-1].body.stop - 1}
        source = {"range": chunks, "url": f"{hub.url}{PREFIX}{number}/data/{term.xorb}", "url_range": positions}
        if source not in sources.setdefault(term.xorb, []):
            sources[term.xorb].append(source)
    return Response({"offset_into_first_range": offset, "terms": terms, "fetch_info": sources})


def xorb_data(hub: Hub, request: Request, number: str, name: str) -> Response:
    return Response.content(request, hub.xet.xorb(name), {})  # no token: the public Hub uses signed URLs


STORE = f"{PREFIX}([0-9a-f]+)"
ROUTES = [
    ("GET", f"{MODEL}/xet-(read|write)-token/([^/]+)", token),
    ("POST", f"{STORE}/v1/xorbs/default/([0-9a-f]{{64}})", put_xorb),
    ("POST", f"{STORE}/v1/shards", put_shard),
    ("GET", f"{STORE}/v1/reconstructions/([0-9a-f]{{64}})", reconstruction),
    ("GET", f"{STORE}/data/([0-9a-f]{{64}})", xorb_data),
]
