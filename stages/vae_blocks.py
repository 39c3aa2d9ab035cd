"""The layers of AutoencoderKLFlux2: one flat list a half, which gives names, shapes and the pass itself.

Letters: B batch, H W rows and columns of an activation, C its channels. Activations are NHWC, float32.
A layer needs nothing but its input and its own tensors, so a walk may hold activations whole or in strips.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import mlx.core as mx

from flux2_relay.stages.spec import VaeSpec

Kind = Literal["conv3", "conv1", "norm", "resnet", "attention", "downsample", "upsample"]
Weights = Mapping[str, mx.array]
Shapes = dict[str, tuple[int, ...]]

GROUP_NORM_EPS = 1e-6
"""Of every group norm; the checkpoint's config does not carry it (diffusers passes it in code)."""


class Layer(NamedTuple):
    """One step of a walk: what it does, the prefix of its tensors, and its channels."""

    kind: Kind
    name: str
    inputs: int
    outputs: int


def encoder_layers(spec: VaeSpec) -> tuple[Layer, ...]:
    """The encoder half in walking order, quant_conv last: pixels -> moments (mean, then log-variance)."""
    widths, moments = spec.block_out_channels, 2 * spec.latent_channels
    layers = [Layer("conv3", "encoder.conv_in", spec.in_channels, widths[0])]
    inputs = widths[0]
    for level, width in enumerate(widths):
        block = f"encoder.down_blocks.{level}"
        layers += _resnets(block, inputs, width, spec.layers_per_block)
        if level < len(widths) - 1:
            layers.append(Layer("downsample", f"{block}.downsamplers.0.conv", width, width))
        inputs = width
    layers += _middle("encoder.mid_block", inputs, spec.attention)
    layers.append(Layer("norm", "encoder.conv_norm_out", inputs, inputs))
    layers.append(Layer("conv3", "encoder.conv_out", inputs, moments))
    if spec.quant_conv:
        layers.append(Layer("conv1", "quant_conv", moments, moments))
    return tuple(layers)


def decoder_layers(spec: VaeSpec) -> tuple[Layer, ...]:
    """The decoder half in walking order, post_quant_conv first: latents -> pixels, unclamped."""
    widths = tuple(reversed(spec.decoder_block_out_channels or spec.block_out_channels))
    latent = spec.latent_channels
    layers = [Layer("conv1", "post_quant_conv", latent, latent)] if spec.post_quant_conv else []
    layers.append(Layer("conv3", "decoder.conv_in", latent, widths[0]))
    layers += _middle("decoder.mid_block", widths[0], spec.attention)
    inputs = widths[0]
    for level, width in enumerate(widths):
        block = f"decoder.up_blocks.{level}"
        layers += _resnets(block, inputs, width, spec.layers_per_block + 1)
        if level < len(widths) - 1:
            layers.append(Layer("upsample", f"{block}.upsamplers.0.conv", width, width))
        inputs = width
    layers.append(Layer("norm", "decoder.conv_norm_out", inputs, inputs))
    layers.append(Layer("conv3", "decoder.conv_out", inputs, spec.out_channels))
    return tuple(layers)


def _resnets(block: str, inputs: int, width: int, count: int) -> list[Layer]:
    """The resnets of one level; only the first changes the width."""
    return [Layer("resnet", f"{block}.resnets.{j}", inputs if j == 0 else width, width) for j in range(count)]


def _middle(block: str, width: int, attention: bool) -> list[Layer]:
    """Resnet, attention (where the spec has it), resnet, all of one width."""
    first, second = _resnets(block, width, width, 2)
    between = [Layer("attention", f"{block}.attentions.0", width, width)] if attention else []
    return [first, *between, second]


def tensor_shapes(layers: Sequence[Layer]) -> Shapes:
    """Every tensor of ``layers`` under its diffusers name, with its shape as the file has it (OIHW)."""
    shapes: Shapes = {}
    for layer in layers:
        shapes.update(_layer_shapes(layer))
    return shapes


