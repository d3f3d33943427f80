"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import nn

from countdown.engine.engine import TURNS
from countdown.modules import sparse_modules
from countdown.sparsify import realised_sparsity

if TYPE_CHECKING:
    from countdown.server.worker import Job, Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Counts what a worker tells it; each server has its own.

    Args:
        model: Whose realised sparsity is shown.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self.registry = model, CollectorRegistry()
        registry = self.registry
        self._requests = Counter("countdown_requests", "Requests by how they ended.", ["outcome"], registry=registry)
        self._prompt = Counter("countdown_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._reused = Counter("countdown_reused_tokens", "Of these, those that a cache held.", registry=registry)
        self._generated = Counter("countdown_generated_tokens", "Tokens generated.", registry=registry)
        self._first = Histogram(
            "countdown_time_to_first_token_seconds", "From request to first token.", buckets=_SECONDS, registry=registry
        )
        self._rate = Histogram(
            "countdown_tokens_per_second", "Of an answer, behind its first token.", buckets=_RATES, registry=registry
        )
        self._running = Gauge("countdown_running", "Answers that are being written.", registry=registry)
        self._waiting = Gauge("countdown_waiting", "Requests that wait for a place.", registry=registry)
        self._sparsity = None
        if sparse_modules(model):
            about = "Share of terms skipped so far, over all modules."
            self._sparsity = Gauge("countdown_realised_sparsity", about, registry=registry)

    def first_token(self, job: Job) -> None:
        """An answer has its first token."""
        assert job.first is not None
        assert job.answer is not None
        self._first.observe(job.first - job.submitted)
        self._prompt.inc(len(job.request.prompt))
        self._reused.inc(job.answer.reused)

    def ended(self, job: Job, outcome: str) -> None:
        """An answer ended."""
        self._requests.labels(outcome).inc()
        tokens = len(job.answer.tokens) if job.answer else 0
        self._generated.inc(tokens)
        if tokens > 1 and job.first is not None:
            self._rate.observe((tokens - 1) / max(time.perf_counter() - job.first, 1e-9))

    def failed(self, job: Job) -> None:
        """A request failed before it had an answer."""
        self._requests.labels("failed").inc()

    def shown(self, worker: Worker) -> bytes:
        """Return it in Prometheus's text format."""
        self._running.set(worker.running)
        self._waiting.set(worker.waiting)
        if self._sparsity is not None:
            # Counters are read between two steps of the engine: on a GPU that must not meet a capture.
            with TURNS:
                self._sparsity.set(realised_sparsity(self._model) or 0.0)
        return generate_latest(self.registry)
