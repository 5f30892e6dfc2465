"""Attention and GELU: what float64 says, in every dtype and on every path, forwards, backwards and twice."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from condot.models import registry
from condot.models.common import kernels
from condot.models.common.kernels import TanhGELU, attend, gelu_tanh, use_fast_gelu

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Half a unit in the last place, relative, of a result; of float32 and float64 some more, for their steps round too."""


@pytest.fixture(params=[(0, 5), (0, 2**18), (10**9, 0)], ids=["chunks of 5", "one chunk", "torch's own"])
def paths(request, monkeypatch):
    """GELU's forms on a CPU; chunks that do not divide the tensor among them."""
    monkeypatch.setattr(kernels, "SMALL_INPUT", request.param[0])
    monkeypatch.setattr(kernels, "CHUNK", request.param[1])


@pytest.fixture
def in_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "SMALL_INPUT", 0)
    monkeypatch.setattr(kernels, "CHUNK", 5)


def formula(x):
    """GELU's tanh form as it is published."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(x, gradient=None):
    x = x.detach().double().requires_grad_()
    y = formula(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y) if gradient is None else gradient.double())
    return y.detach(), dx


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gelu_is_the_published_formula_to_rounding(paths, dtype):
    """Value and gradient, from where GELU is nothing to where it is x: one rounding, or two in the gradient; in wide dtypes beside x."""
    x = torch.linspace(-6, 8, 1003).to(dtype).requires_grad_()
    gradient = torch.linspace(-2, 2, 1003).to(dtype)
    value, slope = reference(x, gradient)
    y = gelu_tanh(x)
    (dx,) = torch.autograd.grad(y, x, gradient)
    assert y.dtype == dx.dtype == dtype and y.shape == x.shape
    allowed, least = ROUNDING[dtype], 1.0 if dtype.itemsize > 2 else 0.01
    assert ((y.double() - value).abs() <= allowed * (value.abs() + least)).all()
    assert ((dx.double() - slope).abs() <= 2.5 * allowed * (slope.abs() + least * gradient.double().abs())).all()


def test_gelu_far_from_zero(paths):
    """Nothing, or x itself, without an overflow."""
    x = torch.tensor([-1e6, -40.0, 0.0, 40.0, 1e6], requires_grad=True)
    y = gelu_tanh(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 0.0, 0.0, 40.0, 1e6] and x.grad.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_gelu_of_any_layout(in_chunks):
    """Transposed, cut, expanded, empty, with gradients as awkward; the answers are contiguous inputs' answers."""
    wide = torch.randn(6, 8, 10, dtype=torch.float64)
    for x in (wide.transpose(0, 2), wide[:, ::2, 1:7], wide[:1].expand(6, 8, 10), wide[:0]):
        x = x.detach().requires_grad_()
        gradient = torch.randn(x.shape[::-1], dtype=torch.float64).permute(2, 1, 0)
        y = gelu_tanh(x)
        (dx,) = torch.autograd.grad(y, x, gradient)
        value, slope = reference(x, gradient)
        torch.testing.assert_close(y.detach(), value)
        torch.testing.assert_close(dx, slope)
        assert torch.equal(gelu_tanh(x.detach()), y), "with and without a graph"


