"""MMVP-VLM, the paper's measure of fine vision (Table 1), and zero-shot retention (Table 3).

    python eval_mmvp.py --preset toy --weights runs/toy-rf/clip.safetensors --baseline original
    python eval_mmvp.py --weights clip.safetensors --baseline original --benchmark MMVP_VLM \\
        --zeroshot imagenet:DIR cifar100:DIR --json result.json --picture changed.png

Every number comes with its noise. "before" is the --baseline, "after" is the model of --weights.
The protocol is that of the benchmark's own evaluate_vlm.py (github.com/tsb0601/MMVP) but for one
point: a pair's pattern is here what its Type column says, and there it follows from the row number.
"""
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: a busy machine stays fast

import csv
import json
import math
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections import namedtuple
from contextlib import contextmanager
from functools import partial

import numpy as np
import open_clip
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, SUN397, ImageFolder
from tqdm import tqdm

from genhancer import (
    BACKBONES,
    TOY,
    Parser,
    UserError,
    check_writable,
    escape,
    find_backbone,
    load_clip,
    run_command,
    write_file,
    write_json,
)

# ---- MMVP-VLM ------------------------------------------------------------------------------------


def evaluate_mmvp(clip, preprocess, tokenizer, benchmark_dir, batch_size=64):
    """MMVP-VLM on the clip's device, in float32; leaves the clip in eval mode.

    Each statement chooses one of its pair's two images. A pair is right if both of its statements
    choose as they should (see is_right). Returns a dict:
    - "average": the mean over the patterns, in percent;
    - "patterns": {pattern: percent of its pairs that are right}, in order of first appearance;
    - "pairs": read_benchmark's, each with "scores", each statement's probability of the first
      image, and "correct".
    """
    clip.eval()
    pairs = read_benchmark(benchmark_dir)
    texts = []
    files = []
    for pair in pairs:
        texts += ["a photo of " + statement for statement in pair["statements"]]
        files += pair["images"]
    with exact_float32():
        texts = encode_texts(clip, tokenizer, texts, batch_size)
        images, _ = encode_images(clip, ImageFiles(files, preprocess), batch_size)
        texts = texts.view(len(pairs), 2, -1)                  # (pairs, 2 statements, D)
        images = images.view(len(pairs), 2, -1)                # (pairs, 2 images, D)
        logits = clip.logit_scale.exp() * texts @ images.mT    # (pairs, 2 statements, 2 images)
        scores = check_finite(logits.softmax(dim=-1)[..., 0])  # SigLIP's bias would cancel here
    for pair, of_pair in zip(pairs, scores.tolist(), strict=True):
        pair["scores"] = tuple(of_pair)
        pair["correct"] = is_right(pair, 0) and is_right(pair, 1)
    patterns = {name: percent([right]) for name, right in by_pattern(pairs).items()}
    average = sum(patterns.values()) / len(patterns)
    return {"average": average, "patterns": patterns, "pairs": pairs}


def is_right(pair, i):
    """Whether statement i chose as it should: the first image if its id is odd, else the second."""
    return (pair["scores"][i] > 0.5) == (pair["ids"][i] % 2 == 1)


def by_pattern(pairs):
    """{pattern: (n,) array, 1.0 for each pair that is right and 0.0 for each that is wrong}."""
    groups = {}
    for pair in pairs:
        groups.setdefault(pair["type"], []).append(float(pair["correct"]))
    return {name: np.array(right) for name, right in groups.items()}


def check_benchmark(benchmark_dir):
    """Read a benchmark and decode all of its images: a second or two, no model needed.

    Raises UserError, with file and row, for whatever is not as the benchmark's authors lay it out.
    Says on stderr, in one line, if there are pairs in another order than the published one.
    """
    pairs = read_benchmark(benchmark_dir)
    path = os.path.join(benchmark_dir, "Questions.csv")
    for pair in pairs:
        for row, file in zip(pair["rows"], pair["images"], strict=True):
            read_image(file, f"{path}, row {row}: ")
    unusual = [pair["rows"][0] for pair in pairs if not pair["usual"]]
    if unusual:
        print(f"warning: {escape(path)}: {len(unusual)} of {len(pairs)} pairs, the first in row "
              f"{unusual[0]}, are not an odd id and the next one of the same Type: they are judged "
              "as the benchmark's own script does, by the images in the first Type's folder, of "
              "which an odd id's statement must choose the first", file=sys.stderr)


