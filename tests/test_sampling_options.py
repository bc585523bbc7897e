"""The options of `sample`, compared with diffusers' pipeline and with results computed by hand."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_oracle as oracle
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import save_file
from test_lora_layouts import ATTENTION, kohya, layers, pair, text_name
from torch_oracle import nchw, relative

from nabla_gfn_jax import sample
from nabla_gfn_jax.base_models.base import predictor
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.lora_file import load_lora
from nabla_gfn_jax.diffusion.sampler import draw_noise
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.paths import sample_paths
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling, all_images, combined, scaled
from nabla_gfn_jax.models.lora import init_lora

pytestmark = pytest.mark.thorough

PROMPTS = ["a face", "an animal"]
HOW = Sampling(steps=4, guidance=2.0, seed=3)


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_folder(tiny_model)


def random_lora(model, seed, rank=2):
    """A random LoRA of the UNet."""
    fresh = init_lora(jax.random.key(0), model.params["unet"], rank)
    return jax.tree.map(
        lambda a: 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), a.size), a.shape), fresh
    )


def joined(batches):
    batches = list(batches)
    return np.concatenate([b.images for b in batches]), np.concatenate([b.paths.spent for b in batches if b.paths])


def merged(params, lora):
    """The parameters with a LoRA merged into the kernels of its linear layers."""
    flat, pairs = flatten_dict(params), flatten_dict(lora)
    for path, down in pairs.items():
        if path[-1] == "down":
            flat[(*path[:-1], "kernel")] += down @ pairs[(*path[:-1], "up")]
    return unflatten_dict(flat)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # two LoRAs are meant
def test_two_loras_a_negative_prompt_and_another_size_as_diffusers_draws_them(tmp_path):
    """One LoRA adapts the text encoder too. Both programs take 6 DDIM steps from the same noise, at 64 x 32 pixels."""
    pipe = oracle.pipeline(tmp_path, **oracle.TWO_LEVELS)
    pipe.save_pretrained(tmp_path)
    unet = {n: tuple(p.shape) for n, p in pipe.unet.named_parameters()}
    text = {text_name(n): tuple(p.shape) for n, p in pipe.text_encoder.named_parameters()}
    first = kohya(layers(unet, [*ATTENTION, "proj_in", "conv2"]), "lora_unet_") | kohya(
        layers(text, ["q_proj", "out_proj", "fc2"]), "lora_te_"
    )
    second = {}
    for name, shape in layers(unet, ["to_q", "ff.net.2"]).items():
        second[f"unet.{name}.lora_A.weight"], second[f"unet.{name}.lora_B.weight"] = pair(shape, rank=1, seed=1)
    for name, state in {"first": first, "second": second}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["first", "second"], [0.7, -0.4])

    how = Sampling(steps=6, guidance=3.0, eta=0.0, seed=5, negative="two dogs")
    model = load_folder(tmp_path).sized(64, 32)
    assert model.image_shape == (64, 32, 3)
    params = model.params["unet"], model.params["text_encoder"]
    loras = [load_lora(tmp_path / f"{name}.safetensors", *params) for name in ("first", "second")]
    lora = combined([scaled(tree, strength) for tree, strength in zip(loras, (0.7, -0.4), strict=True)])
    (ours,) = (batch.images for batch in ImageSampler(model, ["a cat"], how).images(lora, 1))

    key = jax.random.fold_in(jax.random.key(5), 0)
    start = nchw(draw_noise(key[None], 0, model.latent_shape))
    options = {"num_inference_steps": 6, "guidance_scale": 3.0, "eta": 0.0, "output_type": "np"}
    draw = partial(pipe, "a cat", height=64, width=32, latents=start, **options)
    theirs = draw(negative_prompt="two dogs").images
    assert theirs.shape == (1, 64, 32, 3)
    assert relative(ours, theirs) < 1e-4
    assert relative(draw().images, theirs) > 1e-3  # the negative prompt counts
    pipe.disable_lora()
    assert relative(draw(negative_prompt="two dogs").images, theirs) > 1e-2


def test_loras_add_up(model):
    """LoRAs combined in one tree, whose ranks add up, equal the sum in the weights."""
    loras = [random_lora(model, 1, rank=2), random_lora(model, 2, rank=3)]
    some = {name: tree for name, tree in list(loras[1].items())[:1]}  # a LoRA of fewer layers
    both = combined([loras[0], some])
    x = jax.random.normal(jax.random.key(0), (1, *model.latent_shape))
    inputs = x, jnp.asarray([500]), model.encode_prompts(["a face"]).context
    params = merged(merged(model.params["unet"], loras[0]), some)
    ours = model.unet.apply({"params": model.params["unet"], "lora": both}, *inputs)
    assert relative(ours, model.unet.apply({"params": params}, *inputs)) < 1e-4
    (first,) = some.values()
    for path, leaf in flatten_dict(first).items():
        if path[-1] == "down":
            name = next(iter(some))
            assert flatten_dict(both[name])[path].shape[-1] == leaf.shape[-1] + 2


def test_a_lora_of_some_steps(model):
    """The steps before and after equal the base model's exactly and spend no nats."""
    lora, how = random_lora(model, 1), replace(HOW, lora_from_step=2, lora_until_step=3)
    assert how.lora_steps.tolist() == [False, True, True, False]
    images, spent = joined(ImageSampler(model, PROMPTS, how, batch=8).images(lora, 4, nats=True))
    assert (spent[:, [0, 3]] == 0).all()
    assert (spent[:, [1, 2]] > 0).all()
    chain, table = model.chain(4), model.encode_prompts(PROMPTS)
    plain = predictor(model, model.frozen_params, table, HOW.guidance)

    def by_time(lora, x, level, prompt):
        base, adapted = plain(None, x, level, prompt), plain(lora, x, level, prompt)
        late = (level.time == chain.at.time[1]) | (level.time == chain.at.time[2])
        return jnp.where(late[:, None, None, None], adapted, base)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), np.asarray([0, 1, 2, 3, *(2**20 + np.arange(4))]))
    prompt = jnp.repeat(jnp.arange(2), 4)
    paths = sample_paths(by_time, lora, chain, keys, model.latent_shape, prompt, nats=False)
    np.testing.assert_allclose(images, model.decode(model.frozen_params, paths.latents), atol=1e-5)
    for options in ({"lora_from_step": 5}, {"lora_from_step": 3, "lora_until_step": 2}):
        with pytest.raises(UserError, match=r"with lora_from_step = \d.* none of the 4 steps uses the LoRA"):
            replace(HOW, **options)


