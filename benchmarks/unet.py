"""Compares Stable Diffusion 1.5's UNet at full size, with random weights, with diffusers' UNet."""

import gc
import os
from collections.abc import Iterator

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.timing import compare
from nabla_gfn_jax.checkpoints.torch_layout import from_state_dict
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.models.unet import UNet2DConditionModel, UNetConfig


def run() -> Iterator[tuple[str, str, str, str]]:
    """Times a guided pair at 512 pixels, and the input gradient of one image at 256; float32, all cores."""
    use_compilation_cache()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)
    ours = UNet2DConditionModel(UNetConfig())
    dummies = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1, jnp.int32), jnp.zeros((1, 77, 768))
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *dummies)["params"]
    state = {name: p.numpy() for name, p in theirs.state_dict().items()}
    params = jax.tree.map(jnp.asarray, from_state_dict(state, shapes, "diffusers"))
    del state
    gc.collect()
    rng = np.random.default_rng(0)

    def inputs(batch: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        x, context = (rng.normal(size=s).astype(np.float32) for s in ((batch, size, size, 4), (batch, 77, 768)))
        return x, np.full(batch, 981, np.int32), context

    @jax.jit
    def output(params, x, t, context):
        return ours.apply({"params": params}, x, t, context)

    @jax.jit
    def gradient(params, x, t, context):
        return jax.grad(lambda x: (ours.apply({"params": params}, x, t, context) ** 2).sum())(x)

    def in_torch(x, t, context, grad):
        x = torch.tensor(x).permute(0, 3, 1, 2).contiguous().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            y = theirs(x, torch.tensor(t), torch.tensor(context)).sample
            y = torch.autograd.grad((y**2).sum(), x)[0] if grad else y
        return y.permute(0, 2, 3, 1).numpy()

    cases = [
        ("forward, 2 of 512 pixels", (2, 64), output, False),
        ("input gradient, 1 of 256", (1, 32), gradient, True),
    ]
    for name, (batch, size), function, grad in cases:
        arguments = inputs(batch, size)
        want, got = in_torch(*arguments, grad), np.asarray(function(params, *arguments))
        error = np.linalg.norm(want - got) / np.linalg.norm(want)
        assert error < 1e-4, f"{name}: relative difference {error:.1e}"
        yield compare(
            f"(c) SD-1.5's UNet, {name}",
            lambda a=arguments, g=grad: in_torch(*a, g),
            lambda a=arguments, f=function: jax.block_until_ready(f(params, *a)),
            rounds=5,
        )
