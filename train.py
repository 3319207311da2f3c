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
import dataclasses
import datetime
import fcntl
import gc
import glob
import io
import json
import math
import os
import resource
import signal
import sys
import tarfile
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep, not spin

import numpy as np
import open_clip
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

from eval_mmvp import check_benchmark, check_zeroshot, evaluate, print_table, summary
from genhancer import (
    BACKBONES,
    TOY,
    Continuous,
    Discrete,
    Flux,
    FluxConfig,
    Parser,
    Perceiver,
    PerceiverConfig,
    UserError,
    check_export,
    export_hf,
    find_backbone,
    image_side,
    inject_lora,
    load_clip,
    load_strictly,
    merge_lora,
    read_json,
    read_weights,
    run_command,
    write_file,
    write_json,
    write_weights,
)
from vae import AutoEncoder, AutoEncoderConfig, load_vae
from vqgan import VQGAN, VQGANConfig, load_vqgan

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


# ------------------------------------------------------------------------------------ settings

def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high] if `above`."""
    def parse(text):
        value = kind(text)
        too_low = value <= low if above else value < low
        if too_low or value > high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = "number"  # argparse names it in its message
    return parse


def nonempty(text):
    """An argparse type: any text but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty: give one, or leave the option out")
    return text


COUNT = number(int, 1, 10**9)
FEW = number(int, 1, 1024)
SIZE = number(int, 1, 2**14)
RATE = number(float, 0, above=True)
SHARE = number(float, 0, 1)


def option(default, kind, help, nargs=None, metavar=None):
    """A field of Settings. kind: an argparse type, a tuple of choices, or bool for a switch."""
    about = {"kind": kind, "help": help, "nargs": nargs, "metavar": metavar}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a stage, each an option of the command line.

    The defaults are the paper's for stage 1 (Sec. 5.1, App. B) and, where it is silent, the
    official code's. PRESETS, STAGE_DEFAULTS and what was typed override them (make_settings).
    """
    preset: str = option("paper", ("paper", "toy", "bench"), "which set of defaults")
    stage: object = option("all", ("1", "2", "e2e", "all"), "all: 1, 2, and the benchmark")
    denoiser: str = option("rf", ("rf", "perceiver"), "continuous or discrete")
    backbone: str = option("openai-l14-224", nonempty,
                           f"{', '.join(BACKBONES)}, or open_clip's MODEL:TAG")
    clip_weights: str = option(None, nonempty, "CLIP's file or HuggingFace folder; else downloaded")
    vae: str = option("weights/ae.safetensors", nonempty, "rf: FLUX.1's ae.safetensors")
    vqgan: str = option("weights/vqgan_imagenet_f16_16384.safetensors", nonempty,
                        "perceiver: taming's VQ-GAN, converted by vqgan.py")
    data: tuple = option(("data/cc3m",), nonempty, "training images: folders of images, tar "
                         "shards, or folders of tar shards", "+")
    val: tuple = option((), nonempty, "held-out images, of which the first 512 are used", "+")
    benchmark: str = option("data/MMVP_VLM", nonempty, "stage all: MMVP-VLM's folder")
    zeroshot: tuple = option((), nonempty, "stage all: NAME:PATH of retention tasks", "*")
    out: str = option(None, nonempty, "the run's folder; default: runs/PRESET-DENOISER")
    init: str = option(None, nonempty, "stage 1, e2e: a denoiser with FLUX's names (Table 7); "
                       "stage 2: another run's stage1/last.safetensors")

    epochs: float = option(1.0, RATE, "passes over the data")
    steps: int = option(None, COUNT, "optimizer steps of a stage; wins over --epochs")
    batch_size: int = option(16, SIZE, "images in a micro-batch of one process")
    accum: int = option(2, SIZE, "micro-batches that a process accumulates into a step")
    lr: float = option(1e-4, RATE, "learning rate of denoiser and projectors")
    lr_clip: float = option(None, RATE, "learning rate of the visual tower; default: --lr")
    warmup: int = option(10, number(int, 0), "steps of linear warm-up; then the rate is constant")
    weight_decay: float = option(0.01, number(float, 0), "AdamW's")
    clip_grad: float = option(1.0, RATE, "largest norm of the gradient")
    seed: int = option(0, number(int, 0, 2**63 - 1), "of everything random")

    precision: str = option(None, ("bf16", "fp32"), "autocast's; default: bf16 where it is fast")
    workers: int = option(8, number(int, 0, 1024), "data loading processes of each rank")
    compile: bool = option(False, bool, "torch.compile the networks (other dropout draws)")
    shard: bool = option(False, bool, "FSDP2: weights, gradients and optimizer over the ranks")
    grad_checkpoint: bool = option(False, bool, "recompute the blocks in the backward pass")
    save_every: int = option(1000, COUNT, "steps between checkpoints")
    sample_every: int = option(1000, COUNT, "steps between pictures and held-out losses")
    export_every: int = option(None, COUNT, "stage 2, e2e: steps between whole CLIPs, clip-STEP")
    log_every: int = option(50, COUNT, "steps between rows of log.csv")

    width: int = option(None, SIZE, "the denoiser's; default: 3072 (rf), 1024 (perceiver)")
    condition: tuple = option((768, 4096), SIZE, "rf: widths of the projected [CLS], to modulate "
                              "and as context token", 2, ("VEC", "CONTEXT"))
    depth: tuple = option((2, 4), FEW, "rf: blocks (Table 5)", 2, ("MM-DIT", "SINGLE-DIT"))
    layers: int = option(6, FEW, "perceiver: layers (Table 5)")
    timesteps: str = option("logit-normal", ("logit-normal", "uniform"), "rf: of t (Table 4)")
    scale: float = option(1.0, RATE, "rf: s of the scaled logit-normal (Eq. 6, Table 4)")
    mask_ratio: tuple = option((0.5, 0.9), number(float, 0, 1, above=True),
                               "perceiver: share of masked tokens (Table 8)", 2, ("LOW", "HIGH"))
    local_ratio: float = option(0.0, SHARE, "share of local tokens in the condition (Fig. 5)")
    no_lora: bool = option(False, bool, "train the whole visual tower (Fig. 8)")
    freeze_denoiser: bool = option(False, bool, "stage 2: train LoRA alone (Fig. 9)")
    shuffle_target: bool = option(False, bool, "a control: reconstruct from another image's [CLS]")

    @property
    def folder(self):
        """Where the stage's checkpoints, log and pictures lie."""
        return os.path.join(self.out, "e2e" if self.stage == "e2e" else f"stage{self.stage}")

    @property
    def result(self):
        """What the stage makes: projectors and denoiser, or the enhanced CLIP."""
        if self.stage == 1:
            return os.path.join(self.folder, "last.safetensors")
        return os.path.join(self.out, "clip.safetensors")


