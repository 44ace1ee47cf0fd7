"""The oracle itself, against loops that use nothing of it."""

from __future__ import annotations

import itertools

import torch

from medspark.sparse import BlockMask, reference

WINDOW = ((3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mask = BlockMask(
        torch.tensor([[[[True, False], [False, True]], [[False, True], [True, False]]]])
    )
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    return (
        x,
        reference.voxel_mask(mask.level((4, 4, 4))),
        reference.voxel_mask(mask.level((2, 2, 2))),
    )


def _windows(x, mask):
    """For each output voxel: the (tap, value [C]) pairs of visible inputs, and the voxels in the volume."""
    for out in itertools.product(range(2), repeat=3):
        seen, inside = [], 0
        for tap in itertools.product(range(3), repeat=3):
            at = [o * 2 - 1 + t for o, t in zip(out, tap, strict=True)]
            if all(0 <= a < 4 for a in at):
                inside += 1
                if mask[0, 0, at[0], at[1], at[2]]:
                    seen.append((tap, x[0, :, at[0], at[1], at[2]]))
        yield out, seen, inside


def test_conv_is_the_sum_over_visible_taps() -> None:
    x, mask, out_mask = _case()
    weight, bias = torch.randn(3, 2, 3, 3, 3).double(), torch.randn(3).double()
    y = reference.conv3d(x, mask, out_mask, weight, bias, *WINDOW[1:], 1)
    for out, seen, _ in _windows(x, mask):
        expected = bias.clone() if out_mask[0, 0][out] else torch.zeros(3).double()
        if out_mask[0, 0][out]:
            for tap, value in seen:
                expected += weight[:, :, tap[0], tap[1], tap[2]] @ value
        assert torch.allclose(y[0, :, out[0], out[1], out[2]], expected, atol=1e-12)


def test_pools_follow_their_rules() -> None:
    x, mask, out_mask = _case()
    x = x - 5  # all negative: hidden zeros win
    zero = reference.max_pool3d(x, mask, out_mask, WINDOW, "zero")
    ignore = reference.max_pool3d(x, mask, out_mask, WINDOW, "ignore")
    active = reference.avg_pool3d(x, mask, out_mask, WINDOW[:3], True, None, "active")
    kernel = reference.avg_pool3d(x, mask, out_mask, WINDOW[:3], True, None, "kernel")
    for out, seen, inside in _windows(x, mask):
        if not out_mask[0, 0][out]:
            assert zero[(0, slice(None), *out)].abs().sum() == 0
            continue
        values = torch.stack([v for _, v in seen])
        at = (0, slice(None), *out)
        highest = values.amax(0)
        expected = highest.clamp(min=0) if len(seen) < inside else highest
        assert torch.equal(zero[at], expected)
        assert torch.equal(ignore[at], highest)
        assert torch.allclose(active[at], values.mean(0))
        assert torch.allclose(kernel[at], values.sum(0) / 27)


def test_norm_is_batchnorm1d_over_the_visible_voxels() -> None:
    x, mask, _ = _case()
    x = torch.cat([x, x.flip(2) * 2 + 1])
    mask = torch.cat([mask, mask.flip(3)])
    rows = torch.cat([x[b][:, mask[b, 0]].T for b in range(2)])
    bn = torch.nn.BatchNorm1d(2).double()
    y, mean, var = reference.norm(x, mask, bn.weight, bn.bias, bn.eps, per_sample=False)
    got = torch.cat([y[b][:, mask[b, 0]].T for b in range(2)])
    assert torch.allclose(got, bn(rows), atol=1e-12)
    assert torch.allclose(mean[0], rows.mean(0))
    assert torch.allclose(var[0], rows.var(0, unbiased=False))
    per_sample, means, _ = reference.norm(x, mask, None, None, 1e-5, per_sample=True)
    one = x[1][:, mask[1, 0]]
    expected = (one - one.mean(1, keepdim=True)) / (
        one.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    assert torch.allclose(per_sample[1][:, mask[1, 0]], expected)
    assert torch.allclose(means[1], one.mean(1))


def test_pack_and_unpack_are_inverse() -> None:
    x, mask, _ = _case()
    level = BlockMask(mask[:, 0, ::2, ::2, ::2]).level((4, 4, 4))
    packed = reference.pack(x, level)
    assert torch.equal(packed[0, 0, 0, 1], x[0, :, 0, 0, 1])
    assert torch.equal(reference.unpack(packed, level), torch.where(mask, x, 0.0))


def test_hidden_nan_never_gets_in() -> None:
    x, mask, out_mask = _case()
    x = torch.where(mask, x, torch.nan)
    weight = torch.randn(2, 2, 3, 3, 3).double()
    results = [
        reference.conv3d(x, mask, out_mask, weight, None, *WINDOW[1:], 1),
        reference.max_pool3d(x, mask, out_mask, WINDOW, "zero"),
        reference.norm(x, mask, None, None, 1e-5, False)[0],
        reference.global_pool(x, mask, False),
        reference.densify(x, mask, torch.ones(2).double()),
    ]
    assert all(torch.isfinite(r).all() for r in results)
