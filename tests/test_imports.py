"""Imports between folders point to earlier ones only; checked on the source text."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The folders in order. A module imports modules of its own folder and of earlier ones, never of later ones.
FOLDERS = [
    *("sparse_lora", "config", "distributed", "data", "checkpoint", "methods", "memory", "plan", "model", "optim"),
    *("training", "export", "record", "run", "commands"),
]
# The two programs, which may import every folder.
ENTRIES = ["__main__", "torchrun_main"]
PLACE_OF = {name: number for number, name in enumerate([*FOLDERS, *ENTRIES])}
# Modules that import a slow package at their top, so they themselves must be imported late.
LOADED_LATE = {"adam8bit.py", "adam_ao.py", "kernels_triton.py", "trainer.py"}
FOLDERS_WITHOUT_TORCH = ["config", "methods", "memory", "plan"]


def sources():
    files = [ROOT / "torchrun_main.py", *sorted((ROOT / "sparse_lora").glob("*.py"))]
    return files + sorted((ROOT / "peft_pretraining").rglob("*.py"))


def part(path: Path) -> str:
    """Returns the folder that a file belongs to, or the name of an entry program."""
    inside = path.relative_to(ROOT).parts
    if inside[0] != "peft_pretraining":
        return Path(inside[0]).stem
    return Path(inside[1]).stem


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Returns (module, True if at the top of the file) for every import, including those for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, bool]] = []
    at_the_top = set(loaded_with(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in at_the_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            # `from package import module`
            inside = ROOT / module.replace(".", "/")
            names = [
                a.name for a in node.names if (inside / f"{a.name}.py").exists() or (inside / a.name / "__init__.py").exists()
            ]
            found += [(name, node in at_the_top) for name in (module, *(f"{module}.{name}" for name in names))]
    return found


def loaded_with(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what is executed when a file is imported: not the bodies of functions, nor what is for type checking only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from loaded_with(child)


def target(module: str) -> str | None:
    """Returns the folder that an imported module belongs to, None for modules of other packages."""
    parts = module.split(".")
    if parts[0] == "peft_pretraining":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ("sparse_lora", "torchrun_main") else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_earlier_folders(path):
    folder = part(path)
    if folder == "__init__":
        return
    assert folder in PLACE_OF, f"{path}: {folder} is not one of the folders"
    for module, _ in imports(path):
        other = target(module)
        if other is not None and other != folder:
            assert PLACE_OF[other] < PLACE_OF[folder], f"{path} imports {module}, which comes after it"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_there_is_no_import_cycle():
    names = {module_name(path) for path in sources()}
    edges = {module_name(path): sorted({module for module, _ in imports(path)} & names) for path in sources()}
    done = set()

    def visit(name, trail):
        assert name not in trail, f"import cycle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in edges[name]:
                if not name.startswith(f"{other}."):  # a package's __init__ imports its own modules
                    visit(other, [*trail, name])
            done.add(name)

    for name in sorted(names):
        visit(name, [])


@pytest.mark.parametrize("folder", FOLDERS_WITHOUT_TORCH)
def test_folders_without_torch_import_no_slow_package(folder):
    """No module of these folders imports one of them, directly or indirectly, so that --help and error messages are fast."""
    modules = [module_name(path) for path in sorted((ROOT / "peft_pretraining" / folder).rglob("*.py"))]
    slow = ("torch", "transformers", "numpy")
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit(any(m in sys.modules for m in {slow}))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("package", ["transformers", "datasets", "wandb", "bitsandbytes", "matplotlib", "triton"])
def test_slow_packages_are_not_imported_at_the_top_of_a_file(package):
    for path in sources():
        if path.name in LOADED_LATE:
            continue
        tops = [module for module, at_top in imports(path) if at_top and module.split(".")[0] == package]
        assert not tops, f"{path} imports {package} at its top"


def test_the_data_folder_does_not_import_the_model():
    forbidden = {"model", "methods", "training", "sparse_lora", "optim"}
    for path in (ROOT / "peft_pretraining" / "data").rglob("*.py"):
        assert not forbidden & {target(module) for module, _ in imports(path)}, path


def test_sparse_lora_imports_only_torch():
    """Triton is imported by one module only, which is loaded if Triton is installed."""
    allowed = {"torch", "sparse_lora", *sys.stdlib_module_names}
    for path in (ROOT / "sparse_lora").glob("*.py"):
        own = {"triton"} if path.name in LOADED_LATE else set()
        assert {module.split(".")[0] for module, _ in imports(path)} <= allowed | own, path


@pytest.mark.parametrize("name", sorted(LOADED_LATE))
def test_modules_that_import_a_slow_package_are_imported_late(name):
    users = [
        (path, at_top)
        for path in sources()
        for module, at_top in imports(path)
        if module.endswith(f".{name.removesuffix('.py')}")
    ]
    assert users
    assert not any(at_top for _, at_top in users)


def test_imports_of_whole_folders_and_inside_blocks_are_found(tmp_path, monkeypatch):
    (tmp_path / "peft_pretraining" / "training").mkdir(parents=True)
    (tmp_path / "peft_pretraining" / "training" / "__init__.py").touch()
    path = tmp_path / "peft_pretraining" / "example.py"
    path.write_text(
        "from peft_pretraining import training\n"
        "try:\n    import torch\nexcept ImportError:\n    pass\n"
        "if TYPE_CHECKING:\n    import numpy\n"
        "def late():\n    import wandb\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert set(imports(path)) == {
        *(("peft_pretraining", True), ("peft_pretraining.training", True), ("torch", True)),
        *(("numpy", False), ("wandb", False)),
    }
