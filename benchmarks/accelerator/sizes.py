"""The models, runs and arrays of the measurements: Stable Diffusion 1.5 and HPS at full size, or small substitutes.

Weights are random, created on the host, and the same in every process.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.base_models.names import DTYPES, abstract_model
from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.models.clip import CLIPTextConfig
from nabla_gfn_jax.models.open_clip import VIT_H_14, OpenCLIPConfig, OpenCLIPVision
from nabla_gfn_jax.models.vision_transformer import VisionConfig
from nabla_gfn_jax.parallel import data_mesh
from nabla_gfn_jax.planning.chips import CHIPS, Chip
from nabla_gfn_jax.planning.phases import Plan
from nabla_gfn_jax.rewards.hps import abstract
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import assemble
from nabla_gfn_jax.training.prompts import abstract_table
from nabla_gfn_jax.training.trainer import Trainer

CONFIG = "hps"
PROMPTS = 1500  # about the size of the prompt set of configs/hps.py
TRAJECTORIES = 16  # a micro-batch of configs/hps.py on one device
# The chip whose data sheet gives the peak rate, by the name of the device. An H200 has the compute rate of an H100.
_CHIPS = {
    "H100": "h100",
    "H200": "h100",
    "A100": "a100",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
}

_LEVEL = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
_SMALL: dict[str, dict[str, Any]] = {
    "unet": _LEVEL
    | {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
    "vae": _LEVEL
    | {
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
    },
    "text_encoder": {
        "vocab_size": 600,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    },
    "scheduler": STABLE_DIFFUSION,
}
# The fields of Stable Diffusion 1.5's config that differ from the defaults of diffusers' classes.
_TRUE: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
}
_SMALL_FIELDS = {
    "sampling.num_steps": 10,
    "training.remat": False,  # takes long to compile on a CPU
    "algorithm.transition_fraction": 0.2,
    "correction.block_out_channels": (8,),
    "correction.norm_num_groups": 4,
    "correction.attention_head_dim": 2,
}
_SMALL_CLIP = OpenCLIPConfig(
    embed_dim=20,
    vision=VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, patch_size=14, image_size=28
    ),
    text=CLIPTextConfig(
        vocab_size=600, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3
    ),
)


@dataclass(frozen=True)
class Size:
    """The size of the models: full size, or, if `small`, a size that a CPU runs in seconds."""

    small: bool

    @cached_property
    def clip(self) -> OpenCLIPConfig:
        return _SMALL_CLIP if self.small else VIT_H_14

    def fields(self, part: str) -> dict[str, Any]:
        """The fields of the config.json of "unet" or "vae", for diffusers' class."""
        return (_SMALL if self.small else _TRUE)[part]

    def config(self, **fields: Any) -> Settings:
        """`configs/hps.py` with one micro-batch of trajectories. "__" in the name of a field stands for a dot."""
        named: dict[str, Any] = {
            "training.micro_batches": 1,
            "training.trajectories": 4 if self.small else TRAJECTORIES,
        }
        if self.small:
            named |= _SMALL_FIELDS | {"model": str(self._folder())}
        named |= {name.replace("__", "."): value for name, value in fields.items()}
        return load_settings(Settings, CONFIG, named)

    def _folder(self) -> Path:
        """A folder with the JSON files of a model."""
        folder = Path(tempfile.gettempdir()) / f"nabla_gfn_jax_small_{os.getpid()}"
        for part, fields in _SMALL.items():
            file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(fields))
        return folder

    def pieces(self, config: Settings) -> Trainer:
        """A run on the first device, with shapes instead of parameters."""
        c, prompts = config.training, 3 if self.small else PROMPTS
        mesh = data_mesh(c.trajectories, c.micro_batches, jax.local_devices()[:1])
        base, reward = abstract_model(config.model, DTYPES[config.model_dtype]), abstract(self.clip)
        return assemble(config, mesh, base, reward, abstract_table(base, reward, prompts), prompts)

    def tower(self, dtype: Any) -> OpenCLIPVision:
        """The reward's image tower."""
        return OpenCLIPVision(self.clip.vision, self.clip.embed_dim, dtype)