def read_benchmark(benchmark_dir):
    """The pairs of an MMVP-VLM folder, in the order of its Questions.csv, two rows each.

    Returns dicts: "ids" (2 integers), "type" (the first row's), "statements" (2 strings), "images"
    (2 paths, both in the first Type's folder), "rows" (2 line numbers), and "usual" (are_usual).
    Raises UserError with file and row.
    """
    path = os.path.join(benchmark_dir, "Questions.csv")
    rows = read_rows(path)
    if len(rows) % 2:
        couples = zip(rows[::2], rows[1::2], strict=False)
        lone = [first for first, second in couples if not are_usual(first, second)] + rows[-1:]
        raise UserError(f"{path}, row {lone[0].line}: odd number of rows: id {lone[0].id} has no "
                        "partner")
    pairs = {}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        key = (first.type, frozenset((first.id, second.id)))
        if key in pairs:
            raise UserError(f"{path}, row {first.line}: the pair {first.id}, {second.id} is listed "
                            f"twice, first in row {pairs[key]['rows'][0]}")
        pairs[key] = {
            "ids": (first.id, second.id),
            "type": first.type,
            "statements": (first.statement, second.statement),
            "images": (
                find_image(benchmark_dir, first.type, first.id, f"{path}, row {first.line}"),
                find_image(benchmark_dir, first.type, second.id, f"{path}, row {second.line}"),
            ),
            "rows": (first.line, second.line),
            "usual": are_usual(first, second),
        }
    return list(pairs.values())


def are_usual(first, second):
    """Whether two rows are a pair as published: an odd id and the next one, of the same Type."""
    return first.id % 2 == 1 and second.id == first.id + 1 and second.type == first.type


Row = namedtuple("Row", "line id type statement")


def read_rows(path):
    """The Rows of a Questions.csv below its header; `line` is the line's number in the file."""
    if not os.path.isfile(path):
        raise UserError(f"{path} not found: download MMVP/MMVP_VLM from Hugging Face and name its "
                        "folder with --benchmark")
    lines = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # with or without a mark
            reader = csv.reader(file)
            for cells in reader:
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    lines.append((reader.line_num, cells))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a CSV file in UTF-8 ({reason(error)}): "
                        "download it again") from None
    if len(lines) < 2:
        raise UserError(f"{path} is empty: it must hold a header (Question ID,Type,Statement) and "
                        "two rows for each pair")
    if lines[0][1][0].isdecimal():
        raise UserError(f"{path}, row {lines[0][0]}: the header is missing "
                        "(Question ID,Type,Statement)")
    rows = []
    for row, cells in lines[1:]:
        if len(cells) != 3 or not all(cells) or not cells[0].isdecimal() or len(cells[0]) > 18:
            raise UserError(f"{path}, row {row}: must be a number, a Type and a statement (in "
                            f"quotes if it has a comma), not {','.join(cells)[:200]}")
        rows.append(Row(row, int(cells[0]), cells[1], cells[2]))
    return rows


def find_image(benchmark_dir, pattern, number, where):
    """The path of an image of the benchmark; `where` stands in front of a UserError."""
    images = os.path.join(benchmark_dir, "MLLM_VLM Images")
    stem = os.path.join(images, pattern, str(number))
    if not os.path.abspath(stem).startswith(os.path.join(os.path.abspath(images), "")):
        raise UserError(f"{where}: the Type {pattern[:200]} leads out of {images}: it must name a "
                        "folder in there")
    for suffix in (".jpg", ".jpeg", ".png"):
        if os.path.isfile(stem + suffix):
            return stem + suffix
    raise UserError(f"{where}: image not found: {stem[:500]}.jpg (or .jpeg or .png)")


# ---- Images and texts to features ----------------------------------------------------------------

MANY = 5_000  # images: larger sets are decoded by worker processes


