"""Single-file checkpoints with LDM's names give the same model as diffusers' folder and as diffusers itself."""

import shutil
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import torch
import torch_oracle as oracle
import transformers
from safetensors.numpy import save_file

from nabla_gfn_jax.base_models.names import abstract_model, load_model, model_files
from nabla_gfn_jax.checkpoints import hub
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, alphas_cumprod
from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.inference.subject import hashes_of

# Two levels with two layers each, the first with attention.
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.attentions.1": "input_blocks.2.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".conv_shortcut.": ".skip_connection.",
}
VAE = {
    **{f"encoder.down_blocks.{i}.resnets.0": f"encoder.down.{i}.block.0" for i in range(4)},
    **{f"encoder.down_blocks.{i}.downsamplers.0.conv": f"encoder.down.{i}.downsample.conv" for i in range(3)},
    **{f"decoder.up_blocks.{i}.resnets.{j}": f"decoder.up.{3 - i}.block.{j}" for i in range(4) for j in range(2)},
    **{f"decoder.up_blocks.{i}.upsamplers.0.conv": f"decoder.up.{3 - i}.upsample.conv" for i in range(3)},
    **{
        f"{side}.mid_block.{new}": f"{side}.mid.{old}"
        for side in ("encoder", "decoder")
        for new, old in {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}.items()
    },
    **{f"{side}.conv_norm_out": f"{side}.norm_out" for side in ("encoder", "decoder")},
}
VAE_INNER = {
    ".conv_shortcut.": ".nin_shortcut.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
}
WIDTH, WORDS = 64, 600


def renamed(state, blocks, inner):
    """The tensors with LDM's names for blocks and for the parts of a resnet or an attention."""
    found = {}
    for name, tensor in state.items():
        block = max((b for b in blocks if name.startswith(f"{b}.")), key=len, default="")
        rest = name.removeprefix(block)
        for new, old in inner.items() if "attentions" not in block or inner is VAE_INNER else ():
            rest = rest.replace(new, old)
        found[blocks.get(block, "") + rest] = tensor.numpy()
    return found


def write_unet(unet):
    return {f"model.diffusion_model.{k}": a for k, a in renamed(unet.state_dict(), UNET, RESNET).items()}


def write_vae(vae):
    state = renamed(vae.state_dict(), VAE, VAE_INNER)
    for key, array in state.items():
        if ".attn_1." in key and key.endswith(".weight") and array.ndim == 2:
            state[key] = array[:, :, None, None]  # 1x1 convolutions there
    return {f"first_stage_model.{key}": array for key, array in state.items()}


def write_clip(text):
    state = {k.removeprefix("text_model."): t.numpy() for k, t in text.state_dict().items()}
    state["embeddings.position_ids"] = np.arange(oracle.TOKENS)[None]
    return {f"cond_stage_model.transformer.text_model.{key}": array for key, array in state.items()}


