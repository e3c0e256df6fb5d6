"""A layer before Gradio that checks each request to the demo before anything is read or computed.

It checks host names and origins, a password, routes, the size and speed of bodies, and the form of JSON bodies.
A request that passes is for this page, small and well formed; the page's functions check its content.
"""

import asyncio
import base64
import ipaddress
import json
import re
import secrets
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from zoo.demo.uploads import MOST_AT_ONCE, Uploads

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# The routes of Gradio that the page, gradio_client and the two endpoints need; all others are refused.
GET = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/[^:]+|"
    r"/gradio_api/(info/?|openapi\.json|startup-events|theme\.css|app_id/?|queue/(data|status)|upload_progress|"
    r"heartbeat/[\w-]+|file=.+|call/\w+/\w+)")
POST = re.compile(r"/gradio_api/(run/predict|queue/join|cancel|reset|upload|call/\w+)/?")
STREAM = re.compile(r"/gradio_api/(?:queue/data|call/\w+/(\w+))/?$")
CALL = re.compile(r"/gradio_api/call/(\w+)/?")
BYTES = {"/gradio_api/queue/join": 4_000_000, "/gradio_api/run/predict": 4_000_000}  # names of 5,000 uploads
BYTES_ELSE = 100_000
SECONDS = 20.0  # for a JSON body, and between two pieces of an upload
SLOWEST = 20_000  # bytes a second, of an upload that takes longer than SECONDS
BODIES, OF_ONE_ADDRESS = 64, 16  # under way at a time: in all, and from one address
UNREAD = 16  # events of one session whose answers were not fetched


