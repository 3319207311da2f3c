"""MMVP-VLM, the paper's measure of fine vision (Table 1), and zero-shot retention (Table 3).

    python eval_mmvp.py --preset toy --weights runs/toy-rf/open_clip --baseline original
    python eval_mmvp.py --weights open_clip --baseline original --benchmark MMVP_VLM \\
        --zeroshot imagenet:DIR cifar100:DIR --json result.json --picture changed.png
    python eval_mmvp.py --weights open_clip --zeroshot imagenet:DIR    # without MMVP-VLM

Every number comes with its noise. "before" is the --baseline, "after" is the model of --weights.
The protocol is that of the benchmark's own evaluate_vlm.py (github.com/tsb0601/MMVP) but for two
points. A pair's pattern is what its Type column says; there, it follows from the row number. Images
are converted to RGB before they are resized; there, afterwards, which differs only for palette,
RGBA and CMYK images.
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
from collections import namedtuple
from contextlib import contextmanager
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle threads sleep, not spin

import numpy as np
import open_clip
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image, ImageDraw, ImageFont, ImageOps
from timm.data import ImageNetInfo  # open_clip requires timm
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100
from tqdm import tqdm

from genhancer import (
    Parser,
    UserError,
    check_writable,
    escape,
    find_model,
    first_line,
    image_side,
    load_strictly,
    message_of,
    number,
    read_json,
    read_pickle,
    read_weights,
    run_command,
    start_method,
    write_file,
    write_json,
    write_tensors,
    write_text,
    write_weights,
)

TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")


class Backbone(NamedTuple):
    model: str         # open_clip's name
    pretrained: str    # open_clip's tag, which it downloads, or a file


BACKBONES = {  # the six of Table 1, and the toy; to add one, add a row
    "openai-l14-224": Backbone("ViT-L-14-quickgelu", "openai"),
    "openai-l14-336": Backbone("ViT-L-14-336-quickgelu", "openai"),
    "metaclip-l14-224": Backbone("ViT-L-14-quickgelu", "metaclip_fullcc"),
    "metaclip-h14-224": Backbone("ViT-H-14-quickgelu", "metaclip_fullcc"),
    "siglip-so400m-224": Backbone("ViT-SO400M-14-SigLIP", "webli"),
    "siglip-so400m-384": Backbone("ViT-SO400M-14-SigLIP-384", "webli"),
    "toy": Backbone("toy-clip", os.path.join(TOY, "clip.safetensors")),
}


# ---- CLIP in and out -----------------------------------------------------------------------------

def load_clip(name, weights=None, random=False):
    """Load a CLIP: a row of BACKBONES, or open_clip's MODEL:TAG, whose weights it downloads.

    `weights` names local ones instead, which need no network: a folder or file of open_clip's or
    HuggingFace's, OpenAI's own archive, or a larger program's checkpoint. No code in them is run.
    What a visual tower alone lacks is the backbone's own, as without `weights`, and a line says so.
    `random=True` keeps the random initialisation, and needs no tag.

    Returns (clip, preprocess, tokenizer): the open_clip model on the CPU, float32, eval and frozen;
    the transform from a PIL image to its input, with the tag's mean, std and resizing; the function
    from a list of strings to token ids. Raises UserError for an unknown name, and for weights that
    do not fit, or beside which a configuration says other than what the backbone computes.
    """
    backbone = find_backbone(name, weights, random)
    if name == "toy" and weights is None:
        weights = backbone.pretrained
    if random or weights is None:
        clip = create_clip(backbone, download=not random)
    else:
        clip = load_clip_file(name, backbone, weights)
    preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)

    def tokenizer(texts):
        return make_tokenizer(backbone.model)(texts)

    return clip.float().eval().requires_grad_(False), preprocess, tokenizer


def find_backbone(name, weights=None, random=False):
    """The Backbone that load_clip would load; UserError if it, or its weights, are not there."""
    if name == "toy" and "toy-clip" not in open_clip.list_models():
        open_clip.add_model_config(os.path.join(TOY, "toy-clip.json"))
    model, _, tag = name.partition(":")
    backbone = BACKBONES.get(name, Backbone(model, tag))
    if backbone.model not in open_clip.list_models():
        rows = ", ".join(BACKBONES)
        raise UserError(f"unknown backbone {name!r}: choose from {rows}, "
                        "or name open_clip's MODEL:TAG")
    known = name in BACKBONES or open_clip.is_pretrained_cfg(model, tag)
    if not known and (tag or not random):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise UserError(f"{name!r} names no tag of open_clip's, which says how images are prepared "
                        f"and which activation is computed: name {model}:TAG with one of its tags "
                        f"({tags or 'it has none: choose another model'})")
    if weights is not None and not random:
        find_files(weights)
    return backbone


def create_clip(backbone, download=False):
    """An open_clip model that computes what its tag says: random, or with weights from the hub."""
    published = open_clip.get_pretrained_cfg(backbone.model, backbone.pretrained) or {}
    config = open_clip.get_model_config(backbone.model)
    config["quick_gelu"] = bool(config.get("quick_gelu") or published.get("quick_gelu"))
    try:
        logging.disable()  # open_clip logs what is raised here, and warns of random weights
        clip = open_clip.create_model(
            backbone.model,
            pretrained=backbone.pretrained if download else None,
            load_weights=download,
            pretrained_hf=False,
            force_quick_gelu=config["quick_gelu"],  # which plain ViT-L-14 leaves to its tags
            force_preprocess_cfg=published,  # of which it takes mean, std and how to resize
        )
        clip.model_cfg = config  # for whoever exports it
        return clip
    except Exception as error:  # open_clip, the hub and the network each raise their own
        raise UserError(f"open_clip cannot make {backbone.model} ({first_line(error)}): download "
                        f"its weights {backbone.pretrained!r} where there is a network, and name "
                        "the local file") from None
    finally:
        logging.disable(logging.NOTSET)


@lru_cache
def make_tokenizer(model):
    """open_clip's text tokenizer, made when there is text: SigLIP's comes from the hub."""
    try:
        return open_clip.get_tokenizer(model)
    except Exception as error:  # as in create_clip
        raise UserError(f"open_clip cannot make the text tokenizer of {model} "
                        f"({first_line(error)}): it needs `pip install transformers` and, once, "
                        "the network") from None


# ---- reading weights, running nothing ----

OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
OPEN_CLIP_CONFIG = "open_clip_config.json"
FILES = (  # names of weights in a folder, as open_clip prefers them; two are HuggingFace's
    OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin",
)
# Not weights: masks, positions, and the three integers in OpenAI's archives.
IGNORED = ("attn_mask", "position_ids", "input_resolution", "context_length", "vocab_size")
TOWER = ("visual.", "vision_model.")  # in open_clip's format, in HuggingFace's
HF_PATCHES = "embeddings.patch_embedding.weight"


def load_clip_file(name, backbone, path):
    """A CLIP with the weights of a local file or folder, or of a visual tower alone."""
    what = f"CLIP weights for {backbone.model}"
    tensors = {}
    for file in find_files(path):
        tensors.update(read_tensors(file, what))
    clip = create_clip(backbone)
    tensors, is_hf = unwrap(clip, tensors, path, what)
    if is_hf:
        check_export(name, clip)  # what transformers cannot hold is not in its files
    alone = tensors and all(key.startswith((*TOWER, "visual_projection.")) for key in tensors)
    if alone:
        print(f"{what}: {path} is a visual tower alone: all else is {name}'s", file=sys.stderr)
        clip = create_clip(backbone, download=True)
    weights = hf_weights(clip) if is_hf else clip.state_dict()
    if alone:
        tensors = {key: weights[key] for key in weights if not key.startswith(TOWER)} | tensors
    for key in ("logit_scale", "logit_bias"):
        if key in weights and getattr(tensors.get(key), "shape", None) == (1,):
            tensors[key] = tensors[key].reshape(weights[key].shape)  # as older files have it
    load_strictly(weights, tensors, path, what)
    if is_hf and is_siglip(clip):  # these two are no views
        pool = clip.visual.trunk.attn_pool.state_dict()
        for kind in ("weight", "bias"):
            packed = weights[f"vision_model.head.attention.in_proj_{kind}"]
            rows = len(packed) // 3
            pool[f"q.{kind}"].copy_(packed[:rows])
            pool[f"kv.{kind}"].copy_(packed[rows:])
    check_config(name, clip, path, what, is_hf, alone)
    return clip


def unwrap(clip, tensors, path, what):
    """The tensors of the one CLIP among these, and whether they are in HuggingFace's format."""
    names = clip.state_dict()
    for last in reversed(clip.visual.state_dict()):
        if sum(name.endswith(f".{last}") for name in names) == 1:
            break  # no other name of this CLIP ends like that
    pattern = rf"(visual\.)?{re.escape(last)}|(vision_model\.)?{re.escape(HF_PATCHES)}"
    tensors, found = find_model(tensors, pattern, path, what)
    # A tower alone may lack its name, as open_clip and transformers 5 save it.
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
            shards = read_json(f"{file}.index.json", "weight_map").values()
            names = sorted({os.path.basename(str(shard)) for shard in shards})
            return [os.path.join(path, name) for name in names]
    raise UserError(f"CLIP weights: the folder {path} is neither in open_clip's nor in "
                    f"HuggingFace's format (it holds no {', '.join(FILES)}): name a file")


