"""Tiny random models of the families that the project is tried on, and a folder of one as the Hub would hold it."""

import json
import random
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import datasets
import sentencepiece
import torch
import transformers
from tiny_text import SPECIAL, make_tokenizer
from tokenizers.models import WordPiece
from tokenizers.processors import ByteLevel

from tasks import TASKS

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
COMMON = {"vocab_size": 400, "pad_token_id": 0, "max_position_embeddings": 64}
FAMILIES = {
    "bert": SIZES,
    "roberta": SIZES | {"pad_token_id": 1},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "electra": SIZES | {"embedding_size": 8},
    "albert": SIZES | {"embedding_size": 8, "num_hidden_groups": 2},
    "deberta-v2": SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    "modernbert": SIZES | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
}
DECODERS = {
    "llama": SIZES,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mistral": SIZES | {"num_key_value_heads": 1, "sliding_window": 16},
    "gemma2": SIZES | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 16},
    "qwen3": SIZES | {"num_key_value_heads": 1, "head_dim": 8},
}
BART_SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART_SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
T5_SIZES = {"d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "d_ff": 32}
IDS = {
    "pad_token_id": 0,
    "eos_token_id": 3,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
SEQ2SEQ = {
    "t5": T5_SIZES | IDS,
    "mt5": T5_SIZES | IDS,
    "bart": BART_SIZES | IDS,
    "mbart": BART_SIZES | IDS,
    "marian": BART_SIZES | IDS,
    "pegasus": BART_SIZES | IDS,
}
SWAPPABLE = [family for family in (*FAMILIES, *DECODERS, *SEQ2SEQ) if family != "deberta-v2"]
"""Those that take other attention."""
HALF = {"model_type": "bert"} | SIZES | COMMON
JOINED = {
    "encoder-decoder": IDS | {"encoder": HALF, "decoder": HALF | {"is_decoder": True, "add_cross_attention": True}},
}
SHORT = {"generation": {"decoding": {"max_new_tokens": 16}}}
for task in ("summarization", "translation"):
    SHORT[task] = SHORT["generation"] | {"max_target_length": 16}
"""Sections of a configuration under which answers fit into these models' 64 positions."""
NO_DROPOUT = {
    name: 0.0
    for name in (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "classifier_dropout_prob",
        "dropout",
        "attention_dropout",
        "qa_dropout",
        "seq_classif_dropout",
        "pooler_dropout",
        "embedding_dropout",
        "mlp_dropout",
        "summary_last_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "dropout_rate",
        "activation_dropout",
    )
}


def make_config(family, *, dropout=True, **kwargs):
    sizes = COMMON | (FAMILIES | DECODERS | SEQ2SEQ | JOINED)[family] | ({} if dropout else NO_DROPOUT) | kwargs
    return transformers.AutoConfig.for_model(family, **sizes)


def make_masking_tokenizer():
    tokenizer = make_tokenizer("bert", TEXTS)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    return tokenizer


def make_seq2seq_tokenizer():
    tokenizer = make_tokenizer("bert", TEXTS)
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def make_decoder_tokenizer():
    """Byte-level, with a token that ends a text and none that begins it; no padding token, as GPT-2 has it."""
    tokenizer = make_tokenizer("roberta", TEXTS)
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]")


def train_sentencepiece(prefix, *, kind="unigram"):
    """``prefix``.model and ``prefix``.vocab, of a few lower-case texts; the pieces in order."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in TEXTS] * 4),
        model_prefix=str(prefix),
        vocab_size=40,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return [line.split("\t")[0] for line in Path(f"{prefix}.vocab").read_text().splitlines()]


def save_marian(folder):
    """As opus-mt checkpoints are: two SentencePiece models and one vocabulary, which only a slow class reads."""
    folder.mkdir()
    pieces = ["</s>", "<unk>"]
    for side, kind in {"source": "unigram", "target": "char"}.items():
        found = train_sentencepiece(folder / side, kind=kind)
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        (folder / f"{side}.vocab").unlink()
        pieces += [piece for piece in found if piece not in {*pieces, "<s>"}]
    ids = {piece: i for i, piece in enumerate([*pieces, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(ids))
    tokens = {"pad_token_id": ids["<pad>"], "eos_token_id": 0, "decoder_start_token_id": ids["<pad>"]}
    config = make_config("marian", vocab_size=len(ids), **tokens)
    transformers.MarianMTModel(config).save_pretrained(folder)
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "es"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


LANGUAGES = {
    "mbart": ("en_XX", "es_XX"),
    "mbart50": ("en_XX", "es_XX"),
    "nllb": ("eng_Latn", "spa_Latn"),
    "m2m_100": ("en", "es"),
}
"""Tokenizers that write the codes of languages into the text, and two such codes."""


def make_language_tokenizer(kind, folder):
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "nllb":
        letters = sorted({*"▁".join(TEXTS)})
        return transformers.NllbTokenizer(vocab={piece: i for i, piece in enumerate(first + letters)})
    if kind == "m2m_100":
        pieces = train_sentencepiece(folder / "sentencepiece.bpe")
        vocabulary = dict.fromkeys([*first, *pieces])
        (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
        return transformers.M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model"))
    words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
    pieces = [*first, *words, *LANGUAGES[kind]]
    made = {"mbart": transformers.MBartTokenizer, "mbart50": transformers.MBart50Tokenizer}[kind]
    return made(vocab=[(piece, -float(piece in words)) for piece in pieces])


HABITS = {
    "min_length": 20,
    "repetition_penalty": 5.0,
    "do_sample": True,
    "num_beams": 2,
    "no_repeat_ngram_size": 1,
    "num_return_sequences": 2,
    "early_stopping": True,
    "use_cache": False,
    "suppress_tokens": list(range(4, 200)),
    "bad_words_ids": [[token] for token in range(4, 200)],
    "return_dict_in_generate": True,
}
"""What a checkpoint's generation_config.json may ask for, and a run did not."""


@contextmanager
def input_widths(decoder):
    """The widths of what a decoder is given within, call by call."""
    widths = []

    def spy(module, args, kwargs):
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        widths.append(ids.shape[1])

    handle = decoder.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        yield widths
    finally:
        handle.remove()


def make_model(family, auto_class, *, seed=0, **kwargs):
    """A random model; the same weights in each call."""
    torch.manual_seed(seed)
    return auto_class.from_config(make_config(family, **kwargs)).eval()


def save_body(family, folder, *, tokenizer=None, **kwargs):
    """A folder with a body and no head, as pretrained checkpoints are; and a tokenizer.

    A decoder's head is its embeddings again, or else in its checkpoint.
    """
    kind, usual = transformers.AutoModel, make_masking_tokenizer
    if family in DECODERS:
        kind, usual = transformers.AutoModelForCausalLM, make_decoder_tokenizer
    elif family in SEQ2SEQ | JOINED:
        kind, usual = transformers.AutoModelForSeq2SeqLM, make_seq2seq_tokenizer
    make_model(family, kind, **kwargs).save_pretrained(folder)
    (tokenizer or usual()).save_pretrained(folder)
    return folder


TEXTS = ["the cat sat on the mat", "a dog barked at the moon", "Anna met Paul in Berlin", "it rained all day long"]

WORDS = ["Anna", "Paul", "Berlin", "the", "cat", "sat", "on", "mat", "dog", "barked"]
TAGS = {"Anna": "B-PER", "Paul": "B-PER", "Berlin": "B-LOC"}


def tokenizer_for(family):
    """A tokenizer with the same ids in every process, which WordPiece's trainer does not promise."""
    if family in DECODERS:
        return make_decoder_tokenizer()
    if family not in {"bert", "electra", "albert", "deberta-v2", *SEQ2SEQ, *JOINED}:
        tokenizer = make_tokenizer("roberta", TEXTS)
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        return tokenizer
    tokenizer = make_masking_tokenizer()
    if family in SEQ2SEQ | JOINED:
        tokenizer.eos_token = "[SEP]"
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = sorted({word.lower() for word in WORDS})
    tokens = [*SPECIAL, "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    tokenizer.backend_tokenizer.model = WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    return tokenizer


def make_rows(task, count=16, *, seed=0):
    """Rows of very uneven lengths and numbers of targets."""
    draw = random.Random(seed)
    columns = defaultdict(list)
    for row in range(count):
        words = draw.choices(WORDS, k=1 + row * 5 % 13)
        columns["row"].append(row)
        if task == "ner":
            words[0] = WORDS[row % 3]
            columns["tokens"].append(words)
            columns["tags"].append([TAGS.get(word, "O") for word in words])
        elif task == "classification":
            columns["text"].append(" ".join(words))
            columns["label"].append("abc"[row % 3])
        elif task in ("summarization", "translation"):
            columns["source"].append(" ".join(words))
            columns["target"].append(" ".join(words[::-2]))
        elif task in ("generation", "mlm"):
            columns["text"].append(" ".join(words))
        else:
            columns["question"].append("where sat the cat")
            columns["context"].append(" ".join(words))
            columns["answers"].append({"text": [words[-1]], "answer_start": [len(" ".join(words)) - len(words[-1])]})
    return datasets.Dataset.from_dict(columns)


FAMILY_OF = {"generation": "llama", "summarization": "gpt2", "translation": "bart"}
"""A family for each task that is not for encoders."""


def make_task(name, family=None, *, count=16, max_length=32, **settings):
    """A task as ``finetune`` builds it, its rows and their features."""
    family = family or FAMILY_OF.get(name, "bert")
    rows = make_rows(name, count)
    tokenizer = tokenizer_for(family)
    kind, options = TASKS[name].load(), TASKS[name].options(**settings)
    config = make_config(family)
    task = kind.build(tokenizer, rows, model_config=config, max_length=max_length, stride=4, options=options)
    return task, rows, datasets.Dataset.from_dict(task.encode(rows[:], training=True))
