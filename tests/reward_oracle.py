"""transformers' CLIP and BLIP at small sizes, saved in the layouts of OpenCLIP's and ImageReward's files."""

import re
from itertools import pairwise
from pathlib import Path

import torch
import transformers

from nabla_gfn_jax.models.clip import CLIPTextConfig
from nabla_gfn_jax.models.open_clip import OpenCLIPConfig
from nabla_gfn_jax.models.vision_transformer import VisionConfig

transformers.utils.logging.disable_progress_bar()

VOCABULARY = 600
CLIP = OpenCLIPConfig(
    embed_dim=20,
    vision=VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=42
    ),
    text=CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        hidden_act="gelu",
    ),
)
BLIP = VisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=16,
    image_size=48,
    layer_norm_eps=1e-6,
)
MED = {
    "hidden_act": "gelu",
    "hidden_size": 36,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "vocab_size": 200,
    "encoder_width": 7,  # the released file states another width than the image encoder's, too
    "add_cross_attention": True,
}
PROMPTS = [
    "a cat",
    "a frog with heart eyes, " * 40,  # beyond the 77 tokens, and the 35
    "Ünïcödé 猫 😀 ½ İstanbul",
    "",
]
_MEAN, _STD = (
    torch.tensor(values).reshape(1, 3, 1, 1)
    for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, (height, width), mode="bicubic", antialias=True)


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - _MEAN) / _STD


def rename(name: str, table: dict[str, str]) -> str:
    """The name with all patterns of the table replaced, in order."""
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


def make_random(model: torch.nn.Module, seed: int) -> None:
    """Random weights, large enough that every part of the model affects its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 and "embedding" not in name else 4
            scale = 0.2 if parameter.ndim == 1 else fan_in**-0.5
            centre = 1.0 if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + scale * noise)


_OPEN_CLIP = {
    r"^text_model\.final_layer_norm": "ln_final",
    r"^text_model\.embeddings\.token_embedding": "token_embedding",
    r"^text_model\.embeddings\.position_embedding\.weight": "positional_embedding",
    r"^text_projection\.weight": "text_projection",
    r"^vision_model\.embeddings\.class_embedding": "visual.class_embedding",
    r"^vision_model\.embeddings\.patch_embedding": "visual.conv1",
    r"^vision_model\.embeddings\.position_embedding\.weight": "visual.positional_embedding",
    r"^vision_model\.pre_layrnorm": "visual.ln_pre",
    r"^vision_model\.post_layernorm": "visual.ln_post",
    r"^visual_projection\.weight": "visual.proj",
    r"^text_model\.encoder\.layers": "transformer.resblocks",
    r"^vision_model\.encoder\.layers": "visual.transformer.resblocks",
    r"self_attn\.out_proj": "attn.out_proj",
    r"layer_norm": "ln_",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}
_IMAGE_REWARD = {
    r"^vision_model\.embeddings\.class_embedding": "blip.visual_encoder.cls_token",
    r"^vision_model\.embeddings\.position_embedding": "blip.visual_encoder.pos_embed",
    r"^vision_model\.embeddings\.patch_embedding": "blip.visual_encoder.patch_embed.proj",
    r"^vision_model\.post_layernorm": "blip.visual_encoder.norm",
    r"^vision_model\.encoder\.layers": "blip.visual_encoder.blocks",
    r"self_attn\.projection": "attn.proj",
    r"self_attn": "attn",
    r"layer_norm": "norm",
    r"^text_encoder": "blip.text_encoder",
}


class HPS(torch.nn.Module):
    """transformers' CLIP with HPS's score."""

    def __init__(self, config: OpenCLIPConfig = CLIP):
        super().__init__()
        self.size = config.vision.image_size
        text, vision = ({k: v for k, v in vars(c).items()} for c in (config.text, config.vision))
        self.clip = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=text | {"bos_token_id": 0, "eos_token_id": 2},
                vision_config=vision,
                projection_dim=config.embed_dim,
            )
        ).eval()
        make_random(self.clip, 0)

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        size = self.size
        scale = size / max(height, width)
        images = resized(images, round(scale * height), round(scale * width))
        rows, columns = (size - n for n in images.shape[2:])
        black = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        images = normalised(torch.nn.functional.pad(images, black))
        output = self.clip(pixel_values=images, input_ids=ids)
        return (output.image_embeds * output.text_embeds).sum(-1)

    def save(self, file: Path, dtype: torch.dtype = torch.float32) -> None:
        """Saves the weights as OpenCLIP's own training does."""
        state = {}
        for name, tensor in self.clip.state_dict().items():
            if ".self_attn.q_proj." in name:
                parts = [self.clip.state_dict()[name.replace("q_proj", f"{n}_proj")] for n in "qkv"]
                joined = rename(name, _OPEN_CLIP).replace("self_attn.q_proj.", "attn.in_proj_")
                state[joined] = torch.cat(parts)
            elif not re.search(r"self_attn\.[kv]_proj|position_ids", name):
                state[rename(name, _OPEN_CLIP)] = tensor.T if name.endswith("projection.weight") else tensor
        torch.save({"epoch": 1, "state_dict": {name: tensor.to(dtype) for name, tensor in state.items()}}, file)


class ImageReward(torch.nn.Module):
    """transformers' BLIP with ImageReward's head."""

    def __init__(self, vision_config: VisionConfig = BLIP, med: dict = MED):
        super().__init__()
        self.size = vision_config.image_size
        vision = {k: v for k, v in vars(vision_config).items()}
        self.vision_model = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision)).eval()
        text = transformers.BlipTextConfig(
            **med | {"encoder_hidden_size": vision_config.hidden_size, "is_decoder": True}
        )
        self.text_encoder = transformers.models.blip.modeling_blip_text.BlipTextModel(text, add_pooling_layer=False)
        widths = (med["hidden_size"], 1024, 128, 64, 16, 1)
        dense = [torch.nn.Linear(a, b) for a, b in pairwise(widths)]
        dropout = [torch.nn.Dropout(p) for p in (0.2, 0.2, 0.1)]
        layers = [dense[0], dropout[0], dense[1], dropout[1], dense[2], dropout[2], *dense[3:]]
        self.mlp = torch.nn.ModuleDict({"layers": torch.nn.Sequential(*layers)})
        make_random(self, 1)
        self.eval()

    def forward(self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        size, shorter = self.size, min(images.shape[2:])
        images = resized(images, int(size * height / shorter), int(size * width / shorter))
        top, left = (round((n - size) / 2) for n in images.shape[2:])
        tokens = self.vision_model(normalised(images)[:, :, top : top + size, left : left + size]).last_hidden_state
        output = self.text_encoder(ids, attention_mask=mask, encoder_hidden_states=tokens, is_decoder=False)
        score = self.mlp["layers"](output.last_hidden_state[:, 0])[:, 0]
        return (score - 0.16717362830052426) / 1.0333394966054072

    def save(self, file: Path) -> None:
        """Saves the weights as the released program, with the buffer and the two projections that no score uses."""
        state = {rename(name, _IMAGE_REWARD): tensor for name, tensor in self.state_dict().items()}
        state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
        state |= {
            "blip.vision_proj.weight": torch.zeros(256, 7),
            "blip.text_proj.bias": torch.zeros(256),
        }
        torch.save(state, file)
