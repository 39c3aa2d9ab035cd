"""Pictures inside a page: small ones as they are, large ones as smaller JPEGs, so that the page stays usable."""

import base64
import io
import struct
from dataclasses import dataclass
from html import escape
from pathlib import Path

_PNG = b"\x89PNG\r\n\x1a\n"
_WHOLE = 256  # pixels; a picture up to this size goes in as the file it is
_SMALL = 192  # pixels; a picture below is enlarged without blurring it


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture as a data address, with the size that it has in the file."""

    source: str
    width: int
    height: int

    def img(self, told: str, more: str = "") -> str:
        """Its element; `told` describes it, `more` are attributes, escaped already."""
        kind = ' class="small"' if max(self.width, self.height) < _SMALL else ""
        size = f'width="{self.width}" height="{self.height}"'
        return f'<img{kind} {size} alt="{escape(told)}"{more} src="{self.source}">'


def embedded(path: Path, most: int) -> Embedded | None:
    """A PNG with at most `most` pixels on its longer side; None where it is no picture."""
    try:
        data = path.read_bytes()
        if not data.startswith(_PNG) or len(data) < 24:
            return None
        width, height = struct.unpack(">II", data[16:24])
        if max(width, height) <= _WHOLE:
            return Embedded(address("png", data), width, height)
        return Embedded(address("jpeg", _smaller(data, most)), width, height)
    except (OSError, ValueError, SyntaxError):  # Pillow raises the last for broken chunks
        return None


def address(kind: str, data: bytes) -> str:
    """Bytes of a picture as a data address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _smaller(data: bytes, most: int) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB")
    picture.thumbnail((most, most))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=88)
    return out.getvalue()
