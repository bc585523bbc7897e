"""Every option and every config field refuses wrong values in one line.

The tables of `wrong_values` are written by hand: a field or flag that they lack fails the tests, as does one that
accepts what stands there.
"""

import importlib
import math
import pkgutil
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
from wrong_values import WRONG, WRONG_FLAGS, WRONG_OF_ALGORITHM, WRONG_OF_PRETRAINING

import nabla_gfn_jax
from nabla_gfn_jax import options
from nabla_gfn_jax.algorithms import ALGORITHMS
from nabla_gfn_jax.base_models.names import abstract_model
from nabla_gfn_jax.command_line import load_config, load_settings
from nabla_gfn_jax.emoji.settings import Pretraining
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.options import MISSING, Checked, build, leaves, option
from nabla_gfn_jax.settings import Settings
from nabla_gfn_jax.training.build import check_heads

COMMANDS = {
    name: f"nabla_gfn_jax.{name}:Options"
    for name in ("train", "sample", "evaluate", "report", "reproduce", "plan", "pretrain")
}
COMMANDS |= {f"grid {name}": f"nabla_gfn_jax.reproduction.grid:{name.title()}" for name in ("shared", "base", "method")}
COMMANDS |= {
    "mixture2d": "nabla_gfn_jax.studies.mixture2d:Options",
    "bank_fit": "nabla_gfn_jax.studies.bank_fit:Options",
    "bench2d": "nabla_gfn_jax.studies.bench2d:Options",
    "ablations": "nabla_gfn_jax.studies.ablations:Options",
    "foresight": "nabla_gfn_jax.studies.foresight:Options",
    "value_fit": "nabla_gfn_jax.studies.value_fit:Options",
    "value_guidance": "nabla_gfn_jax.studies.value_guidance:Options",
    "candidates": "nabla_gfn_jax.studies.candidates:Options",
    "uptake": "nabla_gfn_jax.studies.uptake:Options",
    "microscope": "nabla_gfn_jax.studies.microscope:Options",
    "fit": "nabla_gfn_jax.emoji.settings:FitOptions",
    "benchmarks": "benchmarks.__main__:Options",
    "accelerator": "benchmarks.accelerator.command:Options",
}


def cases(wrong):
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in wrong.items() for value in values]


def with_value(tree, name, value):
    *groups, last = name.split(".")
    copy = dict(tree)
    copy[groups[0] if groups else last] = (
        with_value(tree[groups[0]], name.partition(".")[2], value) if groups else value
    )
    return copy


def algorithm_tree(name):
    config = {
        "residual_nabla_db": "emoji",
        "path_regression": "path_regression",
        "fitted_value": "emoji_exact",
        "value_gradient": "emoji_exact:network",
    }.get(name, f"{name}:emoji")
    tree = load_config(*config.split(":")).to_dict()
    assert tree["algorithm"]["name"] == name
    return tree


def refused(cls, tree, name, value, prefix=""):
    """Checks that the value is refused in one line that names the field and the value."""
    with pytest.raises(UserError) as caught:
        build(cls, with_value(tree, name, value), prefix)
    text = str(caught.value)
    assert name.rpartition(".")[2] in text
    assert "\n" not in text
    shown = [str(v) for v in (value if isinstance(value, tuple) else (value,))]
    assert all(part in text for part in shown), text


EMOJI = load_config("emoji").to_dict()


def test_the_tables_name_every_field_and_flag():
    assert set(WRONG) == {n for n in leaves(Settings, EMOJI) if not n.startswith("algorithm.")} | {"algorithm.name"}
    assert WRONG_OF_ALGORITHM.keys() == ALGORITHMS.keys()
    for name, algorithm in ALGORITHMS.items():
        assert WRONG_OF_ALGORITHM[name].keys() == leaves(algorithm).keys(), name
    assert WRONG_OF_PRETRAINING.keys() == leaves(Pretraining, load_config("emoji_base").to_dict()).keys()
    for command in COMMANDS:
        assert WRONG_FLAGS[command].keys() == leaves(options_of(command)).keys(), command


def options_of(command):
    module, _, name = COMMANDS[command].partition(":")
    return getattr(importlib.import_module(module), name)


