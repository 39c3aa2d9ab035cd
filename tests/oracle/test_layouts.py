"""BFL's names, against diffusers' own converters: the same tensors bit for bit, and nothing left over."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.loaders import single_file_utils
from oracle.reference import Reference
from tiny import layouts

from flux2_relay.stages import names, spec
from flux2_relay.stages.weights import Tensors


def state(module: torch.nn.Module) -> layouts.Values:
    """A reference module's state dict as MLX arrays, counters left out."""
    values = module.state_dict().items()
    return {name: mx.array(value.float().numpy()) for name, value in values if "num_batches" not in name}


def torch_state(values: layouts.Values) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in values.items()}


def assert_same(actual: Tensors, expected: dict[str, torch.Tensor]) -> None:
    assert set(actual.info) == set(expected)
    for name, value in expected.items():
        assert actual.info[name].shape == tuple(value.shape), name
        assert np.array_equal(np.array(actual.read(name)), value.numpy()), name


@pytest.mark.parametrize("norm", ["scale", "weight"])
def test_a_transformer_file_as_diffusers_converts_it(reference: Reference, tmp_path: Path, norm: str) -> None:
    ours = state(reference.transformer)
    file = layouts.save(tmp_path / "x.safetensors", layouts.bfl_transformer(ours, norm))
    converted = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(torch_state(layouts.load(file)))
    assert_same(names.open_transformer(file), converted)
    assert_same(names.open_transformer(file), torch_state(ours))
    config = reference.transformer.config
    found = spec.read_transformer_spec(file)
    assert (found.heads, found.head_dim) == (config.num_attention_heads, config.attention_head_dim)
    assert (found.double_blocks, found.single_blocks) == (config.num_layers, config.num_single_layers)
    assert found.rope_axes == tuple(config.axes_dims_rope)


def test_a_vae_file_as_diffusers_converts_it(tmp_path: Path) -> None:
    """With diffusers' default group norms, which a file without config stands for."""
    torch.manual_seed(0)
    config = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
    model = AutoencoderKLFlux2(**config)
    ours = state(model)
    file = layouts.save(tmp_path / "ae.safetensors", layouts.bfl_vae(ours))
    loaded = torch_state(layouts.load(file))
    converted = single_file_utils.convert_ldm_vae_checkpoint(loaded, dict(model.config))
    found = names.open_vae(file)
    left_out = {name.split(".")[0] for name in set(ours) - set(converted)}
    assert left_out == {"bn", "quant_conv", "post_quant_conv"}  # diffusers' converter is older than FLUX.2's VAE
    for name, value in converted.items():
        assert np.array_equal(np.array(found.read(name)).reshape(value.shape), value.numpy()), name
    assert_same(found, torch_state(ours))
    assert spec.read_vae_spec(file).block_out_channels == config["block_out_channels"]
