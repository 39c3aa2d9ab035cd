"""What a model is: frozen sizes of its three parts. Numerics ask these and never compare names."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerSpec:
    """Sizes of one FLUX.2 transformer (diffusers `Flux2Transformer2DModel`)."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_dim: int
    context_width: int
    guidance: bool  # guidance-distilled: takes a guidance embedding
    channels: int = 128
    mlp_ratio: float = 3.0
    time_channels: int = 256
    rope_axes: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    eps: float = 1e-6

    @property
    def hidden(self) -> int:
        """Width D of the residual stream."""
        return self.heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Blocks of both kinds."""
        return self.double_blocks + self.single_blocks

    @property
    def mlp_width(self) -> int:
        """Width M of one half of the gated MLP."""
        return int(self.hidden * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSpec:
    """Sizes of the language model that reads captions, and which of its layers are kept."""

    family: str  # a key of stages.encode.templates.FAMILIES
    layers: int
    hidden: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_theta: float
    eps: float
    taps: tuple[int, ...]
    length: int  # rows of the context, pads included

    @property
    def context_width(self) -> int:
        """Channels C of the context: the taps side by side."""
        return self.hidden * len(self.taps)


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSpec:
    """Sizes of the image autoencoder (diffusers `AutoencoderKLFlux2`)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None
    layers_per_block: int = 2
    norm_num_groups: int = 32
    batch_norm_eps: float = 1e-4
    patch: tuple[int, int] = (2, 2)
    attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The three parts of one model, and whether it was distilled to few steps (then it takes no negative prompt)."""

    name: str
    transformer: TransformerSpec
    text: TextSpec
    vae: VaeSpec
    distilled: bool
