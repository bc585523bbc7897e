"""DreamSim in PyTorch, for comparison and for writing its released files with random weights.

The package needs torchvision, whose wheels do not fit every build of PyTorch, and the network to load DINO's code. This
module was compared with version 0.2.1 of the package: with the same weights, the distances agree to 1e-6.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

CLIP_STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RANK, ALPHA = 4, 2.0


class Adapted(nn.Linear):
    """A linear layer with a LoRA that is not merged."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = nn.Linear(inputs, RANK, bias=False), nn.Linear(RANK, outputs, bias=False)

    def forward(self, x):
        return super().forward(x) + ALPHA / RANK * self.lora_B(self.lora_A(x))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, Adapted(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width, inner, quick):
        super().__init__()
        self.fc1, self.fc2, self.quick = nn.Linear(width, inner), nn.Linear(inner, width), quick

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))
        self.attn = Attention(c.hidden_size, c.num_attention_heads)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size, c.hidden_act == "quick_gelu")

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """A vision transformer in DINO's layout. With an `embed_dim` it has CLIP's norms and projection."""

    def __init__(self, config):
        super().__init__()
        c = config.vision
        self.is_clip = config.embed_dim is not None
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.tokens, c.hidden_size))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        if self.is_clip:
            self.pos_drop = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
            self.proj = nn.Parameter(torch.zeros(c.hidden_size, config.embed_dim))

    def forward(self, images):
        mean, std = (
            torch.tensor(s).reshape(1, 3, 1, 1) for s in (CLIP_STATISTICS if self.is_clip else IMAGENET_STATISTICS)
        )
        patches = self.patch_embed.proj((images - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        x = self.pos_drop(x) if self.is_clip else x
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]) @ self.proj if self.is_clip else x[:, 0]


class DreamSim(nn.Module):
    """Images in [0, 1] (B, 3, height, width) → embeddings; random weights, for which every part matters."""

    def __init__(self, variant, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.variant = variant
        self.towers = nn.ModuleList(Tower(branch) for branch in variant.branches)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                vector = parameter.ndim == 1 or parameter.shape[0] == 1  # biases, norms, tokens
                centre = float(parameter.ndim == 1 and name.endswith("weight"))  # of the norms' scales
                scale = 0.2 if vector else 1.5 * parameter[0].numel() ** -0.5
                parameter.copy_(centre + scale * torch.randn(parameter.shape))
        self.eval()

    def forward(self, images):
        x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        features = torch.cat([tower(x) for tower in self.towers], 1)
        features = features - features.mean(1, keepdim=True)
        return features / features.norm(dim=1, keepdim=True)

    def save(self, folder):
        """Writes the files as they are published, and returns those of the branches, the LoRA's config and the LoRA."""
        lora, files = {}, []
        for number, (tower, name) in enumerate(zip(self.towers, self.variant.files, strict=True)):
            state = {}
            for key, tensor in tower.state_dict().items():
                if ".lora_" in key:
                    lora[f"base_model.model.extractor_list.{number}.model.{key}"] = tensor.contiguous()
                else:
                    state[key] = tensor
            torch.save({"state_dict": state} if tower.is_clip else state, folder / name)
            files.append(folder / name)
        (folder / self.variant.lora).mkdir(exist_ok=True)
        config, adapter = (folder / self.variant.lora / n for n in ("adapter_config.json", "adapter_model.safetensors"))
        config.write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "target_modules": ["qkv"], "bias": "none"}))
        save_file(lora, adapter)
        return files, config, adapter
