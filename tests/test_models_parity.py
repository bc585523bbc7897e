"""UNet and text encoder, compared with diffusers and transformers, with random weights that these saved to disk."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle as oracle
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from flax.traverse_util import flatten_dict, unflatten_dict
from peft import get_peft_model_state_dict
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.models.lora import init_lora

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module", params=[oracle.SD_1_5, oracle.SD_2_1], ids=["sd-1.5", "sd-2.1"])
def case(request, tmp_path_factory):
    """A PyTorch model with LoRA, our model from its files, one input, and outputs and gradients of both."""
    folder = tmp_path_factory.mktemp("model")
    pipe = oracle.pipeline(folder, **request.param)
    pipe.save_pretrained(folder)
    model = load_folder(folder)
    rng = np.random.default_rng(0)
    x, context, cotangent = (
        rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 16, 4), (2, 5, oracle.WIDTH), (2, 8, 16, 4))
    )
    t = np.asarray([981, 1], np.int32)
    inputs = SimpleNamespace(x=x, t=t, context=context)

    unet = pipe.unet
    base = nhwc(unet(nchw(x), torch.tensor(t), torch.tensor(context)).sample)
    oracle.add_lora(unet)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=state)
    lora = load_lora(folder / "lora/pytorch_lora_weights.safetensors", model.params["unet"])
    theirs = torch_gradients(unet, inputs, cotangent)

    def pulled_back(params, lora, x):
        def output(lora, x):
            return model.unet.apply({"params": params, "lora": lora}, x, t, context)

        y, pull = jax.vjp(output, lora, x)
        return y, *pull(jnp.asarray(cotangent))

    run = oracle.compile_quickly(pulled_back, model.params["unet"], lora, x)
    ours = run(model.params["unet"], lora, x)
    return SimpleNamespace(model=model, inputs=inputs, base=base, lora=lora, theirs=theirs, run=run, ours=ours)


def torch_gradients(unet, inputs, cotangent):
    """The output, and the gradients of ⟨cotangent, output⟩ with respect to each LoRA matrix and the input."""
    with torch.enable_grad():
        x = nchw(inputs.x).requires_grad_()
        y = unet(x, torch.tensor(inputs.t), torch.tensor(inputs.context)).sample
        y.backward(nchw(cotangent))
    lora = {name: p.grad.numpy() for name, p in unet.named_parameters() if "lora_" in name}
    return nhwc(y), lora, nhwc(x.grad)


@pytest.mark.thorough
def test_unet_with_lora(case):
    assert relative(case.ours[0], case.theirs[0]) < 1e-5
    assert relative(case.theirs[0], case.base) > 0.05  # the adapters matter


def test_base_unet(case):
    """If the `up` matrices are zero, the policy equals the base model."""
    zero = {path: a if path[-1] == "down" else 0 * a for path, a in flatten_dict(case.lora).items()}
    y, *_ = case.run(case.model.params["unet"], unflatten_dict(zero), case.inputs.x)
    assert relative(y, case.base) < 1e-5


def test_gradient_in_the_input(case):
    assert relative(case.ours[2], case.theirs[2]) < 1e-5


def test_gradient_in_every_lora_matrix(case):
    theirs = case.theirs[1]
    ours = {}
    for path, gradient in flatten_dict(case.ours[1]).items():
        matrix = {"down": "lora_A", "up": "lora_B"}[path[-1]]
        ours[".".join((*path[:-1], matrix, "default.weight"))] = gradient.T
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * 4 * 2 * 10  # matrices, projections, attentions a block, blocks
    names = sorted(ours)
    assert max(relative(ours[name], theirs[name]) for name in names) < 1e-4
    flat = [np.concatenate([np.ravel(side[name]) for name in names]) for side in (ours, theirs)]
    assert relative(*flat) < 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_encoder(activation, tmp_path):
    pipe = oracle.pipeline(tmp_path, **oracle.ONE_LEVEL)
    pipe.text_encoder = oracle.text_encoder(activation)
    pipe.save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    ids = np.random.default_rng(0).integers(0, 600, (3, oracle.TOKENS), np.int32)
    theirs = pipe.text_encoder(torch.tensor(ids)).last_hidden_state.numpy()
    arguments = ({"params": model.params["text_encoder"]}, ids)
    run = oracle.compile_quickly(model.text_encoder.apply, *arguments)
    ours = run(*arguments)
    assert relative(ours, theirs) < 1e-5
    other = run(arguments[0], np.roll(ids, 1, axis=0))
    assert relative(other, theirs) > 0.1


@pytest.mark.thorough
def test_bfloat16_is_close_and_its_last_layer_in_float32(tmp_path):
    pipe = oracle.pipeline(tmp_path, **oracle.ONE_LEVEL)
    pipe.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 8, 8, 4), (2, 5, oracle.WIDTH)))
    t = np.asarray([981, 1], np.int32)
    model = load_folder(tmp_path, jnp.bfloat16)
    arguments = ({"params": model.params["unet"]}, x, t, context)
    y = oracle.compile_quickly(model.unet.apply, *arguments)(*arguments)
    assert y.dtype == jnp.float32
    assert np.any(np.asarray(y) != np.asarray(y.astype(jnp.bfloat16).astype(jnp.float32)))
    expected = nhwc(pipe.unet(nchw(x), torch.tensor(t), torch.tensor(context)).sample)
    assert relative(y, expected) < 0.03


@pytest.mark.thorough
def test_remat_is_the_same_gradient_and_keeps_less(tmp_path):
    """Compares gradients and kept activations, not the compiled program's memory: XLA on CPU merges recomputation."""
    oracle.pipeline(tmp_path, **oracle.ONE_LEVEL).save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    rng = np.random.default_rng(0)
    params = model.params["unet"]
    lora = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape) / 8, jnp.float32), init_lora(jax.random.key(0), params, 2)
    )
    x, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 16, 16, 4), (2, 5, oracle.WIDTH)))

    def pull_back(unet):
        def output(lora, x):
            variables = {"params": params, "lora": lora}
            return unet.apply(variables, x, np.asarray([981, 1], np.int32), context)

        return jax.vjp(output, lora, x)

    def gradient(unet):
        def run(_):
            y, pull = pull_back(unet)
            return pull(y)

        return jax.tree.leaves(oracle.compile_quickly(run, 0.0)(0.0))

    def kept(unet):
        leaves = jax.tree.leaves(jax.eval_shape(lambda: pull_back(unet)[1]))
        return sum(leaf.size for leaf in leaves)

    remat = model.unet.clone(remat=True)
    assert max(relative(a, b) for a, b in zip(gradient(remat), gradient(model.unet), strict=True)) < 1e-4
    weights = sum(a.size for a in jax.tree.leaves(params))
    assert kept(remat) - weights < 0.3 * (kept(model.unet) - weights)
