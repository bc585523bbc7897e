"""Images of a base model, with or without a LoRA, batch after batch, in bounded memory."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, UInt8
from tqdm import tqdm

from nabla_gfn_jax.base_models.base import BaseModel, Table, change_predictor, predictor
from nabla_gfn_jax.checkpoints.lora_names import TEXT_ENCODER
from nabla_gfn_jax.diffusion.chain import Level
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.images import levels
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics.base import Batch, PathStatistics
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, all_devices, gather, place, split
from nabla_gfn_jax.typing import Images, Latents, Params, PRNGKeys, PromptIds

CPU_BATCH = 32  # the most images sampled together on a CPU: what its cores must divide
_MOST = 32  # images together on a device, and fewer of so many pixels that these would not fit
_PIXELS = 2**21  # sampled together on a device: 8 images of 512 x 512
_DECODED = 2**19  # pixels decoded together on a device: the VAE's activations take 1 kB or more of each
_PER_PROMPT = 2**20  # noises set apart for each prompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled."""

    sampler: Sampler = "ddpm"
    steps: int = 50
    guidance: float = 5.0
    eta: float = 1.0  # 1: DDPM; 0: DDIM, which has no nats
    seed: int = 0
    negative: str = ""  # the prompt that guidance leads away from
    lora_from_step: int = 1  # the first step that a LoRA takes part in, counted from 1
    lora_until_step: int | None = None  # the last; None: the last of all

    def __post_init__(self) -> None:
        """Raises `UserError` if a LoRA has no step."""
        if not self.lora_steps.any():
            last = "" if self.lora_until_step is None else f" and lora_until_step = {self.lora_until_step}"
            first = f"lora_from_step = {self.lora_from_step}"
            raise UserError(f"with {first}{last} the LoRA has none of the {self.steps} steps; give it a range of them")

    @property
    def lora_steps(self) -> Bool[np.ndarray, " steps"]:
        """Which steps are a LoRA's; the others are the base model's."""
        step = 1 + np.arange(self.steps)
        return (step >= self.lora_from_step) & (step <= (self.lora_until_step or self.steps))


