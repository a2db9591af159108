"""FastDropout is dropout: the same distribution, scale, gradient and reproducibility."""

import pytest
import torch
from tiny_families import make_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification

from training.dropout import FastDropout, use_fast_dropout


@pytest.mark.parametrize("p", [0.1, 0.37, 0.9])
def test_keeps_each_element_with_probability_one_minus_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    kept = torch.stack([FastDropout(p)(torch.ones(40, 25)) != 0 for _ in range(400)]).double()
    standard_error = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * standard_error + 2**-16
    # Neighbors share a draw of 64 bits, yet must be independent: every element and every pair of neighbors.
    assert (kept.mean(dim=0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / 400) ** 0.5
    flat = kept.reshape(400, -1)
    both = (flat[:, :-1] * flat[:, 1:]).mean(dim=1).mean()
    assert abs(both - (1 - p) ** 2) < 0.01
    outcome = FastDropout(p)(torch.ones(1000))
    torch.testing.assert_close(
        outcome[outcome != 0], torch.full_like(outcome[outcome != 0], 1 / (1 - p)), rtol=2e-4, atol=0
    )


def test_gradient_passes_where_the_value_did():
    x = torch.randn(7, 11, requires_grad=True)
    y = FastDropout(0.5)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 2.0))


def test_eval_and_p_zero_are_the_identity_and_p_one_is_zero():
    x = torch.randn(5)
    assert torch.equal(FastDropout(0.5).eval()(x), x)
    assert torch.equal(FastDropout(0.0)(x), x)
    assert not FastDropout(1.0)(x).any()


def test_seeded_alike_it_is_alike_and_a_checkpointed_block_is_redone_alike():
    block, x = nn.Sequential(nn.Linear(8, 8), FastDropout(0.5), nn.Linear(8, 8)), torch.randn(4, 8)

    def gradient(forward):
        torch.manual_seed(3)
        block.zero_grad()
        forward(x).square().sum().backward()
        return block[0].weight.grad.clone()

    plain = gradient(block)
    assert torch.equal(gradient(block), plain)
    assert torch.equal(gradient(lambda x: checkpoint(block, x, use_reentrant=False)), plain)


def test_a_model_is_served_whole_and_its_weights_keep_their_names():
    model = make_model("bert", AutoModelForSequenceClassification)
    names = list(model.state_dict())
    use_fast_dropout(model)
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.Dropout)]
    assert kinds
    assert set(kinds) == {FastDropout}
    assert list(model.state_dict()) == names
