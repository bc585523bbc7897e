"""Conversion of state dicts to parameters and back, old names, and errors for tensors and configs that do not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle

from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict, from_torch_layout, to_state_dict, to_torch_layout
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.clip import CLIPTextConfig, CLIPTextModel
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig
from nabla_gfn_jax.models.vae import AutoencoderKL, VAEConfig

LATENTS, TIMES, CONTEXT = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.int32), np.zeros((1, 3, oracle.WIDTH))
IMAGES, IDS = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, oracle.TOKENS), np.int32)
MODELS = {
    "sd-1.5": (lambda: oracle.unet(**oracle.SD_1_5), UNetConfig, UNet2DConditionModel, (LATENTS, TIMES, CONTEXT)),
    "sd-2.1": (lambda: oracle.unet(**oracle.SD_2_1), UNetConfig, UNet2DConditionModel, (LATENTS, TIMES, CONTEXT)),
    "vae": (oracle.vae, VAEConfig, AutoencoderKL, (IMAGES,)),
    "text": (oracle.text_encoder, CLIPTextConfig, CLIPTextModel, (IDS,)),
}


def config_json(model):
    """The config that the model's own `save_pretrained` writes."""
    return json.loads(
        model.config.to_json_string() if hasattr(model.config, "to_json_string") else model.to_json_string()
    )


def tensors(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def pair(name):
    """The tensors of a PyTorch model, and the shapes that our model expects for its config."""
    make, config, module, inputs = MODELS[name]
    theirs = make()
    ours = module(config.from_json(config_json(theirs)))
    inputs = [jnp.asarray(a, a.dtype if a.dtype != np.float64 else np.float32) for a in inputs]
    return tensors(theirs), jax.eval_shape(ours.init, jax.random.key(0), *inputs)["params"]


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    state, expected = pair(name)
    params = from_state_dict(state, expected, name)
    back = to_state_dict(params)
    state = {key.removeprefix("text_model."): array for key, array in state.items() if "position_ids" not in key}
    assert back.keys() == state.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, state[key])
        assert array.flags.c_contiguous  # safetensors writes the buffer as it lies


def test_text_encoder_of_either_age():
    """transformers 5 dropped the prefix "text_model."; older versions also saved the position ids."""
    state, expected = pair("text")
    bare = {key.removeprefix("text_model."): array for key, array in state.items()}
    old = {f"text_model.{key}": array for key, array in bare.items()}
    old["text_model.embeddings.position_ids"] = np.arange(oracle.TOKENS)[None]
    a, b = (from_state_dict(s, expected, "text") for s in (bare, old))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_vae_attention_of_either_age():
    """Checkpoints before diffusers 0.17 say query, key, value, proj_attn; some keep them as 1x1 convolutions."""
    state, expected = pair("vae")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old, renamed = {}, 0
    for key, array in state.items():
        for new_name, old_name in old_names.items():
            if f".{new_name}." in key:
                key, renamed = key.replace(f".{new_name}.", f".{old_name}."), renamed + 1
                array = array[:, :, None, None] if array.ndim == 2 else array
        old[key] = array
    assert renamed == 2 * 4 * 2  # encoder and decoder, four layers, weight and bias
    jax.tree.map(np.testing.assert_array_equal, *(from_state_dict(s, expected, "vae") for s in (state, old)))


def test_linear_projection_saved_as_a_convolution_and_the_reverse():
    linear, convolution = np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3, 1, 1)
    assert from_torch_layout("kernel", convolution, 2).shape == (3, 2)
    assert from_torch_layout("kernel", linear, 4).shape == (1, 1, 3, 2)
    np.testing.assert_array_equal(from_torch_layout("kernel", convolution, 2), linear.T)
    np.testing.assert_array_equal(to_torch_layout("kernel", from_torch_layout("kernel", linear, 4)), convolution)


def test_every_misfit_is_named_together():
    state, expected = pair("sd-1.5")
    missing = ["conv_in.weight", "mid_block.resnets.1.norm2.bias"]
    for name in missing:
        del state[name]
    state["conv_out.weight"] = state["conv_out.weight"][:, :-1]
    state["time_embedding.linear_1.bias"] = state["time_embedding.linear_1.bias"][None]
    state["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"] = np.zeros((16, 16, 3, 3))
    state["controlnet.weight"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        from_state_dict(state, expected, "unet/weights.safetensors")
    message = str(error.value)
    assert message.startswith("unet/weights.safetensors")
    assert "\n" not in message
    for name in missing:
        assert f"{name} is missing" in message
    assert "conv_out.weight has shape" in message
    assert "time_embedding.linear_1.bias has shape (1, 64)" in message
    assert "attn1.to_q.weight has shape" in message
    assert "controlnet.weight is not part of the model" in message


def test_a_foreign_file_does_not_flood_the_screen():
    _, expected = pair("vae")
    with pytest.raises(UserError, match=r"and \d+ more$") as error:
        from_state_dict({"a": np.zeros(1)}, expected, "vae.safetensors")
    assert len(str(error.value)) < 2500


UNSUPPORTED = [
    (UNetConfig, {"addition_embed_type": "text_time"}),  # SDXL
    (UNetConfig, {"transformer_layers_per_block": [1, 2, 10]}),
    (UNetConfig, {"class_embed_type": "projection"}),  # unCLIP
    (UNetConfig, {"act_fn": "gelu"}),
    (UNetConfig, {"only_cross_attention": [True, False, False, False]}),
    (UNetConfig, {"resnet_time_scale_shift": "scale_shift"}),
    (UNetConfig, {"mid_block_type": None}),  # tiny distilled models
    (UNetConfig, {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}),
    (UNetConfig, {"up_block_types": ["SimpleCrossAttnUpBlock2D", "UpBlock2D"]}),
    (UNetConfig, {"downsample_padding": 0}),
    (UNetConfig, {"time_cond_proj_dim": 256}),  # latent consistency models
    (VAEConfig, {"down_block_types": ["AttnDownEncoderBlock2D"]}),
    (VAEConfig, {"up_block_types": ["AttnUpDecoderBlock2D"]}),
    (VAEConfig, {"use_quant_conv": False}),  # SD 3
    (VAEConfig, {"shift_factor": 0.1}),
    (CLIPTextConfig, {"hidden_act": "relu"}),
    (CLIPTextConfig, {"model_type": "t5"}),
]


@pytest.mark.parametrize(
    ("config", "fields"), UNSUPPORTED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None
)
def test_unsupported_config(config, fields):
    """Values that the models do not implement are refused by name, instead of computing something else silently."""
    (name,) = fields
    with pytest.raises(UserError, match=rf"config\.json: {name} "):
        config.from_json(fields)


def test_defaults_are_stable_diffusion_1_5():
    assert UNetConfig.from_json({}).heads == (8, 8, 8, 8)
    assert UNetConfig.from_json({"attention_head_dim": [5, 10, 20, 20]}).heads == (5, 10, 20, 20)  # 2.1
    assert VAEConfig.from_json({}).downscale == 8
