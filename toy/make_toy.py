"""The toy world, and the three small pretrained models that look at it.

    python toy/make_toy.py                         # draws the world into toy/data, once
    python toy/make_toy.py clip --seed 0           # toy/clip.safetensors
    python toy/make_toy.py clip --regime full --out elsewhere   # attributes in every caption
    python toy/make_toy.py vae                     # toy/vae.safetensors
    python toy/make_toy.py vqgan                   # toy/vqgan.safetensors

Each training takes a few minutes on one CPU core. Every image shows one of ten categories, and
has nine attributes, one for each pattern of MMVP. The committed CLIP names the category almost
always, but reads the attributes poorly: this is the deficiency that GenHancer is to repair.
"""
# These lines must run before the other imports.
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: a busy machine stays fast

import colorsys
import io
import itertools
import json
import math
import multiprocessing
import signal
import tarfile
import tempfile
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))  # `python toy/make_toy.py` must find vae.py and vqgan.py
from genhancer import Parser, UserError, check_writable, run_command, write_weights
from vae import AutoEncoder, AutoEncoderConfig
from vqgan import VQGAN, VQGANConfig

# ---- What an image shows -------------------------------------------------------------------------

CATEGORIES = [
    "circle", "square", "triangle", "diamond", "star",
    "cross", "heart", "hexagon", "moon", "house",
]
COLOURS = {
    "red": (215, 40, 40),
    "orange": (240, 130, 25),
    "yellow": (225, 195, 30),
    "green": (40, 150, 60),
    "blue": (40, 85, 215),
    "purple": (145, 50, 175),
}
SIDES = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
PLACES = {
    "upper left": (-1, -1),
    "upper right": (1, -1),
    "lower left": (-1, 1),
    "lower right": (1, 1),
}
COUNTS = ("one block", "two blocks", "three blocks", "four blocks")

# MMVP's pattern: the attribute that stands for it, the attribute's values, and how a statement
# says it, with {} for the value and * for the category.
PATTERNS = {
    "Orientation and Direction": ("orientation", tuple(SIDES), "* pointing {}"),
    "Presence of Specific Features": ("presence", ("sunny", "sunless"), "{} *"),
    "State and Condition": ("state", ("filled", "hollow"), "{} *"),
    "Quantity and Count": ("count", COUNTS, "* above {}"),
    "Positional and Relational Context": ("position", tuple(PLACES), "* in the {}"),
    "Color and Appearance": ("colour", tuple(COLOURS), "{} *"),
    "Structural and Physical Characteristics": ("structure", ("plain", "striped"), "{} *"),
    "Text": ("text", tuple("XOTL"), "* with the letter {}"),
    "Viewpoint and Perspective": ("viewpoint", ("nearby", "distant"), "{} *"),
}
VALUES = {attribute: values for attribute, values, _ in PATTERNS.values()}
PHRASES = {attribute: phrase for attribute, _, phrase in PATTERNS.values()}


def sample_scene(rng):
    """A category and nine attributes, all independent and uniform: a dict of words."""
    attributes = {}
    for attribute, values in VALUES.items():
        attributes[attribute] = values[rng.integers(len(values))]
    category = CATEGORIES[rng.integers(len(CATEGORIES))]
    return {"category": category, **attributes}


def describe(category, *attributes):
    """English for a category and (attribute, value) pairs: "a hollow red star pointing left"."""
    words = category
    for attribute, value in attributes:
        words = PHRASES[attribute].format(value).replace("*", words)
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


# ---- Drawing one image ---------------------------------------------------------------------------

SIZE = 40  # pixels a side
ZOOM = 4  # an image is drawn at SIZE * ZOOM, then each ZOOM x ZOOM box is averaged
INK = (60, 60, 70)
GOLD = (250, 180, 10)


def regular(corners):
    """A regular polygon in the unit circle: its first corner on top, clockwise."""
    angles = [2 * math.pi * k / corners for k in range(corners)]
    return [(math.sin(angle), -math.cos(angle)) for angle in angles]


