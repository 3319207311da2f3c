"""The paper's ablations in miniature: a grid of train.py runs on the toy world, over several CLIPs, as curves of accuracy against retention.

    python toy/ablate.py --quick      # one CLIP and the main rows, about 10 minutes on 2 cores
    python toy/ablate.py              # the grid: hours. A killed grid goes on where it was
    python toy/ablate.py --report     # the tables, ablation.svg and ablation.csv of what has run so far
    python toy/ablate.py --visible runs/toy-rf     # what the reconstructions of a finished train.py --preset toy show, and a picture of it

Each cell is one CLIP, arm and rate of LoRA: stage 1 (shared by the arms that differ in stage 2 only), then stage 2 with a CLIP saved every
60 steps, each scored on two benchmarks and on two sets of category images. The rate of an arm is the one of three with the highest accuracy
at a retention of .97 on dev, with the first CLIP; the table's numbers come from a benchmark and from images that nothing was chosen on.
CLIP n is trained with seed n, and so are its stages. A verdict is Student's 95 % interval over CLIPs, for which the arms' spreads are pooled:
of 22 verdicts, one is wrong by luck. The cells share what they all compute, the images of a step and their latents (out/memory-*, 2 GB, to be removed at will).
"""
import argparse
import csv
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import eval_mmvp  # noqa: E402
import toy.make_toy as make_toy  # noqa: E402
import train  # noqa: E402
from eval_mmvp import encode_images, evaluate, exact_float32  # noqa: E402
from genhancer import load_clip  # noqa: E402
from toy.make_toy import VALUES, draw_part, draw_world, tqdm, write_benchmark, write_classes  # noqa: E402
from train import build_model, checkpoints, load_file, parse_args, seed_draws, stage_settings, write_json  # noqa: E402
from vae import AutoEncoder, UserError  # noqa: E402
from vqgan import VQGAN  # noqa: E402

FINAL, FINAL_CLASSES, PROBE = 101, 102, 103  # seeds of what the table is measured on, drawn by nothing else
STEPS, EVERY = 300, 60
SAME = "--precision bf16"  # whether or not the CPU is fast at it
RATES, DIRECT_RATES = (2e-4, 4e-4, 8e-4), (1e-5, 3e-5, 1e-4)
# arm: (flags of both stages, of stage 1, of stage 2)
ARMS = {
    "rf": ("", "", ""),
    "perceiver": ("--denoiser perceiver", "", ""),
    "local .1": ("--local-ratio 0.1", "", ""),
    "local .5": ("--local-ratio 0.5", "", ""),
    "local 1": ("--local-ratio 1", "", ""),
    "perceiver, local .5": ("--denoiser perceiver --local-ratio 0.5", "", ""),
    "end to end": ("", None, ""),
    "direct": ("", "", "--no-lora"),
    "frozen": ("", "", "--freeze-denoiser"),
    "uniform t": ("--timesteps uniform", "", ""),
    "s = .1": ("--scale 0.1", "", ""),
    "s = .5": ("--scale 0.5", "", ""),
    "s = 5": ("--scale 5", "", ""),
    "s = 10": ("--scale 10", "", ""),
    "depth 2 + 4": ("--depth 2 4", "", ""),
    "layers 2": ("--denoiser perceiver --layers 2", "", ""),
    "layers 6": ("--denoiser perceiver --layers 6", "", ""),
    "mask .5": ("--denoiser perceiver --mask-ratio 0.5 0.5", "", ""),
    "mask .75": ("--denoiser perceiver --mask-ratio 0.75 0.75", "", ""),
    "mask .9": ("--denoiser perceiver --mask-ratio 0.9 0.9", "", ""),
    "stage 1: 200 steps": ("", "--steps 200", ""),
    "stage 1: 1700 steps": ("", "--steps 1700", ""),
    "shuffled target": ("", "", "--shuffle-target"),
}
QUICK = ("rf", "local .5", "end to end", "direct")
KEY = ("rf", "perceiver", "local .5", "end to end", "uniform t", "direct", "frozen")  # on all CLIPs; the others on two
CLAIMS = (  # (arm, of what, the claim, the paper's numbers, how the arm should differ from its reference)
    ("local .1", "rf", "Fig. 5: 10 % of local tokens hurt", "a figure only", -1),
    ("local .5", "rf", "Fig. 5: 50 % of local tokens hurt", "a figure only", -1),
    ("local 1", "rf", "Fig. 5: all local tokens hurt", "a figure only", -1),
    ("perceiver, local .5", "perceiver", "Fig. 5: also with the discrete denoiser", "a figure only", -1),
    ("end to end", "rf", "Fig. 6: end to end is worse", "more than 5 points worse", -1),
    ("uniform t", "rf", "Table 4: uniform t is worse than s = 1", "21.5 against 31.9", -1),
    ("s = .1", "rf", "Table 4: s = .1 is worse", "27.4 against 31.9", -1),
    ("s = .5", "rf", "Table 4: s = .5 is worse", "28.2 against 31.9", -1),
    ("s = 5", "rf", "Table 4: s = 5 is worse", "24.5 against 31.9", -1),
    ("s = 10", "rf", "Table 4: s = 10 is worse", "20.7 against 31.9", -1),
    ("depth 2 + 4", "rf", "Table 5: one of 2 + 4 for 1 + 2 blocks does no better", "42.2 against 41.5", "<="),
    ("layers 2", "perceiver", "Table 5: 2 layers are a little worse than 4", "41.5 against 43.7", -1),
    ("layers 6", "perceiver", "Table 5: 6 layers are a little better than 4", "45.2 against 43.7", 1),
    ("perceiver", "rf", "Table 6: discrete below continuous on OpenAI's CLIP", "28.9 against 31.9", -1),
    ("mask .5", "perceiver", "Table 8: masks of 50 % do about as well as 50-90 %", "28.1 against 28.9", 0),
    ("mask .75", "perceiver", "Table 8: masks of 75 % are a little worse", "27.4 against 28.9", -1),
    ("mask .9", "perceiver", "Table 8: masks of 90 % are worse", "25.9 against 28.9", -1),
    ("direct", "rf", "Fig. 8: training without LoRA is worse", "a figure only", -1),
    ("frozen", "rf", "Fig. 9: a frozen denoiser makes little difference", "a figure only", 0),
    ("stage 1: 200 steps", "rf", "Fig. 1b: a short stage 1 is worse", "a figure only", -1),
    ("stage 1: 1700 steps", "rf", "Fig. 1b: better reconstruction is no better representation", "a figure only", "<="),
    ("shuffled target", "rf", "control: another image's [CLS]", "none", -1),
)
CLIPS = tuple("0123456789")  # seeds of make_toy.py clip; 0: the committed one
CONTROL, RETENTIONS = "shuffled target", (.98, .97, .95)
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042}
MARGIN = 2.0  # points: what "about as well" and "no better" allow


