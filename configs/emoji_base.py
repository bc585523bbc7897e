"""The emoji Stable Diffusion that ships with the package.

    pip install '.[pretrain]'
    python -m nabla_gfn_jax.pretrain --config=configs/emoji_base.py --workdir=runs/emoji_base

Seed 0, 2 shared CPU cores. VAE: 4,000 updates of 16 in 37 minutes, held-out drawings reconstructed at 27.3 dB PSNR
(`report.json`). UNet and text encoder: 9,000 updates of 64 in about 65 minutes, final loss .472 (mean squared error of
the velocity over all noise levels, the 50 updates before the end; `denoiser.jsonl`). The shipped weights were trained
in three sittings, whose learning rate fell along a cosine to update 3,300, then (from 3,300 to 4,950) along one to
6,600, then along one to 9,000; a new run follows the last from the start. The shipped model is 11 MB in float16;
its tokenizer was learnt before ties between merges were broken the same way in every run, so a new run's merges, and
with them the text encoder's rows, may differ. Drawings come from npm and PyPI packages the first time (100 MB).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Sizes and schedules of the three networks; the model's JSON files are made from them."""
    c = ConfigDict()
    c.seed = 0
    c.max_tokens = 16
    c.vocab_size = 1200

    c.vae = ConfigDict()
    c.vae.block_out_channels = (16, 32, 64, 64)
    c.vae.layers_per_block = 1
    c.vae.latent_channels = 8
    c.vae.norm_num_groups = 8
    c.vae.steps = 4000
    c.vae.batch = 16
    c.vae.learning_rate = 2e-3
    c.vae.decay = 0.999

    c.text_encoder = ConfigDict()
    c.text_encoder.hidden_size = 128
    c.text_encoder.intermediate_size = 256
    c.text_encoder.num_hidden_layers = 2
    c.text_encoder.num_attention_heads = 4

    c.unet = ConfigDict()
    c.unet.block_out_channels = (64, 96, 112)
    c.unet.layers_per_block = 1
    c.unet.attention_head_dim = 4
    c.unet.norm_num_groups = 16
    c.unet.steps = 9_000
    c.unet.batch = 64
    c.unet.learning_rate = 1e-3
    c.unet.decay = 0.9995
    return c
