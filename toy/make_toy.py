"""The toy world, and the three small pretrained models that look at it.

    python toy/make_toy.py                                            # draw the world into toy/data (about 20 s; drawn once)
    python toy/make_toy.py clip --seed 0 --out toy                    # toy/clip.safetensors
    python toy/make_toy.py clip --seed 0 --regime full --out elsewhere # the negative regime: attributes in every caption
    python toy/make_toy.py vae --out toy                              # toy/vae.safetensors
    python toy/make_toy.py vqgan --out toy                            # toy/vqgan.safetensors

Each training is a few minutes on one CPU core (OMP_NUM_THREADS=1 is fastest there). Every image shows one of ten categories and has
all nine attributes, one for each of MMVP's patterns. The committed CLIP names the category almost always, but reads the attributes
poorly: the deficiency that GenHancer mends.
"""
import argparse
import colorsys
import ctypes
import io
import json
import math
import os
import sys
import tarfile

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # so that `python toy/make_toy.py` finds vae.py and vqgan.py
from vae import AutoEncoder, AutoEncoderConfig  # noqa: E402
from vqgan import VQGAN, VQGANConfig  # noqa: E402

SIZE, ZOOM = 40, 4  # images are drawn at SIZE * ZOOM and box-reduced
CATEGORIES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "hexagon", "moon", "house")
COLOURS = {"red": (215, 40, 40), "orange": (240, 130, 25), "yellow": (225, 195, 30),
           "green": (40, 150, 60), "blue": (40, 85, 215), "purple": (145, 50, 175)}
SIDES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PLACES = {"upper left": (-1, -1), "upper right": (1, -1), "lower left": (-1, 1), "lower right": (1, 1)}
# MMVP's pattern: (attribute, its values, how a caption says it; {} is the value, * the category)
PATTERNS = {
    "Orientation and Direction": ("orientation", tuple(SIDES), "* pointing {}"),
    "Presence of Specific Features": ("presence", ("sunny", "sunless"), "{} *"),
    "State and Condition": ("state", ("filled", "hollow"), "{} *"),
    "Quantity and Count": ("count", ("one block", "two blocks", "three blocks", "four blocks"), "* above {}"),
    "Positional and Relational Context": ("position", tuple(PLACES), "* in the {}"),
    "Color and Appearance": ("colour", tuple(COLOURS), "{} *"),
    "Structural and Physical Characteristics": ("structure", ("plain", "striped"), "{} *"),
    "Text": ("text", tuple("XOTL"), "* with the letter {}"),
    "Viewpoint and Perspective": ("viewpoint", ("nearby", "distant"), "{} *"),
}
VALUES = {attribute: values for attribute, values, _ in PATTERNS.values()}
PHRASES = {attribute: phrase for attribute, _, phrase in PATTERNS.values()}
# The first word of every random seed: no two parts of the world share an image.
CAPTIONED, UNLABELLED, ZEROSHOT_DEV, DEV, _, TEST, ZEROSHOT = range(7)  # 4 was seen while an earlier recipe was chosen


def sample_scene(rng):
    """A category and nine attributes, all independent and uniform."""
    scene = {attribute: values[rng.integers(len(values))] for attribute, values in VALUES.items()}
    return {"category": CATEGORIES[rng.integers(len(CATEGORIES))], **scene}


def describe(category, *attributes):
    """English for a category and some (attribute, value): "a hollow red star pointing left"."""
    words = category
    for attribute, value in attributes:
        words = PHRASES[attribute].format(value).replace("*", words)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def regular(corners, turn=0.0):
    return [(math.sin(turn + 2 * math.pi * k / corners), -math.cos(turn + 2 * math.pi * k / corners)) for k in range(corners)]