def write_open_clip(text):
    """Writes OpenCLIP's tensors, with a last block that is not used, as in the released files."""
    state = {k.removeprefix("text_model."): t.numpy() for k, t in text.state_dict().items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": np.eye(WIDTH, dtype=np.float32),
        "logit_scale": np.float32(1),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for ours, block in ((0, 0), (1, 1), (0, 2)):
        for kind in ("weight", "bias"):
            of = lambda n, o=ours, k=kind: state[f"encoder.layers.{o}.{n}.{k}"]  # noqa: E731
            place = f"transformer.resblocks.{block}"
            found |= {f"{place}.{old}.{kind}": of(new) for new, old in names.items()}
            found[f"{place}.attn.in_proj_{kind}"] = np.concatenate([of(f"self_attn.{p}_proj") for p in "qkv"])
    return {f"cond_stage_model.model.{key}": array for key, array in found.items()}


@pytest.fixture(scope="module", params=[1, 2], ids=["SD-1", "SD-2"])
def case(request, tmp_path_factory):
    """A diffusers folder of the version with random weights, and a file of the same tensors with LDM's names."""
    folder, version_2 = tmp_path_factory.mktemp("model"), request.param == 2
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=96 if version_2 else 64,
        cross_attention_dim=WIDTH,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[1, 2] if version_2 else 8,
        use_linear_projection=version_2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=oracle.TOKENS,
        hidden_act="gelu" if version_2 else "quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
    )
    train_tokenizer(oracle.CAPTIONS, folder / "words", WORDS, oracle.TOKENS)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "words", pad_token="!" if version_2 else None)
    text = transformers.CLIPTextModel(config)
    prediction = "v_prediction" if version_2 else "epsilon"
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**STABLE_DIFFUSION | {"prediction_type": prediction}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    (folder / "weights/tokenizer").mkdir(parents=True)
    shutil.copy(folder / "tokenizer/tokenizer.json", folder / "weights/tokenizer")
    state = write_unet(unet) | write_vae(vae) | (write_open_clip(text) if version_2 else write_clip(text))
    state |= {"alphas_cumprod": alphas_cumprod(STABLE_DIFFUSION).astype(np.float32)}
    return SimpleNamespace(folder=folder, state=state, version_2=version_2, prediction=prediction)


@pytest.fixture(autouse=True)
def weights(case, monkeypatch, tmp_path):
    monkeypatch.setenv(hub.FOLDER, str(case.folder / "weights"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(case, file, extra=None):
    state = case.state | (extra or {})
    if file.suffix == ".safetensors":
        save_file({k: np.ascontiguousarray(a) for k, a in state.items()}, file)
    else:
        torch.save({"state_dict": {k: torch.tensor(a) for k, a in state.items()}, "global_step": 3}, file)
    return f"{file}:{case.prediction}" if case.version_2 else str(file)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
@pytest.mark.thorough
def test_the_model_is_the_folders(name, case, tmp_path):
    model, folder = load_model(write(case, tmp_path / name)), load_model(str(case.folder))
    assert (model.unet.config.heads, model.text_encoder) == (folder.unet.config.heads, folder.text_encoder)
    for field in ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "sample_size"):
        assert getattr(model.unet.config, field) == getattr(folder.unet.config, field), field
    assert model.unet.config.use_linear_projection == case.version_2
    assert model.vae == folder.vae
    jax.tree.map(np.testing.assert_array_equal, model.params, folder.params)
    assert model.scheduler["prediction_type"] == case.prediction
    prompts = ["a cat", "", "two dogs and a frog's pond"]
    np.testing.assert_array_equal(model.tokenizer(prompts), folder.tokenizer(prompts))
    shapes = abstract_model(write(case, tmp_path / name)).params
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, model.params)


def test_the_text_encoder_of_the_oldest_files(case, tmp_path):
    """The oldest files have no `text_model` in these names."""
    if case.version_2:
        pytest.skip("of version 1")
    old = {key.replace(".transformer.text_model.", ".transformer."): array for key, array in case.state.items()}
    save_file({k: np.ascontiguousarray(a) for k, a in old.items()}, tmp_path / "old.safetensors")
    found, expected = (load_model(str(path)).params for path in (tmp_path / "old.safetensors", case.folder))
    jax.tree.map(np.testing.assert_array_equal, found["text_encoder"], expected["text_encoder"])


def test_diffusers_reads_the_same_file_to_the_same_model(case, tmp_path):
    """This shows that the tests write the correct names."""
    if case.version_2:
        pytest.skip("diffusers' conversion of OpenCLIP is for its one size")
    write(case, tmp_path / "model.safetensors")
    options = {"config": str(case.folder), "local_files_only": True, "safety_checker": None}
    pipe = diffusers.StableDiffusionPipeline.from_single_file(tmp_path / "model.safetensors", **options)
    expected = diffusers.StableDiffusionPipeline.from_pretrained(case.folder)
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(pipe, part).state_dict()
        for key, tensor in getattr(expected, part).state_dict().items():
            assert torch.equal(theirs[key], tensor), key


