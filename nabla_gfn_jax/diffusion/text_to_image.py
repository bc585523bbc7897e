"""Stable Diffusion as the sampler and the algorithms see it: prompt → context → guided ε; latent → image."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nabla_gfn_jax.algorithms.base import Predict
from nabla_gfn_jax.checkpoints.diffusers_folder import StableDiffusion
from nabla_gfn_jax.diffusion.schedule import alphas_cumprod, expand
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.typing import Images, Latents, Params, Scores, Timesteps

_ENCODED_TOGETHER = 64  # prompts
Condition = dict[str, Any]  # "context" and "negative" (B, tokens, width); "reward": the reward's prompt features


def encode_prompts(model: StableDiffusion, prompts: Sequence[str]) -> Condition:
    """Text features of the prompts and, for guidance, of "" as often. Each is encoded once, a few at a time."""
    unique = list(dict.fromkeys(["", *prompts]))
    rows = {prompt: row for row, prompt in enumerate(unique)}
    apply = jax.jit(model.text_encoder.apply)
    together = min(_ENCODED_TOGETHER, len(unique))
    ids = np.asarray(model.tokenizer(unique + [""] * (-len(unique) % together)))
    variables = {"params": model.params["text_encoder"]}
    parts = [apply(variables, ids[start : start + together]) for start in range(0, len(ids), together)]
    features = jnp.concatenate(parts)
    context = features[jnp.asarray([rows[prompt] for prompt in prompts])]
    return {"context": context, "negative": jnp.broadcast_to(features[:1], context.shape)}


def guided_predictor(model: StableDiffusion, params: Params, guidance: float) -> Predict:
    """ε_u + w(ε_c − ε_u), w = `guidance` (Ho & Salimans 2022, arXiv 2207.12598), as one doubled batch.

    `params` are the UNet's, handed in so that inside `jit` they are arguments and not constants. The velocity
    of a v-prediction model (Salimans & Ho 2022, arXiv 2202.00512) is made ε: ε = √ᾱ v + √(1−ᾱ) x. Returns
    ε(lora, x, t, condition) in float32; `lora` None is the base model.
    """
    kind = model.scheduler.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"scheduler_config.json: prediction_type {kind!r} is not supported; epsilon or v_prediction is")
    alpha_bars = alphas_cumprod(model.scheduler)

    def predict(lora: Params | None, x: Latents, t: Timesteps, condition: Condition) -> Latents:
        def double(a: Array) -> Array:
            return jnp.concatenate([a, a])

        context = jnp.concatenate([condition["negative"], condition["context"]])
        variables = {"params": params} if lora is None else {"params": params, "lora": lora}
        output: Latents = model.unet.apply(variables, double(x), double(t), context)  # type: ignore[assignment]
        without, with_prompt = jnp.split(output.astype(jnp.float32), 2)
        guided = without + guidance * (with_prompt - without)
        if kind == "epsilon":
            return guided
        alpha_bar: Scores = alpha_bars[t]
        return expand(jnp.sqrt(alpha_bar), x) * guided + expand(jnp.sqrt(1 - alpha_bar), x) * x

    return predict


def decode(model: StableDiffusion, params: Params, latents: Latents) -> Images:
    """Images in [0, 1], clamped, float32; `params` are the VAE's."""
    images: Images = model.vae.apply({"params": params}, latents, method="decode")  # type: ignore[assignment]
    return jnp.clip(images.astype(jnp.float32), 0.0, 1.0)