def outline(category):
    """The polygon of a category about the origin, within about the unit disc, y downwards."""
    if category == "circle":
        return [(0.9 * x, 0.9 * y) for x, y in regular(24)]
    if category == "star":
        return [(x * r, y * r) for (x, y), r in zip(regular(10), (1.08, 0.45) * 5)]
    if category == "heart":
        angles = [2 * math.pi * k / 32 for k in range(32)]
        return [(math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 15) for a in angles]
    if category == "moon":  # an arc of the unit circle, and back along a flatter one
        far = [(-math.cos(a), math.sin(a)) for a in np.linspace(-2.2, 2.2, 20)]
        near = [(0.75 - 1.05 * math.cos(a), 0.9 * math.sin(a)) for a in np.linspace(1.1, -1.1, 14)]
        return [(x + 0.15, y) for x, y in far + near]
    return {"square": [(-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)], "triangle": [(0, -1), (.95, .75), (-.95, .75)],
            "diamond": [(0, -1.05), (.7, 0), (0, 1.05), (-.7, 0)], "hexagon": [(-.5, -.75), (.5, -.75), (1.1, 0), (.5, .75), (-.5, .75), (-1.1, 0)],
            "cross": [(-.32, -1), (.32, -1), (.32, -.32), (1, -.32), (1, .32), (.32, .32),
                      (.32, 1), (-.32, 1), (-.32, .32), (-1, .32), (-1, -.32), (-.32, -.32)],
            "house": [(0, -1), (1, -.2), (.7, -.2), (.7, .9), (-.7, .9), (-.7, -.2), (-1, -.2)]}[category]


OUTLINES = {category: np.array(outline(category)) for category in CATEGORIES}
STROKES = {"X": [(-1, -1, 1, 1), (-1, 1, 1, -1)], "T": [(-1, -1, 1, -1), (0, -1, 0, 1)], "L": [(-1, -1, -1, 1), (-1, 1, 1, 1)]}
RAYS = regular(8)
INK = (60, 60, 70)


