"""Damaged files by the thousand through `data.prepare`, `data.inspect` and training: only counted bad samples may come of them.

    python benchmarks/fuzz.py --files 20000 --seed 0 --output runs/fuzz

A round is a folder of mutated image files. It is packed with `--skip_corrupt`
(what is not packed must be counted), packed again as a tar that is indexed
without decoding (so that training meets the damage), looked at, and trained on.
Tars, tables, parquet files and captions are mutated as well and given to
`data.prepare` one by one. What else comes of a file than success or a counted
fault (a traceback, a hang, a crash, a loss that no report counts) is a finding,
kept in the output with the file that caused it. All is a function of the seed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.fuzz_mutations import mutate
from benchmarks.fuzz_seeds import containers, images, saved

MEMORY = 8 << 30
"""Bytes of address space that a command may have."""
SECONDS = 15
"""For one container in the worker; a command has COMMAND_SECONDS."""
COMMAND_SECONDS = 420
DIT = {"model.kind": "dit", "model.width": 32, "model.depth": 1, "model.heads": 2, "model.patch_size": 4, "data.resolution": 16}
QUIET = {"export": "false", "log.sample_every": 0, "log.report_to": "none", "checkpoint.every": 1000, "train.cpu_threads": 1}
RUN = DIT | QUIET | {"train.max_steps": 3, "data.max_bad_share": 0.999, "data.workers": 0}
"""A run of three steps, which goes on whatever share of the samples is bad."""


def write_round(folder: Path, seeds: dict[str, tuple[str, bytes]], count: int, rng: random.Random) -> dict[str, str]:
    """Write mutated files; returns the kind of each by name. One in ten stays whole, so that there is something to train on."""
    folder.mkdir(parents=True)
    kinds = sorted(seeds)
    made = {}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        extension, body = seeds[kind]
        if rng.random() < 0.05:
            extension = rng.choice(sorted({e for e, _ in seeds.values()}))
        name = f"{number:05d}.{extension}"
        (folder / name).write_bytes(body if rng.random() < 0.1 else mutate(body, rng))
        made[name] = kind
    return made


def limited() -> None:
    """Bound a command's memory."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def command(*words: str) -> tuple[int, str]:
    """Run a command of the product; its status and what it printed; -999 where it hung."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, errors="replace",
            timeout=COMMAND_SECONDS, preexec_fn=limited,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return -999, f"hung: {error.stdout!r:.2000}"
    return done.returncode, done.stdout + done.stderr


def broken(status: int, text: str, allowed: tuple[int, ...]) -> str:
    """What is wrong with the end of a command, or nothing."""
    if status not in allowed or "Traceback" in text:
        return f"status {status}: {text[-1500:]}"
    return ""


class Fuzz:
    """The rounds, their counts and their findings."""

    def __init__(self, output: Path, seed: int) -> None:
        self.output, self.seed = output, seed
        self.files, self.packed, self.steps, self.replaced = Counter[str](), Counter[str](), 0, 0
        self.reasons: dict[str, Counter[str]] = {}
        self.findings: list[dict[str, str]] = []

    def find(self, what: str, why: str, place: Path) -> None:
        """Keep a finding with what caused it."""
        kept = self.output / "findings" / f"{len(self.findings):03d}-{what.replace(' ', '_')}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if place.is_dir() else shutil.copy)(place, kept)  # type: ignore[operator]
        self.findings.append({"what": what, "why": why, "kept": str(kept)})
        print(f"FINDING {what}: {why[-400:]}", flush=True)

    def round(self, number: int, seeds: dict[str, tuple[str, bytes]], count: int) -> None:
        """Pack, look at, and train on one folder of mutated images."""
        place = self.output / f"round-{number:04d}"
        shutil.rmtree(place, ignore_errors=True)
        kinds = write_round(place / "images", seeds, count, random.Random(f"{self.seed}/{number}"))
        self.files.update(kinds.values())
        if self._pack(place, kinds):
            self._adopt(place, kinds)
        shutil.rmtree(place)

    def _pack(self, place: Path, kinds: dict[str, str]) -> bool:
        words = [
            "-m",
            "data.prepare",
            "imagefolder",
            str(place / "images"),
            "--output",
            str(place / "shards"),
            "--skip_corrupt",
            "--workers",
            "1",
        ]
        wrong = broken(*command(*words), allowed=(0,))
        if wrong:
            self.find("prepare", wrong, place / "images")
            return False
        report = json.loads((place / "shards" / "report.json").read_text())
        bad = report["unreadable"]
        passed_over = sum(report.get("unknown_files", {}).values())
        if report["samples"] + bad["count"] + passed_over != len(kinds):
            counts = f"{report['samples']} packed, {bad['count']} bad, {passed_over} passed over, of {len(kinds)}"
            self.find("uncounted", counts, place / "images")
        left = {line.partition(" (")[0] for line in bad["list"]}
        self.packed.update(kind for name, kind in kinds.items() if name not in left)
        for line in bad["list"]:
            name, _, why = line.partition(" (")
            self.reasons.setdefault(kinds.get(name, "?"), Counter())[why[:60]] += 1
        return True

    def _adopt(self, place: Path, kinds: dict[str, str]) -> None:
        """Index the same files as a tar without decoding them, look at it, and train on it: training must meet what is wrong."""
        (place / "tars").mkdir()
        with tarfile.open(place / "tars" / "train-000000.tar", "w") as tar:
            for name in kinds:
                tar.add(place / "images" / name, name)
        adopted, run = str(place / "adopted"), place / "run"
        more = {"data.shards": adopted, "output_dir": run, "train.batch_size": max(8, len(kinds) // 4)}
        picture = ["--resolution", "16", "--batch_size", "16", "--output", str(place / "inspect.png")]
        checks = (
            (["-m", "data.prepare", "webdataset", str(place / "tars"), "--output", adopted, "--skip_corrupt", "--workers", "1"], (0,)),
            (["-m", "data.inspect", adopted, "--workers", "1", *picture], (0, 1)),
            (["train.py", *(f"--{key}={value}" for key, value in (RUN | more).items())], (0,)),
        )
        for words, allowed in checks:
            wrong = broken(*command(*words), allowed=allowed)
            if wrong:
                self.find(words[1] if words[0] == "-m" else words[0], wrong, place / "images")
                return
        self.steps += json.loads((run / "status.json").read_text())["step"]
        listed = run / "bad_samples.jsonl"
        self.replaced += len(listed.read_text().splitlines()) if listed.exists() else 0

    def containers(self, count: int) -> None:
        """Mutated tars, tables and texts, each prepared alone in a worker that is begun anew when one kills it."""
        place = self.output / "containers"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        seeds, rng = containers(), random.Random(f"{self.seed}/containers")
        jobs = []
        for number in range(count):
            kind = sorted(seeds)[number % len(seeds)]
            name, body = seeds[kind]
            folder = place / f"{number:05d}"
            folder.mkdir()
            (folder / name).write_bytes(body if rng.random() < 0.05 else mutate(body, rng))
            if name.startswith(("metadata", "0.")):
                for image in range(4):
                    (folder / f"{image}.png").write_bytes(saved("L", "PNG", (4, 4)))
            source = str(folder / name) if name.endswith(".parquet") else str(folder)
            jobs.append(
                (kind, "webdataset" if name.endswith(".tar") else "parquet" if name.endswith(".parquet") else "imagefolder", source)
            )
        self.files.update(kind for kind, *_ in jobs)
        done = 0
        while done < len(jobs):
            done += self._worker(jobs[done : done + 500])
        shutil.rmtree(place)

    def _worker(self, jobs: list[tuple[str, str, str]]) -> int:
        """Some containers in one process; how many were done, the one that killed it included."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
        worker = subprocess.run(
            [sys.executable, __file__, "--worker"],
            input=json.dumps(jobs), env=env, cwd=ROOT, text=True, errors="replace", capture_output=True, preexec_fn=limited,
        )  # fmt: skip
        lines = [json.loads(line[1:]) for line in worker.stdout.splitlines() if line.startswith("\x01")]
        for (kind, _, source), line in zip(jobs, lines, strict=False):
            self.packed[kind] += line["status"] == 0
            if line["wrong"]:
                self.find(kind, line["wrong"], Path(source).parent if kind == "parquet" else Path(source))
            elif line["status"]:
                self.reasons.setdefault(kind, Counter())[line["said"][:60]] += 1
        if len(lines) < len(jobs):
            kind, _, source = jobs[len(lines)]
            self.find(kind, f"the process ended with {worker.returncode}: {worker.stderr[-1500:]}", Path(source))
        return min(len(jobs), len(lines) + 1)

    def report(self, seconds: float) -> dict[str, Any]:
        """The table as plain values."""
        rows = {
            kind: {"files": n, "packed": self.packed[kind], "bad": n - self.packed[kind],
                   "reasons": dict(self.reasons.get(kind, Counter()).most_common(3))}
            for kind, n in sorted(self.files.items())
        }  # fmt: skip
        totals = {
            "files": self.files.total(),
            "formats": len(rows),
            "packed": self.packed.total(),
            "training_steps": self.steps,
            "replaced_in_training": self.replaced,
        }
        return {"seed": self.seed, **totals, "seconds": round(seconds), "findings": self.findings, "kinds": rows}


