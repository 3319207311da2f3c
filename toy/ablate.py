"""The paper's claims in miniature: each claim is an arm of a grid, compared with its reference.

    python toy/ablate.py --quick             # one CLIP, four arms, a small test set
    python toy/ablate.py                     # the grid, in hours; the same command resumes it
    python toy/ablate.py --arms "local .5"   # one arm and its reference
    python toy/ablate.py --report            # the tables and the figure, from toy/ablation.csv

The design, which was fixed beforehand, and the results are in toy/ABLATIONS.md. A cell of the grid
is an arm on one CLIP: train.py's two stages, and the CLIPs exported along the second. Once all are
trained, the test set is drawn, and each CLIP is scored on it once. The report needs nothing but
OUT/full/ablation.csv; the other 14 GB can be deleted.
"""
import csv
import fcntl
import io
import logging
import math
import os
import subprocess
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # `python toy/ablate.py` must find the project's files
from eval_mmvp import OPEN_CLIP_WEIGHTS, evaluate, load_clip, raise_failures
from genhancer import Parser, UserError, read_json, run_command, write_text
from toy.make_toy import draw_world, write_benchmark, write_classes

# ---- The design ----------------------------------------------------------------------------------

# CLIPs, each named by the seed of its make_toy.py clip, which is also that of its stages.
THREE = ("0", "1", "2")
SIX = (*THREE, "3", "4", "5")
PAIR_SEED, IMAGE_SEED = 201, 202  # of the test set; nothing else draws from them

# An outcome is a measure and where it is compared: at equal retention, or at the end of stage 2.
EQUAL, AFTER = "pairs at equal retention", "pairs at the end"
KEPT, MARGIN = "zeroshot at the end", "margin at equal retention"
OUTCOMES = (EQUAL, AFTER, KEPT, MARGIN)
LOW, HIGH = 0.97, 0.99  # the retentions over which gains are averaged
NARROWEST = 0.98        # where not all curves fall to this, AFTER decides instead of EQUAL

WORSE, BETTER, AS_WELL, NO_BETTER = "worse", "better", "about as well", "no better"


@dataclass(frozen=True)
class Arm:
    """A row of the grid. The paper claims that it is `expected`, compared with its reference."""

    name: str
    paper: str = ""          # where the paper claims it
    expected: str = ""       # "" for references and for what is only shown
    flags: str = ""          # of both stages
    stage1: str = ""         # of stage 1 alone
    stage2: str = ""         # of stage 2 alone
    stage: str = "2"
    clips: tuple = THREE
    share: float = math.nan  # of its reference's gain that it loses in the paper
    primary: str = EQUAL     # the outcome that decides
    looks: int = 1           # 2: undecided with three CLIPs, so it got three more

    @property
    def family(self):
        return "perceiver" if "perceiver" in self.flags else "rf"

    @property
    def reference(self):
        return "rf" if self.name == "perceiver" else self.family

    @property
    def start(self):
        """The arm whose stage 1 it starts from: rf if it differs from rf in stage 2 alone."""
        return self if self.flags or self.stage1 else ARMS["rf"]


def table4(*points):
    """The share that an arm of Table 4 loses: the mean over its three backbones."""
    gains = (12.6, 9.6, 8.2)  # of s = 1
    return sum(lost / gain for lost, gain in zip(points, gains, strict=True)) / 3


