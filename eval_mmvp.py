"""Evaluate CLIPs: MMVP-VLM (Table 1 of the paper) and zero-shot retention (Table 3).

    python eval_mmvp.py --preset toy --weights runs/toy-rf/open_clip --baseline original
    python eval_mmvp.py --weights runs/paper-rf/open_clip --baseline original \\
        --benchmark MMVP_VLM --zeroshot imagenet:DIR --json it.json --picture changed.png
    python eval_mmvp.py --weights ViT-L-14.pt --zeroshot imagenet:DIR cifar100:DIR

Every number comes with a 95 % interval. "before" is the --baseline, "after" the model of --weights.
The protocol is that of the benchmark's evaluate_vlm.py (github.com/tsb0601/MMVP), except for two
points: a pair's pattern is what its Type column says, instead of following from the row number, and
images are converted to RGB before resizing, which matters only for palette, RGBA and CMYK images.
"""
import csv
import hashlib
import json
import logging
import math
import os
import re
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from contextlib import contextmanager
from functools import lru_cache
from itertools import zip_longest
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep, not spin

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import ImageNetInfo  # open_clip requires timm
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100
from tqdm import tqdm

import genhancer as gh
from genhancer import UserError, first_line

TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")
WORLD = os.path.join(TOY, "data")
open_clip.add_model_config(os.path.join(TOY, "toy-clip.json"))

BACKBONES = {  # the six of Table 1 and the toy, as open_clip's MODEL:TAG; to add one, add a row
    "openai-l14-224": "ViT-L-14-quickgelu:openai",
    "openai-l14-336": "ViT-L-14-336-quickgelu:openai",
    "metaclip-l14-224": "ViT-L-14-quickgelu:metaclip_fullcc",
    "metaclip-h14-224": "ViT-H-14-quickgelu:metaclip_fullcc",
    "siglip-so400m-224": "ViT-SO400M-14-SigLIP:webli",
    "siglip-so400m-384": "ViT-SO400M-14-SigLIP-384:webli",
    "toy": f"toy-clip:{TOY}/clip.safetensors",
}


# ---- CLIP in and out -----------------------------------------------------------------------------

def load_clip(name, weights=None, random=False):
    """Load a CLIP: a row of BACKBONES, or open_clip's MODEL:TAG, with its published weights.

    `weights` names local ones instead: a file or folder in open_clip's or Hugging Face's format,
    OpenAI's own archive, or a larger program's checkpoint. No code in them is executed. A visual
    tower alone is completed by the published weights. `random=True` keeps the random initialisation
    and needs no tag.

    Returns (clip, preprocess, tokenizer): the open_clip model on the CPU, in float32 and eval mode,
    frozen; the transform from a PIL image to its input (3, H, W); the function from a list of
    strings to token ids. Raises UserError for an unknown name, and for weights that do not fit or
    whose configuration contradicts the backbone's.
    """
    model, tag = find_backbone(name, weights, random)
    if random or weights is None:
        clip = create_clip(model, tag, download=not random)
    else:
        clip = load_clip_file(name, model, tag, weights)
    clip = clip.float().eval().requires_grad_(False)
    preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
    return clip, preprocess, lambda texts: make_tokenizer(model)(texts)


def find_backbone(name, weights=None, random=False):
    """open_clip's (model, tag) for load_clip's arguments; UserError if any of them is unknown."""
    model, _, tag = BACKBONES.get(name, name).partition(":")
    if model not in open_clip.list_models():
        raise UserError(f"unknown backbone {name!r}: choose from {', '.join(BACKBONES)}, "
                        "or give open_clip's MODEL:TAG")
    known = name in BACKBONES or open_clip.is_pretrained_cfg(model, tag)
    if not known and (tag or not random):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise UserError(f"{name!r} has no known tag, which determines the preprocessing and the "
                        f"activation: give {model}:TAG with one of its tags "
                        f"({tags or 'it has none: choose another model'})")
    if weights is not None and not random:
        find_files(weights)
    return model, tag


def create_clip(model, tag, download=False):
    """An open_clip model with its tag's settings: random, or with the tag's weights."""
    published = open_clip.get_pretrained_cfg(model, tag)
    config = open_clip.get_model_config(model)
    config["quick_gelu"] = bool(config.get("quick_gelu") or published.get("quick_gelu"))
    try:
        logging.disable()  # open_clip also logs what it raises, and warns about random weights
        clip = open_clip.create_model(
            model, tag if download else None, load_weights=download, pretrained_hf=False,
            force_quick_gelu=config["quick_gelu"],  # a plain ViT-L-14 leaves this to its tags
            force_preprocess_cfg=published,  # open_clip picks mean, std and resizing from it
        )
        clip.model_cfg = config  # for the exports
        return clip
    except Exception as error:  # open_clip, the hub and the network each raise their own
        raise UserError(f"open_clip cannot create {model} ({first_line(error)}): download its "
                        f"weights {tag!r} on another machine, and pass the local file") from None
    finally:
        logging.disable(logging.NOTSET)


@lru_cache
def make_tokenizer(model):
    """open_clip's text tokenizer, made on first use because SigLIP's comes from the hub."""
    try:
        return open_clip.get_tokenizer(model)
    except Exception as error:  # as in create_clip
        raise UserError(f"open_clip cannot create {model}'s text tokenizer ({first_line(error)}): "
                        "it requires `pip install transformers` and, once, the network") from None


# ---- reading weights without executing code ----

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
FILES = (  # weights in a folder, in open_clip's order of preference; the last two may be either's
    OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin",
)
# Not weights: masks, positions, and the three integers in OpenAI's archives.
IGNORED = ("attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size")
HF_PATCHES = "embeddings.patch_embedding.weight"


def load_clip_file(name, model, tag, path):
    """A CLIP with the weights of a local file or folder; see load_clip."""
    what = f"CLIP weights for {model}"
    tensors = {}
    for file in find_files(path):
        tensors.update(read_tensors(file, what))
    clip = create_clip(model, tag)
    tensors, is_hf = find_clip(clip, tensors, path, what)
    if is_hf:
        check_export(name, clip)  # transformers' names and shapes do not fit every model
    visual_only = bool(tensors) and all(key.startswith(("visual", "vision_")) for key in tensors)
    if visual_only:
        print(f"{what}: {path} holds only a visual tower; all other weights are {name}'s own",
              file=sys.stderr)
        clip = create_clip(model, tag, download=True)
    weights = hf_weights(clip) if is_hf else clip.state_dict()
    if visual_only:
        tower = ("visual.", "vision_model.")
        rest = {key: weights[key] for key in weights if not key.startswith(tower)}
        tensors = rest | tensors
    for key in ("logit_scale", "logit_bias"):
        if key in weights and getattr(tensors.get(key), "shape", None) == (1,):
            tensors[key] = tensors[key].reshape(weights[key].shape)  # as in older files
    gh.load_strictly(weights, tensors, path, what)
    if is_hf and is_siglip(clip):  # the two that are copies, not views
        pool = clip.visual.trunk.attn_pool.state_dict()
        for kind in ("weight", "bias"):
            q, k, v = weights[f"vision_model.head.attention.in_proj_{kind}"].chunk(3)
            pool[f"q.{kind}"].copy_(q)
            pool[f"kv.{kind}"].copy_(torch.cat([k, v]))
    check_config(name, clip, path, what, is_hf, visual_only)
    return clip


