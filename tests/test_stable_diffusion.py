"""The whole pipeline, compared with diffusers' for the same noise, and its parts, compared with closed forms."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import scheduling_ddim
from flax.traverse_util import flatten_dict
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.base_models.base import BaseModel, predictor
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.base_models.names import SHIPPED_MODELS
from nabla_gfn_jax.base_models.stable_diffusion import StableDiffusion, TextFeatures
from nabla_gfn_jax.checkpoints.lora_file import save_kohya, save_lora
from nabla_gfn_jax.diffusion.sampler import draw_noise, sample
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.models.lora import init_lora

STEPS, GUIDANCE = 50, 5.0


def draw_in_both(folder, pipe, lora, prompts, monkeypatch):
    """Fifty guided DDPM steps with the same noise in both programs: the latents after each step, and the images."""
    model = load_folder(folder)
    shape = model.latent_shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(len(prompts)))
    noise = iter([nchw(draw_noise(keys, step + 1, shape)) for step in range(STEPS)])
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda *args, **kwargs: next(noise))
    theirs = []

    def record(pipe, step, timestep, tensors):
        theirs.append(nhwc(tensors["latents"]))
        return tensors

    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "eta": 1.0, "output_type": "np"}
    start = nchw(draw_noise(keys, 0, shape))
    their_images = pipe(prompts, latents=start, callback_on_step_end=record, **options).images
    assert next(noise, None) is None

    assert isinstance(model, BaseModel)
    chain = model.chain(STEPS)

    def run(params, lora, keys, table):
        predict = predictor(model, params, table, GUIDANCE)
        trajectory = sample(predict, lora, chain, keys, shape, jnp.arange(len(prompts)))
        return trajectory.latents[1:], model.decode(params, trajectory.samples)

    arguments = (model.params, lora, keys, model.encode_prompts(prompts))
    ours, images = oracle.compile_quickly(run, *arguments)(*arguments)
    return zip(ours, theirs, strict=True), images, their_images


def random_lora(folder, layers="attention"):
    fresh = init_lora(jax.random.key(0), load_folder(folder).params["unet"], 3, layers)
    return jax.tree.map(lambda a: 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), fresh)


@pytest.mark.parametrize("layers", ["attention", "all", "up_blocks"])
@pytest.mark.thorough
def test_noise_prediction_with_a_lora_in_diffusers_layout(layers, tmp_path, monkeypatch):
    pipe = oracle.pipeline(tmp_path, "epsilon", **oracle.TWO_LEVELS)
    pipe.save_pretrained(tmp_path)
    lora = random_lora(tmp_path, layers)
    if layers != "attention":
        lora = jax.tree.map(lambda a: 0.3 * a, lora)
        kernels = [path for path in flatten_dict(load_folder(tmp_path).params["unet"]) if path[-1] == "kernel"]
        adapted = {path[:-1] for path in kernels if layers == "all" or "up_blocks" in path[0]}
        assert {path[:-1] for path in flatten_dict(lora)} == adapted
    save_lora(tmp_path / "lora.safetensors", lora)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    prompts = ["a cat", "two dogs and a frog's pond"]
    latents, images, expected = draw_in_both(tmp_path, pipe, lora, prompts, monkeypatch)
    assert max(relative(ours, theirs) for ours, theirs in latents) < 1e-4
    assert relative(images, expected) < 1e-4
    assert ((expected > 0) & (expected < 1)).mean() > 0.9  # not all clamped
    assert relative(images[0], images[1]) > 0.1


@pytest.mark.thorough
def test_the_shipped_velocity_prediction_with_a_lora_in_kohyas_layout(tmp_path, monkeypatch):
    folder = SHIPPED_MODELS["emoji"]
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    lora = jax.tree.map(lambda a: 0.1 * a, random_lora(folder))
    save_kohya(tmp_path / "lora.safetensors", lora)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    latents, images, expected = draw_in_both(folder, pipe, lora, ["a tiger", "a grinning face"], monkeypatch)
    assert max(relative(ours, theirs) for ours, theirs in latents) < 1e-4
    assert relative(images, expected) < 1e-4


class FakeUNet:
    """Its output shows its inputs: scale · (mean of the context + t), with scale 2 for a LoRA."""

    def __init__(self):
        self.batches = []

    def apply(self, variables, x, t, context):
        self.batches.append(x.shape[0])
        scale = variables["params"]["scale"] * (2.0 if "lora" in variables else 1.0)
        per_sample = context.mean(axis=(1, 2)) + t.astype(jnp.float32)
        return scale * jnp.broadcast_to(per_sample[:, None, None, None], x.shape)


def test_guidance_asks_once_with_a_doubled_batch():
    unet = FakeUNet()
    model = StableDiffusion(unet, None, None, None, STABLE_DIFFUSION, {})
    rng = np.random.default_rng(0)
    x, empty, context = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 2, 2, 4), (5, 6), (7, 5, 6)))
    ids = jnp.asarray([6, 0, 2])
    level = model.chain(50)[jnp.asarray([0, 24, 49])].at
    predict = predictor(model, {"unet": {"scale": 0.5}}, TextFeatures(context=context, negative=empty), GUIDANCE)
    times = np.asarray([981, 501, 1])
    without, asked = (np.asarray(c).mean(axis=(-2, -1)) + times for c in (empty, context[ids]))
    guided = np.broadcast_to(0.5 * (without + GUIDANCE * (asked - without))[:, None, None, None], x.shape)
    np.testing.assert_allclose(predict(None, x, level, ids), guided, rtol=1e-5)
    np.testing.assert_allclose(predict({}, x, level, ids), 2 * guided, rtol=1e-5)
    assert unet.batches == [6, 6]


def test_each_prompt_is_encoded_once_and_the_order_kept(tmp_path):
    pipe = oracle.pipeline(tmp_path, **oracle.ONE_LEVEL)
    pipe.save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    asked = []

    def tokenize(prompts):
        asked.append(list(prompts))
        return model.tokenizer(prompts)

    prompts = ["a cat", "", "two dogs", "a cat"]
    table = dataclasses.replace(model, tokenizer=tokenize).encode_prompts(prompts)
    assert asked == [["", "a cat", "two dogs"]]
    expected, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    assert relative(table.context, expected) < 1e-5
    assert relative(table.negative, negative[0]) < 1e-5
    np.testing.assert_array_equal(table.context[1], table.negative)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), table)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), model.abstract_table(4)) == shapes


def test_decoded_images_are_clamped():
    vae = SimpleNamespace(apply=lambda variables, z, method: z.astype(jnp.bfloat16))
    latents = jnp.asarray([-0.5, 0.25, 1.5]).reshape(1, 1, 1, 3)
    images = StableDiffusion(None, vae, None, None, {}, {}).decode({"vae": {}}, latents)
    np.testing.assert_array_equal(images.ravel(), [0.0, 0.25, 1.0])
    assert images.dtype == jnp.float32