def end_with(parent):
    """For a worker or a job: one core, and no life after its parent's, or it would hold the grid's lock."""
    torch.set_num_threads(1)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def remember(owner, name, folder, key):
    """Have a method of one argument keep each result on disk and read it from there the next time; `key` tells what it depends on."""
    method = getattr(owner, name)

    def recalled(self, argument):
        path = os.path.join(folder, f"{name.strip('_')}-{hashlib.sha256(key(self, argument)).hexdigest()}.pt")
        if os.path.isfile(path):
            return torch.load(path)
        result = method(self, argument)
        torch.save(result, f"{path}.{os.getpid()}")
        os.replace(f"{path}.{os.getpid()}", path)
        return result
    setattr(owner, name, recalled)


def command(log, memory, words):
    """The body of a process: train.py or make_toy.py, words[0], with the other words as its arguments; same numbers, whatever is remembered."""
    end_with(os.getppid())
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the toy is compared on CPUs
    os.chdir(os.path.dirname(HERE))
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    remember(train.Images, "__getitem__", memory, lambda data, key: f"{data.fingerprint()} {key}".encode())
    for tokenizer, method in ((AutoEncoder, "moments"), (VQGAN, "encode")):
        remember(tokenizer, method, memory, lambda _, images: np.ascontiguousarray(images))
    sys.argv = words
    {"train.py": train, "toy/make_toy.py": make_toy}[words[0]].main()


def call(out, log, line, /, *flags, **paths):
    """Run a command line of train.py or make_toy.py in a process of its own, its output into the file `log`; returns the line, raises RuntimeError."""
    words = [*line.split(), *(word for flag in flags for word in flag.split())]
    words += [word for name, path in paths.items() for word in (f"--{name.replace('_', '-')}", path)]
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as file:
        process = multiprocessing.get_context("fork").Process(target=command, args=(file, memory_of(out), words))  # spares the imports
        process.start()
        process.join()
    if process.exitcode:
        raise RuntimeError(f"{' '.join(words)} failed: see {log}")
    return "python " + " ".join(words)


