"""LoRA files: diffusers and this package read each other's files, and refuse bad ones."""

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
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.lora_file import load_lora, save_kohya, save_lora
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.lora import init_lora

RANK = 3
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # from the prompt's 24 features to 32
KOHYA_LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
WRITERS = {"diffusers": save_lora, "kohya": save_kohya}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A pipeline on disk, our UNet read from it, a random LoRA, one input, and our output as a function of the LoRA."""
    folder = tmp_path_factory.mktemp("model")
    oracle.pipeline(folder, **oracle.TWO_LEVELS).save_pretrained(folder)
    model = load_folder(folder)
    params = model.params["unet"]
    rng = np.random.default_rng(0)
    lora = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape) / 4, jnp.float32), init_lora(jax.random.key(0), params, RANK)
    )
    x, context = (rng.normal(size=s).astype(np.float32) for s in ((1, 8, 8, 4), (1, 4, oracle.WIDTH)))
    t = np.asarray([621], np.int32)

    def apply(params, lora):
        return model.unet.apply({"params": params, "lora": lora}, x, t, context)

    run = oracle.quick_jit(apply)

    def theirs(unet):
        return nhwc(unet(nchw(x), torch.tensor(t), torch.tensor(context)).sample)

    return SimpleNamespace(folder=folder, params=params, lora=lora, ours=lambda lora: run(params, lora), theirs=theirs)


def open_pipeline(case):
    pipe = StableDiffusionPipeline.from_pretrained(case.folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=WRITERS)
def written(request, case, tmp_path):
    """The random LoRA, written in one of the two layouts."""
    WRITERS[request.param](tmp_path / "lora.safetensors", case.lora)
    return tmp_path / "lora.safetensors"


def test_round_trip_is_exact(case, written):
    read = load_lora(written, case.params)
    assert jax.tree.structure(read) == jax.tree.structure(case.lora)
    jax.tree.map(np.testing.assert_array_equal, read, case.lora)
    assert {a.dtype for a in jax.tree.leaves(read)} == {jnp.dtype(jnp.float32)}
    assert {a.dtype for a in load_file(written).values()} == {np.dtype(np.float32)}


def test_keys_are_those_of_the_two_layouts(case, tmp_path):
    save_lora(tmp_path / "a", case.lora)
    save_kohya(tmp_path / "b", case.lora)
    ours, kohya = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert ours[f"unet.{LAYER}.lora_A.weight"].shape == (RANK, 24)
    assert ours[f"unet.{LAYER}.lora_B.weight"].shape == (32, RANK)
    assert kohya[f"{KOHYA_LAYER}.lora_down.weight"].shape == (RANK, 24)
    assert kohya[f"{KOHYA_LAYER}.alpha"] == RANK
    assert f"{KOHYA_LAYER.replace('to_k', 'to_out_0')}.lora_up.weight" in kohya


def test_diffusers_opens_what_we_write(case, written):
    pipe = open_pipeline(case)
    base = case.theirs(pipe.unet)
    pipe.load_lora_weights(written)
    adapted = case.theirs(pipe.unet)
    assert relative(case.ours(case.lora), adapted) < 1e-5
    assert relative(base, adapted) > 0.05


def diffusers_file(folder, unet, **settings):
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state, **settings)
    return folder / "pytorch_lora_weights.safetensors"


def test_we_open_what_diffusers_writes(case, tmp_path):
    """The scale alpha / rank in the adapter settings of the header is multiplied into `up`."""
    unet = open_pipeline(case).unet
    oracle.add_lora(unet, rank=RANK, alpha=1.5)
    settings = unet.peft_config["default"].to_dict()
    file = diffusers_file(tmp_path, unet, unet_lora_adapter_metadata=settings)
    assert relative(case.ours(load_lora(file, case.params)), case.theirs(unet)) < 1e-5


def test_we_open_what_peft_writes(case, tmp_path):
    """PEFT's folder has keys under base_model.model, and the scale alpha / rank in adapter_config.json."""
    unet = open_pipeline(case).unet
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=1.5, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"
    )
    adapted = get_peft_model(unet, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.25)
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    expected = case.theirs(adapted)
    assert relative(case.ours(load_lora(file, case.params)), expected) < 1e-5
    assert relative(case.ours(jax.tree.map(jnp.zeros_like, case.lora)), expected) > 0.02
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        load_lora(file, case.params)


