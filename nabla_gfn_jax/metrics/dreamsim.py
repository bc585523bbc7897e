"""DreamSim: a perceptual distance, fitted to human judgements of similarity (Fu et al. 2023, arXiv 2306.09344).

The embedding of an image joins the features of several vision transformers, finetuned by LoRA, and is then centred and
divided by its norm. The distance of two images is one minus the product of their embeddings. It measures here how
diverse the images of a prompt are. Two usages are in print. They differ in scale and in the number of images, since
|e − f|² = 2 (1 − e·f) for embeddings of norm 1:

    distance_x100   100 times the mean distance of two images of a prompt, by all its images (Adjoint Matching,
                    arXiv 2409.08861)
    variance_16     Σ_ij |e_i − e_j|²/(2n(n−1)) of the first n = 16 images of a prompt (∇-GFlowNet, arXiv 2412.07775,
                    and VGG-Flow, arXiv 2512.05116)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nabla_gfn_jax.checkpoints import release, weights
from nabla_gfn_jax.checkpoints.files import TensorFiles, read_json
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics.base import Batch, Released, Samples, Weighting
from nabla_gfn_jax.metrics.on_devices import OnDevices, as_saved
from nabla_gfn_jax.metrics.pairwise import FEATURES, mean_distance, variance
from nabla_gfn_jax.metrics.tilt import Estimate
from nabla_gfn_jax.models.dino_vision import CLIP, DINO, OPEN_CLIP, DinoConfig, DinoVision
from nabla_gfn_jax.models.preprocess import clip_normalise, imagenet_normalise
from nabla_gfn_jax.models.resize import resize
from nabla_gfn_jax.rewards.prompt_features import unit
from nabla_gfn_jax.typing import Images, Params

SIZE = 224
_RELEASES = "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints"
_DINO_FILE = "dino_vitbase16_pretrain.pth"
_DINO_URL = f"https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/{_DINO_FILE}"
_FEW = 16  # images of a prompt in `variance_16`
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Variant:
    """A released DreamSim: its branches in the order of the features, and where their weights are published."""

    name: str
    branches: tuple[DinoConfig, ...]
    files: tuple[str, ...]  # of the branches
    lora: str  # the folder of the LoRA
    archive: str  # all files but DINO's


ENSEMBLE = Variant(
    "dreamsim",
    (DINO, CLIP, OPEN_CLIP),
    (_DINO_FILE, "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar"),
    "ensemble_lora",
    f"{_RELEASES}/dreamsim_ensemble_checkpoint.zip",
)
SINGLE = Variant(
    "dreamsim_dino",
    (DINO,),
    (_DINO_FILE,),
    "dino_vitb16_single_lora",
    f"{_RELEASES}/dreamsim_dino_vitb16_checkpoint.zip",
)


class DreamSim:
    """The diversity of the images of a prompt. A sample of the ensemble takes 7 KiB, one of the single branch 3."""

    def __init__(self, variant: Variant, params: Sequence[Params]):
        """`params` are those of the branches, with the LoRA merged."""
        self._name = variant.name

        def run(params: tuple[Params, ...], images: Images) -> Float[Array, "batch embedding"]:
            return embed(variant.branches, params, images)

        self._embed = OnDevices(run, tuple(params))

    @property
    def name(self) -> str:
        return self._name

    def prepare(self, prompts: Sequence[str]) -> None:
        """Accepts any prompts."""

    def update(self, batch: Batch) -> Samples:
        return Samples(batch.prompt, {FEATURES: self._embed(as_saved(batch.images))})

    def compute(self, state: Samples, weighting: Weighting | None = None) -> dict[str, Estimate]:
        """NAME_distance_x100 and, with equal weights and 16 or more images of each prompt, NAME_variance_16."""
        state = state.by_prompt()
        distance = mean_distance(state, weighting)
        found = {f"{self._name}_distance_x100": Estimate(100.0 * distance.value, 100.0 * distance.error)}
        few = None if weighting is not None else variance(state, _FEW)
        return found if few is None else found | {f"{self._name}_variance_{_FEW}": few}


def embed(branches: Sequence[DinoConfig], params: Sequence[Params], images: Images) -> Float[Array, "batch embedding"]:
    """The embeddings of images in [0, 1]: centred over their features, and of norm 1."""
    seen = jnp.clip(resize(images, SIZE, SIZE, antialias=True), 0.0, 1.0)
    found = []
    for branch, its in zip(branches, params, strict=True):
        normalised = imagenet_normalise(seen) if branch.embed_dim is None else clip_normalise(seen)
        with jax.default_matmul_precision("highest"):
            found.append(jnp.asarray(DinoVision(branch).apply({"params": its}, normalised)))
    features = jnp.concatenate(found, axis=-1)
    return unit(features - features.mean(axis=-1, keepdims=True))


def ensemble() -> Released:
    """The ensemble with the released weights. Raises `UserError` that says how to get a missing file."""
    return _released(ENSEMBLE)


def single() -> Released:
    """The single branch of DINO with the released weights. Raises `UserError` that says how to get a missing file."""
    return _released(SINGLE)


def _released(variant: Variant) -> Released:
    urls = {_DINO_FILE: _DINO_URL}
    lora = (f"{variant.lora}/adapter_config.json", f"{variant.lora}/adapter_model.safetensors")
    found = [release.find("dreamsim", f, url=urls.get(f, variant.archive)) for f in (*variant.files, *lora)]
    *branches, config, adapter = found
    return Released(DreamSim(variant, load(variant, branches, config, adapter)), tuple(found))


def load(variant: Variant, files: Sequence[Path], config: Path, adapter: Path) -> list[Params]:
    """The parameters of the branches with the LoRA merged.

    `files` are those of the branches; `config` and `adapter` are PEFT's files of the LoRA. Raises `UserError` if a file
    is damaged or does not match.
    """
    lora, scale = TensorFiles(adapter), _scale(config)
    used: set[str] = set()
    params = []
    for number, (branch, file) in enumerate(zip(variant.branches, files, strict=True)):
        prefix = f"base_model.model.extractor_list.{number}.model."
        changes = {name.removeprefix(prefix): lora[name] for name in lora if name.startswith(prefix)}
        used |= {prefix + name for name in changes}
        params.append(_load_branch(branch, _Merged(weights.read_state_dict(file), changes, scale, adapter), file))
    others = sorted(set(lora) - used)
    if others:
        raise UserError(f"{adapter} is no LoRA of {variant.name}: it has {others[0]}; download it again")
    return params


def _load_branch(branch: DinoConfig, state: Mapping[str, np.ndarray], file: Path) -> Params:
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    expected = jax.eval_shape(DinoVision(branch).init, jax.random.key(0), image)["params"]
    is_clip = branch.embed_dim is not None
    return from_state_dict(
        state,
        expected,
        str(file),
        "ViT-B/16 in DINO's layout",
        place=lambda a: jnp.asarray(a, jnp.float32),
        ignore=lambda name: not is_clip and name in ("norm.weight", "norm.bias"),
    )


class _Merged(Mapping[str, np.ndarray]):
    """A state dict with W + scale · B A instead of W for each layer that the LoRA adapts.

    Raises `UserError` if the LoRA adapts another layer or one of another shape.
    """

    def __init__(self, state: Mapping[str, np.ndarray], lora: Mapping[str, np.ndarray], scale: float, file: Path):
        self._state, self._scale = state, scale
        names = {name.removesuffix(_DOWN).removesuffix(_UP) for name in lora}
        self._lora = {}
        for name in sorted(names):
            down, up, weight = lora.get(name + _DOWN), lora.get(name + _UP), state.get(f"{name}.weight")
            if down is None or up is None or weight is None or (up.shape[0], down.shape[1]) != weight.shape:
                raise UserError(f"{file} does not fit the network at {name}; download it again")
            self._lora[f"{name}.weight"] = (down, up)

    def __getitem__(self, name: str) -> np.ndarray:
        weight = self._state[name]
        if name not in self._lora:
            return weight
        down, up = (np.asarray(matrix, np.float64) for matrix in self._lora[name])
        merged: np.ndarray = (weight + self._scale * (up @ down)).astype(np.float32)
        return merged

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _scale(config: Path) -> float:
    """alpha / rank of a LoRA from PEFT's adapter_config.json."""
    fields = read_json(config)
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise UserError(f"{config} has no r or no lora_alpha; download it again")
    if fields.get("use_rslora") or fields.get("use_dora"):
        raise UserError(f"{config} describes a variant of LoRA that is not supported; download it again")
    return alpha / rank
