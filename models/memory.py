"""What a step of training holds in memory beside weights, gradients and moments: estimated without computing, and measured.

A trace runs forward and backward on fake tensors, which have shapes and no
values, and counts every storage that comes to life until it
dies. So XL/2 needs no memory to be planned, and a step that computes its
blocks again, or differentiates twice, is counted as it goes. What a kernel
takes for itself while it runs is not seen, but for the largest such thing that
torch's own allocator gives: the columns of convolutions that oneDNN does not
take, as of bf16 on a CPU without it. Nor is what an allocator loses between
its blocks.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from .common import kernels
from .cost import stages

DeviceKind = Literal["cpu", "gpu"]
Step = Callable[[Callable[..., Tensor], nn.Module], Tensor]
"""From a network as it is called in training, and the bare one, to the mean loss of a micro-batch that it makes itself."""
AUTOCAST_FLOAT32 = {F.layer_norm, F.rms_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.interpolate}
"""What autocast computes in float32 on a GPU and not on a CPU, of all that our networks call: ATen/autocast_mode.h, AT_FORALL_FP32."""
CONVOLUTION, CONVOLUTION_BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default


class Footprint(NamedTuple):
    """Bytes of one micro-batch."""

    activations: int
    """At most at one moment, in the forward or the backward pass, beside weights, their gradients and `copies`."""
    saved: int
    """Of these: from the forward to the backward pass."""
    copies: int
    """At most, of weights in half precision, which autocast makes and the backward pass wants again."""
    peak: int
    """Activations and copies at one moment."""


class MemoryTracker(TorchDispatchMode):
    """Bytes of the storages that came to life while it is entered, and live.

    Args:
        held: tensors that were there before, and do not count.
        kind: cpu, to count what this CPU's convolutions take while they run besides.
    """

    def __init__(self, held: Iterable[Tensor] = (), kind: DeviceKind = "gpu") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self._kind = kind
        self._held = [tensor.untyped_storage() for tensor in held]
        self._weights = {storage._cdata for storage in self._held}
        self._living: dict[int, weakref.ref[Any]] = {}
        self.current = {"activations": 0, "copies": 0}
        self.peak = {**self.current, "both": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1  # checks of values: times in [0, 1], no token hidden
        result = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        for part in tree_iter(result):
            if isinstance(part, Tensor):
                self._add(part.untyped_storage(), "copies" if copied else "activations")
        if self._kind == "cpu" and func in (CONVOLUTION, CONVOLUTION_BACKWARD):
            self._update_peak(_workspace(func, args))
        return result

    def _add(self, storage: torch.UntypedStorage, sort: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights or key in self._living:
            return
        self._living[key] = weakref.ref(storage, partial(self._remove, key, size, sort))
        self.current[sort] += size
        self.peak["copies"] = max(self.peak["copies"], self.current["copies"])
        self._update_peak()

    def _update_peak(self, workspace: int = 0) -> None:
        """Take this moment for the highest if it is, with bytes that are held for its length."""
        self.peak["activations"] = max(self.peak["activations"], self.current["activations"] + workspace)
        self.peak["both"] = max(self.peak["both"], sum(self.current.values()) + workspace)

    def _remove(self, key: int, size: int, sort: str, _: Any) -> None:
        del self._living[key]
        self.current[sort] -= size


def _workspace(func: Any, args: Sequence[Any]) -> int:
    """Return the bytes that torch's allocator gives a convolution on this CPU while it runs.

    Where oneDNN takes it, copies in its own layout, which are small and not
    counted. What it leaves, as bf16 where the CPU neither has it nor AVX-512 to
    emulate it, ATen lays out in columns, every patch of the whole batch beside
    the other: for a 3 x 3 kernel nine times the input. The gradient of a bias
    in bf16 is summed from a copy in float32.

    Args:
        func: CONVOLUTION or CONVOLUTION_BACKWARD.
        args: its arguments, real or fake tensors of the CPU.

    Source: ATen/native/ConvolutionMM2d.cpp.
    """
    if func is CONVOLUTION:
        x, weight, bias, stride, padding, *rest = args
        grad, sizes, mask = None, None, (False, True, False)
    else:
        grad, x, weight, sizes, stride, padding, *rest, mask = args
        bias = None
    backend = torch._C._select_conv_backend(x, weight, bias, stride, padding, *rest, sizes)
    if backend != torch._C._ConvBackend.Slow2d:  # type: ignore[attr-defined]  # torch's stub has another name
        return 0
    pixels = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)]
    pointwise = {*weight.shape[2:], *stride} == {1} and not any(padding)  # the input itself is the columns
    columns = 0 if pointwise else len(x) * weight[0].numel() * math.prod(pixels) * x.element_size()
    widened = 4 * grad.numel() if grad is not None and grad.element_size() < 4 else 0
    return max(columns * mask[1], widened * mask[2])


class _GPUAutocast(TorchFunctionMode):
    """Autocast on a CPU with the list of float32 operations that a GPU has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in AUTOCAST_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = tuple(_to_float32(value) for value in args)
            kwargs = {name: _to_float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


def estimate_memory(build: Callable[[], nn.Module], step: Step, precision: str, kind: DeviceKind) -> Footprint:
    """What a step takes on a device that need not be here.

    Args:
        build: makes the network on the meta device.
        step: one micro-batch. It may not look at values, but read tables that were made before.
        precision: no, or what the products are in: bf16, fp16, and fp8, whose activations are counted as of bf16.
        kind: gpu, for the kernels and the autocast of CUDA, or cpu: this one, for convolutions differ by processor.

    Returns:
        Bytes. Text is counted without a mask, and FlashAttention's or the memory-efficient kernel's
        needs for attention on a GPU.
    """
    network = build()
    with FakeTensorMode(allow_non_fake_inputs=True), _kernels_of(kind):
        tracker = MemoryTracker(_allocate_gradients(_replace_by_fakes(network)), kind)
        with tracker, _GPUAutocast() if kind == "gpu" else nullcontext():
            loss = step(_with_autocast(network, precision), network)
            saved = tracker.current["activations"]
            _backward(loss)
    return Footprint(tracker.peak["activations"], saved, tracker.peak["copies"], tracker.peak["both"])


def _backward(loss: Tensor) -> None:
    """Run the backward pass as `loss.backward()` does, which would suspend the function mode, and blocks are computed again meanwhile."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def measure_memory(network: nn.Module, step: Step, precision: str) -> int:
    """Bytes that a step took at most on this CPU beside weights and gradients, as torch's allocator tells its profiler.

    Args:
        network: with values.
        step, precision: as of `estimate_memory`.
    """
    _allocate_gradients(network)
    model = _with_autocast(network, precision)
    step(model, network).backward()  # what is made once is made
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells the terminal when it begins and ends
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, network).backward()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak


def _allocate_gradients(network: nn.Module) -> list[Tensor]:
    """Give every trained weight a gradient, as it has one between two micro-batches of a step; all that is then held."""
    weights, buffers = list(network.parameters()), list(network.buffers())
    for weight in weights:
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    return [*weights, *buffers, *(weight.grad for weight in weights if weight.grad is not None)]


def _replace_by_fakes(network: nn.Module) -> nn.Module:
    """Fake tensors of the CPU in place of those of the meta device, which autocast does not know; inside a FakeTensorMode."""
    made: dict[int, Tensor] = {}
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
            module._parameters[name] = made.setdefault(id(weight), fake)  # type: ignore[assignment]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


def _with_autocast(network: nn.Module, precision: str) -> Callable[..., Tensor]:
    """A network as Accelerate calls it: under autocast, with an output of float32."""

    def model(*arguments: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
            output: Tensor = network(*arguments)
        return output.float()

    return model


@contextmanager
def _kernels_of(kind: DeviceKind) -> Iterator[None]:
    """Have the kernels take the forms of a kind of device whatever the tensors say, and go through no chunks, of which nothing is left."""
    before = kernels._on_cpu, kernels._chunks
    kernels._on_cpu, kernels._chunks = lambda x: kind == "cpu", lambda x, size: ()
    try:
        yield
    finally:
        kernels._on_cpu, kernels._chunks = before


def inference_cost(network: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[int, int]:
    """What a frozen network costs while it computes.

    Args:
        network: on the meta device.
        call: uses it, and makes its input.

    Returns:
        Bytes at most beside its weights, and multiply-adds.
    """
    with FakeTensorMode(), _kernels_of("gpu"), torch.no_grad():
        _replace_by_fakes(network)
        with MemoryTracker([*network.parameters(), *network.buffers()]) as tracker:
            call(network)
        with MemoryTracker(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused kernels are not all counted
            call(network)
    return tracker.peak["activations"], counter.get_total_flops() // 2


def fsdp_units(network: nn.Module) -> list[list[tuple[int, ...]]]:
    """The shapes of the weights that FSDP2 gathers together: of each block, and last of all that stands in none."""
    blocks = [module for _, module in stages(network)]
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    rest = [tuple(weight.shape) for weight in network.parameters() if id(weight) not in inside]
    return [*([tuple(weight.shape) for weight in block.parameters()] for block in blocks), rest]