@pytest.mark.thorough
def test_the_running_mean_is_read_where_there_are_two(case, tmp_path):
    ema = {}
    for key, array in case.state.items():
        if key.startswith("model.diffusion_model."):
            ema["model_ema." + key.removeprefix("model.").replace(".", "")] = 2 * array
    name = write(case, tmp_path / "both.safetensors", ema)
    other = f"{name},non_ema" if case.version_2 else f"{name}:non_ema"
    mean, plain = load_model(name).params["unet"], load_model(other).params["unet"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), mean, plain)


@pytest.mark.thorough
def test_what_it_predicts_is_found_or_asked_for(case, tmp_path):
    file = tmp_path / "model.safetensors"
    write(case, file)
    if not case.version_2:
        assert load_model(str(file)).scheduler["prediction_type"] == "epsilon"
        assert load_model(f"{file}:v_prediction").scheduler["prediction_type"] == "v_prediction"
        return
    with pytest.raises(UserError, match=r"does not say what it predicts; name it \S+:v_prediction if it is for 768"):
        load_model(str(file))
    file.with_suffix(".yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert load_model(str(file)).scheduler["prediction_type"] == "v_prediction"
    file.with_suffix(".yaml").write_text("model:\n  params:\n    linear_start: 0.00085\n")
    model = load_model(str(file))
    assert (model.scheduler["prediction_type"], model.unet.config.sample_size) == ("epsilon", 64)
    file.with_suffix(".yaml").unlink()
    write(case, file, {"v_pred": np.zeros(0, np.float32)})
    assert load_model(str(file)).scheduler["prediction_type"] == "v_prediction"


@pytest.mark.thorough
def test_the_noise_schedule_is_the_files(case, tmp_path):
    schedules = {
        "linear": STABLE_DIFFUSION | {"beta_schedule": "linear"},
        "zero": STABLE_DIFFUSION | {"rescale_betas_zero_snr": True},
    }
    for name, config in schedules.items():
        signal = alphas_cumprod(config)
        write(case, tmp_path / f"{name}.safetensors", {"alphas_cumprod": signal})
        found = load_model(f"{tmp_path / name}.safetensors:v_prediction").scheduler
        np.testing.assert_allclose(alphas_cumprod(found), signal, rtol=1e-6, atol=1e-12)


@pytest.mark.thorough
def test_what_else_is_wrong_is_named(case, tmp_path):
    file = tmp_path / "model.safetensors"
    for cut, said in {
        "first_stage_model.": "has no VAE",
        "cond_stage_model.": "has no text encoder",
        "model.diffusion_model.": "has no UNet",
    }.items():
        save_file({k: np.ascontiguousarray(a) for k, a in case.state.items() if not k.startswith(cut)}, file)
        with pytest.raises(UserError, match=said):
            load_model(f"{file}:epsilon")
    write(case, file, {"model.diffusion_model.label_emb.0.0.weight": np.zeros(1)})
    with pytest.raises(UserError, match="is Stable Diffusion XL"):
        load_model(f"{file}:epsilon")
    write(case, file, {"model.diffusion_model.out.2.bias": np.zeros(5)})
    with pytest.raises(UserError, match=r"conv_out\.bias has shape \(5,\)"):
        load_model(f"{file}:epsilon")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated"):
        load_model(f"{file}:epsilon")
    with pytest.raises(UserError, match="there is no file"):
        load_model(f"{tmp_path / 'nothing.safetensors'}:epsilon")


def test_a_run_says_which_files_it_read(case, tmp_path):
    name = write(case, tmp_path / "model.safetensors")
    assert model_files(name).keys() == {"model.safetensors", "tokenizer.json"}
    assert hashes_of(name).keys() == {"model/model.safetensors", "model/tokenizer.json"}
