"""Imports point down only, so that the house can be read from the bottom up; checked on the source itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The rooms, bottom floor first: a module imports modules of its own room and of rooms before it, never of later ones.
ROOMS = [
    *("sparse_lora", "config", "distributed", "data", "checkpoint", "methods", "memory", "plan", "model", "optim"),
    *("training", "export", "record", "run", "commands"),
]
ENTRIES = ["__main__", "torchrun_main"]  # the two programs; may import anything
FLOOR_OF = {name: number for number, name in enumerate([*ROOMS, *ENTRIES])}
# Modules about one slow package, which nobody imports at the top of a file.
LOADED_LATE = {"adam8bit.py", "adam_ao.py", "kernels_triton.py", "trainer.py"}
ROOMS_WITHOUT_TORCH = ["config", "methods", "memory", "plan"]


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
    """(module, is at the top of the file) for every import, those for type checking included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in tree.body
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            yield module, node in tree.body
            # `from package import module`
            for alias in node.names:
                if (ROOT / module.replace(".", "/") / f"{alias.name}.py").exists():
                    yield f"{module}.{alias.name}", node in tree.body


def target(module: str) -> str | None:
    """The part of the house an imported module belongs to, None for other people's."""
    parts = module.split(".")
    if parts[0] == "peft_pretraining":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ("sparse_lora", "torchrun_main") else None


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    room = part(path)
    if room == "__init__":
        return
    assert room in FLOOR_OF, f"{path}: {room} is not one of the rooms"
    for module, _ in imports(path):
        other = target(module)
        if other is not None and other != room:
            assert FLOOR_OF[other] < FLOOR_OF[room], f"{path} imports {module}, which is above it"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_through_others():
    names = {module_name(path) for path in sources()}
    edges = {module_name(path): sorted({module for module, _ in imports(path)} & names) for path in sources()}
    done = set()

    def visit(name, trail):
        assert name not in trail, f"import cycle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in edges[name]:
                if not name.startswith(f"{other}."):  # a package's __init__ gathers what its modules define
                    visit(other, [*trail, name])
            done.add(name)

    for name in sorted(names):
        visit(name, [])


@pytest.mark.parametrize("room", ROOMS_WITHOUT_TORCH)
def test_rooms_that_answer_before_torch_is_loaded(room):
    """--help and refused arguments answer at once: no module of these rooms imports torch, itself or through another."""
    modules = [module_name(path) for path in sorted((ROOT / "peft_pretraining" / room).rglob("*.py"))]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("package", ["transformers", "datasets", "wandb", "bitsandbytes", "matplotlib", "triton"])
def test_slow_packages_are_imported_where_they_are_needed(package):
    for path in sources():
        if path.name in LOADED_LATE:
            continue
        tops = [module for module, at_top in imports(path) if at_top and module.split(".")[0] == package]
        assert not tops, f"{path} imports {package} at its top"


def test_data_never_sees_the_model():
    forbidden = {"model", "methods", "training", "sparse_lora", "optim"}
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
