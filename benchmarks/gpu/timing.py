"""Measures times, launched kernels, waits and memory of a device: CUDA's way beside the equivalent on a CPU.

The lines that only a GPU can execute are in this file, but for those that ask whether there is one and what it is called, so that
a test on a CPU executes everything else.
"""

from __future__ import annotations

import gc
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pretraining.record.recorder import peak_memory_bytes

Step = Callable[[], object]

# The calls of CUDA's runtime in which the host waits for the device.
_WAITING_CALLS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
# The same on a CPU: operators that return a value, or a shape that depends on values, to the host.
_WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Operators that start no kernel, although they are not declared as views.
_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")


class Kernels(NamedTuple):
    """The kernels of a call; on a CPU its operators that are not views.

    busy_seconds: sum of the kernels' times. waits: number of times the host waited for the device. top: the kernels that took
    the most time, as (name, how often, seconds).
    """

    count: int
    busy_seconds: float
    waits: int
    top: list[tuple[str, int, float]]


def wait(device: torch.device) -> None:
    """Waits until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def pipelined_seconds(step: Step, device: torch.device, repeats: int = 1) -> float:
    """Returns the seconds per call of `repeats` calls in a row; the host waits for the device before and after them only."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    return (time.perf_counter() - start) / repeats


def repeats_for(step: Step, device: torch.device, seconds: float, most: int = 200) -> int:
    """Returns how many calls take about `seconds`, 1 .. most, after a warm-up call."""
    step()
    return max(1, min(most, int(seconds / max(pipelined_seconds(step, device), 1e-9))))


def replayed_seconds(step: Step, device: torch.device, repeats: int = 1) -> float:
    """Returns the seconds per replay of the call as a CUDA graph, which takes no time of the host; on a CPU those of a call."""
    if device.type != "cuda":
        return pipelined_seconds(step, device, repeats)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # Libraries allocate their workspaces in the first calls, which a graph must not record.
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return pipelined_seconds(graph.replay, device, repeats)


def device_seconds(step: Step, device: torch.device) -> float:
    """Returns the seconds that one call keeps the device busy, with nothing of its operands in the cache."""
    if device.type != "cuda":
        return pipelined_seconds(step, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _fill_cache(device)
    # Keeps the device busy while the host starts the call, so that the time between the events is the device's only.
    torch.cuda._sleep(2_000_000)
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _fill_cache(device: torch.device) -> None:
    size = 4 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    torch.empty(size, dtype=torch.uint8, device=device).zero_()


def cache_bytes(device: torch.device) -> int:
    """Returns the bytes over which operands must be spread, so that a call does not find its own in the cache."""
    if device.type != "cuda":
        return 0
    return 4 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20))


class Stopwatch:
    """Adds up the device's seconds between `start` and `stop` without waiting for it."""

    def __init__(self, device: torch.device):
        """device: the device whose time is measured; on a CPU the time of the host."""
        self._device, self._spans = device, []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begins a span."""
        self._spans.append([self._now()])

    def stop(self) -> None:
        """Ends the span."""
        self._spans[-1].append(self._now())

    def take(self) -> float:
        """Waits for the device; returns the sum of the spans since the last call, in seconds."""
        wait(self._device)
        spans, self._spans = self._spans, []
        if self._device.type != "cuda":
            return float(sum(end - start for start, end in spans))
        return float(sum(start.elapsed_time(end) for start, end in spans)) / 1e3


def kernels_of(step: Step, device: torch.device, most: int = 25) -> Kernels:
    """Returns the kernels that a call launches, with their times; `most` is the number of names in `top`."""
    if device.type != "cuda":
        recorder = _Operators()
        with recorder:
            step()
        return _summary(recorder.spans, recorder.waits, most)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    wait(device)
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("measured"):
            step()
        wait(device)
    events = list(profile.events())
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and _is_kernel(e)]
    spans = [(event.name, event.time_range.elapsed_us() / 1e6) for event in on_device]
    whole = next(e.time_range for e in events if e.name == "measured" and e.device_type == torch.autograd.DeviceType.CPU)
    waits = sum(e.name in _WAITING_CALLS and whole.start <= e.time_range.start <= whole.end for e in events)
    return _summary(spans, waits, most)


def _is_kernel(event: Any) -> bool:
    """Tells whether an event on the device is a kernel, copy or fill, and not the range of an annotation on the host."""
    return not getattr(event, "is_user_annotation", False) and event.name != "measured"


def _summary(spans: list[tuple[str, float]], waits: int, most: int) -> Kernels:
    counts, seconds = Counter(name for name, _ in spans), defaultdict(float)
    for name, taken in spans:
        seconds[name] += taken
    longest = sorted(seconds, key=lambda name: -seconds[name])[:most]
    return Kernels(len(spans), sum(seconds.values()), waits, [(name[:160], counts[name], seconds[name]) for name in longest])


class _Operators(TorchDispatchMode):
    """Records the operators that a GPU would launch kernels for, and those at which the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, float]] = []
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and func.overloadpacket.__name__ not in _NO_KERNEL:
            self.spans.append((str(func), time.perf_counter() - start))
        self.waits += bool(_WAITING_TAGS & set(func.tags)) and not _indexes_by_position(func, args)
        return result


