"""The meaning of the keys of a LoRA file in the layouts of all programs: key → (part of the model, layer, matrix).

A layout has a prefix, a spelling of layer names, and an ending. All three are tables here:

| program | key of the same matrix |
|---|---|
| diffusers, this package | `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight` |
| diffusers' training scripts | `unet.….to_q.lora.down.weight` |
| diffusers of 2023 | `unet.….attn1.processor.to_q_lora.down.weight`, also without `unet.` |
| PEFT | `base_model.model.….to_q.lora_A.weight`, or `.lora_A.default.weight` |
| kohya, LyCORIS | `lora_unet_mid_block_…_attn1_to_q.lora_down.weight` |
| kohya with LDM's names | `lora_unet_middle_block_1_…_attn1_to_q.lora_down.weight` |

Keys of the text encoder are `text_encoder.text_model.encoder.layers.0.self_attn.q_proj…` and `lora_te_text_model_…`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from nabla_gfn_jax.checkpoints.ldm_names import unet_names

UNET, TEXT_ENCODER = "unet", "text_encoder"  # the parts of a model that a LoRA may adapt
PEFT = "base_model.model."

_ENDING = re.compile(r"[._]lora(?:_linear_layer)?[._](?P<matrix>A|B|down|up|mid)(?:\.[\w-]+)?\.weight$")
_MATRIX = {"A": "down", "B": "up"}
_DOTTED = re.compile(r"^(?:base_model\.model\.|unet\.|text_encoder\.|(?:model\.)?diffusion_model\.)+")
_UNDERSCORED = {"lora_unet_": UNET, "lora_te_": TEXT_ENCODER, "lora_te1_": TEXT_ENCODER}
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # diffusers of 2023

# Other kinds of files that are often taken for such a LoRA, by a key that each kind has.
_ADVICE = "; merge it into a checkpoint with the program that made it, and use that checkpoint as --model"
_OTHER_KINDS = {
    r"\.hada_w": "a LoHa of LyCORIS, which is not a plain LoRA" + _ADVICE,
    r"\.lokr_w": "a LoKr of LyCORIS, which is not a plain LoRA" + _ADVICE,
    r"\.oft_|\.boft_": "an OFT of LyCORIS, which is not a plain LoRA" + _ADVICE,
    r"\.on_input$|\.ia3_": "an (IA)³, which is not a plain LoRA" + _ADVICE,
    r"dora_scale$|lora_magnitude_vector": "a DoRA, which is not a plain LoRA" + _ADVICE,
    r"\.lora_B\.(?:[\w-]+\.)?bias$": "a LoRA with biases (PEFT's lora_bias), which is not a plain LoRA" + _ADVICE,
    r"\.(?:diff|diff_b|w_norm|b_norm)$": "a file of differences of whole weights, which is not a plain LoRA" + _ADVICE,
    r"^lora_te2_|^text_encoder_2\.|^lora_unet_label_emb_": "a LoRA for Stable Diffusion XL; it needs that model",
    r"^transformer\.|^lora_transformer_|double_blocks|joint_blocks": "a LoRA for a diffusion transformer, not a UNet",
    r"^emb_params$|^string_to_param$|^clip_[lg]$": "a textual-inversion embedding, not a LoRA; it is not supported",
}


class Place(NamedTuple):
    """The meaning of a tensor: part of the model, layer, and matrix ("down", "up", "mid" or "alpha")."""

    part: str
    layer: str
    matrix: str


class LayerNames:
    """The layers of a model under all of their names."""

    def __init__(self, layers: Mapping[str, Iterable[str]]):
        """`layers` has the layers of each part of the model that may be adapted."""
        spelled = [(part, layer, name) for part in layers for layer, name in _spellings(part, layers[part])]
        self._dotted = {name: (part, layer) for part, layer, name in spelled}
        self._underscored = {(part, name.replace(".", "_")): (part, layer) for part, layer, name in spelled}

    def place(self, key: str) -> Place | None:
        """The meaning of the tensor `key`; None if it belongs to no layer or is not a tensor of a LoRA."""
        ending = _ENDING.search(key)
        if ending is not None:
            name, matrix = key[: ending.start()], _MATRIX.get(ending["matrix"], ending["matrix"])
        elif key.endswith(".alpha"):
            name, matrix = key.removesuffix(".alpha"), "alpha"
        else:
            return None
        prefix = next((p for p in _UNDERSCORED if name.startswith(p)), None)
        if prefix is not None:
            found = self._underscored.get((_UNDERSCORED[prefix], name.removeprefix(prefix)))
        else:
            found = self._dotted.get(_DOTTED.sub("", name))
        return found and Place(*found, matrix)


def kohya_name(layer: str) -> str:
    """The name of a layer of the UNet in kohya's layout."""
    return f"lora_unet_{layer.replace('.', '_')}"


def other_kind(keys: Iterable[str]) -> str | None:
    """The kind of a file with these keys if it is a known kind that is not supported, otherwise None."""
    found = list(keys)
    return next((kind for sign, kind in _OTHER_KINDS.items() if any(re.search(sign, key) for key in found)), None)


def _spellings(part: str, layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of each layer and each of its names, without prefixes."""
    if part == TEXT_ENCODER:
        for layer in layers:
            *modules, last = layer.split(".")
            for name in {last, _OLD_TEXT.get(last, last)}:
                yield layer, ".".join([*modules, name])
                yield layer, ".".join(["text_model", *modules, name])
        return
    ldm = unet_names(layers)
    for layer, old in ldm.items():
        yield layer, layer
        yield layer, old
        head, found, last = layer.rpartition(".to_")
        if found:
            yield layer, f"{head}.processor.to_{last.removesuffix('.0')}"
