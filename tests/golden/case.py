"""A random tiny Stable Diffusion with a reward and a correction, for numbers that later code must reproduce."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from nabla_gfn_jax.base_models.diffusers_folder import abstract_params
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion, TextFeatures
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.lora import init_lora
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig

STEPS, GUIDANCE, BATCH = 10, 3.0, 3
SETTINGS = {"beta": 40.0, "output_regularisation": 3.0, "prior_strength": 1.5}
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(11), jnp.arange(BATCH))

_BLOCKS = {"layers_per_block": 1, "norm_num_groups": 4}
_UNET = _BLOCKS | {
    "block_out_channels": (8,),
    "sample_size": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
_TEXT = {
    "vocab_size": 600,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def _random(shapes, seed, dtype, scale=0.2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0, scale, a.shape), dtype), shapes)


def case(prediction, dtype):
    """Model, two LoRAs (`earlier` samples), φ, table of B prompts, and log R = mean of shade · image²."""
    unet = UNet2DConditionModel(UNetConfig(**_UNET), dtype)
    vae = AutoencoderKL(VAEConfig(**_BLOCKS | {"block_out_channels": (8, 8), "scaling_factor": 1.0}), dtype)
    text = CLIPTextModel(CLIPTextConfig(**_TEXT), dtype)
    params = _random(abstract_params(unet, vae, text), 0, dtype)
    scheduler = STABLE_DIFFUSION | {"prediction_type": prediction}
    model = StableDiffusion(unet, vae, text, None, scheduler, params)
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), params["unet"], 2))
    rng = np.random.default_rng(4)
    context, negative, shade = (
        jnp.asarray(rng.normal(size=s), dtype) for s in ((BATCH, 5, 8), (1, 5, 8), (BATCH, 8, 8, 3))
    )

    def log_reward(z, prompt_id):
        images = vae.apply({"params": params["vae"]}, z, method="decode")
        return (shade[prompt_id] * images**2).mean((1, 2, 3))

    phi = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)), jnp.zeros(1, jnp.int32), context[:1])
    return SimpleNamespace(
        model=model,
        lora=_random(shapes, 1, dtype, 0.5),
        earlier=_random(shapes, 2, dtype, 0.5),
        phi=_random(phi["params"], 3, dtype),
        table=TextFeatures(context=context, negative=negative[0]),
        log_reward=log_reward,
        correction=lambda phi, x, level, prompt_id: unet.apply({"params": phi}, x, level.time, context[prompt_id]),
    )