def find_clip(clip, tensors, path, what):
    """The tensors of the only CLIP in a file, and whether they are in Hugging Face's format."""
    last = list(clip.visual.state_dict())[-1]  # no text tower has a tensor of this name
    pattern = rf"(visual\.)?{re.escape(last)}|(vision_model\.)?{re.escape(HF_PATCHES)}"
    tensors, found = gh.find_model(tensors, pattern, path, what)
    # open_clip and transformers 5 save a tower by itself without the tower's name.
    tower = {last: "visual.", HF_PATCHES: "vision_model."}.get(found, "")
    kept = [name for name in tensors if name.rpartition(".")[2] not in IGNORED]
    return {tower + name: tensors[name] for name in kept}, found.endswith(HF_PATCHES)


def find_files(path):
    """The files that hold the weights: `path` itself, or those of a folder."""
    path = os.fspath(path)
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"CLIP weights not found at {path!r}: name a file or a folder")
    for name in FILES:
        file = os.path.join(path, name)
        if os.path.isfile(file):
            return [file]
        if os.path.isfile(f"{file}.index.json"):
            shards = gh.read_json(f"{file}.index.json", "weight_map").values()
            names = sorted({os.path.basename(str(shard)) for shard in shards})
            return [os.path.join(path, name) for name in names]
    raise UserError(f"CLIP weights: the folder {path} is neither in open_clip's nor in "
                    f"Hugging Face's format (it holds no {', '.join(FILES)}): name a file")


def read_tensors(path, what):
    """The tensors of one file, by name: safetensors, torch.save's, or OpenAI's own TorchScript."""
    if path.endswith(".safetensors"):
        return gh.read_weights(path, what)[0]
    if os.path.isfile(path):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        models = open_clip.list_pretrained_models_by_tag("openai")
        urls = [open_clip.get_pretrained_cfg(model, "openai")["url"] for model in models]
        if any(digest in url for url in urls):  # loading any other archive might execute its code
            return torch.jit.load(path, map_location="cpu").state_dict()
    return gh.read_pickle(path, what)


# ---- settings that tensor shapes do not show ----

