"""MMVP-VLM, the paper's measure of fine-grained vision (Table 1), and zero-shot retention (Table 3), each with its noise.

    python eval_mmvp.py --preset toy --weights runs/toy-rf/clip.safetensors --baseline original --picture changed.png
    python eval_mmvp.py --benchmark MMVP_VLM --weights clip.safetensors --baseline original --zeroshot imagenet:val coco:coco

The protocol is that of the benchmark's own evaluate_vlm.py (github.com/tsb0601/MMVP), but for a pair's pattern, which is here
what its Type column says. "before" is the --baseline, "after" the model of --weights.
"""
import argparse
import csv
import json
import math
import os
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, SUN397, ImageFolder
from tqdm import tqdm

from genhancer import BACKBONES, find_backbone, load_clip
from vae import UserError

HEADER = ["Question ID", "Type", "Statement"]
MANY = 5_000  # images: larger sets are decoded by worker processes
CLASS_FOLDERS = "a folder of test images, one subfolder per class, named as the class (underscores for spaces)"
ZEROSHOT = {  # --zeroshot NAME:PATH, and what PATH must be; nothing is downloaded
    "cifar100": "the folder in which cifar-100-python.tar.gz was unpacked (it holds cifar-100-python/)",
    "sun397": "the folder in which SUN397.tar.gz was unpacked (it holds SUN397/)",
    "imagenet": "the validation images in exactly 1000 subfolders, n01440764 to n15075141",
    "cars": CLASS_FOLDERS,
    "folder": CLASS_FOLDERS,
    "flickr30k": "a folder with Karpathy's dataset_flickr30k.json and the images beside it",
    "coco": "a folder with Karpathy's dataset_coco.json and the images in val2014/ beside it",
}


# ------------------------------------------------------------------------------------------- images and texts to features

def read_image(path, where=""):
    """Decode to RGB, as open_clip's own preprocessing would; UserError if that fails, `where` in front."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # over broken files the decoders raise nearly anything
        raise UserError(f"{where}cannot decode the image {path}: replace it ({error})") from None


class ImageFiles(Dataset):
    """Item i is (image i, preprocessed (3, H, W); i)."""

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.preprocess(read_image(self.paths[i])), i


@contextmanager
def exact_float32():
    """No gradients, and float32 without TF32, whatever the caller has set: train.py and this command print the same digits."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    callers = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad():
            yield
    finally:
        for backend, precision in zip(backends, callers):
            backend.fp32_precision = precision


def encode_images(clip, dataset, batch_size):
    """Unit features (N, D) and labels (N,), on the clip's device, of a dataset of (image, label), in its order."""
    device, features, labels = clip.logit_scale.device, [], []
    loader = DataLoader(dataset, batch_size, num_workers=min(8, os.cpu_count() or 1) if len(dataset) > MANY else 0)
    for images, batch_labels in tqdm(loader, "images", leave=False, disable=None):
        features.append(clip.encode_image(images.to(device), normalize=True))
        labels.append(batch_labels)
        if not features[-1].isfinite().all():
            raise UserError("the CLIP's image features are not finite: its weights are broken, use an earlier checkpoint")
    return torch.cat(features), torch.cat(labels).to(device)


def encode_texts(clip, tokenizer, texts, batch_size):
    """Unit features (N, D) of N strings, on the clip's device."""
    batches = (texts[i:i + batch_size] for i in range(0, len(texts), batch_size))
    return torch.cat([clip.encode_text(tokenizer(batch).to(clip.logit_scale.device), normalize=True) for batch in batches])


# ------------------------------------------------------------------------------------------- MMVP-VLM