DISCRETE = "--denoiser perceiver"
AGAIN = {"clips": SIX, "looks": 2}
ARMS = (
    Arm("rf", clips=SIX),
    Arm("perceiver", "Table 6", WORSE, DISCRETE, clips=SIX, share=3.0 / 12.6),
    Arm("local .1", "Fig. 5", WORSE, "--local-ratio 0.1", **AGAIN),
    Arm("local .5", "Fig. 5", WORSE, "--local-ratio 0.5", clips=SIX),
    Arm("local 1", "Fig. 5", WORSE, "--local-ratio 1"),
    Arm("perceiver, local .5", "Fig. 5", WORSE, f"{DISCRETE} --local-ratio 0.5", primary=AFTER),
    Arm("end to end", "Fig. 6", WORSE, stage="e2e", clips=SIX, share=5 / 12.6),
    Arm("uniform t", "Table 4", WORSE, "--timesteps uniform", clips=SIX,
        share=table4(10.4, 7.4, 8.2)),
    Arm("s = .1", "Table 4", WORSE, "--scale 0.1", share=table4(4.5, 3.7, 5.2)),
    Arm("s = .5", "Table 4", WORSE, "--scale 0.5", share=table4(3.7, 0.7, 2.3), **AGAIN),
    Arm("s = 5", "Table 4", WORSE, "--scale 5", share=table4(7.4, 3.7, 6.0)),
    Arm("s = 10", "Table 4", WORSE, "--scale 10", share=table4(11.2, 9.6, 10.4)),
    Arm("depth 2 + 4", "Table 5 ‡", NO_BETTER, "--depth 2 4", **AGAIN),  # ‡: see NOTES
    Arm("layers 2", "Table 5", WORSE, f"{DISCRETE} --layers 2", share=2.2 / 5.9),
    Arm("layers 6", "Table 5", BETTER, f"{DISCRETE} --layers 6", share=1.5 / 5.9),
    Arm("mask .5", "Table 8", AS_WELL, f"{DISCRETE} --mask-ratio 0.5 0.5", **AGAIN),
    Arm("mask .75", "Table 8", WORSE, f"{DISCRETE} --mask-ratio 0.75 0.75", share=1.5 / 9.6),
    Arm("mask .9", "Table 8", WORSE, f"{DISCRETE} --mask-ratio 0.9 0.9", share=3.0 / 9.6),
    Arm("direct", "Fig. 8", WORSE, stage2="--no-lora --lr-clip 1e-4", clips=SIX[1:], primary=KEPT),
    Arm("direct, 4e-4", "Fig. 8", stage2="--no-lora", clips=THREE[1:]),  # CLIP 0 chose its rate
    Arm("frozen", "Fig. 9", AS_WELL, stage2="--freeze-denoiser", **AGAIN),
    Arm("stage 1: 60 steps", "Fig. 1b", WORSE, stage1="--steps 60", **AGAIN),
    Arm("stage 1: 500 steps", "Fig. 1b", NO_BETTER, stage1="--steps 500", **AGAIN),
    Arm("shuffled target", "control", WORSE, stage2="--shuffle-target", primary=AFTER),
    Arm("all captions", clips=("full",)),  # rf on the CLIP of make_toy.py clip --regime full
)
ARMS = {arm.name: arm for arm in ARMS}
APART = ("direct, 4e-4", "shuffled target", "all captions")  # no claims: not in the pooled noise
# The steps of stage 1, the steps of stage 2 after which a CLIP is scored, and the size of the
# test set: pairs per pattern, and images for the zero-shot accuracy.
FULL = {"arms": tuple(ARMS), "clips": (*SIX, "full"), "stage 1": 250,
        "stage 2": (80, 120, 160, 240), "pairs": 1000, "images": 10_000}
QUICK = FULL | {"arms": ("rf", "local .5", "end to end", "frozen"), "clips": ("0",)}
QUICK |= {"stage 1": 100, "pairs": 100, "images": 2000}

# ---- The cells -----------------------------------------------------------------------------------

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # the arms are compared on CPUs
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # the process keeps freed memory: a fifth faster
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


def run_grid(out, plan, jobs):
    """Train and score what is missing in `out`, `jobs` runs at a time, and write ablation.csv.

    The file keeps the cells of earlier runs with other --arms.
    """
    draw_world(f"{HERE}/data")
    phases = {"CLIPs": {}, "stage 1": {}, "stage 2": {}}  # of each: {file: the command for it}
    exported = {}  # {(clip, arm, step): weights}
    for name in plan["arms"]:
        for clip in ARMS[name].clips:
            if clip in plan["clips"]:
                exported |= add_cell(out, plan, ARMS[name], clip, phases)
    for what, commands in phases.items():
        run_missing(what, commands, jobs)
    draw_test(f"{out}/test", plan)
    torch.set_num_threads(jobs)
    score_missing(out, exported)


