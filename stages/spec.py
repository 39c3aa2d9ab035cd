"""What a model is: specs read from a checkpoint's own config files, or from its shapes where it has none.

Numerics ask a spec and never compare names. A checkpoint of any size is understood; the catalogue only gives familiar
sizes a name (`model.name`) and lets a wrong folder be refused early.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from flux2_relay.cache.errors import InputError
from flux2_relay.stages import folders, infer, names
from flux2_relay.stages.catalogue import CATALOGUE, DEV
from flux2_relay.stages.sizes import ModelSpec, TextSpec, TransformerSpec, VaeSpec
from flux2_relay.stages.weights import open_tensors

__all__ = ["CATALOGUE", "DEV", "ModelSpec", "TextSpec", "TransformerSpec", "VaeSpec"]


def from_checkpoint(model_dir: Path | str) -> ModelSpec:
    """The specs of a checkpoint in any layout that `folders.find` knows; InputError names every file and key at fault.

    Whether a single file without a `model_index.json` beside it is distilled cannot be told: it counts as not.
    """
    places = folders.find(str(model_dir))
    transformer, distilled = read_transformer_spec(places.transformer), read_distilled(places.root)
    text = read_text_spec(places.text_encoder)
    if text.context_width != transformer.context_width:
        raise InputError(
            f"{places.root}: the text encoder gives {text.context_width} channels ({len(text.taps)} taps x "
            f"{text.hidden}), but the transformer takes {transformer.context_width}: the folder mixes two models"
        )
    return ModelSpec(
        name=known_name(transformer, distilled) or places.root.name,
        transformer=transformer,
        text=text,
        vae=read_vae_spec(places.vae),
        distilled=distilled,
    )


def known_name(transformer: TransformerSpec, distilled: bool) -> str | None:
    """The catalogue's name of a model of this size, None for a size that it does not list."""
    return next((name for name, entry in CATALOGUE.items() if entry == (transformer, distilled)), None)


def name_of(places: folders.ModelFolders) -> str | None:
    """The catalogue's name of the model in these places, None for another or an unreadable one.

    A base Klein and its distilled twin differ in `model_index.json` alone.
    """
    try:
        return known_name(read_transformer_spec(places.transformer), read_distilled(places.root))
    except InputError:
        return None


def check_name(name: str, transformer: TransformerSpec, distilled: bool, folder: Path) -> None:
    """Refuse a checkpoint that is not the model the config names (`auto` takes any)."""
    if name == "auto" or (transformer, distilled) == CATALOGUE[name]:
        return
    found = known_name(transformer, distilled) or (
        f"a model of {transformer.double_blocks} + {transformer.single_blocks} blocks, width {transformer.hidden}"
    )
    raise InputError(f"model.name is '{name}', but {folder} holds {found}; correct model.path, or say model.name: auto")


def read_transformer_spec(place: Path) -> TransformerSpec:
    """The spec of a `transformer` folder or file: its config.json, else its shapes."""
    config = _config_of(place, "num_single_layers", "attention_head_dim", "Flux2Transformer2DModel")
    if config is None:
        return infer.transformer_spec(names.open_transformer(place))
    spec = TransformerSpec(
        double_blocks=config.integer("num_layers", 8),
        single_blocks=config.integer("num_single_layers", 48),
        heads=config.integer("num_attention_heads", 48),
        head_dim=config.integer("attention_head_dim", 128),
        context_width=config.integer("joint_attention_dim", 15360),
        guidance=config.flag("guidance_embeds", True),
        channels=config.integer("in_channels", 128),
        mlp_ratio=config.number("mlp_ratio", 3.0),
        time_channels=config.integer("timestep_guidance_channels", 256),
        rope_axes=config.integers("axes_dims_rope", (32, 32, 32, 32)),
        rope_theta=config.number("rope_theta", 2000.0),
        eps=config.number("eps", 1e-6),
    )
    if sum(spec.rope_axes) != spec.head_dim or any(axis % 2 for axis in spec.rope_axes):
        config.fail(
            f"axes_dims_rope {list(spec.rope_axes)} must be even and add up to attention_head_dim {spec.head_dim}"
        )
    if config.get("out_channels", None) not in (None, spec.channels) or config.get("patch_size", 1) != 1:
        config.fail("out_channels must equal in_channels and patch_size must be 1, as in every FLUX.2")
    return spec


def read_distilled(model_dir: Path) -> bool:
    """Whether `model_index.json` says `is_distilled`; a folder without that file or key is not distilled."""
    path = index_of(model_dir)
    return path.is_file() and _Config(path).flag("is_distilled", False)


def is_distilled(model_dir: Path, name: str) -> bool:
    """The same, where the config names the model: that decides for a single file, which does not say it of itself."""
    return CATALOGUE[name][1] if name != "auto" and not index_of(model_dir).is_file() else read_distilled(model_dir)


def index_of(model_dir: Path) -> Path:
    """Where the `model_index.json` of a model folder, or of a single file in one, would be."""
    root = Path(model_dir)
    return (root.parent if root.is_file() else root) / "model_index.json"


_FAMILIES = {"mistral": ("mistral", (10, 20, 30)), "qwen3": ("qwen3", (9, 18, 27))}
"""`model_type` of the language model -> family, and the taps that the family's pipelines keep."""


