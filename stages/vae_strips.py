"""The VAE's layers over activations in strips of rows: a fraction of the memory, the numbers of the whole picture.

Letters: B batch, H W rows and columns of an activation, C its channels, G groups. Group norm takes its statistics
over all strips first, a convolution reads one row of each neighbour, attention sees all positions; so nothing is
blended and nothing depends on where a strip ends. A strip is let go of once no later one needs it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import mlx.core as mx

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.measure import in_words
from flux2_relay.stages.vae_blocks import GROUP_NORM_EPS, Layer, Weights, conv, linear, walk

_SCORES_BYTES = 1 << 28  # attention scores of the queries that are in work at once
_ROWS = (128, 64, 32, 16, 8, 4)  # of a strip; fewer would mostly be borders
_SCRATCH = 14  # tensors as large as a strip while it is in work, 9 of them a CPU's unfolded convolution; measured


class Strips:
    """An activation [B, H, W, C] in strips, from top to bottom; those dropped are gone."""

    def __init__(self, height: int, rows: int) -> None:
        """None yet, of an activation of `height` rows; `rows` is what a strip has."""
        self.height, self.rows = height, rows
        self._strips: list[tuple[int, mx.array]] = []

    def add(self, strip: mx.array) -> None:
        """Compute the next strip, so that it no longer holds what it was made from."""
        mx.eval(strip)
        top = self._strips[-1][0] + self._strips[-1][1].shape[1] if self._strips else 0
        self._strips.append((top, strip))

    def window(self, top: int, bottom: int) -> mx.array:
        """The rows `top` to `bottom` - 1, as far as the picture has them: [B, rows, W, C]."""
        top, bottom = max(top, 0), min(bottom, self.height)
        parts = [
            strip[:, max(top - start, 0) : bottom - start]
            for start, strip in self._strips
            if start < bottom and start + strip.shape[1] > top
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def drop(self, row: int) -> None:
        """Let go of the strips that end above `row`."""
        while self._strips and self._strips[0][0] + self._strips[0][1].shape[1] <= row:
            del self._strips[0]

    def spans(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """First and last row (exclusive) of each strip of the whole height."""
        step = rows or self.rows
        for top in range(0, self.height, step):
            yield top, min(top + step, self.height)


def run(
    layers: Sequence[Layer], x: mx.array, weights: Weights, groups: int, budget_bytes: int | None = None
) -> mx.array:
    """The walk, whole where that fits into `budget_bytes` beside the weights, else in the highest strips that fit.

    x and result as of `vae_blocks.walk`; both ways agree to rounding. InputError says the least budget that works.
    """
    rows = rows_beside(weights, layers, x.shape, budget_bytes)
    return walk(layers, x, weights, groups) if rows is None else walk_strips(layers, x, weights, groups, rows)


def rows_beside(
    weights: Weights, layers: Sequence[Layer], shape: Sequence[int], budget_bytes: int | None
) -> int | None:
    """`rows_for` on this device, for what the weights leave of a budget; None is no limit."""
    if budget_bytes is None:
        return None
    held = sum(array.nbytes for array in weights.values())
    return rows_for(layers, shape, budget_bytes - held, mx.default_device() == mx.Device(mx.gpu))


def rows_for(layers: Sequence[Layer], shape: Sequence[int], budget_bytes: int, gpu: bool = False) -> int | None:
    """Rows of a strip for an input of `shape` [B, H, W, C], None for the whole; `budget_bytes` is without weights."""
    whole = whole_bytes(layers, shape, gpu)
    if whole <= budget_bytes:
        return None
    for rows in _ROWS:
        if strips_bytes(layers, shape, rows) <= budget_bytes:
            return rows
    least, short = strips_bytes(layers, shape, _ROWS[-1]), in_words(max(budget_bytes, 0))
    raise InputError(
        f"memory.budget: {short} beside the VAE's weights is too little for {_picture(layers, shape)}; "
        f"{in_words(least)} is the least that works"
    )


def whole_bytes(layers: Sequence[Layer], shape: Sequence[int], gpu: bool) -> int:
    """About the memory of `vae_blocks.walk` above the weights."""
    # A CPU unfolds each 3 x 3 convolution, 9 tensors and their copies; measured, as is the GPU's share by its parts.
    tensors = 10 if gpu else 32
    peak = 0
    for layer, (B, H, W) in _sizes(layers, shape):
        scores = 2 * B * (H * W) ** 2 if layer.kind == "attention" else 0
        peak = max(peak, 4 * scores + 4 * tensors * B * H * W * max(layer.inputs, layer.outputs))
    return peak


def strips_bytes(layers: Sequence[Layer], shape: Sequence[int], rows: int) -> int:
    """About the memory of `walk_strips` above the weights: what waits, and the strip in work."""
    peak = 0
    for layer, (B, H, W) in _sizes(layers, shape):
        wide = max(layer.inputs, layer.outputs)
        waiting = wide
        if layer.kind == "resnet":
            waiting = max(layer.inputs, layer.outputs + min(layer.inputs, layer.outputs))
        if layer.kind == "attention":  # keys and values beside both; scores twice, as they are and as shares
            waiting = 4 * wide + 2 * _query_rows(B, H, W, rows) * W
        peak = max(peak, 4 * B * W * (H * waiting + _SCRATCH * min(rows + 2, H) * wide))
    return peak


def _sizes(layers: Sequence[Layer], shape: Sequence[int]) -> Iterator[tuple[Layer, tuple[int, int, int]]]:
    """Each layer with B, H and W of its larger side."""
    B, H, W = shape[:3]
    for layer in layers:
        if layer.kind == "upsample":
            H, W = 2 * H, 2 * W
        yield layer, (B, H, W)
        if layer.kind == "downsample":
            H, W = H // 2, W // 2


def _picture(layers: Sequence[Layer], shape: Sequence[int]) -> str:
    *_, (_, (_, H, W)) = _sizes(layers, shape)
    height, width = max(H, shape[1]), max(W, shape[2])
    return f"a picture of {width} x {height} pixels"


def walk_strips(layers: Sequence[Layer], x: mx.array, weights: Weights, groups: int, rows: int) -> mx.array:
    """`vae_blocks.walk` in strips of `rows` rows (even) at every level.

    x [B, H, W, C of the first layer] float32 -> [B, H', W', C of the last] float32.
    """
    strips = Strips(x.shape[1], rows)
    strips.add(x)
    for layer in layers:
        strips = _APPLY[layer.kind](strips, layer, weights, groups)
    return strips.window(0, strips.height)


Change = Callable[[mx.array], mx.array]


class _Moments(NamedTuple):
    """How many values a group has, their mean and the sum of their squared distances from it: [B, 1, 1, G, 1]."""

    total: int
    mean: mx.array
    squares: mx.array


def _moments(x: mx.array, groups: int) -> _Moments:
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, groups, C // groups)
    count = H * W * C // groups
    mean = x.sum(axis=(2, 4), keepdims=True).sum(axis=1, keepdims=True) / count
    squares = ((x - mean) ** 2).sum(axis=(2, 4), keepdims=True).sum(axis=1, keepdims=True)
    mx.eval(mean, squares)
    return _Moments(count, mean, squares)


def _merge(a: _Moments, b: _Moments) -> _Moments:
    """Both together; numerically as good as one pass over all (Chan, Golub and LeVeque 1979)."""
    count, apart = a.total + b.total, b.mean - a.mean
    mean = a.mean + apart * (b.total / count)
    return _Moments(count, mean, a.squares + b.squares + apart * apart * (a.total * b.total / count))


def _norm_of(x: Strips, weights: Weights, name: str, groups: int) -> Change:
    """The group norm of `x` as something to be done to any of its rows."""
    moments = reduce(_merge, (_moments(x.window(*span), groups) for span in x.spans()))
    scale = mx.rsqrt(moments.squares / moments.total + GROUP_NORM_EPS)
    mx.eval(moments.mean, scale)
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def norm(rows: mx.array) -> mx.array:
        B, H, W, C = rows.shape
        grouped = rows.reshape(B, H, W, groups, C // groups)
        return ((grouped - moments.mean) * scale).reshape(B, H, W, C) * weight + bias

    return norm


def _activation_of(x: Strips, weights: Weights, name: str, groups: int) -> Change:
    norm = _norm_of(x, weights, name, groups)

    def activation(rows: mx.array) -> mx.array:
        rows = norm(rows)
        return rows * mx.sigmoid(rows)

    return activation


def _convolved(x: Strips, weights: Weights, name: str, before: Change = lambda rows: rows) -> Iterator[mx.array]:
    """A 3 x 3 convolution of `before(x)`, strip by strip; the zero border comes after `before`."""
    for top, bottom in x.spans():
        window = before(x.window(top - 1, bottom + 1))
        border = (int(top == 0), int(bottom == x.height))
        yield conv(mx.pad(window, [(0, 0), border, (0, 0), (0, 0)]), weights, name, padding=(0, 1))


def _conv3(x: Strips, layer: Layer, weights: Weights, groups: int) -> Strips:
    result = Strips(x.height, x.rows)
    for (top, _), strip in zip(x.spans(), _convolved(x, weights, layer.name), strict=True):
        result.add(strip)
        x.drop(top)
    return result


def _conv1(x: Strips, layer: Layer, weights: Weights, groups: int) -> Strips:
    return _mapped(x, lambda rows: conv(rows, weights, layer.name, padding=0))


def _norm(x: Strips, layer: Layer, weights: Weights, groups: int) -> Strips:
    return _mapped(x, _activation_of(x, weights, layer.name, groups))


def _mapped(x: Strips, change: Change) -> Strips:
    """A change that needs no neighbours; `x` is consumed."""
    result = Strips(x.height, x.rows)
    for top, bottom in x.spans():
        result.add(change(x.window(top, bottom)))
        x.drop(bottom)
    return result


def _resnet(x: Strips, layer: Layer, weights: Weights, groups: int) -> Strips:
    """Two tensors of the wider kind are held at most: a narrowing shortcut is taken as soon as its rows are read."""
    name = layer.name
    early = layer.outputs < layer.inputs

    def shortcut(rows: mx.array) -> mx.array:
        is_other = layer.outputs != layer.inputs
        return conv(rows, weights, f"{name}.conv_shortcut", padding=0) if is_other else rows

    inner, beside = Strips(x.height, x.rows), Strips(x.height, x.rows) if early else x
    first = _convolved(x, weights, f"{name}.conv1", _activation_of(x, weights, f"{name}.norm1", groups))
    for (top, bottom), strip in zip(x.spans(), first, strict=True):
        inner.add(strip)
        if early:
            beside.add(shortcut(x.window(top, bottom)))
            x.drop(top)
    result = Strips(x.height, x.rows)
    second = _convolved(inner, weights, f"{name}.conv2", _activation_of(inner, weights, f"{name}.norm2", groups))
    for (top, bottom), strip in zip(inner.spans(), second, strict=True):
        rows = beside.window(top, bottom)
        result.add((rows if early else shortcut(rows)) + strip)
        inner.drop(top)
        beside.drop(bottom)
    return result


def _attention(x: Strips, layer: Layer, weights: Weights, groups: int) -> Strips:
    """Keys and values whole, queries strip by strip."""
    name, norm = layer.name, _norm_of(x, weights, f"{layer.name}.group_norm", groups)

    def tokens(rows: mx.array, which: str) -> mx.array:
        B, H, W, C = rows.shape
        return linear(norm(rows).reshape(B, 1, H * W, C), weights, f"{name}.{which}")

    def of_all(which: str) -> mx.array:
        parts = []
        for span in x.spans():
            parts.append(tokens(x.window(*span), which))
            mx.eval(parts)
        return mx.concatenate(parts, axis=2)

    keys, values = of_all("to_k"), of_all("to_v")
    mx.eval(keys, values)
    result = Strips(x.height, x.rows)
    B, _, W, _ = x.window(0, 1).shape
    for top, bottom in x.spans(_query_rows(B, x.height, W, x.rows)):
        rows = x.window(top, bottom)
        mixed = mx.fast.scaled_dot_product_attention(tokens(rows, "to_q"), keys, values, scale=rows.shape[-1] ** -0.5)
        result.add(rows + linear(mixed, weights, f"{name}.to_out.0").reshape(rows.shape))
        x.drop(bottom)
    return result


def _query_rows(B: int, H: int, W: int, rows: int) -> int:
    """Rows of queries that are in work at once, each of which has scores for all H x W positions."""
    return max(1, min(rows, _SCORES_BYTES // (4 * B * W * H * W)))


def _downsample(x: Strips, layer: Layer, weights: Weights, groups: int) -> Strips:
    """Output row r reads the rows 2r to 2r + 2; the zero border is right and bottom only."""
    result = Strips(x.height // 2, x.rows)
    for top, bottom in result.spans():
        window = x.window(2 * top, 2 * bottom + 1)
        below = int(bottom == result.height)
        result.add(conv(mx.pad(window, [(0, 0), (0, below), (0, 1), (0, 0)]), weights, layer.name, 0, stride=2))
        x.drop(2 * bottom)
    return result


def _upsample(x: Strips, layer: Layer, weights: Weights, groups: int) -> Strips:
    """Each row and column twice, then a convolution; doubled row r is row r // 2."""
    result = Strips(2 * x.height, x.rows)
    for top, bottom in result.spans():
        first = max(top - 1, 0) // 2
        rows = x.window(first, bottom // 2 + 1)
        doubled = mx.repeat(mx.repeat(rows, 2, axis=1), 2, axis=2)
        above, below = int(top == 0), int(bottom == result.height)
        doubled = doubled[:, top - 1 + above - 2 * first : bottom + 1 - below - 2 * first]
        padded = mx.pad(doubled, [(0, 0), (above, below), (0, 0), (0, 0)])
        result.add(conv(padded, weights, layer.name, padding=(0, 1)))
        x.drop(top // 2)
    return result


_APPLY: Mapping[str, Callable[[Strips, Layer, Weights, int], Strips]] = {
    "conv3": _conv3,
    "conv1": _conv1,
    "norm": _norm,
    "resnet": _resnet,
    "attention": _attention,
    "downsample": _downsample,
    "upsample": _upsample,
}