def add_cell(out, plan, arm, clip, phases):
    """Add a cell's commands to `phases`; return the CLIPs, as {(clip, arm, step): weights}."""
    home = f"{out}/clip-{clip}"
    weights = f"{HERE if clip == '0' else home}/clip.safetensors"  # 0 is the committed CLIP
    seed, regime = ("0", "full") if clip == "full" else (clip, "weak")
    command = f"toy/make_toy.py clip --seed {seed} --regime {regime} --out"
    phases["CLIPs"][weights] = [*command.split(), home]

    train = ["train.py", "--preset", "toy", "--seed", seed, "--clip-weights", weights, "--out"]
    init = []
    if arm.stage == "2":
        folder = f"{home}/{arm.start.name}"
        start = f"{folder}/stage1/last.safetensors"
        init = ["--init", start]
        # Of a flag that comes twice, train.py takes the last.
        flags = f"--stage 1 --steps {plan['stage 1']} {arm.start.flags} {arm.start.stage1}"
        phases["stage 1"][start] = [*train, folder, *flags.split()]

    folder = f"{home}/{arm.name}"
    steps = plan["stage 2"]
    flags = f"--stage {arm.stage} --steps {steps[-1]} --export-every {math.gcd(*steps)}"
    flags += f" --lr-clip 4e-4 {arm.flags} {arm.stage2}"
    result = f"{folder}/open_clip/{OPEN_CLIP_WEIGHTS}"
    phases["stage 2"][result] = [*train, folder, *flags.split(), *init]

    exported = {(clip, "original", 0): weights, (clip, arm.name, steps[-1]): result}
    for step in steps[:-1]:
        exported[clip, arm.name, step] = f"{folder}/clip-{step:06}/{OPEN_CLIP_WEIGHTS}"
    return exported


