"""A server under requests of every kind for a while: nothing leaks, no slot is lost. `make soak` runs it.

    SOAK_REQUESTS=1000 SOAK_SECONDS=600      the defaults; the malformed bodies are 3 for 10 requests
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from helpers.events import until
from helpers.malformed import LARGEST, malformed
from helpers.models import tiny_hf_mixtral
from helpers.serving import Served, post

from examples.quickstart.hf_tokenizer import write_hf_tokenizer

REQUESTS, SECONDS = int(os.environ.get("SOAK_REQUESTS", 1000)), float(os.environ.get("SOAK_SECONDS", 600))
WARM = 5  # of so many parts of the requests, the first is not measured: caches fill, the heap finds its size


def ask(server: Served, number: int) -> None:
    """One of six kinds of request: short and long, whole and streamed, with several answers, left in the middle."""
    question = f"Question {number % 7} " * (number % 40 + 1)
    options = {"model": "tiny", "messages": [{"role": "user", "content": question}],
               "max_tokens": 4 + number % 13, "seed": number % 11, "temperature": float(number % 3)}
    kind = number % 6
    chats = server.client().chat.completions
    if kind in (0, 1):
        assert chats.create(**options).usage.completion_tokens > 0
    elif kind == 2:
        assert len(chats.create(**options, n=3, logprobs=True, top_logprobs=3).choices) == 3
    elif kind == 3:
        assert list(chats.create(**options, stream=True))[-1].choices[0].finish_reason
    elif kind == 4:
        stream = chats.create(**options | {"max_tokens": 400}, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    else:
        server.client().completions.create(model="tiny", prompt=["a", "b"], stop=["e", "\u4f60"], max_tokens=6)


@pytest.mark.slow
def test_a_server_stays_as_large_as_it_is(tmp_path):
    folder = tiny_hf_mixtral(tmp_path / "tiny", vocab_size=32000, max_position_embeddings=512)
    write_hf_tokenizer(folder)
    server = Served(1, ["--load", str(folder), "--max-slots", "6", "--max-queue", "1000"], tmp_path)
    try:
        process = psutil.Process(server.ranks[0].pid)

        def size() -> tuple[int, int, int]:
            until(lambda: server.value("slots_used") == server.value("queue") == 0)
            return process.memory_info().rss, process.num_fds(), process.num_threads()

        def part(first: int, count: int) -> None:
            """So many requests, spread over their share of the time, and malformed ones between them."""
            start, asked = time.monotonic(), []
            bodies = malformed(count * 3 // 10, seed=first)
            with ThreadPoolExecutor(12) as pool:
                for number in range(first, first + count):
                    time.sleep(max(0.0, start + (number - first) * SECONDS / REQUESTS - time.monotonic()))
                    asked.append(pool.submit(ask, server, number))
                    if number % 10 < 3 and (case := next(bodies, None)):
                        status, _ = post(server, *case)
                        assert status == 200 or 400 <= status < 500, case
            for one in asked:
                one.result()

        # The heap keeps what a body took once (runtime/cpu/heap.py). The largest that the server takes come first, so
        # that what still grows is a leak.
        for case in LARGEST:
            assert 400 <= post(server, *case)[0] < 500, case[1][:40]
        sizes = []
        for number in range(WARM):
            part(number * REQUESTS // WARM, REQUESTS // WARM)
            sizes.append(size())
            done = (number + 1) * REQUESTS // WARM
            print(f"\nafter {done} requests: {sizes[-1][0] / 1e6:.1f} MB, {sizes[-1][1]} open "
                  f"files, {sizes[-1][2]} threads", flush=True)
        (memory, files, threads), (after, files_after, threads_after) = sizes[0], sizes[-1]
        assert after <= memory * 1.02
        assert files_after <= files and threads_after <= threads
    finally:
        server.kill()
