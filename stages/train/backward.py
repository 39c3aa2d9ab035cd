"""The two kinds of block, backward: cotangents pulled through the pieces of `blocks.py`, written out by hand.

Only adapters have gradients, so no product for a base weight is formed. Autodiff is used inside the small parts that
have no weights (layer norm, RMS norm with rotation, attention). Cotangents of fused projections stay in pieces and meet
the rows of the weight one by one; they are never joined. What the forward pass kept is used, else computed again.

Letters: B batch, T text tokens, L image tokens, D hidden, N heads, d head dim, M MLP width, r rank.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx

from flux2_relay.stages import kernels
from flux2_relay.stages.quantize import dense
from flux2_relay.stages.train import blocks
from flux2_relay.stages.train.blocks import (
    SINGLE_IN,
    SINGLE_NORMS,
    SINGLE_OUT,
    STREAMS,
    Block,
    KeptDouble,
    Linear,
    Modulations,
    Norms,
    Run,
    Sizes,
)
from flux2_relay.stages.train.cuts import cut, joined, product, split
from flux2_relay.stages.train.embeddings import Rotary
from flux2_relay.stages.train.kinds import Kept, Named

Gradients = dict[str, Named]
"""Linear's name inside its block -> gradients of its adapter."""


def through_linear(cotangents: Sequence[mx.array], layer: Linear, columns: int) -> tuple[mx.array, Kept | None]:
    """The cotangent [..., columns] of a linear's input, and what its adapter's gradients start from."""
    weight, adapter = layer
    matrix = dense(weight, columns, cotangents[0].dtype)
    if not adapter:
        return product(cotangents, cut(matrix, cotangents, axis=0)), None
    return adapter.pull(cotangents, matrix)


def adapter_gradients(inputs: Sequence[mx.array], cotangents: Sequence[mx.array], kept: Kept, layer: Linear) -> Named:
    """Gradients of an adapter, from the pieces of its linear's input and of the output's cotangent."""
    weight, adapter = layer
    columns = sum(x.shape[-1] for x in inputs)
    assert adapter
    return adapter.gradients(inputs, cotangents, kept, dense(weight, columns, inputs[0].dtype))


def through_modulate(x: mx.array, scale: mx.array, cotangent: mx.array, eps: float) -> mx.array:
    """The cotangent of `blocks.modulate`'s x [B, L, D]."""
    _, pulled = mx.vjp(lambda x: [mx.fast.layer_norm(x, None, None, eps)], [x], [cotangent * (1 + scale)])
    return pulled[0]


def through_gated(wide: mx.array, cotangent: mx.array) -> list[mx.array]:
    """`blocks.gated` once more [..., M], and the cotangents of gate and up [..., M]; float32 inside.

    d silu(a) = s (1 + a (1 - s)), s = sigmoid(a).
    """
    gate, up = (x.astype(mx.float32) for x in split(wide, 2, axis=-1))
    g, share = cotangent.astype(mx.float32), mx.sigmoid(gate)
    results = gate * share * up, g * up * share * (1 + gate * (1 - share)), g * gate * share
    out, of_gate, of_up = (x.astype(wide.dtype) for x in results)
    # One kernel instead of several: compiled, outputs are only fused where one depends on the others. Never chosen.
    return [out, mx.where(share > 2, out + of_up, of_gate), of_up]


def single_through_gated(wide: mx.array, cotangent: mx.array, sizes: Sizes) -> list[mx.array]:
    """The same of a single block's fused projection."""
    return through_gated(blocks.single_parts(wide, sizes)[1], cotangent)


def through_attention(query: mx.array, key: mx.array, value: mx.array, cotangent: mx.array) -> list[mx.array]:
    """Attention once more, and the cotangents of q, k and v; all [B, heads, rows, d]."""
    outputs, pulled = mx.vjp(lambda *qkv: [kernels.attention(*qkv)], [query, key, value], [cotangent])
    return [outputs[0], *pulled]


def attention_inputs(
    wide: Sequence[mx.array], scales: Sequence[Norms], rotary: Rotary, sizes: Sizes, cotangents: Sequence[mx.array]
) -> list[mx.array]:
    """q, k, v once more, and the cotangent of attention's output as heads; all [B, N, rows, d]."""
    heads = blocks.turned_heads(wide, scales, rotary, sizes)
    return [*heads, blocks.heads_of(joined(list(cotangents), axis=1), scales[0][0].shape[0])]


