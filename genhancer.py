"""GenHancer (ICCV 2025): CLIP learns visual detail by reconstructing images from its [CLS] token.

    images (B, 3, H, W) in [0, 1]
      ├─ CLIP mean/std ─> visual tower ─> [CLS] (B, D) (+ local tokens) ─> projectors ─> condition
      └─ 2 * image - 1 ─> frozen autoencoder ─> what is to be reconstructed, x:
             Continuous: VAE latents (B, 16, H/8, W/8)    Discrete: VQ-GAN indices (B, H/16 * W/16)

    Continuous (rf; Fig. 3b, Eq. 3):        x_t = (1 - t) x + t eps; Flux predicts eps - x; MSE
    Discrete   (perceiver; Fig. 3c, Eq. 4): 50-90 % of the tokens are masked (Sec. 5.1); Perceiver
                                            predicts them; cross-entropy

Conventions: t = 0 is data and t = 1 is noise. A mask is True where a token is hidden and must be
predicted. [CLS] is the output of the visual tower: CLIP's class token after ln_post and
visual.proj (as in the official code), not normalised. SigLIP has no class token: its [CLS] is the
output of the attention pooling head (Sec. 5.4). Local tokens are taken before visual.proj.

The loss has no term for Eq. 5's penalty on the drift of the visual tower. By our reading, stage 1,
LoRA and the small learning rate of stage 2 take its place (Sec. 4.3, 5.1). The training loop
(Algorithms 1 and 2) is train_stage in train.py; the optimizer (App. B) is there, too.
"""
import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ------------------------------------------------------------------------------------- the method

