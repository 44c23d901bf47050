"""Imports point down only, so that the house can be read from the bottom up; checked on the source itself."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Floors of the house: a module may import modules of its own package's floor or of lower ones, never of a higher.
FLOORS = [
    ["sparse_lora"],
    [
        *("config", "command_line", "refusals", "notices", "model_config"),
        *("memory", "account", "schedule", "distributed", "loss", "forward", "modeling"),
        *("health", "stop", "manifest", "parallel", "fsdp_units", "peak", "savings", "wire", "new_folder"),
        *("allocator", "svd_start"),
    ],
    ["data", "optim", "methods", "tensor_store", "checkpoint", "summary", "metrics"],
    [
        "train",
        "evaluate",
        "plan",
        "footprint",
        "resume",
        "run_folder",
        "same_run",
        "saver",
        "build",
        "late_record",
        "compile_cache",
        "restarts",
    ],
    ["assemble"],
    ["ending"],
    ["analysis", "estimate", "export", "report"],
    ["load", "published"],
    ["evaluation", "finetune", "generate"],
    ["sweep"],
    ["__main__", "torchrun_main"],
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
# Modules about one slow package, which nobody imports at the top of a file.
LOADED_LATE = {"adam8bit.py", "adam_ao.py", "kernels_triton.py"}
WITHOUT_TORCH = [
    *(
        "config",
        "command_line",
        "refusals",
        "notices",
        "model_config",
        "memory",
        "account",
        "schedule",
        "manifest",
        "plan",
    ),
    *("fsdp_units", "peak", "savings", "wire", "allocator", "summary"),
]


def sources():
    files = [ROOT / "torchrun_main.py", *sorted((ROOT / "sparse_lora").glob("*.py"))]
    return files + sorted((ROOT / "peft_pretraining").rglob("*.py"))


def part(path: Path) -> str:
    """The part of the house a file belongs to: its module in peft_pretraining, or its package."""
    inside = path.relative_to(ROOT).parts
    if inside[0] != "peft_pretraining":
        return Path(inside[0]).stem
    return Path(inside[1]).stem


def imports(path: Path):
    """(module, is at the top of the file) for every import of ours or of torch, type-checking ones left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    skipped = {id(child) for node in hints for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in tree.body
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            if module == "peft_pretraining":
                for alias in node.names:
                    yield f"{module}.{alias.name}", node in tree.body
            else:
                yield module, node in tree.body


def target(module: str) -> str | None:
    """The part of the house an imported module belongs to, None for other people's."""
    parts = module.split(".")
    if parts[0] == "peft_pretraining":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ("sparse_lora", "torchrun_main") else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    here = part(path)
    if here == "__init__":
        return
    assert here in FLOOR_OF, f"{here} has no floor: add it to FLOORS"
    for module, _ in imports(path):
        there = target(module)
        if there is not None and there != here:
            assert FLOOR_OF[there] <= FLOOR_OF[here], f"{path} imports {module}, which is above it"


def test_no_cycles():
    edges = {}
    for path in sources():
        edges.setdefault(part(path), set()).update(
            there for module, _ in imports(path) if (there := target(module)) and there != part(path)
        )

    def visit(name, trail):
        assert name not in trail, f"import cycle: {' -> '.join([*trail, name])}"
        for there in edges.get(name, ()):
            visit(there, [*trail, name])

    for name in edges:
        visit(name, [])


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_argument_modules_import_no_torch(name):
    path = ROOT / "peft_pretraining" / f"{name}.py"
    assert not [module for module, _ in imports(path) if module.split(".")[0] == "torch"]


@pytest.mark.parametrize("package", ["transformers", "datasets", "wandb", "bitsandbytes", "matplotlib", "triton"])
def test_slow_packages_are_imported_where_they_are_needed(package):
    for path in sources():
        if path.name in LOADED_LATE:
            continue
        tops = [module for module, at_top in imports(path) if at_top and module.split(".")[0] == package]
        assert not tops, f"{path} imports {package} at its top"


def test_data_never_sees_the_model():
    forbidden = {"modeling", "methods", "train", "loss", "sparse_lora", "optim"}
    for path in (ROOT / "peft_pretraining" / "data").rglob("*.py"):
        assert not forbidden & {target(module) for module, _ in imports(path)}, path


def test_sparse_lora_stands_alone():
    """On torch; Triton is for the one module that is imported where it is there."""
    allowed = {"torch", "sparse_lora", *sys.stdlib_module_names}
    for path in (ROOT / "sparse_lora").glob("*.py"):
        own = {"triton"} if path.name in LOADED_LATE else set()
        assert {module.split(".")[0] for module, _ in imports(path)} <= allowed | own, path


@pytest.mark.parametrize("name", sorted(LOADED_LATE))
def test_modules_about_a_slow_package_are_imported_late(name):
    users = [
        (path, at_top)
        for path in sources()
        for module, at_top in imports(path)
        if module.endswith(f".{name.removesuffix('.py')}")
    ]
    assert users
    assert not any(at_top for _, at_top in users)