def through_turned_heads(
    wide: Sequence[mx.array],
    scales: Sequence[Norms],
    rotary: Rotary,
    sizes: Sizes,
    parts: Sequence[Sequence[mx.array]],
) -> tuple[list[mx.array], list[tuple[mx.array, mx.array]]]:
    """From attention's output and the cotangents of q, k and v, each cut by heads: what each stream has of them.

    The output [B, rows, D], the cotangents of q and k side by side [B, rows, 2D] and that of v [B, rows, D].
    """
    out, query, key, value = (joined(list(part), axis=1) for part in parts)
    both = mx.stack([query.swapaxes(1, 2), key.swapaxes(1, 2)], axis=2)
    rows = list(accumulate(x.shape[1] for x in wide))[:-1]
    streams = [split(x, rows, axis=1) if rows else [x] for x in (both, blocks.rows_of(value), blocks.rows_of(out))]
    found, tables = [], blocks.stream_tables(wide, rotary)
    for projected, norms, table, pair, of_value in zip(wide, scales, tables, *streams[:2], strict=True):
        cos, _, back = blocks.turning(norms, table)
        inside, _ = blocks.paired(projected, norms[0].shape[0], sizes)
        turned = blocks.turn(pair, cos, back)
        _, (pulled,) = mx.vjp(lambda x: [mx.fast.rms_norm(x, None, sizes.eps)], [inside], [turned])
        found.append((pulled.reshape(*pulled.shape[:2], -1), of_value))
    return streams[2], found


def through_leave(gate: mx.array, layer: Linear, cotangent: mx.array, columns: int) -> list[Any]:
    """Of `blocks.leave`: cotangents of the linear's output and of its input, and what its adapter keeps."""
    gated = gate * cotangent
    inner, kept = through_linear([gated], layer, columns)
    return [gated, inner, kept]


def enter_factors(
    x: mx.array, modulation: Modulations, layer: Linear, cotangents: Sequence[mx.array], eps: float
) -> tuple[Named, mx.array]:
    """Of `blocks.enter` with one linear: gradients of its adapter, and the cotangent of its (modulated) input."""
    pulled, kept = through_linear(cotangents, layer, x.shape[-1])
    if kept is None:
        return {}, pulled
    modulated = blocks.modulate(x, modulation[0], modulation[1], eps)
    return adapter_gradients([modulated], cotangents, kept, layer), pulled


def input_sum(x: mx.array, scale: mx.array, pulled: Sequence[mx.array], residual: mx.array, eps: float) -> mx.array:
    """The cotangent of a modulated branch's x: what came through its linears, and what went past them."""
    total = pulled[0]
    for other in pulled[1:]:
        total = total + other
    return residual + through_modulate(x, scale, total, eps)