def read_text_spec(place: Path) -> TextSpec:
    """The spec of a `text_encoder` folder or file: its config.json, else that of the known encoder with its shapes.

    `flux2_text_length` and `flux2_taps` in the config replace what the family's pipeline has as arguments.
    """
    outer = _config_of(place, "text_config", "num_hidden_layers")
    if outer is None:
        return infer.text_spec(names.text_encoder(open_tensors(place)))
    config = outer.inner("text_config")
    model_type = config.get("model_type", None)
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        config.fail(f"model_type is {model_type!r}; FLUX.2 reads its captions with one of {sorted(_FAMILIES)}")
    family, taps = _FAMILIES[model_type]
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    spec = TextSpec(
        family=family,
        layers=config.integer("num_hidden_layers"),
        hidden=hidden,
        mlp_width=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim", hidden // heads),
        vocabulary=config.integer("vocab_size"),
        rope_theta=_rope_theta(config),
        eps=config.number("rms_norm_eps", 1e-6),
        taps=outer.integers("flux2_taps", taps),
        length=outer.integer("flux2_text_length", 512),
    )
    if (
        not spec.taps
        or sorted(set(spec.taps)) != list(spec.taps)
        or not 0 < spec.taps[0] <= spec.taps[-1] < spec.layers
    ):
        # The last layer's output is no tap: transformers normalises it before it hands it out.
        config.fail(f"taps {list(spec.taps)} must rise and lie between 1 and {spec.layers - 1} (layers - 1)")
    return spec


def _rope_theta(config: "_Config") -> float:
    """The rotary base, from either place where transformers has kept it (4: `rope_theta`; 5: `rope_parameters`)."""
    parameters = config.get("rope_parameters", None) or {}
    if not isinstance(parameters, dict):
        config.fail(f"rope_parameters must be a mapping, found {parameters!r}")
    if parameters.get("rope_type", "default") != "default" or config.get("rope_scaling", None):
        config.fail("rotary scaling is set, which no FLUX.2 text encoder has")
    if parameters.get("rope_theta", config.get("rope_theta", None)) is None:
        config.fail("neither rope_theta nor rope_parameters.rope_theta is there")
    return (config.inner("rope_parameters") if "rope_theta" in parameters else config).number("rope_theta")


def read_vae_spec(place: Path) -> VaeSpec:
    """The spec of a `vae` folder or file: its config.json, else its shapes."""
    config = _config_of(place, "block_out_channels", "latent_channels", "AutoencoderKLFlux2")
    if config is None:
        return infer.vae_spec(names.open_vae(place))
    patch = config.integers("patch_size", (2, 2))
    if len(patch) != 2:
        config.fail(f"patch_size must be two numbers, found {list(patch)}")
    spec = VaeSpec(
        in_channels=config.integer("in_channels", 3),
        out_channels=config.integer("out_channels", 3),
        latent_channels=config.integer("latent_channels", 32),
        block_out_channels=config.integers("block_out_channels", (128, 256, 512, 512)),
        decoder_block_out_channels=config.integers("decoder_block_out_channels", ()) or None,
        layers_per_block=config.integer("layers_per_block", 2),
        norm_num_groups=config.integer("norm_num_groups", 32),
        batch_norm_eps=config.number("batch_norm_eps", 1e-4),
        patch=(patch[0], patch[1]),
        attention=config.flag("mid_block_add_attention", True),
        quant_conv=config.flag("use_quant_conv", True),
        post_quant_conv=config.flag("use_post_quant_conv", True),
    )
    if config.get("act_fn", "silu") != "silu":
        config.fail(f"act_fn is {config.get('act_fn', None)!r}; FLUX.2's autoencoder uses silu")
    if config.get("_class_name", "AutoencoderKLFlux2") != "AutoencoderKLFlux2":
        config.fail(f"holds a {config.get('_class_name', None)}, not an AutoencoderKLFlux2: the VAE of another model")
    return spec


def _config_of(place: Path, *signs: str) -> "_Config | None":
    """The config.json of a folder, or the one beside a file if it describes that part; None where only shapes tell.

    A file may lie beside the config of something else: one of the `signs` must be a key of it, or its class.
    """
    if not place.is_file():
        path = place / "config.json"
        return None if not path.exists() and any(place.glob("*.safetensors")) else _Config(path)
    path = place.with_name("config.json")
    if not path.is_file():
        return None
    config = _Config(path)
    return config if any(sign in config.values or sign == config.values.get("_class_name") for sign in signs) else None


class _Config:
    """One config.json whose every complaint names the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.values: Mapping[str, Any] = self._load() if values is None else values

    def _load(self) -> Mapping[str, Any]:
        try:
            values = json.loads(self.path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"{self.path}: no such file; `relay models --path MODEL` says what is missing and what to download"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read as JSON ({error}); download it again") from None
        if not isinstance(values, dict):
            raise InputError(f"{self.path}: holds no JSON object; download it again")
        return values

    def fail(self, what: str) -> NoReturn:
        raise InputError(f"{self.path}: {what}")

    def get(self, key: str, default: Any) -> Any:  # noqa: ANN401 - JSON values have any type
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._or_default(key, default)
        if not _is_count(value):
            self.fail(f"{key} must be a whole number from 1, found {value!r}")
        return value

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self._or_default(key, default)
        if not isinstance(value, list | tuple) or not all(map(_is_count, value)):
            self.fail(f"{key} must be a list of whole numbers from 1, found {value!r}")
        return tuple(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._or_default(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            self.fail(f"{key} must be a number above 0, found {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._or_default(key, default)
        if not isinstance(value, bool):
            self.fail(f"{key} must be true or false, found {value!r}")
        return value

    def _or_default(self, key: str, default: object) -> Any:  # noqa: ANN401 - JSON values have any type
        value = self.values.get(key)
        return default if value is None else value  # a null head_dim means "the default"

    def inner(self, key: str) -> "_Config":
        """The nested config under `key` where there is one (multimodal models keep their language model there)."""
        nested = self.values.get(key)
        return _Config(self.path, nested) if isinstance(nested, dict) else self


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