def test_gelu_differentiated_twice_forwards_and_through_functions(in_chunks):
    """What score matching and exact divergences do with it."""
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x)
    assert torch.autograd.gradcheck(gelu_tanh, x, check_forward_ad=True) and torch.autograd.gradgradcheck(gelu_tanh, x)

    def forward(function):
        return lambda x: torch.func.jvp(function, (x,), (v,))[1].square().sum()

    def twice(function):
        return lambda x: torch.autograd.grad(function(x).sum(), x, create_graph=True)[0].square().sum()

    for way in (forward, twice):
        (ours,) = torch.autograd.grad(way(gelu_tanh)(x), x)
        (theirs,) = torch.autograd.grad(way(formula)(x), x)
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.func.grad(lambda x: gelu_tanh(x).sum())(x.detach()), reference(x)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_are_bitwise_the_same(monkeypatch, dtype):
    """Activation checkpointing runs forward twice, once without a graph."""
    monkeypatch.setattr(kernels, "SMALL_INPUT", 0)
    x = torch.randn(2, 3, 8, 4, dtype=dtype)

    def part(x):
        return gelu_tanh(attend(x, 2 * x, x - 1))

    grads = []
    for run in (part, lambda x: checkpoint(part, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.float().square().sum().backward()
        grads.append((y.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def softmax_of_products(q, k, v, mask):
    """Attention as it is published, in float64, head by head."""
    out = []
    for i in range(q.shape[0]):
        heads = []
        for h in range(q.shape[1]):
            seen = slice(None) if mask is None else mask[i]
            weights = torch.softmax(q[i, h] @ k[i, h][seen].T / math.sqrt(q.shape[-1]), -1)
            heads.append(weights @ v[i, h][seen])
        out.append(torch.cat(heads, -1))
    return torch.stack(out)


def tokens(dtype, others=7):
    """Queries, keys and values as one map gives them, not contiguous; another number of keys than of queries, three heads of 20."""
    torch.manual_seed(0)
    q = torch.randn(2, 5, 3, 20).to(dtype).permute(0, 2, 1, 3)
    k, v = torch.randn(2, others, 2, 3, 20).to(dtype).permute(2, 0, 3, 1, 4)
    return [t.detach().requires_grad_() for t in (q, k, v)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_attention_is_softmax_of_products(monkeypatch, dtype, whole, masked):
    """Value and gradients to the dtype's rounding, on either path; keys that are masked get no gradient."""
    monkeypatch.setattr(kernels, "_materialises_scores", lambda q, k: whole)
    mask = torch.tensor([[True] * 4 + [False] * 3, [False] * 2 + [True] + [False] * 4]) if masked else None
    inputs = tokens(dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    y, expected = attend(*inputs, mask), softmax_of_products(*wide, mask)
    assert y.shape == (2, 5, 60) and y.dtype == dtype
    gradient = torch.randn(2, 5, 60).to(dtype)
    found = [y, *torch.autograd.grad(y, inputs, gradient)]
    known = [expected, *torch.autograd.grad(expected, wide, gradient.double())]
    for ours, theirs in zip(found, known, strict=True):
        assert (ours.double() - theirs).norm() <= 4 * ROUNDING[dtype] * theirs.norm()
    if masked:
        assert not found[2][0, :, 4:].any() and not found[3][1, :, 3:].any() and found[3][0, :, :4].all()


def test_attention_is_differentiable_twice_where_scores_are_whole(monkeypatch):
    monkeypatch.setattr(kernels, "_materialises_scores", lambda q, k: True)
    mask = torch.tensor([[True, True, False], [False, False, True]])
    inputs = [torch.randn(2, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3)]
    assert torch.autograd.gradgradcheck(lambda q, k, v: attend(q, k, v, mask), inputs)


def test_the_path_is_a_function_of_device_dtype_and_sizes(monkeypatch):
    q, k, _ = tokens(torch.bfloat16)
    monkeypatch.setattr(kernels, "MAX_SCORES", 2 * 3 * 5 * 7)
    assert (
        kernels._materialises_scores(q, k)
        and not kernels._materialises_scores(q.float(), k.float())
        and not kernels._materialises_scores(q.half(), k.half())
    )
    assert not kernels._materialises_scores(q.to("meta"), k.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels._materialises_scores(q.float(), k.float())
    monkeypatch.setattr(kernels, "MAX_SCORES", 2 * 3 * 5 * 7 - 1)
    assert not kernels._materialises_scores(q, k)


def test_autocast_attends_in_its_dtype():
    """Float32 queries, as a norm may give them, beside bf16 values."""
    q, k, v = tokens(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(q.float(), k.float(), v), attend(q, k, v))


def test_a_graph_holds_gelu_as_a_formula():
    """Exported, and so compiled: plain operations, for a compiler to fuse, and no call of Python's."""

    class Part(torch.nn.Module):
        def forward(self, x):
            return gelu_tanh(x)

    x = torch.randn(300, 300)
    program = torch.export.export(Part(), (x,))
    assert {str(n.target) for n in program.graph.nodes if n.op == "call_function"} >= {"aten.sigmoid.default"}
    torch.testing.assert_close(program.module()(x), formula(x.double()).float())


SMALL = {"channels": 1, "resolution": 4, "patch_size": 2, "width": 16, "depth": 2, "heads": 2}


def test_networks_are_built_with_the_fast_form():
    """In place of each tanh-GELU and of nothing else; no weight has another name, and the output is the same to rounding."""
    text = {"text_width": 6, "pooled_width": 5}
    for kind, options, count in (("dit", {"num_classes": 3}, 2), ("mmdit", text, 3), ("cross_dit", text, 3)):
        network = registry.build(kind, **SMALL, **options, seed=0)
        assert sum(type(module) is TanhGELU for module in network.modules()) == count
        assert not [module for module in network.modules() if type(module) is torch.nn.GELU]
    pair = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Sequential(torch.nn.GELU("tanh")))
    assert use_fast_gelu(pair) is pair and [type(m) for m in pair.modules()][1::2] == [torch.nn.GELU, TanhGELU]


@torch.no_grad()
def test_the_fast_form_is_torchs_to_rounding(in_chunks):
    x = torch.linspace(-5, 5, 77)
    torch.testing.assert_close(TanhGELU("tanh")(x), torch.nn.GELU("tanh")(x), rtol=1e-6, atol=1e-6)
