"""A complete model on disk: diffusers and this package read each other's folders, and damaged files are reported."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_oracle as oracle
from diffusers import StableDiffusionPipeline
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from nabla_gfn_jax.base_models.diffusers_folder import load_folder, save_folder
from nabla_gfn_jax.checkpoints.files import read_json
from nabla_gfn_jax.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
CONFIGS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline, and the folder to which it was saved."""
    folder = tmp_path_factory.mktemp("model")
    pipe = oracle.pipeline(folder, "v_prediction", **oracle.ONE_LEVEL)
    pipe.save_pretrained(folder)
    return pipe, folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved[1], tmp_path / "copy")


def assert_equal(ours, theirs, **tolerance):
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == jnp.float32
        np.testing.assert_allclose(array, theirs[name], err_msg=name, **tolerance)


def test_load(saved):
    pipe, folder = saved
    model = load_folder(folder)
    assert model.scheduler["prediction_type"] == "v_prediction"
    assert model.latent_shape == (8, 8, 4)
    kernel = model.params["unet"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel, pipe.unet.conv_in.weight.permute(2, 3, 1, 0).numpy())
    table = model.params["text_encoder"]["embeddings.token_embedding"]["embedding"]
    np.testing.assert_array_equal(table, pipe.text_encoder.get_input_embeddings().weight.numpy())
    count = sum(a.size for a in jax.tree.leaves(model.params))
    assert count == sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_we_save_diffusers_opens(dtype, saved, tmp_path):
    """float16 files are rounded once, and both programs read the same float32 numbers."""
    pipe, folder = saved
    model = load_folder(folder)
    configs = {part: read_json(folder / file) for part, file in CONFIGS.items()}
    del configs["text_encoder"]["dtype"]
    configs["text_encoder"] |= {"bos_token_id": None, "eos_token_id": None}  # transformers would stumble over it
    save_folder(tmp_path, configs, model.params, dtype)
    shutil.copytree(folder / "captions_tokenizer", tmp_path / "tokenizer")
    assert {a.dtype for a in load_file(tmp_path / UNET).values()} == {np.dtype(dtype)}
    again = load_folder(tmp_path)
    assert_equal(again.params, model.params, rtol=0 if dtype == np.float32 else 1e-3, atol=1e-7)
    assert again.unet == model.unet
    assert again.vae == model.vae
    assert again.text_encoder == model.text_encoder
    assert again.scheduler == model.scheduler | {"_class_name": "DDIMScheduler"}

    opened = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert opened.safety_checker is None
    assert opened.scheduler.config.prediction_type == "v_prediction"
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(pipe, part).state_dict()
        for name, tensor in getattr(opened, part).state_dict().items():
            rounded = expected[name].to(torch.float16).to(torch.float32) if dtype == np.float16 else expected[name]
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, rounded), name
    opened.set_progress_bar_config(disable=True)
    opened("a cat", num_inference_steps=1, output_type="np")


def test_text_encoder_keys_with_and_without_the_older_prefix(saved, copy):
    file = copy / "text_encoder/model.safetensors"
    state = {name.removeprefix("text_model."): array for name, array in load_file(file).items()}
    expected = load_folder(saved[1]).params
    for prefix in ("", "text_model."):
        renamed = {prefix + name: array for name, array in state.items()}
        renamed[f"{prefix}embeddings.position_ids"] = np.arange(oracle.TOKENS)[None]
        save_file(renamed, file)
        assert_equal(load_folder(copy).params, expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.thorough
def test_shards(variant, saved, tmp_path):
    pipe, folder = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / UNET).unlink()
    pipe.unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB", variant=variant)
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    assert_equal(load_folder(tmp_path).params, load_folder(folder).params)
    shard = min((tmp_path / "unet").glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        load_folder(tmp_path)


def test_a_half_precision_variant(saved, tmp_path):
    pipe, folder = saved
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    pipe.save_pretrained(tmp_path, variant="fp16")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.float()
    assert not (tmp_path / UNET).exists()
    assert_equal(load_folder(tmp_path).params, load_folder(folder).params, rtol=1e-3, atol=1e-7)


def edit_json(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(file, edit):
    state = load_file(file)
    edit(state)
    save_file(state, file)


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


DAMAGE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "is not a model folder of diffusers"),
    "no config": (lambda f: (f / "vae/config.json").unlink(), "vae/config.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer_config.json is missing"),
    "no weights": (lambda f: (f / UNET).unlink(), f"{UNET} is missing"),
    "bad config": (lambda f: (f / "unet/config.json").write_text("{'"), "unet/config.json cannot be read"),
    "cut weights": (lambda f: cut(f / UNET), f"{UNET} is truncated"),
    "empty weights": (lambda f: (f / UNET).write_bytes(b""), f"{UNET} is truncated"),
    "pointer": (
        lambda f: (f / UNET).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"{UNET} is truncated",
    ),
    "inpainting": (lambda f: edit_json(f / "unet/config.json", in_channels=9), "9 in, 4 out, 4 in the VAE"),
    "other text": (lambda f: edit_json(f / "unet/config.json", cross_attention_dim=1024), "1024 and hidden_size 24"),
    "too long": (lambda f: edit_json(f / "tokenizer/tokenizer_config.json", model_max_length=77), "77 tokens of"),
    "vocabulary": (lambda f: edit_json(f / "text_encoder/config.json", vocab_size=50), "and 50 entries"),
    "sdxl": (lambda f: edit_json(f / "unet/config.json", addition_embed_type="text_time"), "addition_embed_type"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(damage, copy):
    harm, reason = DAMAGE[damage]
    harm(copy)
    with pytest.raises(UserError) as caught:
        load_folder(copy)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a model folder of diffusers"):
        load_folder(tmp_path / "nowhere")


def test_all_wrong_tensors_are_named_together(copy):
    def edit(state):
        state["conv_in.weight"] = state["conv_in.weight"][:, :3].copy()
        state["surplus.weight"] = state.pop("conv_out.bias")

    edit_tensors(copy / UNET, edit)
    with pytest.raises(UserError) as caught:
        load_folder(copy)
    message = str(caught.value)
    for part in ("conv_in.weight has shape", "conv_out.bias is missing", "surplus.weight is not part", UNET):
        assert part in message