def check_config(name, clip, path, what, is_hf, visual_only):
    """Refuse weights if the JSON files beside them contradict what the backbone computes."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    read = read_hf_config if is_hf else read_open_clip_config
    for file, part, theirs, ours in read(folder, clip):
        if visual_only and part.startswith("text"):
            continue
        for key, value in ours.items():
            line = f"{file} says {key} {theirs[key]!r} ({part}), and {name} computes {value!r}"
            if is_siglip(clip) and (theirs[key], value) == ("gelu_pytorch_tanh", "gelu"):
                print(f"{what}: {line}; the two differ by less than 5e-4", file=sys.stderr)
            elif theirs[key] != value:
                raise UserError(f"{what}: {line}: choose another backbone")


def read_open_clip_config(folder, clip):
    """Yield (file, part, the file's settings, the clip's) for a folder's open_clip_config.json."""
    file = os.path.join(folder, "open_clip_config.json")
    if not os.path.isfile(file):
        return
    config = gh.read_json(file)
    try:
        theirs = full_config(config["model_cfg"], config.get("preprocess_cfg", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a configuration of the installed open_clip "
                        f"({first_line(error)}): update open_clip or use other weights") from None
    for part, ours in full_config(clip.model_cfg, clip.visual.preprocess_cfg).items():
        yield file, part, theirs[part], ours


# Settings that change no features: where weights and tokenizers come from, what acts only in
# training, and the size, which the vision tower determines.
NO_EFFECT = {"timm_model_pretrained", "hf_model_pretrained", "hf_tokenizer_name", "size",
             "patch_dropout", "timm_drop", "timm_drop_path", "output_tokens"}


def full_config(model_cfg, preprocess_cfg):
    """An open_clip configuration with all defaults filled in, as {part: {key: value}}."""
    parts = {
        "model_cfg": {"quick_gelu": bool(model_cfg.get("quick_gelu"))},
        "vision_cfg": vars(open_clip.CLIPVisionCfg(**model_cfg["vision_cfg"])),
        "text_cfg": vars(open_clip.CLIPTextCfg(**model_cfg["text_cfg"])),
        "preprocess_cfg": merge_preprocess_dict(PreprocessCfg(), preprocess_cfg),
    }
    for part, values in parts.items():
        parts[part] = {key: values[key] for key in values if key not in NO_EFFECT}
    return json.loads(json.dumps(parts))  # turns tuples into lists


def read_hf_config(folder, clip):
    """As read_open_clip_config, for Hugging Face's files, with transformers' defaults filled in."""
    ours = hf_config(clip) | {"image_processor": hf_preprocessor(clip.visual.preprocess_cfg)}
    kind = ours["model_type"]
    for name, part in (
        ("config.json", "vision_config"),
        ("config.json", "text_config"),
        ("preprocessor_config.json", "image_processor"),  # transformers 4
        ("processor_config.json", "image_processor"),     # transformers 5
    ):
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            continue
        theirs = gh.read_json(file, f"{part}_dict", part)  # transformers prefers an old *_dict
        if not str(theirs.get("model_type", kind)).startswith(kind):
            continue  # a larger program's configuration
        if name == "processor_config.json" and "image_processor_type" not in theirs:
            continue  # transformers 4's, which only names a class
        defaults = hf_defaults(part, kind)
        theirs = defaults | {key: value for key, value in theirs.items() if value is not None}
        if isinstance(theirs.get("size"), int):  # older spellings
            theirs["size"] = {"shortest_edge": theirs["size"]}
        if isinstance(theirs.get("crop_size"), int):
            theirs["crop_size"] = dict.fromkeys(("height", "width"), theirs["crop_size"])
        yield file, part, theirs, {key: ours[part][key] for key in defaults if key in ours[part]}


def hf_defaults(part, kind):
    """transformers' defaults for a part of the configuration of a "clip" or a "siglip"."""
    if part == "image_processor":  # open_clip's defaults are OpenAI's, too
        half = [0.5, 0.5, 0.5]
        images = {"mean": half, "std": half, "resize_mode": "squash"} if kind == "siglip" else {}
        return hf_preprocessor(vars(PreprocessCfg(**images)))
    heads = 8 if (part, kind) == ("text_config", "clip") else 12
    tower = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": heads}
    if kind == "siglip":
        tower |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    return tower


# ---- open_clip's format ----

def export_open_clip(clip, folder):
    """Write a CLIP (LoRA merged) as a folder that open_clip opens as model "local-dir:FOLDER"."""
    config = {"model_cfg": clip.model_cfg, "preprocess_cfg": clip.visual.preprocess_cfg}
    gh.write_json(os.path.join(folder, "open_clip_config.json"), config)
    # The weights are last: once they exist, the folder is complete.
    gh.write_weights(os.path.join(folder, OPEN_CLIP_WEIGHTS), clip.state_dict())


def loading_hint(name, out):
    """How to open the CLIP exported to out/open_clip and out/hf, and which files to add."""
    hint = (f"open_clip.create_model_and_transforms('local-dir:{out}/open_clip') and "
            f"transformers.AutoModel.from_pretrained('{out}/hf') open the enhanced CLIP")
    model, _ = find_backbone(name, random=True)
    hub = open_clip.get_model_config(model)["text_cfg"].get("hf_tokenizer_name")
    if hub:  # open_clip does not ship this tokenizer
        google = "google/siglip2" if "SigLIP2" in hub else "google/siglip"
        hint += (f"; for text, add the tokenizer files of {hub} to open_clip/, and Google's (such "
                 f"as {google}-so400m-patch14-384's) to hf/")
    return hint


# ---- Hugging Face's format ----

HF_NAMES = [  # (pattern of open_clip's, Hugging Face's): replaced in this order, in both directions
    (r"^visual\.proj$",                     "visual_projection.weight"),
    (r"^visual\.trunk\.norm\.",             "visual.post_layernorm."),
    (r"^visual\.(trunk\.)?",                "vision_model."),
    (r"^text\.text_projection\.",           "text_model.head."),
    (r"^text\.text_projection$",            "text_projection.weight"),
    (r"^text\.",                            "text_model."),
    (r"attn_pool\.latent",                  "head.probe"),
    (r"attn_pool\.(q|kv)\.",                "head.attention.in_proj_"),  # two tensors become one
    (r"attn_pool\.proj",                    "head.attention.out_proj"),
    (r"attn_pool\.norm",                    "head.layernorm"),
    (r"attn_pool\.mlp",                     "head.mlp"),
    (r"(class|token)_embedding",            r"embeddings.\1_embedding"),
    (r"(positional_embedding|pos_embed)$",  "embeddings.position_embedding.weight"),
    (r"(conv1|patch_embed\.proj)\.",        "embeddings.patch_embedding."),
    (r"ln_pre",                             "pre_layrnorm"),
    (r"ln_post",                            "post_layernorm"),
    (r"ln_final",                           "final_layer_norm"),
    (r"(transformer\.res)?blocks\.",        "encoder.layers."),
    (r"(ln_|\bnorm)([12])",                 r"layer_norm\2"),
    (r"\battn\.(in_proj_|qkv\.)",           "self_attn.QKV_proj."),  # one tensor becomes three
    (r"\battn\.(out_)?proj",                "self_attn.out_proj"),
    (r"mlp\.c_fc",                          "mlp.fc1"),
    (r"mlp\.c_proj",                        "mlp.fc2"),
]
# Hugging Face's are the transposes of open_clip's.
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")


def hf_weights(clip):
    """The weights of an open_clip CLIP or SigLIP under Hugging Face's names and in its shapes.

    They are views of the clip's own tensors, for export to read and import to write, but for the
    packed weight and bias of SigLIP's pooling head, which are copies.
    """
    weights = {}
    for key, tensor in clip.state_dict().items():
        top = key.partition(".")[0]
        # open_clip's CLIP keeps the parts of its text tower at the top level.
        name = key if top in ("visual", "text", "logit_scale", "logit_bias") else f"text.{key}"
        for ours, theirs in HF_NAMES:
            name = re.sub(ours, theirs, name)
        if name in PROJECTIONS:
            tensor = tensor.T
        elif key == "visual.trunk.pos_embed":
            tensor = tensor[0]
        elif top.startswith("logit_") and is_siglip(clip):
            tensor = tensor.reshape(1)
        if "QKV" in name:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("QKV", letter)] = rows
        elif name in weights:  # the pooling head's q comes first, then its k and v
            weights[name] = torch.cat([weights[name], tensor])
        else:
            weights[name] = tensor
    return weights


def is_siglip(clip):
    return isinstance(clip.visual, open_clip.timm_model.TimmModel)


# Settings of open_clip that may vary, because shapes or hf_config show them. All others must be
# those of ViT-B-32, or of ViT-B-16-SigLIP.
HF_VARIES = {"width", "layers", "heads", "head_width", "mlp_ratio", "patch_size", "image_size",
             "context_length", "norm_kwargs", "act_kwargs"}
SIGLIP_VARIES = {"timm_model_name", "vocab_size", "tokenizer_kwargs"}


def check_export(name, clip):
    """UserError for a CLIP that is neither transformers' CLIPModel nor its SiglipModel."""
    siglip = is_siglip(clip)
    reference = open_clip.get_model_config("ViT-B-16-SigLIP" if siglip else "ViT-B-32")
    varies = HF_VARIES | SIGLIP_VARIES if siglip else HF_VARIES
    fixed, ours = full_config(reference, {}), full_config(clip.model_cfg, {})
    for part in ("vision_cfg", "text_cfg"):
        for key, value in ours[part].items():
            if value != fixed[part][key] and (key not in varies or isinstance(value, list)):
                raise UserError(f"{name} does not fit Hugging Face's format ({part}: {key} is "
                                f"{value!r}, not {fixed[part][key]!r}): choose another backbone")


def export_hf(clip, folder):
    """Write a CLIP (LoRA merged) that passes check_export as a folder for transformers:
    CLIPModel, CLIPVisionModel or SiglipModel `.from_pretrained(folder)`."""
    config = hf_config(clip)
    images = hf_preprocessor(clip.visual.preprocess_cfg)
    images["image_processor_type"] = f"{'Siglip' if is_siglip(clip) else 'CLIP'}ImageProcessor"
    gh.write_json(os.path.join(folder, "config.json"), config)
    gh.write_json(os.path.join(folder, "preprocessor_config.json"), images)
    if not is_siglip(clip):  # open_clip does not ship SigLIP's tokenizer
        write_hf_tokenizer(folder, config["text_config"]["max_position_embeddings"])
    weights = {name: tensor.cpu() for name, tensor in hf_weights(clip).items()}
    gh.write_tensors(os.path.join(folder, "model.safetensors"), weights, {"format": "pt"})


