"""Sampling of images in batches on the tiny model: what an image depends on, and what it does not depend on."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference import batch_size, sampling
from nabla_gfn_jax.inference.sampling import ImageSampler, Sampling, all_images, scaled
from nabla_gfn_jax.models.lora import init_lora

HOW = Sampling(steps=4, guidance=2.0, seed=3)
PROMPTS = ["a face", "an animal", ""]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_folder(tiny_model)


@pytest.fixture(scope="module")
def lora(model):
    fresh = init_lora(jax.random.key(0), model.params["unet"], rank=2)
    return jax.tree.map(lambda a: 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), fresh)


def joined(batches):
    batches = list(batches)
    images = np.concatenate([b.images for b in batches])
    paths = [b.paths for b in batches if b.paths is not None]
    return images, np.concatenate([b.prompt for b in batches]), *(np.concatenate(p) for p in zip(*paths, strict=True))


@pytest.fixture(scope="module")
def sampler(model):
    return ImageSampler(model, PROMPTS, HOW, batch=8)


@pytest.fixture(scope="module")
def sampled(sampler, lora):
    return joined(sampler.images(lora, 3, nats=True))


@pytest.mark.thorough
def test_an_image_depends_on_no_other(model, lora, sampler, sampled):
    images, prompt, spent, log_ratio = sampled
    assert prompt.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert spent.shape == (9, 4)
    assert len(np.unique(images.reshape(9, -1).round(5), axis=0)) == 9
    rows = np.array([1, 2, 4, 5, 7, 8])
    few = joined(ImageSampler(model, PROMPTS, HOW, batch=16).images(lora, 3, first=1, nats=True))
    for other in (few, joined(sampler.images(lora, 3, first=1, nats=True))):
        for mine, theirs in zip(other, (images, prompt, spent, log_ratio), strict=True):
            np.testing.assert_allclose(mine, theirs[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_nats_change_no_image_and_the_base_model_has_none(sampler, lora, sampled):
    np.testing.assert_allclose(joined(sampler.images(lora, 3))[0], sampled[0], atol=1e-5)
    base = next(sampler.images(None, 3, nats=True))
    assert base.paths is None
    assert np.abs(base.images[:3] - sampled[0][:3]).max() > 1e-3


def test_a_lora_of_no_strength_is_the_base_model(sampler, lora, sampled):
    images, _, spent, log_ratio = joined(sampler.images(scaled(lora, 0.0), 3, nats=True))
    np.testing.assert_allclose(images, joined(sampler.images(None, 3))[0], atol=1e-6)
    assert not spent.any()
    assert not log_ratio.any()
    half = joined(sampler.images(scaled(lora, 0.5), 3, nats=True))[2]
    assert 0 < half.sum() < sampled[2].sum()


def test_each_prompt_is_encoded_once(model):
    asked = []

    def tokenize(prompts):
        asked.extend(prompts)
        return model.tokenizer(prompts)

    ImageSampler(dataclasses.replace(model, tokenizer=tokenize), [*PROMPTS, "a face"], HOW)
    assert sorted(asked) == sorted(set(PROMPTS))


@pytest.mark.thorough
def test_decoding_in_parts_changes_no_image(model, lora, sampled, monkeypatch):
    monkeypatch.setattr("nabla_gfn_jax.inference.sampling._DECODED", 64)  # pixels: one image of 8 x 8
    images = joined(ImageSampler(model, PROMPTS, HOW, batch=16).images(lora, 3))[0]
    np.testing.assert_allclose(images, sampled[0], atol=1e-5)


def test_large_images_are_sampled_a_few_at_a_time(model):
    config = dataclasses.replace(model.unet.config, sample_size=512)
    large = dataclasses.replace(model, unet=model.unet.clone(config=config))
    assert ImageSampler(model, PROMPTS, HOW)._batch == 32
    assert ImageSampler(large, PROMPTS, HOW)._batch == len(jax.devices())


def test_steps_without_noise_have_no_nats(model, sampler):
    assert sampler.has_nats
    assert not ImageSampler(model, PROMPTS, dataclasses.replace(HOW, eta=0.0)).has_nats
    with pytest.raises(UserError, match="num_steps is 1000"):
        ImageSampler(model, PROMPTS, dataclasses.replace(HOW, steps=1000))


def test_pictures_have_256_levels(sampled, sampler, lora):
    pictures = all_images(sampler.images(lora, 3, nats=True))
    assert pictures.dtype == np.uint8
    np.testing.assert_allclose(pictures / 255.0, sampled[0], atol=0.51 / 255)


def full_above(monkeypatch, most):
    """Makes devices report that they have no memory for a batch of more images, when its results are fetched."""
    gather = sampling.gather

    def fetch(array, mesh):
        if len(array) > most:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34.0GiB.")
        return gather(array, mesh)

    monkeypatch.setattr(sampling, "gather", fetch)


@pytest.mark.thorough
def test_a_batch_that_does_not_fit_is_halved(model, lora, sampled, monkeypatch, capsys):
    """Nothing else changes, and the next images begin with the batch that was found."""
    full_above(monkeypatch, 8)
    sampler = ImageSampler(model, PROMPTS, HOW, batch=32)
    found = joined(sampler.images(lora, 8, nats=True))
    rows = np.flatnonzero(np.arange(24) % 8 < 3)
    for mine, theirs in zip(found, sampled, strict=True):
        np.testing.assert_allclose(mine[rows], theirs, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().err == ("24 images at once do not fit into memory; going on with 8\n")
    assert [len(batch.images) for batch in sampler.images(None, 8)] == [8, 8, 8]
    assert not capsys.readouterr().err


@pytest.mark.thorough
def test_a_single_image_on_each_device_that_does_not_fit_is_one_line(model, monkeypatch):
    full_above(monkeypatch, 0)
    with pytest.raises(UserError, match="8 images at once do not fit into memory; use --model_dtype=bfloat16"):
        next(ImageSampler(model, PROMPTS, HOW, batch=8).images(None, 3))
    monkeypatch.setattr(sampling, "gather", lambda *_: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: x")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        next(ImageSampler(model, PROMPTS, HOW, batch=8).images(None, 3))


@pytest.mark.thorough
def test_on_a_cpu_a_batch_takes_no_more_than_the_free_memory(model, sampled, lora, monkeypatch, capsys):
    """What a batch needs is read from its compiled program: a batch of 16 on 8 devices needs more than one of 8."""
    needed = []
    real = batch_size.fits
    monkeypatch.setattr(sampling, "fits", lambda compiled, devices: needed.append(compiled) or real(compiled, devices))
    monkeypatch.setattr(batch_size, "free_memory", lambda: None)
    ImageSampler(model, PROMPTS, HOW, batch=16).images(None, 6).__next__()
    sizes = needed.pop().memory_analysis()
    bytes_of_16 = 8 * (sizes.temp_size_in_bytes + sizes.output_size_in_bytes)
    assert bytes_of_16 > 16 * 8 * 8 * 3 * 4  # the images alone
    for free, batch in ((bytes_of_16 / 0.8 + 1, 16), (bytes_of_16 / 0.8 - 1, 8)):
        monkeypatch.setattr(batch_size, "free_memory", lambda free=free: free)
        batches = list(ImageSampler(model, PROMPTS, HOW, batch=16).images(None, 6))
        assert len(batches[0].images) == batch
        assert ("16 images at once do not fit" in capsys.readouterr().err) == (batch == 8)


def test_the_free_memory_is_the_smaller_of_machine_and_container(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "_CGROUP", tmp_path)
    machine = batch_size.free_memory()
    if Path("/proc/meminfo").exists():
        assert 2**20 < machine < 2**50
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert batch_size.free_memory() == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert batch_size.free_memory() is not None or machine is None
