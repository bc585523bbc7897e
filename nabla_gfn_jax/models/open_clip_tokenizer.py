"""OpenCLIP's tokenizer: CLIP's byte pairs, of text that is mended first."""

import html
from pathlib import Path

import ftfy
from tokenizers import normalizers

from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.tokenizer import END, START, CLIPTokenizer, make_encoder, read_vocabulary

_START, _END = "<start_of_text>", "<end_of_text>"  # OpenCLIP's own writing of them, which a prompt may hold
_PADDING = 0


def load_open_clip_tokenizer(folder: Path, max_length: int = 77) -> CLIPTokenizer:
    """From CLIP's `tokenizer.json`, or `vocab.json` and `merges.txt`. Raises `UserError` if they are damaged."""
    vocabulary, merges = read_vocabulary(folder)
    if not {START, END} <= vocabulary.keys():
        raise UserError(f"{folder}: the vocabulary lacks {START} or {END}; download the tokenizer again")
    vocabulary = vocabulary | {_START: vocabulary[START], _END: vocabulary[END]}
    del vocabulary[START], vocabulary[END]
    encoder = make_encoder(vocabulary, merges, [_START, _END])
    encoder.normalizer = normalizers.Sequence([])  # `_clean` has done it
    return CLIPTokenizer(encoder, max_length, _PADDING, _START, _END, _clean)


def _clean(text: str) -> str:
    """Broken Unicode and HTML entities (some escaped twice) mended, white space made single blanks, lower case."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