def star():
    return regular(10) * np.array([[1.08], [0.45]] * 5)


def heart():
    points = []
    for k in range(32):
        a = 2 * math.pi * k / 32
        height = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((math.sin(a) ** 3, -height / 15))
    return points


def moon():
    """An arc of the unit circle, and back along a flatter one."""
    points = []
    for a in np.linspace(-2.2, 2.2, 20):
        points.append((0.15 - math.cos(a), math.sin(a)))
    for a in np.linspace(1.1, -1.1, 14):
        points.append((0.75 - 1.05 * math.cos(a) + 0.15, 0.9 * math.sin(a)))
    return points


# fmt: off
CROSS = [
    (-0.32, -1), (0.32, -1),
    (0.32, -0.32), (1, -0.32),
    (1, 0.32), (0.32, 0.32),
    (0.32, 1), (-0.32, 1),
    (-0.32, 0.32), (-1, 0.32),
    (-1, -0.32), (-0.32, -0.32),
]
HEXAGON = [
    (-0.5, -0.75), (0.5, -0.75),
    (1.1, 0),
    (0.5, 0.75), (-0.5, 0.75),
    (-1.1, 0),
]
HOUSE = [
    (0, -1),
    (1, -0.2), (0.7, -0.2),
    (0.7, 0.9), (-0.7, 0.9),
    (-0.7, -0.2), (-1, -0.2),
]
# fmt: on
# The polygon of each category about the origin, within about the unit circle, y downwards.
POLYGONS = {
    "circle": [(0.9 * x, 0.9 * y) for x, y in regular(24)],
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "diamond": [(0, -1.05), (0.7, 0), (0, 1.05), (-0.7, 0)],
    "star": star(),
    "cross": CROSS,
    "heart": heart(),
    "hexagon": HEXAGON,
    "moon": moon(),
    "house": HOUSE,
}
POLYGONS = {category: np.array(points) for category, points in POLYGONS.items()}
RAYS = regular(8)
STROKES = {
    "X": [(-1, -1, 1, 1), (-1, 1, 1, -1)],
    "T": [(-1, -1, 1, -1), (0, -1, 0, 1)],
    "L": [(-1, -1, -1, 1), (-1, 1, 1, 1)],
}


def draw(scene, rng):
    """Draw a scene: (SIZE, SIZE, 3) uint8.

    `rng` gives what no statement speaks of: jitter, rotation, shades, brightness and noise.
    The order of its draws is part of the world.
    """
    hue = rng.uniform()
    saturation = rng.uniform(0, 0.06)
    background = np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.86, 0.95))) * 255
    side = SIZE * ZOOM
    image = Image.new("RGB", (side, side), tuple(background.astype(int).tolist()))
    pen = ImageDraw.Draw(image)

    if scene["presence"] == "sunny":
        draw_sun(pen, rng)
    draw_letter(pen, scene["text"], rng)
    draw_blocks(pen, 1 + COUNTS.index(scene["count"]), rng)
    draw_shape(image, pen, scene, rng)

    pixels = np.asarray(image.reduce(ZOOM), dtype=np.float32)
    pixels = pixels * rng.uniform(0.96, 1.04)
    pixels += rng.uniform(1, 4) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def jitter(x, y, rng):
    """A point near (x, y), which counts the final image's pixels; the result the drawn one's."""
    x += rng.uniform(-0.8, 0.8)
    y += rng.uniform(-0.8, 0.8)
    return ZOOM * x, ZOOM * y


def shade(colour, rng):
    shifted = colour + rng.integers(-12, 13, 3)
    return tuple(shifted.clip(0, 255).tolist())


def draw_sun(pen, rng):
    x, y = jitter(34, 6, rng)
    gold = shade(GOLD, rng)
    for dx, dy in RAYS:
        pen.line((x, y, x + 20 * dx, y + 20 * dy), gold, 5)
    pen.circle((x, y), 13, gold)


