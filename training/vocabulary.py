"""Learn a tokenizer from texts: byte-level BPE (Radford et al., 2019), WordPiece (BERT's), Unigram (Kudo, 2018).

The same texts give the same bytes in every process. The trainers of ``tokenizers`` do so for BPE alone: they walk
through hash tables whose order changes with each process. What depends on that order is settled here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from heedful import UserError
from sources.files import write_whole
from training.tokenizers import load_tokenizer

Kind = Literal["bpe", "wordpiece", "unigram"]
SEQ2SEQ = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BERT = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
SPECIAL: dict[Kind, dict[str, str]] = {"bpe": SEQ2SEQ, "wordpiece": BERT, "unigram": SEQ2SEQ}
"""The special tokens of each kind; their ids count from 0 in this order."""
TEMPLATES: dict[Kind, tuple[str, str]] = {
    "bpe": ("$A </s>", "$A </s> $B </s>"),
    "wordpiece": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "unigram": ("$A </s>", "$A </s> $B </s>"),
}
MIN_FREQUENCY = 2
"""Pairs that occur less often are not joined, as in the ready-made tokenizers of ``tokenizers``."""
SCORE_DIGITS = 4
"""Of Unigram's log-probabilities, whose last bits differ between processes; 1e-4 of one moves no segmentation."""
PROBED = 1000


def train_tokenizer(
    texts: Sequence[str],
    *,
    kind: Kind,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    lowercase: bool = False,
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary; where the texts do not fill ``vocab_size``, the tokenizer is smaller.

    Args:
        texts: In an order that does not matter.
        special_tokens: More of them than ``SPECIAL``; they stand next in the vocabulary.
        lowercase: Learn and encode in lower case; WordPiece then drops accents too, as BERT's uncased ones do.

    Raises:
        UserError: No text at all, or a vocabulary too small for the characters that occur.
    """
    if not any(map(str.strip, texts)):
        raise UserError("texts without a single character", expected="some text to learn from")
    names = SPECIAL[kind]
    special = list(dict.fromkeys([*names.values(), *special_tokens]))
    tokenizer = TRAINERS[kind](texts, vocab_size, special, lowercase)
    if (size := tokenizer.get_vocab_size()) > vocab_size:
        raise _too_small(vocab_size, f"at least {size}: {len(special)} special tokens and every character or byte")
    single, pair = TEMPLATES[kind]
    ids = [(token, tokenizer.token_to_id(token)) for token in special if token in pair]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    inputs = ["input_ids", *(["token_type_ids"] if kind == "wordpiece" else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=inputs,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in special if token not in names.values()],
        **names,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, texts: Sequence[str]) -> None:
    """Write a tokenizer's folder whole, once it is proved that ``AutoTokenizer`` reads the texts as this one does.

    Raises:
        RuntimeError: It does not.
    """

    def fill(aside: Path) -> None:
        tokenizer.save_pretrained(aside)
        again, probe = load_tokenizer(str(aside), own=False), list(texts[:PROBED])
        if len(again) != len(tokenizer) or again(probe).input_ids != tokenizer(probe).input_ids:
            raise RuntimeError(f"the reloaded {type(again).__name__} gives other ids")

    write_whole(folder, fill)


def _train_bpe(texts: Sequence[str], vocab_size: int, special: list[str], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    # No space is put before a text: decode(encode(text)) is the text.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(texts: Sequence[str], vocab_size: int, special: list[str], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=BERT["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # The trainer numbers the ##characters as it meets them, in the order of a hash table, and breaks ties between
    # pairs by these numbers. Given as special tokens they have theirs beforehand; they are none in the vocabulary.
    inner = sorted({f"##{char}" for text in texts for word in _words(tokenizer, text) for char in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[*special, *inner],
        show_progress=False,
    )
    learner = Tokenizer(tokenizer.model)
    learner.normalizer, learner.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    learner.train_from_iterator(texts, trainer)
    tokenizer.model = models.WordPiece(learner.get_vocab(), unk_token=BERT["unk_token"])
    tokenizer.add_special_tokens(special)
    return tokenizer


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))]


def _train_unigram(texts: Sequence[str], vocab_size: int, special: list[str], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    steps = [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if lowercase else [])])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    unk = SEQ2SEQ["unk_token"]
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=special, unk_token=unk, show_progress=False)
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:  # a plain Exception of Rust
        raise _too_small(vocab_size, f"more ({error})") from error
    pieces = settle_scores([(piece, score) for piece, score in _pieces(tokenizer) if piece not in special])
    tokenizer.model = models.Unigram([*((token, 0.0) for token in special), *pieces], unk_id=special.index(unk))
    tokenizer.add_special_tokens(special)
    return tokenizer


def _pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    return [(piece, score) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


def settle_scores(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Scores and order of Unigram's pieces without what chance gave them.

    The trainer sums in an order of its own, so that last bits differ; and characters that were pruned come back with
    the lowest score plus 0.0001, 0.0002, ... in an order of its own: they all get the lowest.
    """
    lowest, step = min(score for _, score in pieces), 1e-4
    singles = sum(len(piece) == 1 for piece, _ in pieces)
    settled = []
    for piece, score in pieces:
        steps = (score - lowest) / step
        brought_back = len(piece) == 1 and steps < singles and abs(steps - round(steps)) < 1e-6
        settled.append((piece, round(lowest if brought_back else score, SCORE_DIGITS)))
    return sorted(settled, key=lambda pair: (-pair[1], pair[0]))


def _too_small(vocab_size: int, needed: str) -> UserError:
    return UserError(
        f"a vocabulary of {vocab_size} tokens",
        where="--vocab-size",
        expected=needed,
        fix="raise it, or leave out texts in rare scripts",
    )


TRAINERS: dict[Kind, Callable[[Sequence[str], int, list[str], bool], Any]] = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
}
