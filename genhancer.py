"""GenHancer (ICCV 2025): a CLIP vision tower learns visual detail by making its [CLS] embedding enough to reconstruct the image.

    images (B, 3, H, W) in [0, 1]
      |- CLIP mean/std -> visual tower -> [CLS] (B, D) (+ local tokens (B, L, W)) -> projectors -> condition
      '- 2x - 1 -> frozen tokenizer:    rf: VAE latent (B, 16, H/8, W/8)     perceiver: VQ-GAN indices (B, H/16 * W/16)
    rf:        x_t = (1 - t) x + t eps;  denoiser(x_t, t, condition) ~ eps - x;  loss = MSE              (Eq. 3)
    perceiver: mask 50-90 % of the tokens;  denoiser(tokens, mask, condition) -> logits;  cross-entropy  (Eq. 4)

Conventions: t = 0 is data, t = 1 is noise. A mask is True where the token is hidden and must be predicted. Eq. 5's penalty on how far
the visual tower may drift is no loss term: stage 1, LoRA and stage 2's small learning rate stand for it (GenHancer.set_stage).
"""
import json
import logging
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from vae import UserError, load_strictly

TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")


# ---------------------------------------------------------------------------------------------------------------- CLIP backbones

class Backbone(NamedTuple):
    model: str       # open_clip's model name; the -quickgelu ones, since the plain names silently build another activation
    pretrained: str  # open_clip's tag, which it downloads, or a file


BACKBONES = {  # the paper's six (Table 1), and the toy; adding one is adding a row
    "openai-l14-224":     Backbone("ViT-L-14-quickgelu",      "openai"),
    "openai-l14-336":     Backbone("ViT-L-14-336-quickgelu",  "openai"),
    "metaclip-l14-224":   Backbone("ViT-L-14-quickgelu",      "metaclip_fullcc"),
    "metaclip-h14-224":   Backbone("ViT-H-14-quickgelu",      "metaclip_fullcc"),
    "siglip-so400m-224":  Backbone("ViT-SO400M-14-SigLIP",     "webli"),
    "siglip-so400m-384":  Backbone("ViT-SO400M-14-SigLIP-384", "webli"),
    "toy":                Backbone("toy-clip", os.path.join(TOY, "clip.safetensors")),
}


def find_backbone(name, weights=None):
    """The Backbone that `name` (a row of BACKBONES, or open_clip's MODEL:TAG) stands for; UserError if there is none, or no such file."""
    if name == "toy" and "toy-clip" not in open_clip.list_models():
        open_clip.add_model_config(os.path.join(TOY, "toy-clip.json"))
    backbone = BACKBONES.get(name) or Backbone(*name.partition(":")[::2])
    if backbone.model not in open_clip.list_models():
        raise UserError(f"unknown backbone {name!r}: choose from {', '.join(BACKBONES)}, or name open_clip's MODEL:TAG")
    if weights == "random":
        return backbone
    if weights is not None or name == "toy":
        if not os.path.isfile(weights or backbone.pretrained):
            raise UserError(f"CLIP weights not found at {weights or backbone.pretrained}: name an open_clip safetensors or .pt file"
                            + (" (a folder in HuggingFace's format is not one)" if os.path.isdir(weights or "") else ""))
    elif not open_clip.is_pretrained_cfg(*backbone):
        raise UserError(f"open_clip has no weights {backbone.pretrained!r} for {backbone.model}: name a file with --clip-weights, "
                        f"or a tag of {', '.join(open_clip.list_pretrained_tags_by_model(backbone.model)) or 'none'}")
    return backbone


def load_clip(name, weights=None):
    """Load a CLIP: a row of BACKBONES or open_clip's MODEL:TAG; by its tag (open_clip downloads it), or from the file `weights`;
    `weights="random"` keeps the random initialisation (the bench preset, which says so).

    Returns (clip, preprocess, tokenizer): the open_clip model on the CPU, in float32, eval and frozen; the transform from a PIL
    image to its input; and the function from a list of strings to token ids. Mean, std and resizing are the tag's, with a local
    file too. Raises UserError for an unknown name and for a file that does not fit.
    """
    model, tag = find_backbone(name, weights)
    weights = tag if name == "toy" and weights is None else weights
    published = open_clip.get_pretrained_cfg(model, tag) or {}
    look = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in published}
    try:
        logging.disable(logging.WARNING)  # open_clip warns of random weights, which are loaded below
        clip = open_clip.create_model(model, pretrained=None if weights else tag, load_weights=not weights,
                                      pretrained_hf=False, force_preprocess_cfg=look)
    except Exception as error:  # open_clip, the hub and the network each raise their own
        raise UserError(f"CLIP {model} could not be had with open_clip's weights {tag!r} ({str(error).splitlines()[0][:150]}): "
                        "download them where there is a network and name the file with --clip-weights") from None
    finally:
        logging.disable(logging.NOTSET)
    if weights and weights != "random":
        try:
            tensors = open_clip.factory.load_state_dict(weights, weights_only=True)
        except Exception as error:  # safetensors, zip, pickle and TorchScript each raise their own
            raise UserError(f"CLIP weights: {weights} cannot be read as open_clip safetensors or .pt ({str(error).splitlines()[0][:150]})") from None
        load_strictly(clip, tensors, weights, f"CLIP weights for {model}")
    preprocess = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    try:
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # SigLIP's needs transformers and its files; training never calls it
        reason = f"the tokenizer of {model} needs `pip install transformers` and its files from the hub ({str(error).splitlines()[0][:100]})"

        def tokenizer(texts):
            raise UserError(reason)
    return clip.float().eval().requires_grad_(False), preprocess, tokenizer


