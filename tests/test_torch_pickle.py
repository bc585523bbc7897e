"""Reading PyTorch's checkpoints without PyTorch; hostile and damaged files are refused."""

import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from nabla_gfn_jax.checkpoints import torch_pickle
from nabla_gfn_jax.checkpoints.torch_pickle import read
from nabla_gfn_jax.errors import UserError

LAYOUTS = pytest.mark.parametrize("zipped", [False, True], ids=["old", "zip"])
DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def checkpoint() -> OrderedDict:
    torch.manual_seed(0)
    tensors = OrderedDict((name, (torch.randn(3, 4) * 50).to(getattr(torch, name))) for name in DTYPES)
    base = torch.randn(6, 5)
    tensors["transposed"] = base.t()
    tensors["part of the same storage"] = base[2:4, 1:]
    tensors["expanded"] = torch.randn(1, 4).expand(3, 4)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 7)
    tensors["parameter"] = torch.nn.Parameter(torch.randn(2))
    return tensors


@LAYOUTS
def test_every_dtype_and_stride(tmp_path, zipped):
    tensors = checkpoint()
    file = tmp_path / "model.pth"
    torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
    arrays = read(file)
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        assert str(arrays[name].dtype) == str(tensor.dtype).removeprefix("torch."), name
        wide = tensor.detach().double().numpy()
        np.testing.assert_array_equal(arrays[name].astype(np.float64), wide, err_msg=name)


@LAYOUTS
def test_nested_with_plain_values_and_module_metadata(tmp_path, zipped):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    file = tmp_path / "model.pt"
    saved = {"state_dict": module.state_dict(), "epoch": 3, "betas": (0.9, [0.99])}
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    loaded = read(file)
    assert (loaded["epoch"], loaded["betas"]) == (3, (0.9, [0.99]))
    np.testing.assert_array_equal(loaded["state_dict"]["0.weight"], module[0].weight.detach().numpy())


class Hostile:
    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


@LAYOUTS
def test_hostile_pickle_is_refused_and_not_run(tmp_path, zipped):
    file, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save({"weight": torch.zeros(2), "x": Hostile(marker)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"evil\.pth asks for (posix|nt)\.system"):
        read(file)
    assert not marker.exists()


@LAYOUTS
def test_what_training_programs_keep_beside_is_passed_over(tmp_path, zipped):
    """NumPy's scalars, lightning's classes as keys, and options are not created."""
    kept = {"best": np.float64(3), "args": Namespace(lr=1), "seen": {1, 2}, "counts": defaultdict(list, a=[1])}
    saved = {"state_dict": {"weight": torch.ones(2)}, "callbacks": kept, "epoch": 3}
    torch.save(saved, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path / "model.ckpt")
    np.testing.assert_array_equal(found["state_dict"]["weight"], np.ones(2))
    assert found["epoch"] == 3
    assert not isinstance(found["callbacks"]["args"], Namespace)


def test_plain_hostile_pickle(tmp_path):
    file, marker = tmp_path / "evil.bin", tmp_path / "marker"
    file.write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(UserError, match=r"evil\.bin asks for"):
        read(file)
    assert not marker.exists()


@LAYOUTS
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.7, 0.999])
def test_truncated(tmp_path, zipped, kept):
    file = tmp_path / "cut.pth"
    torch.save(checkpoint(), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UserError, match=r"cut\.pth is truncated"):
        read(file)


def test_truncated_before_an_empty_tensor(tmp_path):
    """In the older layout, storages are in the order of addresses, so the last may be the empty one, 8 zeros."""
    file = tmp_path / "cut.pth"
    torch.save(OrderedDict(empty=torch.zeros(0, 7)), file, _use_new_zipfile_serialization=False)
    assert read(file)["empty"].shape == (0, 7)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cut\.pth is truncated"):
        read(file)


class Beyond:
    """Is pickled as a tensor that claims more elements than its storage has."""

    def __reduce__(self):
        storage = torch.storage.TypedStorage(4, dtype=torch.float32)
        return torch._utils._rebuild_tensor_v2, (storage, 2, (3,), (1,), False, OrderedDict())


