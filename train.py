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
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as dist_state
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from eval_mmvp import (
    BACKBONES, IMAGE_FORMATS, IMAGE_SUFFIXES, OPEN_CLIP_WEIGHTS, TOY, check_benchmark,
    check_export, check_zeroshot, evaluate, export_hf, export_open_clip, find_backbone,
    load_clip, loading_hint, make_tokenizer, print_table, raise_failures, summary,
    zeroshot_task,
)
from genhancer import (
    Continuous, Discrete, Flux, FluxConfig, Parser, Perceiver, PerceiverConfig, UserError,
    checksum, first_line, image_side, inject_lora, load_strictly, merge_lora, number, read_json,
    read_weights, run_command, start_method, write_file, write_json, write_weights,
)
from vae import AutoEncoder, AutoEncoderConfig, load_vae
from vqgan import VQGAN, VQGANConfig, load_vqgan

# torchrun sets all of these; another launcher may have left some of them.
LAUNCHED = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if LAUNCHED else 0


# ------------------------------------------------------------------------------------ settings

COUNT = number(int, 1, 10**9)
SIZE = number(int, 1, 2**14)
POSITIVE = number(float, sys.float_info.min)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every option's default, and the docstring as it is."""


def make_parser():
    """The command line, with the paper's defaults for stage 1 (Sec. 5.1, App. B). Where the paper
    is silent they are the official code's, except --warmup, --workers and the perceiver's size."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=HelpFormatter,
                    parents=[choice_parser()])
    add_run_options(parser.add_argument_group("inputs and outputs").add_argument)
    add_training_options(parser.add_argument_group("training").add_argument)
    add_method_options(parser.add_argument_group("the method and its ablations").add_argument)
    return parser


def choice_parser():
    """The options on which the defaults of the others depend."""
    parser = Parser(add_help=False)
    add = parser.add_argument_group("what sets the defaults of the other options").add_argument
    add("--preset", choices=["paper", "toy", "bench"], default="paper", help="set of defaults")
    add("--stage", choices=list(STAGES), help="all: 1, 2 and the benchmark (bench: 1)")
    add("--denoiser", choices=["rf", "perceiver"], default="rf", help="continuous or discrete")
    add("--epochs", type=POSITIVE, help="passes over the data")
    return parser


def add_run_options(add):
    # To add a backbone, add a row to BACKBONES in eval_mmvp.py, or name open_clip's MODEL:TAG.
    names = ", ".join(BACKBONES)
    add("--backbone", default="openai-l14-224", help=f"{names}, or open_clip's MODEL:TAG")
    add("--clip-weights", help="local file or folder of CLIP weights; None: download them")
    add("--vae", default="weights/ae.safetensors", help="rf: FLUX.1's ae.safetensors")
    add("--vqgan", default="weights/vqgan_imagenet_f16_16384.safetensors",
        help="perceiver: taming's VQ-GAN, converted by vqgan.py")
    add("--data", default=["data/cc3m"], nargs="+", help="folders of images or shards, or shards")
    add("--val", default=[], nargs="+", help="held-out images, of which the first 512 are used")
    add("--benchmark", default="data/MMVP_VLM", help="stage all: MMVP-VLM's folder")
    add("--zeroshot", default=[], nargs="*", type=zeroshot_task, help="stage all: NAME:PATH")
    add("--out", help="run directory")
    add("--init", help="stage 1, e2e: a denoiser with FLUX's names (Table 7); stage 2: another "
                       "run's stage1/last.safetensors")


def add_training_options(add):
    add("--steps", type=COUNT, help="optimizer steps of a stage; wins over --epochs")
    add("--batch-size", default=16, type=SIZE, help="images in a micro-batch of one process")
    add("--accum", default=2, type=SIZE, help="micro-batches that a process accumulates in a step")
    add("--lr", default=1e-4, type=POSITIVE, help="learning rate of the denoiser and projectors")
    add("--lr-clip", type=POSITIVE, help="learning rate of the visual tower; None: that of --lr")
    add("--warmup", default=10, type=number(int, 0), help="steps of linear warm-up")
    add("--weight-decay", default=0.01, type=number(float, 0), help="AdamW's weight decay")
    add("--clip-grad", default=1.0, type=POSITIVE, help="maximum norm of the gradient")
    add("--seed", default=0, type=number(int, 0, 2**63 - 1), help="random seed")
    add("--precision", choices=["bf16", "fp32"], help="of autocast; bf16 where it is fast")
    add("--workers", default=8, type=number(int, 0, 1024), help="data loading processes of a rank")
    add("--compile", action="store_true", help="torch.compile the networks (other dropout draws)")
    add("--shard", action="store_true", help="FSDP2: weights, gradients, optimizer over the ranks")
    add("--grad-checkpoint", action="store_true", help="gradient checkpointing of the blocks")
    add("--save-every", default=1000, type=COUNT, help="steps between checkpoints")
    add("--sample-every", default=1000, type=COUNT, help="steps between samples and validation")
    add("--export-every", type=COUNT, help="stage 2, e2e: steps between exports, clip-STEP")
    add("--log-every", default=50, type=COUNT, help="steps between rows of log.csv")


def add_method_options(add):
    add("--width", default=3072, type=SIZE, help="hidden size of the denoiser")
    add("--condition", default=[768, 4096], type=SIZE, nargs=2, metavar=("VEC", "CONTEXT"),
        help="rf: widths of the projected [CLS], as modulation and as context token")
    add("--depth", default=[2, 4], type=SIZE, nargs=2, metavar=("MM-DIT", "SINGLE-DIT"),
        help="rf: number of blocks (Table 5)")
    add("--layers", default=6, type=SIZE, help="perceiver: number of layers (Table 5)")
    add("--timesteps", default="logit-normal", choices=["logit-normal", "uniform"],
        help="rf: distribution of t (Table 4)")
    add("--scale", default=1.0, type=POSITIVE, help="rf: s of the logit-normal (Eq. 6, Table 4)")
    add("--mask-ratio", default=[0.5, 0.9], type=number(float, sys.float_info.min, 1), nargs=2,
        metavar=("LOW", "HIGH"), help="perceiver: share of masked tokens (Table 8)")
    add("--local-ratio", default=0.0, type=number(float, 0, 1), help="of local tokens (Fig. 5)")
    add("--no-lora", action="store_true", help="train the whole visual tower (Fig. 8)")
    add("--freeze-denoiser", action="store_true", help="stage 2: train LoRA alone (Fig. 9)")
    add("--shuffle-target", action="store_true", help="control: [CLS] of another image")


STAGES = {"1": [1], "2": [2], "e2e": ["e2e"], "all": [1, 2]}

DEFAULTS = [  # (choices, the defaults under them); later ones override earlier ones
    ({}, dict(epochs=1.0)),
    ({"denoiser": "perceiver"}, dict(width=1024)),
    ({"stage": 2}, dict(lr=1e-5)),
    ({"stage": "e2e"}, dict(epochs=2.0, lr_clip=1e-5)),
    ({"preset": "toy"}, dict(  # tuned on the toy's dev benchmark
        backbone="toy", vae=f"{TOY}/vae.safetensors", vqgan=f"{TOY}/vqgan.safetensors",
        data=[f"{TOY}/data/train"], val=[f"{TOY}/data/val"], benchmark=f"{TOY}/data/mmvp",
        zeroshot=[("folder", f"{TOY}/data/zeroshot")], width=128, condition=[256, 256],
        depth=[1, 2], layers=4, batch_size=64, accum=1, workers=0, save_every=200, log_every=10)),
    ({"preset": "toy", "stage": 1}, dict(steps=250, lr=2e-3)),
    ({"preset": "toy", "stage": 2}, dict(steps=130, lr=1e-3, lr_clip=4e-4)),
    ({"preset": "toy", "stage": "e2e"}, dict(steps=380, lr=2e-3, lr_clip=4e-4)),
    # The perceiver changes CLIP less per step than rf.
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
    typed, _ = choice_parser().parse_known_args(argv)
    stages = STAGES[typed.stage or ("1" if typed.preset == "bench" else "all")]
    return [read_stage(stage, stages, typed, argv) for stage in stages]


def read_stage(stage, stages, typed, argv):
    """The settings of one of the stages: its defaults, and what was typed."""
    parser = stage_parser(stage, typed)
    s = parser.parse_args(argv)
    s.stage = stage
    s.stages = stages
    if len(stages) > 1 and (s.init or s.lr != parser.get_default("lr")):
        raise UserError("--init and --lr belong to one stage: name it with --stage")
    check_values(s)
    s.folder = os.path.join(s.out, "e2e" if stage == "e2e" else f"stage{stage}")
    if s.preset == "bench":
        s.folder = os.path.join(s.out, "bench")
    elif stage == 2:
        s.init = s.init or os.path.join(s.out, "stage1", "last.safetensors")
    s.result = os.path.join(s.out, "open_clip", OPEN_CLIP_WEIGHTS)
    if stage == 1:
        s.result = os.path.join(s.folder, "last.safetensors")
    s.lr_clip = s.lr_clip or s.lr
    return s


def stage_parser(stage, typed):
    """The parser with the defaults of a stage, preset and denoiser."""
    choices = {"stage": stage, "denoiser": typed.denoiser, "preset": typed.preset,
               "device": "cuda" if torch.cuda.is_available() else "cpu"}
    parser = make_parser()
    parser.set_defaults(out=f"runs/{typed.preset}-{typed.denoiser}",
                        precision="bf16" if is_bf16_fast() else "fp32")
    for needed, values in DEFAULTS:
        if all(choices[name] == value for name, value in needed.items()):
            parser.set_defaults(**values)
    if typed.epochs:
        parser.set_defaults(steps=None)  # the preset's number of steps would override --epochs
    return parser


def is_bf16_fast():
    """Whether the device supports bf16 natively; emulation is 10 times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def check_values(s):
    """Raise UserError for settings that contradict each other."""
    head = 128 if s.denoiser == "rf" else 64
    low, high = s.mask_ratio
    if s.width % head:
        raise UserError(f"--width {s.width} must be a multiple of {head}, the width of a head")
    if low > high:
        raise UserError(f"--mask-ratio {low} {high}: give the lower ratio first")
    if s.shuffle_target and s.batch_size < 2:
        raise UserError("--shuffle-target takes the [CLS] of another image in the micro-batch: "
                        "use --batch-size 2 or more")
    if s.freeze_denoiser and s.stage == "e2e":
        raise UserError("--freeze-denoiser is for stage 2: end to end, the denoiser is untrained")
    if s.shard and not LAUNCHED:
        raise UserError("--shard shards the model over several processes: use torchrun")
    if s.preset == "bench" and (len(s.stages) > 1 or (s.steps or 0) < 2 * s.log_every):
        raise UserError("--preset bench measures one --stage, in --steps of at least twice "
                        "--log-every")