def draw(scene, rng):
    """Draw a scene: (SIZE, SIZE, 3) uint8. `rng` gives the nuisance: jitter, rotation, shades, gain and noise."""
    shade = lambda colour: tuple(min(max(c + int(d), 0), 255) for c, d in zip(colour, rng.integers(-12, 13, 3)))
    place = lambda x, y: (ZOOM * (x + rng.uniform(-0.8, 0.8)), ZOOM * (y + rng.uniform(-0.8, 0.8)))  # the jitter, in pixels of the final image
    background = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0, 0.06), rng.uniform(0.86, 0.95))) * 255
    image = Image.new("RGB", (SIZE * ZOOM, SIZE * ZOOM), tuple(background.astype(int).tolist()))
    pen = ImageDraw.Draw(image)

    if scene["presence"] == "sunny":
        (x, y), gold = place(34, 6), shade((250, 180, 10))
        for dx, dy in RAYS:
            pen.line((x, y, x + 20 * dx, y + 20 * dy), gold, 5)
        pen.ellipse((x - 13, y - 13, x + 13, y + 13), gold)

    (x, y), ink = place(6, 6), shade(INK)
    if scene["text"] == "O":
        pen.ellipse((x - 16, y - 16, x + 16, y + 16), None, ink, 7)
    else:
        for x0, y0, x1, y1 in STROKES[scene["text"]]:
            pen.line((x + 14 * x0, y + 14 * y0, x + 14 * x1, y + 14 * y1), ink, 7)

    count = 1 + VALUES["count"].index(scene["count"])
    (x, y), ink = place(20, 37.6), shade(INK)
    for k in range(count):
        left = x + 24 * (k - (count - 1) / 2) - 6
        pen.rectangle((left, y - 6, left + 12, y + 6), ink)

    dx, dy = PLACES[scene["position"]]
    center = place(20 + 6 * dx, 20.5 + 2.5 * dy)
    radius = ZOOM * (8.3 if scene["viewpoint"] == "nearby" else 5.6)
    turn = rng.uniform(-0.1, 0.1)
    rotation = np.array(((math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))))
    points = [tuple(p) for p in (OUTLINES[scene["category"]] @ rotation.T * radius + center).tolist()]
    colour, dark = shade(COLOURS[scene["colour"]]), shade(INK)
    if scene["state"] == "filled":
        pen.polygon(points, colour)
    if scene["structure"] == "striped":
        inside, stripes = Image.new("1", image.size), Image.new("1", image.size)
        ImageDraw.Draw(inside).polygon(points, 1)
        for k in range(-2, 3):
            ImageDraw.Draw(stripes).line((0, center[1] + 16 * k, image.width, center[1] + 16 * k), 1, 5)
        image.paste(dark, mask=ImageChops.logical_and(inside, stripes))
    if scene["state"] == "hollow":
        pen.line([*points, points[0], points[1]], colour, 7, joint="curve")
    dx, dy = SIDES[scene["orientation"]]
    x, y = center[0] + (radius + 2) * dx, center[1] + (radius + 2) * dy
    pen.polygon([(x + 16 * dx, y + 16 * dy), (x + 10 * dy, y + 10 * dx), (x - 10 * dy, y - 10 * dx)], dark)

    pixels = np.asarray(image.reduce(ZOOM), dtype=np.float32) * rng.uniform(0.96, 1.04)
    pixels += rng.uniform(1, 4) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def draw_part(part, indices):
    """Images (uint8 arrays) and scenes of one part of the world; image i is the same however many are drawn."""
    for i in indices:
        rng = np.random.default_rng((part, i))
        scene = sample_scene(rng)
        yield draw(scene, rng), scene


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def write_shards(folder, indices, per_shard=10_000):
    """Tar shards as img2dataset writes them. The captions are empty: these images are the unlabelled ones."""
    os.makedirs(folder)
    for shard, start in enumerate(range(0, len(indices), per_shard)):
        with tarfile.open(f"{folder}/{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for k, (pixels, _) in enumerate(draw_part(UNLABELLED, indices[start:start + per_shard])):
                key = f"{shard:05d}{k:04d}"
                about = {"caption": "", "key": key, "status": "success", "width": SIZE, "height": SIZE}
                for kind, data in (("jpg", jpeg(pixels)), ("txt", b""), ("json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{key}.{kind}")  # its mtime is 0: equal worlds are equal bytes
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                yield


def write_benchmark(folder, seed, pairs=100):
    """A benchmark in MMVP-VLM's layout: the two images of a pair differ in one attribute (and in the nuisance)."""
    rows, number = ["Question ID,Type,Statement"], 0
    for k, (pattern, (attribute, values, _)) in enumerate(PATTERNS.items()):
        os.makedirs(f"{folder}/MLLM_VLM Images/{pattern}")
        for pair in range(pairs):
            rng = np.random.default_rng((seed, k, pair))
            scene = sample_scene(rng)
            for value in rng.choice(values, 2, replace=False):
                number += 1
                rows.append(f"{number},{pattern},{describe(scene['category'], (attribute, value))}")
                with open(f"{folder}/MLLM_VLM Images/{pattern}/{number}.jpg", "wb") as file:
                    file.write(jpeg(draw({**scene, attribute: str(value)}, rng)))
                yield
    with open(f"{folder}/Questions.csv", "w") as file:
        file.write("\n".join(rows) + "\n")


def write_classes(folder, seed, images=2000):
    """A folder of images for each category."""
    for category in CATEGORIES:
        os.makedirs(f"{folder}/{category}")
    for i, (pixels, scene) in enumerate(draw_part(seed, range(images))):
        with open(f"{folder}/{scene['category']}/{i:04d}.jpg", "wb") as file:
            file.write(jpeg(pixels))
        yield


TRAIN, HELD_OUT = range(23_488), range(23_488, 24_000)


def draw_world(folder):
    """Draw the toy world into `folder`: train/, val/, mmvp/, zeroshot/, and mmvp-dev/, zeroshot-dev/ to choose settings on. Not twice."""
    if os.path.isdir(folder):
        return
    folder = os.path.abspath(folder)
    new = f"{folder}.{os.getpid()}.tmp"  # moved into place when complete, so that a killed run leaves no half world
    os.makedirs(new)
    parts = (write_shards(f"{new}/train", TRAIN), write_shards(f"{new}/val", HELD_OUT), write_benchmark(f"{new}/mmvp", TEST),
             write_benchmark(f"{new}/mmvp-dev", DEV), write_classes(f"{new}/zeroshot", ZEROSHOT), write_classes(f"{new}/zeroshot-dev", ZEROSHOT_DEV))
    with tqdm(total=24_000 + 2 * (1800 + 2000), desc="drawing the toy world", unit="image") as bar:
        for part in parts:
            for _ in part:
                bar.update()
    os.replace(new, folder)


def tensor_part(part, indices, what):
    """One part of the world in memory: images (N, 3, SIZE, SIZE) uint8, and their scenes."""
    drawn = list(tqdm(draw_part(part, indices), total=len(indices), desc=f"drawing {what}", unit="image"))
    return torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).contiguous(), [scene for _, scene in drawn]


def fit(parameters, loss_of_step, steps, lr, weight_decay=0.0):
    """AdamW with a one-cycle rate: what the three trainings share. `loss_of_step(step)` draws its own batch."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    with tqdm(range(steps), desc="training", unit="step") as bar:
        for step in bar:
            # bf16 doubles the speed where the CPU has it, but the backward of CPU flash attention is slow there: hence MATH
            with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                loss = loss_of_step(step)
            if not loss.isfinite():
                sys.exit(f"make_toy.py: the loss is {loss.item()} at step {step}: try another --seed")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 19:
                bar.set_postfix(loss=f"{loss.item():.4f}")


def save(module, path, metadata=None):
    """float16 safetensors, moved into place when complete. Its bytes depend on the weights alone."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    with open(f"{path}.tmp", "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata))
    os.replace(f"{path}.tmp", path)
    print(f"{path}: {os.path.getsize(path) / 2**20:.1f} MiB")