@LAYOUTS
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensor_beyond_its_storage(tmp_path, zipped):
    file = tmp_path / "long.pth"
    torch.save({"a": Beyond()}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"long\.pth .*beyond its storage"):
        read(file)


def zipped(pickled: bytes, storages: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, contents in {"data.pkl": pickled, **{f"data/{k}": raw for k, raw in storages.items()}}.items():
            archive.writestr(f"archive/{name}", contents)
    return stream.getvalue()


# The pickles of a tensor with the storage "0" and any shape, and of what calls and changes a function.
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x01tQ"
FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(shape: bytes, strides: bytes) -> bytes:
    return FUNCTION + b"(" + STORAGE + b"K\0" + shape + strides + b"tR"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + value.to_bytes(4, "little") for value in values) + b"t"


HUGE = {
    "places": b"\x80\x02}r\xff\xff\xff\x7f.",
    "text": b"\x80\x04\x8d\0\0\0\0\0\1\0\0abc.",
    "lists of lists": b"\x80\x02]q\0" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(60)) + b".",
    "one number often": b"\x80\x02" + tensor(numbers(2**30, 2**30), numbers(0, 0)) + b".",
    "one tensor often": b"\x80\x02](" + tensor(numbers(200_000), numbers(1)) + b"q\0" + b"h\0" * 3000 + b"e.",
}


@pytest.mark.parametrize("name", HUGE)
def test_a_small_file_cannot_ask_for_much_memory(tmp_path, name):
    """Neither while it is read nor when its tensors are copied."""
    (tmp_path / "a.pt").write_bytes(zipped(HUGE[name], {"0": bytes(800_000)}))
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="no torch checkpoint"):
        read(tmp_path / "a.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 2**17  # kB


def test_members_that_are_compressed_or_overlap_are_refused(tmp_path):
    whole = b"\x80\x02" + tensor(numbers(2), numbers(1)) + b"."
    (tmp_path / "a.pt").write_bytes(zipped(whole, {"0": bytes(8)}))
    np.testing.assert_array_equal(read(tmp_path / "a.pt"), np.zeros(2))
    (tmp_path / "a.pt").write_bytes(zipped(whole, {"0": bytes(2**20)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match=r"data\.pkl is compressed"):
        read(tmp_path / "a.pt")
    contents = bytearray(zipped(whole, {"0": bytes(8)}))
    size = contents.rindex(b"PK\1\2") + 20
    contents[size : size + 8] = (10**6).to_bytes(4, "little") * 2
    (tmp_path / "a.pt").write_bytes(contents)
    with pytest.raises(UserError, match="its members overlap"):
        read(tmp_path / "a.pt")


def test_a_pickle_cannot_change_what_the_next_one_is_read_with(tmp_path):
    """It sets the defaults of the function that makes tensors, and the fields of a storage's class."""
    good = zipped(b"\x80\x02" + tensor(numbers(2), numbers(1)) + b".", {"0": bytes(8)})
    for target, state in (
        (FUNCTION, b"N}X\x0c\0\0\0__defaults__(K\1K\1K\1tsq\1\x86"),
        (FUNCTION, b"}X\1\0\0\0aK\1s"),
        (b"ctorch\nFloatStorage\n", b"}X\4\0\0\0nameX\x0d\0\0\0DoubleStorages"),
    ):
        before = dict(torch_pickle._DTYPES), vars(torch_pickle._rebuild_tensor).copy()
        (tmp_path / "a.pt").write_bytes(zipped(b"\x80\x02" + target + state + b"b0K\1.", {}))
        assert read(tmp_path / "a.pt") == 1
        assert torch_pickle._rebuild_tensor.__defaults__ is None
        assert before == (torch_pickle._DTYPES, vars(torch_pickle._rebuild_tensor))
        (tmp_path / "a.pt").write_bytes(good)
        assert read(tmp_path / "a.pt").dtype == np.float32


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pth does not exist"):
        read(tmp_path / "nothing.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"text\.pth is truncated or no torch checkpoint"):
        read(tmp_path / "text.pth")


def test_torch_is_not_imported():
    code = "import sys, nabla_gfn_jax.checkpoints.torch_pickle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
