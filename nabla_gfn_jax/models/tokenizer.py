"""CLIP's byte-pair tokenizer: from the files of a diffusers folder, or learned from captions."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from nabla_gfn_jax.checkpoints.files import read_json, write_json
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
    start: str = START
    end: str = END
    clean: Callable[[str], str] = str  # what is done to a prompt before `encoder` sees it

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "batch tokens"]:
        start, end = self.encoder.token_to_id(self.start), self.encoder.token_to_id(self.end)
        ids = np.full((len(prompts), self.max_length), self.padding_id, np.int32)
        texts = [self.clean(prompt) for prompt in prompts]
        for row, encoding in enumerate(self.encoder.encode_batch(texts, add_special_tokens=False)):
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
    vocabulary, merges = read_vocabulary(folder)
    if not all(token in vocabulary for token in (START, END, padding)):
        raise UserError(f"{folder}: the vocabulary lacks {START}, {END} or {padding}; download the model again")
    encoder = make_encoder(vocabulary, merges, [START, END])
    return CLIPTokenizer(encoder, int(settings.get("model_max_length", 77)), vocabulary[padding])


def make_encoder(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: list[str]) -> Tokenizer:
    """Text to the ids of its byte pairs; the two `special` tokens, start and end, are found in text too."""
    encoder = _pipeline(models.BPE(vocabulary, merges, end_of_word_suffix=_WORD_END, unk_token=special[1]))
    encoder.add_special_tokens(special)
    return encoder


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges, from `tokenizer.json` (all that transformers 5 writes) or `vocab.json` and `merges.txt`.

    Raises `UserError` naming a missing or damaged file.
    """
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

    The vocabulary is CLIP's layout: 256 bytes, the same at a word's end, one entry a merge, start and end; at
    most `vocab_size` of them. A folder that has one keeps it: ids must not move under trained weights.
    """
    if (folder / "vocab.json").exists():
        return
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(_count_words(texts), vocab_size - 2 * len(alphabet) - 2)
    entries = [*alphabet, *(c + _WORD_END for c in alphabet), *map("".join, merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(entries))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "vocab.json", vocabulary)


def _count_words(texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """How often each word occurs, as its bytes' letters, the last one marked."""
    pipeline = _pipeline(models.BPE())
    normalise, split = pipeline.normalizer.normalize_str, pipeline.pre_tokenizer.pre_tokenize_str
    words = Counter(word for text in texts for word, _ in split(normalise(text)))
    return Counter({(*word[:-1], word[-1] + _WORD_END): count for word, count in words.items()})


def _learn_merges(words: Counter[tuple[str, ...]], limit: int) -> list[tuple[str, str]]:
    """At most `limit` merges, each of the most frequent pair, of equals the alphabet's first.

    Sennrich et al. 2016, arXiv 1508.07909. The `tokenizers` library's trainer breaks ties anew in each run.
    """
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        words = Counter({_merge(word, best): count for word, count in words.items()})
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair not in pairwise(word):
        return word
    merged: list[str] = []
    for symbol in word:
        if merged and merged[-1] == pair[0] and symbol == pair[1]:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


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
