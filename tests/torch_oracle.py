"""The PyTorch models with which ours are compared, at sizes that compile in seconds."""

from pathlib import Path

import diffusers
import jax
import numpy as np
import peft
import torch
import transformers

from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer

torch.set_num_threads(1)
torch.set_grad_enabled(False)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

TOKENS = 12
WIDTH = 24  # of the text features
CAPTIONS = ["a cat", "a smiling face with heart eyes", "two dogs and a frog's pond"]

# As the SD-1.5 and SD-2.1 config files differ: heads, projections, text encoder, prediction type.
SD_1_5 = {"attention_head_dim": 4}
SD_2_1 = {"attention_head_dim": [2, 4, 4, 8], "use_linear_projection": True}
# The least there is, and the least that has every kind of block.
ONE_LEVEL = {
    "attention_head_dim": 4,
    "block_out_channels": (16,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
TWO_LEVELS = {
    "attention_head_dim": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(seed: int = 0, **fields) -> diffusers.UNet2DConditionModel:
    """A UNet with four levels as in Stable Diffusion, unless `fields` change it, and one layer per block."""
    torch.manual_seed(seed)
    small = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "layers_per_block": 1}
    return diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=WIDTH, **small | fields).eval()


def vae(seed: int = 1) -> diffusers.AutoencoderKL:
    """A VAE with three levels; with Stable Diffusion's four, a latent of these small images would be one pixel."""
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=32,
    ).eval()


def text_encoder(hidden_act: str = "quick_gelu", seed: int = 2) -> transformers.CLIPTextModel:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=600,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=TOKENS,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = transformers.CLIPTextModel(config).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # as initialised, features hardly depend on the text
    return model


def pipeline(folder: Path, prediction_type: str = "epsilon", **unet_fields) -> diffusers.StableDiffusionPipeline:
    """A whole Stable Diffusion with random weights."""
    train_tokenizer(CAPTIONS, folder / "captions_tokenizer", 600, TOKENS)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "captions_tokenizer"),
        unet=unet(**unet_fields),
        scheduler=diffusers.DDIMScheduler(**STABLE_DIFFUSION | {"prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_lora(model: diffusers.UNet2DConditionModel, rank: int = 3, alpha: float = 3) -> None:
    """Random adapters on every attention projection."""
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config)


def quick_jit(function):
    """`jit(function)` without optimisations that take longer than they save here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def compile_quickly(function, *arguments):
    """The function compiled for these shapes, without such optimisations."""
    return quick_jit(function).lower(*arguments).compile()


def relative(ours, theirs) -> float:
    """‖a − b‖ / ‖b‖ in float64."""
    a, b = (np.asarray(v, np.float64) for v in (ours, theirs))
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def nchw(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).contiguous()


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().permute(0, 2, 3, 1).numpy()
