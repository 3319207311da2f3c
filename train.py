"""Train GenHancer: stage 1 (CLIP frozen), stage 2 (LoRA on CLIP), both and the benchmark ("all"), or end to end ("e2e").

    torchrun --nproc_per_node 8 train.py --stage 1 --denoiser rf --data 'cc3m/{00000..00331}.tar' --vae ae.safetensors
    torchrun --nproc_per_node 8 train.py --stage 2 --denoiser rf --data 'cc3m/{00000..00331}.tar' --vae ae.safetensors
    python train.py --preset toy          # everything in miniature on a laptop CPU, nothing to download

The same command resumes a run that was stopped. The order of the images and every random draw follow from (seed, step, slot), slot =
micro * world_size + rank counting the micro-batches of one global batch, so a resumed run walks the same path to the last bit.
"""
import argparse
import atexit
import contextlib
import csv
import ctypes
import datetime
import glob
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import time
import warnings
import zlib
from functools import lru_cache

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torchvision.transforms as T
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

from eval_mmvp import check_benchmark, check_zeroshot, evaluate, print_table
from genhancer import (BACKBONES, TOY, Flux, FluxConfig, GenHancer, Perceiver, PerceiverConfig, export_hf, find_backbone, image_side, inject_lora,
                       load_clip, merge_lora)
from vae import AutoEncoder, AutoEncoderConfig, UserError, load_strictly, load_vae, read_weights
from vqgan import VQGAN, VQGANConfig, load_vqgan

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))

# ---------------------------------------------------------------------------------------------------------------------- settings

PRESETS = {
    "paper": dict(  # Sec. 5.1 and App. B; where the paper is silent, the official code
        backbone="openai-l14-224", vae="weights/ae.safetensors", vqgan="weights/vqgan_imagenet_f16_16384.safetensors", data=["data/cc3m"],
        val=None, benchmark="data/MMVP_VLM", zeroshot=[], width={"rf": 3072, "perceiver": 1024}, condition=[768, 4096], depth=[2, 4], layers=6,
        stages={1: dict(epochs=1, batch_size=16, lr=1e-4), 2: dict(epochs=1, batch_size=16, lr=1e-5),
                "e2e": dict(epochs=2, batch_size=16, lr=1e-4, lr_clip=1e-5)},
        accum=2, precision=None, workers=8, save_every=1000, sample_every=1000, log_every=50),
    "toy": dict(  # tuned on the toy's dev benchmark
        backbone="toy", vae=f"{TOY}/vae.safetensors", vqgan=f"{TOY}/vqgan.safetensors", data=[f"{TOY}/data/train"],
        val=[f"{TOY}/data/val"], benchmark=f"{TOY}/data/mmvp", zeroshot=[f"folder:{TOY}/data/zeroshot"],
        width={"rf": 128, "perceiver": 128}, condition=[256, 256], depth=[1, 2], layers=4,
        stages={1: dict(steps=850, batch_size=64, lr=2e-3), 2: dict(steps=300, batch_size=64, lr=1e-3, lr_clip=2e-4),
                "e2e": dict(steps=1150, batch_size=64, lr=2e-3, lr_clip=2e-4)},
        accum=1, precision=None, workers=0, save_every=200, sample_every=1000, log_every=10),
}
PRESETS["bench"] = {**PRESETS["paper"], "accum": 1, "data": [], "stages": {  # full size; BENCH_CPU where there is no GPU
    stage: {**values, "steps": 110} for stage, values in PRESETS["paper"]["stages"].items()}}
