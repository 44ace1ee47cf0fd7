"""Keys in other company than their queries: one process in parts; two are in tests/losses."""

import pytest
import torch
from torch import nn

from medspark.models.shuffle import encode_keys, in_parts, shuffle, unshuffle


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def batch(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 3, dtype=torch.float64)


def test_shuffle_moves_rows_by_the_seed_and_comes_back():
    x = torch.arange(64.0).view(16, 2, 2)
    y = shuffle(x, 5)
    assert torch.equal(unshuffle(y, 5), x)
    assert torch.equal(shuffle(x, 5), y)
    assert not torch.equal(y, x)
    assert not torch.equal(shuffle(x, 6), y)
    assert sorted(y[:, 0, 0].tolist()) == x[:, 0, 0].tolist()


def test_one_process_and_one_part_is_the_network_itself():
    net, x = network(), batch()
    assert torch.equal(encode_keys(net, x, 3), net(x))


def test_parts_have_their_own_statistics():
    net, x = network(), batch()
    hidden = net[0](x)
    expected = torch.cat(
        [
            (part - part.mean(0)) / (part.var(0, correction=0) + 1e-5).sqrt()
            for part in (hidden[:4], hidden[4:])
        ]
    )
    assert torch.allclose(in_parts(net, x, 2), expected, rtol=1e-12)
    assert not torch.allclose(in_parts(net, x, 2), net(x), rtol=1e-2)


def test_keys_come_back_in_order_from_random_company():
    net, x, seed = network(), batch(), 1
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    expected = torch.empty(8, 4, dtype=torch.float64)
    for company in order.chunk(2):  # indices of the samples that are encoded together
        expected[company] = net(x[company]).detach()
    assert torch.allclose(encode_keys(net, x, seed, parts=2), expected, rtol=1e-12)
    assert {frozenset(c.tolist()) for c in order.chunk(2)} != {
        frozenset(range(4)),
        frozenset(range(4, 8)),
    }


def test_company_changes_with_the_seed_but_not_without_batch_norm():
    net, x = network(), batch()
    assert not torch.allclose(encode_keys(net, x, 0, 2), encode_keys(net, x, 1, 2), rtol=1e-2)
    plain = net[0]
    assert torch.allclose(encode_keys(plain, x, 0, 2), plain(x), rtol=1e-12)


def test_keys_carry_no_gradient_and_parts_do():
    net, x = network(), batch().requires_grad_()
    assert not encode_keys(net, x, 0, parts=2).requires_grad
    assert not encode_keys(net, x, 0).requires_grad
    in_parts(net, x, 2).square().sum().backward()
    assert x.grad is not None


def test_the_leak_is_there_without_parts_and_closed_with_them():
    """Whether company can be read off a sample that says nothing by itself: zeros, batch after batch.

    Each batch holds one such sample per half among others that differ; after a batch norm the zeros
    tell the mean and SD of their company, and nothing else.
    """
    norm, same, other = nn.BatchNorm1d(1, affine=False).double(), [], []
    for seed in range(40):
        x = torch.randn(16, 1, dtype=torch.float64)
        x[[0, 8]] = 0
        queries = in_parts(norm, x, 2)
        same.append((queries[[0, 8]], in_parts(norm, x, 2)[[0, 8]]))
        other.append((queries[[0, 8]], encode_keys(norm, x, seed, 2)[[0, 8]]))

    def agreement(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        q, k = (torch.cat(side).flatten() for side in zip(*pairs, strict=True))
        return torch.corrcoef(torch.stack([q, k]))[0, 1].item()

    assert agreement(same) == pytest.approx(1)
    assert agreement(other) < 0.7


def test_errors_name_the_numbers():
    with pytest.raises(ValueError, match="8 does not split into 3"):
        in_parts(network(), batch(), 3)
    with pytest.raises(ValueError, match="into 0"):
        in_parts(network(), batch(), 0)