def hf_config(clip):
    """transformers' config.json for an open_clip CLIP or SigLIP, read from its modules."""
    siglip = is_siglip(clip)
    kind = "siglip" if siglip else "clip"
    weights = hf_weights(clip)
    vocabulary = len(weights["text_model.embeddings.token_embedding.weight"])
    vision = hf_tower(clip.visual.trunk.blocks if siglip else clip.visual.transformer.resblocks)
    vision["model_type"] = f"{kind}_vision_model"
    vision["image_size"] = gh.image_side(clip.visual)
    vision["patch_size"] = weights[f"vision_model.{HF_PATCHES}"].shape[-1]
    text = hf_tower(getattr(clip, "text", clip).transformer.resblocks)
    text["model_type"] = f"{kind}_text_model"
    text["vocab_size"] = vocabulary
    text["max_position_embeddings"] = len(
        weights["text_model.embeddings.position_embedding.weight"])
    config = {"model_type": kind, "torch_dtype": "float32",
              "architectures": ["SiglipModel" if siglip else "CLIPModel"]}
    if siglip:
        text["projection_size"] = len(weights["text_model.head.weight"])
    else:
        text["bos_token_id"] = vocabulary - 2
        text["eos_token_id"] = vocabulary - 1  # the position that is pooled
        for part in (config, vision, text):
            part["projection_dim"] = len(weights["visual_projection.weight"])
    return config | {"vision_config": vision, "text_config": text}


ACTIVATIONS = {"quick_gelu": open_clip.transformer.QuickGELU(), "gelu": nn.GELU(),
               "gelu_pytorch_tanh": nn.GELU("tanh")}


def hf_tower(blocks):
    """The part of config.json that describes a tower's transformer blocks."""
    # timm's blocks and open_clip's begin with a norm, their MLPs with a linear layer and its GELU.
    norm = next(blocks[0].children())
    linear, gelu = list(blocks[0].mlp.children())[:2]
    x = torch.linspace(-3, 3, 7)  # the values tell which GELU it is; its class may be any of many
    activation = next(name for name, other in ACTIVATIONS.items() if gelu(x).allclose(other(x)))
    return {"hidden_size": linear.in_features, "intermediate_size": linear.out_features,
            "num_hidden_layers": len(blocks), "num_attention_heads": blocks[0].attn.num_heads,
            "layer_norm_eps": norm.eps, "attention_dropout": 0.0, "hidden_act": activation}


def hf_preprocessor(config):
    """transformers' image processor, without its class, for open_clip's preprocess_cfg."""
    side = PreprocessCfg(**config).input_size[1]
    square = {"height": side, "width": side}
    images = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    images["resample"] = {"bicubic": 3, "bilinear": 2}[config["interpolation"]]  # Pillow's numbers
    images |= {"image_mean": list(config["mean"]), "image_std": list(config["std"])}
    images["rescale_factor"] = 1 / 255
    if config["resize_mode"] == "squash":
        return images | {"size": square, "do_center_crop": False}
    return images | {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}


def write_hf_tokenizer(folder, context_length):
    """Write CLIP's text tokenizer for transformers."""
    tokenizer = open_clip.SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    renamed = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {renamed.get(token, token): i for token, i in tokenizer.encoder.items()}
    merges = ["#version: 0.2"] + [" ".join(pair) for pair in tokenizer.bpe_ranks]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    config |= {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    gh.write_json(os.path.join(folder, "vocab.json"), vocabulary)
    gh.write_text(os.path.join(folder, "merges.txt"), "\n".join(merges) + "\n")
    gh.write_json(os.path.join(folder, "tokenizer_config.json"), config)


# ---- MMVP-VLM ------------------------------------------------------------------------------------

def evaluate_mmvp(clip, preprocess, tokenizer, benchmark_dir, batch_size=64):
    """MMVP-VLM on the clip's device, in float32; leaves the clip in eval mode.

    Each statement chooses one of its pair's two images; a pair is right if both choose their own.
    Returns "average" (mean over the patterns, in percent), "patterns" ({pattern: percent of its
    pairs that are right}, in order of first appearance) and "pairs" (read_benchmark's, each with
    "scores", each statement's probability of the first image, and "correct").
    """
    clip.eval()
    pairs = read_benchmark(benchmark_dir)
    texts = ["a photo of " + statement for pair in pairs for statement in pair["statements"]]
    files = [file for pair in pairs for file in pair["images"]]
    with exact_float32():
        texts = encode_texts(clip, tokenizer, texts, batch_size)
        images, _ = encode_images(clip, ImageFiles(files, preprocess), batch_size)
        texts = texts.view(len(pairs), 2, -1)                  # (pairs, 2 statements, D)
        images = images.view(len(pairs), 2, -1)                # (pairs, 2 images, D)
        logits = clip.logit_scale.exp() * texts @ images.mT    # (pairs, 2 statements, 2 images)
        scores = check_finite(logits.softmax(dim=-1)[..., 0])  # SigLIP's bias would cancel
    for pair, of_pair in zip(pairs, scores.tolist(), strict=True):
        pair["scores"] = tuple(of_pair)
        pair["correct"] = is_right(pair, 0) and is_right(pair, 1)
    patterns = {name: percent([right]) for name, right in by_pattern(pairs).items()}
    average = sum(patterns.values()) / len(patterns)
    return {"average": average, "patterns": patterns, "pairs": pairs}


def is_right(pair, i):
    """Whether statement i chose image i."""
    return (pair["scores"][i] > 0.5) == (i == 0)


def by_pattern(pairs):
    """{pattern: (n,) array, 1.0 for each pair that is right and 0.0 for each that is wrong}."""
    groups = {}
    for pair in pairs:
        groups.setdefault(pair["type"], []).append(float(pair["correct"]))
    return {name: np.array(right) for name, right in groups.items()}


def check_benchmark(benchmark_dir):
    """Read a benchmark and decode all of its images: a second or two, no model needed."""
    for pair in read_benchmark(benchmark_dir):
        for file in pair["images"]:
            read_image(file)


def read_benchmark(benchmark_dir):
    """The pairs of an MMVP-VLM folder, in the order of its Questions.csv, two rows each: dicts of
    "ids" (2 integers), "type", "statements" (2 strings) and "images" (2 paths). UserError, with
    file and row, for any departure from the benchmark's published layout."""
    rows = read_rows(os.path.join(benchmark_dir, "Questions.csv"))
    pairs = {}
    for first, second in zip_longest(rows[::2], rows[1::2]):
        partner = (second.id, second.type) if second else None
        if first.id % 2 == 0 or partner != (first.id + 1, first.type):
            raise UserError(f"{first.where}: id {first.id} of Type {first.type} does not start a "
                            "pair: a pair is an odd id and, in the next row, the next id of the "
                            "same Type")
        if (first.type, first.id) in pairs:
            raise UserError(f"{first.where}: the pair {first.id}, {second.id} is listed twice")
        pairs[first.type, first.id] = {
            "ids": (first.id, second.id),
            "type": first.type,
            "statements": (first.statement, second.statement),
            "images": tuple(find_image(benchmark_dir, row) for row in (first, second)),
        }
    return list(pairs.values())


def read_rows(path):
    """The rows of a Questions.csv below its header; `where` names the file and the line."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            table = [(f"{path}, row {reader.line_num}", [cell.strip() for cell in cells])
                     for cells in reader]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} not found, or not a CSV file in UTF-8 ({first_line(error)}): "
                        "download MMVP/MMVP_VLM from Hugging Face and name its folder with "
                        "--benchmark") from None
    rows = []
    for where, cells in [(where, cells) for where, cells in table if any(cells)][1:]:
        if len(cells) != 3 or not all(cells) or not re.fullmatch(r"\d{1,18}", cells[0]):
            raise UserError(f"{where}: must be a number, a Type and a statement (in quotes if it "
                            f"has a comma), not {','.join(cells)[:200]}")
        number, pattern, text = cells
        rows.append(SimpleNamespace(where=where, id=int(number), type=pattern, statement=text))
    if not rows:
        raise UserError(f"{path} is empty: it must hold a header and two rows for each pair")
    return rows


def find_image(benchmark_dir, row):
    for images in ("MLLM_VLM_Images", "MLLM_VLM Images"):  # some copies have underscores
        stem = os.path.join(benchmark_dir, images, row.type, str(row.id))
        for suffix in (".jpg", ".jpeg", ".png"):
            if os.path.isfile(stem + suffix):
                return stem + suffix
    raise UserError(f"{row.where}: image not found: {stem}.jpg (or .jpeg or .png)")


# ---- Images and texts to features ----------------------------------------------------------------

MANY = 5_000  # images: larger sets are decoded by worker processes


@contextmanager
def exact_float32():
    """No gradients, and no TF32, whatever the caller's settings, so that all programs agree."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    callers = (conv.fp32_precision, matmul.fp32_precision)
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{first_line(error)}: choose a smaller --batch-size, or select a GPU with "
                        "more free memory with CUDA_VISIBLE_DEVICES") from None
    finally:
        conv.fp32_precision, matmul.fp32_precision = callers