def check_benchmark(benchmark_dir):
    """Parse an MMVP-VLM folder and decode its every image: a second or two, no model needed.

    Returns the pairs in the file's order: {"ids": (odd, even), "type": str, "statements": (2 str), "images": (2 paths)}.
    UserError, with file and row (the line in the file), for whatever is not as the benchmark's authors lay it out.
    """
    path = Path(benchmark_dir, "Questions.csv")
    if not path.is_file():
        raise UserError(f"{path} not found: download MMVP/MMVP_VLM from Hugging Face and name its folder with --benchmark")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: with or without a byte order mark
            reader = csv.reader(file)
            rows = [(f"{path}, row {reader.line_num}", cells) for row in reader if any(cells := [cell.strip() for cell in row])]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from None
    if rows and rows[0][1] != HEADER:
        raise UserError(f"{rows[0][0]}: the header must be {','.join(HEADER)}, not {','.join(rows[0][1])}")
    if len(rows) < 2:
        raise UserError(f"{path} is empty: it must hold the header {','.join(HEADER)} and two rows per pair")
    return [read_pair(path.parent, *rows[i:i + 2]) for i in range(1, len(rows), 2)]


def read_pair(folder, *rows):
    """Two successive rows, each (where, cells) -> their pair; `where` is file and row, for the errors."""
    for where, cells in rows:
        if len(cells) != 3 or not all(cells) or not cells[0].isdecimal():
            raise UserError(f"{where}: must be a number, a Type and a statement (in quotes if it has a comma), not {','.join(cells)}")
    ids, types, statements = zip(*((int(cells[0]), *cells[1:]) for _, cells in rows))
    if len(rows) == 1:
        raise UserError(f"{where}: odd number of rows: the last one, id {ids[0]}, has no partner")
    if ids[0] % 2 == 0 or ids[1] != ids[0] + 1:
        raise UserError(f"{where}: the ids of a pair must be odd and the next even, not {ids[0]} and {ids[1]}")
    if types[0] != types[1]:
        raise UserError(f"{where}: the pair {ids[0]}, {ids[1]} has two Types, {types[0]} and {types[1]}")
    images = []
    for (where, _), number in zip(rows, ids):
        stem = folder / "MLLM_VLM Images" / types[0] / str(number)
        found = [f"{stem}{suffix}" for suffix in (".jpg", ".jpeg", ".png") if os.path.isfile(f"{stem}{suffix}")]
        if not found:
            raise UserError(f"{where}: image not found: {stem}.jpg (or .jpeg or .png)")
        read_image(found[0], f"{where}: ")
        images.append(found[0])
    return {"ids": ids, "type": types[0], "statements": statements, "images": tuple(images)}


@exact_float32()
def evaluate_mmvp(clip, preprocess, tokenizer, benchmark_dir, batch_size=64):
    """MMVP-VLM on the clip's device, in float32 (the clip is left in eval mode).

    Each statement chooses one of the pair's two images; a pair is right if the odd one chooses image 1 and the even one image 2.
    Returns {"average": percent, the mean over patterns; "patterns": {pattern: percent} in order of first appearance; "pairs":
    check_benchmark's, each with "scores": (2 floats), the softmax of image 1 for either statement, and "correct": bool}.
    """
    clip.eval()
    pairs = check_benchmark(benchmark_dir)
    texts = encode_texts(clip, tokenizer, ["a photo of " + text for pair in pairs for text in pair["statements"]], batch_size)
    images, _ = encode_images(clip, ImageFiles([path for pair in pairs for path in pair["images"]], preprocess), batch_size)
    texts, images = (features.view(len(pairs), 2, -1) for features in (texts, images))
    logits = clip.logit_scale.exp() * texts @ images.mT    # (pairs, 2 statements, 2 images); SigLIP's bias cancels in the softmax
    scores = logits.softmax(dim=-1)[..., 0].tolist()       # (pairs, 2 statements): of image 1
    for pair, (odd, even) in zip(pairs, scores):
        pair.update(scores=(odd, even), correct=odd > 0.5 and not even > 0.5)
    patterns = {name: float(100 * group.sum() / len(group)) for name, group in by_pattern(pairs).items()}
    return {"average": sum(patterns.values()) / len(patterns), "patterns": patterns, "pairs": pairs}


def by_pattern(pairs):
    """{pattern: (n,) array with 1.0 for each right pair and 0.0 for each wrong one}."""
    return {name: np.array([float(pair["correct"]) for pair in pairs if pair["type"] == name])
            for name in dict.fromkeys(pair["type"] for pair in pairs)}


# ------------------------------------------------------------------------------------------- zero-shot retention