@contextmanager
def exact_float32():
    """No gradients, and no TF32 whatever the caller has set: all programs print the same digits."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    callers = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad():
            yield
    finally:
        for backend, precision in zip(backends, callers, strict=True):
            backend.fp32_precision = precision


class ImageFiles(Dataset):
    """Item i is (image i, preprocessed (3, H, W); i)."""

    def __init__(self, paths, preprocess):
        self.paths = paths
        self.preprocess = preprocess

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.preprocess(read_image(self.paths[i])), i


IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # SHIM


def read_image(path, where=""):
    """Decode to RGB as open_clip's own preprocessing does; `where` stands in front of an error."""
    if not os.path.isfile(path):  # a named pipe would hang
        raise UserError(f"{where}the image {path} is not a file: replace it")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # over broken files the decoders raise nearly anything
        message = f"{where}cannot decode the image {path} ({reason(error)}): replace it"
        raise UserError(message) from None


def encode_images(clip, dataset, batch_size):
    """A dataset of (image, label): unit features (N, D) and labels (N,), on the clip's device."""
    device = clip.logit_scale.device
    workers = min(8, os.cpu_count() or 1) if len(dataset) > MANY else 0
    loader = DataLoader(dataset, batch_size, num_workers=workers)
    features = []
    labels = []
    try:
        for images, batch_labels in tqdm(loader, "images", leave=False, disable=None):
            encoded = clip.encode_image(images.to(device), normalize=True)
            features.append(check_finite(encoded))
            labels.append(batch_labels)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that decodes images died ({reason(error)}): this machine may "
                        "be short of memory or of /dev/shm") from None
    return torch.cat(features), torch.cat(labels).to(device)


def encode_texts(clip, tokenizer, texts, batch_size):
    """Unit features (N, D) of N strings, on the clip's device."""
    device = clip.logit_scale.device
    features = []
    for i in range(0, len(texts), batch_size):
        tokens = tokenizer(texts[i : i + batch_size]).to(device)
        features.append(check_finite(clip.encode_text(tokens, normalize=True)))
    return torch.cat(features)


def check_finite(x):
    if not x.isfinite().all():
        raise UserError("the CLIP's features are not finite: its weights are broken, use others")
    return x


def reason(error):
    """An error in one line."""
    return str(error).partition("\n")[0][:200] or type(error).__name__


# ---- What is noise -------------------------------------------------------------------------------


def summarize(results):
    """The table's rows, in percent: each pattern, the average, then each zero-shot metric.

    results: {any name: evaluate's result}, or {"before": ..., "after": ...} to compare the two.
    A row is what make_row returns. Patterns and accuracies have Wilson's interval and McNemar's p.
    The average's pairs are redrawn within their patterns; a recall's images, of which each brings
    all of its queries, are redrawn too, since queries of one image are not independent.
    """
    patterns = {key: by_pattern(result["pairs"]) for key, result in results.items()}
    outcomes = {key: result.get("outcomes", {}) for key, result in results.items()}
    some = next(iter(results))
    rows = []
    for name in patterns[some]:
        rows.append(make_row(name, {key: [groups[name]] for key, groups in patterns.items()}))
    groups = {key: list(groups.values()) for key, groups in patterns.items()}
    rows.append(make_row("average", groups, resample=True))
    for name in outcomes[some]:
        groups = {key: [of_metric[name]] for key, of_metric in outcomes.items()}
        recall = not name.endswith("accuracy")
        rows.append(make_row(name, groups, resample=recall, count_changes=not recall))
    return rows


def make_row(name, groups, resample=False, count_changes=True):
    """One row of the table, in percent, with its 95 % intervals.

    groups: {"before"/"after"/any name: arrays, whose means are averaged}. resample: the intervals
    are bootstrap's, else wilson's, for one array of 0 and 1. count_changes: where all values are
    0 or 1, the row says how many were won and lost, and McNemar's p.
    """
    row = {"name": name}
    for key, arrays in groups.items():
        row["count"] = sum(len(values) for values in arrays)
        interval = bootstrap(arrays) if resample else wilson(arrays[0].sum(), row["count"])
        row[key] = {"percent": percent(arrays), "interval": [100 * bound for bound in interval]}
    if "before" not in groups:
        return row
    changes = [new - old for old, new in zip(groups["before"], groups["after"], strict=True)]
    row["change"] = row["after"]["percent"] - row["before"]["percent"]
    if resample:
        row["change_interval"] = [100 * bound for bound in bootstrap(changes)]
    if count_changes:
        row["won"] = sum(int((change > 0).sum()) for change in changes)
        row["lost"] = sum(int((change < 0).sum()) for change in changes)
        row["p"] = mcnemar(row["won"], row["lost"])
    return row


