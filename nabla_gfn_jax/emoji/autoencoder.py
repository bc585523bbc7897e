"""The loss of the emoji VAE: squared and absolute error, and a small KL term towards the unit Gaussian."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from nabla_gfn_jax.models.vae import AutoencoderKL
from nabla_gfn_jax.typing import Images, Params, PRNGKey

L1_WEIGHT = 0.1  # keeps edges sharper than with the squared error alone
KL_WEIGHT = 1e-6  # weight of the KL in nats per image; latents need a bounded scale, not a Gaussian distribution


def augment(key: PRNGKey, images: Images, max_shift: int = 4) -> Images:
    """Mirrors, shifts and (3 of 10) permutes the colour channels of each image at random. Shifts wrap around."""

    def one(key: PRNGKey, image: Float[Array, "height width 3"]) -> Float[Array, "height width 3"]:
        mirror, recolour, order, shift = jax.random.split(key, 4)
        image = jnp.where(jax.random.bernoulli(mirror), image[:, ::-1], image)
        permuted = image[:, :, jax.random.permutation(order, 3)]
        image = jnp.where(jax.random.bernoulli(recolour, 0.3), permuted, image)
        dy, dx = jax.random.randint(shift, (2,), -max_shift, max_shift + 1)
        return jnp.roll(image, (dy, dx), (0, 1))

    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def make_loss(vae: AutoencoderKL, drawings: UInt8[np.ndarray, "count height width 3"], batch: int):
    """The function `loss(params, key)` on `batch` random, augmented drawings, for `emoji.loop.fit`."""
    data = jnp.asarray(drawings)
    apply: Any = vae.apply

    def loss(params: Params, key: PRNGKey) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        choose, change, noise = jax.random.split(key, 3)
        index = jax.random.randint(choose, (batch,), 0, data.shape[0])
        images = augment(change, data[index].astype(jnp.float32) / 255.0)
        mean, std = apply({"params": params}, images, method="encode")
        latents = mean + std * jax.random.normal(noise, mean.shape)
        error = apply({"params": params}, latents, method="decode") - images
        mse, mae = jnp.square(error).mean(), jnp.abs(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.square(std) - 1.0 - 2.0 * jnp.log(std)).sum(axis=(1, 2, 3)).mean()
        return mse + L1_WEIGHT * mae + KL_WEIGHT * kl, {"mse": mse, "kl": kl, "latent_std": mean.std()}

    return loss


def psnr(vae: AutoencoderKL, params: Params, drawings: UInt8[np.ndarray, "count height width 3"]) -> float:
    """The peak signal-to-noise ratio (dB, peak 1) of decode(encode(x)), clamped to [0, 1], as a mean over drawings."""
    apply: Any = vae.apply
    reconstruct = jax.jit(lambda x: jnp.clip(apply({"params": params}, x), 0.0, 1.0))
    values: list[float] = []
    for start in range(0, len(drawings), 64):
        images = drawings[start : start + 64].astype(np.float32) / 255.0
        mse = np.square(np.asarray(reconstruct(images)) - images).mean(axis=(1, 2, 3))
        values += list(-10.0 * np.log10(mse))
    return float(np.mean(values))