class ImageFiles(Dataset):
    """Item i is (image i, preprocessed (3, H, W); its label, which is i by default)."""

    def __init__(self, paths, preprocess, labels=None):
        self.paths = paths
        self.preprocess = preprocess
        self.labels = labels or range(len(paths))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.preprocess(read_image(self.paths[i])), self.labels[i]


# Pillow detects the format from the content: an EPS named .jpg would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# A file without a suffix also counts as an image, as some downloaders write it.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif",
                  ".tiff")


def read_image(path):
    """Decode an image and convert it to RGB, without the rotation in its EXIF."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # the decoders raise nearly anything on broken files
        reason = first_line(error)
        raise UserError(f"cannot decode the image {path} ({reason}): replace it") from None


def encode_images(clip, dataset, batch_size):
    """A dataset of (image, label): unit features (N, D) and labels (N,), on the clip's device."""
    device = clip.logit_scale.device
    workers = min(8, os.cpu_count() or 1) if len(dataset) > MANY else 0
    context = gh.start_method() if workers else None
    loader = DataLoader(dataset, batch_size, num_workers=workers, multiprocessing_context=context)
    features, labels = [], []
    try:
        for images, batch_labels in tqdm(loader, "images", leave=False, disable=None):
            features.append(clip.encode_image(images.to(device), normalize=True))
            labels.append(batch_labels)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"an image decoding worker died ({first_line(error)}): it may need more "
                        "memory, or more shared memory (docker run --ipc=host)") from None
    return torch.cat(features), torch.cat(labels).to(device)


def encode_texts(clip, tokenizer, texts, batch_size):
    """Unit features (N, D) of N strings, on the clip's device."""
    features = []
    for i in range(0, len(texts), batch_size):
        tokens = tokenizer(texts[i : i + batch_size]).to(clip.logit_scale.device)
        features.append(clip.encode_text(tokens, normalize=True))
    return torch.cat(features)


def check_finite(similarities):
    if not similarities.isfinite().all():
        raise UserError("the CLIP's features are not finite: its weights are broken, use others")
    return similarities


# ---- Confidence intervals and significance -------------------------------------------------------

def make_rows(results):
    """The table's rows (see make_row): each pattern, their average, then each zero-shot metric.

    results: {"after": evaluate's result}, and with a baseline "before", here and below. For a
    recall, images are resampled, because the queries of one image are not independent.
    """
    patterns = {key: by_pattern(result["pairs"]) for key, result in results.items()}
    rows = []
    for name in patterns["after"]:
        groups = {key: [arrays[name]] for key, arrays in patterns.items()}
        rows.append(make_row(name, "pairs", groups))
    if rows:
        groups = {key: list(arrays.values()) for key, arrays in patterns.items()}
        rows.append(make_row("average", "pairs", groups, resample=True))
    outcomes = {key: result["outcomes"] for key, result in results.items()}
    for name in outcomes["after"]:
        if all(name in of_model for of_model in outcomes.values()):
            groups = {key: [of_model[name]] for key, of_model in outcomes.items()}
            rows.append(make_row(name, "images", groups, resample=not name.endswith("accuracy")))
    return rows


def make_row(name, unit, groups, resample=False):
    """One row of the table, in percent, with its 95 % intervals.

    groups: {"before" (if there is one) and "after": arrays whose means are averaged}, with one
    value for each of the row's `unit`, "pairs" or "images". resample: intervals from bootstrap
    rather than wilson, which takes one array of 0 and 1. With a "before", the row also has how many
    values rose (won) and fell (lost), and the exact sign test's p, McNemar's for 0 and 1.
    """
    row = {"name": name, "unit": unit}
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
    row["won"] = sum(int((change > 0).sum()) for change in changes)
    row["lost"] = sum(int((change < 0).sum()) for change in changes)
    row["p"] = mcnemar(row["won"], row["lost"])
    return row


def percent(arrays):
    """The mean over arrays of each array's mean, in percent."""
    means = [float(100 * values.sum() / len(values)) for values in arrays]
    return sum(means) / len(means)


