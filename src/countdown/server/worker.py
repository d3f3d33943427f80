"""The thread that owns an engine: requests wait in line, up to as many as it has places run together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from countdown.engine.engine import Answer, Engine, Piece, Request
from countdown.errors import AccidentError, told


class QueueFullError(AccidentError):
    """As many requests wait as may."""


class DrainingError(AccidentError):
    """The server takes no more requests."""


@dataclass(eq=False)
class Job:
    """A request and what came of it.

    Args:
        request: What is asked for.
        loop: The event loop of whoever waits for it.
        submitted, started, first: When it came, had a place, and had its first token, by `time.perf_counter`; None
            until then.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first: float | None = None
    answer: Answer | None = None
    cancelled: bool = False
    events: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)

    def put(self, event: Piece | Exception) -> None:
        """Hand on a piece or an error, from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits any more
            self.cancelled = True


class Worker:
    """Runs requests in an engine, first come, first served; those that run get a token each in turn.

    Args:
        engine: Used by nobody else; closed with the worker.
        most_waiting: So many requests may wait for a place.
        observer: Told of what happens; see `Metrics`.
    """

    def __init__(self, engine: Engine, *, most_waiting: int = 64, observer: Any = None) -> None:
        self.engine, self._most, self._observer = engine, most_waiting, observer
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._change = threading.Condition()
        self._draining = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many answers are being written."""
        return len(self._running)

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and answered."""
        return self._thread.is_alive() and not self._draining

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """Yield the pieces of a job that was submitted; whoever stops early cancels it.

        Raises:
            CountdownError, Exception: What went wrong.
        """
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if event.finish is not None:
                    return
        finally:
            self.cancel(job)

    def submit(self, request: Request) -> Job:
        """Put a request in line; call from the event loop that waits for it.

        Raises:
            ConfigError: See `Engine.check`.
            QueueFullError: Too many wait.
            DrainingError: No more are taken.
        """
        self.engine.check(request)
        job = Job(request, asyncio.get_running_loop())
        with self._change:
            if self._draining:
                raise DrainingError("the server is shutting down.")
            # Those for which a place is free do not wait for long.
            if len(self._waiting) >= self._most + self.engine.free:
                raise QueueFullError(f"{self._most} requests are waiting already; try again later.")
            self._waiting.append(job)
            self._change.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job wherever it is; its place is free before the next token."""
        with self._change:
            job.cancelled = True
            self._change.notify()

    def close(self, *, timeout: float | None = None) -> None:
        """Answer what was taken, within so many seconds, then stop and close the engine."""
        with self._change:
            self._draining = True
            self._change.notify()
        self._thread.join(timeout)
        with self._change:
            self._stopped = True
            self._change.notify()
        # A long prompt is not waited for: the thread ends with the process.
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self.engine.close()

    def _run(self) -> None:
        try:
            while self._wait():
                self._turn()
        except BaseException as error:  # whatever it is, nobody waits for ever
            with self._change:
                self._draining = True
                left = [*self._running.values(), *self._waiting]
                self._running, self._waiting = {}, deque()
            failure = AccidentError(f"the engine has stopped: {told(error)}.")
            for job in left:
                job.put(failure)
            raise

    def _turn(self) -> None:
        """Add a token to each answer that is being written, after those that were cancelled and those that wait."""
        self._drop_cancelled()
        self._start_waiting()
        for answer, piece in self.engine.step():
            self._hand_on(self._running[id(answer)], piece)
        for job in [job for job in self._running.values() if job.answer and job.answer.error]:
            self._fail(job, job.answer.error)  # type: ignore[union-attr, arg-type]

    def _wait(self) -> bool:
        """Return once there is something to do; False when nothing will be."""
        with self._change:
            while not self._stopped and not self._running and not self._waiting:
                if self._draining:
                    return False
                self._change.wait()
            return not self._stopped

    def _drop_cancelled(self) -> None:
        with self._change:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for job in [job for job in self._running.values() if job.cancelled]:
            self.engine.cancel(job.answer)  # type: ignore[arg-type]
            self._end(job, "cancelled")

    def _start_waiting(self) -> None:
        while self.engine.free:
            with self._change:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            job.started = time.perf_counter()
            try:
                job.answer = self.engine.start(job.request)
            except Exception as error:
                job.put(error)
                self._tell("failed", job)
                continue
            self._running[id(job.answer)] = job
            # Between two prompts those that run go on.
            if len(self._running) > 1:
                return

    def _hand_on(self, job: Job, piece: Piece) -> None:
        if job.first is None:
            job.first = time.perf_counter()
            self._tell("first_token", job)
        job.put(piece)
        if piece.finish is not None:
            self._end(job, piece.finish)

    def _fail(self, job: Job, error: Exception) -> None:
        job.put(error)
        self._end(job, "failed")

    def _end(self, job: Job, how: str) -> None:
        del self._running[id(job.answer)]
        self._tell("ended", job, how)

    def _tell(self, what: str, *about: Any) -> None:
        if self._observer is not None:
            getattr(self._observer, what)(*about)
