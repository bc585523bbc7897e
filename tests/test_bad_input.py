"""Malformed models, prompts and LoRAs end the command with one line and exit code 2, and leave no results behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import brightness, flags, last_of_each

from nabla_gfn_jax import train
from nabla_gfn_jax.rewards import REWARDS

UNET = "unet/diffusion_pytorch_model.safetensors"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def refused(tiny_model, tmp_path, monkeypatch, capfd):
    """Runs `train` with more flags, on a copy of the tiny model or on another, and returns the one line of its error.

    Beside it, `workdir` is the workdir.
    """
    monkeypatch.setitem(REWARDS, "1.0", lambda: brightness(1.0))

    def run(*more: str, model: Path = tiny_model) -> str:
        with pytest.raises(SystemExit) as stop:
            train.main(["train", *last_of_each([*flags(model, tmp_path / "run"), *more])])
        assert stop.value.code == 2
        told = capfd.readouterr()
        (line,) = told.err.splitlines()
        assert line.startswith("error: ")
        assert told.out == ""
        return line

    run.workdir = tmp_path / "run"
    return run


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_tensors(file: Path, edit) -> None:
    state = load_file(file)
    edit(state)
    save_file(state, file)


def header(file: Path, text: str, size: int | None = None) -> None:
    """Writes a safetensors file with this header, which says that it has `size` bytes, and 8 bytes of data."""
    file.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text.encode() + bytes(8))


def shards(folder: Path, *names: str) -> None:
    """Replaces the UNet's weights by an index of shards, of which only the first is there."""
    (folder / UNET).rename(folder / "unet/first.safetensors")
    tensors = load_file(folder / "unet/first.safetensors")
    weight_map = dict(zip(tensors, (*names, *["first.safetensors"] * len(tensors)), strict=False))
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def other_pipeline(folder: Path) -> None:
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))


TERABYTES = '{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
MODELS = {
    "another pipeline": (other_pipeline, "has no unet: it is a FluxPipeline; use a model of"),
    "another class": (
        lambda f: edit_json(f / "unet/config.json", _class_name="UNet3DConditionModel"),
        "unet/config.json: _class_name = 'UNet3DConditionModel' is not supported",
    ),
    "another VAE": (
        lambda f: edit_json(f / "vae/config.json", _class_name="AutoencoderTiny"),
        "'AutoencoderTiny' is not",
    ),
    "no config": (lambda f: (f / "text_encoder/config.json").unlink(), "text_encoder/config.json is missing"),
    "empty config": (lambda f: (f / "unet/config.json").write_bytes(b""), "unet/config.json cannot be read"),
    "text for a number": (
        lambda f: edit_json(f / "unet/config.json", layers_per_block="two"),
        "layers_per_block = 'two' is not allowed; it must be a whole number, from 1 to 256",
    ),
    "too deep": (
        lambda f: edit_json(f / "text_encoder/config.json", num_hidden_layers=10**9),
        "num_hidden_layers = 1000000000 is not allowed",
    ),
    "levels": (
        lambda f: edit_json(f / "unet/config.json", block_out_channels=[8, 16]),
        "the numbers of levels differ (block_out_channels has 2, down_block_types has 1, up_block_types has 1)",
    ),
    "groups": (lambda f: edit_json(f / "vae/config.json", norm_num_groups=3), "norm_num_groups = 3 does not divide"),
    "heads": (
        lambda f: edit_json(f / "text_encoder/config.json", num_attention_heads=3),
        "3 does not divide hidden_size",
    ),
    "a missing tensor": (lambda f: edit_tensors(f / UNET, lambda s: s.pop("conv_in.bias")), "conv_in.bias is missing"),
    "a tensor too many": (
        lambda f: edit_tensors(f / UNET, lambda s: s.update(more=np.zeros(1))),
        "more is not part of the model",
    ),
    "another shape": (
        lambda f: edit_tensors(f / UNET, lambda s: s.update({"conv_in.bias": np.zeros(9, np.float32)})),
        "conv_in.bias has shape (9,), its config.json implies (8,)",
    ),
    "cut weights": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-1]), "is truncated"),
    "empty weights": (lambda f: (f / UNET).write_bytes(b""), "is truncated"),
    "a header of terabytes": (lambda f: header(f / UNET, "{}", 2**42), "is truncated"),
    "a tensor of terabytes": (lambda f: header(f / UNET, TERABYTES), "is truncated"),
    "a missing shard": (lambda f: shards(f, "second.safetensors"), "unet/second.safetensors is missing"),
    "a shard elsewhere": (lambda f: shards(f, "../../other.safetensors"), "does not say which file beside it"),
    "an index that is cut": (lambda f: (shards(f), (f / f"{UNET}.index.json").write_text("{"))[0], "cannot be read"),
    "ids that are no numbers": (
        lambda f: edit_json(f / "tokenizer/vocab.json", a="1"),
        "tokenizer/vocab.json cannot be read (the id of the token 'a' is 1)",
    ),
    "prompts without end": (
        lambda f: edit_json(f / "tokenizer/tokenizer_config.json", model_max_length=10**30),
        "model_max_length = 1000000000000000000000000000000 is not allowed",
    ),
    "betas": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_start="small"),
        "beta_start is 'small'; only a number between 0 and 1 is supported",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_malformed_model(refused, tiny_model, tmp_path, name):
    harm, reason = MODELS[name]
    model = shutil.copytree(tiny_model, tmp_path / "model")
    harm(model)
    before = contents(model)
    line = refused(model=model)
    assert reason in line
    assert str(model) in line or "config.json: " in line
    assert contents(model) == before
    assert {file.name for file in refused.workdir.rglob("*")} <= {"manifest.json", ".lock"}


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


