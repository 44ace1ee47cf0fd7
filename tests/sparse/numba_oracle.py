"""The sparse ops as loops over voxels and taps: a second oracle that shares no code with the first.

Numpy arrays in float64: volumes `[B, C, D, H, W]`, voxel masks `[B, D, H, W]` (bool), everything per axis
as three integers (z, y, x). A hidden voxel is never read as a number, so it may hold NaN; the output is 0
wherever `out_mask` is False.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit


@njit
def window_size(n, kernel, stride, lower, upper, dilation, ceil_mode):
    """Windows that fit on one axis of n voxels, as torch counts them."""
    span = n + lower + upper - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    count = -(-span // stride) + 1
    # The last window must start inside the volume or its lower padding.
    return count - 1 if (count - 1) * stride >= n + lower else count


@njit
def _check_windows(x, out_mask, kernel, stride, lower, upper, dilation, ceil_mode):
    for a in range(3):
        n, out = x.shape[2 + a], out_mask.shape[1 + a]
        if out != window_size(n, kernel[a], stride[a], lower[a], upper[a], dilation[a], ceil_mode):
            raise ValueError("the output mask does not have the size of the windows")


@njit
def _inside(z, y, x, shape):
    return 0 <= z < shape[2] and 0 <= y < shape[3] and 0 <= x < shape[4]


@njit
def conv3d(x, mask, out_mask, weight, bias, stride, lower, upper, dilation, groups):
    """y[o] = bias + sum over taps t of weight[t] * x[o * stride - lower + t * dilation]."""
    c_out, c_in = weight.shape[:2]
    kernel = weight.shape[2:]
    _check_windows(x, out_mask, kernel, stride, lower, upper, dilation, False)
    y = np.zeros((x.shape[0], c_out, *out_mask.shape[1:]))
    for b, oz, oy, ox in np.argwhere(out_mask):
        for c in range(c_out):
            total = 0.0 if bias is None else bias[c]
            first = c // (c_out // groups) * c_in
            for tz, ty, tx in np.ndindex(kernel):
                iz = oz * stride[0] - lower[0] + tz * dilation[0]
                iy = oy * stride[1] - lower[1] + ty * dilation[1]
                ix = ox * stride[2] - lower[2] + tx * dilation[2]
                if _inside(iz, iy, ix, x.shape) and mask[b, iz, iy, ix]:
                    for i in range(c_in):
                        total += weight[c, i, tz, ty, tx] * x[b, first + i, iz, iy, ix]
            y[b, c, oz, oy, ox] = total
    return y


@njit
def conv_transpose3d(x, mask, out_mask, weight, bias, stride, padding, extra, dilation, groups):
    """Each active voxel i adds weight[t] * x[i] to voxel i * stride - padding + t * dilation."""
    c_in, c_out = weight.shape[:2]  # all inputs, and the outputs of one group
    kernel = weight.shape[2:]
    y = np.zeros((x.shape[0], c_out * groups, *out_mask.shape[1:]))
    for a in range(3):
        reach = dilation[a] * (kernel[a] - 1) + extra[a] + 1
        if out_mask.shape[1 + a] != (x.shape[2 + a] - 1) * stride[a] - 2 * padding[a] + reach:
            raise ValueError("the output mask does not have the size of the transposed windows")
    for b, iz, iy, ix in np.argwhere(mask):
        for tz, ty, tx in np.ndindex(kernel):
            oz = iz * stride[0] - padding[0] + tz * dilation[0]
            oy = iy * stride[1] - padding[1] + ty * dilation[1]
            ox = ix * stride[2] - padding[2] + tx * dilation[2]
            if not (_inside(oz, oy, ox, y.shape) and out_mask[b, oz, oy, ox]):
                continue
            for i in range(c_in):
                first = i // (c_in // groups) * c_out
                for c in range(c_out):
                    y[b, first + c, oz, oy, ox] += weight[i, c, tz, ty, tx] * x[b, i, iz, iy, ix]
    if bias is not None:
        for b, oz, oy, ox in np.argwhere(out_mask):
            y[b, :, oz, oy, ox] += bias
    return y


@njit
def max_pool3d(
    x, mask, out_mask, kernel, stride, lower, upper, dilation, ceil_mode, hidden_is_zero
):
    """Largest voxel of a window; a hidden one is 0 or absent, padding always absent. None: 0."""
    _check_windows(x, out_mask, kernel, stride, lower, upper, dilation, ceil_mode)
    y = np.zeros((x.shape[0], x.shape[1], *out_mask.shape[1:]))
    for b, oz, oy, ox in np.argwhere(out_mask):
        for c in range(x.shape[1]):
            highest = -math.inf
            for tz, ty, tx in np.ndindex(kernel):
                iz = oz * stride[0] - lower[0] + tz * dilation[0]
                iy = oy * stride[1] - lower[1] + ty * dilation[1]
                ix = ox * stride[2] - lower[2] + tx * dilation[2]
                if not _inside(iz, iy, ix, x.shape):
                    continue
                if mask[b, iz, iy, ix]:
                    highest = max(highest, x[b, c, iz, iy, ix])
                elif hidden_is_zero:
                    highest = max(highest, 0.0)
            y[b, c, oz, oy, ox] = 0.0 if highest == -math.inf else highest
    return y


@njit
def avg_pool3d(
    x, mask, out_mask, kernel, stride, padding, ceil_mode, count_padding, override, by_active
):
    """Sum over the active voxels of a window, divided as torch does or by their number.

    Torch's divisor: `override` where it is not 0; else the voxels of the window that lie in the volume,
    and with `count_padding` in its padding too. What ceil mode adds behind the padding never counts.
    """
    _check_windows(x, out_mask, kernel, stride, padding, padding, (1, 1, 1), ceil_mode)
    y = np.zeros((x.shape[0], x.shape[1], *out_mask.shape[1:]))
    _, _, depth, height, width = x.shape
    for b, oz, oy, ox in np.argwhere(out_mask):
        for c in range(x.shape[1]):
            total, active, inside, padded = 0.0, 0, 0, 0
            for tz, ty, tx in np.ndindex(kernel):
                iz = oz * stride[0] - padding[0] + tz
                iy = oy * stride[1] - padding[1] + ty
                ix = ox * stride[2] - padding[2] + tx
                if iz < depth + padding[0] and iy < height + padding[1] and ix < width + padding[2]:
                    padded += 1
                if _inside(iz, iy, ix, x.shape):
                    inside += 1
                    if mask[b, iz, iy, ix]:
                        active += 1
                        total += x[b, c, iz, iy, ix]
            if by_active:
                divisor = active
            elif override:
                divisor = override
            else:
                divisor = padded if count_padding else inside
            y[b, c, oz, oy, ox] = total / divisor if divisor else 0.0
    return y


@njit
def _normalise(y, x, mask, eps):
    """Fills a box [b, c, D, H, W] of y by the statistics of all active voxels of x; their moments."""
    where = np.argwhere(mask)
    count = len(where) * x.shape[1]
    if count == 0:
        return 0.0, 0.0
    mean, var = 0.0, 0.0
    for c in range(x.shape[1]):
        for b, z, h, w in where:
            mean += x[b, c, z, h, w] / count
    for c in range(x.shape[1]):
        for b, z, h, w in where:
            var += (x[b, c, z, h, w] - mean) ** 2 / count
    for c in range(x.shape[1]):
        for b, z, h, w in where:
            y[b, c, z, h, w] = (x[b, c, z, h, w] - mean) / math.sqrt(var + eps)
    return mean, var


@njit
def _affine(y, mask, weight, bias):
    for b, z, h, w in np.argwhere(mask):
        for c in range(y.shape[1]):
            y[b, c, z, h, w] = y[b, c, z, h, w] * weight[c] + bias[c]


@njit
def batch_norm(x, mask, weight, bias, eps):
    """Each channel by the active voxels of the batch; also its mean and biased variance [1, C]."""
    channels = x.shape[1]
    y, mean, var = np.zeros(x.shape), np.zeros((1, channels)), np.zeros((1, channels))
    for c in range(channels):
        mean[0, c], var[0, c] = _normalise(y[:, c : c + 1], x[:, c : c + 1], mask, eps)
    _affine(y, mask, weight, bias)
    return y, mean, var


@njit
def instance_norm(x, mask, weight, bias, eps):
    """Each channel of each sample by its active voxels; also mean and biased variance [B, C]."""
    batch, channels = x.shape[:2]
    y, mean, var = np.zeros(x.shape), np.zeros((batch, channels)), np.zeros((batch, channels))
    for b in range(batch):
        shown = mask[b : b + 1]
        for c in range(channels):
            one = x[b : b + 1, c : c + 1]
            mean[b, c], var[b, c] = _normalise(y[b : b + 1, c : c + 1], one, shown, eps)
    _affine(y, mask, weight, bias)
    return y, mean, var


@njit
def group_norm(x, mask, groups, weight, bias, eps):
    """Each group of neighbouring channels of each sample by its active voxels."""
    y, width = np.zeros(x.shape), x.shape[1] // groups
    for b in range(x.shape[0]):
        for first in range(0, x.shape[1], width):
            group = x[b : b + 1, first : first + width]
            _normalise(y[b : b + 1, first : first + width], group, mask[b : b + 1], eps)
    _affine(y, mask, weight, bias)
    return y


@njit
def global_pool(x, mask, maximum):
    """Mean or maximum [B, C] of the active voxels of each sample; 0 without any."""
    y = np.zeros(x.shape[:2])
    for b in range(x.shape[0]):
        where = np.argwhere(mask[b])
        for c in range(x.shape[1] if len(where) else 0):
            total, highest = 0.0, -math.inf
            for z, h, w in where:
                total += x[b, c, z, h, w]
                highest = max(highest, x[b, c, z, h, w])
            y[b, c] = highest if maximum else total / len(where)
    return y


@njit
def _linear_taps(o, n_in, n_out, align_corners, factor):
    """Lower source voxel of output voxel o on one axis, and the weight of its upper neighbour."""
    if align_corners:
        source = o * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
    else:
        source = max((o + 0.5) * (1 / factor if factor else n_in / n_out) - 0.5, 0.0)
    lower = min(int(source), n_in - 1)
    return lower, min(source - lower, 1.0)


@njit
def _read(x, mask, b, c, z, h, w):
    """A voxel, 0 where hidden; places behind the last voxel of an axis read that voxel."""
    z, h, w = min(z, x.shape[2] - 1), min(h, x.shape[3] - 1), min(w, x.shape[4] - 1)
    return x[b, c, z, h, w] if mask[b, z, h, w] else 0.0


@njit
def interpolate(x, mask, out_mask, linear, align_corners, exact, scales):
    """Resizes the volume whose hidden voxels are 0, trilinear or nearest.

    `align_corners` of the linear one puts the outer voxels of both volumes on each other, `exact` of the
    nearest one measures from the middle of voxels. `scales` are the scale factors, which decide the
    places to read at, or 0 to take the ratio of sizes.
    """
    y = np.zeros((x.shape[0], x.shape[1], *out_mask.shape[1:]))
    for b, oz, oy, ox in np.argwhere(out_mask):
        lower, upper = np.zeros(3, np.int64), np.zeros(3)
        for a, o in enumerate((oz, oy, ox)):
            n_in, n_out = x.shape[2 + a], out_mask.shape[1 + a]
            if linear:
                lower[a], upper[a] = _linear_taps(o, n_in, n_out, align_corners, scales[a])
            else:
                step = 1 / scales[a] if scales[a] else n_in / n_out
                lower[a] = min(int((o + 0.5 if exact else o) * step), n_in - 1)
        for c in range(x.shape[1]):
            for corner in np.ndindex((2, 2, 2)):
                share = 1.0
                for a in range(3):
                    share *= upper[a] if corner[a] else 1 - upper[a]
                if share > 0:
                    z, h, w = lower[0] + corner[0], lower[1] + corner[1], lower[2] + corner[2]
                    y[b, c, oz, oy, ox] += share * _read(x, mask, b, c, z, h, w)
    return y
