"""The parser of all commands: `--NAME=VALUE` or `--NAME VALUE`, `--config.FIELD=VALUE`, and `--help`.

A command declares its options as a dataclass (`options.py`). A command with a config also takes `--config`, the name of
a config file, and each field of the settings as a flag. argparse and absl do not fit: the flags are known only after
the config has been read, because the value of one field decides which other fields exist, and argparse reads `--beta
-1e5` as a missing value.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nabla_gfn_jax.config_files import load_config, shipped_configs, split_variant
from nabla_gfn_jax.errors import UserError
from nabla_gfn_jax.help import print_help
from nabla_gfn_jax.options import Leaf, build, check_files, did_you_mean, leaves

__all__ = ["default_workdir", "load_config", "load_settings", "parse", "parse_run", "shipped_configs"]

Options = TypeVar("Options")
Run = TypeVar("Run")
Typed = Mapping[str, Sequence[str]]  # the values typed for each flag, such as "--num" or "--config.training.clip"
_FIELD = "--config."


def parse(argv: Sequence[str], options: type[Options], about: str) -> Options:
    """The options in `argv[1:]`. With `--help`, prints `about` and the options and exits.

    Raises `UserError` for a flag that does not exist, is given twice or has a value that is not allowed.
    """
    known = leaves(options, prefix="--")
    typed = _read_flags(argv[1:], known)
    if "--help" in typed:
        print_help(about, argv[0], known)
    _refuse_unknown(typed, known)
    return _options_of(options, known, typed)


def parse_run(argv: Sequence[str], options: type[Options], settings: type[Run], about: str) -> tuple[Options, Run]:
    """As `parse`, for a command with a config: returns its options, which include `config`, and the run's settings."""
    known = leaves(options, prefix="--")
    typed = _read_flags(argv[1:], known)
    config = _once("--config", typed.get("--config", [known["--config"].default]))
    tree = _tree(settings, config)
    for flag in sorted((f for f in typed if f.startswith(_FIELD)), key=_decides_others_first):
        leaf = _leaf(settings, tree, flag.removeprefix(_FIELD), known)
        _set(settings, tree, leaf, leaf.read(_once(flag, typed[flag])))
    if "--help" in typed:
        print_help(about, argv[0], known, leaves(settings, tree), tree, config)
    fields = [_FIELD + name for name in leaves(settings, tree)]
    own = {flag: texts for flag, texts in typed.items() if not flag.startswith(_FIELD)}
    _refuse_unknown(own, known, fields)
    return _options_of(options, known, own), _checked(build(settings, tree))


def load_settings(settings: type[Run], config: str, fields: Mapping[str, Any] | None = None) -> Run:
    """The settings of a config, named as for `--config`, with the values in `fields` by full name.

    Raises `UserError` for a config or field that does not exist, or a value that is not allowed.
    """
    tree = _tree(settings, config)
    for name in sorted(fields or {}, key=_decides_others_first):
        _set(settings, tree, _leaf(settings, tree, name), (fields or {})[name])
    return _checked(build(settings, tree))


def default_workdir(config: str, seed: int) -> Path:
    """`runs/CONFIG/seedN`, or `runs/CONFIG-VARIANT/seedN`."""
    name, variant = split_variant(config)
    return Path("runs") / f"{Path(name).stem}{'-' * bool(variant)}{variant}" / f"seed{seed}"


def _read_flags(arguments: Sequence[str], known: Mapping[str, Leaf]) -> dict[str, list[str]]:
    """The values typed for each flag. Arguments without a flag belong to the positional option."""
    positional = next((flag for flag, leaf in known.items() if leaf.option.positional), None)
    typed: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, equals, text = argument.partition("=")
        flag = "--help" if flag == "-h" else flag
        if not flag.startswith("--"):
            if positional is None:
                raise UserError(f"{argument!r} is not understood; options look like --seed=1, see --help")
            flag, text = positional, argument
        elif not equals and (flag == "--help" or (flag in known and known[flag].kind is bool)):
            text = "true"
        elif not equals:
            if not flag.startswith(_FIELD):
                _refuse_unknown([flag], known)
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{flag} needs a value, as in {flag}=VALUE; see --help")
            text = rest.pop(0)
        typed.setdefault(flag, []).append(text)
    return typed


def _refuse_unknown(flags: Iterable[str], known: Mapping[str, Leaf], fields: Iterable[str] = ()) -> None:
    for flag in flags:
        if flag not in known:
            raise UserError(f"{flag} is unknown{did_you_mean(flag, [*known, '--help', *fields])}; see --help")


def _once(flag: str, texts: Sequence[str]) -> str:
    if len(texts) > 1:
        raise UserError(f"{flag} is given {len(texts)} times ({', '.join(texts)}); give it once")
    return texts[0]


def _options_of(options: type[Options], known: Mapping[str, Leaf], typed: Typed) -> Options:
    tree: dict[str, Any] = {}
    for flag in typed:
        leaf = known[flag]
        if leaf.optional and "" in typed[flag]:
            raise UserError(f"{flag} is empty; leave it out, or give {leaf.allowed}")
        several = leaf.option.repeated or leaf.option.positional
        name = flag.removeprefix("--")
        tree[name] = [leaf.read(text) for text in typed[flag]] if several else leaf.read(_once(flag, typed[flag]))
    return _checked(build(options, tree, prefix="--"), prefix="--")


def _checked(instance: Any, prefix: str = "") -> Any:
    check_files(instance, prefix)
    return instance


def _tree(settings: type, config: str) -> dict[str, Any]:
    """The fields of a config as nested dicts, with old names replaced by the present ones."""
    tree: dict[str, Any] = load_config(*split_variant(config)).to_dict()
    for old, new in getattr(settings, "RENAMED", {}).items():
        group, name = _group(tree, old)
        if name in group:
            into, present = _group(tree, new)
            into[present] = group.pop(name)
    return tree


def _decides_others_first(name: str) -> bool:
    """Sort key: a group's `name` comes first, because it decides which other fields the group has."""
    return not name.endswith(".name")


def _leaf(settings: type, tree: Mapping[str, Any], name: str, options: Iterable[str] = ()) -> Leaf:
    """The field whose present or old name is `name`. Raises `UserError` if there is none."""
    known, renamed = leaves(settings, tree), name
    for old, new in getattr(settings, "RENAMED", {}).items():
        if name == old or name.startswith(f"{old}."):
            renamed = new + name.removeprefix(old)
    if renamed not in known:
        near = did_you_mean(_FIELD + name, [*(_FIELD + n for n in known), *options])
        raise UserError(f"{_FIELD}{name} is unknown{near}; --help lists the fields")
    return known[renamed]


def _set(settings: type, tree: dict[str, Any], leaf: Leaf, value: Any) -> None:
    """Sets a field. If another algorithm is chosen, the group keeps only the fields that this algorithm accepts."""
    group, name = _group(tree, leaf.name)
    group[name] = leaf.check(value)
    if not _decides_others_first(leaf.name):
        prefix, known = leaf.name.removesuffix("name"), leaves(settings, tree)
        for field in list(group):
            if prefix + field not in known or not known[prefix + field].allows(group[field]):
                del group[field]


def _group(tree: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The group of a field, created if it does not exist, and the field's name within the group."""
    *groups, last = name.split(".")
    for part in groups:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"{part} = {inner!r} is not allowed; it must be a group of fields")
        tree = inner
    return tree, last
