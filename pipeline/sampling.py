"""`relay sample`: pictures from the base, or from the base and adapters, in three processes one after another.

Prompts become contexts in the store (text encoder, then the VAE for references), contexts become latents
(transformer), latents become PNGs (VAE). Each process ends before the next begins, and what is there already is not
made again: prompts by their keys in the store, pictures by the key of their settings.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux2_relay import cache
from flux2_relay.cache.errors import InputError
from flux2_relay.pipeline import apart, commands
from flux2_relay.pipeline.cache_commands import print_json
from flux2_relay.pipeline.config import Config
from flux2_relay.pipeline.request import SAMPLES, set_request
from flux2_relay.pipeline.run_folder import say
from flux2_relay.pipeline.sampling_pictures import Model, Picture, Scene, pictures
from flux2_relay.pipeline.wish import Wish
from flux2_relay.stages import folders, identity

if TYPE_CHECKING:
    from flux2_relay.cache import Store
    from flux2_relay.stages.folders import ModelFolders
    from flux2_relay.stages.spec import TransformerSpec
    from flux2_relay.stages.train.layout import Layout

_CELL = 256, 512  # least and most pixels of a picture on a contact sheet

Tell = Callable[[str], None]
Body = Mapping[str, Any]


def aside(sentence: str) -> None:
    """Tell something on stderr, where stdout is for JSON."""
    from tqdm import tqdm

    tqdm.write(sentence, file=sys.stderr)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ready:
    """The model that draws, and the adapters, read once and found fit."""

    places: "ModelFolders"
    spec: "TransformerSpec"
    distilled: bool
    adapters: tuple[Path, ...]
    adapter_bytes: int


def sample(config: Config, wish: Wish, as_json: bool) -> None:
    """Draw every prompt at every seed and scale, and a contact sheet for each prompt."""
    tell = aside if as_json else say
    ready = _ready(config, wish)
    body = _contexts(config, wish, ready.places, tell)
    store = cache.open(config.cache.path)
    layout = _layout(config, wish, ready, store, body)
    wanted = _pictures(config, wish, ready, body, (layout, tell))
    missing = [picture for picture in wanted if not picture.is_there()]
    if any(not picture.order.latents.exists() for picture in missing):
        apart.run(_draw, config, missing, body, ready.adapters, layout, tell)
    if missing:
        apart.run(_decode, config, missing, tell)
    _tidy(wish.folder, wanted)
    sheets = _sheets(wish, wanted)
    if as_json:
        made = {picture.file for picture in missing}
        listed = [{**picture.as_object(), "drawn": picture.file in made} for picture in wanted]
        print_json({"folder": str(wish.folder), "pictures": listed, "sheets": list(map(str, sheets))})
        return
    count = f"{len(missing)} picture{'s' * (len(missing) != 1)}"
    of_sheets = f"; contact sheets: {', '.join(map(str, sheets))}" if sheets else ""
    say(f"{wish.folder}: drew {count}, {len(wanted) - len(missing)} were there{of_sheets}")


def _ready(config: Config, wish: Wish) -> _Ready:
    """Find model and adapters; InputError says everything that is wrong with the wish or the files."""
    from flux2_relay.stages.train import mixing

    model = config.model
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    commands.require(config, places, "transformer", "vae")
    spec, distilled = commands.check_model(config, places)
    wish.check(spec.guidance, distilled, wish.guidance_or(config.previews.guidance))
    adapters = tuple(mixing.locate(path) for path, _ in wish.adapters)
    adapter_bytes = mixing.size(mixing.read_all(adapters, spec))
    return _Ready(places=places, spec=spec, distilled=distilled, adapters=adapters, adapter_bytes=adapter_bytes)


def _contexts(config: Config, wish: Wish, places: "ModelFolders", tell: Tell) -> Body:
    """The set with the prompts' contexts in the store, made now where something of it is missing.

    A machine without the text encoder can draw what was encoded elsewhere.
    """
    size = wish.size_or(config.previews.size)
    shared = set_request(config)
    request = {
        SAMPLES: {
            **{part: shared[part] for part in ("model", "encode", "cache")},
            "prompts": [[prompt, wish.negative or ""] for prompt in wish.prompts],
            "references": [_sha256(path) for path in wish.references],
            "size": list(size) if wish.references else None,
        }
    }
    lacks_encoder = {"text_encoder", "tokenizer"} & set(places.missing())
    if not lacks_encoder:
        key = apart.run(_encode, config, wish, request, tell)
        return cache.open(config.cache.path).open_set(key).body
    with suppress(InputError):
        store = cache.open(config.cache.path)
        for record in store.sets():
            if record.body.get("request") == request and not store.missing(record):
                return record.body
    commands.require(config, places, "text_encoder", "tokenizer")
    raise AssertionError  # the line above refuses


def _sha256(path: Path) -> str:
    try:
        return identity.file_sha256(path)
    except OSError as error:
        raise InputError(f"--reference {path}: {str(error.strerror).lower()}") from None


def _layout(config: Config, wish: Wish, ready: _Ready, store: "Store", body: Body) -> "Layout":
    """How the drawing fits the memory budget; sizes of texts and references are told by the store."""
    from flux2_relay.stages.train import forward_layout
    from flux2_relay.stages.train.transformer import stock_of

    text = int(store.header("text", body["shared"]["empty"]).attributes["key"]["max_length"])
    references = sum(prod(store.header("latents", key).shape[:2]) for key in body["prompts"][0]["references"])
    rows = text + prod(wish.size_or(config.previews.size)) // 256 + references
    load = forward_layout.DrawingLoad(
        rows=rows,
        adapter_bytes=ready.adapter_bytes,
        dtype=config.train.dtype,
        stored=stock_of(ready.places.transformer, ready.spec),
    )
    return forward_layout.choose(ready.spec, load, config.memory)


def _pictures(config: Config, wish: Wish, ready: _Ready, body: Body, how: tuple["Layout", Tell]) -> list[Picture]:
    """What was asked for, each picture under its key; hashes weights that this machine has not hashed before."""
    from flux2_relay.stages import spec
    from flux2_relay.stages.decode import stage as decoding
    from flux2_relay.stages.train import drawing

    options, (layout, tell) = config.previews, how
    model = Model(
        name=spec.name_of(ready.places) or ready.places.root.name,
        transformer=drawing.identity_of(ready.places, ready.spec, tell),
        decoder=decoding.identity_of(ready.places),
        bits=layout.bits,
        dtype=config.train.dtype,
    )
    guidance = wish.guidance_or(options.guidance)
    scene = Scene(
        size=wish.size_or(options.size),
        steps=wish.steps or options.steps,
        guidance=guidance if ready.spec.guidance or not ready.distilled else None,
        is_steered=not (ready.spec.guidance or ready.distilled) and guidance > 1,
        negative=wish.negative or "",
        references=wish.references,
        adapters=tuple(zip(ready.adapters, (scale for _, scale in wish.adapters), strict=True)),
    )
    return pictures(wish, scene, model, body["prompts"], options.seed)


def _encode(config: Config, wish: Wish, request: Mapping[str, object], tell: Tell) -> str:
    """In its process: prompts and references into the store -> the key of their set."""
    from flux2_relay.stages import memory
    from flux2_relay.stages.encode import stage
    from flux2_relay.stages.encode.entries import Prompt

    model = config.model
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    size = wish.size_or(config.previews.size)
    job = stage.Job(
        name=f"{config.run.name}-samples",  # another name than the training's, of which `gc --keep` keeps the newest
        request=request,
        samples=(),
        prompts=[
            Prompt(text=prompt, negative=wish.negative or "", size=size, seed=0, references=wish.references)
            for prompt in wish.prompts
        ],
        folders=places,
        encode=config.encode,
        text_dtype=config.cache.dtype,
        latents_dtype=config.cache.latents_dtype,
        seed=config.run.seed,
        budget_bytes=memory.budget_bytes(config.memory.budget),
        say=tell,
        store=cache.open(config.cache.path, "a", codec=config.cache.codec),
    )
    done = stage.encode(job)
    if done.captions or done.images:
        tell(f"{config.cache.path}: encoded {_count(done.captions, 'text')} and {_count(done.images, 'reference')}")
    return done.set


def _draw(
    config: Config, missing: Sequence[Picture], body: Body, adapters: tuple[Path, ...], layout: "Layout", tell: Tell
) -> None:
    """In its process: contexts to latents."""
    from flux2_relay.stages.train import drawing

    model = config.model
    places = folders.find(model.path, model.text_encoder, model.tokenizer, model.vae)
    spec, _ = commands.check_model(config, places)
    job = drawing.DrawingJob(
        store=cache.open(config.cache.path),
        body=body,
        orders=[picture.order for picture in missing],
        adapters=adapters,
        memory=config.memory,
        dtype=config.train.dtype,
        layout=layout,
        say=tell,
    )
    drawing.draw_all(job, places, spec)


def _decode(config: Config, missing: Sequence[Picture], tell: Tell) -> None:
    """In its process: latents to PNG."""
    from flux2_relay.stages import memory
    from flux2_relay.stages.decode import stage

    todo = [(picture.order.latents, picture.file) for picture in missing]
    places = folders.find(config.model.path, vae=config.model.vae)
    stage.to_png(todo, places, tell, memory.budget_bytes(config.memory.budget))


def _tidy(folder: Path, wanted: Sequence[Picture]) -> None:
    """Remove the latents of pictures that are there."""
    for picture in wanted:
        picture.order.latents.unlink(missing_ok=True)
    with suppress(OSError):  # another command's may lie there, or none did
        (folder / "latents").rmdir()


def _sheets(wish: Wish, wanted: Sequence[Picture]) -> list[Path]:
    """A sheet for each prompt that has several pictures: a row a seed, a column a scale."""
    from flux2_relay.stages.decode.sheet import Labels, draw_sheet

    made = []
    for prompt in dict.fromkeys(picture.prompt for picture in wanted):
        of_prompt = [picture for picture in wanted if picture.prompt == prompt]
        seeds = list(dict.fromkeys(picture.order.seed for picture in of_prompt))
        scales = list(dict.fromkeys(picture.scale for picture in of_prompt))
        if len(of_prompt) == 1:
            continue
        placed = {(seeds.index(p.order.seed), scales.index(p.scale)): p.file for p in of_prompt}
        names = [f"scale {scale:g}" if scale and wish.adapters else "base" for scale in scales]
        labels = Labels(columns=names, rows=[f"seed {seed}" for seed in seeds], title=prompt)
        path = wish.folder / f"sheet-{of_prompt[0].slug}-{of_prompt[0].order.context[:10]}.png"
        draw_sheet(placed, labels, path, cell=min(_CELL[1], max(_CELL[0], *of_prompt[0].order.size)))
        made.append(path)
    return made


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
