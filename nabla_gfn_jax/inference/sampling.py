"""Samples images from a base model, with or without a LoRA, in batches of bounded memory."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int, UInt8
from tqdm import tqdm

from nabla_gfn_jax.algorithms.value_guide import ValueGuide, following
from nabla_gfn_jax.base_models.base import FEW_PROMPTS, BaseModel, Table, change_predictor, predictor, window
from nabla_gfn_jax.checkpoints.lora_names import TEXT_ENCODER
from nabla_gfn_jax.diffusion.chain import Level
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.images import levels
from nabla_gfn_jax.inference.batch_size import fits, is_out_of_memory
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.metrics.base import Batch, PathStatistics
from nabla_gfn_jax.parallel import EVERYWHERE, SPLIT, all_devices, gather, place, split
from nabla_gfn_jax.typing import Images, Latents, Params, PRNGKeys, PromptIds

CPU_BATCH = 32  # the most images sampled together on a CPU; the number of cores in use must divide it
_MOST = 32  # the most images sampled together on a device
_PIXELS = 2**21  # the most pixels sampled together on a device: 8 images of 512 x 512
_DECODED = 2**19  # the most pixels decoded together on a device: the VAE's activations take 1 kB or more per pixel
_PER_PROMPT = 2**20  # number of noises reserved for each prompt
_Kind = Literal["images", "nats", "along_base"]  # of the programs: whether paths are recorded, and whose
Policy: TypeAlias = Params | ValueGuide


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled.

    Attributes:
        sampler: the steps' distribution.
        steps: number of sampling steps.
        guidance: classifier-free guidance scale; 1: no guidance.
        eta: scale of the noise of each step. 1: DDPM; 0: DDIM, which has no nats.
        seed: seed of the noise.
        negative: the negative prompt of the guidance.
        lora_from_step: the first step with the LoRA, counted from 1.
        lora_until_step: the last step with the LoRA; None: the last step of all.
    """

    sampler: Sampler = "ddpm"
    steps: int = 50
    guidance: float = 5.0
    eta: float = 1.0
    seed: int = 0
    negative: str = ""
    lora_from_step: int = 1
    lora_until_step: int | None = None

    def __post_init__(self) -> None:
        """Raises `UserError` if no step would use the LoRA."""
        if not self.lora_steps.any():
            last = "" if self.lora_until_step is None else f" and lora_until_step = {self.lora_until_step}"
            first = f"lora_from_step = {self.lora_from_step}"
            raise UserError(f"with {first}{last} none of the {self.steps} steps uses the LoRA; choose a range of steps")

    @property
    def lora_steps(self) -> Bool[np.ndarray, " steps"]:
        """True for the steps with the LoRA, False for those of the base model."""
        step = 1 + np.arange(self.steps)
        return (step >= self.lora_from_step) & (step <= (self.lora_until_step or self.steps))


