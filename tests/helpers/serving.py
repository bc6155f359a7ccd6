"""A server in this process, on a fake engine or a real one: uvicorn on its thread, the engine's steps on another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.server.api import Api, Settings
from megatron_mixtral.server.desk import Desk
from megatron_mixtral.server.process import Web, open_socket


@dataclass
class Serving:
    """A server that runs: where it is, and its parts."""

    address: str
    desk: Desk
    engine: Any

    def client(self, **options: Any) -> Any:
        """OpenAI's own client. It asks only once, so that a test sees the first answer."""
        from openai import OpenAI

        return OpenAI(**({"base_url": f"{self.address}/v1", "api_key": "none", "max_retries": 0} | options))


@contextmanager
def serving(generator: Any, prompts: Any, **settings: Any) -> Iterator[Serving]:
    """Serve for as long as the block lasts."""
    options = Settings(**({"model": "tiny", "port": 0} | settings))
    listener = open_socket(options.host, options.port)
    desk = Desk(generator.engine, options.max_queue)
    web = Web(Api(desk, generator, prompts, options), listener)
    faults: list[BaseException] = []

    def step() -> None:
        try:
            desk.run()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the test
            faults.append(error)

    stepping = threading.Thread(target=step)
    stepping.start()
    web.start()
    try:
        yield Serving(f"http://127.0.0.1:{listener.getsockname()[1]}", desk, generator.engine)
    finally:
        desk.close(0)
        stepping.join()
        web.stop()
    assert not faults or generator.engine.fails in faults, faults
