"""Tokenizers trained on a few texts and tiny random models with weights large enough to tell inputs apart."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DISTIL_SIZES = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}


def make_tokenizer(kind, texts):
    """``bert`` (WordPiece, token types), ``roberta`` (byte-level BPE, none), ``left`` (bert, padded on the left)."""
    if kind == "roberta":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        pair, inputs = "[CLS] $A [SEP] [SEP] $B [SEP]", ["input_ids", "attention_mask"]
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)
        pair, inputs = "[CLS] $A [SEP] $B:1 [SEP]:1", ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=ids)
    side = "left" if kind == "left" else "right"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side=side, model_input_names=inputs, **NAMES
    )


def make_model(kind, auto_class, **kwargs):
    """A random model of the kind for ``auto_class``; the same weights in each call."""
    torch.manual_seed(0)
    sizes = DISTIL_SIZES if kind == "distilbert" else SIZES
    kwargs = {"vocab_size": 500, "pad_token_id": 0, "initializer_range": 0.5} | sizes | kwargs
    model = auto_class.from_config(transformers.AutoConfig.for_model(kind, **kwargs))
    return model.eval()