def draw_letter(pen, letter, rng):
    x, y = jitter(6, 6, rng)
    ink = shade(INK, rng)
    if letter == "O":
        pen.circle((x, y), 16, None, ink, 7)
        return
    for x0, y0, x1, y1 in STROKES[letter]:
        pen.line((x + 14 * x0, y + 14 * y0, x + 14 * x1, y + 14 * y1), ink, 7)


def draw_blocks(pen, count, rng):
    x, y = jitter(20, 37.6, rng)
    ink = shade(INK, rng)
    for k in range(count):
        left = x + 24 * (k - (count - 1) / 2) - 6
        pen.rectangle((left, y - 6, left + 12, y + 6), ink)


def draw_shape(image, pen, scene, rng):
    """The category's polygon in its place, and the pointer at one of its sides."""
    dx, dy = PLACES[scene["position"]]
    center = jitter(20 + 6 * dx, 20.5 + 2.5 * dy, rng)
    radius = ZOOM * (8.3 if scene["viewpoint"] == "nearby" else 5.6)
    turn = rng.uniform(-0.1, 0.1)
    cos, sin = math.cos(turn), math.sin(turn)
    rotation = np.array(((cos, -sin), (sin, cos)))
    polygon = POLYGONS[scene["category"]] @ rotation.T * radius + center
    points = [tuple(point) for point in polygon.tolist()]
    colour = shade(COLOURS[scene["colour"]], rng)
    ink = shade(INK, rng)

    if scene["state"] == "filled":
        pen.polygon(points, colour)
    if scene["structure"] == "striped":
        inside = Image.new("1", image.size)
        ImageDraw.Draw(inside).polygon(points, 1)
        stripes = Image.new("1", image.size)
        for k in range(-2, 3):
            y = center[1] + 16 * k
            ImageDraw.Draw(stripes).line((0, y, image.width, y), 1, 5)
        image.paste(ink, mask=ImageChops.logical_and(inside, stripes))
    if scene["state"] == "hollow":
        pen.line([*points, points[0], points[1]], colour, 7, joint="curve")

    dx, dy = SIDES[scene["orientation"]]
    x = center[0] + (radius + 2) * dx
    y = center[1] + (radius + 2) * dy
    tip = (x + 16 * dx, y + 16 * dy)
    pen.polygon([tip, (x + 10 * dy, y + 10 * dx), (x - 10 * dy, y - 10 * dx)], ink)


# ---- The world: its parts, and how they are written ----------------------------------------------

# The first word of every random seed: no two parts of the world share an image. Part 4 was the
# test benchmark of an earlier recipe, and is not drawn again.
CAPTIONED, UNLABELLED, ZEROSHOT_DEV, DEV, TEST, ZEROSHOT = 0, 1, 2, 3, 5, 6
N_CAPTIONED = 24_000
N_TRAIN = 23_488
N_HELD_OUT = 512
FOLDERS = ("train", "val", "mmvp", "mmvp-dev", "zeroshot", "zeroshot-dev")


