"""`pytest test_genhancer.py`: on the CPU, without downloads, in under two minutes.

Truth comes from elsewhere: golden outputs of FLUX's and taming's own implementations (toy/golden),
closed forms, the benchmark's own protocol written out pair by pair, a second process, a perturbed
round trip.
"""
import copy
import csv
import gc
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import traceback
import types
import zlib
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from xml.etree import ElementTree

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import eval_mmvp
import genhancer as gh
import toy.ablate as ablate
import toy.make_toy as make_toy
import train
import vqgan as vqgan_file
from genhancer import UserError, load_clip
from vae import AutoEncoder, AutoEncoderConfig, load_vae

HERE = os.path.dirname(os.path.abspath(gh.__file__))
GOLDEN = os.path.join(HERE, "toy", "golden")

TINY_CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY_SIGLIP = {
    "embed_dim": 48,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "tiny_siglip_tower",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 320,
        "width": 48,
        "heads": 4,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}


@timm.models.register_model
def tiny_siglip_tower(
    pretrained=False,
    features_only=False,
    pretrained_cfg=None,
    pretrained_cfg_overlay=None,
    cache_dir=None,
    **kwargs,
):
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
    shape |= dict(class_token=False, global_pool="map", num_classes=0)
    return timm.models.vision_transformer.VisionTransformer(**{**shape, **kwargs})


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Random tiny models in the published formats, and noise for images in two shards."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    for name, config in (("tiny-clip", TINY_CLIP), ("tiny-siglip", TINY_SIGLIP)):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        clip = open_clip.create_model(name, load_weights=False)
        perturb(clip)
        save_file(clip.state_dict(), folder / f"{name}.safetensors")

    vae = AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4))
    about = {"scale_factor": "0.5", "shift_factor": "0.1"}
    save_file(vae.state_dict(), folder / "vae.safetensors", about)

    config = vqgan_file.VQGANConfig(
        ch=32,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(128,),
        z_channels=16,
        n_embed=64,
        embed_dim=8,
    )
    save_file(vqgan_file.VQGAN(config).state_dict(), folder / "vqgan.safetensors")

    rng = np.random.default_rng(0)
    for shard in range(2):
        images = [jpeg(noise_image(rng, 40, 50)) for _ in range(30)]
        write_shard(folder / "data" / f"{shard:05}.tar", images)
    return folder


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
    with safe_open(os.path.join(GOLDEN, f"{name}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@torch.no_grad()
def fill(module, std):
    """The parameters with which the golden outputs were made."""
    for name, parameter in module.named_parameters():
        k = torch.arange(parameter.numel(), dtype=torch.float64)
        phase = zlib.crc32(name.encode()) % 1000
        value = std * math.sqrt(2) * torch.sin(1.7 * k + 0.013 * k * k + phase)
        if name.endswith(".scale") or (name.endswith(".weight") and "norm" in name):
            value += 1
        parameter.copy_(value.view(parameter.shape))
    return module.eval().requires_grad_(False)


def assert_close(a, b, tolerance=1e-4):
    """Relative error of the whole tensor."""
    assert (a - b).norm() <= tolerance * b.norm()


def assert_one_line(error, *words):
    """A UserError's message is one line that holds all these words."""
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def tiny_model(world, kind="rf", clip="tiny-clip", **options):
    """A GenHancer of a few thousand parameters; kind: "rf" or "perceiver"."""
    return copy.deepcopy(built_model(world, kind, clip, tuple(options.items())))


@lru_cache
def built_model(world, kind, clip, options):
    visual = gh.load_clip(clip, str(world / f"{clip}.safetensors"))[0].visual
    options = dict(options)
    torch.manual_seed(1)
    if kind == "rf":
        config = gh.FluxConfig(
            in_channels=16,
            hidden_size=64,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=(8, 12, 12),
            context_in_dim=48,
        )
        vae = load_vae(world / "vae.safetensors")
        return gh.Continuous(visual, vae, gh.Flux(config), **options)
    vqgan = vqgan_file.load_vqgan(world / "vqgan.safetensors")
    config = gh.PerceiverConfig(n_embed=64, embed_dim=8, width=32, num_heads=2, layers=2)
    denoiser = gh.Perceiver(config, vqgan.quantize.embedding.weight)
    return gh.Discrete(visual, vqgan, denoiser, **options)


# ------------------------------------------------------------------ parity with FLUX and taming


def test_vae_equals_flux():
    truth = golden("flux_ae_tiny")
    vae = fill(AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1, 2, 4))), 0.05)
    mean, logvar = vae.moments(truth["image"])
    assert_close(mean, truth["mean"])
    assert_close(logvar, truth["logvar"])
    assert_close(vae.encode(truth["image"], sample=False), truth["latent_of_mean"])
    assert_close(vae.decode(truth["latent_of_mean"]), truth["decoded"])


def test_vae_encodes_to_a_sample_of_the_posterior():
    truth = golden("flux_ae_tiny")
    vae = fill(AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1, 2, 4))), 0.05)
    torch.manual_seed(0)
    noise = torch.randn_like(truth["mean"])
    torch.manual_seed(0)
    latent = vae.encode(truth["image"])
    sample = truth["mean"] + (0.5 * truth["logvar"]).exp() * noise
    assert_close(latent, 0.3611 * (sample - 0.1159))


def test_vqgan_equals_taming():
    config = vqgan_file.VQGANConfig(
        ch=32,
        ch_mult=(1, 1, 2),
        num_res_blocks=1,
        attn_resolutions=(8,),
        resolution=32,
        z_channels=16,
        n_embed=64,
        embed_dim=8,
    )
    truth = golden("vqgan_tiny")
    vqgan = fill(vqgan_file.VQGAN(config), 0.1)
    vqgan.quantize.embedding.weight.copy_(truth["codebook"])
    assert_close(vqgan.pre_quantize(truth["image"]), truth["pre_quant"])
    assert torch.equal(vqgan.encode(truth["image"]), truth["indices"])
    assert_close(vqgan.decode(truth["indices"]), truth["decoded"])


def full_size_autoencoder(name):
    with torch.device("meta"):
        if name == "flux_ae":
            return AutoEncoder(AutoEncoderConfig())
        codes = int(name.rpartition("_")[2])
        return vqgan_file.VQGAN(vqgan_file.VQGANConfig(n_embed=codes))


@pytest.mark.parametrize("name", ["flux_ae", "vqgan_f16_1024", "vqgan_f16_16384"])
def test_full_size_layouts_are_the_published_ones(name):
    with open(os.path.join(GOLDEN, f"keys_{name}.json")) as file:
        published = json.load(file)
    module = full_size_autoencoder(name)
    shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    assert shapes == published["shapes"]
    assert sum(p.numel() for p in module.parameters()) == published["parameters"]


# ------------------------------------------------------------------ the autoencoders' files

LOAD = {"vae": load_vae, "vqgan": vqgan_file.load_vqgan}
both_autoencoders = pytest.mark.parametrize("name", LOAD)
CONV_IN, BIAS, Q = "encoder.conv_in.weight", "encoder.conv_in.bias", "decoder.mid.attn_1.q.weight"
CODES, BLOCK = "quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight"


def test_the_vae_reads_its_configuration_off_the_file(world, tmp_path):
    vae = load_vae(world / "vae.safetensors")
    layout = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4)
    assert vae.config == AutoEncoderConfig(**layout, scale_factor=0.5, shift_factor=0.1)
    assert vae.factor == 4
    save_file(load_file(world / "vae.safetensors"), tmp_path / "it")  # without metadata: as FLUX's
    assert load_vae(tmp_path / "it").config == AutoEncoderConfig(**layout)


def test_the_vqgan_reads_its_configuration_off_the_file_less_the_training_loss(world, tmp_path):
    steps = {"loss.discriminator.steps": torch.zeros(3, dtype=torch.int64)}
    save_file(load_file(world / "vqgan.safetensors") | steps, tmp_path / "it")
    vqgan = vqgan_file.load_vqgan(tmp_path / "it")
    config = vqgan.config
    assert (config.ch, config.ch_mult, config.z_channels) == (32, (1, 2), 16)
    assert (config.n_embed, config.embed_dim, vqgan.factor) == (64, 8, 2)
    assert [len(level.attn) for level in vqgan.encoder.down] == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@both_autoencoders
def test_autoencoders_of_any_precision_load_as_float32_frozen(world, tmp_path, name, dtype):
    tensors = load_file(world / f"{name}.safetensors")
    save_file({key: value.to(dtype) for key, value in tensors.items()}, tmp_path / "it")
    module = LOAD[name](tmp_path / "it")
    assert not module.training
    for key, parameter in module.named_parameters():
        assert not parameter.requires_grad
        assert torch.equal(parameter, tensors[key].to(dtype).float())


def refused(load, path, *words):
    with pytest.raises(UserError) as error:
        load(path)
    assert_one_line(error, path, *words)


@both_autoencoders
def test_what_is_no_whole_file_is_refused(world, tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "fifo", ""):
        refused(LOAD[name], path, "not found", f"--{name}")
    data = (world / f"{name}.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        refused(LOAD[name], tmp_path / "cut", "not a complete safetensors file", f"--{name}")


def test_the_files_of_others_are_refused_with_the_way_out(world, tmp_path):
    refused(load_vae, world / "vqgan.safetensors", "VQ-GAN", "--vqgan", "ae.safetensors")
    refused(LOAD["vqgan"], world / "vae.safetensors", f"missing {CODES}")
    for load in LOAD.values():
        refused(load, world / "tiny-clip.safetensors", "layout", CONV_IN)
    names = (CONV_IN, "encoder.down_blocks.0.resnets.0.conv1.weight")
    save_file({name: torch.zeros(32, 3, 3, 3) for name in names}, tmp_path / "it")
    refused(load_vae, tmp_path / "it", "diffusers", "ae.safetensors")


def one_value(value):
    tensor = torch.zeros(64, 64, 1, 1, dtype=torch.float64)
    tensor[3, 2] = value
    return tensor


IMPOSSIBLE = [  # channels that are none, not 3 or not a multiple of 32; too few dimensions
    (CONV_IN, (0, 3, 3, 3)),
    (CONV_IN, (32, 0, 3, 3)),
    (CONV_IN, (32, 4, 3, 3)),
    (CONV_IN, (48, 3, 3, 3)),
    (BLOCK, (48, 32, 3, 3)),
    (CONV_IN, (32, 3, 3)),
    (BLOCK, ()),
    ("decoder.conv_in.weight", (32, 0, 3, 3)),
    ("decoder.conv_out.weight", (1, 32, 3, 3)),
]
MISFITS = [  # an autoencoder, a tensor of its file, what stands there instead, what the line says
    ("vae", "something.weight", torch.zeros(1), "unexpected something.weight"),
    ("vae", "decoder.mid.block_1.conv1.bias", None, "missing decoder.mid.block_1.conv1.bias"),
]
for shape in [(0, 8), (64, 0), (64,), (64, 8, 1), ()]:
    MISFITS.append(("vqgan", CODES, torch.zeros(shape), CODES))
for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64):
    MISFITS.append(("vae", Q, one_value(1).to(dtype), "floating-point"))
for name in LOAD:
    MISFITS += [(name, key, torch.zeros(shape), "does not") for key, shape in IMPOSSIBLE]
    for value in (math.nan, math.inf, -math.inf, 1e300):
        MISFITS.append((name, Q, one_value(value), f"{Q} that are not finite"))


@pytest.mark.parametrize("name, key, value, says", MISFITS)
def test_a_file_that_does_not_fit_is_refused(world, tmp_path, name, key, value, says):
    tensors = load_file(world / f"{name}.safetensors") | {key: value}
    save_file({key: tensors[key] for key in tensors if tensors[key] is not None}, tmp_path / "it")
    refused(LOAD[name], tmp_path / "it", says)


BAD_SCALING = [("scale_factor", text) for text in ("", "big", "nan", "inf", "0", "1e300")]
BAD_SCALING += [("shift_factor", text) for text in ("", "0.1, 0.2", "nan", "-inf")]


@pytest.mark.parametrize("name, text", BAD_SCALING)
def test_a_factor_that_cannot_scale_is_refused(world, tmp_path, name, text):
    save_file(load_file(world / "vae.safetensors"), tmp_path / "it", {name: text})
    refused(load_vae, tmp_path / "it", name, repr(text))


# ------------------------------------------------------------------ reading and writing files


