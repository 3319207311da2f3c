"""`pytest test_genhancer.py`: on the CPU, without downloads, in under two minutes.

Truth comes from elsewhere: golden outputs of FLUX's and taming's own implementations (toy/golden),
closed forms, the benchmark's own protocol written out pair by pair, a second process, a perturbed
round trip.
"""
import argparse
import ast
import copy
import csv
import dataclasses
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
import traceback
import types
import zlib
from collections import OrderedDict
from contextlib import ExitStack, nullcontext, redirect_stdout
from fractions import Fraction
from functools import lru_cache

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.distributed.run as torchrun_command
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import eval_mmvp
import genhancer as gh
import toy.ablate as ablate
import toy.make_toy as make_toy
import train
import vae as vae_file
import vqgan as vqgan_file
from eval_mmvp import find_backbone, load_clip
from genhancer import UserError
from vae import AutoEncoder, AutoEncoderConfig, load_vae

gc.freeze()  # the collector need not look through all that the imports made
torch.set_num_threads(1)  # a fork of a process whose threads have computed can hang

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()  # of the tests that ask for a device
HERE = os.path.dirname(os.path.abspath(gh.__file__))
GOLDEN = os.path.join(HERE, "toy", "golden")

both_denoisers = pytest.mark.parametrize("kind", ["rf", "perceiver"])
both_families = pytest.mark.parametrize("clip", ["tiny-clip", "tiny-siglip"])

TINY_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY_SIGLIP = open_clip.get_model_config("ViT-B-16-SigLIP") | {"embed_dim": 48}
TINY_SIGLIP["vision_cfg"] |= {"image_size": 32, "timm_model_name": "tiny_siglip_tower"}
TINY_SIGLIP["text_cfg"] |= {"context_length": 16, "vocab_size": 320}
TINY_SIGLIP["text_cfg"] |= {"width": 48, "heads": 4, "layers": 2}
for download in ("hf_tokenizer_name", "tokenizer_kwargs"):
    del TINY_SIGLIP["text_cfg"][download]
TINY_SIGLIP2 = copy.deepcopy(TINY_SIGLIP)
TINY_SIGLIP2["vision_cfg"]["timm_model_name"] = "tiny_siglip2_tower"
TINY_SIGLIP2["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
TINY = {
    "tiny-clip": TINY_CLIP,
    "tiny-siglip": TINY_SIGLIP,
    "tiny-gelu": TINY_CLIP | {"quick_gelu": False},
    "tiny-siglip2": TINY_SIGLIP2,
}
LOOK = {"mean": [0.1] * 3, "std": [0.2] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
TINY_VAE = AutoEncoderConfig(
    ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4, scale_factor=0.5, shift_factor=0.1
)
TINY_VQGAN = vqgan_file.VQGANConfig(
    ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(128,),
    z_channels=16, n_embed=64, embed_dim=8,
)


@timm.models.register_model
def tiny_siglip_tower(pretrained, pretrained_cfg, pretrained_cfg_overlay, cache_dir, **options):
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
    shape |= dict(class_token=False, global_pool="map", num_classes=0)
    return timm.models.vision_transformer.VisionTransformer(**{**shape, **options})


@timm.models.register_model
def tiny_siglip2_tower(**options):
    return tiny_siglip_tower(act_layer="gelu_tanh", **options)

@pytest.fixture(autouse=True)
def same_everywhere(monkeypatch):
    """Every test draws the same, alone or after others, and leaves a GPU to those processes that
    it starts."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random tiny models in the published formats, and noise for images in two shards."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    for name, config in TINY.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    register(folder)
    for name in TINY:
        clip = open_clip.create_model(name, load_weights=False)
        perturb(clip)
        save_file(clip.state_dict(), folder / f"{name}.safetensors")
        eval_mmvp.BACKBONES[name] = f"{name}:no tag"
    squash = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    open_clip.pretrained._PRETRAINED["tiny-siglip"] = {"no tag": squash}
    open_clip.pretrained._PRETRAINED["tiny-gelu"] = {"it": {"quick_gelu": True, **LOOK}}

    for name, module in (("vae", AutoEncoder(TINY_VAE)), ("vqgan", vqgan_file.VQGAN(TINY_VQGAN))):
        about = {name: dataclasses.asdict(module.config)}
        gh.write_weights(folder / f"{name}.safetensors", module.state_dict(), about)

    rng = np.random.default_rng(0)
    for shard in range(2):
        images = [jpeg(noise_image(rng, 40, 50)) for _ in range(30)]
        write_shard(folder / "data" / f"{shard:05}.tar", images)
    return folder


def register(folder):
    """Make the tiny models known to open_clip and to load_clip."""
    for name in TINY:
        open_clip.add_model_config(os.path.join(folder, f"{name}.json"))
    os.environ["TINY_WORLD"] = str(folder)  # for processes that are not forked


@torch.no_grad()
def perturb(module, std=0.03):
    """Move every parameter off its initial value, so that a round trip proves something."""
    for parameter in module.parameters():
        parameter += std * torch.randn_like(parameter)


def noise_image(rng, height, width):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def write_shard(path, images):
    """A tar shard as img2dataset writes it: a jpg, a txt and a json for each sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(images):
            for suffix, content in (("jpg", data), ("txt", b"a caption"), ("json", b"{}")):
                member = tarfile.TarInfo(f"{path.stem}{i:04}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def golden(name):
    return load_file(os.path.join(GOLDEN, f"{name}.safetensors"))


@torch.no_grad()
def fill(module, std):
    """The parameters with which the golden outputs were made."""
    for name, parameter in module.named_parameters():
        parameter.copy_(filling(name, parameter.shape, std))
    return module.eval().requires_grad_(False)


def filling(name, shape, std):
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = zlib.crc32(name.encode()) % 1000
    value = std * math.sqrt(2) * torch.sin(1.7 * k + 0.013 * k * k + phase)
    if name.endswith(".scale") or (name.endswith(".weight") and "norm" in name):
        value += 1
    return value.view(shape).float()


def assert_close(a, b, tolerance=1e-4):
    """Relative error of the whole tensor."""
    assert (a - b).norm() <= tolerance * b.norm()


def refused(call, subject, *words):
    """call(subject) ends in a UserError: one line, which names the subject and says the words."""
    with pytest.raises(UserError) as error:
        call(subject)
    message = str(error.value)
    assert "\n" not in message
    for word in (subject, *words):
        assert str(word) in message, message


def watch(monkeypatch, owner, name):
    """Let owner.name do what it does; a list of its arguments, filled at each call."""
    real, calls = getattr(owner, name), []

    def watched(*arguments, **more):
        calls.append(arguments)
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, watched)
    return calls


def fails(error):
    """What raises this error, whatever it is called with."""

    def fail(*_, **__):
        raise error

    return fail


def tiny_model(world, kind="rf", clip="tiny-clip", **options):
    """A GenHancer of a few thousand parameters; kind: "rf" or "perceiver"."""
    return copy.deepcopy(built_model(world, kind, clip, tuple(options.items())))


@lru_cache  # making it takes longer than most tests
def built_model(world, kind, clip, options):
    visual = load_clip(clip, str(world / f"{clip}.safetensors"))[0].visual
    options = dict(options)
    torch.manual_seed(1)
    if kind == "rf":
        config = gh.FluxConfig(
            in_channels=16, context_in_dim=48, hidden_size=64, num_heads=2,
            depth=1, depth_single_blocks=1, axes_dim=(8, 12, 12),
        )
        vae = load_vae(world / "vae.safetensors")
        return gh.Continuous(visual, vae, gh.Flux(config), **options)
    vqgan = vqgan_file.load_vqgan(world / "vqgan.safetensors")
    config = gh.PerceiverConfig(n_embed=64, embed_dim=8, width=32, num_heads=2, layers=2)
    denoiser = gh.Perceiver(config, vqgan.quantize.embedding.weight)
    return gh.Discrete(visual, vqgan, denoiser, **options)


def forget(end):
    """Free what the failed program held: a DataLoader that waits for the garbage collector to end
    its workers then waits 5 s for each."""
    traceback.clear_frames(end.value.__context__.__traceback__)


# ------------------------------------------------------------------ parity with FLUX and taming


def test_vae_equals_flux():
    truth = golden("flux_ae_tiny")
    vae = fill(AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1, 2, 4))), 0.05)
    mean, logvar = vae.moments(truth["image"])
    assert_close(mean, truth["mean"])
    assert_close(logvar, truth["logvar"])
    assert_close(vae.encode(truth["image"], sample=False), truth["latent_of_mean"])
    assert_close(vae.decode(truth["latent_of_mean"]), truth["decoded"])
    # By default the posterior is sampled.
    torch.manual_seed(0)
    sample = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    torch.manual_seed(0)
    assert_close(vae.encode(truth["image"]), 0.3611 * (sample - 0.1159))


def test_vqgan_equals_taming():
    layout = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=16, n_embed=64)
    layout |= dict(attn_resolutions=(8,), resolution=32, embed_dim=8)
    truth = golden("vqgan_tiny")
    vqgan = fill(vqgan_file.VQGAN(vqgan_file.VQGANConfig(**layout)), 0.1)
    vqgan.quantize.embedding.weight.copy_(truth["codebook"])
    assert_close(vqgan.pre_quantize(truth["image"]), truth["pre_quant"])
    assert torch.equal(vqgan.encode(truth["image"]), truth["indices"])
    assert_close(vqgan.decode(truth["indices"]), truth["decoded"])


def test_the_nearest_code_is_found_in_float32_under_autocast():
    quantizer = vqgan_file.VectorQuantizer(500, 4)
    z = torch.randn(2, 4, 6, 7)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 4).double()
    distances = torch.cdist(vectors, quantizer.embedding.weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(z).flatten(), distances.argmin(1))


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name, make, parameters", [
    ("flux_ae", lambda: AutoEncoder(AutoEncoderConfig()), 83_819_683),
    ("vqgan_f16_1024", lambda: vqgan_file.VQGAN(vqgan_file.VQGANConfig(n_embed=1024)), 72_141_699),
    ("vqgan_f16_16384", lambda: vqgan_file.VQGAN(vqgan_file.VQGANConfig()), 76_073_859),
    ("flux_2_4", lambda: gh.Flux(gh.FluxConfig()), 1_310_154_816),  # the paper's 1.31B
    (None, lambda: gh.Flux(gh.FluxConfig(depth=19, depth_single_blocks=38)), 11_901_408_320),
    # The two projectors of a [CLS] of 768, as the official code has them.
    (None, lambda: nn.ModuleList(gh.Projector(768, width) for width in (768, 4096)), 21_115_392),
])
def test_full_size_modules_are_the_published_ones(name, make, parameters):
    with torch.device("meta"):
        module = make()
    assert count_parameters(module) == parameters
    if name:
        with open(os.path.join(GOLDEN, f"keys_{name}.json")) as file:
            shapes = json.load(file)["shapes"]
        assert {key: list(value.shape) for key, value in module.state_dict().items()} == shapes
    norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm)]
    assert all((norm.num_groups, norm.eps) == (32, 1e-6) for norm in norms)  # as in both codes


# ------------------------------------------------------------------ the autoencoders' files

CONV_IN, BIAS = "encoder.conv_in.weight", "encoder.conv_in.bias"
CODES, BLOCK = "quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight"


def save_changed(source, changes, path):
    """A file of weights with some of its tensors changed, or left out where the change is None."""
    tensors, about = gh.read_weights(source, "it")
    tensors = tensors | changes
    kept = {name: tensors[name] for name in tensors if tensors[name] is not None}
    gh.write_weights(path, kept, about)


def convert(path):
    vqgan_file.convert(path, f"{path}.out")


@pytest.fixture
def published(monkeypatch):
    """The tiny autoencoders' configurations in place of the published ones."""
    replace = dataclasses.replace
    monkeypatch.setattr(vae_file, "AutoEncoderConfig", functools.partial(replace, TINY_VAE))
    monkeypatch.setattr(vqgan_file, "VQGANConfig", functools.partial(replace, TINY_VQGAN))


LOADERS = [(load_vae, "vae"), (vqgan_file.load_vqgan, "vqgan")]


def test_the_configuration_stands_in_the_file_or_is_the_published_one(world, tmp_path):
    for (load, name), tiny in zip(LOADERS, (TINY_VAE, TINY_VQGAN), strict=True):
        config = load(world / f"{name}.safetensors").config
        assert json.dumps(vars(config)) == json.dumps(vars(tiny))
        save_file(load_file(world / f"{name}.safetensors"), tmp_path / "it")  # says nothing
        refused(load, tmp_path / "it", "decoder.conv_in.bias must be [512], not [")


def test_a_published_vqgan_has_as_many_codes_as_its_file_and_maybe_its_loss(
        world, published, tmp_path):
    loss = {"loss.discriminator.steps": torch.zeros(3, dtype=torch.int64)}
    tensors = load_file(world / "vqgan.safetensors") | loss
    for codes in (16, 64):
        save_file(tensors | {CODES: tensors[CODES][:codes].clone()}, tmp_path / "it")
        config = vqgan_file.load_vqgan(tmp_path / "it").config
        assert config == dataclasses.replace(TINY_VQGAN, n_embed=codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_autoencoders_of_any_precision_load_as_float32_frozen(world, tmp_path, dtype):
    for load, name in LOADERS:
        tensors = load_file(world / f"{name}.safetensors")
        changes = {key: value.to(dtype) for key, value in tensors.items()}
        save_changed(world / f"{name}.safetensors", changes, tmp_path / "it")
        module = load(tmp_path / "it")
        assert not module.training
        for key, parameter in module.named_parameters():
            assert not parameter.requires_grad
            assert torch.equal(parameter, tensors[key].to(dtype).float())


@pytest.mark.parametrize("load, hint, says", [
    (load_vae, "--vae", "not a complete safetensors file"),
    (vqgan_file.load_vqgan, "--vqgan", "not a complete safetensors file"),
    (convert, "VQ-GAN checkpoint", "nothing in it was run: download it again"),
])
def test_what_is_no_whole_file_is_refused(world, checkpoint, tmp_path, load, hint, says):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "fifo", ""):
        refused(load, path, "not found", hint)
    wholes = [path.read_bytes() for path in (world / "vqgan.safetensors", checkpoint)]
    parts = [whole[:size] for whole in wholes for size in (0, 5, 100, 1000, -1)]
    for content in (*parts, b"\x80", b".", b"<html>", bytes(1000)):
        (tmp_path / "cut").write_bytes(content)
        refused(load, tmp_path / "cut", hint, says)


@pytest.mark.parametrize("key, value, says", [
    # A tensor of both autoencoders, what stands there instead, what the line says.
    ("something.weight", torch.zeros(1), "something.weight must be absent, not [1]"),
    (BIAS, None, f"{BIAS} must be [32], not absent"),
    (CONV_IN, torch.zeros(0, 3, 3, 3), f"{CONV_IN} must be [32, 3, 3, 3], not [0, 3, 3, 3]"),
    (BLOCK, torch.zeros(32, 32, 9), f"{BLOCK} must be [32, 32, 3, 3], not [32, 32, 9]"),
    (BIAS, torch.ones(32, dtype=torch.int8), f"{BIAS} must be [32], not [32] of torch.int8"),
    (BIAS, torch.tensor(31 * [0.0] + [math.nan]), f"{BIAS} that are not finite"),
    (BIAS, torch.full((32,), 1e300, dtype=torch.float64), f"{BIAS} that are not finite"),
])
def test_a_tensor_that_does_not_fit_is_refused(world, tmp_path, key, value, says):
    for load, name in LOADERS:
        save_changed(world / f"{name}.safetensors", {key: value}, tmp_path / "it")
        refused(load, tmp_path / "it", says)


# ------------------------------------------------------------------ the converter


@pytest.fixture
def state(world, published):
    return load_file(world / "vqgan.safetensors")