def memory_of(out):
    """The folder of what is remembered: another one for other tokenizers."""
    folder = os.path.join(out, "-".join(["memory", *(f"{checksum(f'{HERE}/{name}.safetensors'):08x}" for name in ("vae", "vqgan"))]))
    os.makedirs(folder, exist_ok=True)
    return folder


def read_json(path):
    with open(path) as file:
        return json.load(file)


def quoted(arm):
    return f'"{arm}"' if " " in arm else arm


def weights_of(out, clip):
    """The file of a CLIP: the committed one ("0"), another seed's, or the regime without gain ("full")."""
    return os.path.join(HERE if clip == "0" else os.path.join(out, f"clip-{clip}"), "clip.safetensors")


def prepare(out, clip):
    """Train a CLIP, if it is not there, and score it as it is."""
    folder, weights = os.path.join(out, f"clip-{clip}"), weights_of(out, clip)
    if not os.path.isfile(weights):
        call(out, f"{folder}.log", "toy/make_toy.py clip", "--regime full" if clip == "full" else f"--seed {clip}", out=folder)
    if not os.path.isfile(f"{folder}/before.json") or read_json(f"{folder}/before.json").get("crc") != checksum(weights):
        os.makedirs(folder, exist_ok=True)
        write_json(f"{folder}/before.json", score(out, weights) | {"step": 0, "crc": checksum(weights)})


def name_of(out, clip, name):
    return os.path.join(out, f"clip-{clip}", name.replace("--", "").replace(" ", "_"))


def stage1_folder(out, clip, arm):
    """Where an arm's stage 1 lies: named by its flags, so that arms which differ in stage 2 only share it."""
    both, one, _ = ARMS[arm]
    return name_of(out, clip, f"stage 1 {both} {one}".rstrip())


def same(clip):
    """The flags of every run of a CLIP."""
    return f"{SAME} --seed {0 if clip == 'full' else clip}"


def stage1(out, clip, arm):
    """Stage 1 of an arm, which train.py finds finished if it is."""
    folder = stage1_folder(out, clip, arm)
    call(out, f"{folder}.log", "train.py --preset toy --stage 1", same(clip), *ARMS[arm][:2], clip_weights=weights_of(out, clip), out=folder)


@lru_cache(None)
def checksum(path):
    with open(path, "rb") as file:
        return zlib.crc32(file.read())


def plan(out, clip, arm, rate):
    """A cell's path without .json, the flags of its stage 2, and what its JSON must say for it to be this cell."""
    both, one, two = ARMS[arm]
    flags = (both, two, f"{same(clip)} --lr-clip {rate} --export-every {EVERY} --sample-every {EVERY}")
    what = {"clip": clip, "arm": arm, "rate": rate, "flags": " ".join([*flags, str(one), str(STEPS)]), "crc": checksum(weights_of(out, clip))}
    return name_of(out, clip, f"{arm} {rate:g}"), flags, what


def finished(out, clip, arm, rate):
    """A cell's JSON, or None if it has not run; RuntimeError if another one lies in its place."""
    if not os.path.isfile(path := f"{name_of(out, clip, f'{arm} {rate:g}')}.json"):
        return None
    content, what = read_json(path), plan(out, clip, arm, rate)[2]
    if {key: content.get(key) for key in what} != what:
        raise RuntimeError(f"{path} is of other settings or another CLIP: remove it, or choose another --out")
    return content


def cell(out, clip, arm, rate):
    """Train, score the curve and write one JSON, unless it is there."""
    if finished(out, clip, arm, rate):
        return
    (path, flags, what), weights, one = plan(out, clip, arm, rate), weights_of(out, clip), ARMS[arm][1]
    if one is None:
        line = call(out, f"{path}.log", f"train.py --preset toy --stage e2e --steps {STEPS * 3 // 2}", *flags, clip_weights=weights, out=path)
    else:
        start = os.path.join(stage1_folder(out, clip, arm), "stage1", "last.safetensors")
        line = call(out, f"{path}.log", f"train.py --preset toy --stage 2 --steps {STEPS}", *flags, clip_weights=weights, out=path, init=start)
    with open(os.path.join(path, "e2e" if one is None else "stage2", "log.csv"), newline="") as file:
        heldout = {int(row["step"]): float(row["heldout"]) for row in csv.DictReader(file) if row["heldout"]}
    curve, last = [read_json(os.path.join(out, f"clip-{clip}", "before.json"))], os.path.join(path, "clip.safetensors")
    for step in sorted(heldout):
        curve.append(score(out, last if step == max(heldout) else os.path.join(path, f"clip-{step:06}.safetensors")) | {"step": step, "heldout": heldout[step]})
    result = what | {"command": line, "curve": curve}
    if arm == "rf":
        result["probe"] = {"before": probe(weights), "after": probe(last)}
    write_json(f"{path}.json", result)
    shutil.rmtree(path)


