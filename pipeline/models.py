"""`relay models`: the models that are known by name, and which files of a model lie where and what is missing.

Reads configs and headers of weights, never weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline.cache_commands import in_bytes, print_json, print_table
from flux2_relay.pipeline.config import Config
from flux2_relay.stages import folders, fp8, hub, names, packed, spec, vae
from flux2_relay.stages.catalogue import CATALOGUE, ENCODERS, SOURCES, PartName, download, download_all
from flux2_relay.stages.encode import encoder_weights
from flux2_relay.stages.folders import PARTS, ModelFolders
from flux2_relay.stages.train import base
from flux2_relay.stages.train.transformer import base_shapes
from flux2_relay.stages.weights import Tensors, open_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownModel:
    """A model of the catalogue in a line."""

    name: str
    repository: str
    file: str
    """BFL's single file of the transformer."""
    parameters: int
    distilled: bool
    text_encoder: str
    snapshot: str | None
    """Its folder in the Hugging Face cache of this machine."""
    missing: tuple[PartName, ...]
    """Parts that are not in there; all of them without a snapshot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of one model: its files, or what is the matter with them."""

    part: PartName
    place: str
    layout: str = ""
    files: tuple[str, ...] = ()
    bytes: int = 0
    fault: str | None = None
    """Why these files cannot be used; None for what is there and sound, or not there."""
    download: str | None = None
    """What to download, where there are no files."""


def known(as_json: bool) -> None:
    """The catalogue, and what of it lies in the Hugging Face cache."""
    models = [_known(name) for name in CATALOGUE]
    if as_json:
        print_json({"hugging_face_cache": str(hub.cache_folder()), "models": list(map(asdict, models))})
        return
    rows = [
        [m.name, f"{m.parameters / 1e9:.1f} B", "yes" if m.distilled else "no", m.text_encoder, _here(m)]
        for m in models
    ]
    print_table(["model", "transformer", "distilled", "text encoder", "on this machine"], rows)
    for model in models:
        is_whole = model.snapshot is not None and not model.missing
        click.echo(f"{model.name}: {model.repository}" + ("" if is_whole else f"\n  {download_all(model.name)}"))
    click.echo()
    click.echo(f"The Hugging Face cache is {hub.cache_folder()}; nothing is downloaded by this program.")
    click.echo("model.path takes one of its repositories, a folder, or a single file;")
    click.echo("`relay models --path PLACE` looks into it.")


def _known(name: str) -> KnownModel:
    (transformer, distilled), source = CATALOGUE[name], SOURCES[name]
    (encoder,) = (e for e, text in ENCODERS.items() if text.context_width == transformer.context_width)
    snapshot = hub.snapshot(source.repository)
    return KnownModel(
        name=name,
        repository=source.repository,
        file=source.file,
        parameters=sum(map(math.prod, base_shapes(transformer).values())),
        distilled=distilled,
        text_encoder=encoder,
        snapshot=str(snapshot) if snapshot else None,
        missing=folders.find(str(snapshot)).missing() if snapshot else PARTS,
    )


def _here(model: KnownModel) -> str:
    if model.snapshot is None:
        return "no"
    return "without " + ", ".join(model.missing) if model.missing else "whole"


def of_config(config: Config, as_json: bool) -> None:
    """Which files of a config's model were found where, and what is missing."""
    model = config.model
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    _report(places, None if model.name == "auto" else model.name, as_json)


def of_path(path: str, as_json: bool) -> None:
    """The same for a model by its path or repository id."""
    if not path.strip():  # else the current folder would be meant
        raise InputError("--path '': name a folder, a file or a repository")
    _report(folders.find(path), None, as_json)


def _report(places: ModelFolders, named: str | None, as_json: bool) -> None:
    name = named or spec.name_of(places)
    parts = [_part(part, getattr(places, part), name) for part in PARTS]
    if as_json:
        print_json({"model": name, "path": str(places.root), "parts": list(map(asdict, parts))})
        return
    click.echo(f"{places.root}: {name or 'a model that is not in the catalogue'}")
    click.echo()
    rows = [[p.part, p.layout or "-", len(p.files), in_bytes(p.bytes) if p.files else "-", _said(p)] for p in parts]
    print_table(["part", "layout", "files", "size", "where"], rows)
    for part in parts:
        if part.fault or part.download:
            click.echo(f"{part.part}: {part.fault or part.download}")


def _said(part: Part) -> str:
    return part.place + (" (missing)" if part.download else " (cannot be used)" if part.fault else "")


def _part(part: PartName, place: Path, model: str | None) -> Part:
    if not folders.is_there(part, place):
        return Part(part=part, place=str(place), download=download(part, model))
    if part == "tokenizer":
        file = place / "tokenizer.json"
        return Part(part=part, place=str(place), layout="tokenizers", files=(file.name,), bytes=file.stat().st_size)
    try:
        layout, tensors = _INSPECT[part](place)
    except InputError as error:
        return Part(part=part, place=str(place), files=_files(place), bytes=_bytes(place), fault=str(error))
    files = {info.file for info in tensors.info.values()}
    return Part(
        part=part,
        place=str(place),
        layout=layout,
        files=tuple(sorted(file.name for file in files)),
        bytes=sum(file.stat().st_size for file in files),
    )


def _files(place: Path) -> tuple[str, ...]:
    found = [place] if place.is_file() else place.glob("*.safetensors")
    return tuple(sorted(file.name for file in found))


def _bytes(place: Path) -> int:
    folder = place.parent if place.is_file() else place
    return sum((folder / name).stat().st_size for name in _files(place))


def _transformer(place: Path) -> tuple[str, Tensors]:
    shapes = base_shapes(spec.read_transformer_spec(place))
    tensors = base.open_base(place, shapes)
    packing = packed.summary({path: one.packing for path, one in base.stock(tensors, shapes).items()})
    layout = names.layout_of("transformer", open_tensors(place).info)
    return _described(layout, packing, tensors), tensors


def _text_encoder(place: Path) -> tuple[str, Tensors]:
    text = spec.read_text_spec(place)
    tensors = encoder_weights.open_encoder(place, text)
    packing = packed.summary(encoder_weights.encoder_packings(tensors, text))
    return _described("MLX" if packing else "plain", packing, tensors), tensors


def _vae(place: Path) -> tuple[str, Tensors]:
    of_vae, tensors = spec.read_vae_spec(place), names.open_vae(place)
    shapes = vae.encoder_tensor_names(of_vae) | vae.decoder_tensor_names(of_vae)
    tensors.check(shapes, ignore=lambda name: not name.startswith(("encoder.", "decoder.")))
    return _described(names.layout_of("vae", open_tensors(place).info), None, tensors), tensors


def _described(layout: str, packing: packed.Packing | None, tensors: Tensors) -> str:
    """A layout, and how its matrices are stored where they are not plain floats."""
    stored = [packing.in_words()] if packing else []
    return ", ".join([layout, *stored, *(["fp8"] if fp8.is_fp8(tensors) else [])])


_INSPECT: Mapping[str, Callable[[Path], tuple[str, Tensors]]] = {
    "transformer": _transformer,
    "text_encoder": _text_encoder,
    "vae": _vae,
}
"""What a part's files are and hold, headers alone; InputError where they do not hold what they should."""
