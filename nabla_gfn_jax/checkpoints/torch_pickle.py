"""Reads PyTorch's pickled checkpoints (`.pth`, `.pt`, `.bin`) without PyTorch and without executing their contents.

A pickle can call any function that it names. This reader accepts only tensors, their storages and `OrderedDict`. It
replaces the objects that training programs save beside them by objects that do nothing, and refuses every other name. A
checkpoint from a stranger can therefore contain wrong numbers but cannot run code. Both layouts are read: the zip
archive of PyTorch 1.6 and later, and the older sequence of pickles followed by raw storages.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from nabla_gfn_jax.errors import UserError

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: Any


@dataclass(frozen=True)
class _Tensor:
    """A tensor whose storage has not been read yet, because the older layout has the storages last."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, raw: bytes) -> np.ndarray:
        """The tensor as a read-only view into the bytes of its storage. Offset and strides are in elements."""
        elements = np.frombuffer(raw, self.storage.dtype)
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("malformed tensor")
        if 0 in self.shape:
            return np.zeros(self.shape, elements.dtype)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if last >= elements.size:
            raise ValueError("tensor reaches beyond its storage")
        strides = tuple(step * elements.itemsize for step in self.strides)
        return np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, strides, writeable=False)


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *unused: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *unused: Any) -> _Tensor:
    return tensor


# Modules whose objects training programs save beside the tensors. Their objects are not created.
_BYSTANDERS = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "argparse", "numpy", "typing")
_PLAIN = {
    ("_codecs", "encode"),
    ("collections", "defaultdict"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("dict", "list", "set")),
}
_KNOWN: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Bystander:
    """Replaces an object that a training program saved beside the tensors. It accepts all calls and does nothing."""

    def __init__(self, *said: Any, **more: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Does nothing."""

    def extend(self, items: Any) -> None:
        """Does nothing."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BufferedIOBase | IO[bytes], file: Path):
        super().__init__(stream, encoding="utf-8")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])  # replaces the storage class; only `persistent_load` uses it
        if module.partition(".")[0] in _BYSTANDERS or (module, name) in _PLAIN:
            return _Bystander
        raise UserError(
            f"{self._file} asks for {module}.{name}, but only tensors are read; "
            "save only its state_dict, or save it as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError("unknown persistent id")
        return _Storage(str(key), dtype)


def read(file: Path) -> Any:
    """The object that `torch.save` wrote: nested dicts, lists and tuples with tensors as read-only NumPy arrays.

    bfloat16 becomes `ml_dtypes.bfloat16`.

    Raises:
        UserError: the file is missing or truncated, is not a checkpoint of PyTorch, or contains an object that is not
            allowed, which the error names.
    """
    try:
        if zipfile.is_zipfile(file):
            return _read_zip(file)
        with open(file, "rb") as stream:
            return _read_old(stream, file)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{file} is truncated or no torch checkpoint; download it again ({error})") from None


def _read_zip(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        with archive.open(name) as stream:
            outline = _Unpickler(stream, file).load()
        storages: dict[str, bytes] = {}

        def bytes_of(storage: _Storage) -> bytes:
            if storage.key not in storages:
                storages[storage.key] = archive.read(f"{folder}data/{storage.key}")
            return storages[storage.key]

        return _fill(outline, bytes_of)


def _read_old(stream: BufferedIOBase | IO[bytes], file: Path) -> Any:
    magic, _version, _machine = (_Unpickler(stream, file).load() for _ in range(3))
    if magic != _OLD_MAGIC:
        raise ValueError("wrong magic number")
    unpickler = _Unpickler(stream, file)
    outline = unpickler.load()
    sizes = {storage.key: storage.dtype.itemsize for storage in _storages(outline)}
    storages: dict[str, bytes] = {}
    for key in _Unpickler(stream, file).load():
        header = stream.read(8)
        count = int.from_bytes(header, "little") * sizes[key]
        storages[key] = stream.read(count)
        if len(header) < 8 or len(storages[key]) < count:
            raise EOFError("the file ends inside a tensor")
    return _fill(outline, lambda storage: storages[storage.key])


def _storages(node: Any) -> list[_Storage]:
    if isinstance(node, _Tensor):
        return [node.storage]
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ()
    return [storage for child in children for storage in _storages(child)]


def _fill(node: Any, bytes_of: Callable[[_Storage], bytes]) -> Any:
    if isinstance(node, _Tensor):
        return node.view(bytes_of(node.storage))
    if isinstance(node, dict):
        return {key: _fill(value, bytes_of) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_fill(value, bytes_of) for value in node)
    return node