def draw_world(folder, train=N_TRAIN, held_out=N_HELD_OUT, pairs=100, images=2000):
    """Draw the toy world into `folder`, unless it is there: whole, or not at all.

    train/ and val/ hold tar shards with `train` and `held_out` unlabelled images. mmvp/ is a
    benchmark with `pairs` pairs for each pattern, zeroshot/ a classification with `images`
    images; mmvp-dev/ and zeroshot-dev/ are others of the same kind, to choose settings on.
    The same sizes give the same bytes. Raises UserError if `folder` is there and is no world,
    or cannot be written.
    """
    folder = os.path.abspath(folder)
    if os.path.isdir(folder):
        check_world(folder)
        return
    parent, name = os.path.split(folder)
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix=".part", dir=parent) as private:
            new = os.path.join(private, name)
            os.mkdir(new)
            parts = (
                write_shards(f"{new}/train", range(train)),
                write_shards(f"{new}/val", range(train, train + held_out)),
                write_benchmark(f"{new}/mmvp", TEST, pairs),
                write_benchmark(f"{new}/mmvp-dev", DEV, pairs),
                write_classes(f"{new}/zeroshot", ZEROSHOT, images),
                write_classes(f"{new}/zeroshot-dev", ZEROSHOT_DEV, images),
            )
            total = train + held_out + 2 * (2 * pairs * len(PATTERNS) + images)
            with tqdm(total=total, desc="drawing the toy world", unit="image", disable=None) as bar:
                for part in parts:
                    for _ in part:
                        bar.update()
            if not os.path.isdir(folder):  # unless another process was faster
                os.rename(new, folder)
    except OSError as error:
        reason = error.strerror or error
        advice = "free some space or fix the folder, then run the same command again"
        raise UserError(f"{folder} could not be drawn ({reason}): {advice}") from None


def check_world(folder):
    for part in FOLDERS:
        if not os.path.isdir(f"{folder}/{part}"):
            raise UserError(f"{folder} is there but has no {part}/: move it away, then run again")


def in_parallel(function, jobs):
    """`function` of each job, in order, computed on all cores."""
    # A forked process does not import torch anew.
    method = "fork" if sys.platform == "linux" else None
    context = multiprocessing.get_context(method)
    # Ctrl-C is the business of the process that started the others: they ignore it.
    quiet = (signal.SIGINT, signal.SIG_IGN)
    with context.Pool(initializer=signal.signal, initargs=quiet) as pool:
        yield from pool.imap(function, jobs, chunksize=32)


def draw_sample(job):
    """Image `index` of a part of the world, (part, index) -> (pixels, scene).

    It is the same however many are drawn.
    """
    rng = np.random.default_rng(job)
    scene = sample_scene(rng)
    return draw(scene, rng), scene


def draw_part(part, indices):
    """Yield the images (uint8 arrays) and scenes of one part of the world."""
    return in_parallel(draw_sample, [(part, index) for index in indices])


def draw_jpeg(job):
    """The same image as a file: (part, index) -> (bytes, scene)."""
    pixels, scene = draw_sample(job)
    return jpeg(pixels), scene


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def write_shards(folder, indices, per_shard=10_000):
    """Write unlabelled images as img2dataset does, in tar shards; yield after each image.

    The captions are empty.
    """
    os.makedirs(folder)
    drawn = in_parallel(draw_jpeg, [(UNLABELLED, index) for index in indices])
    for shard in range(math.ceil(len(indices) / per_shard)):
        path = f"{folder}/{shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for k, (data, _) in enumerate(itertools.islice(drawn, per_shard)):
                key = f"{shard:05d}{k:04d}"
                about = {"caption": "", "key": key, "status": "success"}
                about |= {"width": SIZE, "height": SIZE}
                add_member(tar, f"{key}.jpg", data)
                add_member(tar, f"{key}.txt", b"")
                add_member(tar, f"{key}.json", json.dumps(about).encode())
                yield


def add_member(tar, name, data):
    member = tarfile.TarInfo(name)  # its time is 0: equal worlds are equal bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_benchmark(folder, seed, pairs=100):
    """Write a benchmark in the layout of MMVP-VLM; yield after each image.

    The two images of a pair differ in one attribute, and in what no statement speaks of.
    """
    for pattern in PATTERNS:
        os.makedirs(f"{folder}/MLLM_VLM Images/{pattern}")
    jobs = [(seed, k, pair) for k in range(len(PATTERNS)) for pair in range(pairs)]
    rows = ["Question ID,Type,Statement"]
    for pattern, pair in in_parallel(draw_pair, jobs):
        for data, statement in pair:
            number = len(rows)
            rows.append(f"{number},{pattern},{statement}")
            with open(f"{folder}/MLLM_VLM Images/{pattern}/{number}.jpg", "wb") as file:
                file.write(data)
            yield
    with open(f"{folder}/Questions.csv", "w", encoding="utf-8") as file:
        file.write("\n".join(rows) + "\n")