class Refused(HTTPException):
    """A refusal, answered as JSON with `detail`; FastAPI does so too."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None):
        super().__init__(status, detail, {"connection": "close", **(headers or {})})


@dataclass(frozen=True)
class Rules:
    """Who may send requests.

    listens      the address that the demo listens on
    hosts        further names that the Host header may hold
    trust_proxy  trust X-Forwarded-* headers and any host name: a reverse proxy sets them
    auth         user:password that each request must bring; None: no password
    framed_by    other sites that may show the page in a frame, in the syntax of Content-Security-Policy
    """

    listens: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    trust_proxy: bool = False
    auth: str | None = None
    framed_by: str = "'none'"


@dataclass(frozen=True)
class Event:
    """What a request for an event of the page must bring: inputs of these kinds, and for a click its event_data."""

    kinds: Sequence[TypeAdapter]
    clicked: bool = False


class Gate:
    """An ASGI application in front of Gradio's.

    fns      the page's events by number
    names    the public endpoints by name
    uploads  the folder of uploads, and its quota
    forget   ends the running jobs of a session (session_hash=) or a call (event_id=)
    """

    def __init__(self, app, rules: Rules, fns: dict[int, Event], names: dict[str, Event], uploads: Uploads,
                 forget: Callable[..., Awaitable[None]] | None = None):
        self.app, self.rules, self.fns, self.names, self.uploads = app, rules, fns, names, uploads
        self.forget = forget
        self.coming: Counter[str] = Counter()  # bodies under way, by address
        self.unread: OrderedDict[str, int] = OrderedDict()  # events by session, the last 1,000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            plain = scope["path"].startswith("/gradio_api/")  # so that `_sends` can read it
            scope = {**scope, "headers": [(n, v) for n, v in scope["headers"] if self._believed(n)
                                          and not (plain and n == b"accept-encoding")]}
            await self._admitted(scope)
            if scope["method"] == "POST":
                await self._posted(scope, receive, self._sends(send))
            elif STREAM.match(scope["path"]):
                await self._read(scope, receive, self._sends(send))
            else:
                await self.app(scope, receive, self._sends(send))
        except Refused as refused:
            answer = JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)
            await answer(scope, receive, self._sends(send))

    # ---- who asks, for what ----

    def _believed(self, header: bytes) -> bool:
        return header != b"x-gradio-server" and (
            self.rules.trust_proxy or (not header.startswith(b"x-forwarded-") and header != b"forwarded"))

    async def _admitted(self, scope: Scope) -> None:
        """Raises Refused unless host, origin, password and route are in order."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.rules.trust_proxy:
            host = headers.get("x-forwarded-host", host).split(",")[0].strip()
        if not self.rules.trust_proxy and not self._known(_host_and_port(host, "http")[0]):
            raise Refused(421, f"The demo does not answer under the host name {host[:100]!r}. The person who runs it "
                               "can allow it: metasaug demo --allowed-host NAME, or --trust-proxy behind a proxy.")
        method, path = scope["method"], scope["path"]
        origin = headers.get("origin")
        if origin is not None and method not in ("GET", "HEAD"):
            scheme = origin.partition("://")[0]
            if origin == "null" or _host_and_port(urlsplit(origin).netloc, scheme) != _host_and_port(host, scheme):
                raise Refused(403, "Requests from pages of other sites are refused.")
        if self.rules.auth is not None:
            await self._authorised(headers.get("authorization"))
        routes = {"GET": GET, "HEAD": GET, "POST": POST}.get(method)
        if routes is None:
            raise Refused(405, f"{method[:20]} is not used here.")
        called = CALL.match(path)
        if called and called[1] not in self.names:
            raise Refused(404, f"No endpoint is called {called[1][:50]!r}: there are {', '.join(self.names)}.")
        _, is_file, file = path.partition("/gradio_api/file=")
        if not routes.fullmatch(path) or (is_file and not self.uploads.holds(file)):
            raise Refused(404, "There is no page at this address.")

    def _known(self, host: str) -> bool:
        if host in (*self.rules.hosts, "localhost") or host.endswith(".localhost"):
            return True
        try:
            is_loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            return not _loopback(self.rules.listens) and host == socket.gethostname().lower()
        # An IP address, unlike a name, cannot be made to point elsewhere.
        return is_loopback or not _loopback(self.rules.listens)

    async def _authorised(self, given: str | None) -> None:
        expected = "Basic " + base64.b64encode((self.rules.auth or "").encode()).decode()
        if given is None or not secrets.compare_digest(given.encode(), expected.encode()):
            if given is not None:
                await asyncio.sleep(1)  # slows down guessing
            raise Refused(401, "A user and a password are needed.",
                          {"www-authenticate": 'Basic realm="MetaSAug demo", charset="UTF-8"'})

    # ---- bodies ----

    @contextmanager
    def _body(self, scope: Scope) -> Iterator[None]:
        """Count a body while it arrives. Raises Refused if too many do."""
        address = str((scope.get("client") or ("",))[0])
        if self.coming.total() >= BODIES or self.coming[address] >= OF_ONE_ADDRESS:
            raise Refused(503, "The demo is busy: try again in a moment.", {"retry-after": "2"})
        self.coming[address] += 1
        try:
            yield
        finally:
            self.coming[address] -= 1
            if not self.coming[address]:
                del self.coming[address]

    async def _posted(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].rstrip("/")
        announced = next((int(v) for n, v in scope["headers"] if n == b"content-length" and v.isdigit()), None)
        if path == "/gradio_api/upload":
            with self._body(scope), self.uploads.room_for(announced) as room:
                if room is None:
                    raise Refused(413 if (announced or 0) > MOST_AT_ONCE else 503, self.uploads.full(announced))
                await self.app(scope, _slow_or_long(receive, room), send)
            await asyncio.to_thread(self.uploads.tidy)
            return
        most = BYTES.get(path, BYTES_ELSE)
        if (announced or 0) > most:
            raise Refused(413, f"The request has {announced:,} bytes; at most {most:,} are read.")
        with self._body(scope):
            content = await _whole(receive, most)
        session = self._check_json(content, path)
        if path == "/gradio_api/queue/join":
            if self.unread.get(session, 0) >= UNREAD:
                raise Refused(429, "This session has not fetched the answers to its earlier requests yet.")
            self.unread[session] = self.unread.pop(session, 0) + 1
            if len(self.unread) > 1000:
                self.unread.popitem(last=False)
        await self.app(scope, _replayed(content, receive), send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream of a session's answers and count them. When the visitor leaves it, the session's jobs end."""
        found = re.search(rb"session_hash=([\w-]+)", scope["query_string"])
        session = found[1].decode() if found else ""

        async def counting(message: Message) -> None:
            done = message.get("body", b"").count(b'"msg":"process_completed"')
            if done and session in self.unread:
                self.unread[session] = max(0, self.unread[session] - done)
            await send(message)

        try:
            await self.app(scope, receive, counting)
        finally:
            self.unread.pop(session, None)
            called = STREAM.match(scope["path"])
            if self.forget is not None:
                await (self.forget(event_id=called[1]) if called and called[1] else self.forget(session_hash=session))

    def _check_json(self, content: bytes, path: str) -> str:
        """The session that a JSON body names. Raises Refused for a body that Gradio could not handle."""
        try:
            body = json.loads(content or b"{}")
        except (ValueError, RecursionError):
            raise Refused(400, "The body is not JSON.") from None
        if not isinstance(body, dict):
            raise Refused(400, "The body is not a JSON object.")
        session = body.get("session_hash")
        if session is not None and not (isinstance(session, str) and re.fullmatch(r"[\w-]{1,64}", session)):
            raise Refused(400, "session_hash is a short text of letters, digits, _ and -.")
        called = CALL.match(path)
        if called:
            event = self.names[called[1]]
        elif path.endswith(("run/predict", "queue/join")):
            index = body.get("fn_index")
            if type(index) is not int or index not in self.fns:
                raise Refused(400, "fn_index names no event of this page: load it again.")
            if path.endswith("queue/join") and session is None:
                raise Refused(400, "session_hash is missing.")
            event = self.fns[index]
            if type(body.get("trigger_id")) not in (int, type(None)) or (
                    event.clicked and not isinstance(body.get("event_data"), dict)):
                raise Refused(400, "trigger_id is a number, event_data an object that the browser sends.")
        else:
            return ""
        data = body.get("data")
        if not isinstance(data, list) or len(data) != len(event.kinds):
            raise Refused(400, f"data is a list of {len(event.kinds)} values: see /gradio_api/info.")
        for position, (value, kind) in enumerate(zip(data, event.kinds, strict=True), 1):
            try:
                kind.validate_python(value, strict=True)
            except ValidationError:
                raise Refused(400, f"Value {position} of data is of the wrong kind: see /gradio_api/info.") from None
        for file in _files(data):
            if not self.uploads.holds(file.get("path")):
                raise Refused(400, "No picture came with the request, or it was deleted meanwhile: upload it first.")
        return session or ""

    # ---- answers ----

    def _sends(self, send: Send) -> Send:
        """`send` that adds our headers, removes Gradio's permissions for other origins, and makes paths of uploads
        relative."""
        added = [
            (b"content-security-policy", f"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src "
             f"'none'; frame-ancestors {self.rules.framed_by}".encode()),
            (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"same-origin")]
        here, told = f"{self.uploads.folder}/".encode(), f"{self.uploads.folder.name}/".encode()
        names_files = False

        async def wrapped(message: Message) -> None:
            nonlocal names_files
            if message["type"] == "http.response.start":
                headers = [(n.lower(), v) for n, v in message.get("headers", [])]
                kind = dict(headers).get(b"content-type", b"")
                names_files = kind.startswith((b"application/json", b"text/event-stream"))
                left_out = (b"access-control-", *([b"content-length"] if names_files else []))
                message = {**message, "headers": [*((n, v) for n, v in headers if not n.startswith(left_out)), *added]}
            elif names_files:
                message = {**message, "body": message.get("body", b"").replace(here, told)}
            await send(message)

        return wrapped


def _host_and_port(netloc: str, scheme: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{netloc}")
        return (parts.hostname or "").lower(), parts.port or (443 if scheme in ("https", "wss") else 80)
    except ValueError:
        return "", 0


def _loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _files(data: Any) -> Iterator[dict[str, Any]]:
    """Every object in a value that names a file."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value or "url" in value or "meta" in value:
                yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


async def _whole(receive: Receive, most: int) -> bytes:
    content = b""
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "The connection was closed.")
                content += message.get("body", b"")
                if len(content) > most:
                    raise Refused(413, f"The request has more than {most:,} bytes.")
                if not message.get("more_body"):
                    return content
    except TimeoutError:
        raise Refused(408, f"The request did not come within {SECONDS:.0f} seconds.") from None


def _replayed(content: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body, which was already read, again."""
    waiting: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


def _slow_or_long(receive: Receive, most: int) -> Receive:
    """`receive` of an upload that must keep a minimum speed and have at most `most` bytes."""
    began, came = time.monotonic(), 0

    async def piece() -> Message:
        nonlocal came
        try:
            message = await asyncio.wait_for(receive(), SECONDS)
        except TimeoutError:
            raise Refused(408, f"Nothing came for {SECONDS:.0f} seconds.") from None
        came += len(message.get("body", b""))
        if came > most:
            raise Refused(413, f"The upload has more than {most / 1e6:,.0f} MB, the most at a time.")
        took = time.monotonic() - began
        if message.get("more_body") and took > SECONDS and came < SLOWEST * took:
            raise Refused(408, f"The upload came at under {SLOWEST / 1e3:.0f} kB a second.")
        return message

    return piece
