"""Model FLOP utilisation: what an image's training computes, over what the device could compute in that time.

Counted are the products of the network's forward pass, FLOPs being two a
multiply-add, and twice as many for its backward pass: 6 a multiply-add in all.
What activation checkpointing computes again is not counted, nor is the
optimiser, since neither brings the model forward.
Source: Chowdhery et al., PaLM, appendix B.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

T = TypeVar("T")

DATASHEET_TFLOPS: dict[str, tuple[float, float | None, float | None, float]] = {
    r"B200": (2250, 4500, 1125, 75),
    r"(H100|H800) \d+GB HBM\de?|H200|GH200 .*": (989.4, 1978.9, 494.7, 66.9),
    r"H100 NVL|H200 NVL": (835.5, 1671, 417.5, 60),
    r"H100 PCIe": (756.5, 1513, 378, 51.2),
    r"(A100|A800)[- ].*": (312, None, 156, 19.5),
    r"A40": (149.7, None, 74.8, 37.4),
    r"A30": (165, None, 82, 10.3),
    r"A10": (125, None, 62.5, 31.2),
    r"L40S": (362.05, 733, 183, 91.6),
    r"L40": (181.05, 362, 90.5, 90.5),
    r"L4": (121, 242.5, 60, 30.3),
    r"RTX 6000 Ada Generation": (364.2, 728.5, 182.1, 91.1),
    r"RTX A6000": (154.8, None, 77.4, 38.7),
    r"GeForce RTX 5090": (209.5, 419, 104.8, 104.8),
    r"GeForce RTX 4090": (165.2, 330.3, 82.6, 82.6),
    r"GeForce RTX 4080": (97.5, 194.9, 48.7, 48.7),
    r"GeForce RTX 3090 Ti": (80, None, 40, 40),
    r"GeForce RTX 3090": (71, None, 35.6, 35.6),
    r"V100-SXM2-.*": (125, None, None, 15.7),
    r"V100-PCIE-.*": (112, None, None, 14),
    r"T4": (65, None, None, 8.1),
    r"MI(300|325)X.*": (1307.4, 2614.9, 653.7, 163.4),
    r"MI250X.*": (191.5, None, None, 47.9),
}
"""TFLOP/s of one device in bf16 and fp16, fp8, TF32 and float32, by what torch calls it, of the vendors' data sheets.

All dense: where a sheet gives the figure with sparsity alone, half of it.
GeForce cards with float32 sums, as torch computes; MI250X of one of its two
dies, which is one device to torch. V100 and T4 have no bf16 products.
"""

DATASHEET_COLUMNS = {"bf16": 0, "fp16": 0, "fp8": 1, "tf32": 2, "float32": 3}
MIN_TRIALS = 4
BENCHMARK_SECONDS = {"cpu": 0.3, "cuda": 1.0}
"""That measuring a peak may take."""


def datasheet_flops(name: str, kind: str) -> float | None:
    """FLOP/s of a device by its data sheet, or None.

    Args:
        name: as torch.cuda.get_device_name has it; a part of a device (MIG) is not listed.
        kind: of the products: a key of DATASHEET_COLUMNS.
    """
    short = re.sub(r"^(NVIDIA|Tesla|AMD Instinct) ", "", re.sub(r"^NVIDIA Tesla ", "", name))
    found = next((sheet for pattern, sheet in DATASHEET_TFLOPS.items() if re.fullmatch(pattern, short) and "MIG" not in short), None)
    if found is None or (kind == "bf16" and re.match("V100|T4", short)):
        return None
    rate = found[DATASHEET_COLUMNS[kind]]
    return None if rate is None else rate * 1e12


def matmul_precision(precision: str, device: torch.device) -> str:
    """Return the kind of a run's products: a key of DATASHEET_COLUMNS; `precision` is Accelerate's."""
    if precision != "no":
        return precision
    fast = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if fast else "float32"


def benchmark_flops(device: torch.device, kind: str, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter) -> float | None:
    """FLOP/s that plain products of square matrices reach, of the size that reaches most; None for fp8.

    Torch's generators are not used.

    Args:
        device: to measure, with as many threads as training will have.
        kind: a key of DATASHEET_COLUMNS.
        seconds: after which no larger matrices are tried.
        clock: seconds.
    """
    if kind == "fp8":
        return None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    best, began, size = 0.0, clock(), 256
    while size <= 8192:
        x = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        elapsed = _fastest_seconds(partial(torch.matmul, x, x), device, seconds / 8, clock)
        best = max(best, 2 * size**3 / max(elapsed, 1e-9))
        if clock() - began + MIN_TRIALS * 8 * elapsed > seconds:
            break
        size *= 2
    return best


def _fastest_seconds(function: Callable[[], Any], device: torch.device, seconds: float, clock: Callable[[], float]) -> float:
    """Seconds of the quickest of MIN_TRIALS and more: small products fit between the turns that others take on a shared processor."""
    found: list[float] = []
    until = clock() + seconds
    while len(found) < MIN_TRIALS or clock() < until:
        began = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - began)
    return min(found)


def peak_flops(configured: float, precision: str, device: torch.device) -> tuple[float | None, str]:
    """FLOP/s of one device, and whose word that is.

    Args:
        configured: `log.peak_tflops`, which is taken where it is not 0.
        precision: of the run, as Accelerate has it.
        device: of this process; one that is not listed is measured, with others computing at the same time if they do the same.
    """
    if configured:
        return configured * 1e12, "log.peak_tflops"
    kind = matmul_precision(precision, device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        rate = datasheet_flops(name, kind)
        if rate:
            return rate, f"{name}, {kind}, by its data sheet"
    return benchmark_flops(device, kind, BENCHMARK_SECONDS.get(device.type, 1.0)), f"plain {kind} products, measured here"


@torch.no_grad()
def count_flops(function: Callable[[], T]) -> tuple[T, int]:
    """What a function returns, and the FLOPs of the products, convolutions and attentions in it."""
    custom: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # not in torch's own table
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        result = function()
    return result, counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Return the FLOPs of an attention; the arguments are shapes."""
    return int(sdpa_flop(query, key, value))