def _indexes_by_position(func: Any, args: Any) -> bool:
    """Returns True for x[positions], whose shape is known; the shape of x[mask] depends on the values of the mask."""
    indices = [index for index in args[1] if index is not None] if func is torch.ops.aten.index.Tensor else []
    return bool(indices) and all(index.dtype == torch.int64 for index in indices)


@contextmanager
def waits_are_errors(device: torch.device) -> Iterator[None]:
    """Makes torch raise an error at each operator that waits for a GPU; without effect on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def free(device: torch.device) -> None:
    """Returns unused memory to the device and starts a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_of(device: torch.device) -> dict[str, int]:
    """Returns bytes: the peak since `free` (allocated; reserved by the allocator), and what is in use on the card now.

    `card` counts everything on the card, with the context and the libraries' workspaces. On a CPU: the process's peak.
    """
    if device.type != "cuda":
        return {"allocated": peak_memory_bytes(device)}
    free_bytes, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return {"allocated": peak_memory_bytes(device), "reserved": reserved, "card": total - free_bytes, **smi_memory()}


def smi_memory() -> dict[str, int]:
    """Returns the bytes in use on the first GPU as nvidia-smi says it, as {"nvidia_smi": bytes}; {} without nvidia-smi."""
    used = nvidia_smi("memory.used")
    return {"nvidia_smi": int(float(used)) * 2**20} if used and used.replace(".", "").isdigit() else {}


def nvidia_smi(query: str) -> str | None:
    """Returns nvidia-smi's answer to --query-gpu for the first GPU, without units; None if there is none."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.strip().splitlines()), None)


def card(device: torch.device) -> dict[str, Any]:
    """Returns the device's properties; for a CPU {}."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    names = ("name", "total_memory", "multi_processor_count", "L2_cache_size", "major", "minor")
    values = {name: getattr(properties, name, None) for name in names}
    return values | {"cuda": torch.version.cuda, "driver": nvidia_smi("driver_version"), "clocks": nvidia_smi("clocks.max.sm")}


def context_bytes(device: torch.device) -> dict[str, int]:
    """Creates the context and returns the bytes that the card then has in use, and those that a first product adds."""
    if device.type != "cuda":
        return {}
    before = smi_memory().get("nvidia_smi", 0)
    matrix = torch.ones(1024, 1024, dtype=torch.bfloat16, device=device)
    wait(device)
    reserved = torch.cuda.memory_reserved(device)
    free_bytes, total = torch.cuda.mem_get_info(device)
    _ = matrix @ matrix
    wait(device)
    free_later, _ = torch.cuda.mem_get_info(device)
    context = total - free_bytes - reserved - before
    return {"before": before, "context": context, "first_product": free_bytes - free_later}


# Messages of errors after which every further call fails; a lack of memory or a graph that cannot be recorded is none.
_LASTING = (
    "illegal memory",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "launch failure",
    "uncorrectable",
)


def is_lost(error: BaseException) -> bool:
    """Tells whether an error leaves the process unable to use the device."""
    return any(words in str(error) for words in _LASTING)
