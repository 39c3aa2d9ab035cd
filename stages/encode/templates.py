"""How each family of text encoder is asked about a caption: the exact rendering, its pads, its known tokens.

A template is data. The rendered text goes to `tokenizer.json` as it is, without the tokenizer adding anything, so no
chat-template engine is needed. Sources: diffusers `pipeline_flux2.py`, `system_messages.py`, `pipeline_flux2_klein.py`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from flux2_relay.cache.errors import InputError
from flux2_relay.stages.spec import TextSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """One family's rendering of a caption and what stands in the rows that it does not fill."""

    before: str
    after: str
    removed: str  # literal that is deleted from captions, "" for none
    pad: str  # token of the rows without text
    side: Literal["left", "right"]  # where the pads stand
    # What a pad row attends to. Where it is nothing, all pads are one row, and `before` is a prefix of constant tokens
    # (special tokens on both sides keep the caption from merging with it): both are shared by all captions.
    pads_see: Literal["nothing", "caption"]

    def render(self, caption: str) -> str:
        """The text that is tokenised for `caption`."""
        return self.before + (caption.replace(self.removed, "") if self.removed else caption) + self.after

    def identity(self) -> str:
        """Hash of everything in here, for the keys of the cache."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


# The line break between "object" and "attribution" is part of the reference; a space there changes every later row.
_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)

FAMILIES: Mapping[str, Template] = {
    "mistral": Template(
        before=f"<s>[SYSTEM_PROMPT]{_SYSTEM}[/SYSTEM_PROMPT][INST]",
        after="[/INST]",
        removed="[IMG]",
        pad="<pad>",
        side="left",
        pads_see="nothing",
    ),
    "qwen3": Template(
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        removed="",
        pad="<|endoftext|>",
        side="right",
        pads_see="caption",  # and a caption that starts with a line break merges with the one before it
    ),
}


@dataclass(frozen=True, slots=True)
class CaptionTokenizer:
    """Captions to token ids, exactly as the reference pipeline forms them (before padding)."""

    tokenizer: Tokenizer
    template: Template
    length: int
    prefix: tuple[int, ...]  # ids of the constant prefix, () where the template has none
    pad: int
    file_sha256: str

    def ids(self, caption: str) -> list[int]:
        """Token ids of the rendered caption, cut on the right to `length`, without pads."""
        return self._encode(self.template.render(caption))[: self.length]

    def beyond(self, caption: str) -> int:
        """Tokens of the rendered caption that `ids` cuts off."""
        rendered = self.template.render(caption)
        if len(rendered.encode("utf-8")) <= self.length:  # a token is a byte at least
            return 0
        return max(0, len(self._encode(rendered)) - self.length)

    @property
    def shares_rows(self) -> bool:
        """Whether prefix and pad rows are the same for every caption, so that only own rows need be stored."""
        return self.template.pads_see == "nothing"

    def own(self, ids: list[int]) -> list[int]:
        """What follows the constant prefix."""
        return ids[len(self.prefix) :]

    def cost(self, caption: str) -> int:
        """Tokens that a caption sends through the encoder's layers."""
        return len(self.own(self.ids(caption))) if self.shares_rows else self.length

    def special_spellings(self) -> frozenset[str]:
        """What stands for a token of its own wherever a caption spells it."""
        return frozenset(token.content for token in self.tokenizer.get_added_tokens_decoder().values())

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def load_tokenizer(folder: Path, spec: TextSpec) -> CaptionTokenizer:
    """The tokenizer of a folder's `tokenizer.json`, read as data; InputError where it does not fit the encoder."""
    path = folder / "tokenizer.json"
    template = FAMILIES[spec.family]
    try:
        data = path.read_bytes()
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; the model's own tokenizer folder is needed beside the encoder"
        ) from None
    except Exception as error:  # the library raises a bare Exception for every malformed file
        raise InputError(f"{path}: cannot be read as a tokenizer ({error}); download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    pad = tokenizer.token_to_id(template.pad)
    if pad is None:
        raise InputError(f"{path}: has no token {template.pad!r}; it is the tokenizer of another model")
    prefix: tuple[int, ...] = ()
    if template.pads_see == "nothing":
        prefix = tuple(tokenizer.encode(template.before, add_special_tokens=False).ids)
        _check_prefix(path, tokenizer, template, prefix, spec.length)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= spec.vocabulary:
        raise InputError(f"{path}: knows tokens up to {largest}, but the text encoder only {spec.vocabulary} of them")
    return CaptionTokenizer(tokenizer, template, spec.length, prefix, pad, hashlib.sha256(data).hexdigest())


def _check_prefix(path: Path, tokenizer: Tokenizer, template: Template, prefix: tuple[int, ...], length: int) -> None:
    if len(prefix) >= length:
        raise InputError(f"{path}: the system text alone takes {len(prefix)} of the {length} text tokens")
    probe = tokenizer.encode(template.render(" x\n"), add_special_tokens=False).ids
    if tuple(probe[: len(prefix)]) != prefix:
        raise InputError(
            f"{path}: the tokens of the system text depend on the caption; it is the tokenizer of another model"
        )
