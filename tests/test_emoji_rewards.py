"""The emoji rewards: heads on a PyTorch version of their network, the meaning of scores, and the stated accuracy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_efficientnet import LITE0, drawing, oracle_of, relative

from nabla_gfn_jax.checkpoints.files import read_safetensors
from nabla_gfn_jax.data.prompts import SIMPLE_ANIMALS
from nabla_gfn_jax.emoji import drawings as emoji
from nabla_gfn_jax.emoji import fit_recognisability, fit_valence
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.rewards import load_reward
from nabla_gfn_jax.rewards.emoji import DATA

WITH_DRAWINGS = pytest.mark.skipif(
    not (emoji.default_folder() / "pictures.npz").exists(), reason="the drawings are not downloaded"
)
FIRST_FIVE_STAGES = 11  # blocks of EfficientNet-Lite0


def head(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    return read_safetensors(DATA / f"{name}.safetensors")


def torch_outputs(name: str, images: torch.Tensor) -> torch.Tensor:
    """The head's outputs for images (B, 3, H, W), from features at 6 x 6 averaged over 2 x 2, channels last."""
    network = oracle_of("lite0", LITE0).to(images.dtype)
    x = torch.nn.functional.interpolate(images, (96, 96), mode="bilinear", align_corners=False)
    x = torch.nn.functional.relu6(network._bn0(network._conv_stem((x * 255 - 127) / 128)))
    for block in network._blocks[:FIRST_FIVE_STAGES]:
        x = block(x)
    layout = torch.nn.functional.avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1)
    tensors = {key: torch.tensor(tensor.astype(np.float64)).to(images.dtype) for key, tensor in head(name)[0].items()}
    return layout @ tensors["kernel"] + tensors["bias"]


def torch_score(name: str, images: torch.Tensor, animals: list[int]) -> torch.Tensor:
    outputs = torch_outputs(name, images)
    if name == "valence":
        return torch.tanh(outputs[:, 0])
    return torch.log_softmax(outputs, dim=1)[torch.arange(len(animals)), animals]


@pytest.mark.parametrize("name", ["valence", "recognisability"])
@pytest.mark.thorough
def test_score(name):
    images, animals = drawing(64, seed=7), [3, 40]
    reward = load_reward(name)
    features = reward.encode_prompts([SIMPLE_ANIMALS[a] for a in animals])
    ours = jax.jit(reward.score)(reward.params, images, features)
    assert ours.dtype == jnp.float32
    with torch.no_grad():
        want = torch_score(name, torch.tensor(images.transpose(0, 3, 1, 2)), animals)
    assert relative(ours, want) < 1e-4


@pytest.mark.parametrize("name", ["valence", "recognisability"])
@pytest.mark.thorough
def test_image_gradient(name):
    """Uses double precision as in test_efficientnet, because rounding may flip a ReLU6 gate in single precision."""
    images, animals = drawing(64, seed=8).astype(np.float64), [0, 21]
    x = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    torch_score(name, x, animals).sum().backward()
    assert x.grad is not None
    reward = load_reward(name)
    prompts = [SIMPLE_ANIMALS[a] for a in animals]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), reward.params)
        features = reward.encode_prompts(prompts)
        ours = jax.jit(jax.grad(lambda im, p: reward.score(p, im, features).sum()))(images, params)
    assert relative(ours, x.grad.permute(0, 2, 3, 1)) < 1e-9


def test_valence_is_bounded_and_ignores_the_prompt():
    """With a head fifty times as steep, outputs far beyond 1 still give scores within the bound."""
    reward = load_reward("valence")
    assert reward.encode_prompts(["a face", "a tiger"]) == {}
    wild = np.random.default_rng(0).choice([0.0, 1.0], (2, 64, 64, 3)).astype(np.float32)
    steep = reward.params | {"kernel": 50.0 * reward.params["kernel"], "bias": 50.0 * reward.params["bias"]}
    with torch.no_grad():
        outputs = 50.0 * torch_outputs("valence", torch.tensor(wild.transpose(0, 3, 1, 2)))[:, 0]
    assert outputs.abs().min() > 1
    np.testing.assert_allclose(jax.jit(reward.score)(steep, wild, {}), torch.tanh(outputs).numpy(), atol=1e-4)


def test_recognisability_is_a_probability_of_the_prompts_animal():
    """The probability that remains after the 45 animals is the oracle's probability of "something else"."""
    reward = load_reward("recognisability")
    images = drawing(64, seed=9)
    features = reward.encode_prompts([f"an {a}" if a[0] in "aeiou" else f"a {a}" for a in SIMPLE_ANIMALS])
    score = jax.jit(reward.score)
    p = np.exp([score(reward.params, images, features[np.array([n, n])]) for n in range(len(features))]).sum(axis=0)
    with torch.no_grad():
        outputs = torch_outputs("recognisability", torch.tensor(images.transpose(0, 3, 1, 2)))
    other = torch.softmax(outputs, dim=1)[:, len(SIMPLE_ANIMALS)].numpy()
    np.testing.assert_allclose(1.0 - p, other, atol=1e-4)
    with pytest.raises(UserError, match="unicorn"):
        reward.encode_prompts(["a unicorn"])


@WITH_DRAWINGS
def test_recognisability_names_the_drawings_it_was_fitted_to():
    """The shipped head was fitted to all vendors, so this test checks only that the labels are correct."""
    drawings = emoji.load_drawings(None).base()
    reward = load_reward("recognisability")
    every = np.asarray(reward.encode_prompts(list(SIMPLE_ANIMALS)))[:, None]
    score_all = jax.jit(lambda images, prompts: jax.vmap(partial(reward.score, reward.params, images))(prompts))
    for animal in ("tiger", "butterfly", "snake", "turtle", "whale"):
        rows = np.isin(drawings.concept, drawings.captioned(animal))
        images = drawings.images[rows].astype(np.float32) / np.float32(255)
        outputs = score_all(images, every.repeat(len(images), axis=1))
        assert (np.argmax(outputs, axis=0) == SIMPLE_ANIMALS.index(animal)).mean() > 0.6, animal


@pytest.mark.slow
@WITH_DRAWINGS
def test_the_stated_figures_are_reproduced():
    """Fits the heads of all folds again and compares with the figures in the files; .02 allows for rounding."""
    examples = fit_valence.read_examples(None)
    found = fit_valence.figures(examples, fit_valence.held_out_predictions(examples))
    stated = head("valence")[1]
    for name in ("held-out Spearman, emoji", "held-out Spearman, drawings, perturbed"):
        assert abs(float(found[name]) - float(stated[name])) <= 0.02, (name, found[name])
    assert float(found["held-out Spearman, emoji"]) > 0.6

    animals = fit_recognisability.read_examples(None)
    stated = head("recognisability")[1]
    judged = fit_recognisability.other_vendors(animals, float(stated["weight decay"]))
    found = fit_recognisability.figures(animals, judged)
    assert abs(float(found["unseen vendor, top-1"]) - float(stated["unseen vendor, top-1"])) <= 0.02, found
