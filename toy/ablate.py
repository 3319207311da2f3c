"""The paper's ablations in miniature: a grid of train.py runs on the toy world, over several CLIPs, as curves of accuracy against retention.

    python toy/ablate.py --quick      # one CLIP and the main rows, about 15 minutes on 2 cores
    python toy/ablate.py              # the grid: hours. A killed grid goes on where it was
    python toy/ablate.py --report     # the table and toy/ablation.svg of what has run so far

Each cell is one CLIP, arm and rate of LoRA: stage 1 (shared by the arms that differ in stage 2 only), then stage 2 with a CLIP saved every
100 steps, each scored on two benchmarks and on two sets of category images. The rate of an arm is the one of three with the highest accuracy
at a retention of .97 on dev, with the first CLIP; the table's numbers come from a benchmark and from images that nothing was chosen on.
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from eval_mmvp import encode_images, evaluate, exact_float32  # noqa: E402
from genhancer import load_clip  # noqa: E402
from toy.make_toy import VALUES, Image, draw_part, draw_world, tqdm, write_benchmark, write_classes  # noqa: E402
from train import write_json  # noqa: E402

FINAL, FINAL_CLASSES, PROBE = 101, 102, 103  # seeds of what the table is measured on, drawn by nothing else
STEPS, EVERY = 400, 100
RATES, DIRECT_RATES = (1e-4, 2e-4, 4e-4), (1e-5, 3e-5, 1e-4)
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
    "depth 1 + 1": ("--depth 1 1", "", ""),
    "depth 2 + 4": ("--depth 2 4", "", ""),
    "layers 2": ("--denoiser perceiver --layers 2", "", ""),
    "layers 6": ("--denoiser perceiver --layers 6", "", ""),
    "mask .5": ("--denoiser perceiver --mask-ratio 0.5 0.5", "", ""),
    "mask .75": ("--denoiser perceiver --mask-ratio 0.75 0.75", "", ""),
    "mask .9": ("--denoiser perceiver --mask-ratio 0.9 0.9", "", ""),
    "stage 1: 200 steps": ("", "--steps 200", ""),
    "stage 1: 2400 steps": ("", "--steps 2400", ""),
    "shuffled target": ("", "", "--shuffle-target"),
}
QUICK = ("rf", "local .5", "end to end", "direct")
KEY = ("rf", "perceiver", "local .5", "end to end", "uniform t", "direct")  # on all CLIPs; the others on two
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
    ("depth 1 + 1", "rf", "Table 5: half the blocks do as well", "41.5 against 42.2", 0),
    ("depth 2 + 4", "rf", "Table 5: twice the blocks do no better", "42.2 against 42.2", 0),
    ("layers 2", "perceiver", "Table 5: 2 layers are a little worse than 4", "41.5 against 43.7", -1),
    ("layers 6", "perceiver", "Table 5: 6 layers are a little better than 4", "45.2 against 43.7", 1),
    ("perceiver", "rf", "Table 6: discrete below continuous on OpenAI's CLIP", "28.9 against 31.9", -1),
    ("mask .5", "perceiver", "Table 8: masks of 50 % do about as well as 50-90 %", "28.1 against 28.9", 0),
    ("mask .75", "perceiver", "Table 8: masks of 75 % are a little worse", "27.4 against 28.9", -1),
    ("mask .9", "perceiver", "Table 8: masks of 90 % are worse", "25.9 against 28.9", -1),
    ("direct", "rf", "Fig. 8: training without LoRA is worse", "a figure only", -1),
    ("frozen", "rf", "Fig. 9: a frozen denoiser makes little difference", "a figure only", 0),
    ("stage 1: 200 steps", "rf", "Fig. 1b: a short stage 1 is worse", "a figure only", -1),
    ("stage 1: 2400 steps", "rf", "Fig. 1b: better reconstruction is not better representation", "a figure only", 0),
    ("shuffled target", "rf", "control: another image's [CLS]", "none", -1),
)
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided 95 %, by degrees of freedom


def command(*parts):
    """A command line: each part is split at its spaces."""
    return [sys.executable, *(word for part in parts for word in str(part).split())]


def call(log, line):
    """Run a command, one thread, its output into the file `log`; raises with the last line if it fails."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    with open(log, "a") as file:
        if subprocess.run(line, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=os.path.dirname(HERE)).returncode:
            raise RuntimeError(f"{' '.join(line)} failed: see {log}")


def read_json(path):
    with open(path) as file:
        return json.load(file)


def make_clip(out, clip):
    """The weights of a CLIP: the committed one ("0"), another seed, or the regime without gain ("full")."""
    if clip == "0":
        return os.path.join(HERE, "clip.safetensors")
    path = os.path.join(out, f"clip-{clip}")
    if not os.path.isfile(os.path.join(path, "clip.safetensors")):
        call(f"{path}.log", command("toy/make_toy.py clip --out", path, "--regime full" if clip == "full" else f"--seed {clip}"))
    return os.path.join(path, "clip.safetensors")


