"""Fits the recognisability head: `python -m nabla_gfn_jax.emoji.fit_recognisability`, minutes on 2 cores.

The head is a softmax regression on `rewards.emoji.features`. Its classes are the 45 animals of `SIMPLE_ANIMALS` and
"something else", which is the other drawings of the base model. The strength of the weight decay and the printed
figures come from heads that are fitted to the drawings of two vendors and evaluated on those of the third. (ImageNet's
own classes of these animals cannot be used, because their logits classify few drawings correctly.)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import save_file
from scipy.optimize import minimize
from scipy.special import log_softmax

from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.data.prompts import SIMPLE_ANIMALS
from nabla_gfn_jax.emoji.drawings import load_drawings
from nabla_gfn_jax.emoji.features import features_of
from nabla_gfn_jax.emoji.settings import FitOptions
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.rewards.emoji import DATA

OTHER = len(SIMPLE_ANIMALS)
CLASSES = OTHER + 1
STRENGTHS = (0.01, 0.03, 0.1)  # candidates for the weight decay
COPIES = 8
_OTHER_WEIGHT = 0.05  # weight of a drawing that is not an animal relative to an animal; they are four times as many
_AMBIGUOUS = ("cat-face", "monkey-face")  # a grinning cat is both a cat and a face


@dataclass(frozen=True)
class Examples:
    """Training examples. `features` is (versions, drawings, 1008), with the unperturbed version first."""

    features: Float[np.ndarray, "versions drawings features"]
    label: Int[np.ndarray, " drawings"]
    vendor: Int[np.ndarray, " drawings"]


Head = tuple[Float[np.ndarray, "features classes"], Float[np.ndarray, " classes"]]


def read_examples(folder: Path | None) -> Examples:
    """The examples from the base model's drawings."""
    drawings = load_drawings(folder).base()
    label_of = np.full(len(drawings.concepts), OTHER)
    for number, animal in enumerate(SIMPLE_ANIMALS):
        label_of[drawings.captioned(animal)] = number
    clear = np.array([c.subgroup not in _AMBIGUOUS for c in drawings.concepts])[drawings.concept]
    features = features_of(drawings.images[clear], COPIES)
    return Examples(features, label_of[drawings.concept[clear]], drawings.vendor[clear])


def fit(examples: Examples, strength: float) -> Head:
    """The head that minimises weighted cross-entropy over all versions + strength · Σ (standardised kernel)²."""
    versions, count, width = examples.features.shape
    x = examples.features.reshape(-1, width)
    mean, scale = x.mean(axis=0), x.std(axis=0) + np.float32(1e-2)
    x = (x - mean) / scale
    label = np.tile(examples.label, versions)
    weight = np.where(label == OTHER, _OTHER_WEIGHT, 1.0)
    weight /= weight.sum()
    rows = np.arange(versions * count)

    def loss(flat: Float[np.ndarray, " parameters"]) -> tuple[float, Float[np.ndarray, " parameters"]]:
        kernel, bias = np.split(flat.astype(np.float32), [width * CLASSES])
        kernel = kernel.reshape(width, CLASSES)
        log_p = log_softmax(x @ kernel + bias, axis=1)
        value = -(weight * log_p[rows, label]).sum() + strength * np.square(kernel).sum()
        slope = np.exp(log_p)
        slope[rows, label] -= 1.0
        slope = (slope * weight[:, None]).astype(np.float32)
        to_kernel = x.T @ slope + 2.0 * strength * kernel
        return float(value), np.concatenate([to_kernel.ravel(), slope.sum(axis=0)]).astype(np.float64)

    start = np.zeros(width * CLASSES + CLASSES)
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    kernel = best[: width * CLASSES].reshape(width, CLASSES) / scale[:, None]
    return kernel.astype(np.float32), (best[width * CLASSES :] - mean @ kernel).astype(np.float32)


def other_vendors(examples: Examples, strength: float) -> Float[np.ndarray, "versions drawings classes"]:
    """log p of the classes for every drawing, by a head that was fitted to the other vendors' drawings."""
    log_p = np.zeros((*examples.features.shape[:2], CLASSES))
    for vendor in np.unique(examples.vendor):
        seen, test = examples.vendor != vendor, examples.vendor == vendor
        kernel, bias = fit(Examples(examples.features[:, seen], examples.label[seen], examples.vendor[seen]), strength)
        log_p[:, test] = log_softmax(examples.features[:, test] @ kernel + bias, axis=-1)
    return log_p


def figures(examples: Examples, log_p: Float[np.ndarray, "versions drawings classes"]) -> dict[str, str]:
    """For the drawings of animals: top-1 accuracy among the 45 (chance: 2 %), and mean log p among all 46 classes."""
    animal = examples.label < OTHER
    label, log_p = examples.label[animal], log_p[:, animal]
    right = log_p[..., :OTHER].argmax(axis=-1) == label
    true_log_p = np.take_along_axis(log_p, label[None, :, None], axis=-1)
    return {
        "unseen vendor, top-1": f"{right[0].mean():.2f}",
        "unseen vendor, top-1, perturbed": f"{right[1:].mean():.2f}",
        "unseen vendor, log p": f"{true_log_p[0].mean():.2f}",
        "drawings of animals": str(int(animal.sum())),
        "command": "python -m nabla_gfn_jax.emoji.fit_recognisability",
    }


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Fits the head, prints the figures and writes `rewards/data/recognisability.safetensors`."""
    examples = read_examples(parse(argv, FitOptions, __doc__).emoji)
    judged = {strength: other_vendors(examples, strength) for strength in STRENGTHS}
    found = {strength: figures(examples, log_p) for strength, log_p in judged.items()}
    strength = max(STRENGTHS, key=lambda s: float(found[s]["unseen vendor, log p"]))
    kernel, bias = fit(examples, strength)
    results = found[strength] | {"weight decay": str(strength)}
    tensors = {"kernel": kernel.astype(np.float16), "bias": bias}
    save_file(tensors, DATA / "recognisability.safetensors", metadata=results)
    for name, value in results.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main(sys.argv)