def test_loaded_weights_do_not_depend_on_the_file_any_more(tmp_path):
    path = tmp_path / "it.safetensors"
    save_file({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, path)
    tensors, _ = gh.read_weights(path, "weights")
    module = gh.load_strictly(nn.Linear(1, 1), tensors, path, "weights")
    path.write_bytes(bytes(path.stat().st_size))
    assert module.weight.item() == module.bias.item() == 1


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_get_the_permissions_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        gh.write_weights(tmp_path / "it.safetensors", {"a": torch.zeros(1)})
        gh.write_json(tmp_path / "it.json", {"a": 1})
    finally:
        os.umask(before)
    for name in ("it.safetensors", "it.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_is_synced_before_it_is_moved_into_place(tmp_path, monkeypatch):
    calls = []
    sync, move = os.fsync, os.replace

    def fsync(file):
        calls.append("fsync")
        sync(file)

    def replace(*paths):
        calls.append("replace")
        move(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    gh.write_json(tmp_path / "it.json", 1)
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("no")])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    def write(part):
        with open(part, "w") as file:
            file.write("half")
        raise error

    path = tmp_path / "it.txt"
    path.write_text("old")
    with pytest.raises(UserError) as caught:
        gh.write_file(path, write)
    assert_one_line(caught, path, "could not be written", getattr(error, "strerror", "no"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["it.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def write(part):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gh.write_file(tmp_path / "it.txt", write)
    assert os.listdir(tmp_path) == []


def bad_outputs(folder):
    """Paths that cannot be files."""
    (folder / "file").write_text("old")
    (folder / "folder").mkdir()
    names = ["folder", "folder/", "new/", "file/below", "a" * 300]
    return ["", *(f"{folder}/{name}" for name in names), "/proc/it"]


def test_a_path_that_cannot_be_written_is_one_line(tmp_path):
    for path in bad_outputs(tmp_path):
        with pytest.raises(UserError) as error:
            gh.write_json(path, 1)
        assert_one_line(error, path)


def test_the_bytes_of_written_weights_do_not_depend_on_their_order(tmp_path):
    tensors = {"b": torch.ones(2, 3).T, "a": torch.zeros(4)}
    gh.write_weights(tmp_path / "1", tensors, {"x": 1, "y": (2,)})
    gh.write_weights(tmp_path / "2", dict(reversed(tensors.items())), {"y": [2], "x": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    read, about = gh.read_weights(tmp_path / "1", "it")
    assert torch.equal(read["b"], tensors["b"])
    assert about == {"x": 1, "y": [2]}


@pytest.mark.parametrize("old, new", [
    (b"weight", b"height"), (b"F16", b"I16"), (b"[2,3]", b"[3,2]"), (b"step", b"stop"),
    (bytes(5 * 2) + b"\0<", bytes(5 * 2) + b"\0="),
])
def test_any_change_of_what_was_written_is_noticed(tmp_path, old, new):
    path = tmp_path / "it.safetensors"
    tensors = {"weight": torch.tensor(6 * [0.0]).half().view(2, 3)}
    tensors["weight"][1, 2] = 1
    gh.write_weights(path, tensors, {"step": 3})
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError) as error:
        gh.read_weights(path, "it")
    assert_one_line(error, path, "is damaged")


# ------------------------------------------------------------------ the command line


def command(capsys, run, *argv):
    """The exit status and stderr of a program."""
    with pytest.raises(SystemExit) as end:
        gh.run_command("it.py", run, argv)
    forget(end)
    return end.value.code, capsys.readouterr().err


def forget(end):
    """Free what the failed program held: a DataLoader that waits for the garbage collector to end
    its workers then waits 5 s for each."""
    traceback.clear_frames(end.value.__context__.__traceback__)


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    def run(argv):
        raise UserError(f"{argv[0]}: no such thing")

    assert command(capsys, run, "x") == (2, "it.py: x: no such thing\n")


def test_ctrl_c_is_one_line_and_a_shells_status(capsys):
    def run(argv):
        raise KeyboardInterrupt

    assert command(capsys, run) == (130, "\nit.py: interrupted\n")


def test_a_name_cannot_control_the_terminal(capsys):
    def run(argv):
        raise UserError(f"{argv[0]} is bad")

    _, line = command(capsys, run, "a\x1b[31m\n\u202eé日")
    assert line == "it.py: a\\x1b[31m\\n\\u202eé日 is bad\n"


def test_a_mistake_in_a_data_worker_is_one_line(capsys):
    def run(argv):
        list(torch.utils.data.DataLoader(BadData(), num_workers=1))

    assert command(capsys, run) == (2, "it.py: shard 3 is cut\n")


class BadData(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("shard 3 is cut")


@pytest.mark.parametrize("argv", [[], ["a"], ["a", "b", "c"], ["--nope", "a", "b"]])
def test_a_wrong_usage_of_the_converter_is_one_line(capsys, argv):
    status, line = command(capsys, vqgan_file.run, *argv)
    assert status == 2
    assert line.startswith("it.py: ") and line.count("\n") == 1


# ------------------------------------------------------------------ the converter

LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture
def state(world):
    return load_file(world / "vqgan.safetensors")


def convert(folder, content):
    """Convert what is saved as a checkpoint, and return the result's tensors."""
    torch.save(content, folder / "last.ckpt")
    vqgan_file.convert(folder / "last.ckpt", folder / "it.safetensors")
    return load_file(folder / "it.safetensors")


def test_a_lightning_checkpoint_is_converted(state, tmp_path, monkeypatch):
    callback = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
    module = types.ModuleType(LIGHTNING)
    module.ModelCheckpoint = callback
    with monkeypatch.context() as patch:  # Lightning is there when it is saved
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", LIGHTNING):
            patch.setitem(sys.modules, name, module)
        loss = {"loss.logvar": torch.zeros(1), "loss.name": "lpips"}
        content = {"state_dict": {**loss, **state}, "epoch": 3, "callbacks": {callback: {}}}
        torch.save(content, tmp_path / "last.ckpt")
    vqgan_file.convert(tmp_path / "last.ckpt", tmp_path / "it.safetensors")
    converted = load_file(tmp_path / "it.safetensors")
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)
    vqgan_file.load_vqgan(tmp_path / "it.safetensors")


def views_of_one_storage(state):
    storage = torch.randn(sum(value.numel() for value in state.values()))
    parts = storage.split([value.numel() for value in state.values()])
    return {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}


NORM = "encoder.mid.block_1.norm"
USABLE = {
    "views": views_of_one_storage,
    "order": lambda state: {name: v.mT.contiguous().mT for name, v in state.items() if v.dim() > 1},
    "expanded": lambda state: {BIAS: torch.ones(1).expand(32)},
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "parameters": lambda state: {name: nn.Parameter(value) for name, value in state.items()},
    "negative view": lambda state: {BIAS: torch._neg_view(torch.ones(32))},
    "two names": lambda state: {f"{NORM}1.weight": state[f"{NORM}2.weight"]},
}


@pytest.mark.parametrize("kind", USABLE)
def test_tensors_of_every_usable_kind_are_converted(state, tmp_path, kind):
    state = state | USABLE[kind](state)
    converted = convert(tmp_path, {"state_dict": state})
    for name, value in state.items():
        assert converted[name].dtype == value.dtype
        assert torch.equal(converted[name], value)


UNUSABLE = {
    "string": "text",
    "int": 3,
    "none": None,
    "list": [1.0],
    "int tensor": torch.zeros(32, dtype=torch.int64),
    "bool tensor": torch.zeros(32, dtype=torch.bool),
    "complex": torch.zeros(32, dtype=torch.complex64),
    "sparse": torch.ones(32).to_sparse(),
    "meta": torch.ones(32, device="meta"),
    "empty": torch.zeros(0),
    "misshapen": torch.zeros(31),
    "nan": torch.full((32,), math.nan),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("name", [BIAS, CONV_IN, "other"])
def test_a_value_of_any_other_kind_is_refused_by_name(state, tmp_path, kind, name):
    with pytest.raises(UserError) as error:
        convert(tmp_path, {"state_dict": state | {name: UNUSABLE[kind]}})
    assert_one_line(error, tmp_path / "last.ckpt", name)
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("content, says", [
    ({"model": {}}, "no state_dict"),
    ([1, 2], "no state_dict"),
    ({"state_dict": [1, 2]}, "no state_dict"),
    ({"state_dict": {}}, f"missing {CONV_IN}"),
    ({"state_dict": {"loss.a": torch.ones(1)}}, f"missing {CONV_IN}"),
    ({"state_dict": {1: torch.ones(1)}}, "first name 1"),
    ("a VAE", f"missing {CODES}"),
])
def test_a_checkpoint_of_anything_else_is_refused(world, tmp_path, content, says):
    if content == "a VAE":
        content = {"state_dict": load_file(world / "vae.safetensors")}
    with pytest.raises(UserError) as error:
        convert(tmp_path, content)
    assert_one_line(error, tmp_path / "last.ckpt", says)


class Payload:
    """What pickles as a call, such as one that makes the folder "owned"."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        function, *arguments = self.call
        return function, tuple(arguments)


PAYLOADS = [
    Payload(os.mkdir, "owned"),
    Payload(os.system, "mkdir owned"),
    Payload(eval, "__import__('os').mkdir('owned')"),
    Payload(bytearray, 10**15),
]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_converting_runs_none_of_a_checkpoints_code(state, tmp_path, monkeypatch, payload, place):
    monkeypatch.chdir(tmp_path)
    contents = {"beside": {"state_dict": state, "extra": payload},
                "inside": {"state_dict": state | {BIAS: payload}}}
    if place == "alone":
        (tmp_path / "last.ckpt").write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(contents[place], "last.ckpt")
    with pytest.raises(UserError) as error:
        vqgan_file.convert("last.ckpt", "it.safetensors")
    assert_one_line(error, "last.ckpt cannot be read safely")
    assert "eval" not in str(payload.call[0]) or "it asks for eval" in str(error.value)
    assert not re.search("weights_only|safe_globals", str(error.value))  # how to run it
    assert os.listdir() == ["last.ckpt"]


def test_what_is_no_whole_checkpoint_is_refused(state, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    target = tmp_path / "it.safetensors"
    for source in (tmp_path / "nowhere", tmp_path, tmp_path / "fifo", ""):
        refused(lambda source: vqgan_file.convert(source, target), source, "not found")
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    data = (tmp_path / "last.ckpt").read_bytes()
    for content in (b"", b"\x80", b".", b"<html>", bytes(1000), data[:1000], data[:-1]):
        (tmp_path / "cut").write_bytes(content)
        refused(lambda source: vqgan_file.convert(source, target), tmp_path / "cut", "read safely")


def test_a_checkpoint_is_not_written_over(state, tmp_path):
    source = tmp_path / "last.ckpt"
    torch.save({"state_dict": state}, source)
    content = source.read_bytes()
    os.link(source, tmp_path / "hard.ckpt")
    os.symlink(source, tmp_path / "soft.ckpt")
    for name in ("last.ckpt", "hard.ckpt", "soft.ckpt"):
        with pytest.raises(UserError, match="both input and output"):
            vqgan_file.convert(source, tmp_path / name)
        assert (tmp_path / name).read_bytes() == content


def test_the_converters_output_is_a_file_and_prints_no_raw_name(state, tmp_path, capsys):
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    for path in bad_outputs(tmp_path):
        refused(lambda path: vqgan_file.convert(tmp_path / "last.ckpt", path), path)
    for name in ("a\x1b[31m\n.safetensors", os.fsdecode(b"a\xff.safetensors")):
        vqgan_file.convert(tmp_path / "last.ckpt", f"{tmp_path}/{name}")
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and out[:-1].isprintable()


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage():
    """The collector need not look through all that the imports made."""
    gc.freeze()


@pytest.fixture(autouse=True)
def same_draws():
    """Every test draws the same, alone or after others."""
    torch.manual_seed(0)


# Loading and initialising take longer than most tests: each is done once, and copied.


def load_visual(world, name):
    return copy.deepcopy(loaded_visual(world, name))


@lru_cache
def loaded_visual(world, name):
    return gh.load_clip(name, str(world / f"{name}.safetensors"))[0].visual


# ---------------------------------------------------------------------------------------------
# What trains, and what forward returns
# ---------------------------------------------------------------------------------------------

both_denoisers = pytest.mark.parametrize("kind", ["rf", "perceiver"])
both_families = pytest.mark.parametrize("clip", ["tiny-clip", "tiny-siglip"])

STAGES = [  # stage, lora, freeze_denoiser, what trains
    (1, True, False, {"projectors", "denoiser"}),
    (1, True, True, {"projectors", "denoiser"}),
    (1, False, False, {"projectors", "denoiser"}),
    (1, False, True, {"projectors", "denoiser"}),
    (2, True, False, {"adapters", "projectors", "denoiser"}),
    (2, True, True, {"adapters"}),
    (2, False, False, {"visual", "projectors", "denoiser"}),
    (2, False, True, {"visual"}),
    ("e2e", True, False, {"adapters", "projectors", "denoiser"}),
    ("e2e", True, True, {"adapters", "projectors", "denoiser"}),
    ("e2e", False, False, {"visual", "projectors", "denoiser"}),
    ("e2e", False, True, {"visual", "projectors", "denoiser"}),
]
every_stage = pytest.mark.parametrize("stage, lora, freeze_denoiser, trains", STAGES)


def trained_parts(model):
    """Each part of a model, with True and False for what trains in it and what does not."""
    parts = {}
    for name, parameter in model.named_parameters():
        part = "adapters" if "lora_" in name else name.split(".")[0]
        parts.setdefault(part, set()).add(parameter.requires_grad)
    return parts


@every_stage
def test_a_stage_trains_what_it_says_and_nothing_else(world, stage, lora, freeze_denoiser, trains):
    model = tiny_model(world).set_stage(stage, lora, freeze_denoiser)
    expected = {"visual": {False}, "autoencoder": {False}}
    expected |= {"projectors": {False}, "denoiser": {False}}
    expected |= {part: {True} for part in trains}
    assert trained_parts(model) == expected


@every_stage
def test_frozen_parts_stay_in_eval_mode(world, stage, lora, freeze_denoiser, trains):
    model = tiny_model(world).set_stage(stage, lora, freeze_denoiser).eval().train()
    for name, part in model.named_children():
        frozen = not any(p.requires_grad for p in part.parameters())
        modes = {module.training for module in part.modules()}
        assert modes == {not frozen}, name


@every_stage
def test_eval_mode_is_eval_mode_everywhere(world, stage, lora, freeze_denoiser, trains):
    model = tiny_model(world).set_stage(stage, lora, freeze_denoiser).eval()
    assert not any(module.training for module in model.modules())


def test_stage_2_follows_stage_1_in_one_process(world):
    model = tiny_model(world).set_stage(1).set_stage(2)
    assert trained_parts(model)["adapters"] == {True}
    assert trained_parts(model)["visual"] == {False}


def seen_by_denoiser(model):
    """A list of the denoiser's positional inputs, one tuple a call, filled while it is called."""
    calls = []
    model.denoiser.register_forward_pre_hook(keep_inputs_in(calls))
    return calls


def keep_inputs_in(calls):
    def hook(module, inputs):
        calls.append(inputs)

    return hook


@both_families
def test_the_levels_are_the_timesteps_that_were_used(world, clip):
    model = tiny_model(world, "rf", clip).set_stage(1)
    calls = seen_by_denoiser(model)
    losses, levels = model(torch.rand(5, 3, 32, 32))
    _, t, _, _ = calls[0]
    assert losses.shape == (5,)
    assert torch.equal(levels, t)


@both_families
def test_the_levels_are_the_mask_ratios_that_were_used(world, clip):
    model = tiny_model(world, "perceiver", clip).set_stage(1)
    calls = seen_by_denoiser(model)
    losses, levels = model(torch.rand(5, 3, 32, 32))
    _, mask, _ = calls[0]
    assert losses.shape == (5,)
    assert levels.tolist() == pytest.approx([row.sum().item() / 256 for row in mask])


def test_the_mask_ratios_are_those_asked_for(world):
    model = tiny_model(world, "perceiver", mask_ratio=(0.25, 0.25)).set_stage(1)
    levels = model(torch.rand(3, 3, 32, 32))[1]
    assert levels.tolist() == [0.25, 0.25, 0.25]


def test_the_timesteps_are_distributed_as_asked_for(world):
    model = tiny_model(world, "rf", scale=0.0).set_stage(1)
    levels = model(torch.rand(3, 3, 32, 32))[1]
    assert levels.tolist() == [0.5, 0.5, 0.5]


def seeded(model, *images):
    torch.manual_seed(7)
    return model(*images)[0]


@both_denoisers
def test_an_images_loss_is_its_own(world, kind):
    model = tiny_model(world, kind).set_stage(1)
    images = torch.rand(3, 3, 32, 32)
    others = torch.cat([images[:1], torch.rand(2, 3, 32, 32)])
    losses = seeded(model, images)
    losses_beside_others = seeded(model, others)
    assert losses_beside_others[0].item() == pytest.approx(losses[0].item(), rel=1e-4)
    assert (losses_beside_others[1:] - losses[1:]).abs().min() > 1e-4


@both_denoisers
def test_the_seed_decides_every_draw(world, kind):
    model = tiny_model(world, kind, local_ratio=0.5).set_stage(2)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(seeded(model, images), seeded(model, images))


@both_denoisers
def test_the_condition_comes_from_the_images_by_default(world, kind):
    model = tiny_model(world, kind).set_stage(1)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(seeded(model, images), seeded(model, images, images))


@both_denoisers
def test_the_control_takes_its_condition_from_other_images(world, kind):
    model = tiny_model(world, kind).set_stage(1)
    images = torch.rand(2, 3, 32, 32)
    others = torch.rand(2, 3, 32, 32)
    conditions = []
    model.visual.register_forward_pre_hook(keep_inputs_in(conditions))
    seeded(model, images, others)
    assert_close(conditions[0][0], (others - model.mean) / model.std, 1e-6)


def attributes(model):
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[name, key] = value
        for key, value in module.named_buffers(recurse=False):
            found[name, key] = value
    return found


@both_denoisers
def test_forward_leaves_nothing_behind(world, kind):
    model = tiny_model(world, kind, local_ratio=0.5).set_stage(2)
    before = attributes(model)
    model(torch.rand(2, 3, 32, 32))[0].mean().backward()
    after = attributes(model)
    assert list(after) == list(before)
    for key, value in after.items():
        assert value is before[key], key


def clip_gradient(model):
    """The gradient of the loss with respect to [CLS], or None if none reaches it."""
    features = []

    def keep(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
        features.append(output)

    model.visual.register_forward_hook(keep)
    model(torch.rand(2, 3, 32, 32))[0].mean().backward()
    return features[0].grad if features[0].requires_grad else None


@both_denoisers
def test_no_gradient_reaches_cls_in_stage_1(world, kind):
    assert clip_gradient(tiny_model(world, kind).set_stage(1)) is None


@both_denoisers
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("freeze_denoiser", [True, False])
def test_a_gradient_reaches_cls_in_stage_2(world, kind, lora, freeze_denoiser):
    gradient = clip_gradient(tiny_model(world, kind).set_stage(2, lora, freeze_denoiser))
    assert (gradient.abs().sum(1) > 0).all()


@both_families
@both_denoisers
@pytest.mark.parametrize("stage", [1, 2])
def test_every_trained_parameter_gets_a_gradient(world, kind, clip, stage):
    model = tiny_model(world, kind, clip, local_ratio=0.5).set_stage(stage)
    model(torch.rand(2, 3, 32, 32))[0].mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


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
    recomputed = gradients(model, images)
    assert list(recomputed) == list(plain)
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name])


@both_denoisers
def test_checkpointing_computes_every_block_twice(world, kind):
    model = tiny_model(world, kind).set_stage(1)
    model.denoiser.grad_checkpointing = True
    lists = [part for part in model.denoiser.children() if isinstance(part, nn.ModuleList)]
    blocks = [block for part in lists for block in part]
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(keep_inputs_in(calls))
    model(torch.rand(2, 3, 32, 32))[0].mean().backward()
    assert len(calls) == 2 * len(blocks)


# ---------------------------------------------------------------------------------------------
# The condition: [CLS] and local tokens
# ---------------------------------------------------------------------------------------------


@both_families
def test_the_features_are_those_of_the_visual_tower(world, clip):
    visual = load_visual(world, clip)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(gh.encode_with_patches(visual, x)[0], visual(x))


def test_the_patch_tokens_are_the_last_layers_after_its_norm(world):
    visual = load_visual(world, "tiny-clip")
    last = []
    visual.transformer.resblocks[-1].register_forward_hook(keep_output_in(last))
    patches = gh.encode_with_patches(visual, torch.randn(2, 3, 32, 32))[1]
    assert_close(patches, visual.ln_post(last[0])[:, 1:], 1e-6)


def keep_output_in(calls):
    def hook(module, inputs, output):
        calls.append(output)

    return hook


def test_only_local_tokens_have_a_projector_for_them(world):
    assert set(tiny_model(world, "rf").projectors) == {"context", "vec"}
    assert set(tiny_model(world, "perceiver").projectors) == {"context"}
    assert "local" in tiny_model(world, "rf", local_ratio=0.5).projectors


def test_without_local_tokens_the_condition_is_cls_alone(world):
    images = torch.rand(2, 3, 32, 32)
    rf = tiny_model(world, "rf").condition(images)
    assert set(rf) == {"context", "vec"}
    assert rf["context"].shape == (2, 1, 48)
    assert rf["vec"].shape == (2, 768)
    assert tiny_model(world, "perceiver").condition(images).shape == (2, 1, 32)


def projected_patches(model, images):
    """All 16 patch tokens (B, 16, width), as they could appear in the condition."""
    _, patches = gh.encode_with_patches(model.visual, (images - model.mean) / model.std)
    return model.projectors["local"](patches)


def find_patches(tokens, candidates):
    """The numbers (B, n) of the patches whose tokens (B, n, width) these are."""
    chosen = torch.cdist(tokens, candidates).argmin(-1)
    for image in range(len(tokens)):
        assert_close(tokens[image], candidates[image, chosen[image]], 1e-5)
    return chosen


@torch.no_grad()
def test_local_tokens_of_rf_carry_the_rotary_position_of_their_patch(world):
    model = tiny_model(world, "rf", local_ratio=0.5)
    images = torch.rand(2, 3, 32, 32)
    condition = model.condition(images)
    chosen = find_patches(condition["context"][:, 1:], projected_patches(model, images))
    # The 4 x 4 patches lie exactly on the 4 x 4 tokens of the denoiser.
    expected = torch.stack([torch.zeros_like(chosen), chosen // 4, chosen % 4], dim=-1)
    torch.testing.assert_close(condition["context_ids"][:, 1:], expected.float())


@torch.no_grad()
def test_local_tokens_of_the_perceiver_carry_the_sincos_position_of_their_patch(world):
    model = tiny_model(world, "perceiver", local_ratio=0.5)
    images = torch.rand(2, 3, 32, 32)
    # Patches are 4 tokens wide: patch i covers the tokens 4 i to 4 i + 3.
    patch = torch.arange(16)
    centres = torch.stack([patch // 4, patch % 4], dim=-1) * 4 + 1.5
    candidates = projected_patches(model, images) + gh.sincos_embedding(centres, 32)
    chosen = find_patches(model.condition(images)[:, 1:], candidates)
    assert chosen.shape == (2, 8)


@torch.no_grad()
def test_patches_that_leave_a_rest_lie_where_their_pixels_are(world):
    """Of 384 pixels, 27 patches of 14 cover 378."""
    model = tiny_model(world, "rf", local_ratio=1.0)
    width = model.projectors["local"][0].normalized_shape[0]
    model.num_locals = 27 * 27
    model.clip_grid, model.patch_pixels, model.token_pixels = 27, 14, 16
    _, position = model.choose_locals(torch.rand(1, 27 * 27, width))
    assert position.max().item() == (26 * 14 + 7) / 16 - 0.5
    assert position.min().item() == 7 / 16 - 0.5


@torch.no_grad()
def test_cls_lies_at_the_rotary_origin(world):
    condition = tiny_model(world, "rf", local_ratio=0.5).condition(torch.rand(2, 3, 32, 32))
    assert (condition["context_ids"][:, 0] == 0).all()


@torch.no_grad()
def test_each_image_draws_its_own_local_tokens_without_repetition(world):
    model = tiny_model(world, "rf", local_ratio=0.5)
    images = torch.rand(6, 3, 32, 32)
    context = model.condition(images)["context"]
    chosen = find_patches(context[:, 1:], projected_patches(model, images))
    draws = {tuple(sorted(row.tolist())) for row in chosen}
    assert all(len(set(draw)) == 8 for draw in draws)
    assert len(draws) > 1


@pytest.mark.parametrize("ratio, tokens", [(0.1, 2), (0.5, 8), (1.0, 16)])
def test_the_local_ratio_is_a_share_of_the_patches(world, ratio, tokens):
    model = tiny_model(world, "perceiver", local_ratio=ratio)
    assert model.condition(torch.rand(1, 3, 32, 32)).shape == (1, 1 + tokens, 32)


def test_a_local_ratio_of_no_patch_is_refused(world):
    with pytest.raises(UserError, match="0.01 is none of 16 patch tokens"):
        tiny_model(world, "rf", local_ratio=0.01)


# ---------------------------------------------------------------------------------------------
# Reconstruction
# ---------------------------------------------------------------------------------------------


def decoded(model, codes):
    return (model.autoencoder.decode(codes) / 2 + 0.5).clamp(0, 1)


class StraightPath(nn.Module):
    """Knows the truth: the velocity of the straight path to it at x_t is (x_t - truth) / t."""

    def __init__(self, config, truth):
        super().__init__()
        self.config = config
        self.truth = truth

    def forward(self, x, t, **condition):
        return (x - self.truth) / t.view(-1, 1, 1, 1)


class KnownTokens(nn.Module):
    """Knows the truth of all tokens; `calls` holds the tokens and the masks that it was given."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth
        self.calls = []

    def forward(self, indices, mask, context):
        self.calls.append((indices, mask))
        return 1000.0 * F.one_hot(self.truth[mask], 64)


class Guesses(KnownTokens):
    """Changes its mind at each call."""

    def forward(self, indices, mask, context):
        self.calls.append((indices, mask))
        return torch.randn(int(mask.sum()), 64)


def test_euler_steps_reach_the_truth(world):
    images = torch.rand(3, 3, 32, 32)
    model = tiny_model(world)
    truth = model.autoencoder.encode(2 * images - 1, sample=False)
    model.denoiser = StraightPath(model.denoiser.config, truth)
    assert_close(model.reconstruct(images, steps=7), decoded(model, truth))


def discrete_with(world, images, denoiser):
    """A Discrete model, the indices (B, 256) of images, and what stands for its denoiser."""
    model = tiny_model(world, "perceiver")
    indices = model.autoencoder.encode(2 * images - 1).flatten(1)
    model.denoiser = denoiser(indices)
    return model, indices


@pytest.mark.parametrize("steps, mask_ratio", [(8, 1.0), (1, 1.0), (1, 0.75), (40, 0.1)])
def test_masked_decoding_reaches_the_truth(world, steps, mask_ratio):
    images = torch.rand(3, 3, 32, 32)
    model, indices = discrete_with(world, images, KnownTokens)
    result = model.reconstruct(images, steps, mask_ratio)
    assert_close(result, decoded(model, indices.view(3, 16, 16)))


def test_masked_decoding_follows_the_cosine_schedule(world):
    images = torch.rand(3, 3, 32, 32)
    model, _ = discrete_with(world, images, KnownTokens)
    model.reconstruct(images, steps=8)
    cosine = [int(256 * math.cos(math.pi / 2 * step / 8)) for step in range(1, 8)]
    for image in range(3):
        hidden = [mask[image].sum().item() for _, mask in model.denoiser.calls]
        assert hidden == [256, *cosine]


def test_one_step_asks_once_for_all_that_is_masked(world):
    images = torch.rand(3, 3, 32, 32)
    model, _ = discrete_with(world, images, KnownTokens)
    model.reconstruct(images, steps=1, mask_ratio=0.75)
    masks = [mask.sum(1).tolist() for _, mask in model.denoiser.calls]
    assert masks == [[192, 192, 192]]


def test_masked_decoding_keeps_what_it_has_accepted(world):
    images = torch.rand(2, 3, 32, 32)
    model, _ = discrete_with(world, images, Guesses)
    model.reconstruct(images, steps=6)
    calls = model.denoiser.calls
    for (given, mask), (later, later_mask) in zip(calls, calls[1:], strict=False):
        assert not (later_mask & ~mask).any()
        assert torch.equal(later[~mask], given[~mask])


def test_masked_decoding_starts_from_the_unmasked_tokens(world):
    images = torch.rand(2, 3, 32, 32)
    model, indices = discrete_with(world, images, Guesses)
    model.reconstruct(images, steps=6, mask_ratio=0.5)
    given, mask = model.denoiser.calls[0]
    assert torch.equal(given[~mask], indices[~mask])


class SurerToTheRight(KnownTokens):
    """At position j, 64 - j codes are equally likely: whichever is drawn is equally sure."""

    def forward(self, indices, mask, context):
        self.calls.append((indices, mask))
        _, position = mask.nonzero(as_tuple=True)
        impossible = torch.arange(64) >= 64 - position[:, None]
        return torch.zeros(impossible.shape).masked_fill(impossible, -torch.inf)


def test_masked_decoding_keeps_the_surest_tokens(world):
    model, _ = discrete_with(world, torch.rand(2, 3, 32, 32), SurerToTheRight)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    everything = torch.ones(2, 64, dtype=torch.bool)
    model.fill_in(tokens, everything, None, steps=2, temperature=0.0)
    _, mask = model.denoiser.calls[1]
    still_masked = int(64 * math.cos(math.pi / 4))
    expected = torch.arange(64) < still_masked
    assert torch.equal(mask, expected.expand(2, 64))


@both_denoisers
def test_reconstruction_takes_no_part_in_training(world, kind):
    model = tiny_model(world, kind).set_stage(2)
    modes = [module.training for module in model.modules()]
    images = model.reconstruct(torch.rand(2, 3, 32, 32), steps=2)
    assert not images.requires_grad
    assert [module.training for module in model.modules()] == modes


@both_denoisers
def test_reconstructions_are_images(world, kind):
    images = tiny_model(world, kind).reconstruct(torch.rand(2, 3, 32, 32), steps=2)
    assert images.shape == (2, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1


# ---------------------------------------------------------------------------------------------
# The equations
# ---------------------------------------------------------------------------------------------


def seed(number):
    return torch.Generator().manual_seed(number)


def assert_uniform(values):
    """Kolmogorov-Smirnov: no larger distance to the uniform distribution than p = 0.001 allows."""
    values = values.sort().values
    steps = torch.arange(len(values) + 1) / len(values)
    above = (steps[1:] - values).max()
    below = (values - steps[:-1]).max()
    assert max(above, below) < 1.95 / math.sqrt(len(values))


def logit_normal_cdf(t, scale):
    """P(t < x) = Phi(logit(x) / s)."""
    return 0.5 * (1 + torch.erf(torch.logit(t) / scale / math.sqrt(2)))


@pytest.mark.parametrize("scale", [0.1, 0.5, 1, 5, 10])
def test_timesteps_follow_the_scaled_logit_normal(scale):
    t = gh.sample_timesteps(20_000, scale, generator=seed(0)).double()
    # At large scales float32 rounds many to 0 and 1, which are clamped: judge the inside.
    ends = torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64)
    inside = t[(t > ends[0]) & (t < ends[1])]
    low, high = logit_normal_cdf(ends, scale)
    assert_uniform((logit_normal_cdf(inside, scale) - low) / (high - low))


@pytest.mark.parametrize("scale", [1, 10, 1000])
def test_timesteps_are_never_zero_or_one(scale):
    t = gh.sample_timesteps(20_000, scale, generator=seed(0))
    assert t.min() > 0
    assert t.max() < 1


def test_uniform_timesteps_are_uniform():
    t = gh.sample_timesteps(20_000, distribution="uniform", generator=seed(0))
    assert_uniform(t.double())


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="'normal'.*logit-normal or uniform"):
        gh.sample_timesteps(3, distribution="normal")


def test_time_stays_float32_under_autocast():
    config = gh.FluxConfig(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1)
    flux = gh.Flux(config)
    dtypes = []

    def keep_dtypes(module, inputs, output):
        dtypes.extend([inputs[0].dtype, output.dtype])

    flux.time_in.register_forward_hook(keep_dtypes)
    flux.guidance_in.register_forward_hook(keep_dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        t = gh.sample_timesteps(2)
        flux(torch.randn(2, 16, 4, 4), t, torch.randn(2, 1, 4096), torch.randn(2, 768))
    assert t.dtype == torch.float32
    assert dtypes == 4 * [torch.float32]


def test_the_time_is_embedded_in_thousandths():
    embedded = gh.timestep_embedding(torch.tensor([0.25]))[0]
    assert embedded[0] == pytest.approx(math.cos(250), abs=1e-4)
    assert embedded[128] == pytest.approx(math.sin(250), abs=1e-4)


class Remembers:
    """A denoiser that predicts a fixed velocity and keeps its noisy latents and its time."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, noisy, t, context, vec, context_ids=None):
        self.noisy = noisy
        self.t = t
        return self.velocity


def two_numbers(a, b):
    """Two images of one latent each."""
    return torch.tensor([a, b]).view(2, 1, 1, 1)


def test_noisy_latents_lie_between_data_and_noise():
    denoiser = Remembers(two_numbers(0.0, 0.0))
    data = two_numbers(2.0, 2.0)
    noise = two_numbers(10.0, 10.0)
    t = torch.tensor([0.0, 0.25])
    gh.rectified_flow_loss(denoiser, data, None, None, t, noise)
    assert denoiser.noisy.flatten().tolist() == [2.0, 0.75 * 2 + 0.25 * 10]
    assert torch.equal(denoiser.t, t)


def test_the_flow_loss_is_the_squared_error_of_noise_minus_data():
    denoiser = Remembers(two_numbers(8.0, 5.0))
    data = two_numbers(2.0, 2.0)
    noise = two_numbers(10.0, 10.0)
    losses = gh.rectified_flow_loss(denoiser, data, None, None, torch.rand(2), noise)
    assert losses.tolist() == [(10 - 2 - 8) ** 2, (10 - 2 - 5) ** 2]


def test_mask_ratios_are_uniform_in_their_range():
    hidden = gh.sample_masks(400, 196, 0.5, 0.9, seed(0)).sum(1).double()
    # Counts are whole numbers: spread each over the width of its step.
    ratios = (hidden + torch.rand(400, generator=seed(1), dtype=torch.float64) - 0.5) / 196
    assert hidden.min() >= round(0.5 * 196)
    assert hidden.max() <= round(0.9 * 196)
    assert_uniform(((ratios - 0.5) / 0.4).clamp(0, 1))


@pytest.mark.parametrize("ratio, n, hidden", [(0.75, 25, 19), (0.01, 9, 1), (0.0, 9, 1), (1, 9, 9)])
def test_a_mask_hides_the_rounded_share_and_at_least_one(ratio, n, hidden):
    mask = gh.sample_masks(5, n, ratio, ratio)
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == 5 * [hidden]


def test_every_position_is_masked_equally_often():
    mask = gh.sample_masks(20_000, 4, 0.5, 0.5, seed(0))
    # Two of four: .5 each, with a standard error of .0035.
    assert mask.double().mean(0).tolist() == pytest.approx(4 * [0.5], abs=0.014)


def masked_example():
    """Three images of ten tokens, from seven codes, of which 1, 5 and 7 are masked."""
    indices = torch.randint(7, (3, 10))
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, :1] = True
    mask[1, :5] = True
    mask[2, 3:] = True
    return indices, mask


def test_knowing_nothing_costs_the_logarithm_of_the_codes():
    indices, mask = masked_example()
    losses = gh.masked_token_loss(torch.zeros(13, 7), indices, mask)
    assert losses.tolist() == pytest.approx(3 * [math.log(7)])


def test_knowing_the_masked_tokens_costs_nothing():
    indices, mask = masked_example()
    logits = 100.0 * F.one_hot(indices[mask], 7)
    losses = gh.masked_token_loss(logits, indices, mask)
    assert losses.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_masked_loss_is_each_images_mean_over_its_masked_tokens():
    indices, mask = masked_example()
    logits = torch.randn(13, 7)
    surprise = iter(-logits.log_softmax(-1).double())
    for image, loss in enumerate(gh.masked_token_loss(logits, indices, mask)):
        hidden = indices[image][mask[image]]
        by_hand = [next(surprise)[index].item() for index in hidden]
        assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------


def adapters(visual):
    return {name: p for name, p in visual.named_parameters() if "lora_" in name}


@torch.no_grad()
def with_lora(world, name):
    """A visual tower in eval mode whose adapters do something."""
    visual = load_visual(world, name)
    gh.inject_lora(visual)
    for key, parameter in adapters(visual).items():
        if key.endswith("lora_B"):
            parameter.normal_(std=0.1)
    return visual


@pytest.mark.parametrize("clip, matrices", [("tiny-clip", 2 * 6 + 1), ("tiny-siglip", 2 * 6 + 6)])
def test_lora_is_on_every_matrix(world, clip, matrices):
    assert gh.inject_lora(load_visual(world, clip)) == matrices


@both_families
def test_only_lora_trains(world, clip):
    visual = load_visual(world, clip).requires_grad_(True)
    gh.inject_lora(visual)
    trained = {name for name, p in visual.named_parameters() if p.requires_grad}
    assert trained == set(adapters(visual))


@both_families
@pytest.mark.parametrize("mode", [True, False])
def test_injecting_lora_keeps_the_mode(world, clip, mode):
    visual = load_visual(world, clip).train(mode)
    gh.inject_lora(visual)
    assert {module.training for module in visual.modules()} == {mode}


@both_families
@pytest.mark.parametrize("mode", [True, False])
@torch.no_grad()
def test_lora_changes_nothing_before_training(world, clip, mode):
    visual = load_visual(world, clip)
    x = torch.randn(2, 3, 32, 32)
    before = visual(x)
    gh.inject_lora(visual)
    assert_close(visual.train(mode)(x), before, 1e-5)


@both_families
@torch.no_grad()
def test_lora_changes_the_features_once_trained(world, clip):
    x = torch.randn(2, 3, 32, 32)
    before = load_visual(world, clip)(x)
    assert (with_lora(world, clip)(x) - before).abs().max() > 1e-2


@both_families
def test_every_adapter_gets_a_gradient(world, clip):
    visual = with_lora(world, clip).train()
    visual(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in adapters(visual).items():
        # Packed matrices, as q, k and v, have an adapter each.
        packed = name.endswith("lora_A")
        parts = parameter.grad.split(16) if packed else parameter.grad
        for part in parts:
            assert part.abs().sum() > 0, name


@both_families
@torch.no_grad()
def test_lora_drops_out_in_training_mode_alone(world, clip):
    visual = with_lora(world, clip)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(visual(x), visual(x))
    visual.train()
    assert not torch.equal(visual(x), visual(x))


@both_families
@torch.no_grad()
def test_lora_acts_with_patch_tokens_too(world, clip):
    visual = with_lora(world, clip)
    x = torch.randn(2, 3, 32, 32)
    assert_close(gh.encode_with_patches(visual, x)[0], visual(x), 1e-6)


@both_families
@torch.no_grad()
def test_merging_lora_keeps_the_features(world, clip):
    visual = with_lora(world, clip)
    x = torch.randn(2, 3, 32, 32)
    adapted = visual(x)
    assert_close(gh.merge_lora(visual)(x), adapted, 1e-5)


@both_families
def test_merging_lora_restores_modules_and_names(world, clip):
    original = load_visual(world, clip)
    merged = gh.merge_lora(with_lora(world, clip))
    types = [(name, type(module)) for name, module in merged.named_modules()]
    assert types == [(name, type(module)) for name, module in original.named_modules()]
    assert list(merged.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("clip, packed", [("tiny-clip", 2 * 4 + 1), ("tiny-siglip", 2 * 4 + 5)])
def test_merging_lora_changes_the_matrices_alone(world, clip, packed):
    original = load_visual(world, clip).state_dict()
    merged = gh.merge_lora(with_lora(world, clip)).state_dict()
    changed = [name for name in merged if not torch.equal(merged[name], original[name])]
    assert len(changed) == packed
    for name in changed:
        assert original[name].dim() == 2
        assert "embed" not in name


def test_lora_needs_a_linear_layer():
    with pytest.raises(ValueError, match="no linear layer"):
        gh.inject_lora(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_lora_on_attention_equals_its_definition():
    original = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    expected = copy.deepcopy(original)
    lora = gh.LoRAAttention(original, rank=2, alpha=6, dropout=0.0)
    nn.init.normal_(lora.qkv.lora_B)
    nn.init.normal_(lora.out.lora_B)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        for i in range(3):  # W + alpha / r B A, for q, k and v on their own
            low = lora.qkv.lora_A[2 * i : 2 * i + 2]
            expected.in_proj_weight[8 * i : 8 * i + 8] += 6 / 2 * lora.qkv.lora_B[i] @ low
        expected.out_proj.weight += 6 / 2 * lora.out.lora_B[0] @ lora.out.lora_A
        assert_close(lora(x)[0], expected(x, x, x)[0], 1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_lora_on_packed_matrices_equals_its_definition(parts):
    base = nn.Linear(8, 4 * parts)
    lora = gh.LoRALinear(base, rank=2, alpha=6, dropout=0.0, parts=parts)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        matrices = base.weight.split(4)
        lows = lora.lora_A.split(2)
        adapted = [w + 6 / 2 * b @ a for w, b, a in zip(matrices, lora.lora_B, lows, strict=True)]
        assert_close(lora(x), x @ torch.cat(adapted).T + base.bias, 1e-5)


def test_lora_on_the_projection_equals_its_definition():
    proj = nn.Parameter(torch.randn(8, 6))
    lora = gh.LoRAProj(proj, rank=2, alpha=6, dropout=0.0)
    nn.init.normal_(lora.lora_B)
    pooled = torch.randn(3, 8)
    with torch.no_grad():
        delta = 6 / 2 * lora.lora_B[0] @ lora.lora_A
        assert_close(pooled @ lora, pooled @ (proj + delta.T), 1e-5)


BACKBONE_SIZES = {  # parameters of model and visual tower, adapted matrices, parameters of LoRA
    "openai-l14-224": (427_616_513, 303_966_208, 145, 7_106_560),
    "openai-l14-336": (427_944_193, 304_293_888, 145, 7_106_560),
    "metaclip-l14-224": (427_616_513, 303_966_208, 145, 7_106_560),
    "metaclip-h14-224": (986_109_441, 632_076_800, 193, 11_833_344),
    "siglip-so400m-224": (877_360_306, 427_680_704, 168, 9_017_344),
    "siglip-so400m-384": (877_960_498, 428_225_600, 168, 9_017_344),
}


def count_parameters(module, trained_only=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def layout(module):
    """Names and types of the modules, and names and shapes of the tensors."""
    types = {name: type(child) for name, child in module.named_modules()}
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return list(types.items()), list(shapes.items())


@pytest.fixture(scope="module", params=BACKBONE_SIZES)
def measured_backbone(request):
    """A backbone at full size, without memory for its weights, measured before and after LoRA."""
    clip = copy.deepcopy(full_size(request.param))
    sizes = count_parameters(clip), count_parameters(clip.visual)
    before = layout(clip.visual)
    matrices = gh.inject_lora(clip.visual)
    lora = count_parameters(clip.visual, trained_only=True)
    after = layout(gh.merge_lora(clip.visual))
    return BACKBONE_SIZES[request.param], (*sizes, matrices, lora), before, after


def test_the_six_backbones_have_the_published_size(measured_backbone):
    expected, measured, _, _ = measured_backbone
    assert measured[:2] == expected[:2]


def test_lora_has_its_size_on_the_six_backbones(measured_backbone):
    expected, measured, _, _ = measured_backbone
    assert measured[2:] == expected[2:]


def test_merging_lora_restores_the_six_backbones(measured_backbone):
    _, _, before, after = measured_backbone
    assert after == before


# ---------------------------------------------------------------------------------------------
# The continuous denoiser
# ---------------------------------------------------------------------------------------------

golden_cases = pytest.mark.parametrize("case", ["cls", "cls_local"])


def golden_flux(case):
    """Flux with the golden parameters; the golden inputs; the velocity by FLUX's own code."""
    tensors = golden("flux_tiny")
    config = gh.FluxConfig(
        vec_in_dim=32,
        context_in_dim=48,
        hidden_size=96,
        num_heads=4,
        depth=2,
        depth_single_blocks=3,
        axes_dim=(8, 8, 8),
    )
    inputs = [tensors[f"{case}.{name}"] for name in ("timesteps", "context", "vec")]
    velocity = tensors[f"{case}.velocity_latent"]
    return fill(gh.Flux(config), 0.1), [tensors["latent"], *inputs], velocity


@golden_cases
def test_flux_equals_fluxs_own_code(case):
    flux, inputs, velocity = golden_flux(case)
    assert_close(flux(*inputs), velocity)


@golden_cases
def test_context_positions_are_zero_by_default(case):
    flux, inputs, velocity = golden_flux(case)
    zeros = torch.zeros(*inputs[2].shape[:2], 3)
    assert_close(flux(*inputs, context_ids=zeros), velocity)


@golden_cases
def test_context_positions_matter(case):
    flux, inputs, velocity = golden_flux(case)
    ones = torch.ones(*inputs[2].shape[:2], 3)
    moved = flux(*inputs, context_ids=ones)
    assert (moved - velocity).norm() > 1e-3 * velocity.norm()


def test_context_positions_belong_to_their_image():
    flux, inputs, velocity = golden_flux("cls_local")
    context_ids = torch.zeros(*inputs[2].shape[:2], 3)
    context_ids[1] = 1
    moved = flux(*inputs, context_ids=context_ids)
    assert_close(moved[0], velocity[0])
    assert (moved[1] - velocity[1]).norm() > 1e-3 * velocity[1].norm()


@golden_cases
def test_checkpointed_flux_equals_fluxs_own_code(case):
    flux, inputs, velocity = golden_flux(case)
    flux.requires_grad_(True)
    flux.grad_checkpointing = True
    assert_close(flux(*inputs), velocity)


def test_rotary_positions_turn_complex_numbers():
    ids = torch.tensor([[0, 3, 5], [0, 1, 2]])
    x = torch.randn(2, 8)
    # A head of 8: 2 features for the unused axis, 2 for the row and 4 for the column.
    cos, sin = gh.rotary_table(ids, (2, 2, 4), 10_000)
    angles = torch.tensor([[0, 3, 5, 0.05], [0, 1, 2, 0.02]])
    turned = torch.view_as_complex(x.view(2, 4, 2)) * torch.polar(torch.ones(2, 4), angles)
    assert_close(gh.rotate(x, cos, sin), torch.view_as_real(turned).flatten(1), 1e-5)


def test_rotary_dimensions_must_fill_a_head():
    with pytest.raises(ValueError, match="must sum to the width of a head, 64"):
        gh.Flux(gh.FluxConfig(hidden_size=128, num_heads=2))


@pytest.fixture(scope="module")
def full_size_flux():
    with torch.device("meta"):
        return gh.Flux(gh.FluxConfig())


def test_flux_has_the_published_layout(full_size_flux):
    with open(os.path.join(GOLDEN, "keys_flux_2_4.json")) as file:
        published = json.load(file)
    tensors = full_size_flux.state_dict().items()
    assert {name: list(tensor.shape) for name, tensor in tensors} == published["shapes"]


def test_the_denoiser_has_the_papers_size(full_size_flux):
    assert count_parameters(full_size_flux) == 1_310_154_816


def test_flux1_dev_has_its_published_size():
    with torch.device("meta"):
        flux = gh.Flux(gh.FluxConfig(depth=19, depth_single_blocks=38))
    assert count_parameters(flux) == 11_901_408_320


WIDTHS = [(768, 21_115_392), (1024, 22_361_600), (1152, 22_984_704)]


@pytest.mark.parametrize("width, parameters", WIDTHS)
def test_the_projectors_have_the_official_size(width, parameters):
    with torch.device("meta"):
        both = count_parameters(gh.Projector(width, 768))
        both += count_parameters(gh.Projector(width, 4096))
    assert both == parameters


# ---------------------------------------------------------------------------------------------
# The discrete denoiser
# ---------------------------------------------------------------------------------------------

every_size = pytest.mark.parametrize("n", [196, 441, 576])  # 14, 21 and 24 tokens a side


def tiny_perceiver():
    torch.manual_seed(0)
    config = gh.PerceiverConfig(n_embed=50, embed_dim=8, width=32, num_heads=2, layers=2)
    perceiver = gh.Perceiver(config, torch.randn(50, 8))
    nn.init.normal_(perceiver.mask_token)
    return perceiver


def perceiver_inputs(n):
    """Indices and masks of n tokens, and a context of three, for two images."""
    return torch.randint(50, (2, n)), gh.sample_masks(2, n, 0.5, 0.9), torch.randn(2, 3, 32)


def differ(a, b):
    return (a - b).norm() > 1e-3 * b.norm()


@every_size
def test_the_perceiver_predicts_the_masked_tokens_alone(n):
    perceiver = tiny_perceiver()
    indices, mask, context = perceiver_inputs(n)
    calls = []
    perceiver.head.register_forward_pre_hook(keep_inputs_in(calls))
    assert perceiver(indices, mask, context).shape == (mask.sum(), 50)
    assert len(calls[0][0]) == mask.sum()


@every_size
def test_the_perceiver_does_not_read_the_masked_tokens(n):
    perceiver = tiny_perceiver()
    indices, mask, context = perceiver_inputs(n)
    others = torch.where(mask, (indices + 1) % 50, indices)
    assert torch.equal(perceiver(others, mask, context), perceiver(indices, mask, context))


@every_size
def test_the_perceiver_puts_its_mask_vector_where_tokens_are_masked(n):
    perceiver = tiny_perceiver()
    inputs = perceiver_inputs(n)
    before = perceiver(*inputs)
    perceiver.mask_token.data.neg_()
    assert differ(perceiver(*inputs), before)


@every_size
def test_the_perceiver_reads_the_unmasked_tokens(n):
    perceiver = tiny_perceiver()
    indices, mask, context = perceiver_inputs(n)
    others = torch.where(mask, indices, (indices + 1) % 50)
    assert differ(perceiver(others, mask, context), perceiver(indices, mask, context))


@every_size
def test_the_perceiver_reads_the_condition(n):
    perceiver = tiny_perceiver()
    indices, mask, context = perceiver_inputs(n)
    assert differ(perceiver(indices, mask, -context), perceiver(indices, mask, context))


@every_size
def test_the_perceiver_reads_an_images_own_condition_alone(n):
    perceiver = tiny_perceiver()
    indices, mask, context = perceiver_inputs(n)
    context.requires_grad_(True)
    perceiver(indices, mask, context)[0].sum().backward()  # the first row is the first image's
    assert context.grad[0].abs().min() > 0
    assert (context.grad[1] == 0).all()


def test_the_logits_are_in_row_major_order():
    perceiver = tiny_perceiver()
    indices, mask, context = perceiver_inputs(196)
    together = perceiver(indices, mask, context)
    first = perceiver(indices[:1], mask[:1], context[:1])
    second = perceiver(indices[1:], mask[1:], context[1:])
    assert_close(together, torch.cat([first, second]), 1e-5)


def test_the_perceiver_knows_where_a_token_is():
    perceiver = tiny_perceiver()
    hidden = torch.ones(1, 196, dtype=torch.bool)
    logits = perceiver(torch.zeros(1, 196, dtype=torch.long), hidden, torch.randn(1, 3, 32))
    assert len(logits.round(decimals=4).unique(dim=0)) == 196


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 100])
def test_the_scale_of_the_codebook_does_not_matter(scale):
    perceiver = tiny_perceiver()
    scaled = gh.Perceiver(perceiver.config, scale * perceiver.codebook)
    scaled.load_state_dict(perceiver.state_dict())
    inputs = perceiver_inputs(196)
    assert_close(scaled(*inputs), perceiver(*inputs), 1e-3)


def test_the_codebook_is_not_saved_with_the_perceiver():
    assert "codebook" not in tiny_perceiver().state_dict()


def test_the_codebook_does_not_train():
    perceiver = gh.Perceiver(tiny_perceiver().config, nn.Parameter(torch.randn(50, 8)))
    assert "codebook" not in dict(perceiver.named_parameters())
    assert not perceiver.codebook.requires_grad


def test_sincos_positions_by_hand():
    row = [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]
    column = [math.sin(5), math.sin(0.05), math.cos(5), math.cos(0.05)]
    position = gh.sincos_embedding(torch.tensor([3, 5]), 8)
    assert position.tolist() == pytest.approx(row + column, abs=1e-6)


def test_token_positions_run_along_the_rows():
    positions = gh.grid_embedding(9, 8, torch.device("cpu"))
    assert torch.equal(positions[5], gh.sincos_embedding(torch.tensor([1, 2]), 8))


def test_tokens_must_fill_a_square():
    with pytest.raises(ValueError, match="10 tokens are no square grid"):
        gh.grid_embedding(10, 8, torch.device("cpu"))


def load_tiny(world, name="tiny-clip"):
    return gh.load_clip(name, world / f"{name}.safetensors")[0]


def assert_same_weights(clip, other):
    weights = clip.state_dict()
    others = other.state_dict()
    assert list(weights) == list(others)
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


# ---------------------------------------------------------------------------------------------
# The backbones
# ---------------------------------------------------------------------------------------------

# Name, side of an image, patches.
SIX_BACKBONES = [
    ("openai-l14-224", 224, 256),
    ("openai-l14-336", 336, 576),
    ("metaclip-l14-224", 224, 256),
    ("metaclip-h14-224", 224, 256),
    ("siglip-so400m-224", 224, 256),
    ("siglip-so400m-384", 384, 729),
]


@lru_cache
def full_size(name):
    """The model of a backbone without memory for its weights."""
    with torch.device("meta"):
        model = gh.find_backbone(name).model
        return open_clip.create_model(model, device="meta", load_weights=False)


@pytest.mark.parametrize("name, side, patches", SIX_BACKBONES)
def test_the_six_backbones_take_their_side_and_see_their_patches(name, side, patches):
    clip = full_size(name)
    assert gh.image_side(clip.visual) == side
    images = torch.empty(1, 3, side, side, device="meta")
    features = clip.visual.forward_intermediates(images, indices=1, output_fmt="NLC")
    assert features["image_intermediates"][-1].shape[1] == patches


@pytest.mark.parametrize("name", [row[0] for row in SIX_BACKBONES if "siglip" not in row[0]])
def test_backbones_of_the_clip_family_have_quick_gelu(name):
    block = full_size(name).visual.transformer.resblocks[0]
    assert type(block.mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize("name", [row[0] for row in SIX_BACKBONES])
def test_open_clip_publishes_every_backbone(name):
    assert open_clip.is_pretrained_cfg(*gh.find_backbone(name)[:2])


@pytest.mark.parametrize("name", [row[0] for row in SIX_BACKBONES])
def test_huggingface_has_every_number_of_a_backbone_once(name):
    clip = full_size(name)
    theirs = sum(tensor.numel() for tensor in gh.hf_views(clip).values())
    assert theirs == sum(tensor.numel() for tensor in clip.state_dict().values())


@pytest.mark.parametrize(
    "name, file, says",
    [
        ("nonsense", None, ["unknown backbone 'nonsense'", "openai-l14-224"]),
        ("ViT-L-14:nonsense", None, ["no weights 'nonsense'", "laion2b_s32b_b82k"]),
        ("tiny-clip", "nowhere.pt", ["not found at", "nowhere.pt"]),
        ("tiny-clip", "data", ["data", "not in HuggingFace's format"]),
        ("tiny-clip", "vae.safetensors", ["missing", "unexpected decoder"]),
        ("tiny-clip", "tiny-siglip.safetensors", ["missing", "unexpected"]),
        ("tiny-clip", "tiny-clip.json", ["cannot be read"]),
    ],
)
def test_foreign_clips_are_refused(world, name, file, says):
    with pytest.raises(UserError) as error:
        gh.load_clip(name, file and world / file)
    assert_one_line(error, *says)


@pytest.mark.parametrize("name", ["tiny-clip", "toy", "openai-l14-224"])
@pytest.mark.parametrize("weights", ["", "random", "nowhere.pt"])
def test_missing_weights_are_noticed_before_any_model(world, name, weights):
    with pytest.raises(UserError) as error:
        gh.find_backbone(name, weights)
    assert_one_line(error, f"not found at {weights!r}")


def test_random_weights_are_asked_for_by_name_alone(world):
    torch.manual_seed(0)
    first = gh.load_clip("tiny-clip", random=True)[0]
    second = gh.load_clip("tiny-clip", random=True)[0]
    assert not torch.equal(first.visual.proj, second.visual.proj)


def test_a_clip_is_frozen_float32_in_eval_mode(world):
    half = {name: tensor.half() for name, tensor in load_tiny(world).state_dict().items()}
    save_file(half, world / "half.safetensors")
    clip = gh.load_clip("tiny-clip", world / "half.safetensors")[0]
    assert not clip.training
    for parameter in clip.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad


# ---------------------------------------------------------------------------------------------
# Preprocessing, text, the network
# ---------------------------------------------------------------------------------------------


def left_edge_white():
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste("white", (0, 0, 8, 32))
    return picture


def test_a_local_siglip_gets_its_tags_preprocessing(world, monkeypatch):
    published = open_clip.get_pretrained_cfg("ViT-SO400M-14-SigLIP", "webli")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-siglip", {"webli": published})
    clip, preprocess, _ = gh.load_clip("tiny-siglip:webli", world / "tiny-siglip.safetensors")
    assert tuple(clip.visual.preprocess_cfg["mean"]) == (0.5, 0.5, 0.5)
    # Squashed to a square, so that the edge is still there; white is 1 in [-1, 1].
    assert preprocess(left_edge_white())[0, 16, 0] > 0.9


def test_a_local_clip_gets_openais_preprocessing(world):
    clip, preprocess, _ = gh.load_clip("tiny-clip", world / "tiny-clip.safetensors")
    assert clip.visual.preprocess_cfg["mean"] == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    # Cropped at the centre, so that the edge is gone; black is below 0.
    assert preprocess(left_edge_white())[0, 16, 0] < 0


def test_the_text_tokenizer_knows_the_context_length(world):
    tokenizer = gh.load_clip("tiny-clip", world / "tiny-clip.safetensors")[2]
    assert tokenizer(["a cat", "two cats"]).shape == (2, 77)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_local_or_random_clip_needs_no_network(world, tmp_path, no_network):
    text = TINY_SIGLIP["text_cfg"] | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    (tmp_path / "hub-text.json").write_text(json.dumps(TINY_SIGLIP | {"text_cfg": text}))
    open_clip.add_model_config(tmp_path / "hub-text.json")
    gh.load_clip("hub-text", world / "tiny-siglip.safetensors")
    gh.load_clip("hub-text", random=True)
    gh.load_clip("toy")


def test_a_text_tokenizer_that_is_not_there_is_one_line_when_text_comes(world, monkeypatch):
    def fail(model):
        raise OSError("no such tokenizer\nand more")

    monkeypatch.setattr(open_clip, "get_tokenizer", fail)
    tokenizer = gh.load_clip("tiny-siglip", world / "tiny-siglip.safetensors")[2]
    with pytest.raises(UserError) as error:
        tokenizer(["a cat"])
    assert_one_line(error, "tiny-siglip", "no such tokenizer", "pip install transformers")


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no network\nand more")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(UserError) as error:
        gh.load_clip("openai-l14-224")
    assert_one_line(error, "ViT-L-14-quickgelu", "'openai'", "no network")


# ---------------------------------------------------------------------------------------------
# open_clip's files and OpenAI's archives
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_what_open_clip_converts_is_taken(world, tmp_path, name):
    clip = load_tiny(world, name)
    old = {f"module.{key}": tensor for key, tensor in clip.state_dict().items()}
    old["module.attn_mask"] = torch.zeros(77, 77)
    old["module.logit_scale"] = clip.logit_scale.reshape(1)
    torch.save({"epoch": 3, "state_dict": old}, tmp_path / "old.pt")
    assert_same_weights(gh.load_clip(name, tmp_path / "old.pt")[0], clip)


class PickledCode:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_runs_none_of_its_code(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": load_tiny(world).state_dict(), "extra": PickledCode()}, "forged.pt")
    with pytest.raises(UserError) as error:
        gh.load_clip("tiny-clip", "forged.pt")
    assert_one_line(error, "forged.pt", "cannot be read")
    assert not os.path.exists("owned")


class WritesAFile(nn.Module):
    """Its __setstate__ runs when torch.jit.load reads it."""

    def __init__(self):
        super().__init__()
        self.tensor = torch.ones(2)

    @torch.jit.export
    def __getstate__(self) -> torch.Tensor:
        return self.tensor

    @torch.jit.export
    def __setstate__(self, state: torch.Tensor) -> None:
        torch.save(state, "owned")
        self.tensor = state
        self.training = False


def as_openais(clip):
    """A TorchScript module as OpenAI's ViT-L-14.pt holds one: fp16, and three integers."""
    root = nn.Module()
    for name, tensor in clip.state_dict().items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, nn.Parameter(tensor.half(), requires_grad=False))
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(name, torch.tensor(value))
    return root


def test_openais_archive_is_read(world, tmp_path, monkeypatch):
    clip = load_tiny(world)
    path = tmp_path / "ViT.pt"
    torch.jit.script(as_openais(clip)).save(path)
    published = {"url": f"https://it/{hashlib.sha256(path.read_bytes()).hexdigest()}/ViT.pt"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: published)
    assert_same_weights(gh.load_clip("tiny-clip", path)[0], clip.half().float())


def test_the_digests_of_openais_archives_are_known():
    models = open_clip.list_pretrained_models_by_tag("openai")
    urls = [open_clip.get_pretrained_cfg(name, "openai")["url"] for name in models]
    assert "ViT-L-14-336" in models
    assert all(re.search("/[0-9a-f]{64}/", url) for url in urls)


def test_an_archive_runs_none_of_its_code(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = as_openais(load_tiny(world))
    module.visual.add_module("forged", WritesAFile())
    torch.jit.script(module).save("forged.pt")
    with pytest.raises(UserError) as error:
        gh.load_clip("tiny-clip", "forged.pt")
    assert_one_line(error, "forged.pt")
    assert not os.path.exists("owned")
    torch.jit.load("forged.pt")  # what this test is worth
    assert os.path.exists("owned")


# ---------------------------------------------------------------------------------------------
# HuggingFace's format
# ---------------------------------------------------------------------------------------------


def with_kinds(*layers):
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def hf_blocks(tower):
    """HuggingFace's names of the two blocks that both towers of the tiny models have."""
    layers = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    layers += [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    blocks = [f"{tower}.encoder.layers.{i}" for i in range(2)]
    return with_kinds(*(f"{block}.{layer}" for block in blocks for layer in layers))


HF_BOTH = hf_blocks("vision_model") | hf_blocks("text_model")
HF_BOTH |= with_kinds("vision_model.post_layernorm", "text_model.final_layer_norm")
HF_BOTH |= {
    "logit_scale",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
}
HF_CLIP = HF_BOTH | with_kinds("vision_model.pre_layrnorm")
HF_CLIP |= {
    "vision_model.embeddings.class_embedding",
    "visual_projection.weight",
    "text_projection.weight",
}
HF_SIGLIP = HF_BOTH | with_kinds(
    "text_model.head",
    "vision_model.head.layernorm",
    "vision_model.head.mlp.fc1",
    "vision_model.head.mlp.fc2",
    "vision_model.head.attention.out_proj",
)
HF_SIGLIP |= {
    "logit_bias",
    "vision_model.embeddings.patch_embedding.bias",
    "vision_model.head.probe",
    "vision_model.head.attention.in_proj_weight",
    "vision_model.head.attention.in_proj_bias",
}


@pytest.fixture(scope="module")
def exported(world):
    """A folder with hf/ of the tiny models."""
    for name in ("tiny-clip", "tiny-siglip"):
        gh.export_hf(load_tiny(world, name), world / "hf" / name)
    return world / "hf"


def read_export(folder):
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def test_an_exported_clip_has_the_published_layout(world, exported):
    clip = load_tiny(world)
    weights, config = read_export(exported / "tiny-clip")
    assert weights.keys() == HF_CLIP
    k_rows = clip.visual.transformer.resblocks[1].attn.in_proj_weight[64:128]
    assert torch.equal(weights["vision_model.encoder.layers.1.self_attn.k_proj.weight"], k_rows)
    assert torch.equal(weights["visual_projection.weight"], clip.visual.proj.T)
    assert torch.equal(weights["text_projection.weight"], clip.text_projection.T)
    assert weights["logit_scale"].shape == ()


def test_an_exported_clips_configuration(exported):
    config = read_export(exported / "tiny-clip")[1]
    assert config["model_type"] == "clip"
    assert config["projection_dim"] == config["vision_config"]["projection_dim"] == 32
    expected = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
    assert expected.items() <= config["vision_config"].items()
    assert config["text_config"]["eos_token_id"] == 49407
    assert config["text_config"]["max_position_embeddings"] == 77


def test_an_exported_clips_text_tokenizer(exported):
    vocabulary = json.loads((exported / "tiny-clip" / "vocab.json").read_text())
    assert len(vocabulary) == 49408
    assert vocabulary["<|endoftext|>"] == 49407
    assert vocabulary["photo</w>"] == 1125
    merges = (exported / "tiny-clip" / "merges.txt").read_text().splitlines()
    assert merges[:2] == ["#version: 0.2", "i n"]


def test_an_exported_clips_image_processor(exported):
    processor = json.loads((exported / "tiny-clip" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 32}
    assert processor["do_center_crop"]
    assert processor["image_mean"] == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def test_an_exported_siglip_has_the_published_layout(world, exported):
    pool = load_tiny(world, "tiny-siglip").visual.trunk.attn_pool
    weights, config = read_export(exported / "tiny-siglip")
    assert weights.keys() == HF_SIGLIP
    packed = weights["vision_model.head.attention.in_proj_weight"]
    assert torch.equal(packed, torch.cat([pool.q.weight, pool.kv.weight]))
    assert weights["vision_model.embeddings.position_embedding.weight"].shape == (16, 48)
    assert weights["logit_scale"].shape == weights["logit_bias"].shape == (1,)
    assert config["vision_config"]["hidden_act"] == "gelu"
    assert not (exported / "tiny-siglip" / "vocab.json").exists()


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_what_was_exported_is_imported_bit_by_bit(world, exported, name):
    clip = load_tiny(world, name)
    assert_same_weights(gh.load_clip(name, exported / name)[0], clip)
    assert_same_weights(gh.load_clip(name, exported / name / "model.safetensors")[0], clip)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_a_pickled_folder_is_imported(world, exported, tmp_path, name):
    weights = read_export(exported / name)[0]
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # older ones have it
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same_weights(gh.load_clip(name, tmp_path)[0], load_tiny(world, name))


SHARDED = [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)]


@pytest.mark.parametrize("file, save", SHARDED)
def test_a_sharded_folder_is_imported(world, exported, tmp_path, file, save):
    weights = read_export(exported / "tiny-clip")[0]
    shards = {name: f"{i % 3}-{file}" for i, name in enumerate(weights)}
    for shard in set(shards.values()):
        save({n: weights[n] for n in weights if shards[n] == shard}, tmp_path / shard)
    (tmp_path / f"{file}.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_same_weights(gh.load_clip("tiny-clip", tmp_path)[0], load_tiny(world))


def perturbed_toy():
    clip = gh.load_clip("toy")[0]
    perturb(clip)
    return clip


@pytest.mark.parametrize("prefix", ["vision_model.", ""])  # transformers 5 saves the latter
def test_a_vision_tower_alone_keeps_the_backbones_text_tower(tmp_path, capsys, prefix):
    clip = perturbed_toy()
    gh.export_hf(clip, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tower = {n: v for n, v in weights.items() if n.startswith("vision_model.")}
    tower = {prefix + n.removeprefix("vision_model."): v for n, v in tower.items()}
    save_file(tower, tmp_path / "model.safetensors")
    loaded = gh.load_clip("toy", tmp_path)[0]
    own = gh.load_clip("toy")[0]
    for name, tensor in loaded.state_dict().items():
        tower = name.startswith("visual.") and name != "visual.proj"
        assert torch.equal(tensor, (clip if tower else own).state_dict()[name]), name
    error = capsys.readouterr().err
    assert "vision tower alone, with toy's text tower and visual projection" in error
    assert error.count("\n") == 1


def test_a_vision_tower_with_its_projection_keeps_it(tmp_path, capsys):
    clip = perturbed_toy()
    gh.export_hf(clip, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tower = {n: v for n, v in weights.items() if n.startswith(("vision_model.", "visual_"))}
    save_file(tower, tmp_path / "tower.safetensors")
    loaded = gh.load_clip("toy", tmp_path / "tower.safetensors")[0]
    assert torch.equal(loaded.visual.proj, clip.visual.proj)
    assert "with toy's text tower\n" in capsys.readouterr().err


def test_a_vision_tower_without_a_backbone_at_hand_is_one_line(exported, tmp_path):
    weights = read_export(exported / "tiny-clip")[0]
    tower = {n: v for n, v in weights.items() if n.startswith("vision_model.")}
    save_file(tower, tmp_path / "tower.safetensors")
    with pytest.raises(UserError) as error:
        gh.load_clip("tiny-clip", tmp_path / "tower.safetensors")
    assert_one_line(error, "tower.safetensors", "vision tower alone", "open_clip has no weights")


@pytest.mark.parametrize(
    "name, folder, says",
    [
        ("tiny-siglip", "tiny-clip", "holds a CLIPModel of width 64"),
        ("tiny-siglip", "tiny-clip", "tiny-siglip is a SiglipModel of width 48"),
        ("tiny-clip", "tiny-siglip", "holds a SiglipModel of width 48"),
        ("toy", "tiny-clip", "toy is a CLIPModel of width 96, 4 layers and 26 positions"),
    ],
)
def test_another_architecture_is_refused_by_name(exported, name, folder, says):
    with pytest.raises(UserError) as error:
        gh.load_clip(name, exported / folder)
    assert_one_line(error, exported / folder, says)


def test_another_activation_is_refused_by_name(exported, tmp_path):
    shutil.copytree(exported / "tiny-clip", tmp_path / "hf")
    config = read_export(tmp_path / "hf")[1]
    config["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        gh.load_clip("tiny-clip", tmp_path / "hf")
    assert_one_line(error, "config.json asks for gelu", "tiny-clip computes quick_gelu")


K_WEIGHT = "vision_model.encoder.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "name, tensor, says",
    [
        (K_WEIGHT, None, f"missing {K_WEIGHT}"),
        (K_WEIGHT, torch.zeros(64, 32), f"misshapen {K_WEIGHT} (64, 32) for (64, 64)"),
        (K_WEIGHT, torch.zeros(64, 64, dtype=torch.int8), K_WEIGHT),
        (K_WEIGHT, torch.full((64, 64), math.nan), "not finite"),
        ("text_model.more", torch.zeros(1), "unexpected text_model.more"),
    ],
)
def test_a_spoilt_huggingface_file_is_refused(exported, tmp_path, name, tensor, says):
    weights = read_export(exported / "tiny-clip")[0]
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, tmp_path / "spoilt.safetensors")
    with pytest.raises(UserError) as error:
        gh.load_clip("tiny-clip", tmp_path / "spoilt.safetensors")
    assert_one_line(error, "spoilt.safetensors", says)


@pytest.mark.parametrize("missing", ["1-model.safetensors", "model.safetensors.index.json"])
def test_a_folder_that_is_not_whole_is_one_line(exported, tmp_path, missing):
    weights = read_export(exported / "tiny-clip")[0]
    save_file(weights, tmp_path / "0-model.safetensors")
    shards = dict.fromkeys(weights, "0-model.safetensors") | {K_WEIGHT: "1-model.safetensors"}
    index = json.dumps({"weight_map": shards})
    if missing.endswith("json"):
        index = index[:100]
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError) as error:
        gh.load_clip("tiny-clip", tmp_path)
    assert_one_line(error, tmp_path / missing)


# ---------------------------------------------------------------------------------- the images

RED = (250, 10, 20)
WHITE = (255, 255, 255)


def transparent_palette():
    image = Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = image.getpixel((0, 0))
    return image


def grey_16_bit():
    return Image.fromarray(np.full((8, 8), 60_000, np.uint16))


def grey_32_bit():
    return Image.fromarray(np.full((8, 8), 40_000, np.int32))


@pytest.mark.parametrize("image, expected", [
    (Image.new("RGB", (8, 8), RED), RED),
    (Image.new("RGB", (8, 8), RED).convert("CMYK"), RED),
    (Image.new("RGB", (8, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE), RED),
    (Image.new("L", (8, 8), 77), (77, 77, 77)),
    (Image.new("RGBA", (8, 8), (0, 0, 0, 0)), WHITE),
    (Image.new("LA", (8, 8), (0, 0)), WHITE),
    (transparent_palette(), WHITE),
    (grey_16_bit(), (234, 234, 234)),
    (grey_32_bit(), (156, 156, 156)),
])
def test_any_image_becomes_rgb(image, expected):
    converted = train.to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.getpixel((1, 1)) == pytest.approx(expected, abs=3)


def test_a_photo_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn it by 90 degrees
    wide = Image.new("RGB", (60, 20), "white")
    wide.paste("black", (0, 0, 10, 20))
    file = io.BytesIO()
    wide.save(file, "JPEG", exif=exif)
    upright = train.to_rgb(Image.open(file))
    assert upright.size == (20, 60)
    assert upright.getpixel((10, 2))[0] < 60
    assert upright.getpixel((10, 57))[0] > 200


@pytest.fixture
def zoo(tmp_path):
    """A folder and two shards of images: 13 are good, 6 are not."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "zoo"
    (folder / "deeper").mkdir(parents=True)
    noise = noise_image(rng, 48, 64)
    noise.save(folder / "a.jpg")
    noise.convert("CMYK").save(folder / "b.jpeg")
    noise.convert("L").save(folder / "c.png")
    noise.convert("P").save(folder / "deeper" / "d.gif")
    noise.convert("RGBA").save(folder / "deeper" / "e.PNG")
    grey_16_bit().save(folder / "f.png")
    noise.resize((1, 1)).save(folder / "g.png")
    good = (folder / "a.jpg").read_bytes()
    (folder / "h.jpg").write_bytes(good[:len(good) // 2])
    (folder / "i.jpg").write_bytes(b"")
    (folder / "j.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    write_shard(tmp_path / "tars" / "0.tar", [good, b"junk", good, b"", good])
    write_shard(tmp_path / "tars" / "1.tar", [good, good, good[:300], good])
    return [str(folder), str(tmp_path / "tars")]


def open_images(paths, tmp_path, side=16):
    return train.Images([str(path) for path in paths], side, str(tmp_path / "index.npz"))


def test_bad_images_are_skipped_and_named(zoo, tmp_path):
    data = open_images(zoo, tmp_path, 32)
    assert len(data) == 10 + 5 + 4
    images, skipped = data[0, 0, 0, list(range(len(data)))]
    assert images.shape == (19, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert len(set(skipped)) == 6
    assert sum("tar at byte" in name for name in set(skipped)) == 3
    assert sum(data.load(i)[0] is not None for i in range(len(data))) == 13


def test_crops_follow_from_seed_step_and_slot(zoo, tmp_path):
    data = open_images(zoo, tmp_path)
    images = data[0, 3, 1, [0, 1]][0]
    assert torch.equal(images, data[0, 3, 1, [0, 1]][0])
    for other in ((1, 3, 1), (0, 4, 1), (0, 3, 2)):
        assert not torch.equal(images, data[*other, [0, 1]][0])


@pytest.fixture
def shard(tmp_path):
    """A shard of six images, each with its caption and its JSON."""
    rng = np.random.default_rng(0)
    images = [jpeg(noise_image(rng, 30, 30)) for _ in range(6)]
    write_shard(tmp_path / "data" / "0.tar", images)
    return tmp_path / "data" / "0.tar"


def members(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()


def test_entries_point_at_the_images(shard, tmp_path):
    data = open_images([shard], tmp_path)
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        pictures = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
    found = [content[e["offset"]:e["offset"] + e["size"]] for e in data.entries]
    assert found == pictures


def test_shards_are_indexed_once(shard, tmp_path, monkeypatch):
    before = open_images([shard], tmp_path)
    monkeypatch.setattr(train, "index_shard", None)
    assert open_images([shard], tmp_path).fingerprint() == before.fingerprint()


def test_a_shard_that_changed_is_indexed_anew(shard, tmp_path):
    before = open_images([shard], tmp_path)
    write_shard(shard, 4 * [jpeg(Image.new("RGB", (9, 9)))])
    after = open_images([shard], tmp_path)
    assert len(after) == 4
    assert after.fingerprint() != before.fingerprint()


def test_a_damaged_index_is_made_anew(shard, tmp_path):
    open_images([shard], tmp_path)
    (tmp_path / "index.npz").write_bytes(b"torn")
    assert len(open_images([shard], tmp_path)) == 6


def test_many_shards_are_indexed_in_their_order(shard, tmp_path):
    for number in range(1, 9):
        write_shard(shard.parent / f"{number}.tar", number * [b"an image"])
    data = open_images([shard.parent], tmp_path)
    assert np.bincount(data.entries["file"]).tolist() == [6, 1, 2, 3, 4, 5, 6, 7, 8]


def test_the_fingerprint_follows_the_data_wherever_it_lies(shard, tmp_path):
    before = open_images([shard.parent], tmp_path).fingerprint()
    shutil.copytree(shard.parent, tmp_path / "moved")
    assert open_images([tmp_path / "moved"], tmp_path).fingerprint() == before


def spoil(path, start, content):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


def bad_checksum(shard):
    spoil(shard, members(shard)[9].offset + 148, b"0000000")


def zero_block(shard):
    spoil(shard, members(shard)[9].offset, bytes(512))


def zero_blocks(shard):
    spoil(shard, members(shard)[9].offset, bytes(2048))


def rubbish(shard):
    spoil(shard, members(shard)[9].offset, 128 * b"junk")


def two_tars(shard):
    shard.write_bytes(2 * shard.read_bytes())


def sparse(shard):
    header = tarfile.TarInfo("big.jpg")
    header.type = tarfile.GNUTYPE_SPARSE
    block = header.tobuf(tarfile.GNU_FORMAT)
    content = shard.read_bytes()
    shard.write_bytes(block + content)


def compressed(shard):
    content = shard.read_bytes()
    with tarfile.open(shard, "w:gz") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def no_tar(shard):
    shard.write_text("<html>404</html>")


@pytest.mark.parametrize("damage", [bad_checksum, zero_block, zero_blocks, rubbish, two_tars,
                                    sparse, compressed, no_tar])
def test_a_damaged_shard_is_an_error_that_names_it(shard, tmp_path, damage):
    damage(shard)
    with pytest.raises(UserError) as error:
        open_images([shard], tmp_path)
    assert_one_line(error, shard, "fetch it again")
    assert not (tmp_path / "index.npz").exists()


@pytest.mark.parametrize("member, more", [(0, 0), (0, 100), (9, 0), (9, 512), (9, 600), (17, 513)])
def test_a_shard_cut_short_is_an_error_that_names_it(shard, tmp_path, member, more):
    os.truncate(shard, members(shard)[member].offset + more)
    with pytest.raises(UserError) as error:
        open_images([shard], tmp_path)
    assert_one_line(error, shard, "fetch it again")


def test_a_shard_without_its_end_is_an_error(shard, tmp_path):
    last = members(shard)[-1]
    os.truncate(shard, last.offset_data + 512)
    with pytest.raises(UserError) as error:
        open_images([shard], tmp_path)
    assert_one_line(error, shard, "damaged or cut short")


def touch(path):
    os.utime(path, ns=(1, 1))


def shorten(path):
    os.truncate(path, 2000)


@pytest.mark.parametrize("change", [touch, shorten, zero_block])
def test_a_shard_that_changes_while_a_run_uses_it_is_an_error(shard, tmp_path, change):
    data = open_images([shard], tmp_path)
    change(shard)
    with pytest.raises(UserError) as error:
        data.load(5)
    assert_one_line(error, shard, "not what it was when the run began")


def test_a_shard_that_vanishes_is_no_bad_image(shard, tmp_path):
    data = open_images([shard], tmp_path)
    os.remove(shard)
    with pytest.raises(UserError) as error:
        data.load(0)
    assert_one_line(error, shard, "can no longer be read", "No such file")


def test_a_fifo_or_a_device_among_the_images_is_left_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    os.mkfifo(folder / "b.png")
    os.symlink("/dev/zero", folder / "c.png")
    assert len(open_images([folder], tmp_path)) == 1


@pytest.mark.parametrize("world_size, accum", [(1, 1), (4, 1), (2, 2), (1, 4)])
def test_every_image_comes_once_in_an_epoch(monkeypatch, world_size, accum):
    n, batch, epochs = 96, 3, 3
    steps = epochs * n // (batch * accum * world_size)
    settings = train.Settings(seed=5, accum=accum, batch_size=batch)
    monkeypatch.setattr(train, "WORLD", world_size)
    slots = {}
    for rank in range(world_size):
        monkeypatch.setattr(train, "RANK", rank)
        for _, step, slot, indices in train.batch_keys(settings, n, 0, steps):
            slots[step, slot] = indices
    order = [index for key in sorted(slots) for index in slots[key]]
    assert order == [train.epoch_order(n, 5, e)[i] for e in range(epochs) for i in range(n)]
    for epoch in range(epochs):
        assert sorted(order[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert order[:n] != order[n:2 * n]


def test_a_run_goes_on_at_its_exact_position():
    settings = train.Settings(seed=5, accum=2, batch_size=3)
    whole = list(train.batch_keys(settings, 50, 0, 20))
    assert list(train.batch_keys(settings, 50, 13, 20)) == whole[2 * 13:]


def test_three_million_entries_are_small():
    order = train.epoch_order(1000, 0, 0)
    assert 3_000_000 * (train.ENTRY.itemsize + order.itemsize) < 75e6  # bytes, in each rank


# ----------------------------------------------------------------------------- training, for real

def arguments(world, out, *more):
    """A run of six steps on 60 images, with models of about a million parameters."""
    settings = [
        "--backbone", "tiny-clip",
        "--clip-weights", world / "tiny-clip.safetensors",
        "--vae", world / "vae.safetensors",
        "--vqgan", world / "vqgan.safetensors",
        "--data", world / "data",
        "--out", out,
        "--width", 128,
        "--condition", 48, 64,
        "--depth", 1, 1,
        "--layers", 2,
        "--steps", 6,
        "--batch-size", 2,
        "--accum", 2,
        "--workers", 0,
        "--precision", "fp32",
        "--save-every", 2,
        "--log-every", 1,
        "--sample-every", 3,
        *more,
    ]
    return [str(setting) for setting in settings]


def write_benchmark(folder):
    """MMVP-VLM's layout, two patterns with a pair each."""
    rng = np.random.default_rng(0)
    rows = [["Question ID", "Type", "Statement"]]
    for question, pattern in enumerate(("Colour", "Colour", "State", "State"), 1):
        path = folder / "MLLM_VLM Images" / pattern / f"{question}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(rng, 32, 32).save(path)
        rows.append([question, pattern, f"statement {question}"])
    with open(folder / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def rf(world, out, *more):
    return arguments(world, out, "--warmup", 0, "--val", world / "val", *more)


def perceiver(world, out, *more):
    settings = ("--denoiser", "perceiver", "--freeze-denoiser", "--sample-every", 6)
    return arguments(world, out, *settings, *more)


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """rf: both stages, with the benchmark before and after; perceiver: LoRA alone in stage 2.

    The network is out of reach all the while.
    """
    out = tmp_path_factory.mktemp("trained")
    images = [jpeg(noise_image(np.random.default_rng(n), 40, 50)) for n in range(4)]
    write_shard(world / "val" / "0.tar", images)
    benchmark = write_benchmark(out / "mmvp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", None)
        patch.setattr(socket.socket, "connect", None)
        train.main(rf(world, out / "rf", "--benchmark", benchmark, "--export-every", 4))
        for stage in (1, 2):
            train.main(perceiver(world, out / "perceiver", "--stage", stage))
    return out


def test_lora_and_proj_alone_change_in_clip(world, trained):
    before = load_file(world / "tiny-clip.safetensors")
    after = load_file(trained / "rf" / "clip.safetensors")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * 4 + 1  # two blocks: qkv, out, fc, proj; and the tower's proj
    for name in changed:
        assert name.startswith("visual.")
        assert "ln_" not in name and "bias" not in name


@pytest.mark.parametrize("run", ["rf", "perceiver"])
def test_stage_1_makes_denoiser_and_projectors(trained, run):
    result = load_file(trained / run / "stage1" / "last.safetensors")
    assert {name.split(".")[0] for name in result} == {"denoiser", "projectors"}


def trained_weights(folder):
    """The weights in the last checkpoint of a stage."""
    tensors = load_file(folder / "step-00000006.safetensors")
    prefix = "model."
    return {name[len(prefix):]: tensors[name] for name in tensors if name.startswith(prefix)}


def test_stage_2_trains_lora_and_the_denoiser(trained):
    before = load_file(trained / "rf" / "stage1" / "last.safetensors")
    after = trained_weights(trained / "rf" / "stage2")
    assert sum("lora" in name for name in after) == 2 * (2 * 4 + 1)
    assert not any(".base." in name for name in after)
    weights = [name for name in before if not name.endswith("bias")]
    assert not any(torch.equal(before[name], after[name]) for name in weights)


def test_freeze_denoiser_leaves_lora_alone(trained):
    after = trained_weights(trained / "perceiver" / "stage2")
    assert len(after) == 2 * (2 * 4 + 1)
    assert all("lora" in name for name in after)


def test_the_result_compares_before_and_after(trained):
    result = json.loads((trained / "rf" / "result.json").read_text())
    assert result.keys() == {"before", "after"}
    for summary in result.values():
        assert summary.keys() == {"average", "patterns", "zeroshot"}
        assert summary["patterns"].keys() == {"Colour", "State"}


def test_the_result_loads_in_plain_open_clip(world, trained):
    """It computes what the trained tower did, whose LoRA was not merged."""
    path = str(trained / "rf" / "clip.safetensors")
    clip = open_clip.create_model("tiny-clip", pretrained=path).eval()
    typed = train.read_command_line(rf(world, trained / "rf"))
    model = train.build_model(train.make_settings(typed, 2), torch.device("cpu")).eval()
    weights = trained_weights(trained / "rf" / "stage2")
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(clip.visual(images), model.visual(images), 1e-5)


def test_the_huggingface_folder_holds_the_same_weights(trained):
    clip = load_file(trained / "rf" / "clip.safetensors")
    exported = load_file(trained / "rf" / "hf" / "model.safetensors")
    assert torch.equal(exported["visual_projection.weight"], clip["visual.proj"].T)


def test_the_result_says_nothing_of_time_or_place(trained):
    with safe_open(trained / "rf" / "clip.safetensors", "pt") as file:
        [(name, seal)] = file.metadata().items()
    seal = json.loads(seal)
    assert (name, sorted(seal), seal["about"]) == ("genhancer", ["about", "crc32"], {})


def test_export_every_writes_whole_clips_along_the_way(trained):
    path = trained / "rf" / "clip-000004.safetensors"
    open_clip.create_model("tiny-clip", pretrained=str(path))
    last = load_file(trained / "rf" / "clip.safetensors")
    assert not torch.equal(load_file(path)["visual.proj"], last["visual.proj"])
    assert not list((trained / "perceiver").glob("clip-*"))


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session")
def compiled(world, tmp_path_factory):
    """Stage 1 of the perceiver with --compile, and how many graphs pictures and losses cost."""
    out = tmp_path_factory.mktemp("compiled")
    compile_module, look = torch.nn.Module.compile, train.look
    graphs, graphs_of_look = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def counted_look(*inputs):
        before = len(graphs)
        losses = look(*inputs)
        graphs_of_look.append(len(graphs) - before)
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda m: compile_module(m, backend=backend))
        patch.setattr(train, "look", counted_look)
        train.main(perceiver(world, out, "--stage", 1, "--compile"))
    assert graphs
    return out, graphs_of_look


def test_compile_gives_the_same_losses(trained, compiled):
    plain, out = read_log(trained / "perceiver" / "stage1"), read_log(compiled[0] / "stage1")
    for name in ("loss", "grad_norm", "heldout"):
        for row, other in zip(plain, out, strict=True):
            if row[name]:
                assert float(other[name]) == pytest.approx(float(row[name]), rel=1e-4)


def test_compile_leaves_pictures_and_heldout_losses_alone(compiled):
    assert compiled[1] == [0]


@pytest.mark.parametrize("run", ["rf", "perceiver"])
def test_the_log_tells_what_happened(trained, run):
    rows = read_log(trained / run / "stage1")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[2]["epoch"]) == pytest.approx(3 * 4 / 60, abs=1e-4)
    for name in ("loss", "grad_norm", "images_per_s", "peak_memory_gb"):
        assert all(math.isfinite(float(row[name])) for row in rows)
    level = {"rf": "t", "perceiver": "mask"}[run]
    bins = [rows[0][f"loss_{level}_{i / 10}"] for i in range(10)]
    bins = [float(loss) for loss in bins if loss]
    assert min(bins) <= float(rows[0]["loss"]) <= max(bins)


def test_the_rate_warms_up(trained):
    rates = [float(row["lr"]) for row in read_log(trained / "perceiver" / "stage1")]
    assert rates == pytest.approx([1e-5 * step for step in range(1, 7)])
    rates = [float(row["lr"]) for row in read_log(trained / "rf" / "stage1")]
    assert rates == pytest.approx(6 * [1e-4])


def test_heldout_losses_are_logged_when_they_are_due(trained):
    rows = read_log(trained / "rf" / "stage1")
    due = [bool(row["heldout"] and row["heldout_shuffled"]) for row in rows]
    assert due == 2 * [False, False, True]
    assert not any(row["heldout"] for row in read_log(trained / "perceiver" / "stage1"))


@pytest.mark.parametrize("run, step, columns", [("rf", 3, 2), ("perceiver", 6, 3)])
def test_pictures_show_images_and_reconstructions(trained, run, step, columns):
    picture = Image.open(trained / run / "stage1" / "samples" / f"{step:06}.png")
    assert picture.width == 2 * columns * (4 * 32 + 2) + 2


def test_the_newest_two_checkpoints_are_kept(trained):
    names = sorted(path.name for path in (trained / "rf" / "stage1").glob("step-*"))
    assert names == ["step-00000004.safetensors", "step-00000006.safetensors"]


def test_a_finished_run_is_left_alone(world, trained, capsys):
    def times():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    folder = trained / "perceiver" / "stage1"
    before = times()
    train.main(perceiver(world, trained / "perceiver", "--stage", 1))
    assert "stage 1 is finished" in capsys.readouterr().out
    assert times() == before


def test_the_control_conditions_on_another_image(world, tmp_path, monkeypatch):
    forward = gh.Continuous.forward
    seen = []

    def watched(self, images, other=None):
        seen.append((images, other))
        return forward(self, images, other)

    monkeypatch.setattr(gh.Continuous, "forward", watched)
    more = ("--steps", 1, "--batch-size", 3, "--accum", 1, "--shuffle-target")
    train.main(arguments(world, tmp_path, "--stage", 1, *more))
    images, other = seen[0]  # then come the held-out ones
    assert torch.equal(other, images[[2, 0, 1]])
    assert not torch.equal(images, other)


def test_flux_weights_start_a_denoiser(world, tmp_path):
    config = gh.FluxConfig(
        in_channels=16,
        vec_in_dim=48,
        context_in_dim=64,
        hidden_size=128,
        num_heads=1,
        depth=1,
        depth_single_blocks=1,
    )
    flux = fill(gh.Flux(config), 0.02)
    save_file(flux.state_dict(), tmp_path / "flux.safetensors")
    more = ("--stage", 1, "--init", tmp_path / "flux.safetensors")
    typed = train.read_command_line(arguments(world, tmp_path, *more))
    model = train.build_model(train.make_settings(typed, 1), torch.device("cpu"))
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, flux.state_dict()[name])
    assert all(p.requires_grad for p in model.denoiser.parameters())


def test_the_bench_needs_no_weights_and_says_what_it_measured(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_autoencoder", lambda s: load_vae(world / "vae.safetensors"))
    small = "--backbone tiny-clip --width 128 --depth 1 1 --steps 6 --batch-size 2 --log-every 1"
    train.main(["--preset", "bench", "--out", str(tmp_path), *small.split()])
    said = capsys.readouterr().out
    for row in ("s / 100 iterations", "images / s", "peak memory", "model TFLOP/s", "MFU"):
        assert row in said
    assert not (tmp_path / "stage1" / "last.safetensors").exists()


# ------------------------------------------------------------------- killed, disturbed, continued

def in_a_process(said, work, *more):
    """Start work(*more) in a process of its own, which tells the file `said` what it has to say."""
    def told():
        with open(said, "w", buffering=1) as file:
            sys.stdout = file
            sys.stderr = file
            work(*more)

    process = multiprocessing.get_context("fork").Process(target=told)
    process.start()
    return process


def killed_at(step, work, *more):
    """Do work(*more), and die of SIGKILL when the images of a step are asked for."""
    parent = os.getpid()
    getitem = train.Images.__getitem__

    def fatal(self, key):
        if key[1] == step:
            os.kill(parent, signal.SIGKILL)
        return getitem(self, key)

    train.Images.__getitem__ = fatal
    work(*more)


@pytest.mark.parametrize("run, stage", [("rf", 2), ("perceiver", 1)])
def test_a_killed_run_ends_in_the_same_bits(world, trained, tmp_path, run, stage):
    options = {"rf": rf, "perceiver": perceiver}[run]
    settings = options(world, tmp_path, "--stage", stage, "--workers", 1)
    if stage == 2:
        shutil.copytree(trained / run / "stage1", tmp_path / "stage1")
    process = in_a_process(tmp_path / "said", killed_at, 5, train.main, settings)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = in_a_process(tmp_path / "said", train.main, settings)
    process.join()
    assert process.exitcode == 0
    assert "resumed from" in (tmp_path / "said").read_text()
    assert_same_run(trained / run, tmp_path, f"stage{stage}")
    if stage == 2:
        assert_same_bytes(trained / run, tmp_path, "clip.safetensors", "hf/model.safetensors")


def assert_same_bytes(one, other, *names):
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_same_run(one, other, stage):
    """Checkpoints, pictures and losses are the same to the last bit."""
    names = [path.relative_to(one) for path in (one / stage).rglob("*") if path.is_file()]
    assert_same_bytes(one, other, *[name for name in names if name.name != "log.csv"])
    for row, same in zip(read_log(one / stage), read_log(other / stage), strict=True):
        for name in ("step", "epoch", "loss", "grad_norm", "lr", "heldout"):
            assert row[name] == same[name]


class Stub(nn.Module):
    """Stands in for GenHancer where the model does not matter: it trains in no time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Linear(1, 1).requires_grad_(False)
        self.denoiser = nn.Linear(3 * 8 * 8, 4)
        self.projectors = nn.ModuleDict()
        self.register_buffer("mean", torch.zeros(1), persistent=False)

    def forward(self, images, other=None):
        noise = torch.randn(len(images), 4)
        losses = (self.denoiser(images.flatten(1)) - noise).square().mean(1)
        return losses, torch.rand(len(images))

    def reconstruct(self, images):
        return images


def train_stub(world, out, *more):
    """Run stage 1 with a Stub for a model, and return its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", lambda *_: Stub())
        patch.setattr(train, "check", lambda *_, **__: None)
        patch.setattr(train, "backbone_side", lambda s: 8)
        train.main(arguments(world, out, "--stage", 1, *more))
    return out / "stage1"


@pytest.fixture(scope="session")
def stub_run(world, tmp_path_factory):
    """The folder of a finished run of the Stub, and what was said."""
    out = tmp_path_factory.mktemp("stub")
    train_stub(world, out)
    return out


@pytest.fixture
def stopped(stub_run, tmp_path):
    """A copy of that run, as if it had been killed before it wrote its result."""
    out = tmp_path / "stopped"
    shutil.copytree(stub_run, out)
    os.remove(out / "stage1" / "last.safetensors")
    return out


def flip_a_bit(path):
    content = path.read_bytes()
    spoil(path, len(content) // 2, bytes([content[len(content) // 2] ^ 1]))


def zero_the_second_half(path):
    size = path.stat().st_size
    spoil(path, size // 2, bytes(size - size // 2))


def zero_all(path):
    spoil(path, 0, bytes(path.stat().st_size))


def cut_the_end(path):
    os.truncate(path, path.stat().st_size - 3)


def empty(path):
    os.truncate(path, 0)


def rename_a_key(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"denoiser", b"denoises", 1).replace(b"step", b"stop", 1))


def break_the_seal(path):
    save_file(load_file(path), path)


def replace_by_a_list(path):
    path.write_text("[]")


DAMAGES = [flip_a_bit, zero_the_second_half, cut_the_end, empty, rename_a_key, break_the_seal,
           replace_by_a_list]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(world, stub_run, stopped, capsys, damage):
    damage(stopped / "stage1" / "step-00000006.safetensors")
    train_stub(world, stopped)
    said = capsys.readouterr().out.splitlines()
    passed_over = [line for line in said if "passed over" in line]
    assert len(passed_over) == 1
    assert "step-00000006" in passed_over[0]
    assert any("resumed from" in line and "step-00000004" in line for line in said)
    assert_same_run(stub_run, stopped, "stage1")


def test_a_checkpoint_of_another_step_is_passed_over(world, stub_run, stopped, capsys):
    folder = stopped / "stage1"
    shutil.copy(folder / "step-00000004.safetensors", folder / "step-00000006.safetensors")
    train_stub(world, stopped)
    assert "is of another step or model, and is passed over" in capsys.readouterr().out
    assert_same_run(stub_run, stopped, "stage1")


def test_a_checkpoint_outlives_damaged_newer_ones(world, stopped):
    folder = stopped / "stage1"
    whole = folder / "step-00000006.safetensors"
    for step in (7, 8):
        shutil.copy(whole, folder / f"step-0000000{step}.safetensors")
    train_stub(world, stopped)
    assert train.is_whole(whole)


def test_without_a_whole_checkpoint_a_run_begins_anew(world, stub_run, stopped, capsys):
    for path in (stopped / "stage1").glob("step-*"):
        empty(path)
    train_stub(world, stopped)
    said = capsys.readouterr().out
    assert said.count("passed over") == 2
    assert "resumed" not in said
    assert_same_run(stub_run, stopped, "stage1")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_the_end, empty, os.remove])
def test_a_damaged_result_is_not_finished(world, stub_run, tmp_path, capsys, damage):
    shutil.copytree(stub_run, tmp_path / "run")
    damage(tmp_path / "run" / "stage1" / "last.safetensors")
    train_stub(world, tmp_path / "run")
    assert "resumed from" in capsys.readouterr().out
    assert_same_run(stub_run, tmp_path / "run", "stage1")


def refusal(capsys, work, *more):
    """The one line in which work(*more) ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        work(*more)
    forget(stop)
    assert stop.value.code == 2
    return one_line(capsys.readouterr().err)


def one_line(said):
    """The one line of the program's own among the progress bars; there must be no traceback."""
    assert "Traceback" not in said, said
    lines = [line for line in re.split("[\r\n]", said) if line.startswith("train.py: ")]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.parametrize("damage", [zero_all, empty, cut_the_end, replace_by_a_list])
def test_unreadable_settings_are_one_line(world, stopped, capsys, damage):
    damage(stopped / "stage1" / "settings.json")
    assert "settings.json cannot be read" in refusal(capsys, train_stub, world, stopped)


@pytest.mark.parametrize("damage", [zero_all, empty, replace_by_a_list, zero_the_second_half])
def test_an_unreadable_log_is_one_line(world, stopped, capsys, damage):
    damage(stopped / "stage1" / "log.csv")
    assert "log.csv cannot be read" in refusal(capsys, train_stub, world, stopped)


def test_a_log_that_was_moved_away_is_begun_anew(world, stopped):
    """As the message about an unreadable one advises."""
    os.remove(stopped / "stage1" / "step-00000006.safetensors")
    os.remove(stopped / "stage1" / "log.csv")
    rows = read_log(train_stub(world, stopped))
    assert [int(row["step"]) for row in rows] == [5, 6]


def test_a_gradient_that_is_not_finite_stops_the_run(world, tmp_path, monkeypatch, capsys):
    clip = torch.nn.utils.clip_grad_norm_
    factors = iter([1.0, 1.0, 1.0, math.inf])

    def spoiled(*more):
        return clip(*more) * next(factors)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    line = refusal(capsys, train_stub, world, tmp_path)
    assert "gradient is not finite at step 4" in line
    assert "step-00000002" in line
    names = [path.name for path in (tmp_path / "stage1").glob("step-*.safetensors")]
    assert names == ["step-00000002.safetensors"]


def spoil_images(monkeypatch, every):
    """From now on each so many-th image for training cannot be decoded."""
    load = train.Images.load

    def spoiled(self, index, augment=True):
        if augment and index % every == 0:
            return None, "a bad image"
        return load(self, index, augment)

    monkeypatch.setattr(train.Images, "load", spoiled)


def test_a_tenth_of_bad_images_stops_the_run(world, tmp_path, monkeypatch, capsys):
    spoil_images(monkeypatch, 4)
    monkeypatch.setattr(train.Log, "ENOUGH", 12)
    line = refusal(capsys, train_stub, world, tmp_path)
    assert re.search("data: [3-9] images of 12 cannot be decoded", line)


def test_a_short_run_is_judged_at_its_end(world, tmp_path, monkeypatch, capsys):
    spoil_images(monkeypatch, 4)
    assert "images of 24 cannot be decoded" in refusal(capsys, train_stub, world, tmp_path)
    assert not (tmp_path / "stage1" / "last.safetensors").exists()


def test_a_few_bad_images_are_counted(world, tmp_path, monkeypatch, capsys):
    spoil_images(monkeypatch, 30)
    rows = read_log(train_stub(world, tmp_path, "--steps", 15))  # each image once
    assert rows[-1]["undecodable"] == "2"
    assert capsys.readouterr().err.count("skipped, cannot be decoded: a bad image") == 2


def test_a_shard_that_vanishes_under_a_worker_is_one_line(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "data", tmp_path / "data")
    load = train.Images.load

    def vanish(self, index, augment=True):
        if augment:
            shutil.rmtree(tmp_path / "data", ignore_errors=True)
        return load(self, index, augment)

    monkeypatch.setattr(train.Images, "load", vanish)
    run = ("--data", tmp_path / "data", "--workers", 1)
    line = refusal(capsys, train_stub, world, tmp_path / "run", *run)
    assert line.startswith("train.py: data: ")
    assert "can no longer be read (No such file" in line


def test_a_run_goes_on_with_its_data_elsewhere(world, stub_run, stopped, tmp_path):
    shutil.copytree(world / "data", tmp_path / "moved")
    os.remove(stopped / "stage1" / "step-00000006.safetensors")
    train_stub(world, stopped, "--data", tmp_path / "moved")
    assert_same_run(stub_run, stopped, "stage1")


def test_files_have_the_permissions_of_the_umask(world, tmp_path):
    before = os.umask(0o027)
    try:
        train_stub(world, tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


@pytest.mark.parametrize("name", ["file", "file/below", 300 * "x"])
def test_a_bad_out_is_refused_at_once(world, tmp_path, monkeypatch, capsys, name):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "check", None)
    line = refusal(capsys, train.main, arguments(world, tmp_path / name))
    assert "cannot be written" in line


@pytest.mark.parametrize("name, kept", [
    ("index-data.npz", None),
    ("settings.json", None),
    ("log.csv", None),
    ("000003.png", 2),
    ("step-00000004.safetensors", 2),
    ("last.safetensors", 6),
])
def test_a_full_disk_is_one_line(world, stub_run, tmp_path, monkeypatch, capsys, name, kept):
    """The newest checkpoint is intact, and the run ends as if nothing had been."""
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        line = refusal(capsys, train_stub, world, tmp_path)
    assert name in line
    assert "No space left on device" in line
    assert not list(tmp_path.rglob(f".*{name}"))
    train_stub(world, tmp_path)
    said = capsys.readouterr().out
    assert "resumed from" not in said if kept is None else f"step-0000000{kept}.saf" in said
    assert_same_run(stub_run, tmp_path, "stage1")


def hold(out, held):
    """Begin a run in `out`, say so, and wait."""
    lock = train.lock_out(train.Settings(out=str(out)))
    held.set()
    signal.pause()
    del lock


def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path, capsys):
    held = multiprocessing.Event()
    process = in_a_process(tmp_path / "said", hold, tmp_path / "run", held)
    held.wait(60)
    line = refusal(capsys, train_stub, world, tmp_path / "run")
    process.kill()
    process.join()
    assert "is in use by another run" in line
    train_stub(world, tmp_path / "run")


def test_a_data_worker_that_dies_is_one_line(world, tmp_path, monkeypatch, capsys):
    def die(self, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(train.Images, "__getitem__", die)
    line = refusal(capsys, train_stub, world, tmp_path, "--workers", 1)
    assert "a data worker died" in line


@pytest.fixture
def heeds_ctrl_c():
    """Ctrl-C interrupts, though whoever started the tests may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_reaches_that_line(world, tmp_path, monkeypatch, capsys, heeds_ctrl_c):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train.Log, "add", interrupt)
    with pytest.raises(SystemExit, match="130") as stop:
        train_stub(world, tmp_path, "--workers", 1)
    forget(stop)
    assert capsys.readouterr().err.endswith("\ntrain.py: interrupted\n")


# ------------------------------------------------------------------------------ several processes

def rank(number, port, work, *more):
    """Do work(*more) as torchrun's process of this number, of two."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    train.RANK = number
    train.LOCAL_RANK = number
    train.WORLD = 2
    work(*more)


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def in_two_processes(folder, works):
    """Do two works, each a tuple of function and arguments; what they said, and their statuses."""
    port = free_port()
    names = [folder / f"said-{number}" for number in range(2)]
    processes = [in_a_process(names[n], rank, n, port, *works[n]) for n in range(2)]
    for process in processes:
        process.join(60)
        process.kill()
    return [name.read_text() for name in names], [process.exitcode for process in processes]


def train_two(folder, settings):
    said, statuses = in_two_processes(folder, 2 * [(train.main, settings)])
    assert statuses == [0, 0], said
    return said[0]


E2E = ("--stage", "e2e", "--steps", 3, "--local-ratio", 0.3)


def assert_close_runs(one, other, tolerance):
    """The weights after the last step are the same, but for rounding."""
    name = os.path.join("e2e", "step-00000003.safetensors")
    a, b = load_file(one / name), load_file(other / name)
    assert a.keys() == b.keys()
    assert any("lora_B" in key for key in a)
    for key in a:
        assert (a[key] - b[key]).abs().max() <= tolerance, key


@contextmanager
def without_pictures():
    """They take longer than three steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "look", lambda *_: ("", ""))
        yield


@pytest.fixture(scope="session")
def single(world, tmp_path_factory):
    """One process x accumulation 2."""
    out = tmp_path_factory.mktemp("single")
    with without_pictures():
        train.main(arguments(world, out, *E2E))
    return out


@pytest.fixture(scope="session")
def double(world, tmp_path_factory):
    """Two processes x accumulation 1, with DDP."""
    out = tmp_path_factory.mktemp("double")
    with without_pictures():
        train_two(out, arguments(world, out, *E2E, "--accum", 1))
    return out


def rewind(source, target):
    """A copy of a run as it was after its second step."""
    shutil.copytree(source, target)
    for path in [*target.glob("clip.*"), *target.glob("e2e/step-*3.*")]:
        path.unlink()
    return target


def test_two_processes_walk_the_path_of_one(single, double):
    assert_close_runs(single, double, 1e-5)


def test_shards_go_on_from_ddp(world, double, tmp_path):
    out = rewind(double, tmp_path / "run")
    said = train_two(tmp_path, arguments(world, out, *E2E, "--accum", 1, "--shard"))
    assert "resumed from" in said
    assert_close_runs(double, out, 1e-5)


def test_one_process_goes_on_from_two(world, single, double, tmp_path, capsys):
    out = rewind(double, tmp_path / "run")
    with without_pictures():
        train.main(arguments(world, out, *E2E))
    assert "resumed from" in capsys.readouterr().out
    assert_close_runs(single, out, 1e-5)


def accumulate_gradients(world, out, shard):
    """The gradients of two micro-batches in bf16, on two processes, written to a file."""
    s = train.Settings(precision="bf16", shard=shard, accum=2)
    device = train.start_processes()
    core = tiny_model(world).set_stage(1)
    model = train.distribute(s, core, device)
    for micro in range(s.accum):
        train.seed_draws("noise", micro, train.RANK)
        images = torch.rand(1, 3, 32, 32)
        with train.reducing(s, model, micro), train.autocast(s, device):
            losses, _ = model(images)
            (losses.mean() / s.accum).backward()
    trained = {name: p.grad for name, p in core.named_parameters() if p.requires_grad}
    if shard:
        trained = {name: gradient.full_tensor() for name, gradient in trained.items()}
    if train.RANK == 0:
        save_file(trained, out)
    train.barrier()


def test_shards_in_bf16_sum_the_gradients_of_ddp(world, tmp_path):
    """Over two micro-batches, after each of which --shard reduces them."""
    gradients = []
    for shard in (False, True):
        out = tmp_path / f"{shard}.safetensors"
        in_two_processes(tmp_path, 2 * [(accumulate_gradients, world, out, shard)])
        gradients.append(load_file(out))
    ddp, sharded = gradients
    assert ddp.keys() == sharded.keys()
    for name in ddp:
        assert_close(sharded[name], ddp[name], 0.05)
    whole = [torch.cat([g.flatten() for g in some.values()]) for some in (sharded, ddp)]
    assert_close(*whole, 0.01)


def test_a_rank_that_dies_is_one_line(world, tmp_path):
    works = [(train_stub, world, tmp_path / "run"),
             (killed_at, 2, train_stub, world, tmp_path / "run")]
    said, statuses = in_two_processes(tmp_path, works)
    assert statuses == [2, -signal.SIGKILL]
    assert "rank 0 lost another rank" in one_line(said[0])


# ------------------------------------------------------------------------------- users' mistakes

@pytest.mark.parametrize("more, says", [
    (["--stage", "3"], "--stage: invalid choice"),
    (["--denoiser", "gan"], "--denoiser: invalid choice"),
    (["--preset", "big"], "--preset: invalid choice"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--backbone", "nonsense"], "unknown backbone 'nonsense'"),
    (["--steps", "0"], "--steps: 0 is out of range"),
    (["--steps", "many"], "--steps: invalid number value: 'many'"),
    (["--batch-size", "-3"], "--batch-size"),
    (["--lr", "nan", "--stage", "1"], "--lr: nan is out of range"),
    (["--scale", "0"], "--scale: 0 is out of range"),
    (["--seed", "-1"], "--seed: -1 is out of range"),
    (["--seed", str(2**64)], "--seed: .* is out of range"),
    (["--width", "100"], "--width 100 must be a multiple of 128"),
    (["--width", "65536"], "--width: 65536 is out of range"),
    (["--batch-size", "1000000"], "--batch-size: 1000000 is out of range"),
    (["--layers", "100000"], "--layers: 100000 is out of range"),
    (["--depth", "0", "1"], "--depth: 0 is out of range"),
    (["--workers", "100000"], "--workers: 100000 is out of range"),
    (["--local-ratio", "2"], "--local-ratio: 2 is out of range"),
    (["--mask-ratio", "0.9", "0.5"], "the low end comes first"),
    (["--stage", "e2e", "--freeze-denoiser"], "--freeze-denoiser belongs to stage 2"),
    (["--mask-ratio", "0", "0.5"], "--mask-ratio: 0 is out of range"),
    (["--mask-ratio", "0.5", "1.5"], "--mask-ratio: 1.5 is out of range"),
    (["--clip-weights", "nowhere.pt"], "CLIP weights not found at '?nowhere.pt"),
    (["--clip-weights", "random"], "CLIP weights not found at '?random"),
    (["--clip-weights", "WORLD/vae.safetensors"], "missing .*unexpected"),
    (["--vae", "nowhere"], "VAE weights not found at '?nowhere'?.*ae.safetensors"),
    (["--vae", "WORLD/vqgan.safetensors"], "VQ-GAN"),
    (["--denoiser", "perceiver", "--vqgan", "nowhere"], "VQ-GAN weights not found at '?nowhere"),
    (["--denoiser", "perceiver", "--vqgan", "WORLD/vae.safetensors"], "quantize.embedding.weight"),
    (["--vae", "WORLD/vae64.safetensors"], "sees 32 pixels, and the denoiser's tokens are 64"),
    (["--data", "nowhere"], "data not found at nowhere"),
    (["--data", "WORLD/empty"], "no image and no .tar"),
    (["--data", "WORLD/tiny-clip.json"], "no image and no .tar"),
    (["--val", "nowhere"], "data not found at nowhere"),
    (["--stage", "2"], "run --stage 1 first"),
    (["--stage", "1", "--init", "nowhere"], "no weights to start from at nowhere"),
    (["--stage", "1", "--init", "WORLD/vae.safetensors"], "FLUX's weights .*missing"),
    (["--stage", "2", "--init", "WORLD/vae.safetensors"], "stage 1's weights .*missing"),
    (["--stage", "all"], "Questions.csv not found"),
    (["--stage", "all", "--zeroshot", "folder:nowhere", "--benchmark", "WORLD/mmvp"],
     "one subfolder per class"),
    (["--stage", "all", "--lr", "1"], "belong to one stage"),
    (["--shuffle-target", "--batch-size", "1"], "give --batch-size 2 or more"),
    (["--shard"], "start it with torchrun"),
    (["--preset", "bench", "--steps", "1"], "--preset bench counts in --steps"),
    *[([f"--{name}", ""], f"--{name}: the value is empty")
      for name in ("backbone", "clip-weights", "vae", "vqgan", "data", "val", "benchmark",
                   "zeroshot", "out", "init")],
])
def test_a_mistake_is_one_line(mistaken, world, tmp_path, monkeypatch, capsys, more, says):
    """Before anything expensive is begun: --init's file alone waits for its model."""
    def too_late(*_):
        pytest.fail("expensive work began")

    monkeypatch.setattr(train, "load_vae", load_once)
    monkeypatch.setattr(train, "train_stage", train.build_model if "--init" in more else too_late)
    monkeypatch.chdir(tmp_path)
    if "--stage" not in more:
        more = ["--stage", "1", *more]
    more = [setting.replace("WORLD", str(world)) for setting in more]
    settings = [*arguments(world, tmp_path / "out"), *more]
    assert re.search(says, refusal(capsys, train.main, settings))


load_once = lru_cache(load_vae)


@pytest.fixture(scope="session")
def mistaken(world):
    """What the mistakes point at."""
    (world / "empty").mkdir()
    write_benchmark(world / "mmvp")
    config = AutoEncoderConfig(ch=32, ch_mult=(1,) * 6, num_res_blocks=1, z_channels=4)
    save_file(AutoEncoder(config).state_dict(), world / "vae64.safetensors")


@pytest.mark.parametrize("more, says", [
    (["--seed", 1], "seed was 0, is 1"),
    (["--denoiser", "perceiver"], "denoiser was rf, is perceiver"),
    (["--lr", 3e-4], "lr was 0.0001, is 0.0003"),
    (["--accum", 1], "micro-batches of a step .* was 2, is 1"),
    (["--data", "WORLD/data/00000.tar"], "data was 60 images, .*, is 30 images"),
    (["--vae", "WORLD/tiny-clip.json"], "vae was vae.safetensors, .* is tiny-clip.json"),
])
def test_a_run_goes_on_with_its_own_settings_only(world, stub_run, capsys, more, says):
    more = [str(setting).replace("WORLD", str(world)) for setting in more]
    assert re.search(says, refusal(capsys, train_stub, world, stub_run, *more))


@pytest.mark.parametrize("denoiser", ["rf", "perceiver"])
@pytest.mark.parametrize("flags, steps", [("--steps 7", 7), ("--epochs 2", None)])
def test_a_typed_length_wins_over_the_presets(denoiser, flags, steps):
    typed = train.read_command_line(f"--preset toy --denoiser {denoiser} {flags}".split())
    assert train.make_settings(typed, 1).steps == steps


def test_a_clip_without_vision_transformer_is_refused(world, tmp_path, monkeypatch, capsys):
    clip = gh.load_clip("toy", random=True)[0]
    clip.visual = open_clip.modified_resnet.ModifiedResNet((1, 1, 1, 1), 64, 1, width=8)
    monkeypatch.setattr(train, "load_clip", lambda *_: (clip, None, None))
    line = refusal(capsys, train.main, arguments(world, tmp_path, "--stage", 1))
    assert "tiny-clip is neither a CLIP nor a SigLIP with vision transformers" in line


def test_another_kind_of_run_in_the_same_folder_is_refused(world, stub_run, capsys):
    line = refusal(capsys, train.main, arguments(world, stub_run, "--stage", "e2e"))
    assert "holds another run (stage1)" in line


def test_a_damaged_stage_1_is_no_start_for_stage_2(world, stub_run, tmp_path, capsys):
    shutil.copytree(stub_run, tmp_path / "run")
    flip_a_bit(tmp_path / "run" / "stage1" / "last.safetensors")
    line = refusal(capsys, train.main, arguments(world, tmp_path / "run", "--stage", 2))
    assert re.search("last.safetensors is damaged.*: run --stage 1 again", line)


# ---- MMVP-VLM ------------------------------------------------------------------------------------

PATTERNS = [
    "Orientation and Direction",
    "Presence",
    "State",
    "Quantity",
    "Spatial",
    "Color",
    "Structural Character",
    "Texts",
    "Caméra",
]
WORDS = "red green small heart star hollow left of big blue house with the sun two three wing open"
HEADER = "Question ID,Type,Statement"


def picture(path, rng, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise_image(rng, side, side).save(path)


def make_benchmark(folder, per=15, patterns=PATTERNS, interleaved=False):
    """A random benchmark in MMVP-VLM's layout: .jpg, .jpeg and .png, commas and quotes."""
    rng = np.random.default_rng(0)
    types = list(np.repeat(patterns, per))
    if interleaved:
        types = list(patterns) * per
    rows = [HEADER.split(",")]
    for i, pattern in enumerate(types):
        for number in (2 * i + 1, 2 * i + 2):
            suffix = (".jpg", ".jpeg", ".png")[number % 3]
            picture(folder / "MLLM_VLM Images" / pattern / f"{number}{suffix}", rng)
            statement = "a " + " ".join(rng.choice(WORDS.split(), rng.integers(2, 9)))
            if number % 5 == 0:
                statement += ', "so"'
            rows.append([number, pattern, statement])
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows):
    with open(folder / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def read_rows(folder):
    with open(folder / "Questions.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="session")
def two_clips(world):
    """The files of two random tiny CLIPs; the second one is a perturbation of the first."""
    torch.manual_seed(0)
    before = load_file(world / "tiny-clip.safetensors")
    after = dict(before)
    for name, value in before.items():
        if name.startswith("visual."):
            after[name] = value + 0.03 * torch.randn_like(value)
    torch.save(before, world / "before.pt")
    torch.save(after, world / "after.pt")
    return str(world / "before.pt"), str(world / "after.pt")


@pytest.fixture(scope="session")
def tiny(two_clips):
    """(clip, preprocess, tokenizer) of the first of the two."""
    return gh.load_clip("tiny-clip", two_clips[0])


@pytest.fixture(scope="module")
def benchmark_dir(tmp_path_factory):
    return make_benchmark(tmp_path_factory.mktemp("mmvp"), per=1)


@torch.no_grad()
def judge_as_the_script(clip, preprocess, tokenizer, folder):
    """What the benchmark's evaluate_vlm.py does, two rows at a time, but by the Type column.

    Returns {pattern: percent} and all scores.
    """
    rows = read_rows(folder)[1:]
    right = {}
    scores = []
    for i in range(0, len(rows), 2):
        numbers = [int(row[0]) for row in rows[i : i + 2]]
        pattern = rows[i][1]
        images = []
        for number in numbers:
            [file] = (folder / "MLLM_VLM Images" / pattern).glob(f"{number}.*")
            images.append(preprocess(Image.open(file)))
        picks = []
        for row in rows[i : i + 2]:
            text = tokenizer(["a photo of " + row[2]])
            image, text, scale = clip(torch.stack(images), text)[:3]
            score = (scale * text @ image.T).softmax(dim=-1)[0, 0].item()
            scores.append(score)
            picks.append("img1" if score > 0.5 else "img2")
        truth = ["img1" if number % 2 == 1 else "img2" for number in numbers]
        right.setdefault(pattern, []).append(picks == truth)
    return {name: 100 * sum(group) / len(group) for name, group in right.items()}, scores


@pytest.mark.parametrize("interleaved", [False, True])
def test_mmvp_equals_the_protocol_pair_by_pair(tiny, tmp_path, interleaved):
    folder = make_benchmark(tmp_path, interleaved=interleaved)
    expected, scores = judge_as_the_script(*tiny, folder)
    assert len(set(expected.values())) > 1  # a test of something
    result = eval_mmvp.evaluate_mmvp(*tiny, folder)
    assert result["patterns"] == expected
    assert list(result["patterns"]) == PATTERNS
    assert result["average"] == pytest.approx(sum(expected.values()) / 9, abs=1e-12)
    ours = np.array([pair["scores"] for pair in result["pairs"]])
    assert ours.ravel() == pytest.approx(scores, abs=1e-5)


def test_mmvp_gives_the_same_bits_twice(tiny, benchmark_dir):
    first = eval_mmvp.evaluate_mmvp(*tiny, benchmark_dir)
    assert eval_mmvp.evaluate_mmvp(*tiny, benchmark_dir) == first


def test_mmvp_does_not_depend_on_the_batch_size(tiny, benchmark_dir):
    first = eval_mmvp.evaluate_mmvp(*tiny, benchmark_dir)
    second = eval_mmvp.evaluate_mmvp(*tiny, benchmark_dir, batch_size=7)
    assert second["patterns"] == first["patterns"]


def test_mmvp_average_is_over_patterns_not_pairs(tiny, tmp_path):
    folder = make_benchmark(tmp_path, per=4, patterns=["A", "B"])
    write_rows(folder, read_rows(folder)[:-4])
    result = eval_mmvp.evaluate_mmvp(*tiny, folder)
    groups = eval_mmvp.by_pattern(result["pairs"])
    assert [len(group) for group in groups.values()] == [4, 2]
    assert result["average"] == pytest.approx(sum(result["patterns"].values()) / 2)


def test_mmvp_sets_eval_mode(tiny, benchmark_dir):
    clip, *preparation = tiny
    eval_mmvp.evaluate_mmvp(clip.train(), *preparation, benchmark_dir)
    assert not clip.training


def test_a_byte_order_mark_spaces_and_blank_rows_are_tolerated(tmp_path):
    folder = make_benchmark(tmp_path, per=2, patterns=["A"])
    expected = eval_mmvp.read_benchmark(folder)
    header, *lines = (folder / "Questions.csv").read_text().splitlines()
    text = "\ufeff Question ID , Type ,Statement\n" + "\n\n".join(lines) + "\n,,\n"
    (folder / "Questions.csv").write_text(text, encoding="utf-8")
    for pair, before in zip(eval_mmvp.read_benchmark(folder), expected, strict=True):
        assert pair | {"rows": None} == before | {"rows": None}


def test_the_callers_tf32_is_left_out_and_restored():
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    with eval_mmvp.exact_float32():
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
        assert not torch.is_grad_enabled()
    assert [backend.fp32_precision for backend in backends] == before
    assert torch.is_grad_enabled()


def test_features_that_are_not_finite_are_refused(two_clips, benchmark_dir):
    clip, *preparation = gh.load_clip("tiny-clip", two_clips[0])
    clip.visual.proj.data[0] = math.nan
    with pytest.raises(UserError) as error:
        eval_mmvp.evaluate_mmvp(clip, *preparation, benchmark_dir)
    assert_one_line(error, "not finite")


# How pairs can differ from the published order; each function changes the rows below the header.


def even_id_first(rows):
    return [rows[1], rows[0], *rows[2:]]


def two_types(rows):
    return [rows[0], [rows[1][0], "Presence", rows[1][2]], *rows[2:]]


def a_type_without_a_folder(rows):
    return [rows[0], [rows[1][0], "Nowhere", rows[1][2]], *rows[2:]]


def two_odd_ids(rows):
    return [rows[0], rows[2], rows[1], *rows[3:]]


def ids_1_and_4(rows):
    return [rows[0], rows[3], rows[2], rows[1], *rows[4:]]


UNUSUAL = [even_id_first, two_types, a_type_without_a_folder, two_odd_ids, ids_1_and_4]


@pytest.mark.parametrize("change", UNUSUAL)
def test_unusual_pairs_are_judged_as_the_script_does(tiny, tmp_path, change):
    folder = make_benchmark(tmp_path, per=8, patterns=["Color", "Presence"])
    header, *rows = read_rows(folder)
    write_rows(folder, [header, *change(rows)])
    expected, scores = judge_as_the_script(*tiny, folder)
    result = eval_mmvp.evaluate_mmvp(*tiny, folder)
    assert result["patterns"] == expected
    ours = np.array([pair["scores"] for pair in result["pairs"]])
    assert ours.ravel() == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("change", UNUSUAL)
def test_one_warning_covers_all_unusual_pairs(tmp_path, capsys, change):
    folder = make_benchmark(tmp_path, per=8, patterns=["Color", "Presence"])
    header, *rows = read_rows(folder)
    write_rows(folder, [header, *change(rows[:8]), *rows[8:]])
    eval_mmvp.check_benchmark(folder)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "of 16 pairs, the first in row 2," in warning


def test_the_published_order_brings_no_warning(benchmark_dir, capsys):
    eval_mmvp.check_benchmark(benchmark_dir)
    assert capsys.readouterr().err == ""


def test_any_header_will_do_as_it_does_for_the_script(tmp_path):
    folder = make_benchmark(tmp_path, per=1, patterns=["A"])
    write_rows(folder, [["Index", "Category", "Text"], *read_rows(folder)[1:]])
    assert len(eval_mmvp.read_benchmark(folder)) == 1


@pytest.fixture
def small(tmp_path):
    """A benchmark with two patterns of two pairs: ids 1 to 4 in rows 2 to 5, 5 to 8 in 6 to 9."""
    folder = make_benchmark(tmp_path / "b", per=2, patterns=["Color", "Presence"])
    eval_mmvp.check_benchmark(folder)
    return folder


def row(number, cells):
    """A change of the rows of a benchmark: another row at this number of the file."""
    return lambda rows: [*rows[: number - 1], cells, *rows[number:]]


BAD_ROWS = [
    (lambda rows: [], "Questions.csv is empty"),
    (lambda rows: rows[:1], "Questions.csv is empty"),
    (lambda rows: rows[1:], "row 1: the header is missing"),
    (lambda rows: rows[:-1], "row 8: odd number of rows: id 7 has no partner"),
    (lambda rows: rows[:4] + rows[5:], "row 4: odd number of rows: id 3 has no partner"),
    (lambda rows: rows[:3] + rows[4:], "row 4: odd number of rows: id 4 has no partner"),
    (lambda rows: rows + rows[1:3], "row 10: the pair 1, 2 is listed twice, first in row 2"),
    (lambda rows: rows + rows[2:0:-1], "row 10: the pair 2, 1 is listed twice, first in row 2"),
    (row(2, ["1", "Absence", "x"]), "row 2: image not found"),
    (row(3, ["9", "Color", "x"]), "row 3: image not found"),
    (row(4, ["3", "Color"]), "row 4: must be a number, a Type and a statement"),
    (row(4, ["3", "Color", "a cat", "sitting"]), "in quotes if it has a comma"),
    (row(4, ["3", "Color", ""]), "row 4: must be a number"),
    (row(4, ["three", "Color", "a cat"]), "row 4: must be a number"),
    (row(4, ["9" * 5000, "Color", "a cat"]), "row 4: must be a number"),
    (row(4, ["-3", "Color", "a cat"]), "row 4: must be a number"),
]


@pytest.mark.parametrize("change, says", BAD_ROWS)
def test_a_bad_table_is_one_line(small, change, says):
    write_rows(small, change(read_rows(small)))
    with pytest.raises(UserError) as error:
        eval_mmvp.check_benchmark(small)
    assert_one_line(error, small, says)


@pytest.mark.parametrize("pattern", ["../outside", "Color/../../outside", "absolute"])
def test_a_type_that_leads_out_of_the_benchmark_is_refused(small, pattern):
    shutil.copytree(small / "MLLM_VLM Images" / "Color", small / "outside")
    if pattern == "absolute":
        pattern = str(small / "outside")
    header, first, second, *rows = read_rows(small)
    pair = [[first[0], pattern, first[2]], [second[0], pattern, second[2]]]
    write_rows(small, [header, *pair, *rows])
    with pytest.raises(UserError) as error:
        eval_mmvp.check_benchmark(small)
    assert_one_line(error, "row 2", pattern, "leads out of")


def test_images_may_be_links_as_in_the_hubs_cache(small):
    image = small / "MLLM_VLM Images" / "Color" / "1.jpeg"
    image.rename(small / "blob")
    image.symlink_to(small / "blob")
    eval_mmvp.check_benchmark(small)


def remove_all(folder):
    shutil.rmtree(folder)


def remove_table(folder):
    (folder / "Questions.csv").unlink()


def spoil_table(folder):
    (folder / "Questions.csv").write_bytes(b"\xff\xfe\x00")


def unreadable_table(folder):
    remove_table(folder)
    (folder / "Questions.csv").symlink_to("/proc/self/mem")  # whose first page cannot be read


def an_image(folder):
    return folder / "MLLM_VLM Images" / "Presence" / "6.jpg"


def remove_image(folder):
    an_image(folder).unlink()


def cut_image(folder):
    an_image(folder).write_bytes(an_image(folder).read_bytes()[:200])


def text_for_an_image(folder):
    an_image(folder).write_text("no image")


def pipe_for_an_image(folder):
    remove_image(folder)
    os.mkfifo(an_image(folder))


BAD_FILES = [
    (remove_all, "Questions.csv not found: download MMVP/MMVP_VLM"),
    (remove_table, "Questions.csv not found: download MMVP/MMVP_VLM"),
    (spoil_table, "cannot be read as a CSV file in UTF-8"),
    (unreadable_table, "cannot be read as a CSV file"),
    (remove_image, "row 7: image not found"),
    (cut_image, "row 7: cannot decode the image"),
    (text_for_an_image, "row 7: cannot decode the image"),
    (pipe_for_an_image, "row 7: image not found"),
]


@pytest.mark.parametrize("spoil, says", BAD_FILES)
def test_a_bad_file_of_the_benchmark_is_one_line(small, spoil, says):
    spoil(small)
    with pytest.raises(UserError) as error:
        eval_mmvp.check_benchmark(small)
    assert_one_line(error, small, says)


def test_a_decompression_bomb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    picture(tmp_path / "1.png", np.random.default_rng(0))  # 1600 pixels
    with pytest.raises(UserError) as error:
        eval_mmvp.read_image(tmp_path / "1.png")
    assert_one_line(error, "1.png", "decompression bomb")


def test_a_pipe_for_an_image_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(UserError) as error:
        eval_mmvp.read_image(tmp_path / "1.png")
    assert_one_line(error, "1.png is not a file")


def test_images_are_plainly_converted_as_the_protocols_do(tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))  # transparent, and to be turned
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "1.png", exif=exif)
    image = eval_mmvp.read_image(tmp_path / "1.png")
    assert (image.size, image.getpixel((0, 0))) == ((2, 1), (10, 20, 30))


# ---- What is noise -------------------------------------------------------------------------------

Z2 = 1.959964**2


def test_wilson_is_its_closed_form_at_the_ends_and_in_the_middle():
    assert eval_mmvp.wilson(0, 10) == pytest.approx((0, Z2 / (10 + Z2)))
    assert eval_mmvp.wilson(10, 10) == pytest.approx((10 / (10 + Z2), 1))
    half = math.sqrt(Z2 / (10 + Z2)) / 2
    assert eval_mmvp.wilson(5, 10) == pytest.approx((0.5 - half, 0.5 + half))


NEWCOMBE = [  # Newcombe 1998, Table I: k, n, low, high
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize("k, n, low, high", NEWCOMBE)
def test_wilson_gives_the_published_values(k, n, low, high):
    assert eval_mmvp.wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_is_the_binomial_tail():
    assert eval_mmvp.mcnemar(0, 0) == 1
    assert eval_mmvp.mcnemar(3, 3) == 1
    assert eval_mmvp.mcnemar(5, 0) == eval_mmvp.mcnemar(0, 5) == 2 / 32
    assert eval_mmvp.mcnemar(8, 2) == 2 * (1 + 10 + 45) / 1024


def test_mcnemar_of_many_pairs_does_not_overflow():
    assert eval_mmvp.mcnemar(900, 0) == 2.0**-899
    z = 99 / 30  # the normal approximation, with its correction
    expected = math.erfc(z / math.sqrt(2))
    assert eval_mmvp.mcnemar(500, 400) == pytest.approx(expected, abs=2e-5)


def test_mcnemar_of_ten_thousands_is_near_the_normal_tail():
    expected = math.erfc(999 / math.sqrt(23_000) / math.sqrt(2))
    assert eval_mmvp.mcnemar(12_000, 11_000) == pytest.approx(expected, rel=0.02)


def width(interval):
    return interval[1] - interval[0]


def test_the_bootstrap_of_one_share_is_near_the_normal_interval():
    right = np.repeat([1.0, 0.0], [30, 70])
    half = 1.96 * math.sqrt(0.21 / 100)
    expected = (0.3 - half, 0.3 + half)
    assert eval_mmvp.bootstrap([right]) == pytest.approx(expected, abs=0.011)


def test_the_bootstrap_redraws_within_each_pattern():
    assert eval_mmvp.bootstrap([np.ones(50), np.zeros(50)]) == (0.5, 0.5)
    groups = [np.repeat([1.0, 0.0], [k, 15 - k]) for k in range(9)]
    spread = math.sqrt(sum(group.var() / 15 for group in groups)) / 9
    interval = eval_mmvp.bootstrap(groups)
    assert width(interval) == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert eval_mmvp.bootstrap(groups) == interval


def test_a_bound_at_no_change_is_0():
    # Pairs won and lost in patterns of 15: the lower bound's sum of shares leaves a rounding error.
    split = [(1, 0), (0, 2), (0, 0), (2, 0), (1, 0), (1, 0), (0, 0), (0, 0), (3, 0)]
    changes = [np.repeat([1.0, -1.0, 0.0], [won, lost, 15 - won - lost]) for won, lost in split]
    assert str(eval_mmvp.bootstrap(changes)[0]) == "0.0"


def test_the_bootstrap_of_a_change_is_paired():
    change = np.repeat([1.0, -1.0, 0.0], [10, 4, 86])
    interval = eval_mmvp.bootstrap([change])
    assert sum(interval) / 2 == pytest.approx(0.06, abs=0.006)
    spread = math.sqrt(0.1364 / 100)  # the variance of the difference itself
    assert width(interval) == pytest.approx(2 * 1.96 * spread, rel=0.06)


def result_of(verdicts, **outcomes):
    """A result with these verdicts, {pattern: string of 0s and 1s}, and zero-shot outcomes."""
    pairs = []
    for name, string in verdicts.items():
        for verdict in string:
            number = 2 * len(pairs) + 1
            pair = {
                "ids": (number, number + 1),
                "type": name,
                "statements": ("a", "b"),
                "images": ("1", "2"),
                "scores": (0.9, 0.1) if verdict == "1" else (0.9, 0.9),
                "correct": verdict == "1",
            }
            pairs.append(pair)
    patterns = {name: 100 * string.count("1") / len(string) for name, string in verdicts.items()}
    average = sum(patterns.values()) / len(patterns)
    outcomes = {name.replace("_", " "): np.array(values) for name, values in outcomes.items()}
    zeroshot = {name: 100 * values.mean() for name, values in outcomes.items()}
    mmvp = {"average": average, "patterns": patterns, "pairs": pairs}
    return mmvp | {"zeroshot": zeroshot, "outcomes": outcomes}


BEFORE = {"Color": "0000011111", "Text": "0011"}
AFTER = {"Color": "1111101111", "Text": "0011"}


def test_the_rows_of_patterns_and_average():
    rows = eval_mmvp.summarize({"before": result_of(BEFORE), "after": result_of(AFTER)})
    keys = ("name", "count", "change", "won", "lost", "p")
    assert [[row[key] for key in keys] for row in rows] == [
        ["Color", 10, 40, 5, 1, 2 * 7 / 64],
        ["Text", 4, 0, 0, 0, 1],
        ["average", 14, 20, 5, 1, 2 * 7 / 64],
    ]
    expected = [100 * bound for bound in eval_mmvp.wilson(5, 10)]
    assert rows[0]["before"] == {"percent": 50, "interval": expected}
    low, high = rows[2]["change_interval"]
    assert low < 20 < high


def test_the_row_of_an_accuracy_has_wilsons_interval_and_mcnemars_p():
    before = result_of(BEFORE, folder_accuracy=[1.0] * 8 + [0.0] * 2)
    after = result_of(AFTER, folder_accuracy=[1.0] * 3 + [0.0] * 7)
    row = eval_mmvp.summarize({"before": before, "after": after})[-1]
    assert (row["name"], row["count"], row["won"], row["lost"]) == ("folder accuracy", 10, 0, 5)
    assert row["p"] == 2 / 32
    expected = [100 * bound for bound in eval_mmvp.wilson(8, 10)]
    assert row["before"] == {"percent": 80, "interval": expected}
    assert row["change"] == -50


def test_a_recalls_interval_is_that_of_images_not_of_queries():
    # 100 images whose five captions are all found or all missed: 100 facts, and not 500.
    result = result_of(BEFORE, **{"coco_image_recall@5": np.repeat([1.0, 0.0], [60, 40])})
    row = eval_mmvp.summarize({"percent": result})[-1]
    spread = 100 * math.sqrt(0.6 * 0.4 / 100)
    assert width(row["percent"]["interval"]) == pytest.approx(2 * 1.96 * spread, rel=0.06)


def test_a_recalls_change_is_paired_over_images():
    shares = np.tile([0.2, 0.4, 0.6, 0.8], 100)
    better = np.where(np.arange(400) % 5 == 0, shares + 0.2, shares)
    before = result_of(BEFORE, **{"coco_image_recall@5": shares})
    after = result_of(AFTER, **{"coco_image_recall@5": better})
    row = eval_mmvp.summarize({"before": before, "after": after})[-1]
    assert row["change"] == pytest.approx(4)
    spread = 100 * 0.2 * math.sqrt(0.2 * 0.8 / 400)
    assert width(row["change_interval"]) == pytest.approx(2 * 1.96 * spread, rel=0.06)
    assert "p" not in row


# ---- Zero-shot retention -------------------------------------------------------------------------


@torch.no_grad()
def image_features(tiny, path):
    clip, preprocess, _ = tiny
    return clip.encode_image(preprocess(Image.open(path))[None], normalize=True)[0]


@torch.no_grad()
def text_features(tiny, text):
    clip, _, tokenizer = tiny
    return clip.encode_text(tokenizer([text]), normalize=True)[0]


def test_classification_equals_the_naive_one(tiny, tmp_path):
    rng = np.random.default_rng(1)
    for i in range(30):
        name = ("red_star", "moon", "big blue house")[i % 3]
        picture(tmp_path / name / f"{i}.{('png', 'jpg')[i % 2]}", rng)
    [(metric, right)] = eval_mmvp.evaluate_zeroshot(*tiny, "folder", tmp_path).items()
    classes = sorted(folder.name for folder in tmp_path.iterdir())
    prompts = [f"a photo of a {name.replace('_', ' ')}." for name in classes]
    texts = torch.stack([text_features(tiny, prompt) for prompt in prompts])
    expected = []
    for name in classes:
        for file in sorted((tmp_path / name).iterdir()):
            choice = int((texts @ image_features(tiny, file)).argmax())
            expected.append(classes[choice] == name)
    assert metric == "folder accuracy"
    assert right.tolist() == expected
    assert 0 < sum(expected) < 30


def make_imagenet(folder):
    picture(folder / "one.png", np.random.default_rng(1), 8)
    for i in range(1000):
        (folder / f"n{i:08}").mkdir()
        shutil.copy(folder / "one.png", folder / f"n{i:08}" / "a.png")


def test_imagenet_has_open_clips_names_and_templates(tmp_path):
    make_imagenet(tmp_path)
    dataset, names, templates = eval_mmvp.check_zeroshot("imagenet", tmp_path)
    assert len(dataset) == len(names) == 1000
    assert names[0] == "tench"
    assert len(templates) == 80


def test_imagenet_wants_its_1000_folders(tmp_path):
    make_imagenet(tmp_path)
    (tmp_path / "n00000007").rename(tmp_path / "tench")
    with pytest.raises(UserError) as error:
        eval_mmvp.check_zeroshot("imagenet", tmp_path)
    assert_one_line(error, "1000 class folders, n00000000 to tench", "exactly 1000 subfolders")
    shutil.rmtree(tmp_path / "tench")
    with pytest.raises(UserError) as error:
        eval_mmvp.check_zeroshot("imagenet", tmp_path)
    assert_one_line(error, "999 class folders", "exactly 1000 subfolders")


def make_cifar100(folder):
    folder = folder / "cifar-100-python"
    folder.mkdir()
    names = [f"class_{i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    pixels = np.random.default_rng(1).integers(0, 256, (20, 3072), dtype=np.uint8)
    (folder / "test").write_bytes(pickle.dumps({"data": pixels, "fine_labels": list(range(20))}))


def test_cifar100_goes_through_torchvision(tiny, tmp_path, monkeypatch):
    make_cifar100(tmp_path)
    monkeypatch.setattr(eval_mmvp.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(eval_mmvp.CIFAR100, "meta", eval_mmvp.CIFAR100.meta | {"md5": None})
    assert eval_mmvp.check_zeroshot("cifar100", tmp_path)[1][7] == "class 7"
    right = eval_mmvp.evaluate_zeroshot(*tiny, "cifar100", tmp_path)["cifar100 accuracy"]
    assert len(right) == 20


def test_cifar100_with_a_wrong_checksum_is_not_unpickled(tmp_path):
    make_cifar100(tmp_path)
    with pytest.raises(UserError) as error:
        eval_mmvp.check_zeroshot("cifar100", tmp_path)
    assert_one_line(error, "--zeroshot cifar100:", "cifar-100-python.tar.gz")


def test_sun397_goes_through_torchvision(tiny, tmp_path):
    rng = np.random.default_rng(1)
    picture(tmp_path / "SUN397" / "a" / "abbey" / "sun_1.jpg", rng)
    picture(tmp_path / "SUN397" / "a" / "apartment_building" / "outdoor" / "sun_2.jpg", rng)
    classes = "/a/abbey\n/a/apartment_building/outdoor\n"
    (tmp_path / "SUN397" / "ClassName.txt").write_text(classes)
    _, names, _ = eval_mmvp.check_zeroshot("sun397", tmp_path)
    assert names == ["abbey", "apartment building outdoor"]
    assert len(eval_mmvp.evaluate_zeroshot(*tiny, "sun397", tmp_path)["sun397 accuracy"]) == 2


def test_recall_by_hand():
    images = torch.eye(8)  # image i points along axis i, and captions 2i and 2i + 1 belong to it
    captions = torch.eye(8).repeat_interleave(2, 0)
    owner = torch.arange(8).repeat_interleave(2)
    index = torch.arange(8)
    assert eval_mmvp.finds_own(captions, images, owner, index, k=1).all()
    assert eval_mmvp.finds_own(images, captions, index, owner, k=1).all()
    captions[0] = images[1:7].sum(0) - images[0]  # sees six others before its own
    weights = torch.tensor([6.0, 5, 4, 3, 2, 1])  # caption 3: its own image, 1, is the second
    captions[3] = images[:6].sum(0) + weights @ images[:6]
    missed = (~eval_mmvp.finds_own(captions, images, owner, index)).nonzero()
    assert missed.flatten().tolist() == [0]
    missed = (~eval_mmvp.finds_own(captions, images, owner, index, k=1)).nonzero()
    assert missed.flatten().tolist() == [0, 3]
    assert eval_mmvp.finds_own(images, captions, index, owner).all()  # image 0 has caption 1 still


def make_captioned(folder, name, n=24):
    """A retrieval set in Karpathy's format; a sixth of its images are not of the test split."""
    rng = np.random.default_rng(2)
    entries = []
    for i in range(n):
        sentences = []
        for _ in range(5 + i % 2):
            sentences.append({"raw": " ".join(rng.choice(WORDS.split(), 6))})
        entry = {"filename": f"{i}.jpg", "sentences": sentences}
        entry["split"] = "test" if i % 6 else "train"
        if name == "coco":
            entry["filepath"] = "val2014"
        if i % 6:
            picture(folder / entry.get("filepath", "") / f"{i}.jpg", rng)
        entries.append(entry)
    write_captions(folder, entries, name)
    return entries


def write_captions(folder, entries, name="coco"):
    (folder / f"dataset_{name}.json").write_text(json.dumps({"images": entries}))


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_retrieval_equals_the_naive_one(tiny, tmp_path, name):
    entries = [entry for entry in make_captioned(tmp_path, name) if entry["split"] == "test"]
    images = []
    captions = []  # (index of the image, features)
    for i, entry in enumerate(entries):
        file = tmp_path / entry.get("filepath", "") / entry["filename"]
        images.append(image_features(tiny, file))
        for sentence in entry["sentences"][:5]:
            captions.append((i, text_features(tiny, sentence["raw"])))
    image_found = []  # whether a caption's own image is among the five nearest
    for i, caption in captions:
        nearer = [float(caption @ other) > float(caption @ images[i]) for other in images]
        image_found.append(sum(nearer) < 5)
    text_found = []  # whether one of an image's own captions is
    for i, image in enumerate(images):
        ranked = sorted(captions, key=lambda caption: -float(caption[1] @ image))  # noqa: B023
        text_found.append(i in [owner for owner, _ in ranked[:5]])
    outcomes = eval_mmvp.evaluate_zeroshot(*tiny, name, tmp_path, batch_size=7)
    of_image = np.array(image_found).reshape(20, 5).mean(1)
    assert outcomes[f"{name} image recall@5"] == pytest.approx(of_image)
    assert outcomes[f"{name} text recall@5"].tolist() == text_found


def test_recall_is_over_captions_where_images_have_unlike_numbers(tiny, tmp_path):
    entries = make_captioned(tmp_path, "coco", n=12)
    entries[1]["sentences"] = entries[1]["sentences"][:1]
    write_captions(tmp_path, entries)
    shares = eval_mmvp.evaluate_zeroshot(*tiny, "coco", tmp_path)["coco image recall@5"]
    hits = shares.mean() * 46  # nine images with five captions, and one with one
    assert hits == pytest.approx(round(hits))


NEEDS = [
    ("cifar10", "unknown set cifar10: choose from cifar100, sun397, imagenet"),
    ("cifar100", "cifar-100-python.tar.gz"),
    ("sun397", "SUN397.tar.gz"),
    ("folder", "one subfolder per class"),
    ("cars", "one subfolder per class"),
    ("imagenet", "exactly 1000"),
    ("coco", "dataset_coco.json"),
    ("flickr30k", "dataset_flickr30k.json"),
]


@pytest.mark.parametrize("name, says", NEEDS)
def test_zeroshot_says_what_to_put_where(tmp_path, name, says):
    for path in (tmp_path, tmp_path / "nowhere", ""):
        with pytest.raises(UserError) as error:
            eval_mmvp.check_zeroshot(name, path)
        assert_one_line(error, f"--zeroshot {name}", says)


BAD_CAPTIONS = [
    '{"images": [',
    "[]",
    "3",
    '{"images": 3}',
    '{"images": ["a"]}',
    "[" * 100_000,
    '{"images": [{"split": "train"}]}',
    '{"images": [{"split": "test", "filename": "1.jpg"}]}',
    '{"images": [{"split": "test", "filename": 1, "sentences": [{"raw": "a"}]}]}',
    '{"images": [{"split": "test", "filename": "1.jpg", "sentences": []}]}',
    '{"images": [{"split": "test", "filename": "1.jpg", "sentences": 5}]}',
    '{"images": [{"split": "test", "filename": "1.jpg", "sentences": [{"raw": 5}]}]}',
    '{"images": [{"split": "test", "filename": "1.jpg", "sentences": [{"raw": null}]}]}',
    '{"images": [{"split": "test", "filename": "1.jpg", "sentences": [{"raw": " "}]}]}',
    '{"images": [{"split": "test", "filename": "1.jpg", "sentences": [{"raw": "\\ud800"}]}]}',
    '{"images": [{"split": "test", "filename": "2.jpg", "sentences": [{"raw": "a"}]}]}',
]


@pytest.mark.parametrize("text", BAD_CAPTIONS)
def test_bad_captions_are_one_line(tmp_path, text):
    picture(tmp_path / "1.jpg", np.random.default_rng(0))
    (tmp_path / "dataset_coco.json").write_text(text)
    with pytest.raises(UserError) as error:
        eval_mmvp.check_zeroshot("coco", tmp_path)
    assert_one_line(error, "--zeroshot coco:", "PATH must be a folder with Karpathy's")


def test_a_missing_test_image_is_counted_and_named(tmp_path):
    make_captioned(tmp_path, "coco")
    (tmp_path / "val2014" / "7.jpg").unlink()
    with pytest.raises(UserError) as error:
        eval_mmvp.check_zeroshot("coco", tmp_path)
    assert_one_line(error, "1 of 20 test images missing, first", "7.jpg")


def test_a_process_that_dies_while_decoding_is_one_line(tiny, tmp_path, monkeypatch):
    clip, _, _ = tiny
    picture(tmp_path / "1.png", np.random.default_rng(0))

    def die(image):
        os._exit(1)

    monkeypatch.setattr(eval_mmvp, "MANY", 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    images = eval_mmvp.ImageFiles([tmp_path / "1.png"], die)
    with pytest.raises(UserError) as error, torch.no_grad():
        eval_mmvp.encode_images(clip, images, 4)
    assert_one_line(error, "a process that decodes images died")


# ---- The table and the picture -------------------------------------------------------------------


def test_the_table_of_one_model(capsys):
    eval_mmvp.print_table(result_of(BEFORE, folder_accuracy=[1.0] * 63 + [0.0]))
    printed = capsys.readouterr().out
    assert "before" not in printed
    assert "change" not in printed
    assert "50.0 [23.7-76.3]" in printed
    assert re.search(r"folder accuracy +64 +98.4 \[91.7-99.7\]", printed)
    assert "One pair is worth 5.00 to 12.50 % of the average" in printed


def test_the_table_of_two_models(capsys):
    before = result_of(BEFORE, folder_accuracy=[1.0] * 10)
    after = result_of(AFTER, folder_accuracy=[1.0] * 4 + [0.0] * 6)
    eval_mmvp.print_table(before, after)
    printed = capsys.readouterr().out
    color = r"Color +10 +50.0 \[23.7-76.3\] +90.0 \[59.6-98.2\] +\+40.0 +5 +1 0.219"
    assert re.search(color, printed)
    assert re.search(r"folder accuracy .* -60.0 +0 +6 0.031", printed)
    assert re.search(r"The average changed by \+20.0 \[\+\d+.\d, \+\d+.\d\]", printed)


def test_the_table_fits_into_100_columns(capsys):
    shares = np.tile([0.2, 1.0], 5000)
    names = ["Structural and Physical Characteristics", "Positional and Relational Context"]
    outcomes = {"flickr30k_image_recall@5": shares, "sun397_accuracy": np.ones(108_754)}
    before = result_of(dict.fromkeys(names, "1" * 500), **outcomes)
    after = result_of(dict.fromkeys(names, "0" * 500), **outcomes)
    eval_mmvp.print_table(before, after)
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 100


def test_control_characters_of_a_type_do_not_reach_the_terminal(capsys):
    eval_mmvp.print_table(result_of({"\x1b[31mRed\a\n": "01"}))
    printed = capsys.readouterr().out
    assert r"\x1b[31mRed\x07\n" in printed
    assert printed.replace("\n", "").isprintable()


WON = (21, 128, 61)     # green
LOST = (220, 38, 38)    # red


def test_the_picture_shows_won_and_lost_pairs_in_proportion(tmp_path):
    Image.new("RGB", (40, 40), "orange").save(tmp_path / "0.png")
    Image.new("RGB", (900, 300), "navy").save(tmp_path / "1.png")
    before = result_of({"Color": "0" * 40 + "1" * 20})
    after = result_of({"Color": "1" * 40 + "0" * 20})
    for pair in before["pairs"]:
        pair["images"] = (tmp_path / "0.png", tmp_path / "1.png")
        pair["statements"] = ("an orange square " * 9, "x")
    eval_mmvp.draw_changes(tmp_path / "many.png", before, after)
    sheet = Image.open(tmp_path / "many.png").convert("RGB")
    assert sheet.size == (4 * 440 + 20, 80 + 6 * 420)
    frames = []
    for i in range(24):
        frames.append(sheet.getpixel((16 + i % 4 * 440, 81 + i // 4 * 420)))
    assert frames == [WON] * 16 + [LOST] * 8  # 24 of the 60, in the proportion of 40 to 20


def test_the_picture_without_changes_is_its_title(tmp_path):
    result = result_of(BEFORE)
    eval_mmvp.draw_changes(tmp_path / "none.png", result, result)
    assert Image.open(tmp_path / "none.png").size[1] == 80


# ---- The command ---------------------------------------------------------------------------------


def run_eval(*arguments):
    eval_mmvp.main(["--backbone", "tiny-clip", "--device", "cpu", *map(str, arguments)])


@pytest.fixture
def comparison(two_clips, tmp_path):
    """The arguments of a whole comparison, which writes out.json and out.png into tmp_path."""
    before, after = two_clips
    rng = np.random.default_rng(1)
    for i in range(12):
        picture(tmp_path / "classes" / ("cat", "dog")[i % 2] / f"{i}.png", rng)
    folder = make_benchmark(tmp_path / "b", per=3)
    arguments = ["--benchmark", folder, "--weights", after, "--baseline", before]
    arguments += ["--zeroshot", f"folder:{tmp_path / 'classes'}"]
    arguments += ["--json", tmp_path / "out.json", "--picture", tmp_path / "out.png"]
    return arguments


def test_two_runs_of_a_command_give_the_same_bytes(comparison, tmp_path, capsys):
    outputs = []
    for _ in range(2):
        run_eval(*comparison)
        files = [(tmp_path / name).read_bytes() for name in ("out.json", "out.png")]
        outputs.append([capsys.readouterr().out, *files])
    assert outputs[0] == outputs[1]
    assert "One pair is worth 3.70 %" in outputs[0][0]
    assert Image.open(tmp_path / "out.png").format == "PNG"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["b", "classes", "out.json", "out.png"]


def test_a_clip_is_not_overwritten(comparison, capsys):
    folder, name = os.path.split(comparison[comparison.index("--weights") + 1])
    comparison[comparison.index("--json") + 1] = f"{folder}/./{name}"
    assert_command_ends_in_one_line(capsys, comparison, "is a CLIP to evaluate")


def test_a_folder_of_one_class_is_refused(comparison, tmp_path, capsys):
    comparison[comparison.index("--zeroshot") + 1] = f"folder:{tmp_path}/parent"
    (tmp_path / "parent").mkdir()
    os.rename(tmp_path / "classes", tmp_path / "parent" / "classes")
    assert_command_ends_in_one_line(capsys, comparison, "classes is the only class")


def test_large_counts_stay_apart():
    row = {"change": 0.5, "won": 12_345, "lost": 11_801, "p": 0.01}
    assert eval_mmvp.format_row(row, {}).split() == ["+0.5", "12345", "11801", "0.010"]


def test_the_json_holds_every_pairs_scores_and_verdicts(comparison, tmp_path):
    run_eval(*comparison)
    content = json.loads((tmp_path / "out.json").read_text())
    pairs = content["pairs"]
    statements = [row[2] for row in read_rows(tmp_path / "b")[1:]]
    assert [text for pair in pairs for text in pair["statements"]] == statements
    assert [number for pair in pairs for number in pair["ids"]] == list(range(1, 55))
    for model in ("before", "after"):
        for pair in pairs:
            first, second = pair[model]["scores"]
            assert pair[model]["correct"] == (first > 0.5 >= second)
        for pattern, value in content[model]["patterns"].items():
            right = [pair[model]["correct"] for pair in pairs if pair["type"] == pattern]
            assert value == pytest.approx(100 * np.mean(right))


def test_the_json_holds_the_summary_and_the_rows_beside_the_pairs(comparison, tmp_path):
    run_eval(*comparison)
    content = json.loads((tmp_path / "out.json").read_text())
    assert list(content) == ["backbone", "models", "before", "after", "rows", "pairs"]
    assert content["models"] == {"before": comparison[5], "after": comparison[3]}
    assert list(content["after"]) == ["average", "patterns", "zeroshot"]
    assert list(content["after"]["zeroshot"]) == ["folder accuracy"]
    names = [row["name"] for row in content["rows"]]
    assert names == [*PATTERNS, "average", "folder accuracy"]
    verdicts = [(p["before"]["correct"], p["after"]["correct"]) for p in content["pairs"]]
    won, lost = verdicts.count((False, True)), verdicts.count((True, False))
    assert (content["rows"][9]["won"], content["rows"][9]["lost"]) == (won, lost)
    assert won + lost > 0


def test_a_command_without_a_baseline_prints_one_model(comparison, capsys):
    run_eval(*comparison[:4])
    assert "change" not in capsys.readouterr().out


def test_the_summary_is_what_result_json_holds():
    result = result_of(BEFORE, folder_accuracy=[1.0, 0.0])
    summary = eval_mmvp.summary(result)
    assert summary["zeroshot"] == {"folder accuracy": 50}
    assert list(summary) == ["average", "patterns", "zeroshot"]


def test_the_toy_preset_draws_the_world_and_takes_its_defaults_there(monkeypatch):
    drawn = []
    monkeypatch.setattr(make_toy, "draw_world", drawn.append)
    args = eval_mmvp.parse_arguments(["--preset", "toy"])
    eval_mmvp.fill_in(args)
    world = os.path.join(HERE, "toy", "data")
    assert drawn == [world]
    assert args.backbone == "toy"
    assert args.benchmark == os.path.join(world, "mmvp")
    assert args.zeroshot == [("folder", os.path.join(world, "zeroshot"))]


def assert_command_ends_in_one_line(capsys, arguments, *words):
    with pytest.raises(SystemExit) as stop:
        run_eval(*arguments)
    forget(stop)
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.count("\n") == 1
    assert printed.startswith("eval_mmvp.py: ")
    for word in words:
        assert word in printed, printed


BAD_COMMANDS = [  # B is the benchmark
    ("", "no benchmark: download MMVP/MMVP_VLM from Hugging Face"),
    ("--benchmark nowhere", "Questions.csv not found"),
    ("--benchmark=", "--benchmark: an empty string is no value"),
    ("--benchmark B --weights=", "--weights: an empty string is no value"),
    ("--benchmark B --baseline=", "--baseline: an empty string is no value"),
    ("--benchmark B --json=", "--json: an empty string is no value"),
    ("--benchmark B --zeroshot folder", "write folder:PATH"),
    ("--benchmark B --zeroshot folder:", "write folder:PATH"),
    ("--benchmark B --zeroshot folder:a folder:b", "folder is given twice"),
    ("--benchmark B --zeroshot mnist:a", "unknown set mnist"),
    ("--benchmark B --weights nowhere.pt", "nowhere.pt"),
    ("--benchmark B --baseline nowhere.pt", "nowhere.pt"),
    ("--benchmark B --json .", "name a file"),
    ("--benchmark B --json B/Questions.csv/x.json", "cannot be written"),
    ("--benchmark B --json " + "x" * 300, "cannot be written"),
    ("--benchmark B --picture p.png", "--picture shows"),
    ("--benchmark B --batch-size 0", "--batch-size 0"),
    ("--benchmark B --batch-size 1" + "0" * 30, "must be from 1 to"),
    ("--benchmark B --batch-size many", "--batch-size: invalid int value: 'many'"),
    ("--benchmark B --device gpu7", "--device gpu7"),
    ("--benchmark B --device meta", "--device meta"),
    ("--benchmark B --device privateuseone", "--device privateuseone"),
    ("--benchmark B --backbone nonsense", "nonsense"),
    ("--benchmark B --csv scores.csv", "unrecognized arguments: --csv"),
    ("--benchmark B --preset bench", "invalid choice: 'bench'"),
]


@pytest.mark.parametrize("flags, says", BAD_COMMANDS)
def test_a_bad_command_is_one_line_before_any_model(
    two_clips, benchmark_dir, monkeypatch, capsys, flags, says
):
    monkeypatch.setattr(eval_mmvp, "load_clip", None)  # which cannot be called
    flags = flags.replace("B", str(benchmark_dir)).split()
    assert_command_ends_in_one_line(capsys, ["--weights", two_clips[1], *flags], says)


def test_an_output_that_is_a_pipe_is_refused_and_left_alone(comparison, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    flags = [*comparison, "--json", tmp_path / "pipe"]
    assert_command_ends_in_one_line(capsys, flags, "pipe cannot be written: name a file")
    assert (tmp_path / "pipe").is_fifo()


def test_baseline_original_needs_weights(benchmark_dir, capsys):
    flags = ["--benchmark", benchmark_dir, "--baseline", "original"]
    assert_command_ends_in_one_line(capsys, flags, "by --weights")


def test_json_and_picture_must_be_two_files(comparison, capsys):
    flags = [*comparison, "--json", "same", "--picture", "same"]
    assert_command_ends_in_one_line(capsys, flags, "name two files")


def test_control_characters_of_a_mistake_do_not_reach_the_terminal(small, two_clips, capsys):
    write_rows(small, row(2, ["1", "\x1b[31mRed\a\n", "x"])(read_rows(small)))
    flags = ["--weights", two_clips[1], "--benchmark", small]
    assert_command_ends_in_one_line(capsys, flags, r"\x1b[31mRed")


def test_a_mistake_in_a_decoding_process_is_one_line(comparison, tmp_path, monkeypatch, capsys):
    (tmp_path / "classes" / "cat" / "0.png").write_text("no image")
    monkeypatch.setattr(eval_mmvp, "MANY", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(eval_mmvp, "evaluate_mmvp", lambda *_: result_of({"A": "01"}))
    assert_command_ends_in_one_line(capsys, comparison, "cannot decode the image", "0.png")


def test_a_batch_that_does_not_fit_is_one_line(comparison, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")

    monkeypatch.setattr(eval_mmvp, "evaluate", fail)
    assert_command_ends_in_one_line(capsys, comparison, "choose a smaller --batch-size")


TORCH = os.path.dirname(torch.__file__)
READS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
# Operators whose results have a size that only the values tell:
SIZED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
ASKS = {"_local_scalar_dense", "equal"}  # item, int, float, bool, torch.equal


class Operators(TorchDispatchMode):
    """Notes operators that would wait for a GPU. What they read of `host` lies on the CPU there."""

    def __init__(self, waits, host):
        super().__init__()
        self.waits = waits
        self.host = host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ASKS or (name in SIZED_BY_VALUES and not self.is_host(args[0])):
            self.waits.append(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                self.waits.append(f"{name} by a mask")
        if name == "lift_fresh":
            self.waits.append("a tensor of Python's numbers")
        return func(*args, **(kwargs or {}))

    def is_host(self, tensor):
        storage = tensor.untyped_storage().data_ptr()
        return storage in [mask.untyped_storage().data_ptr() for mask in self.host]


class Calls(TorchFunctionMode):
    """Notes copies from and to the host that would wait, which on a CPU are no operators."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ours = not sys._getframe(1).f_code.co_filename.startswith(TORCH)
        if func in READS:
            self.waits.append(func.__name__)
        places = [*args[1:], kwargs.get("device")] if func is torch.Tensor.to else []
        copies = any(isinstance(place, (torch.device, str, torch.Tensor)) for place in places)
        if copies and ours and not kwargs.get("non_blocking"):
            self.waits.append("to(device)")
        return func(*args, **kwargs)


class Watched(Exception):
    pass


def waits_of_a_step(world, out, monkeypatch, *more):
    """Train for one step and list all by which the loop, from its images on, would wait."""
    waits, host = [], []
    load_batches, sample_masks = train.load_batches, gh.sample_masks
    watching = ExitStack()

    def load_then_watch(*args):
        batches = list(load_batches(*args))
        watching.enter_context(Calls(waits))
        watching.enter_context(Operators(waits, host))
        return iter(batches)

    def stop_watching(*args):  # the loop asks what is due after the optimizer's step
        watching.close()
        raise Watched

    def sample_on_the_host(*args, device=None):
        mask = sample_masks(*args, device=device)
        if device is None:
            host.append(mask)
        return mask

    monkeypatch.setattr(train, "load_batches", load_then_watch)
    monkeypatch.setattr(train, "is_due", stop_watching)
    monkeypatch.setattr(gh, "sample_masks", sample_on_the_host)
    with pytest.raises(Watched):
        train.run(arguments(world, out, *more))
    return waits


@pytest.mark.parametrize("denoiser", ["rf", "perceiver"])
@pytest.mark.parametrize("stage", [1, "e2e"])  # the latter is stage 2 without a stage 1 before it
@pytest.mark.parametrize("more", [[], ["--local-ratio", 0.5, "--shuffle-target"]])
def test_the_loop_never_waits_for_the_device(world, tmp_path, monkeypatch, denoiser, stage, more):
    options = ("--denoiser", denoiser, "--stage", stage, *more)
    assert waits_of_a_step(world, tmp_path, monkeypatch, *options) == []


@pytest.mark.parametrize("wait", [
    lambda losses: losses.mean().item(),
    lambda losses: losses[losses > 0],
    lambda losses: losses.nonzero(),
    lambda losses: losses.to("cpu"),
    lambda losses: torch.tensor([1.0]),
])
def test_a_wait_in_the_loop_is_noticed(world, tmp_path, monkeypatch, wait):
    def wait_for(log, losses, levels, skipped):
        wait(losses)

    monkeypatch.setattr(train.Log, "add", wait_for)
    assert waits_of_a_step(world, tmp_path, monkeypatch, "--stage", 1)


MAKE_TOY = os.path.join(HERE, "toy", "make_toy.py")
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


def first_images(part, number=40):
    return [pixels.tobytes() for pixels, _ in make_toy.draw_part(part, range(number))]


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
    for part, digest in known.items():
        images = b"".join(first_images(part, 20))
        assert hashlib.sha256(images).hexdigest()[:16] == digest, part


def test_a_toy_image_does_not_depend_on_how_many_are_drawn():
    [(alone, scene)] = make_toy.draw_part(make_toy.UNLABELLED, [7])
    *_, (last, same_scene) = make_toy.draw_part(make_toy.UNLABELLED, range(8))
    assert scene == same_scene
    assert np.array_equal(alone, last)


def test_no_two_parts_of_the_toy_world_share_an_image():
    parts = ("CAPTIONED", "UNLABELLED", "ZEROSHOT_DEV", "DEV", "TEST", "ZEROSHOT")
    seeds = [getattr(make_toy, part) for part in parts]
    images = [image for seed in seeds for image in first_images(seed)]
    assert len(set(images)) == len(images) == 40 * len(parts)


def test_training_and_held_out_images_of_the_toy_are_different(tiny_world):
    train = read_tar(tiny_world / "train" / "00000.tar")
    val = read_tar(tiny_world / "val" / "00000.tar")
    images = [data for name, data in train + val if name.endswith(".jpg")]
    assert len(set(images)) == len(images) == 5 + 3


def read_tar(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def test_toy_shards_are_laid_out_as_img2dataset_lays_them_out(tmp_path):
    for _ in make_toy.write_shards(tmp_path / "train", range(5), per_shard=2):
        pass
    shards = sorted(os.listdir(tmp_path / "train"))
    assert shards == ["00000.tar", "00001.tar", "00002.tar"]
    (name, image), (_, text), (_, about) = read_tar(tmp_path / "train" / "00002.tar")
    assert name == "000020000.jpg"
    assert Image.open(io.BytesIO(image)).size == (40, 40)
    assert text == b""
    assert json.loads(about)["key"] == "000020000"


def test_the_toy_benchmark_has_the_layout_of_mmvp_vlm(tiny_world):
    rows = read_questions(tiny_world)
    assert [row["Question ID"] for row in rows] == [str(n) for n in range(1, 19)]
    assert [row["Type"] for row in rows[::2]] == list(make_toy.PATTERNS)
    for row in rows:
        pattern, number = row["Type"], row["Question ID"]
        image = tiny_world / "mmvp" / "MLLM_VLM Images" / pattern / f"{number}.jpg"
        assert Image.open(image).size == (40, 40)
    eval_mmvp.check_benchmark(tiny_world / "mmvp")


def read_questions(folder):
    with open(folder / "mmvp" / "Questions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_statements_of_a_toy_pair_differ_in_their_pattern_only(tiny_world):
    rows = read_questions(tiny_world)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        _, values, _ = make_toy.PATTERNS[first["Type"]]
        category = [word for word in make_toy.CATEGORIES if word in first["Statement"].split()]
        assert len(category) == 1
        assert category[0] in second["Statement"].split()
        said = [[v for v in values if v in row["Statement"]] for row in (first, second)]
        assert len(said[0]) == len(said[1]) == 1
        assert said[0] != said[1]


def test_the_images_of_a_toy_pair_differ_in_one_attribute(monkeypatch):
    drawn = []

    def draw(scene, rng):
        drawn.append(scene)
        return np.zeros((40, 40, 3), dtype=np.uint8)

    monkeypatch.setattr(make_toy, "draw", draw)
    for k, (attribute, _, _) in enumerate(make_toy.PATTERNS.values()):
        make_toy.draw_pair((make_toy.DEV, k, 0))
        first, second = drawn[-2:]
        assert [name for name in first if first[name] != second[name]] == [attribute]


def test_the_same_toy_world_is_drawn_twice(tiny_world, tmp_path):
    make_toy.draw_world(tmp_path / "again", **TINY_WORLD)
    again = digests(tmp_path / "again")
    assert again == digests(tiny_world)
    assert len(again) == 2 + 2 * (18 + 1) + 2 * 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_toy_world_is_drawn_whole_or_not_at_all(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(make_toy, "write_classes", fail)
    with pytest.raises((KeyboardInterrupt, UserError)):
        make_toy.draw_world(tmp_path / "data", **TINY_WORLD)
    assert os.listdir(tmp_path) == []


def test_a_toy_world_that_is_there_is_left_alone(tiny_world, monkeypatch):
    monkeypatch.setattr(make_toy, "write_shards", None)
    before = digests(tiny_world)
    make_toy.draw_world(tiny_world)
    assert digests(tiny_world) == before


def test_a_folder_that_is_no_toy_world_is_not_taken_for_one(tmp_path):
    with pytest.raises(UserError) as error:
        make_toy.draw_world(tmp_path)
    assert_one_line(error, tmp_path, "train/", "move it away")


def test_statements_of_the_toy_are_english():
    attributes = [("state", "hollow"), ("colour", "red"), ("orientation", "left")]
    assert make_toy.describe("star", *attributes) == "a red hollow star pointing left"
    assert make_toy.describe("star", ("colour", "orange")) == "an orange star"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["clip", "--steps", "0"], ["--steps", "at least 1"]),
        (["clip", "--seed", "-1"], ["--seed"]),
        (["--out", ""], ["--out", "empty"]),
        (["vea"], ["vea", "vae"]),
    ],
)
def test_a_usage_mistake_of_make_toy_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        make_toy.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("make_toy.py: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_make_toy_notices_before_training_that_it_cannot_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(make_toy, "train_vae", None)
    with pytest.raises(SystemExit):
        make_toy.main(["vae", "--out", str(tmp_path / "file")])
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("what, load", [("vae", load_vae), ("vqgan", vqgan_file.load_vqgan)])
def test_make_toy_writes_autoencoders_that_load(what, load, tmp_path, monkeypatch):
    images = torch.randint(256, (8, 3, 40, 40), dtype=torch.uint8)
    monkeypatch.setattr(make_toy, "unlabelled", lambda: (images, images))
    make_toy.main([what, "--steps", "2", "--out", str(tmp_path)])
    assert os.listdir(tmp_path) == [f"{what}.safetensors"]
    load(tmp_path / f"{what}.safetensors")


def point(zeroshot, pairs, **more):
    return {"zeroshot": zeroshot, "pairs": pairs, "margin": pairs / 10} | more


# Retentions 1, .985, .96 and .975; pairs +0, +3, +8 and +9.
CURVE = [point(80, 50), point(78.8, 53), point(76.8, 58), point(78, 59)]


def test_gain_at_the_end_is_the_last_point_against_the_first():
    assert ablate.gain(CURVE, ablate.AFTER) == 9
    assert ablate.gain(CURVE, ablate.KEPT) == -2
    assert ablate.gain(CURVE, "margin at the end") == pytest.approx(0.9)


def test_gain_at_equal_retention_is_the_area_under_the_curve():
    # Piecewise linear: +2 at .99, +3 at .985, +6 at .97. A later rise of the retention is ignored.
    area = 0.005 * (2 + 3) / 2 + 0.015 * (3 + 6) / 2
    assert ablate.gain(CURVE, ablate.EQUAL) == pytest.approx(area / 0.02, abs=1e-9)
    assert ablate.gain(CURVE, ablate.EQUAL, low=0.985) == pytest.approx(2.5, abs=1e-9)


def test_gain_at_equal_retention_is_unknown_where_the_curve_ends_above():
    assert math.isnan(ablate.gain(CURVE[:2], ablate.EQUAL))
    assert math.isfinite(ablate.gain(CURVE[:2], ablate.EQUAL, low=0.985))


def test_residual_is_what_neither_arm_nor_clip_explains():
    table = np.random.default_rng(0).normal(size=(5, 3))
    values = {}
    for (i, j), number in np.ndenumerate(table):
        values[f"arm {i}", f"clip {j}"] = number + 10 * i + 100 * j
    deviation, freedom = ablate.residual(values)
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert freedom == 8
    assert deviation == pytest.approx(math.sqrt((rest**2).sum() / 8))


def test_residual_leaves_out_what_is_unknown():
    values = {("a", "0"): 1.0, ("a", "1"): 2.0, ("b", "0"): 4.0, ("b", "1"): math.nan}
    assert ablate.residual(values)[1] == 0
    assert ablate.residual({})[1] == 0


def test_residual_of_two_arms_is_that_of_their_paired_differences():
    first, second = np.random.default_rng(1).normal(size=(2, 6))
    values = {("a", str(i)): x for i, x in enumerate(first)}
    values |= {("b", str(i)): x for i, x in enumerate(second)}
    deviation, freedom = ablate.residual(values)
    assert freedom == 5
    assert deviation * math.sqrt(2) == pytest.approx(np.std(first - second, ddof=1))


STUDENT = [  # degrees of freedom, |t|, looks, the two-sided p: tables, and closed forms of 1 and 2
    (1, 12.706, 1, 0.05),
    (2, 4.303, 1, 0.05),
    (5, 2.571, 1, 0.05),
    (10, 2.228, 1, 0.05),
    (30, 2.042, 1, 0.05),
    (10, 2.634, 2, 0.05),
    (10, 0.0, 2, 1.0),
    (2, 4.0, 1, 1 - 4 / math.sqrt(2 + 16)),
    (1, -4.0, 1, 1 - 2 * math.atan(4) / math.pi),
]


@pytest.mark.parametrize(("freedom", "t", "looks", "p"), STUDENT)
def test_intervals_and_p_are_students(freedom, t, looks, p):
    x = ablate.Difference(1 + 2 * t, 2.0, freedom, clips=3, effect=0.0, looks=looks)
    assert x.p(1) == pytest.approx(p, rel=2e-3)
    if p == 0.05:
        assert x.half == pytest.approx(2 * t, rel=3e-4)


def test_there_is_no_interval_without_degrees_of_freedom():
    assert math.isnan(ablate.half_width(1.0, 0))


NONE = math.nan
VERDICTS = [
    (ablate.WORSE, 0.1, 1.1, 2.0, "reproduces", 0),
    (ablate.WORSE, 0.1, 0.7, 2.0, "smaller than the paper's", 0),
    (ablate.WORSE, 0.5, 0.9, 2.0, "smaller than the paper's", 1),
    (ablate.WORSE, 0.1, 0.9, NONE, "reproduces", 0),
    (ablate.WORSE, -2.0, -0.1, 2.0, "opposite", 0),
    (ablate.WORSE, -0.1, 0.9, 2.0, "excluded", 1),
    (ablate.WORSE, -0.1, 1.1, 2.0, "cannot tell", None),
    (ablate.WORSE, -0.1, 0.9, NONE, "excluded", 1),
    (ablate.WORSE, -0.1, 1.1, NONE, "cannot tell", None),
    (ablate.BETTER, 0.2, 1.4, 1.8, "reproduces", 0),
    (ablate.AS_WELL, -0.9, 0.8, NONE, "reproduces", -1),
    (ablate.AS_WELL, 1.1, 3.0, NONE, "excluded", 1),
    (ablate.AS_WELL, -3.0, -1.1, NONE, "excluded", -1),
    (ablate.AS_WELL, -1.1, 0.5, NONE, "cannot tell", None),
    (ablate.AS_WELL, 0.2, 1.1, NONE, "cannot tell", None),
    (ablate.NO_BETTER, -3.0, 0.9, NONE, "reproduces", 1),
    (ablate.NO_BETTER, 0.1, 0.9, NONE, "reproduces", 1),
    (ablate.NO_BETTER, 0.1, 1.1, NONE, "opposite", 0),
    (ablate.NO_BETTER, -0.1, 1.1, NONE, "cannot tell", None),
    (ablate.WORSE, NONE, NONE, 2.0, "cannot tell", None),
    (ablate.BETTER, NONE, NONE, 2.0, "cannot tell", None),
    (ablate.AS_WELL, NONE, NONE, 2.0, "cannot tell", None),
    (ablate.NO_BETTER, NONE, NONE, 2.0, "cannot tell", None),
]


@pytest.mark.parametrize(("expected", "low", "high", "effect", "verdict", "bound"), VERDICTS)
def test_verdicts(expected, low, high, effect, verdict, bound):
    said, ruled_out = ablate.judge(expected, low, high, effect)
    assert said == verdict
    assert (None if math.isnan(ruled_out) else ruled_out) == bound


def test_holm_goes_down_from_the_smallest_p():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}  # .0125, .0167, .025
    assert ablate.holm(p) == {"a", "d"}
    assert ablate.holm({"a": 0.03, "b": 0.026}) == set()
    assert ablate.holm({"a": 0.04, "b": 0.02}) == {"a", "b"}


def made_up_curves(seed=0):
    """Curves of all arms, which pass through retentions of about .99, .96 and .9."""
    rng = np.random.default_rng(seed)
    curves = {}
    for arm in ablate.ARMS.values():
        for clip in arm.clips:
            curve = [point(98.0, 50.0)]
            for kept, gained in ((0.99, 4), (0.96, 8), (0.9, 11)):
                kept += 0.004 * rng.normal()
                curve.append(point(98 * kept, 50 + gained + 0.5 * rng.normal()))
            curves[arm.name, clip] = curve
    return curves


def test_an_arm_is_compared_on_the_same_clips_with_the_noise_of_its_family():
    curves = made_up_curves()
    arm = ablate.ARMS["s = .1"]
    x = ablate.compare(curves, arm, ablate.AFTER)
    gains = {key: curve[-1]["pairs"] - curve[0]["pairs"] for key, curve in curves.items()}
    assert x.mean == pytest.approx(np.mean([gains["s = .1", c] - gains["rf", c] for c in "012"]))
    family = [
        name for name, other in ablate.ARMS.items()
        if "perceiver" not in other.flags and name not in ablate.APART]
    mine = {key: gain for key, gain in gains.items() if key[0] in family}
    deviation, freedom = ablate.residual(mine)
    assert x.error == pytest.approx(deviation * math.sqrt(2 / 3))
    assert (x.freedom, x.clips) == (freedom, 3)
    assert x.effect == pytest.approx(arm.share * np.mean([gains["rf", c] for c in "012"]))
    lost = {
        key: curve[-1]["zeroshot"] - curve[0]["zeroshot"]
        for key, curve in curves.items() if key[0] in family}
    x = ablate.compare(curves, arm, ablate.KEPT)
    assert x.error == pytest.approx(ablate.residual(lost)[0] * math.sqrt(2 / 3))


def test_an_arm_is_compared_with_the_other_family_by_its_own_spread():
    curves = made_up_curves()
    x = ablate.compare(curves, ablate.ARMS["perceiver"], ablate.AFTER)
    differences = [
        curves["perceiver", c][-1]["pairs"] - curves["rf", c][-1]["pairs"] for c in "012345"]
    assert x.freedom == 5
    assert x.error == pytest.approx(np.std(differences, ddof=1) / math.sqrt(6))


def test_curves_are_compared_over_the_retentions_that_all_reach():
    curves = made_up_curves()
    for clip in "012":
        curves["s = 5", clip] = [point(100, 50), point(99, 54), point(97.5, 56)]
        curves["rf", clip] = [point(100, 50), point(99, 53), point(96, 53)]
    x = ablate.compare(curves, ablate.ARMS["s = 5"], ablate.EQUAL)
    assert x.mean == pytest.approx(((4 + 6) / 2) - 3, abs=1e-6)  # from .99 to .975
    for clip in "012":  # the other way round
        curves["s = 5", clip], curves["rf", clip] = curves["rf", clip], curves["s = 5", clip]
    x = ablate.compare(curves, ablate.ARMS["s = 5"], ablate.EQUAL)
    assert x.mean == pytest.approx(3 - (4 + 6) / 2, abs=1e-6)
    for clip in "012":
        curves["s = 5", clip] = [point(100, 50), point(98.5, 56)]
    assert ablate.compare(curves, ablate.ARMS["s = 5"], ablate.EQUAL) is None
    assert ablate.compare(curves, ablate.ARMS["s = 5"], ablate.AFTER) is not None


def test_shares_of_table_4_are_means_over_its_backbones():
    assert ablate.table4(12.6, 9.6, 8.2) == pytest.approx(1)
    assert ablate.ARMS["uniform t"].share == pytest.approx(0.87, abs=0.005)
    assert ablate.ARMS["s = 10"].share == pytest.approx(1.05, abs=0.005)


def test_every_arm_but_the_references_carries_a_claim():
    claims = [arm for arm in ablate.ARMS.values() if arm.expected]
    assert len(claims) == 22
    for arm in claims:
        reference = ablate.ARMS[arm.reference]
        assert set(arm.clips) <= set(reference.clips)
        assert arm.name == "direct" or arm.rate == reference.rate == 4e-4


def write_cells(folder, curves):
    """The cells' files of these curves."""
    files = []
    for clip in dict.fromkeys(clip for _, clip in curves):
        own = {key: curve for key, curve in curves.items() if key[1] == clip}
        own["original", clip] = [next(iter(own.values()))[0]]
        for (arm, _), curve in reversed(own.items()):  # the original first
            points = []
            for step, values in enumerate(curve if arm == "original" else curve[1:]):
                about = {"arm": arm, "clip": clip, "step": step}
                if arm != "original":
                    about |= {"rate": 4e-4, "precision": "fp32", "heldout": "0.6712"}
                points.append(about | values)
            files.append(folder / f"{len(files)}.json")
            files[-1].write_text(json.dumps(points))
    return files


def test_the_csv_holds_all_that_the_cells_hold(tmp_path):
    curves = made_up_curves()
    path = tmp_path / "ablation.csv"
    ablate.write_csv(path, write_cells(tmp_path, curves))
    read = ablate.read_csv(path)
    assert read.keys() == curves.keys()
    for key, curve in curves.items():
        for before, after in zip(curve, read[key], strict=True):
            assert before == {name: after[name] for name in before}
    first = next(iter(read.values()))
    assert (first[-1]["rate"], first[-1]["precision"]) == ("0.0004", "fp32")


def test_the_report_needs_nothing_but_the_csv(tmp_path, capsys):
    ablate.write_csv(tmp_path / "ablation.csv", write_cells(tmp_path, made_up_curves()))
    alone = tmp_path / "alone"
    alone.mkdir()
    os.rename(tmp_path / "ablation.csv", alone / "ablation.csv")
    ablate.main(["--report", str(alone / "ablation.csv")])
    printed = capsys.readouterr().out
    for arm in ablate.ARMS.values():
        assert f"| {arm.name} |" in printed
    assert "of 22 claims are decided" in printed
    picture = (alone / "ablation.svg").read_text()
    assert "zero-shot accuracy kept" in picture
    assert ">97<" in picture

    ablate.main(["--report", str(alone / "ablation.csv")])
    assert capsys.readouterr().out == printed
    assert (alone / "ablation.svg").read_text() == picture


def cells(line):
    """The cells of a table's line, sorted: the README has P at another place."""
    return sorted(cell.strip() for cell in line.split("|"))


def test_the_committed_grid_gives_the_readmes_verdicts_and_the_committed_figure(tmp_path, capsys):
    shutil.copy(os.path.join(ablate.HERE, "ablation.csv"), tmp_path)
    ablate.main(["--report", str(tmp_path / "ablation.csv")])
    claims, end = capsys.readouterr().out.split("\n\n")[-3:-1]
    assert "15 of 22 claims are decided" in end
    assert "By chance 0.9 intervals" in end
    with open(os.path.join(ablate.HERE, "README.md")) as file:
        readme = [cells(line) for line in file]
    for line in claims.strip().splitlines()[2:]:
        assert cells(line) in readme, line
    with open(os.path.join(ablate.HERE, "ablation.svg")) as file:
        assert (tmp_path / "ablation.svg").read_text() == file.read()


def test_the_report_bears_a_grid_of_one_clip_and_one_arm(tmp_path, capsys):
    curves = {key: curve for key, curve in made_up_curves().items() if key == ("rf", "0")}
    ablate.write_csv(tmp_path / "ablation.csv", write_cells(tmp_path, curves))
    ablate.main(["--report", str(tmp_path / "ablation.csv")])
    assert "nan" not in (tmp_path / "ablation.svg").read_text()


def test_nothing_runs_off_the_figure(tmp_path):
    ablate.draw(made_up_curves(), tmp_path / "ablation.svg")
    root = ElementTree.parse(tmp_path / "ablation.svg").getroot()
    width, height = [float(x) for x in root.get("viewBox").split()[2:]]
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        words = path.get("d").replace("M", " ").replace("L", " ").split()
        for word in words:
            for number in word.replace("H", " ").replace("V", " ").split():
                assert 0 <= float(number) <= max(width, height)
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 < float(text.get("x")) < width
        assert 0 < float(text.get("y")) < height


def test_the_figures_colours_stand_out_from_its_page():
    def luminance(colour):
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    assert 'fill="#ffffff"' in ablate.SVG  # the page is part of the picture
    for colour in ablate.COLOURS.values():
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5
        assert (luminance("#e3ebf5") + 0.05) / (luminance(colour) + 0.05) >= 4.5


def test_a_missing_csv_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        ablate.main(["--report", str(tmp_path / "none.csv")])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_two_grids_in_a_folder_are_refused(tmp_path, capsys):
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    (tmp_path / "quick").mkdir()
    words = [sys.executable, "-c", holder + "print('held', flush=True); input()"]
    other = subprocess.Popen(
        [*words, tmp_path / "quick" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(SystemExit):
        ablate.main(["--quick", "--out", str(tmp_path)])
    other.communicate(b"\n")
    assert "in use by another grid" in capsys.readouterr().err


def fake_call(made):
    """What stands in for train.py and make_toy.py: it notes the command and makes its file."""
    def call(words, log):
        made.append(words)
        if "--out" not in words:
            return
        folder = words[words.index("--out") + 1]
        file = "clip.safetensors"
        if "--stage" in words and words[words.index("--stage") + 1] == "1":
            file = "stage1/last.safetensors"
        os.makedirs(os.path.dirname(f"{folder}/{file}"), exist_ok=True)
        open(f"{folder}/{file}", "w").close()

    return call


def fake_score(scored):
    def score_cell(test, path, arm, clip, files):
        scored.append((arm, clip))
        points = [point(98.0, 50.0, arm=arm, clip=clip, step=0)]
        with open(path, "w") as file:
            json.dump(points, file)

    return score_cell


@pytest.fixture
def faked(monkeypatch):
    """run_grid without any training: the commands and the scored cells are noted."""
    made, scored = [], []
    monkeypatch.setattr(ablate, "call", fake_call(made))
    monkeypatch.setattr(ablate, "score_cell", fake_score(scored))
    monkeypatch.setattr(ablate, "load_test", lambda out, plan: None)
    threads = torch.get_num_threads()
    yield made, scored
    torch.set_num_threads(threads)


def test_the_grid_runs_each_cell_once_and_goes_on(tmp_path, faked):
    made, scored = faked
    ablate.run_grid(str(tmp_path), ablate.FULL, 1)
    trained = [words for words in made if "train.py" in words]
    cells = [(arm.name, clip) for arm in ablate.ARMS.values() for clip in arm.clips]
    last = [words for words in trained if words[words.index("--stage") + 1] != "1"]
    assert len(last) == len(cells)
    assert sorted(scored) == sorted(cells + [("original", clip) for clip in (*"012345", "full")])
    clips = [words for words in made if "clip" in words]
    assert len(clips) == 6  # CLIP 0 is committed
    [frozen] = [" ".join(w) for w in last if f"{tmp_path}/clip-0/frozen" in w]
    assert f"{tmp_path}/clip-0/rf/stage1/last.safetensors" in frozen  # it shares rf's stage 1
    assert "--stage 2 --steps 240 --export-every 40 --lr-clip 0.0004" in frozen
    assert all("--init" not in words for words in last if "e2e" in words)
    before = (tmp_path / "ablation.csv").read_text()

    made.clear()
    scored.clear()
    os.remove(tmp_path / "clip-2" / "frozen.json")
    os.remove(tmp_path / "clip-2" / "frozen" / "clip.safetensors")
    ablate.run_grid(str(tmp_path), ablate.FULL | {"arms": ("rf", "frozen")}, 1)
    assert (tmp_path / "ablation.csv").read_text() == before  # with the cells of other arms
    assert [words for words in made if "--out" in words] == [
        words for words in trained if str(tmp_path / "clip-2" / "frozen") in words]
    assert scored == [("frozen", "2")]


def test_a_command_that_fails_names_its_log(tmp_path):
    with pytest.raises(UserError, match="world.log"):
        ablate.call(["-c", "raise SystemExit('no room')"], str(tmp_path / "world.log"))
    assert "no room" in (tmp_path / "world.log").read_text()


def test_after_an_error_no_further_run_begins():
    seen, all_began = [], threading.Event()

    def function(task):
        seen.append(task)
        if task == 0:
            all_began.wait(1)  # a long run, beside which another one fails
        if task == 1:
            raise UserError("no")
        time.sleep(0.01)
        if len(seen) == 50:
            all_began.set()

    with pytest.raises(UserError):
        ablate.run_missing("tasks", function, {f"no file {k}": (k,) for k in range(50)}, 2)
    assert len(seen) < 50


@pytest.fixture(scope="session")
def small_test(tmp_path_factory):
    """The test of a tiny grid, in a folder and in memory."""
    folder = tmp_path_factory.mktemp("grid")
    test = ablate.load_test(str(folder), {"pairs": 4, "images": 60})
    return folder / "test", test


def test_scores_are_those_of_the_evaluation(small_test):
    folder, test = small_test
    clip, preprocess, tokenizer = load_clip("toy")
    tasks = [("folder", str(folder / "zeroshot"))]
    truth = eval_mmvp.evaluate(clip, preprocess, tokenizer, str(folder / "mmvp"), tasks)
    point = ablate.score(test, os.path.join(ablate.HERE, "clip.safetensors"))
    assert point["pairs"] == pytest.approx(truth["average"])
    assert point["zeroshot"] == pytest.approx(truth["zeroshot"]["folder accuracy"])
    margins = []
    for pair in truth["pairs"]:
        first, second = [math.log(score / (1 - score)) for score in pair["scores"]]
        margins.append(max(-4, min(4, first, -second)))
    assert point["margin"] == pytest.approx(np.mean(margins), abs=1e-3)


def test_the_test_is_drawn_once(small_test, monkeypatch):
    folder, _ = small_test
    monkeypatch.setattr(ablate, "write_benchmark", None)
    before = os.stat(folder / "mmvp" / "Questions.csv").st_mtime_ns
    ablate.load_test(str(folder.parent), {"pairs": 4, "images": 60})
    assert os.stat(folder / "mmvp" / "Questions.csv").st_mtime_ns == before


def test_nothing_else_draws_the_tests_images():
    own = {ablate.PAIR_SEED, ablate.IMAGE_SEED}
    worlds = {value for value in vars(make_toy).values() if type(value) is int}
    assert len(own) == 2
    assert not own & worlds
    assert not own & {101, 102, 103}  # of the first grid