def read_tensors(path, what):
    """The tensors of one file, by name: safetensors, torch.save's, or OpenAI's own TorchScript."""
    if path.endswith(".safetensors"):
        return read_weights(path, what)[0]
    if os.path.isfile(path) and is_openais(path):
        return torch.jit.load(path, map_location="cpu").state_dict()
    return read_pickle(path, what)


def is_openais(path):
    """Whether OpenAI published this very file, by its SHA-256, which is a part of its address.

    Loading a TorchScript archive runs code that is in it: no other one is loaded.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    models = open_clip.list_pretrained_models_by_tag("openai")
    return any(digest in open_clip.get_pretrained_cfg(name, "openai")["url"] for name in models)


# ---- what shows in no shape ----

def check_config(name, clip, path, what, is_hf, alone):
    """Refuse weights if the JSON files beside them say other than what the backbone computes."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    published = ("gelu_pytorch_tanh", "gelu")  # of SigLIPs: theirs, ours; 5e-4 apart at most
    for file, part, said, ours in (read_hf if is_hf else read_open_clip)(folder, clip):
        if alone and part.startswith("text"):
            continue
        for key, value in ours.items():
            line = f"{file} says {key} {said[key]!r} ({part}), and {name} computes {value!r}"
            if is_siglip(clip) and (said[key], value) == published:
                print(f"{what}: {line}, which is close", file=sys.stderr)
            elif said[key] != value:
                raise UserError(f"{what}: {line}: choose another backbone")


def read_open_clip(folder, clip):
    """[(file, part, what it says, what the clip computes)] of a folder's open_clip_config.json."""
    file = os.path.join(folder, OPEN_CLIP_CONFIG)
    if not os.path.isfile(file):
        return []
    config = read_json(file)
    try:
        said = spell_out(config["model_cfg"], config.get("preprocess_cfg", {}))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no configuration of this open_clip's ({first_line(error)}): "
                        "update open_clip, or choose other weights") from None
    ours = spell_out(clip.model_cfg, clip.visual.preprocess_cfg)
    return [(file, part, said[part], ours[part]) for part in ours]


# What changes no features: a part's origin, names, what only training does, an unread size.
WITHOUT_EFFECT = {"timm_model_pretrained", "hf_model_pretrained", "hf_tokenizer_name", "size",
                  "patch_dropout", "timm_drop", "timm_drop_path", "output_tokens"}