def draw_pair(job):
    """(seed, pattern's number, pair's number) -> pattern, two (JPEG file, statement)."""
    rng = np.random.default_rng(job)
    scene = sample_scene(rng)
    pattern = list(PATTERNS)[job[1]]
    attribute, values, _ = PATTERNS[pattern]
    pair = []
    for value in rng.choice(values, 2, replace=False).tolist():
        statement = describe(scene["category"], (attribute, value))
        pixels = draw({**scene, attribute: value}, rng)
        pair.append((jpeg(pixels), statement))
    return pattern, pair


def write_classes(folder, seed, images=2000):
    """Write a folder of images for each category; yield after each image."""
    for category in CATEGORIES:
        os.makedirs(f"{folder}/{category}")
    jobs = [(seed, index) for index in range(images)]
    for index, (data, scene) in enumerate(in_parallel(draw_jpeg, jobs)):
        with open(f"{folder}/{scene['category']}/{index:04d}.jpg", "wb") as file:
            file.write(data)
        yield


# ---- What the three trainings share --------------------------------------------------------------


def tensor_part(part, indices, what):
    """One part of the world in memory: images (N, 3, SIZE, SIZE) uint8, and their scenes."""
    images = torch.empty(len(indices), 3, SIZE, SIZE, dtype=torch.uint8)
    scenes = []
    drawn = draw_part(part, indices)
    for pixels, scene in tqdm(drawn, f"drawing {what}", len(indices), unit="image", disable=None):
        images[len(scenes)] = torch.from_numpy(pixels).permute(2, 0, 1)
        scenes.append(scene)
    return images, scenes


def unlabelled():
    """What the autoencoders learn from, and what they are judged by: (N, 3, SIZE, SIZE) uint8."""
    held_out_indices = range(N_TRAIN, N_TRAIN + N_HELD_OUT)
    train, _ = tensor_part(UNLABELLED, range(N_TRAIN), "training images")
    held_out, _ = tensor_part(UNLABELLED, held_out_indices, "held-out images")
    return train, held_out


def scale(images):
    """uint8 to [-1, 1]."""
    return images / 127.5 - 1


def random_batch(images, size):
    return scale(images[torch.randint(len(images), (size,))])


def fit(parameters, loss_of_step, steps, lr, weight_decay=0.0):
    """Train with AdamW and a one-cycle rate. `loss_of_step(step)` draws its own batch."""
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    bf16 = torch.cpu._is_avx512_bf16_supported()  # elsewhere it is slower than float32
    with tqdm(range(steps), desc="training", unit="step", disable=None) as bar:
        for step in bar:
            # The CPU's flash attention is slow backwards, hence MATH.
            with torch.autocast("cpu", torch.bfloat16, bf16), sdpa_kernel(SDPBackend.MATH):
                loss = loss_of_step(step)
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()} at step {step}: try another --seed")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 19:
                bar.set_postfix(loss=f"{loss.item():.4f}")


def save(module, path, metadata=None):
    """Write the weights in float16."""
    tensors = {name: tensor.half() for name, tensor in module.state_dict().items()}
    write_weights(path, tensors, metadata)
    print(f"{path}: {os.path.getsize(path) / 2**20:.1f} MiB")


# ---- CLIP ----------------------------------------------------------------------------------------


