"""The training of the emoji model: losses compared with closed forms, the loop's resume, and a tiny complete run."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nabla_gfn_jax import pretrain
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.emoji import autoencoder, denoiser
from nabla_gfn_jax.emoji.drawings import Concept, Drawings
from nabla_gfn_jax.emoji.loop import fit, init_state
from nabla_gfn_jax.errors import UserError

ALPHA_BARS = np.linspace(0.999, 0.005, 1000, dtype=np.float32)


def quadratic(params, key):
    """A noisy loss, so that a resume with other random numbers would give another result."""
    target = jax.random.normal(key, (3,))
    value = ((params["w"] - target) ** 2).sum()
    return value, {"distance": jnp.abs(params["w"] - target).mean()}


def run(workdir, steps, loss=quadratic, decay=0.9, chunk=4):
    state = init_state({"w": jnp.ones(3)}, optax.sgd(0.05))
    workdir.mkdir(exist_ok=True)
    options = {"steps": steps, "seed": 3, "decay": decay, "workdir": workdir, "chunk": chunk}
    return fit("net", state, loss, optax.sgd(0.05), **options)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "net.jsonl").read_text().splitlines()]


def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole", 10)
    run(tmp_path / "parts", 4)
    with (tmp_path / "parts/net.jsonl").open("a") as log:
        log.write('{"step": 8, "loss": 0.0}\n{"step": 1')  # of updates that no save had, and cut short
    parts = run(tmp_path / "parts", 10)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["step"] for row in rows(tmp_path / "parts")] == [4, 8, 10]  # no update beyond the last
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}
    assert int(whole.step) == 10


def test_the_average_and_the_updates_are_those_of_a_loop_in_numpy(tmp_path):
    state = run(tmp_path / "run", 7, decay=0.3)
    w = average = np.ones(3, np.float32)
    losses = []
    for step in range(7):
        target = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(3), step), (3,)))
        losses.append(((w - target) ** 2).sum())
        w = w - 0.05 * 2 * (w - target)
        weight = min(0.3, (1 + step) / (10 + step))
        average = weight * average + (1 - weight) * w
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(state.average["w"], average, rtol=1e-5)
    np.testing.assert_allclose(
        [row["loss"] for row in rows(tmp_path / "run")], [np.mean(losses[:4]), np.mean(losses[4:])]
    )


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_save(tmp_path):
    run(tmp_path / "run", 4)
    before = (tmp_path / "run/net.msgpack").read_bytes()

    def breaks(params, key):
        return quadratic(params, key)[0] * jnp.nan, {}

    with pytest.raises(UserError, match="step 8 is not finite"):
        run(tmp_path / "run", 12, breaks)
    assert (tmp_path / "run/net.msgpack").read_bytes() == before


def test_a_save_of_another_model_is_named(tmp_path):
    run(tmp_path / "run", 4)
    with pytest.raises(UserError, match=r"net\.msgpack"):
        fit("net", init_state({"w": jnp.ones(5)}, optax.sgd(0.05)), quadratic, optax.sgd(0.05),
            steps=8, seed=3, decay=0.9, workdir=tmp_path / "run")  # fmt: skip


def test_the_denoisers_loss_is_zero_for_the_true_velocity_and_one_closed_form_for_none():
    """With one drawing of zero variance, v = (√ᾱ x − z)/√(1−ᾱ) follows from x and t; v = 0 costs ᾱ + (1−ᾱ) mean z²."""
    z = np.random.default_rng(0).normal(0, 2.0, (1, 4, 4, 2)).astype(np.float32)
    ids = np.zeros((1, 1, 3), np.int32)
    data = denoiser.LatentDrawings(jnp.asarray(z), jnp.zeros_like(z), jnp.asarray(ids), jnp.zeros(3, jnp.int32))
    text = SimpleNamespace(apply=lambda variables, ids: jnp.zeros((len(ids), 3, 4)))
    seen = []

    def velocity(variables, x, t, context):
        alpha_bar = ALPHA_BARS[t].reshape(-1, 1, 1, 1)
        return (jnp.sqrt(alpha_bar) * x - z) / jnp.sqrt(1 - alpha_bar)

    def nothing(variables, x, t, context):
        seen.append(np.asarray(t))
        return jnp.zeros_like(x)

    def loss(apply):
        unet = SimpleNamespace(apply=apply)
        return denoiser.make_loss(unet, text, data, jnp.asarray(ALPHA_BARS), 4096)(
            {"unet": {}, "text_encoder": {}}, key
        )

    key = jax.random.key(5)
    value, halves = loss(velocity)
    assert value < 1e-6
    assert halves["loss_high_noise"] < 1e-6
    value, _ = loss(nothing)
    alpha_bar = ALPHA_BARS[seen[0]].mean()
    assert value == pytest.approx(alpha_bar + (1 - alpha_bar) * np.mean(z**2), rel=0.02)  # 4096 x 32 normal numbers
    assert abs(seen[0].mean() - 499.5) < 5 * 289 / 4096**0.5


def test_a_prompt_is_dropped_in_one_of_ten():
    z = jnp.zeros((2, 2, 2, 1))
    ids = jnp.arange(1, 13, dtype=jnp.int32).reshape(2, 2, 3)
    data = denoiser.LatentDrawings(z, z, ids, jnp.zeros(3, jnp.int32))
    seen = []

    def read(variables, ids):
        seen.append(np.asarray(ids))
        return jnp.zeros((len(ids), 3, 4))

    unet = SimpleNamespace(apply=lambda variables, x, t, context: x)
    loss = denoiser.make_loss(unet, SimpleNamespace(apply=read), data, jnp.asarray(ALPHA_BARS), 4000)
    loss({"unet": {}, "text_encoder": {}}, jax.random.key(0))
    counts = {int(first): int(n) for first, n in zip(*np.unique(seen[0][:, 0], return_counts=True), strict=True)}
    assert counts.keys() == {0, 1, 4, 7, 10}  # "" and the two captions of each drawing
    assert abs(counts[0] - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5
    assert min(counts[n] for n in (1, 4, 7, 10)) > 750


def test_the_vaes_loss_is_its_three_terms():
    """A VAE that adds .2 to every pixel and encodes to N(mean, std): each term has a closed form."""
    mean, std = 0.7, 0.5

    def apply(variables, x, method):
        if method == "encode":
            rest = jnp.zeros((len(x), 2, 2, 3))
            return rest + mean, rest + std
        return images_of[0] + 0.2

    images_of = []

    def remember(key, images):
        images_of.append(images)
        return images

    drawings = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "augment", remember)
        value, terms = autoencoder.make_loss(SimpleNamespace(apply=apply), drawings, 3)({}, jax.random.key(0))
    kl = 12 * (mean**2 + std**2 - 1 - 2 * np.log(std)) / 2
    assert terms["kl"] == pytest.approx(kl, rel=1e-5)
    assert value == pytest.approx(0.04 + 0.1 * 0.2 + 1e-6 * kl, rel=1e-5)


def test_augmenting_moves_and_recolours_and_invents_no_pixel():
    images = np.random.default_rng(0).random((200, 6, 6, 3)).astype(np.float32)
    changed = np.asarray(jax.jit(autoencoder.augment)(jax.random.key(0), images))
    np.testing.assert_array_equal(np.sort(changed.reshape(200, -1)), np.sort(images.reshape(200, -1)))
    colours = [{tuple(sorted(p)) for p in batch.reshape(-1, 3).tolist()} for batch in (images[0], changed[0])]
    assert colours[0] == colours[1]
    recoloured = [
        {tuple(p) for p in a.reshape(-1, 3).tolist()} != {tuple(p) for p in b.reshape(-1, 3).tolist()}
        for a, b in zip(images, changed, strict=True)
    ]
    assert 0.13 < np.mean(recoloured) < 0.37  # 3 of 10, and one in six of those keeps its order
    assert np.mean([not np.array_equal(a, b) for a, b in zip(images, changed, strict=True)]) > 0.9


def test_psnr_of_a_constant_error():
    vae = SimpleNamespace(apply=lambda variables, x: x + 0.1)
    drawings = np.full((70, 4, 4, 3), 100, np.uint8)  # more than a batch
    assert autoencoder.psnr(vae, {}, drawings) == pytest.approx(20.0, abs=1e-4)


def few_drawings() -> Drawings:
    """Two concepts, each by three vendors, with one held-out drawing."""
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    concepts = (
        Concept("1F42F", "tiger face", "animal-mammal", ("a tiger face", "a tiger")),
        Concept("1F600", "grinning face", "face-smiling", ("a grinning face", "a face", "a smiling face")),
    )
    concept, vendor = np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)
    return Drawings(images, concept, vendor, np.arange(6) == 4, concepts)


@pytest.mark.thorough
def test_the_command_makes_a_model_that_opens_and_does_nothing_when_asked_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "load_drawings", few_drawings)
    fields = {
        **{f"vae.{name}": value for name, value in {"block_out_channels": "(4, 4)", "norm_num_groups": 2}.items()},
        **{"vae.latent_channels": 2, "vae.steps": 2, "vae.batch": 2, "unet.steps": 3, "unet.batch": 2},
        **{"unet.block_out_channels": "(8,)", "unet.norm_num_groups": 2, "unet.attention_head_dim": 2},
        **{"text_encoder.hidden_size": 8, "text_encoder.intermediate_size": 8, "text_encoder.num_hidden_layers": 1},
        **{"text_encoder.num_attention_heads": 2, "vocab_size": 600, "max_tokens": 8},
    }
    argv = ["pretrain", f"--workdir={tmp_path}", *(f"--config.{name}={value}" for name, value in fields.items())]
    pretrain.main(argv)
    model = load_folder(tmp_path / "model")
    assert model.latent_shape == (32, 32, 2)
    assert model.scheduler["prediction_type"] == "v_prediction"
    mean, _ = denoiser.encode_drawings(model.vae, model.params["vae"], few_drawings().images)
    assert float(mean.std()) == pytest.approx(1.0, abs=0.02)  # what the scaling factor is for; saved in float16
    assert np.isfinite(json.loads((tmp_path / "report.json").read_text())["vae_psnr_held_out_db"])
    written = {name: (tmp_path / name).read_bytes() for name in ("vae.jsonl", "denoiser.jsonl", "denoiser.msgpack")}
    pretrain.main(argv)
    assert written == {name: (tmp_path / name).read_bytes() for name in written}
    assert "the model is in" in capsys.readouterr().out
