"""train.py with one fault in it: `python tests/faulty.py FAULT RANK STEP [words of train.py]`; once, whatever restarts follow.

FAULT: kill, stop (SIGSTOP), sleep, a signal's name, nan (in the rank's batch), clock (time.time jumps a day back and a year on),
reader (a thread of the stream dies), fill (the run's disk, for ten steps), or a signal that comes while `saving` or
`sampling`, as saving:SIGTERM.
"""

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from condot.core.process import take_signals
from condot.core.standard_streams import guard_streams

guard_streams()
take_signals("the same command goes on from the last checkpoint")

from condot.cli import train
from condot.data.loader.batch import BatchLoader
from condot.pipeline.checkpoint import rank_file as rankfile
from condot.pipeline.training import loop, preview

FAULT, RANK, STEP, *WORDS = sys.argv[1:]
HERE = int(os.environ.get("RANK", "0")) == int(RANK) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
where, _, what = FAULT.rpartition(":")
train_step, write_file, compute_loss, load, real_time, now = (
    loop.train_step,
    rankfile.write_file,
    loop.compute_loss,
    BatchLoader.load,
    time.time,
    0,
)


def strike() -> None:
    """Let it happen."""
    print(f"FAULT {FAULT} on rank {RANK}", flush=True)
    if what == "sleep":
        time.sleep(1000)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(what) or signal.Signals[what])
    time.sleep(0.2)


def fill(folder: Path, step: int) -> None:
    """Leave no room on a disk from STEP on, for ten steps."""
    filler = folder.parent / "filler"
    if step >= int(STEP) + 10:
        filler.unlink(missing_ok=True)
    elif step >= int(STEP):
        with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
            while True:
                file.write(bytes(512))


def stepping(run):
    global now
    now = run.step
    if HERE and what == "fill":
        fill(Path(run.config.output_dir), now)
    elif HERE and not where and run.step == int(STEP) and what not in ("nan", "clock", "reader"):
        strike()
    if HERE and what == "clock" and run.step >= int(STEP):
        time.time = lambda: real_time() + (-86_400 if run.step % 2 else 3e7)
    return train_step(run)


def losing(run, batch):
    loss = compute_loss(run, batch)
    return loss._replace(loss=loss.loss * math.nan) if HERE and what == "nan" and run.step == int(STEP) else loss


def writing(*arguments):
    if HERE and where == "saving" and now >= int(STEP):
        strike()
    return write_file(*arguments)


def loading(self, plan):
    if HERE and what == "reader" and now >= int(STEP):
        raise MemoryError("no memory for a batch")
    return load(self, plan)


loop.train_step, loop.compute_loss, BatchLoader.load = stepping, losing, loading
for module in [
    m for name, m in sys.modules.items() if name.startswith("condot.pipeline.") and getattr(m, "write_file", None) is write_file
]:
    module.write_file = writing
if where == "sampling":
    generate = preview.generate

    def drawing(*arguments, **more):
        if HERE:
            strike()
        return generate(*arguments, **more)

    preview.generate = drawing

if __name__ == "__main__":
    train.program(WORDS)
