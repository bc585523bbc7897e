"""The joint loss of the emoji UNet and its text encoder, on latents that are encoded once."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nabla_gfn_jax.diffusion.chain import expand
from nabla_gfn_jax.models.clip import CLIPTextModel
from nabla_gfn_jax.models.unet import UNet2DConditionModel
from nabla_gfn_jax.models.vae import AutoencoderKL
from nabla_gfn_jax.typing import Params, PRNGKey

PROMPT_DROPOUT = 0.1  # probability of the prompt "", which trains the unconditional prediction for guidance


@dataclass(frozen=True)
class LatentDrawings:
    """N drawings as inputs of the UNet: mean and std of q(z | image), and the token ids of each drawing's captions."""

    mean: Float[Array, "drawings height width channels"]
    std: Float[Array, "drawings height width channels"]
    ids: Int[Array, "drawings captions tokens"]  # captions are repeated if a drawing has fewer
    empty_ids: Int[Array, " tokens"]  # of the prompt ""


def encode_drawings(vae: AutoencoderKL, params: Params, images: np.ndarray) -> tuple[Array, Array]:
    """Mean and standard deviation of the latents of uint8 images (N, H, W, 3), computed in batches."""
    encode = jax.jit(lambda x: vae.apply({"params": params}, x, method="encode"))
    parts = [encode(images[i : i + 64].astype(np.float32) / 255.0) for i in range(0, len(images), 64)]
    means, stds = zip(*parts, strict=True)
    return jnp.concatenate(means), jnp.concatenate(stds)


def make_loss(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    data: LatentDrawings,
    alphas_cumprod: Float[Array, "1000"],
    batch: int,
):
    """The function `loss(params, key)`: squared error of the velocity v = √ᾱ ε − √(1−ᾱ) z.

    `params` has "unet" and "text_encoder". The reason for v-prediction (Salimans & Ho 2022, arXiv 2202.00512, section
    4) is that at high noise an error in ε would be amplified 14 times in the clean image, and an error in v is not.
    """

    def loss(params: Params, key: PRNGKey) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        keys = jax.random.split(key, 6)
        row = jax.random.randint(keys[0], (batch,), 0, data.mean.shape[0])
        caption = jax.random.randint(keys[1], (batch,), 0, data.ids.shape[1])
        dropped = jax.random.bernoulli(keys[2], PROMPT_DROPOUT, (batch, 1))
        ids = jnp.where(dropped, data.empty_ids[None], data.ids[row, caption])
        context = text_encoder.apply({"params": params["text_encoder"]}, ids)

        z = data.mean[row] + data.std[row] * jax.random.normal(keys[3], data.mean[row].shape)
        t = jax.random.randint(keys[4], (batch,), 0, alphas_cumprod.shape[0])
        noise = jax.random.normal(keys[5], z.shape)
        signal, sigma = (expand(jnp.sqrt(a[t]), z) for a in (alphas_cumprod, 1.0 - alphas_cumprod))
        predict: Any = unet.apply
        velocity = predict({"params": params["unet"]}, signal * z + sigma * noise, t, context)
        error = jnp.square(velocity - (signal * noise - sigma * z)).mean(axis=(1, 2, 3))
        noisy = t >= alphas_cumprod.shape[0] // 2
        count = jnp.maximum(noisy.sum(), 1).astype(error.dtype)
        per_half = {"loss_high_noise": jnp.where(noisy, error, 0.0).sum() / count}
        return error.mean(), per_half

    return loss
