"""Makes the atlas of drawings that `metrics.coverage` reads: `python -m nabla_gfn_jax.emoji.fit_atlas`.

The 64 dimensions come from a linear discriminant analysis. Along these directions, the variance between drawings is
largest relative to the variance between the perturbed versions of a drawing.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8
from safetensors.numpy import save_file
from tqdm import tqdm

from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.emoji.drawings import Drawings, load_drawings
from nabla_gfn_jax.emoji.perturb import perturb
from nabla_gfn_jax.emoji.settings import FitOptions
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.metrics import coverage
from nabla_gfn_jax.models import efficientnet

DIMENSIONS = 64
COPIES = 4
_SHRINKAGE = 0.3  # shrinkage of the within-drawing scatter towards a multiple of the identity
_BATCH = 64


def layouts(drawings: UInt8[np.ndarray, "count 64 64 3"]) -> Float[np.ndarray, "versions count 1080"]:
    """Features of the unperturbed drawings (first) and of `COPIES` perturbed versions of each."""
    network, layout, change = efficientnet.load("lite2"), jax.jit(coverage.layout), jax.jit(perturb)
    padding = -len(drawings) % _BATCH
    images = np.concatenate([drawings, drawings[:padding]]).astype(np.float32) / np.float32(255.0)
    rows: list[np.ndarray] = []
    for start in tqdm(range(0, len(images), _BATCH), desc="features", unit="batch"):
        batch = images[start : start + _BATCH]
        keys = [jax.random.fold_in(jax.random.key(copy), start) for copy in range(COPIES)]
        versions = [layout(network, batch), *(layout(network, change(key, batch)) for key in keys)]
        rows.append(np.stack([np.asarray(version) for version in versions]))
    return np.concatenate(rows, axis=1)[:, : len(drawings)]


def discriminant(
    features: Float[np.ndarray, "versions drawings features"],
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, "features 64"]]:
    """The mean and the discriminant basis, in which the within-drawing scatter is the identity.

    The scatter between drawings is diagonal in the basis, with the largest values.
    """
    mean = features[0].mean(axis=0)
    scale = features[0].std(axis=0) + 1e-2
    centred = (features - mean) / scale
    change = (centred[1:] - centred[0]).reshape(-1, features.shape[-1])
    within = change.T @ change / len(change)
    within += _SHRINKAGE * np.trace(within) / len(within) * np.eye(len(within))
    variance, axes = np.linalg.eigh(within)
    whiten = axes / np.sqrt(variance)
    between = whiten.T @ (centred[0].T @ centred[0] / len(centred[0])) @ whiten
    return mean, (whiten @ np.linalg.eigh(between)[1][:, -DIMENSIONS:]) / scale[:, None]


def write_atlas(file: Path, drawings: Drawings, features: Float[np.ndarray, "versions drawings 1080"]) -> None:
    """Writes the atlas without the network; basis and points are in half precision."""
    mean, basis = discriminant(features.astype(np.float64))
    tensors = {
        "mean": mean.astype(np.float32),
        "basis": basis.astype(np.float16),
        "points": ((features[0] - mean) @ basis).astype(np.float16),
        "concept": drawings.concept.astype(np.int16),
        "vendor": drawings.vendor.astype(np.uint8),
    }
    names = "|".join(c.name for c in drawings.concepts)
    captions = json.dumps([c.captions for c in drawings.concepts])
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file, metadata={"names": names, "captions": captions})


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Writes `metrics/data/drawings.safetensors` and prints how often perturbed drawings are recognised."""
    drawings = load_drawings(parse(argv, FitOptions, __doc__).emoji).base()
    write_atlas(coverage.FILE, drawings, layouts(drawings.images))
    unseen_key = jax.random.key(1000)
    images = np.asarray(jax.jit(perturb)(unseen_key, drawings.images.astype(np.float32) / np.float32(255.0)))
    nearest = coverage.nearest_drawing(images)
    print(f"drawings: {len(nearest)}, perturbed anew each")
    print(f"nearest is the drawing itself: {np.mean(nearest == np.arange(len(nearest))):.3f}")
    print(f"nearest is of the same emoji: {np.mean(drawings.concept[nearest] == drawings.concept):.3f}")
    print(f"nearest is by the same vendor: {np.mean(drawings.vendor[nearest] == drawings.vendor):.3f}")


if __name__ == "__main__":
    main(sys.argv)