def spell_out(model_cfg, preprocess_cfg):
    """open_clip's configuration, with its own values where it is silent: {part: {key: value}}."""
    parts = {
        "model_cfg": {"quick_gelu": bool(model_cfg.get("quick_gelu"))},
        "vision_cfg": vars(CLIPVisionCfg(**model_cfg["vision_cfg"])),
        "text_cfg": vars(CLIPTextCfg(**model_cfg["text_cfg"])),
        "preprocess_cfg": merge_preprocess_dict(PreprocessCfg(), preprocess_cfg),
    }
    for part, values in parts.items():
        parts[part] = {key: values[key] for key in values if key not in WITHOUT_EFFECT}
    return json.loads(json.dumps(parts))  # of tuples this makes lists


def read_hf(folder, clip):
    """As read_open_clip, of HuggingFace's files; where they are silent, transformers' values."""
    ours = hf_config(clip) | {"image_processor": hf_preprocessor(clip.visual.preprocess_cfg)}
    kind = ours["model_type"]
    says = []
    for name, part in (
        ("config.json", "vision_config"),
        ("config.json", "text_config"),
        ("preprocessor_config.json", "image_processor"),  # transformers 4 has it here,
        ("processor_config.json", "image_processor"),     # and 5 here, where 4 names a class alone
    ):
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            continue
        said = read_json(file, f"{part}_dict", part)  # transformers prefers the former, an old one
        if not str(said.get("model_type", kind)).startswith(kind):
            continue  # a larger program's
        if name == "processor_config.json" and "image_processor_type" not in said:
            continue
        silent = hf_defaults(part, kind)
        said = silent | {key: value for key, value in said.items() if value is not None}
        if isinstance(said.get("size"), int):  # older spellings
            said["size"] = {"shortest_edge": said["size"]}
        if isinstance(said.get("crop_size"), int):
            said["crop_size"] = dict.fromkeys(("height", "width"), said["crop_size"])
        shown = {key: value for key, value in ours[part].items() if key in silent}
        says.append((file, part, said, shown))
    return says


def hf_defaults(part, kind):
    """What transformers takes where a part of a "clip"'s or "siglip"'s files is silent."""
    if part == "image_processor":  # open_clip's defaults are OpenAI's, too
        half = [0.5, 0.5, 0.5]
        look = {"mean": half, "std": half, "resize_mode": "squash"} if kind == "siglip" else {}
        return hf_preprocessor(vars(PreprocessCfg(**look)))
    tower = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 12}
    if kind == "siglip":
        return tower | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    return tower | ({"num_attention_heads": 8} if part == "text_config" else {})


# ---- open_clip's format ----

def export_open_clip(clip, folder):
    """Write a CLIP (LoRA merged) for open_clip, which takes "local-dir:FOLDER" for a model's name.

    The weights are written last: if they are whole, so is the folder. SigLIP's text tokenizer is
    not in open_clip's package.
    """
    config = {"model_cfg": clip.model_cfg, "preprocess_cfg": clip.visual.preprocess_cfg}
    write_json(os.path.join(folder, OPEN_CLIP_CONFIG), config)
    write_weights(os.path.join(folder, OPEN_CLIP_WEIGHTS), clip.state_dict())


def how_to_open(name, out):
    """The calls that open the exported CLIP in out/open_clip and out/hf, and what these lack."""
    line = (f"open_clip.create_model_and_transforms('local-dir:{out}/open_clip') and "
            f"transformers.AutoModel.from_pretrained('{out}/hf') open the enhanced CLIP")
    config = open_clip.get_model_config(find_backbone(name, random=True).model)
    hub = config["text_cfg"].get("hf_tokenizer_name")
    if hub:
        google = "google/siglip2" if "SigLIP2" in hub else "google/siglip"
        line += (f"; for text, add the tokenizer files of {hub} to open_clip/, and google's own "
                 f"(such as {google}-so400m-patch14-384's) to hf/")
    return line


# ---- HuggingFace's format ----

HF_NAMES = [  # (open_clip's, HuggingFace's): replaced from top to bottom, for export and import
    ("visual.trunk.",          "visual."),
    ("visual.proj",            "visual_projection.weight"),
    ("visual.norm",            "visual.post_layernorm"),
    ("visual.",                "vision_model."),
    ("text.text_projection.",  "text_model.head."),
    ("text.text_projection",   "text_projection.weight"),
    ("text.",                  "text_model."),
    ("attn_pool.latent",       "head.probe"),
    ("attn_pool.q.",           "head.attention.in_proj_"),  # one tensor there, two here
    ("attn_pool.kv.",          "head.attention.in_proj_"),
    ("attn_pool.proj",         "head.attention.out_proj"),
    ("attn_pool.norm",         "head.layernorm"),
    ("attn_pool.mlp",          "head.mlp"),
    ("class_embedding",        "embeddings.class_embedding"),
    ("token_embedding",        "embeddings.token_embedding"),
    ("positional_embedding",   "embeddings.position_embedding.weight"),
    ("pos_embed",              "embeddings.position_embedding.weight"),
    ("conv1",                  "embeddings.patch_embedding"),
    ("patch_embed.proj",       "embeddings.patch_embedding"),
    ("ln_pre",                 "pre_layrnorm"),
    ("ln_post",                "post_layernorm"),
    ("ln_final",               "final_layer_norm"),
    ("transformer.resblocks.", "encoder.layers."),
    ("blocks.",                "encoder.layers."),
    ("ln_1",                   "layer_norm1"),
    (".norm1",                 ".layer_norm1"),
    ("ln_2",                   "layer_norm2"),
    (".norm2",                 ".layer_norm2"),
    ("attn.in_proj_",          "self_attn.QKV_proj."),
    ("attn.qkv.",              "self_attn.QKV_proj."),
    ("attn.out_proj",          "self_attn.out_proj"),
    ("attn.proj",              "self_attn.out_proj"),
    ("mlp.c_fc",               "mlp.fc1"),
    ("mlp.c_proj",             "mlp.fc2"),
]
PROJECTIONS = ("visual_projection.weight", "text_projection.weight")  # HuggingFace transposes them


