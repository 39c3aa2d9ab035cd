"""The peer of stage one: transformers' Mistral as diffusers calls it, every caption padded to 512 rows."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from bench.gpu import peer_model
from transformers import MistralConfig, MistralModel

SIZES: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TAPS, TINY_TAPS = (10, 20, 30), (1, 2, 3)
ROWS, OWN, VOCABULARY = 512, 92, 8192
"""Rows of a padded caption, those that are no pads on average (32 of them the prefix), and known tokens."""


def run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`measured` captions in batches, after a warm-up; the seconds are scaled to `captions`, as all cost the same."""
    is_tiny = settings.get("tiny", False)
    sizes, taps = (TINY, TINY_TAPS) if is_tiny else (SIZES, TAPS)
    config = MistralConfig(
        **sizes, vocab_size=VOCABULARY, max_position_embeddings=4096, rope_theta=1e9, attn_implementation="sdpa"
    )
    with peer_model.default(torch.bfloat16), torch.device(peer_model.DEVICE):
        model = MistralModel(config).eval()
    ids = torch.randint(1000, VOCABULARY, (settings["batch"], ROWS), device=peer_model.DEVICE)
    mask = torch.ones_like(ids)
    mask[:, : ROWS - OWN] = 0

    @torch.no_grad()
    def encode() -> torch.Tensor:
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack([hidden[tap] for tap in taps], dim=1)

    encode()
    peer_model.peak_gib(reset=True)
    peer_model.synchronize()
    started, passes = time.perf_counter(), -(-settings["measured"] // settings["batch"])
    for _ in range(passes):
        encode()
    peer_model.synchronize()
    seconds = (time.perf_counter() - started) / (passes * settings["batch"])
    return {
        "how": f"transformers, {sizes['num_hidden_layers']} layers, batch {settings['batch']}, scaled from "
        f"{passes * settings['batch']} captions",
        "seconds": round(seconds * settings["captions"], 3),
        "peak_gib": round(peer_model.peak_gib(), 3),
    }