# ------------------------------------------------------------------------------------ a run

ADVICE = [  # parts of a RuntimeError's message, and what the user can do
    (["OutOfMemoryError", "can't allocate memory"],
     "out of memory: try --grad-checkpoint, --shard, or a lower --batch-size in another --out"),
    (["DataLoader worker (pid"],
     "a data worker died, perhaps out of memory: lower --workers, or give the container more "
     "shared memory (docker run --ipc=host); the same command resumes the run"),
    (["InvalidCxxCompiler", "Failed to find C compiler"],
     "--compile needs a C++ compiler: install g++, name another by CXX, or leave --compile out"),
    (["DistBackendError", "DistNetworkError", "DistStoreError", "gloo"],
     "this rank lost another rank, whose own message says why; the same command resumes the run"),
]


@contextlib.contextmanager
def explain_errors():
    """Turn the RuntimeErrors of ADVICE into UserErrors."""
    try:
        yield
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
        for signs, advice in ADVICE:
            if any(sign in said for sign in signs):
                raise UserError(advice) from None
        raise


def run(argv):
    """Train each stage of the command in turn; for stage all, evaluate CLIP before and after."""
    if sys.platform == "win32":
        raise UserError("training runs on Linux, macOS and WSL, not on Windows itself")
    settings = read_settings(argv)
    first, last = settings[0], settings[-1]
    evaluates = len(settings) > 1  # stage all
    with lock_run_directory(first), explain_errors():
        pretrained = None
        if LOCAL_RANK == 0:  # downloads and reports mistakes; the others wait in start_processes
            prepare(first, evaluates)
            pretrained = load_pretrained(first)
        device, patient_group = start_processes()
        compare_ranks(shared_settings(first))
        for s in settings:
            train_stage(s, pretrained or load_pretrained(s), device)
            pretrained = None
            gc.collect()  # DDP refers to itself: frees the stage's model before the next
        if evaluates and RANK == 0:
            evaluate_before_and_after(last, device)
        if dist.is_initialized():
            dist.barrier(patient_group)  # torchrun would stop rank 0 if the others exited early
            dist.destroy_process_group()


