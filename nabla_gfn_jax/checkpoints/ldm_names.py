"""The names of Stable Diffusion's tensors in its original code (CompVis's latent diffusion, "LDM").

Single-file checkpoints and some LoRA files use these names. Here a name is that of a layer or a tensor, with dots. Our
own names are diffusers' names.
"""

import re
from collections.abc import Iterable

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>\w+)\.(?P<index>\d+)\.(?P<rest>.+)")


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's names by our names. `names` must have all layers or tensors of a UNet, because LDM numbers its blocks."""
    ours = list(names)
    blocks = [match for match in map(_BLOCK.match, ours) if match]
    layers = 1 + max(int(m["index"]) for m in blocks if m["side"] == "down" and m["kind"] == "resnets")
    attends = {m["level"] for m in blocks if m["side"] == "up" and m["kind"] == "attentions"}

    def renamed(name: str) -> str:
        match = _BLOCK.match(name)
        if match is None:
            return _replace(_replace(name, _UNET), _RESNET if ".resnets." in name else {})
        side, level, kind, rest = match["side"], match["level"], match["kind"], match["rest"]
        resampler = kind in ("downsamplers", "upsamplers")
        number = int(level) * (layers + 1) + (layers if resampler else int(match["index"]))
        if side == "down":
            rest = rest.replace("conv", "op", 1) if resampler else rest
            block, part = f"input_blocks.{number + 1}", int(kind == "attentions")
        else:  # an upsampler belongs to the block of the last layer
            block = f"output_blocks.{number}"
            part = 1 + (level in attends) if resampler else int(kind == "attentions")
        return f"{block}.{part}.{_replace(rest, _RESNET) if kind == 'resnets' else rest}"

    return {name: renamed(name) for name in ours}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's names by our names. `names` must have all tensors of a VAE."""
    ours = list(names)
    levels = 1 + max(int(match["level"]) for match in map(_BLOCK.search, ours) if match)

    def renamed(name: str) -> str:
        match = _BLOCK.search(name)
        if match is None:
            return _replace(name, _VAE)
        level, resampler = int(match["level"]), match["kind"] in ("downsamplers", "upsamplers")
        level = level if match["side"] == "down" else levels - 1 - level
        part = f"{match['side']}sample" if resampler else f"block.{match['index']}"
        return f"{name[: match.start()]}{match['side']}.{level}.{part}.{_replace(match['rest'], _VAE)}"

    return {name: renamed(name) for name in ours}


def _replace(name: str, table: dict[str, str]) -> str:
    """`name` with its parts replaced according to the table. Only whole words between dots are replaced."""
    for old, new in table.items():
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name
