"""The readers that `fuzz_readers` gives damaged files to, and small valid files of each format."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save

from nabla_gfn_jax.checkpoints import hub, torch_pickle
from nabla_gfn_jax.checkpoints.files import read_json, read_safetensors
from nabla_gfn_jax.checkpoints.lora_file import load_lora, read_about
from nabla_gfn_jax.data.prompts import prompt_set
from nabla_gfn_jax.diffusion.chain import stable_diffusion_chain
from nabla_gfn_jax.diffusion.schedule import STABLE_DIFFUSION, alphas_cumprod
from nabla_gfn_jax.models.bert_tokenizer import load_bert_tokenizer
from nabla_gfn_jax.models.blip import BertConfig
from nabla_gfn_jax.models.clip import CLIPTextConfig
from nabla_gfn_jax.models.open_clip_tokenizer import load_open_clip_tokenizer
from nabla_gfn_jax.models.tokenizer import load_tokenizer
from nabla_gfn_jax.models.unet import UNetConfig
from nabla_gfn_jax.models.vae import VAEConfig
from nabla_gfn_jax.runs import evaluations, manifest, metrics_log

Files = dict[str, bytes]


class Case(NamedTuple):
    """A reader of the files in a folder, valid contents of them, and the words that its files are made of.

    `share` is the share of all inputs that it gets; a slow reader gets fewer.
    """

    read: Callable[[Path], Any]
    files: Files
    words: Sequence[bytes] = ()
    share: float = 1


# JSON values that a careless or hostile file may have in place of any other.
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, 0.5, float("nan"), float("inf")),
    *("", "a", "\ud800", "\x00", "../../etc/passwd", "é" * 300, "1e999", "linear"),
    *([], {}, [None], [[]], {"a": 1}, [0] * 1000, [1, [2, [3]]], {"": ""}),
)


def zipped(pickled: bytes, storages: Files, method: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint as PyTorch 1.6 and later write it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, raw in storages.items():
            archive.writestr(f"archive/data/{key}", raw)
    return stream.getvalue()


def state_pickle() -> bytes:
    """The pickle of {"a": tensor (2, 3), "state_dict": {"b": a view of it}, "epoch": 3}, as torch.save writes it."""
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((X\x07\x00\x00\x00storageq\x02ctorch\nFloatStorage\nq\x03"
        b"X\x01\x00\x00\x000q\x04X\x03\x00\x00\x00cpuq\x05K\x06tq\x06Q"
    )
    whole = (
        tensor + b"K\x00K\x02K\x03\x86q\x07K\x03K\x01\x86q\x08\x89ccollections\nOrderedDict\nq\x09)Rq\x0atq\x0bRq\x0c"
    )
    part = b"h\x01(h\x06QK\x01K\x02\x85K\x01\x85\x89h\x09)RtR"
    return (
        b"\x80\x02}q\x00(X\x01\x00\x00\x00a" + whole + b"X\x0a\x00\x00\x00state_dicth\x09)R(X\x01\x00\x00\x00b" + part
    ) + b"uX\x05\x00\x00\x00epochK\x03u."


def old_layout(pickled: bytes, storages: Files) -> bytes:
    """A checkpoint as PyTorch before 1.6 writes it."""
    head = b"".join(pickle.dumps(part, 2) for part in (torch_pickle._OLD_MAGIC, 1001, {"little_endian": True}))
    tail = b"".join((len(raw) // 4).to_bytes(8, "little") + raw for raw in storages.values())
    return head + pickled + pickle.dumps(list(storages), 2) + tail


def _tokenizer_files() -> Files:
    letters = [
        *"abcdeghinost",
        *(f"{c}</w>" for c in "abcdeghinost"),
        "an",
        "in</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: number for number, token in enumerate(letters)}
    merges = [("a", "n"), ("i", "n</w>")]
    return {
        "vocab.json": json.dumps(vocabulary).encode(),
        "merges.txt": b"#version: 0.2\n" + "\n".join(map(" ".join, merges)).encode(),
        "tokenizer_config.json": json.dumps(
            {"model_max_length": 9, "pad_token": {"content": "<|endoftext|>"}}
        ).encode(),
        "special_tokens_map.json": b'{"pad_token": "<|endoftext|>"}',
    }


def _whole_tokenizer() -> Files:
    files = _tokenizer_files()
    model = {"vocab": json.loads(files["vocab.json"]), "merges": [["a", "n"], "i n</w>"]}
    return {
        "tokenizer.json": json.dumps({"model": model}).encode(),
        "tokenizer_config.json": files["tokenizer_config.json"],
    }


def _tensors() -> bytes:
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
    return save(arrays, {"format": "pt", "nabla_gfn_jax": '{"updates": 3}'})


_BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
_LINEAR = {"kernel": jax.ShapeDtypeStruct((4, 4), np.float32)}
_UNET = {_BLOCK: {"attn1.to_q": _LINEAR, "attn1.to_k": _LINEAR}, "down_blocks.0.resnets.0": {"time_emb_proj": _LINEAR}}


def _lora(prefix: str) -> Files:
    down, up = np.ones((2, 4), np.float32), np.ones((4, 2), np.float32)
    layers = {
        f"{prefix}{_BLOCK}.attn1.{n}.lora_{m}.weight": a for n in ("to_q", "to_k") for m, a in (("A", down), ("B", up))
    }
    settings = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_k": 2}, "unet.init_lora_weights": True})
    peft = json.dumps({"lora_alpha": 4, "alpha_pattern": {"to_k": 2}, "use_rslora": True, "init_lora_weights": True})
    file = save(layers, {"lora_adapter_metadata": settings})
    return {"adapter_model.safetensors": file, "adapter_config.json": peft.encode()}


def _config(cls: Any, **fields: Any) -> Files:
    return {"config.json": json.dumps({k: v for k, v in vars(cls()).items()} | fields).encode()}


def _manifest() -> Files:
    start = {"versions": {"jax": "1"}, "devices": {"kind": "cpu", "count": 1}}
    found = {
        "id": "a",
        "config": {"seed": 0, "training": {"clip": "inf"}},
        "beta": "inf",
        "inputs": {},
        "starts": [start],
    }
    rows = b'{"epoch": 0, "loss": 1.5}\n{"epoch": 1, "loss": null}\n'
    return {"manifest.json": json.dumps(found).encode(), "metrics.jsonl": rows, "evaluations.jsonl": rows}


def _read_run(folder: Path) -> None:
    found = manifest.read(folder)
    _ = found.versions, found.devices, found.about_lora(3)
    metrics_log.read(folder)
    evaluations.read(folder)


def _prompts(name: str) -> Callable[[Path], Any]:
    return lambda folder: prompt_set(f"{folder}/{name}")


def _schedule(folder: Path) -> None:
    config = read_json(folder / "scheduler_config.json")
    alphas_cumprod(config)
    stable_diffusion_chain(config, 2, 1.0, "ddpm")


_JSON = (*(json.dumps(odd).encode() for odd in ODD), b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"\xff", b"\x00")
_PICKLE = (
    *(b"\x80\x04", b"\x94", b"r\xff\xff\xff\xff", b"r\x00\x00\x00\x10", b"j\xff\xff\xff\xff", b"p99999999999\n"),
    *(
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x8e\x00\x00\x00\x00\x10\x00\x00\x00",
        b"B\xff\xff\xff\x7f",
        b"(l",
        b"(d",
    ),
    *(
        b"\x95\xff\xff\xff\xff\xff\x00\x00\x00",
        b"\x8b\xff\xff\xff\x7f",
        b"K\x00",
        b"J\xff\xff\xff\xff",
        b"2222",
        b"0",
        b"(",
        b"1",
    ),
    *(b"t", b"\x85", b"R", b"b", b"\x81", b"Q", b"s", b"u", b"e", b"a", b"\x89", b"N", b")", b"]", b"}", b"\x8f", b"."),
    *(b"cbuiltins\nexec\n", b"cos\nsystem\n", b"cnumpy\ndtype\n", b"ctorch\nFloatStorage\n", b"ctorch\nLongStorage\n"),
    *(
        b"h\x01",
        b"h\x03",
        b"h\x06",
        b"h\x09",
        b"h\x0c",
        b"\x82\x01",
        b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b"I99999999999999999999\n",
    ),
)
_STORAGE = {"0": np.arange(6, dtype=np.float32).tobytes()}
_FIELDS = tuple(f'"{name}": '.encode() for name in ("dtype", "shape", "data_offsets", "__metadata__", "pad_token"))
_KINDS_OF_NUMBERS = tuple(
    f'"{name}"'.encode() for name in ("F64", "BF16", "F8_E4M3", "F8_E5M2", "F4", "U16", "BOOL", "C64")
)

CASES: dict[str, Case] = {
    "safetensors": Case(
        lambda folder: read_safetensors(folder / "a.safetensors"),
        {"a.safetensors": _tensors()},
        _FIELDS + _KINDS_OF_NUMBERS,
    ),
    "about a LoRA": Case(lambda folder: read_about(folder / "a.safetensors"), {"a.safetensors": _tensors()}, _JSON),
    "LoRA of PEFT": Case(lambda folder: load_lora(folder, _UNET), _lora("base_model.model."), _JSON, 0.1),
    "LoRA of diffusers": Case(lambda folder: load_lora(folder, _UNET), _lora("unet."), _JSON + _KINDS_OF_NUMBERS, 0.1),
    "pickle in a zip": Case(
        lambda folder: torch_pickle.read(folder / "a.pt"), {"a.pt": zipped(state_pickle(), _STORAGE)}, _PICKLE
    ),
    "zip around a pickle": Case(
        lambda folder: (
            (folder / "a.pt").write_bytes(zipped((folder / "data.pkl").read_bytes(), _STORAGE)),
            torch_pickle.read(folder / "a.pt"),
        ),
        {"data.pkl": state_pickle()},
        _PICKLE,
    ),
    "old pickle": Case(
        lambda folder: torch_pickle.read(folder / "a.pt"), {"a.pt": old_layout(state_pickle(), _STORAGE)}, _PICKLE
    ),
    "CLIP's tokenizer": Case(lambda folder: load_tokenizer(folder)(["an ant in"]), _tokenizer_files(), _JSON),
    "CLIP's tokenizer in one file": Case(
        lambda folder: load_tokenizer(folder)(["an ant in"]), _whole_tokenizer(), _JSON
    ),
    "OpenCLIP's tokenizer": Case(
        lambda folder: load_open_clip_tokenizer(folder, 9)(["an ant in"]), _tokenizer_files(), _JSON
    ),
    "BERT's tokenizer": Case(
        lambda folder: load_bert_tokenizer(folder / "vocab.txt", 9)(["an ant"]),
        {"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##n\nan\n"},
        (b"[PAD]", b"[MASK]", b"\r", b"\n", b"\xff"),
    ),
    "UNet's config": Case(
        lambda folder: UNetConfig.from_json(read_json(folder / "config.json")), _config(UNetConfig), _JSON
    ),
    "VAE's config": Case(
        lambda folder: VAEConfig.from_json(read_json(folder / "config.json")), _config(VAEConfig), _JSON
    ),
    "text encoder's config": Case(
        lambda folder: CLIPTextConfig.from_json(read_json(folder / "config.json")), _config(CLIPTextConfig), _JSON
    ),
    "BERT's config": Case(
        lambda folder: BertConfig.from_json(read_json(folder / "config.json"), "a"), _config(BertConfig), _JSON
    ),
    "scheduler": Case(
        _schedule,
        {"scheduler_config.json": json.dumps(STABLE_DIFFUSION | {"trained_betas": None}).encode()},
        _JSON,
        0.1,
    ),
    "index of shards": Case(
        lambda folder: hub.shards(folder / "index.json"),
        {"index.json": b'{"weight_map": {"a": "b.safetensors", "c": "d"}}'},
        _JSON,
    ),
    "prompts.txt": Case(
        _prompts("a.txt"), {"a.txt": b"# animals\n\na cat\n  a dog \n"}, (b"\xff\xfe", b"\xef\xbb\xbf", b"#", b"\x00")
    ),
    "prompts.csv": Case(
        _prompts("a.csv:prompt,n"), {"a.csv": b'n,prompt\n1,a cat\n2,"a, dog"\n'}, (b'"', b",", b"\n", b"inf", b"1e999")
    ),
    "prompts.json": Case(
        _prompts("a.json:prompt,n"), {"a.json": b'[{"prompt": "a cat", "n": 1}, {"prompt": "b", "n": 2}]'}, _JSON
    ),
    "list of prompts": Case(_prompts("a.json"), {"a.json": b'["a cat", "a dog"]'}, _JSON),
    "prompts.jsonl": Case(_prompts("a.jsonl:p,n"), {"a.jsonl": b'{"p": "a cat", "n": 1}\n{"p": "b", "n": 2}\n'}, _JSON),
    "files of a run": Case(_read_run, _manifest(), _JSON),
}