PROMPTS = {
    "empty.txt": (b"", "has no prompts"),
    "nul.txt": (b"a face\na \0face\n", "nul.txt is no text: line 2 has a NUL; save it in UTF-8"),
    "latin.txt": ("a café".encode("latin-1"), "latin.txt cannot be read as text"),
    "cut.txt": ("a face".encode("utf-16")[:-1], "cut.txt cannot be read as text"),
    "half.json": (
        b'["a face", "\\ud83d"]',
        "prompt 2 has a NUL or half a character and is no text; mend it: '\\ud83d'",
    ),
    "nul.jsonl": (b'{"prompt": "a\\u0000"}', "prompt 1 has a NUL"),
    "deep.json": (b"[" * 100_000, "deep.json is not valid JSON"),
    "long.csv": (b"prompt\n" + b"a" * 200_000, "long.csv is not valid CSV"),
    "none.csv": (b"text,n\na face,1\n", "is a table; name the column"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_that_cannot_be_read(refused, tmp_path, name):
    given, reason = PROMPTS[name]
    (tmp_path / name).write_bytes(given)
    line = refused(f"--config.prompts={tmp_path / name}")
    assert reason in line
    assert name in line
    assert not refused.workdir.exists()


def pair(down: tuple[int, ...], up: tuple[int, ...], layer: str = LAYER) -> dict[str, np.ndarray]:
    halves = {"A": np.zeros(down, np.float32), "B": np.zeros(up, np.float32)}
    return {f"{layer}.lora_{half}.weight": array for half, array in halves.items()}


TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
LORAS = {
    "another base model": (
        pair((4, 320), (320, 4)),
        "has down (4, 320) and up (320, 4) for a layer from 8 to 8 features",
    ),
    "two ranks": (pair((4, 8), (8, 2)), "has down (4, 8) and up (8, 2)"),
    "an unknown key": (pair((4, 8), (8, 4)) | {"more": np.zeros(1)}, "more belongs to no layer of the model"),
    "another network": (pair((4, 8), (8, 4), "transformer.blocks.0.to_q"), "is a LoRA for a diffusion transformer"),
    "half of a pair": ({f"{LAYER}.lora_A.weight": np.zeros((4, 8), np.float32)}, "to_q has no up matrix"),
    "no tensors": ({}, "it has no tensors"),
    "the text encoder": (pair((4, 8), (8, 4), TEXT), "adapts the text encoder too, which training does not change"),
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_that_does_not_fit(refused, tmp_path, name):
    tensors, reason = LORAS[name]
    save_file(tensors, tmp_path / "lora.safetensors")
    line = refused(f"--config.lora.start_from={tmp_path / 'lora.safetensors'}")
    assert reason in line
    assert str(tmp_path / "lora.safetensors") in line
    assert {file.name for file in refused.workdir.rglob("*")} <= {"manifest.json", ".lock"}


def test_a_file_of_another_kind_and_a_workdir_of_another_version(refused, tmp_path):
    save_file(pair((4, 8), (8, 4)), tmp_path / "lora.safetensors")
    assert "lora.safetensors has no UNet" in refused(f"--config.model={tmp_path / 'lora.safetensors'}")
    (refused.workdir / "manifest.json").write_text('{"version": 2, "runs": []}')
    (refused.workdir / "metrics.jsonl").write_text('{"epoch": 0}\n')
    before = contents(refused.workdir)
    assert "manifest.json is damaged" in refused()
    assert contents(refused.workdir) == before