def prepare(s, evaluates):
    """Draw the toy world, index the images, and check what the evaluation needs."""
    if s.preset == "toy":
        from toy.make_toy import draw_world
        draw_world(os.path.join(TOY, "data"))
    if RANK == 0:
        for kind, paths in (("data", s.data), ("val", s.val)):
            if paths:
                make_index(paths, index_file(s, kind))
    if evaluates:
        check_benchmark(s.benchmark)
        for name, path in s.zeroshot:
            check_zeroshot(name, path)
        make_tokenizer(find_backbone(s.backbone, s.clip_weights)[0])(["a photo"])


def train_stage(s, pretrained, device):
    """One stage of Algorithm 1 (rf) or 2 (perceiver), from the start or from a checkpoint."""
    side = image_side(pretrained.visual)
    data, val = open_data(s, "data", side), open_data(s, "val", side)
    images_per_step = s.batch_size * s.accum * WORLD
    total = s.steps or math.ceil(s.epochs * len(data) / images_per_step)
    check_same_run(s, data, val, pretrained)
    if broadcast(RANK == 0 and is_intact(s.result)):
        print_rank_0(f"stage {s.stage} is finished: {s.result}")
        return
    val_images = load_val_images(val or data, 512 if val else 8, device)
    core = build_model(s, pretrained, device)  # the GenHancer; set_stage chooses what trains
    model = distribute(s, core)                # the same model, wrapped for several processes
    optimizer = make_optimizer(s, core)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    checkpoints = Checkpoints(s, core, model, optimizer)
    start = checkpoints.load()
    print_summary(s, core, data, val_images, total, device)
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
        due = list_due(s, done, total)
        val_losses = None
        if "sample" in due:
            write_samples(s, done, core, val_images[:8])
            val_losses = validate(s, core, val_images) if val else None
        if due:
            log.write_row(done, grad_norm, optimizer.param_groups[0]["lr"], val_losses)
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
    result = s.result if s.stage == 1 else loading_hint(s.backbone, s.out)
    print_rank_0(f"stage {s.stage} is done ({log.undecodable} undecodable images): {result}")


def list_due(s, step, total):
    """What is due after a step: "row", "sample", "save", "export". With any of these a row is
    written: a sample's losses are in it, and a run resumes from the row of its checkpoint."""
    every = {"row": s.log_every, "sample": s.sample_every, "save": s.save_every}
    if s.stage != 1 and step < total:
        every["export"] = s.export_every
    return {name for name, n in every.items() if n and (step % n == 0 or step == total)}