@dataclass
class MfuEstimator:
    """Of a run: FLOPs of an image, and the FLOP/s that one device could do; None is not known, and never guessed."""

    network: nn.Module | None = None
    """A copy on meta, of which one forward pass is counted; None: the objective is not one forward and one backward pass."""
    trained_share: float = 1.0
    """Share of its weights that are trained: a product with the others has no gradient of weights to compute."""
    peak_flops: float | None = None
    """FLOP/s of one device."""
    flops_per_image: float | None = None
    """FLOPs of training on one image."""
    encoder_flops_per_image: float | None = None
    """FLOPs of encoding one image and its caption."""
    counted: bool = False

    @classmethod
    def for_run(cls, accelerator: Accelerator, network: nn.Module, plain: nn.Module | None, configured: float) -> MfuEstimator:
        """What a run's utilisation is reckoned from; all ranks together, since those that measure share processors.

        Args:
            accelerator: of the run.
            network: that is trained.
            plain: a copy on meta; None as in `network` above.
            configured: `log.peak_tflops`.
        """
        accelerator.wait_for_everyone()
        try:
            rate, source = peak_flops(configured, accelerator.mixed_precision, accelerator.device)
        except Exception as error:  # as in `count`; other ranks compute here at the same time
            rate, source = None, ""
            accelerator.print(f"a device's peak is not known: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if rate:
            accelerator.print(f"a device's peak is {rate / 1e12:.4g} TFLOP/s ({source}).")
        sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
        return cls(plain, sum(n for n, wanted in sizes if wanted) / sum(n for n, _ in sizes), rate)

    def count(self, encode_batch: Callable[[], tuple[Any, ...]]) -> str:
        """Count, once, what one micro-batch computes.

        Args:
            encode_batch: encodes it: data, (B, *S), and what else the network takes besides x and t; called once, its result is dropped.

        Returns:
            "", or why nothing could be counted.
        """
        if self.counted:
            return ""
        self.counted = True
        try:
            seen, encoders = count_flops(encode_batch)
            data, *conditions = tree_map(lambda part: part.to("meta") if isinstance(part, Tensor) else part, tuple(seen))
            self.encoder_flops_per_image = encoders / len(data)
            if self.network is not None:
                forward = count_flops(lambda: self.network(data, data.new_empty(len(data)), *conditions))[1]  # type: ignore[misc]
                self.flops_per_image = forward * (2 + self.trained_share) / len(data)
        except Exception as error:  # a figure that cannot be had stops no training
            return f"model FLOP utilisation is not known: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            self.network = None
        return ""

    def mfu_values(self, rate: float) -> dict[str, float | None]:
        """`mfu` and `mfu_with_encoders` of one device at `rate` images per second."""
        model = self.flops_per_image * rate / self.peak_flops if self.flops_per_image is not None and self.peak_flops else None
        more = (
            self.encoder_flops_per_image * rate / self.peak_flops if self.encoder_flops_per_image is not None and self.peak_flops else None
        )
        return {"mfu": model, "mfu_with_encoders": None if model is None or more is None else model + more}