def image_side(visual):
    """The side of the square images that a visual tower takes, in pixels."""
    side = visual.preprocess_cfg["size"]
    return side if isinstance(side, int) else side[0]


# -------------------------------------------------------------------------------------------------------------------------- LoRA

class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A dropout(x), with B = 0 at the start (Hu et al. 2021; paper, App. B: rank 16, alpha 16, dropout .1).

    A linear layer that packs n matrices (q, k and v) gets n independent adapters, as if it were n layers.
    """

    def __init__(self, base, rank=16, alpha=16, dropout=0.1, n=1):
        super().__init__()
        self.base, self.scale, self.n = base, alpha / rank, n
        self.dropout = nn.Dropout(dropout)
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(n * rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(n, base.out_features // n, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(self.dropout(x), self.lora_A)                                           # (..., n * rank)
        if self.n == 1:
            return self.base(x) + self.scale * F.linear(low, self.lora_B[0])
        low = low.unflatten(-1, (self.n, -1)).movedim(-2, 0).flatten(1, -2)                    # (n, tokens, rank)
        delta = torch.bmm(low, self.lora_B.mT).movedim(0, 1).reshape(*x.shape[:-1], -1)        # (..., n * out)
        return self.base(x) + self.scale * delta

    @torch.no_grad()
    def merge(self):
        """Add the adapters to the base's weight, in float32, and return the base."""
        low = self.lora_A.unflatten(0, (self.n, -1))                                           # (n, rank, in)
        self.base.weight += self.scale * torch.bmm(self.lora_B, low).flatten(0, 1)
        return self.base


