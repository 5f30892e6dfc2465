"""A DiT in plain words, for tests: every option as its formula says it, and the original's forward pass by the original's names.

Nothing here calls condot's networks; attention is a loop over heads, rotation a product of complex numbers, patches are cut by index.
"""

import math

import torch


def sinusoids(values, last):
    """Cosines, then sines, 256 in all, float32 as published; the last frequency is 10000^-1 or one step short of that."""
    steps = torch.arange(128, dtype=torch.float32)
    angles = values.float()[:, None] * torch.exp(-math.log(10000) * steps / (127 if last else 128))
    return torch.cat([angles.cos(), angles.sin()], 1)


def grid(rows, columns):
    """Row and column of each token."""
    return [(r, c) for r in range(rows) for c in range(columns)]


def fixed_positions(width, rows, columns):
    def of(place):
        angles = [place / 10000 ** (i / (width // 4)) for i in range(width // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    return torch.tensor([of(c) + of(r) for r, c in grid(rows, columns)], dtype=torch.float64)


def turned(x, rows, columns, before):
    """(N, d): channels i and i + d / 2 as one complex number, turned by row for the first half of the numbers, by column for the others."""
    d = x.shape[1]
    turns = [[0.0] * (d // 2)] * before
    for place in grid(rows, columns):
        turns.append([p / 10000 ** (i / (d // 4)) for p in place for i in range(d // 4)])
    z = torch.complex(x[:, : d // 2], x[:, d // 2 :]) * torch.polar(torch.ones(len(x), d // 2).to(x), torch.tensor(turns).to(x))
    return torch.cat([z.real, z.imag], 1)


def rms(x, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def cut(image, p):
    """(C, H, W) to tokens, each channels, rows, columns."""
    _, h, w = image.shape
    return torch.stack([image[:, r * p : r * p + p, c * p : c * p + p].flatten() for r, c in grid(h // p, w // p)])


def paste(tokens, channels, rows, columns, p):
    """Tokens, each rows, columns, channels, to (C, H, W)."""
    image = torch.zeros(channels, rows * p, columns * p, dtype=tokens.dtype)
    for token, (r, c) in zip(tokens, grid(rows, columns), strict=True):
        image[:, r * p : r * p + p, c * p : c * p + p] = token.view(p, p, channels).permute(2, 0, 1)
    return image


def attention(x, linear, qkv, out, heads, prepare=lambda q, k: (q, k)):
    d = x.shape[1] // heads
    q, k, v = linear(x, qkv).split(x.shape[1], 1)
    results = []
    for i in range(heads):
        a, b = prepare(q[:, i * d : i * d + d], k[:, i * d : i * d + d])
        logits = torch.exp(a @ b.T / math.sqrt(d))
        results.append(logits / logits.sum(1, keepdim=True) @ v[:, i * d : i * d + d])
    return linear(torch.cat(results, 1), out)


def ours(state, image, t, label, sizes, *, heads, patch_size, depth, **options):
    """One sample, (C, H, W), through a DiT of ours given as a dictionary of tensors; options as DiT's."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def embed(x, name):
        return linear(silu(linear(x.to(state[f"{name}.enter.weight"]), f"{name}.enter")), f"{name}.leave")

    clock = options.get("clock", "diffusers")
    rows, columns = image.shape[1] // patch_size, image.shape[2] // patch_size
    ticks = sinusoids(t[None] if clock == "sit" else 1000 * (1 - t[None]), clock == "diffusers")[0]
    each = []
    for prefix in [f"conditions.{i}." for i in range(depth)] if options.get("own_conditions") else [""] * depth:
        condition = embed(ticks, f"{prefix}time") + state[f"{prefix}classes.weight"][label]
        if options.get("micro_conditions"):
            condition = condition + embed(sinusoids(sizes, False).flatten(), "sizes")
        each.append(silu(condition))
    x = linear(cut(image, patch_size), "enter")
    place = options.get("positions", "sincos")
    x = x + {"sincos": fixed_positions(x.shape[1], rows, columns), "learned": state.get("positions", x).reshape(-1, x.shape[1])}.get(
        place, 0
    )
    registers = state.get("registers", x[:0])
    x = torch.cat([registers, x])
    norm = rms if options.get("rms_norm") else layer_norm

    for i in range(depth):
        block = f"blocks.{i}"
        if options.get("shared_modulation"):
            m = linear(each[0], "shared_modulation").view(6, -1) + state[f"{block}.modulation.table"]
        else:
            m = linear(each[i], f"{block}.modulation").view(6, -1)

        def prepare(q, k, block=block):
            if options.get("qk_norm"):
                q, k = rms(q, state[f"{block}.attention.query_norm.weight"]), rms(k, state[f"{block}.attention.key_norm.weight"])
            if options.get("rope"):
                q, k = (turned(part, rows, columns, len(registers)) for part in (q, k))
            return q, k

        x = x + m[2] * attention(norm(x) * (1 + m[1]) + m[0], linear, f"{block}.attention.qkv", f"{block}.attention.out", heads, prepare)
        h = linear(norm(x) * (1 + m[4]) + m[3], f"{block}.feed_forward.enter")
        h = silu(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :] if options.get("swiglu") else gelu(h)
        x = x + m[5] * linear(h, f"{block}.feed_forward.leave")

    shift, scale = linear(each[0], "modulation").chunk(2)
    return paste(linear(norm(x[len(registers) :]) * (1 + scale) + shift, "leave"), len(image), rows, columns, patch_size)


def original(state, image, ticks, label, *, heads):
    """One sample through the original DiT, by its own names; `ticks` is what its time embedding takes; all its output channels."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    projection = state["x_embedder.proj.weight"]
    p = projection.shape[-1]
    rows, columns = image.shape[1] // p, image.shape[2] // p
    x = cut(image, p) @ projection.flatten(1).T + state["x_embedder.proj.bias"] + state["pos_embed"][0]
    time = sinusoids(ticks[None], False)[0].to(x)
    c = linear(silu(linear(time, "t_embedder.mlp.0")), "t_embedder.mlp.2") + state["y_embedder.embedding_table.weight"][label]
    for i in range(sum(name.endswith("attn.proj.bias") for name in state)):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(silu(c), f"blocks.{i}.adaLN_modulation.1").chunk(6)
        h = layer_norm(x) * (1 + scale_a) + shift_a
        x = x + gate_a * attention(h, linear, f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj", heads)
        h = layer_norm(x) * (1 + scale_m) + shift_m
        x = x + gate_m * linear(gelu(linear(h, f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
    shift, scale = linear(silu(c), "final_layer.adaLN_modulation.1").chunk(2)
    tokens = linear(layer_norm(x) * (1 + scale) + shift, "final_layer.linear")
    return paste(tokens, tokens.shape[1] // p**2, rows, columns, p)
