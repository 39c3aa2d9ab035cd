"""What a forward pass holds while a block runs: pictures on demand and previews are planned with it.

Read off `sample.draw` on a CPU, in arrays of [R, D]. Letters: R rows of a pass, D hidden, N heads.
"""

from flux2_relay.stages import memory
from flux2_relay.stages.spec import TransformerSpec
from flux2_relay.stages.train.options import PreviewOptions

_UNITS = {4: 36, 2: 54}
"""Bytes of a number -> arrays of [R, D] at once; the rotation of q and k is float32 in bfloat16, too."""
_LATENTS = 3
"""Pictures' tokens in float32 beside the blocks: what is drawn, its velocity and the two mixed."""
_PIXELS = 256
"""Of one token: 16 x 16."""


def work_bytes(spec: TransformerSpec, rows: int, item_bytes: int) -> int:
    """What a block of a forward pass over `rows` rows holds at its peak; outside a GPU also all scores of attention."""
    scores = 0 if memory.is_gpu() else spec.heads * rows**2 * item_bytes
    beside = 4 * rows * (_LATENTS * spec.channels + 2 * spec.head_dim)  # and the two rotary tables
    return _UNITS[item_bytes] * rows * spec.hidden * item_bytes + scores + beside


def preview_rows(options: PreviewOptions, text_rows: int) -> int:
    """Rows of the largest preview, 0 where none are drawn; each of its references is as large as it at most."""
    if not options.every:
        return 0
    tokens = [
        width * height // _PIXELS * (1 + len(picture.references))
        for picture in options.pictures()
        for width, height in [picture.size or options.size]
    ]
    return text_rows + max(tokens) if tokens else 0