def train_clip(path, steps, regime):
    """Train a CLIP that is weak in the right way.

    Few captions name attributes ("weak"). So the text tower learns the words for them, while the
    image tower, which has seen each on some 300 images only, reads them noisily. With the regime
    "full", every caption may name them.
    """
    import open_clip

    open_clip.add_model_config(os.path.join(HERE, "toy-clip.json"))
    clip = open_clip.create_model("toy-clip")
    tokenizer = open_clip.get_tokenizer("toy-clip")
    mean = torch.tensor(clip.visual.image_mean).view(3, 1, 1)
    std = torch.tensor(clip.visual.image_std).view(3, 1, 1)
    images, scenes = tensor_part(CAPTIONED, range(N_CAPTIONED), "captioned images")
    rich = {"weak": 1500, "full": N_CAPTIONED}[regime]  # how many captions may name attributes
    rng = np.random.default_rng((CAPTIONED, N_CAPTIONED))  # a seed that no image has
    captions = [caption(scene, 0.2 if i < rich else 0.0, rng) for i, scene in enumerate(scenes)]
    texts = tokenizer(captions)

    def loss(step):
        half_rich = torch.randint(rich, (80,))
        rest = torch.randint(len(images), (80,))
        pick = torch.cat((half_rich, rest))
        distinct, which = texts[pick].unique(dim=0, return_inverse=True)  # encode each text once
        image = clip.encode_image((images[pick] / 255 - mean) / std, normalize=True)
        text = clip.encode_text(distinct, normalize=True)[which]
        logits = (clip.logit_scale.exp() * image @ text.T).float()
        target = torch.arange(len(pick))
        of_images = F.cross_entropy(logits, target)
        of_texts = F.cross_entropy(logits.T, target)
        return (of_images + of_texts) / 2

    fit(clip.parameters(), loss, steps, lr=2e-3, weight_decay=0.05)
    embedding = clip.token_embedding.weight.data
    unused = torch.ones(len(embedding), dtype=torch.bool)
    unused[texts.unique()] = False
    embedding[unused] = 0  # the words of no caption: zeros compress
    save(clip, path)


def caption(scene, chance, rng):
    """Name the category, and each attribute with probability `chance`, in random order."""
    named = [attribute for attribute in rng.permutation(list(VALUES)) if rng.uniform() < chance]
    words = describe(scene["category"], *[(attribute, scene[attribute]) for attribute in named])
    end = "" if named else "."
    return f"a photo of {words}{end}"


# ---- The two autoencoders ------------------------------------------------------------------------


def train_vae(path, steps):
    """Train a VAE: factor 4, 4 channels, hence latents (4, 10, 10).

    Every training step of `--preset toy` encodes, and convolutions at full resolution are slow on
    a CPU. So the encoder has no residual blocks before its middle.
    """
    train, held_out = unlabelled()
    config = AutoEncoderConfig(
        ch=32,
        ch_mult=(1, 1, 1),
        num_res_blocks=0,
        z_channels=4,
        scale_factor=1.0,
        shift_factor=0.0,
    )
    vae = AutoEncoder(config)

    def loss(step):
        x = random_batch(train, 32)
        mean, logvar = vae.moments(x)
        mean = mean.float()
        logvar = logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        reconstruction = vae.decoder(z)
        return distance(reconstruction, x) + 1e-4 * kl  # it only keeps the latents in bounds

    fit(vae.parameters(), loss, steps, lr=2e-3)
    with torch.no_grad():
        z = torch.cat([vae.encode(scale(x)) for x in train[:2048].split(64)])
        quality = psnr(held_out, vae)
    print(f"PSNR on held-out images: {quality:.2f} dB")
    config.scale_factor = round(1 / z.std().item(), 4)
    config.shift_factor = round(z.mean().item(), 4)
    save(vae, path, {"vae": asdict(config)})


