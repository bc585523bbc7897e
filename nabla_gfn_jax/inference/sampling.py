"""Images of a base model, with or without a LoRA, batch after batch, in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from nabla_gfn_jax.base_models.base import BaseModel, Table, predictor
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics.base import Batch, PathStatistics
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, all_devices, gather, place, split
from nabla_gfn_jax.typing import Images, Latents, Params, PRNGKeys

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
        self._params, self._table = place((model.frozen_params, model.encode_prompts(self.prompts)), self._mesh)
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
            lora: None for the base model.
            num, first: image i of a prompt has the same noise in every model, however many are asked for.
            nats: record path statistics; takes twice the time, with a LoRA.
            progress: what to call the work on a progress bar, if there is to be one.
        """
        each = np.arange(first, num)
        prompt = np.repeat(np.arange(len(self.prompts)), len(each))
        noise = prompt * _PER_PROMPT + np.tile(each, len(self.prompts))
        lora = place(lora, self._mesh)
        size = min(self._batch, -(-len(prompt) // self._mesh.size) * self._mesh.size)
        with tqdm(total=len(prompt), desc=progress, disable=progress is None, unit=" images") as bar:
            for start in range(0, len(prompt), size):
                count = min(size, len(prompt) - start)
                rows = start + np.minimum(np.arange(size), count - 1)  # the last batch is filled up
                keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(self.how.seed), noise[rows])
                program = self._programs[nats and lora is not None]
                given = place((keys, prompt[rows].astype(np.int32)), self._mesh, SPLIT)
                results = program(self._params, lora, self._table, *given)
                images, *paths = (gather(result, self._mesh)[:count] for result in results)
                yield Batch(images, prompt[rows][:count], PathStatistics(*paths) if paths else None)
                bar.update(count)

    def _likely_batch(self) -> int:
        on_each = int(np.clip(_PIXELS // self._pixels(), 1, _MOST))
        return min(on_each, CPU_BATCH) if self._mesh.devices.flat[0].platform == "cpu" else on_each * self._mesh.size

    def _pixels(self) -> int:
        height, width, _ = self._model.image_shape
        return height * width

    def _program(self, nats: bool):  # type: ignore[no-untyped-def]
        model, chain = self._model, self.chain

        def run(
            params: Params, lora: Params | None, table: Table, keys: PRNGKeys, prompt: Int[Array, " batch"]
        ) -> tuple[Images, ...]:
            predict = predictor(model, params, table, self.how.guidance)
            paths = sample_paths(predict, lora, chain, keys, model.latent_shape, prompt, nats=nats)
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


def all_images(batches: Iterator[Batch]) -> UInt8[np.ndarray, "n height width 3"]:
    """The images of all batches, for a grid, in the 256 levels of a picture: a quarter of the memory."""
    return np.concatenate([np.round(batch.images * 255.0).astype(np.uint8) for batch in batches])
