"""HTTP server of the Hub: request parsing, fault injection, routing and request log."""

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
from .message import Request, Response
from .store import File, HubError, Repo, Store, User

# stages of a push, for Fault.match
CREATE = r"^POST /api/repos/create"
PREUPLOAD = r"^POST .*/preupload/"
WEIGHTS = r"^(PUT /lfs/|POST .*/xorbs/)"
COMMIT = r"^POST .*/commit/"

ROUTES = [(method, re.compile(pattern), handler) for method, pattern, handler in api.ROUTES + xet.ROUTES]


@dataclass
class Fault:
    """Fault of the next `times` requests whose "METHOD /path" matches the regular expression `match`.

    Attributes:
        match: Regular expression.
        action: HTTP status of the response; "reset": closes the connection before the body is read; "drop": closes it
            after the body is read, without effect; "lost": handles the request without a response; "stall": handles
            it after `seconds`; or a function that is called before the request is handled.
        times: Number of requests; math.inf for all.
        seconds: Duration of a stall.
        headers: Headers of an error response.
        body: Error message of an error response.
    """

    match: str
    action: int | str | Callable[[], object] = 503
    times: float = 1
    seconds: float = 60
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = "broken by the test"


NO_FAULT = Fault("", "")


class Logged(NamedTuple):
    """Logged request; `status` is the HTTP status, or the action of the fault that prevented a response."""

    method: str
    path: str
    status: int | str
    user: str | None


class Hub:
    """Hub server on 127.0.0.1; it accepts connections inside the `with` block only.

    Args:
        users: Users by token. Removing a token revokes it.
        port: Port; 0 for a free one.

    Attributes:
        mode: "lfs" or "xet", the upload protocol of the clients in the current test; the server supports both.
    """

    mode = "xet"

    def __init__(self, users: Mapping[str, User], port: int = 0):
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self.stall_ended = threading.Event()
        self.reset(users)
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler, bind_and_activate=False)
        self.server.daemon_threads = True
        self.server.server_bind()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def reset(self, users: Mapping[str, User]) -> None:
        """Removes all repositories, faults and logged requests, and ends stalls."""
        self.stall_ended.set()
        with self.lock:
            self.users, self.store, self.xet = dict(users), Store(), xet.ContentStore()
            self.faults: list[Fault] = []
            self.log: list[Logged] = []
            self.stall_ended = threading.Event()

    def __enter__(self) -> Hub:
        self.server.server_activate()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stall_ended.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):  # the server would continue to serve open connections
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, private=False, gated=False) -> Repo:
        """Adds a repository without a request."""
        repo = self.store.repos[repo_id] = Repo(repo_id, private, gated)
        if files:
            content = {path: File(data, api.is_lfs(path, len(data))) for path, data in files.items()}
            repo.commit({**repo.commits[repo.branches["main"]].files, **content}, "add files", "hub")
        return repo

    def requests(self, match: str) -> list[Logged]:
        """Returns the logged requests whose "METHOD /path" matches a regular expression."""
        return [logged for logged in self.log if re.search(match, f"{logged.method} {logged.path}")]

    def match_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def respond(self, request: Request) -> Response:
        """Returns the response of the matching route; a `HubError` becomes an error response."""
        if request.token is not None and request.user is None and not request.path.startswith(xet.PREFIX):
            return Response.error(HubError(401, "Invalid credentials in Authorization header"))
        for methods, pattern, handler in ROUTES:
            if request.method in methods.split() and (match := pattern.fullmatch(request.path)):
                try:
                    with self.lock:
                        return handler(self, request, *(group and unquote(group) for group in match.groups()))
                except HubError as error:
                    return Response.error(error)
                except Exception:
                    return Response.error(HubError(500, traceback.format_exc()))
        return Response.error(HubError(404, f"no such route: {request.method} {request.path}"))


class _Handler(BaseHTTPRequestHandler):
    """Handler of one client connection."""

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
        pass  # requests are logged in hub.log

    def handle_request(self):
        hub, url, stall_ended = self.hub, urlsplit(self.path), self.hub.stall_ended
        fault = hub.match_fault(f"{self.command} {url.path}") or NO_FAULT
        if fault.action == "reset":
            return self.close_without_response("reset", None)
        body = self.read_body()
        if callable(fault.action):
            fault.action()
        token = self.headers["Authorization"] and self.headers["Authorization"].removeprefix("Bearer ")
        user = hub.users.get(token or "")
        headers = {name.title(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, dict(parse_qsl(url.query)), headers, body, token, user)
        if fault.action == "drop":
            return self.close_without_response("drop", user)
        if fault.action == "stall" and stall_ended.wait(fault.seconds):  # the hub was reset during the stall
            self.close_connection = True
            return None
        if isinstance(fault.action, int):
            response = Response({"error": fault.body}, fault.action, fault.headers)
        else:
            response = hub.respond(request)
        if fault.action == "lost":
            return self.close_without_response("lost", user)
        # log first: the test may read the log as soon as the client has the response
        hub.log.append(Logged(self.command, self.path, response.status, user and user.name))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def close_without_response(self, reason: str, user: User | None) -> None:
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

    def send(self, response: Response) -> None:
        body = response.body if isinstance(response.body, bytes) else json.dumps(response.body).encode()
        kind = "application/octet-stream" if isinstance(response.body, bytes) else "application/json"
        self.send_response(response.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
