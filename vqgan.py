"""taming-transformers' VQ-GAN: images <-> indices into a learned codebook (Esser et al. 2021).

Parameter names are those of the published models (vqgan_imagenet_f16_1024 and _16384). They are published as PyTorch Lightning
pickles; `python vqgan.py last.ckpt vqgan.safetensors` converts one without running any code that it may carry.
"""
import argparse
import os
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from vae import Decoder, Encoder, UserError, load_strictly, read_layout, read_weights


@dataclass
class VQGANConfig:
    """taming's f16 ImageNet model with 16384 codes."""
    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple = (16,)  # levels with attention, by their side at the nominal `resolution`
    resolution: int = 256
    z_channels: int = 256
    n_embed: int = 16384
    embed_dim: int = 256
    in_channels: int = 3
    out_ch: int = 3


class VectorQuantizer(nn.Module):
    """Nearest codebook entry, by Euclidean distance."""

    def __init__(self, n_embed, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z):
        """Pre-quantisation vectors (B, embed_dim, h, w) -> indices (B, h, w) of their nearest codes."""
        codes = self.embedding.weight
        z = z.permute(0, 2, 3, 1)  # (B, h, w, embed_dim)
        with torch.autocast(z.device.type, enabled=False):  # distances in bf16 would pick other codes
            distance = codes.float().square().sum(1) - 2 * z.float() @ codes.float().T  # |z|^2 is the same for every code
        return distance.argmin(-1)


class VQGAN(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> indices (B, H/f, W/f), f = 2 ** (len(ch_mult) - 1)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        attn_levels = [i for i in range(len(c.ch_mult)) if c.resolution // 2**i in c.attn_resolutions]
        self.encoder = Encoder(c.in_channels, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels, attn_levels)
        self.decoder = Decoder(c.out_ch, c.ch, c.ch_mult, c.num_res_blocks, c.z_channels, attn_levels)
        self.quantize = VectorQuantizer(c.n_embed, c.embed_dim)
        self.quant_conv = nn.Conv2d(c.z_channels, c.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        self.factor = 2 ** (len(c.ch_mult) - 1)

    def pre_quantize(self, x):
        """The encoder's vectors before quantisation, (B, embed_dim, H/f, W/f)."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x):
        return self.quantize(self.pre_quantize(x))

    def decode(self, indices):
        codes = F.embedding(indices, self.quantize.embedding.weight).permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(codes))


def load_vqgan(path):
    """taming's VQ-GAN at any size from safetensors: float32, eval, frozen. `loss.*` is dropped; the configuration is read off the tensors."""
    tensors, _ = read_weights(path, "VQ-GAN weights", "download taming's vqgan_imagenet_f16, convert it with "
                              "`python vqgan.py last.ckpt vqgan.safetensors`, and name it with --vqgan")
    tensors = {key: value for key, value in tensors.items() if not key.startswith("loss.")}
    try:
        layout = read_layout(tensors)
        n_embed, embed_dim = tensors["quantize.embedding.weight"].shape
    except KeyError as error:
        raise UserError(f"VQ-GAN weights: {path} does not have the layout of taming's VQ-GAN: missing {error}; "
                        f"first key {min(tensors, default='none')}") from None
    attention = tuple(256 // 2**i for i in range(len(layout["ch_mult"])) if f"encoder.down.{i}.attn.0.q.weight" in tensors)
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig(**layout, attn_resolutions=attention, resolution=256, n_embed=n_embed, embed_dim=embed_dim))
    return load_strictly(vqgan, tensors, path, "VQ-GAN weights").eval().requires_grad_(False)


def convert(source, target):
    """Rewrite a PyTorch Lightning checkpoint's state_dict (without `loss.*`) as safetensors; nothing in the pickle is executed."""
    # Lightning keys `callbacks` by this class; an inert namesake is all that the restricted unpickler may build.
    stub = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    try:
        with torch.serialization.safe_globals([stub]):
            checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        tensors = {key: value.contiguous() for key, value in checkpoint["state_dict"].items() if not key.startswith("loss.")}
    except FileNotFoundError:
        raise UserError(f"VQ-GAN checkpoint not found at {source}") from None
    except Exception as error:  # whatever a broken or malicious pickle raises
        raise UserError(f"VQ-GAN checkpoint {source} cannot be read safely: {str(error).splitlines()[0][:200]}") from None
    save_file(tensors, f"{target}.tmp")
    os.replace(f"{target}.tmp", target)
    print(f"{target}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert taming's VQ-GAN checkpoint to safetensors, safely.")
    parser.add_argument("source", metavar="IN.ckpt")
    parser.add_argument("target", metavar="OUT.safetensors")
    args = parser.parse_args()
    try:
        convert(args.source, args.target)
    except UserError as error:
        sys.exit(print(f"vqgan.py: {error}", file=sys.stderr) or 2)
