"""The parts of the miniature Stable Diffusion of emoji, and their training."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, alphas_cumprod
from nabla_gfn_jax.emoji import autoencoder, denoiser
from nabla_gfn_jax.emoji.drawings import SIZE, Drawings
from nabla_gfn_jax.emoji.loop import State, fit, init_state, optimizer
from nabla_gfn_jax.emoji.settings import Pretraining
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.tokenizer import CLIPTokenizer
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL
from nabla_gfn_jax.typing import Params


def describe(config: Pretraining) -> dict[str, dict[str, Any]]:
    """The contents of the model's JSON files. The VAE's scaling factor is 1 until the scale of the latents is known."""
    down = ["CrossAttnDownBlock2D"] * (len(config.unet.block_out_channels) - 1) + ["DownBlock2D"]
    v, t, u = config.vae, config.text_encoder, config.unet
    shared = ("block_out_channels", "layers_per_block", "norm_num_groups")
    vae: dict[str, Any] = {name: getattr(v, name) for name in shared}
    vae |= {"in_channels": 3, "out_channels": 3, "latent_channels": v.latent_channels, "scaling_factor": 1.0}
    vae["down_block_types"] = ["DownEncoderBlock2D"] * len(v.block_out_channels)
    vae["up_block_types"] = ["UpDecoderBlock2D"] * len(v.block_out_channels)
    vae["sample_size"] = SIZE
    unet: dict[str, Any] = {name: getattr(u, name) for name in (*shared, "attention_head_dim")}
    unet |= {"in_channels": v.latent_channels, "out_channels": v.latent_channels}
    unet |= {
        "cross_attention_dim": t.hidden_size,
        "sample_size": SIZE // 2 ** (len(v.block_out_channels) - 1),
    }
    unet |= {
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
    }
    text = asdict(t) | {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_tokens}
    text |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None}
    scheduler = STABLE_DIFFUSION | {"prediction_type": "v_prediction"}
    return {"vae": vae, "unet": unet, "text_encoder": text, "scheduler": scheduler}


def train_vae(config: Pretraining, vae: AutoencoderKL, drawings: Drawings, workdir: Path) -> Params:
    """Trains the VAE without the held-out drawings. Returns the averaged parameters."""
    c = config.vae
    transform = optimizer(c.learning_rate, c.steps)
    params = vae.init(jax.random.key(config.seed), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    loss = autoencoder.make_loss(vae, drawings.images[~drawings.held_out], c.batch)
    state = init_state(params, transform)
    state = fit("vae", state, loss, transform, steps=c.steps, seed=config.seed, decay=c.decay, workdir=workdir)
    return state.average


def caption_ids(tokenizer: CLIPTokenizer, drawings: Drawings) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of every drawing's captions (N, captions, tokens), and of "" (tokens,).

    Captions are repeated so that every drawing has the same number.
    """
    rows = [c.captions for c in drawings.concepts]
    most = max(map(len, rows))
    ids = np.stack([tokenizer([row[i % len(row)] for i in range(most)]) for row in rows])
    return ids[drawings.concept], tokenizer([""])[0]


def train_denoiser(config: Pretraining, json_files: dict, data: denoiser.LatentDrawings, workdir: Path) -> Params:
    """Trains the UNet and the text encoder. Returns the averaged parameters."""
    c = config.unet
    unet = UNet2DConditionModel(UNetConfig.from_json(json_files["unet"]))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_json(json_files["text_encoder"]))
    key = jax.random.key(config.seed + 1)
    context = jnp.zeros((1, config.max_tokens, config.text_encoder.hidden_size))
    params = {
        "unet": unet.init(key, data.mean[:1], jnp.zeros(1, jnp.int32), context)["params"],
        "text_encoder": text_encoder.init(key, data.empty_ids[None])["params"],
    }
    transform = optimizer(c.learning_rate, c.steps)
    signal = jnp.asarray(alphas_cumprod(json_files["scheduler"]), jnp.float32)
    loss = denoiser.make_loss(unet, text_encoder, data, signal, c.batch)
    state: State = init_state(params, transform)
    state = fit("denoiser", state, loss, transform, steps=c.steps, seed=config.seed, decay=c.decay, workdir=workdir)
    return state.average
