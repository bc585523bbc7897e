"""A run keeps tokens and keys out of its files, and writes nowhere but into its workdir."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from test_parallel import without_images

SECRETS = {
    "HF_TOKEN": "hf_Secret0123456789abcdefghijklmnop",
    "HUGGING_FACE_HUB_TOKEN": "hf_Other0123456789abcdefghijklmnop",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}
PROMPTS = ("a face\n", "../../../a face\n", "/tmp/a face\n", "a\\..\\face\n", "<script>alert(1)</script>\n")


class Recorded:
    """The package wandb, which records what it is given."""

    def __init__(self):
        self.given: list[object] = []
        module = ModuleType("wandb")
        module.__spec__ = ModuleSpec("wandb", None)
        module.init = self.init
        self.module = module

    def init(self, **options: object) -> "Recorded":
        self.given.append(options)
        return self

    def log(self, row: object, step: int) -> None:
        self.given.append(row)

    def finish(self) -> None:
        pass


def holds(folder: Path, text: str) -> list[str]:
    """The files whose contents or names have the text."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if text.encode() in file.read_bytes() or text in str(file)]


@pytest.mark.thorough
def test_no_token_or_key_is_in_a_file_of_a_run_and_no_file_outside_its_workdir(
    command, tiny_model, tmp_path, monkeypatch
):
    without_images(monkeypatch)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    wandb = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", wandb.module)
    (tmp_path / "prompts.txt").write_text("".join(PROMPTS))
    others = {file for file in tmp_path.rglob("*") if file.is_file()}
    fields = {"prompts": tmp_path / "prompts.txt", "logging.tensorboard": True, "logging.wandb": True}
    fields |= {"algorithm.credit": "adjoint", "training.num_epochs": 2}
    command(tmp_path / "a" / "run", *(f"--config.{name}={value}" for name, value in fields.items()))
    written = {file for file in tmp_path.rglob("*") if file.is_file()} - others
    assert {file.relative_to(tmp_path / "a" / "run").parts[0] for file in written} == {
        *("manifest.json", "metrics.jsonl", "report.html", ".lock"),
        *("checkpoints", "lora", "samples", "pictures", "tensorboard"),
    }
    run = tmp_path / "a" / "run"
    assert str(run / "manifest.json") in holds(run, str(tiny_model))  # what is searched is found
    assert len(wandb.given) == 5
    for secret in SECRETS.values():
        assert holds(tmp_path, secret) == []
        assert secret not in repr(wandb.given)
        for part in (secret[:20], secret[-20:]):
            assert holds(tmp_path, part) == []
