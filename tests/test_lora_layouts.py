"""LoRA files of other programs: each layout gives the output of diffusers or PEFT for the same file."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import torch_oracle as oracle
from diffusers import StableDiffusionPipeline
from flax.traverse_util import flatten_dict
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from torch_oracle import nchw, nhwc, relative

from nabla_gfn_jax.base_models.diffusers_folder import load_folder
from nabla_gfn_jax.checkpoints.lora_file import load_lora, save_kohya, save_lora
from nabla_gfn_jax.errors import UserError

RANK = 3
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
# Of Stable Diffusion's UNet on its first program's names, for the two levels with one layer of the tests.
LDM = {
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A pipeline on disk, our model read from it, and the outputs of UNet and text encoder in both programs."""
    folder = tmp_path_factory.mktemp("model")
    pipe = oracle.pipeline(folder, **oracle.TWO_LEVELS)
    pipe.save_pretrained(folder)
    model = load_folder(folder)
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=s).astype(np.float32) for s in ((1, 8, 8, 4), (1, 4, oracle.WIDTH)))
    t = np.asarray([621], np.int32)
    ids = np.asarray(model.tokenizer(["a cat"]))

    def ours(lora):
        variables = {"params": model.params["unet"], "lora": lora}
        return oracle.compile_quickly(model.unet.apply, variables, x, t, context)(variables, x, t, context)

    def text(lora):
        variables = {"params": model.params["text_encoder"], "lora": lora.get("text_encoder", {})}
        return model.text_encoder.apply(variables, ids)

    return SimpleNamespace(
        folder=folder,
        params=(model.params["unet"], model.params["text_encoder"]),
        shapes={name: tuple(p.shape) for name, p in pipe.unet.named_parameters()},
        text_shapes={name: tuple(p.shape) for name, p in pipe.text_encoder.named_parameters()},
        ours=ours,
        text=text,
        theirs=lambda unet: nhwc(unet(nchw(x), torch.tensor(t), torch.tensor(context)).sample),
        their_text=lambda encoder: encoder(torch.tensor(ids, dtype=torch.int64)).last_hidden_state.numpy(),
    )


