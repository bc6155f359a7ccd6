"""A server's life: its socket, its two threads, signals, and its end on all ranks."""

import logging
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from megatron_mixtral.errors import ConfigError
from megatron_mixtral.inference import Generator
from megatron_mixtral.server.api import Api, application
from megatron_mixtral.server.desk import GRACE, Desk
from megatron_mixtral.server.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 1024  # connections that may wait to be taken
WEB_SECONDS = 3  # in which connections that are open at the end have to close


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a busy port is known before a model is loaded. Port 0 takes any that is free.

    Raises `ConfigError` where this machine has no such address, or the port is in use or not allowed.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected 0 to 65535 (0: any that is free)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error.strerror}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _open(listener.bind, address, host, port)
    return listener


def _open(step: Callable[[Any], None], argument: Any, host: str, port: int) -> None:
    try:
        step(argument)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be opened: {error.strerror}. Where another program has "
                          f"the port, end it or give another port, such as --port {port + 1}.") from error


def serve(generator: Generator, prompts: Any, settings: Settings, listener: socket.socket | None) -> None:
    """Serve until SIGTERM or Ctrl-C: rank 0, which has a listener, by HTTP, the other ranks by following it.

    Raises `RankLostError`, on every rank that is left, where one ends before.
    """
    if listener is None:
        # What ends the program is meant for rank 0, which lets answers be finished and then lets the others go.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        generator.engine.follow()
        return
    desk = Desk(generator.engine, settings.max_queue)
    web = Web(Api(desk, generator, prompts, settings), listener)

    def end(number: int, frame: FrameType | None) -> None:
        if desk.ending:
            raise KeyboardInterrupt
        logger.info("%s: finishing what is running, for at most %.0f s", signal.Signals(number).name, GRACE)
        desk.close()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        web.start()
        address = listener.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        logger.info("serving %s at http://%s:%d/ and /v1", settings.model, shown, address[1])
        desk.run()
    finally:
        web.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


class Web:
    """uvicorn on a thread of its own. Where it ends by itself, the desk closes."""

    def __init__(self, api: Api, listener: socket.socket) -> None:
        import uvicorn

        self._server = uvicorn.Server(uvicorn.Config(
            application(api), log_level="warning", access_log=False, lifespan="off", ws="none", server_header=False,
            timeout_graceful_shutdown=WEB_SECONDS, backlog=BACKLOG))
        self._listener, self._desk = listener, api.desk
        self._thread = threading.Thread(target=self._run, name="web", daemon=True)

    def start(self) -> None:
        """Returns when connections are taken. Until now none were: a client of a server that loads is told at once."""
        _open(self._listener.listen, BACKLOG, *self._listener.getsockname()[:2])
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            self._thread.join(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(2 * WEB_SECONDS)

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._desk.close(0)
