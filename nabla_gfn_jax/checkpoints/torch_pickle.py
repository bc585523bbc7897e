"""Reads PyTorch's pickled checkpoints (`.pth`, `.pt`, `.bin`) without PyTorch and without executing their contents.

A pickle can call any function that it names. This reader accepts only tensors, their storages and `OrderedDict`. It
replaces the objects that training programs save beside them by objects that do nothing, and refuses every other name. A
checkpoint from a stranger can therefore contain wrong numbers but cannot run code. Both layouts are read: the zip
archive of PyTorch 1.6 and later, and the older sequence of pickles followed by raw storages.
"""

import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nabla_gfn_jax.checkpoints.files import reason_of
from nabla_gfn_jax.errors import UserError

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_REPEATED = 8  # the most times that a file may repeat its contents; two layers may share their weights
_SMALL = 2**26  # bytes that any file may take
_SHOWN = 80  # characters of a name in an error
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
class _StorageClass:
    """Replaces the class of a storage, such as `torch.FloatStorage`."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str  # a name in `_DTYPES`


@dataclass(frozen=True)
class _Tensor:
    """A tensor whose storage has not been read yet, because the older layout has the storages last."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The memory of a copy, in bytes. Raises `ValueError` if the fields are not those of a tensor."""
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("malformed tensor")
        return math.prod(self.shape) * np.dtype(_DTYPES[self.storage.kind]).itemsize

    def view(self, raw: bytes) -> np.ndarray:
        """The tensor as a read-only view into the bytes of its storage. Offset and strides are in elements."""
        elements = np.frombuffer(raw, _DTYPES[self.storage.kind])
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
_FUNCTIONS: dict[tuple[str, str], Callable] = {
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
    """Reads one pickle. `storages` has the storages that it names."""

    def __init__(self, contents: bytes, file: Path):
        super().__init__(BytesIO(contents), encoding="utf-8")
        self._file, self.storages = file, dict[str, _Storage]()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in _FUNCTIONS:
            function = _FUNCTIONS[module, name]
            return lambda *given: function(*given)  # a new one each time, because a pickle can change its attributes
        if module == "torch" and name in _DTYPES:
            return _StorageClass(name)  # only `persistent_load` uses it
        if module.partition(".")[0] in _BYSTANDERS or (module, name) in _PLAIN:
            return _Bystander
        raise UserError(
            f"{self._file} asks for {module[:_SHOWN]}.{name[:_SHOWN]}, but only tensors are read; "
            "save only its state_dict, or save it as safetensors"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, of, key = pid[:3]
        if kind != "storage" or not isinstance(of, _StorageClass) or not isinstance(key, str | int):
            raise ValueError("unknown persistent id")
        storage = self.storages[str(key)] = _Storage(str(key), of.name)
        return storage


class _File(BufferedReader):
    """A file that is read. `read` allocates no more than the file still has, whatever a damaged file asks for."""

    def __init__(self, file: Path):
        super().__init__(FileIO(file))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self.size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def read(file: Path) -> Any:
    """The object that `torch.save` wrote: nested dicts, lists and tuples with tensors as read-only NumPy arrays.

    bfloat16 becomes `ml_dtypes.bfloat16`.

    Raises:
        UserError: the file is missing or truncated, is not a checkpoint of PyTorch, contains an object that is not
            allowed, which the error names, or would take far more memory than its own size.
    """
    try:
        with _File(file) as stream:
            zipped = zipfile.is_zipfile(stream)
            stream.seek(0)
            return _read_zip(stream, file) if zipped else _read_old(stream, file)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{file} is truncated or no torch checkpoint; download it again ({reason_of(error)})") from None


def _read_zip(stream: _File, file: Path) -> Any:
    with zipfile.ZipFile(stream) as archive:
        if sum(info.compress_size for info in archive.infolist()) > stream.size:
            raise ValueError("its members overlap")

        def member(name: str) -> bytes:
            if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # PyTorch compresses nothing
                raise ValueError(f"{name} is compressed")
            return archive.read(name)

        name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
        if name is None:
            raise ValueError("it has no data.pkl")
        pickled, folder = member(name), name.removesuffix("data.pkl")
        _check_places(pickled)
        outline, storages = _Unpickler(pickled, file).load(), dict[str, bytes]()

        def bytes_of(storage: _Storage) -> bytes:
            if storage.key not in storages:
                storages[storage.key] = member(f"{folder}data/{storage.key}")
            return storages[storage.key]

        return _Filling(bytes_of, len(pickled), stream.size).fill(outline)


def _read_old(stream: _File, file: Path) -> Any:
    magic, _version, _machine = (_Unpickler(_next_pickle(stream), file).load() for _ in range(3))
    if magic != _OLD_MAGIC:
        raise ValueError("wrong magic number")
    pickled = _next_pickle(stream)
    unpickler = _Unpickler(pickled, file)
    outline = unpickler.load()
    storages: dict[str, bytes] = {}
    for key in _Unpickler(_next_pickle(stream), file).load():
        if not isinstance(key, str) or key not in unpickler.storages:
            raise ValueError("unknown storage")
        header = stream.read(8)
        kind = unpickler.storages[key].kind
        count = int.from_bytes(header, "little") * np.dtype(_DTYPES[kind]).itemsize
        storages[key] = stream.read(count)
        if len(header) < 8 or len(storages[key]) < count:
            raise EOFError("the file ends inside a tensor")
    return _Filling(lambda storage: storages[storage.key], len(pickled), stream.size).fill(outline)


def _next_pickle(stream: _File) -> bytes:
    """The bytes of the pickle at the stream's position, which moves to its end."""
    start = stream.tell()
    for _ in pickletools.genops(stream):
        pass
    end = stream.tell()
    stream.seek(start)
    pickled = stream.read(end - start)
    _check_places(pickled)
    return pickled


def _check_places(pickled: bytes) -> None:
    """Raises `ValueError` if the pickle stores an object at a higher place than it can need.

    The unpickler allocates all places up to the highest.
    """
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(pickled):
            raise ValueError("malformed pickle")


class _Filling:
    """Puts the tensors into an outline.

    An outline can name one part or one storage very often. Without the bounds here, a small file could take up all
    memory.
    """

    def __init__(self, bytes_of: Callable[[_Storage], bytes], pickled: int, size: int):
        """`pickled` and `size` are the bytes of the pickle and of the file."""
        self._bytes_of = bytes_of
        self._parts, self._bytes = _REPEATED * pickled, _REPEATED * size + _SMALL

    def fill(self, node: Any) -> Any:
        """The outline with arrays in place of tensors. Raises `ValueError` if it is too large for its file."""
        self._parts -= 1
        if isinstance(node, _Tensor):
            self._bytes -= node.nbytes
        if self._parts < 0 or self._bytes < 0:
            raise ValueError(f"it repeats its contents more than {_REPEATED} times")
        if isinstance(node, _Tensor):
            return node.view(self._bytes_of(node.storage))
        if isinstance(node, dict):
            return {key: self.fill(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(self.fill(value) for value in node)
        return node