class LoRAAttention(nn.Module):
    """nn.MultiheadAttention (self-attention, batch first) with LoRA on q, k, v and out.

    That module reads its layers' weights without calling them, so a wrapper around its out_proj would never run: this replaces it whole.
    """

    def __init__(self, attn, rank=16, alpha=16, dropout=0.1):
        super().__init__()
        self.original = [attn]  # in a list, so that its parameters are not registered twice
        qkv = nn.Linear(attn.embed_dim, 3 * attn.embed_dim, device="meta")
        qkv.weight, qkv.bias = attn.in_proj_weight, attn.in_proj_bias
        self.qkv = LoRALinear(qkv, rank, alpha, dropout, n=3)
        self.out = LoRALinear(attn.out_proj, rank, alpha, dropout)

    def forward(self, x, key=None, value=None, need_weights=False, attn_mask=None):
        q, k, v = split_heads(self.qkv(x), self.original[0].num_heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out(x.transpose(1, 2).flatten(2)), None

    def merge(self):
        attn, qkv = self.original[0], self.qkv.merge()
        attn.in_proj_weight, attn.in_proj_bias, attn.out_proj = qkv.weight, qkv.bias, self.out.merge()
        return attn


class LoRAProj(LoRALinear):
    """LoRA on `visual.proj`, a bare Parameter that open_clip uses as `pooled @ visual.proj`: this module takes part in that product."""

    def __init__(self, proj, rank=16, alpha=16, dropout=0.1):
        base = nn.Linear(*proj.shape, bias=False, device="meta")
        base.weight = nn.Parameter(proj.detach().T, requires_grad=False)
        super().__init__(base, rank, alpha, dropout)

    def __rmatmul__(self, pooled):
        return self(pooled)

    def merge(self):
        return nn.Parameter(super().merge().weight.T.contiguous(), requires_grad=False)


def inject_lora(visual, rank=16, alpha=16, dropout=0.1):
    """Freeze a visual tower and put LoRA on each of its linear weights: q, k, v, out and the MLP of every block, and visual.proj.

    Works on open_clip's VisionTransformer and TimmModel (SigLIP, its pooling head included). Returns the number of adapted
    matrices; raises ValueError if there is none. Afterwards only the A and B matrices require gradients.
    """
    visual.requires_grad_(False)
    count = 0
    for parent in list(visual.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, LoRAAttention(child, rank, alpha, dropout))
                count += 4
            elif type(child) is nn.Linear:  # not a subclass: nn.MultiheadAttention's out_proj is one
                n = {"qkv": 3, "kv": 2}.get(name, 1)  # timm packs them
                setattr(parent, name, LoRALinear(child, rank, alpha, dropout, n))
                count += n
    if isinstance(getattr(visual, "proj", None), nn.Parameter):
        proj = visual.proj
        del visual.proj
        visual.proj = LoRAProj(proj, rank, alpha, dropout)
        count += 1
    if not count:
        raise ValueError(f"no linear layer to adapt in {type(visual).__name__}")
    visual.train(visual.training)  # new modules start in training mode
    return count


def merge_lora(visual):
    """Fold LoRA into the weights it adapts, in float32, and put the original modules back: types and state-dict keys as before."""
    for name, child in list(visual.named_children()):
        if isinstance(child, LoRAProj):
            delattr(visual, name)  # a module gives way to a Parameter
        if isinstance(child, (LoRAAttention, LoRALinear)):
            setattr(visual, name, child.merge())
        else:
            merge_lora(child)
    return visual


# ---------------------------------------------------------------------------------------------- projector, timesteps, the rf loss

class Projector(nn.Sequential):
    """The bridge from CLIP's feature space to the denoiser's condition space: (..., D) -> (..., out)."""

    def __init__(self, in_features, out_features):
        super().__init__(nn.LayerNorm(in_features), nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


def sample_timesteps(n, scale=1.0, distribution="logit-normal", generator=None, device=None):
    """n timesteps in (0, 1), float32: scaled logit-normal (Eq. 6/7) or "uniform". A smaller scale gathers them around 0.5."""
    if distribution == "uniform":
        t = torch.rand(n, generator=generator, device=device)
    elif distribution == "logit-normal":
        t = torch.sigmoid(scale * torch.randn(n, generator=generator, device=device))  # Eq. 6/7: t = sigmoid(s * eps)
    else:
        raise ValueError(f"unknown timestep distribution {distribution!r}: logit-normal or uniform")
    return t.clamp(1e-7, 1 - 1e-7)  # in float32 sigmoid(10 eps) is often exactly 1


def rectified_flow_loss(denoiser, latents, context, vec, t, noise, context_ids=None, reduction="mean"):
    """Eq. 3: || v_theta(x_t, t, condition) - (eps - x) ||^2, averaged over a latent; over the batch too unless reduction is "none"."""
    time = t.view(-1, 1, 1, 1)
    noisy = (1 - time) * latents + time * noise                                # Eq. 1/3: x_t = (1 - t) x + t eps
    velocity = denoiser(noisy, t, context, vec, context_ids=context_ids)
    loss = (velocity.float() - (noise - latents)).square().flatten(1).mean(1)  # Eq. 3: target eps - x
    return loss if reduction == "none" else loss.mean()


# ------------------------------------------------------------------------------------------- the continuous denoiser: FLUX's layout

@dataclass
class FluxConfig:
    """FLUX.1-dev's fields; the paper keeps its width and takes 2 MM-DiT and 4 Single-DiT blocks of 19 and 38 (Sec. 5.1)."""
    in_channels: int = 64           # 16 latent channels x 2 x 2 patch
    vec_in_dim: int = 768           # the condition for modulation: the projected [CLS]
    context_in_dim: int = 4096      # the context tokens: the projected [CLS], and local tokens if any
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 2                  # MM-DiT ("double") blocks
    depth_single_blocks: int = 4    # Single-DiT blocks
    axes_dim: tuple = (16, 56, 56)  # rotary dimensions of a head for (unused, row, column)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True     # FLUX.1-dev's; the official code feeds a constant 4.0


def timestep_embedding(t, dim=256, max_period=10_000):
    """Sinusoidal embedding of t (B,) in [0, 1], times 1000: (B, dim), float32."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    args = 1000.0 * t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def rotary_table(ids, axes_dim, theta):
    """Positions (..., len(axes_dim)) -> the cosines and sines of their rotary angles, each (..., sum(axes_dim) / 2), float32."""
    angles = [ids[..., i, None].double() / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
              for i, dim in enumerate(axes_dim)]
    angles = torch.cat(angles, dim=-1)
    return angles.cos().float(), angles.sin().float()


@lru_cache(maxsize=16)
def image_rotary_table(context, height, width, axes_dim, theta, device):
    """The table of `context` tokens at position 0 and of an image's height x width patches, computed once per size."""
    row, col = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, col], dim=-1).flatten(0, 1)       # (N, 3)
    return rotary_table(torch.cat([ids.new_zeros(context, 3), ids]), axes_dim, theta)


def rotate(x, cos, sin):
    """Rotary position embedding on pairs of neighbouring features of x (B, heads, L, D), in float32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * a - sin * b, sin * a + cos * b], dim=-1).flatten(-2)


def attend(q, k, v, rotary):
    """Attention with rotary positions, each input (B, heads, L, D): (B, L, heads * D)."""
    x = F.scaled_dot_product_attention(rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype), v)
    return x.transpose(1, 2).flatten(2)


def split_heads(qkv, heads):
    """(B, L, 3 * heads * D) -> q, k, v, each (B, heads, L, D)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim, hidden):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(in_dim, hidden), nn.Linear(hidden, hidden)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.scale.float(), eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, q, k, v):
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The layers of one stream's attention; the attention itself joins both streams and is in DoubleStreamBlock."""

    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)


