"""Trains the miniature Stable Diffusion that ships with the package: `python -m nabla_gfn_jax.pretrain`.

Drawings → tokenizer → VAE → latents → UNet and text encoder → a diffusers folder, `WORKDIR/model`. Stopped, it goes on
from its last save; every stage that is done is read back, not repeated.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nabla_gfn_jax.checkpoints.diffusers_folder import save_folder
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.command_line import claim_workdir, parse_flags, workdir_of
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.data import emoji
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, alphas_cumprod
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.tokenizer import CLIPTokenizer, load_tokenizer, train_tokenizer
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig
from nabla_gfn_jax.pretraining import denoiser
from nabla_gfn_jax.pretraining import vae as autoencoder
from nabla_gfn_jax.pretraining.loop import State, fit, init_state, optimizer
from nabla_gfn_jax.typing import Params


@exit_on_user_error
def main(argv: list[str]) -> None:
    """The stages, in order. Drawings are downloaded to the user's cache folder, or to $NABLA_GFN_JAX_EMOJI."""
    config, options = parse_flags(argv, "configs/emoji_base.py", {"workdir": ""})
    workdir = workdir_of(options)
    claim_workdir(workdir, config)
    use_compilation_cache()
    drawings = emoji.load()
    base = drawings.base()
    json_files = describe(config)

    captions = sorted({caption for concept in base.concepts for caption in concept.captions})
    train_tokenizer(captions, workdir / "model/tokenizer", config.vocab_size, config.max_tokens)
    tokenizer = load_tokenizer(workdir / "model/tokenizer")

    vae = AutoencoderKL(VAEConfig.from_json(json_files["vae"]))
    vae_params = train_vae(config, vae, drawings, workdir)
    report = {"vae_psnr_held_out_db": autoencoder.psnr(vae, vae_params, drawings.images[drawings.held_out])}

    mean, std = denoiser.encode_drawings(vae, vae_params, base.images)
    json_files["vae"]["scaling_factor"] = scale = round(float(1.0 / mean.std()), 5)
    ids, empty = caption_ids(tokenizer, base)
    data = denoiser.LatentDrawings(mean * scale, std * scale, jnp.asarray(ids), jnp.asarray(empty))
    params = train_denoiser(config, json_files, data, workdir)

    save_folder(workdir / "model", json_files, {"vae": vae_params, **params})
    write_json(workdir / "report.json", report)
    print(f"{report}\nthe model is in {workdir / 'model'}")


def describe(config: Any) -> dict[str, dict[str, Any]]:
    """The contents of the model's JSON files. The VAE's scaling factor is 1 until the latents' scale is known."""
    down = ["CrossAttnDownBlock2D"] * (len(config.unet.block_out_channels) - 1) + ["DownBlock2D"]
    v, t, u = config.vae, config.text_encoder, config.unet
    shared = ("block_out_channels", "layers_per_block", "norm_num_groups")
    vae: dict[str, Any] = {name: v[name] for name in shared}
    vae |= {"in_channels": 3, "out_channels": 3, "latent_channels": v.latent_channels, "scaling_factor": 1.0}
    vae["down_block_types"] = ["DownEncoderBlock2D"] * len(v.block_out_channels)
    vae["up_block_types"] = ["UpDecoderBlock2D"] * len(v.block_out_channels)
    vae["sample_size"] = emoji.SIZE
    unet: dict[str, Any] = {name: u[name] for name in (*shared, "attention_head_dim")}
    unet |= {"in_channels": v.latent_channels, "out_channels": v.latent_channels}
    unet |= {
        "cross_attention_dim": t.hidden_size,
        "sample_size": emoji.SIZE // 2 ** (len(v.block_out_channels) - 1),
    }
    unet |= {
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
    }
    text = t.to_dict() | {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_tokens}
    text |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None}
    scheduler = STABLE_DIFFUSION | {"prediction_type": "v_prediction"}
    return {"vae": vae, "unet": unet, "text_encoder": text, "scheduler": scheduler}


def train_vae(config: Any, vae: AutoencoderKL, drawings: emoji.Drawings, workdir: Path) -> Params:
    """The averaged parameters of a VAE that never saw the held-out drawings."""
    c = config.vae
    transform = optimizer(c.learning_rate, c.steps)
    params = vae.init(jax.random.key(config.seed), jnp.zeros((1, emoji.SIZE, emoji.SIZE, 3)))["params"]
    loss = autoencoder.make_loss(vae, drawings.images[~drawings.held_out], c.batch)
    state = init_state(params, transform)
    state = fit("vae", state, loss, transform, steps=c.steps, seed=config.seed, decay=c.decay, workdir=workdir)
    return state.average


def caption_ids(tokenizer: CLIPTokenizer, drawings: emoji.Drawings) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of every drawing's captions (N, captions, tokens), repeated to one number of them, and of ""."""
    rows = [c.captions for c in drawings.concepts]
    most = max(map(len, rows))
    ids = np.stack([tokenizer([row[i % len(row)] for i in range(most)]) for row in rows])
    return ids[drawings.concept], tokenizer([""])[0]


def train_denoiser(config: Any, json_files: dict, data: denoiser.LatentDrawings, workdir: Path) -> Params:
    """The averaged parameters of the UNet and the text encoder."""
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
    loss = denoiser.make_loss(unet, text_encoder, data, alphas_cumprod(json_files["scheduler"]), c.batch)
    state: State = init_state(params, transform)
    state = fit("denoiser", state, loss, transform, steps=c.steps, seed=config.seed, decay=c.decay, workdir=workdir)
    return state.average


if __name__ == "__main__":
    main(sys.argv)