BENCH_CPU = dict(backbone="ViT-B-32-quickgelu:random", width=768, batch_size=4, steps=7, workers=0)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (train.py --help lists the options)")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a number of `kind` in [low, high], or in (low, high] if `above`."""
    def parse(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value
    parse.__name__ = "number"
    return parse


def parse_args(argv=None):
    positive, count, rate, share = number(int, 1), number(int, 0), number(float, 0, above=True), number(float, 0, 1)
    p = Parser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=argparse.SUPPRESS)
    p.add_argument("--preset", choices=PRESETS, default="paper", help="where the other defaults come from")
    p.add_argument("--stage", choices=["1", "2", "e2e", "all"], default="all", help="all: stages 1 and 2, then the benchmark before and after")
    p.add_argument("--denoiser", choices=["rf", "perceiver"], default="rf", help="continuous (rectified flow) or discrete (masked tokens)")
    p.add_argument("--backbone", help=f"{', '.join(BACKBONES)}, or open_clip's MODEL:TAG")
    p.add_argument("--clip-weights", metavar="FILE", default=None, help="CLIP's weights, open_clip format; default: open_clip downloads the backbone's")
    p.add_argument("--vae", metavar="FILE", help="FLUX.1's ae.safetensors (rf)")
    p.add_argument("--vqgan", metavar="FILE", help="taming's VQ-GAN, converted by vqgan.py (perceiver)")
    p.add_argument("--data", nargs="+", metavar="PATH", help="training images: folders, or tar shards as img2dataset writes them (bench: random ones)")
    p.add_argument("--val", nargs="+", metavar="PATH", help="held-out images, for the loss with the right and with shuffled [CLS]; the first 512")
    p.add_argument("--benchmark", metavar="DIR", help="MMVP-VLM's folder (stage all)")
    p.add_argument("--zeroshot", nargs="*", metavar="NAME:PATH", help="retention tasks, as for eval_mmvp.py (stage all)")
    p.add_argument("--out", metavar="DIR", default=None, help="default: runs/PRESET-DENOISER")
    p.add_argument("--init", metavar="FILE", default=None, help="stages 1, e2e: a denoiser with FLUX's names (Table 7); stage 2: another run's stage1/last.safetensors")
    p.add_argument("--epochs", type=rate, help="passes over the data")
    p.add_argument("--steps", type=positive, help="optimizer steps of each stage; wins over --epochs")
    p.add_argument("--batch-size", type=positive, help="images in a micro-batch of one process")
    p.add_argument("--accum", type=positive, help="micro-batches that a process accumulates into a step")
    p.add_argument("--lr", type=rate, help="the stage's learning rate (e2e: the denoiser's)")
    p.add_argument("--lr-clip", type=rate, help="the visual tower's learning rate, if it is another")
    p.add_argument("--warmup", type=count, default=10, help="steps of linear warm-up; then the rate is constant")
    p.add_argument("--weight-decay", type=number(float, 0), default=0.01, help="AdamW's")
    p.add_argument("--clip-grad", type=rate, default=1.0, help="largest gradient norm")
    p.add_argument("--seed", type=count, default=0, help="of everything random")
    p.add_argument("--workers", type=count, help="data loading processes of each rank")
    p.add_argument("--save-every", type=positive, help="steps between checkpoints")
    p.add_argument("--sample-every", type=positive, help="steps between sample pictures and held-out losses")
    p.add_argument("--export-every", type=positive, default=None, help="stage 2, e2e: steps between whole CLIPs, clip-STEP.safetensors, to be evaluated")
    p.add_argument("--log-every", type=positive, help="steps between rows of log.csv, and between checks for NaN and for signals")
    p.add_argument("--precision", choices=["bf16", "fp32"], help="of autocast (weights are float32); default: bf16 where the device has it")
    p.add_argument("--compile", action="store_true", default=False, help="torch.compile the denoiser, the tokenizer's encoder and the visual tower")
    p.add_argument("--shard", action="store_true", default=False, help="shard weights, gradients and optimizer state over the ranks (FSDP2), not DDP")
    p.add_argument("--grad-checkpoint", action="store_true", default=False, help="recompute the blocks in the backward pass")
    p.add_argument("--width", type=positive, help="the denoiser's hidden size (rf: a multiple of 128; perceiver: of 64)")
    p.add_argument("--condition", type=positive, nargs=2, metavar=("VEC", "CONTEXT"), help="rf: widths of the projected [CLS], for modulation and as context token")
    p.add_argument("--depth", type=count, nargs=2, metavar=("MM", "SINGLE"), help="rf's blocks (Table 5)")
    p.add_argument("--layers", type=positive, help="perceiver's layers (Table 5)")
    p.add_argument("--timesteps", choices=["logit-normal", "uniform"], default="logit-normal", help="rf's distribution of t (Table 4)")
    p.add_argument("--scale", type=rate, default=1.0, help="s of the scaled logit-normal (Eq. 6, Table 4)")
    p.add_argument("--mask-ratio", type=number(float, 0, 1, above=True), nargs=2, metavar=("LOW", "HIGH"), default=[0.5, 0.9], help="perceiver's (Table 8)")
    p.add_argument("--local-ratio", type=share, default=0.0, help="share of local tokens beside [CLS] in the condition (Fig. 5)")
    p.add_argument("--no-lora", action="store_true", default=False, help="train the whole visual tower (Fig. 8)")
    p.add_argument("--shuffle-target", action="store_true", default=False, help="a control: each image is reconstructed from another one's [CLS]")
    p.add_argument("--freeze-denoiser", action="store_true", default=False, help="stage 2: train LoRA alone (Fig. 9)")
    args = p.parse_args(argv)
    preset = PRESETS[args.preset]
    for key, value in preset.items():
        if key != "stages" and not hasattr(args, key):
            setattr(args, key, value[args.denoiser] if key == "width" else value)
    args.stage = 1 if (args.preset, args.stage) == ("bench", "all") else args.stage if args.stage in ("e2e", "all") else int(args.stage)
    args.precision = args.precision or ("bf16" if (
        torch.cuda.is_bf16_supported(including_emulation=False) if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()) else "fp32")
    args.out = args.out or f"runs/{args.preset}-{args.denoiser}"
    if args.shard and "RANK" not in os.environ:
        raise UserError("--shard shares the model among processes: start it with torchrun")
    if args.preset == "bench" and (hasattr(args, "epochs") or getattr(args, "steps", 110) <= 10):
        raise UserError("--preset bench counts in --steps, of which the first 10 warm up: give more of them, and no --epochs")
    if args.mask_ratio[0] > args.mask_ratio[1]:
        raise UserError(f"--mask-ratio {args.mask_ratio[0]} {args.mask_ratio[1]}: the low end comes first")
    if args.width % (128 if args.denoiser == "rf" else 64):
        raise UserError(f"--width {args.width} must be a multiple of {128 if args.denoiser == 'rf' else 64}, the width of an attention head")
    if args.denoiser == "rf" and min(args.depth) < 1:
        raise UserError(f"--depth {args.depth[0]} {args.depth[1]}: at least one block of each kind")
    if args.stage == "all" and (args.init or hasattr(args, "lr")):
        raise UserError("--init and --lr belong to one stage: run --stage 1 and --stage 2 one after the other")
    return args


def stage_settings(args, stage):
    """`args` with the preset's values for one stage filled in, where the command line is silent."""
    s = argparse.Namespace(**vars(args))
    s.stage = stage
    for key, value in PRESETS[args.preset]["stages"][stage].items():
        if not (hasattr(args, key) or key == "epochs" and hasattr(args, "steps") or key == "steps" and hasattr(args, "epochs")):
            setattr(s, key, value)
    s.lr_clip = getattr(s, "lr_clip", s.lr)
    if s.shuffle_target and s.batch_size < 2:
        raise UserError("--shuffle-target takes another image of the micro-batch: give --batch-size 2 or more")
    s.folder = os.path.join(args.out, stage if stage == "e2e" else f"stage{stage}")
    s.result = os.path.join(s.folder, "last.safetensors") if stage == 1 else os.path.join(args.out, "clip.safetensors")
    return s


