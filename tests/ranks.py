"""Ranks for tests: processes of one gloo group, forked from a server that has imported torch once, so that a launch takes a moment."""

import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which DTensor would import in every rank
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

import condot.pipeline.checkpoint.store  # noqa: F401

HERE = Path(__file__).resolve().parent


def _enter(body, rank, world, folder, words):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=300))
        body(*words)
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # without the farewell of the group, for which a rank that a test killed would be missed


def outcomes(world, body, *words, timeout=120):
    """Run a function of an importable module on every rank; (exit status, traceback) of each, -9 for a killed one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks", "pytest"])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        map(str, (HERE, HERE.parent))
    )  # for the server, which otherwise finds none of them (Python 3.11)
    with tempfile.TemporaryDirectory() as folder:
        crew = [context.Process(target=_enter, args=(body, rank, world, folder, words)) for rank in range(world)]
        for process in crew:
            process.start()
        end = time.monotonic() + timeout
        for process in crew:
            process.join(max(0.1, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(crew) if process.exitcode is None]
        for process in crew:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} of {world} still ran {body.__name__} after {timeout} s"
        texts = [Path(folder) / f"error-{rank}" for rank in range(world)]
        return [(p.exitcode, text.read_text() if text.exists() else "") for p, text in zip(crew, texts, strict=True)]


def together(world, body, *words, timeout=120):
    """As `outcomes`, and every rank must end well."""
    for rank, (status, text) in enumerate(outcomes(world, body, *words, timeout=timeout)):
        assert status == 0, f"rank {rank} of {world} ended with {status}: {text}"
