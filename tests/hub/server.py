"""The HTTP side of the hub: reads requests, breaks the chosen ones, finds the route, answers, keeps a log."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from . import api, xet
from .message import Answer, Request
from .store import File, Refusal, Repo, Store, User

# The stages of a push, for Fault.match.
CREATE = r"^POST /api/repos/create"
PREUPLOAD = r"^POST .*/preupload/"
WEIGHTS = r"^(PUT /lfs/|POST .*/xorbs/)"
COMMIT = r"^POST .*/commit/"

ROUTES = [(method, re.compile(pattern), answer) for method, pattern, answer in api.ROUTES + xet.ROUTES]


@dataclass
class Fault:
    """Breaks the next `times` requests whose "METHOD /path" the regular expression `match` finds.

    Attributes:
        action: an HTTP status to answer with; "reset": the connection is closed before the body is read;
            "drop": closed after the body is read, nothing done; "lost": the request is carried out and the answer
            never sent; "stall": carried out `seconds` later; or a function to call before the request is looked at.
        times: how many requests; math.inf for all.
    """

    match: str
    action: int | str | Callable[[], object] = 503
    times: float = 1
    seconds: float = 60
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = "broken by the test"


UNBROKEN = Fault("", "")


class Logged(NamedTuple):
    """A request and what came of it: an HTTP status, or the action of the fault that left it unanswered."""

    method: str
    path: str
    status: int | str
    user: str | None


class Hub:
    """A hub on a free port of 127.0.0.1; it answers while the `with` block runs and refuses connections before.

    Args:
        users: whom each token stands for. Taking a token out revokes it.
        port: 0 for a free one.

    Attributes:
        mode: "lfs" or "xet", how the clients of the running test send weights; the hub itself takes both.
    """

    mode = "xet"

    def __init__(self, users: Mapping[str, User], port: int = 0):
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self.released = threading.Event()  # ends stalls
        self.reset(users)
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler, bind_and_activate=False)
        self.server.daemon_threads = True
        self.server.server_bind()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def reset(self, users: Mapping[str, User]) -> None:
        """Makes the hub new and empty."""
        self.released.set()
        with self.lock:
            self.users, self.store, self.xet = dict(users), Store(), xet.ContentStore()
            self.faults: list[Fault] = []
            self.log: list[Logged] = []
            self.released = threading.Event()

    def __enter__(self) -> Hub:
        self.server.server_activate()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):  # the server goes on serving open ones
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, private=False, gated=False) -> Repo:
        """Adds a repository that is simply there."""
        repo = self.store.repos[repo_id] = Repo(repo_id, private, gated)
        if files:
            content = {path: File(data, api.is_lfs(path, len(data))) for path, data in files.items()}
            repo.commit({**repo.commits[repo.branches["main"]].files, **content}, "add files", "hub")
        return repo

    def requests(self, match: str) -> list[Logged]:
        """Returns the logged requests whose "METHOD /path" the regular expression finds."""
        return [logged for logged in self.log if re.search(match, f"{logged.method} {logged.path}")]

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Answer:
        """Finds the route of a request and carries it out; refusals become answers."""
        if request.token is not None and request.user is None and not request.path.startswith(xet.PREFIX):
            return Answer.refusal(Refusal(401, "Invalid credentials in Authorization header"))
        for methods, pattern, respond in ROUTES:
            if request.method in methods.split() and (found := pattern.fullmatch(request.path)):
                try:
                    with self.lock:
                        return respond(self, request, *(part and unquote(part) for part in found.groups()))
                except Refusal as refusal:
                    return Answer.refusal(refusal)
                except Exception:
                    return Answer.refusal(Refusal(500, traceback.format_exc()))
        return Answer.refusal(Refusal(404, f"no such route: {request.method} {request.path}"))


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def setup(self):
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args):
        pass  # hub.log is the log

    def handle_request(self):
        hub, url, released = self.hub, urlsplit(self.path), self.hub.released
        fault = hub.fault_for(f"{self.command} {url.path}") or UNBROKEN
        if fault.action == "reset":
            return self.hang_up("reset", None)
        body = self.read_body()
        if callable(fault.action):
            fault.action()
        token = self.headers["Authorization"] and self.headers["Authorization"].removeprefix("Bearer ")
        user = hub.users.get(token or "")
        headers = {name.title(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), headers, body, token, user)
        if fault.action == "drop":
            return self.hang_up("drop", user)
        if fault.action == "stall" and released.wait(fault.seconds):  # the hub has been reset meanwhile
            self.close_connection = True
            return None
        if isinstance(fault.action, int):
            answer = Answer({"error": fault.body}, fault.action, fault.headers)
        else:
            answer = hub.answer(request)
        if fault.action == "lost":
            return self.hang_up("lost", user)
        # Logged first: the client may look at the log as soon as it has its answer.
        hub.log.append(Logged(self.command, self.path, answer.status, user and user.name))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def hang_up(self, reason: str, user: User | None) -> None:
        self.hub.log.append(Logged(self.command, self.path, reason, user and user.name))
        self.close_connection = True

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        self.send_response(answer.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
