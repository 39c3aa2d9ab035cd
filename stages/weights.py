"""Safetensors in: checked before use, lazy, mapped by name.

A folder (sharded or not) or a single file becomes one `Tensors`: a table of what stands where, read from the headers
alone. Values are read when they are evaluated. MLX checks offsets against the file's end, but not that the file ends
there, nor holes and overlaps; a half-downloaded or mixed-up checkpoint must be refused before an hour of work.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from flux2_relay.cache.errors import InputError

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Element types that weights may have, with their bytes."""
FP8 = "F8_E4M3"
"""The 8-bit floats that weights may be made of besides: see `stages.fp8`."""
_SIZES = FLOATS | {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_MAX_HEADER = 100_000_000  # bytes; the format's own bound


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor stands: file, its name there, element type, shape and byte range in the file.

    It may be a part of what the file calls a tensor, or parts of it in another order: other layouts fuse matrices.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    rows: tuple[tuple[int, int], ...] = ()
    """The row ranges of the file's tensor that this one is made of, in order; () is all of it."""
    stored: tuple[int, ...] | None = None
    """The shape in the file where `shape` differs in more than rows."""
    scale: "TensorInfo | None" = None
    """What the file's tensor is to be multiplied by: one number, or one a row."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The byte ranges in the file that hold this tensor's bytes, in order."""
        if len(self.rows) < 2:
            return ((self.start, self.end),)
        row = (self.end - self.start) // sum(last - first for first, last in self.rows)
        base = self.start - row * min(first for first, _ in self.rows)
        return tuple((base + first * row, base + last * row) for first, last in self.rows)

    def take_rows(self, *ranges: tuple[int, int]) -> "TensorInfo":
        """These row ranges of a whole tensor, one after another; together they must be one stretch of the file."""
        row = (self.end - self.start) // max(1, self.shape[0])
        first, last = min(start for start, _ in ranges), max(end for _, end in ranges)
        shape = (sum(end - start for start, end in ranges), *self.shape[1:])
        return replace(self, shape=shape, start=self.start + first * row, end=self.start + last * row, rows=ranges)

    def reshape(self, shape: tuple[int, ...]) -> "TensorInfo":
        """The same bytes in another shape."""
        return replace(self, shape=shape, stored=self.shape)

    def of(self, whole: mx.array) -> mx.array:
        """This tensor's values, given those of the file's tensor; lazy."""
        if self.rows:
            parts = [whole[first:last] for first, last in self.rows]
            whole = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return whole if self.stored is None else whole.reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a checkpoint under the names that our code uses; nothing is read until `read` is evaluated."""

    source: Path
    info: Mapping[str, TensorInfo]

    def read(self, name: str, dtype: mx.Dtype | None = None) -> mx.array:
        """One tensor, lazy, cast to `dtype` where given."""
        return self.read_all([name], dtype)[name]

    def read_all(self, names: Iterable[str], dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """Several tensors, lazy; each file's header is parsed once."""
        files: dict[Path, dict[str, mx.array]] = {}
        values = {}
        for name in names:
            info = self.info[name]
            for of in filter(None, (info, info.scale)):
                if of.file not in files:
                    files[of.file] = _load(of.file)
            value = info.of(_values(info, files))
            values[name] = value if dtype is None else value.astype(dtype)
        return values

    def rename(self, new_name: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under other names; those that `new_name` maps to None are left out."""
        pairs = ((new_name(name), info) for name, info in self.info.items())
        return Tensors(self.source, {name: info for name, info in pairs if name is not None})

    def check(
        self, expected: Mapping[str, tuple[int, ...]], ignore: Callable[[str], bool] = lambda name: False
    ) -> None:
        """Refuse missing, surplus, misshapen and non-float tensors, all of them in one InputError.

        `ignore` says which surplus names are known and not needed.
        """
        faults = [
            f"{name} is missing (expected {_shape(shape)})" for name, shape in expected.items() if name not in self.info
        ]
        for name, info in self.info.items():
            where = f"{name} in {info.file.name}"
            if name not in expected:
                if not ignore(name):
                    faults.append(f"{where} is not part of this model (shape {_shape(info.shape)})")
            elif info.shape != tuple(expected[name]):
                faults.append(f"{where}: expected {_shape(expected[name])}, found {_shape(info.shape)}")
            elif info.dtype not in (*FLOATS, FP8):
                faults.append(f"{where} has type {info.dtype}; expected one of {', '.join(FLOATS)}")
        if faults:
            raise InputError(listing(f"{self.source} does not hold the weights that its config describes:", faults))


def from_fp8(values: mx.array, scale: mx.array | None) -> mx.array:
    """The float32 that 8-bit floats [out, ...] stand for, given as bytes, times `scale`: one number, or one a row."""
    floats = mx.from_fp8(values, dtype=mx.float32)
    if scale is None:
        return floats
    scale = scale.astype(mx.float32)
    return floats * (scale.reshape(-1, *[1] * (floats.ndim - 1)) if scale.size > 1 else scale.reshape(()))


def listing(title: str, faults: list[str], most: int = 20) -> str:
    """One message for many faults, a line each; beyond `most` they are only counted."""
    rest = [f"  … and {len(faults) - most} more"] if len(faults) > most else []
    return "\n".join([title, *(f"  {fault}" for fault in faults[:most]), *rest])


def open_tensors(path: Path | str) -> Tensors:
    """The tensors of one safetensors file or of a folder of them; InputError names each file that is not whole."""
    path = Path(path).expanduser()
    info: dict[str, TensorInfo] = {}
    faults: list[str] = []
    for file in _files(path):
        try:
            table = read_header(file)
        except InputError as error:
            faults.append(str(error))
            continue
        faults += [f"{name} stands in {info[name].file.name} and in {file.name}" for name in table if name in info]
        info |= table
    if faults:
        raise InputError(listing(f"{path} cannot be used; download or copy these again:", faults))
    return Tensors(path, info)


def _files(path: Path) -> list[Path]:
    """The safetensors files of `path`: itself, the shards that its index names, or all that lie in the folder."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; expected safetensors weights there")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _shards(indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: holds no .safetensors file; is the download complete?")
    return files


def _shards(index: Path) -> list[Path]:
    try:
        named = json.loads(index.read_text("utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in named})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: cannot be read as a safetensors index ({error}); download it again") from None
    if not names:
        raise InputError(f"{index}: names no file; download it again")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(listing(f"{index} names files that are not there; download them:", missing))
    return [index.parent / name for name in names]


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The table of one safetensors file, checked: types, shapes against ranges, no hole or overlap, nothing behind."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise InputError(
                    f"{file}: its header length {length} does not fit its {size} bytes; it is cut off or no safetensors"
                )
            header = json.loads(handle.read(length))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError, struct.error) as error:
        raise InputError(
            f"{file}: has no readable safetensors header ({error}); the file is cut off or no safetensors"
        ) from None
    base = 8 + length
    try:
        table = {name: _info(file, name, entry, base) for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{file}: its header is malformed ({said}); download it again") from None
    _check_ranges(file, table, base, size)
    return table


def _info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:  # noqa: ANN401 - JSON values have any type
    (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    numbers = [start, end, *shape]
    if not isinstance(dtype, str) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"{name}: {entry}")
    return TensorInfo(file, name, dtype, tuple(shape), base + start, base + end)


def _check_ranges(file: Path, table: Mapping[str, TensorInfo], base: int, size: int) -> None:
    at = base
    for name, info in sorted(table.items(), key=lambda item: (item[1].start, item[1].end)):
        count = 1
        for side in info.shape:
            count *= side
        if info.dtype not in _SIZES:
            raise InputError(f"{file}: tensor {name} has the unknown type {info.dtype}")
        if info.end - info.start != count * _SIZES[info.dtype]:
            raise InputError(
                f"{file}: tensor {name} of shape {_shape(info.shape)} {info.dtype} has {info.end - info.start} bytes"
            )
        if info.start != at:
            raise InputError(
                f"{file}: there is a hole or an overlap before tensor {name} (byte {at}, then {info.start})"
            )
        at = info.end
    if at != size:
        raise InputError(
            f"{file}: its header describes {at} bytes, but the file has {size}; it is cut off or was appended to"
        )


def _load(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    if not isinstance(loaded, dict):
        raise InputError(f"{file}: is no safetensors file")
    return loaded


def _values(info: TensorInfo, files: Mapping[Path, Mapping[str, mx.array]]) -> mx.array:
    """What the file calls this tensor, 8-bit floats as the float32 that they stand for; lazy."""
    whole = files[info.file][info.name]
    if info.dtype != FP8:
        return whole
    return from_fp8(whole, info.scale and files[info.scale.file][info.scale.name])


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
