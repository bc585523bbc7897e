"""Samples and trains a model of a few thousand parameters with the installed jax and flax, without PyTorch.

`python tests/smoke.py`, in CI with the newest pair; the tests themselves run with the oldest.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # before any JAX operation, of which making the model is the first

import flax
import jax
from tiny_run import brightness, flags, make_model

from nabla_gfn_jax import sample, train
from nabla_gfn_jax.rewards import REWARDS

if __name__ == "__main__":
    REWARDS["1.0"] = lambda: brightness(1.0)
    with tempfile.TemporaryDirectory() as name:
        model, workdir = Path(name) / "model", Path(name) / "run"
        make_model(model)
        for epochs in (1, 2):  # begun, and resumed
            few = [flag for flag in flags(model, workdir) if "num_epochs" not in flag]
            train.main(["train", *few, f"--config.training.num_epochs={epochs}"])
        (lora,) = sorted(workdir.rglob("diffusers.safetensors"))[-1:]
        pictures = [Path(name) / f"{n}.png" for n in ("base", "finetuned")]
        for file, more in zip(pictures, ([], [f"--lora={lora}"]), strict=True):
            sample.main(["sample", f"--model={model}", "--num=4", "--steps=4", f"--out={file}", *more])
        if pictures[0].read_bytes() == pictures[1].read_bytes():
            sys.exit("the LoRA changes no pixel")
    print(f"sampled, trained and resumed with jax {jax.__version__}, flax {flax.__version__}, Python {sys.version[:6]}")