def test_alpha_of_single_layers_in_the_header(case, tmp_path):
    unet = open_pipeline(case).unet
    oracle.add_lora(unet, rank=RANK, alpha=RANK)
    settings = unet.peft_config["default"].to_dict()
    settings["alpha_pattern"] = {"attn2.to_k": 7.5}
    file = diffusers_file(tmp_path, unet, unet_lora_adapter_metadata=settings)
    read = flatten_dict(load_lora(file, case.params), sep=".")
    state = load_file(file)
    for name, scale in ((LAYER, 2.5), (LAYER.replace("to_k", "to_v"), 1.0)):
        np.testing.assert_allclose(read[f"{name}.up"], scale * state[f"unet.{name}.lora.up.weight"].T, rtol=1e-6)
    pipe = open_pipeline(case)
    pipe.load_lora_weights(file)
    assert relative(case.ours(load_lora(file, case.params)), case.theirs(pipe.unet)) < 1e-5


def test_alpha_of_kohya(case, tmp_path):
    """alpha 0.75 at rank 3 is a scale of a quarter, to diffusers and to us; half precision is read as float32."""
    save_kohya(tmp_path / "lora.safetensors", case.lora)
    state = {key: a.astype(np.float16) for key, a in load_file(tmp_path / "lora.safetensors").items()}
    state |= {key: np.asarray(0.75, np.float16) for key in state if key.endswith(".alpha")}
    save_file(state, tmp_path / "lora.safetensors")
    pipe = open_pipeline(case)
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    read = load_lora(tmp_path / "lora.safetensors", case.params)
    assert relative(case.ours(read), case.theirs(pipe.unet)) < 1e-5
    quarter = {k: a if k[-1] == "down" else a / 4 for k, a in flatten_dict(case.lora).items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), read, unflatten_dict(quarter))


# Where the UNet attends, as kohya's sd-scripts name it and as diffusers does.
KOHYA_BLOCKS = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0": "down_blocks.0.attentions.0.transformer_blocks.0",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0": "mid_block.attentions.0.transformer_blocks.0",
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0": "up_blocks.1.attentions.0.transformer_blocks.0",
    "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0": "up_blocks.1.attentions.1.transformer_blocks.0",
}
KOHYA_LAYERS = {
    **{"attn1_to_q": "attn1.to_q", "attn1_to_k": "attn1.to_k", "attn1_to_v": "attn1.to_v"},
    **{"attn2_to_q": "attn2.to_q", "attn2_to_k": "attn2.to_k", "attn2_to_v": "attn2.to_v"},
    **{"attn1_to_out_0": "attn1.to_out.0", "attn2_to_out_0": "attn2.to_out.0"},
}


def test_a_file_with_the_keys_that_kohya_writes(case, tmp_path):
    """Rank 4, alpha 1, half precision and a header, as sd-scripts leave them. What they mean is stated here: each
    weight of PyTorch's UNet plus alpha/rank · up · down; so does diffusers read them.
    """
    unet, rng, state = open_pipeline(case).unet, np.random.default_rng(0), {}
    for block, module in KOHYA_BLOCKS.items():
        for layer, submodule in KOHYA_LAYERS.items():
            weight = unet.get_submodule(f"{module}.{submodule}").weight
            down, up = (rng.normal(size=s).astype(np.float16) / 2 for s in ((4, weight.shape[1]), (weight.shape[0], 4)))
            state |= {f"{block}_{layer}.lora_down.weight": down, f"{block}_{layer}.lora_up.weight": up}
            state[f"{block}_{layer}.alpha"] = np.asarray(1.0, np.float16)
            weight.add_(torch.tensor(up.astype(np.float32) @ down.astype(np.float32)) / 4)
    file = tmp_path / "lora.safetensors"
    save_file(state, file, metadata={"ss_network_module": "networks.lora", "ss_network_dim": "4"})
    expected = case.theirs(unet)
    assert relative(case.ours(load_lora(file, case.params)), expected) < 1e-5
    pipe = open_pipeline(case)
    assert relative(case.theirs(pipe.unet), expected) > 0.05
    pipe.load_lora_weights(file)
    assert relative(case.theirs(pipe.unet), expected) < 1e-5