def stage1(out, clip, arm):
    """Stage 1 of an arm, or nothing if it has none or is done: the folder that holds it."""
    both, one, _ = ARMS[arm]
    if one is None:
        return None
    folder = os.path.join(out, f"clip-{clip}", "stage 1" + both.replace("--", "") + one.replace("--", " ")).replace(" ", "_")
    if not os.path.isfile(f"{folder}/stage1/last.safetensors"):
        call(f"{folder}.log", command("train.py --preset toy --stage 1 --clip-weights", make_clip(out, clip), "--out", folder, both, one))
    return folder


def cell(out, clip, arm, rate):
    """Train, score the curve, and write one JSON; what is there already is not done again. Returns its content."""
    path = os.path.join(out, f"clip-{clip}", f"{arm} {rate:g}".replace(" ", "_"))
    if not os.path.isfile(f"{path}.json"):
        weights, (both, one, two), start = make_clip(out, clip), ARMS[arm], stage1(out, clip, arm)
        stages = f"--stage e2e --steps {STEPS * 3 // 2}" if start is None else f"--stage 2 --steps {STEPS} --init {start}/stage1/last.safetensors"
        line = command("train.py --preset toy --clip-weights", weights, "--out", path, stages, both, two,
                       f"--lr-clip {rate} --export-every {EVERY} --sample-every {EVERY}")
        call(f"{path}.log", line)
        with open(os.path.join(path, "stage2" if start else "e2e", "log.csv"), newline="") as file:
            heldout = {int(row["step"]): float(row["heldout"]) for row in csv.DictReader(file) if row["heldout"]}
        before = os.path.join(out, f"clip-{clip}", "before.json")
        if not os.path.isfile(before):
            write_json(before, score(out, weights) | {"step": 0})
        curve = [read_json(before)]
        for step in sorted(heldout):
            file = os.path.join(path, f"clip-{step:06}.safetensors")
            curve.append(score(out, file if os.path.isfile(file) else f"{path}/clip.safetensors") | {"step": step, "heldout": heldout[step]})
        result = {"clip": clip, "arm": arm, "rate": rate, "command": "python " + " ".join(line[1:]), "curve": curve}
        if arm == "rf":
            result["probe"] = {"before": probe(weights), "after": probe(f"{path}/clip.safetensors")}
        write_json(f"{path}.json", result)
        shutil.rmtree(path)
    return read_json(f"{path}.json")


def score(out, weights):
    """{"dev": ..., "test": ...}: pair accuracy, by pattern too, and category zero-shot, of a CLIP's weights."""
    torch.set_num_threads(1)
    clip, preprocess, tokenizer = load_clip("toy", weights)
    result = {}
    for name, benchmark, classes in (("dev", f"{HERE}/data/mmvp-dev", f"{HERE}/data/zeroshot-dev"), ("test", f"{out}/world/mmvp", f"{out}/world/zeroshot")):
        seen = evaluate(clip, preprocess, tokenizer, benchmark, [("folder", classes)])
        result[name] = {"pairs": seen["average"], "patterns": seen["patterns"], "zeroshot": seen["zeroshot"]["folder accuracy"]}
    return result


@exact_float32()
def probe(weights, images=3000, ridge=1e-2):
    """{attribute: percent}: a linear probe (ridge regression to one-hot) on [CLS], fitted to two thirds of new images, tested on the rest."""
    clip, preprocess, _ = load_clip("toy", weights)
    drawn = [(preprocess(Image.fromarray(pixels)), scene) for pixels, scene in draw_part(PROBE, range(images))]
    features, _ = encode_images(clip, [(x, i) for i, (x, _) in enumerate(drawn)], 100)
    features = torch.cat([features - features.mean(0), torch.ones(images, 1)], dim=1).double()
    fit, test, result = slice(0, images * 2 // 3), slice(images * 2 // 3, images), {}
    for attribute, values in VALUES.items():
        labels = torch.tensor([values.index(scene[attribute]) for _, scene in drawn])
        x, y = features[fit], torch.eye(len(values), dtype=torch.double)[labels[fit]]
        solution = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=torch.double), x.T @ y)
        result[attribute] = 100 * ((features[test] @ solution).argmax(1) == labels[test]).double().mean().item()
    return result


def at_retention(curve, retention, part):
    """Pair accuracy where zero-shot / zero-shot before first falls to `retention`, linear between two points; the last point's if it never does."""
    points = [(point[part]["zeroshot"] / curve[0][part]["zeroshot"], point[part]["pairs"]) for point in curve]
    for (r0, a0), (r1, a1) in zip(points, points[1:]):
        if r1 <= retention:
            return a0 + (a1 - a0) * (r0 - retention) / (r0 - r1)
    return points[-1][1]