def wilson(k, n, z=1.959964):
    """Wilson's 95 % score interval (low, high) for k of n."""
    centre = k + z * z / 2
    spread = z * math.sqrt(k * (n - k) / n + z * z / 4)
    high = (centre + spread) / (n + z * z)
    return (centre - spread) / (n + z * z), min(1.0, high)  # no rounding error above 1


def bootstrap(arrays, resamples=10_000, seed=0):
    """95 % percentile interval (low, high) of the mean over arrays of each array's mean, from
    resampling within each array, in which few values may be distinct."""
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for array in arrays:
        # To draw n values with replacement is to draw how often each distinct value occurs.
        values, counts = np.unique(array, return_counts=True)
        drawn = rng.multinomial(len(array), counts / len(array), resamples)
        means += drawn @ values / len(array) / len(arrays)
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 12) + 0.0, round(float(high), 12) + 0.0  # no rounding error, no -0


def mcnemar(won, lost):
    """McNemar's exact two-sided p: of fair coins splitting won + lost at least this unevenly."""
    n = won + lost
    tail = ways = 1  # ways to choose i of n
    for i in range(min(won, lost)):
        ways = ways * (n - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)  # integers until the division: no overflow


# ---- Zero-shot retention -------------------------------------------------------------------------

CLASS_FOLDERS = "a folder with one subfolder per class, named as the class (underscores for spaces)"
ZEROSHOT = {  # --zeroshot NAME:PATH, and what PATH must be; nothing is downloaded
    "cifar100": "the folder in which cifar-100-python.tar.gz was unpacked",
    "sun397": "the folder in which SUN397.tar.gz was unpacked",
    "imagenet": "the validation images in 1000 subfolders, n01440764 to n15075141",
    "cars": CLASS_FOLDERS,
    "folder": CLASS_FOLDERS,
    "flickr30k": "a folder with Karpathy's dataset_flickr30k.json and the images beside it",
    "coco": "a folder with Karpathy's dataset_coco.json and the images in val2014/ beside it",
}
PHOTOS = ["a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.",
          "a low contrast photo of a {}.", "a high contrast photo of a {}.", "a bad photo of a {}.",
          "a good photo of a {}.", "a photo of a small {}.", "a photo of a big {}."]
OWNERS = ["a", "the", "my", "my dirty", "my clean", "my new", "my old"]
PROMPTS = {  # as published with CLIP (github.com/openai/CLIP), except for folder
    "cifar100": PHOTOS + [photo.replace(" of a ", " of the ") for photo in PHOTOS],
    "sun397": ["a photo of a {}.", "a photo of the {}."],
    "imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
    "cars": [f"a photo of {whose} {{}}." for whose in OWNERS] + ["i love my {}!"],
    "folder": ["a photo of a {}."],
}
CAPTIONED = ("flickr30k", "coco")  # retrieval; the others are classifications


def evaluate(clip, preprocess, tokenizer, benchmark_dir, zeroshot=(), batch_size=64):
    """evaluate_mmvp's result, and that of every (name, path) in `zeroshot`.

    Adds "outcomes", {metric: (images,) array whose mean is the metric}, and "zeroshot", {metric:
    percent}. "NAME accuracy" (top 1): 1.0 for an image that is classified correctly. "NAME image
    recall@5" and "NAME text recall@5": the share of an image's queries that find a match among the
    first five. A set that fails is left out, and its error is in "failures": see raise_failures.
    """
    clip.eval()
    result = {"average": None, "patterns": {}, "pairs": []}
    if benchmark_dir is not None:
        result = evaluate_mmvp(clip, preprocess, tokenizer, benchmark_dir, batch_size)
    result |= {"outcomes": {}, "failures": []}
    for name, path in zeroshot:
        measure = retrieve if name in CAPTIONED else classify
        try:
            dataset, texts, more = check_zeroshot(name, path, preprocess)
            with exact_float32():
                outcomes = measure(clip, tokenizer, dataset, texts, more, batch_size)
        except UserError as error:
            result["failures"].append(f"{name} was not evaluated: {gh.message_of(error)}")
            continue
        result["outcomes"] |= {f"{name} {metric}": of for metric, of in outcomes.items()}
    result["zeroshot"] = {metric: percent([of]) for metric, of in result["outcomes"].items()}
    return result


def raise_failures(results):
    """UserError if any set failed; to be called once all other results are written."""
    failures = [failure for result in results for failure in result["failures"]]
    if failures:
        raise UserError("; ".join(dict.fromkeys(failures)))


def summary(result):
    """The part of evaluate's result that is written to files: percentages only."""
    return {key: result[key] for key in ("average", "patterns", "zeroshot")}


