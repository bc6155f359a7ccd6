"""Servers for tests: one in this process on a fake engine (`serving`), and the command on its own ranks (`Served`)."""

import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.quickstart.hf_tokenizer import write_hf_tokenizer
from helpers.events import HANG, until
from helpers.ports import free_port
from helpers.ranks import prepare_fork_server
from megatron_mixtral import __main__ as commands
from megatron_mixtral.server.api import Api
from megatron_mixtral.server.desk import Desk
from megatron_mixtral.server.process import Web, open_socket
from megatron_mixtral.server.settings import Settings
from megatron_mixtral.tokenizer import chat_prompts, load_tokenizer


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


class Served:
    """The command `serve` as ranks of its own, forked from the server of `ranks.py`; rank 0 has a free port."""

    def __init__(self, world: int, argv: list[str], folder: Path) -> None:
        """Returns when rank 0 says where it serves."""
        context = prepare_fork_server()
        self.log = folder / "serve.log"
        port = free_port()
        self.ranks = [context.Process(target=_rank, args=(rank, world, port, [*argv, "--port", "0"], str(self.log)))
                      for rank in range(world)]
        for process in self.ranks:
            process.start()
        until(lambda: "serving " in self.log_text() or not all(one.is_alive() for one in self.ranks))
        found = re.search(r"serving \S+ at (http://\S+:\d+)/", self.log_text())
        assert found, self.log_text()
        self.address = found[1]

    client = Serving.client

    def log_text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.ranks[rank].pid, number)

    def end(self) -> list[int | None]:
        """Wait for all ranks; their exit codes."""
        for process in self.ranks:
            process.join(HANG)
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def value(self, name: str) -> float:
        """A sample of /metrics."""
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:
            [line] = [line for line in answer.read().decode().splitlines() if line.startswith(f"mixtral_{name} ")]
        return float(line.rpartition(" ")[2])


def _rank(rank: int, world: int, port: int, argv: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    code = commands.run("serve", argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in program.py: the interpreter's own end would close gloo's threads one by one


def tokenizer_and_prompts(folder: Path) -> tuple[Any, Any]:
    """Mixtral's tokenizer, written to a folder, and its prompts of a chat."""
    write_hf_tokenizer(folder)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", folder / "tokenizer.json")
    return tokenizer, chat_prompts(tokenizer, folder)


def post(server: Any, path: str, body: Any = None, kind: str = "application/json", **headers: str) -> tuple[int, Any]:
    """(status, object or text) of a raw request; without a body it is a GET."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    asked = urllib.request.Request(server.address + path, content, {"Content-Type": kind} | headers)
    try:
        with urllib.request.urlopen(asked) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") else text