def at_step(curve, key):
    """The test's value after STEPS steps of the visual tower."""
    return next(point["test"][key] for point in curve if point["step"] == STEPS)


def interval(values):
    """Mean and half-width of Student's 95 % interval over CLIPs ("one CLIP" has none)."""
    mean = float(np.mean(values))
    half = T95[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return mean, half, f"{mean:+.1f}" + (f" ± {half:.1f}" if half is not None else " (one CLIP)")


def verdict(values, direction):
    """Whether a difference over CLIPs has the paper's sign: reproduces, does not, or undecided at this size."""
    mean, half, _ = interval(values)
    if half is None:
        return "undecided (one CLIP)"
    if direction == 0:
        return "reproduces" if abs(mean) + half < 2 else "does not" if abs(mean) > half else "undecided"
    return "undecided" if abs(mean) <= half else "reproduces" if mean * direction > 0 else "does not"


def report(chosen):
    """Print the tables of the chosen cells {(arm, clip): cell}, and draw them into toy/ablation.svg."""
    arms = list(dict.fromkeys(arm for arm, _ in chosen))
    clips = lambda arm: [clip for a, clip in chosen if a == arm and clip != "full"]
    print(f"\n| arm | rate | CLIPs | pairs before | after {STEPS} steps | zero-shot there | at retention .98 | .97 | .95 |\n|" + "---|" * 9)
    for arm in arms:
        curves = [chosen[arm, clip]["curve"] for clip in clips(arm)]
        mean = lambda f: f"{np.mean([f(curve) for curve in curves]):.1f}"
        print(f"| {arm} | {chosen[arm, clips(arm)[0]]['rate']:g} | {len(curves)} | {mean(lambda c: c[0]['test']['pairs'])} | {mean(lambda c: at_step(c, 'pairs'))} | "
              f"{mean(lambda c: at_step(c, 'zeroshot'))} | " + " | ".join(mean(lambda c: at_retention(c, r, 'test')) for r in (.98, .97, .95)) + " |")
    print("\n| claim | the paper | ours: difference at equal steps | at retention .98 | .97 | .95 | CLIPs | verdict (at .97) |\n|" + "---|" * 8)
    for arm, reference, claim, paper, direction in CLAIMS:
        both = [clip for clip in clips(arm) if (reference, clip) in chosen] if arm in arms else []
        if not both:
            print(f"| {claim} | {paper} | not run | | | | 0 | |")
            continue
        pairs = [(chosen[arm, clip]["curve"], chosen[reference, clip]["curve"]) for clip in both]
        columns = [[at_step(a, "pairs") - at_step(b, "pairs") for a, b in pairs]]
        columns += [[at_retention(a, r, "test") - at_retention(b, r, "test") for a, b in pairs] for r in (.98, .97, .95)]
        print(f"| {claim} | {paper} | " + " | ".join(interval(values)[2] for values in columns) + f" | {len(both)} | {verdict(columns[2], direction)} |")
    for clip in dict.fromkeys(clip for arm, clip in chosen if arm == "rf"):
        run = chosen["rf", clip]
        print(f"\nCLIP {clip}: zero-shot {run['curve'][0]['test']['zeroshot']:.1f} -> {run['curve'][-1]['test']['zeroshot']:.1f}\n| pattern | pairs before | after | linear probe before | after |\n|" + "---|" * 5)
        for (pattern, before), attribute in zip(run["curve"][0]["test"]["patterns"].items(), VALUES):
            print(f"| {pattern} | {before:.0f} | {run['curve'][-1]['test']['patterns'][pattern]:.0f} | {run['probe']['before'][attribute]:.1f} | {run['probe']['after'][attribute]:.1f} |")
    if arms:
        draw({arm: [chosen[arm, clip]["curve"] for clip in clips(arm)] for arm in arms}, os.path.join(HERE, "ablation.svg"))


COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#db2777", "#65a30d")


def draw(curves, path):
    """An SVG of pair accuracy gained against retention, a curve per arm, the mean over its CLIPs, readable on light and dark."""
    lines = {arm: [(np.mean([c[i]["test"]["zeroshot"] / c[0]["test"]["zeroshot"] for c in runs]), np.mean([c[i]["test"]["pairs"] - c[0]["test"]["pairs"] for c in runs]))
                   for i in range(min(map(len, runs)))] for arm, runs in curves.items() if arm in KEY}
    x = lambda r: 60 + (1.005 - min(max(r, 0.85), 1.005)) / 0.155 * 460
    y = lambda a: 330 - (min(max(a, -8), 16) + 8) / 24 * 300
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 390" font-family="sans-serif" font-size="13">',
             "<style>text{fill:#1f2937}.axis{stroke:#9ca3af}@media(prefers-color-scheme:dark){text{fill:#e5e7eb}}</style>"]
    for r in (1, .97, .95, .9, .85):
        parts.append(f'<line class="axis" x1="{x(r):.1f}" x2="{x(r):.1f}" y1="30" y2="330" stroke-opacity=".3"/><text x="{x(r):.1f}" y="348" text-anchor="middle">{r:g}</text>')
    for a in range(-8, 17, 4):
        parts.append(f'<line class="axis" x1="60" x2="520" y1="{y(a):.1f}" y2="{y(a):.1f}" stroke-opacity="{.9 if a == 0 else .3}"/><text x="52" y="{y(a) + 4:.1f}" text-anchor="end">{a:+d}</text>')
    parts.append('<text x="290" y="375" text-anchor="middle">zero-shot accuracy kept</text><text x="60" y="18">points of pair accuracy gained, along stage 2</text>')
    for k, (arm, points) in enumerate(lines.items()):
        path_of = " ".join(f"{x(r):.1f},{y(a):.1f}" for r, a in points)
        parts.append(f'<polyline points="{path_of}" fill="none" stroke="{COLOURS[k]}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x(r):.1f}" cy="{y(a):.1f}" r="3" fill="{COLOURS[k]}"/>' for r, a in points]
        parts.append(f'<line x1="540" x2="565" y1="{50 + 22 * k}" y2="{50 + 22 * k}" stroke="{COLOURS[k]}" stroke-width="3"/><text x="572" y="{54 + 22 * k}">{arm} ({len(curves[arm])} CLIPs)</text>')
    with open(path, "w") as file:
        file.write("\n".join([*parts, "</svg>"]) + "\n")