def test_no_dataclass_of_options_is_left_out():
    """Every such dataclass is a group of a run's or a pretraining's settings, an algorithm, or a command's options."""
    for module in pkgutil.walk_packages(nabla_gfn_jax.__path__, "nabla_gfn_jax."):
        if not module.name.endswith("__main__") and ".configs" not in module.name:
            importlib.import_module(module.name)
    walked = {*ALGORITHMS.values(), *groups(Settings), *groups(Pretraining)}
    walked = walked.union(*(groups(options_of(command)) for command in COMMANDS))
    bases = {base for cls in walked for base in cls.__mro__}  # what commands share
    assert {cls for cls in subclasses(Checked) if cls.__module__.startswith("nabla_gfn_jax")} <= walked | bases


def subclasses(cls):
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def groups(cls):
    inner = [hint for hint in get_type_hints(cls).values() if is_dataclass(hint)]
    return {cls}.union(*map(groups, inner))


@pytest.mark.parametrize(("name", "value"), cases(WRONG))
def test_a_run_refuses(name, value):
    refused(Settings, EMOJI, name, value)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_refuses(algorithm):
    tree = algorithm_tree(algorithm)
    for name, values in WRONG_OF_ALGORITHM[algorithm].items():
        for value in values:
            refused(Settings, tree, f"algorithm.{name}", value)


def test_a_pretraining_refuses():
    tree = load_config("emoji_base").to_dict()
    for name, values in WRONG_OF_PRETRAINING.items():
        for value in values:
            refused(Pretraining, tree, name, value)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses(command):
    studies = ("mixture2d", "bank_fit", "foresight", "value_fit", "value_guidance", "candidates", "microscope")
    folders = {name: {"out": "out"} for name in studies}
    folders |= {name: {"out": "out.jsonl"} for name in ("bench2d", "ablations")}
    folders["uptake"] = {"out": "out", "lora": __file__}
    folders |= {"grid shared": {"updates": 1, "evaluation": {}, "tuning": {}}, "grid base": {"config": "emoji"}}
    given = folders.get(command, {})  # it must be
    for name, values in WRONG_FLAGS[command].items():
        for value in values:
            refused(options_of(command), given, name, value, prefix="--")


def test_every_value_says_what_it_means():
    known = leaves(Settings, EMOJI) | leaves(Pretraining)
    for cls in (*map(options_of, COMMANDS), *ALGORITHMS.values()):
        known |= leaves(cls, prefix=f"{cls.__module__} ")
    assert [name for name, leaf in known.items() if not leaf.option.meaning] == []


# What is allowed though it may look wrong.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("algorithm.beta", -80.0),
        ("algorithm.beta", 0.0),
        ("algorithm.beta", 3),
        ("algorithm.credit_clip", "inf"),
        ("training.clip", math.inf),
        ("training.num_epochs", 0),
        ("sampling.guidance", 0.0),
        ("seed", 2**32 - 1),
        ("lora.start_from", ""),
        ("correction.block_out_channels", [32, 64]),
    ],
)
def test_a_run_takes(name, value):
    found = options.flatten(build(Settings, with_value(EMOJI, name, value)))[name]
    expected = {"": None, "inf": math.inf, 3: 3.0}.get(value, value) if not isinstance(value, list) else tuple(value)
    assert found == expected
    assert type(found) is type(expected)


def test_settings_are_checked_however_they_are_made():
    run = load_settings(Settings, "emoji")
    with pytest.raises(UserError, match="clip"):
        replace(run.training, clip=0.0)
    with pytest.raises(UserError, match="divide"):
        replace(run.correction, norm_num_groups=7)
    with pytest.raises(UserError, match="bins"):
        replace(run, sampling=replace(run.sampling, num_steps=49))


def test_a_field_without_a_statement_is_a_programming_error():
    @dataclass(frozen=True, kw_only=True)
    class Forgotten(Checked):
        rank: int = 8

    with pytest.raises(TypeError, match="rank has no option"):
        leaves(Forgotten)
    with pytest.raises(TypeError, match="rank has no option"):
        Forgotten()


def test_json_and_back():
    """JSON has no infinities, tuples and paths, which are converted."""
    run = load_settings(Settings, "hps", {"lora.start_from": Path(__file__)})
    tree = options.plain(run)
    assert tree["algorithm"] == tree["algorithm"] | {"name": "residual_nabla_db", "credit_clip": "inf"}
    assert tree["correction"]["block_out_channels"] == [64, 128, 256, 256]
    assert tree["lora"]["start_from"] == str(Path(__file__))
    assert build(Settings, tree) == run