def test_keys_of_training_scripts_and_mixed_ranks(case, tmp_path):
    """diffusers' training scripts call the halves lora.down and lora.up; each layer has its matrices' own rank."""
    save_lora(tmp_path / "lora.safetensors", case.lora)
    state = load_file(tmp_path / "lora.safetensors")
    state[f"unet.{LAYER}.lora_A.weight"] = state[f"unet.{LAYER}.lora_A.weight"][:1]
    state[f"unet.{LAYER}.lora_B.weight"] = state[f"unet.{LAYER}.lora_B.weight"][:, :1]
    old = {
        k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): np.ascontiguousarray(a) for k, a in state.items()
    }
    save_file(old, tmp_path / "lora.safetensors")
    read = flatten_dict(load_lora(tmp_path / "lora.safetensors", case.params), sep=".")
    written = flatten_dict(case.lora, sep=".")
    assert read.keys() == written.keys()
    for name, array in read.items():
        expected = written[name]
        if name.startswith(LAYER):
            expected = expected[:, :1] if name.endswith("down") else expected[:1]
        np.testing.assert_array_equal(array, expected)


def test_every_misfit_is_named_together(case, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_lora(file, case.lora)
    state = load_file(file)
    value = LAYER.replace("to_k", "to_v")
    query = LAYER.replace("to_k", "to_q")
    output = LAYER.replace("to_k", "to_out.0")
    state["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((3, 24), np.float32)
    state["unet.norm.lora_A.weight"] = np.zeros(3, np.float32)
    state["unet.conv_in.lora_A.weight"] = np.zeros((3, 4, 3, 3), np.float32)
    del state[f"unet.{LAYER}.lora_B.weight"]
    state[f"unet.{value}.lora_A.weight"] = np.zeros((RANK, 768), np.float32)
    state[f"unet.{query}.lora_A.weight"] = np.zeros((RANK + 1, 32), np.float32)
    state[f"unet.{output}.alpha"] = np.zeros(2, np.float32)
    save_file(state, file)
    with pytest.raises(UserError) as error:
        load_lora(file, case.params)
    message = str(error.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    for part in (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight belongs to no",
        "conv_in has no up matrix",
        "unet.norm.lora_A.weight belongs to no",
        f"{LAYER} has no up matrix",
        f"{value} has down (3, 768)",
        f"{query} has down (4, 32)",
        f"{output} has alpha of shape (2,)",
    ):
        assert part in message


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "no tensors", "not ours", "header"])
def test_bad_files_are_named(damage, case, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_lora(file, case.lora)
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "no tensors":
        save_file({}, file)
    elif damage == "not ours":
        file.write_bytes(b"PK\x03\x04" + bytes(200))
    else:
        save_file(load_file(file), file, metadata={"lora_adapter_metadata": "{'"})
    with pytest.raises(UserError) as error:
        load_lora(file, case.params)
    assert str(file) in str(error.value)


def test_a_lora_of_another_model_does_not_flood_the_screen(case, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.layer{i}.lora_A.weight": np.zeros(1) for i in range(500)}, file)
    with pytest.raises(UserError, match=r"and 480 more$") as error:
        load_lora(file, case.params)
    assert len(str(error.value)) < 2500