def percent(arrays):
    """The mean over arrays of each array's mean, in percent."""
    means = [float(100 * values.sum() / len(values)) for values in arrays]
    return sum(means) / len(means)


def wilson(k, n, z=1.959964):
    """Wilson's 95 % score interval of a share, k of n: (low, high) in 0..1.

    wilson(0, n) = (0, z^2 / (n + z^2)).
    """
    centre = k + z * z / 2
    spread = z * math.sqrt(k * (n - k) / n + z * z / 4)
    low = (centre - spread) / (n + z * z)
    high = (centre + spread) / (n + z * z)
    return max(0.0, low), min(1.0, high)


def bootstrap(arrays, resamples=10_000, seed=0):
    """95 % percentile interval (low, high) of the mean over arrays of each array's mean.

    The values of each array are redrawn within it. They must be few distinct ones: 0 and 1 for an
    accuracy; -1, 0 and 1 for after - before. An array whose values are all equal adds no width.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for array in arrays:
        # To draw n values with replacement is to draw how often each distinct value comes up.
        values, counts = np.unique(array, return_counts=True)
        drawn = rng.multinomial(len(array), counts / len(array), resamples)
        means += drawn @ values / len(array) / len(arrays)
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 12) + 0.0, round(float(high), 12) + 0.0  # what sums to 0 is 0, not -0


def mcnemar(won, lost):
    """McNemar's exact two-sided p: that fair coins split won + lost at least this unevenly.

    mcnemar(5, 0) = 1/16.
    """
    n = won + lost
    tail = 0
    ways = 1  # to choose i of n
    for i in range(min(won, lost) + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)  # integers until the division: no overflow


# ---- Zero-shot retention -------------------------------------------------------------------------

CLASS_FOLDERS = "a folder with one subfolder per class, named as the class (underscores for spaces)"
ZEROSHOT = {  # --zeroshot NAME:PATH, and what PATH must be; nothing is downloaded
    "cifar100": "the folder in which cifar-100-python.tar.gz was unpacked",
    "sun397": "the folder in which SUN397.tar.gz was unpacked",
    "imagenet": "the validation images in exactly 1000 subfolders, n01440764 to n15075141",
    "cars": CLASS_FOLDERS,
    "folder": CLASS_FOLDERS,
    "flickr30k": "a folder with Karpathy's dataset_flickr30k.json and the images beside it",
    "coco": "a folder with Karpathy's dataset_coco.json and the images in val2014/ beside it",
}
CAPTIONED = ("flickr30k", "coco")  # retrieval; the others are classifications


def evaluate(clip, preprocess, tokenizer, benchmark_dir, zeroshot=(), batch_size=64):
    """evaluate_mmvp's result, with that of every (name, path) in `zeroshot`.

    Adds "zeroshot": {metric: percent}, and "outcomes": {metric: evaluate_zeroshot's array}.
    """
    result = evaluate_mmvp(clip, preprocess, tokenizer, benchmark_dir, batch_size)
    result["outcomes"] = {}
    for name, path in zeroshot:
        outcomes = evaluate_zeroshot(clip, preprocess, tokenizer, name, path, batch_size)
        result["outcomes"].update(outcomes)
    result["zeroshot"] = {metric: percent([of]) for metric, of in result["outcomes"].items()}
    return result


def summary(result):
    """What of evaluate's result is written to files: all of it in percent, nothing by image."""
    return {key: result[key] for key in ("average", "patterns", "zeroshot")}


def evaluate_zeroshot(clip, preprocess, tokenizer, name, path, batch_size=64):
    """{metric: (images,) array}, whose mean is the metric; leaves the clip in eval mode.

    "NAME accuracy" (top 1): 1.0 for an image whose class is right. "NAME image recall@5" and "NAME
    text recall@5": an image's share of queries that find one of their own among the first five.
    """
    clip.eval()
    measure = retrieve if name in CAPTIONED else classify
    dataset, texts, more = check_zeroshot(name, path, preprocess)
    with exact_float32():
        outcomes = measure(clip, tokenizer, dataset, texts, more, batch_size)
    return {f"{name} {metric}": values for metric, values in outcomes.items()}


def classify(clip, tokenizer, dataset, names, templates, batch_size):
    device = clip.logit_scale.device
    build = open_clip.build_zero_shot_classifier
    classifier = build(clip, tokenizer, names, templates, device=device)      # (D, classes)
    images, labels = encode_images(clip, dataset, batch_size)                 # (images, D)
    chosen = check_finite(images @ classifier).argmax(dim=1)
    return {"accuracy": (chosen == labels).cpu().numpy().astype(float)}


def retrieve(clip, tokenizer, dataset, texts, owners, batch_size):
    owner = torch.tensor(owners, device=clip.logit_scale.device)              # (captions,)
    captions = encode_texts(clip, tokenizer, texts, batch_size)               # (captions, D)
    images, index = encode_images(clip, dataset, batch_size)                  # (images, D)
    image_found = finds_own(captions, images, owner, index).cpu().numpy()     # (captions,)
    text_found = finds_own(images, captions, index, owner).cpu().numpy()      # (images,)
    of_image = np.bincount(owners, weights=image_found)                       # (images,)
    captions_per_image = len(captions) / len(images)
    return {
        "image recall@5": of_image / captions_per_image,
        "text recall@5": text_found.astype(float),
    }


def finds_own(queries, gallery, query_owner, gallery_owner, k=5):
    """Which queries (N, D) have an item of their own owner among the k nearest of the gallery.

    gallery: (M, D). Owners: (N,) and (M,) integers. Returns (N,) booleans.
    """
    k = min(k, len(gallery))
    nearest = [(part @ gallery.T).topk(k).indices for part in queries.split(1024)]
    owners = gallery_owner[torch.cat(nearest)]                                # (N, k)
    return (owners == query_owner[:, None]).any(dim=1)


def check_zeroshot(name, path, preprocess=None):
    """Find a set of ZEROSHOT on disk; no model needed, no image decoded.

    Returns (dataset of (image, label), class names, templates) or, for retrieval, (dataset,
    captions, the index of each caption's image). Raises UserError with what to put where.
    """
    if name not in ZEROSHOT:
        raise UserError(f"--zeroshot {name}:{path}: unknown set {name}: choose from "
                        f"{', '.join(ZEROSHOT)}")
    if not path:
        raise UserError(f"--zeroshot {name}: write {name}:PATH, where PATH is {ZEROSHOT[name]}")
    open_set = open_captioned if name in CAPTIONED else open_labelled
    try:
        dataset, texts, more = open_set(name, path, preprocess)
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{text!r} is no class name or caption")
            text.encode()  # raises ValueError where a name is broken off within a character
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, UserError) as error:
        message = f"--zeroshot {name}:{path}: {reason(error)}: PATH must be {ZEROSHOT[name]}"
        raise UserError(message) from None
    return dataset, texts, more


