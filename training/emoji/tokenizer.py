"""A byte-level BPE vocabulary in CLIP's form, small, trained on the world's captions and on a broad list of words.

The broad list (every emoji's label, tags and keywords) makes words that no caption holds split sensibly.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.emoji.scenes import SceneMaker
from training.emoji.world import archive_of, load_drawings, place_options, read_world

VOCABULARY = 4096
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's word split: contractions, letters, single digits, anything else.
SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def broad_words(folder: Path) -> list[str]:
    """Labels, tags and keywords of every emoji, from emojibase-data and emojilib."""
    words: list[str] = []
    with tarfile.open(archive_of("emojibase-data@17.0.0", folder / "packages")) as tar:
        for entry in json.load(tar.extractfile("package/en/data.json")):
            words += [entry["label"], *entry.get("tags", [])]
    with tarfile.open(archive_of("emojilib@4.0.3", folder / "packages")) as tar:
        member = next(name for name in tar.getnames() if name.endswith("emoji-en-US.json"))
        for keywords in json.load(tar.extractfile(member)).values():
            words += [keyword.replace("_", " ") for keyword in keywords]
    return words


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: every byte, every byte that ends a word, then the merges, then the two special tokens.
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    kept = []
    for left, right in merges:
        if len(tokens) >= VOCABULARY - 2:
            break
        kept.append((left, right))
        if left + right not in tokens:
            tokens.append(left + right)
    tokens += [START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=kept,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=77,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    place_options(parser)
    options = parser.parse_args()
    world = read_world(options.world)
    maker = SceneMaker(world, load_drawings(world, options.work), seed=0)
    captions = [maker.one()[2] for _ in range(20_000)]
    names = [name for label in world.labels for name in label.names] * 50
    tokenizer = train_tokenizer(captions + names + broad_words(options.work))
    folder = options.work / "tokenizer"
    tokenizer.save_pretrained(folder)
    # transformers 4 reads these two files, transformers 5 the tokenizer.json.
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf8")
    for text in (
        "a photo of the airplane",
        "flag of Equatorial Guinea in twemoji style",
        "an unforeseeable zebra",
    ):
        print(text, "->", tokenizer.tokenize(text))


if __name__ == "__main__":
    main()