class Backward:
    """The backward pass of blocks; `heads` attention heads at a time (0: all), for backends without a fused kernel."""

    def __init__(self, run: Run, rotary: Rotary, heads: int = 0) -> None:
        """`run` calls every piece; `rotary` is that of the pass."""
        self.run, self.rotary, self.heads = run, rotary, heads

    def single(
        self,
        block: Block,
        hidden: mx.array,
        kept: mx.array | None,
        modulation: Modulations,
        cotangent: mx.array,
        need_input: bool,
    ) -> tuple[Gradients, mx.array | None]:
        """Gradients of a single block's adapters, and the cotangent [B, T + L, D] of its input if needed."""
        run, sizes, gradients = self.run, block.sizes, {}
        wide = blocks.single_start(run, block, hidden, modulation) if kept is None else kept
        layer = block.layer(SINGLE_OUT)
        gated, inner, low = run(through_leave, modulation[2], layer, cotangent, sizes.hidden + sizes.mlp)
        of_attention, of_mlp = split(inner, [sizes.hidden], axis=-1)
        # Attention first, while the MLP's cotangents are not there yet; and each array goes once it was used.
        outs, ((of_both, of_value),) = self._attention([wide], [block.norms(SINGLE_NORMS)], [of_attention], sizes)
        del inner, of_attention
        activated, of_gate, of_up = run(single_through_gated, wide, of_mlp, sizes)
        del wide, of_mlp
        self._note(gradients, block, SINGLE_OUT, [outs[0], activated], [gated], low)
        del outs, activated, gated
        cotangents, residual = [of_both, of_value, of_gate, of_up], cotangent if need_input else None
        return gradients, self._enter(gradients, block, [(SINGLE_IN, cotangents)], hidden, modulation, residual)

    def double(
        self,
        block: Block,
        streams: Sequence[mx.array],
        kept: KeptDouble | None,
        modulation: Sequence[Modulations],
        cotangents: Sequence[mx.array],
        need_input: bool,
    ) -> tuple[Gradients, list[mx.array | None]]:
        """Gradients of a double block's adapters, and the cotangents of text and image if needed."""
        run, sizes, gradients = self.run, block.sizes, {}
        if kept is None:
            kept = blocks.double_attend(run, block, streams, modulation, self.rotary)
        past = [self._mlp(gradients, block, kept, modulation, place, cotangents[place]) for place in (0, 1)]
        leaving = [
            run(through_leave, m[2], block.layer(names.out), g, sizes.hidden)
            for names, m, g in zip(STREAMS, modulation, past, strict=True)
        ]
        scales = [block.norms(names.norms) for names in STREAMS]
        outs, of_wide = self._attention(kept.wide, scales, [inner for _, inner, _ in leaving], sizes)
        del kept
        for place, names in enumerate(STREAMS):
            gated, _, low = leaving[place]
            self._note(gradients, block, names.out, [outs[place]], [gated], low)
        del outs, leaving
        pulled = []
        for place, names in enumerate(STREAMS):
            of_both, of_value = of_wide[place]
            parts = [*split(of_both, 2, axis=-1), of_value]
            layers = [(name, [part]) for name, part in zip(names.qkv, parts, strict=True)]
            residual = past[place] if need_input else None
            pulled.append(self._enter(gradients, block, layers, streams[place], modulation[place], residual))
        return gradients, pulled

    def _mlp(
        self,
        gradients: Gradients,
        block: Block,
        kept: KeptDouble,
        modulation: Sequence[Modulations],
        place: int,
        cotangent: mx.array,
    ) -> mx.array:
        """The MLP of one stream of a double block: its gradients, and the cotangent of the stream before it."""
        (into, out), m = STREAMS[place].mlp, modulation[place]
        gated, inner, low = self.run(through_leave, m[5], block.layer(out), cotangent, block.sizes.mlp)
        up = kept.up[place] if kept.up else blocks.double_up(self.run, block, kept.middle, modulation, place)
        activated, of_gate, of_up = self.run(through_gated, up, inner)
        del up, inner
        self._note(gradients, block, out, [activated], [gated], low)
        del activated, gated
        before = self._enter(gradients, block, [(into, [of_gate, of_up])], kept.middle[place], m[3:5], cotangent)
        assert before is not None
        return before

    def _enter(
        self,
        gradients: Gradients,
        block: Block,
        layers: Sequence[tuple[str, list[mx.array]]],
        x: mx.array,
        modulation: Modulations,
        residual: mx.array | None,
    ) -> mx.array | None:
        """Gradients of the linears that share the modulated x, and, with a residual, the cotangent of x."""
        eps, pulled = block.sizes.eps, []
        for name, cotangents in layers:
            layer = block.layer(name)
            if residual is None and not layer[1]:
                continue
            found, of_input = self.run(enter_factors, x, modulation[:2], layer, cotangents, eps)
            if found:
                gradients[name] = found
            pulled.append(of_input)
        return None if residual is None else self.run(input_sum, x, modulation[1], pulled, residual, eps)

    def _note(
        self,
        gradients: Gradients,
        block: Block,
        name: str,
        inputs: list[mx.array],
        cotangents: list[mx.array],
        kept: Kept | None,
    ) -> None:
        """Gradients of a linear's adapter, where it has one."""
        if kept is not None:
            gradients[name] = self.run(adapter_gradients, inputs, cotangents, kept, block.layer(name))

    def _attention(
        self,
        wide: Sequence[mx.array],
        scales: Sequence[Norms],
        cotangents: Sequence[mx.array],
        sizes: Sizes,
    ) -> tuple[list[mx.array], list[tuple[mx.array, mx.array]]]:
        """Attention's output for each stream, and the cotangents of its q and k, and of its v."""
        heads = self.run(attention_inputs, wide, scales, self.rotary, sizes, cotangents)
        step = self.heads or heads[0].shape[1]
        places = list(range(step, heads[0].shape[1], step))
        chunks = list(zip(*(split(x, places, axis=1) if places else [x] for x in heads), strict=True))
        del heads
        parts = []
        while chunks:
            parts.append(self.run(through_attention, *chunks.pop(0)))
        by_kind = [list(part) for part in zip(*parts, strict=True)]
        del parts
        return self.run(through_turned_heads, wide, scales, self.rotary, sizes, by_kind)