def phase(name: str, config: Settings, pieces: Trainer) -> tuple[Any, tuple[Any, ...]]:
    """The run's "rollout" or "update", compiled when called, and the shapes of its arguments."""
    plan: Any = SimpleNamespace(config=config, mesh=pieces.mesh)
    return Plan.phase(plan, name, pieces)


def chip_of(device: Any) -> Chip | None:
    """The data sheet of the device; None if it is not known."""
    return next((CHIPS[chip] for name, chip in _CHIPS.items() if name in device.device_kind), None)


class Weights:
    """Random weights with realistic sizes. They are pieces of one long draw, so gigabytes take seconds."""

    def __init__(self, seed: int = 0, length: int = 2**25):
        self._rng = np.random.default_rng(seed)
        self._pool = self._rng.standard_normal(length, np.float32)

    def normal(self, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
        """Independent normal numbers, float32."""
        size = int(np.prod(shape))
        start = int(self._rng.integers(max(len(self._pool) - size, 1)))
        piece = self._pool[start : start + size] if size < len(self._pool) else np.resize(self._pool, size)
        return (scale * piece).reshape(shape)

    def like(self, shapes: Any) -> Any:
        """Parameters: matrices and kernels that preserve the size of activations, norm scales near 1, small biases."""

        def leaf(path: Any, a: Any) -> np.ndarray:
            if len(a.shape) > 1:
                drawn = self.normal(a.shape, float(np.prod(a.shape[:-1])) ** -0.5)
            else:
                drawn = self.normal(a.shape, 0.1) + (str(path[-1].key) == "scale")
            return drawn.astype(a.dtype)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    def frozen(self, shapes: Any) -> Any:
        """The frozen parameters of a run. Its table looks like the output of the text encoder and of the reward."""
        table = jax.tree.map(lambda a: self.normal(a.shape).astype(a.dtype), shapes["table"])
        table["reward"] /= np.linalg.norm(table["reward"], axis=-1, keepdims=True)
        return {**{part: self.like(shapes[part]) for part in ("base", "reward")}, "table": table}

    def arguments(self, name: str, pieces: Trainer, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a phase as arrays in the host's memory."""
        frozen = self.frozen(shapes[0])
        if name == "rollout":
            _, params, keys, ids = shapes
            return frozen, self.like(params), jax.random.split(jax.random.key(0), len(keys)), self._ids(pieces, ids)
        _, state, data, weight = shapes
        optimizer = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state.optimizer)
        first = state.replace(params=self.like(state.params), optimizer=optimizer, step=np.zeros((), np.int32))
        steps = pieces.chain.num_steps
        data = data.replace(
            ordinary=self._transition(pieces, data.ordinary, lambda shape: self._rng.integers(steps - 1, size=shape)),
            last=self._transition(pieces, data.last, lambda shape: np.full(shape, steps - 1)),
        )
        return frozen, first, data, np.ones(weight.shape, weight.dtype)

    def _transition(self, pieces: Trainer, shapes: Transition, index: Callable[[Any], np.ndarray]) -> Transition:
        drawn = jax.tree.map(lambda a: self.normal(a.shape).astype(a.dtype), shapes)
        steps = index(shapes.index.shape).astype(np.int32)
        return drawn.replace(index=steps, prompt_id=self._ids(pieces, shapes.prompt_id))  # type: ignore[no-any-return]

    def _ids(self, pieces: Trainer, shape: Any) -> np.ndarray:
        return self._rng.integers(pieces.num_prompts, size=shape.shape).astype(np.int32)


def as_dtype(tree: Any, dtype: Any) -> Any:
    """The tree with its leaves converted to `dtype`."""
    return jax.tree.map(lambda a: np.asarray(a).astype(jnp.dtype(dtype)), tree)