def run_missing(what, commands, jobs):
    """Run the command of each file in {file: command} that is missing, `jobs` at a time.

    train.py resumes a killed run. After an error, no further run is started.
    """
    missing = [path for path in commands if not os.path.exists(path)]
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(call, commands[path], f"{path}.log") for path in missing]
        try:
            for run in tqdm(as_completed(runs), what, len(runs), disable=None):
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def call(command, log):
    """Run a program of the project as a user does; its output is appended to the file `log`."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *command], cwd=os.path.dirname(HERE),
                              env=os.environ | ENVIRONMENT, stdout=file, stderr=file)
    if done.returncode != 0:
        raise UserError(f"{' '.join(command)} failed: see {log}; the same command resumes")


def draw_test(folder, plan):
    """Draw the test set, unless it exists: all of it or nothing."""
    if os.path.isdir(folder):
        return
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as private:
        new = f"{private}/test"
        pairs = write_benchmark(f"{new}/mmvp", PAIR_SEED, plan["pairs"])
        images = write_classes(f"{new}/zeroshot", IMAGE_SEED, plan["images"])
        for _ in tqdm(chain(pairs, images), "drawing the test set", disable=None):
            pass
        os.rename(new, folder)


NUMBERS = ("heldout", "step", "pairs", "zeroshot", "margin")
COLUMNS = ("arm", "clip", "rate", "precision", *NUMBERS)


def score_missing(out, exported):
    """Score each of {(clip, arm, step): weights} that is not in ablation.csv, and add it there."""
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of every CLIP
    path = f"{out}/ablation.csv"
    rows = {}
    if os.path.exists(path):
        rows = {(row["clip"], row["arm"], int(row["step"])): row for row in read_rows(path)}
    for key in tqdm([key for key in exported if key not in rows], "scores", disable=None):
        rows[key] = score(out, *key, exported[key])
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))
        write_text(path, text.getvalue())


def score(out, clip, arm, step, weights):
    """A row of the csv: what eval_mmvp.py measures of a CLIP, and the mean margin.

    A pair's margin is the logit by which the right image leads, for the worse of the two
    statements, clamped to ±4.
    """
    tasks = [("folder", f"{out}/test/zeroshot")]
    result = evaluate(*load_clip("toy", weights), f"{out}/test/mmvp", tasks)
    raise_failures([result])
    scores = np.array([pair["scores"] for pair in result["pairs"]]).clip(1e-9, 1 - 1e-9)
    leads = np.log(scores / (1 - scores))  # (pairs, 2 statements), of the first image
    margins = np.minimum(leads[:, 0], -leads[:, 1])
    row = {"arm": arm, "clip": clip, "step": step, "pairs": result["average"]}
    row["zeroshot"] = result["zeroshot"]["folder accuracy"]
    row["margin"] = margins.clip(-4, 4).mean()
    if arm != "original":
        folder = f"{out}/clip-{clip}/{arm}/{'e2e' if ARMS[arm].stage == 'e2e' else 'stage2'}"
        settings = read_json(f"{folder}/settings.json")
        row["rate"] = settings["lr_clip"]
        row["precision"] = settings["precision"]
        row["heldout"] = read_rows(f"{folder}/log.csv")[-1]["heldout"]  # after stage 2
    return row


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_csv(path):
    """The curves {(arm, clip): [point, ...]}, each of which starts at the original CLIP."""
    if not os.path.isfile(path):
        raise UserError(f"{path} not found: run the grid, or name its ablation.csv")
    curves = {}
    for row in read_rows(path):
        for name in NUMBERS:
            row[name] = float(row[name] or "nan")
        curves.setdefault((row["arm"], row["clip"]), []).append(row)
    return {
        (name, clip): curves["original", clip] + points
        for (name, clip), points in curves.items() if name != "original"}


# ---- The statistics ------------------------------------------------------------------------------


def gain(curve, outcome, low=LOW):
    """What a curve gains by its end, or on average over the retentions from `low` to HIGH.

    The latter is NaN if the curve ends above `low`.
    """
    measure = outcome.split()[0]
    gains = [point[measure] - curve[0][measure] for point in curve]
    if outcome.endswith("the end"):
        return gains[-1]
    kept = np.minimum.accumulate(retention(curve))  # np.interp needs it monotonic
    wanted = np.linspace(low, HIGH, 101)
    gains = np.interp(wanted, kept[::-1], gains[::-1], left=math.nan)
    return float(np.trapezoid(gains, wanted)) / (HIGH - low)


def retention(curve):
    """The share of its original zero-shot accuracy that a CLIP keeps, at each point."""
    return [point["zeroshot"] / curve[0]["zeroshot"] for point in curve]


def residual(values):
    """Randomised blocks: the standard deviation of what neither arm nor CLIP explains.

    values: {(arm, clip): number}; NaNs are ignored. Returns it and its degrees of freedom.
    """
    values = {key: value for key, value in values.items() if not math.isnan(value)}
    if not values:
        return math.nan, 0
    effects = sorted({effect for key in values for effect in key})  # no arm is named like a CLIP
    design = np.array([[effect in key for effect in effects] for key in values], dtype=float)
    seen = np.array(list(values.values()))
    solution = np.linalg.lstsq(design, seen, rcond=None)[0]
    freedom = len(seen) - int(np.linalg.matrix_rank(design))
    if freedom == 0:
        return math.nan, 0
    rest = np.linalg.norm(seen - design @ solution)
    return float(rest) / math.sqrt(freedom), freedom


def noise(curves, family, outcome):
    """The residual of the gains, pooled over a family's arms."""
    return residual({
        (name, clip): gain(curve, outcome)
        for (name, clip), curve in curves.items()
        if ARMS[name].family == family and name not in APART})


@lru_cache
def student(freedom):
    """|t| and its two-sided p: for t = sqrt(freedom) tan(a), a's density is cos^(freedom - 1)."""
    angles = np.linspace(0, math.pi / 2, 200_001)
    below = np.cumsum(np.cos(angles) ** (freedom - 1))
    return math.sqrt(freedom) * np.tan(angles), 1 - below / below[-1]


