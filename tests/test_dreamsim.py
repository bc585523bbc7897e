"""DreamSim against the same network in PyTorch, from its published files with random weights.

`pytest -n 0 -m slow tests/test_dreamsim.py` compares the ensemble and the single branch at full size.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from dreamsim_oracle import DreamSim
from torch_oracle import compile_quickly, nchw, relative

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.metrics import dreamsim
from nabla_gfn_jax.metrics.base import Batch
from nabla_gfn_jax.metrics.dreamsim import ENSEMBLE, SINGLE
from nabla_gfn_jax.models.dino_vision import DinoConfig
from nabla_gfn_jax.models.vision_transformer import VisionConfig


def small(variant):
    """The variant with transformers of two layers."""

    def smaller(branch):
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
        vision = VisionConfig(**vars(branch.vision) | sizes)
        return DinoConfig(vision=vision, embed_dim=branch.embed_dim and 20)

    return replace(variant, branches=tuple(map(smaller, variant.branches)))


def agree(variant, folder, tolerance):
    oracle = DreamSim(variant)
    params = tuple(dreamsim.load(variant, *oracle.save(folder)))
    images = np.random.default_rng(0).uniform(size=(3, 70, 90, 3)).astype(np.float32)
    images[1:] += np.linspace(-0.5, 0.5, 90, dtype=np.float32)[None, None, :, None]
    images = images.clip(0.0, 1.0)

    def embed(params, images):
        return dreamsim.embed(variant.branches, params, images)

    found = np.asarray(compile_quickly(embed, params, images)(params, images), np.float64)
    expected = oracle(nchw(images)).numpy().astype(np.float64)
    assert relative(found, expected) < tolerance
    pairs = np.triu_indices(3, 1)
    distances, wanted = ((1.0 - e @ e.T)[pairs] for e in (found, expected))
    np.testing.assert_allclose(distances, wanted, rtol=tolerance)
    assert wanted.min() > 0.01
    return oracle


@pytest.mark.thorough
@pytest.mark.parametrize("variant", [ENSEMBLE, SINGLE], ids=["ensemble", "single"])
def test_embeddings_and_distances(variant, tmp_path):
    agree(small(variant), tmp_path, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [ENSEMBLE, SINGLE], ids=["ensemble", "single"])
def test_at_full_size(variant, tmp_path):
    agree(variant, tmp_path, 1e-4)


@pytest.mark.thorough
def test_the_lora_matters_and_the_figures_have_their_names(tmp_path):
    variant = small(SINGLE)
    files, config, adapter = DreamSim(variant).save(tmp_path)
    images = np.random.default_rng(1).uniform(size=(34, 32, 32, 3)).astype(np.float32)
    prompt = np.arange(34) % 2
    metric = dreamsim.DreamSim(variant, dreamsim.load(variant, files, config, adapter))
    state = metric.update(Batch(images, prompt))
    found = metric.compute(state)
    assert found.keys() == {"dreamsim_dino_distance_x100", "dreamsim_dino_variance_16"}
    e = state.values["features"].astype(np.float64)
    each = [e[prompt == p] for p in (0, 1)]
    pairs = [(1.0 - x @ x.T)[np.triu_indices(17, 1)].mean() for x in each]
    assert found["dreamsim_dino_distance_x100"].value == pytest.approx(100 * np.mean(pairs), rel=1e-6)
    squares = [((x[:16, None] - x[None, :16]) ** 2).sum() / (2 * 16 * 15) for x in each]
    assert found["dreamsim_dino_variance_16"].value == pytest.approx(np.mean(squares), rel=1e-5)
    assert metric.compute(state.numbers(0, 5)).keys() == {"dreamsim_dino_distance_x100"}
    config.write_text(json.dumps({"r": 4, "lora_alpha": 0}))
    without = dreamsim.DreamSim(variant, dreamsim.load(variant, files, config, adapter))
    assert np.abs(without.update(Batch(images[:1], prompt[:1])).values["features"] - e[:1]).max() > 1e-3


def test_files_that_do_not_belong_together_are_named(tmp_path):
    variant = small(SINGLE)
    files, config, adapter = DreamSim(variant).save(tmp_path)
    wider = VisionConfig(**vars(variant.branches[0].vision) | {"hidden_size": 48})
    others = {}
    for name, other in [("wide", replace(variant, branches=(DinoConfig(vision=wider),))), ("both", small(ENSEMBLE))]:
        (tmp_path / name).mkdir()
        others[name] = DreamSim(other).save(tmp_path / name)[2]
    with pytest.raises(UserError, match=r"adapter_model\.safetensors does not fit the network at blocks"):
        dreamsim.load(variant, files, config, others["wide"])
    with pytest.raises(UserError, match=r"is no LoRA of dreamsim_dino: it has base_model\.model\.extractor_list\.1"):
        dreamsim.load(variant, files, config, others["both"])
    with pytest.raises(UserError, match=r"does not match ViT-B/16 in DINO's layout"):
        dreamsim.load(SINGLE, files, config, adapter)
    config.write_text(json.dumps({"lora_alpha": 1}))
    with pytest.raises(UserError, match="has no r or no lora_alpha"):
        dreamsim.load(variant, files, config, adapter)
