"""Dashboards in a browser on this machine: a server that only this machine reaches, and that only reads.

It listens on 127.0.0.1, and answers only requests that were addressed to this machine by name (`Host`): a page from
elsewhere whose own name was pointed at 127.0.0.1 gets nothing. A port that is forwarded (`ssh -L`) works.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import socketserver
import sys
import threading
import webbrowser
from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sae_lens_gemma4.errors import ConfigError, Gemma4SAEError, SAEError
from sae_lens_gemma4.neuronpedia.viewer import Viewer, dumps, page

PORT = 8742
_HOSTS = ("127.0.0.1", "localhost", "::1")
_JSON, _HTML = "application/json", "text/html; charset=utf-8"


class Server(ThreadingHTTPServer):
    """A folder's viewer at `url`; `serve_forever` runs it."""

    allow_reuse_address = os.name != "nt"  # there it would share the port with a server that already has it

    def __init__(self, viewer: Viewer, port: int) -> None:
        self.viewer = viewer
        self.page = page(viewer.head())
        self._making = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # the class between also asks a name server who this is
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def index(self) -> bytes:
        """The list of latents, as it is sent: JSON, compressed once."""
        with self._making:
            return self._index

    @cached_property
    def _index(self) -> bytes:
        return gzip.compress(dumps(self.viewer.index()), 6)

    def prepare(self) -> None:
        """Read in the background what the first requests ask for; what is wrong with it is told to those."""

        def read() -> None:
            try:
                _ = self.index, self.viewer.read_nearest()
            except Gemma4SAEError:
                return

        threading.Thread(target=read, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes a connection is no error; anything else is one of this package."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self._host() not in _HOSTS:
            self._send(HTTPStatus.FORBIDDEN, dumps({"error": "This server answers to localhost and 127.0.0.1 alone."}))
            return
        path = urlsplit(self.path).path
        latent = re.fullmatch(r"/latent/(\d{1,9})\.json", path)
        try:
            if path == "/":
                self._send(HTTPStatus.OK, self.server.page.html.encode(), _HTML)
            elif path == "/latents.json":
                self._send(HTTPStatus.OK, self.server.index, compressed=True)
            elif latent is not None:
                self._send(HTTPStatus.OK, dumps(self.server.viewer.latent(int(latent[1]))))
            else:
                self._send(HTTPStatus.NOT_FOUND, dumps({"error": "There is nothing at this address."}))
        except SAEError as e:
            self._send(HTTPStatus.NOT_FOUND, dumps({"error": str(e)}))
        except Gemma4SAEError as e:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, dumps({"error": str(e)}))

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""

    def _host(self) -> str | None:
        """The name that the request was addressed to; of any port, since a forwarded one is another."""
        try:
            return urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            return None

    def _send(self, status: HTTPStatus, body: bytes, kind: str = _JSON, compressed: bool = False) -> None:
        takes_gzip = "gzip" in self.headers.get("Accept-Encoding", "")
        if takes_gzip and not compressed:
            body = gzip.compress(body, 1)
        elif compressed and not takes_gzip:
            body = gzip.decompress(body)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if takes_gzip:
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Vary", "Accept-Encoding")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Content-Security-Policy", f"{self.server.page.policy}; frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def make_server(folder: str | Path, *, port: int = PORT, labels: Mapping[int, str] | None = None) -> Server:
    """The server of a folder's viewer, already listening and not yet answering.

    Args:
        folder: one of dashboards, or one that has such a folder as its subfolder `dashboards`.
        port: 0 for any that is free.
        labels: what latents are called, by index.

    Raises:
        DataError: no folder of dashboards, or one that is not finished.
        ConfigError: a port that is taken, or none.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError(f"Ports are numbers from 0 (any that is free) to 65535; {port} is none.")
    viewer = Viewer(folder, labels)
    try:
        server = Server(viewer, port)
    except OSError as e:
        why = "is taken" if e.errno == errno.EADDRINUSE else f"cannot be listened on ({e.strerror})"
        raise ConfigError(f"Port {port} {why}; choose another with --port, or any that is free with --port 0.") from e
    server.prepare()
    return server


def serve(
    folder: str | Path, *, port: int = PORT, labels: Mapping[int, str] | None = None, open_browser: bool = False
) -> None:
    """Serve a folder's viewer on 127.0.0.1 until Ctrl-C, and print where. Arguments and errors are `make_server`'s."""
    with make_server(folder, port=port, labels=labels) as server:
        print(f"{server.viewer.dashboards.path} is shown at {server.url} until Ctrl-C.", flush=True)
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(flush=True)