def half_width(error, freedom, looks=1):
    """Half the width of Student's interval: 95 %, or 97.5 % for two looks; NaN without freedom."""
    if freedom == 0:
        return math.nan
    t, p = student(freedom)
    return error * float(np.interp(0.05 / looks, p[::-1], t[::-1]))


def p_value(t, freedom, looks=1):
    """The two-sided p of Student's t, Bonferroni-corrected for the looks; 1 if t is NaN."""
    if math.isnan(t):
        return 1.0
    return min(1.0, looks * float(np.interp(abs(t), *student(freedom))))


# By how much an arm gains more than its reference: the mean over the CLIPs, half the width of its
# interval, its standard error with the degrees of freedom, and P, the paper's effect.
Difference = namedtuple("Difference", "mean half error freedom clips effect")


def compare(curves, arm, outcome):
    """The Difference of an arm from its reference on the same CLIPs; None if not comparable.

    The noise is pooled over all arms of the family. If the reference belongs to the other family,
    it is the differences' own, since a CLIP may respond more to one denoiser than to the other.
    """
    names = (arm.name, arm.reference)
    clips = [clip for clip in arm.clips if all((name, clip) in curves for name in names)]
    own = [curves[arm.name, clip] for clip in clips]
    other = [curves[arm.reference, clip] for clip in clips]
    low = max([LOW, *[min(retention(curve)) for curve in own + other]])
    if not clips or (outcome.endswith("retention") and low > NARROWEST):
        return None
    other = np.array([gain(curve, outcome, low) for curve in other])
    differences = np.array([gain(curve, outcome, low) for curve in own]) - other
    if arm.family == ARMS[arm.reference].family:
        deviation, freedom = noise(curves, arm.family, outcome)
        deviation *= math.sqrt(2)  # that of an arm and that of its reference
    else:
        freedom = len(clips) - 1
        deviation = np.std(differences, ddof=1) if freedom else math.nan
    error = deviation / math.sqrt(len(clips))
    half = half_width(error, freedom, arm.looks)
    effect = arm.share * other.mean()
    return Difference(differences.mean(), half, error, freedom, len(clips), effect)


def judge(expected, low, high, effect):
    """The verdict on a claim, and the difference that it rules out (the nearest, if two).

    low, high: the interval of the difference, positive in the paper's direction. effect: P, or NaN
    where the paper gives no number. Comparisons with NaN are false.
    """
    side = math.copysign(1, low + high)
    enough = 1 if math.isnan(effect) else effect / 2
    nearest = 0 if low + high < enough else enough
    if expected == AS_WELL:
        rules = [(low > -1 and high < 1, "reproduces", side),
                 (low > 1 or high < -1, "excluded", side)]
    elif expected == NO_BETTER:
        rules = [(high < 1, "reproduces", 1), (low > 0, "opposite", 0)]
    else:
        rules = [
            (high < 0, "opposite", 0),
            (low > 0 and high < effect / 2, "smaller than the paper's", nearest),
            (low > 0, "reproduces", 0),
            (high < enough, "excluded", enough),
        ]
    for holds, verdict, ruled_out in rules:
        if holds:
            return verdict, ruled_out
    return "cannot tell", math.nan


def holm(p):
    """Which of {name: p} survive Holm's correction at 5 %."""
    survivors = set()
    for rank, name in enumerate(sorted(p, key=p.get)):
        if p[name] > 0.05 / (len(p) - rank):
            break
        survivors.add(name)
    return survivors


# ---- The tables and the figure -------------------------------------------------------------------


def report(path, names=tuple(ARMS)):
    """Print the tables of a csv for these arms; for all arms, draw the figure beside it as well."""
    curves = {key: curve for key, curve in read_csv(path).items() if key[0] in names}
    print_gains(curves)
    print_claims(curves)
    if len(names) == len(ARMS):
        picture = f"{os.path.splitext(path)[0]}.svg"
        draw(curves, picture)
        print(f"\nThe figure is {picture}")


def print_table(title, columns, rows):
    print(f"\n{title}\n")
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(row)} |")