def caption(scene, chance, rng):
    """A caption that names the category, and each attribute with probability `chance`, in random order."""
    named = [attribute for attribute in rng.permutation(list(VALUES)) if rng.uniform() < chance]
    return "a photo of " + describe(scene["category"], *((a, scene[a]) for a in named)) + ("" if named else ".")


def train_clip(out, seed, steps, regime):
    """A CLIP that is weak in the right way: few captions name attributes, so that the text tower learns the words for them,
    while the image tower, having seen each on some 300 images only, reads them noisily. `full` names them on all images."""
    import open_clip
    open_clip.add_model_config(os.path.join(HERE, "toy-clip.json"))
    clip, tokenizer = open_clip.create_model("toy-clip"), open_clip.get_tokenizer("toy-clip")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.visual.image_mean, clip.visual.image_std))
    images, scenes = tensor_part(CAPTIONED, range(24_000), "captioned images")
    rich = 24_000 if regime == "full" else 1500  # how many captions name attributes
    rng = np.random.default_rng((CAPTIONED, 24_000))  # a seed that no image has
    texts = tokenizer([caption(scene, 0.2 if i < rich else 0.0, rng) for i, scene in enumerate(scenes)])

    def loss(step):
        pick = torch.cat((torch.randint(rich, (80,)), torch.randint(len(images), (80,))))  # half of each batch from the rich
        distinct, which = texts[pick].unique(dim=0, return_inverse=True)  # "a photo of a star." is encoded once
        image = clip.encode_image((images[pick] / 255 - mean) / std, normalize=True)
        text = clip.encode_text(distinct, normalize=True)[which]
        logits, target = (clip.logit_scale.exp() * image @ text.T).float(), torch.arange(len(pick))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit(clip.parameters(), loss, steps, lr=2e-3, weight_decay=0.05)
    unused = torch.ones(len(clip.token_embedding.weight), dtype=torch.bool)
    unused[texts.unique()] = False
    clip.token_embedding.weight.data[unused] = 0  # words that no caption has: zeros compress
    save(clip, os.path.join(out, "clip.safetensors"))


def unlabelled():
    """Training and held-out images of the two tokenizers: uint8 (N, 3, SIZE, SIZE)."""
    return tensor_part(UNLABELLED, TRAIN, "training images")[0], tensor_part(UNLABELLED, HELD_OUT, "held-out images")[0]


def batch(images, size):
    """A random batch, in [-1, 1]."""
    return images[torch.randint(len(images), (size,))] / 127.5 - 1


def psnr(images, reconstruct):
    """In dB, from the mean squared error over all `images` (uint8)."""
    error = [F.mse_loss(reconstruct(x / 127.5 - 1).clamp(-1, 1) / 2, (x / 127.5 - 1) / 2) for x in images.split(64)]
    return -10 * math.log10(torch.stack(error).mean())


def distance(reconstruction, images):
    return F.mse_loss(reconstruction.float(), images) + 0.2 * F.l1_loss(reconstruction.float(), images)