@torch.compiler.set_stance("force_eager")  # --compile is for the shapes of training
@torch.no_grad()
def write_samples(s, step, core, images):
    """samples/STEP.png: images uint8 (n, 3, H, W), each beside its reconstructions."""
    seed_draws("samples", s.seed, step)
    images = images.float() / 255
    with autocast(s, images.device):
        columns = [images, core.reconstruct(images)]
        if s.denoiser == "perceiver":
            columns.append(core.reconstruct(images, steps=1, mask_ratio=0.75))
    if RANK == 0:
        sheet = torch.stack(columns, 1).flatten(0, 1).float().cpu()  # two images to a row
        sheet = torch.nn.functional.interpolate(sheet, scale_factor=max(1, 128 // sheet.shape[-1]))
        path = os.path.join(s.folder, "samples", f"{step:06}.png")
        write_file(path, lambda part: save_image(sheet, part, nrow=2 * len(columns)))


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def validate(s, core, images):
    """The mean loss of images uint8 (n, 3, H, W), with their own [CLS] and with another's."""
    core.eval()
    means = []
    for condition_images in (images, images.roll(1, 0)):  # its own, then the previous image's
        batches = zip(images.split(s.batch_size), condition_images.split(s.batch_size), strict=True)
        total = 0.0
        for i, (batch, condition) in enumerate(batches):
            seed_draws("validation", s.seed, i)  # the same timesteps, noise and masks each time
            with autocast(s, images.device):
                losses, _ = core(batch.float() / 255, condition.float() / 255)
            total += losses.sum().item()
        means.append(total / len(images))
    core.train()
    return means


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def print_summary(s, core, data, val_images, total, device):
    """What a reader can check: what trains, on which device, on how many images, for how long."""
    trainable = sum(p.numel() for p in core.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in core.parameters())
    print_rank_0(
        f"stage {s.stage} on {device_name(device)}: {trainable:,} of {parameters:,} parameters "
        f"train; {len(data):,} images; {total:,} steps of {s.batch_size * s.accum * WORLD} images "
        f"(processes {WORLD} x batch size {s.batch_size} x accumulation {s.accum}); {s.precision}")
    if s.preset == "bench":
        print_rank_0(f"bench: RANDOM weights{'' if s.data else ' and images'}, which learn "
                     f"nothing; {s.backbone}, width {s.width}")
    elif s.denoiser == "rf" and s.stage == 1:
        images = val_images[:8].float() / 255
        latents = core.autoencoder.encode(2 * images - 1, sample=False)
        mean, std = latents.mean().item(), latents.std().item()
        doubt = "" if 0.5 <= std <= 2 else f", which is far from 1: is {s.vae} the right VAE?"
        print_rank_0(f"latents: mean {mean:.2f}, standard deviation {std:.2f}{doubt}")


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


# ------------------------------------------------------------------------ model and processes

class Pretrained(NamedTuple):
    """What a stage starts from."""
    visual: torch.nn.Module       # the CLIP's visual tower
    autoencoder: torch.nn.Module  # the VAE (rf) or VQ-GAN (perceiver), frozen
    initial: dict                 # trained weights of --init, or {}
    checksums: dict               # of these three, by name


def load_pretrained(s):
    """Load the CLIP, the autoencoder and the weights of --init; UserError if they do not fit."""
    random = s.preset == "bench"
    torch.manual_seed(s.seed)  # random weights must be the same on all ranks
    clip, _, _ = load_clip(s.backbone, s.clip_weights, random)
    autoencoder = load_autoencoder(s, random)
    side = image_side(clip.visual)
    token = autoencoder.factor * (Continuous if s.denoiser == "rf" else Discrete).token_side
    if side % token:
        raise UserError(f"the images of {s.backbone} are {side} pixels wide, which is no multiple "
                        f"of a denoiser's token ({token}): choose another backbone or autoencoder")
    check_export(s.backbone, clip)  # the result must fit into Hugging Face's format
    checksums = {"CLIP": checksum(clip.visual.state_dict()),
                 "autoencoder": checksum(autoencoder.state_dict())}
    initial = load_initial(s, checksums)
    if initial:
        checksums["weights to start from"] = checksum(initial)
    return Pretrained(clip.visual, autoencoder, initial, checksums)


def load_autoencoder(s, random):
    """The frozen VAE (rf) or VQ-GAN (perceiver)."""
    if random:
        model = AutoEncoder(AutoEncoderConfig()) if s.denoiser == "rf" else VQGAN(VQGANConfig())
        return model.eval().requires_grad_(False)
    return load_vae(s.vae) if s.denoiser == "rf" else load_vqgan(s.vqgan)


def load_initial(s, checksums):
    """Stage 1's result for stage 2; FLUX's weights with --init; or nothing."""
    if not s.init:
        return {}
    if s.stage != 2:
        return read_weights(s.init, "FLUX's weights", "name a file with --init")[0]
    hint = "run --stage 1 (again), or name another run's stage1/last.safetensors by --init"
    tensors, about = read_weights(s.init, "stage 1's weights", hint)
    for name, value in checksums.items():
        if about.get(name, value) != value:
            raise UserError(f"{s.init} was trained with another {name}: give stage 2 that one")
    return tensors


def build_model(s, pretrained, device):
    """The GenHancer of a stage: pretrained CLIP and autoencoder, and a denoiser to train."""
    visual = pretrained.visual.to(device)
    autoencoder = pretrained.autoencoder.to(device)
    if s.denoiser == "rf" and s.precision == "bf16":
        autoencoder = autoencoder.bfloat16()  # not the VQ-GAN: bf16 would change its codes
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
        set_grad_checkpointing(core, True)
    if s.compile:
        for part in (denoiser, visual, autoencoder.encoder):
            part.compile()
    # Stage 1: freezes CLIP. Stages 2 and e2e: injects LoRA.
    return core.set_stage(s.stage, lora=not s.no_lora, freeze_denoiser=s.freeze_denoiser)


def set_grad_checkpointing(core, enable):
    core.denoiser.grad_checkpointing = enable
    core.visual.set_grad_checkpointing(enable)


def flux_config(s, autoencoder):
    vec, context = s.condition
    double, single = s.depth
    channels = autoencoder.config.z_channels * Continuous.token_side**2
    return FluxConfig(in_channels=channels, vec_in_dim=vec, context_in_dim=context,
                      hidden_size=s.width, num_heads=s.width // 128,
                      depth=double, depth_single_blocks=single)


def perceiver_config(s, codebook):
    n_embed, embed_dim = codebook.shape
    return PerceiverConfig(n_embed=n_embed, embed_dim=embed_dim, width=s.width,
                           num_heads=s.width // 64, layers=s.layers)


def make_optimizer(s, core):
    """AdamW, with --lr for the denoiser and projectors, and --lr-clip for the visual tower."""
    trained_at_lr = [*core.denoiser.parameters(), *core.projectors.parameters()]
    groups = []
    for parameters, lr in ((trained_at_lr, s.lr), (core.visual.parameters(), s.lr_clip)):
        trainable = [p for p in parameters if p.requires_grad]
        if trainable:
            groups.append({"params": trainable, "lr": lr, "initial_lr": lr})
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay, fused=True)


def autocast(s, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16")


def start_processes():
    """This process's device, and a process group with a long timeout (None without torchrun).

    Under torchrun, connect the processes; UserError if that fails.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    else:
        device = torch.device("cpu")
        torch.backends.cuda.enable_flash_sdp(False)  # on CPUs too, where its backward is slow
    if not LAUNCHED:
        return device, None
    nccl = device.type == "cuda"
    try:
        dist.init_process_group("nccl" if nccl else "gloo", timeout=datetime.timedelta(minutes=30),
                                device_id=device if nccl else None)
        return device, dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    except RuntimeError as error:
        raise UserError(f"rank {RANK} cannot connect to the others ({first_line(error)}): name a "
                        "free MASTER_PORT, and in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME the "
                        "network that the nodes share") from None


def distribute(s, core):
    """Wrap the model for several processes: DDP, or with --shard FSDP2."""
    if s.shard:
        return shard(s, core)
    if WORLD > 1:
        # The option that replaces broadcast_buffers is newer than torch 2.11.
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
        return DistributedDataParallel(core, broadcast_buffers=False,
                                       gradient_as_bucket_view=True)
    return core


def shard(s, core):
    """FSDP2 of the trainable parameters; FLUX's blocks are gathered in bf16, reduced in float32."""
    frozen = {p for p in core.parameters() if not p.requires_grad}
    dtype = torch.bfloat16 if s.precision == "bf16" else None
    mixed = fsdp.MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for name, policy in (("double_blocks", mixed), ("single_blocks", mixed),
                         ("layers", fsdp.MixedPrecisionPolicy())):  # CPUs' LayerNorm needs fp32
        for block in getattr(core.denoiser, name, ()):
            fsdp.fully_shard(block, ignored_params=frozen, mp_policy=policy)
    fsdp.fully_shard(core, ignored_params=frozen)
    fsdp.register_fsdp_forward_method(core, "reconstruct")
    return core


def reducing(s, model, micro):
    """DDP reduces gradients after a step's last micro-batch, FSDP2 after each (less memory)."""
    if isinstance(model, DistributedDataParallel) and micro < s.accum - 1:
        return model.no_sync()
    return contextlib.nullcontext()


def clear_gradients(model, optimizer):
    """Zero the gradients. Under DDP they must stay views of the buckets: if set to None, a
    micro-batch without reduction would allocate a second gradient."""
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def broadcast(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def raise_on_all_ranks(message):
    """Exit on all ranks, each of which calls this; only rank 0 prints the message."""
    if RANK > 0:
        with contextlib.suppress(RuntimeError):  # raised once rank 0 has printed and exited
            dist.barrier()
        sys.exit(2)
    raise UserError(message)


def print_rank_0(message):
    if RANK == 0:
        tqdm.write(message)


STREAMS = {"crops": 0, "noise": 1, "validation": 2, "samples": 3}  # of random numbers


def seed_draws(stream, *key):
    """Seed torch's default generators from the name of a stream and integers."""
    sequence = np.random.SeedSequence((*key, STREAMS[stream]))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


# ------------------------------------------------------------------------------------ images

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md")  # captions and metadata
WHOLE = -1  # the size of an entry that is a whole file: file.read(-1) reads all of it


def open_data(s, kind, side):
    """The images of --data or --val (`kind`: "data" or "val"), whose index rank 0 has made.

    None without --val; random images for the bench without --data.
    """
    if not getattr(s, kind):
        return RandomImages(s.batch_size, side) if kind == "data" else None
    if not os.path.exists(index_file(s, kind)):
        raise UserError(f"rank {RANK} does not see {index_file(s, kind)}, which rank 0 wrote: name "
                        "an --out that all nodes share")
    return Images(index_file(s, kind), side)


def index_file(s, kind):
    return os.path.join(s.out, f"index-{kind}.safetensors")


def load_val_images(data, count, device):
    """The first `count` images, less those that cannot be decoded: uint8 (n, 3, H, W)."""
    images = [data.load(i, augment=False)[0] for i in range(min(len(data), count))]
    images = [image for image in images if image is not None]
    if not images:
        raise UserError("none of the first images of --val (or else --data) can be decoded: "
                        "replace them")
    return torch.stack(images).to(device)


def load_batches(s, data, start, total, device):
    """An iterator over this rank's micro-batches from step `start` on; see Images.__getitem__."""
    keys = batch_keys(s, len(data), start, total)
    context = start_method() if s.workers else None
    return iter(DataLoader(data, batch_size=None, sampler=keys, num_workers=s.workers,
                           multiprocessing_context=context, pin_memory=device.type == "cuda"))


def batch_keys(s, n, start, total):
    """The keys of this rank's micro-batches for Images: a function of (seed, step, slot)."""
    for step in range(start, total):
        for micro in range(s.accum):
            slot = micro * WORLD + RANK
            first = (step * s.accum * WORLD + slot) * s.batch_size
            positions = range(first, first + s.batch_size)
            indices = [int(epoch_order(n, s.seed, i // n)[i % n]) for i in positions]
            yield s.seed, step, slot, indices


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """The order of the n images in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(n, dtype=np.int32))


class Images(Dataset):
    """The images in an index file that make_index wrote.

    An item is a whole micro-batch, so that its crops depend on its (seed, step, slot) alone.
    side: of the square output, in pixels.
    """
    TRIES = 100  # replacements for an image that cannot be decoded, until one can

    def __init__(self, index_path, side):
        self.index_path = index_path
        self.side = side
        index, _ = read_weights(index_path, "the index of the data")
        files = index["files"].numpy()
        self.files = files.view(f"S{files.shape[1]}")[:, 0]  # millions of str would fill the memory
        self.sizes = index["stamps"].numpy()[:, 0]
        self.entries = index["entries"].numpy()
        bicubic = v2.InterpolationMode.BICUBIC  # antialiased
        # As in the official code, images wider than 1.48:1 always get the central 4:3 crop: they
        # have no crop of 90 % of their area with a ratio up to 4:3.
        self.random_crop = v2.RandomResizedCrop(side, scale=(0.9, 1.0), interpolation=bicubic)
        self.resize = v2.Resize(side, bicubic)

    def __reduce__(self):
        return Images, (self.index_path, self.side)  # each worker maps the index into its memory

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, key):
        """(seed, step, slot, indices) -> uint8 (B, 3, side, side), and the names of the images that
        could not be decoded, each of which is replaced by a random other one."""
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
                                f"is {name}: repair the data, or leave that part out")
            images.append(image)
        return torch.stack(images), undecodable

    def load(self, index, augment=True):
        """One image, uint8 (3, side, side), or None if it cannot be decoded; and its name."""
        place, offset, size = self.entries[index].tolist()
        path = os.fsdecode(self.files[place])
        name = path if size == WHOLE else f"{path} at byte {offset}"
        try:
            with open(path, "rb") as stream:
                if size != WHOLE and os.stat(stream.fileno()).st_size != self.sizes[place]:
                    raise UserError(f"data: {path} does not have the size that was indexed: "
                                    "restore the shard, or choose another --out")
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:  # a missing file or a failing disk is not a bad image
            raise UserError(f"data: {path} cannot be read ({error.strerror}): restore it, under "
                            "the same path on every node, and repeat the command") from None
        try:
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                needed = math.ceil(self.side / 0.9)  # crops keep at least .9 of the shorter side
                image.draft(None, (needed, needed))  # decodes a large JPEG at a lower resolution
                pixels = pil_to_tensor(to_rgb(image))
            return (self.random_crop(pixels) if augment else self.centre_crop(pixels)), name
        except Exception:  # decoders raise all kinds of errors
            return None, name

    def centre_crop(self, pixels):
        """The central square, resized. Resizing first would blow up a very thin image."""
        return self.resize(v2.functional.center_crop(pixels, [min(pixels.shape[1:])]))

    def fingerprint(self):
        """Depends on the files' names and order and on the offsets in shards, not on folders."""
        names = b"\n".join(os.path.basename(path) for path in self.files.tolist())
        return f"{len(self)} images, {zlib.crc32(self.entries, zlib.crc32(names)):08x}"


def to_rgb(image):
    """A PIL image -> upright 8-bit RGB, on white. ValueError for greys of unknown range."""
    with contextlib.suppress(Exception):  # broken metadata only costs the rotation
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError("the white level of 32-bit and floating-point greys is unknown")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class RandomImages(Dataset):
    """Random images in place of Images, for the bench."""

    def __init__(self, batch_size, side):
        self.batch = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8)

    def __len__(self):
        return 1_000_000

    def __getitem__(self, key):
        return self.batch, []

    def load(self, index, augment=True):
        return self.batch[0], "noise"

    def fingerprint(self):
        return "noise"


def make_index(paths, index_path):
    """Index the images under `paths`, unless index_path holds an up-to-date index.

    files: uint8 (F, longest), the paths of all shards and then all images: NumPy's fixed-width byte
    strings, viewed as the numbers that safetensors takes. stamps: (F, 2), size and time of each
    shard, zeros for images. entries: (N, 3), each image's file number, offset and size in bytes.
    """
    shards, images = find_images(paths)
    files = np.array([os.fsencode(path) for path in shards + images])
    files = files.view(np.uint8).reshape(len(files), -1)
    stamps = np.zeros((len(files), 2), dtype=np.int64)
    for place, path in enumerate(shards):
        status = os.stat(path)
        stamps[place] = status.st_size, status.st_mtime_ns
    tables = {"files": torch.from_numpy(files), "stamps": torch.from_numpy(stamps)}
    try:
        known, _ = read_weights(index_path, "index")
        if all(torch.equal(known[name], table) for name, table in tables.items()):
            return
    except (UserError, KeyError):  # no index yet, or a damaged or older one
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

    UserError for a folder that holds neither or both.
    """
    shards, images, others = [], [], []
    for path in paths:
        try:
            found = [path] if os.path.isfile(path) else sorted(list_files(path, set()))
        except OSError as error:
            raise UserError(f"data not found at {error.filename} ({error.strerror}): name folders "
                            "of images, or tar shards (the README says how to get CC3M)") from None
        tars = [name for name in found if name.lower().endswith(".tar")]
        pictures = [name for name in found if name.lower().endswith(IMAGE_SUFFIXES)]
        if not tars:  # a common CC3M downloader saves images without a suffix
            pictures += [name for name in found if not os.path.splitext(name)[1]]
        if tars and pictures:
            raise UserError(f"data: {path} holds both {len(tars)} tar shards, such as {tars[0]}, "
                            f"and {len(pictures)} images, such as {pictures[0]}: name one kind")
        if not tars and not pictures:
            raise UserError(f"data: no image and no .tar in {path}: name folders of images, or "
                            "plain .tar shards; unpack .zip and .tar.gz, and convert .parquet")
        shards += tars
        images += sorted(pictures)
        used = {*tars, *pictures}
        metadata = {name.removesuffix(".tar") + ".parquet" for name in tars}  # img2dataset's
        others += [name for name in found if name not in used and name not in metadata
                   and not name.lower().endswith(TEXT_SUFFIXES)]
    if others:
        print_rank_0("data: ignored files that are neither images nor .tar shards: "
                     f"{len(others)}, such as {others[0]}")
    return shards, images


def list_files(folder, seen):
    """The regular files under a folder (reading a FIFO would block), without hidden ones.

    Links to folders are followed; `seen` holds the (device, inode) of each folder already listed.
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


def index_shards(shards):
    """index_shard of each, in order; many of them in parallel."""
    workers = min(32, os.cpu_count()) if len(shards) >= 8 else 0
    context = start_method() if workers else None
    # A DataLoader, since the workers of a pool print tracebacks on Ctrl-C, and may die unnoticed.
    tables = DataLoader(shards, batch_size=None, collate_fn=index_shard, num_workers=workers,
                        multiprocessing_context=context)
    return tqdm(tables, "indexing shards", leave=False, disable=None if shards else True)


def index_shard(path):
    """The (offset, size) of each image in a tar; UserError if the tar is incomplete."""
    rows = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is sparse")
                if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES):
                    rows.append((member.offset_data, member.size))
            end = tar.offset
        with open(path, "rb") as file:  # for tarfile, any damaged header is the end
            file.seek(end)
            tail = file.read(1 << 20)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data: {path} cannot be read as a plain tar ({error}): download it again, "
                        "or leave it out") from None
    padded = 2 * tarfile.BLOCKSIZE <= len(tail) <= 2 * tarfile.RECORDSIZE
    if not padded or any(tail):
        raise UserError(f"data: {path} is damaged or truncated at byte {end}: download it again, "
                        "or leave it out")
    return rows


# ------------------------------------------------------------------------ checkpoints and log

FULL_STATE = dist_state.StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


class Checkpoints:
    """step-N.safetensors in a stage's folder: trained weights and optimizer moments.

    torch.distributed.checkpoint gives the state the same names and shapes with one process, DDP and
    FSDP2. A checkpoint is written in the background; if that fails, the next save or finish raises
    UserError. The newest two are kept.
    """

    def __init__(self, s, core, model, optimizer):
        self.folder = s.folder
        self.trained = [name for name, p in core.named_parameters() if p.requires_grad]
        self.model = model
        self.optimizer = optimizer
        self.thread = ThreadPoolExecutor(1)
        self.written = None  # the Future of the latest write

    def save(self, step):
        """Copy the state to the CPU and start writing it. All ranks take part."""
        self.finish()
        weights, state = dist_state.get_state_dict(self.model, self.optimizer, options=FULL_STATE)
        if RANK > 0:
            return
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        for name, moments in state["state"].items():
            for kind, tensor in moments.items():
                tensors[f"{kind}.{name}"] = tensor
        if not torch.cuda.is_available():  # on a CPU the state is not a copy yet
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        about = {"step": step, "param_groups": state["param_groups"]}
        self.written = self.thread.submit(self.write, step, tensors, about)

    def write(self, step, tensors, about):
        path = self.path(step)
        write_weights(path, tensors, about)
        older = [other for other in self.list() if other < path]
        for old in older[:-1]:
            with contextlib.suppress(FileNotFoundError):  # the user deleted it
                os.remove(old)

    def finish(self):
        """Wait until the latest checkpoint is written; UserError if that failed."""
        if self.written:
            self.written.result()

    def load(self):
        """Restore the newest intact checkpoint and return its step, or 0 if there is none."""
        step = broadcast(self.find() if RANK == 0 else 0)
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
        dist_state.set_state_dict(
            self.model, self.optimizer, model_state_dict=weights,
            optim_state_dict={"state": state, "param_groups": about["param_groups"]},
            # Not strict: frozen weights are not in a checkpoint.
            options=dist_state.StateDictOptions(full_state_dict=True, strict=False))
        print_rank_0(f"resumed from {self.path(step)}")
        return step

    def find(self):
        """The step of the newest checkpoint that is intact and of this model, or 0."""
        kinds = ("model", "exp_avg", "exp_avg_sq", "step")
        wanted = {f"{kind}.{name}" for kind in kinds for name in self.trained}
        for path in reversed(self.list()):
            try:
                tensors, about = read_weights(path, "checkpoint")
                if tensors.keys() == wanted and path == self.path(about.get("step", 0)):
                    return about["step"]
                print_rank_0(f"{path} is of another step or model: skipped")
            except UserError as error:
                print_rank_0(f"{error}: skipped")
        return 0

    def path(self, step):
        return os.path.join(self.folder, f"step-{step:08}.safetensors")

    def list(self):
        """The checkpoint files, oldest first, intact or not."""
        return sorted(glob.glob(os.path.join(glob.escape(self.folder), "step-*.safetensors")))


def is_intact(path):
    """Whether a file of weights exists and matches its checksum."""
    try:
        return bool(read_weights(path, "result"))
    except UserError:
        return False


class Log:
    """log.csv. Losses (means) and images/s (total) are of all ranks since the previous row;
    undecodable images and peak memory count since the start or restart; the rest is of the step."""
    BINS = 10      # of t or of the mask ratio
    ENOUGH = 1000  # images to have seen before their share of undecodable ones can stop the run

    def __init__(self, s, start, total, data_size, device):
        self.s = s
        self.start = start
        self.total = total
        self.data_size = data_size
        self.images_per_step = s.batch_size * s.accum * WORLD
        self.losses = torch.zeros(self.BINS, device=device)
        self.images = torch.zeros(self.BINS, device=device)
        self.undecodable = 0       # images of all ranks, at the last row
        self.undecodable_here = 0  # images of this rank
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
        """The rows up to the step from which the run resumes; none if there is no log."""
        if not os.path.exists(self.path):
            return []
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                header, *rows = csv.reader(file)
            rows = [row for row in rows if int(row[0]) <= self.start]
            if header != self.columns or int(rows[-1][0]) != self.start:
                raise ValueError("the row of this step is missing")
            return rows
        except (OSError, ValueError, IndexError, csv.Error):
            raise UserError(f"{self.path} cannot be read as this run's log: repair it, or move it "
                            "away") from None

    def add(self, losses, levels, undecodable):
        """Add a micro-batch: losses (B,), their t or mask ratios (B,), undecodable names."""
        bins = (levels * self.BINS).long().clamp(max=self.BINS - 1)
        self.losses.index_add_(0, bins, losses)
        self.images.index_add_(0, bins, torch.ones_like(losses))
        for name in undecodable[:max(0, 20 - self.undecodable_here)]:
            tqdm.write(f"cannot be decoded, replaced by another: {name}", file=sys.stderr)
        self.undecodable_here += len(undecodable)

    def write_row(self, step, grad_norm, lr, val_losses):
        """Sum over the ranks and write a row. This synchronises with the device.

        UserError if the gradient is not finite, or if too many images could not be decoded.
        """
        grad_norm = float(grad_norm.full_tensor() if self.s.shard else grad_norm)
        if not math.isfinite(grad_norm):
            raise_on_all_ranks(f"the gradient is not finite at step {step}: try a lower --lr, or "
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
        bins = ["" if math.isnan(mean) else f"{mean:.6g}" for mean in bins]  # nan: an empty bin
        epoch = step * self.images_per_step / self.data_size
        val_losses = [f"{mean:.6g}" for mean in val_losses or []] or ["", ""]
        self.rows.append([
            step, f"{epoch:.4f}", f"{loss:.6g}", *bins, f"{grad_norm:.4g}", f"{lr:.3g}",
            f"{speed:.4g}", f"{peak_memory():.2f}", self.undecodable, *val_losses])
        if RANK == 0:
            write_file(self.path, self.write)
        progress = f"loss {loss:.4f}, {speed:.0f} images/s"
        if self.bar.disable:  # there is no terminal
            print_rank_0(f"step {step} of {self.total}: {progress}")
        self.bar.set_postfix_str(progress, refresh=False)
        self.bar.update(step - self.bar.n)
        self.losses.zero_()
        self.images.zero_()
        self.clock = time.perf_counter()

    def check_undecodable(self, step):
        """UserError, on all ranks, if more than a tenth of the images could not be decoded."""
        seen = (step - self.start) * self.images_per_step
        complete = self.start == 0 and step == self.total  # the rest of a resumed run may be short
        if self.undecodable > 0.1 * seen and (seen >= self.ENOUGH or complete):
            raise_on_all_ranks(f"data: {self.undecodable} of {seen} images cannot be decoded: "
                               "repair the data, or leave that part out")

    def write(self, part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])


def peak_memory():
    """The peak memory of this process in GB, on the GPU, or else on the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ------------------------------------------------------------------------------------ results

def write_result(s, model, path, checksums=None):
    """Stage 1's projectors and denoiser, or the CLIP of the other stages, by rank 0."""
    weights = dist_state.get_model_state_dict(model, options=FULL_STATE)  # all ranks take part
    if RANK == 0 and s.stage == 1:
        write_weights(path, weights, checksums)
    elif RANK == 0:
        clip = build_enhanced_clip(s, weights)
        if path == s.result:
            export_hf(clip, os.path.join(s.out, "hf"))
        export_open_clip(clip, os.path.dirname(path))
    if dist.is_initialized():
        dist.barrier()  # the other ranks read the file next


def build_enhanced_clip(s, weights):
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


def evaluate_before_and_after(s, device):
    """Evaluate the original CLIP and the result: print the table, write result.json."""
    results = {}
    for key, weights in (("before", s.clip_weights), ("after", s.result)):
        clip, preprocess, tokenizer = load_clip(s.backbone, weights)
        results[key] = evaluate(clip.to(device), preprocess, tokenizer, s.benchmark, s.zeroshot)
    print_table(results)
    summaries = {key: summary(result) for key, result in results.items()}
    write_json(os.path.join(s.out, "result.json"), summaries)
    raise_failures(results.values())


PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362,
               "RTX 4090": 165}  # dense bf16, from the vendor's datasheets


@torch.compiler.set_stance("force_eager")  # the counter does not see into compiled code
def print_bench(s, core, log, device):
    """Print speed, memory and MFU; the first row of the log is warm-up."""
    column = log.columns.index("images_per_s")
    speed = float(np.median([float(row[column]) for row in log.rows[1:]]))
    steps_per_s = speed / log.images_per_step
    images = torch.rand(s.batch_size, 3, *2 * [image_side(core.visual)], device=device)
    memory = peak_memory()  # before the extra pass below
    set_grad_checkpointing(core, False)  # MFU does not count recomputation
    with FlopCounterMode(display=False) as counter, autocast(s, device):
        core(images)[0].mean().backward()
    tflops = counter.get_total_flops() * s.accum * steps_per_s / 1e12
    name = device_name(device)
    mfu = f"no peak known for {name}"
    for gpu, peak in PEAK_TFLOPS.items():
        if gpu in name:
            mfu = f"{100 * tflops / peak:.1f} % of {peak} in bf16"
    print_rank_0(f"s / 100 iterations   {100 / steps_per_s:.2f}")
    print_rank_0(f"images / s           {speed:.4g}")
    print_rank_0(f"peak memory          {memory:.2f} GB")
    print_rank_0(f"model TFLOP/s        {tflops:.2f} per device")
    print_rank_0(f"MFU                  {mfu}")


# ------------------------------------------------------------------------ one run per directory

# Options that may differ between the machines of a run: paths and workers.
PER_MACHINE = {"out", "folder", "result", "data", "val", "benchmark", "zeroshot", "clip_weights",
               "vae", "vqgan", "init", "workers"}
# Options that may change when a run is resumed, but must agree among its ranks.
PER_START = {"stage", "stages", "save_every", "sample_every", "log_every", "export_every", "accum",
             "compile", "shard", "grad_checkpoint"}


def shared_settings(s):
    return {name: value for name, value in vars(s).items() if name not in PER_MACHINE}


def compare_ranks(facts):
    """End all ranks unless `facts` (settings and more, by name) are the same on each."""
    if WORLD == 1:
        return
    of_ranks = [None] * WORLD
    dist.all_gather_object(of_ranks, facts)
    for name, value in of_ranks[0].items():
        others = [rank for rank in range(WORLD) if of_ranks[rank].get(name) != value]
        if others:
            ranks = ", ".join(map(str, others))
            raise_on_all_ranks(
                f"the ranks of one run differ: {name} is {value} on rank 0, and "
                f"{of_ranks[others[0]].get(name)} on rank {ranks}: give all of them the same")


def check_same_run(s, data, val, pretrained):
    """UserError unless all ranks have the same settings, data and weights, and these agree with the
    stage's settings.json, which is written by the first start."""
    facts = shared_settings(s) | {"data": data.fingerprint()}
    for name, value in pretrained.checksums.items():
        facts[f"checksum of the {name}"] = value
    compare_ranks(facts | {"validation data": val and val.fingerprint()})
    if s.preset == "bench":
        return
    settings = {name: value for name, value in facts.items() if name not in PER_START}
    settings["micro-batches of a step (processes x --accum)"] = s.accum * WORLD
    path = os.path.join(s.folder, "settings.json")
    if not os.path.exists(path):
        if RANK == 0:
            write_json(path, settings)
        return
    before = read_json(path)
    options = stage_parser(s.stage, s)
    changed = []
    for name in sorted(before.keys() | settings.keys()):
        was = before.get(name, options.get_default(name))  # older runs lack newer options
        if was != settings.get(name):
            changed.append(f"{name} was {was}, is {settings.get(name)}")
    if changed:
        raise_on_all_ranks(f"{s.folder} holds a run with other settings ({'; '.join(changed)}): "
                           "give it the same again, or choose another --out")


@contextlib.contextmanager
def lock_run_directory(s):
    """Create the run directory and lock it (rank 0): UserError if another run uses it."""
    if RANK > 0:
        yield
        return
    import fcntl  # not on Windows
    for name in ["stage1", "stage2"] if s.stage == "e2e" else ["e2e"]:
        if os.path.exists(os.path.join(s.out, name, "settings.json")):
            raise UserError(f"--out {s.out} holds another run ({name}): choose another directory")
    try:
        os.makedirs(s.out, exist_ok=True)
        file = open(os.path.join(s.out, ".lock"), "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        message = f"--out {s.out} cannot be written ({error.strerror}): choose another"
        raise UserError(message) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out {s.out} is in use by another run: choose another; several "
                            "processes of one run are started with torchrun") from None
        except OSError as error:
            print_rank_0(f"--out {s.out} is on a file system without locks ({error.strerror}): do "
                         "not start another run in it")
        else:
            remove_parts(s)
        yield


def remove_parts(s):
    """Remove the partial files of a run that was killed while writing."""
    for folder in ("", "hf", "open_clip", "clip-*", "stage1", "stage2", "e2e", "*/samples"):
        for part in glob.glob(os.path.join(glob.escape(s.out), folder, ".part-*")):
            os.remove(part)


def main(argv=None):
    run_command("train.py", run, argv)


if __name__ == "__main__":
    main()