def check_zeroshot(name, path, preprocess=None):
    """Find a set of ZEROSHOT on disk; no model needed. UserError, with what to put where, if it is not there.

    Returns (dataset of (image, label), class names, templates) or, for retrieval, (dataset, captions, each caption's image).
    """
    if name not in ZEROSHOT:
        raise UserError(f"--zeroshot {name}:{path}: unknown set {name}: choose from {', '.join(ZEROSHOT)}")
    try:
        return (open_captioned if name in ("flickr30k", "coco") else open_labelled)(name, path, preprocess)
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"--zeroshot {name}:{path}: {str(error).partition(chr(10))[0][:200]}: PATH must be {ZEROSHOT[name]}") from None


def open_labelled(name, path, preprocess):
    if name == "cifar100":
        dataset = CIFAR100(path, train=False, transform=preprocess)
    else:  # SUN397: torchvision knows no split, so all 108,754 images
        dataset = (SUN397 if name == "sun397" else ImageFolder)(path, transform=preprocess, loader=read_image)
    if not len(dataset):
        raise UserError("no images")
    if name != "imagenet":
        return dataset, [label.replace("_", " ").replace("/", " ") for label in dataset.classes], ["a photo of a {}."]
    if len(dataset.classes) != 1000 or not all(label[0] == "n" and label[1:].isdecimal() for label in dataset.classes):
        raise UserError(f"{len(dataset.classes)} class folders, {dataset.classes[0]} to {dataset.classes[-1]}")
    return dataset, open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES  # both in the order of the sorted wnids


def open_captioned(name, path, preprocess):
    with open(Path(path, f"dataset_{name}.json"), encoding="utf-8") as file:
        entries = [entry for entry in json.load(file)["images"] if entry["split"] == "test"]
    files = [str(Path(path, entry.get("filepath", ""), entry["filename"])) for entry in entries]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        raise UserError(f"{len(missing)} of {len(files)} test images missing" + (f", first {missing[0]}" if missing else ""))
    captions = [(sentence["raw"], i) for i, entry in enumerate(entries) for sentence in entry["sentences"][:5]]  # some have six
    return ImageFiles(files, preprocess), [text for text, _ in captions], torch.tensor([i for _, i in captions])


@exact_float32()
def evaluate_zeroshot(clip, preprocess, tokenizer, name, path, batch_size=64):
    """{metric: percent}: "NAME accuracy" (top 1), or "NAME image recall@5" and "NAME text recall@5" (leaves the clip in eval mode)."""
    clip.eval()
    dataset, texts, more = check_zeroshot(name, path, preprocess)
    if name in ("flickr30k", "coco"):
        captions, owner = encode_texts(clip, tokenizer, texts, batch_size), more.to(clip.logit_scale.device)
        images, index = encode_images(clip, dataset, batch_size)
        return {f"{name} image recall@5": 100 * recall(captions, images, owner, index),
                f"{name} text recall@5": 100 * recall(images, captions, index, owner)}
    classifier = open_clip.build_zero_shot_classifier(clip, tokenizer, texts, more, device=clip.logit_scale.device)  # (D, classes)
    images, labels = encode_images(clip, dataset, batch_size)
    return {f"{name} accuracy": 100 * ((images @ classifier).argmax(dim=1) == labels).float().mean().item()}


def recall(queries, gallery, query_owner, gallery_owner, k=5):
    """The share of queries (N, D) with an item of their own among the k nearest of the gallery (M, D); owners (N,), (M,)."""
    top = torch.cat([(part @ gallery.T).topk(min(k, len(gallery))).indices for part in queries.split(1024)])   # (N, k)
    return (gallery_owner[top] == query_owner[:, None]).any(dim=1).float().mean().item()


def evaluate(clip, preprocess, tokenizer, benchmark_dir, zeroshot=(), batch_size=64):
    """evaluate_mmvp's result, with "zeroshot": {metric: percent} of all (name, path) in `zeroshot`."""
    result = evaluate_mmvp(clip, preprocess, tokenizer, benchmark_dir, batch_size) | {"zeroshot": {}}
    for name, path in zeroshot:
        result["zeroshot"] |= evaluate_zeroshot(clip, preprocess, tokenizer, name, path, batch_size)
    return result


# ------------------------------------------------------------------------------------------- what is noise

