"""taming-transformers' VQ-GAN: images <-> indices into a learned codebook (Esser et al. 2021).

    python vqgan.py last.ckpt vqgan.safetensors

converts a published model (vqgan_imagenet_f16_1024 or _16384), which is a PyTorch Lightning pickle,
without running any code that it may carry. Parameter names are those of the published models.
"""
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genhancer import (
    Parser, UserError, find_model, load_strictly, read_pickle, read_weights, run_command,
    write_weights,
)
from vae import Decoder, Encoder


@dataclass
class VQGANConfig:
    """The defaults are taming's f16 model of ImageNet with 16384 codes."""

    ch: int = 128                      # channels of the first level
    ch_mult: tuple = (1, 1, 2, 2, 4)   # channels of each level, in multiples of ch
    num_res_blocks: int = 2
    attn_resolutions: tuple = (16,)    # levels with attention, by their side ...
    resolution: int = 256              # ... for images of this side
    z_channels: int = 256
    n_embed: int = 16384               # codes in the codebook
    embed_dim: int = 256               # length of a code
    in_channels: int = 3
    out_ch: int = 3


class VQGAN(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> indices (B, H/f, W/f), f = 16 for taming's."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        sides = [c.resolution // 2**i for i in range(len(c.ch_mult))]
        attn_levels = [i for i, side in enumerate(sides) if side in c.attn_resolutions]
        blocks = c.num_res_blocks
        self.encoder = Encoder(c.in_channels, c.ch, c.ch_mult, blocks, c.z_channels, attn_levels)
        self.decoder = Decoder(c.out_ch, c.ch, c.ch_mult, blocks, c.z_channels, attn_levels)
        self.quantize = VectorQuantizer(c.n_embed, c.embed_dim)
        self.quant_conv = nn.Conv2d(c.z_channels, c.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        self.factor = 2 ** (len(c.ch_mult) - 1)

    def pre_quantize(self, x):
        """The encoder's vectors before quantisation, (B, embed_dim, H/f, W/f)."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x):
        """The indices of images."""
        return self.quantize(self.pre_quantize(x))

    def decode(self, indices):
        """The images of indices; not clamped."""
        codes = F.embedding(indices, self.quantize.embedding.weight)  # (B, H/f, W/f, embed_dim)
        return self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))


class VectorQuantizer(nn.Module):
    """The nearest code by Euclidean distance."""

    def __init__(self, n_embed, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def forward(self, z):
        """Vectors before quantisation (B, embed_dim, h, w) -> indices of codes (B, h, w)."""
        with torch.autocast(z.device.type, enabled=False):  # distances in bf16 pick other codes
            codes = self.embedding.weight.float()                    # (K, embed_dim)
            z = z.float().permute(0, 2, 3, 1)                        # (B, h, w, embed_dim)
            # |z - code|^2 less |z|^2, which is the same for every code
            distance = codes.square().sum(1) - 2 * z @ codes.T       # (B, h, w, K)
        return distance.argmin(-1)


def load_vqgan(path):
    """The VQ-GAN of a safetensors file: float32, eval, frozen.

    It is taming's f16 model, with as many codes as the file holds, unless the metadata gives
    another configuration ("vqgan"). UserError if the file is missing or damaged, or does not fit.
    """
    convert = "convert it with `python vqgan.py last.ckpt vqgan.safetensors`"
    hint = f"download taming's vqgan_imagenet_f16, {convert}, and name it with --vqgan"
    tensors, about = read_weights(path, "VQ-GAN weights", hint)
    return build_vqgan(tensors, about.get("vqgan"), path, f"VQ-GAN weights ({hint})")


def build_vqgan(tensors, config, path, what):
    """A VQGAN with these values; without a config, taming's with as many codes as there are."""
    tensors = {name: tensors[name] for name in tensors if not name.startswith("loss.")}
    if config is None:
        codes = getattr(tensors.get("quantize.embedding.weight"), "shape", None)
        config = {"n_embed": codes[0]} if codes else {}
    with torch.device("meta"):
        vqgan = VQGAN(VQGANConfig(**config))
    vqgan.to_empty(device="cpu")
    return load_strictly(vqgan, tensors, path, what).eval().requires_grad_(False)


def convert(source, target):
    """Write the VQ-GAN of a PyTorch Lightning checkpoint, without `loss.*`, as safetensors.

    Nothing that the pickle may carry is run. Raises UserError for whatever load_vqgan would refuse.
    """
    what = "VQ-GAN checkpoint"
    codes = r"quantize\.embedding\.weight"
    state, _ = find_model(read_pickle(source, what), codes, source, what)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise UserError(f"{what}: {source} is both input and output: name another output")
    tensors = build_vqgan(state, None, source, what).state_dict()
    write_weights(target, tensors)
    parameters = sum(value.numel() for value in tensors.values())
    print(f"{os.fspath(target)!r}: {len(tensors)} tensors, {parameters:,} parameters")


def run(argv=None):
    parser = Parser(description="Convert taming's VQ-GAN checkpoint to safetensors, safely.")
    parser.add_argument("source", metavar="IN.ckpt")
    parser.add_argument("target", metavar="OUT.safetensors")
    args = parser.parse_args(argv)
    convert(args.source, args.target)


if __name__ == "__main__":
    run_command("vqgan.py", run)