def hf_weights(clip):
    """The weights of an open_clip CLIP or SigLIP under HuggingFace's names and in its shapes.

    Each is a view of the clip's own tensor, so that export reads it and import writes it; but the
    two that SigLIP's pooling head packs are copies.
    """
    weights = {}
    for key, tensor in clip.state_dict().items():
        top = key.partition(".")[0]
        # open_clip's CLIP has its text tower's parts at the top.
        name = key if top in ("visual", "text", "logit_scale", "logit_bias") else f"text.{key}"
        for ours, theirs in HF_NAMES:
            name = name.replace(ours, theirs)
        if name in PROJECTIONS:
            tensor = tensor.T
        elif key == "visual.trunk.pos_embed":
            tensor = tensor[0]
        elif top.startswith("logit_") and is_siglip(clip):
            tensor = tensor.reshape(1)
        if "QKV" in name:  # one tensor here, three there
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("QKV", letter)] = rows
        elif name in weights:  # the pooling head's q comes first, then its k and v
            weights[name] = torch.cat([weights[name], tensor])
        else:
            weights[name] = tensor
    return weights


def is_siglip(clip):
    return isinstance(clip.visual, open_clip.timm_model.TimmModel)


# What may vary in open_clip's configuration, since shapes or hf_config show it. All else must be
# as open_clip has it for ViT-B-32, or for ViT-B-16-SigLIP.
HF_VARIES = {"width", "layers", "heads", "head_width", "mlp_ratio", "patch_size", "image_size",
             "context_length", "norm_kwargs", "act_kwargs"}
SIGLIP_VARIES = {"timm_model_name", "vocab_size", "tokenizer_kwargs"}


def check_export(name, clip):
    """Refuse, with a UserError, a CLIP that transformers' CLIPModel or SiglipModel cannot hold."""
    siglip = is_siglip(clip)
    reference = open_clip.get_model_config("ViT-B-16-SigLIP" if siglip else "ViT-B-32")
    varies = HF_VARIES | SIGLIP_VARIES if siglip else HF_VARIES
    held, ours = spell_out(reference, {}), spell_out(clip.model_cfg, {})
    for part in ("vision_cfg", "text_cfg"):
        for key, value in ours[part].items():
            if value != held[part][key] and (key not in varies or isinstance(value, list)):
                raise UserError(f"{name} does not fit into HuggingFace's format ({part}: {key} is "
                                f"{value!r}, not {held[part][key]!r}): choose another backbone")


def export_hf(clip, folder):
    """Write a CLIP (LoRA merged) for transformers, if check_export takes it: CLIPModel,
    CLIPVisionModel or SiglipModel `.from_pretrained(folder)` loads it. SigLIP's text tokenizer is
    not in open_clip's package."""
    config = hf_config(clip)
    images = hf_preprocessor(clip.visual.preprocess_cfg)
    images["image_processor_type"] = f"{'Siglip' if is_siglip(clip) else 'CLIP'}ImageProcessor"
    write_json(os.path.join(folder, "config.json"), config)
    write_json(os.path.join(folder, "preprocessor_config.json"), images)
    if not is_siglip(clip):
        write_hf_tokenizer(folder, config["text_config"]["max_position_embeddings"])
    weights = {name: tensor.cpu() for name, tensor in hf_weights(clip).items()}
    write_tensors(os.path.join(folder, "model.safetensors"), weights, {"format": "pt"})