def open_labelled(name, path, preprocess):
    if name == "cifar100":
        dataset = CIFAR100(path, train=False, transform=preprocess)
    elif name == "sun397":  # torchvision knows no split: all 108,754 images
        dataset = SUN397(path, transform=preprocess, loader=read_image)
    else:
        dataset = ImageFolder(path, transform=preprocess, loader=read_image)
    if len(dataset) == 0:
        raise UserError("no images")
    names = dataset.classes
    if len(names) == 1:
        raise UserError(f"{names[0]} is the only class")
    if name == "imagenet":
        wordnet = [label for label in names if label[0] == "n" and label[1:].isdecimal()]
        if len(names) != 1000 or wordnet != names:
            raise UserError(f"{len(names)} class folders, {names[0]} to {names[-1]}")
        # Both of these are in the order of the sorted WordNet ids.
        return dataset, open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    names = [label.replace("_", " ").replace("/", " ") for label in names]
    return dataset, names, ["a photo of a {}."]


def open_captioned(name, path, preprocess):
    annotations = os.path.join(path, f"dataset_{name}.json")
    if not os.path.isfile(annotations):
        raise UserError(f"{annotations} not found")
    with open(annotations, encoding="utf-8") as file:
        entries = [entry for entry in json.load(file)["images"] if entry["split"] == "test"]
    if not entries:
        raise UserError("no test images")
    files, captions, owners = [], [], []
    for i, entry in enumerate(entries):
        files.append(os.path.join(path, entry.get("filepath", ""), entry["filename"]))
        own = [sentence["raw"] for sentence in entry["sentences"][:5]]  # some images have six
        if not own:
            raise UserError(f"{files[-1]} has no captions")
        captions += own
        owners += [i] * len(own)
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} test images missing, first {missing[0]}")
    return ImageFiles(files, preprocess), captions, owners