read_once = lru_cache(None)(eval_mmvp.read_image)  # a worker scores many CLIPs on the same images


def score(out, weights):
    """{"dev": ..., "test": ...}: pair accuracy, by pattern too, and category zero-shot, of a CLIP's weights."""
    eval_mmvp.read_image = read_once
    clip, preprocess, tokenizer = load_clip("toy", weights)
    result = {}
    for name, benchmark, classes in (("dev", f"{HERE}/data/mmvp-dev", f"{HERE}/data/zeroshot-dev"), ("test", f"{out}/world/mmvp", f"{out}/world/zeroshot")):
        seen = evaluate(clip, preprocess, tokenizer, benchmark, [("folder", classes)])
        result[name] = {"pairs": seen["average"], "patterns": seen["patterns"], "zeroshot": seen["zeroshot"]["folder accuracy"]}
    return result


def fit_reader(features, scenes, ridge):
    """Ridge regression of features (N, D) to each attribute, one-hot: a function (features, scenes) -> {attribute: (N,) bool, read rightly}."""
    center = features.mean(0)
    widen = lambda x: torch.cat([x - center, torch.ones(len(x), 1)], dim=1).double()
    labels = lambda attribute, some: torch.tensor([VALUES[attribute].index(scene[attribute]) for scene in some])
    x = widen(features)
    square = x.T @ x + ridge * torch.eye(x.shape[1], dtype=torch.double)
    maps = {attribute: torch.linalg.solve(square, x.T @ torch.eye(len(values), dtype=torch.double)[labels(attribute, scenes)]) for attribute, values in VALUES.items()}
    return lambda features, some: {attribute: (widen(features) @ map_).argmax(1) == labels(attribute, some) for attribute, map_ in maps.items()}


def percent(right):
    return {attribute: 100 * of.double().mean().item() for attribute, of in right.items()}


@exact_float32()
def probe(weights):
    """{attribute: percent}: a linear probe on [CLS], fitted to 2,000 new images, tested on 1,000 more."""
    clip, preprocess, _ = load_clip("toy", weights)
    pixels, scenes = zip(*draw_part(PROBE, range(3000)))
    features, _ = encode_images(clip, [(preprocess(Image.fromarray(x)), i) for i, x in enumerate(pixels)], 100)
    return percent(fit_reader(features[:2000], scenes[:2000], 1e-2)(features[2000:], scenes[2000:]))