class Modulation(nn.Module):
    """AdaLN: the condition (B, hidden) -> n vectors (B, 1, hidden): shift, scale and gate for each residual branch."""

    def __init__(self, dim, n):
        super().__init__()
        self.n, self.lin = n, nn.Linear(dim, n * dim)

    def forward(self, vec):
        return self.lin(F.silu(vec))[:, None].chunk(self.n, dim=-1)


class DoubleStreamBlock(nn.Module):
    """MM-DiT: image and context tokens with weights of their own, joined in attention."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.num_heads
        for stream in ("img", "txt"):
            setattr(self, f"{stream}_mod", Modulation(c.hidden_size, 6))
            setattr(self, f"{stream}_attn", SelfAttention(c.hidden_size, c.num_heads, c.qkv_bias))
            setattr(self, f"{stream}_mlp", nn.Sequential(nn.Linear(c.hidden_size, int(c.hidden_size * c.mlp_ratio)), nn.GELU("tanh"),
                                                         nn.Linear(int(c.hidden_size * c.mlp_ratio), c.hidden_size)))

    def forward(self, img, txt, vec, rotary):
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        img_qkv = self.img_attn.norm(*split_heads(self.img_attn.qkv(modulate(img, img_shift1, img_scale1)), self.heads))
        txt_qkv = self.txt_attn.norm(*split_heads(self.txt_attn.qkv(modulate(txt, txt_shift1, txt_scale1)), self.heads))
        joint = attend(*(torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv)), rotary)   # (B, L + N, hidden)
        txt_attn, img_attn = joint.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + img_gate1 * self.img_attn.proj(img_attn)
        img = img + img_gate2 * self.img_mlp(modulate(img, img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_attn)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(txt, txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Single-DiT: attention and MLP side by side over all tokens."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.widths = c.num_heads, [3 * c.hidden_size, int(c.hidden_size * c.mlp_ratio)]
        self.linear1 = nn.Linear(c.hidden_size, sum(self.widths))
        self.linear2 = nn.Linear(c.hidden_size + self.widths[1], c.hidden_size)
        self.norm = QKNorm(c.hidden_size // c.num_heads)
        self.modulation = Modulation(c.hidden_size, 3)

    def forward(self, x, vec, rotary):
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(x, shift, scale)).split(self.widths, dim=-1)
        attn = attend(*self.norm(*split_heads(qkv, self.heads)), rotary)
        return x + gate * self.linear2(torch.cat([attn, F.gelu(mlp, approximate="tanh")], dim=-1))


class LastLayer(nn.Module):
    def __init__(self, hidden, out_channels):
        super().__init__()
        self.linear = nn.Linear(hidden, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class Flux(nn.Module):
    """The continuous denoiser (Sec. 4.4, Fig. 3b), with the parameter names of black-forest-labs/flux `model.py`: flux1-dev.safetensors
    loads strictly at depth 19 + 38. Default: 1,310,154,816 parameters (the paper's 1.31B)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if sum(c.axes_dim) != c.hidden_size // c.num_heads:
            raise ValueError(f"axes_dim {c.axes_dim} must sum to hidden_size / num_heads = {c.hidden_size // c.num_heads}")
        self.img_in = nn.Linear(c.in_channels, c.hidden_size)
        self.time_in = MLPEmbedder(256, c.hidden_size)
        self.vector_in = MLPEmbedder(c.vec_in_dim, c.hidden_size)
        if c.guidance_embed:
            self.guidance_in = MLPEmbedder(256, c.hidden_size)
        self.txt_in = nn.Linear(c.context_in_dim, c.hidden_size)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(c) for _ in range(c.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(c) for _ in range(c.depth_single_blocks))
        self.final_layer = LastLayer(c.hidden_size, c.in_channels)
        self.grad_checkpointing = False

    def forward(self, latents, t, context, vec, guidance=4.0, context_ids=None):
        """Velocity (B, C, h, w) at latents (B, C, h, w), t (B,), context (B, L, context_in_dim) and vec (B, vec_in_dim).

        context_ids (B, L, 3): rotary positions of the context tokens, (0, row, column) in patches; zeros by default.
        """
        b, c, h, w = latents.shape
        height, width, n = h // 2, w // 2, context.shape[1]
        img = latents.reshape(b, c, height, 2, width, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 4C)
        cos, sin = image_rotary_table(n, height, width, tuple(self.config.axes_dim), self.config.theta, latents.device)
        if context_ids is not None:
            own = rotary_table(context_ids, self.config.axes_dim, self.config.theta)                         # (B, L, D/2)
            cos, sin = (torch.cat([o, table[n:].expand(b, -1, -1)], dim=1)[:, None] for o, table in zip(own, (cos, sin)))

        img, txt = self.img_in(img), self.txt_in(context)
        with torch.autocast(latents.device.type, enabled=False):  # bf16 would move t by 0.9 of 1000
            cond = self.time_in(timestep_embedding(t))
            if self.config.guidance_embed:
                cond = cond + self.guidance_in(timestep_embedding(torch.full_like(t, guidance)))
        cond = cond + self.vector_in(vec)                                                                    # (B, hidden)
        for block in self.double_blocks:
            img, txt = run_block(self, block, img, txt, cond, (cos, sin))
        x = torch.cat([txt, img], dim=1)                                                                     # (B, L + N, hidden)
        for block in self.single_blocks:
            x = run_block(self, block, x, cond, (cos, sin))
        x = self.final_layer(x[:, n:], cond)                                                                 # (B, N, 4C)
        return x.reshape(b, height, width, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def run_block(model, block, *inputs):
    """block(*inputs), recomputed in the backward pass if the model's grad_checkpointing is set."""
    if model.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# ------------------------------------------------------------------------------------- the discrete denoiser: Perceiver over VQ codes

@dataclass
class PerceiverConfig:
    """The paper gives 6 layers (Sec. 5.1) and no width: 1024 with 16 heads is ours, CLIP ViT-L's."""
    n_embed: int = 16384   # codebook entries
    embed_dim: int = 256   # width of a codebook vector
    width: int = 1024
    num_heads: int = 16
    layers: int = 6
    mlp_ratio: float = 4.0


def sincos_position(ids, dim):
    """Fixed 2-D sin-cos embedding of positions (..., 2), (row, column) in tokens: (..., dim), half of it for each axis."""
    freqs = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float32, device=ids.device) / (dim // 4))
    angles = ids[..., None].float() * freqs                                    # (..., 2, dim / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


@lru_cache(maxsize=16)
def token_positions(n, dim, device):
    """The sin-cos positions of a square grid of n tokens, (n, dim), computed once per size."""
    side = math.isqrt(n)
    if side * side != n:
        raise ValueError(f"{n} tokens are no square grid")
    return sincos_position(torch.stack(torch.meshgrid(*2 * [torch.arange(side, device=device)], indexing="ij"), -1).flatten(0, 1), dim)


class PerceiverLayer(nn.Module):
    """Cross-attention from the token states to (token states, condition), then an MLP; pre-norm, residual."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.num_heads
        self.norm_q, self.norm_kv, self.norm_mlp = (nn.LayerNorm(c.width) for _ in range(3))
        self.q, self.kv, self.proj = nn.Linear(c.width, c.width), nn.Linear(c.width, 2 * c.width), nn.Linear(c.width, c.width)
        hidden = int(c.width * c.mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(c.width, hidden), nn.GELU(), nn.Linear(hidden, c.width))

    def forward(self, x, context):
        q = self.q(self.norm_q(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)                           # (B, heads, N, D)
        kv = self.kv(self.norm_kv(torch.cat([x, context.to(x.dtype)], dim=1)))
        k, v = kv.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)                        # (B, heads, N + L, D)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Perceiver(nn.Module):
    """The discrete denoiser (Sec. 4.4, Fig. 3c): predicts the masked VQ-GAN tokens from the unmasked ones and the condition.

    The paper's queries are "the unmasked tokens", its keys and values those and [CLS]. Where it is silent, we chose: masked positions
    stay in the sequence as one learned [MASK] vector, since a query is needed wherever a token is predicted; tokens enter as the
    VQ-GAN's frozen codebook vectors through a linear layer, with a fixed 2-D sin-cos position; width 1024; pre-norm.
    """

    def __init__(self, config, codebook):
        """codebook (n_embed, embed_dim): the VQ-GAN's, kept as it is and not saved with the denoiser."""
        super().__init__()
        c = self.config = config
        self.register_buffer("codebook", codebook.detach(), persistent=False)
        self.token_in = nn.Linear(c.embed_dim, c.width)
        self.mask_token = nn.Parameter(torch.zeros(c.width))
        self.layers = nn.ModuleList(PerceiverLayer(c) for _ in range(c.layers))
        self.norm, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, c.n_embed)
        self.grad_checkpointing = False

    def forward(self, indices, mask, context):
        """Logits (mask.sum(), n_embed) of the masked positions, in row-major order.

        indices (B, N), of which those under the mask are not read; mask (B, N) bool, True = predict, on the host or on the model's
        device; context (B, L, width).
        """
        where, mask = positions(mask, indices.device), mask.to(indices.device, non_blocking=True)
        x = self.token_in(F.embedding(indices.masked_fill(mask, 0), self.codebook))
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = x + token_positions(indices.shape[1], self.config.width, indices.device)
        for layer in self.layers:
            x = run_block(self, layer, x, context)
        return self.head(self.norm(x.flatten(0, 1).index_select(0, where)))  # never made for the unmasked: the codebook is wide


def sample_masks(b, n, low, high, generator=None, device=None):
    """b masks over n tokens, (b, n) bool: of each sample exactly round(ratio * n) tokens, at least one; ratio uniform in [low, high]."""
    ratio = low + (high - low) * torch.rand(b, 1, generator=generator, device=device)
    count = (ratio * n).round().clamp(min=1)
    order = torch.rand(b, n, generator=generator, device=device).argsort(dim=1).argsort(dim=1)
    return order < count


def positions(mask, device):
    """Where a mask is True: flat indices in row-major order, on `device`. Of a mask on the host this takes no synchronisation."""
    return mask.flatten().nonzero()[:, 0].to(device, non_blocking=True)


def masked_token_loss(logits, indices, mask, reduction="mean"):
    """Eq. 4: - log p(s_i | unmasked tokens, condition), averaged over each sample's masked tokens, then (unless "none") over samples.

    logits (mask.sum(), K), indices (B, N), mask (B, N). By sample first, so that accumulation and DDP equal one process.
    """
    where = positions(mask, logits.device)
    loss = F.cross_entropy(logits.float(), indices.flatten().index_select(0, where), reduction="none")
    loss = torch.zeros(mask.numel(), device=loss.device).scatter(0, where, loss).view(mask.shape).sum(1) / mask.sum(1).to(loss.device)
    return loss if reduction == "none" else loss.mean()


# --------------------------------------------------------------------------------------------------------------------- the method

class GenHancer(nn.Module):
    """The paper's Fig. 3a. `visual` is an open_clip visual tower, `tokenizer` a frozen AutoEncoder or VQGAN, `denoiser` a Flux or Perceiver.

    local_ratio: the share of patch tokens that joins [CLS] in the condition (Fig. 5). Random draws use torch's default generator.
    """

    def __init__(self, visual, tokenizer, denoiser, timesteps="logit-normal", scale=1.0, mask_ratio=(0.5, 0.9), local_ratio=0.0):
        super().__init__()
        self.visual, self.tokenizer, self.denoiser = visual, tokenizer, denoiser
        self.timesteps, self.scale, self.mask_ratio, self.local_ratio = timesteps, scale, mask_ratio, local_ratio
        self.rf = isinstance(denoiser, Flux)
        side, device = image_side(visual), next(visual.parameters()).device
        with torch.no_grad():  # widths are read off the model
            features = visual.forward_intermediates(torch.zeros(1, 3, side, side, device=device), **self.FEATURES)
        embed, (self.patches, width) = features["image_features"].shape[-1], features["image_intermediates"][-1].shape[1:]
        self.tokens_side = side // tokenizer.factor // (2 if self.rf else 1)  # the denoiser's tokens along a side
        self.locals = round(local_ratio * self.patches)
        context = denoiser.config.context_in_dim if self.rf else denoiser.config.width
        self.projectors = nn.ModuleDict({"context": Projector(embed, context)})
        if self.rf:
            self.projectors["vec"] = Projector(embed, denoiser.config.vec_in_dim)
        if self.locals:
            self.projectors["local"] = Projector(width, context)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(visual.preprocess_cfg[name], device=device).view(3, 1, 1), persistent=False)
        self.tune_clip = False

    FEATURES = dict(indices=1, normalize_intermediates=True, output_fmt="NLC")  # [CLS] and the last layer's patch tokens, normed

    def set_stage(self, stage, lora=True, freeze_denoiser=False):
        """Choose what trains. stage 1: projectors and denoiser, CLIP frozen. Stage 2: LoRA on the visual tower (or all of it, without
        `lora`), and, unless frozen, projectors and denoiser. "e2e": all of them from the start (Fig. 6). The tokenizer never trains."""
        self.requires_grad_(False)  # freezes CLIP
        for part in (self.denoiser, self.projectors):
            part.requires_grad_(not (stage == 2 and freeze_denoiser))
        self.tune_clip = stage != 1
        if self.tune_clip and lora:
            inject_lora(self.visual)
        elif self.tune_clip:
            self.visual.requires_grad_(True)
        return self.train()

    def train(self, mode=True):
        super().train(mode)
        self.tokenizer.eval()
        self.visual.train(mode and self.tune_clip)
        return self

    def condition(self, images):
        """Images (B, 3, H, W) in [0, 1] -> what the denoiser is given of them: context (B, 1 + locals, width), and for rf vec and context_ids."""
        x = (images - self.mean) / self.std
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tune_clip):
            if self.locals:
                features = self.visual.forward_intermediates(x, **self.FEATURES)
                cls, patches = features["image_features"], features["image_intermediates"][-1]
            else:
                cls = self.visual(x)                                           # (B, D), not normalised
        condition = {"context": self.projectors["context"](cls)[:, None]}      # (B, 1, width)
        if self.rf:
            condition["vec"] = self.projectors["vec"](cls)                     # (B, 768)
        if self.locals:  # Fig. 5: a random few patch tokens, each with the position of its patch on the denoiser's grid
            chosen = torch.rand(patches.shape[:2], device=x.device).argsort(dim=1)[:, :self.locals]
            local = self.projectors["local"](patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2])))
            grid = math.isqrt(self.patches)
            ids = (torch.stack([chosen // grid, chosen % grid], dim=-1) + 0.5) * self.tokens_side / grid - 0.5  # (B, locals, 2)
            if self.rf:
                condition["context_ids"] = F.pad(ids, (1, 0, 1, 0))            # (0, row, column); [CLS] first, at zero
            else:
                local = local + sincos_position(ids, local.shape[-1])
            condition["context"] = torch.cat([condition["context"], local], dim=1)
        return condition

    def forward(self, images, condition_images=None):
        """The loss of a batch of images (B, 3, H, W) in [0, 1]; see the figure at the top of this file.

        condition_images: other images to take the condition from, for controls. Leaves each sample's loss and its t (mask ratio for
        the perceiver) in `self.losses` and `self.levels`, (B,), detached.
        """
        condition = self.condition(images if condition_images is None else condition_images)
        with torch.no_grad():
            target = self.tokenizer.encode(2 * images - 1)
        if self.rf:
            latents = target.float()                                                      # (B, C, h, w)
            self.levels = sample_timesteps(len(images), self.scale, self.timesteps, device=images.device)
            losses = rectified_flow_loss(self.denoiser, latents, t=self.levels, noise=torch.randn_like(latents), reduction="none", **condition)
        else:
            indices = target.flatten(1)                                                   # (B, N)
            mask = sample_masks(*indices.shape, *self.mask_ratio)                         # on the host, which thereby knows how many
            self.levels = mask.float().mean(1).to(images.device, non_blocking=True)
            losses = masked_token_loss(self.denoiser(indices, mask, **condition), indices, mask, reduction="none")
        self.losses = losses.detach()
        return losses.mean()

    @torch.no_grad()
    def reconstruct(self, images, steps=20, mask_ratio=1.0):
        """Images (B, 3, H, W) in [0, 1] -> what the denoiser makes of their condition alone, likewise.

        rf: Euler steps from noise. perceiver: MaskGIT's iterative decoding from all tokens masked; or, with a smaller mask_ratio, the
        true tokens with that share of them filled in.
        """
        mode, device = self.training, images.device
        self.eval()
        condition = self.condition(images)
        if self.rf:
            size = images.shape[-1] // self.tokenizer.factor
            x = torch.randn(len(images), self.denoiser.config.in_channels // 4, size, size, device=device)
            times = torch.linspace(1, 0, steps + 1, device=device)
            for t, s in zip(times[:-1], times[1:]):  # dx/dt = v (Eq. 1), from t = 1, noise, to t = 0, data
                x = x + (s - t) * self.denoiser(x, t.expand(len(x)), **condition).float()
        else:
            x = self.tokenizer.encode(2 * images - 1)
            mask = sample_masks(len(x), x[0].numel(), mask_ratio, mask_ratio, device=device)
            x = self.fill_in(x.flatten(1), mask, condition["context"], steps).view_as(x)
        self.train(mode)
        return (self.tokenizer.decode(x).float() / 2 + 0.5).clamp(0, 1)

    def fill_in(self, indices, mask, context, steps, temperature=4.5):
        """MaskGIT's parallel decoding (Chang et al. 2022): sample all masked tokens, keep the surest, on a cosine schedule; in one step, argmax."""
        start = remaining = int(mask[0].sum())  # the same for each sample
        for step in range(steps):
            logits = self.denoiser(indices, mask, context).float()
            choice = torch.distributions.Categorical(logits=logits).sample() if steps > 1 else logits.argmax(-1)
            indices = indices.masked_scatter(mask, choice)
            sure = logits.log_softmax(-1).gather(1, choice[:, None])[:, 0]
            sure = sure - temperature * (1 - (step + 1) / steps) * torch.rand_like(sure).clamp_min(1e-9).log().neg().log()  # Gumbel noise
            after = int(start * math.cos(math.pi / 2 * (step + 1) / steps))
            keep = torch.full(mask.shape, -torch.inf, device=mask.device).masked_scatter(mask, sure).topk(remaining - after).indices
            mask, remaining = mask.scatter(1, keep, False), after
            if not remaining:
                return indices
        return indices


# -------------------------------------------------------------------------------------------------------------------------- export

HF_NAMES = [  # (open_clip's, HuggingFace's), applied in this order; the text tower first loses its prefix, if it has one
    ("visual.trunk.", "vision_model."), ("visual.proj", "visual_projection.weight"), ("visual.", "vision_model."),
    ("patch_embed.proj", "embeddings.patch_embedding"), ("pos_embed", "embeddings.position_embedding.weight"),
    ("conv1", "embeddings.patch_embedding"), ("class_embedding", "embeddings.class_embedding"),
    ("token_embedding", "embeddings.token_embedding"), ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm"), ("vision_model.norm.", "vision_model.post_layernorm."),
    ("transformer.resblocks.", "encoder.layers."), ("blocks.", "encoder.layers."),
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), (".norm1", ".layer_norm1"), (".norm2", ".layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("attn_pool.latent", "head.probe"), ("attn_pool.norm", "head.layernorm"),
    ("attn_pool.proj", "head.attention.out_proj"), ("attn_pool.mlp", "head.mlp"), ("attn.out_proj", "self_attn.out_proj"),
    ("attn.proj", "self_attn.out_proj"),
]


def hf_state_dict(clip):
    """The weights of an open_clip CLIP or SigLIP under the names and shapes of transformers' CLIPModel or SiglipModel."""
    siglip = isinstance(clip.visual, open_clip.timm_model.TimmModel)
    result, pool = {}, {}
    for key, value in clip.state_dict().items():
        if key.startswith(("logit_scale", "logit_bias")):
            result[key] = value.reshape(1) if siglip else value
            continue
        name = key if key.startswith("visual.") else "text_model." + key.removeprefix("text.")
        if name.startswith("text_model.text_projection"):
            name = name.replace("text_projection", "head") if siglip else "text_projection.weight"
        for ours, theirs in HF_NAMES:
            name = name.replace(ours, theirs)
        if "attn_pool.q." in name or "attn_pool.kv." in name:
            pool[key.rsplit(".", 2)[1], key.rsplit(".", 1)[1]] = value
        elif "in_proj" in name or "attn.qkv" in name:
            layer, kind = name.split("attn.")[0], "bias" if name.endswith("bias") else "weight"
            result |= {f"{layer}self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", value.chunk(3))}
        elif name in ("visual_projection.weight", "text_projection.weight"):
            result[name] = value.T
        else:
            result[name] = value[0] if key.endswith("trunk.pos_embed") else value
    for kind in ("weight", "bias") if pool else ():
        result[f"vision_model.head.attention.in_proj_{kind}"] = torch.cat([pool["q", kind], pool["kv", kind]])
    return {name: value.detach().cpu().contiguous() for name, value in result.items()}


def hf_config(clip, weights):
    """transformers' config.json for the same model, its numbers read off the modules."""
    siglip = isinstance(clip.visual, open_clip.timm_model.TimmModel)
    text = getattr(clip, "text", clip)
    blocks = {"vision": clip.visual.trunk.blocks if siglip else clip.visual.transformer.resblocks, "text": text.transformer.resblocks}
    config = {}
    for tower, (first, *_) in blocks.items():
        act = first.mlp.act if hasattr(first.mlp, "act") else first.mlp.gelu
        norm = first.norm1 if hasattr(first, "norm1") else first.ln_1
        fc1 = weights[f"{tower}_model.encoder.layers.0.mlp.fc1.weight"]
        config[tower] = dict(
            hidden_size=fc1.shape[1], intermediate_size=fc1.shape[0], num_hidden_layers=len(blocks[tower]),
            num_attention_heads=getattr(first.attn, "num_heads", None), layer_norm_eps=norm.eps, attention_dropout=0.0,
            hidden_act="quick_gelu" if type(act).__name__ == "QuickGELU" else "gelu_pytorch_tanh" if getattr(act, "approximate", "") == "tanh" else "gelu")
    patch = weights["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    config["vision"] |= dict(model_type=f"{'siglip' if siglip else 'clip'}_vision_model", image_size=image_side(clip.visual), patch_size=patch)
    vocabulary, positions = (len(weights[f"text_model.embeddings.{kind}_embedding.weight"]) for kind in ("token", "position"))
    config["text"] |= dict(model_type=f"{'siglip' if siglip else 'clip'}_text_model", vocab_size=vocabulary, max_position_embeddings=positions)
    top = dict(model_type="siglip" if siglip else "clip", architectures=["SiglipModel" if siglip else "CLIPModel"], torch_dtype="float32",
               vision_config=config["vision"], text_config=config["text"])
    if siglip:
        config["text"]["projection_size"] = len(weights["text_model.head.weight"])
    else:
        config["text"] |= dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)  # the wrong eos would pool another position
        for part in (top, config["vision"], config["text"]):
            part["projection_dim"] = len(weights["visual_projection.weight"])
    return top


def export_hf(clip, folder):
    """Write a CLIP (LoRA merged) for transformers: config.json, model.safetensors, preprocessor_config.json, and CLIP's tokenizer files.

    CLIPModel, CLIPVisionModel or SiglipModel `.from_pretrained(folder)` loads it. SigLIP's tokenizer is not in open_clip's package.
    """
    os.makedirs(folder, exist_ok=True)
    weights, look = hf_state_dict(clip), clip.visual.preprocess_cfg
    config, side = hf_config(clip, weights), image_side(clip.visual)
    squash = look["resize_mode"] == "squash"
    square = {"height": side, "width": side}
    files = {"config.json": config, "preprocessor_config.json": dict(
        image_processor_type="SiglipImageProcessor" if config["model_type"] == "siglip" else "CLIPImageProcessor",
        do_resize=True, size=square if squash else {"shortest_edge": side}, resample=3, do_center_crop=not squash, crop_size=square,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=list(look["mean"]), image_std=list(look["std"]), do_convert_rgb=True)}
    if config["model_type"] == "clip":
        bpe, ends = open_clip.SimpleTokenizer(), {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        files["vocab.json"] = {ends.get(token, token): i for token, i in bpe.encoder.items()}
        files["merges.txt"] = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe.bpe_ranks)]) + "\n"
        files["tokenizer_config.json"] = dict(tokenizer_class="CLIPTokenizer", model_max_length=config["text_config"]["max_position_embeddings"],
                                              bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
