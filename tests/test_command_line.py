"""The command line: accepted input, one-line errors, the text of `--help`, and where configs are found."""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nabla_gfn_jax import (
    __main__,
    command_line,
    config_files,
    options,
    plan,
    pretrain,
    report,
    reproduce,
    sample,
    train,
)
from nabla_gfn_jax.command_line import default_workdir, load_config, load_settings, parse, parse_run
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import Checked, leaves, option
from nabla_gfn_jax.settings import Settings

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Options of every kind."""

    config: str = option("emoji", "a config")
    num: int = option(16, "how many", minimum=1)
    beta: float = option(1.0, "exponent", minimum=-1e9)
    word: tuple[str, ...] = option(("a face",), "a word", repeated=True)
    fast: bool = option(False, "be fast")
    file: Path | None = option(None, "a file")
    name: tuple[str, ...] = option((), "names", positional=True, empty=True)


def parsed(*arguments):
    return parse(["command", *arguments], Options, "")


def run(*arguments):
    return parse_run(["train", *arguments], train.Options, Settings, "")


def test_both_ways_of_giving_a_value():
    for arguments in (("--num=3", "--beta=-1e5", "--fast"), ("--num", "3", "--beta", "-1e5", "--fast=true")):
        found = parsed(*arguments)
        assert (found.num, found.beta, found.fast) == (3, -1e5, True)
    assert parsed("--fast", "x", "--num", "2", "y").name == ("x", "y")


def test_an_option_that_is_repeated_replaces_its_default():
    assert parsed().word == ("a face",)
    assert parsed("--word=a cat", "--word", "a dog").word == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num=3", "--num", "4"), "--num is given 2 times (3, 4); give it once"),
        (("--fast", "--fast"), "--fast is given 2 times"),
        (("--num",), "--num needs a value, as in --num=VALUE"),
        (("--num", "--fast"), "--num needs a value"),
        (("--numb=3",), "--numb is unknown (did you mean --num?)"),
        (("--numb", "3"), "--numb is unknown (did you mean --num?)"),
        (("--halp",), "--halp is unknown (did you mean --help?)"),
        (("--num=many",), "--num = 'many' is not allowed; it must be a whole number of 1 or more"),
        (("--num=",), "--num = '' is not allowed"),
        (("--=3",), "-- is unknown"),
        (("--file=",), "--file is empty; leave it out, or give a path"),
        (("--file", ""), "--file is empty"),
        (("--beta=nan",), "--beta = nan is not allowed; it must be a number of -1e+09 or more"),
    ],
)
def test_what_is_not_understood(arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parsed(*arguments)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("epochs", "'epochs' is not understood"),
        ("--config.training.num_epoch=3", "(did you mean --config.training.num_epochs?)"),
        ("--config.num_epochs=3", "(did you mean --config.training.num_epochs?)"),
        ("--num_epochs=3", "--num_epochs is unknown (did you mean --config.training.num_epochs?)"),
        ("--config.workdir=x", "(did you mean --workdir?)"),
        ("--config.training=3", "--config.training is unknown"),
        ("--config.algorithm.tail=3", "--config.algorithm.tail is unknown"),
        ("--config.algorithm.credit=Lookahead", "one of lookahead, guess, adjoint, terminal (did you mean lookahead?)"),
        ("--config.flow.norm_num_groups=7", "correction.norm_num_groups = 7 does not divide"),
        ("--config.sampling.num_steps=49", "sampling.num_steps = 49"),
        ("--config=emojy", "config emojy does not exist (did you mean emoji?)"),
        ("--config=hps:quick", "there is no variant 'quick'"),
        ("--config=emoji:fast", "config emoji has no variants"),
        ("--config=paper", "reward = '' is not allowed; it must be one of valence"),
        ("--config=emoji_base", "max_tokens is unknown"),
        ("--config.lora.start_from=/nowhere", "lora.start_from = /nowhere does not exist"),
    ],
)
def test_what_a_run_does_not_understand(argument, said):
    with pytest.raises(UserError) as caught:
        run(argument)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_of_the_config_are_overridden():
    found, settings = run(
        *("--config=hps:fast", "--config.seed", "7", "--config.algorithm.credit_clip=inf", "--profile"),
        *(
            "--config.training.remat=False",
            "--config.correction.block_out_channels=(32,64)",
            "--config.flow.norm_num_groups=8",
        ),
    )
    assert found.profile
    expected = options.flatten(load_settings(Settings, "hps:fast")) | {
        "seed": 7,
        "algorithm.credit_clip": math.inf,
        "training.remat": False,
        "correction.block_out_channels": (32, 64),
        "correction.norm_num_groups": 8,
    }
    assert options.flatten(settings) == expected


def test_another_algorithm_keeps_what_it_shares_and_takes_its_own_options():
    _, settings = run("--config.algorithm.last_steps=3", "--config.algorithm.name=draft")
    flat = {name: value for name, value in options.flatten(settings).items() if name.startswith("algorithm.")}
    assert flat == {
        "algorithm.name": "draft",
        "algorithm.last_steps": 3,
        "algorithm.lv_samples": 0,
        "algorithm.output_regularisation": 0.0,
    }


def test_another_algorithm_takes_its_own_default_for_what_it_does_not_know():
    """`hps` has the credit "lookahead", which path regression does not have, and β, which it has."""
    _, settings = run("--config=hps", "--config.algorithm.name=path_regression")
    assert (settings.algorithm.credit, settings.algorithm.beta) == ("adjoint", 500_000.0)


def test_a_config_with_the_names_of_before(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from nabla_gfn_jax.command_line import load_config\n"
        "def get_config(variant=''):\n"
        "    c = load_config('emoji')\n"
        "    c.flow = c.correction\n"
        "    del c.correction\n"
        "    c.training.weight_decay_flow = 0.5\n"
        "    del c.training.weight_decay_correction\n"
        "    c.seed = len(variant)\n"
        "    return c\n"
    )
    settings = load_settings(Settings, f"{file}:abc")
    assert settings.correction == load_settings(Settings, "emoji").correction
    assert (settings.training.weight_decay_correction, settings.seed) == (0.5, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config = {}", "has no function get_config()"),
        ("def get_config():\n    return {}", "returns dict; make it an ml_collections.ConfigDict"),
        ("def get_config():\n\n    return missing", "fails in line 3: NameError: name 'missing'"),
        ("import nothing.there", "fails in line 1: ModuleNotFoundError"),
        ("def get_config(:", "fails in line 1: SyntaxError"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'training': 3})",
            "training = 3 is not allowed; it must be a group of fields",
        ),
    ],
)
def test_a_config_that_fails(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        run(f"--config={file}", "--config.training.clip=1")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_python_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a Python file; give a file\.py, or one of aesthetic, "):
        load_config(tmp_path / "config.json")


def test_workdirs_do_not_collide():
    names = [
        ("emoji", 0),
        ("emoji", 1),
        ("hps", 0),
        ("hps:fast", 0),
        ("hps:forward_only", 0),
        ("some/where/hps2.py:fast", 0),
    ]
    assert len({default_workdir(*name) for name in names}) == len(names)
    assert default_workdir("configs/hps.py:fast", 3) == default_workdir("hps:fast", 3) == Path("runs/hps-fast/seed3")


def printed_help(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["command", "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [train, sample, report, reproduce, plan, pretrain])
def test_help_lists_every_option(command, capsys):
    text = printed_help(command.main, capsys)
    assert max(map(len, text.splitlines())) <= 100
    for name, leaf in leaves(command.Options, prefix="--").items():
        shown = name.removeprefix("--").upper() if leaf.option.positional else name
        assert re.search(rf"^  {shown}\b", text, re.M), name
    assert not re.search(r"\bNone\b|MISSING|<", text)


def test_help_of_a_run_lists_every_field_with_the_configs_value(capsys):
    with pytest.raises(SystemExit):
        train.main(["train", "--config=hps:fast", "-h", "--config.seed=5"])
    text = " ".join(capsys.readouterr().out.split())
    for name, leaf in leaves(Settings, load_config("hps").to_dict()).items():
        assert f" {name} {leaf.option.meaning}" in text, name
    for shown in (
        "seed of every random number of the run; a whole number from 0 to 4294967295 [5]",
        "guess, adjoint, terminal [guess]",
    ):
        assert shown in text
    assert "[64,128,256,256]" in text
    assert "shipped configs: aesthetic, awm," in text


def test_one_name_for_all_commands(capsys):
    __main__.main(["nabla-gfn", "--help"])
    text = capsys.readouterr().out
    for command in __main__.COMMANDS:
        assert f"  {command} " in text
    with pytest.raises(SystemExit) as stop:
        __main__.main(["nabla-gfn", "tarin"])
    assert stop.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        __main__.main(["nabla-gfn", "plan", "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: nabla-gfn plan [--OPTION=VALUE ...]")


def test_configs_are_found_from_any_folder_and_from_a_wheel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("hps", "fast").sampling.num_steps == 20
    installed = tmp_path / "site/nabla_gfn_jax"
    (installed / "configs").mkdir(parents=True)
    for name in ("emoji.py", "hps.py"):
        (installed / "configs" / name).write_bytes((ROOT / "configs" / name).read_bytes())
    monkeypatch.setattr(config_files, "__file__", str(installed / "config_files.py"))
    assert config_files.shipped_configs() == {name: installed / f"configs/{name}.py" for name in ("emoji", "hps")}


def test_a_typo_claims_no_workdir(tmp_path, capsys):
    for flag in ("--config.reward=valance", "--config.prompts=poems", "--config.model=./model.ckpt"):
        with pytest.raises(SystemExit) as stop:
            train.main(["train", f"--workdir={tmp_path / 'run'}", flag])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_refusing_loads_no_device(tmp_path):
    """The called module finds the mistake before a backend of JAX is started."""
    program = (
        "import sys, jax\nfrom nabla_gfn_jax import train\n"
        "try: train.main(['train', '--config.training.clip=0'])\n"
        "except SystemExit as stop: print(stop.code, jax._src.xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert done.stderr == "error: training.clip = 0.0 is not allowed; it must be a number above 0, or inf\n"


def test_the_package_says_its_version(capsys):
    __main__.main(["nabla-gfn", "--version"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", capsys.readouterr().out.strip())
    assert command_line.load_config is config_files.load_config  # where the configs that people have look for it


@pytest.mark.parametrize("command", ["train", "sample", "studies.value_fit"])
def test_a_platform_that_is_not_here(command, tmp_path):
    """Exit code 2 and one line before a folder is made; `tpu` is nowhere where these tests run."""
    out = tmp_path / "out"
    name = "workdir" if command == "train" else "out"
    done = subprocess.run(
        [sys.executable, "-m", f"nabla_gfn_jax.{command}", f"--{name}={out}" + ".png" * (command == "sample")],
        env=os.environ | {"JAX_PLATFORMS": "tpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.endswith(
        "JAX finds no device for JAX_PLATFORMS = 'tpu'; unset it, or install JAX for this platform\n"
    )
    assert done.stderr.count("error:") == 1
    assert not list(tmp_path.iterdir())