def classify(clip, tokenizer, dataset, names, templates, batch_size):
    at_once = max(1, batch_size // len(templates))  # classes whose prompts make a batch
    classifier = open_clip.build_zero_shot_classifier(                        # (D, classes)
        clip, tokenizer, names, templates, at_once, clip.logit_scale.device)
    images, labels = encode_images(clip, dataset, batch_size)                 # (images, D)
    predicted = check_finite(images @ classifier).argmax(dim=1)
    return {"accuracy": (predicted == labels).cpu().numpy().astype(float)}


def retrieve(clip, tokenizer, dataset, texts, owners, batch_size):
    owner = torch.tensor(owners, device=clip.logit_scale.device)              # (captions,)
    captions = encode_texts(clip, tokenizer, texts, batch_size)               # (captions, D)
    images, index = encode_images(clip, dataset, batch_size)                  # (images, D)
    image_found = finds_own(captions, images, owner, index).cpu().numpy()     # (captions,)
    text_found = finds_own(images, captions, index, owner).cpu().numpy()      # (images,)
    of_image = np.bincount(owners, image_found) * len(images) / len(captions)  # (images,)
    return {"image recall@5": of_image, "text recall@5": text_found.astype(float)}


def finds_own(queries, gallery, query_owner, gallery_owner, k=5):
    """Whether each query (N, D) has an item of its own owner among its k nearest in the gallery
    (M, D): (N,) booleans. Owners: (N,) and (M,) integers."""
    similarities = check_finite(queries @ gallery.T)                          # (N, M)
    nearest = similarities.topk(min(k, len(gallery))).indices                 # (N, k)
    owners = gallery_owner[nearest]                                           # (N, k)
    return (owners == query_owner[:, None]).any(dim=1)


def check_zeroshot(name, path, preprocess=None):
    """Find a set of ZEROSHOT on disk; no model needed, no image decoded.

    Returns (dataset of (image, label), class names, templates) or, for retrieval, (dataset,
    captions, the index of each caption's image). UserError says what PATH must be.
    """
    if name not in ZEROSHOT or not path:
        raise UserError(f"--zeroshot {name}:{path}: write NAME:PATH, where NAME is one of "
                        f"{', '.join(ZEROSHOT)}")
    open_set = open_captioned if name in CAPTIONED else open_labelled
    try:
        dataset, texts, more = open_set(name, path, preprocess)
        if not all(text.encode().strip() for text in texts):  # encode rejects broken characters
            raise UserError("a class name or caption is empty")
    except Exception as error:  # torchvision and json raise nearly anything on broken files
        why = str(error).partition(". You can use download=True")[0]  # torchvision's advice
        raise UserError(f"--zeroshot {name}:{path}: {why}: PATH must be {ZEROSHOT[name]}") from None
    return dataset, texts, more


def open_labelled(name, path, preprocess):
    if name == "cifar100":
        dataset = CIFAR100(path, train=False, transform=preprocess)
        names = dataset.classes
    elif name == "sun397":  # no split: all 108,754 images
        with open(os.path.join(path, "SUN397", "ClassName.txt"), encoding="utf-8") as file:
            lines = file.read().split()  # such as /a/apartment_building/outdoor
        names = [line[3:].replace("/", " ") for line in lines]
        dataset = open_folders([f"{path}/SUN397{line}" for line in lines], preprocess)
    else:
        names = [entry.name for entry in os.scandir(path) if entry.is_dir()]
        names = sorted(name for name in names if name[0] != ".")
        dataset = open_folders([os.path.join(path, name) for name in names], preprocess)
    if len(names) < 2:
        raise UserError(f"{len(names)} class folders, where 2 or more are needed")
    if name == "imagenet":
        synsets = ImageNetInfo().label_names()
        wrong = [name for name in synsets + names if name not in names or name not in synsets]
        if wrong:
            raise UserError(f"{len(names)} class folders; missing or unknown: {wrong[0]}")
        return dataset, open_clip.IMAGENET_CLASSNAMES, PROMPTS[name]  # in the synsets' order
    return dataset, [label.replace("_", " ") for label in names], PROMPTS[name]


def open_folders(folders, preprocess):
    """One folder per class -> ImageFiles. UserError for one that holds folders, or no image."""
    paths, labels, nested, skipped = [], [], [], 0
    for label, folder in enumerate(folders):
        entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
        images = [entry.path for entry in entries
                  if os.path.splitext(entry.name)[1].lower() in ("", *IMAGE_SUFFIXES)]
        if any(entry.is_dir() for entry in entries):
            nested.append(folder)
        elif not images:
            raise UserError(f"no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}")
        paths += sorted(images)
        labels += [label] * len(images)
        skipped += len(entries) - len(images)
    if nested:
        raise UserError("a class folder must not contain folders: if those are the classes, name "
                        f"{' or '.join(nested[:3])}, otherwise move them elsewhere")
    if skipped and preprocess is None:  # once, not again for each model
        print(f"{os.path.commonpath(folders)}: {skipped} files skipped, whose suffixes are not "
              f"those of images ({', '.join(IMAGE_SUFFIXES)})", file=sys.stderr)
    return ImageFiles(paths, preprocess, labels)


def open_captioned(name, path, preprocess):
    with open(os.path.join(path, f"dataset_{name}.json"), encoding="utf-8") as file:
        entries = [entry for entry in json.load(file)["images"] if entry["split"] == "test"]
    files, captions, owners = [], [], []
    for i, entry in enumerate(entries):
        files.append(os.path.join(path, entry.get("filepath", ""), entry["filename"]))
        own = [sentence["raw"] for sentence in entry["sentences"][:5]]  # some images have six
        captions += own
        owners += [i] * len(own)
    if not files or len(set(owners)) < len(files):
        raise UserError(f"{len(files)} test images, of which {len(set(owners))} have captions")
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} test images missing, first {missing[0]}")
    return ImageFiles(files, preprocess), captions, owners


# ---- The table and the picture -------------------------------------------------------------------

def print_table(results):
    """Print the table of results, at most 100 columns wide, and how to read it."""
    rows = make_rows(results)
    titles = results if "before" in results else ["percent"]
    columns = "".join(f" {title + ' [95 %]':17}" for title in titles)
    if "before" in results:
        columns += " change  won lost     p"
    for title, unit in (("MMVP-VLM pattern", "pairs"), ("zero-shot", "images")):
        shown = [row for row in rows if row["unit"] == unit]
        if shown:
            print(f"\n{title:33} {unit:>6}{columns}".rstrip())
        for row in shown:
            print(format_row(row))
    if rows:
        print(f"\n{explain_table(rows)}")


def format_row(row):
    line = f"{gh.escape(row['name'])[:33]:33} {row['count']:6}"
    for key in [key for key in ("before", "after") if key in row]:
        low, high = row[key]["interval"]
        interval = f"[{low:4.1f}-{high:4.1f}]".replace("100.0", "100")
        line += f" {row[key]['percent']:5.1f} {interval:11}"
    if "change" in row:
        p = f"{row['p']:.3f}" if row["p"] >= 0.001 else f"{row['p']:.0e}"
        line += f"{row['change']:+7.1f} {row['won']:4} {row['lost']:4} {p:>5}"
    return line.rstrip()


def explain_table(rows):
    """The lines below the table: what its numbers do and do not show."""
    noise = "To tell a difference between models from noise, compare them with --baseline."
    if "change" in rows[0]:
        noise = "A change whose p (McNemar's, exact) exceeds 0.05 may be noise."
    for row in rows:
        if row["unit"] == "pairs" and "change_interval" in row:  # the average's
            low, high = row["change_interval"]
            noise = (f"The average changed by {row['change']:+.1f} [{low:+.1f}, {high:+.1f}].\n"
                     f"{noise}\nAmong many patterns a small p may be chance: judge by the average.")
    return noise


GREEN, RED = "#15803d", "#dc2626"
SIDE = 200                  # of an image in the picture, in pixels
CARD = (2 * SIDE + 30, SIDE + 210)


