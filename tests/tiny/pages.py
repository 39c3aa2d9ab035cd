"""Run folders as a report reads them, and its page as a parser without a browser sees it."""

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

CONFIG = """
run: {{name: {name}, dir: {folder}}}
model: {{path: models/FLUX.2-dev}}
data: {{path: data/fox}}
train: {{steps: {steps}, batch: 2}}
previews: {{prompts: {prompts}, size: [64, 96]}}
"""
HOSTILE = "</script></textarea><script>alert('x')</script> & \"y\""
"""What a caption, a prompt or a name may hold."""


def line(step: int, loss: object = 1.0, **others: object) -> str:
    """A line of metrics."""
    values = {
        "step": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.5, "sigma": [0.25, 0.75], "seconds": 2.0,
        "wait_seconds": 0.01, "peak_bytes": 22_500_000_000,
    }  # fmt: skip
    return json.dumps({**values, **others}) + "\n"


def held_out_line(step: int, loss: float, sigmas: Sequence[float] = (0.1, 0.5, 0.9)) -> str:
    """A line of held-out losses."""
    by_sigma = [loss + sigma - 0.5 for sigma in sigmas]
    told = {"step": step, "loss": loss, "sigma": list(sigmas), "loss_by_sigma": by_sigma, "pictures": 2}
    return json.dumps(told) + "\n"


def png(width: int, height: int, grey: int = 128) -> bytes:
    """A PNG of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes([grey]) * width for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_run(
    folder: Path,
    losses: Sequence[float] = (),
    steps: int = 10,
    prompts: Sequence[str] = (),
    tail: str = "",
    name: str = "",
) -> Path:
    """A run folder with its config and these losses, `steps` of which were wanted -> it."""
    (folder / "previews").mkdir(parents=True, exist_ok=True)
    values = {"name": json.dumps(name or folder.name), "folder": folder.parent, "steps": steps}
    (folder / "config.yaml").write_text(CONFIG.format(prompts=json.dumps(list(prompts)), **values), encoding="utf-8")
    lines = "".join(line(step, loss) for step, loss in enumerate(losses, 1))
    (folder / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")
    return folder


def put_preview(folder: Path, step: int, number: int, picture: bytes | None = None) -> Path:
    """Latents of one preview, with a picture or without -> them."""
    latents = folder / "previews" / f"{step:06d}-{number:02d}.safetensors"
    latents.write_bytes(b"latents")
    if picture is not None:
        latents.with_suffix(".png").write_bytes(picture)
    return latents


class Page(HTMLParser):
    """Every element with its attributes, all text, and a check that elements close in order."""

    VOID = ("meta", "img", "path", "br", "input", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.said: list[str] = []
        self.scripts: list[str] = []
        self.html = text
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.said.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.said).split())

    @property
    def policy(self) -> str:
        (policy,) = [m["content"] for m in self.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
        return policy

    def asks_for_nothing(self) -> None:
        """No address but data, and one script, that whose hash the page allows."""
        assert {name for name, _ in self.elements} & {"link", "iframe", "object", "base", "form"} == set()
        found = [value for _, of in self.elements for key, value in of.items() if key in ("src", "href", "srcset")]
        assert all(address.startswith("data:image/") for address in found)
        assert not [key for _, of in self.elements for key in of if key.startswith("on")]
        (script,) = self.scripts
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in self.policy
        assert "default-src 'none'" in self.policy
        assert "url(" not in self.html
        assert "@import" not in self.html