def train_vae(out, steps):
    """Factor 4, 4 channels: latents (4, 10, 10). The KL term only keeps the latents' scale in bounds."""
    train, held_out = unlabelled()
    vae = AutoEncoder(AutoEncoderConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4, scale_factor=1.0, shift_factor=0.0))

    def loss(step):
        x = batch(train, 32)
        mean, logvar = (m.float() for m in vae.moments(x))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return distance(vae.decoder(z), x) + 1e-4 * kl

    fit(vae.parameters(), loss, steps, lr=2e-3)
    with torch.no_grad():
        z = torch.cat([vae.encode(x / 127.5 - 1) for x in train[:2048].split(64)])
        print(f"held-out PSNR {psnr(held_out, lambda x: vae.decode(vae.encode(x))):.2f} dB")
    save(vae, os.path.join(out, "vae.safetensors"), {"scale_factor": f"{1 / z.std():.4f}", "shift_factor": f"{z.mean():.4f}"})


def train_vqgan(out, steps, size=512, warm=0.15):
    """Factor 8: 5 x 5 codes of 512. Reconstruction, codebook and commitment losses; no discriminator."""
    train, held_out = unlabelled()
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1, attn_resolutions=(), z_channels=64, n_embed=size, embed_dim=8))
    codebook, uses = vqgan.quantize.embedding.weight, torch.zeros(size)
    first = int(steps * warm)  # an autoencoder first: codes are seeded from vectors that already say something

    def loss(step):
        x = batch(train, 32)
        z = vqgan.pre_quantize(x).float()  # (B, embed_dim, h, w)
        extra, codes = 0, z
        if step >= first:
            if (step - first) % 50 == 0 and step < 0.8 * steps:  # re-seed the codes that the last 50 batches did not use
                vectors, dead = z.detach().transpose(0, 1).flatten(1).T, (uses == 0).nonzero()[:, 0]
                codebook.data[dead] = vectors[torch.randperm(len(vectors))[:len(dead)]]
                uses.zero_()
            indices = vqgan.quantize(z)
            uses.add_(indices.flatten().bincount(minlength=size))
            codes = F.embedding(indices, codebook).permute(0, 3, 1, 2)
            extra = F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
            codes = z + (codes - z).detach()  # straight through: the gradient skips the choice
        return distance(vqgan.decoder(vqgan.post_quant_conv(codes)), x) + extra

    fit(vqgan.parameters(), loss, steps, lr=2e-3)
    with torch.no_grad():
        used = torch.cat([vqgan.encode(x / 127.5 - 1).flatten() for x in held_out.split(64)]).unique()
        print(f"held-out PSNR {psnr(held_out, lambda x: vqgan.decode(vqgan.encode(x))):.2f} dB, {len(used)} of {size} codes used")
    save(vqgan, os.path.join(out, "vqgan.safetensors"))


def main():
    parser = argparse.ArgumentParser(description="Draw the toy world, or train one of its pretrained models.")
    parser.add_argument("what", nargs="?", default="world", choices=("world", "clip", "vae", "vqgan"))
    parser.add_argument("--out", help="the folder of the world (toy/data), or of the weights (toy)")
    parser.add_argument("--seed", type=int, default=0, help="of a training; the world's seeds are fixed")
    parser.add_argument("--steps", type=int, help="of a training")
    parser.add_argument("--regime", default="weak", choices=("weak", "full"), help="clip: attributes in 1,500 captions, or in all 24,000")
    parser.error = lambda message: sys.exit(print(f"make_toy.py: {message}", file=sys.stderr) or 2)  # one line, no usage
    args = parser.parse_args()
    if args.what == "world":
        return draw_world(args.out or os.path.join(HERE, "data"))
    if sys.platform == "linux":  # glibc hands large blocks back at once, and every step faults them in again: keep them
        libc = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 2**28)
    torch.manual_seed(args.seed)
    out = args.out or HERE
    if args.what == "clip":
        train_clip(out, args.seed, args.steps or 1500, args.regime)
    elif args.what == "vae":
        train_vae(out, args.steps or 2000)
    else:
        train_vqgan(out, args.steps or 1500)


if __name__ == "__main__":
    main()