def test_a_size_the_model_cannot_draw(model):
    with pytest.raises(UserError, match=r"9 x 8 pixels cannot be sampled; use multiples of \d+"):
        model.sized(9, 8)


def test_each_image_says_how_it_was_drawn(tiny_model, tmp_path, capsys):
    """The text fields of an image are enough to sample it again."""
    flags = [f"--model={tiny_model}", "--steps=3", "--seed=7", "--negative=a dog", "--guidance=2"]
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    sample.main(
        ["sample", *flags, *prompts, "--num=2", f"--out={tmp_path / 'grid.png'}", f"--each={tmp_path / 'each'}"]
    )
    files = sorted((tmp_path / "each").iterdir())
    assert [file.name for file in files] == [f"{i:04d}.png" for i in range(4)]
    recipes, pictures = [], []
    for file in files:
        with Image.open(file) as opened:
            recipes.append(json.loads(opened.text["nabla_gfn_jax"]))
            pictures.append(np.asarray(opened))
            assert opened.text["parameters"].startswith(recipes[-1]["prompt"] + "\nNegative prompt: a dog\nSteps: 3, ")
    assert [r["prompt"] for r in recipes] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    said = recipes[2]
    assert (said["seed"], said["guidance"], said["loras"]) == (7, 2.0, {})
    how = Sampling(steps=said["steps"], guidance=said["guidance"], seed=said["seed"], negative=said["negative"])
    again = all_images(ImageSampler(load_folder(tiny_model), PROMPTS, how).images(None, 2))
    np.testing.assert_array_equal(np.stack(pictures), again)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_scale=1,2"], "give one value, or one for each of 0 LoRAs"),
        (["--lora_from_step=51"], "none of the 50 steps uses the LoRA"),
        (["--height=100000"], "height"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_loaded(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(sample, "load_model", None)
    with pytest.raises(SystemExit):
        sample.main(["sample", *flags])
    assert said in capsys.readouterr().err
