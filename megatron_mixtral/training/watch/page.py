"""Runs on a page: one file, asked for what is new every two seconds, by the standard library's server."""

import json
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from threading import Lock

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.training.watch.run import WatchedRun


def serve(runs: Sequence[WatchedRun], host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens; `serve_forever()` answers. `ConfigError` where the port is taken."""
    try:
        return ThreadingHTTPServer((host, port), partial(_Answer, runs, Lock()))
    except OSError as error:
        raise ConfigError(f"--port {port} on {host} cannot be used: {error.strerror}; give another, or 0 for any "
                          "that is free") from None


class _Answer(BaseHTTPRequestHandler):
    """`/` is the page, `/runs.json` what it shows."""

    def __init__(self, runs: Sequence[WatchedRun], lock: Lock, *args: object) -> None:
        self._runs, self._lock = runs, lock
        super().__init__(*args)

    def do_GET(self) -> None:  # the name that http.server looks for
        """Answer one request."""
        if self.path == "/":
            self._send(files(__package__).joinpath("page.html").read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/runs.json":
            with self._lock:  # each browser has a thread of its own
                for run in self._runs:
                    run.update()
                views = [run.view() for run in self._runs]
            self._send(json.dumps(views).encode(), "application/json")
        else:
            self.send_error(404)

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing: a request every two seconds is no news."""
