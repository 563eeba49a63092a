"""The shape of the package, read with `ast`: floors, sibling imports, file sizes, names."""

import ast
import re
import statistics
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING, AutoConfig

import hf_compress
from hf_compress.core.architectures import ARCHITECTURES


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_compress"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))

# Lower floors never import higher ones. The longest prefix of a module's name decides.
FLOORS = {
    "hf_compress.core": 0,
    "hf_compress.core.surgery": 1,
    "hf_compress.core.folded_norms": 1,
    "hf_compress.methods": 2,
    "hf_compress.students": 4,
    "hf_compress.api": 3,
    "hf_compress.loading": 3,
    "hf_compress.card_sections": 2,
    "hf_compress.folder_card": 3,
    "hf_compress.hub_results": 2,
    "hf_compress.training": 4,
    "hf_compress.tasks": 4,
    "hf_compress.vocabulary": 4,
    "hf_compress.layer_by_layer": 4,
    "hf_compress.report": 5,
    "hf_compress.export": 5,
    "hf_compress.hub": 5,
    "hf_compress.stages": 6,
    "hf_compress.recipes": 7,
    "hf_compress.cli": 8,
    "hf_compress.__main__": 9,
}
# It names the loader, which is imported with transformers' registry.
EXEMPT = {"hf_compress"}
OPTIONAL = {"matplotlib", "optuna", "peft", "wandb", "onnx", "onnxruntime", "openvino"}
VAGUE = {"utils", "helpers", "common", "base", "misc", "tools"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module):
    known = [prefix for prefix in FLOORS if module == prefix or module.startswith(prefix + ".")]
    return FLOORS[max(known, key=len)] if known else None


def imports_of(tree):
    """(module, names, inside a function) of every import."""
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield node.module, [alias.name for alias in node.names], node in inside


def targets(module, names):
    """The modules that an import reaches: `from package import name` may name a module of the package."""
    whole = [f"{module}.{name}" for name in names]
    return [name for name in whole if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()] or [module]


PARSED = {module_name(path): ast.parse(path.read_text()) for path in FILES}


def test_rules_catch_what_they_forbid():
    tree = ast.parse("import a\ndef f():\n    from hf_compress.core import cost\n")
    assert list(imports_of(tree)) == [("a", [], False), ("hf_compress.core", ["cost"], True)]
    assert targets("hf_compress.core", ["cost"]) == ["hf_compress.core.cost"]
    assert floor_of("hf_compress.core.surgery") == 1 > floor_of("hf_compress.core.cost") == 0
    assert floor_of("hf_compress.corex") is None


@pytest.mark.parametrize("module", sorted(set(PARSED) - EXEMPT))
def test_imports_point_down(module):
    floor = floor_of(module)
    assert floor is not None, f"{module} stands on no floor"
    for imported, names, _ in imports_of(PARSED[module]):
        if imported.partition(".")[0] != "hf_compress":
            continue
        for target in targets(imported, names):
            if target == "hf_compress":
                # The lazy package: for the loader, which may run while transformers is half imported, and above.
                assert floor >= 3, f"{module} imports the whole package"
                continue
            above = floor_of(target)
            assert above is not None
            same_package = module.split(".")[:2] == target.split(".")[:2]
            assert above < floor or same_package, f"{module} (floor {floor}) imports {target} (floor {above})"
            assert above <= floor, f"{module} (floor {floor}) imports {target} (floor {above})"


def test_methods_do_not_know_each_other():
    for module, tree in PARSED.items():
        if not module.startswith("hf_compress.methods."):
            continue
        own = ".".join(module.split(".")[:3])
        for imported, names, _ in imports_of(tree):
            for target in targets(imported, names):
                if target.startswith("hf_compress.methods"):
                    assert target == own or target.startswith(own + "."), f"{module} imports {target}"


def test_core_names_no_method():
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in hf_compress.METHODS, f"{path.name} names the method {node.value}"


def test_imports_stand_at_the_top():
    for module, tree in PARSED.items():
        local = [name for name, _, inside in imports_of(tree) if inside and name.partition(".")[0] not in OPTIONAL]
        assert not local, f"{module} imports {local} inside a function"


def test_only_loading_touches_the_quantizer_registry():
    for module, tree in PARSED.items():
        for imported, _, _ in imports_of(tree):
            if imported.startswith("transformers.quantizers"):
                assert module == "hf_compress.loading"


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > 300}
    assert statistics.median(length for length in lengths.values() if length) <= 160


def classes():
    """(module, class) of every class in the package."""
    for module, tree in PARSED.items():
        yield from ((module, node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef))


def test_classes_are_short():
    lengths = {f"{module}.{node.name}": node.end_lineno - node.lineno + 1 for module, node in classes()}
    assert not {name: length for name, length in lengths.items() if length > 200}
    trainers = {name.rpartition(".")[2]: length for name, length in lengths.items()}
    assert max(trainers["CompressionTrainer"], trainers["DistillationTrainer"]) < 150


def test_private_methods_of_trainer_are_left_alone():
    """`Trainer` may rename them in any release: at most four are overridden, and each says why no public hook does."""
    overridden = {}
    for module, node in classes():
        for method in node.body:
            private = isinstance(method, ast.FunctionDef) and re.fullmatch(r"_[a-z]\w*", method.name)
            if private and module.startswith("hf_compress.training") and hasattr(transformers.Trainer, method.name):
                lines = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text().splitlines()
                body = lines[method.lineno : method.body[0].end_lineno]
                overridden.setdefault(method.name, []).append(any(line.strip().startswith("#") for line in body))
    assert len(overridden) <= 4, sorted(overridden)
    assert all(any(commented) for commented in overridden.values()), overridden


def test_files_say_what_they_are():
    for path in FILES:
        text = path.read_text()
        assert text.isascii(), path
        assert path.stem not in VAGUE, path
        assert not text or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_only_the_command_line_prints():
    for module, tree in PARSED.items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
        if not module.startswith("hf_compress.cli"):
            assert not any(call.func.id == "print" for call in calls), module


def test_a_page_names_everything_public():
    text = (ROOT / "docs" / "public_names.md").read_text()
    assert [name for name in hf_compress.__all__ if name not in text] == []


def test_flat_names_are_claimed_once():
    claimed = {}
    for method in hf_compress.METHODS.values():
        for name in method.config_class.flat:
            assert name not in claimed, f"{method.name} and {claimed[name]} both claim {name}"
            claimed[name] = method.name
    for kind in CONFIG_MAPPING.keys() & ARCHITECTURES.keys():
        config = AutoConfig.for_model(kind)
        assert [name for name in claimed if hasattr(config, name)] == []


def test_method_folders():
    folders = sorted(path.parent.name for path in (PACKAGE / "methods").glob("*/__init__.py"))
    assert folders == sorted(hf_compress.METHODS)
    for name, method in hf_compress.METHODS.items():
        assert method.name == name
        assert (PACKAGE / "methods" / name / "README.md").is_file()
        assert method.paper.title in method.paper.bibtex
        assert method.paper.identifier in method.paper.bibtex