def wilson(k, n, z=1.959964):
    """Wilson's 95 % score interval of a share, k of n: (low, high) in 0..1. wilson(0, n) = (0, z^2 / (n + z^2))."""
    centre, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def bootstrap(groups, resamples=10_000, seed=0):
    """95 % percentile interval (low, high) of the mean over groups of each group's mean, pairs redrawn within their group.

    groups: arrays, one per pattern, of a few distinct values: 0/1 for an accuracy, -1/0/1 for after - before. A group whose values are
    all equal adds no width, so give it several pairs per pattern.
    """
    rng, means = np.random.default_rng(seed), np.zeros(resamples)
    for group in groups:  # n draws with replacement = multinomial counts of the distinct values
        values, counts = np.unique(group, return_counts=True)
        means += rng.multinomial(len(group), counts / len(group), resamples) @ values / len(group) / len(groups)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(won, lost):
    """McNemar's exact two-sided p: that fair coins split won + lost pairs at least this unevenly. mcnemar(5, 0) = 1/16."""
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))  # integers until the division: no overflow


def summarize(results):
    """The table's rows, in percent: one per pattern, and the average last (its intervals are bootstrap's, the patterns' are wilson's).

    results: {any name: evaluate_mmvp's result}, or {"before": ..., "after": ...} on the same benchmark, to have them compared.
    """
    groups = {key: by_pattern(result["pairs"]) for key, result in results.items()}
    patterns, rows = list(next(iter(groups.values()))), []
    for label in [*patterns, "average"]:
        right = {key: [group[name] for name in (patterns if label == "average" else [label])] for key, group in groups.items()}
        row = {"pattern": label, "pairs": sum(map(len, next(iter(right.values()))))}
        for key, result in results.items():
            low, high = bootstrap(right[key]) if label == "average" else wilson(right[key][0].sum(), row["pairs"])
            row[key] = {"accuracy": (result | result["patterns"])[label], "interval": (100 * low, 100 * high)}
        if "before" in results:
            changes = [new - old for old, new in zip(right["before"], right["after"])]
            won, lost = (int(sum((change == sign).sum() for change in changes)) for sign in (1, -1))
            row |= {"change": row["after"]["accuracy"] - row["before"]["accuracy"], "won": won, "lost": lost, "p": mcnemar(won, lost)}
            if label == "average":
                row["change_interval"] = tuple(100 * bound for bound in bootstrap(changes))
        rows.append(row)
    return rows


def print_table(before, after=None):
    """Print evaluate's (or evaluate_mmvp's) result, or two of them side by side: MMVP-VLM with its noise, then zero-shot."""
    results = {"before": before, "after": after} if after else {"accuracy": before}
    rows, tasks = summarize(results), before.get("zeroshot", {})
    width = max(map(len, ["MMVP-VLM pattern", *(row["pattern"] for row in rows), *tasks]))
    print(f"\n{'MMVP-VLM pattern':{width}} pairs" + "".join(f"  {key:>11} [95 %]   " for key in results)
          + (f"  {'change':>11} [95 %]     won  lost  McNemar p" if after else ""))
    for row in rows:
        line = f"{row['pattern']:{width}} {row['pairs']:5}"
        line += "".join("  {:5.1f} [{:5.1f}, {:5.1f}]".format(row[key]["accuracy"], *row[key]["interval"]) for key in results)
        if after:
            interval = "[{:+5.1f}, {:+5.1f}]".format(*row["change_interval"]) if "change_interval" in row else ""
            line += f"  {row['change']:+6.1f} {interval:14} {row['won']:5} {row['lost']:5}  {row['p']:9.2g}"
        print(line)
    worth = sorted({round(100 / row["pairs"] / (len(rows) - 1), 2) for row in rows[:-1]})
    print(f"One pair is worth {' to '.join(f'{share:.2f}' for share in worth[:1] + worth[1:][-1:])} % of the average. " + (
        "A change whose interval holds 0, or whose p exceeds 0.05, may be noise.\n"
        "Each pattern is one more chance of a small p by luck: go by the average first." if after else
        "To tell another model from noise, compare the two by --baseline."))
    if tasks:
        print(f"\n{'zero-shot':{width}}" + "".join(f"{title:>9}" for title in (["before", "after", "change"] if after else ["percent"])))
    for name, value in tasks.items():
        new = after["zeroshot"][name] if after else value
        print(f"{name:{width}}{value:9.1f}" + (f"{new:9.1f}{new - value:+9.1f}" if after else ""))


