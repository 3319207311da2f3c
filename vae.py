"""FLUX.1's image autoencoder, and the convolutional encoder and decoder that it shares with taming's VQ-GAN (vqgan.py).

Module and parameter names are those of the published weights (black-forest-labs/flux `autoencoder.py`,
CompVis/taming-transformers `diffusionmodules/model.py`), so both files load strictly. Images are in [-1, 1].
"""
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn


class UserError(Exception):
    """A mistake that the user can mend. Its one line says what, where and what to do; the commands exit with status 2."""


def read_weights(path, what, hint=""):
    """Read a safetensors file: (tensors by name, metadata). `what` and `hint` name it in the error if that fails."""
    if not os.path.isfile(path):
        raise UserError(f"{what} not found at {path}" + (f": {hint}" if hint else ""))
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what}: {path} is not a complete safetensors file ({error})") from None


def load_strictly(module, tensors, path, what):
    """Load `tensors` into `module` (built on any device, meta included) if every name and shape fits; else name the misfits."""
    expected = module.state_dict()
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected]
    shapes = [f"{key} {tuple(tensors[key].shape)} for {tuple(value.shape)}" for key, value in expected.items()
              if key in tensors and tensors[key].shape != value.shape]
    faults = [f"{name} {', '.join(keys[:2])}{f' and {len(keys) - 2} more' if len(keys) > 2 else ''}"
              for name, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes)) if keys]
    if faults:
        raise UserError(f"{what}: {path} does not fit: {'; '.join(faults)}")
    module.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    return module



class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, h*w, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


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


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level has it."""

    def __init__(self, in_channels, out_channels, blocks, attention):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(out_channels if i else in_channels, out_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H/f, W/f), f = 2 ** (len(ch_mult) - 1)."""

    def __init__(self, in_channels, ch, ch_mult, num_res_blocks, out_channels, attn_levels=()):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList(Level(i, o, num_res_blocks, level in attn_levels)
                                  for level, (i, o) in enumerate(zip([ch, *widths], widths)))
        for level, width in zip(self.down[:-1], widths):
            level.downsample = Downsample(width)
        self.mid = Middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, out_ch, h*f, w*f), f = 2 ** (len(ch_mult) - 1). Not clamped."""

    def __init__(self, out_ch, ch, ch_mult, num_res_blocks, z_channels, attn_levels=()):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(Level(i, o, num_res_blocks + 1, level in attn_levels)
                                for level, (i, o) in enumerate(zip(widths[1:] + widths[-1:], widths)))
        for level, width in zip(self.up[1:], widths[1:]):
            level.upsample = Upsample(width)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def read_layout(tensors):
    """What the Encoder's and Decoder's tensors say of their configuration, as keyword arguments; KeyError if they are not there."""
    ch, in_channels = tensors["encoder.conv_in.weight"].shape[:2]
    levels = [i for i in range(99) if f"encoder.down.{i}.block.0.conv1.weight" in tensors]
    return dict(ch=ch, in_channels=in_channels, out_ch=tensors["decoder.conv_out.weight"].shape[0],
                ch_mult=tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in levels),
                num_res_blocks=sum(f"encoder.down.0.block.{i}.conv1.weight" in tensors for i in range(99)),
                z_channels=tensors["decoder.conv_in.weight"].shape[1])


@dataclass
class AutoEncoderConfig:
    """FLUX.1's published autoencoder (`ae.safetensors`)."""
    ch: int = 128
    ch_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159


class AutoEncoder(nn.Module):
    """FLUX.1's VAE: images (B, 3, H, W) in [-1, 1] <-> latents (B, z_channels, H/8, W/8), scaled to about unit variance."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c.in_channels, c.ch, c.ch_mult, c.num_res_blocks, 2 * c.z_channels)
        self.decoder = Decoder(c.out_ch, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels)
        self.factor = 2 ** (len(c.ch_mult) - 1)

    def moments(self, x):
        """Mean and log-variance of the posterior q(z | x), before scaling: two (B, z_channels, H/8, W/8)."""
        return self.encoder(x).chunk(2, dim=1)

    def encode(self, x, sample=True):
        mean, logvar = self.moments(x)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) if sample else mean
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, z):
        return self.decoder(z / self.config.scale_factor + self.config.shift_factor)


def load_vae(path):
    """FLUX.1's autoencoder, or one of its layout at any size, from safetensors: float32, eval, frozen.

    The configuration is read off the tensors; `scale_factor` and `shift_factor` off the file's metadata, FLUX.1's by default.
    """
    tensors, metadata = read_weights(path, "VAE weights", "download ae.safetensors of FLUX.1 and name it with --vae")
    try:
        layout = read_layout(tensors)
        if any(key.startswith("quantize.") for key in tensors):
            raise UserError(f"VAE weights: {path} holds a VQ-GAN (it has quantize.*): name it with --vqgan, and FLUX.1's ae.safetensors with --vae")
        config = AutoEncoderConfig(**layout, **{k: float(metadata[k]) for k in ("scale_factor", "shift_factor") if k in metadata})
    except KeyError as error:
        raise UserError(f"VAE weights: {path} does not have the layout of FLUX.1's autoencoder: missing {error}; first key {min(tensors, default='none')}") from None
    with torch.device("meta"):
        vae = AutoEncoder(config)
    return load_strictly(vae, tensors, path, "VAE weights").eval().requires_grad_(False)