STAGES = {"1": (1,), "2": (2,), "e2e": ("e2e",), "all": (1, 2)}

PRESETS = {
    "paper": {},
    "toy": dict(  # tuned on the toy's dev benchmark
        backbone="toy", vae=f"{TOY}/vae.safetensors", vqgan=f"{TOY}/vqgan.safetensors",
        data=(f"{TOY}/data/train",), val=(f"{TOY}/data/val",), benchmark=f"{TOY}/data/mmvp",
        zeroshot=(f"folder:{TOY}/data/zeroshot",), width=128, condition=(256, 256), depth=(1, 2),
        layers=4, batch_size=64, accum=1, workers=0, save_every=200, log_every=10),
    "bench": dict(data=(), accum=1, steps=110, log_every=10, save_every=None, sample_every=None),
}
STAGE_DEFAULTS = {
    "paper": {1: {}, 2: dict(lr=1e-5), "e2e": dict(epochs=2.0, lr_clip=1e-5)},
    "toy": {1: dict(steps=250, lr=2e-3), 2: dict(steps=130, lr=1e-3, lr_clip=4e-4),
            "e2e": dict(steps=380, lr=2e-3, lr_clip=4e-4)},
    "bench": {1: {}, 2: {}, "e2e": {}},
}
TOY_PERCEIVER_STEPS = {1: 350, 2: 150, "e2e": 500}  # in as many steps as rf it moves CLIP less
BENCH_ON_CPU = dict(backbone="ViT-B-32-quickgelu:openai", width=768, batch_size=4, workers=0,
                    steps=7, log_every=1)


def read_command_line(argv=None):
    """What was typed, {name of a setting: value}, and nothing else."""
    parser = Parser(prog="train.py", description=__doc__, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Settings):
        flag, kind = f"--{field.name.replace('_', '-')}", field.metadata["kind"]
        help = field.metadata["help"]
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
            continue
        if field.default not in (None, ()):
            default = field.default if isinstance(field.default, tuple) else [field.default]
            help = f"{help} (default: {' '.join(map(str, default))})"
        form = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        about = {key: field.metadata[key] for key in ("nargs", "metavar")}
        parser.add_argument(flag, help=help, **form, **about)
    return vars(parser.parse_args(argv))


def make_settings(typed, stage):
    """The settings of one stage: the preset's, the stage's, and over both what was typed."""
    preset = typed.get("preset", "paper")
    values = PRESETS[preset] | STAGE_DEFAULTS[preset][stage]
    if preset == "toy" and typed.get("denoiser") == "perceiver":
        values["steps"] = TOY_PERCEIVER_STEPS[stage]
    if preset == "bench" and not torch.cuda.is_available():
        values |= BENCH_ON_CPU
    if "epochs" in typed:
        values.pop("steps", None)
    values |= typed | {"stage": stage}
    s = Settings(**values)
    precision = "bf16" if is_bf16_fast() else "fp32"
    filled_in = dict(
        out=s.out or f"runs/{s.preset}-{s.denoiser}",
        width=s.width or {"rf": 3072, "perceiver": 1024}[s.denoiser],
        lr_clip=s.lr_clip or s.lr,
        precision=s.precision or precision,
    )
    return dataclasses.replace(s, **filled_in)


def is_bf16_fast():
    """Whether the device computes in bf16 by itself; emulation is 10 times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


# ------------------------------------------------------------------------------------ a run

def run(argv):
    """Parse, check, hold the run's folder, train each stage, compare before and after."""
    typed = read_command_line(argv)
    bench = typed.get("preset") == "bench"
    wish = typed.pop("stage", "1" if bench else "all")
    if wish == "all" and (bench or typed.keys() & {"init", "lr"}):
        raise UserError("the bench, --init and --lr belong to one stage: name it with --stage")
    settings = [make_settings(typed, stage) for stage in STAGES[wish]]
    lock = lock_out(settings[0]) if RANK == 0 else None
    if LOCAL_RANK == 0:
        if settings[0].preset == "toy":
            from toy.make_toy import draw_world
            draw_world(os.path.join(TOY, "data"))
        check(settings[0], compares=wish == "all")
    device = start_processes()
    try:
        for s in settings:
            train_stage(s, device)
            gc.collect()  # DDP refers to itself, and would keep a stage's model beside the next
    except RuntimeError as error:
        reason = explain(error)
        if reason is None:
            raise
        raise UserError(reason) from None
    if dist.is_initialized():
        dist.destroy_process_group()
    if wish == "all" and RANK == 0:
        compare(settings[-1], device)
    del lock  # held until here


def train_stage(s, device):
    """One stage, from its settings to its result. It goes on from its newest checkpoint."""
    data = open_data(s)
    images_per_step = s.batch_size * s.accum * WORLD
    total = s.steps or math.ceil(s.epochs * len(data) / images_per_step)
    check_same_run(s, data)
    if agree(RANK == 0 and is_whole(s.result)):
        return say(f"stage {s.stage} is finished: {s.result}")
    heldout = load_heldout(s, data)

    core = build_model(s, device)        # the GenHancer; set_stage freezes CLIP, or adds LoRA
    model = distribute(s, core, device)  # the same model, wrapped for several processes
    optimizer = make_optimizer(s, core)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    start, undecodable = load_checkpoint(s, core, model, optimizer)
    introduce(s, core, data, images_per_step, total)
    log = Log(s, start, total, undecodable, device)
    batches = load_batches(s, data, start, total, device)

    for step in range(start, total):
        for group in optimizer.param_groups:  # linear warm-up, then constant
            group["lr"] = group["initial_lr"] * min(1, (step + 1) / max(1, s.warmup))
        for micro in range(s.accum):
            images, skipped = next(batches)
            images = images.to(device, non_blocking=True).float() / 255  # (B, 3, H, W) in [0, 1]
            condition_images = images.roll(1, 0) if s.shuffle_target else images
            seed_draws("noise", s.seed, step, micro * WORLD + RANK)
            with reducing(s, model, micro):
                with autocast(s, device):
                    losses, levels = model(images, condition_images)  # Eq. 3 or 4, each (B,)
                (losses.mean() / s.accum).backward()
            log.add(losses.detach(), levels, skipped)
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, s.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        sampling = is_due(done, s.sample_every, total)
        saving = is_due(done, s.save_every, total)
        exporting = is_due(done, s.export_every, total) and s.stage != 1 and done < total
        if sampling or saving or exporting or is_due(done, s.log_every, total):
            grad_norm = finite_norm(s, grad_norm, done)
            heldout_losses = look(s, done, core, model, heldout) if sampling else ("", "")
            epoch = done * images_per_step / len(data)
            lr = optimizer.param_groups[0]["lr"]
            log.write_row(done, epoch, grad_norm, lr, heldout_losses)
        if exporting:
            write_result(s, model, os.path.join(s.out, f"clip-{done:06}.safetensors"))
        if saving:
            save_checkpoint(s, done, model, optimizer, log.undecodable)

    log.bar.close()
    if s.preset == "bench":
        return print_bench(s, core, log, device)
    write_result(s, model, s.result)
    say(f"stage {s.stage} is done: {s.result}; {log.undecodable} images could not be decoded")


def is_due(step, every, total):
    """Whether something that is done each `every` steps, and at the end, is due. None: never."""
    return every is not None and (step % every == 0 or step == total)


def finite_norm(s, grad_norm, step):
    """The gradient's norm, which every rank sees, as a number; UserError if it is not finite."""
    norm = float(grad_norm.full_tensor() if s.shard else grad_norm)
    if not math.isfinite(norm):
        newest = (list_checkpoints(s) or ["none"])[-1]
        raise UserError(f"the gradient is not finite at step {step}; the newest checkpoint is "
                        f"{newest}: try a lower --lr, or --precision fp32, in another --out")
    return norm


@torch.compiler.set_stance("force_eager")  # --compile is for the shapes of training
@torch.no_grad()
def look(s, step, core, model, heldout):
    """Draw samples/STEP.png; return the held-out losses, with the right and with shuffled [CLS]."""
    core.eval()
    losses = ("", "")
    if s.val:
        losses = [f"{heldout_loss(s, model, heldout, roll):.6g}" for roll in (0, 1)]
    seed_draws("samples", s.seed, step)
    batch = heldout[:8].to(core.mean.device).float() / 255
    with autocast(s, batch.device):
        columns = [batch, core.reconstruct(batch)]
        if s.denoiser == "perceiver":
            columns.append(core.reconstruct(batch, steps=1, mask_ratio=0.75))
    core.train()
    if RANK == 0:
        draw_columns(columns, os.path.join(s.folder, "samples", f"{step:06}.png"))
    return losses


