"""The networks of diffusers and transformers with our weights, combined as in the released program."""

from dataclasses import asdict
from typing import Any

import jax
import numpy as np
import torch
from reward_oracle import _OPEN_CLIP, rename

from benchmarks import naive_loss
from benchmarks.accelerator.sizes import Size
from benchmarks.naive_loss import Batch, Networks
from nabla_gfn_jax.algorithms.transitions import Transition
from nabla_gfn_jax.checkpoints.torch_layout import torch_name
from nabla_gfn_jax.diffusion.chain import Chain
from nabla_gfn_jax.settings import Settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def unet(size: Size, params: Any, dtype: torch.dtype, **fields: Any) -> torch.nn.Module:
    """Stable Diffusion's UNet, or the correction network with other `fields`."""
    import diffusers

    with DEVICE:
        model = diffusers.UNet2DConditionModel(**size.fields("unet") | fields)
    return _load(model, _state(params)).to(dtype)


def vae(size: Size, params: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The VAE, encoder and decoder."""
    import diffusers

    with DEVICE:
        model = diffusers.AutoencoderKL(**size.fields("vae"))
    return _load(model, _state(params)).to(dtype)


def tower(size: Size, params: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The reward's image tower from transformers."""
    import transformers

    vision = {**vars(size.clip.vision), "projection_dim": size.clip.embed_dim}
    with DEVICE:
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**vision))
    ours = _state({"visual": params})
    state = {}
    for name in model.state_dict():
        if "position_ids" in name:
            continue
        theirs = rename(name if name.startswith("vi") else f"vision_model.{name}", _OPEN_CLIP)
        for i, part in enumerate("qkv"):
            before = f"self_attn.{part}_proj."
            if before in theirs:
                joined = ours[theirs.replace(before, "attn.in_proj_")]
                state[name] = joined.chunk(3)[i]
        if name not in state:
            state[name] = ours[theirs].T if name == "visual_projection.weight" else ours[theirs]
    return _load(model, state).to(dtype)


def _state(params: Any) -> dict[str, torch.Tensor]:
    """The parameters by PyTorch's names and in its axes, float32, on the device."""
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(key.key) for key in path]
        tensor = torch.from_numpy(np.asarray(leaf, np.float32)).to(DEVICE)
        if names[-1] == "kernel":
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
        state[torch_name(names)] = tensor
    return state


def _load(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    own = model.state_dict()
    model.load_state_dict({name: a.reshape(own[name].shape) if name in own else a for name, a in state.items()})
    return model.eval().requires_grad_(False)


def add_lora(model: Any, lora: Any, rank: int) -> list[torch.nn.Parameter]:
    """Adds the LoRA, in float32, to `model`. Returns the trained parameters."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    own, trained = dict(model.named_parameters()), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(lora):
        *modules, part = (str(key.key) for key in path)
        parameter = own[f"{'.'.join(modules)}.lora_{'A' if part == 'down' else 'B'}.default.weight"]
        parameter.data = torch.from_numpy(np.ascontiguousarray(np.asarray(leaf).T)).to(DEVICE, torch.float32)
        trained.append(parameter.requires_grad_())
    return trained


class Program:
    """The networks of a transition step: UNet and VAE in `dtype`, reward, LoRA and correction in float32."""

    def __init__(self, size: Size, config: Settings, frozen: Any, params: Any, dtype: torch.dtype):
        self.dtype, self.guidance, base = dtype, config.sampling.guidance, frozen["base"]
        self.unet, self.vae = unet(size, base["unet"], dtype), vae(size, base["vae"], dtype)
        self.tower = tower(size, frozen["reward"], torch.float32)
        self.trained = add_lora(self.unet, params["lora"], config.lora.rank)
        levels = len(config.correction.block_out_channels)
        fields = {
            "down_block_types": ("CrossAttnDownBlock2D",) * levels,
            "up_block_types": ("CrossAttnUpBlock2D",) * levels,
            **asdict(config.correction),
        }
        self.correction = unet(size, params["correction"], torch.float32, **fields).requires_grad_()
        self.networks = Networks(self._predict, self._log_reward, self._correction)
        self.size = size.clip.vision.image_size

    def _predict(self, x: torch.Tensor, t: torch.Tensor, c: Batch, base: bool) -> torch.Tensor:
        (self.unet.disable_adapters if base else self.unet.enable_adapters)()
        context = torch.cat([c["negative"], c["context"]]).to(self.dtype)
        output = self.unet(torch.cat([x, x]).to(self.dtype), torch.cat([t, t]), context).sample.float()
        without, with_prompt = output.chunk(2)
        return without + self.guidance * (with_prompt - without)

    def _log_reward(self, z: torch.Tensor, c: Batch) -> torch.Tensor:
        decoded = self.vae.decode(z.to(self.dtype) / self.vae.config.scaling_factor).sample.float()
        images = (0.5 * decoded + 0.5).clamp(0, 1)
        images = torch.nn.functional.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        shift, scale = (images.new_tensor(values).reshape(1, 3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
        features = self.tower(pixel_values=(images - shift) / scale).image_embeds
        return (torch.nn.functional.normalize(features, dim=-1) * c["reward"]).sum(-1)

    def _correction(self, x: torch.Tensor, t: torch.Tensor, c: Batch) -> torch.Tensor:
        return self.correction(x, t, c["context"].float()).sample


def batch_of(transition: Transition, chain: Chain, table: Any, count: int) -> Batch:
    """The first `count` transitions, with one leading axis and the features of their prompts, on the device."""
    few = jax.tree.map(lambda a: a[:count], transition)
    found = naive_loss.batch_of(few, chain, table["base"])
    found["reward"] = torch.from_numpy(np.asarray(table["reward"], np.float32)[few.prompt_id])
    return {name: a.to(DEVICE) for name, a in found.items()}


def use_tf32(on: bool) -> None:
    """Sets whether float32 products round their operands."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on


def wait() -> None:
    """Waits until the device has finished."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
