"""When is a run the same run? When its settings are, and every definition of ours that these lead to.

Comments, docstrings and layout do not count, nor does code that the experiment has nothing to do with.
"""

import ast
import functools
import hashlib
import json
import re
from pathlib import Path

import yaml

OURS = ("lit_models.", "datamodules.", "callbacks.seeding", "callbacks.checkpoint", "callbacks.averaged_weights")
# methods that neither training nor testing calls
PREDICTION = ("read_input", "read_line", "predict_step", "load_from_checkpoint")
ALWAYS = (
    "callbacks.seeding.EpochSeeding",
    "callbacks.checkpoint.BestCheckpoint",
    "callbacks.checkpoint.LastCheckpoint",
)


def fingerprint(experiment: Path, root: Path) -> str:
    """Return a hash of an experiment's settings and of the code that they name, with all that this code uses of ours.

    Args:
        experiment: its YAML.
        root: the folder that `lit_models` and the others are in.
    """
    text = json.dumps(yaml.safe_load(experiment.read_text()), sort_keys=True)
    named = re.findall(r'"((?:lit_models|datamodules)\.[\w.]+)"', text)
    digest = hashlib.sha256(text.encode())
    for _, node in sorted(_used([*named, *ALWAYS], root).items()):
        digest.update(ast.dump(node).encode())
    return digest.hexdigest()[:16]


def _used(named: list[str], root: Path) -> dict[str, ast.AST]:
    """Return the definitions behind `named`, such as "lit_models.mlp.MLP", and behind every name that they use."""
    found, waiting = {}, list(named)
    while waiting:
        path = waiting.pop()
        inside, _, name = path.rpartition(".")
        definitions, imports = module(inside, root)
        if path in found or name not in definitions:
            continue
        found[path] = definitions[name]
        used = {node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)}
        for other in [imports.get(other, f"{inside}.{other}") for other in used]:
            whole, _ = module(other, root)  # `from lit_models import mlp` gives a whole module
            waiting += [f"{other}.{name}" for name in whole] or [other]
        waiting.append(f"{inside}.")
    return found


@functools.cache
def module(name: str, root: Path) -> tuple[dict[str, ast.AST], dict[str, str]]:
    """Return a module's top-level definitions, without docstrings, and where the names that it imports come from."""
    definitions, imports = {}, {}
    file = root / f"{name.replace('.', '/')}.py"
    if not name.startswith(OURS) or not file.is_file():
        return definitions, imports
    tree, rest = _what_counts(ast.parse(file.read_text())), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            imports |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign) and all(isinstance(target, ast.Name) for target in targets):
            definitions |= {target.id: node for target in targets}
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            rest.append(node)
    definitions[""] = ast.Module(rest, [])  # what else a module does when it is imported
    return definitions, imports


def _what_counts(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", None) not in PREDICTION]
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:]
    return tree
