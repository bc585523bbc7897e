"""CLIP's byte-pair tokenizer, from the files of a diffusers folder."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from nabla_gfn_jax.checkpoints.files import read_json
from nabla_gfn_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
READER = "the text encoder"
_SHORTEST, _LONGEST = 3, 4096  # tokens of a prompt
_LARGEST_ID = 2**24
# Contractions, runs of letters, single digits, runs of other characters (released files of Radford et al. 2021).
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class CLIPTokenizer:
    """Prompts → token ids (B, max_length): start, text, end, padding. Long text is truncated before the end token."""

    encoder: Tokenizer
    max_length: int
    padding_id: int
    start: str = START
    end: str = END
    clean: Callable[[str], str] = str  # is applied to a prompt before `encoder`
    reader: str = ""  # the network's name in the note about truncated prompts; "": no note

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "batch tokens"]:
        start, end = self.encoder.token_to_id(self.start), self.encoder.token_to_id(self.end)
        ids = np.full((len(prompts), self.max_length), self.padding_id, np.int32)
        texts = [self.clean(prompt) for prompt in prompts]
        encodings = self.encoder.encode_batch(texts, add_special_tokens=False)
        cut = [p for p, e in zip(prompts, encodings, strict=True) if len(e.ids) > self.max_length - 2]
        if cut and self.reader:
            which = f"{len(cut)} of {len(prompts)} prompts have more than {self.max_length} tokens"
            rest = f"{self.reader} reads only the first {self.max_length}. The first such prompt: {cut[0][:60]}…"
            logging.getLogger(__name__).warning("%s; %s", which, rest)
        for row, encoding in enumerate(encodings):
            text = np.asarray([start, *encoding.ids[: self.max_length - 2], end], np.int32)
            ids[row, : len(text)] = text
        return ids


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a diffusers model's `tokenizer` folder. Raises `UserError` naming a missing or damaged file."""
    settings = read_json(folder / "tokenizer_config.json")
    older = folder / "special_tokens_map.json"
    if older.is_file() and "added_tokens_decoder" not in settings:  # the older file then takes precedence
        settings |= read_json(older)
    padding: Any = settings.get("pad_token", END)
    padding = padding.get("content") if isinstance(padding, dict) else padding
    length = settings.get("model_max_length", 77)
    if type(length) is not int or not _SHORTEST <= length <= _LONGEST:
        raise UserError(
            f"{folder}/tokenizer_config.json: model_max_length = {str(length)[:40]} is not allowed; it must be a whole "
            f"number from {_SHORTEST} to {_LONGEST}"
        )
    vocabulary, merges = read_vocabulary(folder)
    if not all(isinstance(token, str) and token in vocabulary for token in (START, END, padding)):
        raise UserError(f"{folder}: the vocabulary lacks {START}, {END} or {padding}; download the model again")
    return CLIPTokenizer(make_encoder(vocabulary, merges, [START, END]), length, vocabulary[padding], reader=READER)


def make_encoder(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    """A tokenizer from text to ids of byte pairs.

    The two `special` tokens, start and end, may also occur in the text.
    """
    encoder = text_pipeline(models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END, unk_token=special[1]))
    encoder.add_special_tokens(special)
    return encoder


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of tokens and the merges, from `tokenizer.json` or from `vocab.json` and `merges.txt`.

    transformers 5 writes only `tokenizer.json`. Raises `UserError` naming a missing or damaged file.
    """
    file, *others = vocabulary_files(folder)
    try:
        if not others:
            model = read_json(file)["model"]
            vocabulary, pairs = check_vocabulary(model["vocab"]), model["merges"]
        else:
            vocabulary = check_vocabulary(read_json(file))
            (file,) = others
            lines = file.read_text(encoding="utf-8").splitlines()
            pairs = [line for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in (p.split(" ") if isinstance(p, str) else p for p in pairs)]
        # CLIP's released merges.txt has more lines than its vocabulary uses.
        used = [pair for pair in merges if "".join(pair) in vocabulary]
        unknown = next((token for pair in used for token in pair if token not in vocabulary), None)
        if unknown is not None:
            raise ValueError(f"it merges {unknown!r}, which is no token")
        return vocabulary, used
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download the model again") from error


def check_vocabulary(found: Any) -> dict[str, int]:
    """`found` if it has the ids of tokens. Raises `ValueError` if not."""
    if not isinstance(found, dict):
        raise ValueError("the vocabulary is no JSON object")
    for token, number in found.items():
        if type(number) is not int or not 0 <= number < _LARGEST_ID or not _is_text(token):
            raise ValueError(f"the id of the token {token!r} is {str(number)[:40]}")
    return found


def _is_text(token: str) -> bool:
    """Whether the text can be encoded. JSON can write halves of characters (surrogates), which cannot."""
    return not any("\ud800" <= c <= "\udfff" for c in token)


def vocabulary_files(folder: Path) -> tuple[Path, ...]:
    """The files that `read_vocabulary` reads."""
    whole = folder / "tokenizer.json"
    return (whole,) if whole.is_file() else (folder / "vocab.json", folder / "merges.txt")


def text_pipeline(model: models.BPE) -> Tokenizer:
    """CLIP's preparation of text: lowercase, split into words and bytes. `model` then joins the bytes to tokens."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer
