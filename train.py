"""Train GenHancer: stage 1 (CLIP frozen), stage 2 (LoRA on CLIP), both in turn, or end to end.

    torchrun --nproc_per_node 8 train.py --stage 1 --denoiser rf
    torchrun --nproc_per_node 8 train.py --stage 2 --denoiser rf
    python train.py --preset toy        # everything in miniature on a laptop, nothing to download

The same command resumes a run that was stopped or killed. The order of the images and all random
draws follow from (seed, step, slot), where slot = micro * WORLD + RANK numbers a step's
micro-batches. So on a CPU, with as many processes and threads, the run ends in the same bits.
"""
import argparse
import contextlib
import csv
import datetime
import gc
import glob
import io
import math
import os
import sys
import tarfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep, not spin

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from eval_mmvp import (
    BACKBONES,
    IMAGE_FORMATS,
    OPEN_CLIP_WEIGHTS,
    TOY,
    check_benchmark,
    check_export,
    check_zeroshot,
    evaluate,
    export_hf,
    export_open_clip,
    find_backbone,
    how_to_open,
    load_clip,
    make_tokenizer,
    print_table,
    summary,
)
from genhancer import (
    Continuous,
    Discrete,
    Flux,
    FluxConfig,
    Parser,
    Perceiver,
    PerceiverConfig,
    UserError,
    checksum,
    image_side,
    inject_lora,
    load_strictly,
    merge_lora,
    nonempty,
    number,
    read_json,
    read_weights,
    run_command,
    start_method,
    write_file,
    write_json,
    write_weights,
)
from vae import AutoEncoder, AutoEncoderConfig, load_vae
from vqgan import VQGAN, VQGANConfig, load_vqgan

# torchrun sets all of these; a RANK or WORLD_SIZE alone was left behind by something else.
LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0


# ------------------------------------------------------------------------------------ settings

COUNT = number(int, 1, 10**9)
FEW = number(int, 1, 1024)
SIZE = number(int, 1, 2**14)
ABOVE_0 = sys.float_info.min  # the least of the ordinary positive numbers
RATE = number(float, ABOVE_0)


def make_parser():
    """The command line. Its defaults are the paper's for stage 1 (Sec. 5.1, App. B) and, where it
    is silent, the official code's; OVERRIDES says where others hold."""
    parser = Parser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run(adder(parser, "what is run, on what"))
    add_training(adder(parser, "how it is trained"))
    add_method(adder(parser, "the method and its ablations"))
    return parser


def adder(parser, title):
    """A function that adds an option to a group of this title; its help shows the default."""
    group = parser.add_argument_group(title)

    def add(flag, default, help, **form):
        nothing = default is None or default is False or default == []
        shown = "" if nothing else " (default: %(default)s)"
        group.add_argument(f"--{flag}", default=default, help=help + shown, **form)

    return add


SWITCH = dict(default=False, action="store_true")


def add_run(add):
    add("preset", "paper", "which set of defaults", choices=["paper", "toy", "bench"])
    add("stage", None, "all: 1, 2, and the benchmark (default: all; bench: 1)",
        choices=["1", "2", "e2e", "all"])
    add("denoiser", "rf", "continuous or discrete", choices=["rf", "perceiver"])
    # A new backbone is a row of BACKBONES in eval_mmvp.py, or any MODEL:TAG that open_clip lists.
    add("backbone", "openai-l14-224", f"{', '.join(BACKBONES)}, or open_clip's MODEL:TAG",
        type=nonempty)
    add("clip-weights", None, "CLIP's file or HuggingFace folder; else downloaded", type=nonempty)
    add("vae", "weights/ae.safetensors", "rf: FLUX.1's ae.safetensors", type=nonempty)
    add("vqgan", "weights/vqgan_imagenet_f16_16384.safetensors",
        "perceiver: taming's VQ-GAN, converted by vqgan.py", type=nonempty)
    add("data", ["data/cc3m"], "training images: folders of images, tar shards, or folders of tar "
        "shards", type=nonempty, nargs="+")
    add("val", [], "held-out images, of which the first 512 are used", type=nonempty, nargs="+")
    add("benchmark", "data/MMVP_VLM", "stage all: MMVP-VLM's folder", type=nonempty)
    add("zeroshot", [], "stage all: NAME:PATH of retention tasks", type=nonempty, nargs="*")
    add("out", None, "the run's folder (default: runs/PRESET-DENOISER)", type=nonempty)
    add("init", None, "stage 1, e2e: a denoiser with FLUX's names (Table 7); stage 2: another "
        "run's stage1/last.safetensors", type=nonempty)


def add_training(add):
    add("epochs", None, "passes over the data (default: 1; e2e: 2)", type=RATE)
    add("steps", None, "optimizer steps of a stage; wins over --epochs", type=COUNT)
    add("batch-size", 16, "images in a micro-batch of one process", type=SIZE)
    add("accum", 2, "micro-batches that a process accumulates into a step", type=SIZE)
    add("lr", None, "learning rate of denoiser and projectors (default: 1e-4; stage 2: 1e-5)",
        type=RATE)
    add("lr-clip", None, "learning rate of the visual tower (default: --lr; e2e: 1e-5)", type=RATE)
    add("warmup", 10, "steps of linear warm-up; then the rate is constant", type=number(int, 0))
    add("weight-decay", 0.01, "AdamW's", type=number(float, 0))
    add("clip-grad", 1.0, "largest norm of the gradient", type=RATE)
    add("seed", 0, "of everything random", type=number(int, 0, 2**63 - 1))

    add("precision", None, "autocast's (default: bf16 where it is fast)", choices=["bf16", "fp32"])
    add("workers", 8, "data loading processes of each rank", type=number(int, 0, 1024))
    add("compile", help="torch.compile the networks (other dropout draws)", **SWITCH)
    add("shard", help="FSDP2: weights, gradients and optimizer over the ranks", **SWITCH)
    add("grad-checkpoint", help="recompute the blocks in the backward pass", **SWITCH)
    add("save-every", 1000, "steps between checkpoints", type=COUNT)
    add("sample-every", 1000, "steps between pictures and held-out losses", type=COUNT)
    add("export-every", None, "stage 2, e2e: steps between whole CLIPs, clip-STEP", type=COUNT)
    add("log-every", 50, "steps between rows of log.csv", type=COUNT)


def add_method(add):
    add("width", None, "the denoiser's (default: 3072; perceiver: 1024)", type=SIZE)
    add("condition", [768, 4096], "rf: widths of the projected [CLS], to modulate and as context "
        "token", type=SIZE, nargs=2, metavar=("VEC", "CONTEXT"))
    add("depth", [2, 4], "rf: blocks (Table 5)", type=FEW, nargs=2,
        metavar=("MM-DIT", "SINGLE-DIT"))
    add("layers", 6, "perceiver: layers (Table 5)", type=FEW)
    add("timesteps", "logit-normal", "rf: of t (Table 4)", choices=["logit-normal", "uniform"])
    add("scale", 1.0, "rf: s of the scaled logit-normal (Eq. 6, Table 4)", type=RATE)
    add("mask-ratio", [0.5, 0.9], "perceiver: share of masked tokens (Table 8)",
        type=number(float, ABOVE_0, 1), nargs=2, metavar=("LOW", "HIGH"))
    add("local-ratio", 0.0, "share of local tokens in the condition (Fig. 5)",
        type=number(float, 0, 1))
    add("no-lora", help="train the whole visual tower (Fig. 8)", **SWITCH)
    add("freeze-denoiser", help="stage 2: train LoRA alone (Fig. 9)", **SWITCH)
    add("shuffle-target", help="a control: reconstruct from another image's [CLS]", **SWITCH)


STAGES = {"1": [1], "2": [2], "e2e": ["e2e"], "all": [1, 2]}

OVERRIDES = [  # where these choices are made, these are the defaults; a later line wins
    ({}, dict(lr=1e-4, epochs=1.0, width=3072)),
    ({"denoiser": "perceiver"}, dict(width=1024)),
    ({"stage": 2}, dict(lr=1e-5)),
    ({"stage": "e2e"}, dict(epochs=2.0, lr_clip=1e-5)),
    ({"preset": "toy"}, dict(  # tuned on the toy's dev benchmark
        backbone="toy", vae=f"{TOY}/vae.safetensors", vqgan=f"{TOY}/vqgan.safetensors",
        data=[f"{TOY}/data/train"], val=[f"{TOY}/data/val"], benchmark=f"{TOY}/data/mmvp",
        zeroshot=[f"folder:{TOY}/data/zeroshot"], width=128, condition=[256, 256], depth=[1, 2],
        layers=4, batch_size=64, accum=1, workers=0, save_every=200, log_every=10)),
    ({"preset": "toy", "stage": 1}, dict(steps=250, lr=2e-3)),
    ({"preset": "toy", "stage": 2}, dict(steps=130, lr=1e-3, lr_clip=4e-4)),
    ({"preset": "toy", "stage": "e2e"}, dict(steps=380, lr=2e-3, lr_clip=4e-4)),
    # In as many steps as rf, the perceiver moves CLIP less.
    ({"preset": "toy", "denoiser": "perceiver", "stage": 1}, dict(steps=350)),
    ({"preset": "toy", "denoiser": "perceiver", "stage": 2}, dict(steps=150)),
    ({"preset": "toy", "denoiser": "perceiver", "stage": "e2e"}, dict(steps=500)),
    ({"preset": "bench"}, dict(
        data=[], steps=110, log_every=10, save_every=None, sample_every=None)),
    ({"preset": "bench", "device": "cpu"}, dict(
        backbone="ViT-B-32-quickgelu:openai", width=768, batch_size=4, workers=0, steps=7,
        log_every=1)),
]


def read_settings(argv=None):
    """The settings of each stage that the command line asks for: a list of Namespaces."""
    typed = make_parser().parse_args(argv)
    stage = typed.stage or ("1" if typed.preset == "bench" else "all")
    if stage == "all" and (typed.preset == "bench" or typed.init or typed.lr):
        raise UserError("the bench, --init and --lr belong to one stage: name it with --stage")
    return [settings_of(stage, typed, argv) for stage in STAGES[stage]]


def settings_of(stage, typed, argv):
    """One stage's settings: OVERRIDES are the parser's defaults, so that what was typed wins."""
    choices = {"stage": stage, "denoiser": typed.denoiser, "preset": typed.preset,
               "device": "cuda" if torch.cuda.is_available() else "cpu"}
    parser = make_parser()
    for needed, values in OVERRIDES:
        if all(choices[name] == value for name, value in needed.items()):
            parser.set_defaults(**values)
    s = parser.parse_args(argv)
    s.stage = stage
    if typed.epochs:
        s.steps = typed.steps
    s.out = s.out or f"runs/{s.preset}-{s.denoiser}"
    s.folder = os.path.join(s.out, "e2e" if stage == "e2e" else f"stage{stage}")
    s.result = os.path.join(s.out, "open_clip", OPEN_CLIP_WEIGHTS)
    if stage == 1:
        s.result = os.path.join(s.folder, "last.safetensors")
    s.lr_clip = s.lr_clip or s.lr
    s.precision = s.precision or ("bf16" if is_bf16_fast() else "fp32")
    if stage == 2 and s.preset != "bench":
        s.init = s.init or os.path.join(s.out, "stage1", "last.safetensors")
    check_values(s)
    return s


def is_bf16_fast():
    """Whether the device computes in bf16 by itself; emulation is 10 times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def check_values(s):
    """Settings that do not go together."""
    head = 128 if s.denoiser == "rf" else 64
    low, high = s.mask_ratio
    if s.width % head:
        raise UserError(f"--width {s.width} must be a multiple of {head}, the width of a head")
    if low > high:
        raise UserError(f"--mask-ratio {low} {high}: the low end comes first")
    if s.shuffle_target and s.batch_size < 2:
        raise UserError("--shuffle-target takes another image of the micro-batch: give "
                        "--batch-size 2 or more")
    if s.freeze_denoiser and s.stage == "e2e":
        raise UserError("--freeze-denoiser belongs to stage 2: end to end, it is not yet trained")
    if s.shard and not LAUNCHED:
        raise UserError("--shard shares the model among processes: start it with torchrun")
    if s.preset == "bench" and (s.steps or 0) < 2 * s.log_every:
        raise UserError("--preset bench counts in --steps: give at least twice --log-every")
    if s.preset == "bench" and (s.save_every or s.sample_every or s.export_every or s.init):
        raise UserError("--preset bench saves nothing: leave --init, --save-every, --sample-every "
                        "and --export-every out")


# ------------------------------------------------------------------------------------ a run

ADVICE = [  # what stands in a RuntimeError, and what users can do about it
    (["OutOfMemoryError"],
     "the GPU's memory is full: try --grad-checkpoint or --shard, or a lower --batch-size in "
     "another --out"),
    (["can't allocate memory"], "the memory is full: try a lower --batch-size, --width or --depth "
                              "in another --out"),
    (["DataLoader worker (pid"],
     "a data worker died, perhaps for want of memory: lower --workers, or give the container more "
     "shared memory (docker run --ipc=host); the same command goes on"),
    (["DistBackendError", "DistNetworkError", "DistStoreError", "gloo"],
     "this rank lost another rank, whose own message says why; the same command goes on"),
]


def run(argv):
    """Parse, hold the run's folder, train each stage, compare before and after."""
    check_launch()
    settings = read_settings(argv)
    first, last = settings[0], settings[-1]
    compares = len(settings) > 1  # stage all
    lock = lock_folder(first) if RANK == 0 else None
    if LOCAL_RANK == 0:
        look_ahead(first, compares)
    device = start_processes()
    try:
        for s in settings:
            train_stage(s, device)
            gc.collect()  # DDP refers to itself, and would keep a stage's model beside the next
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
        for signs, advice in ADVICE:
            if any(sign in said for sign in signs):
                raise UserError(advice) from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    if compares and RANK == 0:
        compare(last, device)
    del lock  # held until here


def look_ahead(s, compares):
    """Draw the toy's world, download the CLIP, and notice what stage all would find at its end.

    One rank of a node does it while the others wait, so that it alone says what is wrong.
    """
    if s.preset == "toy":
        from toy.make_toy import draw_world
        draw_world(os.path.join(TOY, "data"))
    if compares:
        check_benchmark(s.benchmark)
        for task in s.zeroshot:
            check_zeroshot(*task.partition(":")[::2])
        make_tokenizer(find_backbone(s.backbone, s.clip_weights).model)(["a photo"])
    find_images(s.val)
    if LAUNCHED:
        load_pretrained(s)


def train_stage(s, device):
    """One stage of Algorithm 1 (rf) or 2 (perceiver): from its settings, or its last checkpoint."""
    pretrained = load_pretrained(s)
    data = open_data(s, image_side(pretrained.visual))
    images_per_step = s.batch_size * s.accum * WORLD
    total = s.steps or math.ceil(s.epochs * len(data) / images_per_step)
    check_same_run(s, data, pretrained)
    if agree(RANK == 0 and is_whole(s.result)):
        say(f"stage {s.stage} is finished: {s.result}")
        return
    heldout = load_heldout(s, data, device)
    core = build_model(s, pretrained, device)  # the GenHancer; CLIP is frozen, or gets LoRA
    model = distribute(s, core)                # the same model, wrapped for several processes
    optimizer = make_optimizer(s, core)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    checkpoints = Checkpoints(s, core, model, optimizer)
    start = checkpoints.load()
    introduce(s, core, data, heldout, images_per_step, total)
    log = Log(s, start, total, len(data), device)
    batches = load_batches(s, data, start, total, device)

    for step in range(start, total):
        for group in optimizer.param_groups:  # linear warm-up, then constant
            group["lr"] = group["initial_lr"] * min(1, (step + 1) / max(1, s.warmup))
        for micro in range(s.accum):
            images, undecodable = next(batches)
            images = images.to(device, non_blocking=True).float() / 255  # (B, 3, H, W) in [0, 1]
            condition_images = images.roll(1, 0) if s.shuffle_target else images
            seed_draws("noise", s.seed, step, micro * WORLD + RANK)
            with reducing(s, model, micro):
                with autocast(s, device):
                    losses, levels = model(images, condition_images)  # Eq. 3 or 4, each (B,)
                (losses.mean() / s.accum).backward()
            log.add(losses.detach(), levels, undecodable)
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, s.clip_grad)
        optimizer.step()
        clear_gradients(model, optimizer)

        done = step + 1
        due = find_due(s, done, total)
        if due:
            heldout_losses = look(s, done, core, heldout) if "sample" in due else None
            log.write_row(done, grad_norm, optimizer.param_groups[0]["lr"], heldout_losses)
        if "export" in due:
            write_result(s, model, os.path.join(s.out, f"clip-{done:06}", OPEN_CLIP_WEIGHTS))
        if "save" in due:
            checkpoints.save(done)

    checkpoints.finish()
    log.bar.close()
    if s.preset == "bench":
        print_bench(s, core, log, device)
        return
    write_result(s, model, s.result, pretrained.checksums)
    result = s.result if s.stage == 1 else how_to_open(s.backbone, s.out)
    say(f"stage {s.stage} is done ({log.undecodable} images could not be decoded): {result}")


def find_due(s, step, total):
    """What is due after a step: of "row", "sample", "save" and "export"; a row with any other."""
    every = {"row": s.log_every, "sample": s.sample_every, "save": s.save_every}
    if s.stage != 1 and step < total:
        every["export"] = s.export_every
    return {name for name, n in every.items() if n and (step % n == 0 or step == total)}


