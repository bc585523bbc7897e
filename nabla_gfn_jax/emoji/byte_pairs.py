"""Learns a tokenizer's byte pairs from captions."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import models, pre_tokenizers

from nabla_gfn_jax.checkpoints.files import write_json
from nabla_gfn_jax.models.tokenizer import END, START, WORD_END, text_pipeline


def train_tokenizer(texts: Iterable[str], folder: Path, vocab_size: int, max_length: int) -> None:
    """Learns byte-pair merges from `texts` and writes a tokenizer folder, which transformers can read too.

    The vocabulary has CLIP's layout: 256 bytes, the same bytes at the end of a word, one entry per merge, start and
    end; at most `vocab_size` entries. An existing vocabulary in the folder is kept, because trained weights depend on
    its ids.
    """
    if (folder / "vocab.json").exists():
        return
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _learn_merges(_count_words(texts), vocab_size - 2 * len(alphabet) - 2)
    entries = [*alphabet, *(c + WORD_END for c in alphabet), *map("".join, merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(entries))}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "vocab.json", vocabulary)


def _count_words(texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """The number of occurrences of each word. A word is a tuple of its bytes' letters; the last one is marked."""
    pipeline = text_pipeline(models.BPE())
    normalise, split = pipeline.normalizer.normalize_str, pipeline.pre_tokenizer.pre_tokenize_str
    words = Counter(word for text in texts for word, _ in split(normalise(text)))
    return Counter({(*word[:-1], word[-1] + WORD_END): count for word, count in words.items()})


def _learn_merges(words: Counter[tuple[str, ...]], limit: int) -> list[tuple[str, str]]:
    """At most `limit` merges, each of the most frequent pair; ties are broken alphabetically.

    Sennrich et al. 2016, arXiv 1508.07909. The trainer of the `tokenizers` library breaks ties randomly in each run.
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
