"""Stable Diffusion as a base model: text features of prompts, guided prediction, and decoding of latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nabla_gfn_jax.diffusion.chain import Chain, Level, expand, stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import Sampler
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextModel
from nabla_gfn_jax.models.lora import Layers, init_lora
from nabla_gfn_jax.models.pair import Pair, filled, linear
from nabla_gfn_jax.models.tokenizer import CLIPTokenizer
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL
from nabla_gfn_jax.typing import Images, Latents, Params, PerSample, PRNGKey, PromptIds

_ENCODED_TOGETHER = 64  # prompts


@flax.struct.dataclass
class TextFeatures:
    """The text features that the UNet attends to, of each prompt and of the negative prompt ("" by default)."""

    context: Float[Array | np.ndarray, "prompts tokens width"]
    negative: Float[Array | np.ndarray, "tokens width"]


@dataclass(frozen=True)
class StableDiffusion:
    """The parts of Stable Diffusion; `params` has "unet", "vae" and "text_encoder"."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: dict[str, Any]  # contents of scheduler_config.json
    params: Params

    @property
    def frozen_params(self) -> Params:
        return {part: self.params[part] for part in ("unet", "vae")}

    @property
    def dtype(self) -> Any:
        return self.unet.dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of one latent."""
        return (*self.unet.config.latent_size, self.unet.config.in_channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width = (side * self.vae.config.downscale for side in self.unet.config.latent_size)
        return (height, width, 3)

    def sized(self, height: int, width: int) -> "StableDiffusion":
        """The model for images of another size in pixels. Raises `UserError` if the model cannot sample this size."""
        factor = self.vae.config.downscale
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if height % multiple or width % multiple:
            raise UserError(f"an image of {height} x {width} pixels cannot be sampled; use multiples of {multiple}")
        config = replace(self.unet.config, sample_size=(height // factor, width // factor))
        return replace(self, unet=self.unet.clone(config=config))

    def chain(self, num_steps: int, *, sampler: Sampler = "ddpm", eta: float = 1.0) -> Chain:
        return stable_diffusion_chain(self.scheduler, num_steps, eta, sampler)

    def encode_prompts(self, prompts: Sequence[str], *, negative: str = "", lora: Params | None = None) -> TextFeatures:
        """Encodes each different prompt once, a few at a time. Repeated prompts have equal rows."""
        unique = list(dict.fromkeys([negative, *prompts]))
        rows = {prompt: row for row, prompt in enumerate(unique)}
        together = min(_ENCODED_TOGETHER, len(unique))
        ids = np.asarray(self.tokenizer(unique + [""] * (-len(unique) % together)))
        variables = {"params": self.params["text_encoder"], "lora": lora or {}}
        parts = [self._encode(variables, ids[start : start + together]) for start in range(0, len(ids), together)]
        features = np.concatenate([np.asarray(part) for part in parts])
        return TextFeatures(context=features[[rows[prompt] for prompt in prompts]], negative=features[0])

    @cached_property
    def _encode(self) -> Callable[..., Any]:
        return jax.jit(self.text_encoder.apply)

    def abstract_table(self, num_prompts: int) -> TextFeatures:
        text = self.text_encoder
        one = (text.config.max_position_embeddings, text.config.hidden_size)
        shapes: Any = [jax.ShapeDtypeStruct(shape, text.dtype) for shape in ((num_prompts, *one), one)]
        return TextFeatures(*shapes)

    def predict(
        self,
        params: Params,
        lora: Params | None,
        x: Latents,
        level: Level,
        table: TextFeatures,
        prompt_id: PromptIds,
        guidance: float,
    ) -> Latents:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) as one doubled batch.

        The last layer and the guidance are always in float32, because the losses amplify the difference of two outputs.
        """
        guided: Latents = self._guided(params, lora, x, level, table, prompt_id, guidance)
        return guided

    def predict_change(
        self,
        params: Params,
        lora: Params,
        x: Latents,
        level: Level,
        table: TextFeatures,
        prompt_id: PromptIds,
        guidance: float,
    ) -> tuple[Latents, Latents]:
        guided = filled(self._guided(params, lora, x, level, table, prompt_id, guidance, Pair))
        return guided.base, guided.change

    def _guided(
        self,
        params: Params,
        lora: Params | None,
        x: Latents,
        level: Level,
        table: TextFeatures,
        prompt_id: PromptIds,
        guidance: float,
        kind: Callable[[Array], Any] = lambda a: a,
    ) -> Any:
        """The guided output. `kind` converts the network's input arrays: to themselves, or to a `Pair`."""

        def double(a: Array) -> Array:
            return jnp.concatenate([a, a])

        def guide(output: Array) -> Array:
            without, with_prompt = jnp.split(output.astype(jnp.float32), 2)
            return without + guidance * (with_prompt - without)

        context = table.context[prompt_id]
        context = jnp.concatenate([jnp.broadcast_to(table.negative[None], context.shape), context])
        variables = {"params": params["unet"]} if lora is None else {"params": params["unet"], "lora": lora}
        seen = expand(level.input_scale, x) * x
        output: Any = self.unet.apply(variables, kind(double(seen)), double(level.time), kind(context))
        return linear(guide, output)

    def decode(self, params: Params, latents: Latents) -> Images:
        images: Images = self.vae.apply({"params": params["vae"]}, latents, method="decode")  # type: ignore[assignment]
        return jnp.clip(images.astype(jnp.float32), 0.0, 1.0)

    def init_lora(self, key: PRNGKey, rank: int, layers: Layers = "attention") -> Params:
        return init_lora(key, self.params["unet"], rank, layers)

    def head(self, kind: str, options: Mapping[str, Any]) -> "UNetHead":
        """A small UNet that attends to the prompt. `options` are fields of its `UNetConfig`."""
        unet, levels = self.unet.config, len(options["block_out_channels"])
        config = UNetConfig(
            sample_size=unet.sample_size,
            in_channels=unet.in_channels,
            out_channels=unet.in_channels,
            cross_attention_dim=unet.cross_attention_dim,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            up_block_types=("CrossAttnUpBlock2D",) * levels,
            **options,
        )
        return UNetHead(UNet2DConditionModel(config, remat=self.unet.remat), self.latent_shape, scalar=kind == "scalar")

    def on(self, platform: str, *, remat: bool) -> "StableDiffusion":
        options: dict[str, Any] = {"remat": remat, "platform": platform}
        return replace(self, unet=self.unet.clone(**options), vae=self.vae.clone(**options))


@dataclass(frozen=True)
class UNetHead:
    """A UNet in float32 whose last layer starts at zero. A scalar head averages its output over the latent."""

    unet: UNet2DConditionModel
    latent_shape: tuple[int, ...]
    scalar: bool = False

    def init(self, key: PRNGKey) -> Params:
        latent, context = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1, 1, self.unet.config.cross_attention_dim))
        params = self.unet.init(key, latent, jnp.zeros(1, jnp.int32), context)["params"]
        return params | {"conv_out": jax.tree.map(jnp.zeros_like, params["conv_out"])}

    def apply(
        self, phi: Params, x: Latents, level: Level, table: TextFeatures, prompt_id: PromptIds
    ) -> Latents | PerSample:
        seen = expand(level.input_scale, x) * x
        output: Latents = self.unet.apply({"params": phi}, seen, level.time, table.context[prompt_id])  # type: ignore[assignment]
        return output.reshape(len(output), -1).mean(axis=1) if self.scalar else output
