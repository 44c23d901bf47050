"""Section gate: are the numbers right? Relative errors against float64, the decoded positions' bits, and the tests marked `gpu`.

The command stops where an error exceeds LARGEST_ERROR.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from layer import SUPPORTS, Shape, shapes_of
from torch import Tensor

from gpu.record import Options, Record, WrongNumbers
from sparse_lora import SparseLowRankLinear, dense_reference, kernels
from sparse_lora.functional import PATHS

ROOT = Path(__file__).resolve().parents[2]
# L2 norm of the error relative to the result. A chain of three roundings to bfloat16, each of 2^-9 at most, is below .006.
LARGEST_ERROR = 1e-2
_ROWS = 512


def run(record: Record, options: Options) -> None:
    """Measures the section's steps. Raises WrongNumbers."""
    device = torch.device(options.device)
    if options.tiny:
        shapes = {"tiny": [Shape(48, 32, 1, 4, 0.1, 24)]}
    else:
        shapes = {config: shapes_of(config, _ROWS) for config in ("350m", "1b", "7b")}
    for config, of_config in shapes.items():
        for shape in of_config:
            record.step(_name(config, shape, "positions"), lambda s=shape: decoded(s, device))
            for support, path, triton in itertools.product(SUPPORTS, PATHS, (False, True)):
                # The kernels are for uniform supports.
                if triton and support != "uniform":
                    continue
                name = _name(config, shape, support, path, "Triton" if triton else "PyTorch")
                record.step(name, lambda s=shape, k=support, p=path, t=triton: errors(s, k, p, t, device))
    record.step("pytest -m gpu", lambda: tests(record.seconds_left - 5, options.tiny))


def _name(config: str, shape: Shape, *words: str) -> str:
    return " ".join([config, f"{shape.out_features} x {shape.in_features}", *words])


def linear(shape: Shape, support: str, path: str, device: torch.device) -> SparseLowRankLinear:
    """Returns a layer in bfloat16 whose B is not zero."""
    layer = SparseLowRankLinear(
        *(shape.in_features, shape.out_features, shape.rank, 0.0 if support == "none" else shape.sparsity),
        support="uniform" if support == "none" else support,
        path=path,
        seed=1,
        dtype=torch.bfloat16,
        device=device,
    )
    torch.nn.init.normal_(layer.lora_B, std=shape.in_features**-0.5)
    return layer


def errors(shape: Shape, support: str, path: str, triton: bool, device: torch.device) -> dict[str, Any]:
    """Returns the errors of y and all gradients relative to float64. Raises WrongNumbers if one is above LARGEST_ERROR."""
    with kernels_allowed(triton):
        if triton and not kernels.is_available(device, torch.bfloat16):
            return {"skipped": "the Triton kernels are not available"}
        layer = linear(shape, support, path, device)
        generator = torch.Generator().manual_seed(0)
        x, grad = (
            torch.randn(shape.tokens, width, generator=generator).to(device, torch.bfloat16)
            for width in (shape.in_features, shape.out_features)
        )
        names = ["y", "x", *(name for name, _ in layer.named_parameters())]
        computed = _results(layer, layer(x.requires_grad_()), x, grad)
    exact = _exact_results(layer, x, grad)
    row = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in zip(names, computed, exact, strict=True)}
    # NaN is not above a number.
    if not all(error <= LARGEST_ERROR for error in row.values()):
        raise WrongNumbers(f"errors relative to float64 above {LARGEST_ERROR}: {row}")
    return {"errors": row}


def _results(layer: SparseLowRankLinear, y: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], grad)]


def _exact_results(layer: SparseLowRankLinear, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Returns y and the gradients by plain autograd in float64."""
    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    scaling = layer.effective_scaling()
    y = dense_reference(x64, wide["lora_A"], wide["lora_B"], wide.get("sparse_value"), layer.support, scaling)
    return [y.detach(), *torch.autograd.grad(y, [x64, *wide.values()], grad.double())]


@contextmanager
def kernels_allowed(allowed: bool) -> Iterator[None]:
    """Switches the Triton kernels on (where available) or off."""
    before = kernels.choose("triton" if allowed else "torch")
    try:
        yield
    finally:
        kernels.choose(before)


def decoded(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Compares positions decoded on the device with those on the CPU. Raises WrongNumbers if one differs."""
    with kernels_allowed(False):
        layer = linear(shape, "uniform", "auto", torch.device("cpu"))
        support = layer.support
        assert support is not None
        expected = support.flat_indices()
        on_device = support.to(device).flat_indices().cpu()
    if not torch.equal(expected, on_device):
        raise WrongNumbers(f"{int((expected != on_device).sum())} of {expected.numel()} positions differ from the CPU's")
    return {"positions": expected.numel(), "equal": True}


def files_with_gpu_tests() -> list[Path]:
    """Returns the files that may have tests marked `gpu`: by a mark of their own, or by the fixture `device`."""
    uses = re.compile(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if uses.search(path.read_text(encoding="utf-8"))]
    # The Triton kernels, which are off by default and compile for minutes, come last.
    return sorted(files, key=lambda path: "kernels" in path.name)


def tests(seconds: float, tiny: bool) -> dict[str, Any]:
    """Runs the tests marked `gpu` and returns their counts and failures."""
    files = [path for path in files_with_gpu_tests() if not tiny or path.name == "test_linear.py"]
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={junit}"]
        try:
            ended = subprocess.run(
                [*command, f"--basetemp={folder}/tests", *map(str, files)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=max(1.0, seconds),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            return {"error": f"not finished after {seconds:.0f} s", "output": text[-4000:]} | outcomes_so_far(text)
        row: dict[str, Any] = {"exit_code": ended.returncode}
        if "No module named pytest" in ended.stderr:
            return {"skipped": "pytest is not installed"}
        if not junit.exists():
            return row | {"error": "pytest wrote no results", "output": (ended.stdout + ended.stderr)[-4000:]}
        return row | outcomes(junit)


def outcomes_so_far(output: str) -> dict[str, Any]:
    """Returns what `outcomes` does, without messages, from what pytest -vv had printed before it was ended."""
    ended = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    counts = Counter({"PASSED": "passed", "SKIPPED": "skipped"}.get(outcome, "failed") for _, outcome in ended)
    failures = [{"test": name, "message": "", "text": ""} for name, outcome in ended if outcome in ("FAILED", "ERROR")]
    return {**{f"num_{key}": counts[key] for key in ("passed", "failed", "skipped")}, "failures": failures, "skipped_because": {}}


def outcomes(junit: Path) -> dict[str, Any]:
    """Returns the numbers of passed, failed and skipped tests, failures with their messages, and reasons for skipping."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    for test in ElementTree.parse(junit).iter("testcase"):
        problem = next((child for child in test if child.tag in ("failure", "error")), None)
        skipped = test.find("skipped")
        counts["failed" if problem is not None else "passed" if skipped is None else "skipped"] += 1
        if problem is not None:
            name = f"{test.get('classname')}.{test.get('name')}"
            failures.append(
                {"test": name, "message": (problem.get("message") or "")[:1000], "text": (problem.text or "")[-3000:]}
            )
        elif skipped is not None:
            reasons[skipped.get("message") or ""] += 1
    return {
        **{f"num_{key}": counts[key] for key in ("passed", "failed", "skipped")},
        "failures": failures,
        "skipped_because": reasons,
    }