@torch.compiler.set_stance("force_eager")  # --compile is for the shapes of training
@torch.no_grad()
def look(s, step, core, heldout):
    """Draw samples/STEP.png; return the held-out losses with the right and with shuffled
    [CLS], or None without held-out images."""
    core.eval()
    losses = None
    if s.val:
        losses = [heldout_loss(s, core, heldout, roll) for roll in (0, 1)]
    seed_draws("samples", s.seed, step)
    batch = heldout[:8].float() / 255
    with autocast(s, heldout.device):
        columns = [batch, core.reconstruct(batch)]
        if s.denoiser == "perceiver":
            columns.append(core.reconstruct(batch, steps=1, mask_ratio=0.75))
    core.train()
    if RANK == 0:
        sheet = torch.stack(columns, 1).flatten(0, 1).float().cpu()  # two images to a row
        sheet = torch.nn.functional.interpolate(sheet, scale_factor=max(1, 128 // sheet.shape[-1]))
        path = os.path.join(s.folder, "samples", f"{step:06}.png")
        write_file(path, lambda part: save_image(sheet, part, nrow=2 * len(columns)))
    return losses


def heldout_loss(s, core, heldout, roll):
    """The mean loss of held-out images, each with the [CLS] of the image `roll` before it."""
    total = 0.0
    others = heldout.roll(roll, 0).split(s.batch_size)
    batches = zip(heldout.split(s.batch_size), others, strict=True)
    for i, (images, condition_images) in enumerate(batches):
        images = images.float() / 255
        condition_images = condition_images.float() / 255
        seed_draws("held-out", s.seed, i)  # the same timesteps, noise and masks each time
        with autocast(s, heldout.device):
            losses, _ = core(images, condition_images)
        total += losses.sum().item()
    return total / len(heldout)


def introduce(s, core, data, heldout, images_per_step, total):
    """Say what a reader can check: what trains, on how many images, for how long."""
    if s.preset == "bench":
        say(f"bench: RANDOM weights{'' if s.data else ' and images'}, which learn nothing; "
            f"{s.backbone}, width {s.width}")
    trained = sum(p.numel() for p in core.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in core.parameters())
    say(f"stage {s.stage}: {trained:,} of {whole:,} parameters train; {len(data):,} images; "
        f"{total:,} steps of {images_per_step} images "
        f"({WORLD} processes x {s.batch_size} x accumulation {s.accum}); {s.precision}")
    if s.denoiser == "rf" and s.stage == 1 and s.preset != "bench":
        look_at_latents(s, core, heldout[:8].float() / 255)


@torch.compiler.set_stance("force_eager")  # as in look
@torch.no_grad()
def look_at_latents(s, core, images):
    """Say whether the VAE brings these images to unit variance, without a random draw."""
    latents = core.autoencoder.encode(2 * images - 1, sample=False)
    mean, std = latents.mean().item(), latents.std().item()
    doubt = "" if 0.5 <= std <= 2 else f", far from 1: is {s.vae} the VAE that this run needs?"
    say(f"latents of {len(images)} images: mean {mean:.2f}, standard deviation {std:.2f}{doubt}")


# ------------------------------------------------------------------------ model and processes

class Pretrained(NamedTuple):
    """What a stage is given."""
    visual: torch.nn.Module       # the CLIP's visual tower
    autoencoder: torch.nn.Module  # the VAE (rf) or VQ-GAN (perceiver), frozen
    initial: dict                 # trained weights to start from, {} if there are none
    checksums: dict               # what tells other weights from these, by name


def load_pretrained(s):
    """The CLIP, the autoencoder and the weights to start from; UserError where they do not fit."""
    clip, _, _ = load_clip(s.backbone, s.clip_weights, random=s.preset == "bench")
    autoencoder = load_autoencoder(s)
    side = image_side(clip.visual)
    token = autoencoder.factor * (Continuous if s.denoiser == "rf" else Discrete).token_side
    if side % token:
        raise UserError(f"{s.backbone} sees {side} pixels, and the denoiser's tokens are {token} "
                        "pixels wide: choose another backbone or autoencoder")
    check_export(s.backbone, clip)  # the result must fit into HuggingFace's format
    checksums = {"CLIP": checksum(clip.visual.state_dict()),
                 "autoencoder": checksum(autoencoder.state_dict())}
    initial = load_initial(s, checksums)
    if initial:
        checksums["weights to start from"] = checksum(initial)
    return Pretrained(clip.visual, autoencoder, initial, checksums)


def load_autoencoder(s):
    """The frozen VAE (rf) or VQ-GAN (perceiver); for the bench with random weights."""
    if s.preset == "bench":
        random = AutoEncoder(AutoEncoderConfig()) if s.denoiser == "rf" else VQGAN(VQGANConfig())
        return random.eval().requires_grad_(False)
    return load_vae(s.vae) if s.denoiser == "rf" else load_vqgan(s.vqgan)


def load_initial(s, checksums):
    """Stage 1's result for stage 2; FLUX's weights with --init; or nothing."""
    if not s.init:
        return {}
    if s.stage != 2:
        return read_weights(s.init, "FLUX's weights", "name a file with --init")[0]
    hint = "run --stage 1 first, or again, or name another run's stage1/last.safetensors by --init"
    tensors, about = read_weights(s.init, "stage 1's weights", hint)
    for name, value in checksums.items():
        if about.get(name, value) != value:
            raise UserError(f"stage 2 has another {name} than the stage 1 that made {s.init}: "
                            "give it the same")
    return tensors


def build_model(s, pretrained, device):
    """The GenHancer of a stage: pretrained CLIP and autoencoder, and a denoiser to train."""
    visual = pretrained.visual.to(device)
    autoencoder = pretrained.autoencoder.to(device)
    if s.denoiser == "rf" and s.precision == "bf16":
        autoencoder = autoencoder.bfloat16()  # not the VQ-GAN, whose codes would be others
    torch.manual_seed(s.seed)
    with torch.device(device):
        if s.denoiser == "rf":
            denoiser = Flux(flux_config(s, autoencoder))
            core = Continuous(visual, autoencoder, denoiser, s.timesteps, s.scale, s.local_ratio)
        else:
            codebook = autoencoder.quantize.embedding.weight
            denoiser = Perceiver(perceiver_config(s, codebook), codebook)
            core = Discrete(visual, autoencoder, denoiser, s.mask_ratio, s.local_ratio)
    if s.init and s.stage == 2:
        trained = torch.nn.ModuleDict({"denoiser": denoiser, "projectors": core.projectors})
        what = "stage 1's weights for these settings"
        load_strictly(trained, pretrained.initial, s.init, what)
    elif s.init:
        what = "FLUX's weights for this --denoiser, --width, --condition and --depth"
        load_strictly(denoiser, pretrained.initial, s.init, what)
    if s.grad_checkpoint:
        recompute_blocks(core, True)
    if s.compile:
        for part in (denoiser, visual, autoencoder.encoder):
            part.compile()
    # Stage 1: freezes CLIP. Stages 2 and e2e: injects LoRA.
    return core.set_stage(s.stage, lora=not s.no_lora, freeze_denoiser=s.freeze_denoiser)


def recompute_blocks(core, recompute):
    """Whether the blocks are computed again in the backward pass, to save memory."""
    core.denoiser.grad_checkpointing = recompute
    core.visual.set_grad_checkpointing(recompute)


def flux_config(s, autoencoder):
    return FluxConfig(
        in_channels=autoencoder.config.z_channels * Continuous.token_side**2,
        vec_in_dim=s.condition[0],
        context_in_dim=s.condition[1],
        hidden_size=s.width,
        num_heads=s.width // 128,
        depth=s.depth[0],
        depth_single_blocks=s.depth[1],
    )


def perceiver_config(s, codebook):
    return PerceiverConfig(
        n_embed=codebook.shape[0],
        embed_dim=codebook.shape[1],
        width=s.width,
        num_heads=s.width // 64,
        layers=s.layers,
    )


def make_optimizer(s, core):
    """AdamW over what trains: denoiser and projectors at --lr, the visual tower at --lr-clip."""
    ours = [*core.denoiser.parameters(), *core.projectors.parameters()]
    groups = []
    for parameters, lr in ((ours, s.lr), (core.visual.parameters(), s.lr_clip)):
        trainable = [p for p in parameters if p.requires_grad]
        if trainable:
            groups.append({"params": trainable, "lr": lr, "initial_lr": lr})
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay, fused=True)


def autocast(s, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16")


def check_launch():
    """What this program was started on, and by what."""
    if sys.platform == "win32":
        raise UserError("training runs on Linux, on macOS and under WSL, not on Windows itself")
    alone = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if alone and not LAUNCHED:
        raise UserError(f"{alone[0]} is set, and not all that torchrun sets: start several "
                        f"processes with torchrun; for a single one, unset {' '.join(alone)}")


def start_processes():
    """This process's device, set up; under torchrun, the processes find each other."""
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    else:
        device = torch.device("cpu")
        torch.backends.cuda.enable_flash_sdp(False)  # the CPU's too: its backward is slow
    if LAUNCHED:
        nccl = device.type == "cuda"
        dist.init_process_group("nccl" if nccl else "gloo", timeout=datetime.timedelta(minutes=30),
                                device_id=device if nccl else None)
    return device


def distribute(s, core):
    """Wrap the model for several processes: DDP, or with --shard FSDP2."""
    if s.shard:
        return shard(s, core)
    if WORLD > 1:
        # What replaces broadcast_buffers is not in torch 2.11.
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
        return DistributedDataParallel(core, broadcast_buffers=False,
                                       gradient_as_bucket_view=True)
    return core


def shard(s, core):
    """FSDP2 over what trains; FLUX's blocks are gathered in bf16 and reduced in float32."""
    frozen = {p for p in core.parameters() if not p.requires_grad}
    dtype = torch.bfloat16 if s.precision == "bf16" else None
    mixed = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for name, policy in (("double_blocks", mixed), ("single_blocks", mixed),
                         ("layers", MixedPrecisionPolicy())):
        for block in getattr(core.denoiser, name, ()):
            fully_shard(block, ignored_params=frozen, mp_policy=policy)
    fully_shard(core, ignored_params=frozen)
    register_fsdp_forward_method(core, "reconstruct")
    return core


def reducing(s, model, micro):
    """DDP reduces the gradients with the last micro-batch of a step, FSDP2 with each."""
    if isinstance(model, DistributedDataParallel) and micro < s.accum - 1:
        return model.no_sync()
    return contextlib.nullcontext()


def clear_gradients(model, optimizer):
    """Under DDP a gradient is a view of the bucket that is reduced: without it, a micro-batch that
    is not reduced would make another gradient beside it."""
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def agree(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def barrier():
    if dist.is_initialized():
        dist.barrier()


def say(message):
    """Tell the user, once for all processes."""
    if RANK == 0:
        tqdm.write(message)


STREAMS = {"crops": 0, "noise": 1, "held-out": 2, "samples": 3}  # of random numbers


def seed_draws(stream, *key):
    """Seed torch's default generators from a named stream and a tuple of integers."""
    sequence = np.random.SeedSequence((*key, STREAMS[stream]))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


# ------------------------------------------------------------------------------------ images

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OTHER_SUFFIXES = (".jfif", ".jpe", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg")
WHOLE = -1  # the size of an entry that is a whole file


def open_data(s, side):
    """The training images; noise for the bench without --data."""
    if not s.data:
        return RandomImages(s.batch_size, side)
    return open_images(s.data, side, os.path.join(s.out, "index-data.safetensors"))


def open_images(paths, side, index_path):
    """Images from folders and shards, whose index rank 0 makes, and which is cached."""
    if RANK == 0:
        make_index(paths, index_path)
    barrier()
    if not os.path.exists(index_path):
        raise UserError(f"{index_path}, which rank 0 wrote, is not to be seen by rank {RANK}: name "
                        "an --out that all nodes share")
    return Images(index_path, side)


def load_heldout(s, data, device):
    """512 images of --val, or for the pictures alone 8 of --data: uint8 (n, 3, H, W)."""
    if s.preset == "bench":
        return None
    count = 8
    if s.val:
        data = open_images(s.val, data.side, os.path.join(s.out, "index-val.safetensors"))
        count = 512
    images = [data.load(i, augment=False)[0] for i in range(min(len(data), count))]
    images = [image for image in images if image is not None]
    if not images:
        raise UserError(f"none of the first images of {', '.join(s.val or s.data)} can be decoded")
    return torch.stack(images).to(device)


def load_batches(s, data, start, total, device):
    """This rank's micro-batches from step `start` on, as Images.__getitem__ gives them."""
    keys = batch_keys(s, len(data), start, total)
    context = start_method() if s.workers else None
    return iter(DataLoader(data, batch_size=None, sampler=keys, num_workers=s.workers,
                           multiprocessing_context=context, pin_memory=device.type == "cuda"))


def batch_keys(s, n, start, total):
    """This rank's micro-batches, as Images takes them: they follow from (seed, step, slot)."""
    for step in range(start, total):
        for micro in range(s.accum):
            slot = micro * WORLD + RANK
            first = (step * s.accum * WORLD + slot) * s.batch_size
            positions = range(first, first + s.batch_size)
            indices = [int(epoch_order(n, s.seed, i // n)[i % n]) for i in positions]
            yield s.seed, step, slot, indices


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """A permutation of the n images: each once in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(n, dtype=np.int32))


class Images(Dataset):
    """Training images, of an index file that make_index wrote.

    An item is a whole micro-batch, so that its crops follow from its own (seed, step, slot).
    side: of the square output, in pixels.
    """
    TRIES = 100  # images that may stand in, one after the other, for one that cannot be decoded

    def __init__(self, index_path, side):
        self.index_path = index_path
        self.side = side
        index, _ = read_weights(index_path, "the index of the data")
        self.files = index["files"].numpy()
        self.stamps = index["stamps"].numpy()
        self.entries = index["entries"].numpy()
        bicubic = v2.InterpolationMode.BICUBIC  # antialiased
        self.random_crop = v2.RandomResizedCrop(side, scale=(0.9, 1.0), interpolation=bicubic)
        self.resize = v2.Resize(side, bicubic)

    def __reduce__(self):
        return Images, (self.index_path, self.side)  # each worker maps the index itself

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, key):
        """(seed, step, slot, indices) -> uint8 (B, 3, side, side), and the names of those images
        that were drawn and cannot be decoded. For each, another drawn at random stands in."""
        *draw, indices = key
        seed_draws("crops", *draw)
        images, undecodable = [], []
        for index in indices:
            image, name = self.load(index)
            for _ in range(self.TRIES):
                if image is not None:
                    break
                undecodable.append(name)
                image, name = self.load(int(torch.randint(len(self), ())))
            if image is None:
                raise UserError(f"data: {self.TRIES} images in a row cannot be decoded, the last "
                                f"is {name}: mend the data, or leave that part out")
            images.append(image)
        return torch.stack(images), undecodable

    def load(self, index, augment=True):
        """One image, uint8 (3, side, side), or None if it cannot be decoded; and its name."""
        place, offset, size = self.entries[index].tolist()
        path = os.fsdecode(self.files[place].tobytes().rstrip(b"\0"))
        name = path if size == WHOLE else f"{path} at byte {offset}"
        try:
            with open(path, "rb") as stream:
                stamp = tuple(self.stamps[place])
                if size != WHOLE and stamp_of(stream.fileno()) != stamp:
                    raise UserError(f"data: {path} is not what it was when the run began: put the "
                                    "shard back, or choose another --out")
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:  # a vanished file or a failing disk is no bad image
            raise UserError(f"data: {path} can no longer be read ({error.strerror}): put it back "
                            "and run the same command again") from None
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                needed = math.ceil(self.side / 0.9)  # no crop is less than .9 of a side
                image.draft(None, (needed, needed))  # JPEG: decode at a fraction that is enough
                pixels = pil_to_tensor(to_rgb(image))
            return (self.random_crop(pixels) if augment else self.centre_crop(pixels)), name
        except Exception:  # the decoders raise anything; from memory, the image is at fault
            return None, name

    def centre_crop(self, pixels):
        """The middle square, resized: in this order, a thin image takes no memory."""
        return self.resize(v2.functional.center_crop(pixels, [min(pixels.shape[1:])]))

    def fingerprint(self):
        """The same for the same images in the same order, wherever they lie."""
        paths = self.files.view(f"S{self.files.shape[1]}").ravel().tolist()
        names = b"\n".join(os.path.basename(path) for path in paths)
        return f"{len(self)} images, {zlib.crc32(self.entries, zlib.crc32(names)):08x}"


def to_rgb(image):
    """A PIL image -> upright 8-bit RGB, on white. ValueError for greys of unknown range."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("greys of 32 bits, signed ones and floats do not say what white is")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class RandomImages(Dataset):
    """Endless noise in place of Images, for the bench."""

    def __init__(self, batch_size, side):
        self.batch = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8)

    def __len__(self):
        return 1_000_000

    def __getitem__(self, key):
        return self.batch, []


def make_index(paths, index_path):
    """Index the images under `paths`, unless index_path holds the index of these very files.

    files: uint8 (F, longest), the paths of all shards and then all images, with zeros behind them.
    stamps: (F, 2), size and time of each shard, zeros for images. entries: (N, 3), for each image
    the number of its file, its offset and its size in bytes.
    """
    shards, images = find_images(paths)
    files = np.array([os.fsencode(path) for path in shards + images])
    files = files.view(np.uint8).reshape(len(files), -1)
    stamps = np.zeros((len(files), 2), dtype=np.int64)
    for place, path in enumerate(shards):
        stamps[place] = stamp_of(path)
    tables = {"files": torch.from_numpy(files), "stamps": torch.from_numpy(stamps)}
    try:
        known, _ = read_weights(index_path, "index")
        if all(torch.equal(known[name], table) for name, table in tables.items()):
            return
    except (UserError, KeyError):  # there is none yet, or it is damaged
        pass
    entries = []
    for place, rows in enumerate(index_shards(shards)):
        entries.append(np.array([(place, *row) for row in rows], dtype=np.int64).reshape(-1, 3))
    whole = np.full((len(images), 3), (0, 0, WHOLE))
    whole[:, 0] = np.arange(len(shards), len(files))
    entries = np.concatenate([*entries, whole])
    if not len(entries):
        raise UserError(f"data: no image in {', '.join(paths)}: name other folders or shards")
    tables["entries"] = torch.from_numpy(entries)
    write_weights(index_path, tables)


def find_images(paths):
    """Folders and tar files -> (shards, images), two sorted lists of files.

    UserError for a path with neither, and for a folder with both.
    """
    shards, images, others = [], [], 0
    for path in paths:
        if os.path.isdir(path):
            try:
                found = sorted(list_files(path, set()))
            except OSError as error:
                raise UserError(f"data: a folder cannot be read: {error}") from None
        elif os.path.isfile(path):
            found = [path]
        else:
            raise UserError(f"data not found at {path}: name folders of images, or tar shards "
                            "(the README says how to get CC3M)")
        tars = [name for name in found if name.lower().endswith(".tar")]
        pictures = [name for name in found if name.lower().endswith(IMAGE_SUFFIXES)]
        others += sum(name.lower().endswith(OTHER_SUFFIXES) for name in found)
        if not tars:  # a common downloader of CC3M saves images without a suffix
            pictures += [name for name in found if not os.path.splitext(name)[1]]
        if tars and pictures:
            raise UserError(f"data: {path} holds {len(tars)} tar shards and {len(pictures)} "
                            f"images, {tars[0]} and {pictures[0]} among them: name the shards or "
                            "the images alone")
        if not tars and not pictures:
            raise UserError(f"data: no image and no .tar in {path}: name folders of images, or tar "
                            "shards, with --data")
        shards += tars
        images += sorted(pictures)
    if others:
        say(f"data: {others} files of other kinds ({', '.join(OTHER_SUFFIXES)}) are left out")
    return shards, images


def list_files(folder, seen):
    """The regular files under a folder: a FIFO among them would block its reader.

    Hidden files and folders are left out. Links to folders are followed; `seen` holds the folders
    that were read, each by its device and inode.
    """
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return []
    seen.add(identity)
    files = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            files += list_files(entry.path, seen)
        elif entry.is_file():
            files.append(entry.path)
    return files


def stamp_of(file):
    """What tells an unchanged file from a changed one: its size and its time of change."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def index_shards(shards):
    """index_shard of each, in their order; many of them side by side, in a DataLoader's workers."""
    workers = min(32, os.cpu_count()) if len(shards) >= 8 else 0
    context = start_method() if workers else None
    tables = DataLoader(shards, batch_size=None, collate_fn=index_shard, num_workers=workers,
                        multiprocessing_context=context)
    return tqdm(tables, "indexing shards", leave=False)


def index_shard(path):
    """Where a tar's images lie: a list of (offset, size). UserError if it is not whole."""
    rows = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is sparse")
                if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                    rows.append((member.offset_data, member.size))
            end = tar.offset
        with open(path, "rb") as file:  # tarfile takes any damaged header for the end
            file.seek(end)
            tail = file.read(1 << 20)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data: {path} cannot be read as a plain tar ({error}): fetch it again, or "
                        "leave it out") from None
    padded = 2 * tarfile.BLOCKSIZE <= len(tail) <= 2 * tarfile.RECORDSIZE
    if not padded or any(tail):
        raise UserError(f"data: {path} is damaged or cut short at byte {end}: fetch it again, or "
                        "leave it out")
    return rows


# ------------------------------------------------------------------------ checkpoints and log

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class Checkpoints:
    """step-N.safetensors in a stage's folder: trained weights and optimizer moments.

    Names and shapes are the same with one process, DDP and FSDP2, which is why the state goes
    through torch.distributed.checkpoint. A checkpoint is written in the background while training
    goes on; a failure is raised when the next one begins, or at the end. The newest two are kept.
    """

    def __init__(self, s, core, model, optimizer):
        self.folder = s.folder
        self.trained = [name for name, p in core.named_parameters() if p.requires_grad]
        self.model = model
        self.optimizer = optimizer
        self.thread = ThreadPoolExecutor(1)
        self.written = None  # the Future of the write that has begun last

    def save(self, step):
        """Copy the state to the host, and begin to write it. All ranks take part."""
        self.finish()
        weights, state = get_state_dict(self.model, self.optimizer, options=FULL)
        if RANK > 0:
            return
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        for name, moments in state["state"].items():
            for kind, tensor in moments.items():
                tensors[f"{kind}.{name}"] = tensor
        if not torch.cuda.is_available():  # these are the very tensors that training changes
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        about = {"step": step, "param_groups": state["param_groups"]}
        self.written = self.thread.submit(self.write, step, tensors, about)

    def write(self, step, tensors, about):
        path = self.path(step)
        write_weights(path, tensors, about)
        older = [other for other in self.list() if other < path]
        for old in older[:-1]:
            with contextlib.suppress(FileNotFoundError):  # somebody made room
                os.remove(old)

    def finish(self):
        """Wait until the last checkpoint is written; UserError if it could not be."""
        if self.written:
            self.written.result()

    def load(self):
        """Restore the newest whole checkpoint, and return its step; 0 if there is none."""
        step = agree(self.find() if RANK == 0 else 0)
        if step == 0:
            return 0
        tensors, about = read_weights(self.path(step), "checkpoint")
        weights, state = {}, {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                weights[name] = tensor
            else:
                state.setdefault(name, {})[kind] = tensor
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=weights,
            optim_state_dict={"state": state, "param_groups": about["param_groups"]},
            options=StateDictOptions(full_state_dict=True, strict=False),  # the frozen is not in it
        )
        say(f"resumed from {self.path(step)}")
        return step

    def find(self):
        """The step of the newest checkpoint that is whole and of this model, or 0."""
        kinds = ("model", "exp_avg", "exp_avg_sq", "step")
        wanted = {f"{kind}.{name}" for kind in kinds for name in self.trained}
        for path in reversed(self.list()):
            try:
                tensors, about = read_weights(path, "checkpoint")
                if tensors.keys() == wanted and path == self.path(about.get("step", 0)):
                    return about["step"]
                say(f"{path} is of another step or model, and is passed over")
            except UserError as error:
                say(f"{error}, and is passed over")
        return 0

    def path(self, step):
        return os.path.join(self.folder, f"step-{step:08}.safetensors")

    def list(self):
        """The checkpoints, oldest first, whole or not."""
        return sorted(glob.glob(os.path.join(glob.escape(self.folder), "step-*.safetensors")))


def is_whole(path):
    """Whether the result of a stage is there as it was written."""
    try:
        return bool(read_weights(path, "result"))
    except UserError:
        return False


class Log:
    """log.csv: losses and images/s over all ranks since the row before, the rest at its step."""
    BINS = 10      # of t, or of the mask ratio
    ENOUGH = 1000  # images, before the undecodable among them are judged

    def __init__(self, s, start, total, data_size, device):
        self.s = s
        self.start = start
        self.total = total
        self.data_size = data_size
        self.images_per_step = s.batch_size * s.accum * WORLD
        self.losses = torch.zeros(self.BINS, device=device)
        self.images = torch.zeros(self.BINS, device=device)
        self.undecodable = 0   # images since the start or restart, over all ranks at the last row
        self.undecodable_here = 0
        self.path = os.path.join(s.folder, "log.csv")
        level = "t" if s.denoiser == "rf" else "mask"
        bins = [f"loss_{level}_{i / self.BINS}" for i in range(self.BINS)]
        self.columns = ["step", "epoch", "loss", *bins, "grad_norm", "lr", "images_per_s",
                        "peak_memory_gb", "undecodable", "heldout", "heldout_shuffled"]
        self.rows = self.read_rows() if start else []
        self.clock = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.bar = tqdm(total=total, initial=start, desc=f"stage {s.stage}", unit="step",
                        disable=None if RANK == 0 else True, dynamic_ncols=True)

    def read_rows(self):
        """The rows up to the step from which the run goes on, which has one; none without a log."""
        if not os.path.exists(self.path):
            return []
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            rows = [row for row in rows if int(row["step"]) <= self.start]
            if not rows or int(rows[-1]["step"]) != self.start:
                raise ValueError("its end is missing")
            return [[row[name] for name in self.columns] for row in rows]
        except (OSError, ValueError, KeyError, TypeError, csv.Error):
            raise UserError(f"{self.path} cannot be read as this run's log: mend it, or move it "
                            "away") from None

    def add(self, losses, levels, undecodable):
        """Note a micro-batch: losses (B,), their t or mask ratios (B,), and undecodable images."""
        bins = (levels * self.BINS).long().clamp(max=self.BINS - 1)
        self.losses.index_add_(0, bins, losses)
        self.images.index_add_(0, bins, torch.ones_like(losses))
        for name in undecodable[:max(0, 20 - self.undecodable_here)]:
            tqdm.write(f"cannot be decoded, another stands in: {name}", file=sys.stderr)
        self.undecodable_here += len(undecodable)

    def write_row(self, step, grad_norm, lr, heldout_losses):
        """Sum over the ranks and write a row. This waits for the device, so it is called rarely.

        UserError if the gradient is not finite, or if too many images cannot be decoded.
        """
        grad_norm = float(grad_norm.full_tensor() if self.s.shard else grad_norm)
        if not math.isfinite(grad_norm):
            raise UserError(f"the gradient is not finite at step {step}: try a lower --lr, or "
                            "--precision fp32, in another --out")
        undecodable = torch.tensor(self.undecodable_here, device=self.losses.device)
        if WORLD > 1:
            for sums in (self.losses, self.images, undecodable):
                dist.all_reduce(sums)
        self.undecodable = int(undecodable)
        self.check_undecodable(step)
        loss = (self.losses.sum() / self.images.sum()).item()
        speed = self.images.sum().item() / (time.perf_counter() - self.clock)
        bins = (self.losses / self.images).tolist()
        bins = ["" if math.isnan(mean) else f"{mean:.6g}" for mean in bins]  # nan: no image in it
        epoch = step * self.images_per_step / self.data_size
        heldout = [f"{mean:.6g}" for mean in heldout_losses] if heldout_losses else ["", ""]
        self.rows.append([
            step, f"{epoch:.4f}", f"{loss:.6g}", *bins, f"{grad_norm:.4g}", f"{lr:.3g}",
            f"{speed:.4g}", f"{peak_memory():.2f}", self.undecodable, *heldout])
        if RANK == 0:
            write_file(self.path, self.write)
        progress = f"loss {loss:.4f}, {speed:.0f} images/s"
        if self.bar.disable:  # where no terminal shows it
            say(f"step {step} of {self.total}: {progress}")
        self.bar.set_postfix_str(progress, refresh=False)
        self.bar.update(step - self.bar.n)
        self.losses.zero_()
        self.images.zero_()
        self.clock = time.perf_counter()

    def check_undecodable(self, step):
        """UserError, on all ranks, if more than a tenth of the images could not be decoded."""
        seen = (step - self.start) * self.images_per_step
        whole = self.start == 0 and step == self.total  # the rest of a resumed run may be too short
        if self.undecodable > 0.1 * seen and (seen >= self.ENOUGH or whole):
            raise UserError(f"data: {self.undecodable} of {seen} images cannot be decoded: mend "
                            "the data, or leave that part out")

    def write(self, part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])


def peak_memory():
    """The most memory that this process has held, in GB: the GPU's, or else the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # which Windows lacks
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ------------------------------------------------------------------------------------ results

def write_result(s, model, path, checksums=None):
    """Stage 1's projectors and denoiser, or the CLIP of the other stages, by rank 0."""
    weights = get_model_state_dict(model, options=FULL)  # all ranks take part
    if RANK == 0 and s.stage == 1:
        write_weights(path, weights, checksums)
    elif RANK == 0:
        clip = trained_clip(s, weights)
        if path == s.result:
            export_hf(clip, os.path.join(s.out, "hf"))
        export_open_clip(clip, os.path.dirname(path))
    barrier()


def trained_clip(s, weights):
    """The backbone's CLIP with the trained weights of its visual tower, LoRA merged in float32."""
    clip = load_clip(s.backbone, s.clip_weights)[0]
    if s.no_lora:
        clip.visual.requires_grad_(True)
    else:
        inject_lora(clip.visual)
    tower = {name: p.detach() for name, p in clip.named_parameters() if p.requires_grad}
    trained = {name: weights[name] for name in weights if name.startswith("visual.")}
    load_strictly(tower, trained, s.folder, "the trained visual tower")
    merge_lora(clip.visual)
    return clip


def compare(s, device):
    """The benchmark and the retention tasks, before and after: screen and result.json."""
    tasks = [task.partition(":")[::2] for task in s.zeroshot]
    results = []
    for weights in (s.clip_weights, s.result):
        clip, preprocess, tokenizer = load_clip(s.backbone, weights)
        results.append(evaluate(clip.to(device), preprocess, tokenizer, s.benchmark, tasks))
    before, after = results
    print_table(before, after)
    result = {"before": summary(before), "after": summary(after)}
    write_json(os.path.join(s.out, "result.json"), result)


PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
               "RTX 4090": 165}  # dense bf16, from the vendor's datasheets


@torch.compiler.set_stance("force_eager")  # compiled blocks hide their work from the counter
def print_bench(s, core, log, device):
    """Speed, memory and MFU, from the rows of the log but the first."""
    column = log.columns.index("images_per_s")
    speed = float(np.median([float(row[column]) for row in log.rows[1:]]))
    steps_per_s = speed / log.images_per_step
    images = torch.rand(s.batch_size, 3, *2 * [image_side(core.visual)], device=device)
    memory = peak_memory()  # of the training, before its work is counted
    recompute_blocks(core, False)  # the model's own work alone is counted
    with FlopCounterMode(display=False) as counter, autocast(s, device):
        core(images)[0].mean().backward()
    tflops = counter.get_total_flops() * s.accum * steps_per_s / 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
    peaks = [peak for known, peak in PEAK_TFLOPS.items() if known in name]
    mfu = f"no peak known for {name}"
    if peaks:
        mfu = f"{100 * tflops / peaks[0]:.1f} % of {peaks[0]} in bf16"
    say(f"s / 100 iterations   {100 / steps_per_s:.2f}")
    say(f"images / s           {speed:.4g}")
    say(f"peak memory          {memory:.2f} GB")
    say(f"model TFLOP/s        {tflops:.2f} a device")
    say(f"MFU                  {mfu}")


# ------------------------------------------------------------------------ a folder holds one run

# What may change when a run goes on; data and weights are known by their content.
MOVABLE = {
    "stage", "out", "folder", "result", "data", "val", "benchmark", "zeroshot",
    "clip_weights", "vae", "vqgan", "init",
    "workers", "save_every", "sample_every", "log_every", "export_every",
    "accum", "compile", "shard", "grad_checkpoint",
}


def check_same_run(s, data, pretrained):
    """A stage's folder holds one run, whose settings.json this writes: UserError if it was begun
    with other settings."""
    if RANK > 0 or s.preset == "bench":
        return
    settings = {key: value for key, value in vars(s).items() if key not in MOVABLE}
    settings["micro-batches of a step (processes x --accum)"] = s.accum * WORLD
    settings["data"] = data.fingerprint()
    for name, value in pretrained.checksums.items():
        settings[f"checksum of the {name}"] = value
    path = os.path.join(s.folder, "settings.json")
    if not os.path.exists(path):
        write_json(path, settings)
        return
    before = read_json(path)
    names = sorted(before.keys() | settings.keys())
    changed = [f"{name} was {before.get(name)}, is {settings.get(name)}"
               for name in names if before.get(name) != settings.get(name)]
    if changed:
        raise UserError(f"{s.folder} holds a run with other settings ({'; '.join(changed)}): "
                        "give it the same again, or choose another --out")


def lock_folder(s):
    """Make the run's folder and hold it while this process lives: a second run there is refused."""
    import fcntl  # which Windows lacks
    others = {1: ["e2e"], 2: ["e2e"], "e2e": ["stage1", "stage2"]}[s.stage]
    for name in ["stage1", "stage2", "e2e"] if s.preset == "bench" else others:
        if os.path.exists(os.path.join(s.out, name, "settings.json")):
            raise UserError(f"--out {s.out} holds another run ({name}): choose another folder")
    try:
        os.makedirs(s.out, exist_ok=True)
        file = open(os.path.join(s.out, ".lock"), "w")  # noqa: SIM115 (open for as long as the run)
    except OSError as error:
        message = f"--out {s.out} cannot be written ({error.strerror}): choose another"
        raise UserError(message) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"--out {s.out} is in use by another run: choose another; several "
                        "processes of one run are started with torchrun") from None
    except OSError as error:
        say(f"--out {s.out} lies on a file system without locks ({error.strerror}): nothing keeps "
            "another run out of it")
    else:
        remove_parts(s)
    return file


def remove_parts(s):
    """What a run that was killed was writing in this folder."""
    for folder in ("", "hf", "open_clip", "clip-*", "stage1", "stage2", "e2e", "*/samples"):
        for part in glob.glob(os.path.join(glob.escape(s.out), folder, ".part-*")):
            os.remove(part)


def main(argv=None):
    run_command("train.py", run, argv)


if __name__ == "__main__":
    main()
