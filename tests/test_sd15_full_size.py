"""The UNet at Stable Diffusion 1.5's full size, 860 million random parameters, compared with diffusers.

`pytest -n 0 -m slow tests/test_sd15_full_size.py -s` on two cores shared with other work: 279 s, peak 9.4 GiB, 4 GB of
disk. Relative errors: output 1.7e-6, the same with LoRA; gradient in the input 2.6e-6, in the LoRA 4.0e-6 (1.3e-5 in
the worst of its 256 matrices).
"""

import gc
import resource
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle as oracle
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from flax.traverse_util import flatten_dict
from peft import get_peft_model_state_dict
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.checkpoints.files import read_json, read_safetensors
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig

TIME = np.asarray([981], np.int32)


def make_inputs():
    """A latent of a 512-pixel image for the output, one of a 256-pixel image for the gradients, a prompt's features."""
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 64, 64, 4), "small": (1, 32, 32, 4), "cotangent": (1, 32, 32, 4), "context": (1, 77, 768)}
    return SimpleNamespace(**{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()})


def by_diffusers(folder, inputs):
    """diffusers' outputs and gradients.

    Writes the weights and a rank-4 LoRA to `folder` and keeps nothing in memory.
    """
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    unet.save_pretrained(folder)
    size = sum(p.numel() for p in unet.parameters())
    time, context = torch.tensor(TIME), torch.tensor(inputs.context)
    base = nhwc(unet(nchw(inputs.x), time, context).sample)
    oracle.add_lora(unet, rank=4, alpha=4)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    adapted = nhwc(unet(nchw(inputs.x), time, context).sample)
    with torch.enable_grad():
        x = nchw(inputs.small).requires_grad_()
        unet(x, time, context).sample.backward(nchw(inputs.cotangent))
    lora = {name: p.grad.numpy() for name, p in unet.named_parameters() if "lora_" in name}
    return SimpleNamespace(size=size, base=base, adapted=adapted, in_x=nhwc(x.grad), in_lora=lora)


def load_unet(folder):
    model = UNet2DConditionModel(UNetConfig.from_json(read_json(folder / "config.json")))
    dummies = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 77, 768))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *dummies)["params"]
    file = folder / "diffusion_pytorch_model.safetensors"
    params = jax.tree.map(jnp.asarray, from_state_dict(read_safetensors(file)[0], shapes, str(file)))
    file.unlink()  # pytest keeps the folders of its last three runs
    return model, params


@pytest.mark.slow
def test_output_and_gradients(tmp_path):
    inputs = make_inputs()
    theirs = by_diffusers(tmp_path, inputs)
    gc.collect()
    assert theirs.size == 859_520_964
    model, params = load_unet(tmp_path)
    lora = load_lora(tmp_path / "pytorch_lora_weights.safetensors", params)

    def output(params, lora, x):
        return model.apply({"params": params, "lora": lora}, x, TIME, inputs.context)

    @jax.jit
    def gradients(params, lora, x):
        return jax.vjp(lambda lora, x: output(params, lora, x), lora, x)[1](jnp.asarray(inputs.cotangent))

    run = jax.jit(output)
    zero = jax.tree.map(jnp.zeros_like, lora)
    in_lora, in_x = gradients(params, lora, inputs.small)
    ours = {}
    for path, gradient in flatten_dict(in_lora).items():
        matrix = {"down": "lora_A", "up": "lora_B"}[path[-1]]
        ours[".".join((*path[:-1], matrix, "default.weight"))] = np.asarray(gradient).T
    assert ours.keys() == theirs.in_lora.keys()
    flat = [np.concatenate([np.ravel(side[name]) for name in sorted(ours)]) for side in (ours, theirs.in_lora)]
    errors = {
        "base output": relative(run(params, zero, inputs.x), theirs.base),
        "output with LoRA": relative(run(params, lora, inputs.x), theirs.adapted),
        "gradient in the input": relative(in_x, theirs.in_x),
        "gradient in the LoRA": relative(*flat),
        "worst gradient of one LoRA matrix": max(relative(ours[name], theirs.in_lora[name]) for name in ours),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print({name: f"{error:.1e}" for name, error in errors.items()}, f"peak {peak:.1f} GiB")
    assert errors.pop("worst gradient of one LoRA matrix") < 1e-4
    assert max(errors.values()) < 1e-5