class ImageSampler:
    """Samples images of some prompts. An image depends on the seed, its prompt's place, its number and the model alone.

    Each prompt is encoded once. Raises `UserError` for a way of sampling that the model does not have.
    """

    def __init__(self, model: BaseModel, prompts: Sequence[str], how: Sampling, batch: int = 0):
        """`batch`: images sampled together on all devices; 0: as many as are likely to fit."""
        self.prompts, self.chain = tuple(prompts), model.chain(how.steps, sampler=how.sampler, eta=how.eta)
        self.how, self._mesh = how, all_devices()
        self._model = model.on(self._mesh.devices.flat[0].platform, remat=False)
        self._batch = -(-(batch or self._likely_batch()) // self._mesh.size) * self._mesh.size
        self._params = place(model.frozen_params, self._mesh)
        self._table, self._lora_steps = self._encode(None), how.lora_steps
        inputs = (EVERYWHERE, EVERYWHERE, EVERYWHERE, SPLIT, SPLIT)
        self._programs = {nats: split(self._program(nats), self._mesh, inputs, SPLIT) for nats in (False, True)}

    @property
    def has_nats(self) -> bool:
        """Whether every step is Gaussian, σ > 0."""
        return bool(np.all(np.asarray(self.chain.sigma) > 0))

    def images(
        self, lora: Params | None, num: int, *, first: int = 0, nats: bool = False, progress: str | None = None
    ) -> Iterator[Batch]:
        """Images number `first` to `num` − 1 of each prompt, a prompt after the other.

        Args:
            lora: None for the base model. What it has under "text_encoder" adapts that.
            num, first: image i of a prompt has the same noise in every model, however many are asked for.
            nats: record path statistics; takes twice the time, with a LoRA.
            progress: what to call the work on a progress bar, if there is to be one.
        """
        each = np.arange(first, num)
        prompt = np.repeat(np.arange(len(self.prompts)), len(each))
        noise = prompt * _PER_PROMPT + np.tile(each, len(self.prompts))
        text = (lora or {}).get(TEXT_ENCODER)
        tables = (self._table, self._encode(text) if text else self._table)
        lora = place(lora, self._mesh)
        size = min(self._batch, -(-len(prompt) // self._mesh.size) * self._mesh.size)
        with tqdm(total=len(prompt), desc=progress, disable=progress is None, unit=" images") as bar:
            for start in range(0, len(prompt), size):
                count = min(size, len(prompt) - start)
                rows = start + np.minimum(np.arange(size), count - 1)  # the last batch is filled up
                keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.how.seed), noise[rows])
                program = self._programs[nats and lora is not None]
                given = place((keys, prompt[rows].astype(np.int32)), self._mesh, SPLIT)
                results = program(self._params, lora, tables, *given)
                images, *paths = (gather(result, self._mesh)[:count] for result in results)
                yield Batch(images, prompt[rows][:count], PathStatistics(*paths) if paths else None)
                bar.update(count)

    def _encode(self, lora: Params | None) -> Table:
        return place(self._model.encode_prompts(self.prompts, negative=self.how.negative, lora=lora), self._mesh)

    def _likely_batch(self) -> int:
        on_each = int(np.clip(_PIXELS // self._pixels(), 1, _MOST))
        return min(on_each, CPU_BATCH) if self._mesh.devices.flat[0].platform == "cpu" else on_each * self._mesh.size

    def _pixels(self) -> int:
        height, width, _ = self._model.image_shape
        return height * width

    def _program(self, nats: bool):  # type: ignore[no-untyped-def]
        model, chain = self._model, self.chain
        active = None if self._lora_steps.all() else self._lora_steps

        def run(
            params: Params, lora: Params | None, tables: tuple[Table, Table], keys: PRNGKeys, prompt: PromptIds
        ) -> tuple[Images, ...]:
            of_base, of_policy = (predictor(model, params, table, self.how.guidance) for table in tables)

            def predict(lora: Params | None, x: Latents, level: Level, condition: PromptIds) -> Latents:
                return (of_base if lora is None else of_policy)(lora, x, level, condition)

            how: dict[str, Any] = {"nats": nats, "active": active}
            if TEXT_ENCODER not in (lora or {}):  # else the two are told different things, and outputs are subtracted
                how["predict_change"] = change_predictor(model, params, tables[0], self.how.guidance)
            paths = sample_paths(predict, lora, chain, keys, model.latent_shape, prompt, **how)
            images = self._decode(params, paths.latents)
            return (images, paths.spent, paths.log_ratio) if nats else (images,)

        return run

    def _decode(self, params: Params, latents: Latents) -> Images:
        """A few at a time."""
        count, most = len(latents), max(1, _DECODED // self._pixels())
        size = max(n for n in range(1, count + 1) if count % n == 0 and n <= most)
        parts = latents.reshape(count // size, size, *latents.shape[1:])
        images = jax.lax.map(partial(self._model.decode, params), parts)
        return images.reshape(count, *images.shape[2:])


def scaled(lora: Params, strength: float) -> Params:
    """The LoRA at another strength: what it adds to each layer, times `strength`."""

    def scale(path: tuple[jax.tree_util.DictKey, ...], leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        return leaf * jnp.asarray(strength, leaf.dtype) if path[-1].key == "up" else leaf

    return jax.tree_util.tree_map_with_path(scale, lora)


def combined(loras: Sequence[Params]) -> Params:
    """The LoRA that adds what all of them add: side by side in one pair where several adapt a layer."""
    pairs: dict[tuple[str, ...], list[Array]] = defaultdict(list)
    for lora in loras:
        for path, leaf in flatten_dict(lora).items():
            pairs[path].append(leaf)
    # The rank is the last axis of down and the first of up.
    return unflatten_dict({p: jnp.concatenate(found, -1 if p[-1] == "down" else 0) for p, found in pairs.items()})


def all_images(batches: Iterator[Batch]) -> UInt8[np.ndarray, "n height width 3"]:
    """The images of all batches, for a grid, in the 256 levels of a picture: a quarter of the memory."""
    return np.concatenate([levels(batch.images) for batch in batches])