def hf_config(clip):
    """transformers' config.json for an open_clip CLIP or SigLIP, read off its modules."""
    kind = "siglip" if is_siglip(clip) else "clip"
    weights = hf_weights(clip)
    visual, text = clip.visual, getattr(clip, "text", clip)
    patch = weights["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    vocabulary = len(weights["text_model.embeddings.token_embedding.weight"])
    positions = len(weights["text_model.embeddings.position_embedding.weight"])
    config = {"model_type": kind, "torch_dtype": "float32"}
    config["architectures"] = ["SiglipModel" if is_siglip(clip) else "CLIPModel"]
    vision = hf_tower(visual.trunk.blocks if is_siglip(clip) else visual.transformer.resblocks)
    vision |= {"model_type": f"{kind}_vision_model"}
    vision |= {"image_size": image_side(visual), "patch_size": patch}
    text = hf_tower(text.transformer.resblocks) | {"model_type": f"{kind}_text_model"}
    text |= {"vocab_size": vocabulary, "max_position_embeddings": positions}
    if is_siglip(clip):
        text["projection_size"] = len(weights["text_model.head.weight"])
    else:
        text["bos_token_id"] = vocabulary - 2
        text["eos_token_id"] = vocabulary - 1  # a wrong one would pool another position
        for part in (config, vision, text):
            part["projection_dim"] = len(weights["visual_projection.weight"])
    return config | {"vision_config": vision, "text_config": text}


ACTIVATIONS = {
    "quick_gelu": open_clip.transformer.QuickGELU(),
    "gelu": nn.GELU(),
    "gelu_pytorch_tanh": nn.GELU("tanh"),
}


def hf_tower(blocks):
    """What config.json says of a tower's transformer blocks."""
    # timm's blocks and open_clip's begin with a norm, their MLPs with a linear layer and its GELU.
    norm = next(blocks[0].children())
    linear, gelu = list(blocks[0].mlp.children())[:2]
    x = torch.linspace(-3, 3, 7)  # a GELU has many classes: its values tell which one it is
    activation = next(name for name, other in ACTIVATIONS.items() if gelu(x).allclose(other(x)))
    return {"hidden_size": linear.in_features, "intermediate_size": linear.out_features,
            "num_hidden_layers": len(blocks), "num_attention_heads": blocks[0].attn.num_heads,
            "layer_norm_eps": norm.eps, "attention_dropout": 0.0, "hidden_act": activation}


def hf_preprocessor(config):
    """open_clip's configuration of images in transformers' words, but for the class's name."""
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
    """CLIP's text tokenizer for transformers."""
    tokenizer = open_clip.SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    renamed = {"<start_of_text>": start, "<end_of_text>": end}
    vocabulary = {renamed.get(token, token): i for token, i in tokenizer.encoder.items()}
    merges = ["#version: 0.2"] + [" ".join(pair) for pair in tokenizer.bpe_ranks]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length}
    config |= {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(os.path.join(folder, "vocab.json"), vocabulary)
    write_text(os.path.join(folder, "merges.txt"), "\n".join(merges) + "\n")
    write_json(os.path.join(folder, "tokenizer_config.json"), config)


# ---- MMVP-VLM ------------------------------------------------------------------------------------


def evaluate_mmvp(clip, preprocess, tokenizer, benchmark_dir, batch_size=64):
    """MMVP-VLM on the clip's device, in float32; leaves the clip in eval mode.

    Each statement chooses one of its pair's two images; a pair is right if both choose their own.
    Returns a dict:
    - "average": the mean over the patterns, in percent;
    - "patterns": {pattern: percent of its pairs that are right}, in order of first appearance;
    - "pairs": read_benchmark's, each with "scores" (of each statement: the probability that it
      gives to the first image) and "correct".
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
        scores = check_finite(logits.softmax(dim=-1)[..., 0])  # SigLIP's bias would cancel here
    for pair, of_pair in zip(pairs, scores.tolist(), strict=True):
        pair["scores"] = tuple(of_pair)
        pair["correct"] = is_right(pair, 0) and is_right(pair, 1)
    patterns = {name: percent([right]) for name, right in by_pattern(pairs).items()}
    average = sum(patterns.values()) / len(patterns)
    return {"average": average, "patterns": patterns, "pairs": pairs}


def is_right(pair, i):
    """Whether statement i chose as it should: image i."""
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
    """The pairs of an MMVP-VLM folder, in the order of its Questions.csv, two rows each.

    Returns dicts: "ids" (2 integers), "type", "statements" (2 strings), "images" (2 paths).
    Raises UserError, with file and row, for whatever is not as the benchmark's authors lay it out.
    """
    path = os.path.join(benchmark_dir, "Questions.csv")
    rows = read_rows(path)
    pairs = {}
    for first, second in zip_longest(rows[::2], rows[1::2]):
        where = f"{path}, row {first.line}"
        partner = (first.id + 1, first.type)
        if first.id % 2 == 0 or second is None or (second.id, second.type) != partner:
            raise UserError(f"{where}: id {first.id} of Type {first.type} starts no pair: a pair "
                            "is an odd id and, in the next row, the next id of the same Type")
        if (first.type, first.id) in pairs:
            raise UserError(f"{where}: the pair {first.id}, {second.id} is listed twice")
        pairs[first.type, first.id] = {
            "ids": (first.id, second.id),
            "type": first.type,
            "statements": (first.statement, second.statement),
            "images": tuple(find_image(benchmark_dir, row, path) for row in (first, second)),
        }
    return list(pairs.values())


Row = namedtuple("Row", "line id type statement")


def read_rows(path):
    """The Rows of a Questions.csv below its header; `line` is the line's number in the file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            table = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} not found, or no CSV file in UTF-8 ({first_line(error)}): "
                        "download MMVP/MMVP_VLM from Hugging Face and name its folder with "
                        "--benchmark") from None
    rows = []
    for line, cells in [(line, cells) for line, cells in table if any(cells)][1:]:
        if len(cells) != 3 or not all(cells) or not cells[0].isdecimal() or len(cells[0]) > 18:
            raise UserError(f"{path}, row {line}: must be a number, a Type and a statement (in "
                            f"quotes if it has a comma), not {','.join(cells)[:200]}")
        if cells[1] == ".." or "/" in cells[1]:
            raise UserError(f"{path}, row {line}: the Type {cells[1]} is no name of a folder")
        rows.append(Row(line, int(cells[0]), cells[1], cells[2]))
    if not rows:
        raise UserError(f"{path} is empty: it must hold a header (Question ID,Type,Statement) and "
                        "two rows for each pair")
    return rows


def find_image(benchmark_dir, row, path):
    """The image of a row of the benchmark's table, which lies at `path`."""
    images = os.path.join(benchmark_dir, "MLLM_VLM_Images")  # as some copies spell it
    if not os.path.isdir(images):
        images = os.path.join(benchmark_dir, "MLLM_VLM Images")
    stem = os.path.join(images, row.type, str(row.id))
    for suffix in (".jpg", ".jpeg", ".png"):
        if os.path.isfile(stem + suffix):
            return stem + suffix
    raise UserError(f"{path}, row {row.line}: image not found: {stem}.jpg (or .jpeg or .png)")


# ---- Images and texts to features ----------------------------------------------------------------

MANY = 5_000  # images: larger sets are decoded by worker processes


@contextmanager
def exact_float32():
    """No gradients, and no TF32 whatever the caller has set: all programs print the same digits."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    callers = (conv.fp32_precision, matmul.fp32_precision)
    conv.fp32_precision = matmul.fp32_precision = "ieee"
    try:
        with torch.no_grad():
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{first_line(error)}: choose a smaller --batch-size, or a GPU with more "
                        "free memory by CUDA_VISIBLE_DEVICES") from None
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


# Pillow guesses a format from the content: an EPS named .jpg would run Ghostscript, maybe for ever.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# A file without any suffix is taken for an image, too, as some downloaders write it.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif",
                  ".tiff")


def read_image(path):
    """Decode to RGB as open_clip's own preprocessing does."""
    try:
        if not os.path.isfile(path):  # a named pipe would hang
            raise OSError("not a file")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # over broken files the decoders raise nearly anything
        message = f"cannot decode the image {path} ({first_line(error)}): replace it"
        raise UserError(message) from None


def encode_images(clip, dataset, batch_size):
    """A dataset of (image, label): unit features (N, D) and labels (N,), on the clip's device."""
    device = clip.logit_scale.device
    workers = min(8, os.cpu_count() or 1) if len(dataset) > MANY else 0
    context = start_method() if workers else None
    loader = DataLoader(dataset, batch_size, num_workers=workers, multiprocessing_context=context)
    features = []
    labels = []
    try:
        for images, batch_labels in tqdm(loader, "images", leave=False, disable=None):
            features.append(clip.encode_image(images.to(device), normalize=True))
            labels.append(batch_labels)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"a process that decodes images died ({first_line(error)}): this machine "
                        "may be short of memory or of /dev/shm (Docker: --ipc=host)") from None
    return torch.cat(features), torch.cat(labels).to(device)


