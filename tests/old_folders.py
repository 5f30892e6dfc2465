"""What commit 85bd0c6 left on disk, and what it made of that itself: `tests/fixtures/85bd0c6`, for test_old_folders.py.

    git worktree add --detach ../wt-85 85bd0c6 && python tests/old_folders.py ../wt-85      # makes the folder anew

Recipes, shards, encoded captions, three runs cut at step 20 and two exports, with paths relative to
the folder. In `expected`: losses and digests of all state when 85bd0c6 went on to step 40, and the
images that it and diffusers drew. Nothing of the house is imported. A U-Net has
no run here: its blocks begin at 32 channels, and the state of the smallest takes 3 MB.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import digests
import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parent / "fixtures/85bd0c6"
CUT, END = 20, 40
COMMON = """\
output_dir: {name}
export: false
data: {{shards: shards, resolution: 8, workers: 1{data}}}
train: {{max_steps: 20, batch_size: 8, learning_rate: 3e-3, cpu_threads: 1, mixed_precision: 'no', condition_dropout: 0.2}}
checkpoint: {{every: 20, keep: 1}}
log: {{every: 1, sample_every: 0, report_to: none}}
"""
RECIPES = {
    "stock": COMMON
    + """\
model: {{kind: dit, patch_size: 2, width: 16, depth: 1, heads: 2}}
flow: {{time: logit_normal}}
ema: {{halflife: 100, power: [0.08, 0.1], snapshot_every: 80}}
""",
    "own": COMMON
    + """\
model: {{kind: dit, style: modern, patch_size: 4, width: 8, depth: 1, heads: 1, registers: 1}}
flow: {{path: sub_vp, coupling: optimal_transport, coupling_group: 4}}
ema: {{halflife: [50, 500]}}
""",
    "text": COMMON
    + """\
model: {{kind: mmdit, patch_size: 4, width: 8, depth: 1, heads: 2}}
flow: {{path: cosine, time: mode, stratified: true}}
ema: {{halflife: 100}}
""",
}
"""One whose export is stock classes, one that takes code of its own along, one on captions."""
TEXT = ", text_encoder: encoder, max_tokens: 8, encoding: cached, encoded: encoded"
GUIDED = ("--seed", "5", "--guidance_scale", "2", "--num_inference_steps", "4", "--batch_size", "2")
LABELS = ("--class_labels", "1", "0", "1", *GUIDED)
SAMPLES = {
    "stock-heun": ("--run", "stock", *LABELS, "--solver", "heun"),
    "stock-width-euler": ("--run", "stock", "--ema", "width=0.09", *LABELS, "--solver", "euler"),
    "stock-exported-heun": ("--pipeline", "stock-export", *LABELS, "--solver", "heun"),
    "own-sde": ("--run", "own", "--ema", "500", *LABELS, "--solver", "exponential"),
    "own-exported-euler": ("--pipeline", "own-export", *LABELS, "--solver", "euler"),
    "text-heun": ("--run", "text", "--prompt", "a red square", "big", *GUIDED, "--solver", "heun"),
}
"""`sample.py images` with these words; no solver and prediction whose way was changed since by wish."""
PIPELINES = {
    "stock": ("stock-export", {}, {}),
    "stock custom": ("stock-export", {"custom_pipeline": "pipeline_condot_v1"}, {"solver": "heun"}),
    "own": ("own-export", {}, {}),
    "own custom": ("own-export", {"custom_pipeline": "pipeline_condot_v1"}, {"solver": "midpoint"}),
}
"""Exports opened by diffusers: folder, words of `from_pretrained` and of the call."""


def probe() -> str:
    """Digest of products, a convolution and functions, forwards and backwards: other kernels, threads or versions give another."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(24, 32, 16, generator=draw).requires_grad_()
    w = torch.randn(64, 16, generator=draw).requires_grad_()
    h = torch.nn.functional.gelu(torch.nn.functional.layer_norm(x @ w.t(), (64,)), approximate="tanh")
    h = torch.nn.functional.scaled_dot_product_attention(h, h.flip(1), h)
    h = torch.nn.functional.conv2d(h.reshape(24, 8, 16, 16), torch.randn(8, 8, 3, 3, generator=draw), padding=1)
    (torch.nn.functional.silu(h).softmax(-1) * h.exp().sin()).mean().backward()
    assert x.grad is not None and w.grad is not None
    return digests.sha(b"".join(one.detach().numpy().tobytes() for one in (h, x.grad, w.grad)))