def open_pipeline(case):
    pipe = StableDiffusionPipeline.from_pretrained(case.folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pair(shape, rank=RANK, seed=0):
    """Random (down, up) for a layer with this weight; for a convolution, down has the kernel."""
    rng = np.random.default_rng([seed, *shape])
    down = rng.normal(size=(rank, *shape[1:])) / np.sqrt(np.prod(shape[1:]))
    up = rng.normal(size=(shape[0], rank)) / 2
    return down.astype(np.float32), up.reshape(*up.shape, *[1] * (len(shape) - 2)).astype(np.float32)


def layers(shapes, endings):
    """The names with this ending of layers, with the shapes of their weights."""
    endings = tuple(f".{e}.weight" for e in endings)
    return {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith(endings)}


def kohya(shapes, prefix, alpha=1.5):
    state = {}
    for name, shape in shapes.items():
        key = prefix + name.replace(".", "_")
        state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = pair(shape)
        state[f"{key}.alpha"] = np.asarray(alpha, np.float32)
    return state


def assert_drawn_alike(case, file, *, text=False):
    """Checks that our output equals diffusers' output with the file, and differs from the base model's."""
    lora, pipe = load_lora(file, *case.params), open_pipeline(case)
    base = case.theirs(pipe.unet), case.their_text(pipe.text_encoder)
    pipe.load_lora_weights(file)
    expected = case.theirs(pipe.unet)
    assert relative(base[0], expected) > 0.02
    assert relative(case.ours(lora), expected) < 1e-4
    assert ("text_encoder" in lora) == text
    if text:
        expected = case.their_text(pipe.text_encoder)
        assert relative(base[1], expected) > 0.02
        assert relative(case.text(lora), expected) < 1e-4


def text_name(name):
    """The name in files. transformers before version 5 puts the text encoder into one more module."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


@pytest.mark.thorough
def test_kohya_with_the_text_encoder(case, tmp_path):
    """Most files on model sites adapt attention and feed-forward layers, 1x1 convolutions, and the text encoder."""
    unet = layers(case.shapes, [*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out"])
    assert {len(shape) for shape in unet.values()} == {2, 4}
    text = layers(case.text_shapes, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
    state = kohya(unet, "lora_unet_") | kohya({text_name(n): s for n, s in text.items()}, "lora_te_")
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight" in state
    save_file(state, tmp_path / "lora.safetensors")
    assert_drawn_alike(case, tmp_path / "lora.safetensors", text=True)
    with pytest.raises(UserError, match=r"lora_te_text_model_encoder_layers_0_\S+ belongs to no layer of the UNet"):
        load_lora(tmp_path / "lora.safetensors", case.params[0])


def test_locon(case, tmp_path):
    """LyCORIS' LoCon adapts 3x3 convolutions, including strided ones."""
    convolutions = layers(case.shapes, ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"])
    state = kohya(convolutions | layers(case.shapes, ATTENTION), "lora_unet_")
    save_file(state, tmp_path / "lora.safetensors")
    assert_drawn_alike(case, tmp_path / "lora.safetensors")


def test_locon_in_tucker_form(case, tmp_path):
    """down (1x1), mid (3x3) and up (1x1) are applied in turn.

    diffusers refuses such files, so they are compared by hand.
    """
    layer, (out, inputs, *_) = "mid_block.resnets.0.conv1", case.shapes["mid_block.resnets.0.conv1.weight"]
    rng = np.random.default_rng(3)
    down, mid, up = (rng.normal(size=s).astype(np.float32) for s in ((2, inputs, 1, 1), (2, 2, 3, 3), (out, 2, 1, 1)))
    key = "lora_unet_" + layer.replace(".", "_")
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up / 50}
    save_file(state | {f"{key}.alpha": np.asarray(1.0)}, tmp_path / "lora.safetensors")
    unet = open_pipeline(case).unet
    kernel = np.einsum("or,rshw,si->oihw", up[:, :, 0, 0] / 50, mid, down[:, :, 0, 0])
    unet.mid_block.resnets[0].conv1.weight += torch.tensor(kernel) / 2  # alpha 1, rank 2
    base, expected = case.theirs(open_pipeline(case).unet), case.theirs(unet)
    assert relative(base, expected) > 0.02
    assert relative(case.ours(load_lora(tmp_path / "lora.safetensors", *case.params)), expected) < 1e-4


def test_first_programs_block_names(case, tmp_path):
    shapes = {}
    for name, shape in layers(case.shapes, [*ATTENTION, "proj_in"]).items():
        block = next(b for b in LDM if name.startswith(f"{b}."))
        shapes[LDM[block] + name.removeprefix(block)] = shape
    save_file(kohya(shapes, "lora_unet_"), tmp_path / "ldm.safetensors")
    back = {old: new for new, old in LDM.items()}
    block = lambda name: next(b for b in back if name.startswith(f"{b}."))  # noqa: E731
    ours = {back[block(n)] + n.removeprefix(block(n)): s for n, s in shapes.items()}
    save_file(kohya(ours, "lora_unet_"), tmp_path / "diffusers.safetensors")
    assert_drawn_alike(case, tmp_path / "diffusers.safetensors")
    read, same = (load_lora(tmp_path / f"{name}.safetensors", *case.params) for name in ("ldm", "diffusers"))
    jax.tree.map(np.testing.assert_array_equal, read, same)


@pytest.mark.parametrize("form", ["bare.safetensors", "unet.safetensors", "pytorch_lora_weights.bin", "lora.pt"])
def test_diffusers_of_2023(form, case, tmp_path):
    """Files have the names of attention processors.

    Pickled files are not executed. The folder of a file may be given.
    """
    state = {}
    for name, shape in layers(case.shapes, ATTENTION).items():
        head, _, last = name.rpartition(".to_")
        key = f"{head}.processor.to_{last.removesuffix('.0')}_lora"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = pair(shape)
    if form != "bare.safetensors":
        state = {f"unet.{key}": array for key, array in state.items()}
    file = tmp_path / form
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({key: torch.tensor(array) for key, array in state.items()}, file)
    modern = {}
    for name, shape in layers(case.shapes, ATTENTION).items():
        modern[f"unet.{name}.lora_A.weight"], modern[f"unet.{name}.lora_B.weight"] = pair(shape)
    save_file(modern, tmp_path / "modern.safetensors")
    read = load_lora(tmp_path if form == "pytorch_lora_weights.bin" else file, *case.params)
    jax.tree.map(np.testing.assert_array_equal, read, load_lora(tmp_path / "modern.safetensors", *case.params))
    if form == "unet.safetensors":
        assert_drawn_alike(case, tmp_path / "modern.safetensors")


def test_text_encoder_of_diffusers_training_scripts(case, tmp_path):
    state = {}
    for name, shape in layers(case.text_shapes, ["q_proj", "v_proj"]).items():
        key = f"text_encoder.{text_name(name)}.lora_linear_layer"
        state[f"{key}.down.weight"], state[f"{key}.up.weight"] = pair(shape)
    for name, shape in layers(case.shapes, ATTENTION).items():
        state[f"unet.{name}.lora.down.weight"], state[f"unet.{name}.lora.up.weight"] = pair(shape)
    save_file(state, tmp_path / "lora.safetensors")
    assert_drawn_alike(case, tmp_path / "lora.safetensors", text=True)
    old = {k.replace(".q_proj.lora_linear_layer", ".to_q_lora"): a for k, a in state.items()}
    save_file({k.replace(".v_proj.lora_linear_layer", ".to_v_lora"): a for k, a in old.items()}, tmp_path / "old")
    read, same = (load_lora(tmp_path / name, *case.params) for name in ("old", "lora.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, read, same)


PEFT = {
    "plain": {},
    "suffixes": {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 16}},
    "regular expressions": {
        "rank_pattern": {r"down_blocks\.\d+\..*to_q": 2},
        "alpha_pattern": {r"down_blocks\.\d+\..*to_q": 32},
    },
    "anchored": {"alpha_pattern": {r"^mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q": 64}},
    "the first that fits": {"alpha_pattern": {r"attn1\.to_.": 9, "to_q": 1}},
    "rslora": {"use_rslora": True},
    "convolutions": {"target_modules": ["to_q", "conv1", "proj_in"]},
}


def peft_folder(case, folder, **options):
    """A folder saved by PEFT, and PEFT's output."""
    torch.manual_seed(6)
    settings = {"r": RANK, "lora_alpha": 5, "target_modules": ATTENTION, "init_lora_weights": False}
    adapted = get_peft_model(open_pipeline(case).unet, LoraConfig(**settings | options))
    adapted.save_pretrained(folder)
    return case.theirs(adapted), adapted


@pytest.mark.parametrize("variant", PEFT)
@pytest.mark.thorough
def test_peft_folders(variant, case, tmp_path):
    expected, adapted = peft_folder(case, tmp_path / "lora", **PEFT[variant])
    assert relative(case.ours(load_lora(tmp_path / "lora", *case.params)), expected) < 1e-5
    if variant == "plain":  # names of the model in memory, in which the adapter's own stands
        named = {k: v.contiguous() for k, v in adapted.state_dict().items() if "lora_" in k}
        assert any(".lora_A.default.weight" in key for key in named)
        torch.save(named, tmp_path / "lora/adapter_model.bin")
        (tmp_path / "lora/adapter_model.safetensors").unlink()
        assert relative(case.ours(load_lora(tmp_path / "lora", *case.params)), expected) < 1e-5


def test_patterns_in_the_header_of_diffusers(case, tmp_path):
    state = {}
    for name, shape in layers(case.shapes, ATTENTION).items():
        state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"] = pair(shape)
    config = LoraConfig(r=RANK, lora_alpha=2, target_modules=ATTENTION).to_dict()
    config |= {"alpha_pattern": {r"down_blocks\.\d+\..*to_q": 12}, "target_modules": sorted(ATTENTION)}
    header = {f"unet.{name}": value for name, value in config.items() if name != "runtime_config"}
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    read = flatten_dict(load_lora(tmp_path / "lora.safetensors", *case.params), sep=".")
    for name in layers(case.shapes, ["to_q"]):
        scale = (12 if name.startswith("down_blocks") else 2) / RANK
        np.testing.assert_allclose(read[f"{name}.up"], scale * state[f"unet.{name}.lora_B.weight"].T, rtol=1e-6)
    assert_drawn_alike(case, tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora_unet_x.hada_w1_a", "is a LoHa of LyCORIS, .* merge it"),
        ("lora_unet_x.lokr_w1", "is a LoKr of LyCORIS, .* merge it"),
        ("lora_unet_x.dora_scale", "is a DoRA, .* merge it"),
        ("base_model.model.x.lora_magnitude_vector", "is a DoRA, .* merge it"),
        ("base_model.model.x.lora_B.bias", "is a LoRA with biases"),
        ("lora_te2_text_model_x.lora_down.weight", "is a LoRA for Stable Diffusion XL"),
        ("transformer.x.lora_A.weight", "is a LoRA for a diffusion transformer"),
        ("emb_params", "is a textual-inversion embedding, not a LoRA"),
    ],
)
def test_other_kinds_are_named(key, said, case, tmp_path):
    save_file({key: np.zeros((2, 2), np.float32)}, tmp_path / "file.safetensors")
    with pytest.raises(UserError, match=f"file.safetensors {said}") as caught:
        load_lora(tmp_path / "file.safetensors", *case.params)
    assert "\n" not in str(caught.value)


def test_pefts_dora_is_named(case, tmp_path):
    peft_folder(case, tmp_path, use_dora=True)
    with pytest.raises(UserError, match="is a DoRA"):
        load_lora(tmp_path, *case.params)


def test_pefts_settings_that_cannot_be_read(case, tmp_path):
    peft_folder(case, tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match=r"was initialised by pissa, which changes the base weights; convert it"):
        load_lora(tmp_path, *case.params)
    file.write_text(json.dumps(settings | {"alpha_pattern": {"to_(q": 3}}))
    with pytest.raises(UserError, match=r"alpha_pattern 'to_\(q' is not a regular expression"):
        load_lora(tmp_path, *case.params)
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        load_lora(tmp_path, *case.params)


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_harmful_pickle_is_not_executed(case, tmp_path, capsys):
    torch.save({"unet.x.lora_A.weight": Harmful()}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"lora\.pt asks for (builtins|__builtin__)\.print"):
        load_lora(tmp_path / "lora.pt", *case.params)
    assert "executed" not in capsys.readouterr().out


def test_a_folder_without_a_lora(case, tmp_path):
    with pytest.raises(UserError, match=r"has no LoRA file called .*adapter_model\.safetensors"):
        load_lora(tmp_path, *case.params)


def test_the_file_of_a_run_that_was_saved_by_us(case, tmp_path):
    """Convolutions are written in both layouts and read again."""
    save_file(kohya(layers(case.shapes, ["conv1", "to_q", "proj_in"]), "lora_unet_"), tmp_path / "a.safetensors")
    lora = load_lora(tmp_path / "a.safetensors", *case.params)
    for save in (save_lora, save_kohya):
        save(tmp_path / "b.safetensors", lora)
        jax.tree.map(np.testing.assert_array_equal, lora, load_lora(tmp_path / "b.safetensors", *case.params))
    assert load_file(tmp_path / "b.safetensors")["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"].ndim == 4