# ---- The table and the picture -------------------------------------------------------------------


def print_table(before, after=None):
    """Print evaluate's result, or two of them side by side, in 100 columns; see summarize."""
    results = {"before": before, "after": after} if after else {"percent": before}
    rows = summarize(results)
    average = len(before["patterns"])  # its row's number
    names = [escape(row["name"]) for row in rows]
    names = [name if len(name) <= 33 else f"{name[:31]}.." for name in names]
    width = max(len(name) for name in [*names, "MMVP-VLM pattern"])
    titles = "".join(f" {key + ' [95 %]':17}" for key in results)
    if after:
        titles += " change  won lost     p"
    print(f"\n{'MMVP-VLM pattern':{width}} pairs{titles}".rstrip())
    for i, row in enumerate(rows):
        print(f"{names[i]:{width}} {row['count']:5}{format_row(row, results)}".rstrip())
        if i == average and i + 1 < len(rows):
            print(f"\n{'zero-shot':{width}} images")
    print(f"\n{explain(rows[:average + 1])}")


def format_row(row, results):
    """A row's cells to the right of its name and count."""
    line = ""
    for key in results:
        low, high = row[key]["interval"]
        interval = f"[{low:4.1f}-{high:4.1f}]".replace("100.0", "100")
        line += f" {row[key]['percent']:5.1f} {interval:11}"
    if "change" in row:
        line += f"{row['change']:+7.1f}"
    if "p" in row:
        p = f"{row['p']:.3f}" if row["p"] >= 0.001 else f"{row['p']:.0e}"
        line += f" {row['won']:4} {row['lost']:4} {p:>5}"
    elif "change_interval" in row:
        low, high = row["change_interval"]
        line += f" [{low:+.1f}, {high:+.1f}]"
    return line


def explain(rows):
    """What the table says. rows: the patterns' and the average's."""
    *patterns, average = rows
    worth = sorted(100 / row["count"] / len(patterns) for row in patterns)
    shares = sorted({f"{worth[0]:.2f}", f"{worth[-1]:.2f}"}, key=float)
    share = f"One pair is worth {' to '.join(shares)} % of the average."
    if "change" not in average:
        return f"{share}\nTo tell another model from noise, compare the two by --baseline."
    low, high = average["change_interval"]
    return (
        f"The average changed by {average['change']:+.1f} [{low:+.1f}, {high:+.1f}]. {share}\n"
        "A change may be noise if its interval holds 0 or its p (McNemar's) is above 0.05.\n"
        "Each pattern is one more chance of a small p by luck: go by the average first."
    )


GREEN = "#15803d"
RED = "#dc2626"
SIDE = 200                  # of an image on the picture, in pixels
CARD = (2 * SIDE + 30, SIDE + 210)