def tensors(folder: Path) -> dict[str, str]:
    """Digests of a checkpoint's tensors, or a snapshot's."""
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in digests.of_tensors(path).items()}


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def draw(name: str, root: Path) -> np.ndarray:
    """What diffusers draws of an export, (N, H, W, C) in 0..1."""
    from diffusers import DiffusionPipeline

    folder, words, call = PIPELINES[name]
    pipe = DiffusionPipeline.from_pretrained(root / folder, trust_remote_code=True, **words)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    made = pipe(class_labels=[0, 1], num_inference_steps=4, guidance_scale=2.0, generator=generator, output_type="np", **call)
    return np.ascontiguousarray(made.images, dtype=np.float32)


def image(path: Path) -> np.ndarray:
    """A file's pixels."""
    with Image.open(path) as opened:
        return np.array(opened)


def make_sources(folder: Path) -> None:
    """Twenty pictures of 8 x 8 in two classes with captions, and a text encoder."""
    digests.make_pictures(folder / "pictures")
    for path in (folder / "pictures").rglob("*.png"):
        Image.fromarray(image(path)[::2, ::2]).save(path)
    digests.make_encoder(folder / "encoder")


def make(repo: Path, folder: Path) -> None:
    """Fill the folder by the commands of a checkout; what they say of themselves is in `expected`."""
    run = digests.Runner(repo, folder)
    make_sources(folder)
    run("prepare", "imagefolder", "pictures", "--output", "shards", "--shard_size", "16kB", "--workers", "1", "--holdout", "0.2")
    shutil.rmtree(folder / "pictures")
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(recipe.format(name=name, data=TEXT if name == "text" else ""))
    run("encode", "--config", "text.yaml")
    for name in RECIPES:
        run("train", "--config", f"{name}.yaml")
    for name in ("stock", "own"):
        run("export", "--run", name, "--output", f"{name}-export")


def expected(repo: Path, folder: Path) -> None:
    """Sample and train on, in a copy, and write down what comes out."""
    (folder / "expected").mkdir()
    told: dict[str, Any] = {"probe": probe(), "torch": torch.__version__, "losses": {}, "tensors": {}}
    commit = subprocess.run(["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    told["commit"] = commit.stdout.strip()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(folder, copy)
        run = digests.Runner(repo, copy)
        for name, words in SAMPLES.items():
            run("images", *words, "--output", str(folder / "expected" / f"{name}.png"))
        drawn = {name: draw(name, copy) for name in PIPELINES}
        for name in RECIPES:
            run("train", "--config", f"{name}.yaml", f"--train.max_steps={END}")
            told["losses"][name] = losses(copy / name)
            for path in sorted((copy / name).rglob(f"checkpoint-{END}")):
                told["tensors"][path.relative_to(copy).as_posix()] = tensors(path)
    save_file(drawn, folder / "expected/diffusers.safetensors")
    (folder / "expected/told.json").write_text(json.dumps(told, indent=1) + "\n")


def main() -> int:
    """Make the fixtures anew."""
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    repo = Path(sys.argv[1]).resolve()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    make(repo, FOLDER)
    expected(repo, FOLDER)
    print(f"{sum(path.stat().st_size for path in FOLDER.rglob('*') if path.is_file()):,} bytes in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