class ImageSampler:
    """Samples images of some prompts. If these are not very many, they are encoded once.

    An image depends only on the model, the seed, the place of its prompt in the list, and its number. Raises
    `UserError` if the model does not support the sampling options.
    """

    def __init__(self, model: BaseModel, prompts: Sequence[str], how: Sampling, batch: int = 0):
        """`batch`: images sampled together on all devices; 0: as many as are likely to fit.

        A batch that does not fit into memory is halved.
        """
        self.prompts, self.chain = tuple(prompts), model.chain(how.steps, sampler=how.sampler, eta=how.eta)
        self.how, self._mesh = how, all_devices()
        self._model = model.on(self._mesh.devices.flat[0].platform, remat=False)
        self._batch = -(-(batch or self._likely_batch()) // self._mesh.size) * self._mesh.size
        self._params = place(model.frozen_params, self._mesh)
        self._table = None if len(self.prompts) > FEW_PROMPTS else self._encode(None, self.prompts)
        self._lora_steps = how.lora_steps
        inputs = (EVERYWHERE, EVERYWHERE, EVERYWHERE, SPLIT, SPLIT)
        self._programs = {kind: split(self._program(kind), self._mesh, inputs, SPLIT) for kind in get_args(_Kind)}
        self._compiled: dict[Hashable, Any] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, 3) of the images."""
        return self._model.image_shape

    @property
    def has_nats(self) -> bool:
        """Whether every step has σ > 0, so that its density and the nats exist."""
        return bool(np.all(np.asarray(self.chain.sigma) > 0))

    def images(
        self,
        lora: Policy | None,
        num: int,
        *,
        first: int = 0,
        nats: bool = False,
        along_base: bool = False,
        progress: str | None = None,
    ) -> Iterator[Batch]:
        """Samples the images number `first` to `num` − 1 of each prompt, prompt by prompt, in batches.

        Args:
            lora: the LoRA, or what is followed in its place; None for the base model. Its part "text_encoder" adapts
                the text encoder.
            num, first: the range of images. Image i of a prompt has the same noise for every model, `num` and `first`.
            nats: record path statistics; with a LoRA this takes twice the time.
            along_base: sample the base model, and record the path statistics of the LoRA on its paths.
            progress: the label of a progress bar; None: no bar.
        """
        if isinstance(lora, ValueGuide) and self._table is None:
            raise UserError(f"a log value cannot be followed for more than {FEW_PROMPTS} prompts; choose fewer")
        each = np.arange(first, num)
        prompt = np.repeat(np.arange(len(self.prompts)), len(each))
        number = np.tile(each, len(self.prompts))
        seeing, lora = self._seeing(_of_text_encoder(lora)), place(lora, self._mesh)
        wanted: _Kind = "along_base" if along_base else "nats" if nats else "images"
        kind: _Kind = "images" if lora is None else wanted
        start = 0
        with tqdm(total=len(prompt), desc=progress, disable=progress is None, unit=" images") as bar:
            while start < len(prompt):
                size = min(self._batch, -(-len(prompt) // self._mesh.size) * self._mesh.size)
                count = min(size, len(prompt) - start)
                rows = start + np.minimum(np.arange(size), count - 1)  # pads the last batch
                tables, places = seeing(prompt[rows])
                given = place((image_keys(self.how.seed, prompt[rows], number[rows]), places), self._mesh, SPLIT)
                results = self._run(kind, self._params, lora, tables, *given)
                if results is None:
                    continue  # with a smaller batch
                images, *paths = (result[:count] for result in results)
                yield Batch(images, prompt[rows][:count], PathStatistics(*paths) if paths else None)
                start += count
                bar.update(count)

    def _run(self, kind: _Kind, *inputs: Any) -> list[np.ndarray] | None:
        """The results of the program `kind` on a batch. None if they do not fit into memory; `_batch` is then half.

        Raises `UserError` if a batch cannot be smaller.
        """
        size, smallest = len(inputs[-1]), self._mesh.size
        leaves, structure = jax.tree.flatten(inputs)
        key = (kind, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        try:
            if key not in self._compiled:
                compiled = self._programs[kind].lower(*inputs).compile()
                on_cpu = self._mesh.devices.flat[0].platform == "cpu"
                if on_cpu and size > smallest and not fits(compiled, smallest):
                    self._halve(size)
                    return None
                self._compiled[key] = compiled
            return [gather(result, self._mesh) for result in self._compiled[key](*inputs)]
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or jax.process_count() > 1:  # other processes may have had enough
                raise
            if size == smallest:
                raise UserError(
                    f"{size} images at once do not fit into memory; use --model_dtype=bfloat16 or smaller images"
                ) from error
            self._halve(size)
            return None

    def _halve(self, size: int) -> None:
        self._batch = max(1, size // 2 // self._mesh.size) * self._mesh.size
        print(f"{size} images at once do not fit into memory; going on with {self._batch}", file=sys.stderr)

    def _encode(self, lora: Params | None, prompts: Sequence[str]) -> Table:
        return place(self._model.encode_prompts(prompts, negative=self.how.negative, lora=lora), self._mesh)

    def _seeing(
        self, text: Params | None
    ) -> Callable[[Int[np.ndarray, " n"]], tuple[tuple[Table, Table], Int[np.ndarray, " n"]]]:
        """A function from prompt ids to the tables of base model and policy, and the rows of the prompts in them.

        `text` is the text encoder's LoRA. Of very many prompts, the tables have those that are asked for.
        """
        if self._table is not None:
            tables = (self._table, self._encode(text, self.prompts) if text else self._table)
            return lambda prompt: (tables, prompt.astype(np.int32))

        def see(prompt: Int[np.ndarray, " n"]) -> tuple[tuple[Table, Table], Int[np.ndarray, " n"]]:
            ids, rows = window(prompt, len(prompt))
            prompts = [self.prompts[i] for i in ids]
            base = self._encode(None, prompts)
            return (base, self._encode(text, prompts) if text else base), rows

        return see

    def _likely_batch(self) -> int:
        on_each = int(np.clip(_PIXELS // self._pixels(), 1, _MOST))
        return min(on_each, CPU_BATCH) if self._mesh.devices.flat[0].platform == "cpu" else on_each * self._mesh.size

    def _pixels(self) -> int:
        height, width, _ = self.image_shape
        return height * width

    def _program(self, kind: _Kind):  # type: ignore[no-untyped-def]
        model, chain, nats = self._model, self.chain, kind != "images"
        active = None if self._lora_steps.all() else self._lora_steps

        def run(
            params: Params, lora: Any, tables: tuple[Table, Table], keys: PRNGKeys, prompt: PromptIds
        ) -> tuple[Images, ...]:
            of_base, of_policy = (predictor(model, params, table, self.how.guidance) for table in tables)
            follow, is_guide = following(of_base, chain), isinstance(lora, ValueGuide)

            def predict(lora: Any, x: Latents, level: Level, condition: PromptIds) -> Latents:
                if is_guide and lora is not None:
                    output, change = follow(lora, x, level, condition)
                    return output + change
                return (of_base if lora is None else of_policy)(lora, x, level, condition)

            how: dict[str, Any] = {"nats": nats, "along_base": kind == "along_base", "active": active}
            if is_guide:
                how |= {"predict_change": follow, "active": None}  # it knows its times
            elif _of_text_encoder(lora) is None:  # otherwise their contexts differ; outputs are subtracted
                how["predict_change"] = change_predictor(model, params, tables[0], self.how.guidance)
            paths = sample_paths(predict, lora, chain, keys, model.latent_shape, prompt, **how)
            images = self._decode(params, paths.latents)
            return (images, paths.spent, paths.log_ratio) if nats else (images,)

        return run

    def _decode(self, params: Params, latents: Latents) -> Images:
        """Decodes a few latents at a time."""
        count, most = len(latents), max(1, _DECODED // self._pixels())
        size = max(n for n in range(1, count + 1) if count % n == 0 and n <= most)
        parts = latents.reshape(count // size, size, *latents.shape[1:])
        images = jax.lax.map(partial(self._model.decode, params), parts)
        return images.reshape(count, *images.shape[2:])


def image_keys(seed: int, prompt: Int[np.ndarray, " n"], number: Int[np.ndarray, " n"]) -> PRNGKeys:
    """The keys of the noise of image number `number` of each prompt. `prompt` is its place in the list of prompts."""
    noise = prompt.astype(np.int64) * _PER_PROMPT + number
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), noise)


def _of_text_encoder(policy: Policy | None) -> Params | None:
    return policy.get(TEXT_ENCODER) if isinstance(policy, dict) else None


def digest(policy: Policy) -> str:
    """A hash of all names and numbers of a LoRA, or of what is followed in its place."""
    found = hashlib.sha256()
    for path, array in sorted(flatten_dict(to_state_dict(policy)).items()):
        found.update(repr((path, array.shape)).encode())
        found.update(np.asarray(array).tobytes())
    return found.hexdigest()


def scaled(lora: Params, strength: float) -> Params:
    """The LoRA with its change of each layer multiplied by `strength`."""

    def scale(path: tuple[jax.tree_util.DictKey, ...], leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        return leaf * jnp.asarray(strength, leaf.dtype) if path[-1].key == "up" else leaf

    return jax.tree_util.tree_map_with_path(scale, lora)


def combined(loras: Sequence[Params]) -> Params:
    """The sum of several LoRAs as one LoRA. The matrices of LoRAs that adapt the same layer are concatenated."""
    pairs: dict[tuple[str, ...], list[Array]] = defaultdict(list)
    for lora in loras:
        for path, leaf in flatten_dict(lora).items():
            pairs[path].append(leaf)
    # The rank is the last axis of down and the first of up.
    return unflatten_dict({p: jnp.concatenate(found, -1 if p[-1] == "down" else 0) for p, found in pairs.items()})


def all_images(batches: Iterator[Batch]) -> UInt8[np.ndarray, "n height width 3"]:
    """The images of all batches as uint8, which needs a quarter of the memory of float32."""
    return np.concatenate([levels(batch.images) for batch in batches])
