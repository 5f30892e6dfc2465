"""Small networks of diffusers' classes, called as its pipelines call them: what ours are held against."""

import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, UNet2DModel

from condot.core.text_states import TextStates

SD3 = {
    "sample_size": 12, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 3, "attention_head_dim": 12,
    "num_attention_heads": 4, "joint_attention_dim": 20, "caption_projection_dim": 48, "pooled_projection_dim": 14, "pos_embed_max_size": 9,
}  # fmt: skip
PIXART = {
    "sample_size": 12, "patch_size": 2, "in_channels": 3, "out_channels": 3, "num_layers": 3, "attention_head_dim": 12,
    "num_attention_heads": 4, "cross_attention_dim": 48, "caption_channels": 20,
}  # fmt: skip
PLAIN = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 32,
}  # fmt: skip
TEXTUAL = {
    **PLAIN, "cross_attention_dim": 20, "attention_head_dim": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SIZED = {
    **TEXTUAL, "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 14 + 6 * 256,
}  # fmt: skip
STOCK = {
    "sd3": (SD3Transformer2DModel, SD3),
    "sd3, qk-norm": (SD3Transformer2DModel, {**SD3, "qk_norm": "rms_norm"}),
    "sd3.5-medium": (SD3Transformer2DModel, {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}),
    "sd3, no grid": (SD3Transformer2DModel, {**SD3, "pos_embed_max_size": None}),
    "sd3, patch 1, one block": (SD3Transformer2DModel, {**SD3, "patch_size": 1, "num_layers": 1, "pos_embed_max_size": 16}),
    "pixart": (PixArtTransformer2DModel, PIXART),
    "pixart, learned variances": (PixArtTransformer2DModel, {**PIXART, "out_channels": 6}),
    "pixart, interpolated": (PixArtTransformer2DModel, {**PIXART, "interpolation_scale": 2, "patch_size": 4}),
    "unet": (UNet2DModel, {**PLAIN, "num_class_embeds": 6}),
    "unet, unconditional": (UNet2DModel, PLAIN),
    "unet, as ddpm": (UNet2DModel, {
        **PLAIN, "down_block_types": ("AttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6,
    }),
    "unet, no attention": (UNet2DModel, {
        **PLAIN, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    }),
    "unet, text": (UNet2DConditionModel, TEXTUAL),
    "unet, text and sizes": (UNet2DConditionModel, SIZED),
}  # fmt: skip


def shake(network, seed=0):
    """Every weight away from its beginning, so that every part shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def stock_network(name):
    torch.manual_seed(0)
    kind, config = STOCK[name]
    return shake(kind(**config))


def inputs(batch=4, side=8, rectangular=False, masked=True, labels=False, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, side, side // 2 if rectangular else side, generator=g)
    mask = torch.arange(6)[None] < torch.tensor([6, 3, 1, 5])[:batch, None] if masked else torch.ones(batch, 6, dtype=torch.bool)
    text = TextStates(torch.randn(batch, 6, 20, generator=g), mask, torch.randn(batch, 14, generator=g))
    sizes = torch.randint(0, 500, (batch, 6), generator=g).float()
    return x, torch.linspace(0, 1, batch), torch.tensor([0, 4, 5, 2])[:batch] if labels else text, sizes


def stock_output(stock, x, t, condition, sizes):
    """As a pipeline calls it: time 1000 (1 - t)."""
    time = 1000 * (1 - t)
    if isinstance(stock, SD3Transformer2DModel):
        return stock(x, condition.states, condition.pooled, time).sample
    if isinstance(stock, PixArtTransformer2DModel):
        return stock(x, condition.states, time, encoder_attention_mask=condition.mask).sample[:, :3]
    if isinstance(stock, UNet2DModel):
        return stock(x, time, class_labels=condition if stock.class_embedding is not None else None).sample
    more = {"text_embeds": condition.pooled, "time_ids": sizes} if stock.config.addition_embed_type else None
    return stock(x, time, condition.states, encoder_attention_mask=condition.mask, added_cond_kwargs=more).sample


def setting(stock, rectangular=False):
    """Inputs that the stock network takes: SD3 knows no mask, UNet2DModel no text."""
    side = 16 if stock.config.get("patch_size") == 4 else stock.config.sample_size
    masked = not isinstance(stock, SD3Transformer2DModel)
    return inputs(side=side, rectangular=rectangular, masked=masked, labels=isinstance(stock, UNet2DModel))
