"""Trains the miniature Stable Diffusion that ships with the package: `python -m nabla_gfn_jax.pretrain`.

Drawings → tokenizer → VAE → latents → UNet and text encoder → a diffusers folder, `WORKDIR/model`. The same command
resumes from the last save; finished stages are read from the workdir and not repeated.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from nabla_gfn_jax.base_models.diffusers_folder import save_folder
from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.command_line import default_workdir, parse_run
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.emoji import autoencoder, denoiser
from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.emoji.drawings import load_drawings
from nabla_gfn_jax.emoji.miniature import caption_ids, describe, train_denoiser, train_vae
from nabla_gfn_jax.emoji.settings import Pretraining
from nabla_gfn_jax.errors import exit_on_user_error
from nabla_gfn_jax.models.tokenizer import load_tokenizer
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig
from nabla_gfn_jax.options import Checked, flatten, option
from nabla_gfn_jax.parallel import require_devices
from nabla_gfn_jax.runs.workdir import claim


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """The options of the command beside the settings."""

    config: str = option("emoji_base", "name of a shipped config, or a Python file")
    workdir: Path | None = option(None, "folder of the run [runs/CONFIG/seedN]")


@exit_on_user_error
def main(argv: list[str]) -> None:
    """Runs the stages in order. Drawings are downloaded to the user's cache folder, or to $NABLA_GFN_JAX_EMOJI."""
    options, config = parse_run(argv, Options, Pretraining, __doc__)
    require_devices()
    with claim(options.workdir or default_workdir(options.config, config.seed), flatten(config)) as workdir:
        use_compilation_cache()
        make(config, workdir.path)


def make(config: Pretraining, workdir: Path) -> None:
    """Trains the parts one after another, and writes the model and report.json with its PSNR on held-out drawings."""
    drawings = load_drawings()
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


if __name__ == "__main__":
    main(sys.argv)