def test_what_changes_no_number():
    free = options.free_names(load_settings(Settings, "emoji"))
    assert free == {
        *("training.num_epochs", "training.micro_batches", "training.remat", "training.images_at_once"),
        "training.skipped_updates",
        *(f"{group}.{name}" for group in ("logging", "evaluation") for name in EMOJI[group]),
    }


def test_what_is_missing_or_unknown_is_named():
    with pytest.raises(UserError, match=r"reward is missing; it must be one of valence"):
        build(Settings, {k: v for k, v in EMOJI.items() if k != "reward"})
    with pytest.raises(UserError, match=r"training.cilp is unknown \(did you mean training\.clip\?"):
        build(Settings, EMOJI | {"training": {"cilp": 1.0}})
    with pytest.raises(UserError, match=r"training = 3 is not allowed; it must be a group"):
        build(Settings, EMOJI | {"training": 3})


@dataclass(frozen=True, kw_only=True)
class Example(Checked):
    """One field of each kind."""

    few: int = option(1, "few", minimum=1, maximum=9)
    share: float = option(0.5, "share", above=0, maximum=1)
    size: float = option(1.0, "size", above=0, infinite=True)
    sure: bool = option(False, "sure")
    side: Literal["left", "right"] = option("left", "side")
    sides: tuple[Literal["left", "right"], ...] = option(("left",), "sides")
    words: tuple[str, ...] = option(("a",), "words", repeated=True)
    file: Path | None = option(None, "file")
    out: Path = option(MISSING, "out", file="output", endings=(".png",))


def test_what_is_allowed_is_said():
    allowed = {name: leaf.allowed for name, leaf in leaves(Example).items()}
    assert allowed == {
        "few": "a whole number from 1 to 9",
        "share": "a number above 0 and up to 1",
        "size": "a number above 0, or inf",
        "sure": "true or false",
        "side": "one of left, right",
        "sides": "one of left, right; several with commas between",
        "words": "text that is not empty",
        "file": "a path",
        "out": "a file name that ends in .png",
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(
            ("few", "3", 3),
            ("few", "3.0", "3.0"),
            ("share", "1e-3", 1e-3),
            ("share", "1", 1.0),
            ("size", "inf", math.inf),
        ),
        *(("sure", "True", True), ("sure", "false", False), ("sure", "1", "1"), ("side", "left", "left")),
        *(("sides", "(left,)", ["left"]), ("sides", "[left, right]", ["left", "right"]), ("sides", "", [])),
        ("file", "~/x", "~/x"),
    ],
)
def test_what_was_typed_is_read(name, text, value):
    assert leaves(Example)[name].read(text) == value


def test_a_home_folder_is_found():
    assert build(Example, {"out": "~/a.png"}).out == Path.home() / "a.png"


def test_files_are_looked_at(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Files(Checked):
        read: Path | None = option(None, "read", file="existing")
        written: Path = option(MISSING, "written", file="output", endings=(".png", ".jpg"))

    (tmp_path / "file").write_text("")
    good = tmp_path / "made/when/written.png"
    options.check_files(Files(read=tmp_path / "file", written=good))
    assert not good.parent.exists()
    for wrong, said in [
        ({"read": tmp_path / "none"}, "read = .*none does not exist"),
        ({"written": tmp_path / "picture"}, r"must be a file name that ends in \.png or \.jpg"),
        ({"written": tmp_path / "file/x.png"}, "cannot be written"),
    ]:
        with pytest.raises(UserError, match=said):
            options.check_files(build(Files, {"written": good} | wrong))


def test_a_correction_with_more_levels_than_latents_have_halves():
    """Latents of the emoji model are 8 x 8, so four levels have the sizes 8, 4, 2 and 1."""
    base = abstract_model("emoji")
    for levels, credit, fits in [(4, "lookahead", True), (5, "lookahead", False), (5, "adjoint", True)]:
        fields = {"algorithm.credit": credit, "correction.block_out_channels": (8,) * levels}
        run = load_settings(Settings, "emoji", fields)
        with nullcontext() if fits else pytest.raises(UserError, match=r"has 5 levels, .* 8 x 8; take fewer"):
            check_heads(run, base)
