"""The peer: diffusers' transformer with a peft adapter on torch, random weights made on the device.

The base is bfloat16 and the adapter float32 under autocast, as diffusers' own training scripts have it; AdamW, the
gradient clipped to norm 1. The adapter is on the linears of attention in both kinds of block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig

ATTENTION = r".*(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_add_out|to_out\.0|to_qkv_mlp_proj)|"
ATTENTION += r"single_transformer_blocks\.\d+\.attn\.to_out"
TEXT_ROWS, TINY_TEXT_ROWS = 512, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SIZES: Mapping[str, dict[str, Any]] = {
    "dev": {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360},
    "klein-9b": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    "klein-4b": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    "tiny": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 192},
}
"""The models of the bench in diffusers' words, so that the peer runs without this project's code."""
CHANNELS = 128


def config(name: str, is_tiny: bool, **changes: Any) -> dict[str, Any]:
    """What diffusers' transformer is made from."""
    head, axis = (32, 8) if is_tiny else (128, 32)
    other = {"attention_head_dim": head, "axes_dims_rope": (axis,) * 4, "guidance_embeds": name == "dev"}
    return SIZES["tiny" if is_tiny else name] | other | changes


def make(config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> Flux2Transformer2DModel:
    """A frozen model with torch's own random weights, made in `dtype` on the device."""
    torch.manual_seed(0)
    with default(dtype), torch.device(DEVICE):
        model = Flux2Transformer2DModel(**config)
    return model.requires_grad_(False)


def adapt(model: Flux2Transformer2DModel, rank: int = 16) -> dict[str, torch.nn.Parameter]:
    """A float32 adapter on the linears of attention -> its factors by name."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=ATTENTION))
    factors = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    for factor in factors.values():
        factor.data = factor.data.float()
    return factors


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes where nothing is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Item:
    """One random picture with a random caption; `rows` of text."""

    def __init__(self, config: Mapping[str, Any], pixels: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
        """Latents [1, L, 128], context [1, T, C] and the position ids."""
        height, width = (side // 16 for side in pixels)
        self.latents = torch.randn(1, height * width, CHANNELS, device=DEVICE).to(dtype)
        self.context = torch.randn(1, rows, config["joint_attention_dim"], device=DEVICE).to(dtype)
        self.text_ids = torch.zeros(rows, 4, device=DEVICE)
        self.text_ids[:, 3] = torch.arange(rows)
        self.image_ids = torch.zeros(height * width, 4, device=DEVICE)
        self.image_ids[:, 1] = torch.arange(height * width) // width
        self.image_ids[:, 2] = torch.arange(height * width) % width
        self.guidance = torch.ones(1, device=DEVICE) if config["guidance_embeds"] else None

    def velocity(self, model: torch.nn.Module, tokens: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the model says of noisy tokens [1, L, 128] at sigma [1]."""
        return model(
            hidden_states=tokens,
            encoder_hidden_states=self.context,
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            guidance=self.guidance,
            return_dict=False,
        )[0]

    def loss(self, model: torch.nn.Module, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Rectified flow, the error in float32."""
        at = sigma[:, None, None].to(self.latents.dtype)
        velocity = self.velocity(model, (1 - at) * self.latents + at * noise, sigma)
        return ((velocity.float() - (noise - self.latents).float()) ** 2).mean()


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_gib(reset: bool = False) -> float:
    """The most that tensors took since the last reset; torch counts none of it on a CPU."""
    if DEVICE != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak
