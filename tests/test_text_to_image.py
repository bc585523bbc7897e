"""The whole pipeline against diffusers' with the same noise, and its pieces against closed forms."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from diffusers import StableDiffusionPipeline
from diffusers.schedulers import scheduling_ddim
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.checkpoints.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.lora_file import save_kohya, save_lora
from nabla_gfn_jax.configuration import SHIPPED_MODELS
from nabla_gfn_jax.diffusion.sampler import draw_noise, sample
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, alphas_cumprod, make_schedule
from nabla_gfn_jax.diffusion.text_to_image import decode, encode_prompts, guided_predictor
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.lora import init_lora

STEPS, GUIDANCE = 50, 5.0


def draw_in_both(folder, pipe, lora, prompts, monkeypatch):
    """Fifty guided DDPM steps with one noise: the latents after each step, and the images, ours and diffusers'."""
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

    schedule = make_schedule(model.scheduler, STEPS)

    def run(params, lora, keys, condition):
        predictor = guided_predictor(model, params["unet"], GUIDANCE)
        trajectory = sample(lambda x, t, c: predictor(lora, x, t, c), schedule, keys, shape, condition)
        return trajectory.latents[1:], decode(model, params["vae"], trajectory.samples)

    arguments = (model.params, lora, keys, encode_prompts(model, prompts))
    ours, images = oracle.compile_quickly(run, *arguments)(*arguments)
    return zip(ours, theirs, strict=True), images, their_images


def random_lora(folder):
    fresh = init_lora(jax.random.key(0), load_folder(folder).params["unet"], rank=3)
    return jax.tree.map(lambda a: 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), fresh)


def test_noise_prediction_with_a_lora_in_diffusers_layout(tmp_path, monkeypatch):
    pipe = oracle.pipeline(tmp_path, "epsilon", **oracle.TWO_LEVELS)
    pipe.save_pretrained(tmp_path)
    lora = random_lora(tmp_path)
    save_lora(tmp_path / "lora.safetensors", lora)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    prompts = ["a cat", "two dogs and a frog's pond"]
    latents, images, expected = draw_in_both(tmp_path, pipe, lora, prompts, monkeypatch)
    assert max(relative(ours, theirs) for ours, theirs in latents) < 1e-4
    assert relative(images, expected) < 1e-4
    assert ((expected > 0) & (expected < 1)).mean() > 0.9  # not all clamped
    assert relative(images[0], images[1]) > 0.1


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
    """Noise (or velocity) that says who was asked what: scale · (mean of the context + t), scale 2 with a LoRA."""

    def __init__(self):
        self.batches = []

    def apply(self, variables, x, t, context):
        self.batches.append(x.shape[0])
        scale = variables["params"]["scale"] * (2.0 if "lora" in variables else 1.0)
        per_sample = context.mean(axis=(1, 2)) + t.astype(jnp.float32)
        return scale * jnp.broadcast_to(per_sample[:, None, None, None], x.shape)


def fake_case(prediction_type):
    model = SimpleNamespace(unet=FakeUNet(), scheduler=STABLE_DIFFUSION | {"prediction_type": prediction_type})
    rng = np.random.default_rng(0)
    x, negative, context = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 2, 2, 4), (3, 5, 6), (3, 5, 6))
    )
    t = jnp.asarray([981, 500, 1], jnp.int32)
    predict = guided_predictor(model, {"scale": 0.5}, GUIDANCE)
    means = [np.asarray(c).mean(axis=(1, 2)) + np.asarray(t) for c in (negative, context)]
    guided = 0.5 * (means[0] + GUIDANCE * (means[1] - means[0]))[:, None, None, None]
    return model, predict, (x, t, {"negative": negative, "context": context}), guided


def test_guidance_asks_once_with_a_doubled_batch():
    model, predict, arguments, guided = fake_case("epsilon")
    np.testing.assert_allclose(predict(None, *arguments), np.broadcast_to(guided, (3, 2, 2, 4)), rtol=1e-5)
    np.testing.assert_allclose(predict({}, *arguments), 2 * np.broadcast_to(guided, (3, 2, 2, 4)), rtol=1e-5)
    assert model.unet.batches == [6, 6]


def test_a_velocity_becomes_noise():
    """v = √ᾱ ε − √(1−ᾱ) x₀ and x = √ᾱ x₀ + √(1−ᾱ) ε, solved for ε sample by sample."""
    _, predict, (x, t, condition), velocity = fake_case("v_prediction")
    eps = predict(None, x, t, condition)
    alpha_bar = np.asarray(alphas_cumprod(STABLE_DIFFUSION), np.float64)[np.asarray(t)][:, None, None, None]
    clean = np.sqrt(alpha_bar) * x - np.sqrt(1 - alpha_bar) * velocity
    expected = (x - np.sqrt(alpha_bar) * clean) / np.sqrt(1 - alpha_bar)
    assert max(relative(a, b) for a, b in zip(eps, expected, strict=True)) < 1e-5


def test_other_predictions_are_refused():
    model = SimpleNamespace(scheduler=STABLE_DIFFUSION | {"prediction_type": "sample"})
    with pytest.raises(UserError, match="prediction_type 'sample' is not supported"):
        guided_predictor(model, {}, GUIDANCE)


def test_each_prompt_is_encoded_once_and_the_order_kept(tmp_path):
    pipe = oracle.pipeline(tmp_path, **oracle.ONE_LEVEL)
    pipe.save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    asked = []

    def tokenize(prompts):
        asked.append(list(prompts))
        return model.tokenizer(prompts)

    prompts = ["a cat", "", "two dogs", "a cat"]
    condition = encode_prompts(dataclasses.replace(model, tokenizer=tokenize), prompts)
    assert asked == [["", "a cat", "two dogs"]]
    expected, negative = pipe.encode_prompt(prompts, "cpu", 1, True)
    assert relative(condition["context"], expected) < 1e-5
    assert relative(condition["negative"], negative) < 1e-5
    np.testing.assert_array_equal(condition["context"][1], condition["negative"][0])


def test_decoded_images_are_clamped():
    vae = SimpleNamespace(apply=lambda variables, z, method: z.astype(jnp.bfloat16))
    latents = jnp.asarray([-0.5, 0.25, 1.5]).reshape(1, 1, 1, 3)
    images = decode(SimpleNamespace(vae=vae), {}, latents)
    np.testing.assert_array_equal(images.ravel(), [0.0, 0.25, 1.0])
    assert images.dtype == jnp.float32
