"""AutoencoderKLFlux2: images to normalised latents and back, each half loaded apart.

Letters: B batch, H W pixels, h w latent positions, c channels of the VAE before patching. Everything is
float32: the VAE runs once per image, and bfloat16 would cost about one percent. Oracle: diffusers
`AutoencoderKLFlux2` with the patching and batch-norm statistics of `Flux2Pipeline`. There is no scaling or
shift factor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from flux2_relay.cache.errors import InputError, RelayError
from flux2_relay.stages import folders, memory, names
from flux2_relay.stages.spec import VaeSpec, read_vae_spec
from flux2_relay.stages.vae_blocks import (
    GROUP_NORM_EPS,
    Layer,
    Shapes,
    decoder_layers,
    encoder_layers,
    tensor_shapes,
)
from flux2_relay.stages.vae_strips import rows_beside, rows_for, run, strips_bytes, whole_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """The encoder half with its weights in memory."""

    spec: VaeSpec
    weights: Mapping[str, mx.array]

    def strip_rows(self, size: tuple[int, int], budget_bytes: int) -> int | None:
        """Rows of the strips in which `encode` takes a picture of (width, height), None for the whole.

        InputError says the least budget that works.
        """
        shape = (1, size[1], size[0], self.spec.in_channels)
        return rows_beside(self.weights, encoder_layers(self.spec), shape, budget_bytes)

    def encode(self, images: mx.array, budget_bytes: int | None = None) -> mx.array:
        """The mean latents of images, patched and normalised: the posterior's mode, never a sample.

        images [B, H, W, 3] in [-1, 1], H and W multiples of 16
        -> [B, H/16, W/16, 128] float32, about unit scale. What does not fit into `budget_bytes` whole, weights
        counted, is encoded in strips: the same latents to rounding.
        """
        images = mx.array(images).astype(mx.float32)
        _check_images(images, self.spec)
        mean = run(encoder_layers(self.spec), images, self.weights, self.spec.norm_num_groups, budget_bytes)
        latents = _normalise(patchify(mean, self.spec.patch), self.weights, self.spec.batch_norm_eps)
        _refuse_broken(latents, "the latents it encoded")
        return latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """The decoder half with its weights in memory."""

    spec: VaeSpec
    weights: Mapping[str, mx.array]

    def decode(self, latents: mx.array, budget_bytes: int | None = None) -> mx.array:
        """The images of normalised latents, in strips where `budget_bytes` asks for it.

        latents [B, H/16, W/16, 128] -> [B, H, W, 3] float32, about [-1, 1] and not clamped.
        """
        latents = mx.array(latents).astype(mx.float32)
        _check_latents(latents, self.spec)
        mean = unpatchify(_restore(latents, self.weights, self.spec.batch_norm_eps), self.spec.patch)
        images = run(decoder_layers(self.spec), mean, self.weights, self.spec.norm_num_groups, budget_bytes)
        _refuse_broken(images, "the images it decoded")
        return images


def load_encoder(model_dir: Path | str, folder: Path | None = None) -> Encoder:
    """The encoder half of the VAE of ``model_dir``, or of ``folder``; no tensor of the decoder is read."""
    folder = folder or folders.find(str(model_dir)).vae
    spec = read_vae_spec(folder)
    _check_groups(folder, spec, spec.block_out_channels)
    weights = _read(folder, encoder_tensor_names(spec), ("encoder.", "quant_conv."))
    return Encoder(spec=spec, weights=_mean_only(weights, encoder_layers(spec)[-1].name, spec.latent_channels))


def load_decoder(model_dir: Path | str, folder: Path | None = None) -> Decoder:
    """The decoder half of the VAE of ``model_dir``, or of ``folder``; no tensor of the encoder is read."""
    folder = folder or folders.find(str(model_dir)).vae
    spec = read_vae_spec(folder)
    _check_groups(folder, spec, spec.decoder_block_out_channels or spec.block_out_channels)
    weights = _read(folder, decoder_tensor_names(spec), ("decoder.", "post_quant_conv."))
    return Decoder(spec=spec, weights=weights)


def encoder_peak(spec: VaeSpec, size: tuple[int, int], budget_bytes: int) -> tuple[int | None, int]:
    """Before weights are read: rows of a strip (None: whole) for a picture of (width, height), and the predicted peak.

    InputError says the least budget that works.
    """
    shape = (1, size[1], size[0], spec.in_channels)
    return _peak(encoder_layers(spec), shape, encoder_tensor_names(spec), budget_bytes)


def decoder_peak(spec: VaeSpec, size: tuple[int, int], budget_bytes: int) -> tuple[int | None, int]:
    """The same of decoding latents of (H/16, W/16)."""
    shape = (1, size[0] * spec.patch[0], size[1] * spec.patch[1], spec.latent_channels)
    return _peak(decoder_layers(spec), shape, decoder_tensor_names(spec), budget_bytes)


def _peak(
    layers: Sequence[Layer], shape: tuple[int, ...], tensors: Shapes, budget_bytes: int
) -> tuple[int | None, int]:
    weights = 4 * sum(map(math.prod, tensors.values()))
    rows = rows_for(layers, shape, budget_bytes - weights, memory.is_gpu())
    above = whole_bytes(layers, shape, memory.is_gpu()) if rows is None else strips_bytes(layers, shape, rows)
    return rows, weights + above


def encoder_tensor_names(spec: VaeSpec) -> Shapes:
    """Every tensor that `encode` uses, by its diffusers name: name -> shape in the file."""
    return tensor_shapes(encoder_layers(spec)) | _statistics(spec)


def decoder_tensor_names(spec: VaeSpec) -> Shapes:
    """Every tensor that `decode` uses, by its diffusers name: name -> shape in the file."""
    return tensor_shapes(decoder_layers(spec)) | _statistics(spec)


def identity_config(spec: VaeSpec) -> dict[str, int | str | list[int]]:
    """What latents depend on and the shapes of the encoder's tensors do not tell; part of the VAE's identity.

    The epsilons are strings, because keys hold no floats.
    """
    return {
        "norm_num_groups": spec.norm_num_groups,
        "group_norm_eps": repr(GROUP_NORM_EPS),
        "batch_norm_eps": repr(float(spec.batch_norm_eps)),
        "patch": list(spec.patch),
        "latent_channels": spec.latent_channels,
    }


def pixel_step(spec: VaeSpec) -> tuple[int, int]:
    """Rows and columns of pixels behind one latent position; (16, 16) in the released model."""
    halvings = 2 ** (len(spec.block_out_channels) - 1)
    return halvings * spec.patch[0], halvings * spec.patch[1]


def patchify(mean: mx.array, patch: tuple[int, int]) -> mx.array:
    """Fold each patch into channels; with (2, 2) channel k = 4c + 2*row + column.

    mean [B, h, w, c] -> [B, h/rows, w/columns, c*rows*columns].
    Oracle: diffusers `Flux2Pipeline._patchify_latents`.
    """
    (B, h, w, c), (rows, columns) = mean.shape, patch
    split = mean.reshape(B, h // rows, rows, w // columns, columns, c)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(B, h // rows, w // columns, c * rows * columns)


def unpatchify(latents: mx.array, patch: tuple[int, int]) -> mx.array:
    """Undo `patchify`: [B, h, w, c*rows*columns] -> [B, h*rows, w*columns, c]."""
    (B, h, w, channels), (rows, columns) = latents.shape, patch
    split = latents.reshape(B, h, w, channels // (rows * columns), rows, columns)
    return split.transpose(0, 1, 4, 2, 5, 3).reshape(B, h * rows, w * columns, channels // (rows * columns))


def _normalise(latents: mx.array, weights: Mapping[str, mx.array], eps: float) -> mx.array:
    return (latents - weights["bn.running_mean"]) / mx.sqrt(weights["bn.running_var"] + eps)


def _restore(latents: mx.array, weights: Mapping[str, mx.array], eps: float) -> mx.array:
    return latents * mx.sqrt(weights["bn.running_var"] + eps) + weights["bn.running_mean"]


def _statistics(spec: VaeSpec) -> Shapes:
    channels = spec.latent_channels * math.prod(spec.patch)
    return {"bn.running_mean": (channels,), "bn.running_var": (channels,)}


def _read(folder: Path, shapes: Shapes, prefixes: tuple[str, ...]) -> dict[str, mx.array]:
    """The named tensors in float32, conv kernels turned from OIHW to MLX's OHWI.

    The half is checked whole: a tensor that starts with one of ``prefixes`` and is not expected is refused.
    """
    tensors = names.open_vae(folder)
    tensors.check(shapes, ignore=lambda name: not name.startswith(prefixes))
    weights = tensors.read_all(shapes, mx.float32)
    weights = {name: w.transpose(0, 2, 3, 1) if w.ndim == 4 else w for name, w in weights.items()}
    mx.eval(weights)
    return weights


def _mean_only(weights: dict[str, mx.array], last: str, channels: int) -> dict[str, mx.array]:
    """Cut the last conv to the mean's outputs, which come first; the log-variance is never needed."""
    cut = {f"{last}.{part}": mx.contiguous(weights[f"{last}.{part}"][:channels]) for part in ("weight", "bias")}
    mx.eval(cut)
    return weights | cut


