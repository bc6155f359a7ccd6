"""The counts of a server, as Prometheus reads them (text exposition format 0.0.4)."""

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_mixtral.inference import Engine

TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HELP = {
    "requests_total": ("counter", "requests answered, by path and status"),
    "prompt_tokens_total": ("counter", "tokens of the prompts that were taken"),
    "generated_tokens_total": ("counter", "tokens that the model wrote"),
    "first_token_seconds": ("summary", "seconds from a request to its first token"),
    "request_seconds": ("summary", "seconds from a request to its end, of those that were taken"),
    "queue": ("gauge", "continuations that wait for a slot"),
    "slots_used": ("gauge", "continuations that are being written"),
    "slots": ("gauge", "continuations that can be written at a time"),
    "up_seconds": ("gauge", "seconds since the server started"),
}


class Metrics:
    """Counts, to which any thread adds."""

    def __init__(self) -> None:
        self._start, self._lock = time.monotonic(), threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, value: float = 1, **labels: object) -> None:
        """Count. `name` with its labels is a sample's, such as requests_total{path="/health",status="200"}."""
        marks = ",".join(f'{label}="{content}"' for label, content in labels.items())
        with self._lock:
            self._counts[f"{name}{{{marks}}}" if marks else name] += value

    def observe(self, name: str, seconds: float) -> None:
        """Add to a summary, which has a sum and a count."""
        self.add(f"{name}_sum", seconds)
        self.add(f"{name}_count")

    def text(self, engine: "Engine") -> str:
        """All of it; queue and slots are the engine's at this moment."""
        now = {"queue": engine.waiting, "slots_used": engine.running, "slots": engine.slots,
               "up_seconds": time.monotonic() - self._start}
        with self._lock:
            samples = sorted({"prompt_tokens_total": 0, "generated_tokens_total": 0, **self._counts, **now}.items())
        lines = []
        for name, (kind, meaning) in _HELP.items():
            own = [(sample, value) for sample, value in samples if sample.partition("{")[0] in (
                name, f"{name}_sum", f"{name}_count")]
            if own:
                lines += [f"# HELP mixtral_{name} {meaning}", f"# TYPE mixtral_{name} {kind}"]
                lines += [f"mixtral_{sample} {value:.15g}" for sample, value in own]
        return "\n".join(lines) + "\n"