def find(curves, name):
    """The curves of an arm, one for each CLIP."""
    return [curve for key, curve in curves.items() if key[0] == name]


def print_gains(curves):
    """What each arm gains, the mean over its CLIPs."""
    rows = []
    for name in ARMS:
        own = find(curves, name)
        if not own:
            continue
        ends = [curve[-1] for curve in own]
        heldout = np.mean([end["heldout"] for end in ends])
        row = [name, str(len(own)), ends[0]["rate"], ends[0]["precision"], f"{heldout:.3f}"]
        for outcome in OUTCOMES:
            mean = np.mean([gain(curve, outcome) for curve in own])
            row.append("not reached" if math.isnan(mean) else f"{mean:+.2f}")
        rows.append(row)
    columns = ["arm", "CLIPs", "rate", "precision", "validation loss", *OUTCOMES]
    print_table("Gains over the original CLIPs:", columns, rows)


NOTES = """A verdict with * survives Holm's correction.
† Looked at twice, so that the interval is of 97.5 % instead of 95.
‡ By the paper's text. Its Table 5 has 42.2 for depth 2 + 4 and 41.5 for 1 + 2."""


def print_claims(curves):
    """The differences from the references with their intervals, and the verdicts."""
    rows, p = {}, {}
    for arm in ARMS.values():
        found = {outcome: compare(curves, arm, outcome) for outcome in OUTCOMES}
        if not arm.paper or not found[AFTER]:
            continue
        deciding = arm.primary if found[arm.primary] else AFTER
        cells = {}
        for outcome, x in found.items():
            words = f"{x.mean:+.2f} ± {x.half:.2f}" if x else "not reached"
            cells[outcome] = words.removesuffix(" ± nan")  # for want of CLIPs
        x = found[deciding]
        verdict = ""
        if arm.expected:
            cells[deciding] = f"**{cells[deciding]}**"
            mean = -x.mean if arm.expected == WORSE else x.mean
            verdict, bound = judge(arm.expected, mean - x.half, mean + x.half, x.effect)
            p[arm.name] = p_value((mean - bound) / x.error, x.freedom, arm.looks)
        claim = f"{arm.paper}: {arm.expected or 'shown only'}"
        effect = "" if math.isnan(x.effect) else f"{x.effect:.2f}"
        clips = f"{x.clips}{' †' * (arm.looks - 1)}"
        rows[arm.name] = [arm.name, claim, *cells.values(), clips, effect, verdict]
    for name in holm(p):
        rows[name][-1] += " *"
    columns = ["arm", "the paper", *OUTCOMES, "CLIPs", "P", "verdict"]
    print_table("Differences from the reference:", columns, rows.values())
    decided = sum(value < 1 for value in p.values())
    chance = sum(0.05 / ARMS[name].looks for name in p)
    print(f"\n{decided} of {len(p)} claims are decided, by the outcome in bold type. By chance, "
          f"{chance:.1f} intervals miss the truth.\n{NOTES}")