def encode_texts(clip, tokenizer, texts, batch_size):
    """Unit features (N, D) of N strings, on the clip's device."""
    device = clip.logit_scale.device
    features = []
    for i in range(0, len(texts), batch_size):
        tokens = tokenizer(texts[i : i + batch_size]).to(device)
        features.append(clip.encode_text(tokens, normalize=True))
    return torch.cat(features)


def check_finite(similarities):
    if not similarities.isfinite().all():
        raise UserError("the CLIP's features are not finite: its weights are broken, use others")
    return similarities


# ---- What is noise -------------------------------------------------------------------------------


def summarize(results):
    """The table's rows, in percent: each pattern, their average, then each zero-shot metric.

    results: {any name: evaluate's result}, or {"before": ..., "after": ...} to compare the two.
    A row is what make_row returns. The average's interval is that of pairs redrawn within their
    patterns, a recall's that of redrawn images: the queries of one image are not independent.
    """
    patterns = {key: by_pattern(result["pairs"]) for key, result in results.items()}
    some, *_ = results
    rows = []
    for name in patterns[some]:
        groups = {key: [of_pattern[name]] for key, of_pattern in patterns.items()}
        rows.append(make_row(name, "pairs", groups))
    if rows:
        groups = {key: list(of_pattern.values()) for key, of_pattern in patterns.items()}
        rows.append(make_row("average", "pairs", groups, resample=True))
    measured = [result["outcomes"] for result in results.values()]
    for name in [name for name in measured[0] if all(name in outcomes for outcomes in measured)]:
        groups = {key: [result["outcomes"][name]] for key, result in results.items()}
        rows.append(make_row(name, "images", groups, resample=not name.endswith("accuracy")))
    return rows


def make_row(name, unit, groups, resample=False):
    """One row of the table, in percent, with its 95 % intervals.

    groups: {"before"/"after"/any name: arrays, whose means are averaged}, of one value for each of
    the row's `unit`, "pairs" or "images". resample: the intervals are bootstrap's, else wilson's,
    for one array of 0 and 1. Of two models: how many values rose (won) and fell (lost), and the
    exact sign test's p, which for 0 and 1 is McNemar's.
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
    """Wilson's 95 % score interval (low, high) of a share, k of n: for 0 it is 0, z² / (n + z²)."""
    centre = k + z * z / 2
    spread = z * math.sqrt(k * (n - k) / n + z * z / 4)
    low = (centre - spread) / (n + z * z)
    high = (centre + spread) / (n + z * z)
    return low, min(1.0, high)  # not 1 and a rounding error


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
    """McNemar's exact two-sided p: that fair coins split won + lost at least this unevenly."""
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
    "imagenet": "the validation images in 1000 subfolders, n01440764 to n15075141",
    "cars": CLASS_FOLDERS,
    "folder": CLASS_FOLDERS,
    "flickr30k": "a folder with Karpathy's dataset_flickr30k.json and the images beside it",
    "coco": "a folder with Karpathy's dataset_coco.json and the images in val2014/ beside it",
}
PHOTOS = ["a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}.",
          "a low contrast photo of a {}.", "a high contrast photo of a {}.",
          "a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.",
          "a photo of a big {}."]
PROMPTS = {  # as published with CLIP (github.com/openai/CLIP); that of folder is ours
    "cifar100": PHOTOS + [photo.replace(" of a ", " of the ") for photo in PHOTOS],
    "sun397": ["a photo of a {}.", "a photo of the {}."],
    "imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
    "cars": ["a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!",
             "a photo of my dirty {}.", "a photo of my clean {}.", "a photo of my new {}.",
             "a photo of my old {}."],
    "folder": ["a photo of a {}."],
}
CAPTIONED = ("flickr30k", "coco")  # retrieval; the others are classifications


def evaluate(clip, preprocess, tokenizer, benchmark_dir, zeroshot=(), batch_size=64):
    """evaluate_mmvp's result, with that of every (name, path) in `zeroshot`.

    Adds "outcomes", {metric: (images,) array whose mean is the metric}, and "zeroshot", {metric:
    percent}. "NAME accuracy" (top 1): 1.0 for an image whose class is right. "NAME image recall@5"
    and "NAME text recall@5": an image's share of queries that find one of their own among the first
    five. Without a benchmark (None) there are no patterns and pairs, and the average is None. A set
    that fails is left out, and its message is in "failures": see raise_failures.
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
            result["failures"].append(f"{name} was not measured: {message_of(error)}")
            continue
        for metric, values in outcomes.items():
            result["outcomes"][f"{name} {metric}"] = values
    result["zeroshot"] = {metric: percent([of]) for metric, of in result["outcomes"].items()}
    return result


def raise_failures(results):
    """UserError for the sets that failed, to be called once all other results are written."""
    failures = [failure for result in results for failure in result["failures"]]
    if failures:
        raise UserError("; ".join(dict.fromkeys(failures)))


def summary(result):
    """What of evaluate's result is written to files: all of it in percent, nothing by image."""
    return {key: result[key] for key in ("average", "patterns", "zeroshot")}


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
    return {
        "image recall@5": of_image * len(images) / len(captions),
        "text recall@5": text_found.astype(float),
    }


def finds_own(queries, gallery, query_owner, gallery_owner, k=5):
    """Which queries (N, D) have an item of their own owner among the k nearest of the gallery.

    gallery: (M, D). Owners: (N,) and (M,) integers. Returns (N,) booleans.
    """
    k = min(k, len(gallery))
    nearest = check_finite(queries @ gallery.T).topk(k).indices               # (N, k)
    owners = gallery_owner[nearest]                                           # (N, k)
    return (owners == query_owner[:, None]).any(dim=1)