@pytest.fixture
def checkpoint(state, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_lightning_checkpoint_of_tensors_of_every_kind_is_converted(
    state, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    state[BIAS] = torch.ones(1).expand(32)
    state[BLOCK] = nn.Parameter(state[BLOCK])
    state[CODES] = state[CODES].mT.contiguous().mT
    state["quant_conv.weight"] = state["quant_conv.weight"].half()
    state["encoder.norm_out.weight"] = state["encoder.norm_out.bias"]  # one tensor, two names
    loss = {"loss.logvar": torch.zeros(1), "loss.name": "lpips"}
    lightning = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": lightning})
    content = {"state_dict": {**loss, **state}, "unet": torch.ones(1), "callbacks": {callback: {}}}
    with monkeypatch.context() as patch:  # Lightning is there when it is saved
        for name in ("pytorch_lightning", lightning):
            patch.setitem(sys.modules, name, types.SimpleNamespace(ModelCheckpoint=callback))
        torch.save(content, "last.ckpt")
    vqgan_file.run(["last.ckpt", "it.safetensors"])
    assert "under 'state_dict.'; 1 other tensors are ignored" in capsys.readouterr().err
    converted = load_file("it.safetensors")
    assert converted.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(converted[name], value.float())
    vqgan_file.load_vqgan("it.safetensors")


@pytest.mark.parametrize("value", [
    "text", torch.tensor(0), torch.ones(32).to_sparse(), torch.ones(32, device="meta"),
])
def test_a_value_that_is_no_ordinary_tensor_is_refused_by_name(state, tmp_path, value):
    path = tmp_path / "last.ckpt"
    for name in (BIAS, CODES, "other"):
        torch.save({"state_dict": state | {name: value}}, path)
        refused(convert, path, name)
    assert os.listdir(tmp_path) == ["last.ckpt"]


WITHIN_ITSELF = {}
WITHIN_ITSELF["it"] = WITHIN_ITSELF


@pytest.mark.parametrize("content, says", [
    ([1, 2], "no state dict"),
    ({"state_dict": [1, 2]}, "must be [512], not absent"),
    ({"state_dict": {}}, "no state dict"),
    ({"a": {CODES: 0}, "b": {CODES: 0}}, f"several models (a.{CODES} and b.{CODES})"),
    (WITHIN_ITSELF, "cannot be read safely (RecursionError)"),
])
def test_a_checkpoint_of_anything_else_is_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "it")
    refused(convert, tmp_path / "it", says)


class Call(tuple):
    """What a pickle calls when it is read: a function, then its arguments."""

    def __reduce__(self):
        return self[0], self[1:]


@pytest.mark.parametrize("payload, says", [
    (Call((os.system, "mkdir owned")), "it asks for posix.system"),
    (Call((eval, "__import__('os').mkdir('owned')")), "it asks for eval"),
    (Call((bytearray, 10**15)), "MemoryError"),
    (Fraction(1, 2), "it asks for fractions.Fraction"),
    # NumPy would take its bytes for the addresses of objects.
    (np.array([(None,)], dtype=[("field", object)])[0], "UnpicklingError"),
])
def test_reading_a_checkpoint_runs_none_of_its_code(tmp_path, monkeypatch, payload, says):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": payload}, "beside.ckpt")
    (tmp_path / "alone.ckpt").write_bytes(pickle.dumps(payload, protocol=2))
    for path in ("beside.ckpt", "alone.ckpt"):
        line = f"{path} cannot be read safely ({says})"
        refused(convert, path, line)
        refused(lambda path: load_clip("toy", path), path, line)
    assert sorted(os.listdir()) == ["alone.ckpt", "beside.ckpt"]


def test_a_checkpoint_is_not_written_over(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    link = tmp_path / "link.ckpt"
    os.link(checkpoint, link)
    for target in (checkpoint, link):
        write = functools.partial(vqgan_file.convert, target=target)
        refused(write, checkpoint, "both input and output")
        assert target.read_bytes() == content


# ------------------------------------------------------------------ reading and writing files


def test_loaded_weights_do_not_depend_on_the_file_any_more(tmp_path):
    path = tmp_path / "it.safetensors"
    save_file({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, path)
    tensors, _ = gh.read_weights(path, "weights")
    module = gh.load_strictly(nn.Linear(1, 1), tensors, path, "weights")
    path.write_bytes(bytes(path.stat().st_size))
    assert module.weight.item() == module.bias.item() == 1


def test_files_get_the_permissions_that_the_umask_gives_if_there_are_any(tmp_path, monkeypatch):
    for umask in (0o002, 0o077):
        before = os.umask(umask)
        gh.write_weights(tmp_path / "it.safetensors", {"a": torch.zeros(1)})
        gh.write_json(tmp_path / "it.json", {"a": umask})
        os.umask(before)
        for file in tmp_path.iterdir():
            assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    monkeypatch.setattr(os, "chmod", fails(PermissionError(1, "Operation not permitted")))
    gh.write_json(tmp_path / "it.json", "new")
    assert json.loads((tmp_path / "it.json").read_text()) == "new"


def test_what_is_not_synced_is_not_moved_into_place_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "it.json"
    path.write_text("old")
    full = OSError(28, "No space left on device")
    for error, reason in ((full, "No space left on device"), (SafetensorError("no"), "no")):
        monkeypatch.setattr(os, "fsync", fails(error))
        refused(lambda path: gh.write_json(path, 1), path, f"could not be written ({reason})")
    monkeypatch.setattr(os, "fsync", fails(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gh.write_json(path, 1)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["it.json"]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    names = ["folder", "folder/", "new/", "file/below", "a" * 300]
    for path in ("", *(f"{tmp_path}/{name}" for name in names), "/proc/it"):
        refused(lambda path: gh.write_json(path, 1), path)
        refused(lambda path: gh.write_weights(path, {}), path)


@pytest.mark.parametrize("old, new", [
    (b"weight", b"height"), (b"F16", b"I16"), (b"[2,3]", b"[3,2]"), (b"step", b"stop"),
    (b"\0E", b"\0F"),  # 5.0 becomes 6.0
])
def test_any_change_of_what_was_written_is_noticed(tmp_path, old, new):
    path = tmp_path / "it.safetensors"
    gh.write_weights(path, {"weight": torch.arange(6).half().view(2, 3)}, {"step": 3})
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    refused(lambda path: gh.read_weights(path, "it"), path, "is damaged")


# ------------------------------------------------------------------ the command line


def command(capsys, run, *argv):
    """The exit status and stderr of a program."""
    with pytest.raises(SystemExit) as end:
        gh.run_command("it.py", run, argv)
    forget(end)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, status, line", [
    (UserError("x: no such thing"), 2, "it.py: x: no such thing\n"),
    (UserError("a\x1b[31m\n\u202eé日 is bad"), 2, "it.py: a\\x1b[31m\\n\\u202eé日 is bad\n"),
    (KeyboardInterrupt(), 130, "\nit.py: interrupted\n"),  # a shell's status
])
def test_a_failed_command_is_one_line_that_controls_no_terminal(capsys, error, status, line):
    assert command(capsys, fails(error)) == (status, line)


def test_a_mistake_in_a_data_worker_is_one_line(capsys):
    collate = fails(UserError("it is cut"))
    loader = torch.utils.data.DataLoader([0], num_workers=1, collate_fn=collate)
    assert command(capsys, lambda argv: list(loader)) == (2, "it.py: it is cut\n")


# ------------------------------------------------------------------ what trains, what is returned

EITHER = (False, True)
STAGES = [  # stage, lora, freeze_denoiser, what trains
    *[(1, lora, freeze, {"projectors", "denoiser"}) for lora in EITHER for freeze in EITHER],
    (2, True, False, {"adapters", "projectors", "denoiser"}),
    (2, True, True, {"adapters"}),
    (2, False, False, {"visual", "projectors", "denoiser"}),
    (2, False, True, {"visual"}),
    *[("e2e", True, freeze, {"adapters", "projectors", "denoiser"}) for freeze in EITHER],
    *[("e2e", False, freeze, {"visual", "projectors", "denoiser"}) for freeze in EITHER],
]
every_stage = pytest.mark.parametrize("stage, lora, freeze_denoiser, trains", STAGES)


@every_stage
def test_a_stage_trains_what_it_says_and_that_alone_is_in_training_mode(
    world, stage, lora, freeze_denoiser, trains
):
    for model in (tiny_model(world), tiny_model(world).requires_grad_(True)):
        model.set_stage(stage, lora, freeze_denoiser)
        for name, parameter in model.named_parameters():
            part = "adapters" if "lora_" in name else name.split(".")[0]
            assert parameter.requires_grad == (part in trains), name
        parts = {"visual" if part == "adapters" else part for part in trains}
        for mode in (True, False, True):  # as set_stage leaves it, and as it is told afterwards
            for name, part in model.named_children():
                expected = mode and name in parts
                assert {module.training for module in part.modules()} == {expected}, name
            model.train(not mode)


def inputs_of(module):
    """A list of a module's positional inputs, one tuple a call, filled while it is called."""
    calls = []
    module.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    return calls


@pytest.mark.parametrize("clip, local_ratio", [("tiny-clip", 0.0), ("tiny-siglip", 0.5)])
@both_denoisers
@every_stage
def test_gradients_reach_all_that_trains_and_after_stage_1_every_cls(
    world, kind, clip, local_ratio, stage, lora, freeze_denoiser, trains
):
    model = tiny_model(world, kind, clip, local_ratio=local_ratio)
    model.set_stage(stage, lora, freeze_denoiser)
    calls = inputs_of(model.projectors["context"])
    loss = model(torch.rand(2, 3, 32, 32))[0].mean()
    cls = calls[0][0]
    assert cls.requires_grad == (stage != 1)
    if cls.requires_grad:
        cls.retain_grad()
    loss.backward()
    assert stage == 1 or cls.grad.any(dim=1).all()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


class Fake(nn.Module):
    """Stands for a denoiser: `answer` says what it predicts; `calls` holds what it was given."""

    def __init__(self, answer, config=None):
        super().__init__()
        self.answer = answer
        self.config = config
        self.calls = []

    def forward(self, *inputs, **condition):
        self.calls.append((*inputs, condition))
        return self.answer(*inputs)


def encode_as(model, codes):
    """Let a model's autoencoder encode everything as `codes`; a list of what it was given."""
    given = []

    def encode(images):
        given.append(images)
        return codes

    model.autoencoder.encode = encode
    return given


def test_rectified_flow_from_images_to_loss(world):
    """x_t = (1 - t) x + t eps, and the loss is the mean of (v - (eps - x))^2."""
    model = tiny_model(world)
    latents, images = torch.randn(16, 4, 8, 8), torch.rand(16, 3, 32, 32)
    velocity = torch.randn(16, 4, 8, 8)
    given = encode_as(model, latents)
    condition = {"context": "context", "vec": "vec", "context_ids": "ids"}
    model.condition = lambda _: condition
    model.denoiser = Fake(lambda *_: velocity, model.denoiser.config)
    losses, levels = model(images)
    noisy, t, context, vec, others = model.denoiser.calls[0]
    assert {"context": context, "vec": vec, **others} == condition
    time = t.view(-1, 1, 1, 1)
    noise = (noisy - (1 - time) * latents) / time
    assert_close(given[0], 2 * images - 1, 1e-6)
    assert_uniform(torch.special.ndtr(noise.flatten()))
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    assert_close(losses, (velocity - (noise - latents)).square().mean((1, 2, 3)), 1e-3)
    assert torch.equal(levels, t)
    assert len(levels.unique()) == 16


def test_masked_tokens_from_images_to_loss(world):
    """Each image's loss is its mean over its masked tokens, in float32."""
    model = tiny_model(world, "perceiver")
    indices, images = torch.randint(64, (3, 16, 16)), torch.rand(3, 3, 32, 32)
    given = encode_as(model, indices)
    table = torch.randn(3, 256, 64).bfloat16()
    model.denoiser = Fake(lambda *_: table)
    losses, levels = model(images)
    tokens, mask, _, _ = model.denoiser.calls[0]
    assert_close(given[0], 2 * images - 1, 1e-6)
    assert torch.equal(tokens, indices.view(3, 256))  # row by row
    surprise = F.cross_entropy(table[mask].double(), tokens[mask], reduction="none")
    by_hand = [part.mean().item() for part in surprise.split(mask.sum(1).tolist())]
    assert losses.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(levels, mask.sum(1) / 256)
    assert len(levels.unique()) == 3


def test_losses_times_and_images_are_float32_under_autocast(world):
    dtypes = []
    model = tiny_model(world)

    def note(module, inputs, output):
        dtypes.extend([inputs[0].dtype, output.dtype])

    model.denoiser.time_in.register_forward_hook(note)
    model.denoiser.guidance_in.register_forward_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        for either in (model, tiny_model(world, "perceiver")):
            dtypes += [tensor.dtype for tensor in either(torch.rand(2, 3, 32, 32))]
    half = torch.zeros(4, dtype=torch.bfloat16)
    dtypes += [gh.to_unit_range(half).dtype, gh.timestep_embedding(half).dtype]
    dtypes += [gh.RMSNorm(4).bfloat16()(half).dtype]
    assert dtypes == 11 * [torch.float32]


def test_the_levels_are_distributed_as_asked_for(world):
    def levels_of(kind, **options):
        return tiny_model(world, kind, **options).set_stage(1)(torch.rand(3, 3, 32, 32))[1]

    assert levels_of("perceiver", mask_ratio=(0.25, 0.25)).tolist() == 3 * [0.25]
    assert levels_of("rf", scale=0.0).tolist() == 3 * [0.5]
    assert len(levels_of("rf", scale=0.0, distribution="uniform").unique()) == 3


def seeded(model, *images):
    torch.manual_seed(7)
    return model(*images)[0]


@both_denoisers
def test_an_images_loss_is_its_own(world, kind):
    model = tiny_model(world, kind).set_stage(1)
    images = torch.rand(3, 3, 32, 32)
    losses = seeded(model, images)
    beside_others = seeded(model, torch.cat([images[:1], torch.rand(2, 3, 32, 32)]))
    assert beside_others[0].item() == pytest.approx(losses[0].item(), rel=1e-4)
    assert (beside_others[1:] - losses[1:]).abs().min() > 1e-4


def gradients(model, images):
    model.zero_grad()
    seeded(model, images).mean().backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@both_denoisers
def test_checkpointing_gives_the_same_gradients(world, kind):
    model = tiny_model(world, kind).set_stage(2)
    images = torch.rand(2, 3, 32, 32)
    plain = gradients(model, images)
    model.denoiser.grad_checkpointing = True
    lists = [part for part in model.denoiser.children() if isinstance(part, nn.ModuleList)]
    calls = [inputs_of(block) for part in lists for block in part]
    recomputed = gradients(model, images)
    assert [len(call) for call in calls] == 2 * [2]  # each block is computed twice
    assert list(recomputed) == list(plain)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name])


# ------------------------------------------------------------------ the condition


@both_families
def test_features_are_the_towers_and_patch_tokens_its_last_layers_after_its_norm(world, clip):
    visual = tiny_model(world, clip=clip).visual
    if clip == "tiny-clip":
        block, norm, class_tokens = visual.transformer.resblocks[-1], visual.ln_post, 1
    else:
        block, norm, class_tokens = visual.trunk.blocks[-1], visual.trunk.norm, 0
    last = []
    block.register_forward_hook(lambda *call: last.append(call[2]))
    x = torch.randn(2, 3, 32, 32)
    cls, patches = gh.encode_with_patches(visual, x)
    assert_close(patches, norm(last[0])[:, class_tokens:], 1e-6)
    assert torch.equal(cls, visual(x))


def test_the_tower_keeps_no_graph_where_none_is_wanted(world):
    images = torch.rand(2, 3, 32, 32)
    stage_1 = tiny_model(world).set_stage(1).requires_grad_(True)
    assert not stage_1.encode_clip(images)[0].requires_grad
    with torch.no_grad():
        assert not tiny_model(world).set_stage(2).encode_clip(images)[0].requires_grad


@both_denoisers
@pytest.mark.parametrize("control", EITHER)
@torch.no_grad()
def test_the_condition_is_cls_alone_of_the_images_or_of_controls(world, kind, control):
    """The tower is given pixels less CLIP's mean over its std; [CLS] is not normalised."""
    model = tiny_model(world, kind)
    answers = {"rf": lambda x, *_: x, "perceiver": lambda *_: torch.zeros(2, 256, 64)}
    model.denoiser = Fake(answers[kind], model.denoiser.config)
    images, others = torch.rand(2, 2, 3, 32, 32)
    model(images, others if control else None)
    openais = PROCESSORS["tiny-clip"]
    mean, std = [torch.tensor(openais[key]).view(3, 1, 1) for key in ("image_mean", "image_std")]
    cls = model.visual(((others if control else images) - mean) / std)
    _, _, *condition, more = model.denoiser.calls[0]
    names = ["context", "vec"] if kind == "rf" else ["context"]
    for name, tensor in zip(names, condition, strict=True):
        assert_close(tensor.squeeze(1), model.projectors[name](cls), 1e-6)
    assert not any(more.values())  # no positions of local tokens


@torch.no_grad()
def test_a_projector_is_layernorm_linear_gelu_linear():
    projector = gh.Projector(8, 6)
    perturb(projector, 1.0)
    norm, first, _, second = projector
    x = torch.randn(5, 8)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    wide = first(norm.weight * normed + norm.bias)
    assert_close(projector(x), second(wide * torch.special.ndtr(wide)), 1e-5)


@pytest.mark.parametrize("kind, token_side", [("rf", 1), ("perceiver", 4)])
@torch.no_grad()
def test_local_tokens_are_drawn_for_each_image_with_the_position_of_their_patch(
    world, kind, token_side
):
    """The 4 x 4 patches lie on 4 x 4 tokens of rf, and on 16 x 16 of the perceiver."""
    model = tiny_model(world, kind, local_ratio=0.5)
    images = torch.rand(6, 3, 32, 32)
    _, patches = gh.encode_with_patches(model.visual, (images - model.mean) / model.std)
    candidates = model.projectors["local"](patches)                     # (6, 16, width)
    patch = torch.arange(16)
    centres = torch.stack([patch // 4, patch % 4], dim=-1) * token_side + (token_side - 1) / 2
    condition = model.condition(images)
    if kind == "perceiver":
        condition = {"context": condition}
        candidates = candidates + gh.sincos_embedding(centres, 32)
    tokens = condition["context"][:, 1:]
    chosen = torch.cdist(tokens, candidates).argmin(-1)                 # (6, 8)
    index = chosen[..., None].expand_as(tokens)
    assert_close(tokens, candidates.gather(1, index), 1e-5)
    draws = {tuple(sorted(row)) for row in chosen.tolist()}
    assert all(len(set(draw)) == 8 for draw in draws)  # without repetition
    assert len(draws) > 1
    if kind == "rf":
        [cls, *positions] = condition["context_ids"].unbind(1)
        assert not cls.any()  # [CLS] lies at the origin
        expected = F.pad(centres[chosen], (1, 0))  # (0, row, column)
        torch.testing.assert_close(torch.stack(positions, dim=1), expected)


@torch.no_grad()
def test_patches_that_leave_a_rest_lie_where_their_pixels_are(world, monkeypatch):
    """Of 384 pixels, 27 patches of 14 cover 378."""
    model = tiny_model(world, "rf", local_ratio=1.0)
    width = model.projectors["local"][0].normalized_shape[0]
    model.num_locals = 27 * 27
    model.autoencoder.factor = 8  # FLUX.1's
    monkeypatch.setattr(gh, "image_side", lambda _: 384)  # SigLIP's
    _, position = model.choose_locals(torch.rand(1, 27 * 27, width))
    assert position.max().item() == (26 * 14 + 7) / 16 - 0.5
    assert position.min().item() == 7 / 16 - 0.5


@pytest.mark.parametrize("ratio, tokens", [(0.0, 0), (0.1, 2), (0.5, 8), (1.0, 16)])
def test_the_local_ratio_is_a_share_of_the_patches(world, ratio, tokens):
    rf, perceiver = (tiny_model(world, kind, local_ratio=ratio) for kind in ("rf", "perceiver"))
    assert perceiver.condition(torch.rand(1, 3, 32, 32)).shape == (1, 1 + tokens, 32)
    local = {"local"} if tokens else set()
    assert set(rf.projectors) == {"context", "vec"} | local
    assert set(perceiver.projectors) == {"context"} | local


# ------------------------------------------------------------------ reconstruction


def decoded(model, codes):
    return (model.autoencoder.decode(codes) / 2 + 0.5).clamp(0, 1)


def test_euler_steps_reach_the_truth(world):
    """The velocity of the straight path to the truth at x_t is (x_t - truth) / t."""
    images = torch.rand(3, 3, 32, 32)
    model = tiny_model(world, local_ratio=0.5)
    truth = model.autoencoder.encode(2 * images - 1, sample=False)
    path = Fake(lambda x, t: (x - truth) / t.view(-1, 1, 1, 1), model.denoiser.config)
    model.denoiser = path
    assert_close(model.reconstruct(images, steps=7), decoded(model, truth))
    start, _, condition = path.calls[0]
    assert_uniform(torch.special.ndtr(start.flatten()))
    assert set(condition) == {"context", "vec", "context_ids"}
    times = torch.stack([t for _, t, _ in path.calls])
    expected = torch.arange(7, 0, -1)[:, None] / 7  # the velocity is taken where the step begins
    torch.testing.assert_close(times, expected.expand(7, 3))


@pytest.mark.parametrize("options, start, steps", [
    ({}, 256, 20),
    ({"steps": 1, "mask_ratio": 0.75}, 192, 1),
    ({"steps": 40, "mask_ratio": 0.1}, 26, 40),
])
def test_masked_decoding_follows_the_cosine_schedule_to_the_truth(world, options, start, steps):
    """By a denoiser that is sure of the true tokens."""
    images = torch.rand(3, 3, 32, 32)
    model = tiny_model(world, "perceiver")
    truth = model.autoencoder.encode(2 * images - 1)
    model.denoiser = Fake(lambda *_: 1000.0 * F.one_hot(truth.flatten(1), 64))
    assert_close(model.reconstruct(images, **options), decoded(model, truth))
    hidden = [int(start * math.cos(math.pi / 2 * step / steps)) for step in range(steps)]
    masks = [mask.sum(1).tolist() for _, mask, _, _ in model.denoiser.calls]
    assert masks == [3 * [count] for count in hidden]


def test_masked_decoding_keeps_what_it_was_given_and_has_accepted(world):
    """Though the denoiser changes its mind at each call."""
    images = torch.rand(2, 3, 32, 32)
    model = tiny_model(world, "perceiver")
    indices = model.autoencoder.encode(2 * images - 1).flatten(1)
    model.denoiser = Fake(lambda indices, mask, context: torch.randn(*indices.shape, 64))
    model.reconstruct(images, steps=6, mask_ratio=0.5)
    calls = model.denoiser.calls
    given, mask, _, _ = calls[0]
    assert torch.equal(given[~mask], indices[~mask])
    for (given, mask, *_), (later, later_mask, *_) in zip(calls, calls[1:], strict=False):
        assert not (later_mask & ~mask).any()
        assert torch.equal(later[~mask], given[~mask])


def fill_in(world, shape, logits, **options):
    """Decode tokens that are all masked; logits (N, K) of each position. The result, and the mask
    at each step."""
    model = tiny_model(world, "perceiver")
    model.denoiser = Fake(lambda *_: logits.expand(*shape, -1))
    tokens = torch.zeros(shape, dtype=torch.long)
    result = model.fill_in(tokens, torch.ones(shape, dtype=torch.bool), None, **options)
    return result, [mask for _, mask, _, _ in model.denoiser.calls]


@pytest.mark.parametrize("options, weight", [
    ({"steps": 2, "temperature": 2.0}, 1),
    ({"steps": 2}, 4.5 / 2),  # MaskGIT's temperature
])
def test_noise_lets_less_sure_tokens_win(world, options, weight):
    """Of tokens with probabilities 1, 1/4 and 1/4, Gumbel noise chooses as Luce's rule says."""
    counts = torch.tensor([[1], [4], [4]])  # of the codes that are equally likely
    logits = torch.where(torch.arange(64) < counts, 0.0, -torch.inf)
    _, masks = fill_in(world, (20_000, 3), logits, **options)
    share = (~masks[1][:, 0]).double().mean().item()
    by_luce = 1 / (1 + 2 * 0.25 ** (1 / weight))
    assert share == pytest.approx(by_luce, abs=0.014)  # 4 standard errors


@pytest.mark.parametrize("steps, share", [(1, 1.0), (2, 0.8)])
def test_one_step_takes_the_likeliest_and_several_draw(world, steps, share):
    result, _ = fill_in(world, (5_000, 1), torch.tensor([[0.8, 0.2]]).log(), steps=steps)
    assert (result == 0).double().mean().item() == pytest.approx(share, abs=0.016)


@both_denoisers
def test_reconstructions_are_images_and_take_no_part_in_training(world, kind):
    model = tiny_model(world, kind).set_stage(2)
    modes = [module.training for module in model.modules()]
    seen = []
    for part in (model.visual, model.denoiser):
        part.register_forward_pre_hook(lambda *_: seen.extend(m.training for m in model.modules()))
    images = model.reconstruct(torch.rand(2, 3, 32, 32), steps=2)
    assert seen and not any(seen)
    assert [module.training for module in model.modules()] == modes
    assert not images.requires_grad
    assert images.shape == (2, 3, 32, 32)
    assert 0 <= images.min() <= images.max() <= 1


# ------------------------------------------------------------------ the equations


def mask_counts(ratio, n):
    return gh.sample_masks(3, n, ratio, ratio).sum(1)


SMALL = torch.tensor([1e-3, -1e-3])  # its mean square is FLUX's epsilon, 1e-6
POSITION = [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]
POSITION += [math.sin(5), math.sin(0.05), math.cos(5), math.cos(0.05)]
BY_HAND = {
    "a mask hides the rounded share": (lambda: mask_counts(0.75, 25), 3 * [19]),
    "a mask hides at least one": (lambda: mask_counts(0.01, 9), 3 * [1]),
    "a mask hides all": (lambda: mask_counts(1, 9), 3 * [9]),
    "images": (lambda: gh.to_unit_range(torch.tensor([-3, -1, 0, 1, 3])), [0, 0, 0.5, 1, 1]),
    "1000 t": (
        lambda: gh.timestep_embedding(torch.tensor([0.375]).bfloat16())[0, [0, 128]],
        [math.cos(375), math.sin(375)],
    ),
    "sin-cos positions run along the rows": (
        lambda: gh.sincos_embedding(gh.grid_positions(6, 6, "cpu"), 8)[23], POSITION,
    ),
    "epsilon of the RMSNorm": (lambda: gh.RMSNorm(2)(SMALL), [0.5**0.5, -(0.5**0.5)]),
    "epsilon of the LayerNorm": (lambda: gh.modulate(SMALL, 0, 0), [0.5**0.5, -(0.5**0.5)]),
}


@pytest.mark.parametrize("what", BY_HAND)
def test_equations_by_hand(what):
    compute, expected = BY_HAND[what]
    assert compute().flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def assert_uniform(values):
    """Kolmogorov-Smirnov: no larger distance to the uniform distribution than p = 0.001 allows."""
    values = values.sort().values
    steps = torch.arange(len(values) + 1) / len(values)
    above = (steps[1:] - values).max()
    below = (values - steps[:-1]).max()
    assert max(above, below) < 1.95 / math.sqrt(len(values))


def logit_normal(*scale):
    """20,000 timesteps t, as P(T < t) = Phi(logit(t) / s), which is uniform; s = 1 by default."""
    t = gh.sample_timesteps(20_000, *scale).double()
    return torch.special.ndtr(torch.logit(t) / (scale[0] if scale else 1))


def mask_ratios():
    """400 mask ratios between .5 and .9 of 196 tokens, as a share of that range."""
    hidden = gh.sample_masks(400, 196, 0.5, 0.9).sum(1).double()
    assert round(0.5 * 196) <= hidden.min() <= hidden.max() <= round(0.9 * 196)
    # Counts are whole numbers: spread each over the width of its step.
    ratios = (hidden + torch.rand(400, dtype=torch.float64) - 0.5) / 196
    return ((ratios - 0.5) / 0.4).clamp(0, 1)


@pytest.mark.parametrize("draw", [
    logit_normal,
    lambda: logit_normal(0.1),
    lambda: logit_normal(5),
    lambda: gh.sample_timesteps(20_000, 1.0, "uniform").double(),
    mask_ratios,
])
def test_draws_are_distributed_as_they_say(draw):
    assert_uniform(draw())


@pytest.mark.parametrize("scale", [1, 10, 1000])
def test_timesteps_are_never_zero_or_one(scale):
    t = gh.sample_timesteps(20_000, scale)
    assert 0 < t.min() < t.max() < 1
    if scale > 1:  # no more than needed is cut off
        assert t.min() < 1e-6
        assert t.max() > 1 - 1e-6


def test_every_position_is_masked_equally_often():
    mask = gh.sample_masks(20_000, 4, 0.5, 0.5)
    # Two of four: .5 each, with a standard error of .0035.
    assert mask.double().mean(0).tolist() == pytest.approx(4 * [0.5], abs=0.014)


# ------------------------------------------------------------------ LoRA


def loras_of(visual):
    return [module for module in visual.modules() if isinstance(module, gh.LoRALinear)]


def with_lora(world, name):
    """A visual tower in eval mode whose adapters, of rank 2 and alpha 6, do something."""
    visual = tiny_model(world, clip=name).visual
    gh.inject_lora(visual, rank=2, alpha=6)
    for lora in loras_of(visual):
        nn.init.normal_(lora.lora_B, std=0.1)
    return visual


def layout(module):
    """Names and types of the modules, and names and shapes of the tensors."""
    types = [(name, type(child)) for name, child in module.named_modules()]
    return types + [(name, tensor.shape) for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("clip, matrices", [("tiny-clip", 2 * 6 + 1), ("tiny-siglip", 2 * 6 + 6)])
def test_lora_is_on_every_matrix_as_the_paper_sets_it_and_trains_alone(world, clip, matrices):
    """App. B: rank 16, alpha 16, dropout 0.1. A and B start as in the code of Hu et al."""
    visual = tiny_model(world, clip=clip).visual.requires_grad_(True)
    assert gh.inject_lora(visual) == matrices
    assert sum(lora.parts for lora in loras_of(visual)) == matrices
    for lora in loras_of(visual):
        rank, width = lora.lora_A.shape[0] / lora.parts, lora.lora_A.shape[1]
        assert (rank, lora.scale, lora.dropout.p) == (16, 1.0, 0.1)
        assert_uniform((lora.lora_A.detach().flatten() * math.sqrt(width) + 1) / 2)
        assert not lora.lora_B.any()
    for name, parameter in visual.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name


@both_families
@torch.no_grad()
def test_lora_equals_its_definition_and_merges_into_the_matrices_alone(world, clip):
    """Each matrix W becomes W + alpha / rank B A, as each of several that are packed does."""
    visual, original = with_lora(world, clip), tiny_model(world, clip=clip).visual
    x = torch.randn(2, 3, 32, 32)
    adapted = visual(x)
    assert_close(gh.encode_with_patches(visual, x)[0], adapted, 1e-6)
    loras = loras_of(visual)
    expected = []
    for lora in loras:
        lows = lora.lora_A.split(2)
        products = [6 / 2 * b @ a for b, a in zip(lora.lora_B, lows, strict=True)]
        expected.append(lora.base.weight + torch.cat(products))
    assert_close(gh.merge_lora(visual)(x), adapted, 1e-5)
    for lora, weight in zip(loras, expected, strict=True):
        assert_close(lora.base.weight, weight, 1e-6)
    assert layout(visual) == layout(original)
    before, after = original.state_dict(), visual.state_dict()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == len(loras)
    for name in changed:
        assert "embed" not in name
        assert after[name].dim() == 2
        assert after[name].is_contiguous()


@torch.no_grad()
def test_lora_drops_inputs_of_its_adapter_alone():
    lora = gh.LoRALinear(nn.Linear(3, 1), rank=1, alpha=1, dropout=0.5)
    lora.lora_A.fill_(1)
    lora.lora_B.fill_(1)
    x = torch.tensor([1.0, 10.0, 100.0])
    sums = (lora(x.expand(200, 3)) - lora.base(x)).round()
    # Each input is dropped on its own, and scaled by 1 / (1 - p) if it is kept.
    assert set(sums.flatten().tolist()) == {0, 2, 20, 22, 200, 202, 220, 222}


# ------------------------------------------------------------------ the continuous denoiser


@pytest.mark.parametrize("case", ["cls", "cls_local"])
def test_flux_equals_fluxs_own_code(case):
    tensors = golden("flux_tiny")
    config = gh.FluxConfig(
        vec_in_dim=32, context_in_dim=48, hidden_size=96, num_heads=4,
        depth=2, depth_single_blocks=3, axes_dim=(8, 8, 8),
    )
    flux = fill(gh.Flux(config), 0.1)
    names = ("latent", f"{case}.timesteps", f"{case}.context", f"{case}.vec")
    inputs = [tensors[name] for name in names]
    velocity = tensors[f"{case}.velocity_latent"]
    assert_close(flux(*inputs), velocity, 3e-5)
    # The positions of context tokens are zero by default, and belong to their image.
    context_ids = torch.zeros(*inputs[2].shape[:2], 3)
    context_ids[1] = 1
    moved = flux(*inputs, context_ids=context_ids) - velocity
    assert moved[0].norm() <= 1e-4 * velocity[0].norm()
    assert moved[1].norm() > 1e-3 * velocity[1].norm()


def test_rotary_positions_turn_complex_numbers():
    ids = torch.tensor([[0, 3, 5], [0, 1, 2]])
    x = torch.randn(2, 8)
    # A head of 8: 2 features for the unused axis, 2 for the row and 4 for the column.
    cos, sin = gh.rotary_table(ids[None], (2, 2, 4), 10_000)
    angles = torch.tensor([[0, 3, 5, 0.05], [0, 1, 2, 0.02]])
    turned = torch.view_as_complex(x.view(2, 4, 2)) * torch.exp(1j * angles)
    assert_close(gh.rotate(x, cos[0, 0], sin[0, 0]), torch.view_as_real(turned).flatten(1), 1e-5)


def test_the_defaults_are_the_published_ones(world):
    published = [  # what no count of parameters shows
        (gh.FluxConfig(), {"num_heads": 24, "axes_dim": (16, 56, 56), "theta": 10_000}),  # dev's
        (gh.PerceiverConfig(), {"layers": 6, "width": 1024, "num_heads": 16, "n_embed": 16_384}),
        (vqgan_file.VQGANConfig(), {"attn_resolutions": (16,), "resolution": 256}),  # taming's f16
        (AutoEncoderConfig(), {"scale_factor": 0.3611, "shift_factor": 0.1159}),  # FLUX.1's VAE
        (tiny_model(world, "rf"), {"distribution": "logit-normal", "scale": 1.0}),  # the paper's
        (tiny_model(world, "perceiver"), {"mask_ratio": (0.5, 0.9)}),  # the paper's
    ]
    for holder, values in published:
        assert {name: getattr(holder, name) for name in values} == values


# ------------------------------------------------------------------ the discrete denoiser

TINY_PERCEIVER = gh.PerceiverConfig(n_embed=50, embed_dim=8, width=32, num_heads=2, layers=2)


@pytest.mark.parametrize("n", [196, 441, 576])  # 14, 21 and 24 tokens a side
@torch.no_grad()
def test_the_perceiver_equals_its_description_with_torchs_own_attention(n):
    """Masked tokens are predicted from the unmasked ones, all positions and the own condition."""
    perceiver = gh.Perceiver(TINY_PERCEIVER, torch.randn(50, 8))
    perturb(perceiver, 0.2)
    indices = torch.randint(50, (2, n))
    mask = gh.sample_masks(2, n, 0.5, 0.9)
    context = torch.randn(2, 3, 32)
    computed = perceiver(indices, mask, context)
    codes = perceiver.codebook[indices]
    x = torch.where(mask[..., None], perceiver.mask_token, perceiver.token_in(codes))
    steps = torch.arange(math.isqrt(n))
    x = x + gh.sincos_embedding(torch.cartesian_prod(steps, steps), 32)
    for layer in perceiver.layers:
        attention = nn.MultiheadAttention(32, 2, batch_first=True)
        attention.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
        attention.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
        attention.out_proj = layer.proj
        keys = layer.norm_kv(torch.cat([x, context], dim=1))
        x = x + attention(layer.norm_q(x), keys, keys)[0]
        wide = layer.mlp[0](layer.norm_mlp(x))
        x = x + layer.mlp[2](wide * torch.special.ndtr(wide))  # the exact GELU
    assert_close(computed, perceiver.head(perceiver.norm(x)), 1e-5)
    others = torch.where(mask, (indices + 1) % 50, indices)
    assert torch.equal(perceiver(others, mask, context), computed)


@pytest.mark.parametrize("scale", [1e-4, 1, 100])
def test_the_codebook_is_brought_to_unit_scale_not_trained_and_not_saved(scale):
    codebook = nn.Parameter(scale * torch.randn(50, 8) * torch.arange(1, 9))
    perceiver = gh.Perceiver(TINY_PERCEIVER, codebook)
    assert_close(perceiver.codebook, codebook.detach() / codebook.detach().std(), 1e-6)
    assert not perceiver.codebook.requires_grad
    assert "codebook" not in perceiver.state_dict()


@pytest.mark.parametrize("call, error, words", [
    (lambda _: gh.Flux(gh.FluxConfig(num_heads=12)), ValueError, "sum to the width of a head, 256"),
    (lambda _: gh.inject_lora(nn.Conv2d(3, 3, 1)), ValueError, "no linear layer to adapt"),
    (lambda w: gh.inject_lora(with_lora(w, "tiny-clip")), ValueError, "has LoRA already"),
    (lambda w: tiny_model(w, local_ratio=0.01), UserError, "0.01 selects none of the 16 "),
])
def test_the_impossible_is_refused(world, call, error, words):
    with pytest.raises(error, match=words):
        call(world)


# ------------------------------------------------------------------ on every device


@both_denoisers
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_in_bf16_is_near_one_in_float32(world, monkeypatch, kind, device):
    """Loss and gradients of stage 2, with the same draws on the CPU and on the device."""
    model = tiny_model(world, kind).set_stage(2)
    perturb(model.visual)  # or LoRA's B would be zero
    monkeypatch.setattr(nn.Dropout, "forward", lambda _, x: x)
    images = torch.rand(8, 3, 32, 32)
    codes = model.autoencoder.encode(2 * images - 1)  # a code at the border may be another in bf16
    draw = gh.sample_timesteps
    monkeypatch.setattr(gh, "sample_timesteps", lambda *a, device: draw(*a).to(device))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape).to(x))
    steps = []
    for place, enabled in (("cpu", False), (device, True)):
        model.to(place)
        encode_as(model, codes.to(place))
        with torch.autocast(place, torch.bfloat16, enabled=enabled):
            named = gradients(model, images.to(place))
            loss = seeded(model, images.to(place)).mean()
        flat = torch.cat([gradient.flatten().float().cpu() for gradient in named.values()])
        steps.append((loss.item(), flat))
    (expected, truth), (loss, flat) = steps
    assert loss == pytest.approx(expected, rel=0.01)
    assert_close(flat, truth, 0.05)


# ------------------------------------------------------------------ the backbones

OPENAI, SIGLIPS = open_clip.OPENAI_DATASET_MEAN, (0.5, 0.5, 0.5)


def full_size(name):
    """The model of a backbone without memory for its weights."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        make = open_clip.create_model
        patch.setattr(open_clip, "create_model", lambda *a, **b: make(*a, **b, device="meta"))
        return eval_mmvp.create_clip(*find_backbone(name))


@pytest.mark.parametrize("name, activation, mean, resize, sizes", [
    # As open_clip publishes them, whose configurations name no activation. The sizes: the side in
    # pixels, the patches, the model's and its visual tower's parameters, LoRA's matrices and its.
    ("openai-l14-224", "quick_gelu", OPENAI, "shortest",
     [224, 256, 427_616_513, 303_966_208, 145, 7_106_560]),
    ("openai-l14-336", "quick_gelu", OPENAI, "shortest",
     [336, 576, 427_944_193, 304_293_888, 145, 7_106_560]),
    ("metaclip-l14-224", "quick_gelu", OPENAI, "shortest",
     [224, 256, 427_616_513, 303_966_208, 145, 7_106_560]),
    ("metaclip-h14-224", "quick_gelu", OPENAI, "shortest",
     [224, 256, 986_109_441, 632_076_800, 193, 11_833_344]),
    ("siglip-so400m-224", "gelu", SIGLIPS, "squash",
     [224, 256, 877_360_306, 427_680_704, 168, 9_017_344]),
    ("siglip-so400m-384", "gelu", SIGLIPS, "squash",
     [384, 729, 877_960_498, 428_225_600, 168, 9_017_344]),
    ("ViT-L-14:openai", "quick_gelu", OPENAI, "shortest", []),
    ("ViT-L-14:laion2b_s32b_b82k", "gelu", SIGLIPS, "shortest", []),
    ("ViT-g-14:laion2b_s34b_b88k", "gelu", OPENAI, "shortest", []),
    ("ViT-gopt-16-SigLIP2-256:webli", "gelu_pytorch_tanh", SIGLIPS, "squash", []),
])
def test_what_a_published_tag_says_is_computed_and_exported(name, activation, mean, resize, sizes):
    assert open_clip.is_pretrained_cfg(*find_backbone(name))
    clip = full_size(name)
    eval_mmvp.check_export(name, clip)
    config = eval_mmvp.hf_config(clip)
    for tower in ("vision_config", "text_config"):
        assert config[tower]["hidden_act"] == activation
    assert tuple(clip.visual.preprocess_cfg["mean"]) == mean
    assert clip.visual.preprocess_cfg["resize_mode"] == resize
    if sizes:
        side = gh.image_side(clip.visual)
        images = torch.empty(1, 3, side, side, device="meta")
        patches = gh.encode_with_patches(clip.visual, images)[1].shape[1]
        parameters = [count_parameters(clip), count_parameters(clip.visual)]
        before = layout(clip.visual)
        matrices = gh.inject_lora(clip.visual)
        of_lora = sum(p.numel() for p in clip.visual.parameters() if p.requires_grad)
        assert [side, patches, *parameters, matrices, of_lora] == sizes
        merged = gh.merge_lora(clip.visual)
        assert layout(merged) == before
        exported = eval_mmvp.hf_weights(clip).values()
        assert sum(tensor.numel() for tensor in exported) == parameters[0]


@pytest.mark.parametrize("way", ["downloaded", "local", "random"])
def test_features_and_images_are_the_tags_whencever_the_weights_come(world, monkeypatch, way):
    path = str(world / "tiny-clip.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: path)
    weights = path if way == "local" else None
    clip, preprocess, _ = load_clip("tiny-gelu:it", weights, random=way == "random")
    truth = open_clip.create_model("tiny-gelu", force_quick_gelu=True, load_weights=False)
    truth.load_state_dict(clip.state_dict())
    images = torch.randn(2, 3, 32, 32)
    truth.eval().requires_grad_(False)
    assert torch.equal(clip.encode_image(images), truth.encode_image(images))
    look = open_clip.transform.PreprocessCfg(size=32, **LOOK)
    image = noise_image(np.random.default_rng(0), 48, 64)
    theirs = open_clip.transform.image_transform_v2(look, is_train=False)(image)
    assert torch.equal(preprocess(image), theirs)
    assert eval_mmvp.hf_preprocessor(clip.visual.preprocess_cfg)["resample"] == 2  # bilinear


@pytest.mark.parametrize("name, file, says", [
    ("nonsense", None, "unknown backbone 'nonsense': choose from openai-l14-224"),
    ("ViT-L-14:nonsense", None, "give ViT-L-14:TAG with one of its tags (openai, "),
    ("ViT-B-32:opnai", "tiny-clip.safetensors", "'ViT-B-32:opnai' has no known tag"),
    ("ViT-S-16", "tiny-clip.safetensors", "it has none: choose another model"),
    ("tiny-clip", "data", "data is neither in open_clip's nor in Hugging Face's format"),
    ("tiny-clip", "vae.safetensors", "decoder.conv_in.bias must be absent, not [64]"),
    ("tiny-clip", "tiny-siglip.safetensors", "ln_final.bias must be [32], not absent"),
    ("tiny-clip", "hf/tiny-siglip", "logit_bias must be absent, not [1]"),
])
def test_foreign_clips_and_tags_are_refused(world, exported, name, file, says):
    refused(lambda _: load_clip(name, file and world / file), says)


def test_what_is_missing_is_noticed_before_any_model_is_made():
    for weights in ("", "random", "nowhere.pt"):
        refused(lambda path: find_backbone("toy", path), weights, f"not found at {weights!r}")
    refused(lambda name: find_backbone(name, random=True), "ViT-B-32:opnai", "laion400m_e31")


def test_a_local_clip_and_an_untagged_random_one_need_no_network(world, tmp_path, monkeypatch):
    refuse = fails(AssertionError("the network was asked"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text = TINY_SIGLIP["text_cfg"] | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    (tmp_path / "hub-text.json").write_text(json.dumps(TINY_SIGLIP | {"text_cfg": text}))
    open_clip.add_model_config(tmp_path / "hub-text.json")
    first, second = [load_clip("hub-text", random=True)[0] for _ in range(2)]
    assert not torch.equal(first.text.positional_embedding, second.text.positional_embedding)
    load_clip("tiny-siglip", world / "tiny-siglip.safetensors")
    load_clip("toy")


def test_what_the_hub_does_not_give_is_one_line(world, monkeypatch, caplog):
    offline = fails(OSError("no network\nand more"))
    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", offline)
    tokenizer = load_clip("tiny-siglip", world / "tiny-siglip.safetensors")[2]
    refused(lambda _: tokenizer(["a cat"]), "tiny-siglip", "no network", "pip install transformers")
    refused(lambda _: load_clip("openai-l14-224"), "ViT-L-14-quickgelu", "'openai': no network")
    assert not caplog.records  # open_clip would log it too


# ------------------------------------------------------------------ files of CLIPs


def load_tiny(world, name="tiny-clip"):
    return load_clip(name, world / f"{name}.safetensors")[0]


def assert_same_weights(clip, other):
    weights, others = clip.state_dict(), other.state_dict()
    assert list(weights) == list(others)
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


BESIDE = {  # what a training program saves beside its weights, and runs nothing
    "args": argparse.Namespace(lr=1e-4),
    "optimizer": {"state": {0: torch.tensor(1.0)}, "param_groups": [{"lr": 1e-4}]},
    "best": np.float64(0.5),
    "epoch": np.int64(3),
    "log": OrderedDict(loss=[1.0]),
}


@both_families
@pytest.mark.parametrize("prefix, key, beside", [
    # The prefix of the CLIP's names, the name of the state dict, how many tensors stand beside.
    ("", None, 0),
    ("model.vision_tower.", None, 2),
    ("module._orig_mod.", "model_state_dict", 1),
    ("class_model.model.", "clip", 4),
])
def test_a_clip_behind_a_prefix_is_found(world, tmp_path, capsys, clip, prefix, key, beside):
    model = load_tiny(world, clip)
    path = tmp_path / "it.pt"
    old = {"attn_mask": torch.zeros(77, 77), "logit_scale": model.logit_scale.reshape(1)}
    whole = f"{key}.{prefix}" if key else prefix
    for inner in (model.state_dict() | old, eval_mmvp.hf_weights(model)):
        state = {f"unet.{i}": torch.zeros(2) for i in range(beside - bool(key))}
        state |= {prefix + name: tensor for name, tensor in inner.items()}
        torch.save(BESIDE | {key: state} if key else state, path)  # BESIDE holds one tensor
        assert_same_weights(load_clip(clip, path)[0], model)
        line = f"{path} holds the model under {whole!r}; {beside} other tensors are ignored\n"
        assert capsys.readouterr().err.partition(": ")[2] == (line if beside else "")


def test_a_clip_with_batch_norm_comes_with_its_counters(world, tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    (tmp_path / "tiny-resnet.json").write_text(json.dumps(TINY_CLIP | {"vision_cfg": vision}))
    open_clip.add_model_config(tmp_path / "tiny-resnet.json")
    open_clip.pretrained._PRETRAINED["tiny-resnet"] = {"it": {}}
    clip = open_clip.create_model("tiny-resnet", load_weights=False)
    perturb(clip)
    clip.visual.bn1.num_batches_tracked += 7
    torch.save({"epoch": 3, "clip": clip.state_dict()}, tmp_path / "it.pt")
    loaded = load_clip("tiny-resnet:it", tmp_path / "it.pt")[0]
    assert_same_weights(loaded, clip)
    assert loaded.visual.bn1.num_batches_tracked.dtype == torch.int64


def test_a_file_of_several_clips_is_refused_and_one_that_does_not_fit(exported, tmp_path):
    weights = exported / "tiny-clip" / "model.safetensors"
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    for name, value, says in (
        (key, torch.zeros(64, 32), f"{key} must be [64, 64], not [64, 32]"),
        ("ema.visual.ln_post.bias", torch.zeros(1), "several models (ema.visual.ln_post.bias and "),
    ):
        save_changed(weights, {name: value}, tmp_path / "it.safetensors")
        refused(lambda path: load_clip("tiny-clip", path), tmp_path / "it.safetensors", says)


class WritesAFile(nn.Module):
    """Its __setstate__ runs when torch.jit.load reads it."""

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool) -> None:
        torch.save(state, "owned")
        self.training = state


def test_openais_archives_are_known_by_their_digests_and_read(world, tmp_path, monkeypatch):
    """ViT-L-14.pt is a TorchScript module like this one: fp16, and three integers."""
    models = open_clip.list_pretrained_models_by_tag("openai")
    assert "ViT-L-14-336" in models
    for name in models:
        address = open_clip.get_pretrained_cfg(name, "openai")["url"]
        assert re.search("/[0-9a-f]{64}/", address)
    clip = load_tiny(world)
    module = copy.deepcopy(clip).half()
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(module).pop(name, None)
        module.register_buffer(name, torch.tensor(32))
    path = tmp_path / "ViT.pt"
    torch.jit.script(module).save(path)
    published = {"url": f"https://it/{hashlib.sha256(path.read_bytes()).hexdigest()}/ViT.pt"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: published)
    loaded = load_clip("tiny-clip", path)[0]
    assert_same_weights(loaded, clip.half().float())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_an_archive_runs_none_of_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(WritesAFile()).save("forged.pt")
    refused(lambda path: load_clip("tiny-clip", path), "forged.pt", "save its state dict alone")
    assert not os.path.exists("owned")
    torch.jit.load("forged.pt")  # what this test is worth
    assert os.path.exists("owned")


# ------------------------------------------------------------------ open_clip's format


def shrunk(name, folder):
    """A MODEL:TAG that is like `name` in all but sizes; without the network's weights."""
    model, tag = find_backbone(name)
    config = open_clip.get_model_config(model)
    small = {"vision_cfg": {"image_size": 32}, "text_cfg": {"width": 48, "heads": 2, "layers": 1}}
    if "timm_model_name" in config["vision_cfg"]:
        small["vision_cfg"]["timm_model_name"] = "tiny_siglip_tower"
    else:
        small["vision_cfg"] |= {"layers": 1, "width": 64, "head_width": 16, "patch_size": 8}
    config = config | {part: config[part] | small[part] for part in small} | {"embed_dim": 48}
    (folder / f"tiny-{model}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"tiny-{model}.json")
    published = {tag: open_clip.get_pretrained_cfg(model, tag)}
    open_clip.pretrained._PRETRAINED[f"tiny-{model}"] = published
    return f"tiny-{model}:{tag}"


@pytest.mark.parametrize("name", [
    *eval_mmvp.BACKBONES, "tiny-gelu:it", "ViT-L-14:openai", "ViT-L-14:laion2b_s32b_b82k",
])
def test_open_clip_opens_an_exported_folder_by_itself(world, tmp_path, monkeypatch, name):
    """Features, pixels and tokens are those of the CLIP that was exported, with no network."""
    monkeypatch.setattr(socket, "getaddrinfo", None)
    small = name if name in ("toy", "tiny-gelu:it") else shrunk(name, tmp_path)
    clip, preprocess, tokenizer = load_clip(small, random=name != "toy")
    perturb(clip)
    eval_mmvp.export_open_clip(clip, tmp_path / "it")
    folder = f"local-dir:{tmp_path}/it"
    theirs, _, their_preprocess = open_clip.create_model_and_transforms(folder)
    theirs.eval().requires_grad_(False)
    image = noise_image(np.random.default_rng(0), 48, 64)
    pixels = preprocess(image)
    assert torch.equal(their_preprocess(image), pixels)
    assert torch.equal(theirs.encode_image(pixels[None]), clip.encode_image(pixels[None]))
    text = clip.model_cfg["text_cfg"]
    tokens = torch.randint(1, 1000, (2, text["context_length"]))
    assert torch.equal(theirs.encode_text(tokens), clip.encode_text(tokens))
    assert torch.equal(theirs.logit_scale, clip.logit_scale)
    assert_same_weights(load_clip(small, tmp_path / "it")[0], clip)
    weights = tmp_path / "it" / "open_clip_model.safetensors"
    assert gh.read_weights(weights, "it")[1] == {}  # nothing of time or place
    if "SigLIP" in find_backbone(name)[0]:  # its tokenizer comes from the hub, by this name
        config = json.loads((tmp_path / "it" / "open_clip_config.json").read_text())
        assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "timm/ViT-B-16-SigLIP"
    else:
        words = ["a photo of a cat", "Two  Dogs!"]
        assert torch.equal(open_clip.get_tokenizer(folder)(words), tokenizer(words))


def test_where_a_results_weights_are_whole_so_is_all_else(trained):
    """A run without them is not finished: they are written last."""
    last = max(trained.glob("rf/*/*.*"), key=lambda path: path.stat().st_mtime_ns)
    assert last == trained / "rf" / "open_clip" / "open_clip_model.safetensors"


def change(config, where, value):
    """Set, or for ... remove, the entry of a nested dictionary whose path is `where`."""
    *parts, key = where.split()
    for part in parts:
        config = config[part]
    config[key] = value
    if value is ...:
        del config[key]


@pytest.mark.parametrize("where, value, says", [
    ("model_cfg quick_gelu", False, "quick_gelu False (model_cfg), and tiny-clip computes True"),
    ("model_cfg quick_gelu", ..., "quick_gelu False (model_cfg), and tiny-clip computes True"),
    ("model_cfg vision_cfg head_width", ..., "head_width 64 (vision_cfg), and tiny-clip computes"),
    ("model_cfg vision_cfg norm_kwargs", {"eps": 1e-6}, "norm_kwargs {'eps': 1e-06} (vision_cfg)"),
    ("model_cfg text_cfg heads", ..., "heads 8 (text_cfg), and tiny-clip computes 2: choose "),
    ("model_cfg text_cfg tokenizer_kwargs", {"clean": "lower"}, "tokenizer_kwargs {'clean': "),
    ("preprocess_cfg mean", [0.5] * 3, "mean [0.5, 0.5, 0.5] (preprocess_cfg), and tiny-clip"),
    ("preprocess_cfg std", [0.5] * 3, "std [0.5, 0.5, 0.5] (preprocess_cfg)"),
    ("preprocess_cfg interpolation", "bilinear", "interpolation 'bilinear' (preprocess_cfg)"),
    ("preprocess_cfg resize_mode", "squash", "resize_mode 'squash' (preprocess_cfg)"),
    ("model_cfg vision_cfg rope", True, "of the installed open_clip (CLIPVisionCfg."),
    ("model_cfg", ..., "not a configuration of the installed open_clip ('model_cfg')"),
    ("preprocess_cfg", [1], "not a configuration of the installed open_clip"),
    # Silence where open_clip's own value is the same, and what changes no features.
    ("preprocess_cfg", ..., None),
    ("preprocess_cfg size", 224, None),
    ("model_cfg vision_cfg patch_dropout", 0.5, None),
    ("model_cfg text_cfg hf_tokenizer_name", "me/mine", None),
])
def test_what_an_open_clip_folder_says_is_compared(exported, tmp_path, where, value, says):
    shutil.copytree(exported.parent / "open_clip" / "tiny-clip", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    change(config, where, value)
    file.write_text(json.dumps(config))
    weights = tmp_path / "open_clip_model.safetensors"
    if says:
        refused(lambda _: load_clip("tiny-clip", weights), file, says)
    else:
        load_clip("tiny-clip", weights)


def test_a_folder_of_the_hubs_in_open_clips_format_is_taken(world, exported, tmp_path):
    """Although HuggingFace's files of another model lie in it, too."""
    shutil.copytree(exported / "tiny-gelu", tmp_path, dirs_exist_ok=True)
    shutil.copy(exported.parent / "open_clip" / "tiny-clip" / "open_clip_config.json", tmp_path)
    for name in ("model.safetensors", "open_clip_pytorch_model.bin"):  # the latter is preferred
        clip = load_tiny(world)
        perturb(clip)
        save = torch.save if name.endswith("bin") else save_file
        save(clip.state_dict(), tmp_path / name)
        assert_same_weights(load_clip("tiny-clip", tmp_path)[0], clip)


# ------------------------------------------------------------------ HuggingFace's format

@pytest.fixture(scope="module")
def exported(world):
    """A folder with hf/ of the tiny models; open_clip/ lies beside it."""
    for name in TINY:
        clip = load_tiny(world, name)
        eval_mmvp.export_hf(clip, world / "hf" / name)
        eval_mmvp.export_open_clip(clip, world / "open_clip" / name)
    return world / "hf"


# The first features of an image and of a text that transformers 5.24 computes from the exported
# folder of each model, with the values of `filling` under the names and in the shapes there.
@pytest.mark.parametrize("name, of_image, of_text", [
    ("tiny-clip", [9.34212, -3.5343, 0.12794], [-2.52783, -3.45225, 0.44768]),
    ("tiny-gelu", [9.34962, -3.52586, 0.14133], [-2.52757, -3.4797, 0.48805]),
    ("tiny-siglip", [6.5993, 3.27101, 10.60235], [1.8459, -2.18394, -2.00684]),
    ("tiny-siglip2", [6.60063, 3.27339, 10.60358], [1.8461, -2.18399, -2.00721]),
])
def test_an_exported_folder_is_the_clip_that_transformers_computes(
    exported, tmp_path, name, of_image, of_text
):
    shutil.copytree(exported / name, tmp_path, dirs_exist_ok=True)
    shapes = load_file(exported / name / "model.safetensors")
    weights = {key: filling(key, shapes[key].shape, 0.3) for key in shapes}
    save_file(weights, tmp_path / "model.safetensors")
    clip = load_clip(name, tmp_path)[0]
    image = torch.sin(torch.arange(3 * 32 * 32) * 0.7).view(1, 3, 32, 32)
    siglip = "siglip" in name
    text = torch.zeros(1, 16 if siglip else 77, dtype=torch.int64)
    text[0, :4] = torch.tensor([7, 8, 9, 1] if siglip else [49406, 320, 1125, 49407])
    assert clip.encode_image(image)[0, :3].tolist() == pytest.approx(of_image, abs=5e-5)
    assert clip.encode_text(text)[0, :3].tolist() == pytest.approx(of_text, abs=2e-5)
    eval_mmvp.export_hf(clip, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
WHOLE = {
    "tiny-clip": {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 32},
    "tiny-siglip": {"model_type": "siglip", "architectures": ["SiglipModel"]},
}
TOWERS = {  # the vision and the text tower of tiny-clip, then of tiny-siglip
    "model_type": ["clip_vision_model", "clip_text_model",
                   "siglip_vision_model", "siglip_text_model"],
    "hidden_size": [64, 32, 48, 48],
    "intermediate_size": [256, 128, 192, 192],
    "num_hidden_layers": [2, 2, 2, 2],
    "num_attention_heads": [4, 2, 4, 4],
    "attention_dropout": [0.0, 0.0, 0.0, 0.0],
    "hidden_act": ["quick_gelu", "quick_gelu", "gelu", "gelu"],
    "layer_norm_eps": [1e-5, 1e-5, 1e-6, 1e-6],
    "projection_dim": [32, 32, None, None],
    "projection_size": [None, None, None, 48],
    "image_size": [32, None, 32, None],
    "patch_size": [8, None, 8, None],
    "max_position_embeddings": [None, 77, None, 16],
    "vocab_size": [None, 49408, None, 320],
    "bos_token_id": [None, 49406, None, None],
    "eos_token_id": [None, 49407, None, None],
}
SQUARE = {"height": 32, "width": 32}
PREPARED = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
PREPARED |= {"resample": 3, "rescale_factor": 0.00392156862745098}
PROCESSORS = {
    "tiny-clip": PREPARED | {
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": SQUARE,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "tiny-siglip": PREPARED | {
        "size": SQUARE,
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


@pytest.mark.parametrize("clip, vision, text, processor", [
    ("tiny-clip", 0, 1, "CLIPImageProcessor"),
    ("tiny-siglip", 2, 3, "SiglipImageProcessor"),
])
def test_an_exported_clips_files_say_what_it_is(exported, clip, vision, text, processor):
    files = {path.stem: path.read_text() for path in (exported / clip).glob("*[!s]")}
    config = WHOLE[clip] | {"torch_dtype": "float32"}
    for part, column in (("vision_config", vision), ("text_config", text)):
        cells = {key: row[column] for key, row in TOWERS.items()}
        config[part] = {key: value for key, value in cells.items() if value is not None}
    assert json.loads(files.pop("config")) == config
    images = PROCESSORS[clip] | {"image_processor_type": processor}
    assert json.loads(files.pop("preprocessor_config")) == images
    if clip == "tiny-siglip":
        assert not files
        return
    end = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    end |= {"bos_token": "<|startoftext|>", "model_max_length": 77}
    assert json.loads(files["tokenizer_config"]) == {"tokenizer_class": "CLIPTokenizer"} | end
    vocabulary = json.loads(files["vocab"])
    assert sorted(vocabulary.values()) == list(range(49408))
    assert vocabulary == vocabulary | {"<|endoftext|>": 49407, "photo</w>": 1125, "!": 0}
    assert files["merges"].splitlines()[:2] == ["#version: 0.2", "i n"]


@pytest.mark.parametrize("model, lacks", [
    ("ViT-L-14-CLIPA", "no_ln_pre is True, not False"),
    ("xlm-roberta-base-ViT-B-32", "hf_model_name is 'xlm-roberta-base', not None"),
    ("RN50", "layers is [3, 4, 6, 3]"),
    ("EVA02-B-16", "timm_pool is 'token', not 'map'"),
    ("nllb-clip-base-siglip", "no_causal_mask is False, not True"),
])
def test_what_huggingfaces_format_cannot_hold_is_refused(world, model, lacks):
    config = open_clip.get_model_config(model)
    timm_model = "timm_model_name" in config["vision_cfg"]
    clip = load_tiny(world, "tiny-siglip" if timm_model else "tiny-clip")
    clip.model_cfg = config
    refused(lambda model: eval_mmvp.check_export(model, clip), model, lacks)


@pytest.mark.parametrize("file, save", [
    ("model.safetensors", save_file),
    ("pytorch_model.bin", torch.save),
])
def test_what_was_exported_is_imported_bit_by_bit(world, exported, tmp_path, file, save):
    weights = load_file(exported / "tiny-clip" / "model.safetensors")
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # older ones have it
    save(weights, tmp_path / file)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shards = {name: f"{i % 3}-{file}" for i, name in enumerate(weights)}
    (sharded / f"{file}.index.json").write_text(json.dumps({"weight_map": shards}))
    for shard in set(shards.values()):
        save({n: weights[n] for n in weights if shards[n] == shard}, sharded / shard)
    # A larger program's configuration says nothing of its CLIP.
    (sharded / CONFIG).write_text('{"model_type": "llava", "hidden_act": "silu"}')
    for path in (tmp_path / file, tmp_path, sharded):
        assert_same_weights(load_clip("tiny-clip", path)[0], load_tiny(world))


@pytest.mark.parametrize("tower, prefix, projected", [
    ("visual.", "visual.", True),
    ("visual.", "", True),  # open_clip saves it so
    ("vision_model.", "vision_model.", True),
    ("vision_model.", "", False),  # as transformers 5 does, without the projection
    ("vision_model.", "model.vision_tower.vision_tower.", False),
])
def test_a_vision_tower_alone_takes_the_rest_from_its_backbone_if_that_is_at_hand(
    world, tmp_path, capsys, tower, prefix, projected
):
    clip = load_clip("toy")[0]
    own = copy.deepcopy(clip).state_dict()
    perturb(clip)
    weights = clip.state_dict() if tower == "visual." else eval_mmvp.hf_weights(clip)
    names = [name for name in weights if name.startswith(tower)]
    alone = {prefix + name.removeprefix(tower): weights[name].clone() for name in names}
    if projected and tower == "vision_model.":
        alone["visual_projection.weight"] = clip.visual.proj.T.contiguous()
    path = tmp_path / "it.safetensors"
    save_file(alone, path)
    config = {"vision_config": {"num_attention_heads": 4}, "text_config": {"hidden_act": "silu"}}
    (tmp_path / CONFIG).write_text(json.dumps(config))  # its text tower is another model
    loaded = load_clip("toy", path)[0].state_dict()
    for name, tensor in clip.state_dict().items():
        its = name.startswith("visual.") and (projected or name != "visual.proj")
        assert torch.equal(loaded[name], tensor if its else own[name]), name
    line = f"{path} holds only a visual tower; all other weights are toy's own\n"
    assert capsys.readouterr().err == f"CLIP weights for toy-clip: {line}"
    refused(lambda _: load_clip("tiny-clip", path), "tiny-clip", "'no tag' is not a")
    del alone[[name for name in alone if "class_embedding" in name][0]]
    save_file(alone, path)
    refused(lambda path: load_clip("toy", path), path, "class_embedding must be [96], not absent")


CLIPS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12}
SIGLIPS_OWN = CLIPS | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
SIGLIP_224 = PROCESSORS["tiny-siglip"] | {"size": {"height": 224, "width": 224}}
CLIP_224 = PROCESSORS["tiny-clip"] | {"size": {"shortest_edge": 224}}
CLIP_224["crop_size"] = SIGLIP_224["size"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("file, part, of_clip, of_siglip", [
    # What transformers 5.24 takes where a part of a CLIP's file, or a SigLIP's, is silent.
    (CONFIG, "vision_config", CLIPS, SIGLIPS_OWN),
    (CONFIG, "text_config", CLIPS | {"num_attention_heads": 8}, SIGLIPS_OWN),
    (PROCESSOR, "image_processor", CLIP_224, SIGLIP_224),
])
def test_what_a_folder_says_or_is_silent_about_is_compared(
    exported, tmp_path, capsys, name, file, part, of_clip, of_siglip
):
    """Each entry in turn is removed, and then is another."""
    shutil.copytree(exported / name, tmp_path, dirs_exist_ok=True)
    weights, file = tmp_path / "model.safetensors", tmp_path / file
    content = json.loads(file.read_text())
    section = content.get(part, content)
    for key, default in (of_siglip if "siglip" in name else of_clip).items():
        own = section.pop(key)
        for theirs in (default, "other"):
            file.write_text(json.dumps(content))
            line = f"{file} says {key} {theirs!r} ({part}), and {name} computes {own!r}"
            if theirs == own:
                load_clip(name, weights)
            elif (theirs, own) == ("gelu_pytorch_tanh", "gelu"):  # published SigLIPs are silent
                load_clip(name, weights)
                assert f"{line}; the two differ by less than 5e-4" in capsys.readouterr().err
            else:
                refused(lambda _: load_clip(name, weights), f"{line}: choose another")
            section[key] = "other"
        section[key] = own


INDEX = "model.safetensors.index.json"
BOTH_PROCESSORS = "processor_config.json"
NO_OBJECT = "cannot be read as JSON (not an object)"


@pytest.mark.parametrize("file, text, says", [
    (INDEX, '{"weight_map": {"a": "1-model.safetensors"}}', "1-model.safetensors' (not a file)"),
    (INDEX, '{"weight_map": {', f"{INDEX} cannot be read as JSON"),
    (CONFIG, '{"vision_config": [3]}', NO_OBJECT),
    (CONFIG, '{"vision_config": null}', "num_attention_heads 12"),
    (CONFIG, '{"vision_config_dict": {"num_attention_heads": 3}, "vision_config": {}}', "heads 3"),
    # Older files have numbers for sizes, some have null, and transformers 5 another name.
    (PROCESSOR, '{"size": 32, "crop_size": 32, "do_resize": null}', None),
    (PROCESSOR, '{"size": 24}', "size {'shortest_edge': 24} (image_processor)"),
    (BOTH_PROCESSORS, '{"processor_class": "CLIPProcessor"}', None),  # transformers 4's
    (BOTH_PROCESSORS, '{"image_processor": {"image_processor_type": "It", "size": 32, '
                      '"crop_size": 32, "resample": 2}}', "resample 2 (image_processor)"),
])
def test_json_beside_weights_is_read_as_transformers_reads_it(
    exported, tmp_path, file, text, says
):
    shutil.copy(exported / "tiny-clip" / "model.safetensors", tmp_path / "0-model.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "0-model.safetensors"}}')
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(says)) if says else nullcontext():
        load_clip("tiny-clip", tmp_path)


# ------------------------------------------------------------------ the images

RED = (250, 10, 20)
WHITE = (255, 255, 255)


def red(mode):
    return Image.new("RGB", (8, 8), RED).convert(mode, palette=Image.Palette.ADAPTIVE)


def grey(value, kind):
    return Image.fromarray(np.full((8, 8), value, kind))


def tagged(image, **tags):
    image.info |= tags
    return image


LYING = Image.new("RGB", (8, 8), "white")
LYING.paste(RED, (0, 4, 4, 8))  # its lower left, which belongs to the upper left
TURN = Image.Exif()
TURN[0x0112] = 6  # orientation: turn it by 90 degrees


@pytest.mark.parametrize("image, expected", [
    (red("RGB"), RED),
    (red("CMYK"), RED),
    (red("P"), RED),
    (tagged(LYING, exif=TURN.tobytes()), RED),
    (Image.new("L", (8, 8), 77), (77, 77, 77)),
    (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), WHITE),
    (tagged(red("P"), transparency=red("P").getpixel((0, 0))), WHITE),
    (grey(60_000, np.uint16), (234, 234, 234)),
    (grey(200, np.uint16), (0, 0, 0)),  # of 65,535
    (tagged(red("RGB"), exif=b"Exif\0\0MM\0*"), RED),  # which cannot be read
])
def test_any_image_becomes_upright_rgb_on_white(image, expected):
    converted = train.to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.getpixel((1, 1)) == pytest.approx(expected, abs=3)


def open_images(paths, tmp_path, side=16):
    index = str(tmp_path / "index.safetensors")
    train.make_index([str(path) for path in paths], index)
    return train.Images(index, side)


def save_and_open(image, path, side):
    image.save(path, quality=95)
    return open_images([path], path.parent, side)


def test_a_thin_image_is_cropped_before_it_is_resized(tmp_path, monkeypatch):
    """The other way round, this one would take 9 GB."""
    data = save_and_open(Image.new("RGB", (60_000, 1)), tmp_path / "a.png", 224)
    resized = watch(monkeypatch, train.v2.Resize, "forward")
    assert data.load(0, augment=False)[0].shape == (3, 224, 224)
    assert [pixels.shape for _, pixels in resized] == [(3, 1, 1)]


def test_the_centre_crop_is_the_middle_square_resized_as_pillow_does(tmp_path):
    """Of a JPEG with fine detail, which decoding at too small a size would lose."""
    rows, columns = np.indices((400, 600)) // 4
    checks = 20 + 200 * ((rows + columns) % 2)
    data = save_and_open(Image.fromarray(checks.astype(np.uint8)), tmp_path / "a.jpg", 230)
    middle = Image.open(tmp_path / "a.jpg").convert("RGB").crop((100, 0, 500, 400))
    expected = np.array(middle.resize((230, 230), Image.BICUBIC), dtype=int)
    found = data.load(0, augment=False)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 3


def test_a_random_crop_holds_nine_tenths_of_the_image(tmp_path):
    rows, columns = np.indices((256, 256))
    ramp = np.stack([rows, columns, rows * 0], -1).astype(np.uint8)
    data = save_and_open(Image.fromarray(ramp), tmp_path / "a.png", 64)
    crops = data[0, 0, 0, 100 * [0]][0].float()
    spans = (crops.amax((2, 3)) - crops.amin((2, 3)))[:, :2] / 255
    areas = spans.prod(1)
    assert 0.86 < areas.min() < 0.9 < areas.median() < areas.max() <= 1


@pytest.mark.parametrize("size, kept", [((300, 200), 8 / 9), ((320, 180), 3 / 4)])
def test_a_wide_image_has_one_crop_the_central_of_4_to_3(tmp_path, size, kept):
    """As in the official code: no crop of nine tenths has a ratio of 4:3 or less."""
    ramp = np.indices(size[::-1])[1] * 255 // (size[0] - 1)
    data = save_and_open(Image.fromarray(ramp.astype(np.uint8)), tmp_path / "a.png", 64)
    crops = data[0, 0, 0, 8 * [0]][0].float()
    assert (crops == crops[0]).all()
    assert (crops.max() - crops.min()) / 255 == pytest.approx(kept, abs=0.02)
    assert crops.max() + crops.min() == pytest.approx(255, abs=2)


def test_images_that_cannot_be_decoded_are_counted_and_named(tmp_path, monkeypatch):
    """Among them an EPS by another name, which Pillow would have Ghostscript run."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", fails(pytest.fail.Exception("it was run")))
    folder = tmp_path / "zoo"
    folder.mkdir()
    noise = noise_image(np.random.default_rng(0), 48, 64)
    for name in ("a.jpg", "b.jpeg", "c.PNG", "d.gif", "e.webp", "f.bmp", "g.tif"):
        noise.save(folder / name)
    noise.resize((1, 1)).save(folder / "h.png")
    noise.save(folder / "bad.jpg", "EPS")
    grey(0.5, np.float32).save(folder / "bad.tiff")  # it does not say what white is
    good = jpeg(noise)
    half = good[:len(good) // 2]
    write_shard(tmp_path / "0.tar", [good, b"junk", good, b"", good[:300], half])
    data = open_images([folder, tmp_path / "0.tar"], tmp_path, 32)
    images, undecodable = data[0, 0, 0, list(range(len(data)))]
    assert images.shape == (8 + 2 + 6, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert sum("bad" in name for name in set(undecodable)) == 2
    assert sum("0.tar at byte" in name for name in set(undecodable)) == 4
    alone = open_images([folder / "bad.jpg"], tmp_path)
    refused(lambda _: alone[0, 0, 0, [0]], folder / "bad.jpg", "100 images in a row cannot be")


@pytest.fixture
def shard(tmp_path):
    rng = np.random.default_rng(0)
    images = [jpeg(noise_image(rng, 30, 30)) for _ in range(6)]
    write_shard(tmp_path / "data" / "0.tar", images)
    return tmp_path / "data" / "0.tar"


def test_a_block_of_bad_images_counts_each_once(shard, tmp_path, monkeypatch):
    """The stand-ins come from all over the data, as follows from seed, step and slot."""
    contents = [jpeg(Image.new("RGB", (9, 9), (i, 0, 0))) for i in range(100)]
    contents[40:60] = 20 * [b"no image"]
    write_shard(shard, contents)
    data = open_images([shard], tmp_path, 8)
    drawn = watch(monkeypatch, data, "load")
    indices = list(range(30, 70))
    images, undecodable = data[0, 0, 0, indices]
    bad = [index for (index,) in drawn if 40 <= index < 60]
    assert len(undecodable) == len(bad) < 30
    assert len(images[10:30, 0].float().mean((1, 2)).round().unique()) > 10
    for key in ("000", "100", "010", "001"):
        again, _ = data[*map(int, key), indices]
        assert torch.equal(again, images) == (key == "000")


def test_many_shards_are_indexed_in_their_order(tmp_path, capsys):
    """No bar is drawn without a terminal."""
    save_and_open(red("RGB"), tmp_path / "a.png", 8)
    contents = [[f"{shard} {i}".encode() for i in range(shard)] for shard in range(9)]
    for shard, images in enumerate(contents):
        write_shard(tmp_path / "data" / f"{shard}.tar", images)
    data = open_images([tmp_path / "data"], tmp_path)
    tars = [path.read_bytes() for path in sorted((tmp_path / "data").iterdir())]
    found = [tars[place][start:start + size] for place, start, size in data.entries]
    assert found == [image for images in contents for image in images]
    assert capsys.readouterr().err == ""


def test_data_is_indexed_once_and_anew_when_it_or_the_index_changes(shard, tmp_path, monkeypatch):
    """Its fingerprint changes with it, and is the same wherever it lies."""
    indexed = watch(monkeypatch, train, "index_shard")
    before = open_images([shard], tmp_path).fingerprint()
    assert open_images([shard], tmp_path).fingerprint() == before
    assert len(indexed) == 1
    (tmp_path / "index.safetensors").write_bytes(b"torn")
    assert open_images([shard], tmp_path).fingerprint() == before
    write_shard(shard, 6 * [b"an image"])
    after = open_images([shard], tmp_path).fingerprint()
    assert after != before
    shutil.copytree(shard.parent, tmp_path / "moved")
    assert open_images([tmp_path / "moved"], tmp_path).fingerprint() == after


def test_a_process_that_may_hold_cuda_has_workers_that_are_not_forked(
    shard, tmp_path, monkeypatch
):
    data = open_images([shard], tmp_path)
    s = settings("--workers", 1, "--batch-size", 2, "--accum", 1)
    assert gh.start_method() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gh.start_method() == "forkserver"
    loader = train.load_batches(s, data, 0, 2, torch.device("cpu"))
    for (images, _), key in zip(loader, train.batch_keys(s, 6, 0, 2), strict=True):
        assert torch.equal(images, data[key][0])


def test_a_shard_that_is_not_whole_is_an_error_that_names_it(shard, tmp_path):
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        starts = [member.offset for member in tar]
    middle, last = starts[9], starts[17]
    for content in (
        b"",
        whole[:middle],
        whole[:last + 1024],
        whole[:middle + 148] + b"0000000" + whole[middle + 155:],  # the header's checksum
        whole[:middle] + bytes(2048) + whole[middle + 2048:],
        gzip.compress(whole),
    ):
        shard.write_bytes(content)
        refused(lambda shard: open_images([shard], tmp_path), shard, "download it again")
        assert not (tmp_path / "index.safetensors").exists()


def test_a_shard_that_changes_while_a_run_uses_it_is_an_error(shard, tmp_path):
    """Its time may be another, as that of a copy on another node is."""
    data = open_images([shard], tmp_path)
    image, _ = data.load(5, augment=False)
    os.utime(shard, ns=(1, 1))
    assert torch.equal(data.load(5, augment=False)[0], image)
    os.truncate(shard, 2000)
    refused(lambda _: data.load(5), shard, "does not have the size that was indexed")
    os.remove(shard)
    refused(lambda _: data.load(5), shard, "cannot be read (No such file")


def test_a_folder_is_searched_for_images_and_nothing_else(tmp_path, capsys):
    """Below it and behind links, in each folder once; no FIFO or device, which have no end."""
    data, disk = tmp_path / "data", tmp_path / "disk"
    images = ["10481_3355970027", "a.JPG", "b.jfif", "deeper/a.webp", "linked/far/a.png"]
    others = ["a.svg", "b.AVIF", "c.heic", "d.tar.gz", "e.zip", "f.parquet"]
    unseen = [".a.jpg", ".trash/a.jpg", "a.txt", "a.JSON"]
    (disk / "far").mkdir(parents=True)
    data.mkdir()
    os.symlink(disk, data / "linked")
    os.symlink(disk / "far", data / "twice")
    os.symlink(data, disk / "loop")
    os.symlink("/dev/zero", data / "device.png")
    os.mkfifo(data / "fifo.png")
    for name in images + others + unseen:
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).touch()
    assert train.find_images([str(data)]) == ([], [f"{data}/{name}" for name in images])
    said = capsys.readouterr().out
    assert f"neither images nor .tar shards: 6, such as {data}/a.svg" in said
    (data / "0.tar").touch()
    both = ("both 1 tar shards", "and 4 images", "name one kind")
    refused(lambda path: train.find_images([str(path)]), data, *both)
    for name in images[1:]:
        (data / name).unlink()
    # Beside shards, a file without a suffix is no image, and Parquet of the same name is metadata.
    (data / "f.parquet").rename(data / "0.parquet")
    assert train.find_images([str(data)]) == ([f"{data}/0.tar"], [])
    assert "shards: 6, such as" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["0.tar.gz", "0.zip", "0.parquet"])
def test_a_container_that_is_not_read_is_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).touch()
    ways_out = ("unpack .zip and .tar.gz", "convert .parquet")
    refused(lambda path: train.find_images([str(path)]), tmp_path, *ways_out)


def test_every_image_comes_once_in_an_epoch_however_many_processes_share_it(monkeypatch):
    """In an order that follows from the seed; a run goes on at its exact position in it."""
    n, batch = 52, 3  # which lets micro-batches reach into the next epoch
    orders = []
    for seed, world_size, accum in ((5, 1, 1), (5, 4, 1), (5, 2, 2), (5, 1, 4), (6, 1, 1)):
        s = settings("--seed", seed, "--accum", accum, "--batch-size", batch)
        monkeypatch.setattr(train, "WORLD", world_size)
        steps = n // (accum * world_size)  # three epochs
        keys = []
        for rank in range(world_size):
            monkeypatch.setattr(train, "RANK", rank)
            own = list(train.batch_keys(s, n, 0, steps))
            assert list(train.batch_keys(s, n, 5, steps)) == own[5 * accum:]
            keys += own
        orders.append([index for *_, indices in sorted(keys) for index in indices])
    assert orders[0] == orders[1] == orders[2] == orders[3] != orders[4]
    epochs = [orders[0][start:start + n] for start in (0, n, 2 * n)]
    assert [sorted(epoch) for epoch in epochs] == 3 * [list(range(n))]
    assert epochs[0] != epochs[1]


# ------------------------------------------------------------------ training, for real

def arguments(world, out, *more):
    """A run of six steps on 60 images, with models of about a million parameters."""
    typed = """
        --backbone tiny-clip --clip-weights {world}/tiny-clip.safetensors
        --vae {world}/vae.safetensors --vqgan {world}/vqgan.safetensors
        --data {world}/data --out {out}
        --width 128 --condition 48 64 --depth 1 1 --layers 2
        --steps 6 --batch-size 2 --accum 2 --workers 0 --precision fp32
        --save-every 2 --log-every 1 --sample-every 3"""
    words = [word.format(world=world, out=out) for word in typed.split()]
    return words + [str(value) for value in more]


def settings(*typed):
    """What train.py reads off a command line, for its first stage."""
    return train.read_settings(["--stage", "1", *map(str, typed)])[0]


def rf(world, out, *more):
    return arguments(world, out, "--warmup", 0, "--val", world / "val", *more)


def perceiver(world, out, *more):
    typed = ("--denoiser", "perceiver", "--freeze-denoiser", "--sample-every", 6)
    return arguments(world, out, *typed, *more)


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """rf: both stages, with the benchmark before and after; perceiver: LoRA alone in stage 2."""
    out = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(1)
    images = [jpeg(noise_image(rng, 40, 50)) for _ in range(4)]
    write_shard(world / "val" / "0.tar", images)
    benchmark = make_benchmark(out / "mmvp", ["Colour", "State"])
    with (
        pytest.MonkeyPatch.context() as patch,
        open(out / "said", "w") as said,
        redirect_stdout(said),
    ):
        patch.setattr(socket, "getaddrinfo", None)  # no step needs the network
        patch.setattr(socket.socket, "connect", None)
        train.main(rf(world, out / "rf", "--benchmark", benchmark, "--export-every", 4))
        for stage in (1, 2):
            train.main(perceiver(world, out / "perceiver", "--stage", stage))
    return out


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def trained_weights(folder):
    tensors = load_file(folder / "step-00000006.safetensors")
    return {key[6:]: tensors[key] for key in tensors if key.startswith("model.")}


def built(world, out, *more):
    s = settings(*arguments(world, out, *more))
    return s, train.build_model(s, train.load_pretrained(s), torch.device("cpu"))


VISUAL = types.SimpleNamespace(preprocess_cfg={"size": 8})  # all that a Stub needs of a tower


class Stub(nn.Module):
    """Stands in for GenHancer where the model does not matter: it trains in no time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Linear(1, 1).requires_grad_(False)
        self.denoiser = nn.Linear(3 * 8 * 8, 4)
        self.projectors = nn.ModuleDict()
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.autoencoder = types.SimpleNamespace(encode=lambda images, sample: images)

    def forward(self, images, other=None):
        noise = torch.randn(len(images), 4)
        losses = (self.denoiser(images.flatten(1)) - noise).square().mean(1)
        return losses, torch.rand(len(images))

    def reconstruct(self, images):
        return images


def train_stub(world, out, *more):
    """Run stage 1 with a Stub for a model, and return its folder."""
    pretrained = train.Pretrained(VISUAL, None, {}, {"CLIP": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_pretrained", lambda s: pretrained)
        patch.setattr(train, "build_model", lambda *_: Stub())
        train.main(arguments(world, out, "--stage", 1, *more))
    return out / "stage1"


def test_a_stages_files_hold_what_it_trained(trained):
    """Stage 2 trains LoRA, and the denoiser unless it is frozen."""
    before = load_file(trained / "rf" / "stage1" / "last.safetensors")
    assert {name.split(".")[0] for name in before} == {"denoiser", "projectors"}
    after = trained_weights(trained / "rf" / "stage2")
    lora = {name for name in after if "lora" in name}
    assert len(lora) == 2 * (2 * 4 + 1)  # two blocks: qkv, out, fc, proj; and the tower's proj
    assert after.keys() == before.keys() | lora
    weights = [name for name in before if not name.endswith("bias")]
    assert not any(torch.equal(before[name], after[name]) for name in weights)
    assert trained_weights(trained / "perceiver" / "stage2").keys() == lora


def test_lora_and_proj_alone_change_in_clip(world, trained):
    """Until --export-every asks for a CLIP, and from there to the result."""
    original = load_file(world / "tiny-clip.safetensors")
    halfway, result = [
        load_file(trained / "rf" / folder / "open_clip_model.safetensors")
        for folder in ("clip-000004", "open_clip")
    ]
    matrices = {name for name, tensor in original.items()
                if name.startswith("visual.transformer.") and tensor.dim() == 2}
    for before, after in ((original, halfway), (halfway, result)):
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == matrices | {"visual.proj"}
    assert not list((trained / "perceiver").glob("clip-*"))


def test_the_result_computes_in_plain_open_clip_what_the_trained_tower_did(world, trained):
    folder = trained / "rf" / "open_clip"
    clip = open_clip.create_model(f"local-dir:{folder}").eval()
    _, model = built(world, trained / "rf", "--stage", 2)
    weights = trained_weights(trained / "rf" / "stage2")
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(clip.visual(images), model.eval().visual(images), 1e-5)
    exported = load_file(trained / "rf" / "hf" / "model.safetensors")
    assert torch.equal(exported["visual_projection.weight"], clip.visual.proj.T)
    config = [path / "open_clip_config.json" for path in (folder, trained / "rf" / "clip-000004")]
    assert config[0].read_text() == config[1].read_text()


def test_before_is_the_backbone_and_after_the_result(tmp_path, monkeypatch):
    """Also where a set fails: the rest is written first."""
    def load(name, weights):
        return types.SimpleNamespace(to=lambda device: weights), None, None

    def measure(weights, *_):
        return dict.fromkeys((*shown, "more"), weights) | {"failures": ["cars was not evaluated"]}

    shown = ("average", "patterns", "zeroshot")
    monkeypatch.setattr(train, "load_clip", load)
    monkeypatch.setattr(train, "evaluate", measure)
    monkeypatch.setattr(train, "print_table", lambda *_: None)
    s = settings("--stage", 2, "--out", tmp_path, "--clip-weights", "original")
    refused(lambda _: train.evaluate_before_and_after(s, None), "cars was not evaluated")
    result = json.loads((tmp_path / "result.json").read_text())
    weights = {"before": "original", "after": s.result}
    assert result == {key: dict.fromkeys(shown, file) for key, file in weights.items()}


def test_a_run_says_how_to_open_its_result_and_what_the_latents_are(trained):
    said = (trained / "said").read_text()
    assert re.findall("stage . is done.*: (.*)", said) == [
        f"{trained}/rf/stage1/last.safetensors",
        eval_mmvp.loading_hint("tiny-clip", f"{trained}/rf"),
        f"{trained}/perceiver/stage1/last.safetensors",
        eval_mmvp.loading_hint("tiny-clip", f"{trained}/perceiver"),
    ]
    assert len(re.findall("latents: mean .*, standard deviation", said)) == 1


@pytest.mark.parametrize("name, says", [
    ("openai-l14-336", "$"),
    ("siglip-so400m-384", ".*timm/ViT-B-16-SigLIP .* google/siglip-so400m-patch14-384"),
    ("ViT-gopt-16-SigLIP2-256:webli", ".*timm/ViT-.*SigLIP2.* google/siglip2-so400m-patch14-384"),
])
def test_the_calls_that_open_a_result_and_a_siglips_tokenizers_are_named(name, says):
    calls, _, text = eval_mmvp.loading_hint(name, "runs/it").partition("; for text, add the ")
    assert "open_clip.create_model_and_transforms('local-dir:runs/it/open_clip')" in calls
    assert "transformers.AutoModel.from_pretrained('runs/it/hf')" in calls
    assert re.match(says, text)


@pytest.mark.parametrize("spread, doubts", [(0.25, True), (0.6, False), (1.5, False), (3, True)])
def test_latents_far_from_unit_variance_are_doubted_without_a_draw(capsys, spread, doubts):
    """By a VAE that gives images of two values back, moved by 0.2."""
    core = Stub()
    core.autoencoder = types.SimpleNamespace(
        encode=lambda images, sample: spread * images + 0.2 + sample)
    images = 255 * (torch.arange(9 * 3 * 64 * 64) % 2).view(9, 3, 64, 64)
    state = torch.get_rng_state()
    s = settings("--vae", "sd3.safetensors")
    train.print_summary(s, core, [], images, 1, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    said = capsys.readouterr().out
    assert f"latents: mean 0.20, standard deviation {spread:.2f}" in said
    assert ("is sd3.safetensors the right VAE" in said) == doubts


@pytest.mark.parametrize("run, level, rates, sampled, columns", [
    ("rf", "t", 6 * [1e-4], ["3", "6"], 2),
    ("perceiver", "mask", [1e-5, 2e-5, 3e-5, 4e-5, 5e-5, 6e-5], [], 3),
])
def test_log_and_pictures_tell_what_happened(trained, run, level, rates, sampled, columns):
    rows = read_log(trained / run / "stage1")
    assert [row["step"] for row in rows] == list("123456")
    assert float(rows[2]["epoch"]) == pytest.approx(3 * 4 / 60, abs=1e-4)
    for name in ("loss", "grad_norm", "images_per_s", "peak_memory_gb"):
        assert all(math.isfinite(float(row[name])) for row in rows)
    assert any(row[f"loss_{level}_0.5"] for row in rows)
    for name in ("heldout", "heldout_shuffled"):
        assert [row["step"] for row in rows if row[name]] == sampled
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    picture = Image.open(trained / run / "stage1" / "samples" / "000006.png")
    assert picture.width == 2 * columns * (4 * 32 + 2) + 2


def test_a_finished_run_is_left_alone(world, trained, capsys):
    files = [path for path in (trained / "perceiver" / "stage1").rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    train.main(perceiver(world, trained / "perceiver", "--stage", 1))
    assert "stage 1 is finished" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize("device", DEVICES)
def test_compile_changes_no_loss_and_leaves_pictures_alone(world, tmp_path, monkeypatch, device):
    """A process on a GPU is not forked: it does not have this backend, and compiles by inductor."""
    def backend(graph, _):
        callers = {frame.name for frame in traceback.extract_stack()}
        print("a graph of", "other" if callers & {"write_samples", "validate"} else "training")
        return graph

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m: compile_module(m, backend=backend))
    for more in ([], ["--compile"]):
        argv = perceiver(world, tmp_path / f"run{len(more)}", "--stage", 1, "--steps", 2, *more)
        in_a_process(tmp_path / "said", train.main, argv, device=device).join()
    assert_close_logs(tmp_path / "run0" / "stage1", tmp_path / "run1" / "stage1")
    graphs = re.findall("a graph of (other|training)", (tmp_path / "said").read_text())
    assert set(graphs) == {"training"} or device == "cuda"


def test_flux_weights_or_the_seed_are_what_a_denoiser_starts_from(world, tmp_path):
    one, same, other = [built(world, tmp_path, "--seed", n)[1].denoiser for n in (1, 1, 2)]
    assert_same_weights(one, same)
    assert not torch.equal(one.img_in.weight, other.img_in.weight)
    save_file(fill(other, 0.02).state_dict(), tmp_path / "flux.safetensors")
    _, model = built(world, tmp_path, "--seed", 1, "--init", tmp_path / "flux.safetensors")
    assert_same_weights(model.denoiser, other)
    assert all(p.requires_grad for p in model.denoiser.parameters())


def test_the_flags_reach_the_model(world, tmp_path):
    flags = ("--timesteps", "uniform", "--scale", 0.1, "--local-ratio", 0.5, "--grad-checkpoint")
    _, model = built(world, tmp_path, *flags)
    assert (model.distribution, model.scale, model.num_locals) == ("uniform", 0.1, 8)
    assert model.denoiser.grad_checkpointing and model.visual.transformer.grad_checkpointing
    more = ("--denoiser", "perceiver", "--mask-ratio", 0.2, 0.3, "--layers", 3)
    _, model = built(world, tmp_path, *more, "--local-ratio", 0.25)
    assert (model.mask_ratio, model.num_locals) == ([0.2, 0.3], 4)
    assert len(model.denoiser.layers) == 3


def test_the_denoisers_of_the_paper_have_its_sizes():
    """Sec. 5.1; FLUX.1-dev's head has 128 features, ViT's 64."""
    vae = types.SimpleNamespace(config=AutoEncoderConfig())
    assert train.flux_config(settings(), vae) == gh.FluxConfig()
    perceiver = train.perceiver_config(settings("--denoiser", "perceiver"), torch.zeros(16384, 256))
    assert perceiver == gh.PerceiverConfig()


def test_without_lora_the_whole_tower_trains_and_is_the_result(world, tmp_path):
    """Fig. 8; the text tower stays."""
    s, model = built(world, tmp_path, "--stage", "e2e", "--no-lora")
    assert all(p.requires_grad for p in model.visual.parameters())
    perturb(model.visual)
    clip = train.build_enhanced_clip(s, model.state_dict())
    assert_same_weights(clip.visual, model.visual)
    original = load_file(world / "tiny-clip.safetensors")
    assert torch.equal(clip.token_embedding.weight, original["token_embedding.weight"])


def test_denoiser_and_clip_have_rates_of_their_own(world, tmp_path):
    s, model = built(world, tmp_path, "--stage", "e2e", "--lr", 3e-4, "--lr-clip", 2e-5)
    groups = train.make_optimizer(s, model).param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[p] == (2e-5 if "lora" in name else 3e-4), name


def test_in_bf16_the_frozen_vae_keeps_its_weights_in_bf16(world, tmp_path):
    """And its latents come out in float32, within bf16's error of those of float32."""
    s, model = built(world, tmp_path, "--precision", "bf16")
    vae = model.autoencoder
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    images = 2 * torch.rand(4, 3, 32, 32) - 1
    with train.autocast(s, torch.device("cpu")):
        latents = vae.encode(images, sample=False)
    assert latents.dtype == torch.float32
    assert_close(latents, load_vae(s.vae).encode(images, sample=False), 0.05)


@pytest.mark.parametrize("more, order", [([], [0, 1, 2]), (["--shuffle-target"], [2, 0, 1])])
def test_the_control_alone_conditions_on_other_images(world, tmp_path, monkeypatch, more, order):
    calls = watch(monkeypatch, Stub, "forward")
    train_stub(world, tmp_path, "--steps", 1, "--batch-size", 3, *more)
    _, images, condition_images = calls[0]
    assert torch.equal(condition_images, images[order])
    assert not torch.equal(images[0], images[1])
    assert 0.4 < images.mean() < 0.6  # noise, in [0, 1]


@pytest.mark.parametrize("largest", [0.5, 1000])
def test_a_step_is_adamw_on_the_clipped_mean_gradient(world, tmp_path, monkeypatch, largest):
    """AdamW (Loshchilov and Hutter 2019, Algorithm 2), with the settings of App. B, by hand."""
    forward, gradients = Stub.forward, []
    flat = nn.utils.parameters_to_vector

    def watched(self, images, other=None):
        losses, levels = forward(self, images, other)
        parameters = list(self.denoiser.parameters())
        gradient = torch.autograd.grad(losses.mean(), parameters, retain_graph=True)
        gradients.append(flat(gradient))
        return losses, levels

    monkeypatch.setattr(Stub, "forward", watched)
    more = ("--clip-grad", largest, "--lr", 0.1, "--warmup", 4, "--weight-decay", 0.2)
    folder = train_stub(world, tmp_path, *more)
    w = flat(Stub().denoiser.parameters()).detach()
    m = v = 0
    for t, lr in enumerate([0.025, 0.05, 0.075, 0.1, 0.1, 0.1], 1):
        g = (gradients.pop(0) + gradients.pop(0)) / 2
        assert 0.5 < g.norm() < 1000
        g *= min(1, largest / g.norm())
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        mean = m / (1 - 0.9**t)
        square = v / (1 - 0.999**t)
        w = w - lr * (0.2 * w + mean / (square.sqrt() + 1e-8))
    made = load_file(folder / "step-00000006.safetensors")
    for kind, expected in (("model", w), ("exp_avg", m), ("exp_avg_sq", v)):
        parts = [made[f"{kind}.denoiser.{name}"] for name in ("weight", "bias")]
        assert_close(flat(parts), expected)


@pytest.mark.parametrize("step, due", [
    (5, "save"), (7, "export"), (11, ""), (12, "row sample"), (14, "row sample save")])
def test_what_is_due_after_a_step_of_14(step, due):
    """After the last, all but a CLIP along the way, which stage 1 never exports."""
    every = ("--log-every", 3, "--sample-every", 4, "--save-every", 5, "--export-every", 7)
    due = set(due.split())
    assert train.list_due(settings(*every, "--stage", 2), step, 14) == due
    assert train.list_due(settings(*every), step, 14) == due - {"export"}


def test_a_row_of_the_log_is_made_of_means(tmp_path):
    s = settings("--out", tmp_path, "--batch-size", 4, "--accum", 1)
    log = train.Log(s, 0, 10, 80, torch.device("cpu"))
    levels = torch.tensor([0.05, 0.95, 0.99, 1.0])
    for step, losses in ((1, [1.0, 2, 3, 4]), (2, [9.0, 1, 1, 4])):
        log.add(torch.tensor(losses), levels, [])
        log.write_row(step, torch.tensor(0.5), 1e-3, [1.25, 2.5])
        row = read_log(tmp_path / "stage1")[-1]
        expected = {"step": step, "epoch": step * 4 / 80, "grad_norm": 0.5, "lr": 1e-3,
                    "heldout": 1.25, "heldout_shuffled": 2.5, "loss": sum(losses) / 4,
                    "loss_t_0.0": losses[0], "loss_t_0.9": sum(losses[1:]) / 3}
        assert {name: float(row[name]) for name in expected} == expected
        assert row["loss_t_0.5"] == ""


def test_a_validation_loss_is_the_mean_over_all_images(tmp_path, monkeypatch):
    """With the right [CLS] and with that of the image before; in micro-batches of uneven sizes."""
    def forward(self, images, condition_images):
        assert not self.training and not torch.is_grad_enabled()
        return (images - condition_images).mean((1, 2, 3)).abs(), None

    monkeypatch.setattr(Stub, "forward", forward)
    images = torch.tensor([10, 20, 50, 90, 255], dtype=torch.uint8)
    s = settings("--batch-size", 2, "--precision", "fp32", "--out", tmp_path)
    model = Stub()
    losses = train.validate(s, model, images.view(5, 1, 1, 1).expand(5, 3, 4, 4))
    assert losses == pytest.approx([0, (245 + 10 + 30 + 40 + 165) / 5 / 255])
    assert model.training


def test_the_bench_needs_no_weights_and_counts_the_models_own_work(
        world, tmp_path, monkeypatch, capsys):
    """The same speed is the same TFLOP/s, though --grad-checkpoint computes blocks twice."""
    monkeypatch.setattr(train, "load_autoencoder", lambda *_: load_vae(world / "vae.safetensors"))
    count, counts = FlopCounterMode.get_total_flops, []

    def count_millions(counter):  # so that the tiny model's work shows
        counts.append(1e6 * count(counter))
        return counts[-1]

    monkeypatch.setattr(FlopCounterMode, "get_total_flops", count_millions)
    typed = "--preset bench --backbone tiny-clip --width 128 --depth 1 1 --batch-size 2 --steps 2"
    typed = [*typed.split(), "--out", str(tmp_path)]
    for more in ([], ["--grad-checkpoint"]):
        clock = iter([0, 4, 4, 4.5, 4.5])  # 1 image / s in the first row, 8 in the second
        monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=clock.__next__))
        train.main([*typed, *more])
        said = capsys.readouterr().out
        assert re.search("s / 100 iterations +50.00\nimages / s +8\npeak memory", said)
        tflops = float(re.search("model TFLOP/s +([0-9.]+)", said)[1])
        assert tflops == pytest.approx(2 * 2 * counts[0] / 1e12, abs=0.01)  # 2 steps / s
    assert counts[0] == counts[1]
    assert not (tmp_path / "stage1" / "last.safetensors").exists()


# ------------------------------------------------------------------ killed, disturbed, continued

def told(said, work, *more):
    """Do work(*more), and tell the file `said` what it has to say."""
    if not open_clip.get_model_config("tiny-clip"):  # this process was not forked
        register(os.environ["TINY_WORLD"])
    torch.set_num_threads(1)  # after a fork two threads that ask for it at once can fail
    with open(said, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        work(*more)


def in_a_process(said, work, *more, device="cpu"):
    """Start work(*more) in a process of its own; on a GPU in a fresh one, which may use it."""
    context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
    process = context.Process(target=told, args=(said, work, *more))
    process.start()
    return process


def killed_at(step, work, *more):
    """Do work(*more), and die of SIGKILL when the noise of a step is drawn."""
    seed_draws = train.seed_draws

    def fatal(stream, *key):
        if stream == "noise" and key[1] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        seed_draws(stream, *key)

    train.seed_draws = fatal
    work(*more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run, stage", [(rf, 2), (perceiver, 1)])
def test_a_killed_run_ends_in_the_same_bits(world, trained, tmp_path, device, run, stage):
    """On a GPU, in nearly the same losses."""
    def status(out, *work):
        if stage == 2:
            shutil.copytree(whole / "stage1", out / "stage1", dirs_exist_ok=True)
        argv = run(world, out, "--stage", stage, "--workers", 1)
        process = in_a_process(tmp_path / "said", *work, argv, device=device)
        process.join()
        return process.exitcode

    whole, killed = trained / run.__name__, tmp_path / "killed"
    assert status(killed, killed_at, 5, train.main) == -signal.SIGKILL
    assert status(killed, train.main) == 0
    assert "resumed from" in (tmp_path / "said").read_text()
    if device == "cuda":
        assert status(tmp_path / "whole", train.main) == 0
        assert_close_logs(tmp_path / "whole" / f"stage{stage}", killed / f"stage{stage}")
    else:
        results = ("open_clip/open_clip_model.safetensors", "hf/model.safetensors") * (stage == 2)
        assert_same_run(whole, killed, f"stage{stage}", *results)


def assert_close_logs(one, other):
    for row, same in zip(read_log(one), read_log(other), strict=True):
        for name in ("loss", "grad_norm", "heldout"):
            if row[name]:
                assert float(same[name]) == pytest.approx(float(row[name]), rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_an_exported_clip_is_evaluated(world, trained, tmp_path, device):
    """By the command, with the result that the run itself had, on the CPU."""
    argv = ["--backbone", "tiny-clip", "--weights", str(trained / "rf" / "open_clip"),
            "--benchmark", str(trained / "mmvp"), "--json", str(tmp_path / "it.json")]
    in_a_process(tmp_path / "said", eval_mmvp.main, argv, device=device).join()
    after = json.loads((trained / "rf" / "result.json").read_text())["after"]
    assert json.loads((tmp_path / "it.json").read_text())["after"]["patterns"] == after["patterns"]


def assert_same_run(one, other, stage, *results):
    files = [path for path in (one / stage).rglob("*.*") if path.suffix != ".csv"]
    for path in files + [one / name for name in results]:
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path
    for row, same in zip(read_log(one / stage), read_log(other / stage), strict=True):
        for name in ("step", "epoch", "loss", "grad_norm", "lr", "heldout"):
            assert row[name] == same[name]


@pytest.fixture(scope="session")
def stub_run(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("stub")
    train_stub(world, out)
    return out


def test_the_newest_two_checkpoints_are_kept(stub_run):
    names = sorted(path.name for path in (stub_run / "stage1").glob("step-*"))
    assert names == ["step-00000004.safetensors", "step-00000006.safetensors"]


def test_training_goes_on_while_a_checkpoint_is_written(world, stub_run, tmp_path, monkeypatch):
    """That of step 4 waits for step 5, and is of step 4 all the same."""
    write, list_due = train.write_weights, train.list_due
    went_on = threading.Event()

    def late_write(path, *more):
        if path.endswith("step-00000004.safetensors"):
            assert went_on.wait(30)
        write(path, *more)

    def after_a_step(s, step, total):
        if step == 5:
            went_on.set()
        return list_due(s, step, total)

    monkeypatch.setattr(train, "write_weights", late_write)
    monkeypatch.setattr(train, "list_due", after_a_step)
    train_stub(world, tmp_path)
    assert_same_run(stub_run, tmp_path, "stage1")


@pytest.fixture
def stopped(stub_run, tmp_path):
    """A copy of that run, as if it had been killed before it wrote its result."""
    out = shutil.copytree(stub_run, tmp_path / "stopped")
    os.remove(out / "stage1" / "last.safetensors")
    return out


def go_on(world, stub_run, out, capsys, start, *more):
    """Go on from the steps in `start`, one or none, and end as `stub_run`; what the run says."""
    capsys.readouterr()
    train_stub(world, out, *more)
    said = capsys.readouterr().out
    assert [int(step) for step in re.findall("resumed from .*step-0*([0-9]+)", said)] == start
    assert_same_run(stub_run, out, "stage1")
    return said


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit": flip_a_bit,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "no seal": lambda path: save_file(load_file(path), path),
    "older": lambda path: shutil.copy(path.with_name("step-00000004.safetensors"), path),
}


@pytest.mark.parametrize("damage, steps, start", [
    ("a bit", [6], [4]),
    ("half", [6, 4], []),
    ("no seal", [6], [4]),
    ("older", [8, 7, 6], [4]),
])
def test_damaged_checkpoints_are_skipped(
        world, stub_run, stopped, tmp_path, capsys, damage, steps, start):
    """Also by a run that goes on with its data elsewhere; a damaged result is written again."""
    for step in steps:
        DAMAGE[damage](stopped / "stage1" / f"step-{step:08}.safetensors")
    moved = shutil.copytree(world / "data", tmp_path / "moved")
    said = go_on(world, stub_run, stopped, capsys, start, "--data", moved)
    assert [int(step) for step in re.findall("step-0*([0-9]+).*: skipped", said)] == steps
    flip_a_bit(stopped / "stage1" / "last.safetensors")
    go_on(world, stub_run, stopped, capsys, [6])


@pytest.mark.parametrize("name, start", [
    ("settings.json", []),
    ("log.csv", []),
    ("000003.png", [2]),
    ("step-00000006.safetensors", [4]),
    ("last.safetensors", [6]),
])
def test_a_full_disk_is_one_line(world, stub_run, tmp_path, monkeypatch, capsys, name, start):
    replace = os.replace

    def full(source, target):
        if target.endswith(name):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = refusal(capsys, train_stub, world, tmp_path)
    assert f"{name} could not be written (No space left on device)" in line
    assert not list(tmp_path.rglob(".part-*"))
    assert not (tmp_path / "stage1" / "last.safetensors").exists()
    go_on(world, stub_run, tmp_path, capsys, start)


def refusal(capsys, work, *more):
    """The one line in which work(*more) ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        work(*more)
    forget(stop)
    line = one_line(capsys.readouterr().err)
    assert stop.value.code == (130 if line.endswith("interrupted") else 2)
    return line


def one_line(said):
    """The one line of the program's own among the progress bars; there must be no traceback."""
    assert "Traceback" not in said, said
    lines = [line for line in re.split("[\r\n]", said) if line.startswith("train.py: ")]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.parametrize("owner, name, fault, says", [
    (train.Images, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL),
     "a data worker died, .* --ipc=host"),
    (torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf),
     "the gradient is not finite at step 2: "),
    (train.Log, "add", fails(KeyboardInterrupt), "interrupted"),
])
def test_what_stops_a_run_is_one_line(
        world, tmp_path, monkeypatch, capsys, owner, name, fault, says):
    saved = watch(monkeypatch, train.Checkpoints, "save")
    monkeypatch.setattr(owner, name, fault)
    line = refusal(capsys, train_stub, world, tmp_path, "--workers", 1, "--log-every", 2)
    assert re.match(f"train.py: {says}", line)
    assert not saved


def test_an_unreadable_log_is_one_line_until_it_is_moved_away(world, stopped, capsys):
    os.remove(stopped / "stage1" / "step-00000006.safetensors")
    DAMAGE["half"](stopped / "stage1" / "log.csv")
    assert "log.csv cannot be read" in refusal(capsys, train_stub, world, stopped)
    os.remove(stopped / "stage1" / "log.csv")
    rows = read_log(train_stub(world, stopped))
    assert [int(row["step"]) for row in rows] == [5, 6]


def test_what_a_killed_run_was_writing_is_removed(world, stopped):
    for folder in ("", "stage1", "stage1/samples", "open_clip", "clip-000004", "another"):
        (stopped / folder).mkdir(exist_ok=True)
        (stopped / folder / ".part-it").write_text("half")
    train_stub(world, stopped)
    assert list(stopped.rglob(".part-*")) == [stopped / "another" / ".part-it"]


def write_bad_data(folder, every):
    """60 images, of which each so many-th cannot be decoded."""
    images = [jpeg(Image.new("RGB", (9, 9), (4 * i, 0, 0))) for i in range(60)]
    images = [image if i % every else b"bad" for i, image in enumerate(images)]
    write_shard(folder / "0.tar", images)
    return folder


def test_bad_images_are_counted_and_a_killed_run_draws_the_same_for_them(world, tmp_path, capsys):
    each_image_once = ("--data", write_bad_data(tmp_path / "data", 30), "--steps", 15)
    rows = read_log(train_stub(world, tmp_path / "whole", *each_image_once))
    assert rows[-1]["undecodable"] == "2"
    assert capsys.readouterr().err.count("replaced by another: ") == 2
    killed = (world, tmp_path / "killed", *each_image_once)
    in_a_process(tmp_path / "said", killed_at, 12, train_stub, *killed).join()
    train_stub(*killed)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", "stage1")


def test_too_many_bad_images_stop_a_run_at_the_latest_at_its_end(world, tmp_path, capsys):
    data = write_bad_data(tmp_path / "data", 4)
    line = refusal(capsys, train_stub, world, tmp_path, "--data", data)
    assert " of 24 images cannot be decoded" in line
    assert not (tmp_path / "stage1" / "last.safetensors").exists()


@pytest.mark.parametrize("start, step, total, bad, judged", [
    (0, 10, 99, 101, True),
    (0, 10, 99, 100, False),
    (0, 9, 99, 900, False),   # too few to tell
    (0, 9, 9, 91, True),      # but they are all that there are
    (5, 14, 14, 900, False),  # else a run whose last few images are bad could never end
    (5, 15, 99, 101, True),
])
def test_more_than_a_tenth_of_enough_images_is_too_many(tmp_path, start, step, total, bad, judged):
    s = settings("--out", tmp_path, "--batch-size", 50, "--accum", 2)
    log = train.Log(s, start, total, 80, torch.device("cpu"))
    log.undecodable = bad
    says = f"{bad} of {100 * (step - start)} images cannot be decoded"
    with pytest.raises(UserError, match=says) if judged else nullcontext():
        log.check_undecodable(step)


# ------------------------------------------------------------------ machines

def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path, monkeypatch, capsys):
    """But not for a file system without locks."""
    with train.lock_run_directory(settings("--out", tmp_path / "run")):
        process = in_a_process(tmp_path / "said", train_stub, world, tmp_path / "run")
        process.join()
    assert process.exitcode == 2
    assert "is in use by another run" in one_line((tmp_path / "said").read_text())
    monkeypatch.setattr(fcntl, "lockf", fails(OSError(errno.ENOLCK, "no lock")))
    train_stub(world, tmp_path / "run")
    assert "a file system without locks (no lock)" in capsys.readouterr().out


def test_an_out_that_a_node_does_not_see_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RANK", 8)
    s = settings("--out", tmp_path)
    refused(lambda _: train.open_data(s, "data", 8), tmp_path, "rank 8", "that all nodes share")


def test_windows_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert "Linux, macOS and WSL" in refusal(capsys, train.main, [])


def test_an_older_python_is_refused_in_one_line(monkeypatch, capsys):
    for name in ("genhancer", "vae", "vqgan", "train", "eval_mmvp"):
        with open(os.path.join(HERE, f"{name}.py"), encoding="utf-8") as file:
            ast.parse(file.read(), feature_version=(3, 10))  # which must get as far as the line
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    status, line = command(capsys, lambda argv: None)
    assert status == 2 and line.startswith("it.py: Python 3.11 or newer is needed")


# ------------------------------------------------------------------ several processes

def rank(variables, work, *more):
    """Do work(*more) as a process of torchrun's, in which these variables are set."""
    os.environ |= {"MASTER_ADDR": "localhost"} | variables
    importlib.reload(train)
    work(*more)


def in_two_processes(folder, works, device="cpu"):
    """Do two works, each a tuple of function and arguments; what they said, and their statuses."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]  # a free one
    names = [folder / f"said-{number}" for number in range(2)]
    processes = []
    for number, work in enumerate(works):
        variables = {"RANK": str(number), "LOCAL_RANK": str(number)}
        variables |= {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        processes.append(in_a_process(names[number], rank, variables, *work, device=device))
    for process in processes:
        process.join(60 if device == "cpu" else 300)
        process.kill()
    return [name.read_text() for name in names], [process.exitcode for process in processes]


def in_both(folder, work, *more, device="cpu"):
    """Do work(*more) in each of two processes, which must succeed; what they said."""
    said, statuses = in_two_processes(folder, 2 * [(work, *more)], device)
    assert statuses == [0, 0], said
    return said


def train_e2e(world, out, *more):
    train.write_samples = lambda *_: None  # which takes longer than the steps
    typed = ("--stage", "e2e", "--steps", 3, "--local-ratio", 0.3)
    train.main(arguments(world, out, *typed, *more))


TWO_DEVICES = ["cpu"] + ["cuda"] * (len(DEVICES) > 1 and torch.cuda.device_count() > 1)


@pytest.mark.parametrize("device", TWO_DEVICES)
def test_one_process_two_and_shards_walk_the_same_path(world, tmp_path, device):
    """But for rounding; they also go on from where two processes were after their second step."""
    def alone(out):
        in_a_process(tmp_path / "said", train_e2e, world, out, device=device).join()
        return (tmp_path / "said").read_text()

    def together(out, *more):
        return in_both(tmp_path, train_e2e, world, out, "--accum", 1, *more, device=device)[0]

    single, double = tmp_path / "single", tmp_path / "double"
    alone(single)
    together(double)
    runs = [double, tmp_path / "shards", tmp_path / "one"]
    for out in runs[1:]:
        shutil.copytree(double, out)
        for path in [*out.glob("open_clip/*"), *out.glob("e2e/step-*3.*")]:
            path.unlink()
    assert "resumed from" in together(tmp_path / "shards", "--shard")
    assert "resumed from" in alone(tmp_path / "one")
    name = os.path.join("e2e", "step-00000003.safetensors")
    expected = load_file(single / name)
    assert any("lora_B" in key for key in expected)
    for out in runs:
        assert_close_logs(single / "e2e", out / "e2e")
        weights = load_file(out / name)
        assert weights.keys() == expected.keys()
        for key in weights:
            distance = (weights[key] - expected[key]).abs().max()
            assert distance <= {"cpu": 1e-5, "cuda": 1e-3}[device], (out, key)


def test_shards_in_bf16_sum_the_gradients_of_ddp(world, tmp_path):
    """Adam's first moments after one step are a tenth of the gradients."""
    typed = ("--stage", 1, "--steps", 1, "--accum", 2, "--precision", "bf16", "--clip-grad", 1e6)
    states = []
    for more in ([], ["--shard"]):
        out = tmp_path / f"run{len(more)}"
        in_both(tmp_path, train_e2e, world, out, *typed, *more)
        states.append(load_file(out / "stage1" / "step-00000001.safetensors"))
    ddp, sharded = states
    assert ddp.keys() == sharded.keys()
    moments = [key for key in ddp if key.startswith("exp_avg.")]
    assert moments
    for key in moments:
        assert_close(sharded[key], ddp[key], 0.01)


def test_under_ddp_a_gradient_is_held_once(world, tmp_path, monkeypatch):
    """From the first step on it is a view of DDP's bucket, over two micro-batches a step."""
    def watched(self, *images):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        print("buckets", len({gradient.untyped_storage().data_ptr() for gradient in gradients}))
        return forward(self, *images)

    forward = Stub.forward
    monkeypatch.setattr(Stub, "forward", watched)
    said = in_both(tmp_path, train_stub, world, tmp_path / "run")
    assert re.findall("buckets ([0-9]+)", said[0])[2:] == 10 * ["1"]


def bench(world, out):
    """A rank whose random numbers are not those of the others runs the bench."""
    torch.manual_seed(train.RANK)
    train.load_autoencoder = lambda *_: load_vae(world / "vae.safetensors")
    typed = "--preset bench --backbone tiny-clip --width 128 --depth 1 1 --batch-size 1 --steps 2"
    train.main([*typed.split(), "--out", str(out)])


def test_the_bench_runs_in_several_processes(world, tmp_path):
    assert "MFU" in in_both(tmp_path, bench, world, tmp_path)[0]


def test_a_rank_that_dies_is_one_line(world, tmp_path):
    work = (train_stub, world, tmp_path / "run")
    said, statuses = in_two_processes(tmp_path, [work, (killed_at, 2, *work)])
    assert statuses == [2, -signal.SIGKILL]
    assert "this rank lost another rank" in one_line(said[0])


@pytest.mark.parametrize("other, says", [
    ("--lr 0.1", "lr is 0.0001 on rank 0, and 0.1 on rank 1"),
    ("--out OUT/part", "data is 60 images, .* on rank 0, and 30 images, .* on rank 1"),
    ("--out OUT/copy --data OUT/copy/data --workers 1", None),
])
def test_ranks_may_differ_in_paths_and_workers_alone(world, tmp_path, other, says):
    """Each --out holds an index: of a part of the data, or of a copy with other times."""
    for folder, shards in (("part", 1), ("copy", 2)):
        data = tmp_path / folder / "data"
        data.mkdir(parents=True)
        for path in sorted((world / "data").iterdir())[:shards]:
            shutil.copy(path, data)
        train.make_index([str(data)], f"{tmp_path}/{folder}/index-data.safetensors")
    plain = (train_stub, world, tmp_path / "run")
    more = other.replace("OUT", str(tmp_path)).split()
    said, statuses = in_two_processes(tmp_path, [plain, (*plain, *more)])
    assert statuses == ([2, 2] if says else [0, 0]), said
    if says:
        assert re.search(says, one_line(said[0]))
        assert "Traceback" not in said[1] and "train.py: " not in said[1]


def test_a_run_of_other_settings_is_refused_in_one_line_of_all_ranks(world, stub_run, tmp_path):
    run = shutil.copytree(stub_run, tmp_path / "run")
    work = (train_stub, world, run, "--accum", 1, "--seed", 1)
    said, statuses = in_two_processes(tmp_path, [work, work])
    assert statuses == [2, 2]
    assert "seed was 0, is 1" in one_line(said[0]) and "train.py: " not in said[1]


@pytest.mark.parametrize("name", [
    *[name for name in vars(settings()) if name not in train.PER_MACHINE],
    "checksum of the CLIP", "validation data"])
def test_all_that_ranks_must_agree_on_is_compared(monkeypatch, name):
    facts = train.shared_settings(settings()) | {"checksum of the CLIP": 1, "validation data": None}

    def gather(of_ranks, mine):
        of_ranks[:] = [mine, mine, mine | {name: "other"}]

    monkeypatch.setattr(train, "WORLD", 3)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    says = f"{name} is {facts[name]} on rank 0, and other on rank 2"
    refused(lambda _: train.compare_ranks(facts), says)


def evaluate_slowly(world, out):
    """Train both stages in processes that wait 2 s for each other, and evaluate for 4 s."""
    connect = train.dist.init_process_group

    def impatient(backend, timeout, device_id):
        connect(backend, timeout=timeout / 900, device_id=device_id)

    def evaluate(*_):
        time.sleep(4)
        assert "left" not in (out.parent / "said-1").read_text()
        print("evaluated")

    train.dist.init_process_group = impatient
    train.evaluate_before_and_after = evaluate
    train.write_result = lambda *_: None
    train_stub(world, out, "--stage", "all", "--steps", 1, "--benchmark", world / "mmvp")
    print("left")


def test_no_rank_leaves_before_rank_0_has_evaluated(mistaken, world, tmp_path):
    said = in_both(tmp_path, evaluate_slowly, world, tmp_path / "run")
    assert said[0].endswith("evaluated\nleft\n") and said[1].endswith("left\n")


def killed_once(argv):
    """Train as a rank of torchrun; the first time, rank 1 dies at the step numbered 3."""
    torch.set_num_threads(1)
    importlib.reload(train)
    train.write_samples = lambda *_: None
    if train.RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        killed_at(3, train.main, argv)
    train.main(argv)


def torchrun(command, work, argv):
    """What a command of torchrun does, but for its program; its processes are forked."""
    variable, *words = shlex.split(command)
    os.environ |= dict([variable.split("=")])
    options = torchrun_command.parse_args([*words[1:], "--start-method", "fork", "program"])
    config, _, _ = torchrun_command.config_from_args(options)
    torchrun_command.elastic_launch(config, work)(argv)


def test_a_killed_rank_comes_back_under_torchrun_and_the_run_ends_in_the_same_losses(
        world, tmp_path):
    """By the README's command for several nodes, here on one."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        command = re.search("(TORCH_DISABLE.* torchrun .*) train.py", file.read())[1]
    command = command.replace("--nnodes 2 --nproc_per_node 8", "--nnodes 1 --nproc_per_node 2")
    command = command.replace("HOST:29500", "localhost:0")
    more = ("--stage", 1, "--steps", 4, "--accum")
    argv = perceiver(world, tmp_path / "killed", *more, 1)
    process = in_a_process(tmp_path / "said", torchrun, command, killed_once, argv)
    process.join(100)
    process.terminate()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 0 and "resumed from" in said, said
    train.main(perceiver(world, tmp_path / "whole", *more, 2))
    assert_close_logs(tmp_path / "killed" / "stage1", tmp_path / "whole" / "stage1")


@pytest.mark.parametrize("name, value, says", [
    ("MASTER_PORT", None, "failed to listen"),  # another program has it
    ("GLOO_SOCKET_IFNAME", "nowhere0", "nowhere0"),
])
def test_processes_that_cannot_connect_end_in_one_line(world, tmp_path, name, value, says):
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        variables[name] = value or str(taken.getsockname()[1])
        process = in_a_process(tmp_path / "said", rank, variables, train_stub, world, tmp_path)
        process.join()
    assert process.exitcode == 2
    line = one_line((tmp_path / "said").read_text())
    assert "rank 0 cannot connect to the others" in line and says in line


def test_a_missing_compiler_is_one_line(monkeypatch):
    """Inductor's own error, without the seconds in which it comes to need a compiler."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere"))
    with pytest.raises(torch._inductor.exc.InvalidCxxCompiler) as missing:
        torch._inductor.cpp_builder.get_cpp_compiler()
    error = torch._inductor.exc.InductorError(missing.value, None)
    with pytest.raises(UserError, match="--compile needs a C.. compiler"), train.explain_errors():
        raise error


# ------------------------------------------------------------------ users' mistakes

@pytest.mark.parametrize("typed, says", [
    ("--denoiser gan", "--denoiser: invalid choice: 'gan'"),
    ("--steps 0", "--steps: 0 is out of range"),
    ("--lr nan", "--lr: nan is out of range"),
    ("--mask-ratio 0 0.5", "--mask-ratio: 0 is out of range"),
    ("--data=", "--data: the value is empty"),
    ("--width 100", "--width 100 must be a multiple of 128"),
    ("--mask-ratio 0.9 0.5", "give the lower ratio first"),
    ("--shuffle-target --batch-size 1", "use --batch-size 2 or more"),
    ("--shard", "use torchrun"),
    ("--stage e2e --freeze-denoiser", "--freeze-denoiser is for stage 2"),
    ("--stage all --lr 1", "belong to one stage"),
    ("--preset bench --steps 1", "--preset bench measures one --stage"),
    ("--out WORLD/tiny-clip.json", "--out .*tiny-clip.json cannot be written"),
    ("--backbone nonsense", "unknown backbone 'nonsense'"),
    ("--clip-weights nowhere.pt", "CLIP weights not found at '?nowhere.pt"),
    ("--clip-weights WORLD/vae.safetensors", "tiny-clip"),
    ("--vae nowhere", "VAE weights not found at '?nowhere'?.*ae.safetensors"),
    ("--vae WORLD/vqgan.safetensors", "ae.safetensors of FLUX.1"),
    ("--vae WORLD/vae64.safetensors", "are 32 pixels wide, which is no multiple"),
    ("--denoiser perceiver --vqgan nowhere", "VQ-GAN weights not found at '?nowhere"),
    ("--denoiser perceiver --vqgan WORLD/vae.safetensors", "vqgan_imagenet_f16"),
    ("--data nowhere", "data not found at nowhere"),
    ("--data WORLD/empty", "no image and no .tar"),
    ("--init WORLD/nothing.safetensors", "FLUX's weights .*not absent"),
    ("--stage 2", "run --stage 1 .again."),
    ("--stage 2 --init WORLD/nothing.safetensors", "stage 1's weights .*not absent"),
    ("--stage 2 --init WORLD/damaged.safetensors", "is damaged.*: run --stage 1 .again."),
    ("--stage all", "Questions.csv not found"),
    ("--stage all --zeroshot folder:nowhere --benchmark WORLD/mmvp", "one subfolder per class"),
])
def test_a_mistake_is_one_line(mistaken, world, tmp_path, monkeypatch, capsys, typed, says):
    """Before a denoiser is made; the weights of --init alone wait for it."""
    if "--init" not in typed:
        monkeypatch.setattr(train, "build_model", fails(AssertionError("expensive work began")))
    monkeypatch.chdir(tmp_path)
    more = typed.replace("WORLD", str(world)).split()
    line = refusal(capsys, train.main, arguments(world, "out", "--stage", 1, *more))
    assert re.search(says, line)


@pytest.fixture(scope="session")
def mistaken(world):
    """What the mistakes point at."""
    (world / "empty").mkdir()
    save_file({}, world / "nothing.safetensors")
    gh.write_weights(world / "damaged.safetensors", {"weight": torch.ones(1000)})
    flip_a_bit(world / "damaged.safetensors")
    make_benchmark(world / "mmvp", ["Colour", "State"])
    config = AutoEncoderConfig(ch=32, ch_mult=(1,) * 6, num_res_blocks=1, z_channels=4)
    about = {"vae": dataclasses.asdict(config)}
    gh.write_weights(world / "vae64.safetensors", AutoEncoder(config).state_dict(), about)


def test_a_clip_that_huggingfaces_format_cannot_hold_is_refused(world, tmp_path, monkeypatch):
    toy = load_clip("toy", random=True)
    toy[0].model_cfg = open_clip.get_model_config("RN50")
    monkeypatch.setattr(train, "load_clip", lambda *_, **__: toy)
    s = settings(*arguments(world, tmp_path, "--backbone", "RN50-quickgelu:openai"))
    refused(lambda _: train.load_pretrained(s), "RN50-quickgelu:openai does not fit")


def test_an_option_that_an_older_version_lacked_had_its_default(world, stopped, capsys):
    path = stopped / "stage1" / "settings.json"
    settings = json.loads(path.read_text())
    del settings["no_lora"]
    path.write_text(json.dumps(settings))
    line = refusal(capsys, train_stub, world, stopped, "--no-lora")
    assert "no_lora was False, is True" in line
    train_stub(world, stopped)


@pytest.mark.parametrize("typed, says", [
    ("--seed 1", "seed was 0, is 1"),
    ("--accum 1", "micro-batches of a step .* was 2, is 1"),
    ("--data WORLD/data/00000.tar", "data was 60 images, .*, is 30 images"),
    ("--stage e2e", r"holds another run \(stage1\)"),
])
def test_a_run_goes_on_with_its_own_settings_only(world, stub_run, capsys, typed, says):
    more = typed.replace("WORLD", str(world)).split()
    assert re.search(says, refusal(capsys, train_stub, world, stub_run, *more))


@pytest.mark.parametrize("stage, option, key, says", [
    (1, "--clip-weights", "visual.proj", "checksum of the CLIP was"),
    (1, "--vqgan", "quantize.embedding.weight", "checksum of the autoencoder was"),
    (2, "--clip-weights", "visual.proj", "was trained with another CLIP"),
    (2, "--vqgan", "quantize.embedding.weight", "was trained with another autoencoder"),
    (2, "--init", "denoiser.head.bias", "checksum of the weights to start from was"),
])
def test_other_weights_are_another_run(world, trained, tmp_path, capsys, stage, option, key, says):
    """Of the same names and sizes, and of the same values but for one."""
    run = shutil.copytree(trained / "perceiver", tmp_path / "run")
    files = {"--clip-weights": world / "tiny-clip.safetensors"}
    files["--vqgan"] = world / "vqgan.safetensors"
    files["--init"] = run / "stage1" / "last.safetensors"
    value = load_file(files[option])[key]
    value.flatten()[-1] += 0.1
    save_changed(files[option], {key: value}, tmp_path / "changed.safetensors")
    more = ("--stage", stage, option, tmp_path / "changed.safetensors")
    assert says in refusal(capsys, train.main, perceiver(world, run, *more))


@pytest.mark.parametrize("typed, expected", [  # Sec. 5.1, App. B, and the README for the toy
    ("--stage 1", dict(lr=1e-4, lr_clip=1e-4, epochs=1, width=3072, batch_size=16, accum=2)),
    ("--stage 2", dict(lr=1e-5, lr_clip=1e-5, epochs=1, warmup=10, weight_decay=0.01)),
    ("--stage 2 --lr 1e-3", dict(lr=1e-3, lr_clip=1e-3)),
    ("--stage e2e", dict(lr=1e-4, lr_clip=1e-5, epochs=2, depth=[2, 4], layers=6)),
    ("--stage 1 --denoiser perceiver", dict(width=1024, mask_ratio=[0.5, 0.9])),
    ("--stage 1 --preset toy", dict(steps=250, lr=2e-3, width=128, backbone="toy")),
    ("--stage 2 --preset toy", dict(steps=130, lr=1e-3, lr_clip=4e-4)),
    ("--stage e2e --preset toy --denoiser perceiver", dict(steps=500, width=128)),
    ("--preset toy --epochs 2", dict(steps=None, epochs=2)),
    ("--preset bench --steps 300", dict(stage=1, steps=300, accum=2, data=[])),
])
def test_defaults_follow_from_preset_denoiser_and_stage(typed, expected):
    s = train.read_settings(typed.split())[-1]
    assert {name: getattr(s, name) for name in expected} == expected


# ------------------------------------------------------------------ mmvp

PATTERNS = ["Orientation and Direction", "Presence", "State", "Quantity", "Spatial", "Color"]
PATTERNS += ["Structural Character", "Texts", "Caméra"]
WORDS = "red green small heart star hollow left of big blue house with the sun two three wing open"
IMAGES = "MLLM_VLM Images"


def picture(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_image(rng, 40, 40).save(path)


def make_benchmark(folder, types):
    """MMVP-VLM's layout, with a random pair of each of these types; commas and quotes."""
    rng = np.random.default_rng(0)
    rows = [["Question ID", "Type", "Statement"]]
    for number, name in enumerate(np.repeat(types, 2), 1):
        suffix = ("jpg", "jpeg", "png")[number % 3]
        picture(folder / IMAGES / name / f"{number}.{suffix}", rng)
        statement = "a " + " ".join(rng.choice(WORDS.split(), rng.integers(2, 9)))
        rows.append([number, name, statement + ', "so"' * (number % 5 == 0)])
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="session")
def two_clips(world):
    """The files of two random tiny CLIPs; the second one is a perturbation of the first."""
    before, after = str(world / "tiny-clip.safetensors"), str(world / "after.pt")
    clip, _, _ = load_clip("tiny-clip", before)
    torch.manual_seed(0)
    perturb(clip.visual)
    torch.save(clip.state_dict(), after)
    return before, after


@pytest.fixture(scope="session")
def tiny(two_clips):
    """(clip, preprocess, tokenizer) of the first of the two."""
    return load_clip("tiny-clip", two_clips[0])


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory):
    """Three pairs of each pattern in turn, but two of the last."""
    return make_benchmark(tmp_path_factory.mktemp("mmvp"), (PATTERNS * 3)[:-1])


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """Thirty images of three classes."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(1)
    for i in range(30):
        name = ("red_star", "moon", "big blue house")[i % 3]
        picture(folder / name / f"{i}.{('png', 'jpg')[i % 2]}", rng)
    return folder


@pytest.fixture(scope="session")
def questions(benchmark, classes, tmp_path_factory):
    """Of evaluate, what it shall judge by: the benchmark, a classification, a retrieval."""
    captioned = tmp_path_factory.mktemp("coco")
    make_captioned(captioned, "coco")
    return [(benchmark,), (None, [("folder", classes)]), (None, [("coco", captioned)])]


def test_evaluation_is_exact_and_leaves_the_callers_precision(tiny, questions):
    """Even when it fails."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    callers = conv.fp32_precision, matmul.fp32_precision
    clip, _, tokenizer = tiny

    def state():
        return conv.fp32_precision, matmul.fp32_precision, torch.is_grad_enabled(), clip.training

    def fail(image):
        raise ArithmeticError(state())

    try:
        for question in questions:
            conv.fp32_precision = matmul.fp32_precision = "tf32"
            with pytest.raises(ArithmeticError, match="'ieee', 'ieee', False, False"):
                eval_mmvp.evaluate(clip.train(), fail, tokenizer, *question)
            assert state() == ("tf32", "tf32", True, False)
    finally:
        conv.fp32_precision, matmul.fp32_precision = callers


@pytest.mark.parametrize("name", ["visual.proj", "token_embedding.weight", "logit_scale"])
def test_a_clip_that_is_not_finite_is_refused(two_clips, questions, name):
    clip, *preparation = load_clip("tiny-clip", two_clips[0])
    star = preparation[1](["star"])[0, 1]  # a word: texts without it stay whole
    clip.get_parameter(name).data[star if name.startswith("token") else ...] = math.nan
    for question in questions[: 1 if name == "logit_scale" else 3]:  # the sets need no scale
        with pytest.raises(UserError, match="the CLIP's features are not finite"):
            eval_mmvp.raise_failures([eval_mmvp.evaluate(clip, *preparation, *question)])


def test_a_byte_order_mark_spaces_blank_rows_another_header_and_links_are_tolerated(tmp_path):
    make_benchmark(tmp_path, ["Color", "Presence"])
    expected = eval_mmvp.read_benchmark(tmp_path)
    table = tmp_path / "Questions.csv"
    _, *rows = table.read_text().splitlines()
    rows = ["\ufeffIndex,Category,Text", "", *rows[:3], ", ,", *rows[3:], ""]
    table.write_text("\n".join(rows).replace(",", " , "))
    image = tmp_path / IMAGES / "Color" / "1.jpeg"  # a link, as in the hub's cache
    image.rename(tmp_path / "blob")
    image.symlink_to(tmp_path / "blob")
    assert eval_mmvp.read_benchmark(tmp_path) == expected
    (tmp_path / IMAGES).rename(tmp_path / "MLLM_VLM_Images")  # as some copies have it
    eval_mmvp.check_benchmark(tmp_path)


NO_PAIR = "does not start a pair: a pair is an odd id and, in the next row, the next id"
MUST_BE = "must be a number, a Type and a statement (in quotes if it has a comma), not "


@pytest.mark.parametrize("rows, says", [  # the rows below the header, and what is said
    ([], "Questions.csv is empty"),
    (["\xff"], "Questions.csv not found, or not a CSV file in UTF-8"),
    (["2,Color,b", "3,Color,c"], f"row 2: id 2 of Type Color {NO_PAIR}"),
    (["1,Color,a", "2,Color,b", "3,Color,c"], f"row 4: id 3 of Type Color {NO_PAIR}"),
    (["1,Color,a", "2,Texts,b"], f"row 2: id 1 of Type Color {NO_PAIR}"),
    (["1,Color,a", "2,Color,b"] * 2, "row 4: the pair 1, 2 is listed twice"),
    (["", "1,Color,"], f"row 3: {MUST_BE}1,Color,"),
    (["1,Color,a cat,sitting"], f"row 2: {MUST_BE}1,Color,a cat,sitting"),
    (["one,Color,a"], f"row 2: {MUST_BE}one,Color,a"),
    (["1,Color,a", "2,Color,b", "5,Color,e", "6,Color,f"], "row 4: image not found"),
])
def test_a_bad_table_is_one_line(tmp_path, rows, says):
    make_benchmark(tmp_path, ["Color", "Color"])
    text = "\n".join(["Question ID,Type,Statement", *rows])
    (tmp_path / "Questions.csv").write_text(text, encoding="latin-1")  # \xff is no UTF-8
    refused(eval_mmvp.check_benchmark, tmp_path, says)


def test_an_image_that_cannot_be_decoded_or_found_is_one_line(tmp_path):
    make_benchmark(tmp_path, ["Color"])
    for content, says in (
        (jpeg(Image.new("RGB", (40, 40)))[:-9], "truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        (b"GIF89a" + b"\xff" * 4 + bytes(3) + b",\0\0\0\0\1\0\1\0\0\2\0;", "decompression bomb"),
    ):
        (tmp_path / IMAGES / "Color" / "2.png").write_bytes(content)
        refused(eval_mmvp.check_benchmark, tmp_path, "cannot decode the image", "2.png", says)
    shutil.rmtree(tmp_path / IMAGES)
    refused(eval_mmvp.check_benchmark, tmp_path, f"not found: {tmp_path}/{IMAGES}/Color/1.jpg")


def test_images_are_plainly_converted_as_the_protocols_do(tmp_path):
    for suffix in eval_mmvp.IMAGE_SUFFIXES:  # each a format's, for Pillow
        Image.new("RGB", (16, 8), (200, 30, 40)).save(tmp_path / f"image{suffix}")
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (16, 8), (200, 30, 40, 0))
    clear.save(tmp_path / "1.png", exif=exif)  # transparent, and to be turned
    for path in tmp_path.iterdir():
        image = eval_mmvp.read_image(path)
        assert image.size == (16, 8)
        assert image.getpixel((5, 5)) == pytest.approx((200, 30, 40), abs=4)


# ------------------------------------------------------------------ what is noise

Z2 = 1.959964**2
SPREAD = 1.96 * math.sqrt(0.25 * 0.75 / 400 + 0.5 * 0.5 / 100) / 2
TWO_ARRAYS = (0.375 - SPREAD, 0.375 + SPREAD)


@pytest.mark.parametrize("name, arguments, expected, within", [
    ("wilson", (0, 10), (0, Z2 / (10 + Z2)), 1e-12),
    ("wilson", (81, 263), (0.2553, 0.3662), 1e-4),  # Newcombe 1998, Tab. I
    ("mcnemar", (3, 3), 1, 0),
    ("mcnemar", (8, 2), 2 * (1 + 10 + 45) / 1024, 0),
    # Of many: near the normal tail, with its correction.
    ("mcnemar", (12_000, 11_000), math.erfc(999 / math.sqrt(23_000) / math.sqrt(2)), 1e-12),
    # Each array is redrawn by itself, and weighs as any other.
    ("bootstrap", ([np.repeat([1.0, 0.0], k) for k in ([100, 300], [50, 50])],), TWO_ARRAYS, 3e-3),
])
def test_intervals_and_p_are_their_closed_forms(name, arguments, expected, within):
    assert getattr(eval_mmvp, name)(*arguments) == pytest.approx(expected, rel=0, abs=within)


def result_of(verdicts, outcomes=()):
    """Of a result, the pairs by their verdicts, {pattern: string of 0s and 1s}, and outcomes."""
    pairs = []
    for name, string in verdicts.items():
        for verdict in string:
            number = 2 * len(pairs) + 1
            pair = {"ids": (number, number + 1), "type": name, "statements": ("a", "b")}
            # A tie chooses the second image, as in the script.
            pair["scores"] = (0.9, 0.1) if verdict == "1" else (0.5, 0.5)
            pairs.append(pair | {"correct": verdict == "1"})
    outcomes = {name: np.array(values) for name, values in dict(outcomes).items()}
    return {"pairs": pairs, "outcomes": outcomes}


BEFORE = {"Color": "0000011111", "Text": "0011"}
AFTER = {"Color": "1111101111", "Text": "0011"}


def test_the_rows_of_patterns_average_accuracy_and_recall():
    """A recall's intervals are those of 400 images, and not of their 2,000 captions."""
    shares = np.tile([0.2, 0.4, 0.6, 0.8], 100)
    better = np.where(np.arange(400) % 5 == 0, shares + 0.25, shares)
    before = {"folder accuracy": [1.0] * 8 + [0.0] * 2, "coco image recall@5": shares}
    after = {"folder accuracy": [1.0] * 3 + [0.0] * 7, "coco image recall@5": better}
    results = {"before": result_of(BEFORE, before), "after": result_of(AFTER, after)}
    rows = eval_mmvp.make_rows(results)
    keys = ("name", "unit", "count", "change", "won", "lost", "p")
    assert [[row[key] for key in keys] for row in rows] == [
        ["Color", "pairs", 10, 40, 5, 1, 2 * 7 / 64],
        ["Text", "pairs", 4, 0, 0, 0, 1],
        ["average", "pairs", 14, 20, 5, 1, 2 * 7 / 64],
        ["folder accuracy", "images", 10, -50, 0, 5, 2 / 32],
        ["coco image recall@5", "images", 400, pytest.approx(5), 80, 0, 2.0**-79],
    ]
    assert [row["before"]["percent"] for row in rows] == pytest.approx([50, 50, 50, 80, 50])
    # Color's change is .4 with a variance of .44 / 10, and makes half of the average.
    assert rows[2]["change_interval"] == pytest.approx((20 - 20.6, 20 + 20.6), abs=3)
    spread = 1.96 * 100 * math.sqrt(0.05 / 400)
    assert rows[4]["before"]["interval"] == pytest.approx((50 - spread, 50 + spread), abs=0.1)
    spread = 1.96 * 100 * 0.25 * math.sqrt(0.2 * 0.8 / 400)
    assert rows[4]["change_interval"] == pytest.approx((5 - spread, 5 + spread), abs=0.1)


# ------------------------------------------------------------------ zero-shot retention

def check_set(name):
    return lambda path: eval_mmvp.check_zeroshot(name, path)


@torch.no_grad()
def cosines(tiny, texts, paths):
    """(texts, images) of a CLIP."""
    clip, preprocess, tokenizer = tiny
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    images = clip.encode_image(images, normalize=True)
    return (clip.encode_text(tokenizer(texts), normalize=True) @ images.T).numpy()


class RandomClip(torch.nn.Module):
    """What is asked of a CLIP, with random features: it reads 80,000 prompts in a second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))
        self.letters, self.places, self.pixels = map(torch.randn, (256, 120, 192), (16, 16, 16))

    def encode_text(self, tokens, normalize):
        return F.normalize((self.letters[tokens] * self.places).sum(1).tanh())

    def encode_image(self, images, normalize):
        return F.normalize(images.flatten(1) @ self.pixels)

    def preprocess(self, image):
        return torch.from_numpy(np.asarray(image.resize((8, 8))) / 255 - 0.5).float()

    def tokenizer(self, texts):
        letters = b"".join(text.encode().ljust(120) for text in texts)
        return torch.from_numpy(np.frombuffer(letters, np.uint8).reshape(-1, 120).astype(int))


def lay_out(folder, monkeypatch, name, classes, images, labels):
    """Images as the authors of a set publish it."""
    if name == "cifar100":
        rows = np.stack([np.asarray(image).transpose(2, 0, 1).ravel() for image in images])
        contents = {"test": {"data": rows, "fine_labels": labels}}
        contents["meta"] = {"fine_label_names": classes}
        (folder / "cifar-100-python").mkdir()
        for file, content in contents.items():
            (folder / "cifar-100-python" / file).write_bytes(pickle.dumps(content))
        monkeypatch.setattr(eval_mmvp.CIFAR100, "_check_integrity", lambda self: True)
        monkeypatch.setattr(eval_mmvp.CIFAR100, "meta", eval_mmvp.CIFAR100.meta | {"md5": None})
        return
    if name == "sun397":
        folder = folder / "SUN397"
        folder.mkdir()
        (folder / "ClassName.txt").write_text("".join(f"/{path}\n" for path in classes))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / classes[label]).mkdir(parents=True, exist_ok=True)
        image.save(folder / classes[label] / f"sun_{i}.jpg", "PNG")


SYNSETS = sorted(timm.data.ImageNetInfo().label_names())
KINDS = ["", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good "]
KINDS = [(kind, "") for kind in KINDS] + [("", "small "), ("", "big ")]
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Type-S 2008"]
OWNED = ["a", "the", "my", "my dirty", "my clean", "my new", "my old"]


# A set's classes on disk and as CLIP's authors call them, and their prompts.
@pytest.mark.parametrize("name, classes, called, prompts", [
    ("cifar100", ["aquarium_fish", "apple", "maple_tree"], ["aquarium fish", "apple", "maple tree"],
     [f"a {kind}photo of {a} {size}{{}}." for kind, size in KINDS for a in ("a", "the")]),
    ("sun397", ["a/abbey", "a/apartment_building/outdoor", "w/wine_cellar/barrel_storage"],
     ["abbey", "apartment building outdoor", "wine cellar barrel storage"],
     ["a photo of a {}.", "a photo of the {}."]),
    ("imagenet", SYNSETS, open_clip.IMAGENET_CLASSNAMES,
     [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]),
    ("cars", CARS, CARS,
     [f"a photo of {whose} {{}}." for whose in OWNED] + ["i love my {}!"]),
    ("folder", ["big_blue house", "moon"], ["big blue house", "moon"], ["a photo of a {}."]),
])
@torch.no_grad()
def test_classification_equals_a_naive_loop_over_the_published_prompts(
    tmp_path, monkeypatch, name, classes, called, prompts
):
    clip = RandomClip()
    centres = []
    for label in called:
        texts = clip.tokenizer([prompt.format(label) for prompt in prompts])
        centres.append(F.normalize(clip.encode_text(texts, True).mean(0), dim=0))
    rng = np.random.default_rng(3)
    images = [noise_image(rng, 32, 32) for _ in range(200 + len(classes))]
    features = clip.encode_image(torch.stack([clip.preprocess(image) for image in images]), True)
    chosen = (features @ torch.stack(centres).T).argmax(1).tolist()
    labels = chosen[:200] + list(range(len(classes)))  # most are where they belong, none is empty
    lay_out(tmp_path, monkeypatch, name, classes, images, labels)
    accuracy = 100 * np.mean(np.equal(chosen, labels))
    result = eval_mmvp.evaluate(clip, clip.preprocess, clip.tokenizer, None, [(name, tmp_path)])
    zeroshot = {f"{name} accuracy": accuracy}
    assert eval_mmvp.summary(result) == {"average": None, "patterns": {}, "zeroshot": zeroshot}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name, "PNG")


def test_imagenet_is_its_1000_synsets_under_their_names(tmp_path):
    words = map(timm.data.ImageNetInfo().label_name_to_description, SYNSETS)
    names = zip(open_clip.IMAGENET_CLASSNAMES, words, strict=True)
    assert sum(name.lower() in of.lower() for name, of in names) > 800  # others have newer names
    touch(tmp_path, *(f"{synset}/a.JPEG" for synset in SYNSETS))
    dataset, names, _ = eval_mmvp.check_zeroshot("imagenet", tmp_path)
    assert (dataset.labels, names) == (list(range(1000)), open_clip.IMAGENET_CLASSNAMES)
    (tmp_path / SYNSETS[7]).rename(tmp_path / "n00000000")
    refused(check_set("imagenet"), tmp_path, f"missing or unknown: {SYNSETS[7]}: PATH must be")
    touch(tmp_path, f"{SYNSETS[7]}/a.JPEG")
    refused(check_set("imagenet"), tmp_path, "1001 class folders; missing or unknown: n00000000")


@pytest.mark.parametrize("files, says", [
    ("test/a/1.png test/b/1.png train/a/1.png train/b/1.png", "name D/test or D/train"),
    ("a/1.png a/more/1.png b/1.png", "name D/a, otherwise move them elsewhere"),
    ("a/1.png b/1.ppm", "no image (.jpg, .jpeg, .jpe, .jfif, .png, .webp"),
    ("a/1.png b/.1.png", "in D/b: PATH must be"),
])
def test_folders_that_are_no_classes_are_refused(tmp_path, files, says):
    touch(tmp_path, *files.split())
    for name in ("folder", "cars"):
        refused(check_set(name), tmp_path, says.replace("D/", f"{tmp_path}/"))


def test_what_is_no_image_of_a_class_is_counted_once(tmp_path, tiny, capsys):
    images = [f"a/{name}" for name in ("1.JPEG", "2.png", "3.gif", "4.jfif", "5.jpe", "6")]
    touch(tmp_path, *images, "a/7.ppm", "a/8.txt", "a/.9.png", ".c/1.png", "b/1.tif", "b/2.webp~")
    dataset, names, _ = eval_mmvp.check_zeroshot("folder", tmp_path, tiny[1])
    assert dataset.paths == [f"{tmp_path}/{name}" for name in (*images, "b/1.tif")]
    assert ([label for _, label in dataset], names) == ([0] * 6 + [1], ["a", "b"])
    assert capsys.readouterr().err == ""  # while a model is evaluated
    eval_mmvp.check_zeroshot("folder", tmp_path)
    says = f"{tmp_path}: 3 files skipped, whose suffixes are not those of images (.jpg, .jpeg"
    assert capsys.readouterr().err.startswith(says)


def make_captioned(folder, name):
    """Karpathy's format: 20 test images, five or six captions each (COCO's first one), 4 others."""
    rng = np.random.default_rng(2)
    where = {"filepath": "val2014"} if name == "coco" else {}
    entries = []
    for i in range(24):
        count = 1 if (name, i) == ("coco", 1) else 5 + i % 2
        sentences = [{"raw": " ".join(rng.choice(WORDS.split(), 6))} for _ in range(count)]
        split = "test" if i % 6 else "restval"
        entries.append({"filename": f"{i}.jpg", "sentences": sentences, "split": split} | where)
        picture(folder / where.get("filepath", "") / f"{i}.jpg", rng)
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": entries}))
    return [entry for entry in entries if entry["split"] == "test"]


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_retrieval_equals_the_naive_one(tiny, tmp_path, name):
    paths, captions, owners = [], [], []
    for i, entry in enumerate(make_captioned(tmp_path, name)):
        paths.append(tmp_path / entry.get("filepath", "") / entry["filename"])
        own = [sentence["raw"] for sentence in entry["sentences"][:5]]
        captions += own
        owners += [i] * len(own)
    near = cosines(tiny, captions, paths)
    image_found = [i in row.argsort()[-5:] for i, row in zip(owners, near, strict=True)]
    text_found = [i in np.take(owners, row.argsort()[-5:]) for i, row in enumerate(near.T)]
    outcomes = eval_mmvp.evaluate(*tiny, None, [(name, tmp_path)], batch_size=7)["outcomes"]
    shares = outcomes[f"{name} image recall@5"]
    hits = np.bincount(owners, image_found)
    assert shares / shares.sum() == pytest.approx(hits / hits.sum())  # of each image
    assert shares.mean() == pytest.approx(np.mean(image_found))  # a caption weighs as any other
    assert outcomes[f"{name} text recall@5"].tolist() == text_found


def one(sentences):
    return '{"images": [{"split": "test", "filename": "1.jpg", "sentences": ' + sentences + "}]}"


KARPATHY = "PATH must be a folder with Karpathy's dataset_coco.json"


@pytest.mark.parametrize("name, annotations, says", [
    ("sun397", None, "PATH must be the folder in which SUN397.tar.gz was unpacked"),
    ("cifar100", None, "corrupted: PATH must be the folder in which cifar-100-python.tar.gz was"),
    ("coco", '{"images": [', f"Expecting value: line 1 column 13 (char 12): {KARPATHY}"),
    ("coco", one("[]"), f"1 test images, of which 0 have captions: {KARPATHY}"),
    ("coco", one('[{"raw": " "}]'), f"a class name or caption is empty: {KARPATHY}"),
    ("coco", one('[{"raw": "\\ud800"}]'), "surrogates not allowed"),
    ("coco", one('[{"raw": "a"}]').replace("1.jpg", "2.jpg"), "1 of 1 test images missing, first"),
])
def test_a_bad_zeroshot_set_is_one_line(tmp_path, name, annotations, says):
    picture(tmp_path / "1.jpg", np.random.default_rng(0))
    if annotations:
        (tmp_path / "dataset_coco.json").write_text(annotations)
    refused(check_set(name), tmp_path, f"--zeroshot {name}:", says)


def test_a_process_that_dies_while_decoding_is_one_line(tiny, classes, monkeypatch):
    monkeypatch.setattr(eval_mmvp, "MANY", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    images = eval_mmvp.ImageFiles([classes / "moon" / "1.jpg"], lambda image: os._exit(1))
    says = "an image decoding worker died"
    refused(lambda _: eval_mmvp.encode_images(tiny[0], images, 4), says, "--ipc=host")


# ------------------------------------------------------------------ the table and the picture

FELL = [{"a accuracy": [share] * 16} for share in (1.0, 0.0)]
CHANGED = [result_of(BEFORE, FELL[0]), result_of(AFTER, FELL[1])]
ALONE = [result_of({}, fell) for fell in FELL]
SUN397 = {"sun397 accuracy": [1.0] * 108_754}
LONG = [result_of({f"Structural{' and Physical' * 9}": 5000 * verdict}, SUN397) for verdict in "10"]


@pytest.mark.parametrize("results, pattern", [
    (CHANGED[:1], r"^Color +10 +50.0 \[23.7-76.3\]$"),
    (CHANGED[:1], r"^zero-shot +images percent \[95 %\] *\na accuracy +16 100.0 \[80.6-100\]"),
    (CHANGED[:1], r"^To tell a difference "),
    (CHANGED, r"^Color +10 +50.0 \[23.7-76.3\] +90.0 \[59.6-98.2\] +\+40.0 +5 +1 0.219$"),
    (ALONE, r"^a accuracy +16 .* -100.0 +0 +16 3e-05$"),
    (CHANGED, r"^The average changed by \+20.0 \[\+?0.0, \+40.0\].$"),
    (ALONE, r"\A\nzero-shot +images .*\na accuracy +16 .*\n\nA change whose p .*\n\Z"),
    ((result_of({"\x1b[31mRed\a\n": "01"}),), r"^\\x1b\[31mRed\\x07\\n  +2 "),
    (LONG, r"^Structural and Physical and Physi   5000 100.0 .* -100.0    0 5000 0e\+00$"),
])
def test_the_table_says_in_100_columns(capsys, results, pattern):
    keys = ("before", "after")[-len(results):]
    eval_mmvp.print_table(dict(zip(keys, results, strict=True)))
    printed = capsys.readouterr().out
    assert re.search(pattern, printed, re.MULTILINE)
    assert max(len(line) for line in printed.splitlines()) <= 100


GREEN, RED = (21, 128, 61), (220, 38, 38)


def frames(path, count):
    """The colours of a picture's frames."""
    sheet = Image.open(path).convert("RGB")
    return [sheet.getpixel((16 + i % 4 * 440, 61 + i // 4 * 420)) for i in range(count)]


def test_the_picture_shows_won_pairs_then_lost_ones(tmp_path, monkeypatch):
    written = watch(monkeypatch, ImageDraw.ImageDraw, "text")
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "0.png")
    Image.new("RGB", (900, 300), "navy").save(tmp_path / "1.png")
    before = result_of({"Color": "0" * 40 + "1" * 20 + "1"})
    after = result_of({"Color": "1" * 40 + "0" * 20 + "1"})
    for pair in before["pairs"]:
        pair["images"] = (tmp_path / "0.png", tmp_path / "1.png")
    eval_mmvp.draw_changes(tmp_path / "many.png", before, after)
    assert frames(tmp_path / "many.png", 12) == [GREEN] * 8 + [RED] * 4  # every fifth of 60
    sheet = Image.open(tmp_path / "many.png").convert("RGB")
    middles = [sheet.getpixel((15 + x, 60 + 136)) for x in (110, 320)]
    assert middles == [(255, 165, 0), (0, 0, 128)]
    title, *texts = [text for _, _, text, *_ in written]
    assert title.startswith("40 pairs won (green frame), 20 lost (red), of 61. 12 are shown")
    assert texts[0] == "Color (1, 2)"
    assert texts[3:9] == ["before", "wrong", "right", "after", "right", "right"]
    assert texts[-6:] == ["before", "right", "right", "after", "wrong", "right"]
    eval_mmvp.draw_changes(tmp_path / "none.png", before, before)
    assert Image.open(tmp_path / "none.png").size == (4 * 440 + 20, 60)


# ------------------------------------------------------------------ evaluation's command


@pytest.fixture
def comparison(two_clips, benchmark, classes, tmp_path):
    """The flags of a whole comparison, which writes out.json and out.png into tmp_path."""
    flags = ["--backbone=tiny-clip", f"--weights={two_clips[1]}", f"--zeroshot=folder:{classes}"]
    flags += [f"--json={tmp_path}/out.json", f"--picture={tmp_path}/out.png"]
    return [*flags, f"--benchmark={benchmark}", f"--baseline={two_clips[0]}"]


def test_two_runs_of_a_command_give_the_same_bytes(comparison, tmp_path, capsys):
    outputs = []
    for _ in range(2):
        eval_mmvp.main(comparison)
        files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
        outputs.append([*capsys.readouterr(), *files])
    assert outputs[0] == outputs[1]


@torch.no_grad()
def judge_as_the_script(clip, preprocess, tokenizer, folder):
    """What the benchmark's evaluate_vlm.py does, two rows at a time: each pair's statements, their
    scores, and whether the pair is right."""
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    for pair in zip(rows[::2], rows[1::2], strict=True):
        pixels, scores = [], []
        for number, pattern, _ in pair:
            [path] = (folder / IMAGES / pattern).glob(f"{number}.*")
            pixels.append(preprocess(Image.open(path)))
        for _, _, statement in pair:
            text = tokenizer(["a photo of " + statement])
            image, text, scale = clip(torch.stack(pixels), text)[:3]
            scores.append((scale * text @ image.T).softmax(dim=-1)[0, 0].item())
        picks = ["img1" if score > 0.5 else "img2" for score in scores]
        yield [statement for _, _, statement in pair], scores, picks == ["img1", "img2"]


def test_the_json_equals_the_protocol_pair_by_pair(comparison, benchmark, tmp_path, monkeypatch):
    """But for a pair's pattern, which is what its Type says."""
    calls = watch(monkeypatch, eval_mmvp, "evaluate")
    eval_mmvp.main([*comparison, "--batch-size=3"])
    assert [batch_size for *_, batch_size in calls] == [3, 3]
    content = json.loads((tmp_path / "out.json").read_text())
    keys = ["backbone", "models", "prompts", "before", "after", "rows", "pairs"]
    assert (list(content), content["prompts"]) == (keys, {"folder": 1})
    pairs = content["pairs"]
    assert [number for pair in pairs for number in pair["ids"]] == list(range(1, 53))
    verdicts = []
    for model, file in content["models"].items():
        clip = load_clip("tiny-clip", file)
        right = []
        for pair, judged in zip(pairs, judge_as_the_script(*clip, benchmark), strict=True):
            statements, scores, correct = judged
            assert (pair["statements"], pair[model]["correct"]) == (statements, correct)
            assert pair[model]["scores"] == pytest.approx(scores, abs=1e-5)
            right.append(correct)
        patterns = {name: 100 * np.mean(right[i::9]) for i, name in enumerate(PATTERNS)}
        mean = np.mean(list(patterns.values()))
        assert mean != 100 * np.mean(right)  # a test of something
        assert content[model]["patterns"] == pytest.approx(patterns)
        assert content[model]["average"] == pytest.approx(mean)
        verdicts.append(right)
    verdicts = list(zip(*verdicts, strict=True))
    won, lost = verdicts.count((False, True)), verdicts.count((True, False))
    assert won != lost
    average, retained = content["rows"][9:]
    assert (average["name"], average["won"], average["lost"]) == ("average", won, lost)
    assert retained["name"] == "folder accuracy"
    assert frames(tmp_path / "out.png", won + lost) == [GREEN] * won + [RED] * lost


def test_zeroshot_alone_needs_no_benchmark(comparison, tmp_path, capsys):
    eval_mmvp.main(comparison[:4])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "folder accuracy" in printed.out and "MMVP" not in printed.out
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["after"]["average"], content["pairs"]) == (None, [])


def test_a_set_that_fails_costs_no_other(comparison, classes, tmp_path, monkeypatch, capsys):
    shutil.copytree(classes, tmp_path / "cars")
    last = tmp_path / "cars" / "red_star" / "z.png"
    last.write_bytes(b"P6 1 1 255 abc")  # a .ppm's content
    says = f"cars was not evaluated: cannot decode the image {last} ("
    flags = [*comparison, "--zeroshot", f"cars:{tmp_path}/cars", f"folder:{classes}"]
    refused(lambda _: eval_mmvp.run(flags), says)
    printed = capsys.readouterr().out
    assert re.search(r"^average .*\n\n.*\nfolder accuracy .*\n\n", printed, re.M)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["prompts"] == {"cars": 8, "folder": 1}
    for model in ("before", "after"):
        assert list(content[model]["zeroshot"]) == ["folder accuracy"]
    assert [row["name"] for row in content["rows"]][9:] == ["average", "folder accuracy"]
    monkeypatch.setattr(eval_mmvp, "MANY", 0)  # now a worker fails, and nothing else is measured
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    refused(lambda _: eval_mmvp.run([*comparison[:2], *flags[-3:-1]]), says)
    gc.collect()  # which ends the workers, and else waits 5 s for them in a later test


DRAWN = os.path.join(HERE, "toy", "data")
DRAWN_SETS = {"benchmark": f"{DRAWN}/mmvp", "zeroshot": [("folder", f"{DRAWN}/zeroshot")]}


@pytest.mark.parametrize("line, expected", [
    ("--preset toy", DRAWN_SETS | {"backbone": "toy"}),
    ("--preset toy --backbone b --benchmark b", DRAWN_SETS | {"backbone": "b", "benchmark": "b"}),
    ("", {"backbone": "openai-l14-224", "benchmark": None, "zeroshot": [], "batch_size": 64}),
])
def test_the_presets_defaults_give_way_to_what_is_typed(line, expected):
    args = vars(eval_mmvp.parse_arguments(line.split()))
    assert args | expected == args


@pytest.mark.parametrize("flags, says", [  # B is the benchmark and AFTER the CLIP's file
    ("", "nothing to evaluate: download MMVP/MMVP_VLM from Hugging Face"),
    ("--benchmark B --zeroshot folder", "write NAME:PATH, where NAME is one of cifar100"),
    ("--benchmark B --zeroshot folder:a folder:b", "--zeroshot: a set is given twice"),
    ("--zeroshot folder:B", "MLLM_VLM Images, otherwise move them elsewhere: PATH must be a"),
    ("--benchmark B --json out/", "out/ cannot be written: name a file"),
    ("--benchmark B --weights AFTER --json AFTER", "is part of a CLIP"),
    ("--benchmark B --baseline AFTER --weights c --picture /.AFTER", "is part of a CLIP"),
    ("--benchmark B --baseline b --weights c --json x --picture ./x", "./x is part of a CLIP"),
    ("--benchmark B --weights B --json B/it.json", "is part of a CLIP"),
    ("--benchmark B --picture p.png", "--picture shows the pairs whose verdict changed"),
    ("--zeroshot folder:B --baseline AFTER --picture p.png", "name the pairs by --benchmark"),
    ("--benchmark B --baseline original", "with --weights"),
    ("--preset toy", "the toy's world is drawn"),  # before it is looked for
])
def test_a_bad_command_is_one_line_before_any_model(
    two_clips, benchmark, monkeypatch, tmp_path, flags, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_mmvp, "load_clip", None)  # which cannot be called
    monkeypatch.setattr(make_toy, "draw_world", fails(UserError("the toy's world is drawn")))
    flags = flags.replace("AFTER", two_clips[1]).replace("B", str(benchmark)).split()
    refused(lambda _: eval_mmvp.run(flags), says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag, says", [
    ("--weights=nowhere.pt", "nowhere.pt"),  # although the baseline could be evaluated
    ("--baseline=nowhere.pt", "nowhere.pt"),
    ("--batch-size=3", "out of memory.: choose a smaller --batch-size"),
])
def test_what_does_not_load_or_fit_is_one_line(comparison, monkeypatch, flag, says):
    memory = torch.OutOfMemoryError("CUDA out of memory.\nTried 20 GiB.")
    monkeypatch.setattr(eval_mmvp, "encode_images", fails(memory))
    refused(lambda _: eval_mmvp.run([*comparison, flag]), says)


# ------------------------------------------------------------------ no step waits for the device

class RefuseWaits(TorchDispatchMode):
    """Refuses what the meta device allows, and for which a GPU's host would wait: copies between
    the two that may block, and assignments by a mask."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        copies = len({tensor.device for tensor in tensors}) > 1
        assert not copies or kwargs.get("non_blocking"), func
        by_mask = torch.bool in {tensor.dtype for tensor in tensors}
        assert not by_mask or "index_put" not in func.__name__, func
        return result


@both_denoisers
def test_the_loop_never_waits_for_the_device(world, tmp_path, monkeypatch, kind):
    """On the meta device, whose tensors have no values: from its images to the optimizer's step,
    the loop fails where it would wait for a GPU."""
    load_batches = train.load_batches
    watching = ExitStack()

    def load_then_watch(*args):
        batches = list(load_batches(*args))
        watching.enter_context(RefuseWaits())
        monkeypatch.setattr(torch, "tensor", fails(AssertionError("it copies Python's numbers")))
        return iter(batches)

    monkeypatch.setattr(train, "start_processes", lambda: (torch.device("meta"), None))
    monkeypatch.setattr(train, "load_batches", load_then_watch)
    monkeypatch.setattr(train, "list_due", fails(InterruptedError))
    # PyTorch has no autocast for this device, and a fused AdamW only if it goes by this name.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "meta")
    # "e2e" trains what stage 2 trains, without a stage 1 before it.
    options = ("--denoiser", kind, "--stage", "e2e", "--local-ratio", 0.5, "--shuffle-target")
    with pytest.raises(InterruptedError), watching:
        train.run(arguments(world, tmp_path, *options))


# ------------------------------------------------------------------ the toy's world

TINY_WORLD = dict(train=5, held_out=3, pairs=1, images=4)


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "data"
    make_toy.draw_world(folder, **TINY_WORLD)
    return folder


def digests(folder):
    """The bytes of every file under a folder, in short."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).digest() for f in files}


def test_the_toy_world_is_the_one_that_its_weights_learned():
    # Hashes of the images that the first version drew, before it was rewritten.
    known = {
        make_toy.CAPTIONED: "d3abc48c963a01df",
        make_toy.UNLABELLED: "72c551853bc8575a",
        make_toy.ZEROSHOT_DEV: "daf71364f29e26dd",
        make_toy.DEV: "d838154e75248199",
        make_toy.TEST: "e8f921a4cade76b8",
        make_toy.ZEROSHOT: "51294ef94f889697",
    }
    seen = set()
    for part, digest in known.items():
        images = [pixels.tobytes() for pixels, _ in make_toy.draw_part(part, range(20))]
        assert hashlib.sha256(b"".join(images)).hexdigest()[:16] == digest, part
        seen.update(images)
    assert len(seen) == 20 * 6  # no two parts share an image
    [(alone, _)] = make_toy.draw_part(make_toy.ZEROSHOT, [7])
    assert alone.tobytes() == images[7]  # however many are drawn


def test_the_toy_benchmark_is_mmvp_vlms_and_pairs_differ_in_a_pattern(tiny_world, monkeypatch):
    pairs = eval_mmvp.read_benchmark(tiny_world / "mmvp")
    assert [pair["ids"] for pair in pairs] == [(n, n + 1) for n in range(1, 19, 2)]
    assert [pair["type"] for pair in pairs] == list(make_toy.PATTERNS)
    scenes = watch(monkeypatch, make_toy, "draw")
    for k, pair in enumerate(pairs):
        assert [Image.open(image).size for image in pair["images"]] == [(40, 40)] * 2
        attribute, values, _ = make_toy.PATTERNS[pair["type"]]
        make_toy.draw_pair((make_toy.TEST, k, 0))
        (first, _), (second, _) = scenes[-2:]
        assert [name for name in first if first[name] != second[name]] == [attribute]
        for scene, statement in zip((first, second), pair["statements"], strict=True):
            assert scene["category"] in statement.split()
            assert [value for value in values if value in statement] == [scene[attribute]]


def test_a_toy_world_is_the_same_each_time_and_drawn_once(tiny_world, tmp_path, monkeypatch):
    make_toy.draw_world(tmp_path / "again", **TINY_WORLD)
    world = digests(tiny_world)
    assert digests(tmp_path / "again") == world
    assert len(world) == 2 + 2 * (18 + 1) + 2 * 4
    images = set()
    for part in ("train", "val"):
        with tarfile.open(tiny_world / part / "00000.tar") as shard:
            images |= {shard.extractfile(file).read() for file in shard if "jpg" in file.name}
    assert len(images) == 5 + 3  # none is held out that trains

    monkeypatch.setattr(make_toy, "write_shards", None)
    make_toy.draw_world(tiny_world)
    assert digests(tiny_world) == world
    refused(make_toy.draw_world, tmp_path, "no train/", "move it away")


def test_a_toy_world_is_drawn_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(make_toy, "write_classes", fails(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_toy.draw_world(tmp_path / "data", **TINY_WORLD)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what, load", [("vae", load_vae), ("vqgan", vqgan_file.load_vqgan)])
def test_make_toy_writes_autoencoders_that_load(what, load, tmp_path, monkeypatch):
    images = torch.randint(256, (8, 3, 40, 40), dtype=torch.uint8)
    monkeypatch.setattr(make_toy, "unlabelled", lambda: (images, images))
    make_toy.main([what, "--steps", "2", "--out", str(tmp_path)])
    assert os.listdir(tmp_path) == [f"{what}.safetensors"]
    load(tmp_path / f"{what}.safetensors")


# ------------------------------------------------------------------ the paper's claims in miniature


def point(zeroshot, pairs):
    return {"zeroshot": zeroshot, "pairs": pairs, "margin": pairs / 10}


def table(numbers):
    """A number for each arm (row) and each CLIP (column)."""
    numbers = np.array(numbers)
    return {(f"arm {i}", f"clip {j}"): x for (i, j), x in np.ndenumerate(numbers)}


NAN = math.nan
# Retentions 1, .985, .96 and .975; pairs +0, +3, +8 and +9. Between the points the curve is
# straight: +2 at .99, +3 at .985, +6 at .97. That the retention rises again is ignored.
CURVE = [point(80, 50), point(78.8, 53), point(76.8, 58), point(78, 59)]
AREA = 0.005 * (2 + 3) / 2 + 0.015 * (3 + 6) / 2
EFFECTS = np.add.outer([10, 20, 40, 70, 0], [100, 300, 200])  # of arms, and of CLIPs
BLOCKS = np.random.default_rng(0).normal(size=(5, 3))
REST = BLOCKS - BLOCKS.mean(0) - BLOCKS.mean(1, keepdims=True) + BLOCKS.mean()


@pytest.mark.parametrize("function, arguments, truth", [
    (ablate.gain, (CURVE, ablate.AFTER), 9),
    (ablate.gain, (CURVE, ablate.KEPT), -2),
    (ablate.gain, (CURVE, "margin at the end"), 0.9),
    (ablate.gain, (CURVE, ablate.EQUAL), AREA / 0.02),
    (ablate.gain, (CURVE, ablate.EQUAL, 0.985), 2.5),
    (ablate.gain, (CURVE[:2], ablate.EQUAL), NAN),  # it ends above .97
    (ablate.residual, (table(BLOCKS + EFFECTS),), (np.linalg.norm(REST) / math.sqrt(8), 8)),
    # Half-widths are of tables of Student's t; p has closed forms with 1 and 2 degrees of freedom.
    (ablate.half_width, (2, 1), 2 * 12.706),
    (ablate.half_width, (2, 10, 2), 2 * 2.634),
    (ablate.half_width, (2, 0), NAN),
    (ablate.p_value, (-4, 1), 1 - 2 * math.atan(4) / math.pi),
    (ablate.p_value, (4, 2, 2), 2 - 8 / math.sqrt(2 + 16)),
    (ablate.p_value, (NAN, 10), 1),
    (ablate.table4, (12.6, 2 * 9.6, 0), 1),
])
def test_statistics_are_their_closed_forms(function, arguments, truth):
    assert function(*arguments) == pytest.approx(truth, rel=3e-4, nan_ok=True)


VERDICTS = """
    worse         |  0.1 |  1.1 |   2 | reproduces               |   0
    worse         |  0.1 |  0.7 |   2 | smaller than the paper's |   0
    worse         |  0.5 |  0.9 |   2 | smaller than the paper's |   1
    worse         |  0.1 |  0.9 | nan | reproduces               |   0
    worse         |   -2 | -0.1 |   2 | opposite                 |   0
    worse         | -0.1 |  1.1 |   2 | cannot tell              | nan
    worse         | -0.1 |  0.9 | nan | excluded                 |   1
    worse         | -0.1 |  1.1 | nan | cannot tell              | nan
    about as well | -0.9 |  0.8 | nan | reproduces               |  -1
    about as well |  1.1 |    3 | nan | excluded                 |   1
    about as well |   -3 | -1.1 | nan | excluded                 |  -1
    about as well |  0.2 |  1.1 | nan | cannot tell              | nan
    no better     |  0.1 |  0.9 | nan | reproduces               |   1
    no better     |  0.1 |  1.1 | nan | opposite                 |   0
    no better     | -0.1 |  1.1 | nan | cannot tell              | nan
"""


@pytest.mark.parametrize("row", VERDICTS.strip().splitlines())
def test_verdicts_are_the_designs(row):
    """On a claim: the interval's ends, the paper's effect, the verdict, what is ruled out."""
    expected, low, high, effect, verdict, ruled_out = map(str.strip, row.split("|"))
    said, bound = ablate.judge(expected, float(low), float(high), float(effect))
    assert said == verdict
    assert bound == pytest.approx(float(ruled_out), nan_ok=True)


def test_holm_goes_down_from_the_smallest_p():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}  # the bounds are .0125, .0167, .025 and .05
    assert ablate.holm(p) == {"a", "d"}
    assert ablate.holm({"a": 0.04, "b": 0.02}) == {"a", "b"}


def test_curves_are_compared_over_the_retentions_that_all_reach():
    def difference(own, other, outcome=ablate.EQUAL):
        curves = {("s = 5", "0"): own, ("rf", "0"): other}
        return ablate.compare(curves, ablate.ARMS["s = 5"], outcome)

    short = [point(100, 50), point(99, 54), point(97.5, 56)]
    long = [point(100, 50), point(99, 53), point(96, 53)]
    assert difference(short, long).mean == pytest.approx((4 + 6) / 2 - 3)  # from .99 to .975
    assert difference(long, short).mean == pytest.approx(3 - (4 + 6) / 2)
    shorter = [point(100, 50), point(98.5, 56)]
    assert difference(shorter, long) is None
    assert difference(shorter, long, ablate.AFTER).mean == 3


@pytest.fixture
def committed(tmp_path):
    """A copy of the committed grid."""
    return shutil.copy(os.path.join(ablate.HERE, "ablation.csv"), tmp_path)


def test_the_committed_grid_gives_the_committed_tables_and_figure(committed, tmp_path, capsys):
    ablate.main(["--report", committed])
    tables, _ = capsys.readouterr().out.split("\nThe figure is")
    with open(os.path.join(ablate.HERE, "ABLATIONS.md")) as file:
        assert tables in file.read()
    with open(os.path.join(ablate.HERE, "ablation.svg")) as file:
        assert (tmp_path / "ablation.svg").read_text() == file.read()


def test_a_report_on_some_arms_takes_their_cells_alone(committed, tmp_path, capsys):
    curves = ablate.read_csv(committed)
    ablate.main(["--report", committed, "--arms", "uniform t"])
    [row] = re.findall(r"\| uniform t \| Table 4.*", capsys.readouterr().out)
    differences = []
    for clip in "012345":
        uniform, rf = [curves[arm, clip][-1]["pairs"] for arm in ("uniform t", "rf")]
        differences.append(uniform - rf)
    half = 2.571 * np.std(differences, ddof=1) / math.sqrt(6)  # Student's, of 5 degrees of freedom
    assert f"| {np.mean(differences):+.2f} ± {half:.2f} |" in row
    assert os.listdir(tmp_path) == ["ablation.csv"]  # the figure is of all arms


@pytest.fixture
def commands(monkeypatch):
    """What run_grid runs: each command only makes its file, and every CLIP scores the same."""
    called = []

    def call(command, log):
        called.append(command)
        os.makedirs(os.path.dirname(log), exist_ok=True)
        open(log.removesuffix(".log"), "x").close()  # never one that is there

    def score(out, clip, arm, step, weights):
        folder = f"{arm}/open_clip" if step == 240 else f"{arm}/clip-{step:06}"
        file = f"{folder}/open_clip_model.safetensors" if step else "clip.safetensors"
        assert weights.endswith(f"/{file}")
        return {"arm": arm, "clip": clip, "step": step} | point(90, 50)

    monkeypatch.setattr(ablate, "call", call)
    monkeypatch.setattr(ablate, "score", score)
    for name in ("draw_world", "draw_test"):
        monkeypatch.setattr(ablate, name, lambda *_: None)
    return called


def test_the_grid_runs_each_cell_once_and_goes_on(tmp_path, commands):
    ablate.run_grid(str(tmp_path), ablate.FULL, 1)
    weights = os.path.join(ablate.HERE, "clip.safetensors")  # CLIP 0 is the committed one
    words = [" ".join(command).replace(str(tmp_path), "OUT") for command in commands]
    common = f"train.py --preset toy --seed 0 --clip-weights {weights} --out OUT/clip-0/"
    start = "--init OUT/clip-0/rf/stage1/last.safetensors"  # frozen shares rf's stage 1
    second = "--steps 240 --export-every 40 --lr-clip 4e-4"
    for expected in (
        "toy/make_toy.py clip --seed 5 --regime weak --out OUT/clip-5",
        f"{common}stage 1: 60 steps --stage 1 --steps 250 --steps 60",
        f"{common}frozen --stage 2 {second} --freeze-denoiser {start}",
        f"{common}end to end --stage e2e {second}",
    ):
        assert words.count(expected) == 1
    arms = [(name, clip) for name, arm in ablate.ARMS.items() for clip in arm.clips]
    assert sum("--export-every" in line for line in words) == len(arms)
    curves = ablate.read_csv(tmp_path / "ablation.csv")
    assert sorted(curves) == sorted(arms)

    commands.clear()
    os.remove(tmp_path / "clip-2" / "frozen" / "open_clip" / "open_clip_model.safetensors")
    before = (tmp_path / "ablation.csv").read_text()
    kept = [line for line in before.splitlines(True) if "frozen,2," not in line]
    (tmp_path / "ablation.csv").write_text("".join(kept))
    ablate.run_grid(str(tmp_path), ablate.FULL | {"arms": ("rf", "frozen")}, 1)
    assert (tmp_path / "ablation.csv").read_text() == before  # with the cells of other arms
    [again] = commands
    assert f"{tmp_path}/clip-2/frozen" in again


def test_a_grid_of_one_clip_and_one_arm_is_reported(tmp_path, commands):
    ablate.run_grid(str(tmp_path), ablate.QUICK | {"arms": ("rf",)}, 1)
    ablate.report(tmp_path / "ablation.csv")
    assert "nan" not in (tmp_path / "ablation.svg").read_text()


def test_what_stops_a_grid_or_a_report_is_one_line(tmp_path, monkeypatch):
    refused(lambda path: ablate.run(["--report", str(path)]), tmp_path / "none.csv", "not found")
    (tmp_path / "quick").mkdir()
    monkeypatch.setattr(ablate, "run_grid", None)
    with open(tmp_path / "quick" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        refused(lambda out: ablate.run(["--quick", "--out", str(out)]), tmp_path, "another grid")
    log = tmp_path / "logs" / "world.log"
    refused(lambda log: ablate.call(["-c", "raise SystemExit('no room')"], str(log)), log, "failed")
    assert "no room" in log.read_text()


def test_a_line_of_the_csv_holds_the_evaluation_and_the_margin(tmp_path, monkeypatch):
    ablate.draw_test(f"{tmp_path}/test", {"pairs": 4, "images": 60})
    ablate.draw_test(f"{tmp_path}/test", None)  # it is there
    stage = tmp_path / "clip-0" / "rf" / "stage2"
    stage.mkdir(parents=True)
    (stage / "settings.json").write_text('{"lr_clip": 0.0004, "precision": "fp32"}')
    (stage / "log.csv").write_text("step,heldout\n1,0.9\n2,0.6712\n")
    weights = os.path.join(ablate.HERE, "clip.safetensors")
    exported = {("0", "original", 0): weights, ("0", "rf", 2): weights}
    ablate.score_missing(tmp_path, exported)
    curve = ablate.read_csv(tmp_path / "ablation.csv")["rf", "0"]
    about = [curve[1][name] for name in ("rate", "precision", "heldout")]
    assert about == ["0.0004", "fp32", 0.6712]

    toy = load_clip("toy")
    tasks = [("folder", tmp_path / "test" / "zeroshot")]
    truth = eval_mmvp.evaluate(*toy, tmp_path / "test" / "mmvp", tasks)
    margins = []
    for pair in truth["pairs"]:
        prompts = ["a photo of " + statement for statement in pair["statements"]]
        (a, b), (c, d) = toy[0].logit_scale.exp().item() * cosines(toy, prompts, pair["images"])
        margins.append(np.clip(min(a - b, d - c), -4, 4))
    assert len(curve) == 2
    for scored in curve:
        assert scored["pairs"] == pytest.approx(truth["average"])
        assert scored["zeroshot"] == pytest.approx(truth["zeroshot"]["folder accuracy"])
        assert scored["margin"] == pytest.approx(np.mean(margins), abs=1e-5)

    monkeypatch.setattr(ablate, "score", None)
    ablate.score_missing(tmp_path, exported)  # once each


def test_nothing_else_draws_the_tests_images():
    worlds = {value for value in vars(make_toy).values() if type(value) is int}
    others = worlds | {101, 102, 103}  # the last three are of the first grid
    assert len({ablate.PAIR_SEED, ablate.IMAGE_SEED} - others) == 2
