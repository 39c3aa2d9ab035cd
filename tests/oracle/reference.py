"""The reference side: diffusers' and transformers' own code on a checkpoint folder, in float32 on the CPU.

Takes and gives numpy arrays in this project's shapes (NHWC images, [B, L, C] tokens), so that a test only compares.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from oracle.vocabularies import MISTRAL_TEMPLATE
from transformers import (
    AutoModelForCausalLM,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2TokenizerFast,
)
from transformers.processing_utils import ProcessorMixin

STEPS = 6
"""Steps of a drawn picture."""


def quiet() -> None:
    """No progress bars; only errors are logged."""
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


class TextProcessor(ProcessorMixin):
    """PixtralProcessor without its image half, which needs torchvision; templates and `<s>` are transformers' code."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str):
        super().__init__(tokenizer, chat_template=chat_template)


class Reference:
    """The models of one checkpoint folder, loaded when first asked for."""

    def __init__(self, folder: Path):
        """Read `model_index.json` of `folder`."""
        self.folder = folder
        index = json.loads((folder / "model_index.json").read_text())
        self.is_klein, self.is_distilled = "Klein" in index["_class_name"], index.get("is_distilled", False)

    @cached_property
    def transformer(self) -> Flux2Transformer2DModel:
        """The transformer in float32."""
        path = self.folder / "transformer"
        return Flux2Transformer2DModel.from_pretrained(path, torch_dtype=torch.float32).eval()

    @cached_property
    def vae(self) -> AutoencoderKLFlux2:
        """The VAE in float32."""
        return AutoencoderKLFlux2.from_pretrained(self.folder / "vae", torch_dtype=torch.float32).eval()

    @cached_property
    def text_encoder(self) -> torch.nn.Module:
        """The text encoder in float32 with SDPA attention."""
        of_class = AutoModelForCausalLM if self.is_klein else Mistral3ForConditionalGeneration
        path = self.folder / "text_encoder"
        return of_class.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()

    @cached_property
    def tokenizer(self) -> Qwen2TokenizerFast | TextProcessor:
        """What diffusers' pipeline would hold under this name."""
        path = self.folder / "tokenizer"
        if self.is_klein:
            return Qwen2TokenizerFast.from_pretrained(path)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), padding_side="left", **names)
        return TextProcessor(tokenizer, MISTRAL_TEMPLATE)

    @cached_property
    def pipeline(self) -> Flux2Pipeline:
        """A pipeline that holds the VAE alone: `_encode_vae_image` needs no more."""
        return Flux2Pipeline(None, self.vae, None, None, None)

    @torch.no_grad()
    def context(self, captions: Sequence[str]) -> np.ndarray:
        """What `encode_prompt` gives: captions -> [B, T, taps*hidden]."""
        config = json.loads((self.folder / "text_encoder/config.json").read_text())
        taps = config.get("flux2_taps") or ([9, 18, 27] if self.is_klein else [10, 20, 30])
        embed = (
            Flux2KleinPipeline._get_qwen3_prompt_embeds
            if self.is_klein
            else Flux2Pipeline._get_mistral_3_small_prompt_embeds
        )
        return embed(
            self.text_encoder,
            self.tokenizer,
            list(captions),
            max_sequence_length=config.get("flux2_text_length", 512),
            hidden_states_layers=taps,
        ).numpy()

    @torch.no_grad()
    def latents(self, images: np.ndarray) -> np.ndarray:
        """images [B, H, W, 3] in [-1, 1] -> normalised latents [B, H/16, W/16, 128]."""
        latents = self.pipeline._encode_vae_image(torch.from_numpy(images).permute(0, 3, 1, 2), None)
        return latents.permute(0, 2, 3, 1).numpy()

    @torch.no_grad()
    def images(self, latents: np.ndarray) -> np.ndarray:
        """latents [B, H/16, W/16, 128] -> images [B, H, W, 3], unclamped, by the last lines of Flux2Pipeline."""
        bn, eps = self.vae.bn, self.vae.config.batch_norm_eps
        z = torch.from_numpy(latents).permute(0, 3, 1, 2)
        z = z * torch.sqrt(bn.running_var.view(1, -1, 1, 1) + eps) + bn.running_mean.view(1, -1, 1, 1)
        images = self.vae.decode(Flux2Pipeline._unpatchify_latents(z), return_dict=False)[0]
        return images.permute(0, 2, 3, 1).numpy()

    def sample(
        self, context: np.ndarray, negative: np.ndarray, start: np.ndarray, grid: tuple[int, int], guidance: float
    ) -> np.ndarray:
        """Latents [H/16, W/16, 128] that the pipeline draws in `STEPS` steps from the noise `start` [1, L, 128]."""
        height, width = grid
        of_class, negatives = Flux2Pipeline, {}
        if self.is_klein:
            of_class, negatives = Flux2KleinPipeline, {"negative_prompt_embeds": torch.from_numpy(negative)[None]}
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder / "scheduler")
        pipeline = of_class(scheduler, self.vae, None, None, self.transformer)
        if self.is_klein:
            pipeline.register_to_config(is_distilled=self.is_distilled)
        pipeline.set_progress_bar_config(disable=True)
        seen = []
        pipeline(
            prompt_embeds=torch.from_numpy(context)[None],
            latents=torch.from_numpy(start).permute(0, 2, 1).reshape(1, -1, height, width),
            height=16 * height,
            width=16 * width,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            output_type="latent",
            callback_on_step_end=lambda pipe, step, time, found: seen.append(found["latents"]) or found,
            **negatives,
        )
        return seen[-1].reshape(height, width, -1).numpy()
