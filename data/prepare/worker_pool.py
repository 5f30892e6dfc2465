"""Jobs on several processes: results as they come, one counter of progress, and none left behind whatever happens to the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from condot.core.plugins import load_plugins, plugin_paths
from condot.core.standard_streams import guard_streams

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int], object]
"""Takes the number of samples done since it was last called."""

_counter: Any = None


def run_jobs(work: Callable[[Job, Progress], Result], jobs: Iterable[Job], workers: int, progress: Progress) -> Iterator[Result]:
    """Do jobs, in this process for one worker; results come in any order.

    Args:
        work: a function of a module, called with a job and its progress.
        jobs: taken as they are needed, so that they never lie in memory all.
        workers: processes.
        progress: called in this process with how many samples are done.

    Raises:
        ValueError: a worker was killed. What a job raises is raised here;
            jobs under way are then given up.
    """
    if workers <= 1:
        for job in jobs:
            yield work(job, progress)
        return
    context = multiprocessing.get_context("forkserver")  # plain fork is unsafe beside threads, and `datasets` and tqdm have some
    context.set_forkserver_preload(["__main__", work.__module__])
    counter, reported = context.Value("q", 0), 0
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _init_worker, (counter, plugin_paths()))
    queue, running = iter(jobs), set[Future[Result]]()
    try:
        while True:
            running |= {pool.submit(_run_job, work, job) for job in islice(queue, 2 * workers - len(running))}
            if not running:
                break
            done, running = wait(running, 0.2, FIRST_COMPLETED)
            now = counter.value  # read once: what is added meanwhile is for the next time
            progress(now - reported)
            reported = now
            for future in done:
                yield future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, often for memory: run the same command again with fewer --workers; finished shards are kept."
        ) from error
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        pool.shutdown(cancel_futures=True)


def _init_worker(counter: Any, plugins: tuple[Path, ...]) -> None:
    """A worker starts: Ctrl-C is the parent's to answer, and it does not outlive the parent."""
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard_streams()
    silence_pillow()
    load_plugins(plugins)  # jobs may hold what they define
    threading.Thread(target=_end_with_parent, daemon=True).start()


def silence_pillow() -> None:
    """Pillow's remarks about odd files say no more than what is reported, and never which file."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_job(work: Callable[[Job, Progress], Result], job: Job) -> Result:
    return work(job, _add_progress)


def _add_progress(samples: int) -> None:
    with _counter.get_lock():
        _counter.value += samples