COLOURS = {  # in the figure, on its own white page
    "rf": "#0550ae",
    "perceiver": "#6639ba",
    "local .5": "#b3141f",
    "end to end": "#8a4600",
    "uniform t": "#116329",
    "direct": "#57606a",
}
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 440" \
font-family="Helvetica, Arial, sans-serif" font-size="14">
<style>text {{fill: #24292f}} path {{fill: none; stroke: #c8d1da}} g path {{stroke-width: 2.5}}
.x text {{text-anchor: middle}} .y text {{text-anchor: end}}</style>
<rect width="740" height="440" rx="8" fill="#ffffff"/>
<rect x="{band}" y="50" width="{width}" height="330" fill="#e3ebf5"/>
<text x="{band}" y="44">compared from 99 to 97 %</text>
<text x="14" y="22">pair accuracy gained, points (a bar: a saved CLIP with its 95 % interval)</text>
<text x="305" y="428" text-anchor="middle">zero-shot accuracy kept, % (less to the right)</text>
<text x="565" y="44">arm (number of CLIPs)</text>
{body}
</svg>
"""


def trace(curves, name):
    """An arm's curve in the figure: for each point, % kept, points gained, half of its interval.

    The interval leaves out what all arms on a CLIP have in common.
    """
    points = []
    for length in range(1, 1 + len(find(curves, name)[0])):
        begun = {key: curve[:length] for key, curve in curves.items()}
        own = find(begun, name)
        kept = 100 * np.mean([retention(curve)[-1] for curve in own])
        gained = np.mean([gain(curve, AFTER) for curve in own])
        deviation, freedom = noise(begun, ARMS[name].family, AFTER)
        half = half_width(deviation / math.sqrt(len(own)), freedom)
        points.append((kept, gained, np.nan_to_num(half)))
    return points


def draw(curves, path):
    """Draw the pair accuracy gained against the zero-shot accuracy kept along stage 2, as SVG."""
    lines = {name: trace(curves, name) for name in COLOURS if find(curves, name)}
    points = [point for line in lines.values() for point in line]
    least = min([95, *[kept for kept, _, _ in points]]) - 0.5
    bottom = math.floor(min([0, *[gained - half for _, gained, half in points]]))
    top = math.ceil(max([1, *[gained + half for _, gained, half in points]]))

    def x(kept):
        return round(60 + 490 * (100.5 - kept) / (100.5 - least), 1)

    def y(gained):
        return round(380 - 325 * (gained - bottom) / (top - bottom), 1)

    body = []
    for tick in (100, 97, *range(95, math.ceil(least) - 1, -5)):
        body.append(f'<path d="M{x(tick)} 50V385"/>')
        body.append(f'<g class="x"><text x="{x(tick)}" y="402">{tick}</text></g>')
    for tick in range(bottom + bottom % 2, top + 1, 2):
        body.append(f'<path d="M60 {y(tick)}H550"/>')
        body.append(f'<g class="y"><text x="52" y="{y(tick) + 5}">{tick:+d}</text></g>')
    for row, (name, line) in enumerate(lines.items()):
        height = 70 + 24 * row
        outline = "L".join(f"{x(kept)} {y(gained)}" for kept, gained, _ in line)
        bars = [f"M{x(kept)} {y(gained - half)}V{y(gained + half)}" for kept, gained, half in line]
        body.append(f'<g><path d="M{outline}{"".join(bars)}M565 {height}H590" '
                    f'style="stroke: {COLOURS[name]}"/></g>')
        body.append(f'<text x="597" y="{height + 5}">{name} ({len(find(curves, name))})</text>')
    width = round(x(97) - x(99), 1)
    svg = SVG.format(band=x(99), width=width, body="\n".join(body))

    write_text(path, svg)


# ---- The command ---------------------------------------------------------------------------------


def read_command_line(argv):
    parser = Parser(prog="ablate.py", description=__doc__,
                    formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small grid")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM",
                        help=f"these and their references alone: {'; '.join(ARMS)}")
    parser.add_argument("--report", nargs="?", const=f"{HERE}/ablation.csv", metavar="CSV",
                        help="run nothing; report on a csv (toy/ablation.csv)")
    parser.add_argument("--out", default="runs/ablation",
                        help="folder of the grid, which is its full/ or quick/ (%(default)s)")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=os.cpu_count(),
                        metavar="N", help="parallel runs, of one core each (all cores)")
    return parser.parse_args(argv)


def run(argv):
    args = read_command_line(argv)
    names = tuple(ARMS)
    plan = QUICK if args.quick else FULL
    if args.arms:
        references = [ARMS[name].reference for name in args.arms]
        names = tuple(dict.fromkeys(references + args.arms))
        plan = plan | {"arms": names}
    if args.report:
        report(args.report, names)
        return
    out = os.path.abspath(os.path.join(args.out, "quick" if args.quick else "full"))
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out} is in use by another grid: choose another --out") from None
        run_grid(out, plan, args.jobs)
    report(f"{out}/ablation.csv", names)


def main(argv=None):
    run_command("ablate.py", run, argv)


if __name__ == "__main__":
    main()
