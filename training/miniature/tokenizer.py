"""A byte-level BPE vocabulary in CLIP's form, small: the world's words and names are single tokens.

A broad list of sentences (`training.captions`) beside the world's captions makes words that no caption holds split
sensibly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY = 4096
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's word split: contractions, letters, single digits, anything else.
SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_tokenizer(texts: Iterable[str], size: int = VOCABULARY) -> CLIPTokenizer:
    """A tokenizer of at most `size` tokens; a text that is given often weighs as much."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: every byte, every byte that ends a word, then the merges, then the two special tokens.
    tokens = dict.fromkeys([*alphabet, *(f"{byte}</w>" for byte in alphabet)])
    kept = []
    for left, right in merges:
        if len(tokens) >= size - 2:
            break
        kept.append((left, right))
        tokens[left + right] = None
    vocabulary = {token: i for i, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=kept,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=77,
    )


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """In both forms: transformers 4 reads vocab.json and merges.txt, transformers 5 tokenizer.json."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