# ------------------------------------------------------------------------------------------- files

def save(path, write):
    """Call write(temporary name) and move the file into place."""
    write(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def write_csv(path, results):
    """One line per pair, with the scores and verdicts of each result in {"before": ..., "after": ...}."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["pattern", "id_1", "id_2", "statement_1", "statement_2"]
                        + [f"{key}_{column}" for key in results for column in ("score_1", "score_2", "correct")])
        for pairs in zip(*(result["pairs"] for result in results.values())):
            verdicts = [cell for pair in pairs for cell in (*pair["scores"], int(pair["correct"]))]
            writer.writerow([pairs[0]["type"], *pairs[0]["ids"], *pairs[0]["statements"], *verdicts])


def draw_changes(path, before, after, limit=24, side=200):
    """A sheet (PNG) of the pairs whose verdict changed, in the manner of the paper's Fig. 10: won ones first (green), then lost (red).

    Of more than `limit`, won and lost are shown in their proportion, evenly spaced over the benchmark. `side` is an image's, in pixels.
    """
    changed = [(old, new) for old, new in zip(before["pairs"], after["pairs"]) if old["correct"] != new["correct"]]
    won, lost = ([pair for pair in changed if pair[1]["correct"] == sign] for sign in (True, False))
    room = round(limit * len(lost) / max(limit, len(changed)))                                 # for the lost ones
    shown = ((won, min(len(won), limit - room)), (lost, room))
    cards = [group[i * len(group) // count] for group, count in shown for i in range(count)]
    title = f"{len(won)} pairs won (green frame), {len(lost)} lost (red), of {len(before['pairs'])}"
    columns, width, height = max(2, min(4, len(cards))), 2 * side + 40, side + 220
    sheet = Image.new("RGB", (columns * width + 20, 80 + height * math.ceil(len(cards) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((20, 12), title, "black", ImageFont.load_default(28))
    draw.text((20, 50), f"{len(cards)} shown. A tick: the statement chose its own image of the two.", "black", ImageFont.load_default(17))
    for i, (old, new) in enumerate(cards):
        sheet.paste(draw_card(old, new, width - 10, height - 10, side), (15 + i % columns * width, 80 + i // columns * height))
    sheet.save(path, "PNG")


def draw_card(old, new, width, height, side):
    """One changed pair: its images, and for either statement whether each model matched it to its own image."""
    colour = {True: "#15803d", False: "#dc2626"}                                               # green: right, red: wrong
    card, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(16)
    draw, before_x, after_x = ImageDraw.Draw(card), width - 105, width - 40                    # the centres of the two columns of marks
    draw.rectangle((0, 0, width - 1, height - 1), outline=colour[new["correct"]], width=4)
    draw.text((12, 9), f"{old['type']}, {old['ids'][0]} and {old['ids'][1]}", "black", font)
    for i, file in enumerate(old["images"]):
        image = read_image(file)
        scale = side / max(image.size)
        scale, method = (int(scale), Image.NEAREST) if scale >= 2 else (scale, Image.LANCZOS)  # small ones: whole pixels, enlarged
        image = image.resize([max(1, round(length * scale)) for length in image.size], method)
        card.paste(image, (10 + i * (side + 10) + (side - image.width) // 2, 36 + (side - image.height) // 2))
    for x, word in ((before_x, "before"), (after_x, "after")):
        draw.text((x, side + 54), word, "black", font, anchor="mm")
    for i, statement in enumerate(old["statements"]):
        y, text = side + 102 + 68 * i, textwrap.fill(f"{i + 1}. {statement}", 32, max_lines=3, placeholder=" ...")
        draw.text((12, y), text, "black", ImageFont.load_default(18), anchor="lm")
        for x, pair in ((before_x, old), (after_x, new)):
            right = (pair["scores"][i] > 0.5) == (i == 0)
            strokes = [(-11, 0, -3, 9), (-3, 9, 12, -10)] if right else [(-9, -9, 9, 9), (-9, 9, 9, -9)]  # a tick, or a cross
            for x1, y1, x2, y2 in strokes:
                draw.line((x + x1, y + y1, x + x2, y + y2), colour[right], 5)
    return card


# ------------------------------------------------------------------------------------------- the command

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["paper", "toy"], default="paper", help="toy: CLIP, benchmark and zero-shot task of toy/")
    parser.add_argument("--backbone", help=f"{', '.join(BACKBONES)}, or open_clip's MODEL:TAG (default: the preset's)")
    parser.add_argument("--weights", metavar="FILE", help="the CLIP to evaluate (default: the backbone's original)")
    parser.add_argument("--baseline", metavar="FILE|original", help="the CLIP to compare it with")
    parser.add_argument("--benchmark", metavar="DIR", help="MMVP_VLM's folder, or one of its layout")
    parser.add_argument("--zeroshot", metavar="NAME:PATH", nargs="+", help="; ".join(f"{k}: {v}" for k, v in ZEROSHOT.items()))
    parser.add_argument("--csv", metavar="FILE", help="write every pair's scores")
    parser.add_argument("--json", metavar="FILE", help="write the summary")
    parser.add_argument("--picture", metavar="FILE", help="draw the pairs whose verdict changed (PNG; needs --baseline)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def check_arguments(args):
    """Fill in the preset, and find every mistake that can be found before a model is loaded."""
    for path in filter(None, (args.csv, args.json, args.picture)):
        if not os.path.isdir(os.path.dirname(path) or ".") or os.path.isdir(path):
            raise UserError(f"{path} cannot be written: make its folder first, and name a file in it")
    if args.baseline == "original" and not args.weights:
        raise UserError("--baseline original: name the CLIP to compare with it by --weights FILE")
    if args.picture and not args.baseline:
        raise UserError("--picture shows the pairs whose verdict changed: name what to compare with by --baseline FILE|original")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).partition(chr(10))[0]}") from None
    args.backbone = args.backbone or {"paper": "openai-l14-224", "toy": "toy"}[args.preset]
    args.files = {"before": args.baseline, "after": args.weights} if args.baseline else {"after": args.weights}
    args.files = {key: None if file == "original" else file for key, file in args.files.items()}  # None: the backbone's own
    for file in args.files.values():
        find_backbone(args.backbone, file)
    args.zeroshot = [tuple(entry.partition(":")[::2]) for entry in args.zeroshot or ()]
    if len(dict(args.zeroshot)) < len(args.zeroshot):
        raise UserError("--zeroshot: each NAME can be given once")
    if args.preset == "toy":
        from toy.make_toy import draw_world
        world = Path(__file__).resolve().parent / "toy" / "data"
        draw_world(world)  # on first use only
        args.benchmark, args.zeroshot = args.benchmark or world / "mmvp", args.zeroshot or [("folder", world / "zeroshot")]
    if not args.benchmark:
        raise UserError("no benchmark: download MMVP/MMVP_VLM from Hugging Face and name its folder with --benchmark")
    check_benchmark(args.benchmark)
    for name, path in args.zeroshot:
        check_zeroshot(name, path)


def run(args):
    check_arguments(args)
    models = {key: load_clip(args.backbone, file) for key, file in args.files.items()}  # all of them first: a file may not fit
    results = {key: evaluate(clip.to(args.device), preprocess, tokenizer, args.benchmark, args.zeroshot, args.batch_size)
               for key, (clip, preprocess, tokenizer) in models.items()}
    print_table(*results.values())
    if args.csv:
        save(args.csv, lambda file: write_csv(file, results))
    if args.json:
        summary = {key: {k: result[k] for k in ("average", "patterns", "zeroshot")} for key, result in results.items()}
        summary["rows"] = summarize(results)
        save(args.json, lambda file: Path(file).write_text(json.dumps(summary, indent=1)))
    if args.picture:
        save(args.picture, lambda file: draw_changes(file, *results.values()))


def main(argv=None):
    try:
        run(parse_arguments(argv))
    except UserError as error:
        print(f"eval_mmvp.py: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)  # from a worker process it is a whole traceback
        sys.exit(2)


if __name__ == "__main__":
    main()
