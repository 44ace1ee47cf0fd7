"""Heads: the layers each paper names, batch norm of one sample, prototypes of length one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medspark.models.heads import (
    Head,
    Prototypes,
    byol_predictor,
    byol_projector,
    hold_prototypes,
    moco_v2_projector,
    simclr_projector,
    swav_projector,
)
from medspark.sparse import convert_sync_batchnorm

# Head -> sizes of its layers, whether the hidden one is normalised.
with torch.device("meta"):
    PAPERS = {
        "simclr": (simclr_projector(2048), (2048, 2048, 128), False),
        "simclr with norm": (simclr_projector(512, norm=True), (512, 512, 128), True),
        "moco v2": (moco_v2_projector(2048), (2048, 2048, 128), False),
        "byol": (byol_projector(2048), (2048, 4096, 256), True),
        "byol predictor": (byol_predictor(), (256, 4096, 256), True),
        "swav": (swav_projector(2048), (2048, 2048, 128), True),
    }


@pytest.mark.parametrize("name", PAPERS)
def test_layers_are_those_of_the_paper(name):
    head, (dim, hidden, out), norm = PAPERS[name]
    kinds = [nn.Linear, *([nn.BatchNorm1d] if norm else []), nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head] == kinds
    assert (head[0].in_features, head[0].out_features) == (dim, hidden)
    assert (head[-1].in_features, head[-1].out_features) == (hidden, out)
    assert (head[0].bias is None) == norm and head[-1].bias is not None


@pytest.mark.parametrize("norm", [True, False])
def test_a_head_computes_what_it_says(norm):
    head, x = Head(5, 7, 3, norm=norm).double(), torch.randn(4, 5, dtype=torch.float64)
    hidden = x @ head[0].weight.T
    if norm:
        with torch.no_grad():
            head[1].weight.uniform_(0.5, 2)
            head[1].bias.uniform_(-1, 1)
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
        hidden = hidden * head[1].weight + head[1].bias
    else:
        hidden = hidden + head[0].bias
    expected = hidden.clamp(min=0) @ head[-1].weight.T + head[-1].bias
    assert torch.allclose(head(x), expected, rtol=1e-12)


def test_batch_norm_of_one_sample_says_what_to_do():
    head = Head(5, 7, 3, norm=True)
    with pytest.raises(ValueError, match=r"batch of 1.*at least 2"):
        head(torch.randn(1, 5))
    # What needs no statistics of the batch goes on.
    assert head.eval()(torch.randn(1, 5)).shape == (1, 3)
    assert Head(5, 7, 3, norm=False)(torch.randn(1, 5)).shape == (1, 3)


def test_a_synchronised_head_keeps_its_keys():
    head = Head(5, 7, 3, norm=True)
    keys = list(head.state_dict())
    assert list(convert_sync_batchnorm(head).state_dict()) == keys
    assert head(torch.randn(4, 5)).shape == (4, 3)


def test_unpooled_features_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 5\], not \(2, 5, 4, 4, 4\)"):
        Head(5, 7, 3, norm=False)(torch.zeros(2, 5, 4, 4, 4))
    with pytest.raises(ValueError, match=r"not \(2, 4\)"):
        Head(5, 7, 3, norm=False)(torch.zeros(2, 4))


def test_prototypes_give_cosines():
    prototypes, x = Prototypes(5, 9).double(), torch.randn(4, 5, dtype=torch.float64)
    assert prototypes.bias is None
    assert torch.allclose(prototypes.weight.norm(dim=1), torch.ones(9).double(), rtol=1e-6)
    prototypes.normalise()
    expected = F.cosine_similarity(x[:, None], prototypes.weight[None], dim=2)
    assert torch.allclose(prototypes(3 * x), expected, rtol=1e-12)


def test_prototypes_come_back_to_length_one_after_a_step():
    prototypes = Prototypes(5, 9)
    optimizer = torch.optim.SGD(prototypes.parameters(), lr=1.0)
    prototypes(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    direction = F.normalize(prototypes.weight.detach(), dim=1)
    assert (prototypes.weight.norm(dim=1) - 1).abs().max() > 1e-3
    prototypes.normalise()
    assert torch.allclose(prototypes.weight, direction)


def test_scores_stay_in_float32_under_autocast(device):
    prototypes, x = Prototypes(5, 9).to(device), torch.randn(4, 5, device=device)
    expected = prototypes(x)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(prototypes(x), expected)
        assert prototypes(x.bfloat16()).dtype == torch.float32


def test_prototypes_are_held_for_the_first_steps_alone():
    prototypes = Prototypes(5, 9)
    optimizer = torch.optim.SGD(prototypes.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    start, held = prototypes.weight.detach().clone(), []
    for step in range(4):
        optimizer.zero_grad()
        prototypes(torch.randn(4, 5)).sum().backward()
        held.append(hold_prototypes(prototypes, step, 2))
        optimizer.step()
        assert torch.equal(prototypes.weight, start) == (step < 2)
    assert held == [True, True, False, False]
