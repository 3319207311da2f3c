"""`pytest test_genhancer.py`: on the CPU, without downloads, in under two minutes.

Truth comes from elsewhere: golden outputs of FLUX's and taming's own implementations (toy/golden), closed forms, the benchmark's own
protocol written out pair by pair, a second process, a perturbed round trip.
"""
import csv
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import eval_mmvp
import genhancer as gh
import toy.ablate as ablate
import toy.make_toy as make_toy
import train
import vqgan as vq
from vae import AutoEncoder, AutoEncoderConfig, UserError, load_vae

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "toy", "golden")
TINY_CLIP = {"embed_dim": 32, "quick_gelu": True,
             "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
             "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
TINY_SIGLIP = {"embed_dim": 48, "init_logit_bias": -10, "custom_text": True,
               "vision_cfg": {"image_size": 32, "timm_model_name": "tiny_siglip_tower", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"},
               "text_cfg": {"context_length": 16, "vocab_size": 320, "width": 48, "heads": 4, "layers": 2, "no_causal_mask": True, "proj_bias": True,
                            "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}}


@timm.models.register_model
def tiny_siglip_tower(pretrained=False, features_only=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, class_token=False, global_pool="map", num_classes=0)
    return timm.models.vision_transformer.VisionTransformer(**{**shape, **kwargs})


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with random tiny models in the published formats, and noise for images in two shards."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    for name, config in (("tiny-clip", TINY_CLIP), ("tiny-siglip", TINY_SIGLIP)):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        clip = open_clip.create_model(name, load_weights=False)
        with torch.no_grad():
            for parameter in clip.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
        save_file(clip.state_dict(), folder / f"{name}.safetensors")
    vae = AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4))
    save_file(vae.state_dict(), folder / "vae.safetensors", {"scale_factor": "0.5", "shift_factor": "0.1"})
    config = vq.VQGANConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,), z_channels=16, n_embed=64, embed_dim=8)
    save_file(vq.VQGAN(config).state_dict(), folder / "vqgan.safetensors")
    rng = np.random.default_rng(0)
    for shard in range(2):
        write_shard(folder / "data" / f"{shard:05}.tar", [jpeg(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(30)])
    return folder


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_shard(path, images):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(images):
            for suffix, content in (("jpg", data), ("txt", b"a caption"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{path.stem}{i:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def golden(name):
    with safe_open(os.path.join(GOLDEN, f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@torch.no_grad()
def fill(module, std):
    """The parameters with which the golden outputs were made."""
    for name, parameter in module.named_parameters():
        k = torch.arange(parameter.numel(), dtype=torch.float64)
        value = std * math.sqrt(2) * torch.sin(1.7 * k + 0.013 * k * k + zlib.crc32(name.encode()) % 1000)
        value += 1.0 * (name.endswith(".scale") or name.endswith(".weight") and "norm" in name)
        parameter.copy_(value.view(parameter.shape))
    return module.eval().requires_grad_(False)


def assert_close(a, b, tolerance=1e-4):
    assert (a - b).norm() <= tolerance * b.norm()


def assert_layout(module, name):
    published = json.load(open(os.path.join(GOLDEN, f"keys_{name}.json")))
    assert {key: list(value.shape) for key, value in module.state_dict().items()} == published["shapes"]
    assert sum(p.numel() for p in module.parameters()) == published["parameters"]


# ------------------------------------------------------------------------------------------------- parity with FLUX and taming

def test_vae_equals_flux():
    g, vae = golden("flux_ae_tiny"), fill(AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1, 2, 4))), 0.05)
    mean, logvar = vae.moments(g["image"])
    for ours, theirs in ((mean, "mean"), (logvar, "logvar"), (vae.encode(g["image"], sample=False), "latent_of_mean"), (vae.decode(g["latent_of_mean"]), "decoded")):
        assert_close(ours, g[theirs])
    torch.manual_seed(0)
    noise = torch.randn_like(mean)
    torch.manual_seed(0)
    assert_close(vae.encode(g["image"]), 0.3611 * (mean + (0.5 * logvar).exp() * noise - 0.1159))


def test_vqgan_equals_taming():
    config = vq.VQGANConfig(z_channels=16, resolution=32, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(8,), n_embed=64, embed_dim=8)
    g, model = golden("vqgan_tiny"), fill(vq.VQGAN(config), 0.1)
    model.quantize.embedding.weight.copy_(g["codebook"])
    assert_close(model.pre_quantize(g["image"]), g["pre_quant"])
    assert torch.equal(model.encode(g["image"]), g["indices"])
    assert_close(model.decode(g["indices"]), g["decoded"])


@pytest.mark.parametrize("case", ["cls", "cls_local"])
def test_flux_equals_flux(case):
    config = gh.FluxConfig(vec_in_dim=32, context_in_dim=48, hidden_size=96, num_heads=4, depth=2, depth_single_blocks=3, axes_dim=(8, 8, 8))
    g, flux = golden("flux_tiny"), fill(gh.Flux(config), 0.1)
    arguments = g["latent"], g[f"{case}.timesteps"], g[f"{case}.context"], g[f"{case}.vec"]
    assert_close(flux(*arguments), g[f"{case}.velocity_latent"])
    zeros = torch.zeros(*g[f"{case}.context"].shape[:2], 3)
    assert_close(flux(*arguments, context_ids=zeros), g[f"{case}.velocity_latent"])
    assert not torch.allclose(flux(*arguments, context_ids=zeros + 1), g[f"{case}.velocity_latent"], rtol=1e-3)
    flux.requires_grad_(True).grad_checkpointing = True
    assert_close(flux(*arguments), g[f"{case}.velocity_latent"])


def test_full_size_layouts():
    with torch.device("meta"):
        assert_layout(gh.Flux(gh.FluxConfig()), "flux_2_4")
        assert_layout(AutoEncoder(AutoEncoderConfig()), "flux_ae")
        assert_layout(vq.VQGAN(vq.VQGANConfig(n_embed=1024)), "vqgan_f16_1024")
        assert_layout(vq.VQGAN(vq.VQGANConfig()), "vqgan_f16_16384")
        assert sum(p.numel() for p in gh.Flux(gh.FluxConfig(depth=19, depth_single_blocks=38)).parameters()) == 11_901_408_320
        sizes = [sum(p.numel() for out in (768, 4096) for p in gh.Projector(width, out).parameters()) for width in (768, 1024, 1152)]
    assert sizes == [21_115_392, 22_361_600, 22_984_704]


def test_tokenizers_read_their_configuration_off_the_file(world, tmp_path):
    vae = load_vae(world / "vae.safetensors")
    assert vae.config == AutoEncoderConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4, scale_factor=0.5, shift_factor=0.1)
    assert vae.factor == 4 and not vae.training and not any(p.requires_grad for p in vae.parameters())
    model = vq.load_vqgan(world / "vqgan.safetensors")
    assert (model.config.ch_mult, model.config.n_embed, model.config.embed_dim, model.factor) == ((1, 2), 64, 8, 2)
    assert len(model.encoder.down[1].attn) == 1 and not len(model.encoder.down[0].attn)
    tensors = load_file(world / "vqgan.safetensors")
    save_file(tensors | {"loss.discriminator.weight": torch.zeros(3)}, tmp_path / "with_loss.safetensors")
    vq.load_vqgan(tmp_path / "with_loss.safetensors")


@pytest.mark.parametrize("load, file, says", [
    (load_vae, "nowhere.safetensors", "not found.*--vae"), (vq.load_vqgan, "nowhere.safetensors", "not found.*--vqgan"),
    (load_vae, "vqgan.safetensors", "VQ-GAN"), (vq.load_vqgan, "vae.safetensors", "quantize.embedding.weight"),
    (load_vae, "tiny-clip.safetensors", "layout of FLUX.1's autoencoder.*encoder.conv_in.weight"), (load_vae, "cut.safetensors", "not a complete safetensors"),
    (load_vae, "extra.safetensors", "unexpected something.weight"), (load_vae, "less.safetensors", "missing decoder.mid.block_1.conv1.bias")])
def test_foreign_and_broken_tokenizer_files_are_refused(world, tmp_path, load, file, says):
    tensors = load_file(world / "vae.safetensors")
    save_file(tensors | {"something.weight": torch.zeros(1)}, tmp_path / "extra.safetensors")
    save_file({key: value for key, value in tensors.items() if key != "decoder.mid.block_1.conv1.bias"}, tmp_path / "less.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((world / "vae.safetensors").read_bytes()[:-100])
    path = tmp_path / file if (tmp_path / file).exists() else world / file
    with pytest.raises(UserError, match=says) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_converting_a_checkpoint_runs_none_of_its_code(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint, callback.__qualname__ = callback, "ModelCheckpoint"
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    tensors = load_file(world / "vqgan.safetensors")
    torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(1)}, "callbacks": {callback: {"best": 1}}, "epoch": 3}, "good.ckpt")
    torch.save({"state_dict": tensors, "extra": Payload()}, "evil.ckpt")
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    vq.convert("good.ckpt", "good.safetensors")
    assert load_file("good.safetensors").keys() == tensors.keys()
    with pytest.raises(UserError, match="cannot be read safely"):
        vq.convert("evil.ckpt", "evil.safetensors")
    assert not os.path.exists("owned") and not os.path.exists("evil.safetensors")


# --------------------------------------------------------------------------------------------------------------- the equations

@pytest.mark.parametrize("scale", [0.1, 0.5, 1, 5, 10])
def test_timesteps_follow_the_scaled_logit_normal(scale):
    t = gh.sample_timesteps(20_000, scale, generator=torch.Generator().manual_seed(0)).double()
    assert t.min() > 0 and t.max() < 1
    phi = lambda x: 0.5 * (1 + torch.erf(torch.logit(x) / scale / math.sqrt(2)))     # P(t < x) = Phi(logit(x) / s)
    low, high = torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)
    inside = t[(t > low) & (t < high)].sort().values
    assert_kolmogorov_smirnov((phi(inside) - phi(low)) / (phi(high) - phi(low)))