def check(args):
    """Look at everything that the run needs before anything expensive: a list of the UserErrors found."""
    faults = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except UserError as error:
            faults.append(error)

    backbone = attempt(find_backbone, args.backbone, args.clip_weights)
    tokenizer = attempt(load_tokenizer, args)
    if backbone and tokenizer:
        side = backbone_side(args)
        factor = tokenizer.factor * (2 if args.denoiser == "rf" else 1)
        if side % factor:
            faults.append(UserError(f"{args.backbone} sees {side} pixels, which {factor} (the tokenizer's factor"
                                    f"{', times 2 for the patches' if args.denoiser == 'rf' else ''}) does not divide: choose another backbone or tokenizer"))
    attempt(find_images, args.data)
    if args.val:
        attempt(find_images, args.val)
    if args.stage == "all":
        attempt(check_benchmark, args.benchmark)
        for task in args.zeroshot:
            attempt(check_zeroshot, *task.partition(":")[::2])
    start = args.init or os.path.join(args.out, "stage1", "last.safetensors")
    if args.stage == 2 and not os.path.isfile(start):
        faults.append(UserError(f"stage 2 starts from stage 1, and there is no {start}: run --stage 1 first, or name another run's stage1/last.safetensors with --init"))
    elif args.init and not os.path.isfile(args.init):
        faults.append(UserError(f"no file at {args.init}, which --init names"))
    other = {"e2e": ("stage1", "stage2")}.get(args.stage, ("e2e",))
    faults += [UserError(f"--out {args.out} holds another run ({name}): choose another folder") for name in other if os.path.isdir(os.path.join(args.out, name))]
    if not faults:  # last, since it may download: once for the machine, before the other processes want it
        loaded = attempt(load_clip, args.backbone, args.clip_weights)
        if loaded and args.stage == "all":
            attempt(loaded[2], ["a photo"])  # SigLIP's tokenizer may be missing
    return faults


def load_tokenizer(args):
    if args.preset == "bench":  # random weights, as the table says
        return (AutoEncoder(AutoEncoderConfig()) if args.denoiser == "rf" else VQGAN(VQGANConfig())).eval().requires_grad_(False)
    return load_vae(args.vae) if args.denoiser == "rf" else load_vqgan(args.vqgan)


def backbone_side(args):
    """The side of the square images that the backbone takes, in pixels."""
    return open_clip.get_model_config(find_backbone(args.backbone, args.clip_weights).model)["vision_cfg"]["image_size"]


# -------------------------------------------------------------------------------------------------------------------------- data

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ENTRY = np.dtype([("file", np.int32), ("offset", np.int64), ("size", np.int32)])  # size -1: the whole file


def find_images(paths):
    """The shards and the image files that `paths` (folders, tar files, a/{000..123}.tar) name: two sorted lists. UserError if nothing."""
    shards, images = [], []
    for path in paths:
        braces = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", path)
        if braces:
            head, first, last, tail = braces.groups()
            shards += [f"{head}{i:0{len(first)}}{tail}" for i in range(int(first), int(last) + 1)]
        elif os.path.isdir(path):
            tars = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
            try:
                found = [] if tars else sorted(os.path.join(folder, name) for folder, _, names in os.walk(path, onerror=raise_it)
                                               for name in names if name.lower().endswith(IMAGE_SUFFIXES))
            except OSError as error:
                raise UserError(f"data folder cannot be read: {error}") from None
            if not tars and not found:
                raise UserError(f"no image and no .tar in {path}: name folders of images, or img2dataset's shards, with --data")
            shards, images = shards + tars, images + found
        else:
            shards.append(path)
    for path in shards:
        if not os.path.isfile(path):
            raise UserError(f"data not found at {path}: fetch CC3M with img2dataset (README) and name its folder or shards with --data")
        try:
            tarfile.open(path, "r:").close()
        except (tarfile.TarError, OSError):
            raise UserError(f"data: {path} is no tar file, or is compressed, or cannot be read") from None
    return shards, images


def raise_it(error):
    raise error


def index_shard(path, spare):
    """Where the images of a tar lie: (n, 2) int64, offset and size. Cached beside the tar or, where that is read-only, in `spare`."""
    status = os.stat(path)
    stamp = np.array([[status.st_size, status.st_mtime_ns]])
    caches = [f"{path}.index.npy", os.path.join(spare, f"{os.path.basename(path)}.{zlib.crc32(os.path.abspath(path).encode()):08x}.npy")]
    for cache in caches:
        with contextlib.suppress(OSError, ValueError, EOFError):  # none yet, or a torn one
            table = np.load(cache)
            if (table[:1] == stamp).all():  # the tar is still the one that was indexed
                return table[1:]
    rows = []
    with tarfile.open(path, "r:") as tar:
        try:
            while member := tar.next():
                tar.members = []  # or it keeps them all
                if member.isfile() and member.name.lower().endswith(IMAGE_SUFFIXES) and member.offset_data + member.size <= status.st_size:
                    rows.append((member.offset_data, member.size))
        except tarfile.ReadError:
            tqdm.write(f"{path} is cut short: its first {len(rows)} images are used", file=sys.stderr)
    table = np.concatenate([stamp, np.array(rows, dtype=np.int64).reshape(-1, 2)])
    for cache in caches:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(cache) or ".", exist_ok=True)
            part = f"{cache}.{os.getpid()}.part.npy"
            np.save(part, table)
            os.replace(part, cache)
            break
    return table[1:]


