import pytest
import torch
import transformers
from tiny_families import FAMILIES, make_model
from transformers import AutoModelForTokenClassification

from heedful import UserError
from tasks.positions import check_lengths, max_positions


def can_run(model, length):
    try:
        with torch.no_grad():
            model(torch.full((1, length), 5))
    except (RuntimeError, IndexError):
        return False
    return True


LIMITS = {"bert": 64, "roberta": 62, "distilbert": 64, "electra": 64, "albert": 64, "modernbert": 64}
LIMITS["deberta-v2"] = None  # relative positions


@pytest.mark.parametrize("family", FAMILIES)
def test_max_positions_is_what_the_model_can_run(family):
    model = make_model(family, transformers.AutoModel)
    limit = max_positions(model)
    assert limit == LIMITS[family]
    assert can_run(model, limit or 200)
    if family not in {"deberta-v2", "modernbert"}:  # rotary positions go on beyond, into what was never trained
        assert not can_run(model, limit + 1)


def test_deberta_with_absolute_positions_is_bounded():
    model = make_model("deberta-v2", transformers.AutoModel, position_biased_input=True)
    assert max_positions(model) == 64
    assert can_run(model, 64)
    assert not can_run(model, 65)


def test_windows_longer_than_the_positions_are_refused():
    model = make_model("roberta", AutoModelForTokenClassification)
    check_lengths(model, [{"max_length": 62}])
    with pytest.raises(UserError, match=r"max_length=63[^0-9]*at most 62[^0-9]*max_length=62"):
        check_lengths(model, [{"max_length": 63}])
    check_lengths(make_model("deberta-v2", transformers.AutoModel), [{"max_length": 5000}])


def test_a_prompt_and_its_answer_need_positions_together():
    model = make_model("gpt2", transformers.AutoModelForCausalLM)
    check_lengths(model, [{"max_length": 40, "max_new_tokens": 24}])
    with pytest.raises(UserError, match=r"max_length=41 \+ max_new_tokens=24[^0-9]*at most 64[^0-9]*max_length=40"):
        check_lengths(model, [{"max_length": 41, "max_new_tokens": 24}])
    with pytest.raises(UserError, match="lower max_length and max_new_tokens"):
        check_lengths(model, [{"max_length": 8, "max_new_tokens": 64}])