def draw_changes(path, before, after, limit=12):
    """Draw pairs whose verdict changed, as the paper's Fig. 10: those won first, framed in green,
    then those lost, in red; of more than `limit`, an evenly spaced selection."""
    both = list(zip(before["pairs"], after["pairs"], strict=True))
    won = [(old, new) for old, new in both if new["correct"] and not old["correct"]]
    lost = [(old, new) for old, new in both if old["correct"] and not new["correct"]]
    changed = won + lost
    shown = changed[::math.ceil(len(changed) / limit) or 1]
    width, height = CARD[0] + 10, CARD[1] + 10
    size = (4 * width + 20, 60 + math.ceil(len(shown) / 4) * height)
    sheet = Image.new("RGB", size, "white")
    title = f"{len(won)} pairs won (green frame), {len(lost)} lost (red), of {len(both)}. "
    title += f"{len(shown)} are shown, with whether each statement chose the right image."
    ImageDraw.Draw(sheet).text((20, 15), title, "black", ImageFont.load_default(24))
    for i, (old, new) in enumerate(shown):
        sheet.paste(draw_card(old, new), (15 + i % 4 * width, 60 + i // 4 * height))
    gh.write_file(path, lambda part: sheet.save(part, "PNG"))


def draw_card(old, new):
    """One changed pair: its two images, and how each model judged either statement."""
    width, height = CARD
    card = Image.new("RGB", CARD, "white")
    draw = ImageDraw.Draw(card)
    font = ImageFont.load_default(16)
    draw.rectangle((0, 0, width - 1, height - 1), None, GREEN if new["correct"] else RED, 4)
    draw.text((12, 9), gh.escape(f"{old['type'][:40]} {old['ids']}"), "black", font)
    for i, file in enumerate(old["images"]):
        image = ImageOps.contain(read_image(file), (SIDE, SIDE), Image.Resampling.BOX)
        left = 10 + i * (SIDE + 10) + (SIDE - image.width) // 2
        card.paste(image, (left, 36 + (SIDE - image.height) // 2))
    for i, statement in enumerate(old["statements"]):
        text = gh.escape(f"{i + 1}. {statement}")
        text = textwrap.fill(text, 34, max_lines=3, placeholder=" ...")
        draw.text((12, SIDE + 102 + 68 * i), text, "black", font, anchor="lm")
    for name, pair, x in (("before", old, width - 105), ("after", new, width - 40)):
        draw.text((x, SIDE + 54), name, "black", font, anchor="mm")
        for i in (0, 1):
            mark, colour = ("right", GREEN) if is_right(pair, i) else ("wrong", RED)
            draw.text((x, SIDE + 102 + 68 * i), mark, colour, font, anchor="mm")
    return card


# ---- The command ---------------------------------------------------------------------------------

def parse_arguments(argv):
    parser = gh.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=["paper", "toy"], default="paper",
        help="toy: the CLIP, the benchmark and the zero-shot task of toy/")
    add("--backbone", default="openai-l14-224",
        help=f"{', '.join(BACKBONES)}, or open_clip's MODEL:TAG (default: %(default)s)")
    add("--weights", metavar="FILE|FOLDER",
        help="the CLIP to evaluate (default: the backbone's original)")
    add("--baseline", metavar="FILE|FOLDER|original", help="the CLIP to compare it with")
    add("--benchmark", metavar="DIR", help="MMVP_VLM's folder, or one with the same layout")
    add("--zeroshot", type=zeroshot_task, metavar="NAME:PATH", nargs="+", default=[],
        help="; ".join(f"{name}: {what}" for name, what in ZEROSHOT.items()) + "; prompts: "
             + ", ".join(f"{len(prompts)} for {name}" for name, prompts in PROMPTS.items()))
    add("--json", metavar="FILE", help="write the table, and every pair's scores and verdicts")
    add("--picture", metavar="FILE",
        help="draw the pairs whose verdict changed (PNG; needs --benchmark and --baseline)")
    add("--batch-size", type=gh.number(int, 1, 100_000), default=64, help="default: %(default)s")
    typed, _ = parser.parse_known_args(argv)
    if typed.preset == "toy":
        parser.set_defaults(backbone="toy", benchmark=os.path.join(WORLD, "mmvp"),
                            zeroshot=[("folder", os.path.join(WORLD, "zeroshot"))])
    return parser.parse_args(argv)


def zeroshot_task(text):
    """An argparse type: NAME:PATH as (name, path)."""
    name, _, path = text.partition(":")
    return name, path


def check_usage(args):
    """UserError for combinations of options that make no sense, and for unwritable outputs."""
    if not args.benchmark and not args.zeroshot:
        raise UserError("nothing to evaluate: download MMVP/MMVP_VLM from Hugging Face and name "
                        "its folder with --benchmark, or give --zeroshot NAME:PATH")
    if len(dict(args.zeroshot)) < len(args.zeroshot):
        raise UserError("--zeroshot: a set is given twice")
    if args.baseline == "original" and not args.weights:
        raise UserError("--baseline original: also name a CLIP with --weights")
    if args.picture and not (args.baseline and args.benchmark):
        raise UserError("--picture shows the pairs whose verdict changed: name the pairs by "
                        "--benchmark DIR, and what to compare with by --baseline FILE|original")
    taken = [os.path.realpath(path) for path in (args.weights, args.baseline) if path]
    for path in [path for path in (args.json, args.picture) if path]:
        real = os.path.realpath(path)
        if real in taken or os.path.dirname(real) in taken:
            raise UserError(f"{path} is part of a CLIP, or named twice: name another file")
        gh.check_writable(path)
        taken.append(real)


def run(argv):
    args = parse_arguments(argv)
    check_usage(args)
    if args.preset == "toy":
        from toy.make_toy import draw_world
        draw_world(WORLD)
    if args.benchmark:
        check_benchmark(args.benchmark)
    for name, path in args.zeroshot:
        check_zeroshot(name, path)
    sources = {"before": args.baseline} if args.baseline else {}
    sources["after"] = args.weights or "original"
    models = {key: load_clip(args.backbone, None if source == "original" else source)
              for key, source in sources.items()}  # all of them, before the first evaluation
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for key, (clip, preprocess, tokenizer) in models.items():
        results[key] = evaluate(clip.to(device), preprocess, tokenizer, args.benchmark,
                                args.zeroshot, args.batch_size)
    print_table(results)
    if args.json:
        prompts = {name: len(PROMPTS[name]) for name, _ in args.zeroshot if name in PROMPTS}
        about = {"backbone": args.backbone, "models": sources, "prompts": prompts}
        gh.write_json(args.json, about | report(results))
    if args.picture:
        draw_changes(args.picture, results["before"], results["after"])
    raise_failures(results.values())


def report(results):
    """The results that --json writes: summaries, the table's rows, and every pair's scores."""
    content = {key: summary(result) for key, result in results.items()}
    content |= {"rows": make_rows(results), "pairs": []}
    for judged in zip(*[result["pairs"] for result in results.values()], strict=True):
        entry = {key: judged[0][key] for key in ("ids", "type", "statements")}
        for key, pair in zip(results, judged, strict=True):
            entry[key] = {"scores": pair["scores"], "correct": pair["correct"]}
        content["pairs"].append(entry)
    return content


def main(argv=None):
    gh.run_command("eval_mmvp.py", run, argv)


if __name__ == "__main__":
    main()
