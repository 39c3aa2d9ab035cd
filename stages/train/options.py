"""What stage two may be told: one record for each section of the config file that training obeys.

Imports nothing heavy, so that a config can be checked without MLX. The metadata of a field are its limits:
`min`, `max`, `above`, `below`, `multiple_of` for numbers (in lists and mappings: for each entry), `bytes` for
sizes such as 24GB, `supported` for the values that work so far; `flux2_relay.pipeline.schema` enforces them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["bfloat16", "float32"]

SHARE: dict[str, Any] = {"min": 0.0, "max": 1.0}
PIXELS: dict[str, Any] = {"min": 16, "multiple_of": 16}  # one token of the transformer covers 16 x 16 pixels
SEED: dict[str, Any] = {"min": 0, "max": 2**32 - 1}  # the seed is the upper half of a 64-bit random key


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraOptions:
    """Which linears get an adapter, and how wide it is."""

    kind: Literal["lora", "dora", "lokr"] = "lora"
    """The form of the update: `lora`; `dora`, with a trained length for each row; `lokr`, a Kronecker product."""

    rank: int = field(default=16, metadata={"min": 1})
    """Width of the low-rank update; adapter size and optimizer memory grow linearly with it."""

    alpha: float = field(default=16.0, metadata={"above": 0.0})
    """Strength of the update: `alpha / rank` multiplies it; not where `lokr` has no rank."""

    factor: Literal["auto"] | int = field(default=16, metadata={"min": 1})
    """Side of the small matrix of `lokr`, where it divides the linear's; `auto` is near its square root."""

    targets: Literal["blocks", "attention"] | tuple[str, ...] = "blocks"
    """`blocks`: every linear of both kinds of block; `attention`: those of attention; or patterns."""

    exclude: tuple[str, ...] = ()
    """Patterns of target modules that get no adapter after all."""

    ranks: Mapping[str, int] = field(default_factory=dict, metadata={"min": 1})
    """Another rank for the target modules that match a pattern."""

    dropout: float = field(default=0.0, metadata={"min": 0.0, "below": 1.0})
    """Share of the adapter's input that is zeroed at random in training."""

    init: str | None = None
    """An adapter file to start from, in any naming."""

    def __post_init__(self) -> None:
        """Refuse an empty list of targets, which would train nothing."""
        if not self.targets:
            raise ValueError("'targets' is an empty list, so nothing would be trained")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """The optimisation: how long, how fast, and on which noise levels."""

    steps: int = field(default=1000, metadata={"min": 1})
    """Optimizer updates of the whole run."""

    batch: int = field(default=1, metadata={"min": 1})
    """Items in one forward pass, all of one bucket."""

    accumulate: int = field(default=1, metadata={"min": 1})
    """Forward passes whose gradients are averaged for one update."""

    lr: float = field(default=1e-4, metadata={"min": 0.0})
    """Learning rate after warm-up."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after warm-up; `linear` and `cosine` fall to zero at the last step."""

    warmup: int = field(default=0, metadata={"min": 0})
    """Steps over which the learning rate rises from zero."""

    optimizer: Literal["adamw", "adafactor", "lion", "prodigy"] = "adamw"
    """The update rule; `adamw` is bias-corrected, `prodigy` finds its step size and takes `lr` 1."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"min": 0.0, "below": 1.0})
    """Decay of the running mean of the gradients, and of their squares; `adafactor` has decays of its own."""

    eps: float = field(default=1e-8, metadata={"above": 0.0})
    """Added to the denominator of the update of `adamw` and `prodigy`."""

    weight_decay: float = field(default=0.01, metadata={"min": 0.0})
    """Decoupled decay of the adapter's weights."""

    clip: float = field(default=1.0, metadata={"min": 0.0})
    """Largest norm of the gradient of one update; 0 never clips."""

    sigma: Literal["flux2_shift", "uniform", "logit_normal", "shift", "content", "style"] = "flux2_shift"
    """The distribution that noise levels are drawn from."""

    sigma_shift: float = field(default=3.0, metadata={"above": 0.0})
    """How far `sigma: shift` moves towards noise; 1 does not move."""

    weighting: Literal["none", "bell", "weighted"] = "none"
    """Weight of the loss by noise level."""

    guidance: float = field(default=1.0, metadata={"min": 0.0})
    """Guidance input in training; only guidance-distilled models take one."""

    caption_dropout: float = field(default=0.05, metadata=SHARE)
    """Share of the items whose caption is replaced by the cached empty caption."""

    prior_weight: float = field(default=1.0, metadata={"min": 0.0})
    """Weight of the loss on regularisation images."""

    ema: float | None = field(default=None, metadata={"min": 0.0, "below": 1.0})
    """Decay of a running mean of the adapter that is saved beside it."""

    dtype: Dtype = "bfloat16"
    """The transformer computes in it; adapters, gradients and moments are always float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOptions:
    """What a stage may occupy."""

    budget: Literal["auto"] | int = field(default="auto", metadata={"bytes": True, "above": 0})
    """Bytes that a stage stays under; `auto` is what the device recommends."""

    bits: Literal["auto", 32, 16, 8, 6, 4] = "auto"
    """Width of the transformer's weights: 32 float32, 16 bfloat16, 8, 6 and 4 affine quantized; `auto`: the most of
    those of `train.dtype`, 8 and 4 at which all blocks stay in memory, else 4."""

    stream: Literal["auto", "never", "always"] = "auto"
    """Read the transformer block by block from disk at every step instead of holding it."""

    copy: str | None = None
    """A folder where quantized blocks are kept for the next run, a file a block; null keeps none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationOptions:
    """The loss on items that are held out."""

    fraction: float = field(default=0.0, metadata={"min": 0.0, "below": 1.0})
    """Share of the data set that is held out."""

    every: int = field(default=100, metadata={"min": 1})
    """Steps between two validations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOptions:
    """When checkpoints are written, and how many stay."""

    every: int = field(default=250, metadata={"min": 1})
    """Steps between two checkpoints; the last step always writes one."""

    keep: int = field(default=4, metadata={"min": 1})
    """Checkpoints that stay; older ones are removed."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the exported adapter; checkpoints are float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptOptions:
    """One preview picture; what is null is taken from the section."""

    prompt: str
    """What to draw."""

    size: tuple[int, int] | None = field(default=None, metadata=PIXELS)
    """Width and height in pixels."""

    seed: int | None = field(default=None, metadata=SEED)
    """Seed of the first noise."""

    steps: int | None = field(default=None, metadata={"min": 1})
    """Denoising steps."""

    guidance: float | None = field(default=None, metadata={"min": 0.0})
    """Guidance input of distilled models, classifier-free guidance of the others."""

    negative: str | None = None
    """Prompt that classifier-free guidance steers away from; null is the empty caption."""

    references: tuple[str, ...] = ()
    """Reference images, for edit training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewOptions:
    """Pictures drawn while training goes on."""

    every: int = field(default=250, metadata={"min": 0})
    """Steps between two rounds of previews, the first at step 0; 0 draws none."""

    prompts: tuple[str | PromptOptions, ...] = ()
    """What to draw: text, or a mapping that overrides the keys below for one picture."""

    size: tuple[int, int] = field(default=(512, 512), metadata=PIXELS)
    """Width and height in pixels."""

    steps: int = field(default=28, metadata={"min": 1})
    """Denoising steps."""

    guidance: float = field(default=4.0, metadata={"min": 0.0})
    """Guidance input of distilled models, classifier-free guidance of the others."""

    seed: int = field(default=42, metadata=SEED)
    """Seed of the first noise."""

    def pictures(self) -> tuple[PromptOptions, ...]:
        """The prompts with everything filled in: only `negative` may still be null."""
        return tuple(self._picture(prompt) for prompt in self.prompts)

    def _picture(self, prompt: str | PromptOptions) -> PromptOptions:
        own = PromptOptions(prompt=prompt) if isinstance(prompt, str) else prompt
        return PromptOptions(
            prompt=own.prompt,
            size=self.size if own.size is None else own.size,
            seed=self.seed if own.seed is None else own.seed,
            steps=self.steps if own.steps is None else own.steps,
            guidance=self.guidance if own.guidance is None else own.guidance,
            negative=own.negative,
            references=own.references,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogOptions:
    """Where metrics go besides the run folder."""

    tensorboard: bool = False
    """Write event files for TensorBoard; needs the extra of that name."""
