"""CLIP's byte-pair tokenizer: from the files of a diffusers folder, or learned from captions."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from nabla_gfn_jax.checkpoints.files import read_json
from nabla_gfn_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of other signs (Radford et al. 2021's released files).
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class CLIPTokenizer:
    """Prompts to token ids (B, max_length): start, text, end, padding; long text is cut before the end."""

    encoder: Tokenizer
    max_length: int
    padding_id: int

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "batch tokens"]:
        start, end = self.encoder.token_to_id(START), self.encoder.token_to_id(END)
        ids = np.full((len(prompts), self.max_length), self.padding_id, np.int32)
        for row, encoding in enumerate(self.encoder.encode_batch(list(prompts), add_special_tokens=False)):
            text = np.asarray([start, *encoding.ids[: self.max_length - 2], end], np.int32)
            ids[row, : len(text)] = text
        return ids


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """From a diffusers model's `tokenizer` folder. Raises `UserError` naming a missing or damaged file."""
    settings = read_json(folder / "tokenizer_config.json")
    older = folder / "special_tokens_map.json"
    if older.is_file() and "added_tokens_decoder" not in settings:  # then its word is the last
        settings |= read_json(older)
    padding = settings.get("pad_token", END)
    padding = padding["content"] if isinstance(padding, dict) else padding
    vocabulary, merges = _read_vocabulary(folder)
    if not all(token in vocabulary for token in (START, END, padding)):
        raise UserError(
            f"{folder}: the vocabulary lacks {START}, {END} or {padding}; download the model again"
        )
    encoder = _pipeline(models.BPE(vocabulary, merges, end_of_word_suffix=_WORD_END, unk_token=END))
    encoder.add_special_tokens([START, END])
    return CLIPTokenizer(encoder, int(settings.get("model_max_length", 77)), vocabulary[padding])


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """From `tokenizer.json` (all that transformers 5 writes) or `vocab.json` and `merges.txt`."""
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            model = read_json(file)["model"]
            vocabulary, pairs = model["vocab"], model["merges"]
        else:
            vocabulary = read_json(folder / "vocab.json")
            file = folder / "merges.txt"
            lines = file.read_text(encoding="utf-8").splitlines()
            pairs = [line for line in lines if line and not line.startswith("#version")]
        merges = [(left, right) for left, right in (p.split(" ") if isinstance(p, str) else p for p in pairs)]
        # CLIP's released merges.txt carries lines beyond those its vocabulary was made of.
        return vocabulary, [pair for pair in merges if "".join(pair) in vocabulary]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}); download the model again") from error


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int, max_length: int) -> None:
    """Learns byte-pair merges from `texts` and writes a tokenizer folder that transformers opens too.

    The vocabulary is CLIP's layout: 256 bytes, the same at a word's end, one entry a merge, start and end.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 256 - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    learner = _pipeline(models.BPE(end_of_word_suffix=_WORD_END))
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    entries = [*alphabet, *(c + _WORD_END for c in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(entries))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _pipeline(model: models.BPE) -> Tokenizer:
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