def to_rgb(image):
    """A PIL image of any mode as upright 8-bit RGB; transparency becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip it to white
        values = np.asarray(image)
        image = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Images(Dataset):
    """Training images by index; an item is a whole micro-batch, so that its crops can be drawn from its own (seed, step, slot).

    paths: as find_images takes them. side: of the square output, pixels. spare: a writable folder for the shards' indices.
    """

    def __init__(self, paths, side, spare, augment=True):
        shards, images = find_images(paths)
        for path in tqdm(shards[RANK::WORLD], "indexing shards", disable=RANK > 0 or len(shards) < 20, leave=False):
            index_shard(path, spare)
        barrier()
        tables = [index_shard(path, spare) for path in shards]
        self.files = np.array([os.fsencode(path) for path in shards + images])  # not a list: workers would copy it as they count references
        self.entries = np.zeros(sum(map(len, tables)) + len(images), ENTRY)
        self.entries["file"] = np.repeat(np.arange(len(self.files)), [len(table) for table in tables] + [1] * len(images))
        self.entries["offset"][:len(self.entries) - len(images)] = np.concatenate([np.zeros(0, int)] + [table[:, 0] for table in tables])
        self.entries["size"] = np.concatenate([np.zeros(0, int)] + [table[:, 1] for table in tables] + [np.full(len(images), -1)])
        if not len(self.entries):
            raise UserError(f"no image in {', '.join(paths)}: name folders of images, or img2dataset's shards, with --data")
        self.side = side
        self.transform = T.RandomResizedCrop(side, scale=(0.9, 1.0), interpolation=T.InterpolationMode.BICUBIC) if augment else \
            T.Compose([T.Resize(side, T.InterpolationMode.BICUBIC), T.CenterCrop(side)])

    def __len__(self):
        return len(self.entries)

    def fingerprint(self):
        """The same images in the same order have the same fingerprint, wherever they lie."""
        names = b"\n".join(os.path.basename(path) for path in self.files)
        return f"{len(self)} images, {zlib.crc32(self.entries.tobytes(), zlib.crc32(names)):08x}"

    def load(self, index):
        """One image as uint8 (3, side, side), and its name; the image is None if it cannot be decoded."""
        file, offset, size = self.entries[index]
        path = os.fsdecode(bytes(self.files[file]))
        try:
            with open(path, "rb") as stream:
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:  # a vanished file or a failing disk is no bad image
            raise UserError(f"data: {path} can no longer be read ({error.strerror}): put it back and run the same command again") from None
        name = path if size < 0 else f"{path} at byte {offset}"
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.draft(None, (2 * self.side, 2 * self.side))  # JPEG: decode at a fraction of the size, if that is enough
                return pil_to_tensor(self.transform(to_rgb(image))), name
        except Exception:  # from memory: whatever is raised, the image is at fault
            return None, name

    def __getitem__(self, key):
        """key (seed, step, slot, indices) -> (uint8 (B, 3, side, side), names of the undecodable ones; the next image stands in for each)."""
        *draw, indices = key
        seed_draws(*draw, 0)
        images, bad = [], []
        for index in indices:
            for candidate in range(index, index + 1000):
                image, name = self.load(candidate % len(self))
                if image is not None:
                    images.append(image)
                    break
                bad.append(name)
            else:
                raise UserError(f"data: 1000 images in a row cannot be decoded, the last {name}")
        return torch.stack(images), bad


def seed_draws(*key):
    """Seed torch's default generators from a tuple of integers."""
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    """A permutation of the n images: each once per epoch."""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(n, dtype=np.int32))