def _check_groups(folder: Path, spec: VaeSpec, widths: tuple[int, ...]) -> None:
    uneven = [width for width in widths if width % spec.norm_num_groups]
    if uneven:
        raise InputError(
            f"{folder}/config.json: norm_num_groups {spec.norm_num_groups} does not divide the widths "
            f"{uneven}; download the file again"
        )


def _check_images(images: mx.array, spec: VaeSpec) -> None:
    if images.ndim != 4 or images.shape[3] != spec.in_channels:
        raise InputError(f"the VAE takes images of shape [B, H, W, {spec.in_channels}], not {list(images.shape)}")
    (rows, columns), (_, H, W, _) = pixel_step(spec), images.shape
    if not H or not W or H % rows or W % columns:
        raise InputError(
            f"an image of {W} x {H} pixels cannot be encoded: the width must be a multiple of {columns} and "
            f"the height of {rows}; crop or resize it first"
        )


def _check_latents(latents: mx.array, spec: VaeSpec) -> None:
    channels = spec.latent_channels * math.prod(spec.patch)
    if latents.ndim != 4 or latents.shape[3] != channels or 0 in latents.shape:
        raise InputError(f"the VAE decodes latents of shape [B, H/16, W/16, {channels}], not {list(latents.shape)}")
    _refuse_broken(latents, "the latents it was to decode", zeros=False)


def _refuse_broken(values: mx.array, what: str, zeros: bool = True) -> None:
    """Refuse values of which an item is not finite or, where ``zeros`` is set, all zero.

    Some MLX releases return silent zeros from a convolution that does not fit into memory (mlx #3979).
    """
    faults = []
    for i, item in enumerate(values):
        if not mx.isfinite(item).all().item():
            faults.append(f"item {i} is not finite")
        elif zeros and not item.any().item():
            faults.append(f"item {i} is all zero")
    if faults:
        raise RelayError(
            f"the VAE refuses {what}: {', '.join(faults)}. Either its input or the weights in vae/ are "
            "damaged, or the device ran out of memory: check the file, then try a smaller resolution."
        )
