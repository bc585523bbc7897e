"""The emoji run in both programs, with the same model, LoRA, correction network, reward and transitions."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import torch
from efficientnet_oracle import LITE0, oracle_of
from peft import LoraConfig
from safetensors.numpy import load_file

from nabla_gfn_jax.base_models.names import SHIPPED_MODELS
from nabla_gfn_jax.checkpoints.lora_file import save_lora
from nabla_gfn_jax.checkpoints.torch_layout import to_state_dict
from nabla_gfn_jax.command_line import load_settings
from nabla_gfn_jax.compilation import use_compilation_cache
from nabla_gfn_jax.parallel import use_cpu_cores
from nabla_gfn_jax.rewards.emoji import DATA
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import build, prompts_of
from nabla_gfn_jax.training.loop import sample_keys
from nabla_gfn_jax.training.prompts import PromptIds
from nabla_gfn_jax.training.state import TrainState


class Ours:
    """The parts of a run of `configs/emoji.py` with the paper's credit, and the transitions of one epoch."""

    def __init__(self) -> None:
        use_compilation_cache()
        fields = {"algorithm.credit": "lookahead", "training.updates_per_epoch": 1}
        self.config = load_settings(Settings, "emoji", fields)
        use_cpu_cores(self.config.training.trajectories // self.config.training.micro_batches)
        self.trainer, self.texts = build(self.config), prompts_of(self.config)
        self.ids = PromptIds(len(self.texts))
        self.keys = sample_keys(jax.random.key(0), 0, self.config.training.trajectories)
        state = self.trainer.first_state(0, self.config.lora.rank)
        rng = np.random.default_rng(0)  # neither LoRA nor g_φ zero: nothing drops out
        params = jax.tree.map(lambda a: a + rng.normal(0, 0.01, a.shape).astype(np.float32), state.params)
        self.state = TrainState(params=params, optimizer=state.optimizer, step=state.step)

    def data(self) -> Any:
        """The training data of the update."""
        ids = self.ids.chosen(self.keys)
        return self.trainer.rollout(self.trainer.frozen, self.state.params, self.keys, ids).data


class Theirs:
    """diffusers and peft with the same weights."""

    def __init__(self, ours: Ours) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        diffusers.utils.logging.disable_progress_bar()
        folder = SHIPPED_MODELS["emoji"]
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = diffusers.DDIMScheduler.from_config(self.pipe.scheduler.config)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder):
            part.requires_grad_(False)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        rank = ours.config.lora.rank
        self.pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        with tempfile.TemporaryDirectory() as made:
            save_lora(Path(made) / "lora.safetensors", ours.state.params["lora"])
            tensors = load_file(Path(made) / "lora.safetensors")
        own = dict(self.pipe.unet.named_parameters())
        for name, tensor in tensors.items():
            own[name.removeprefix("unet.").replace(".weight", ".default.weight")].data = torch.tensor(tensor)
        self.lora = [p for p in self.pipe.unet.parameters() if p.requires_grad]
        flow, u = ours.config.correction, self.pipe.unet.config
        levels = len(flow.block_out_channels)
        self.correction = diffusers.UNet2DConditionModel(
            sample_size=u.sample_size,
            in_channels=u.in_channels,
            out_channels=u.in_channels,
            cross_attention_dim=u.cross_attention_dim,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            up_block_types=("CrossAttnUpBlock2D",) * levels,
            **dataclasses.asdict(flow),
        )
        state = to_state_dict(ours.state.params["correction"])
        self.correction.load_state_dict({name: torch.tensor(np.array(a)) for name, a in state.items()})
        self.network = oracle_of("lite0", LITE0).requires_grad_(False)
        head = load_file(DATA / "valence.safetensors")
        self.kernel, self.bias = (torch.tensor(head[name].astype(np.float32)) for name in ("kernel", "bias"))

    def log_reward(self, z: torch.Tensor) -> torch.Tensor:
        """log R of latents (B, channels, height, width), as in `rewards.emoji.valence`."""
        vae = self.pipe.vae
        images = (0.5 * vae.decode(z / vae.config.scaling_factor).sample + 0.5).clamp(0, 1)
        return torch.tanh((self.network.layout(images) @ self.kernel + self.bias)[:, 0])
