"""The learning rate over a run, and the running mean of the LoRA."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_parallel import without_images

from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.runs.manifest import compare_configs
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import free_fields
from nabla_gfn_jax.training.state import learning_rate


@pytest.mark.thorough
def test_the_running_mean_is_what_is_saved(command, monkeypatch, tmp_path):
    """After one update, the mean of the initial LoRA (`up` is zero) and the present one is half of the latter."""
    without_images(monkeypatch)
    found = {}
    for average in (0.0, 0.5):
        more = ("training.num_epochs=1", "training.updates_per_epoch=1", f"training.average={average}")
        command(tmp_path / f"{average}", *(f"--config.{field}" for field in more))
        found[average] = load_file(tmp_path / f"{average}/lora/00001/diffusers.safetensors")
    ups = [name for name in found[0.0] if "lora_B" in name]
    assert max(np.abs(found[0.0][name]).max() for name in ups) > 0
    for name in ups:
        np.testing.assert_allclose(found[0.5][name], 0.5 * found[0.0][name], rtol=1e-6)


def test_a_rate_that_falls_ends_at_zero():
    assert learning_rate(0.1, "constant", 10) == 0.1
    linear, cosine = learning_rate(0.1, "linear", 10), learning_rate(0.1, "cosine", 10)
    np.testing.assert_allclose([linear(0), linear(5), linear(10)], [0.1, 0.05, 0.0], atol=1e-8)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10)], [0.1, 0.05, 0.0], atol=1e-8)


def test_a_rate_that_falls_binds_the_number_of_epochs():
    free = free_fields(load_settings(Settings, "emoji"))
    falling = free_fields(load_settings(Settings, "emoji", {"training.decline": "cosine"}))
    assert free - falling == {"training.num_epochs"}


def test_a_run_resumes_though_a_free_field_has_another_name_now():
    free = free_fields(load_settings(Settings, "emoji"))
    before, now = {"logging": {"judged_images": 3}}, {"evaluation": {"images": 3}}
    assert compare_configs(before, now, free) == []
    assert compare_configs({"flow": {"layers_per_block": 1}}, {}, free) != []
