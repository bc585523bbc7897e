"""Scores by the original packages: run by `test_reward_originals.py` in an environment of their own.

`python score.py hps|image_reward FOLDER` reads FOLDER/inputs.npz (images, prompts, many_prompts, sizes) and writes
there the checkpoint with random weights, the vocabulary and outputs.npz. Packages' `__init__` files are not run: they
import training programs.
"""

import gzip
import json
import resource
import sys
import types
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

# What the released ImageReward model's file of this name says.
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def folder_of(package: str) -> Path:
    return Path(find_spec(package).submodule_search_locations[0])


def add_bare_package(name: str) -> None:
    """Makes modules of the package `name` importable without running its `__init__`."""
    parent, _, last = name.rpartition(".")
    folder = Path(sys.modules[parent].__path__[0]) / last if parent else folder_of(name)
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def make_random(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Random weights that are exact in `dtype` and large enough that every part of the model affects the score."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "embed" not in name else 4
            scale = 0.1 if parameter.ndim == 1 else fan_in**-0.5
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if is_gain else 0.0, scale)
            parameter.copy_(parameter.to(dtype))


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def preprocessed(transform, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """The preprocessing of a random image of each size."""
    images = {f"{h}x{w}": np.random.default_rng(h).uniform(size=(1, h, w, 3)).astype(np.float32) for h, w in sizes}
    return {name: transform(nchw(image)[0]).permute(1, 2, 0).numpy() for name, image in images.items()}


def score_each(function, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The value and gradient of `function(image, row)` for each image, one at a time."""
    scores, gradients = [], []
    for row in range(len(images)):
        x = nchw(images[row : row + 1]).requires_grad_()
        score = function(x, row)
        (gradient,) = torch.autograd.grad(score, x)
        scores.append(score.item())
        gradients.append(gradient[0].permute(1, 2, 0).numpy())
    return np.asarray(scores, np.float32), np.stack(gradients)


def hps(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores with hpsv2's model and transform, and open_clip_torch's tokenizer and vocabulary, which hpsv2's wheel
    lacks.
    """
    vocabulary = folder_of("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    gzip_open = gzip.open
    gzip.open = lambda file, *rest: gzip_open(vocabulary if Path(file).name == vocabulary.name else file, *rest)
    for name in ("hpsv2", "hpsv2.src", "hpsv2.src.open_clip", "open_clip"):
        add_bare_package(name)
    from hpsv2.src.open_clip.model import CLIP
    from hpsv2.src.open_clip.tokenizer import tokenize as hps_tokenize
    from hpsv2.src.open_clip.transform import image_transform
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    words = dict(tokenizer.encoder)
    words["<|startoftext|>"], words["<|endoftext|>"] = words.pop("<start_of_text>"), words.pop("<end_of_text>")
    (folder / "vocab.json").write_text(json.dumps(words))
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    many = inputs["many_prompts"].tolist()
    ids = tokenizer(many)
    assert (ids == hps_tokenize(many)).all()

    package = Path(sys.modules["hpsv2.src.open_clip"].__path__[0])
    config = json.loads((package / "model_configs/ViT-H-14.json").read_text())
    model = CLIP(**config).eval()
    make_random(model, torch.float16)
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 0, "name": "random", "state_dict": state}, folder / "weights.pt")
    del state
    to_model = image_transform(224, is_train=False, resize_longest_max=True).transforms[2:]

    def transform(image: torch.Tensor) -> torch.Tensor:
        for step in to_model:
            image = step(image)
        return image

    with torch.no_grad():
        text = model.encode_text(tokenizer(inputs["prompts"].tolist()), normalize=True)

    def score(image: torch.Tensor, row: int) -> torch.Tensor:
        return (model.encode_image(transform(image[0])[None], normalize=True) * text[row]).sum()

    scores, gradient = score_each(score, inputs["images"])
    sizes = preprocessed(transform, inputs["sizes"])
    return {"scores": scores, "gradient": gradient, "ids": ids.numpy(), **sizes}


def image_reward(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores with image-reward's model, transform and tokenizer; the vocabulary comes from another model that has the
    same.
    """
    for name in ("ImageReward", "ImageReward.models"):
        add_bare_package(name)
    with zipfile.ZipFile(folder_of("all_minilm_l6_v2") / "model.zip") as archive:
        words = json.loads(archive.read("tokenizer.json"))["model"]["vocab"]
    named = Path("bert-base-uncased")  # in the working directory, so that nothing is downloaded
    named.mkdir()
    for vocabulary in (named / "vocab.txt", folder / "vocab.txt"):
        vocabulary.write_text("\n".join(sorted(words, key=words.get)) + "\n", encoding="utf-8")
    (named / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    (folder / "med_config.json").write_text(json.dumps(MED))
    from ImageReward.ImageReward import ImageReward

    model = ImageReward(str(folder / "med_config.json")).eval()
    make_random(model, torch.float32)
    torch.save(model.state_dict(), folder / "weights.pt")
    resize, crop, _, _, normalise = model.preprocess.transforms

    def transform(image: torch.Tensor) -> torch.Tensor:
        return normalise(crop(resize(image)))

    def tokenise(prompts: list[str]):
        settings = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}
        return model.blip.tokenizer(prompts, **settings)

    text = tokenise(inputs["prompts"].tolist())

    def score(image: torch.Tensor, row: int) -> torch.Tensor:
        rows = slice(row, row + 1)
        return model.score_gard(text.input_ids[rows], text.attention_mask[rows], transform(image)).sum()

    scores, gradient = score_each(score, inputs["images"])
    many = tokenise(inputs["many_prompts"].tolist())
    tokens = {"ids": many.input_ids.numpy(), "mask": many.attention_mask.numpy()}
    return {"scores": scores, "gradient": gradient, **tokens, **preprocessed(transform, inputs["sizes"])}


if __name__ == "__main__":
    target = Path(sys.argv[2])
    found = {"hps": hps, "image_reward": image_reward}[sys.argv[1]](target, dict(np.load(target / "inputs.npz")))
    np.savez(target / "outputs.npz", **found)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
