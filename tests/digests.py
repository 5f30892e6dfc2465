"""What a checkout computes, as digests: run before and after a commit that moves files and changes nothing.

    python tests/digests.py --output before.json            # this checkout
    python tests/digests.py --against before.json           # exit 1, and the entries that differ
    python tests/digests.py --repo ../other --against before.json
    python tests/digests.py --against before.json --found after.json   # of two that were written

In a temporary folder, by the command lines that a user types (nothing of the checkout is imported,
so that its files may lie anywhere), it packs the digits and a folder of captioned pictures, trains a
class DiT (cut and resumed, with power averages), a DDPM U-Net with previews, and an MM-DiT on
captions encoded before, exports each, and samples by ODEs and an SDE. It takes a minute and a half
of processor time, one thread a process, so that sums are the same.

`digests` must agree: packed shards with their indexes and manifests, encoded captions, each tensor
of each checkpoint and snapshot by its name, step and cursor, losses as numbers, exported weights and
configurations, and pixels of samples. `notes` may differ and are only told: code that travels with
exports, model cards, recipes as they were written, reports, curves and `.work`. Left out is what
depends on time, place or versions: speeds, waits and memory in metrics.jsonl, recipes and paths in
state.json, checkpoints' own manifests (they hash state.json), locks, `.packed`, `_diffusers_version`.

Numbers hold for one processor and one set of packages: `about` names them, and a comparison says
where they differ. A tensor or a file that has only another name is told as renamed, and fails too,
unless `--allow_renames`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "prepare": ("-m", "data.prepare"),
    "encode": ("-m", "data.encode"),
    "train": ("train.py",),
    "export": ("sample.py", "export"),
    "images": ("sample.py", "images"),
}
"""How a checkout is spoken to: what must keep working, whatever moves."""


def words(text: str) -> list[str]:
    """Words of a command line."""
    return text.split()


VOCABULARY = words("[PAD] [UNK] [CLS] [SEP] a red green blue big small square circle")
SMALL = words(
    "--data.workers=1 --train.learning_rate=1e-3 --train.cpu_threads=1 --train.mixed_precision=no "
    "--checkpoint.every=3 --checkpoint.keep=9 --ema.halflife=100 --log.every=1 --log.report_to=none "
    "--log.sample_every=0"
)
GRAY = words("--data.resolution=8 --data.channels=1 --data.shards=digits --train.batch_size=16")
DIT = words("--output_dir=dit --model.width=32 --model.depth=2 --model.heads=2 --ema.power 0.08 0.1")
UNET = words(
    "--output_dir=unet --model.kind=unet --model.block_channels 32 --model.head_width=32 "
    "--train.batch_size=4 --train.max_steps=3 --flow.path=ddpm --flow.predict=noise "
    "--flow.time=discrete --log.sample_every=3 --log.sample_steps=2"
)
TEXT = words(
    "--output_dir=text --data.shards=captioned --data.resolution=16 --data.text_encoder=encoder "
    "--data.max_tokens=8 --data.encoding=cached --data.encoded=encoded --model.kind=mmdit "
    "--model.patch_size=4 --model.width=32 --model.depth=2 --model.heads=2 --train.batch_size=8 "
    "--train.max_steps=3 --train.condition_dropout=0.3"
)
GUIDED = words("--seed 1 --guidance_scale 2 --batch_size 3")


class Runner:
    """The commands of one checkout, in one folder, with paths below that folder."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.repo, self.folder, self.failed = repo, folder, False
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("CONDOT")}
        self.env |= {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

    def __call__(self, command: str, *given: str) -> None:
        """Run a command; its error ends the script, also what runs beside it."""
        if self.failed:
            raise SystemExit("another command failed")
        head = [str(self.repo / word) if word.endswith(".py") else word for word in COMMANDS[command]]
        run = subprocess.run([sys.executable, *head, *given], cwd=self.folder, env=self.env, capture_output=True, text=True)
        if run.returncode:
            self.failed = True
            raise SystemExit(f"{command} {' '.join(given)}\nended with status {run.returncode}:\n{run.stderr[-3000:]}")


def make_pictures(folder: Path) -> None:
    """Write twelve pictures of 16 x 16 in two classes, each with its caption in a .txt beside it."""
    y, x = np.mgrid[0:16, 0:16] / 16
    for number in range(12):
        waves = [np.sin(2 * np.pi * (x * (1 + number % 3) + y * k + number / 7)) for k in range(3)]
        path = folder / ("even", "odd")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text(" ".join(VOCABULARY[4 + (number * k) % 8] for k in range(1, 2 + number % 5)))


def make_encoder(folder: Path) -> None:
    """Write a tiny CLIP text encoder of random weights, and a tokenizer of twelve words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

    rules = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    rules.pre_tokenizer = Whitespace()
    rules.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=16, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 12}
    ends = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **ends)).eval().save_pretrained(folder)


def work(run: Runner) -> None:
    """Everything that is digested, in two lines at once."""

    def digits() -> None:
        run("prepare", "digits", "--output", "digits", "--shard_size", "400kB", "--workers", "1")

    def dit() -> None:
        packed.result()
        run("train", *SMALL, *GRAY, *DIT, "--train.max_steps=3", "--export=false")
        run("train", *SMALL, *GRAY, *DIT, "--train.max_steps=6")
        run("export", "--run", "dit", "--ema", "width=0.09", "--output", "dit/export-width")
        labels = words("--class_labels 3 1 4 1 5 --num_inference_steps 4") + GUIDED
        run("images", "--run", "dit", *labels, "--solver", "heun", "--output", "dit/heun.png")
        run("images", "--pipeline", "dit/export-width", *labels, "--solver", "exponential", "--output", "dit/sde")

    def text() -> None:
        make_pictures(run.folder / "pictures")
        make_encoder(run.folder / "encoder")
        run("prepare", "imagefolder", "pictures", "--output", "captioned", "--shard_size", "12kB", "--workers", "1", "--holdout", "0.2")
        data = {"shards": ["captioned"], "resolution": 16, "text_encoder": ["encoder"], "max_tokens": 8, "encoded": "encoded"}
        (run.folder / "encode.json").write_text(json.dumps({"data": data}))
        run("encode", "--config", "encode.json")
        run("train", *SMALL, *TEXT)
        prompts = ("--prompt", "a red square", "big blue", "--num_images", "3", "--num_inference_steps", "3", *GUIDED)
        run("images", "--run", "text", *prompts, "--output", "text/default.png")

    def unet() -> None:
        packed.result()
        run("train", *SMALL, *GRAY, *UNET)
        labels = words("--class_labels 2 7 --num_inference_steps 3") + GUIDED
        run("images", "--pipeline", "unet/export", *labels, "--solver", "multistep", "--output", "unet/multistep.png")

    with ThreadPoolExecutor(2) as pool:
        packed = pool.submit(digits)
        for job in [pool.submit(line) for line in (text, dit, unet)]:
            job.result()


def sha(body: bytes) -> str:
    """Digest of bytes, short enough to be read."""
    return hashlib.sha256(body).hexdigest()[:32]


def pixels(path: Path) -> str:
    """Digest of an image's values, however they are compressed."""
    with Image.open(path) as image:
        return sha(f"{image.mode} {image.size}".encode() + image.tobytes())


def without(value: Any, *names: str) -> Any:
    """JSON without these keys, at any depth."""
    if isinstance(value, dict):
        return {key: without(one, *names) for key, one in value.items() if key not in names}
    return [without(one, *names) for one in value] if isinstance(value, list) else value


def of_json(path: Path, *names: str) -> str:
    """Digest of a JSON file's content, without these keys."""
    return sha(json.dumps(without(json.loads(path.read_text()), *names), sort_keys=True).encode())


def of_tensors(path: Path) -> dict[str, str]:
    """Digest of each tensor by its name."""
    return {name: sha(f"{one.dtype} {one.shape}".encode() + one.tobytes()) for name, one in load_file(path).items()}


class Found:
    """Digests by name, and notes."""

    def __init__(self, root: Path) -> None:
        self.root, self.digests, self.notes = root, {}, {}

    def keep(self, path: Path, how: Callable[[Path], str | dict[str, str]], note: bool = False) -> None:
        """Digest a file, as one entry or as one for each of its parts."""
        name, found = path.relative_to(self.root).as_posix(), how(path)
        parts = {f"{name}:{part}": one for part, one in found.items()} if isinstance(found, dict) else {name: found}
        (self.notes if note else self.digests).update(parts)

    def files(self, folder: str, pattern: str = "*") -> list[Path]:
        """Files of a folder in order."""
        return sorted(path for path in (self.root / folder).rglob(pattern) if path.is_file())


def whole(path: Path) -> str:
    """Digest of a file as it is."""
    return sha(path.read_bytes())


def progress(path: Path) -> str:
    """Digest of how far a checkpoint is."""
    state = json.loads(path.read_text())
    return sha(json.dumps({name: state.get(name) for name in ("step", "images", "cursor", "world", "averages")}).encode())


def losses(path: Path) -> str:
    """The losses themselves."""
    return " ".join(repr(line["loss"]) for line in map(json.loads, path.read_text().splitlines()) if "loss" in line)


def digest(root: Path) -> Found:
    """Digest everything that `work` made."""
    found = Found(root)
    for folder in ("digits", "captioned", "encoded"):
        for path in found.files(folder):
            if ".packed" not in path.parts and path.suffix != ".lock":
                told = path.suffix == ".png" or path.name == "report.json" or ".work" in path.parts
                found.keep(path, pixels if path.suffix == ".png" else whole, note=told)
    for run in ("dit", "unet", "text"):
        found.keep(root / run / "metrics.jsonl", losses)
        found.keep(root / run / "config.yaml", whole, note=True)
        for path in found.files(run):
            inside = path.relative_to(root / run).parts
            if inside[0].startswith("export"):
                keep_exported(found, path)
            elif path.suffix == ".safetensors":
                found.keep(path, of_tensors)
            elif path.name == "state.json":
                found.keep(path, progress)
            elif path.suffix == ".png":
                found.keep(path, pixels)
    return found


def keep_exported(found: Found, path: Path) -> None:
    """A file of an exported folder: weights and configurations must agree; what only tells of them is noted."""
    if path.name in ("SHA256SUMS", "provenance.json", "README.md", "config.yaml", "curve.png") or path.suffix == ".py":
        found.keep(path, pixels if path.suffix == ".png" else whole, note=True)
    elif path.suffix == ".safetensors":
        found.keep(path, of_tensors)
    elif path.suffix == ".json":
        found.keep(path, lambda one: of_json(one, "_diffusers_version", "transformers_version", "_name_or_path"))
    else:
        found.keep(path, pixels if path.suffix == ".png" else whole)


def about(repo: Path) -> dict[str, str]:
    """What the numbers depend on besides the code, and which code it was."""
    git = subprocess.run(["git", "-C", str(repo), "describe", "--always", "--dirty"], capture_output=True, text=True)
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "numpy", "pillow", "scikit-learn")}
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"commit": git.stdout.strip(), "processor": processor, "python": platform.python_version(), **packages}