def check_zeroshot(name, path, preprocess=None):
    """Find a set of ZEROSHOT on disk; no model needed, no image decoded.

    Returns (dataset of (image, label), class names, templates) or, for retrieval, (dataset,
    captions, the index of each caption's image). Raises UserError with what to put where.
    """
    if name not in ZEROSHOT or not path:
        raise UserError(f"--zeroshot {name}:{path}: write NAME:PATH, where NAME is one of "
                        f"{', '.join(ZEROSHOT)}")
    open_set = open_captioned if name in CAPTIONED else open_labelled
    try:
        dataset, texts, more = open_set(name, path, preprocess)
        if not all(text.encode().strip() for text in texts):  # encode also finds broken characters
            raise UserError("a class name or caption is empty")
    except Exception as error:  # over broken files torchvision and json raise nearly anything
        why = str(error).partition(". You can use download=True")[0]  # an option of torchvision's
        message = f"--zeroshot {name}:{path}: {why}: PATH must be {ZEROSHOT[name]}"
        raise UserError(message) from None
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
        raise UserError(f"{len(names)} class folders")
    if name == "imagenet":
        synsets = ImageNetInfo().label_names()
        wrong = [name for name in synsets + names if name not in names or name not in synsets]
        if wrong:
            raise UserError(f"{len(names)} class folders; missing or unknown: {wrong[0]}")
        return dataset, open_clip.IMAGENET_CLASSNAMES, PROMPTS[name]  # in the synsets' order
    return dataset, [label.replace("_", " ") for label in names], PROMPTS[name]


def open_folders(folders, preprocess):
    """One folder per class -> ImageFiles. UserError for one that holds folders, or no image."""
    paths, labels, nested, left_out = [], [], [], 0
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
        left_out += len(entries) - len(images)
    if nested:
        raise UserError("a class folder holds images and no folders: if those are the classes, "
                        f"name {' or '.join(nested[:3])}, otherwise move them elsewhere")
    if left_out and preprocess is None:  # once, not again for each model
        print(f"{os.path.commonpath(folders)}: files left out for their suffix: {left_out} "
              f"(images are {', '.join(IMAGE_SUFFIXES)})", file=sys.stderr)
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


def print_table(before, after=None):
    """Print evaluate's result, or two of them side by side, in 100 columns; see summarize."""
    results = {"before": before, "after": after} if after else {"percent": before}
    rows = summarize(results)
    columns = "".join(f" {key + ' [95 %]':17}" for key in results)
    if after:
        columns += " change  won lost     p"
    for title, unit in (("MMVP-VLM pattern", "pairs"), ("zero-shot", "images")):
        shown = [row for row in rows if row["unit"] == unit]
        if shown:
            print(f"\n{title:33} {unit:>6}{columns}".rstrip())
        for row in shown:
            name = escape(row["name"])[:33]
            print(f"{name:33} {row['count']:6}{format_row(row, results)}".rstrip())
    if rows:
        print(f"\n{explain(rows)}")


def format_row(row, results):
    """A row's cells to the right of its name and count."""
    line = ""
    for key in results:
        low, high = row[key]["interval"]
        interval = f"[{low:4.1f}-{high:4.1f}]".replace("100.0", "100")
        line += f" {row[key]['percent']:5.1f} {interval:11}"
    if "change" in row:
        p = f"{row['p']:.3f}" if row["p"] >= 0.001 else f"{row['p']:.0e}"
        line += f"{row['change']:+7.1f} {row['won']:4} {row['lost']:4} {p:>5}"
    return line


def explain(rows):
    """What the rows of the table say."""
    noise = "To tell another model from noise, compare the two by --baseline."
    if "change" in rows[0]:
        noise = "A change may be noise if its interval holds 0 or its p (McNemar's) is above 0.05."
    of_pairs = [row for row in rows if row["unit"] == "pairs"]
    if not of_pairs:
        return noise
    *patterns, average = of_pairs
    worth = sorted(100 / row["count"] / len(patterns) for row in patterns)
    shares = sorted({f"{worth[0]:.2f}", f"{worth[-1]:.2f}"}, key=float)
    share = f"One pair is worth {' to '.join(shares)} % of the average."
    if "change" not in average:
        return f"{share}\n{noise}"
    low, high = average["change_interval"]
    return (f"The average changed by {average['change']:+.1f} [{low:+.1f}, {high:+.1f}]. {share}\n"
            f"{noise}\nEach pattern is one more chance of a small p by luck: go by the average.")


GREEN = "#15803d"
RED = "#dc2626"
SIDE = 200                  # of an image on the picture, in pixels
CARD = (2 * SIDE + 30, SIDE + 210)