def heldout_loss(s, model, heldout, roll):
    """The mean loss of held-out images, each with the [CLS] of the image `roll` before it."""
    device = next(model.parameters()).device
    total = 0.0
    others = heldout.roll(roll, 0).split(s.batch_size)
    batches = zip(heldout.split(s.batch_size), others, strict=True)
    for i, (images, condition_images) in enumerate(batches):
        images = images.to(device).float() / 255
        condition_images = condition_images.to(device).float() / 255
        seed_draws("held-out", s.seed, i)  # the same timesteps, noise and masks each time
        with autocast(s, device):
            losses, _ = model(images, condition_images)
        total += losses.sum().item()
    return total / len(heldout)


def draw_columns(columns, path):
    """A grid: for each image its entry from every batch in `columns`, two images to a row."""
    sheet = torch.stack(columns, 1).flatten(0, 1).float().cpu()
    sheet = torch.nn.functional.interpolate(sheet, scale_factor=max(1, 128 // sheet.shape[-1]))
    write_file(path, lambda part: save_image(sheet, part, nrow=2 * len(columns)))


def introduce(s, core, data, images_per_step, total):
    """Say what a reader can check: what trains, on how many images, for how long."""
    if s.preset == "bench":
        say(f"bench: RANDOM weights{'' if s.data else ' and images'}, which learn nothing; "
            f"{s.backbone}, width {s.width}")
    trained = sum(p.numel() for p in core.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in core.parameters())
    say(f"stage {s.stage}: {trained:,} of {whole:,} parameters train; {len(data):,} images; "
        f"{total:,} steps of {images_per_step} images "
        f"({WORLD} processes x {s.batch_size} x accumulation {s.accum}); {s.precision}")


# ------------------------------------------------------------------------ model and processes

def build_model(s, device):
    """The GenHancer of a stage: pretrained CLIP and autoencoder, and a denoiser to train."""
    # A new backbone is a row of BACKBONES in genhancer.py, or --backbone MODEL:TAG of open_clip.
    clip, _, _ = load_clip(s.backbone, s.clip_weights, random=s.preset == "bench")
    visual = clip.visual.to(device)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    autoencoder = load_autoencoder(s).to(device, memory_format=layout)
    torch.manual_seed(s.seed)
    with torch.device(device):
        if s.denoiser == "rf":
            denoiser = Flux(flux_config(s, autoencoder))
            core = Continuous(visual, autoencoder, denoiser, s.timesteps, s.scale, s.local_ratio)
        else:
            codebook = autoencoder.quantize.embedding.weight
            denoiser = Perceiver(perceiver_config(s, codebook), codebook)
            core = Discrete(visual, autoencoder, denoiser, s.mask_ratio, s.local_ratio)
    load_start(s, core)
    if s.grad_checkpoint:
        denoiser.grad_checkpointing = True
        visual.set_grad_checkpointing(True)
    if s.compile:
        warnings.filterwarnings("ignore", ".*lru_cache.*")  # Dynamo traces what it holds: harmless
        for part in (denoiser, visual, autoencoder.encoder):
            part.compile()
    # Stage 1: freezes CLIP. Stages 2 and e2e: injects LoRA.
    return core.set_stage(s.stage, not s.no_lora, s.freeze_denoiser)


def load_autoencoder(s):
    """The frozen VAE (rf) or VQ-GAN (perceiver); for the bench with random weights."""
    if s.preset == "bench":
        random = AutoEncoder(AutoEncoderConfig()) if s.denoiser == "rf" else VQGAN(VQGANConfig())
        return random.eval().requires_grad_(False)
    return load_vae(s.vae) if s.denoiser == "rf" else load_vqgan(s.vqgan)


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


def load_start(s, core):
    """Load what a stage starts from: stage 1's weights for stage 2, FLUX's with --init."""
    if s.preset == "bench":
        return
    if s.stage == 2:
        what = "stage 1's weights for these settings"
        trained = torch.nn.ModuleDict({"denoiser": core.denoiser, "projectors": core.projectors})
        load_strictly(trained, read_weights(start_of(s), what)[0], start_of(s), what)
    elif s.init:
        what = "FLUX's weights for this --denoiser, --width, --condition and --depth"
        load_strictly(core.denoiser, read_weights(s.init, what)[0], s.init, what)


def start_of(s):
    """The file that stage 2 starts from."""
    return s.init or os.path.join(s.out, "stage1", "last.safetensors")


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


def start_processes():
    """This process's device, set up; under torchrun, the processes find each other."""
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains
    else:
        device = torch.device("cpu")
        torch.backends.cuda.enable_flash_sdp(False)  # the CPU's too: its backward is slow
    if "RANK" in os.environ:
        nccl = device.type == "cuda"
        dist.init_process_group("nccl" if nccl else "gloo", timeout=datetime.timedelta(minutes=30),
                                device_id=device if nccl else None)
    return device


def distribute(s, core, device):
    """Wrap the model for several processes: DDP, or with --shard FSDP2."""
    if s.shard:
        return shard(s, core)
    if WORLD > 1:
        devices = [device] if device.type == "cuda" else None
        # What replaces broadcast_buffers is not in torch 2.11.
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
        return DistributedDataParallel(core, devices, broadcast_buffers=False,
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


def agree(number):
    """Rank 0's integer, on every rank."""
    if WORLD == 1:
        return number
    box = torch.tensor(int(number), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.broadcast(box, 0)
    return int(box)


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
ENTRY = np.dtype([("file", np.int32), ("offset", np.int64), ("size", np.int64)])
WHOLE = -1  # the size of an entry that is a whole file


def open_data(s):
    """The training images; noise for the bench without --data."""
    side = backbone_side(s)
    if not s.data:
        return RandomImages(s.batch_size, side)
    return Images(s.data, side, os.path.join(s.out, "index-data.npz"))


def load_heldout(s, data):
    """512 images of --val, or for the pictures alone 8 of --data: uint8 (n, 3, H, W)."""
    if s.preset == "bench":
        return None
    count = 8
    if s.val:
        data = Images(s.val, data.side, os.path.join(s.out, "index-val.npz"))
        count = 512
    images = [data.load(i, augment=False)[0] for i in range(min(len(data), count))]
    images = [image for image in images if image is not None]
    if not images:
        raise UserError(f"none of the first images of {', '.join(s.val or s.data)} can be decoded")
    return torch.stack(images)


def load_batches(s, data, start, total, device):
    """This rank's micro-batches from step `start` on, as Images.__getitem__ gives them."""
    keys = batch_keys(s, len(data), start, total)
    return iter(DataLoader(data, batch_size=None, sampler=keys, num_workers=s.workers,
                           pin_memory=device.type == "cuda"))


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
    """Training images by index, from folders and tar shards.

    An item is a whole micro-batch, so that its crops follow from its own (seed, step, slot).
    paths: as find_images takes them. side: of the square output, in pixels. index_path: where
    the index is cached.
    """

    def __init__(self, paths, side, index_path):
        if RANK == 0:
            make_index(paths, index_path)
        barrier()
        index = np.load(index_path)
        self.files = index["files"]      # an array: a list would be copied by each worker in time
        self.stamps = index["stamps"]
        self.entries = index["entries"]
        if not len(self.entries):
            raise UserError(f"data: no image in {', '.join(paths)}: name other folders or shards")
        self.side = side
        bicubic = v2.InterpolationMode.BICUBIC  # antialiased
        self.random_crop = v2.RandomResizedCrop(side, scale=(0.9, 1.0), interpolation=bicubic)
        self.centre_crop = v2.Compose([v2.Resize(side, bicubic), v2.CenterCrop(side)])

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, key):
        """(seed, step, slot, indices) -> uint8 (B, 3, side, side), and the names of skipped images.

        The next image stands in for one that cannot be decoded.
        """
        *draw, indices = key
        seed_draws("crops", *draw)
        images, skipped = [], []
        for index in indices:
            image, name = self.load(index)
            while image is None:
                skipped.append(name)
                if len(skipped) > 1000:
                    raise UserError(f"data: over 1000 images of a batch cannot be decoded: {name}")
                index = (index + 1) % len(self)
                image, name = self.load(index)
            images.append(image)
        return torch.stack(images), skipped

    def load(self, index, augment=True):
        """One image, uint8 (3, side, side), or None if it cannot be decoded; and its name."""
        file, offset, size = self.entries[index]
        path = os.fsdecode(bytes(self.files[file]))
        name = path if size == WHOLE else f"{path} at byte {offset}"
        try:
            with open(path, "rb") as stream:
                if size != WHOLE and stamp_of(stream.fileno()) != tuple(self.stamps[file]):
                    raise UserError(f"data: {path} is not what it was when the run began: put the "
                                    "shard back, or choose another --out")
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:  # a vanished file or a failing disk is no bad image
            raise UserError(f"data: {path} can no longer be read ({error.strerror}): put it back "
                            "and run the same command again") from None
        try:
            with Image.open(io.BytesIO(data)) as image:
                needed = math.ceil(self.side / 0.9)  # no crop is less than .9 of a side
                image.draft(None, (needed, needed))  # JPEG: decode at a fraction that is enough
                crop = self.random_crop if augment else self.centre_crop
                return crop(pil_to_tensor(to_rgb(image))), name
        except Exception:  # the decoders raise anything; from memory, the image is at fault
            return None, name

    def fingerprint(self):
        """The same for the same images in the same order, wherever they lie."""
        names = b"\n".join(os.path.basename(path) for path in self.files)
        return f"{len(self)} images, {zlib.crc32(self.entries.tobytes(), zlib.crc32(names)):08x}"


def to_rgb(image):
    """A PIL image of any mode -> upright 8-bit RGB, on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it to white
        values = np.asarray(image)
        values = values >> 8 if values.max() > 255 else values
        image = Image.fromarray(values.astype(np.uint8))
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


def backbone_side(s):
    """The side of the square images that the backbone takes, in pixels."""
    model = find_backbone(s.backbone, s.clip_weights, random=s.preset == "bench").model
    return open_clip.get_model_config(model)["vision_cfg"]["image_size"]


def make_index(paths, index_path):
    """Index the images under `paths`, unless index_path holds the index of these very files.

    files: all shards and images, sorted. stamps: size and time of each shard, zeros for images.
    entries: for each image its file, its offset and its size in bytes.
    """
    shards, images = find_images(paths)
    files = np.array([os.fsencode(path) for path in shards + images])
    stamps = np.array([stamp_of(path) for path in shards] + [(0, 0)] * len(images), dtype=np.int64)
    try:
        known = np.load(index_path)
        if np.array_equal(known["files"], files) and np.array_equal(known["stamps"], stamps):
            return
    except Exception:  # there is none yet, or it is damaged: np.load raises nearly anything
        pass
    entries = [np.array([], dtype=ENTRY)]
    for number, table in enumerate(index_shards(shards)):
        entries.append(np.array([(number, *row) for row in table], dtype=ENTRY))
    whole = [(len(shards) + number, 0, WHOLE) for number in range(len(images))]
    entries = np.concatenate([*entries, np.array(whole, dtype=ENTRY)])

    def write(part):
        with open(part, "wb") as file:
            np.savez(file, files=files, stamps=stamps, entries=entries)

    write_file(index_path, write)


def find_images(paths):
    """Folders and tar files -> (shards, images), two lists of files. UserError if neither.

    Of a folder that holds tar files, subfolders included, these alone count.
    """
    shards, images = [], []
    for path in paths:
        if os.path.isdir(path):
            try:
                found = list_files(path)
            except OSError as error:
                raise UserError(f"data: a folder cannot be read: {error}") from None
        elif os.path.isfile(path):
            found = [path]
        else:
            raise UserError(f"data not found at {path}: name folders of images, or tar shards "
                            "(the README says how to get CC3M)")
        tars = [name for name in found if name.lower().endswith(".tar")]
        pictures = [name for name in found if name.lower().endswith(IMAGE_SUFFIXES)]
        if not tars and not pictures:
            raise UserError(f"data: no image and no .tar in {path}: name folders of images, or tar "
                            "shards, with --data")
        shards += tars
        images += [] if tars else pictures
    return shards, images


def list_files(folder):
    """The regular files under a folder, sorted: a FIFO among them would block its reader."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                files += list_files(entry.path)
            elif entry.is_file():
                files.append(entry.path)
    return sorted(files)


def stamp_of(file):
    """What tells an unchanged file from a changed one: its size and its time of change."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def index_shards(shards):
    """index_shard of each, in their order; many of them side by side."""
    if len(shards) < 8:
        return [index_shard(path) for path in shards]
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent alone
    with ProcessPoolExecutor(initializer=signal.signal, initargs=ignore_interrupt) as pool:
        tables = pool.map(index_shard, shards)
        return list(tqdm(tables, "indexing shards", total=len(shards), leave=False))


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


def save_checkpoint(s, step, model, optimizer, undecodable):
    """step-N.safetensors: trained weights, optimizer moments and counts. The newest two are kept.

    Names and shapes are the same with one process, DDP and FSDP2.
    """
    weights, moments = get_state_dict(model, optimizer, options=FULL)  # all ranks take part
    if RANK == 0:
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
        for name, state in moments["state"].items():
            for kind, tensor in state.items():
                tensors[f"{kind}.{name}"] = tensor
        about = dict(step=step, undecodable=undecodable, param_groups=moments["param_groups"])
        path = checkpoint_path(s, step)
        write_weights(path, tensors, about)
        older = [other for other in list_checkpoints(s) if other < path]
        for old in older[:-1]:
            os.remove(old)


def load_checkpoint(s, core, model, optimizer):
    """Restore the newest whole checkpoint of a stage: (its step, undecodable images so far)."""
    step = agree(find_checkpoint(s, core) if RANK == 0 else 0)
    if step == 0:
        return 0, 0
    path = checkpoint_path(s, step)
    tensors, about = read_weights(path, "checkpoint")
    weights, state = {}, {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "model":
            weights[name] = tensor
        else:
            state.setdefault(name, {})[kind] = tensor
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict={"state": state, "param_groups": about["param_groups"]},
        options=StateDictOptions(full_state_dict=True, strict=False),  # what is frozen is not in it
    )
    say(f"resumed from {path}")
    return step, about["undecodable"]


def find_checkpoint(s, core):
    """The step of the newest checkpoint that is whole and of this model, or 0."""
    trained = [name for name, p in core.named_parameters() if p.requires_grad]
    kinds = ("model", "exp_avg", "exp_avg_sq", "step")
    wanted = {f"{kind}.{name}" for kind in kinds for name in trained}
    for path in reversed(list_checkpoints(s)):
        try:
            tensors, about = read_weights(path, "checkpoint")
            if tensors.keys() == wanted and path == checkpoint_path(s, about.get("step", 0)):
                return about["step"]
            say(f"{path} is of another step or model, and is passed over")
        except UserError as error:
            say(f"{error}, and is passed over")
    return 0


def checkpoint_path(s, step):
    return os.path.join(s.folder, f"step-{step:08}.safetensors")


def list_checkpoints(s):
    """The checkpoints of a stage, oldest first, whole or not."""
    return sorted(glob.glob(os.path.join(glob.escape(s.folder), "step-*.safetensors")))


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

    def __init__(self, s, start, total, undecodable, device):
        self.total = total
        self.undecodable = undecodable
        self.skipped = 0  # by this rank since the last row
        self.images_per_step = s.batch_size * s.accum * WORLD
        self.losses = torch.zeros(self.BINS, device=device)
        self.images = torch.zeros(self.BINS, device=device)
        self.path = os.path.join(s.folder, "log.csv")
        level = "t" if s.denoiser == "rf" else "mask"
        bins = [f"loss_{level}_{i / self.BINS}" for i in range(self.BINS)]
        self.columns = ["step", "epoch", "loss", *bins, "grad_norm", "lr", "images_per_s",
                        "peak_memory_gb", "undecodable", "heldout", "heldout_shuffled"]
        self.rows = self.read_rows(start) if start else []
        self.since = start
        self.clock = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.bar = tqdm(total=total, initial=start, desc=f"stage {s.stage}", unit="step",
                        disable=None if RANK == 0 else True, dynamic_ncols=True)

    def read_rows(self, start):
        """The rows up to the step from which the run goes on, which has one; none without a log."""
        if not os.path.exists(self.path):
            return []
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            rows = [row for row in rows if int(row["step"]) <= start]
            if not rows or int(rows[-1]["step"]) != start:
                raise ValueError("its end is missing")
            return [[row[name] for name in self.columns] for row in rows]
        except (OSError, ValueError, KeyError, TypeError, csv.Error):
            raise UserError(f"{self.path} cannot be read as this run's log: mend it, or move it "
                            "away") from None

    def add(self, losses, levels, skipped):
        """Note a micro-batch: losses (B,), timesteps or mask ratios (B,), and skipped images."""
        bins = (levels * self.BINS).long().clamp(max=self.BINS - 1)
        self.losses.index_add_(0, bins, losses)
        self.images.index_add_(0, bins, torch.ones_like(losses))
        room = max(0, 20 - self.undecodable - self.skipped)
        for name in skipped[:room]:
            tqdm.write(f"skipped, cannot be decoded: {name}", file=sys.stderr)
        self.skipped += len(skipped)

    def write_row(self, step, epoch, grad_norm, lr, heldout):
        """Sum over the ranks and write a row. This waits for the device, so it is called rarely."""
        skipped = torch.tensor(self.skipped, device=self.losses.device)
        if WORLD > 1:
            for sums in (self.losses, self.images, skipped):
                dist.all_reduce(sums)
        self.undecodable += int(skipped)
        self.check_undecodable(step)
        loss = (self.losses.sum() / self.images.sum()).item()
        speed = self.images.sum().item() / (time.perf_counter() - self.clock)
        bins = (self.losses / self.images).tolist()
        bins = ["" if math.isnan(mean) else f"{mean:.6g}" for mean in bins]  # nan: no image in it
        progress = [f"{grad_norm:.4g}", f"{lr:.3g}", f"{speed:.4g}", f"{peak_memory():.2f}"]
        self.rows.append([step, f"{epoch:.4f}", f"{loss:.6g}", *bins, *progress,
                          self.undecodable, *heldout])
        if RANK == 0:
            write_file(self.path, self.write)
        progress = f"loss {loss:.4f}, {speed:.0f} images/s"
        if self.bar.disable:  # where no terminal shows it
            say(f"step {step} of {self.total}: {progress}")
        self.bar.set_postfix_str(progress, refresh=False)
        self.bar.update(step - self.since)
        self.since = step
        self.losses.zero_()
        self.images.zero_()
        self.skipped = 0
        self.clock = time.perf_counter()

    def check_undecodable(self, step):
        """UserError, on all ranks, if more than a tenth of the images seen could not be decoded."""
        seen = step * self.images_per_step
        if self.undecodable > 0.1 * seen and (seen >= self.ENOUGH or step == self.total):
            raise UserError(f"data: {self.undecodable} images of {seen} cannot be decoded: mend "
                            "the data, or leave that part out")

    def write(self, part):
        with open(part, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.columns, *self.rows])


def peak_memory():
    """The most memory that this process has held, in GB: the GPU's, or else the host's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# ------------------------------------------------------------------------------------ results

def write_result(s, model, path):
    """Stage 1's projectors and denoiser, or the CLIP of the other stages, by rank 0."""
    weights = get_model_state_dict(model, options=FULL)  # all ranks take part
    if RANK == 0 and s.stage == 1:
        write_weights(path, weights)
    elif RANK == 0:
        clip = trained_clip(s, weights)
        if path == s.result:
            export_hf(clip, os.path.join(s.out, "hf"))
        write_weights(path, clip.state_dict())
    barrier()


def trained_clip(s, weights):
    """The backbone's CLIP with the trained weights of its visual tower, LoRA merged in float32."""
    clip = load_clip(s.backbone, s.clip_weights)[0]
    if not s.no_lora:
        inject_lora(clip.visual)
    prefix = "visual."
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items()
           if name.startswith(prefix)}
    unexpected = clip.visual.load_state_dict(own, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"unexpected weight {unexpected[0]}")
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


def print_bench(s, core, log, device):
    """Speed, memory and MFU, from the rows of the log but the first."""
    column = log.columns.index("images_per_s")
    speed = float(np.median([float(row[column]) for row in log.rows[1:]]))
    steps_per_s = speed / log.images_per_step
    images = torch.rand(s.batch_size, 3, *2 * [image_side(core.visual)], device=device)
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
    say(f"peak memory          {peak_memory():.2f} GB")
    say(f"model TFLOP/s        {tflops:.2f} a device")
    say(f"MFU                  {mfu}")


# ------------------------------------------------------------------------------------ the command

# What may change when a run goes on; data and weights are known by their fingerprints.
MOVABLE = {
    "stage", "out", "data", "val", "benchmark", "zeroshot", "clip_weights", "vae", "vqgan", "init",
    "workers", "save_every", "sample_every", "log_every", "export_every",
    "accum", "compile", "shard", "grad_checkpoint",
}


def check_same_run(s, data):
    """A stage's folder holds one run: UserError if it was begun with other settings."""
    if RANK > 0 or s.preset == "bench":
        return
    settings = {key: value for key, value in dataclasses.asdict(s).items() if key not in MOVABLE}
    settings["micro-batches of a step (processes x --accum)"] = s.accum * WORLD
    settings["data"] = data.fingerprint()
    autoencoder = "vae" if s.denoiser == "rf" else "vqgan"
    for key in ("clip_weights", autoencoder, "init"):
        if getattr(s, key):
            settings[key] = fingerprint(getattr(s, key))
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    path = os.path.join(s.folder, "settings.json")
    if not os.path.exists(path):
        return write_json(path, settings)
    before = read_json(path)
    names = sorted(before.keys() | settings.keys())
    changed = [f"{name} was {before.get(name)}, is {settings.get(name)}"
               for name in names if before.get(name) != settings.get(name)]
    if changed:
        raise UserError(f"{s.folder} holds a run with other settings ({'; '.join(changed)}): give "
                        "it the same again, or choose another --out")


def fingerprint(path):
    """What tells one file or folder of weights from another, at no cost: name, size, first MiB."""
    if os.path.isdir(path):
        return os.path.basename(os.path.abspath(path))
    with open(path, "rb") as file:
        start = zlib.crc32(file.read(1 << 20))
    return f"{os.path.basename(path)}, {os.path.getsize(path)} bytes, {start:08x}"


def check(s, compares):
    """Look, before anything expensive, at all that a run needs. UserError at the first mistake."""
    check_values(s)
    if s.preset == "bench":
        return
    for name in ("stage1", "stage2") if s.stage == "e2e" else ("e2e",):
        if os.path.isdir(os.path.join(s.out, name)):
            raise UserError(f"--out {s.out} holds another run ({name}): choose another folder")
    check_sides(s)
    find_images(s.data)
    find_images(s.val)
    if compares:
        check_benchmark(s.benchmark)
        for task in s.zeroshot:
            check_zeroshot(*task.partition(":")[::2])
    check_start(s)
    clip, _, tokenizer = load_clip(s.backbone, s.clip_weights)  # may download: once for the machine
    check_export(s.backbone, clip)
    if compares:
        tokenizer(["a photo"])  # SigLIP's may be missing


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
    if s.shard and "RANK" not in os.environ:
        raise UserError("--shard shares the model among processes: start it with torchrun")
    if s.preset == "bench" and (s.steps or 0) < 2 * s.log_every:
        raise UserError("--preset bench counts in --steps: give at least twice --log-every")
    if s.preset == "bench" and (s.save_every or s.sample_every or s.export_every or s.init):
        raise UserError("--preset bench saves nothing: leave --init, --save-every, --sample-every "
                        "and --export-every out")
    if s.preset == "bench" and os.path.exists(os.path.join(s.folder, "settings.json")):
        raise UserError(f"--out {s.out} holds a run: choose another folder for the bench")


def check_sides(s):
    """The autoencoder's tokens must fill the images that the backbone takes."""
    method = Continuous if s.denoiser == "rf" else Discrete
    factor = load_autoencoder(s).factor * method.token_side
    side = backbone_side(s)
    if side % factor:
        raise UserError(f"{s.backbone} sees {side} pixels, and the denoiser's tokens are {factor} "
                        "pixels wide: choose another backbone or autoencoder")


def check_start(s):
    """What the stage starts from is there and, if this program wrote it, whole."""
    if s.stage != 2 and not s.init:
        return
    start = start_of(s)
    if not os.path.isfile(start):
        way = "run --stage 1 first, or name" if s.stage == 2 else "name"
        raise UserError(f"no weights to start from at {start}: {way} a file with --init")
    if s.stage == 2:
        read_weights(start, "stage 1's weights", "run --stage 1 again, which makes them anew")


def lock_out(s):
    """Make the run's folder and hold it while this process lives: a second run there is refused."""
    try:
        os.makedirs(s.out, exist_ok=True)
        file = open(os.path.join(s.out, ".lock"), "w")  # noqa: SIM115 (open for as long as the run)
    except OSError as error:
        message = f"--out {s.out} cannot be written ({error.strerror}): choose another"
        raise UserError(message) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"--out {s.out} is in use by another run: choose another") from None
    return file


def explain(error):
    """A RuntimeError that users can do something about, in one line; None for any other."""
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: lower --batch-size, or try --grad-checkpoint or --shard"
    if "can't allocate memory" in message:
        return "the memory is full: lower --batch-size, --width or --depth"
    if "DataLoader worker" in message:
        return ("a data worker died, perhaps for want of memory: lower --workers; the same command "
                "goes on")
    if isinstance(error, dist.DistError) or "gloo" in message:
        return (f"rank {RANK} lost another rank, whose own message says why; the same command goes "
                "on")
    return None


def main(argv=None):
    run_command("train.py", run, argv)


if __name__ == "__main__":
    main()
