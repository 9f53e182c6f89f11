"""Turn jsonargparse's long messages into the one line that a person needs.

The messages nest: `Parser key "model": ... Problem with given class_path 'lit_models.mlp.MLP': ... Parser key
"sizes": Expected a <class 'tuple'>. Got value: a`. What matters is the path of keys, the innermost complaint, and
the names that would have been right.
"""

import ast
import importlib
import pkgutil
import re
from pathlib import Path

from jsonargparse import ArgumentParser

from runner.errors import did_you_mean, one_line


def explain(message: str, parser: ArgumentParser) -> str:
    """Return one line for a message of jsonargparse's, with the nearest valid name where one exists."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    classes = re.findall(r"class_path[ =]'([\w.]+)'", message)
    key = ".".join(keys)

    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        group, name = found.groups()
        return f"unknown key {group}.{name}{did_you_mean(name, _keys_below(parser, group))}"

    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        name = found[1]
        if not keys:
            return f"unknown key {name}{did_you_mean(name, _keys_below(parser))}"
        return f"unknown key {name} of {classes[-1]}{did_you_mean(name, _init_names(classes[-1]))}"

    if found := re.search(r"[Uu]nrecognized arguments: --([\w.]+)", message):
        name = found[1]
        group = name.rpartition(".")[0]
        return f"unknown option --{name}{did_you_mean(name.rpartition('.')[2], _keys_below(parser, group))}"

    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module, name = found.groups()
        return f"{key}: there is no {module}.{name}{did_you_mean(name, _classes_near(module))}"

    missing = re.search(r"No module named '([\w.]+)'|Expected a dot import path string: ([\w.]+)", message)
    if missing and not re.search(r"Expected a <class '(?:int|float|bool)'>", message):
        path = missing[2] or (classes[-1] if classes else missing[1])
        return f"{key}: there is no {path}{did_you_mean(path, _classes_near(path.rpartition('.')[0]))}"

    if found := re.search(r"Import path ([\w.]+) does not correspond to a subclass of (\w+)", message) or re.search(
        r"Expected '([\w.]+)' to be a subclass of <class '(?:[\w.]+\.)?(\w+)'>", message
    ):
        path, kind = found.groups()
        return f"{key}: {path} is no {kind}{did_you_mean(path, _ours_of_kind(kind))}"

    if "expect one of:\n" in message and "Given value: {" in message:  # a class was wanted
        given = _dict_after(message, "Given value: ")
        odd = sorted(set(given) - {"class_path", "init_args", "dict_kwargs"})
        if odd and "class_path" in given:
            return f"unknown key {key}.{odd[0]}{did_you_mean(odd[0], ['class_path', 'init_args'])}"
        return f"{key}: expected class_path: and init_args:, got {one_line(given)}"

    if found := re.search(r"following arguments are required: (.+)", message) or re.search(
        r'Key "([\w.]+)" is required', message
    ):
        return f"{'.'.join([*keys, found[1].strip()])} is missing: set it in the experiment's YAML"

    if expected := re.findall(r"Expected an? (.+?)(?:\. Got value: (.*))?$", message, flags=re.M):
        kinds = dict.fromkeys(_plain(kind) for kind, _ in expected if "NoneType" not in kind and "path" not in kind)
        values = [value for _, value in expected if value] + re.findall(
            r"Given value: (.+?)(?:\. Got value.*)?$", message, re.M
        )
        if not keys or keys[-1] not in ("model", "data"):
            return f"{key}: expected {' or '.join(kinds)}, got {values[0] if values else 'something else'}"

    return one_line(message)


def raised_in_init(message: str) -> str:
    """Return what an `__init__` raised, out of the message that jsonargparse wraps around it."""
    found = re.search(r"Errors:\n\s+- (.+?)\n\s+- Expected", message, flags=re.S)
    return one_line(found[1] if found else message)


def _plain(kind: str) -> str:
    """<class 'int'> -> int; typing.Literal['a', 'b'] -> one of 'a', 'b'."""
    kind = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", kind)
    return re.sub(r"(?:typing\.)?Literal\[(.*)\]", r"one of \1", kind)


def _dict_after(message: str, marker: str) -> dict:
    try:
        return ast.literal_eval(message.split(marker, 1)[1].splitlines()[0])
    except (SyntaxError, ValueError):
        return {}


def _keys_below(parser: ArgumentParser, group: str = "") -> list[str]:
    """Names of the keys directly below `group`."""
    prefix = f"{group}." if group else ""
    keys = [action.dest for action in parser._actions]  # jsonargparse has no public list of a parser's keys
    keys = {k.removeprefix(prefix).partition(".")[0] for k in keys if k.startswith(prefix)}
    return sorted(keys - {"help", "config", "print_config"})


def _init_names(class_path: str) -> list[str]:
    """Names of the arguments a class takes, those that go through its **kwargs included."""
    module, _, name = class_path.rpartition(".")
    probe = ArgumentParser(exit_on_error=False)
    probe.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    return _keys_below(probe)


def _classes_near(module: str) -> list[str]:
    """Class paths that can be meant by a name in `module`: its own classes, or its package's if there is no such module."""
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError):  # no such module, or no name at all
        return []
    if hasattr(found, "__path__") and Path(found.__path__[0]).parent == Path(__file__).parent.parent:
        names = []  # one of our own packages: look into its files
        for info in pkgutil.iter_modules(found.__path__, prefix=f"{module}."):
            names += _classes_near(info.name)
        return names
    own = module.partition(".")[0]
    return [
        f"{module}.{name}"
        for name, value in vars(found).items()
        if isinstance(value, type) and not name.startswith("_") and value.__module__.partition(".")[0] == own
    ]


def _ours_of_kind(kind: str) -> list[str]:
    """Class paths of our models' parts that are a class of this name, or made from one."""
    found = []
    for path in _classes_near("lit_models"):
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        if cls.__module__ == module and any(base.__name__ == kind for base in cls.__mro__):
            found.append(path)
    return found