@torch.no_grad()
@exact_float32()
def visible(run, path, columns=8):
    """What the reconstructions of a finished `train.py --preset toy` show, from the original [CLS] after stage 1 and from the enhanced one after stage 2.

    Prints how often each attribute is read rightly off 1,000 of them by a linear reader, fitted to the pixels of 2,000 other images as the VAE
    decodes them. Draws, for the four attributes that gain most, the first two images that are read wrongly before and rightly after.
    """
    core = build_model(stage_settings(parse_args(["--preset", "toy", "--precision", "fp32", "--out", run]), 2), torch.device("cpu"))  # LoRA is still 0
    pixels, scenes = zip(*draw_part(PROBE, range(3000)))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255

    def through(function, some):
        seed_draws(0)  # the same noise for both
        return torch.cat([function(x) for x in tqdm(some.split(100), "reconstructing", leave=False)])

    flat = lambda x: torch.nn.functional.avg_pool2d(x, 2).flatten(1)
    decoded = through(lambda x: core.tokenizer.decode(core.tokenizer.encode(2 * x - 1)) / 2 + 0.5, images)
    reader, images, scenes = fit_reader(flat(decoded[:2000]), scenes[:2000], 10), images[2000:], scenes[2000:]
    before = through(core.reconstruct, images)
    core.load_state_dict(load_file(os.path.join(checkpoints(os.path.join(run, "stage2"))[-1], "model.safetensors")), strict=False)
    after = through(core.reconstruct, images)
    right = [reader(flat(x), scenes) for x in (decoded[2000:], before, after)]
    print("\n| attribute | chance | the image itself | reconstruction, original [CLS] | enhanced [CLS] |\n|" + "---|" * 5)
    for attribute, values in VALUES.items():
        print(f"| {attribute} | {100 / len(values):.0f} | " + " | ".join(f"{percent(of)[attribute]:.1f}" for of in right) + " |")
    gains = {attribute: percent(right[2])[attribute] - percent(right[1])[attribute] for attribute in VALUES}
    best = sorted(gains, key=gains.get, reverse=True)[:columns // 2]
    picked = {}  # image: attribute
    for attribute in best:
        new = [i for i in (right[2][attribute] & ~right[1][attribute]).nonzero().flatten().tolist() if i not in picked]
        picked |= dict.fromkeys(new[:2], attribute)
    sheet = Image.new("RGB", (150 + 122 * len(picked), 3 * 122 + 24), "white")
    pen = ImageDraw.Draw(sheet)
    pen.font = ImageFont.load_default(13)
    for row, (title, source) in enumerate((("image", images), ("reconstruction\nfrom the\noriginal [CLS]", before), ("reconstruction\nfrom the\nenhanced [CLS]", after))):
        pen.multiline_text((8, 122 * row + 45), title, "black")
        for k, i in enumerate(picked):
            tile = Image.fromarray((source[i].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
            sheet.paste(tile.resize((120, 120), Image.Resampling.NEAREST), (150 + 122 * k, 122 * row))
    pen.text((8, 3 * 122 + 4), "what became visible", "black")
    for k, (i, attribute) in enumerate(picked.items()):
        pen.text((152 + 122 * k, 3 * 122 + 4), scenes[i][attribute], "black")
    sheet.save(path)
    print(f"{path}: of each of {', '.join(best)}, the first two images that are read wrongly before and rightly after")


def at_retention(curve, retention, part="test"):
    """Pair accuracy where zero-shot / zero-shot before first falls to `retention`, linear between two points; NaN if it never does."""
    points = [(point[part]["zeroshot"] / curve[0][part]["zeroshot"], point[part]["pairs"]) for point in curve]
    for (r0, a0), (r1, a1) in zip(points, points[1:]):
        if r1 <= retention:
            return a0 + (a1 - a0) * (r0 - retention) / (r0 - r1)
    return math.nan


def at_step(curve):
    """The point after STEPS steps of the visual tower."""
    return next(point for point in curve if point["step"] == STEPS)


def t95(dof):
    """Student's t, two-sided 95 %, at these degrees of freedom or the next fewer in the table."""
    return T95[max(key for key in T95 if key <= dof)]


def residual(values):
    """Randomised blocks: the standard deviation of what neither the arm nor the CLIP explains of {(arm, clip): value}, and its degrees of freedom.

    The least-squares fit of value = the arm's + the CLIP's; NaNs are left out. (NaN, 0) where nothing is left to judge by.
    """
    values = {key: value for key, value in values.items() if not math.isnan(value)}
    columns = [sorted({key[k] for key in values}) for k in (0, 1)]
    design = np.array([[float(part == level) for part, levels in zip(key, columns) for level in levels] for key in values])
    if not values:
        return math.nan, 0
    seen = np.array(list(values.values()))
    solution, _, rank, _ = np.linalg.lstsq(design, seen, rcond=None)
    dof = len(seen) - int(rank)
    return (float(np.linalg.norm(seen - design @ solution)) / dof ** 0.5, dof) if dof else (math.nan, 0)


def interval(values, noise=None):
    """Mean and half-width of the 95 % interval over CLIPs, and both in words; values that are NaN are left out, and counted.

    By the values' own spread (three or more), or, for differences of two arms, by `noise`, what `residual` says of all arms (two or more).
    """
    asked, values = len(values), [value for value in values if not math.isnan(value)]
    if not values:
        return math.nan, math.nan, "not reached"
    n, mean, half, of = len(values), float(np.mean(values)), math.nan, f" ({len(values)} of {asked})" if len(values) < asked else ""
    if noise and noise[1] and n > 1:
        half = t95(noise[1]) * noise[0] * (2 / n) ** 0.5
    elif not noise and n > 2:
        half = t95(n - 1) * float(np.std(values, ddof=1)) / n ** 0.5
    return mean, half, f"{mean:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}") + of


def verdict(mean, half, expected):
    """Whether a difference is as the paper's: lower (-1), higher (1), about the same (0) or not higher ("<=")."""
    if math.isnan(half):
        return "undecided (too few CLIPs)"
    low, high = mean - half, mean + half
    right, wrong = {-1: (high < 0, low > 0), 1: (low > 0, high < 0), 0: (-MARGIN < low and high < MARGIN, low > MARGIN or high < -MARGIN),
                    "<=": (high < MARGIN, low > MARGIN)}[expected]
    return "reproduces" if right else "does not" if wrong else "undecided"


def report(chosen, out):
    """Print the tables of the chosen cells {(arm, clip): cell}, and draw them."""
    curves = {key: run["curve"] for key, run in chosen.items() if key[1] != "full"}
    arms, clips = list(dict.fromkeys(arm for arm, _ in curves)), lambda arm: [clip for a, clip in curves if a == arm]
    gained = [{key: at_step(c)["test"]["pairs"] - c[0]["test"]["pairs"] for key, c in curves.items()}]
    gained += [{key: at_retention(c, r) - c[0]["test"]["pairs"] for key, c in curves.items()} for r in RETENTIONS]
    dev = {key: at_retention(c, .97, "dev") - c[0]["dev"]["pairs"] for key, c in curves.items()}
    print(f"\n| arm | LoRA's rate | CLIPs | zero-shot change after {STEPS} steps | held-out loss | pairs gained | at retention .98 | .97 | .95 |\n|" + "---|" * 9)
    for arm in arms:
        own = [curves[arm, clip] for clip in clips(arm)]
        rate = chosen[arm, clips(arm)[0]]["rate"]
        print(f"| {arm} | {rate:g}{', an edge' if rate in (rates_of(arm)[0], rates_of(arm)[-1]) and arm != CONTROL else ''} | {', '.join(clips(arm))} | {np.mean([at_step(c)['test']['zeroshot'] - c[0]['test']['zeroshot'] for c in own]):+.1f} | "
              f"{np.mean([at_step(c)['heldout'] for c in own]):.3f} | " + " | ".join(interval([column[arm, clip] for clip in clips(arm)])[2] for column in gained) + " |")
    noise = [residual({key: value for key, value in column.items() if key[0] != CONTROL}) for column in gained]
    print(f"\nStandard deviation of what neither arm nor CLIP explains (without the control) after {STEPS} steps, at retention .98, .97, .95: "
          + ", ".join(f"{sd:.2f} ({dof} degrees of freedom)" for sd, dof in noise))
    print(f"\n| the paper's claim | the paper | here, at retention .97 | .97, on dev | .98 | .95 | after {STEPS} steps | CLIPs | verdict | `python toy/ablate.py --arms` |\n|" + "---|" * 10)
    for arm, reference, claim, paper, expected in CLAIMS:
        both = [clip for clip in clips(arm) if (reference, clip) in curves]
        after, high, equal, low = [interval([column[arm, clip] - column[reference, clip] for clip in both], of) for column, of in zip(gained, noise)]
        judged, where = (after, f" (after {STEPS} steps)") if math.isnan(equal[0]) else (equal, "")
        print(f"| {claim} | {paper} | " + (f"{equal[2]} | {interval([dev[arm, clip] - dev[reference, clip] for clip in both], (math.nan, 0))[2]} | {high[2]} | {low[2]} | {after[2]} | {len(both)} | {verdict(*judged[:2], expected)}{where}" if both else "not run | | | | | |")
              + f" | `{quoted(reference)} {quoted(arm)}` |")
    for arm in [arm for arm in ("rf", "perceiver") if arm in arms]:
        print(f"\n| {arm}, steps of stage 2 | held-out loss | pairs gained | zero-shot change |\n|" + "---|" * 4)
        for points in zip(*(curves[arm, clip][1:] for clip in clips(arm))):
            changes = [[point["test"][key] - curve[0]["test"][key] for point, clip in zip(points, clips(arm)) for curve in [curves[arm, clip]]] for key in ("pairs", "zeroshot")]
            print(f"| {points[0]['step']} | {np.mean([point['heldout'] for point in points]):.3f} | " + " | ".join(interval(values)[2] for values in changes) + " |")
    changes = []
    for run in (run for (arm, _), run in chosen.items() if arm == "rf"):
        (before, after), probe = (point["test"] for point in (run["curve"][0], at_step(run["curve"]))), run["probe"]
        print(f"\nCLIP {run['clip']}, rf: zero-shot {before['zeroshot']:.1f} -> {after['zeroshot']:.1f}\n| pattern | pairs before | after | linear probe before | after |\n|" + "---|" * 5)
        for (pattern, old), attribute in zip(before["patterns"].items(), VALUES):
            new = after["patterns"][pattern]
            print(f"| {pattern} | {old:.0f} | {new:.0f} | {probe['before'][attribute]:.1f} | {probe['after'][attribute]:.1f} |")
            if run["clip"] != "full":
                changes.append((new - old, probe["after"][attribute] - probe["before"][attribute]))
    if changes:
        print(f"\nCorrelation of the pairs' change with the probe's, over {len(changes)} patterns of {len(clips('rf'))} CLIPs: {np.corrcoef(np.transpose(changes))[0, 1]:.2f}")
    draw({arm: [curves[arm, clip] for clip in clips(arm)] for arm in arms if arm in (*KEY, CONTROL)}, os.path.join(out, "ablation.svg"))


def write_curves(out):
    """out/ablation.csv: every run's curve, those of the rates that were not chosen too; pairs and zero-shot in percent, then pairs by attribute."""
    with open(os.path.join(out, "ablation.csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "clip", "rate", "step", "heldout", *(f"{part} {name}" for part in ("dev", "test") for name in ("pairs", "zeroshot", *VALUES))])
        for arm in ARMS:
            for run in filter(None, (finished(out, clip, arm, rate) for clip in [*CLIPS, "full"] for rate in rates_of(arm))):
                for point in run["curve"]:
                    numbers = [x for part in (point["dev"], point["test"]) for x in (part["pairs"], part["zeroshot"], *part["patterns"].values())]
                    writer.writerow([arm, run["clip"], f"{run['rate']:g}", point["step"], point.get("heldout", ""), *(f"{x:.4g}" for x in numbers)])


COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d")


def draw(curves, path):
    """An SVG of pair accuracy gained against retention, a curve per arm, the mean over its CLIPs, readable on light and dark."""
    lines = {arm: [(np.mean([c[i]["test"]["zeroshot"] / c[0]["test"]["zeroshot"] for c in runs]), np.mean([c[i]["test"]["pairs"] - c[0]["test"]["pairs"] for c in runs]))
                   for i in range(min(map(len, runs)))] for arm, runs in curves.items()}
    x = lambda r: 60 + (1.003 - r) / 0.103 * 460
    y = lambda a: 330 - (a + 2) / 16 * 300
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" font-family="sans-serif" font-size="13">',
             '<clipPath id="chart"><rect x="60" y="30" width="460" height="300"/></clipPath>',
             "<style>text{fill:#768390}.axis{stroke:#768390}</style>"]  # a grey for light pages and dark ones
    for r in (1, .98, .97, .95, .9):
        parts.append(f'<line class="axis" x1="{x(r):.1f}" x2="{x(r):.1f}" y1="30" y2="330" stroke-opacity=".3"/><text x="{x(r):.1f}" y="348" text-anchor="middle">{r:g}</text>')
    for a in range(-2, 15, 2):
        parts.append(f'<line class="axis" x1="60" x2="520" y1="{y(a):.1f}" y2="{y(a):.1f}" stroke-opacity="{.9 if a == 0 else .3}"/><text x="52" y="{y(a) + 4:.1f}" text-anchor="end">{a:+d}</text>')
    parts.append('<text x="290" y="375" text-anchor="middle">zero-shot accuracy kept, of 1 before stage 2</text><text x="60" y="18">points of pair accuracy gained, along stage 2 (mean over how many CLIPs)</text>')
    for k, (arm, points) in enumerate(lines.items()):
        path_of = " ".join(f"{x(r):.1f},{y(a):.1f}" for r, a in points)
        parts.append(f'<polyline points="{path_of}" fill="none" stroke="{COLOURS[k]}" stroke-width="2.5" clip-path="url(#chart)"/>')
        parts += [f'<circle clip-path="url(#chart)" cx="{x(r):.1f}" cy="{y(a):.1f}" r="3" fill="{COLOURS[k]}"/>' for r, a in points]
        parts.append(f'<line x1="540" x2="565" y1="{50 + 22 * k}" y2="{50 + 22 * k}" stroke="{COLOURS[k]}" stroke-width="3"/><text x="572" y="{54 + 22 * k}">{arm} ({len(curves[arm])})</text>')
    with open(path, "w") as file:
        file.write("\n".join([*parts, "</svg>"]) + "\n")


def choose(out, clips, arm):
    """The best rate of an arm on dev with the first CLIP, the control's being its reference's; and its cells {(arm, clip): content}, as far as they have run."""
    cells = {(clip, rate): content for clip in clips for rate in rates_of(arm) if (content := finished(out, clip, arm, rate))}

    def merit(rate):
        value = at_retention(cells[clips[0], rate]["curve"], .97, "dev")
        return cells[clips[0], rate]["curve"][-1]["dev"]["pairs"] if math.isnan(value) else value  # never as low: at least this

    best = choose(out, clips, "rf")[0] if arm == CONTROL else max((rate for clip, rate in cells if clip == clips[0]), key=merit, default=None)
    return best, {(arm, clip): content for (clip, rate), content in cells.items() if rate == best}


def rates_of(arm):
    return DIRECT_RATES if arm == "direct" else RATES


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"the first CLIP, one rate: {', '.join(QUICK)}")
    parser.add_argument("--report", action="store_true", help="only show what has run")
    parser.add_argument("--visible", metavar="RUN", help="a finished train.py --preset toy: what its reconstructions show, into a table and RUN/visible.png")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="which")
    parser.add_argument("--clips", nargs="+", choices=CLIPS, default=CLIPS[:3], metavar="SEED", help="of make_toy.py clip; 0: the committed one")
    parser.add_argument("--out", default="runs/ablation", help="the folder of the runs")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=2, metavar="N", help="runs at a time, one core each")
    args = parser.parse_args()
    out, arms, clips = os.path.abspath(args.out), *(list(dict.fromkeys(some)) for some in (QUICK if args.quick else args.arms, args.clips[:1] if args.quick else args.clips))
    if args.visible:
        if not checkpoints(os.path.join(args.visible, "stage2")) or not os.path.isfile(os.path.join(args.visible, "stage1", "last.safetensors")):
            sys.exit(print(f"ablate.py: no finished stage 2 in {args.visible}: run train.py --preset toy --out {args.visible} first", file=sys.stderr) or 2)
        return visible(args.visible, os.path.join(args.visible, "visible.png"))
    failures = []
    if args.report and not os.path.isdir(out):
        sys.exit(print(f"ablate.py: nothing has run in {out}: leave --report out, or name the runs' folder with --out", file=sys.stderr) or 2)
    if not args.report:
        os.makedirs(out, exist_ok=True)
        lock = open(os.path.join(out, "lock"), "w")  # a killed grid's jobs hold it for a second or two more
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit(print(f"ablate.py: another grid works in {out}: wait for it, or choose another --out", file=sys.stderr) or 2)
        draw_world(os.path.join(HERE, "data"))
        if not os.path.isdir(f"{out}/world"):
            shutil.rmtree(f"{out}/world.part", ignore_errors=True)
            for part in (write_benchmark(f"{out}/world.part/mmvp", FINAL), write_classes(f"{out}/world.part/zeroshot", FINAL_CLASSES)):
                for _ in tqdm(part, "drawing what is measured on"):
                    pass
            os.replace(f"{out}/world.part", f"{out}/world")
        with ProcessPoolExecutor(args.jobs, initializer=end_with, initargs=(os.getpid(),)) as pool:
            def run(what, calls):  # (function, its arguments)
                for future in tqdm([pool.submit(function, out, *arguments) for function, *arguments in calls], what):
                    try:
                        future.result()
                    except (RuntimeError, OSError, UserError) as error:
                        failures.append(str(error))
                    except KeyboardInterrupt:
                        print("ablate.py: stopped; the same command goes on", file=sys.stderr, flush=True)
                        os._exit(130)  # the workers and their jobs follow

            def stages(some):  # stage 1 for each distinct set of its flags
                return [(stage1, *call) for call in {(clip, *ARMS[arm][:2]): (clip, arm) for clip, arm in some if ARMS[arm][1] is not None}.values()]

            full = ["full"] if "rf" in arms and not args.quick else []
            run("the first CLIP", [(prepare, clips[0])])
            run("the other CLIPs, and stage 1 of the first", [*((prepare, clip) for clip in [*clips[1:], *full]), *stages([(clips[0], arm) for arm in arms])])
            run("stage 2 of the first", [(cell, clips[0], arm, rate) for arm in arms for rate in (rates_of(arm)[1:2] if args.quick else rates_of(arm))])
            best = {arm: choose(out, clips, arm)[0] for arm in arms}
            more = [(clip, arm) for k, clip in enumerate(clips[1:]) for arm in arms if best[arm] and (arm in KEY or k == 0)] + [(clip, "rf") for clip in full if best["rf"]]
            run("stage 1 of the others", stages(more))
            run("stage 2 of the others", [(cell, clip, arm, best[arm]) for clip, arm in more])
    write_curves(out)
    report({key: content for arm in ARMS for key, content in choose(out, [*clips, "full"], arm)[1].items()}, out)
    if failures:
        sys.exit(print(*(f"ablate.py: {failure}" for failure in failures), sep="\n", file=sys.stderr) or 1)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, OSError, UserError) as error:
        sys.exit(print(f"ablate.py: {error}", file=sys.stderr) or 2)