def _layer_shapes(layer: Layer) -> Shapes:
    kind, name, inputs, outputs = layer
    if kind == "norm":
        return _norm_shapes(name, inputs)
    if kind == "resnet":
        first = _norm_shapes(f"{name}.norm1", inputs) | _conv_shapes(f"{name}.conv1", inputs, outputs, 3)
        second = _norm_shapes(f"{name}.norm2", outputs) | _conv_shapes(f"{name}.conv2", outputs, outputs, 3)
        shortcut = _conv_shapes(f"{name}.conv_shortcut", inputs, outputs, 1) if inputs != outputs else {}
        return first | second | shortcut
    if kind == "attention":
        shapes = _norm_shapes(f"{name}.group_norm", inputs)
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= {f"{name}.{linear}.weight": (inputs, inputs), f"{name}.{linear}.bias": (inputs,)}
        return shapes
    return _conv_shapes(name, inputs, outputs, 1 if kind == "conv1" else 3)


def _norm_shapes(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _conv_shapes(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def walk(layers: Sequence[Layer], x: mx.array, weights: Weights, groups: int) -> mx.array:
    """Run ``layers`` one after another.

    x [B, H, W, C of the first layer] float32 -> [B, H', W', C of the last] float32. ``weights`` holds conv
    kernels as OHWI; ``groups`` is the spec's ``norm_num_groups``.
    """
    for layer in layers:
        x = _APPLY[layer.kind](x, weights, layer.name, groups)
        mx.eval(x)  # one layer is one short piece of GPU work, and what it consumed is freed
    return x


def group_norm(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    """Group norm over runs of neighbouring channels, as torch groups them.

    x [B, H, W, C] -> [B, H, W, C]; ``nn.GroupNorm(..., eps=1e-6, pytorch_compatible=True)`` without its two
    transposed copies. Means are taken row by row first: one float32 sum over a megapixel loses digits.
    """
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, groups, C // groups)
    centred = x - _mean(x)
    scale = mx.rsqrt(_mean(centred * centred) + GROUP_NORM_EPS)
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return (centred * scale).reshape(B, H, W, C) * weight + bias


def _mean(x: mx.array) -> mx.array:
    """Mean over rows, columns and a group's channels: [B, H, W, G, C/G] -> [B, 1, 1, G, 1]."""
    return x.mean(axis=(2, 4), keepdims=True).mean(axis=1, keepdims=True)


def _norm(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    x = group_norm(x, weights, name, groups)
    return x * mx.sigmoid(x)


def conv(x: mx.array, weights: Weights, name: str, padding: int | tuple[int, int], stride: int = 1) -> mx.array:
    """A convolution with bias; `padding` is zeros on every side, or (rows, columns)."""
    return mx.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=padding) + weights[f"{name}.bias"]


def _conv3(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    return conv(x, weights, name, padding=1)


def _conv1(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    return conv(x, weights, name, padding=0)


def _resnet(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    y = _conv3(_norm(x, weights, f"{name}.norm1", groups), weights, f"{name}.conv1", groups)
    y = _conv3(_norm(y, weights, f"{name}.norm2", groups), weights, f"{name}.conv2", groups)
    if f"{name}.conv_shortcut.weight" in weights:
        x = _conv1(x, weights, f"{name}.conv_shortcut", groups)
    return x + y


def _attention(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    """One head as wide as the activation, over all positions; no activation after its norm."""
    B, H, W, C = x.shape
    tokens = group_norm(x, weights, f"{name}.group_norm", groups).reshape(B, 1, H * W, C)
    q, k, v = (linear(tokens, weights, f"{name}.{which}") for which in ("to_q", "to_k", "to_v"))
    mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=C**-0.5)
    return x + linear(mixed, weights, f"{name}.to_out.0").reshape(B, H, W, C)


def linear(x: mx.array, weights: Weights, name: str) -> mx.array:
    """A linear with bias over the last axis."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _downsample(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    """Halve both sides. The zero border is right and bottom only: output row r reads rows 2r to 2r+2."""
    return conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]), weights, name, padding=0, stride=2)


def _upsample(x: mx.array, weights: Weights, name: str, groups: int) -> mx.array:
    """Double both sides by repeating pixels, then convolve."""
    B, H, W, C = x.shape
    doubled = mx.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
    return _conv3(doubled, weights, name, groups)


_APPLY: Mapping[str, Callable[[mx.array, Weights, str, int], mx.array]] = {
    "conv3": _conv3,
    "conv1": _conv1,
    "norm": _norm,
    "resnet": _resnet,
    "attention": _attention,
    "downsample": _downsample,
    "upsample": _upsample,
}