class GenHancer(nn.Module):
    """What Continuous and Discrete have in common (Fig. 3a).

    visual: an open_clip visual tower. autoencoder: an AutoEncoder (vae.py) or a VQGAN (vqgan.py).
    denoiser: a Flux or a Perceiver. projector_widths: {projector: its output width}.
    local_ratio: share of the patch tokens that join [CLS] in the condition (Fig. 5); 0 in the
    paper's method.

    `forward` returns each image's loss and its noise level: its timestep t or its mask ratio.
    The condition is `context`, the tokens that the denoiser attends to, and for Flux also `vec`,
    the vector that modulates it (both are FLUX's names). Random numbers come from torch's default
    generators.
    """
    token_side = 1  # a token of the denoiser covers 1 x 1 cells of the autoencoder's output

    def __init__(self, visual, autoencoder, denoiser, projector_widths, local_ratio):
        super().__init__()
        self.visual = visual
        self.autoencoder = autoencoder
        self.denoiser = denoiser
        self.trains_clip = False

        side = image_side(visual)
        device = next(visual.parameters()).device
        with torch.no_grad():  # a forward pass reveals the widths of the features
            cls, patches = encode_with_patches(visual, torch.zeros(1, 3, side, side, device=device))
        self.projectors = nn.ModuleDict()
        for name, width in projector_widths.items():
            self.projectors[name] = Projector(cls.shape[-1], width)
        for name in ("mean", "std"):
            values = torch.tensor(visual.preprocess_cfg[name], device=device).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

        self.num_locals = round(local_ratio * patches.shape[1])
        if self.num_locals:
            self.projectors["local"] = Projector(patches.shape[-1], projector_widths["context"])
        elif local_ratio > 0:
            raise UserError(f"a local ratio of {local_ratio} selects none of the "
                            f"{patches.shape[1]} patch tokens: give a higher one, or 0")

    def set_stage(self, stage, lora=True, freeze_denoiser=False):
        """Choose what trains, once, in a new model; the autoencoder never does.

        stage 1:     projectors and denoiser; CLIP is frozen.
        stage 2:     LoRA on the visual tower (without `lora`, the whole tower, Fig. 8), projectors
                     and denoiser (these two are frozen with `freeze_denoiser`, Fig. 9).
        stage "e2e": as stage 2, from a fresh denoiser and projectors (Fig. 6).
        """
        if stage not in (1, 2, "e2e"):
            raise ValueError(f"unknown stage {stage!r}: choose 1, 2 or 'e2e'")
        self.requires_grad_(False)  # freeze everything, including CLIP; what trains follows
        frozen = stage == 2 and freeze_denoiser
        self.denoiser.requires_grad_(not frozen)
        self.projectors.requires_grad_(not frozen)
        self.trains_clip = stage != 1
        if self.trains_clip and lora:
            inject_lora(self.visual)
        elif self.trains_clip:
            self.visual.requires_grad_(True)
        return self.train()

    def train(self, mode=True):
        """Training mode for parts with trainable parameters, evaluation mode for the rest."""
        super().train(mode)
        for part in self.children():
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def encode_clip(self, images):
        """Images (B, 3, H, W) in [0, 1] -> [CLS] (B, D), not normalised; patch tokens or None."""
        x = (images - self.mean) / self.std
        with torch.set_grad_enabled(self.trains_clip and torch.is_grad_enabled()):
            if self.num_locals:
                return encode_with_patches(self.visual, x)
            return self.visual(x), None

    def choose_locals(self, patches):
        """Fig. 5: patch tokens (B, L, W) -> a random subset, projected, and their positions.

        Tokens (B, num_locals, context width) and positions (B, num_locals, 2): each patch's
        (row, column) on the denoiser's grid. Each call draws another subset. The paper does not say
        whether local tokens carry their positions; here they do.
        """
        order = torch.rand(patches.shape[:2], device=patches.device).argsort(dim=1)
        chosen = order[:, :self.num_locals]                               # (B, num_locals)
        index = chosen[..., None].expand(-1, -1, patches.shape[2])
        tokens = self.projectors["local"](patches.gather(1, index))
        grid = math.isqrt(patches.shape[1])  # patches along a side
        row_column = torch.stack([chosen // grid, chosen % grid], dim=-1)
        patch_pixels = image_side(self.visual) // grid
        token_pixels = self.autoencoder.factor * self.token_side
        # The centre of a patch, in units of the denoiser's tokens, whose centres are 0, 1, 2, ...
        position = (row_column + 0.5) * patch_pixels / token_pixels - 0.5
        return tokens, position


class Continuous(GenHancer):
    """Fig. 3b: rectified flow on VAE latents.

    [CLS] modulates all blocks (the paper) and is also the context token (the official code).
    """
    token_side = 2

    def __init__(
        self,
        visual,
        autoencoder,
        denoiser,
        distribution="logit-normal",
        scale=1.0,
        local_ratio=0.0,
    ):
        config = denoiser.config
        widths = {"context": config.context_in_dim, "vec": config.vec_in_dim}
        super().__init__(visual, autoencoder, denoiser, widths, local_ratio)
        self.distribution = distribution
        self.scale = scale

    def condition(self, images):
        """Images (B, 3, H, W) in [0, 1] -> the condition, as the denoiser's keyword arguments."""
        cls, patches = self.encode_clip(images)
        context = self.projectors["context"](cls)[:, None]                # (B, 1, context_in_dim)
        vec = self.projectors["vec"](cls)                                 # (B, vec_in_dim)
        if patches is None:
            return {"context": context, "vec": vec}
        tokens, position = self.choose_locals(patches)
        context = torch.cat([context, tokens], dim=1)                     # (B, 1 + num_locals, ...)
        context_ids = position.new_zeros(*context.shape[:2], 3)           # [CLS] stays at zero
        context_ids[:, 1:, 1:] = position                                 # (0, row, column)
        return {"context": context, "vec": vec, "context_ids": context_ids}

    def forward(self, images, condition_images=None):
        """Images (B, 3, H, W) in [0, 1] -> each image's loss (B,) and timestep (B,).

        condition_images: as a control, other images that supply the condition.
        """
        condition = self.condition(images if condition_images is None else condition_images)
        latents = self.autoencoder.encode(2 * images - 1)                 # (B, 16, H/8, W/8)
        t = sample_timesteps(len(images), self.scale, self.distribution, device=images.device)
        noise = torch.randn_like(latents)
        losses = rectified_flow_loss(self.denoiser, latents, t=t, noise=noise, **condition)  # Eq. 3
        return losses, t

    @torch.no_grad()
    def reconstruct(self, images, steps=20):
        """Reconstruct square images (B, 3, H, W) in [0, 1] from their condition alone.

        Euler's method follows the predicted velocity from noise to data.
        """
        mode = self.training
        self.eval()
        condition = self.condition(images)
        channels = self.denoiser.config.in_channels // self.token_side**2
        side = images.shape[-1] // self.autoencoder.factor
        x = torch.randn(len(images), channels, side, side, device=images.device)
        times = torch.linspace(1, 0, steps + 1, device=images.device)
        for t, next_t in zip(times[:-1], times[1:], strict=True):
            velocity = self.denoiser(x, t.expand(len(x)), **condition).float()
            x = x + (next_t - t) * velocity  # Sec. 3: dx/dt = v, from t = 1 (noise) to t = 0 (data)
        self.train(mode)
        return to_unit_range(self.autoencoder.decode(x))


class Discrete(GenHancer):
    """Fig. 3c: prediction of masked VQ-GAN tokens; Perceiver says what the paper leaves open."""

    def __init__(self, visual, autoencoder, denoiser, mask_ratio=(0.5, 0.9), local_ratio=0.0):
        widths = {"context": denoiser.config.width}
        super().__init__(visual, autoencoder, denoiser, widths, local_ratio)
        self.mask_ratio = mask_ratio

    def condition(self, images):
        """Images (B, 3, H, W) in [0, 1] -> the condition, (B, 1 + num_locals, width)."""
        cls, patches = self.encode_clip(images)
        context = self.projectors["context"](cls)[:, None]                # (B, 1, width)
        if patches is None:
            return context
        tokens, position = self.choose_locals(patches)
        tokens = tokens + sincos_embedding(position, tokens.shape[-1])
        return torch.cat([context, tokens], dim=1)

    def forward(self, images, condition_images=None):
        """Images (B, 3, H, W) in [0, 1] -> each image's loss (B,) and mask ratio (B,).

        condition_images: as a control, other images that supply the condition.
        """
        context = self.condition(images if condition_images is None else condition_images)
        indices = self.autoencoder.encode(2 * images - 1).flatten(1)      # (B, N)
        low, high = self.mask_ratio
        mask = sample_masks(*indices.shape, low, high, images.device)     # (B, N)
        logits = self.denoiser(indices, mask, context)                    # (B, N, K)
        losses = masked_token_loss(logits, indices, mask)                 # Eq. 4
        return losses, mask.float().mean(1)

    @torch.no_grad()
    def reconstruct(self, images, steps=20, mask_ratio=1.0):
        """Reconstruct images (B, 3, H, W) in [0, 1] from their condition and unmasked tokens.

        By default all tokens are masked, which is more than in training.
        """
        mode = self.training
        self.eval()
        context = self.condition(images)
        indices = self.autoencoder.encode(2 * images - 1)                 # (B, h, w)
        count = indices[0].numel()
        mask = sample_masks(len(images), count, mask_ratio, mask_ratio, device=images.device)
        filled = self.fill_in(indices.flatten(1), mask, context, steps)
        self.train(mode)
        return to_unit_range(self.autoencoder.decode(filled.view_as(indices)))

    def fill_in(self, indices, mask, context, steps, temperature=4.5):
        """Indices (B, N) with the masked ones predicted: MaskGIT's decoding (Chang et al. 2022).

        Each step samples all masked tokens and keeps the most confident, with Gumbel noise on the
        confidence and a cosine schedule. A single step takes the argmax. The mask must hide the
        same number of tokens in every image.
        """
        start = remaining = int(mask[0].sum())
        for step in range(1, steps + 1):
            logits = self.denoiser(indices, mask, context).float()
            if steps > 1:
                choice = torch.distributions.Categorical(logits=logits).sample()
            else:
                choice = logits.argmax(-1)
            indices = torch.where(mask, choice, indices)

            still_masked = int(start * math.cos(math.pi / 2 * step / steps))
            confidence = logits.log_softmax(-1).gather(2, choice[..., None])[..., 0]
            uniform = torch.rand_like(confidence).clamp_min(1e-9)
            gumbel = -torch.log(-torch.log(uniform))
            confidence = confidence + temperature * (1 - step / steps) * gumbel  # annealed to 0
            scores = confidence.masked_fill(~mask, -torch.inf)
            accepted = scores.topk(remaining - still_masked).indices
            mask = mask.scatter(1, accepted, False)
            remaining = still_masked
        return indices


def encode_with_patches(visual, x):
    """[CLS] (B, D) and the last layer's patch tokens (B, L, W), after the tower's final norm."""
    features = visual.forward_intermediates(
        x, indices=1, normalize_intermediates=True, output_fmt="NLC")     # 1: the last layer only
    return features["image_features"], features["image_intermediates"][-1]


def image_side(visual):
    """The side of the square images that a visual tower takes, in pixels."""
    side = visual.preprocess_cfg["size"]
    return side if isinstance(side, int) else side[0]


def to_unit_range(images):
    """The autoencoders' range [-1, 1] -> [0, 1]."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------- the equations

def sample_timesteps(n, scale=1.0, distribution="logit-normal", device=None):
    """n timesteps in (0, 1), float32: "logit-normal" (Eq. 6, 7) or "uniform" (Table 4).

    A smaller scale concentrates the logit-normal around 0.5. ValueError for other distributions.
    """
    if distribution == "logit-normal":
        eps = torch.randn(n, device=device)
        t = torch.sigmoid(scale * eps)                            # Eq. 6, 7: t = sigmoid(s * eps)
    elif distribution == "uniform":
        t = torch.rand(n, device=device)
    else:
        raise ValueError(f"unknown distribution {distribution!r}: choose logit-normal or uniform")
    return t.clamp(1e-7, 1 - 1e-7)  # open at both ends: at s = 10, 5 % of draws would round to 1


def rectified_flow_loss(denoiser, latents, context, vec, t, noise, context_ids=None):
    """Eq. 3: the mean squared error of each image's predicted velocity, (B,).

    latents and noise (B, C, h, w), t (B,); context, vec and context_ids as Flux.forward takes them.
    """
    time = t.view(-1, 1, 1, 1)
    noisy = (1 - time) * latents + time * noise                  # Eq. 1, 3: x_t = (1 - t) x + t eps
    target = noise - latents                                     # Eq. 3: v = eps - x
    velocity = denoiser(noisy, t, context, vec, context_ids=context_ids)
    error = (velocity.float() - target).square()
    return error.flatten(1).mean(1)


def sample_masks(b, n, low, high, device=None):
    """Masks (b, n), bool: exactly max(1, round(ratio * n)) of an image's n tokens are masked; its
    ratio is uniform in [low, high]."""
    ratio = low + (high - low) * torch.rand(b, 1, device=device)
    count = (ratio * n).round().clamp(min=1)
    place = torch.rand(b, n, device=device).argsort(dim=1)  # a permutation
    return place < count


def masked_token_loss(logits, indices, mask):
    """Eq. 4, Eq. 2 for masked instead of next tokens: - log p(s_i | unmasked, condition), (B,).

    Each image's mean over its masked tokens, so that all images have the same weight.
    logits (B, N, K), indices (B, N), mask (B, N) bool.
    """
    losses = F.cross_entropy(logits.float().mT, indices, reduction="none")    # (B, N)
    return (losses * mask).sum(1) / mask.sum(1)


# ------------------------------------------------------------------------------ projector and LoRA

class Projector(nn.Sequential):
    """CLIP's features (..., D) -> the denoiser's condition (..., out_features); official code."""

    def __init__(self, in_features, out_features):
        super().__init__(
            nn.LayerNorm(in_features),
            nn.Linear(in_features, out_features),
            nn.GELU(),
            nn.Linear(out_features, out_features),
        )


def inject_lora(visual, rank=16, alpha=16, dropout=0.1):
    """Freeze a visual tower and add LoRA to all of its linear weights (settings: App. B).

    As in the official code, these are q, k, v, out and both MLP layers of every block, visual.proj,
    and the MLP of SigLIP's pooling head; adapting that head's attention as well is our choice.
    Returns the number of adapted matrices. Raises ValueError if there are none, or LoRA already.
    """
    if any(isinstance(module, LoRALinear) for module in visual.modules()):
        raise ValueError("the tower has LoRA already")
    visual.requires_grad_(False)
    count = 0
    for parent in list(visual.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, LoRAAttention(child, rank, alpha, dropout))
                count += 4
            elif type(child) is nn.Linear:  # not a subclass, as MultiheadAttention's out_proj is
                parts = {"qkv": 3, "kv": 2}.get(name, 1)  # timm packs these
                setattr(parent, name, LoRALinear(child, rank, alpha, dropout, parts))
                count += parts
    if isinstance(getattr(visual, "proj", None), nn.Parameter):
        proj = visual.proj
        del visual.proj  # a Parameter gives way to a module
        visual.proj = LoRAProj(proj, rank, alpha, dropout)
        count += 1
    if count == 0:
        raise ValueError(f"no linear layer to adapt in {type(visual).__name__}")
    visual.train(visual.training)  # the new modules are created in training mode
    return count


def merge_lora(visual):
    """Merge LoRA into the weights that it adapts and restore the original modules.

    The types of the modules and the keys of the state dict are then as before inject_lora.
    """
    for name, child in list(visual.named_children()):
        if isinstance(child, LoRAProj):  # which is a LoRALinear: merged below
            delattr(visual, name)  # a module gives way to a Parameter
        if isinstance(child, (LoRAAttention, LoRALinear)):
            setattr(visual, name, child.merge())
        else:
            merge_lora(child)
    return visual


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A dropout(x), with B = 0 at the start (Hu et al. 2022).

    A layer that packs several matrices, such as q, k and v, has an adapter for each.
    """

    def __init__(self, base, rank, alpha, dropout, parts=1):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.parts = parts
        self.dropout = nn.Dropout(dropout)
        device = base.weight.device
        out_features = base.out_features // parts
        self.lora_A = nn.Parameter(torch.empty(parts * rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(parts, out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = self.scale * F.linear(self.dropout(x), self.lora_A)         # (..., parts * rank)
        if self.parts == 1:
            return self.base(x) + F.linear(low, self.lora_B[0])
        pairs = zip(low.chunk(self.parts, dim=-1), self.lora_B, strict=True)
        deltas = [F.linear(a, b) for a, b in pairs]                       # parts times (..., out)
        return self.base(x) + torch.cat(deltas, dim=-1)

    @torch.no_grad()
    def merge(self):
        """The base layer, with the adapters added to its weight."""
        a = self.lora_A.unflatten(0, (self.parts, -1))                    # (parts, rank, in)
        delta = torch.bmm(self.lora_B, a).flatten(0, 1)                 # (parts * out, in)
        self.base.weight += self.scale * delta
        return self.base


class LoRAAttention(nn.Module):
    """nn.MultiheadAttention (self-attention, batch first) with LoRA on q, k, v and out.

    nn.MultiheadAttention reads the weights of its layers without calling them, so that a wrapper
    around out_proj would never run: this module replaces it. open_clip calls it with x as query,
    key and value; key, value and need_weights are ignored, and no attention weights are returned.
    """

    def __init__(self, attn, rank, alpha, dropout):
        super().__init__()
        self.original = [attn]  # in a list so that its parameters are not registered twice
        qkv = nn.Linear(attn.embed_dim, 3 * attn.embed_dim, device="meta")  # allocates nothing
        qkv.weight = attn.in_proj_weight
        qkv.bias = attn.in_proj_bias
        self.qkv = LoRALinear(qkv, rank, alpha, dropout, parts=3)
        self.out = LoRALinear(attn.out_proj, rank, alpha, dropout)

    def forward(self, x, key=None, value=None, need_weights=False, attn_mask=None):
        q, k, v = split_heads(self.qkv(x), self.original[0].num_heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)  # (B, heads, L, D)
        return self.out(x.transpose(1, 2).flatten(2)), None

    def merge(self):
        """The original module, with the adapters added to its weights."""
        self.qkv.merge()  # in place: the weights are those of the original module
        self.out.merge()
        return self.original[0]


class LoRAProj(LoRALinear):
    """LoRA on visual.proj, a bare Parameter that open_clip uses as `pooled @ visual.proj`."""

    def __init__(self, proj, rank, alpha, dropout):
        base = nn.Linear(*proj.shape, bias=False, device="meta")
        base.weight = nn.Parameter(proj.detach().T, requires_grad=False)
        super().__init__(base, rank, alpha, dropout)

    def __rmatmul__(self, pooled):
        """`pooled @ self`, as open_clip writes it: a tensor defers to this method."""
        return self(pooled)

    def merge(self):
        """The Parameter, with the adapter added."""
        return nn.Parameter(super().merge().weight.T.contiguous(), requires_grad=False)


# ------------------------------------------------------------------ the continuous denoiser (FLUX)

@dataclass
class FluxConfig:
    """FLUX.1-dev's fields. The paper has 2 + 4 blocks (Sec. 5.1), FLUX.1-dev 19 + 38."""
    in_channels: int = 64           # 16 latent channels x 2 x 2 of a patch
    vec_in_dim: int = 768           # the projected [CLS] that modulates
    context_in_dim: int = 4096      # the context tokens: the projected [CLS], and any local ones
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 2                  # MM-DiT ("double stream") blocks
    depth_single_blocks: int = 4    # Single-DiT ("single stream") blocks
    axes_dim: tuple = (16, 56, 56)  # rotary dimensions of a head for (unused, row, column)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True     # FLUX.1-dev's; the official code feeds it a constant 4.0


class Flux(nn.Module):
    """The continuous denoiser (Sec. 4.4, Fig. 3b); by default 1.31B parameters (Table 7).

    The parameters have the names of black-forest-labs/flux, `model.py`: flux1-dev.safetensors loads
    strictly at a depth of 19 + 38. Hence `img` for the tokens of the noisy latents and `txt` for
    the context tokens, which hold no text. As in the official code, all layers have
    PyTorch's default initialisation: the gates do not start at zero. Raises ValueError if axes_dim
    does not sum to the width of a head.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        head = config.hidden_size // config.num_heads
        if sum(config.axes_dim) != head:
            raise ValueError(f"axes_dim {config.axes_dim} must sum to the width of a head, {head}")
        hidden = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, hidden)
        self.time_in = MLPEmbedder(256, hidden)
        self.vector_in = MLPEmbedder(config.vec_in_dim, hidden)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, hidden)
        self.txt_in = nn.Linear(config.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        singles = (SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.single_blocks = nn.ModuleList(singles)
        self.final_layer = LastLayer(hidden, config.in_channels)
        self.grad_checkpointing = False

    def forward(self, latents, t, context, vec, guidance=4.0, context_ids=None):
        """The velocity (B, C, h, w) at noisy latents (B, C, h, w), h and w even.

        t (B,) in [0, 1]; context (B, L, context_in_dim); vec (B, vec_in_dim).
        context_ids (B, L, 3): rotary positions of the context tokens, (0, row, column) in units of
        patches; zeros by default.
        """
        rows, columns = latents.shape[2] // 2, latents.shape[3] // 2      # of patches
        n = context.shape[1]
        patch_ids = F.pad(grid_positions(rows, columns, latents.device), (1, 0))[None]
        if context_ids is None:
            context_ids = patch_ids.new_zeros(1, n, 3)
        patch_ids = patch_ids.expand(len(context_ids), -1, -1)            # (0, row, column)
        ids = torch.cat([context_ids, patch_ids], dim=1)                  # (B or 1, L + N, 3)
        rotary = rotary_table(ids, self.config.axes_dim, self.config.theta)
        img = self.img_in(patchify(latents))                              # (B, N, hidden)
        txt = self.txt_in(context)                                        # (B, L, hidden)
        embedding = self.embed_time(t, guidance) + self.vector_in(vec)    # (B, hidden)

        for block in self.double_blocks:
            img, txt = run_block(self, block, img, txt, embedding, rotary)
        x = torch.cat([txt, img], dim=1)                                  # (B, L + N, hidden)
        for block in self.single_blocks:
            x = run_block(self, block, x, embedding, rotary)
        return unpatchify(self.final_layer(x[:, n:], embedding), rows, columns)

    def embed_time(self, t, guidance):
        """t (B,) and the guidance -> (B, hidden), in float32: bf16 would round 1000 t."""
        with torch.autocast(t.device.type, enabled=False):
            x = self.time_in(timestep_embedding(t))
            if self.config.guidance_embed:
                x = x + self.guidance_in(timestep_embedding(torch.full_like(t, guidance)))
        return x


def patchify(latents):
    """(B, C, 2 rows, 2 columns) -> (B, rows * columns, 4 C)."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // 2, 2, w // 2, 2)
    patches = patches.permute(0, 2, 4, 1, 3, 5)          # (B, rows, columns, C, 2, 2)
    return patches.flatten(3).flatten(1, 2)


def unpatchify(tokens, rows, columns):
    """(B, rows * columns, 4 C) -> (B, C, 2 rows, 2 columns)."""
    b, _, c4 = tokens.shape
    patches = tokens.reshape(b, rows, columns, c4 // 4, 2, 2)
    patches = patches.permute(0, 3, 1, 4, 2, 5)          # (B, C, rows, 2, columns, 2)
    return patches.reshape(b, c4 // 4, 2 * rows, 2 * columns)


def timestep_embedding(t, dim=256, max_period=10_000):
    """Sinusoidal embedding of 1000 t, t (B,) in [0, 1]: (B, dim), float32."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    freqs = torch.exp(-math.log(max_period) * exponents)
    angles = 1000.0 * t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(ids, axes_dim, theta):
    """Positions (B, L, 3) -> cosines and sines of their rotary angles, each (B, 1, L, D/2)."""
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
        angles.append(ids[..., axis, None].double() / theta**exponents)
    angles = torch.cat(angles, dim=-1)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Rotary embedding of x (B, heads, L, D), on pairs of neighbouring features, in float32."""
    pairs = x.unflatten(-1, (-1, 2))                                      # (B, heads, L, D/2, 2)
    a, b = pairs.unbind(-1)
    rotated = [cos * a - sin * b, sin * a + cos * b]
    return torch.stack(rotated, dim=-1).flatten(-2)


def split_heads(qkv, heads):
    """(B, L, 3 * heads * D) -> q, k and v, each (B, heads, L, D)."""
    qkv = qkv.unflatten(-1, (3, heads, -1))                               # (B, L, 3, heads, D)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def attend(q, k, v, rotary):
    """Attention with rotary positions: q, k and v, each (B, heads, L, D) -> (B, L, heads * D)."""
    q = rotate(q, *rotary).to(v.dtype)
    k = rotate(k, *rotary).to(v.dtype)
    attn = F.scaled_dot_product_attention(q, k, v)                        # (B, heads, L, D)
    return attn.transpose(1, 2).flatten(2)


def modulate(x, shift, scale):
    """AdaLN: LayerNorm without affine parameters, then shift and scale (B, 1, hidden)."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale) + shift


class Modulation(nn.Module):
    """Embedding of t, guidance, [CLS] (B, hidden) -> n shifts, scales or gates (B, 1, hidden)."""

    def __init__(self, hidden, n):
        super().__init__()
        self.n = n
        self.lin = nn.Linear(hidden, n * hidden)

    def forward(self, embedding):
        parts = self.lin(F.silu(embedding))[:, None]                      # (B, 1, n * hidden)
        return parts.chunk(self.n, dim=-1)


class DoubleStreamBlock(nn.Module):
    """MM-DiT: image and context tokens have separate weights and joint attention."""

    def __init__(self, config):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.img_mod = Modulation(hidden, 6)
        self.img_attn = SelfAttention(hidden, heads, config.qkv_bias)
        self.img_mlp = mlp(hidden, config.mlp_ratio)
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn = SelfAttention(hidden, heads, config.qkv_bias)
        self.txt_mlp = mlp(hidden, config.mlp_ratio)

    def forward(self, img, txt, embedding, rotary):
        img_mod, txt_mod = self.img_mod(embedding), self.txt_mod(embedding)
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = img_mod
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_mod
        img_q, img_k, img_v = self.img_attn.qkv_heads(modulate(img, img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.qkv_heads(modulate(txt, txt_shift1, txt_scale1))

        q = torch.cat([txt_q, img_q], dim=2)                              # (B, heads, L + N, D)
        k = torch.cat([txt_k, img_k], dim=2)
        v = torch.cat([txt_v, img_v], dim=2)
        joint = attend(q, k, v, rotary)                                   # (B, L + N, hidden)
        txt_attn, img_attn = joint.split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_gate1 * self.img_attn.proj(img_attn)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attn)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Single-DiT: attention and MLP in parallel, over all tokens."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        mlp_width = int(hidden * config.mlp_ratio)
        self.heads = config.num_heads
        self.widths = [3 * hidden, mlp_width]
        self.linear1 = nn.Linear(hidden, sum(self.widths))
        self.linear2 = nn.Linear(hidden + mlp_width, hidden)
        self.norm = QKNorm(hidden // config.num_heads)
        self.modulation = Modulation(hidden, 3)

    def forward(self, x, embedding, rotary):
        shift, scale, gate = self.modulation(embedding)
        x_in = modulate(x, shift, scale)
        qkv, wide = self.linear1(x_in).split(self.widths, dim=-1)
        q, k, v = self.norm(*split_heads(qkv, self.heads))
        attn = attend(q, k, v, rotary)
        wide = F.gelu(wide, approximate="tanh")
        both = torch.cat([attn, wide], dim=-1)                            # (B, L + N, 5 hidden)
        return x + gate * self.linear2(both)


class LastLayer(nn.Module):
    """Modulated tokens (B, N, hidden) -> (B, N, out_channels)."""

    def __init__(self, hidden, out_channels):
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x, embedding):
        parts = self.adaLN_modulation(embedding)[:, None]                 # (B, 1, 2 hidden)
        shift, scale = parts.chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class SelfAttention(nn.Module):
    """The attention layers of one stream; DoubleStreamBlock computes the joint attention."""

    def __init__(self, hidden, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=qkv_bias)
        self.norm = QKNorm(hidden // heads)
        self.proj = nn.Linear(hidden, hidden)

    def qkv_heads(self, x):
        """(B, L, hidden) -> q, k and v, each (B, heads, L, D); q and k are normalised."""
        return self.norm(*split_heads(self.qkv(x), self.heads))


class QKNorm(nn.Module):
    """RMSNorm of queries and keys; the values are unchanged."""

    def __init__(self, dim):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q, k, v):
        return self.query_norm(q), self.key_norm(k), v


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in float32."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x = x.float()
        return F.rms_norm(x, x.shape[-1:], self.scale.float(), eps=1e-6)


class MLPEmbedder(nn.Module):
    """Embeds the timestep, the guidance or [CLS]: (B, in_dim) -> (B, hidden)."""

    def __init__(self, in_dim, hidden):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


def mlp(hidden, ratio, approximate="tanh"):
    """The MLP of a transformer block; FLUX's GELU is the tanh approximation."""
    wide = int(hidden * ratio)
    return nn.Sequential(
        nn.Linear(hidden, wide),
        nn.GELU(approximate),
        nn.Linear(wide, hidden),
    )


def run_block(model, block, *inputs):
    """block(*inputs), with gradient checkpointing if the model's grad_checkpointing is set."""
    if model.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# --------------------------------------------------- the discrete denoiser: Perceiver over VQ codes

@dataclass
class PerceiverConfig:
    """6 layers (Sec. 5.1); the paper gives no width, and we use ViT-L's, with its 16 heads."""
    n_embed: int = 16384   # entries of the codebook
    embed_dim: int = 256   # width of a codebook vector
    width: int = 1024
    num_heads: int = 16
    layers: int = 6
    mlp_ratio: float = 4.0


class Perceiver(nn.Module):
    """The discrete denoiser (Sec. 4.4, Fig. 3c): masked tokens from the unmasked ones and [CLS].

    In the paper the queries are "the unmasked tokens", and the keys and values are these and [CLS];
    there are no latent queries. The rest is our choice. Masked tokens stay in the sequence as one
    learned [MASK] vector, since a prediction needs a query at its position; so they are keys and
    values, too. A token enters as its frozen codebook vector, scaled to unit standard deviation,
    through a linear layer, plus a fixed 2-D sin-cos position. The layers are pre-norm.
    """

    def __init__(self, config, codebook):
        """codebook (n_embed, embed_dim): the VQ-GAN's, frozen, and not saved with the denoiser."""
        super().__init__()
        self.config = config
        codes = codebook.detach() / codebook.detach().std()  # codebooks differ in their scale
        self.register_buffer("codebook", codes, persistent=False)
        self.token_in = nn.Linear(config.embed_dim, config.width)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.n_embed)
        self.grad_checkpointing = False

    def forward(self, indices, mask, context):
        """Logits (B, N, K) over the K codes, at all positions.

        indices (B, N), N a square number; the masked ones have no influence. mask (B, N) bool.
        context (B, L, width).
        """
        codes = F.embedding(indices, self.codebook)                       # (B, N, embed_dim)
        x = self.token_in(codes)                                          # (B, N, width)
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        side = math.isqrt(indices.shape[1])
        x = x + sincos_embedding(grid_positions(side, side, x.device), self.config.width)
        for layer in self.layers:
            x = run_block(self, layer, x, context)
        return self.head(self.norm(x))


class PerceiverLayer(nn.Module):
    """Cross-attention from the token states to (token states, condition), then an MLP. Pre-norm."""

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.heads = config.num_heads
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.norm_mlp = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = mlp(width, config.mlp_ratio, approximate="none")  # the exact GELU

    def forward(self, x, context):
        q = self.q(self.norm_q(x))                                        # (B, N, width)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)             # (B, heads, N, D)
        both = torch.cat([x, context.to(x.dtype)], dim=1)                 # (B, N + L, width)
        kv = self.kv(self.norm_kv(both))                                  # (B, N + L, 2 width)
        kv = kv.unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)                        # (B, heads, N + L, D)
        attn = F.scaled_dot_product_attention(q, k, v)                    # (B, heads, N, D)
        x = x + self.proj(attn.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def sincos_embedding(position, dim):
    """Fixed 2-D sin-cos embedding of positions (..., 2), (row, column) in tokens: (..., dim)."""
    quarter = dim // 4
    exponents = torch.arange(quarter, dtype=torch.float32, device=position.device) / quarter
    angles = position[..., None].float() * 10_000.0**-exponents                # (..., 2, dim / 4)
    both = torch.cat([angles.sin(), angles.cos()], dim=-1)                     # (..., 2, dim / 2)
    return both.flatten(-2)


def grid_positions(rows, columns, device):
    """The (row, column) of each cell of a grid, row by row: (rows * columns, 2)."""
    return torch.cartesian_prod(
        torch.arange(rows, device=device), torch.arange(columns, device=device))


# ------------------------------------------------ shared by all programs: errors, files, commands

class UserError(Exception):
    """A mistake that the user can fix. Its message is one line: what, where, what to do."""


SEAL = "genhancer"  # the key of write_weights' entry in a file's metadata


def read_weights(path, what, hint=""):
    """Two dictionaries: the tensors of a safetensors file, and the `about` that write_weights
    stored with them ({} in the files of other programs).

    The tensors are memory-mapped. UserError with `what`, path and `hint` if the file is missing,
    incomplete, or does not match the checksum that write_weights stored.
    """
    advice = f": {hint}" if hint else ""
    if not os.path.isfile(path):
        raise UserError(f"{what} not found at '{path}' (not a file){advice}")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            about = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        message = f"{what}: {path} is not a complete safetensors file ({error}){advice}"
        raise UserError(message) from None
    if SEAL not in about:
        return tensors, {}
    try:
        seal = json.loads(about[SEAL])
        if seal["crc32"] == checksum(tensors, seal["about"]):
            return tensors, seal["about"]
    except (ValueError, KeyError, TypeError):  # the entry itself is damaged
        pass
    raise UserError(f"{what}: {path} is damaged (its checksum does not match){advice}")


# Harmless types that checkpoints hold beside the weights. Of NumPy's dtypes only those of numbers:
# an array of objects would read memory at addresses that the file names. The last is a key.
INERT = [argparse.Namespace, np.dtype, *[type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgFDG"]]
for core in ("core", "_core"):
    INERT.append((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar"))
INERT.append((object, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"))


def read_pickle(path, what):
    """A file of torch.save as one dictionary with dotted names, whatever its nesting.

    No code in the file is executed: torch's restricted unpickler creates tensors and INERT types.
    """
    if not os.path.isfile(path):
        raise UserError(f"{what} not found at '{path}' (not a file)")
    try:
        with torch.serialization.safe_globals(INERT), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript archives, which are refused
            content = torch.load(path, map_location="cpu", weights_only=True)
        values = flatten(content) if isinstance(content, dict) else {}
    except Exception as error:  # a broken or malicious pickle can raise anything
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {wanted[1]}" if wanted else type(error).__name__
        raise UserError(f"{what}: {path} cannot be read safely ({reason}), and nothing in it was "
                        "run: download it again, or save its state dict alone") from None
    if not values:
        raise UserError(f"{what}: {path} holds no state dict")
    return values


def flatten(content, prefix=""):
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    values = {}
    for key, value in content.items():
        if isinstance(value, dict):
            values |= flatten(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def find_model(values, pattern, path, what):
    """The values of the one model in a file, {name: value}, and the name that matches `pattern`.

    With the pattern "a", {"model.a": 1, "model.b": 2, "step": 3} gives {"a": 1, "b": 2} and "a".
    If no name ends in it: all values, and "". UserError if several do.
    """
    matches = [re.fullmatch(rf"((?:.*?\.)??)({pattern})", name) for name in values]
    found = [match for match in matches if match]
    if len(found) > 1:
        names = " and ".join(match[0] for match in found[:2])
        raise UserError(f"{what}: {path} holds several models ({names}): save one alone")
    prefix, name = found[0].group(1, 2) if found else ("", "")
    outside = [value for key, value in values.items() if not key.startswith(prefix)]
    elsewhere = sum(isinstance(value, torch.Tensor) for value in outside)
    if elsewhere:
        print(f"{what}: {path} holds the model under {prefix!r}; {elsewhere} other tensors are "
              "ignored", file=sys.stderr)
    inside = {key.removeprefix(prefix): values[key] for key in values if key.startswith(prefix)}
    return inside, name


def write_weights(path, tensors, about=None):
    """Write tensors as safetensors, with `about` (JSON) and a checksum of both in the metadata.

    The bytes of the file depend on the arguments alone.
    """
    about = about or {}
    seal = {"about": about, "crc32": checksum(tensors, about)}
    write_tensors(path, tensors, {SEAL: json.dumps(seal, sort_keys=True)})


def checksum(tensors, about=None):
    """CRC-32 of the tensors, of their names, dtypes and shapes, and of `about`."""
    crc = zlib.crc32(json.dumps(about or {}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def load_strictly(module, tensors, path, what):
    """Copy tensors by name into a module, or into a dictionary of tensors, and return it.

    All names and shapes must match, and all values must be finite: else UserError with `what`, the
    path, and the first tensor that does not match.
    """
    targets = module.state_dict() if isinstance(module, nn.Module) else module
    for name in sorted(targets.keys() | tensors.keys()):
        needed, found = describe(targets.get(name)), describe(tensors.get(name))
        if needed != found:
            raise UserError(f"{what}: {path} does not fit: {name} must be {needed}, not {found}")
    for name, target in targets.items():
        target.copy_(tensors[name])
        if not target.isfinite().all():
            raise UserError(f"{what}: {path} holds values in {name} that are not finite")
    return module


def describe(value):
    """What load_strictly compares: the shape, and the dtype if it is not floating-point."""
    if value is None:
        return "absent"
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        return "no ordinary tensor"
    kind = "" if value.is_floating_point() else f" of {value.dtype}"
    return f"{list(value.shape)}{kind}"


def check_writable(path):
    """Create the folder of a file, and raise UserError early if the file cannot be written."""
    folder = os.path.dirname(os.path.abspath(path))
    if path.endswith("/") or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"{path} cannot be written: name a file")
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.NamedTemporaryFile(prefix=os.path.basename(path), dir=folder).close()
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror}): name another file"
        raise UserError(message) from None


def write_file(path, write):
    """Write a file atomically, and create its folder: `write(part)` writes a file beside it, which
    is synced and moved into place. UserError if that fails; `path` then keeps its old content."""
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f".part-{name}")
    try:
        os.makedirs(folder, exist_ok=True)
        open(part, "wb").close()
        permissions = os.stat(part).st_mode  # the umask's; safetensors writes 0600
        write(part)
        with contextlib.suppress(OSError):  # bucket mounts and CIFS have no permissions
            os.chmod(part, permissions)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "free some space or fix the folder, then run the same command again"
        raise UserError(f"{path} could not be written ({reason}): {advice}") from None
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_text(path, text):
    write_file(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path, tensors, metadata):
    """Write tensors as safetensors. `metadata` has one entry at most: the order of several is
    random, and so would be the bytes of the file."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(path, lambda part: save_file(tensors, part, metadata))


def read_json(path, *keys):
    """The object in a JSON file, or in it the first object under one of `keys`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            content = next((content[key] for key in keys if content.get(key)), content)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({first_line(error)})") from None


def number(kind, low, high=sys.float_info.max):
    """An argparse type: a finite number of `kind` in [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = "number"  # for argparse's message
    return parse


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, and rejects empty values."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *words], words, strict=False):
            if not word or (word.startswith("--") and word.endswith("=")):
                self.error(f"argument {word[:-1] or before}: the value is empty")
        return super().parse_known_args(words, namespace)

    def error(self, message):
        raise UserError(f"{message} (--help lists all options)")


def run_command(program, run, argv=None):
    """The main function of every program: run(argv). A UserError is printed as one line, with exit
    status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that it cannot encode
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 (pip may install for an older one)
            raise UserError(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}")
        run(argv)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        message = escape(message_of(error))
        tqdm.write(f"{program}: {message}", file=sys.stderr)  # keeps progress bars intact
        sys.exit(2)


def message_of(error):
    """A UserError's message, without the traceback before it if a DataLoader's worker raised it."""
    return str(error).rpartition("UserError: ")[2].strip()


def first_line(error):
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:150]


def escape(text):
    """`text` with control and other non-printable characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def start_method():
    """How to start worker processes: a fork would copy the state of CUDA, which breaks it."""
    return "forkserver" if torch.cuda.is_available() else None
