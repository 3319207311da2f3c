"""FLUX.1's image autoencoder, and the encoder and decoder that it shares with taming's VQ-GAN.

Module and parameter names are those of the published weights (black-forest-labs/flux,
`autoencoder.py`, and CompVis/taming-transformers, `diffusionmodules/model.py`), so that both load
strictly. Images are (B, 3, H, W) in [-1, 1]; no decoder clamps what it returns.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genhancer import load_strictly, read_weights


@dataclass
class AutoEncoderConfig:
    """The defaults are FLUX.1's published autoencoder, `ae.safetensors`."""

    ch: int = 128                    # channels of the first level
    ch_mult: tuple = (1, 2, 4, 4)    # channels of each level, in multiples of ch
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    scale_factor: float = 0.3611     # these two bring the latents to about unit variance
    shift_factor: float = 0.1159


class AutoEncoder(nn.Module):
    """FLUX.1's VAE: images (B, 3, H, W) <-> latents (B, z_channels, H/f, W/f), f = 8 for FLUX.1."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c.in_channels, c.ch, c.ch_mult, c.num_res_blocks, 2 * c.z_channels)
        self.decoder = Decoder(c.out_ch, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels)
        self.factor = 2 ** (len(c.ch_mult) - 1)

    def moments(self, x):
        """Mean and log-variance of the posterior q(z | x), each of a latent's shape, unscaled."""
        return self.run(self.encoder, x).chunk(2, dim=1)

    def encode(self, x, sample=True):
        """The scaled latents of images: a sample of the posterior, or its mean if not `sample`."""
        mean, logvar = self.moments(x)
        z = mean
        if sample:
            z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, z):
        """The images of scaled latents."""
        z = z / self.config.scale_factor + self.config.shift_factor
        return self.run(self.decoder, z)

    def run(self, half, x):
        """The encoder or decoder in the precision of its weights, not autocast's; returns float32.

        Autocast would cast bf16 weights up and down again, layer by layer.
        """
        with torch.autocast(x.device.type, enabled=False):
            return half(x.to(half.conv_in.weight.dtype)).float()


def load_vae(path):
    """The autoencoder of a safetensors file: float32, eval, frozen.

    It is FLUX.1's, unless the file's metadata gives another configuration ("vae").
    UserError if the file is missing or damaged, or does not fit.
    """
    hint = "download ae.safetensors of FLUX.1 and name it with --vae"
    tensors, about = read_weights(path, "VAE weights", hint)
    with torch.device("meta"):
        vae = AutoEncoder(AutoEncoderConfig(**about.get("vae", {})))
    vae.to_empty(device="cpu")
    load_strictly(vae, tensors, path, f"VAE weights ({hint})")
    return vae.eval().requires_grad_(False)


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H/f, W/f), f = 2 ** (len(ch_mult) - 1)."""

    def __init__(self, in_channels, ch, ch_mult, num_res_blocks, out_channels, attn_levels=()):
        super().__init__()
        widths = [ch * multiple for multiple in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i > 0 else ch
            self.down.append(Level(before, width, num_res_blocks, i in attn_levels))
        for i, width in enumerate(widths[:-1]):
            self.down[i].downsample = Downsample(width)
        self.mid = Middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level.downsample(level(h))
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, out_ch, h*f, w*f), f = 2 ** (len(ch_mult) - 1)."""

    def __init__(self, out_ch, ch, ch_mult, num_res_blocks, z_channels, attn_levels=()):
        super().__init__()
        widths = [ch * multiple for multiple in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()  # from the images' resolution to the latents': used in reverse
        for i, width in enumerate(widths):
            before = widths[min(i + 1, len(widths) - 1)]
            self.up.append(Level(before, width, num_res_blocks + 1, i in attn_levels))
        for i, width in enumerate(widths[1:], start=1):
            self.up[i].upsample = Upsample(width)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z):
        h = self.conv_in(z)
        h = self.mid(h)
        for level in reversed(self.up):
            h = level.upsample(level(h))
        return self.conv_out(F.silu(self.norm_out(h)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, in_channels, out_channels, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(blocks):
            before = out_channels if i > 0 else in_channels
            self.block.append(ResnetBlock(before, out_channels))
        if attention:
            self.attn.extend(AttnBlock(out_channels) for _ in range(blocks))
        self.downsample = nn.Identity()  # an encoder and a decoder set theirs
        self.upsample = nn.Identity()

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)       # (B, 1, h*w, C)
        h = h[:, 0].mT.reshape(x.shape)                   # (B, C, h, w)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the published weights pad right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
