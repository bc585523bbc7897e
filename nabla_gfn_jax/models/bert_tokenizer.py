"""BERT's uncased WordPiece tokenizer with the two tokens that BLIP adds (Devlin et al. 2019; Li et al. 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from nabla_gfn_jax.checkpoints.files import read_json
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.models.tokenizer import check_vocabulary

_PADDING, _UNKNOWN, _START, _END, _MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_ADDED = ("[DEC]", "[ENC]")  # the next ids after BERT's


@dataclass(frozen=True)
class BertTokenizer:
    """Prompts → token ids (B, max_length): [CLS], text, [SEP], padding. Long text is truncated before [SEP]."""

    encoder: Tokenizer
    max_length: int

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[np.ndarray, "batch tokens"], Bool[np.ndarray, "batch tokens"]]:
        """The token ids, and a mask that is False for padding."""
        start, end, padding = (self.encoder.token_to_id(token) for token in (_START, _END, _PADDING))
        ids = np.full((len(prompts), self.max_length), padding, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, encoding in enumerate(self.encoder.encode_batch(list(prompts), add_special_tokens=False)):
            text = np.asarray([start, *encoding.ids[: self.max_length - 2], end], np.int32)
            ids[row, : len(text)] = text
            mask[row, : len(text)] = True
        return ids, mask


def load_bert_tokenizer(file: Path, max_length: int) -> BertTokenizer:
    """The tokenizer from bert-base-uncased's `vocab.txt` or `tokenizer.json`. Raises `UserError` if it is damaged."""
    vocabulary = _read_vocabulary(file)
    special = (_PADDING, _UNKNOWN, _START, _END, _MASK)
    if not all(token in vocabulary for token in special):
        raise UserError(f"{file} lacks one of {', '.join(special)}; download bert-base-uncased's vocab.txt again")
    encoder = Tokenizer(models.WordPiece(vocabulary, unk_token=_UNKNOWN, max_input_chars_per_word=100))
    encoder.normalizer = normalizers.BertNormalizer(lowercase=True)
    encoder.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    encoder.add_special_tokens([*special, *_ADDED])
    return BertTokenizer(encoder, max_length)


def _read_vocabulary(file: Path) -> dict[str, int]:
    try:
        if file.suffix == ".json":
            return check_vocabulary(read_json(file)["model"]["vocab"])
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return {token.removesuffix("\r"): number for number, token in enumerate(lines)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download bert-base-uncased's vocab.txt again") from error