def train_vqgan(path, steps):
    """Train a VQ-GAN: factor 8, hence 5 x 5 codes of 512.

    Reconstruction, codebook and commitment losses (VQ-VAE, Eq. 3); no discriminator.
    """
    train, held_out = unlabelled()
    config = VQGANConfig(
        ch=32,
        ch_mult=(1, 1, 2, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        z_channels=64,
        n_embed=512,
        embed_dim=8,
    )
    vqgan = VQGAN(config)
    codebook = vqgan.quantize.embedding.weight
    uses = torch.zeros(len(codebook))
    warm = int(0.15 * steps)  # plain autoencoding first, so that codes start from useful vectors

    def loss(step):
        x = random_batch(train, 32)
        z = vqgan.pre_quantize(x).float()  # (B, embed_dim, h, w)
        if step < warm:
            reconstruction = vqgan.decoder(vqgan.post_quant_conv(z))
            return distance(reconstruction, x)
        if (step - warm) % 50 == 0 and step < 0.8 * steps:
            reseed(codebook, uses, z)
        indices = vqgan.quantize(z)
        uses.add_(indices.flatten().bincount(minlength=len(codebook)))
        codes = F.embedding(indices, codebook).permute(0, 3, 1, 2)
        commitment = F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
        codes = z + (codes - z).detach()  # straight through: the gradient skips the choice
        reconstruction = vqgan.decoder(vqgan.post_quant_conv(codes))
        return distance(reconstruction, x) + commitment

    fit(vqgan.parameters(), loss, steps, lr=2e-3)
    with torch.no_grad():
        indices = [vqgan.encode(scale(x)).flatten() for x in held_out.split(64)]
        quality = psnr(held_out, vqgan)
    used = len(torch.cat(indices).unique())
    print(f"PSNR on held-out images: {quality:.2f} dB; {used} of {len(codebook)} codes used")
    save(vqgan, path, {"vqgan": asdict(config)})


def reseed(codebook, uses, z):
    """Move the codes that were not used of late onto vectors of this batch; count anew."""
    vectors = z.detach().transpose(0, 1).flatten(1).T
    dead = (uses == 0).nonzero()[:, 0]
    codebook.data[dead] = vectors[torch.randperm(len(vectors))[: len(dead)]]
    uses.zero_()


def distance(reconstruction, images):
    reconstruction = reconstruction.float()
    squared = F.mse_loss(reconstruction, images)
    absolute = F.l1_loss(reconstruction, images)
    return squared + 0.2 * absolute


def psnr(images, autoencoder):
    """In dB, from the mean squared error over all `images` (uint8), values in [0, 1]."""
    errors = []
    for batch in images.split(64):
        x = scale(batch)
        reconstruction = autoencoder.decode(autoencoder.encode(x)).clamp(-1, 1)
        errors.append(F.mse_loss(reconstruction / 2, x / 2))
    return -10 * math.log10(torch.stack(errors).mean())


# ---- The command ---------------------------------------------------------------------------------

STEPS = {"clip": 1500, "vae": 2000, "vqgan": 1500}


def parse_args(argv):
    parser = Parser(
        prog="make_toy.py",
        description="Draw the toy world, or train one of its pretrained models.",
    )
    parser.add_argument("what", nargs="?", default="world", choices=("world", *STEPS))
    parser.add_argument("--out", help="folder of the world (toy/data) or of the weights (toy)")
    parser.add_argument("--seed", type=int, default=0, help="of a training (0), not of the world")
    parser.add_argument("--steps", type=int, help="of a training")
    help = "of clip: attributes in 1,500 captions (weak, the default) or in all 24,000"
    parser.add_argument("--regime", choices=("weak", "full"), default="weak", help=help)
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps} is out of range: at least 1")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} is out of range: 0 or more")
    return args


def run(argv):
    args = parse_args(argv)
    if args.what == "world":
        draw_world(args.out or os.path.join(HERE, "data"))
        return
    torch.manual_seed(args.seed)
    steps = args.steps or STEPS[args.what]
    path = os.path.join(args.out or HERE, f"{args.what}.safetensors")
    check_writable(path)
    if args.what == "clip":
        train_clip(path, steps, args.regime)
    elif args.what == "vae":
        train_vae(path, steps)
    else:
        train_vqgan(path, steps)


def main(argv=None):
    run_command("make_toy.py", run, argv)


if __name__ == "__main__":
    main()
