"""Worker processes for input that cannot be trusted: a crash, a hang or a full memory costs one job.

A file that makes a C++ reader crash would take a pool of `concurrent.futures` down with it, and a
killed parent would leave that pool's workers behind.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any


@dataclass(frozen=True)
class Failure:
    """What is handed out in place of a result.

    Attributes:
        reason: Why there is no result, in one line.
    """

    reason: str


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: int | None = None
    since: float = field(default_factory=monotonic)


def run_isolated(
    work: Callable[[Any], Any],
    jobs: Sequence[Any],
    *,
    workers: int = 1,
    timeout: float | None = None,
    memory: int | None = None,
) -> Iterator[Any]:
    """Do jobs in worker processes and hand out the results in the order of the jobs.

    Args:
        work: Function of one job; it and jobs and results must pickle.
        jobs: The jobs.
        workers: Number of processes.
        timeout: Seconds after which a job is given up and its process killed.
        memory: Bytes of address space that a worker may use, where the system can limit it.

    Yields:
        The result of each job, or a `Failure` if its process died, ran over the time, ran out of
        memory or raised.
    """
    crew: list[_Worker] = []
    results: dict[int, Any] = {}
    waiting = deque(range(len(jobs)))
    handed_out = 0
    try:
        while handed_out < len(jobs):
            # No job is begun far ahead of the one waited for, so that results do not pile up.
            while waiting and waiting[0] < handed_out + 8 * workers:
                idle = next((w for w in crew if w.job is None), None)
                if idle is None and len(crew) < workers:
                    idle = _start(work, memory)
                    crew.append(idle)
                if idle is None:
                    break
                _give(idle, waiting.popleft(), jobs)
            for worker in _ready(crew, timeout):
                assert worker.job is not None
                results[worker.job], alive = _take(worker, timeout)
                worker.job = None
                if not alive:
                    crew.remove(worker)
            while handed_out in results:
                yield results.pop(handed_out)
                handed_out += 1
    finally:
        for worker in crew:
            _stop(worker)


def _start(work: Callable[[Any], Any], memory: int | None) -> _Worker:
    # spawn: the parent may hold threads (torch, ITK) that do not survive a fork.
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, memory), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, job: int, jobs: Sequence[Any]) -> None:
    worker.job, worker.since = job, monotonic()
    with contextlib.suppress(OSError):  # a dead worker is found by its closed pipe
        worker.pipe.send(jobs[job])


def _ready(crew: Sequence[_Worker], timeout: float | None) -> list[_Worker]:
    """Wait for answers; those that answered, died, or ran over their time."""
    busy = {worker.pipe: worker for worker in crew if worker.job is not None}
    wait = None
    if timeout is not None:
        wait = max(0.0, min(w.since for w in busy.values()) + timeout - monotonic())
    ready = [
        busy[pipe] for pipe in connection.wait(list(busy), wait) if isinstance(pipe, Connection)
    ]
    if timeout is None:
        return ready
    return ready or [w for w in busy.values() if monotonic() - w.since >= timeout]


def _take(worker: _Worker, timeout: float | None) -> tuple[Any, bool]:
    """The result, and whether the worker still lives."""
    if not worker.pipe.poll():
        _stop(worker)
        return Failure(f"gave up after {timeout:g} s"), False
    try:
        return worker.pipe.recv(), True
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        _stop(worker)
        return Failure(f"the reader crashed or was killed ({how})"), False


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _serve(pipe: Connection, work: Callable[[Any], Any], memory: int | None) -> None:
    """Loop of a worker process."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if memory is not None:
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = work(job)
        except MemoryError:
            result = Failure("out of memory")
        except Exception as error:  # the process lives on, and the caller is told
            result = Failure(f"{type(error).__name__}: {error}")
        pipe.send(result)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