def choose(out, clips, arm, rates):
    """The cells of an arm at the rate that is best on dev with the first CLIP, as far as they have run."""
    read = lambda clip, rate: os.path.join(out, f"clip-{clip}", f"{arm} {rate:g}.json".replace(" ", "_"))
    done = {rate: read_json(read(clips[0], rate)) for rate in rates if os.path.isfile(read(clips[0], rate))}
    best = max(done, key=lambda rate: at_retention(done[rate]["curve"], .97, "dev"), default=None)
    return best, {(arm, clip): read_json(read(clip, best)) for clip in clips if best and os.path.isfile(read(clip, best))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one CLIP, one rate: {', '.join(QUICK)}")
    parser.add_argument("--report", action="store_true", help="only show what has run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--clips", nargs="+", default=["0", "1", "2"], help="seeds of make_toy.py's clip; 0 is the committed one")
    parser.add_argument("--out", default="runs/ablation", help="the folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    out, arms = os.path.abspath(args.out), args.arms or (QUICK if args.quick else tuple(ARMS))
    clips = args.clips[:1] if args.quick else args.clips
    rates = {arm: (DIRECT_RATES if arm == "direct" else RATES) for arm in arms}
    if args.quick:
        rates = {arm: values[1:2] for arm, values in rates.items()}
    if not args.report:
        draw_world(os.path.join(HERE, "data"))
        if not os.path.isdir(f"{out}/world"):
            shutil.rmtree(f"{out}/world.part", ignore_errors=True)
            for _ in tqdm((_ for part in (write_benchmark(f"{out}/world.part/mmvp", FINAL), write_classes(f"{out}/world.part/zeroshot", FINAL_CLASSES)) for _ in part),
                          "drawing what is measured on", 3800):
                pass
            os.replace(f"{out}/world.part", f"{out}/world")
        with ProcessPoolExecutor(args.jobs) as pool:
            run = lambda function, cells: list(tqdm(pool.map(function, *zip(*cells)), function.__name__, len(cells))) if cells else None
            firsts = list(dict.fromkeys((out, clips[0], arm) for arm in arms if ARMS[arm][1] is not None))
            distinct = list({(ARMS[arm][0], ARMS[arm][1]): (out, clip, arm) for out, clip, arm in firsts}.values())
            run(stage1, distinct)
            run(cell, [(out, clips[0], arm, rate) for arm in arms for rate in rates[arm]])
            best = {arm: choose(out, clips, arm, rates[arm])[0] for arm in arms}
            run(make_clip, [(out, clip) for clip in [*clips[1:], *([] if args.quick else ["full"])]])
            more = [(clip, arm) for k, clip in enumerate(clips[1:]) for arm in arms if arm in KEY or k == 0] + ([] if args.quick else [("full", "rf")])
            run(stage1, list({(clip, *ARMS[arm][:2]): (out, clip, arm) for clip, arm in more}.values()))
            run(cell, [(out, clip, arm, best[arm]) for clip, arm in more if arm in best])
    report({key: value for arm in arms for key, value in choose(out, [*clips, "full"], arm, rates[arm])[1].items()})


if __name__ == "__main__":
    main()
