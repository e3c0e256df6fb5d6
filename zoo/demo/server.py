"""The demo's web server: Gradio's application behind the gate, in uvicorn, with limits on connections and headers."""

import asyncio
import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import fastapi
import gradio as gr
import uvicorn
from pydantic import Field, TypeAdapter
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

import zoo
from zoo.demo.answers import EXAMPLES
from zoo.demo.gate import Event, Gate, Rules
from zoo.demo.theme import CSS, HEAD, theme
from zoo.demo.uploads import Uploads

MAX_FILE = "20mb"  # as zoo.images reads
CONNECTIONS = 600
HEADER_SECONDS = 15.0
# Gradio keeps 110 kB of each session for an hour, and each call of the API is a session. Its default limit of 10,000
# sessions would take over a GB.
SESSIONS = 300


class PunctualProtocol(H11Protocol):
    """HTTP that closes a connection whose request headers do not arrive in time."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def application(page: gr.Blocks, rules: Rules, uploads: Uploads, root_path: str = "") -> Gate:
    """The whole demo as an ASGI application. GRADIO_TEMP_DIR names the folder of `uploads`."""
    outer = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    outer.add_middleware(CORSMiddleware, allow_origins=[])  # with this one, Gradio leaves out its own
    page.state_session_capacity = SESSIONS
    gr.mount_gradio_app(
        outer, page, "/", root_path=root_path, allowed_paths=[str(EXAMPLES)], max_file_size=MAX_FILE, show_error=False,
        ssr_mode=False, pwa=False, enable_monitoring=False, mcp_server=False, run_history=False,
        footer_links=["api", "settings"], theme=theme(), css=CSS, head=HEAD)
    page.has_launched = True  # Gradio checks paths in requests only after a launch
    fns = {number: Event([kind_of(block) for block in fn.inputs], bool(fn.collects_event_data))
           for number, fn in page.fns.items() if fn.fn is not None}
    names = {fn.api_name: fns[number] for number, fn in page.fns.items() if number in fns
             if isinstance(fn.api_name, str) and fn.api_visibility == "public"}
    # Gradio continues the job of a visitor who has left; its queue can end it.
    return Gate(outer, rules, fns, names, uploads, page._queue.clean_events)


def kind_of(component: Any) -> TypeAdapter:
    """The type of the values that a request may give for a component; functions get them raw (preprocess=False)."""
    if isinstance(component, gr.Dropdown):
        return TypeAdapter(list[str] | None if component.multiselect else str | int | None)
    if isinstance(component, gr.Checkbox):
        return TypeAdapter(bool)
    if isinstance(component, gr.Slider):
        return TypeAdapter(Annotated[float, Field(allow_inf_nan=False)])
    model = getattr(component, "data_model", None)
    return TypeAdapter(Any if model is None else model | None)


@contextmanager
def served(app: Gate, host: str, port: int, root_path: str = "") -> Iterator[str]:
    """Serve `app` in a thread; yields its address. Raises ZooError if the port cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise zoo.ZooError(f"Port {port} on {host} cannot be used ({error.strerror or error}): choose another with "
                           "--port.") from error
    _many_files()
    _give_memory_back()
    options: dict[str, Any] = {"limit_concurrency": CONNECTIONS, "timeout_graceful_shutdown": 2, "log_level": "error",
                               "server_header": False, "ws": "none", "http": PunctualProtocol,
                               "proxy_headers": app.rules.trust_proxy, "access_log": False}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    try:
        yield f"http://{shown}:{listener.getsockname()[1]}{root_path and '/'}"
    finally:
        server.should_exit = True
        thread.join(10)


def _many_files() -> None:
    """Allow enough open files for all connections, if the system's default is lower."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 4 * CONNECTIONS
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))


def _give_memory_back() -> None:
    """Make glibc return every freed block over 1 MB (decoded pictures) to the system."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1_000_000)  # M_MMAP_THRESHOLD


@contextmanager
def uploads_in(folder: str) -> Iterator[Uploads]:
    """Uploads below `folder`, which becomes the working directory.

    Requests and answers then name uploads by relative paths, which reveal nothing about this computer.
    """
    before = os.getcwd()
    os.chdir(folder)
    os.makedirs("uploads", exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = "uploads"
    try:
        yield Uploads(Path("uploads"))
    finally:
        os.chdir(before)