def assert_kolmogorov_smirnov(cdf):
    """Sorted values of the supposed distribution function: their largest distance to the uniform, p about 0.001."""
    steps = torch.arange(len(cdf) + 1) / len(cdf)
    assert max((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()) < 1.95 / math.sqrt(len(cdf))


def test_uniform_timesteps_and_an_unknown_distribution():
    assert_kolmogorov_smirnov(gh.sample_timesteps(20_000, distribution="uniform", generator=torch.Generator().manual_seed(0)).double().sort().values)
    with pytest.raises(ValueError, match="logit-normal or uniform"):
        gh.sample_timesteps(3, distribution="normal")


def test_time_stays_float32_under_autocast():
    flux, seen = gh.Flux(gh.FluxConfig(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)), []
    flux.time_in.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        t = gh.sample_timesteps(2)
        flux(torch.randn(2, 16, 4, 4), t, torch.randn(2, 1, 4096), torch.randn(2, 768))
    assert [t.dtype, *seen] == 3 * [torch.float32]
    embedded = gh.timestep_embedding(torch.tensor([0.25]))[0]
    assert embedded[0] == pytest.approx(math.cos(250), abs=1e-4) and embedded[128] == pytest.approx(math.sin(250), abs=1e-4)


def test_rectified_flow_by_hand():
    x, eps, t, seen = torch.full((2, 1, 1, 1), 2.0), torch.full((2, 1, 1, 1), 10.0), torch.tensor([0.0, 0.25]), {}

    def denoiser(noisy, time, context, vec, context_ids=None):
        seen.update(noisy=noisy.flatten().tolist(), time=time)
        return torch.tensor([8.0, 5.0]).view(2, 1, 1, 1)

    losses = gh.rectified_flow_loss(denoiser, x, None, None, t, eps, reduction="none")
    assert seen["noisy"] == [2.0, 4.0] and losses.tolist() == [0.0, 9.0]      # x_t = .75 * 2 + .25 * 10; target 10 - 2
    assert gh.rectified_flow_loss(denoiser, x, None, None, t, eps) == 4.5


def test_masks_and_the_masked_loss():
    mask = gh.sample_masks(400, 196, 0.5, 0.9, torch.Generator().manual_seed(0))
    ratios = mask.sum(1).double()
    assert ratios.min() >= 98 and ratios.max() <= round(0.9 * 196) and ratios.unique().numel() > 50
    assert_kolmogorov_smirnov(((ratios.sort().values + torch.rand(400, dtype=torch.float64) - 0.5) / 196 - 0.5).clamp(0, 0.4) / 0.4)
    assert (gh.sample_masks(5, 25, 0.75, 0.75).sum(1) == 19).all() and (gh.sample_masks(3, 9, 0.01, 0.01).sum(1) == 1).all() and gh.sample_masks(2, 9, 1, 1).all()
    assert mask[:, 0].double().mean() == pytest.approx(0.7, abs=0.1)
    b, n, k = 3, 10, 7
    indices, mask = torch.randint(k, (b, n)), torch.zeros(b, n, dtype=torch.bool)
    mask[0, :1], mask[1, :5], mask[2, 3:] = True, True, True
    assert gh.masked_token_loss(torch.zeros(int(mask.sum()), k), indices, mask) == pytest.approx(math.log(k))
    answer = 100.0 * F.one_hot(indices[mask], k)
    assert gh.masked_token_loss(answer, indices, mask) == pytest.approx(0, abs=1e-6)
    logits = torch.randn(int(mask.sum()), k)
    rows = iter(logits)
    by_hand = [np.mean([-F.log_softmax(next(rows), 0)[indices[i, j]].item() for j in range(n) if mask[i, j]]) for i in range(b)]
    assert gh.masked_token_loss(logits, indices, mask, "none").tolist() == pytest.approx(by_hand, rel=1e-5)
    assert gh.masked_token_loss(logits, indices, mask).item() == pytest.approx(np.mean(by_hand), rel=1e-5)


@pytest.mark.parametrize("n", [196, 441, 576])
def test_perceiver_reads_the_unmasked_and_predicts_the_masked(n):
    torch.manual_seed(0)
    model = gh.Perceiver(gh.PerceiverConfig(n_embed=50, embed_dim=8, width=32, num_heads=2, layers=2), torch.randn(50, 8))
    nn.init.normal_(model.mask_token)
    indices, mask, context = torch.randint(50, (2, n)), gh.sample_masks(2, n, 0.5, 0.9), torch.randn(2, 3, 32, requires_grad=True)
    heads = []
    model.head.register_forward_hook(lambda module, inputs, output: heads.append(len(inputs[0])))
    logits = model(indices, mask, context)
    assert logits.shape == (mask.sum(), 50) and heads == [mask.sum()]           # no logits for the unmasked
    hidden, shown = indices.clone(), indices.clone()
    hidden[mask] = (hidden[mask] + 1) % 50
    shown[~mask] = (shown[~mask] + 1) % 50
    assert torch.equal(model(hidden, mask, context), logits)                    # what is masked is not read
    assert not torch.allclose(model(shown, mask, context), logits, atol=1e-3)
    assert not torch.allclose(model(indices, mask, context.flip(0)), logits, atol=1e-3)
    logits[0].sum().backward()
    assert context.grad[0].abs().min() > 0 and (context.grad[1] == 0).all()     # row 0 belongs to sample 0
    assert "codebook" not in model.state_dict()


def test_local_tokens_carry_their_position(world):
    for kind in ("rf", "perceiver"):
        model = tiny_model(world, kind, local_ratio=0.5).set_stage(1).eval()
        images = torch.rand(2, 3, 32, 32)
        torch.manual_seed(0)
        condition = model.condition(images)
        assert condition["context"].shape[1] == 1 + 8                           # 16 patches
        torch.manual_seed(0)
        chosen = torch.rand(2, 16).argsort(1)[:, :8]
        if kind == "rf":                                                        # 4 x 4 patches over 4 x 4 latent tokens
            assert_close(condition["context_ids"][:, 1:], torch.stack([torch.zeros_like(chosen), chosen // 4, chosen % 4], -1).float(), 1e-6)
            assert (condition["context_ids"][:, 0] == 0).all() and condition["vec"].shape == (2, 768)
        whole = model.visual.forward_intermediates((images - model.mean) / model.std, **model.FEATURES)
        local = model.projectors["local"](whole["image_intermediates"][-1])[torch.arange(2)[:, None], chosen]
        if kind == "perceiver":                                                 # 16 x 16 tokens: patch i is centred at 4 i + 1.5
            local = local + gh.sincos_position(torch.stack([chosen // 4, chosen % 4], -1) * 4 + 1.5, local.shape[-1])
        assert_close(condition["context"][:, 1:], local, 1e-5)
        assert "local" not in tiny_model(world, kind).projectors


def tiny_model(world, kind="rf", clip="tiny-clip", **options):
    visual = gh.load_clip(clip, str(world / f"{clip}.safetensors"))[0].visual
    torch.manual_seed(1)
    if kind == "rf":
        flux = gh.Flux(gh.FluxConfig(in_channels=16, hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1, axes_dim=(8, 12, 12), context_in_dim=48))
        return gh.GenHancer(visual, load_vae(world / "vae.safetensors"), flux, **options)
    tokenizer = vq.load_vqgan(world / "vqgan.safetensors")
    config = gh.PerceiverConfig(n_embed=64, embed_dim=8, width=32, num_heads=2, layers=2)
    return gh.GenHancer(visual, tokenizer, gh.Perceiver(config, tokenizer.quantize.embedding.weight), **options)


def test_euler_and_parallel_decoding_reach_the_truth(world):
    images = torch.rand(3, 3, 32, 32)
    model = tiny_model(world)
    truth = model.tokenizer.encode(2 * images - 1, sample=False)
    expected = (model.tokenizer.decode(truth) / 2 + 0.5).clamp(0, 1)

    class Oracle(nn.Module):  # the straight path's velocity at x_t is (x_t - x) / t
        config = model.denoiser.config

        def forward(self, x, t, **condition):
            return (x - truth) / t.view(-1, 1, 1, 1)

    model.denoiser = Oracle()
    assert_close(model.reconstruct(images, steps=7), expected)

    model = tiny_model(world, "perceiver")
    indices, asked = model.tokenizer.encode(2 * images - 1).flatten(1), []

    class Knows(nn.Module):
        def forward(self, given, mask, context):
            asked.append(mask.sum(1).tolist())
            assert (given[~mask] == indices[~mask]).all()                       # what was accepted stays, and is right here
            return 1000.0 * F.one_hot(indices[mask], 64)

    model.denoiser = Knows()
    expected = (model.tokenizer.decode(indices.view(3, 16, 16)) / 2 + 0.5).clamp(0, 1)
    assert_close(model.reconstruct(images, steps=8), expected)
    assert [counts[0] for counts in asked] == [256, *(int(256 * math.cos(math.pi / 2 * i / 8)) for i in range(1, 8))]
    asked.clear()
    assert_close(model.reconstruct(images, steps=1, mask_ratio=0.75), expected)
    assert asked == [[192, 192, 192]]


# ------------------------------------------------------------------------------------------------------------------------- LoRA

@pytest.mark.parametrize("name, matrices", [("tiny-clip", 2 * 6 + 1), ("tiny-siglip", 2 * 6 + 6)])
def test_lora(world, name, matrices):
    visual = gh.load_clip(name, str(world / f"{name}.safetensors"))[0].visual
    original, types, x = visual.state_dict(), [type(m) for m in visual.modules()], torch.randn(2, 3, 32, 32)
    original = {key: value.clone() for key, value in original.items()}
    with torch.no_grad():
        before = visual(x)
    assert gh.inject_lora(visual) == matrices and not visual.training
    trainable = {key: p for key, p in visual.named_parameters() if p.requires_grad}
    assert all(key.endswith(("lora_A", "lora_B")) for key in trainable) and sum(p.numel() // 16 for p in trainable.values()) > 0
    assert_close(visual(x).detach(), before, 1e-5)
    visual.train()
    assert_close(visual(x).detach(), before, 1e-5)                              # B = 0: dropout changes nothing yet
    with torch.no_grad():
        for key, p in trainable.items():
            if key.endswith("lora_B"):
                p.normal_(std=0.1)
    visual(x).square().sum().backward()
    for key, p in trainable.items():
        for block in p.grad if p.dim() == 3 else p.grad.split(16):              # q, k and v each
            assert block.abs().sum() > 0, key
    assert not any(p.grad is not None for key, p in visual.named_parameters() if key not in trainable)
    assert not torch.equal(visual(x), visual(x))                                # dropout
    visual.eval()
    with torch.no_grad():
        adapted = visual(x)
        assert torch.equal(adapted, visual(x)) and (adapted - before).abs().max() > 1e-2
        assert_close(visual.forward_intermediates(x, **gh.GenHancer.FEATURES)["image_features"], adapted, 1e-6)
        gh.merge_lora(visual)
        assert_close(visual(x), adapted, 1e-5)
    assert list(visual.state_dict()) == list(original) and [type(m) for m in visual.modules()] == types
    changed = {key for key, value in visual.state_dict().items() if not torch.equal(value, original[key])}
    assert all("norm" not in key and "ln_" not in key and "bias" not in key and "embed" not in key and "conv1" not in key for key in changed)
    assert len(changed) == {"tiny-clip": 2 * 4 + 1, "tiny-siglip": 2 * 4 + 5}[name]
    with pytest.raises(ValueError, match="no linear layer"):
        gh.inject_lora(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_lora_equals_its_definition_on_every_packed_matrix():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    lora, x = gh.LoRAAttention(attention, rank=2, alpha=6, dropout=0.0), torch.randn(2, 5, 8)
    nn.init.normal_(lora.qkv.lora_B)
    nn.init.normal_(lora.out.lora_B)
    merged = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    merged.load_state_dict(attention.state_dict())
    with torch.no_grad():
        for i in range(3):  # W + alpha / r B A, for q, k and v on their own
            merged.in_proj_weight[8 * i:8 * i + 8] += 3 * lora.qkv.lora_B[i] @ lora.qkv.lora_A[2 * i:2 * i + 2]
        merged.out_proj.weight += 3 * lora.out.lora_B[0] @ lora.out.lora_A
        assert_close(lora(x)[0], merged(x, x, x)[0], 1e-5)


BACKBONES = [("openai-l14-224", 427_616_513, 303_966_208, 7_106_560, 256), ("openai-l14-336", 427_944_193, 304_293_888, 7_106_560, 576),
             ("metaclip-l14-224", 427_616_513, 303_966_208, 7_106_560, 256), ("metaclip-h14-224", 986_109_441, 632_076_800, 11_833_344, 256),
             ("siglip-so400m-224", 877_360_306, 427_680_704, 9_017_344, 256), ("siglip-so400m-384", 877_960_498, 428_225_600, 9_017_344, 729)]


@pytest.mark.parametrize("name, parameters, visual, lora, patches", BACKBONES)
def test_the_six_backbones_at_full_size(name, parameters, visual, lora, patches):
    backbone = gh.find_backbone(name)
    with torch.device("meta"):                                                  # or it draws a billion random weights first
        clip = open_clip.create_model(backbone.model, device="meta", load_weights=False, pretrained_hf=False)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(clip), count(clip.visual)) == (parameters, visual)
    keys, types, siglip = list(clip.visual.state_dict()), [type(m) for m in clip.visual.modules()], "siglip" in name
    assert gh.inject_lora(clip.visual) == {"siglip": 168, "metaclip-h14-224": 193}.get("siglip" if siglip else name, 145)
    assert sum(p.numel() for p in clip.visual.parameters() if p.requires_grad) == lora
    side = int(name[-3:])
    features = clip.visual.forward_intermediates(torch.empty(1, 3, side, side, device="meta"), **gh.GenHancer.FEATURES)
    assert features["image_intermediates"][-1].shape[1] == patches
    gh.merge_lora(clip.visual)
    assert list(clip.visual.state_dict()) == keys and [type(m) for m in clip.visual.modules()] == types
    assert siglip or type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert open_clip.is_pretrained_cfg(*backbone)


def test_a_local_file_gets_its_tags_preprocessing(world, monkeypatch):
    weights = str(world / "tiny-siglip.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-siglip", {"webli": open_clip.get_pretrained_cfg("ViT-SO400M-14-SigLIP", "webli")})
    clip, preprocess, tokenizer = gh.load_clip("tiny-siglip:webli", weights)
    assert tuple(clip.visual.preprocess_cfg["mean"]) == (0.5, 0.5, 0.5) and clip.visual.preprocess_cfg["resize_mode"] == "squash"
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (0, 0, 8, 32))
    assert preprocess(picture)[0, 16, 0] > 0.9                                   # squashed to a square, not cropped
    clip, preprocess, tokenizer = gh.load_clip("tiny-clip", str(world / "tiny-clip.safetensors"))
    assert clip.visual.preprocess_cfg["mean"] == pytest.approx(open_clip.OPENAI_DATASET_MEAN) and preprocess(picture)[0, 16, 0] < 0
    assert tokenizer(["a cat"]).shape == (1, 77) and not clip.training
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, world / "clip.pt")
    assert torch.equal(gh.load_clip("tiny-clip", str(world / "clip.pt"))[0].visual.proj, clip.visual.proj)


@pytest.mark.parametrize("name, file, says", [
    ("nonsense", None, "unknown backbone 'nonsense': choose from openai-l14-224"), ("ViT-L-14:nonsense", None, "no weights 'nonsense'.*laion2b_s32b_b82k"),
    ("tiny-clip", "nowhere.pt", "not found at"), ("tiny-clip", ".", "HuggingFace"), ("tiny-clip", "vae.safetensors", "missing .*; unexpected decoder"),
    ("tiny-clip", "tiny-siglip.safetensors", "missing .*unexpected"), ("tiny-clip", "tiny-clip.json", "cannot be read")])
def test_foreign_clips_are_refused(world, name, file, says):
    with pytest.raises(UserError, match=says) as error:
        gh.load_clip(name, file and str(world / file))
    assert "\n" not in str(error.value)


def test_export_has_the_published_layout(world, tmp_path):
    block = {f"{layer}.{kind}" for kind in ("weight", "bias") for layer in (
        "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")}
    blocks = {f"{tower}_model.encoder.layers.{i}.{key}" for tower in ("vision", "text") for i in range(2) for key in block}
    both = lambda *names: {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    embeddings = {"text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
                  "vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight", "logit_scale"}
    clip = gh.load_clip("tiny-clip", str(world / "tiny-clip.safetensors"))[0]
    gh.export_hf(clip, tmp_path / "clip")
    weights, config = load_file(tmp_path / "clip" / "model.safetensors"), json.loads((tmp_path / "clip" / "config.json").read_text())
    assert weights.keys() == blocks | embeddings | {"vision_model.embeddings.class_embedding", "visual_projection.weight", "text_projection.weight"} | both(
        "vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm")
    assert torch.equal(weights["vision_model.encoder.layers.1.self_attn.k_proj.weight"], clip.visual.transformer.resblocks[1].attn.in_proj_weight[64:128])
    assert torch.equal(weights["visual_projection.weight"], clip.visual.proj.T) and weights["logit_scale"].shape == ()
    assert config["model_type"] == "clip" and config["projection_dim"] == config["vision_config"]["projection_dim"] == 32
    vision = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    assert vision.items() <= config["vision_config"].items() and config["text_config"]["eos_token_id"] == 49407
    vocabulary, merges = json.loads((tmp_path / "clip" / "vocab.json").read_text()), (tmp_path / "clip" / "merges.txt").read_text().splitlines()
    assert len(vocabulary) == 49408 and vocabulary["<|endoftext|>"] == 49407 and vocabulary["photo</w>"] == 1125 and merges[:2] == ["#version: 0.2", "i n"]
    processor = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 32} and processor["image_mean"] == pytest.approx(open_clip.OPENAI_DATASET_MEAN) and processor["do_center_crop"]

    clip = gh.load_clip("tiny-siglip", str(world / "tiny-siglip.safetensors"))[0]
    gh.export_hf(clip, tmp_path / "siglip")
    weights, config = load_file(tmp_path / "siglip" / "model.safetensors"), json.loads((tmp_path / "siglip" / "config.json").read_text())
    assert weights.keys() == blocks | embeddings | {"logit_bias", "vision_model.embeddings.patch_embedding.bias", "vision_model.head.probe"} | both(
        "vision_model.post_layernorm", "text_model.final_layer_norm", "text_model.head", "vision_model.head.layernorm", "vision_model.head.mlp.fc1",
        "vision_model.head.mlp.fc2", "vision_model.head.attention.out_proj") | {"vision_model.head.attention.in_proj_weight", "vision_model.head.attention.in_proj_bias"}
    assert weights["vision_model.head.attention.in_proj_weight"].shape == (144, 48) and weights["vision_model.embeddings.position_embedding.weight"].shape == (16, 48)
    assert weights["logit_scale"].shape == weights["logit_bias"].shape == (1,) and config["vision_config"]["hidden_act"] == "gelu"
    assert not (tmp_path / "siglip" / "vocab.json").exists()


# ------------------------------------------------------------------------------------------------------------------- the images

def test_any_image_becomes_upright_rgb():
    side = 40
    red, grey16 = Image.new("RGB", (side, side), (250, 10, 20)), Image.fromarray(np.full((side, side), 60_000, np.uint16))
    see_through = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    transparent = palette.copy()
    transparent.info["transparency"] = palette.getpixel((0, 0))
    for image, expected in ((red, (250, 10, 20)), (red.convert("CMYK"), (250, 10, 20)), (red.convert("L"), 3 * (red.convert("L").getpixel((0, 0)),)),
                            (palette, (250, 10, 20)), (see_through, 3 * (255,)), (transparent, 3 * (255,)), (see_through.convert("LA"), 3 * (255,)),
                            (grey16, 3 * (60_000 >> 8,)), (Image.fromarray(np.full((2, 2), 40_000, np.int32)), 3 * (40_000 >> 8,))):
        assert train.to_rgb(image).mode == "RGB" and train.to_rgb(image).getpixel((1, 1)) == pytest.approx(expected, abs=3)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6                                                            # orientation: rotate by 90 degrees to see it upright
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste("black", (0, 0, 10, 20))
    wide.save(file, "JPEG", exif=exif)
    upright = train.to_rgb(Image.open(file))
    assert upright.size == (20, 60) and upright.getpixel((10, 2))[0] < 60 and upright.getpixel((10, 57))[0] > 200


@pytest.fixture
def zoo(tmp_path):
    """A folder and two shards of good and bad images: 12 are good, 6 are not; one shard has lost its end."""
    rng, folder = np.random.default_rng(0), tmp_path / "zoo"
    (folder / "deeper").mkdir(parents=True)
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    noise.save(folder / "a.jpg")
    noise.convert("CMYK").save(folder / "b.jpeg")
    noise.convert("L").save(folder / "c.png")
    noise.convert("P").save(folder / "deeper" / "d.gif")
    noise.convert("RGBA").save(folder / "deeper" / "e.PNG")
    Image.fromarray(rng.integers(0, 65536, (48, 64), dtype=np.uint16)).save(folder / "f.png")
    noise.resize((1, 1)).save(folder / "g.png")
    good = (folder / "a.jpg").read_bytes()
    (folder / "h.jpg").write_bytes(good[:len(good) // 2])                      # truncated
    (folder / "i.jpg").write_bytes(b"")
    (folder / "j.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    write_shard(tmp_path / "tars" / "0.tar", [good, b"junk", good, b"", good])
    write_shard(tmp_path / "tars" / "1.tar", [good, good, good[:300], good])
    whole = (tmp_path / "tars" / "1.tar").read_bytes()
    (tmp_path / "tars" / "1.tar").write_bytes(whole[:whole.rindex(good) + 100])
    return [str(folder), str(tmp_path / "tars")]


def test_bad_images_are_skipped_and_counted(zoo, tmp_path, capsys):
    data = train.Images(zoo, 32, str(tmp_path / "spare"))
    assert len(data) == 10 + 5 + 3 and "1.tar is cut short: its first 3 images" in capsys.readouterr().err
    images, bad = data[0, 0, 0, list(range(len(data)))]
    assert images.shape == (18, 3, 32, 32) and images.dtype == torch.uint8
    assert len({name for name in bad}) == 6 and sum("tar at byte" in name for name in set(bad)) == 3
    assert sum(data.load(i)[0] is not None for i in range(len(data))) == 12
    again, _ = data[0, 0, 0, list(range(len(data)))]
    other, _ = data[0, 0, 1, list(range(len(data)))]
    assert torch.equal(images, again) and not torch.equal(images, other)       # the crops follow from (seed, step, slot)


def test_a_shard_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [jpeg(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(4)]
    shard = tmp_path / "d" / "0.tar"
    write_shard(shard, pictures[:3])
    data = train.Images([str(shard)], 16, str(tmp_path / "spare"))
    with open(shard, "rb") as file:
        for entry, content in zip(data.entries, pictures):
            file.seek(entry["offset"])
            assert file.read(entry["size"]) == content
    assert (tmp_path / "d" / "0.tar.index.npy").exists() and not (tmp_path / "spare").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train, "find_images", lambda paths: (paths, []))
        patch.setattr(tarfile, "open", None)                                    # the cache is enough
        assert train.Images([str(shard)], 16, "").fingerprint() == data.fingerprint()
    write_shard(shard, pictures)
    os.utime(shard, ns=(1, 1))
    changed = train.Images([str(shard)], 16, "")
    assert len(changed) == 4 and changed.fingerprint() != data.fingerprint()
    (tmp_path / "d" / "0.tar.index.npy").write_bytes(b"torn")
    assert len(train.Images([str(shard)], 16, "")) == 4
    real = np.save                                                              # beside a read-only shard: the spare folder
    monkeypatch.setattr(np, "save", lambda path, table: real(path, table) if "spare" in path else open("/nowhere/at/all"))
    os.remove(tmp_path / "d" / "0.tar.index.npy")
    train.index_shard(str(shard), str(tmp_path / "spare"))
    assert len(list((tmp_path / "spare").iterdir())) == 1


@pytest.mark.parametrize("world, accum", [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_every_image_once_per_epoch_whatever_the_ranks(monkeypatch, world, accum):
    n, batch, epochs = 96, 3, 3
    settings = type("S", (), dict(seed=5, steps=epochs * n // (batch * accum * world), accum=accum, batch_size=batch))
    monkeypatch.setattr(train, "WORLD", world)
    slots = {}
    for rank in range(world):
        monkeypatch.setattr(train, "RANK", rank)
        slots |= {(step, slot): indices for _, step, slot, indices in train.batch_keys(n, settings, 0)}
    order = [index for key in sorted(slots) for index in slots[key]]
    for epoch in range(epochs):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert order[:n] != order[n:2 * n] and len(order) == epochs * n
    if world * accum == 4:                                                      # the same path for every way to make 4 micro-batches
        reference = [train.epoch_order(n, 5, e)[i] for e in range(epochs) for i in range(n)]
        assert order == reference
    resumed = list(train.batch_keys(n, settings, 3))
    assert resumed[0][1] == 3 and resumed[0][3] == slots[3, world - 1]


def test_three_million_entries_are_small(monkeypatch):
    assert 3_000_000 * train.ENTRY.itemsize + 3_000_000 * 4 < 65e6             # bytes of index and order in each rank
    assert train.epoch_order(1000, 0, 0).dtype == np.int32


# --------------------------------------------------------------------------------------------------------------- training, for real

def arguments(world, out, *more):
    return [str(x) for x in ("--preset", "paper", "--backbone", "tiny-clip", "--clip-weights", world / "tiny-clip.safetensors", "--vae", world / "vae.safetensors",
            "--vqgan", world / "vqgan.safetensors", "--data", world / "data", "--out", out, "--width", 128, "--condition", 48, 64, "--depth", 1, 1, "--layers", 2, "--steps", 6, "--batch-size", 2,
            "--accum", 2, "--workers", 0, "--precision", "fp32", "--save-every", 2, "--log-every", 1, "--sample-every", 3, *more)]


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """--preset paper, at reduced width: both stages, both denoisers, with the benchmark before and after for rf."""
    out = tmp_path_factory.mktemp("trained")
    benchmark = make_benchmark(out / "mmvp", per=2)
    train.main(arguments(world, out / "rf", "--val", world / "data", "--benchmark", benchmark, "--warmup", 0, "--export-every", 4))
    for stage in (1, 2):
        train.main(arguments(world, out / "perceiver", "--denoiser", "perceiver", "--stage", stage, "--freeze-denoiser"))
    return out


def test_both_stages_change_what_they_should(world, trained):
    before, after = load_file(world / "tiny-clip.safetensors"), load_file(trained / "rf" / "clip.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 2 * 4 + 1 and all(key.startswith("visual.") and "ln_" not in key and "bias" not in key for key in changed)
    for out, frozen in (("rf", False), ("perceiver", True)):
        stage1 = load_file(trained / out / "stage1" / "last.safetensors")
        assert {key.split(".")[0] for key in stage1} == {"denoiser", "projectors"}
        stage2 = load_file(trained / out / "stage2" / "step-00000006" / "model.safetensors")
        assert sum("lora" in key for key in stage2) == 2 * (2 * 4 + 1)
        assert all("lora" in key for key in stage2) == frozen and not any(".base." in key for key in stage2)
        if not frozen:
            assert all(not torch.equal(stage1[key], stage2[key]) for key in stage1 if not key.endswith("bias"))
    result = json.loads((trained / "rf" / "result.json").read_text())
    assert result.keys() == {"before", "after"} and result["after"].keys() == {"average", "patterns", "zeroshot"} and len(result["after"]["patterns"]) == 9


def test_the_result_loads_in_plain_open_clip(world, trained):
    clip = open_clip.create_model("tiny-clip", pretrained=str(trained / "rf" / "clip.safetensors")).eval()
    model = tiny_rf_of(world, trained)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(clip.visual((images - model.mean) / model.std), model.visual((images - model.mean) / model.std), 1e-5)
    exported = load_file(trained / "rf" / "hf" / "model.safetensors")
    assert torch.equal(exported["visual_projection.weight"], clip.visual.proj.T)
    with safe_open(trained / "rf" / "clip.safetensors", "pt") as file:
        assert not file.metadata()


def test_clips_along_the_way(trained):
    """--export-every: each is a whole CLIP, on the way from the original to the last."""
    early, last = (load_file(trained / "rf" / name) for name in ("clip-000004.safetensors", "clip.safetensors"))
    assert early.keys() == last.keys() and not torch.equal(early["visual.proj"], last["visual.proj"])
    open_clip.create_model("tiny-clip", pretrained=str(trained / "rf" / "clip-000004.safetensors"))
    assert not list((trained / "perceiver").glob("clip-*"))


def test_the_control_conditions_on_another_image(world, tmp_path, monkeypatch):
    seen, forward = [], gh.GenHancer.forward
    monkeypatch.setattr(gh.GenHancer, "forward", lambda self, x, other=None: seen.append((x, other)) or forward(self, x, other))
    train.main(arguments(world, tmp_path, "--stage", 1, "--steps", 1, "--batch-size", 3, "--accum", 1, "--shuffle-target"))
    images, other = seen[0]                                                     # then come the held-out ones
    assert all(torch.equal(other[(i + 1) % 3], images[i]) for i in range(3)) and not torch.equal(images, other)


def tiny_rf_of(world, trained):
    """The model at the end of stage 2, LoRA not merged, from its last checkpoint."""
    args = train.stage_settings(train.parse_args(arguments(world, trained / "rf", "--stage", 2)), 2)
    model = train.build_model(args, torch.device("cpu")).eval()
    missing = model.load_state_dict(load_file(trained / "rf" / "stage2" / "step-00000006" / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    return model


def test_the_log_and_the_pictures(trained):
    for out, level, columns in (("rf", "t", 2), ("perceiver", "mask", 3)):
        with open(trained / out / "stage1" / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
        assert float(rows[2]["epoch"]) == pytest.approx(3 * 4 / 60, abs=1e-4)
        assert [float(row["lr"]) for row in rows] == pytest.approx(6 * [1e-4] if out == "rf" else [1e-5 * i for i in range(1, 7)])
        assert all(np.isfinite(float(row[key])) for row in rows for key in ("loss", "grad_norm", "images_per_s", "data_wait_s"))
        assert [bool(row["heldout"]) for row in rows] == [False, False, out == "rf"] * 2
        bins = [float(rows[0][f"loss_{level}_{i / 10}"] or "nan") for i in range(10)]
        assert np.nanmin(bins) <= float(rows[0]["loss"]) <= np.nanmax(bins)
        assert Image.open(trained / out / "stage1" / "samples" / "000003.png").width == 2 * columns * 130 + 2
        assert sorted(os.listdir(trained / out / "stage1"))[-2:] == ["step-00000004", "step-00000006"]      # the newest two


def test_a_finished_run_is_left_alone(world, trained, capsys):
    before = {path: path.read_bytes() for path in (trained / "perceiver").rglob("*") if path.is_file()}
    train.main(arguments(world, trained / "perceiver", "--denoiser", "perceiver", "--stage", 1, "--freeze-denoiser"))
    assert "stage 1 is finished" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (trained / "perceiver").rglob("*") if path.is_file()}


def rewind(folder, step):
    """Leave a stage as a kill after `step` would have: a half-written checkpoint beside the complete ones, the log further on."""
    for path in folder.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    os.makedirs(folder / f"step-{step + 2:08}.part")
    (folder / f"step-{step + 2:08}.part" / "model.safetensors").write_bytes(b"half")


@pytest.mark.parametrize("denoiser", ["rf", "perceiver"])
def test_a_killed_run_ends_in_the_same_bits(world, tmp_path, denoiser, capsys):
    more = ("--denoiser", denoiser, "--stage", "e2e", "--local-ratio", 0.3)
    train.main(arguments(world, tmp_path / "whole", *more))
    train.main(arguments(world, tmp_path / "killed", *more))
    rewind(tmp_path / "killed" / "e2e", 4)
    shutil.copytree(tmp_path / "killed" / "e2e" / "step-00000004", tmp_path / "killed" / "e2e" / "step-00000005")
    cut = tmp_path / "killed" / "e2e" / "step-00000005" / "model.safetensors"  # a disk that lost the end of a file
    cut.write_bytes(cut.read_bytes()[:-1])
    os.remove(tmp_path / "killed" / "clip.safetensors")
    shutil.rmtree(tmp_path / "killed" / "hf")
    train.main(arguments(world, tmp_path / "killed", *more))
    said = capsys.readouterr().out
    assert "step-00000005 is cut short" in said and "resumed from" in said and "step-00000004" in said
    for name in ("clip.safetensors", "hf/model.safetensors", "e2e/step-00000006/model.safetensors", "e2e/settings.json", "e2e/samples/000006.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    logs = [list(csv.DictReader(open(tmp_path / run / "e2e" / "log.csv", newline=""))) for run in ("whole", "killed")]
    exact = ("step", "epoch", "loss", "grad_norm", "lr")
    assert [[row[key] for key in exact] for row in logs[0]] == [[row[key] for key in exact] for row in logs[1]]


def launch(world, *more, processes=2):
    """torchrun over this very world: the tiny CLIP's name is made known first."""
    code = "import sys, open_clip, train; open_clip.add_model_config(sys.argv[1]); train.main(sys.argv[2:])"
    (world / "launch.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0", "--rdzv_backend", "c10d",
                           "--rdzv_endpoint", "localhost:0", str(world / "launch.py"), str(world / "tiny-clip.json"), *more],
                          env=environment, capture_output=True, text=True, timeout=110)


def test_two_processes_walk_the_path_of_one_and_shards_too(world, tmp_path):
    single, double = tmp_path / "single", tmp_path / "double"
    train.main(arguments(world, single, "--stage", "e2e"))                      # 1 process x accumulation 2
    more = ("--stage", "e2e", "--accum", 1)
    done = launch(world, *arguments(world, double, *more))                      # 2 processes x accumulation 1, DDP
    assert done.returncode == 0, done.stderr
    assert_same_weights(single, double, 1e-5)
    rewind(double / "e2e", 4)                                                   # and resumed by FSDP2 from DDP's checkpoint
    os.remove(double / "clip.safetensors")
    done = launch(world, *arguments(world, double, *more, "--shard"))
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    assert_same_weights(single, double, 1e-5)
    rewind(double / "e2e", 4)
    rewind(single / "e2e", 4)
    shutil.rmtree(single / "e2e" / "step-00000004")
    shutil.copytree(double / "e2e" / "step-00000004", single / "e2e" / "step-00000004")
    os.remove(single / "clip.safetensors")
    train.main(arguments(world, single, "--stage", "e2e"))                      # and by one process from two
    done = load_file(single / "clip.safetensors")
    assert all((done[key] - value).abs().max() <= 1e-5 for key, value in load_file(double / "clip.safetensors").items())


def assert_same_weights(a, b, tolerance):
    one, other = (load_file(out / "e2e" / "step-00000006" / "model.safetensors") for out in (a, b))
    assert one.keys() == other.keys() and any("lora_B" in key for key in one)
    for key in one:
        assert (one[key] - other[key]).abs().max() <= tolerance, key


def test_a_signal_saves_and_stops(world, tmp_path, capsys):
    train.STOP.append(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            train.main(arguments(world, tmp_path, "--stage", 1, "--save-every", 6))
    finally:
        train.STOP.clear()
    assert stop.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM after step 1" in capsys.readouterr().err
    train.main(arguments(world, tmp_path, "--stage", 1, "--save-every", 6))
    assert "step-00000001" in capsys.readouterr().out and (tmp_path / "stage1" / "last.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(world, tmp_path, monkeypatch, capsys):
    forward = gh.GenHancer.forward

    def spoiled(self, images, condition_images=None):
        loss = forward(self, images, condition_images)
        spoiled.calls += 1
        if spoiled.calls == 9:                                                  # the first micro-batch of step 5
            self.losses = self.losses * math.nan
        return loss

    spoiled.calls = 0
    monkeypatch.setattr(gh.GenHancer, "forward", spoiled)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path, "--stage", 1, "--sample-every", 9, "--log-every", 6, "--save-every", 4))
    said = capsys.readouterr().err
    assert stop.value.code == 1 and "rank 0 is not finite at step 5 (the last finite one was 1." in said and "step-00000004" in said
    assert [path.name for path in (tmp_path / "stage1").glob("step-*")] == ["step-00000004"]


def test_a_gradient_that_is_not_finite_stops_too(world, tmp_path, monkeypatch, capsys):
    clip_grad = torch.nn.utils.clip_grad_norm_
    norms = iter([1.0, 1.0, 1.0, math.inf])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: clip_grad(*arguments) * next(norms))
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path, "--stage", 1))
    assert stop.value.code == 1 and "gradient is not finite at step 4" in (said := capsys.readouterr().err) and "step-00000002" in said
    assert [path.name for path in (tmp_path / "stage1").glob("step-*")] == ["step-00000002"]


def test_a_torn_log_and_a_vanished_shard(world, tmp_path, capsys):
    shutil.copytree(world / "data", tmp_path / "data")
    moved = arguments(world, tmp_path / "out", "--stage", 1, "--data", tmp_path / "data")
    train.main([*moved, "--save-every", "4"])
    rewind(tmp_path / "out" / "stage1", 4)
    os.remove(tmp_path / "out" / "stage1" / "last.safetensors")
    log = tmp_path / "out" / "stage1" / "log.csv"
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:5]) + whole[5][:9])                           # the power went while step 5's row was written
    load = train.Images.load

    def vanish(self, index):
        if not isinstance(self.transform, train.T.Compose):                     # a training image, hence in the worker
            shutil.rmtree(tmp_path / "data", ignore_errors=True)
        return load(self, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train.Images, "load", vanish)
        train.main([*moved, "--workers", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("train.py: data: ") == 1 and "can no longer be read (No such file" in said and "Traceback" not in said
    train.main([*moved, "--data", str(world / "data")])                         # the same images, elsewhere
    assert [int(row["step"]) for row in csv.DictReader(open(log, newline=""))] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_leaves_the_last_checkpoint(world, tmp_path, monkeypatch, capsys):
    save = torch.save

    def full(content, path):
        if "step-00000004" in path:
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path, "--stage", 1))
    assert stop.value.code == 1 and "No space left on device" in (said := capsys.readouterr().err) and "newest checkpoint is" in said and "step-00000002" in said
    assert [path.name for path in (tmp_path / "stage1").glob("step-*")] == ["step-00000002"]
    monkeypatch.undo()
    train.main(arguments(world, tmp_path, "--stage", 1))
    assert "resumed from" in capsys.readouterr().out


def test_too_many_bad_images_stop_the_run(world, tmp_path, monkeypatch, capsys):
    load = train.Images.load
    monkeypatch.setattr(train.Images, "load", lambda self, i: (None, "bad") if i % 5 == 0 and self.transform.__class__.__name__ != "Compose" else load(self, i))
    monkeypatch.setattr(train.Log, "WINDOW", 20)
    with pytest.raises(SystemExit):
        train.main(arguments(world, tmp_path, "--stage", 1))
    assert "images cannot be decoded: mend the data" in capsys.readouterr().err


def test_flux_weights_start_a_denoiser(world, tmp_path, capsys):
    config = gh.FluxConfig(in_channels=16, vec_in_dim=48, context_in_dim=64, hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)
    flux = fill(gh.Flux(config), 0.02)
    save_file(flux.state_dict(), tmp_path / "flux1-tiny.safetensors")
    args = train.parse_args(arguments(world, tmp_path / "out", "--stage", 1, "--init", tmp_path / "flux1-tiny.safetensors"))
    model = train.build_model(train.stage_settings(args, 1), torch.device("cpu"))
    assert all(torch.equal(value, flux.state_dict()[key]) for key, value in model.denoiser.state_dict().items())
    assert all(p.requires_grad for p in model.denoiser.parameters())


def test_bench_announces_random_weights(world, monkeypatch, capsys):
    monkeypatch.setattr(train, "BENCH_CPU", dict(backbone="tiny-clip:random", width=128, batch_size=2, steps=4, workers=0, depth=[1, 1]))
    monkeypatch.setattr(train, "load_tokenizer", lambda s: load_vae(world / "vae.safetensors"))
    train.main(["--preset", "bench", "--stage", "2", "--precision", "fp32"])
    assert "RANDOM weights and images" in capsys.readouterr().out
    train.main(["--preset", "bench", "--precision", "fp32", "--data", str(world / "data")])
    said = capsys.readouterr().out
    assert "RANDOM weights:" in said and "images/s in one process; 60 images indexed" in said and "REDUCED size" in said and "s / 100 iterations" in said and "no peak on record" in said


@pytest.mark.parametrize("more, says", [
    (["--stage", "3"], "--stage: invalid choice"), (["--denoiser", "gan"], "--denoiser: invalid choice"), (["--preset", "big"], "--preset: invalid choice"),
    (["--backbone", "nonsense"], "unknown backbone 'nonsense'"), (["--steps", "0"], "--steps: 0 is out of range"), (["--batch-size", "-3"], "--batch-size"),
    (["--lr", "nan", "--stage", "1"], "--lr: nan is out of range"), (["--steps", "many"], "--steps: invalid number value: 'many'"), (["--scale", "0"], "--scale"),
    (["--mask-ratio", "0.9", "0.5"], "the low end comes first"), (["--mask-ratio", "0", "0.5"], "--mask-ratio: 0 is out of range"), (["--mask-ratio", "0.5", "1.5"], "1.5"),
    (["--width", "100"], "--width 100 must be a multiple of 128"), (["--depth", "0", "1"], "at least one block"), (["--local-ratio", "2"], "--local-ratio"),
    (["--clip-weights", "nowhere.pt"], "CLIP weights not found at nowhere.pt"), (["--clip-weights", "WORLD/vae.safetensors"], "missing .*unexpected"),
    (["--vae", "nowhere"], "VAE weights not found at nowhere: download ae.safetensors"), (["--vae", "WORLD/vqgan.safetensors"], "VQ-GAN"),
    (["--denoiser", "perceiver", "--vqgan", "WORLD/vae.safetensors"], "quantize.embedding.weight"), (["--data", "nowhere"], "data not found at nowhere"),
    (["--data", "WORLD/empty"], "no image and no .tar"), (["--data", "WORLD/tiny-clip.json"], "is no tar file"), (["--stage", "2"], "run --stage 1 first"),
    (["--init", "nowhere", "--stage", "1"], "no file at nowhere"), (["--init", "WORLD/vae.safetensors", "--stage", "1"], "FLUX's weights .*missing"),
    (["--init", "WORLD/vae.safetensors", "--stage", "2"], "stage 1's weights .*missing"), (["--stage", "all"], "Questions.csv not found"),
    (["--vae", "WORLD/vae8.safetensors"], "sees 32 pixels, which 64"), (["--stage", "all", "--lr", "1"], "belong to one stage"),
    (["--zeroshot", "folder:nowhere", "--stage", "all"], "one subfolder per class"), (["--shard"], "start it with torchrun"),
    (["--preset", "bench", "--steps", "9"], "of which the first 10 warm up")])
def test_a_mistake_is_one_line(world, tmp_path, monkeypatch, capsys, more, says):
    (world / "empty").mkdir(exist_ok=True)
    if not (world / "vae8.safetensors").exists():
        save_file(AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1,) * 6, num_res_blocks=1, z_channels=4)).state_dict(), world / "vae8.safetensors")
    monkeypatch.setattr(train, "train_stage", lambda *_: pytest.fail("expensive work began") if "--init" not in more else train.build_model(*_))
    monkeypatch.chdir(tmp_path)
    stage = [] if "--stage" in more else ["--stage", "1"]
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, tmp_path / "out", *stage, *(x.replace("WORLD", str(world)) for x in more)))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert stop.value.code == 2 and len(error.splitlines()) == len(lines) and "Traceback" not in error
    assert any(__import__("re").search(says, line) for line in lines), error


@pytest.mark.parametrize("more, says", [
    (["--seed", 1], "seed was 0, is 1"), (["--denoiser", "perceiver"], "denoiser was rf, is perceiver"), (["--lr", 3e-4], "lr was 0.0001, is 0.0003"),
    (["--accum", 1], "micro-batches of a step"), (["--data", "WORLD/other"], "data was 60 images"), (["--stage", "e2e"], "holds another run")])
def test_a_run_goes_on_with_its_own_settings_only(world, trained, tmp_path, capsys, more, says):
    rng = np.random.default_rng(1)
    write_shard(world / "other" / "0.tar", [jpeg(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(5)])
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(world, trained / "rf", "--stage", 1, "--warmup", 0, *(str(x).replace("WORLD", str(world)) for x in more)))
    assert stop.value.code == 2 and says in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ the evaluation

PATTERNS = ["Orientation and Direction", "Presence", "State", "Quantity", "Spatial", "Color", "Structural Character", "Texts", "Caméra"]


def picture(path, rng, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def make_benchmark(folder, per=15, patterns=PATTERNS, interleaved=False):
    """A random benchmark in MMVP-VLM's layout: .jpg, .jpeg and .png, commas and quotes in the statements."""
    rng, rows = np.random.default_rng(0), []
    words = "red green small heart star hollow left of big blue house with the sun two three wing open".split()
    types = [p for _ in range(per) for p in patterns] if interleaved else [p for p in patterns for _ in range(per)]
    for i, pattern in enumerate(types):
        for q in (2 * i + 1, 2 * i + 2):
            picture(folder / "MLLM_VLM Images" / pattern / f"{q}{('.jpg', '.jpeg', '.png')[q % 3]}", rng)
            rows.append([q, pattern, "a " + " ".join(rng.choice(words, rng.integers(2, 9))) + (', "so"' if q % 5 == 0 else "")])
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["Question ID", "Type", "Statement"], *rows])
    return folder


@pytest.fixture(scope="session")
def tiny(world):
    """Two random tiny CLIPs, one a perturbation of the other: (name, the folder of before.pt and after.pt, both loaded)."""
    torch.manual_seed(0)
    before = load_file(world / "tiny-clip.safetensors")
    torch.save(before, world / "before.pt")
    torch.save({k: v + 0.03 * torch.randn_like(v) if k.startswith("visual.") else v for k, v in before.items()}, world / "after.pt")
    return "tiny-clip", world, *(gh.load_clip("tiny-clip", str(world / name)) for name in ("before.pt", "after.pt"))


@pytest.fixture(scope="module")
def benchmark_dir(tmp_path_factory):
    return make_benchmark(tmp_path_factory.mktemp("mmvp"), per=1)


@torch.no_grad()
def naive(clip, preprocess, tokenizer, folder):
    """The official evaluate_vlm.py's loop, pair by pair, by the Type column."""
    right, scores = {}, []
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    for (q1, pattern, s1), (q2, _, s2) in zip(rows[::2], rows[1::2]):
        find = lambda q: next((folder / "MLLM_VLM Images" / pattern).glob(f"{q}.*"))
        images = torch.cat([preprocess(Image.open(find(q))).unsqueeze(0) for q in (q1, q2)])
        picks = []
        for statement in (s1, s2):
            image, text, scale = clip(images, tokenizer(["a photo of " + statement]))[:3]
            scores.append((scale * text @ image.T).softmax(dim=-1)[0, 0].item())
            picks.append("img1" if scores[-1] > 0.5 else "img2")
        right.setdefault(pattern, []).append(picks == ["img1" if int(q) % 2 else "img2" for q in (q1, q2)])
    return {pattern: 100 * sum(group) / len(group) for pattern, group in right.items()}, scores


@pytest.mark.parametrize("interleaved", [False, True])
def test_mmvp_equals_the_protocol_pair_by_pair(tiny, tmp_path, interleaved):
    folder, model = make_benchmark(tmp_path, interleaved=interleaved), tiny[2 + interleaved]
    expected, scores = naive(*model, folder)
    result = eval_mmvp.evaluate_mmvp(*model, folder)
    assert result["patterns"] == expected and list(result["patterns"]) == PATTERNS    # exactly
    assert result["average"] == pytest.approx(sum(expected.values()) / 9, abs=1e-12)
    assert [s for pair in result["pairs"] for s in pair["scores"]] == pytest.approx(scores, abs=1e-5)
    assert len(set(expected.values())) > 1                                            # a test of something
    if interleaved:
        assert result == eval_mmvp.evaluate_mmvp(*model, folder)                      # to the last bit
        assert result["patterns"] == eval_mmvp.evaluate_mmvp(*model, folder, batch_size=7)["patterns"]


def test_mmvp_average_is_over_patterns_and_eval_mode_is_set(tiny, tmp_path):
    folder = make_benchmark(tmp_path, per=4, patterns=["A", "B"])
    lines = (folder / "Questions.csv").read_text().splitlines()
    (folder / "Questions.csv").write_text("\ufeff Question ID , Type ,Statement\n" + "\n\n".join(lines[1:-4]) + "\n,,\n", encoding="utf-8")
    clip, *rest = tiny[2]
    result = eval_mmvp.evaluate_mmvp(clip.train(), *rest, folder)                     # BOM, spaces and blank rows are tolerated
    assert not clip.training and [len(g) for g in eval_mmvp.by_pattern(result["pairs"]).values()] == [4, 2]
    assert result["average"] == pytest.approx(sum(result["patterns"].values()) / 2)


def test_the_callers_tf32_is_left_out_and_restored():
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    with eval_mmvp.exact_float32():
        assert (conv.fp32_precision, matmul.fp32_precision) == ("ieee", "ieee") and not torch.is_grad_enabled()
    assert (conv.fp32_precision, matmul.fp32_precision) == before and torch.is_grad_enabled()


def test_broken_weights_are_refused(tiny, benchmark_dir):
    clip, *rest = gh.load_clip(tiny[0], str(tiny[1] / "before.pt"))
    clip.visual.proj.data[0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        eval_mmvp.evaluate_mmvp(clip, *rest, benchmark_dir)


def edited(change):
    """A mistake in Questions.csv: change(list of lines)."""
    def make(folder):
        lines = (folder / "Questions.csv").read_text(encoding="utf-8").splitlines()
        (folder / "Questions.csv").write_text("\n".join(change(lines)) + "\n", encoding="utf-8")
    return make


def cut_image(folder):
    image = folder / "MLLM_VLM Images" / "Presence" / "5.png"
    image.write_bytes(image.read_bytes()[:200])


@pytest.mark.parametrize("spoil, says", [
    (lambda f: shutil.rmtree(f), r"Questions.csv not found: download MMVP/MMVP_VLM"),
    (lambda f: (f / "Questions.csv").unlink(), r"Questions.csv not found: download"),
    (lambda f: (f / "Questions.csv").write_text(""), r"Questions.csv is empty"),
    (edited(lambda rows: rows[:1]), r"Questions.csv is empty"),
    (lambda f: (f / "Questions.csv").write_bytes(b"\xff\xfe\x00"), r"not a CSV file in UTF-8"),
    (edited(lambda rows: ["ID,Type,Statement"] + rows[1:]), r"row 1: the header must be Question ID,Type,Statement, not ID,Type"),
    (edited(lambda rows: rows[1:]), r"row 1: the header must be"),
    (edited(lambda rows: rows[:-1]), r"row 8: odd number of rows: the last one, id 7, has no partner"),
    (edited(lambda rows: rows[:4] + rows[5:]), r"row 5: the ids of a pair must be odd and the next even, not 3 and 5"),
    (edited(lambda rows: [rows[0], *rows[2:]]), r"row 3: .*not 2 and 3"),
    (edited(lambda rows: rows[:2] + [rows[2].replace("Orientation", "Presence")] + rows[3:]), r"row 3: the pair 1, 2 has two Types, Orientation and Pres"),
    (edited(lambda rows: [row.replace("Presence", "Absence") for row in rows]), r"row 6: image not found: .*Absence.*5.jpg"),
    (edited(lambda rows: rows[:3] + ["3,Orientation,x", "5,Presence,x"] + rows[5:]), r"row 5: the ids of a pair must be .*not 3 and 5"),
    (edited(lambda rows: rows[:3] + ["3,Orientation"] + rows[4:]), r"row 4: must be a number, a Type and a statement"),
    (edited(lambda rows: rows[:3] + ["3,Orientation,a cat, sitting"] + rows[4:]), r"row 4: must be .*in quotes"),
    (edited(lambda rows: rows[:3] + ["three,Orientation,a cat"] + rows[4:]), r"row 4: must be a number"),
    (lambda f: (f / "MLLM_VLM Images" / "Presence" / "7.jpeg").unlink(), r"row 8: image not found: .*7.jpg"),
    (cut_image, r"row 6: cannot decode the image .*5.png"),
    (lambda f: (f / "MLLM_VLM Images" / "Presence" / "5.png").write_text("no image"), r"row 6: cannot decode the image .*5.png"),
])
def test_a_bad_benchmark_is_one_line(tmp_path, spoil, says):
    folder = make_benchmark(tmp_path / "b", per=2, patterns=["Orientation", "Presence"])
    for image in (folder / "MLLM_VLM Images" / "Presence").iterdir():                 # every name is in row id + 1
        if image.stem in "57":
            image.rename(image.with_suffix({"5": ".png", "7": ".jpeg"}[image.stem]))
    eval_mmvp.check_benchmark(folder)
    spoil(folder)
    with pytest.raises(UserError, match=says) as error:
        eval_mmvp.check_benchmark(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_wilson():
    z2 = 1.959964 ** 2
    assert eval_mmvp.wilson(0, 10) == pytest.approx((0, z2 / (10 + z2)))              # closed form at the ends
    assert eval_mmvp.wilson(10, 10) == pytest.approx((10 / (10 + z2), 1))
    assert eval_mmvp.wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)   # .5 -+ z/2 / sqrt(10 + z^2)
    assert eval_mmvp.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)     # Newcombe 1998, Table I
    assert eval_mmvp.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert eval_mmvp.wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert eval_mmvp.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


def test_mcnemar():
    assert eval_mmvp.mcnemar(0, 0) == 1 and eval_mmvp.mcnemar(3, 3) == 1
    assert eval_mmvp.mcnemar(5, 0) == eval_mmvp.mcnemar(0, 5) == 2 / 32
    assert eval_mmvp.mcnemar(8, 2) == 2 * (1 + 10 + 45) / 1024
    assert 0 < eval_mmvp.mcnemar(900, 0) == 2.0 ** -899                              # no overflow
    assert eval_mmvp.mcnemar(500, 400) == pytest.approx(0.000958, abs=2e-5)           # normal, with correction: z = 99/30


def test_bootstrap():
    right = np.array([1.0] * 30 + [0.0] * 70)
    low, high = eval_mmvp.bootstrap([right])
    assert (low, high) == pytest.approx((0.3 - 1.96 * math.sqrt(0.21 / 100), 0.3 + 1.96 * math.sqrt(0.21 / 100)), abs=0.011)
    low, high = eval_mmvp.bootstrap([np.ones(50), np.zeros(50)])                      # stratified: nothing varies within a pattern
    assert (low, high) == (0.5, 0.5)
    groups = [np.array([1.0] * k + [0.0] * (15 - k)) for k in range(9)]
    spread = math.sqrt(sum(g.var() / 15 for g in groups)) / 9
    low, high = eval_mmvp.bootstrap(groups)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.05) and (low, high) == eval_mmvp.bootstrap(groups)
    change = np.array([1.0] * 10 + [-1.0] * 4 + [0.0] * 86)                           # paired: variance of the difference itself
    low, high = eval_mmvp.bootstrap([change])
    assert (low + high) / 2 == pytest.approx(0.06, abs=0.006) and high - low == pytest.approx(2 * 1.96 * math.sqrt(0.1364 / 100), rel=0.06)


def result_of(verdicts):
    """A result with these verdicts: {pattern: string of 0s and 1s}."""
    pairs = [{"ids": (2 * i + 1, 2 * i + 2), "type": name, "statements": ("a", "b"), "images": ("1", "2"), "scores": (0.9, 0.1), "correct": c == "1"}
             for name, string in verdicts.items() for i, c in enumerate(string)]
    patterns = {name: 100 * string.count("1") / len(string) for name, string in verdicts.items()}
    return {"average": sum(patterns.values()) / len(patterns), "patterns": patterns, "pairs": pairs}


def test_table(capsys):
    before, after = result_of({"Color": "0000011111", "Text": "0011"}), result_of({"Color": "1111101111", "Text": "0011"})
    rows = eval_mmvp.summarize({"before": before, "after": after})
    assert [(r["pattern"], r["pairs"], r["change"], r["won"], r["lost"], r["p"]) for r in rows] == [
        ("Color", 10, 40, 5, 1, 2 * 7 / 64), ("Text", 4, 0, 0, 0, 1), ("average", 14, 20, 5, 1, 2 * 7 / 64)]
    assert rows[0]["before"]["interval"] == pytest.approx([100 * x for x in eval_mmvp.wilson(5, 10)])
    low, high = rows[2]["change_interval"]
    assert low < 20 < high
    eval_mmvp.print_table(before, after)
    printed = capsys.readouterr().out
    assert "One pair is worth 5.00 to 12.50 % of the average" in printed and "+40.0" in printed and "0.22" in printed and "before" in printed
    eval_mmvp.print_table(before | {"zeroshot": {"folder accuracy": 98.44}})
    printed = capsys.readouterr().out
    assert "before" not in printed and "folder accuracy" in printed and "98.4" in printed and "50.0 [ 23.7,  76.3]" in printed
    eval_mmvp.print_table(before | {"zeroshot": {"folder accuracy": 98.44}}, after | {"zeroshot": {"folder accuracy": 97.0}})
    assert "98.4     97.0     -1.4" in capsys.readouterr().out


def test_zeroshot_folder_equals_the_naive_one(tiny, tmp_path):
    rng, (clip, preprocess, tokenizer) = np.random.default_rng(1), tiny[2]
    for i in range(30):
        picture(tmp_path / ("red_star", "moon", "big blue house")[i % 3] / f"{i}.{('png', 'jpg')[i % 2]}", rng)
    result = eval_mmvp.evaluate_zeroshot(clip, preprocess, tokenizer, "folder", tmp_path)
    with torch.no_grad():
        names = ["big_blue_house".replace("_", " "), "moon", "red star"]
        texts = clip.encode_text(tokenizer([f"a photo of a {n}." for n in names]), normalize=True)
        hits = [int((clip.encode_image(preprocess(Image.open(f))[None], normalize=True) @ texts.T).argmax()) == names.index(f.parent.name.replace("_", " "))
                for f in tmp_path.glob("*/*")]
    assert result == {"folder accuracy": pytest.approx(100 * sum(hits) / 30, abs=1e-4)} and 0 < sum(hits) < 30


def test_zeroshot_imagenet_wants_its_1000_folders(tiny, tmp_path):
    rng = np.random.default_rng(1)
    for i in range(1000):
        (tmp_path / f"n{i:08}").mkdir()
    picture(tmp_path / "one.png", rng, 8)
    for i in range(1000):
        shutil.copy(tmp_path / "one.png", tmp_path / f"n{i:08}" / "a.png")
    dataset, names, templates = eval_mmvp.check_zeroshot("imagenet", tmp_path)
    assert len(dataset) == len(names) == 1000 and names[0] == "tench" and len(templates) == 80
    shutil.rmtree(tmp_path / "n00000007")
    with pytest.raises(UserError, match="999 class folders.*exactly 1000 subfolders"):
        eval_mmvp.check_zeroshot("imagenet", tmp_path)
    (tmp_path / "tench").mkdir()
    shutil.copy(tmp_path / "one.png", tmp_path / "tench")
    with pytest.raises(UserError, match="1000 class folders, n00000000 to tench"):
        eval_mmvp.check_zeroshot("imagenet", tmp_path)


def test_zeroshot_cifar100_and_sun397_through_torchvision(tiny, tmp_path, monkeypatch):
    rng, base = np.random.default_rng(1), tmp_path / "cifar-100-python"
    base.mkdir()
    names = [f"class_{i}" for i in range(100)]
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    data = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "fine_labels": list(range(20))}
    (base / "test").write_bytes(pickle.dumps(data))
    with pytest.raises(UserError, match="--zeroshot cifar100:.*cifar-100-python.tar.gz"):                  # wrong checksum
        eval_mmvp.check_zeroshot("cifar100", tmp_path)
    monkeypatch.setattr(eval_mmvp.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(eval_mmvp.CIFAR100, "meta", eval_mmvp.CIFAR100.meta | {"md5": None})
    assert 0 <= eval_mmvp.evaluate_zeroshot(*tiny[2], "cifar100", tmp_path)["cifar100 accuracy"] <= 100
    assert eval_mmvp.check_zeroshot("cifar100", tmp_path)[1][7] == "class 7"
    with pytest.raises(UserError, match="--zeroshot sun397:.*SUN397.tar.gz"):
        eval_mmvp.check_zeroshot("sun397", tmp_path)
    picture(tmp_path / "SUN397" / "a" / "abbey" / "sun_1.jpg", rng)
    picture(tmp_path / "SUN397" / "a" / "apartment_building" / "outdoor" / "sun_2.jpg", rng)
    (tmp_path / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/a/apartment_building/outdoor\n")
    assert eval_mmvp.check_zeroshot("sun397", tmp_path)[1] == ["abbey", "apartment building outdoor"]
    assert eval_mmvp.evaluate_zeroshot(*tiny[2], "sun397", tmp_path)["sun397 accuracy"] in (0, 50, 100)


def test_recall_by_hand():
    images = torch.eye(8)                                    # image i points along axis i; captions 2i, 2i + 1 belong to it
    captions = torch.eye(8).repeat_interleave(2, 0)
    owner, index = torch.arange(8).repeat_interleave(2), torch.arange(8)
    assert eval_mmvp.recall(captions, images, owner, index, k=1) == 1 and eval_mmvp.recall(images, captions, index, owner, k=1) == 1
    captions[0] = images[1:7].sum(0) - images[0]             # caption 0 sees six others before its own
    captions[3] = images[:6].sum(0) + torch.arange(6, 0, -1).float() @ images[:6]   # its own image is second
    assert eval_mmvp.recall(captions, images, owner, index) == 15 / 16
    assert eval_mmvp.recall(captions, images, owner, index, k=1) == 14 / 16
    assert eval_mmvp.recall(images, captions, index, owner) == 1   # image 0 still has caption 1: any of its captions


@pytest.mark.parametrize("name, sub", [("flickr30k", None), ("coco", "val2014")])
def test_retrieval_equals_the_naive_one(tiny, tmp_path, name, sub):
    rng, entries = np.random.default_rng(2), []
    words = "red green small heart star hollow left of big blue house with sun two three wing open".split()
    for i in range(24):
        entries.append({"filename": f"{i}.jpg", "split": "test" if i % 6 else "train", **({"filepath": sub} if sub else {}),
                        "sentences": [{"raw": " ".join(rng.choice(words, 6))} for _ in range(5 + i % 2)]})
        if i % 6:
            picture(tmp_path / (sub or "") / f"{i}.jpg", rng)
    (tmp_path / f"dataset_{name}.json").write_text(json.dumps({"images": entries}))
    clip, preprocess, tokenizer = tiny[2]
    result = eval_mmvp.evaluate_zeroshot(clip, preprocess, tokenizer, name, tmp_path, batch_size=7)
    test = [e for e in entries if e["split"] == "test"]
    with torch.no_grad():
        images = [clip.encode_image(preprocess(Image.open(tmp_path / (sub or "") / e["filename"]))[None], normalize=True)[0] for e in test]
        texts = [[clip.encode_text(tokenizer([s["raw"]]), normalize=True)[0] for s in e["sentences"][:5]] for e in test]
    found = [sum(float(t @ other) > float(t @ images[i]) for other in images) < 5 for i, group in enumerate(texts) for t in group]
    flat = [(float(0), i, t) for i, group in enumerate(texts) for t in group]
    any_found = [i in {owner for _, owner, _ in sorted(((-float(t @ image), owner, n) for n, (_, owner, t) in enumerate(flat)))[:5]}
                 for i, image in enumerate(images)]
    assert result[f"{name} image recall@5"] == pytest.approx(100 * np.mean(found), abs=1e-4)
    assert result[f"{name} text recall@5"] == pytest.approx(100 * np.mean(any_found), abs=1e-4)
    os.remove(tmp_path / (sub or "") / "7.jpg")
    with pytest.raises(UserError, match=r"1 of 20 test images missing, first .*7.jpg: PATH must be a folder with Karpathy"):
        eval_mmvp.check_zeroshot(name, tmp_path)
    (tmp_path / f"dataset_{name}.json").write_text('{"images": [')
    with pytest.raises(UserError, match="PATH must be"):
        eval_mmvp.check_zeroshot(name, tmp_path)


@pytest.mark.parametrize("name, says", [
    ("cifar10", "unknown set cifar10: choose from cifar100, sun397, imagenet"), ("folder", "one subfolder per class"),
    ("cars", "one subfolder per class"), ("imagenet", "exactly 1000"), ("coco", "dataset_coco.json"), ("flickr30k", "dataset_flickr30k.json")])
def test_zeroshot_says_what_to_put_where(tmp_path, name, says):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"--zeroshot {name}:.*{says}"):
            eval_mmvp.check_zeroshot(name, path)


def test_a_worker_process_reports_one_line(tiny, tmp_path, monkeypatch, capsys, benchmark_dir):
    for i in range(3):
        picture(tmp_path / "zs" / "cat" / f"{i}.png", np.random.default_rng(i))
    (tmp_path / "zs" / "cat" / "9.png").write_text("no image")
    monkeypatch.setattr(eval_mmvp, "MANY", 3)
    monkeypatch.setattr(eval_mmvp, "evaluate_mmvp", lambda *_: result_of({"A": "01"}))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(SystemExit):
        eval_mmvp.main(["--backbone", tiny[0], "--weights", str(tiny[1] / "after.pt"), "--benchmark", str(benchmark_dir), "--zeroshot", f"folder:{tmp_path / 'zs'}"])
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command(tiny, tmp_path, capsys):
    name, folder, *_ = tiny
    benchmark_dir = make_benchmark(tmp_path / "b", per=3)
    rng = np.random.default_rng(1)
    for i in range(12):
        picture(tmp_path / "zs" / ("cat", "dog")[i % 2] / f"{i}.png", rng)
    outputs = [tmp_path / f"o.{suffix}" for suffix in ("csv", "json", "png")]
    command = ["--backbone", name, "--benchmark", str(benchmark_dir), "--weights", str(folder / "after.pt"), "--baseline", str(folder / "before.pt"),
               "--zeroshot", f"folder:{tmp_path / 'zs'}", "--device", "cpu", "--csv", str(outputs[0]), "--json", str(outputs[1]), "--picture", str(outputs[2])]
    runs = []
    for _ in range(2):
        eval_mmvp.main(command)
        runs.append([capsys.readouterr().out, *(o.read_bytes() for o in outputs)])
    assert runs[0] == runs[1]                                                         # two runs print the same digits
    summary, rows = json.loads(outputs[1].read_text()), list(csv.DictReader(outputs[0].open(encoding="utf-8")))
    assert set(summary["before"]) == set(summary["after"]) == {"average", "patterns", "zeroshot"} and list(summary["after"]["zeroshot"]) == ["folder accuracy"]
    assert len(rows) == 27 and len(summary["rows"]) == 10 and "3.70 %" in runs[0][0]
    for model in ("before", "after"):
        share = {p: 100 * np.mean([int(r[f"{model}_correct"]) for r in rows if r["pattern"] == p]) for p in PATTERNS}
        assert summary[model]["patterns"] == pytest.approx(share)
        assert all(int(r[f"{model}_correct"]) == (float(r[f"{model}_score_1"]) > 0.5 >= float(r[f"{model}_score_2"])) for r in rows)
    won, lost = (sum(r["before_correct"] == old != r["after_correct"] for r in rows) for old in "01")
    assert (summary["rows"][-1]["won"], summary["rows"][-1]["lost"]) == (won, lost) and won + lost > 0
    assert Image.open(outputs[2]).format == "PNG" and not list(tmp_path.glob("*.tmp"))
    eval_mmvp.main(command[:6])                                                       # alone, without a baseline
    assert "change" not in capsys.readouterr().out


def test_the_picture(tmp_path):
    for i, size in enumerate([(40, 40), (900, 300)]):
        Image.new("RGB", size, ("orange", "navy")[i]).save(tmp_path / f"{i}.png")
    before, after = result_of({"Color": "0" * 40 + "1" * 20}), result_of({"Color": "1" * 40 + "0" * 20})
    for result in (before, after):
        for pair in result["pairs"]:
            pair.update(images=(tmp_path / "0.png", tmp_path / "1.png"), statements=("an orange square " * 9, "x"),
                        scores=(0.9, 0.1) if pair["correct"] else (0.9, 0.9))
    eval_mmvp.draw_changes(tmp_path / "many.png", before, after)
    many = Image.open(tmp_path / "many.png").convert("RGB")
    assert many.size == (4 * 440 + 20, 80 + 6 * 420)                                  # 24 of the 60, 16 won and 8 lost
    corner = [many.getpixel((16 + i % 4 * 440, 81 + i // 4 * 420)) for i in range(24)]
    assert corner == [(21, 128, 61)] * 16 + [(220, 38, 38)] * 8
    eval_mmvp.draw_changes(tmp_path / "none.png", before, before)
    assert Image.open(tmp_path / "none.png").size[1] == 80


@pytest.mark.parametrize("flags, says", [
    ([], "no benchmark: download MMVP/MMVP_VLM from Hugging Face"),
    (["--benchmark", "nowhere"], "Questions.csv not found"),
    (["--benchmark", "B", "--zeroshot", "folder"], "--zeroshot folder:: "),
    (["--benchmark", "B", "--zeroshot", "folder:a", "folder:b"], "each NAME can be given once"),
    (["--benchmark", "B", "--zeroshot", "mnist:a"], "unknown set mnist"),
    (["--benchmark", "B", "--weights", "nowhere.pt"], "nowhere.pt"),
    (["--benchmark", "B", "--baseline", "nowhere.pt"], "nowhere.pt"),
    (["--benchmark", "B", "--csv", "no/such/folder.csv"], "make its folder first"),
    (["--benchmark", "B", "--json", "."], "name a file in it"),
    (["--benchmark", "B", "--picture", "p.png"], "--picture shows"),
    (["--benchmark", "B", "--batch-size", "0"], "--batch-size 0"),
    (["--benchmark", "B", "--device", "gpu7"], "--device gpu7"),
    (["--benchmark", "B", "--backbone", "nonsense"], "nonsense"),
])
def test_a_bad_command_is_one_line_before_any_model(tiny, benchmark_dir, monkeypatch, capsys, flags, says):
    def forbidden(*_):
        raise AssertionError("a model was loaded")
    monkeypatch.setattr(eval_mmvp, "load_clip", forbidden)
    given = ["--backbone", tiny[0], "--weights", str(tiny[1] / "after.pt"), *flags]
    with pytest.raises(SystemExit) as stop:
        eval_mmvp.main([str(benchmark_dir) if flag == "B" else flag for flag in given])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("eval_mmvp.py: ") and says in error


def test_baseline_original_needs_weights(capsys, benchmark_dir):
    with pytest.raises(SystemExit):
        eval_mmvp.main(["--benchmark", str(benchmark_dir), "--baseline", "original"])
    assert "--weights FILE" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ the ablations

def test_ablations_compare_at_equal_retention():
    point = lambda zeroshot, pairs: {"test": {"zeroshot": zeroshot, "pairs": pairs}}
    curve = [point(80, 50), point(78, 54), point(76, 56), point(77, 58)]        # retention 1, .975, .95, .9625
    assert ablate.at_retention(curve, .975) == pytest.approx(54) and ablate.at_retention(curve, .9625) == pytest.approx(55)
    assert ablate.at_retention(curve, .98) == pytest.approx(50 + 4 * .8) and math.isnan(ablate.at_retention(curve, .9))


def test_ablations_give_students_interval_over_clips():
    mean, half, words = ablate.interval([1.0, 2.0, math.nan, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** .5) and words == "+2.0 ± 2.5 (3 of 4)"    # two degrees of freedom
    assert ablate.interval([1.0, 2.0])[2] == "+1.5" and ablate.interval([math.nan])[2] == "not reached"
    mean, half, words = ablate.interval([1.0, 2.0], noise=(0.5, 17))                                  # of differences, by the pooled spread
    assert half == pytest.approx(2.131 * 0.5) and words == "+1.5 ± 1.1" and ablate.interval([1.0], noise=(0.5, 17))[2] == "+1.0"


def test_ablations_pool_what_neither_arm_nor_clip_explains():
    table = np.random.default_rng(0).normal(size=(5, 3))
    noise, dof = ablate.residual({(f"arm {i}", f"clip {j}"): table[i, j] + 10 * i + 100 * j for i in range(5) for j in range(3)})
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert dof == 8 and noise == pytest.approx((rest ** 2).sum() ** .5 / 8 ** .5)                     # the closed form of a balanced table
    assert ablate.residual({("a", "0"): 1.0, ("a", "1"): 2.0, ("b", "0"): 4.0, ("b", "1"): math.nan})[1] == 0


def test_ablations_reach_a_verdict_only_where_the_interval_allows_it():
    for expected, mean, half, says in ((-1, -3, 1, "reproduces"), (-1, 3, 1, "does not"), (-1, -3, 4, "undecided"), (1, 3, 1, "reproduces"), (0, 0, 1.9, "reproduces"),
                                       (0, 5, 1, "does not"), (0, 1.8, 1, "undecided"), ("<=", -5, 1, "reproduces"), ("<=", 5, 1, "does not"), (-1, -9, math.nan, "undecided (too few CLIPs)")):
        assert ablate.verdict(mean, half, expected) == says, (expected, mean, half)


def test_ablations_remember_a_result_by_what_it_depends_on(tmp_path):
    class Slow:
        calls = 0

        def double(self, x):
            self.calls += 1
            return 2 * x, []

    ablate.remember(Slow, "double", str(tmp_path), lambda _, x: np.ascontiguousarray(x))
    slow, x = Slow(), torch.randn(3, 4)
    for value in (x, x.clone(), x + 1, x + 1):
        assert torch.equal(slow.double(value)[0], 2 * value)
    assert slow.calls == 2 and len(os.listdir(tmp_path)) == 2


def test_the_ablations_reader_reads_what_is_linear_in_its_features_and_nothing_else():
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    scenes = [make_toy.sample_scene(rng) for _ in range(600)]
    sunny = torch.tensor([[scene["presence"] == "sunny"] for scene in scenes]).float()
    features = torch.cat([3 + 2 * sunny @ torch.randn(1, 6, generator=generator), torch.randn(600, 4, generator=generator)], dim=1)
    right = ablate.percent(ablate.fit_reader(features[:400], scenes[:400], 1e-2)(features[400:], scenes[400:]))
    assert right.keys() == make_toy.VALUES.keys() and right.pop("presence") == 100
    for attribute, percent in right.items():
        chance = 100 / len(make_toy.VALUES[attribute])
        assert abs(percent - chance) < 4 * (chance * (100 - chance) / 200) ** .5, attribute    # four standard errors of 200 draws
