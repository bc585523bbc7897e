"""OpenCLIP's tokenizer: CLIP's byte pairs, applied to cleaned text."""

import html
from pathlib import Path

import ftfy
from tokenizers import normalizers

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.tokenizer import END, START, CLIPTokenizer, make_encoder, read_vocabulary

_START, _END = "<start_of_text>", "<end_of_text>"  # OpenCLIP's spelling, which a prompt may contain
_PADDING = 0


def load_open_clip_tokenizer(folder: Path, max_length: int = 77) -> CLIPTokenizer:
    """The tokenizer from CLIP's `tokenizer.json`, or `vocab.json` and `merges.txt`. Raises `UserError` if damaged."""
    vocabulary, merges = read_vocabulary(folder)
    if not {START, END} <= vocabulary.keys():
        raise UserError(f"{folder}: the vocabulary lacks {START} or {END}; download the tokenizer again")
    vocabulary = vocabulary | {_START: vocabulary[START], _END: vocabulary[END]}
    del vocabulary[START], vocabulary[END]
    encoder = make_encoder(vocabulary, merges, [_START, _END])
    encoder.normalizer = normalizers.Sequence([])  # `_clean` normalises instead
    return CLIPTokenizer(encoder, max_length, _PADDING, _START, _END, _clean)


def _clean(text: str) -> str:
    """Repairs Unicode, unescapes HTML entities (also doubly escaped ones), collapses white space, and lowercases."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
