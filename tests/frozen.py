"""Frozen encoders and shards of a few images for the tests of the encoded cache: random weights, real formats."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from condot.data.format.index import index_tar
from condot.data.format.manifest import Manifest, Tally, write_manifest

SIZES = ((32, 32), (48, 32), (32, 48), (40, 33))
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *["a", "red", "green", "blue", "big", "small", "square", "circle", "of", "on", "and", "the"])


def picture(number: int, channels: int = 3) -> Image.Image:
    """Smooth colours that no two numbers share."""
    width, height = SIZES[number % len(SIZES)]
    y, x = np.mgrid[0:height, 0:width] / 32
    waves = [np.sin(2 * np.pi * (x * (1 + number % 3) + y * k + number / 7)) for k in range(channels)]
    pixels = np.round(127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def shards(folder: Path, counts: tuple[int, ...] = (5, 3, 4), *, broken: tuple[int, ...] = (), channels: int = 3) -> Path:
    """Shards of pictures, numbered through, with classes and captions; the `broken` ones are cut."""
    folder.mkdir(parents=True)
    lines, tally, number = [], Tally(), 0
    for at, count in enumerate(counts):
        path = folder / f"train-{at:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(count):
                buffer = io.BytesIO()
                picture(number, channels).save(buffer, "JPEG" if number in broken else "PNG")
                image = buffer.getvalue()[: -200 if number in broken else None]
                caption = " ".join(WORDS[4 + (number * k) % 12] for k in range(1, 2 + number % 5))
                files = {"jpg" if number in broken else "png": image, "cls": str(number % 2).encode(), "txt": caption.encode()}
                if number == 2:
                    del files["txt"]
                for extension, body in files.items():
                    info = tarfile.TarInfo(f"{number:05d}.{extension}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
                number += 1
        shard, found = index_tar(path, "train")
        lines.append(shard)
        tally += found
    write_manifest(folder, Manifest(shards=tuple(lines), class_names=("even", "odd"), tally=tally))
    return folder


def kl(folder: Path, seed: int = 0, channels: int = 3, **config: object) -> Path:
    """A tiny AutoencoderKL: 4 latent channels at 1/4."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=4,
        **{"scaling_factor": 0.5, **config},
    )
    vae.save_pretrained(folder)
    return folder


def tiny(folder: Path, seed: int = 0) -> Path:
    """A tiny AutoencoderTiny: 4 latent channels at 1/4, deterministic."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(seed)
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).save_pretrained(folder)
    return folder


def dc(folder: Path) -> Path:
    """A tiny AutoencoderDC: 4 latent channels at 1/4, deterministic."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    halves = {
        f"{half}_{key}": value
        for half in ("encoder", "decoder")
        for key, value in {"block_out_channels": (8, 16, 16), "layers_per_block": (1,) * 3, "qkv_multiscales": ((),) * 3}.items()
    }
    blocks = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=8, **halves, **blocks).save_pretrained(folder)
    return folder


def text(folder: Path, kind: str, seed: int = 0, width: int = 16, tokenizer: Path | None = None) -> Path:
    """A tiny BERT, T5 or CLIP text encoder (also with its projection), and a tokenizer of sixteen words."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    torch.manual_seed(seed)
    rules = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    rules.pre_tokenizer = Whitespace()
    ends = {"t5": "$A [SEP]", "bare": "$A"}.get(kind, "[CLS] $A [SEP]")
    rules.post_processor = TemplateProcessing(single=ends, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"} | ({} if kind == "bare" else {"pad_token": "[PAD]"})
    transformers.PreTrainedTokenizerFast(tokenizer_object=rules, model_max_length=32, **names).save_pretrained(tokenizer or folder)
    small = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": len(WORDS)}
    if kind == "t5":
        config = transformers.T5Config(vocab_size=len(WORDS), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0)
        model: torch.nn.Module = transformers.T5Model(config)
    elif kind.startswith("clip"):
        config = transformers.CLIPTextConfig(
            **small, max_position_embeddings=32, pad_token_id=0, bos_token_id=2, eos_token_id=3, projection_dim=12
        )
        model = transformers.CLIPTextModelWithProjection(config) if kind == "clip_projected" else transformers.CLIPTextModel(config)
    else:
        model = transformers.BertModel(transformers.BertConfig(**small, max_position_embeddings=32))
    model.eval().save_pretrained(folder)
    return folder


def recipe(path: Path, **data: object) -> Path:
    """A recipe with this section `data`."""
    path.write_text(json.dumps({"data": {k: str(v) if isinstance(v, Path) else v for k, v in data.items()}}))
    return path