def renames(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """Pair each entry that is gone with a new one of the same content, each once, in the order of names."""
    fresh: dict[str, list[str]] = {}
    for name in sorted(new.keys() - old.keys()):
        fresh.setdefault(new[name], []).append(name)
    return {name: fresh[old[name]].pop(0) for name in sorted(old.keys() - new.keys()) if fresh.get(old[name])}


def compare(before: dict[str, Any], after: dict[str, Any], *, allow_renames: bool) -> int:
    """Print what differs; 1 if a digest does."""
    for name, value in before["about"].items():
        if name != "commit" and after["about"].get(name) != value:
            print(f"note: {name} was {value} and is {after['about'].get(name)}, so numbers may differ by that alone")
    old, new = before["notes"], after["notes"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            print(f"note: {name} {'is gone' if name not in new else 'is new' if name not in old else 'differs'}")
    old, new, failures = before["digests"], after["digests"], 0
    renamed = renames(old, new)
    for name in sorted(old.keys() | new.keys() - set(renamed.values())):
        if name in renamed:
            print(f"renamed: {name} is {renamed[name]}")
            failures += not allow_renames
        elif old.get(name) != new.get(name):
            values = f": {old[name]}, now {new[name]}" if name in old and name in new and name.endswith(".jsonl") else ""
            print(f"{'GONE' if name not in new else 'NEW' if name not in old else 'DIFFERS'}: {name}{values}")
            failures += 1
    print(f"{len(old)} entries before, {len(new)} now: {f'{failures} differ' if failures else 'they agree to the bit'}")
    return int(failures > 0)


def digests_of(repo: Path, keep: Path | None) -> dict[str, Any]:
    """Do the work in a temporary folder, or in one to be kept, and digest it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=keep is None)
        work(Runner(repo, folder))
        found = digest(folder)
    return {"about": about(repo), "digests": found.digests, "notes": found.notes}


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, default=ROOT, help="the checkout (default: this one)")
    parser.add_argument("--output", type=Path, help="where the digests are written (default: the screen)")
    parser.add_argument("--against", type=Path, help="digests of before, to be compared with")
    parser.add_argument("--found", type=Path, help="digests of after, instead of the work that makes them")
    parser.add_argument("--allow_renames", action="store_true", help="the same content under another name is no difference")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it, for a look at what differs")
    args = parser.parse_args()
    before = json.loads(args.against.read_text()) if args.against else None
    after = json.loads(args.found.read_text()) if args.found else digests_of(args.repo.resolve(), args.keep)
    if args.output:
        args.output.write_text(json.dumps(after, indent=1, sort_keys=True) + "\n")
    if before:
        return compare(before, after, allow_renames=args.allow_renames)
    if not args.output:
        print(json.dumps(after, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