def batch_keys(n, s, start):
    """This rank's micro-batches from step `start` on, as Images takes them: a function of (seed, step, slot) alone."""
    for step in range(start, s.steps):
        for micro in range(s.accum):
            slot = micro * WORLD + RANK
            first = (step * s.accum * WORLD + slot) * s.batch_size
            yield s.seed, step, slot, [int(epoch_order(n, s.seed, i // n)[i % n]) for i in range(first, first + s.batch_size)]


# ------------------------------------------------------------------------------------------------------- processes and checkpoints

def barrier():
    if dist.is_initialized():
        dist.barrier()


class Halt(Exception):
    """The run ends here, with a line for the user and an exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


STOP = []  # signals received: SIGTERM, SIGINT

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def write_json(path, content):
    with open(f"{path}.part", "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    os.replace(f"{path}.part", path)


def write_weights(tensors, path):
    save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, f"{path}.part")
    os.replace(f"{path}.part", path)


@contextlib.contextmanager
def writing(path, s):
    """Turn a failure to write, a full disk above all, into a Halt that says what is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of open, torch.save and safetensors
        shutil.rmtree(f"{path}.part", ignore_errors=True)
        raise Halt(f"{path} could not be written ({str(error).splitlines()[0]}); the newest checkpoint is {newest(s.folder)}: "
                   "make room and run the same command again") from None


def checkpoints(folder):
    """The checkpoints under a stage's folder, oldest first."""
    return sorted(path for path in glob.glob(os.path.join(glob.escape(folder), "step-*")) if not path.endswith(".part"))


def newest(folder):
    """The newest checkpoint's path, or "none", for a message."""
    return (checkpoints(folder) or ["none"])[-1]


def save_checkpoint(s, step, model, optimizer, bad):
    """Write step-N/ (weights, optimizer, and state.json with the others' sizes) aside, move it into place, keep the newest two."""
    weights, moments = get_state_dict(model, optimizer, options=FULL)  # every rank takes part; names and shapes as without DDP and FSDP
    if RANK:
        return
    path = os.path.join(s.folder, f"step-{step:08}")
    part = f"{path}.part"
    with writing(path, s):
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        save_file({name: tensor.contiguous() for name, tensor in sorted(weights.items())}, os.path.join(part, "model.safetensors"))
        torch.save(moments, os.path.join(part, "optimizer.pt"))
        sizes = {name: os.path.getsize(os.path.join(part, name)) for name in os.listdir(part)}
        write_json(os.path.join(part, "state.json"), {"step": step, "undecodable": bad, "sizes": sizes})
        for name in os.listdir(part):  # a checkpoint is only in place when its bytes are on the disk
            with open(os.path.join(part, name), "rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    for old in checkpoints(s.folder)[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(s, model, optimizer):
    """Restore the newest complete checkpoint of a stage: (its step, the undecodable images so far), or (0, 0) if there is none."""
    for path in reversed(checkpoints(s.folder)):
        try:
            with open(os.path.join(path, "state.json")) as file:
                state = json.load(file)
            complete = all(os.path.getsize(os.path.join(path, name)) == size for name, size in state["sizes"].items())
        except (OSError, ValueError, KeyError):
            complete = False
        if not complete:
            say(f"{path} is cut short and passed over")
            continue
        weights = load_file(os.path.join(path, "model.safetensors"))
        moments = torch.load(os.path.join(path, "optimizer.pt"), weights_only=True)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=StateDictOptions(full_state_dict=True, strict=False))
        say(f"resumed from {path}")
        return state["step"], state["undecodable"]
    return 0, 0


def say(message):
    if RANK == 0:
        tqdm.write(message)


# -------------------------------------------------------------------------------------------------------------------- the training

def build_model(s, device):
    """The GenHancer of a stage, ready to train: pretrained CLIP and tokenizer, fresh denoiser and projectors or those to start from."""
    clip, _, _ = load_clip(s.backbone, "random" if s.preset == "bench" else s.clip_weights)
    tokenizer = load_tokenizer(s).to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format)  # slower on CPU
    visual = clip.visual.to(device)
    torch.manual_seed(s.seed)
    with torch.device(device):
        if s.denoiser == "rf":
            denoiser = Flux(FluxConfig(in_channels=4 * tokenizer.config.z_channels, vec_in_dim=s.condition[0], context_in_dim=s.condition[1],
                                       hidden_size=s.width, num_heads=s.width // 128, depth=s.depth[0], depth_single_blocks=s.depth[1]))
        else:
            denoiser = Perceiver(PerceiverConfig(n_embed=tokenizer.config.n_embed, embed_dim=tokenizer.config.embed_dim, width=s.width,
                                                 num_heads=s.width // 64, layers=s.layers), tokenizer.quantize.embedding.weight)
        model = GenHancer(visual, tokenizer, denoiser, s.timesteps, s.scale, s.mask_ratio, s.local_ratio)
    trained = torch.nn.ModuleDict({"denoiser": model.denoiser, "projectors": model.projectors})
    if s.stage == 2 and s.preset != "bench":
        start = s.init or os.path.join(s.out, "stage1", "last.safetensors")
        load_strictly(trained, read_weights(start, "stage 1's weights")[0], start, "stage 1's weights for these settings")
    elif s.init:
        load_strictly(model.denoiser, read_weights(s.init, "denoiser weights")[0], s.init, "FLUX's weights for this --denoiser, --width, --condition and --depth")
    if s.grad_checkpoint:
        denoiser.grad_checkpointing = True
        visual.set_grad_checkpointing(True)
    if s.compile:
        for part in (denoiser, visual, tokenizer.encoder):
            part.compile()
    # set_stage freezes CLIP in stage 1 and puts LoRA on it in stage 2; a new backbone is a row of BACKBONES in genhancer.py
    return model.to(device).set_stage(s.stage, lora=not s.no_lora, freeze_denoiser=s.freeze_denoiser)


def distribute(model, s, device):
    """Wrap the model for several processes: DDP, or with --shard FSDP2 over the trainable parts."""
    if s.shard:
        frozen = {p for p in model.parameters() if not p.requires_grad}
        blocks = [block for name in ("double_blocks", "single_blocks", "layers") for block in getattr(model.denoiser, name, [])]
        for part in [*blocks, model]:
            fully_shard(part, ignored_params=frozen)
        register_fsdp_forward_method(model, "reconstruct")
    elif WORLD > 1:
        warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)  # its successor is not in torch 2.11
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False, gradient_as_bucket_view=True)
    return model


def synchronized(model, last):
    """Gradients are reduced over the ranks with the last micro-batch of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


class Log:
    """A rank's losses, summed on the device; `flush` gathers all ranks' into a row of log.csv, and is the loop's only host synchronisation."""
    BINS, WINDOW = 10, 1000  # of t, or of the mask ratio; images over which undecodable ones are judged

    def __init__(self, s, device, start, bad):
        self.s, self.bad, self.new_bad, self.seen, self.window, self.wait = s, bad, 0, 0, np.zeros(2), 0.0
        self.sums = torch.zeros(2, self.BINS, device=device)                                  # of losses, and how many
        self.fault, self.finite = torch.tensor([-1.0, math.nan], device=device)               # first step with a NaN, last loss before it
        self.path, level = os.path.join(s.folder, "log.csv"), "t" if s.denoiser == "rf" else "mask"
        self.columns = ["step", "epoch", "loss", *(f"loss_{level}_{i / self.BINS}" for i in range(self.BINS)), "grad_norm", "lr",
                        "images_per_s", "data_wait_s", "peak_memory_gb", "undecodable", "heldout", "heldout_shuffled"]
        if RANK == 0:
            rows = []
            with contextlib.suppress(FileNotFoundError), open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if None not in row.values() and int(row["step"]) <= start]  # not what follows, nor a torn row
            with open(f"{self.path}.part", "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
            os.replace(f"{self.path}.part", self.path)
        self.bar = tqdm(total=s.steps, initial=start, desc=f"stage {s.stage}", disable=RANK > 0, unit="step", dynamic_ncols=True, mininterval=1)
        self.clock, self.since = time.perf_counter(), start

    def add(self, step, losses, levels, bad):
        bins = (levels * self.BINS).long().clamp(max=self.BINS - 1)
        self.sums[0].index_add_(0, bins, losses)
        self.sums[1].index_add_(0, bins, torch.ones_like(losses))
        healthy = losses.isfinite().all() & (self.fault < 0)
        self.finite = torch.where(healthy, losses.mean(), self.finite)
        self.fault = torch.where(healthy | (self.fault >= 0), self.fault, step)
        for name in bad[:max(0, 20 - self.bad - self.new_bad)]:
            tqdm.write(f"skipped, cannot be decoded: {name}", file=sys.stderr)
        self.new_bad, self.seen = self.new_bad + len(bad), self.seen + len(losses)

    def flush(self, step, epoch, grad_norm, lr, heldout=("", "")):
        """Write a row. Returns the signal that asks the run to stop, or 0; raises Halt, on all ranks, at a NaN or at too many bad images."""
        if not math.isfinite(grad_norm):  # the same on all ranks
            raise Halt(f"the gradient is not finite at step {step}; the newest checkpoint is {newest(self.s.folder)}: "
                       "lower --lr, or try --precision fp32, in another --out")
        own = torch.cat([self.sums.flatten(), self.sums.new_tensor([max(STOP, default=0), self.new_bad, self.seen]), self.fault[None], self.finite[None]])
        ranks = [torch.empty_like(own) for _ in range(WORLD)] if WORLD > 1 else [own]
        if WORLD > 1:
            dist.all_gather(ranks, own)
        ranks = torch.stack(ranks).cpu().double()
        sums, (stop, bad, seen, fault, finite) = ranks[:, :-5].sum(0).view(2, self.BINS), ranks[:, -5:].T
        for rank in (fault >= 0).nonzero().flatten().tolist():
            raise Halt(f"the loss of rank {rank} is not finite at step {int(fault[rank]) + 1} (the last finite one was {finite[rank]:.4f}); "
                       f"the newest checkpoint is {newest(self.s.folder)}: lower --lr, or try --precision fp32, in another --out")
        self.bad, self.window = self.bad + int(bad.sum()), self.window + (float(bad.sum()), float(seen.sum()))
        if self.window[1] >= self.WINDOW:
            if self.window[0] > 0.1 * self.window[1]:
                raise Halt("{:.0f} of {:.0f} images cannot be decoded: mend the data, or leave that part out".format(*self.window))
            self.window[:] = 0
        loss, elapsed = (sums[0].sum() / sums[1].sum()).item(), time.perf_counter() - self.clock
        speed = seen.sum().item() / elapsed
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}" if torch.cuda.is_available() else ""
        if RANK == 0:
            bins = [f"{x:.6g}" if n else "" for x, n in zip((sums[0] / sums[1]).tolist(), sums[1])]
            with writing(self.path, self.s), open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([step, f"{epoch:.4f}", f"{loss:.6g}", *bins, f"{grad_norm:.4g}", f"{lr:.3g}", f"{speed:.1f}", f"{self.wait:.2f}",
                                           memory, self.bad, *heldout])
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.1e}, {speed:.0f} images/s", refresh=False)
        self.bar.update(step - self.bar.n)
        self.sums.zero_()
        self.new_bad, self.seen, self.wait, self.clock = 0, 0, 0.0, time.perf_counter()
        return int(stop.max())


@torch.no_grad()
def look(s, step, model, core, images):
    """Held-out loss with the right and with shuffled [CLS] (("", "") without --val), and samples/STEP.png: original | reconstruction."""
    core.eval()
    losses = [0.0, 0.0]
    for i, (batch, other) in enumerate(zip(images.split(s.batch_size), images.roll(1, 0).split(s.batch_size))):
        batch, other = (x.to(core.mean.device).float() / 255 for x in (batch, other))
        for j, source in enumerate((batch, other)):
            seed_draws(s.seed, i, 2)  # the same t, noise and masks each time
            with autocast(s, core.mean.device):
                losses[j] += model(batch, source).item() * len(batch) / len(images)
    seed_draws(s.seed, step, 3)
    batch = images[:8].to(core.mean.device).float() / 255
    with autocast(s, core.mean.device):
        columns = [batch, core.reconstruct(batch)]
        if s.denoiser == "perceiver":
            columns.append(core.reconstruct(batch, steps=1, mask_ratio=0.75))
    core.train()
    if RANK == 0:
        sheet = torch.stack(columns, 1).flatten(0, 1).float().cpu()
        sheet = torch.nn.functional.interpolate(sheet, scale_factor=max(1, 128 // sheet.shape[-1]))
        os.makedirs(os.path.join(s.folder, "samples"), exist_ok=True)
        save_image(sheet, os.path.join(s.folder, "samples", f"{step:06}.png"), nrow=2 * len(columns))
    return [f"{loss:.6g}" for loss in losses] if s.val else ("", "")


def autocast(s, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16")


def export_clip(s, weights, path):
    """The trained visual weights into a fresh CLIP, LoRA merged in float32, as `path`, and, at the end of the stage, as hf/ beside it."""
    clip, _, _ = load_clip(s.backbone, s.clip_weights)
    if not s.no_lora:
        inject_lora(clip.visual)
    own = {name.removeprefix("visual."): tensor for name, tensor in weights.items() if name.startswith("visual.")}
    unknown = clip.visual.load_state_dict(own, strict=False).unexpected_keys
    assert own and not unknown, unknown
    merge_lora(clip.visual)
    if path == s.result:
        export_hf(clip, os.path.join(s.out, "hf"))
    write_weights(clip.state_dict(), path)


def write_result(s, model, path):
    """Stage 1's denoiser and projectors, or the CLIP of the others, by rank 0."""
    weights = get_model_state_dict(model, options=FULL)
    if RANK == 0:
        with writing(path, s):
            write_weights(weights, path) if s.stage == 1 else export_clip(s, weights, path)
    barrier()


RUNTIME = {"stage", "result", "out", "folder", "data", "val", "benchmark", "zeroshot", "epochs", "accum", "workers", "save_every", "sample_every",
           "log_every", "export_every", "compile", "shard", "grad_checkpoint", "clip_weights", "vae", "vqgan", "init"}  # what may differ, or move, when a run goes on


def crc(path):
    """The checksum of a file's first MiB: tells weights of the same size apart, at no cost."""
    with open(path, "rb") as file:
        return zlib.crc32(file.read(1 << 20))


def check_settings(s, data):
    """A stage's folder holds one run: refuse, key by key, to go on with other settings than those it was begun with."""
    settings = {key: value for key, value in sorted(vars(s).items()) if key not in RUNTIME}
    settings |= {"micro-batches of a step (processes x --accum)": s.accum * WORLD, "data": data.fingerprint()}
    files = {"clip_weights": s.clip_weights, "vae" if s.denoiser == "rf" else "vqgan": s.vae if s.denoiser == "rf" else s.vqgan, "init": s.init}
    settings |= {key: f"{os.path.basename(path)}, {os.path.getsize(path)} bytes, {crc(path):08x}" for key, path in files.items() if path}
    path = os.path.join(s.folder, "settings.json")
    barrier()
    if os.path.isfile(path):
        with open(path) as file:
            before = json.load(file)
        changed = [f"{key} was {before.get(key)}, is {settings.get(key)}" for key in sorted(before.keys() | settings) if before.get(key) != settings.get(key)]
        if changed:
            raise UserError(f"{s.folder} holds a run with other settings ({'; '.join(changed)}): give it the same again, or choose another --out")
    elif RANK == 0:
        write_json(path, settings)


def ignore_signals(worker):
    """Torchrun signals the whole process group: the rank decides when its data workers end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At the interpreter's exit, which would send the data workers a SIGTERM, ignored, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def training(s, device, model, core, optimizer, data, start, log):
    """The loop of every stage: yields (steps done, gradient norm) after each step of the optimizer."""
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    batches = iter(DataLoader(data, batch_size=None, sampler=batch_keys(len(data), s, start), num_workers=s.workers,
                              pin_memory=device.type == "cuda", worker_init_fn=ignore_signals))
    atexit.register(end_workers)  # now, so that it runs before the loader's own
    for step in range(start, s.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1, (step + 1) / max(1, s.warmup))          # warm-up, then constant
        for micro in range(s.accum):
            waited = time.perf_counter()
            images, undecodable = next(batches)
            log.wait += time.perf_counter() - waited
            images = images.to(device, non_blocking=True).float() / 255                        # (B, 3, H, W) in [0, 1]
            seed_draws(s.seed, step, micro * WORLD + RANK, 1)
            with synchronized(model, micro == s.accum - 1), autocast(s, device):
                loss = model(images, images.roll(1, 0) if s.shuffle_target else None)          # Eq. 3 or 4: GenHancer.forward
                (loss / s.accum).backward()
            log.add(step, core.losses, core.levels, undecodable)
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, s.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1, grad_norm


def make_optimizer(s, core):
    """AdamW over what set_stage left trainable: denoiser and projectors at --lr, the visual tower at --lr-clip."""
    parts = ([*core.denoiser.parameters(), *core.projectors.parameters()], s.lr), (core.visual.parameters(), s.lr_clip)
    groups = [{"params": [p for p in parameters if p.requires_grad], "lr": lr, "initial_lr": lr} for parameters, lr in parts]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.999), eps=1e-8, weight_decay=s.weight_decay, fused=True)


def train_stage(s, device):
    """One stage, from its settings to its results; goes on from its newest checkpoint."""
    os.makedirs(s.folder, exist_ok=True)
    side, spare = backbone_side(s), os.path.join(s.out, "index")
    data = Images(s.data, side, spare)
    images_per_step = s.batch_size * s.accum * WORLD
    if not hasattr(s, "steps"):
        s.steps = math.ceil(s.epochs * len(data) / images_per_step)
    check_settings(s, data)
    if os.path.isfile(s.result):
        return say(f"stage {s.stage} is finished: {s.result}")
    heldout = Images(s.val or s.data, side, spare, augment=False)
    heldout = [image for image, _ in map(heldout.load, range(min(len(heldout), 512 if s.val else 8))) if image is not None]
    if not heldout:
        raise UserError(f"none of the first images of {', '.join(s.val or s.data)} can be decoded")
    heldout = torch.stack(heldout)

    core = build_model(s, device)
    model = distribute(core, s, device)
    optimizer = make_optimizer(s, core)
    start, bad = load_checkpoint(s, model, optimizer)
    say(f"stage {s.stage}: {sum(p.numel() for p in core.parameters() if p.requires_grad):,} of {sum(p.numel() for p in core.parameters()):,} parameters "
        f"train; {len(data):,} images; {s.steps:,} steps of {images_per_step} images ({WORLD} processes x {s.batch_size} x accumulation {s.accum})")
    log = Log(s, device, start, bad)
    handlers = {number: signal.signal(number, lambda number, _: STOP.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    for step, grad_norm in training(s, device, model, core, optimizer, data, start, log):
        logging, looking, saving = (step % every == 0 or step == s.steps for every in (s.log_every, s.sample_every, s.save_every))
        exporting = s.export_every and s.stage != 1 and step % s.export_every == 0 and step < s.steps
        if logging or looking or saving or exporting:
            seen = look(s, step, model, core, heldout) if looking else ("", "")
            stop = log.flush(step, step * images_per_step / len(data), float(grad_norm), optimizer.param_groups[0]["lr"], seen)
            if exporting:  # before the checkpoint of this step, from which a resumed run would not come back to it
                write_result(s, model, os.path.join(s.out, f"clip-{step:06}.safetensors"))
            if saving or stop:
                save_checkpoint(s, step, model, optimizer, log.bad)
            if stop:
                barrier()  # no rank leaves, and so has torchrun end the others, before the checkpoint is in place
                raise Halt(f"stopped by {signal.Signals(stop).name} after step {step}, which is saved: the same command goes on", 128 + stop)
    log.bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    write_result(s, model, s.result)
    say(f"stage {s.stage} done: {s.result}" + (f"; {log.bad} images could not be decoded" if log.bad else ""))


class RandomImages(Dataset):
    """Endless noise in place of Images, for the bench."""

    def __init__(self, batch_size, side):
        self.batch = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8)

    def __len__(self):
        return 1_000_000

    def __getitem__(self, key):
        return self.batch, []


def bench(s, device):
    """Time the training loop at full size with random weights and, but for --data, images (Table 7); print where the time goes."""
    gpu = device.type == "cuda"
    if not gpu:
        vars(s).update(BENCH_CPU)
    say(f"bench: {'full size' if gpu else 'REDUCED size (no GPU here)'}, RANDOM weights{'' if s.data else ' and images'}: it measures speed and memory, and learns nothing")
    core = build_model(s, device)
    began, side = time.perf_counter(), image_side(core.visual)
    data = Images(s.data, side, os.path.join(s.out, "index")) if s.data else RandomImages(s.batch_size, side)
    indexing, model, warm = time.perf_counter() - began, distribute(core, s, device), 10 if gpu else 2
    optimizer, marks, log = make_optimizer(s, core), [], argparse.Namespace(wait=0.0, add=lambda *_: None)

    def now():
        if not gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(a, b):
        return a.elapsed_time(b) / 1e3 if gpu else b - a

    def time_of(function, repeats=5 if gpu else 2):
        times = [(now(), function(), now()) for _ in range(repeats + 1)][1:]
        torch.cuda.synchronize() if gpu else None
        return float(np.median([seconds(a, b) for a, _, b in times]))

    for step, _ in training(s, device, model, core, optimizer, data, 0, log):
        if step == warm:
            log.wait = 0.0
            if gpu:
                torch.cuda.reset_peak_memory_stats()
        marks.append(now())
    torch.cuda.synchronize() if gpu else None
    peak = torch.cuda.max_memory_allocated() / 1e9 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    steps = np.array([seconds(a, b) for a, b in zip(marks[warm - 1:], marks[warm:])])
    began = time.perf_counter()
    images = [data[s.seed, 0, i, range(i * s.batch_size, (i + 1) * s.batch_size)][0] for i in range(max(1, 256 // s.batch_size))]
    loading, images = len(images) * s.batch_size / (time.perf_counter() - began), images[0].to(device).float() / 255
    with autocast(s, device):
        with FlopCounterMode(display=False) as counter:
            model(images).backward()
        normed = (images - core.mean) / core.std
        if s.shard:
            core.unshard()  # its parts are timed outside its forward
        with torch.set_grad_enabled(core.tune_clip):
            clip = time_of(lambda: core.visual(normed) is None)
        with torch.no_grad():
            tokenizer = time_of(lambda: core.tokenizer.encode(2 * images - 1))
        forward = time_of(lambda: model(images) is None)
        both = time_of(lambda: model(images).backward())
    parts = {"data": log.wait / len(steps), "tokenizer": s.accum * tokenizer, "CLIP forward": s.accum * clip, "denoiser forward": s.accum * (forward - tokenizer - clip),
             "backward": s.accum * (both - forward), "optimizer": time_of(optimizer.step)}
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    ceiling = next((tflops for known, tflops in PEAK_TFLOPS.items() if known in name), None) if s.precision == "bf16" else None
    rate = s.accum * counter.get_total_flops() / np.median(steps) / 1e12
    count = lambda module: sum(p.numel() for p in module.parameters())
    for label, value in (
            ("device", f"{name} x {WORLD}"), ("stage, denoiser, backbone", f"{s.stage}, {s.denoiser}, {s.backbone}"),
            ("parameters", f"denoiser {count(core.denoiser):,}, visual tower {count(core.visual):,}"),
            ("batch", f"{s.batch_size} images x accumulation {s.accum} x {WORLD}, {s.precision}"),
            ("s / 100 iterations", f"{100 * np.median(steps):.2f} (quartiles {100 * np.quantile(steps, .25):.2f}, {100 * np.quantile(steps, .75):.2f}; {len(steps)} timed)"),
            ("images / s", f"{s.batch_size * s.accum * WORLD / np.median(steps):.1f}"),
            *([("loading", f"{loading:.0f} images/s in one process; {len(data):,} images indexed in {indexing:.2f} s")] if s.data else []),
            ("peak memory", f"{peak:.2f} GB {'of a GPU' if gpu else 'of the process'}"),
            ("model TFLOP/s", f"{rate:.2f} per device; MFU " + (f"{100 * rate / ceiling:.1f} % of {ceiling}" if ceiling else "unknown: no peak on record for this device")),
            ("share of time, each alone", ", ".join(f"{part} {100 * value / sum(parts.values()):.0f} %" for part, value in parts.items()))):
        say(f"{label:28}{value}")


PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362, "RTX 4090": 165}  # dense bf16, by the vendor's datasheets


def compare(args, device):
    """The benchmark and the retention tasks before and after, into result.json and onto the screen."""
    result = {}
    for name, weights in (("before", args.clip_weights), ("after", os.path.join(args.out, "clip.safetensors"))):
        clip, preprocess, tokenizer = load_clip(args.backbone, weights)
        result[name] = evaluate(clip.to(device), preprocess, tokenizer, args.benchmark, [task.partition(":")[::2] for task in args.zeroshot])
    print_table(result["before"], result["after"])
    for part in result.values():
        del part["pairs"]
    write_json(os.path.join(args.out, "result.json"), result)


def run(args):
    if LOCAL_RANK == 0 and args.preset != "bench":
        if args.preset == "toy":
            from toy.make_toy import draw_world
            draw_world(os.path.join(TOY, "data"))
        if faults := check(args):
            sys.exit(print(*(f"train.py: {fault}" for fault in faults), sep="\n", file=sys.stderr) or 2)
    device = torch.device("cuda", LOCAL_RANK) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cuda.enable_flash_sdp(device.type == "cuda")  # the CPU's obeys it too, and is slow backwards
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where float32 remains, as cuDNN's convolutions have it by default
    if "RANK" in os.environ:  # torchrun
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30),
                                device_id=device if device.type == "cuda" else None)
    for stage in [1, 2] if args.stage == "all" else [args.stage]:
        (bench if args.preset == "bench" else train_stage)(stage_settings(args, stage), device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if args.stage == "all" and RANK == 0:
        compare(args, device)


def keep_memory():
    """Have glibc keep freed blocks: returning them to the system at each step costs a CPU a fifth of its time."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for option, size in ((-3, 1 << 28), (-1, 1 << 28), (-2, 1 << 26)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(option, size)


def main(argv=None):
    keep_memory()
    try:
        run(parse_args(argv))
    except UserError as error:
        if LOCAL_RANK:
            time.sleep(10)  # local rank 0 says it; torchrun ends this process then
        sys.exit(tqdm.write(f"train.py: {str(error).rpartition('UserError: ')[2]}", file=sys.stderr) or 2)  # from a worker it is a whole traceback
    except Halt as halt:
        if RANK:
            time.sleep(5)
        else:
            tqdm.write(f"train.py: {halt}", file=sys.stderr)
        sys.exit(halt.status)


if __name__ == "__main__":
    main()
