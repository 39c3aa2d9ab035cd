"""What stage one may be told besides its data; the data's own options are in `dataset.py`.

Imports nothing heavy, so that a config can be checked without MLX. The metadata of a field are its limits:
`min`, `max`, `above`, `below`, `multiple_of` for numbers, `supported` for the values that work so far;
`flux2_relay.pipeline.schema` enforces them.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodeOptions:
    """How the text encoder reads the captions."""

    bits: Literal[32, 16, 8, 6, 4] = 8
    """Width of the encoder's weights: 32 float32, 16 bfloat16, 8, 6 and 4 affine quantized.

    One that is quantized on disk keeps its own; this then only chooses the arithmetic, 32 float32, else bfloat16.
    """

    stream: Literal["auto", "never", "always"] = "auto"
    """Read the encoder layer by layer from disk, over the whole data set; `auto`: by `memory.budget`."""

    batch_tokens: int = field(default=8192, metadata={"min": 1})
    """Tokens of one pass; more is faster and takes more memory."""
