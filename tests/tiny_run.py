"""A finetuning run on a model of a few thousand parameters."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nabla_gfn_jax import train
from nabla_gfn_jax.base_models.diffusers_folder import abstract_params, save_folder
from nabla_gfn_jax.config_files import load_config, split_variant
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig
from nabla_gfn_jax.rewards import REWARDS, Reward

CONFIG = Path(__file__).parents[1] / "configs/emoji.py"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A diffusers folder with random weights: 8x8 images, 4x4x4 latents."""
    return make_model(tmp_path_factory.mktemp("tiny"))


def make_model(folder: Path, attention: str = "CrossAttn", text_scale: float = 1.0) -> Path:
    """Writes that folder. With `attention` "" the middle of the UNet alone attends, which compiles faster; with a
    `text_scale` of 30 the predictions depend on the prompt by some percent.
    """
    blocks = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    unet = blocks | {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "down_block_types": [f"{attention}DownBlock2D"],
        "up_block_types": [f"{attention}UpBlock2D"],
    }
    vae = blocks | {
        "block_out_channels": [8, 8],
        "latent_channels": 4,
        "scaling_factor": 1.0,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    text = {
        "vocab_size": 600,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
    }
    train_tokenizer(["a face", "an animal"], folder / "tokenizer", 600, 8)
    modules = (
        UNet2DConditionModel(UNetConfig.from_json(unet)),
        AutoencoderKL(VAEConfig.from_json(vae)),
        CLIPTextModel(CLIPTextConfig.from_json(text)),
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), abstract_params(*modules))
    params["text_encoder"]["final_layer_norm"]["scale"] *= text_scale
    configs = {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": STABLE_DIFFUSION}
    save_folder(folder, configs, params, np.float32)
    return folder


def brightness(scale: float) -> Reward:
    """log R = scale · mean pixel."""
    return Reward(
        params={"scale": jnp.float32(scale)},
        encode_prompts=lambda prompts: {},
        score=lambda params, images, features: params["scale"] * images.mean(axis=(1, 2, 3)),
    )


@pytest.fixture(scope="session")
def command(tiny_model):
    """Runs the training command on the tiny model with a few fields set. Errors raise SystemExit(2)."""

    def call(workdir: Path, *more: str, reward: str = "1.0") -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(REWARDS, reward, lambda: brightness(float(reward)))
            train.main(["train", *fitting([*flags(tiny_model, workdir, reward), *more])])

    return call


def last_of_each(flags: list[str]) -> list[str]:
    """The flags, where only the last of each name is kept, because a repeated flag is an error."""
    return list({flag.partition("=")[0]: flag for flag in flags}.values())


def fitting(flags: list[str]) -> list[str]:
    """The last of each flag, without `transition_fraction` if the config's algorithm has no such field."""
    chosen = last_of_each(flags)
    (config,) = (flag.removeprefix("--config=") for flag in chosen if flag.startswith("--config="))
    known = "transition_fraction" in load_config(*split_variant(config)).algorithm
    return [flag for flag in chosen if known or "transition_fraction" not in flag]


def flags(model: Path, workdir: Path, reward: str = "1.0") -> list[str]:
    """The flags of a small run: 3 epochs of 2 updates on 16 trajectories; the learning rate changes the images."""
    fields = {
        "model": model,
        "reward": reward,
        "sampling.num_steps": 10,
        "algorithm.transition_fraction": 0.2,
        "correction.block_out_channels": "(8,)",
        "correction.norm_num_groups": 4,
        "training.trajectories": 16,
        "training.micro_batches": 2,
        "training.updates_per_epoch": 2,
        "training.num_epochs": 3,
        "training.learning_rate": 0.005,
        "logging.samples_every": 3,
        "logging.checkpoint_every": 1,
    }
    return [
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
