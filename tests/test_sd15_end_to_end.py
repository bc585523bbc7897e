"""The paper's three configs at Stable Diffusion 1.5's true size, random weights, from files in their released layouts.

A diffusers folder in float16 (860 M UNet, VAE, CLIP text encoder), CLIP ViT-L/14 with LAION's head, HPS_v2.1's and
ImageReward's checkpoints are written; then, as a user does it, `train` loads them, samples 2 steps, makes one update
and saves, and `sample` draws with the LoRA that was saved. One trajectory, in float32. Every weight has its true shape;
images have 256 pixels a side, since at 512 the update wants 106 GiB of a CPU, whose compiler neither fuses attention
nor orders the program by memory. The flag below makes it order.

`pytest -n 0 -m slow tests/test_sd15_end_to_end.py -k hps -s`, one at a time with nothing else in memory, on two cores
and 24 GB, compiling included (the first beside other work on the cores):

| | train | its peak | sample |
|---|---|---|---|
| aesthetic, the paper's lookahead | 954 s | 20.8 GiB | 38 s |
| hps:forward_only | 397 s | 16.2 GiB | 34 s |
| image_reward:fast | 379 s | 14.4 GiB | 36 s |

HPS and ImageReward with the lookahead were killed on that machine for want of memory. Loading the folder into float32
takes 1.05 times the weights.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import reward_oracle
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file
from test_aesthetic import Aesthetic
from torch_oracle import CAPTIONS

from nabla_gfn_jax.emoji.byte_pairs import train_tokenizer
from nabla_gfn_jax.models.blip import VIT_L_16
from nabla_gfn_jax.models.clip_vision import VIT_L_14, VIT_L_14_DIM
from nabla_gfn_jax.models.open_clip import VIT_H_14

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[1] / "configs"
IMAGE = 256  # pixels
BY_MEMORY = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
WORDS = 600  # of a tokenizer trained here; the networks' tables have all their rows
# The released file's fields.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
MED = reward_oracle.MED | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 30524,
    "encoder_width": 768,
}


def write_aesthetic(folder: Path) -> None:
    _, head = Aesthetic(VIT_L_14, VIT_L_14_DIM).save(folder)
    head.rename(folder / "aesthetic-model.pth")


def write_hps(folder: Path) -> None:
    reward_oracle.HPS(VIT_H_14).save(folder / "HPS_v2.1_compressed.pt", torch.float16)
    train_tokenizer(CAPTIONS, folder, WORDS, 77)
    fast = transformers.CLIPTokenizer.from_pretrained(folder)
    fast.save_pretrained(folder)


def write_image_reward(folder: Path) -> None:
    reward_oracle.ImageReward(VIT_L_16, MED).save(folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.", "a", "cat"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]) + "\n")


def write_model(folder: Path) -> None:
    """A diffusers folder of Stable Diffusion 1.5's sizes, by diffusers' and transformers' own classes."""
    train_tokenizer(CAPTIONS, folder / "words", WORDS, 77)
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    blocks = (128, 256, 512, 512)
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=blocks,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        unet=diffusers.UNet2DConditionModel(sample_size=IMAGE // 8, cross_attention_dim=768),
        scheduler=diffusers.PNDMScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in pipe.vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in pipe.text_encoder.parameters()) == 123_060_480
    pipe.to(torch.float16).save_pretrained(folder / "model")
    (folder / "model/scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))


WRITERS = {"model": write_model, "aesthetic": write_aesthetic, "hps": write_hps, "image_reward": write_image_reward}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A diffusers folder of Stable Diffusion 1.5's sizes."""
    folder = tmp_path_factory.mktemp("sd15")
    write("model", folder)
    return folder / "model"


def write(name: str, folder: Path) -> None:
    """Writes in a separate process, so that its memory is freed."""
    subprocess.run([sys.executable, __file__, name, str(folder)], check=True)


def run(command: str, *flags: str, **environment: str) -> str:
    """Runs a command in a separate process and prints its time and peak memory."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-m", f"nabla_gfn_jax.{command}", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": BY_MEMORY} | environment,
    )
    assert done.returncode == 0, done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\n{command} {flags[0]}: {time.time() - start:.0f} s, peak of all so far {peak:.1f} GiB")
    return done.stdout


LOAD = """
import re, sys
from pathlib import Path
import jax
from nabla_gfn_jax.base_models.diffusers_folder import load_folder
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
jax.block_until_ready(jax.numpy.zeros(8) + 1)
before = peak()
model = jax.block_until_ready(load_folder(Path(sys.argv[1])).params)
print((peak() - before) / sum(a.nbytes for a in jax.tree.leaves(model)))
"""


def test_loading_takes_the_memory_of_the_weights(model):
    """Loads float32 parameters from float16 files."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(model)], capture_output=True, text=True, check=True)
    print(f"\nloading: {float(done.stdout):.2f} times the weights")
    assert 1.0 <= float(done.stdout) < 1.3


@pytest.mark.parametrize(("name", "variant"), [("aesthetic", ""), ("hps", "forward_only"), ("image_reward", "fast")])
def test_from_files_to_a_lora_that_draws(name, variant, model, tmp_path):
    weights = tmp_path / "weights"
    (weights / name).mkdir(parents=True)
    write(name, weights / name)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    fields = {
        "model": model,
        "prompts": tmp_path / "prompts.txt",
        "model_dtype": "float32",
        "sampling.num_steps": 2,
        "algorithm.transition_fraction": 0.5,
        "training.trajectories": 1,
        "training.micro_batches": 1,
        "training.num_epochs": 1,
    }
    run(
        "train",
        f"--config={CONFIGS / name}.py{':' if variant else ''}{variant}",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{field}={value}" for field, value in fields.items()),
        NABLA_GFN_JAX_WEIGHTS=str(weights),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["updates"]) for row in rows] == [(0, 0), (0, 1), (1, 1)]
    assert all(value is not None for row in rows for value in row.values())  # what is not finite is null
    for term in ("loss_forward", "grad_norm_lora"):
        assert rows[1][term] > 0, term
    for term in ("loss_reverse", "grad_norm_correction"):
        assert (rows[1][term] > 0) == (variant == ""), term
    lora = load_file(tmp_path / "run/lora/00001/diffusers.safetensors")
    assert len(lora) == 256
    assert max(np.abs(a).max() for key, a in lora.items() if "lora_B" in key) > 1e-4  # one AdamW step

    out = tmp_path / "cat.png"
    drawing = ("--num=1", "--steps=2", "--prompt=a cat", f"--out={out}")
    run("sample", f"--model={model}", f"--lora={tmp_path / 'run/lora/00001/kohya.safetensors'}", *drawing)
    with Image.open(out) as image:
        assert min(image.size) >= IMAGE


if __name__ == "__main__":
    torch.manual_seed(0)
    WRITERS[sys.argv[1]](Path(sys.argv[2]))