def work() -> None:
    """The worker: prepare each container here, under an alarm, and write a line of what came of it."""
    import contextlib
    import signal
    import traceback

    from condot.data.prepare.command import main

    def late(number: int, frame: object) -> None:
        raise BaseException(f"hung: more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for _, kind, source in json.loads(sys.stdin.read()):
        out, wrong, status = io.StringIO(), "", -1
        target = Path(source if Path(source).is_dir() else Path(source).parent).with_name(
            f"out-{Path(source).parent.name}-{Path(source).name}"
        )
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                status = main([kind, source, "--output", str(target), "--skip_corrupt", "--workers", "1"])
        except BaseException:  # whatever it is, it is what we look for
            wrong = traceback.format_exc()[-1500:]
        signal.alarm(0)
        said = out.getvalue().strip()
        if status not in (0, 2, -1):
            wrong = f"status {status}"
        if any(ord(sign) < 32 and sign not in "\r\n\t" for sign in said.replace("\x1b[A", "")):
            wrong = f"control characters on the screen: {said[-300:]!r}"
        shutil.rmtree(target, ignore_errors=True)
        print("\x01" + json.dumps({"status": status, "wrong": wrong, "said": said.rpartition("error: ")[2]}), flush=True)


def main() -> int:
    """Run the rounds; returns 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="in all, images and containers (default: 20000)")
    parser.add_argument("--round", type=int, default=1_000, help="image files of a round (default: 1000)")
    parser.add_argument("--containers", type=float, default=0.15, help="share of the files that are tars, tables and texts (default: 0.15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"), help="folder of the report and of what was found")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return 0
    shutil.rmtree(args.output / "findings", ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    fuzz, began, seeds = Fuzz(args.output.resolve(), args.seed), time.perf_counter(), images()
    held = round(args.files * args.containers)
    fuzz.containers(held)
    left, number = args.files - held, 0
    while left > 0:
        fuzz.round(number, seeds, min(args.round, left))
        left, number = left - args.round, number + 1
        report = fuzz.report(time.perf_counter() - began)
        (args.output / "fuzz.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{report['files']:,} files, {report['packed']:,} packed, {len(fuzz.findings)} findings, {report['seconds']} s", flush=True)
    return 1 if fuzz.findings else 0


if __name__ == "__main__":
    sys.exit(main())
