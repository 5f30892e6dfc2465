"""Several ranks of a command, forked from one process that has imported it already: a launch without torchrun's start-up of many seconds.

For facts about what ranks compute together. How launchers start, signal and end processes is tested with the launchers themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["condot.cli.train", "condot.cli.sample", "diffusers.models.unets.unet_2d"])


def _rank(command: str, words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """In the fork: be one rank as torchrun would have started it."""
    for path, number in ((out, 1), (err, 2)):
        with open(path, "ab", buffering=0) as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    os.chdir(ROOT)
    from condot.cli import start

    start(command, words)
    sys.exit(0)


def launch_ranks(ranks: int, command: str, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command of `condot.cli` on so many ranks of this machine.

    Returns:
        The exit status of the first rank that failed, else 0, and what all ranks wrote.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        processes = []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "CONDOT_ALLOCATOR": "system",  # not to be started again
            }  # fmt: skip
            processes.append(_context.Process(target=_rank, args=(command, list(words), environment, str(out), str(err))))
            processes[-1].start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        texts = [path.read_text(encoding="utf-8", errors="replace") if path.exists() else "" for path in (out, err)]
    if late:
        raise subprocess.TimeoutExpired([command, *words], timeout, *texts)
    status = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess([command, *words], int(status or 0), *texts)