def draw_changes(path, before, after, limit=12):
    """A sheet (PNG) of pairs whose verdict changed, in the manner of the paper's Fig. 10.

    Those won come first, framed in green, then those lost, in red. Of more than `limit` pairs,
    every second is shown, or every third, and so on.
    """
    both = list(zip(before["pairs"], after["pairs"], strict=True))
    won = [(old, new) for old, new in both if new["correct"] and not old["correct"]]
    lost = [(old, new) for old, new in both if old["correct"] and not new["correct"]]
    changed = won + lost
    shown = changed[::math.ceil(len(changed) / limit) or 1]
    width, height = CARD[0] + 10, CARD[1] + 10
    rows = math.ceil(len(shown) / 4)
    sheet = Image.new("RGB", (4 * width + 20, 60 + rows * height), "white")
    title = f"{len(won)} pairs won (green frame), {len(lost)} lost (red), of {len(both)}. "
    title += f"{len(shown)} are shown, with whether each statement chose the right image."
    ImageDraw.Draw(sheet).text((20, 15), title, "black", ImageFont.load_default(24))
    for i, (old, new) in enumerate(shown):
        sheet.paste(draw_card(old, new), (15 + i % 4 * width, 60 + i // 4 * height))
    write_file(path, lambda part: sheet.save(part, "PNG"))


def draw_card(old, new):
    """One changed pair: its two images, and how each model judged either statement."""
    width, height = CARD
    card = Image.new("RGB", CARD, "white")
    draw = ImageDraw.Draw(card)
    font = ImageFont.load_default(16)
    draw.rectangle((0, 0, width - 1, height - 1), None, GREEN if new["correct"] else RED, 4)
    draw.text((12, 9), escape(f"{old['type'][:40]} {old['ids']}"), "black", font)
    for i, file in enumerate(old["images"]):
        image = ImageOps.contain(read_image(file), (SIDE, SIDE), Image.Resampling.BOX)
        left = 10 + i * (SIDE + 10) + (SIDE - image.width) // 2
        card.paste(image, (left, 36 + (SIDE - image.height) // 2))
    for i, statement in enumerate(old["statements"]):
        y = SIDE + 102 + 68 * i
        text = textwrap.fill(escape(f"{i + 1}. {statement}"), 34, max_lines=3, placeholder=" ...")
        draw.text((12, y), text, "black", font, anchor="lm")
    for name, pair, x in (("before", old, width - 105), ("after", new, width - 40)):
        draw.text((x, SIDE + 54), name, "black", font, anchor="mm")
        for i in (0, 1):
            mark, colour = ("right", GREEN) if is_right(pair, i) else ("wrong", RED)
            draw.text((x, SIDE + 102 + 68 * i), mark, colour, font, anchor="mm")
    return card


# ---- The command ---------------------------------------------------------------------------------

WORLD = os.path.join(TOY, "data")


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=["paper", "toy"], default="paper",
        help="toy: the CLIP, the benchmark and the zero-shot task of toy/")
    add("--backbone", default="openai-l14-224",
        help=f"{', '.join(BACKBONES)}, or open_clip's MODEL:TAG (default: %(default)s)")
    add("--weights", metavar="FILE|FOLDER",
        help="the CLIP to evaluate (default: the backbone's original)")
    add("--baseline", metavar="FILE|FOLDER|original",
        help="the CLIP to compare it with")
    add("--benchmark", metavar="DIR", help="MMVP_VLM's folder, or one of its layout")
    add("--zeroshot", type=zeroshot_task, metavar="NAME:PATH", nargs="+", default=[],
        help="; ".join(f"{name}: {what}" for name, what in ZEROSHOT.items()) + "; prompts: "
             + ", ".join(f"{len(prompts)} for {name}" for name, prompts in PROMPTS.items()))
    add("--json", metavar="FILE",
        help="write the table, and every pair's scores and verdicts")
    add("--picture", metavar="FILE",
        help="draw the pairs whose verdict changed (PNG; needs --benchmark and --baseline)")
    add("--batch-size", type=number(int, 1, 100_000), default=64, help="1 to 100000 (default: 64)")
    typed, _ = parser.parse_known_args(argv)
    if typed.preset == "toy":
        parser.set_defaults(backbone="toy", benchmark=os.path.join(WORLD, "mmvp"),
                            zeroshot=[("folder", os.path.join(WORLD, "zeroshot"))])
    return parser.parse_args(argv)


def zeroshot_task(text):
    """An argparse type: NAME:PATH as the two."""
    name, _, path = text.partition(":")
    return name, path


def check_usage(args):
    """Mistakes that the command line shows by itself, and files that cannot be written."""
    if not args.benchmark and not args.zeroshot:
        raise UserError("nothing to evaluate: download MMVP/MMVP_VLM from Hugging Face and name "
                        "its folder with --benchmark, or give --zeroshot NAME:PATH")
    if len(dict(args.zeroshot)) < len(args.zeroshot):
        raise UserError("--zeroshot: a set is given twice")
    if args.baseline == "original" and not args.weights:
        raise UserError("--baseline original: name the CLIP to compare with it by --weights")
    if args.picture and not (args.baseline and args.benchmark):
        raise UserError("--picture shows the pairs whose verdict changed: name the pairs by "
                        "--benchmark DIR, and what to compare with by --baseline FILE|original")
    taken = [os.path.realpath(path) for path in (args.weights, args.baseline) if path]
    for path in (args.json, args.picture):
        if path and os.path.realpath(path) in taken:
            raise UserError(f"{path} is a CLIP to evaluate, or named twice: name another file")
        if path:
            check_writable(path)
            taken.append(os.path.realpath(path))


def run(argv):
    args = parse_arguments(argv)
    check_usage(args)
    sources = {"before": args.baseline} if args.baseline else {}
    sources["after"] = args.weights or "original"
    if args.preset == "toy":
        from toy.make_toy import draw_world

        draw_world(WORLD)
    if args.benchmark:
        check_benchmark(args.benchmark)
    for name, path in args.zeroshot:
        check_zeroshot(name, path)
    models = {}  # all of them first: a file may not fit
    for key, source in sources.items():
        models[key] = load_clip(args.backbone, None if source == "original" else source)
    if not args.benchmark:
        print("no --benchmark: the zero-shot sets alone are evaluated", file=sys.stderr)
    results = {}
    for key, (clip, preprocess, tokenizer) in models.items():
        clip.to("cuda" if torch.cuda.is_available() else "cpu")
        results[key] = evaluate(clip, preprocess, tokenizer, args.benchmark, args.zeroshot,
                                args.batch_size)
    print_table(*results.values())
    if args.json:
        prompts = {name: len(PROMPTS[name]) for name, _ in args.zeroshot if name in PROMPTS}
        about = {"backbone": args.backbone, "models": sources, "prompts": prompts}
        write_json(args.json, about | report(results))
    if args.picture:
        draw_changes(args.picture, results["before"], results["after"])
    raise_failures(results.values())


def report(results):
    """What --json writes of results: summaries, the table's rows, and every pair's scores."""
    content = {key: summary(result) for key, result in results.items()}
    content["rows"] = summarize(results)
    content["pairs"] = []
    for judged in zip(*[result["pairs"] for result in results.values()], strict=True):
        entry = {key: judged[0][key] for key in ("ids", "type", "statements")}
        for key, pair in zip(results, judged, strict=True):
            entry[key] = {"scores": pair["scores"], "correct": pair["correct"]}
        content["pairs"].append(entry)
    return content


def main(argv=None):
    run_command("eval_mmvp.py", run, argv)


if __name__ == "__main__":
    main()
