"""The paper's three configs at Stable Diffusion 1.5's true size, random weights, from files in their released layouts.

A diffusers folder in float16 (860 M UNet, VAE, CLIP text encoder), CLIP ViT-L/14 with LAION's head, HPS_v2.1's and
ImageReward's checkpoints are written; then, as a user does it, `train` loads them, samples 2 steps, makes one update
and saves, and `sample` draws with the LoRA that was saved. One trajectory at a time, 512x512 pixels, bfloat16.

`pytest -m slow tests/test_sd15_end_to_end.py -s` on two cores shared with other work: MEASURED
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch_oracle import CAPTIONS

from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION
from nabla_gfn_jax.models.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[1] / "configs"
WORDS = 2000  # of a tokenizer trained here; the text encoder's table has its true 49408 rows
