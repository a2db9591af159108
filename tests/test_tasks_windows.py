"""Windows: they cover all, never cut a unit, move forward, and each unit belongs to exactly one of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_text import make_tokenizer

from heedful import UserError
from tasks.batching import model_inputs, pad_batch
from tasks.windows import owners, plan_windows, window_room

TEXTS = ["a b c d e f g h i j k l m n o p q r s t u v w x y z"]
BERT = make_tokenizer("bert", TEXTS)
sizes = st.integers(1, 12).flatmap(lambda room: st.tuples(st.just(room), st.integers(0, room - 1)))


@given(st.lists(st.integers(0, 15), max_size=40), sizes)
def test_windows_cover_units_and_move_forward(lengths, size):
    room, stride = size
    windows = plan_windows(lengths, room=room, stride=stride)
    assert windows[0][0] == 0
    assert windows[-1][1] == len(lengths)
    for start, end in windows:
        assert sum(lengths[start:end]) <= room or end == start + 1, "only a unit that is too long exceeds the room"
    for (start, end), (next_start, next_end) in pairwise(windows):
        assert start < next_start <= end < next_end
        assert sum(lengths[next_start:end]) <= stride


@given(st.integers(0, 60), sizes)
def test_windows_over_tokens_are_those_of_the_tokenizer(num_tokens, size):
    room, stride = size
    words = [chr(ord("a") + i % 26) for i in range(num_tokens)]
    encoded = BERT(
        words,
        is_split_into_words=True,
        truncation=True,
        max_length=room + 2,
        stride=stride,
        return_overflowing_tokens=True,
    )
    words_of = [encoded.word_ids(i)[1:-1] for i in range(len(encoded["input_ids"]))]
    expected = [(found[0], found[-1] + 1) for found in words_of if found]
    assert plan_windows([1] * num_tokens, room=room, stride=stride) == (expected or [(0, 0)])


@given(st.lists(st.integers(0, 5), max_size=40), sizes)
def test_each_unit_is_owned_by_the_window_with_most_context(lengths, size):
    windows = plan_windows(lengths, room=size[0], stride=size[1])
    owner_N = owners(windows, len(lengths))

    def context(unit, window):
        start, end = window
        left = unit - start if start else np.inf
        return min(left, end - 1 - unit if end < len(lengths) else np.inf)

    for unit, owner in enumerate(owner_N):
        holding = [i for i, (start, end) in enumerate(windows) if start <= unit < end]
        assert owner == max(holding, key=lambda i: (context(unit, windows[i]), -i))


def test_owners_by_hand():
    assert owners([(0, 6), (2, 8), (4, 10)], 10).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert owners([(0, 4)], 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("max_length", "stride"), [(10, 8), (10, 9), (2, 0), (1, 0), (10, -1)])
def test_a_stride_that_stands_still_is_refused(max_length, stride):
    with pytest.raises(UserError, match="special tokens"):
        window_room(make_tokenizer("bert", TEXTS), max_length, stride=stride)


def test_room_is_what_special_tokens_leave():
    tokenizer = make_tokenizer("bert", TEXTS)
    assert window_room(tokenizer, 10, stride=7) == 8
    assert window_room(tokenizer, 10, stride=6, pair=True) == 7


@pytest.mark.parametrize("kind", ["bert", "left", "roberta"])
def test_padding_equals_the_tokenizers(kind):
    tokenizer = make_tokenizer(kind, TEXTS)
    encoded = tokenizer(["a b c", "d", "e f"])
    examples = [{name: encoded[name][i] for name in encoded} | {"row": i} for i in range(3)]
    expected = tokenizer.pad(encoded, return_tensors="pt")
    batch = pad_batch(examples, tokenizer=tokenizer)
    assert batch.keys() == expected.keys() | {"row"}
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name
    assert model_inputs(batch).keys() == expected.keys()
    assert batch["row"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("kind", "padding"), [("bert", slice(1, None)), ("left", slice(None, -1))])
def test_extra_columns_are_padded_on_the_same_side(kind, padding):
    examples = [{"input_ids": [5, 6, 7], "row": 4, "labels": [1, 2, 3], "weight": [0.5] * 3}]
    examples.append({"input_ids": [5], "row": 2, "labels": [9], "weight": [1.5]})
    extra = {"labels": -100, "weight": 0.0, "absent": 0}
    batch = pad_batch(examples, tokenizer=make_tokenizer(kind, TEXTS), extra=extra)
    assert batch["labels"][0].tolist() == [1, 2, 3]
    assert batch["labels"][1][padding].tolist() == [-100, -100]
    assert batch["weight"].dtype == torch.float32
    assert batch["weight"][1].sum() == 1.5
    assert batch["labels"].dtype == torch.int64
    assert "absent" not in batch