def draw_changes(path, before, after, limit=24):
    """A sheet (PNG) of pairs whose verdict changed, in the manner of the paper's Fig. 10.

    Those won come first, framed in green, then those lost, in red. Of more than `limit` pairs, won
    and lost ones are shown in their proportion, evenly spaced over the benchmark.
    """
    both = list(zip(before["pairs"], after["pairs"], strict=True))
    won = [(old, new) for old, new in both if new["correct"] and not old["correct"]]
    lost = [(old, new) for old, new in both if old["correct"] and not new["correct"]]
    room = round(limit * len(lost) / max(limit, len(won) + len(lost)))
    cards = spread(won, limit - room) + spread(lost, room)

    columns = max(2, min(4, len(cards)))
    width, height = CARD[0] + 10, CARD[1] + 10
    rows = math.ceil(len(cards) / columns)
    sheet = Image.new("RGB", (columns * width + 20, 80 + rows * height), "white")
    title = f"{len(won)} pairs won (green frame), {len(lost)} lost (red), "
    title += f"of {len(before['pairs'])}"
    note = f"{len(cards)} shown. A tick: the statement chose the right image of the two."
    draw = ImageDraw.Draw(sheet)
    draw.text((20, 12), title, "black", ImageFont.load_default(28))
    draw.text((20, 50), note, "black", ImageFont.load_default(17))
    for i, (old, new) in enumerate(cards):
        corner = (15 + i % columns * width, 80 + i // columns * height)
        sheet.paste(draw_card(old, new), corner)
    write_file(path, partial(sheet.save, format="PNG"))


def spread(items, most):
    """All items, or `most` of them, evenly spaced."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def draw_card(old, new):
    """One changed pair: its two images, and how each model judged either statement."""
    width, height = CARD
    before_x, after_x = width - 105, width - 40  # the middle of the two columns of marks
    card = Image.new("RGB", CARD, "white")
    draw = ImageDraw.Draw(card)
    small = ImageFont.load_default(16)
    frame = GREEN if new["correct"] else RED
    draw.rectangle((0, 0, width - 1, height - 1), outline=frame, width=4)
    title = f"{old['type'][:40]}, {old['ids'][0]} and {old['ids'][1]}"
    draw.text((12, 9), escape(title), "black", small)
    for i, file in enumerate(old["images"]):
        image = read_image(file)
        small_image = 2 * max(image.size) <= SIDE  # whose pixels stay sharp when it is enlarged
        method = Image.NEAREST if small_image else Image.LANCZOS
        image = ImageOps.contain(image, (SIDE, SIDE), method)
        left = 10 + i * (SIDE + 10) + (SIDE - image.width) // 2
        card.paste(image, (left, 36 + (SIDE - image.height) // 2))
    draw.text((before_x, SIDE + 54), "before", "black", small, anchor="mm")
    draw.text((after_x, SIDE + 54), "after", "black", small, anchor="mm")
    for i, statement in enumerate(old["statements"]):
        y = SIDE + 102 + 68 * i
        text = escape(f"{i + 1}. {statement}")
        text = textwrap.fill(text, 32, max_lines=3, placeholder=" ...")
        draw.text((12, y), text, "black", ImageFont.load_default(18), anchor="lm")
        draw_mark(draw, before_x, y, is_right(old, i))
        draw_mark(draw, after_x, y, is_right(new, i))
    return card


def draw_mark(draw, x, y, right):
    """A green tick or a red cross around (x, y)."""
    if right:
        draw.line([(x - 11, y), (x - 3, y + 9), (x + 12, y - 10)], GREEN, 5)
    else:
        draw.line([(x - 9, y - 9), (x + 9, y + 9)], RED, 5)
        draw.line([(x - 9, y + 9), (x + 9, y - 9)], RED, 5)


# ---- The command ---------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    sets = "; ".join(f"{name}: {what}" for name, what in ZEROSHOT.items())
    add("--preset", choices=["paper", "toy"], default="paper",
        help="toy: the CLIP, the benchmark and the zero-shot task of toy/")
    add("--backbone", help=f"{', '.join(BACKBONES)}, or open_clip's MODEL:TAG (default: the "
        "preset's)")
    add("--weights", metavar="FILE|FOLDER",
        help="the CLIP to evaluate (default: the backbone's original)")
    add("--baseline", metavar="FILE|FOLDER|original", help="the CLIP to compare it with")
    add("--benchmark", metavar="DIR", help="MMVP_VLM's folder, or one of its layout")
    add("--zeroshot", metavar="NAME:PATH", nargs="+", help=sets.replace("%", "%%"))
    add("--json", metavar="FILE", help="write the table, and every pair's scores and verdicts")
    add("--picture", metavar="FILE",
        help="draw the pairs whose verdict changed (PNG; needs --baseline)")
    add("--batch-size", type=int, default=64)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def check_usage(args):
    """Mistakes that the command line shows by itself."""
    for name, value in vars(args).items():
        if value == "":
            raise UserError(f"--{name}: an empty string is no value")
    if args.baseline == "original" and not args.weights:
        raise UserError("--baseline original: name the CLIP to compare with it by --weights")
    if args.picture and not args.baseline:
        raise UserError("--picture shows the pairs whose verdict changed: name what to compare "
                        "with by --baseline FILE|original")
    if args.json and args.json == args.picture:
        raise UserError(f"--json and --picture both name {args.json}: name two files")
    clips = [os.path.realpath(path) for path in (args.weights, args.baseline) if path]
    for path in (args.json, args.picture):
        if path and os.path.realpath(path) in clips:
            raise UserError(f"{path} is a CLIP to evaluate: name another file to write")
    if not 1 <= args.batch_size <= 100_000:
        raise UserError(f"--batch-size {args.batch_size}: must be from 1 to 100000")


def fill_in(args):
    """Set args.models, args.zeroshot and what the preset gives; draw the toy's world if needed."""
    if args.backbone is None:
        args.backbone = "toy" if args.preset == "toy" else "openai-l14-224"
    args.models = {"after": args.weights}
    if args.baseline:
        args.models = {"before": args.baseline, "after": args.weights}
    for key, path in args.models.items():
        args.models[key] = None if path == "original" else path  # None: the backbone's own
        find_backbone(args.backbone, args.models[key])
    tasks = {}
    for entry in args.zeroshot or []:
        name, _, path = entry.partition(":")
        if name in tasks:
            raise UserError(f"--zeroshot {entry}: {name} is given twice")
        tasks[name] = path
    if args.preset == "toy":
        from toy.make_toy import draw_world

        world = os.path.join(TOY, "data")
        draw_world(world)
        args.benchmark = args.benchmark or os.path.join(world, "mmvp")
        tasks = tasks or {"folder": os.path.join(world, "zeroshot")}
    args.zeroshot = list(tasks.items())


def check_device(device):
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {device}: {reason(error)}") from None


def run(argv):
    args = parse_arguments(argv)
    check_usage(args)
    check_device(args.device)
    for path in (args.json, args.picture):
        if path:
            check_writable(path)
    fill_in(args)
    if args.benchmark is None:
        raise UserError("no benchmark: download MMVP/MMVP_VLM from Hugging Face and name its "
                        "folder with --benchmark")
    check_benchmark(args.benchmark)
    for name, path in args.zeroshot:
        check_zeroshot(name, path)
    models = {}  # all of them first: a file may not fit
    for key, weights in args.models.items():
        models[key] = load_clip(args.backbone, weights)
    results = {}
    for key, (clip, *preparation) in models.items():
        try:
            results[key] = evaluate(clip.to(args.device), *preparation, args.benchmark,
                                    args.zeroshot, args.batch_size)
        except torch.OutOfMemoryError as error:
            message = f"--device {args.device}: {reason(error)}: choose a smaller --batch-size"
            raise UserError(message) from None
    print_table(*results.values())
    if args.json:
        models = {key: weights or "original" for key, weights in args.models.items()}
        about = {"backbone": args.backbone, "models": models}
        write_json(args.json, about | report(results))
    if args.picture:
        draw_changes(args.picture, results["before"], results["after"])


def report(results):
    """What --json writes of results: summaries, the table's rows, and every pair's scores."""
    content = {key: summary(result) for key, result in results.items()}
    content["rows"] = summarize(results)
    content["pairs"] = []
    for i, pair in enumerate(results["after"]["pairs"]):
        entry = {key: pair[key] for key in ("ids", "type", "statements")}
        for key, result in results.items():
            judged = result["pairs"][i]
            entry[key] = {"scores": judged["scores"], "correct": judged["correct"]}
        content["pairs"].append(entry)
    return content


def main(argv=None):
    run_command("eval_mmvp.py", run, argv)


if __name__ == "__main__":
    main()
