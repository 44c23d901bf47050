"""The CPU's support of bfloat16 is known before torch is loaded, and the plan warns if it is missing."""

import platform

import pytest
import torch

from peft_pretraining.config.command_line import parse_args
from peft_pretraining.distributed import device
from peft_pretraining.distributed.device import CUDA_CONTEXT_BYTES, DeviceMemory, allow_tf32, cpu_has_bfloat16, resolve_dtype
from peft_pretraining.distributed.world import World
from peft_pretraining.plan import plan as planning
from peft_pretraining.plan.plan import make_plan
from peft_pretraining.run import assemble

AVX2 = "processor : 0\nflags : fpu sse4_1 avx avx2 fma\n"
AVX512 = "processor : 0\nflags : fpu avx2 avx512f avx512dq avx512bw avx512vl\n"
AVX512_FIRST = "processor : 0\nflags : fpu avx2 avx512f avx512cd avx512er\n"  # AVX-512 without the extensions that oneDNN needs
AMX = "processor : 0\nflags : fpu avx2 amx_bf16 amx_tile\n"
ARM = "processor : 0\nFeatures : fp asimd sve\n"
ARM_BF16 = "processor : 0\nFeatures : fp asimd sve bf16 i8mm\n"


@pytest.mark.parametrize(
    ("cpuinfo", "environ", "answer"),
    [
        (AVX2, {}, False),
        (AVX512, {}, True),
        (AVX512_FIRST, {}, False),
        (AMX, {}, True),
        (ARM, {}, False),
        (ARM_BF16, {}, True),
        ("processor : 0\nisa : rv64imafdc\n", {}, None),
        (None, {}, None),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "sse41"}, False),
        (AVX512, {"DNNL_MAX_CPU_ISA": "AVX2_VNNI"}, False),
        (AVX512, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, True),
        (AVX512, {"ATEN_CPU_CAPABILITY": "avx2"}, True),  # oneDNN's products do not depend on it
    ],
)
def test_bfloat16_instructions_are_recognised_in_cpuinfo(tmp_path, cpuinfo, environ, answer):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    assert cpu_has_bfloat16(path, environ) is answer


@pytest.mark.parametrize(
    ("dtype", "device_type", "available", "warned"),
    [
        ("bfloat16", "cpu", False, True),
        ("bfloat16", "cpu", True, False),
        ("bfloat16", "cpu", None, False),
        ("float32", "cpu", False, False),
        ("bfloat16", "cuda", False, False),
    ],
)
def test_the_plan_warns_of_bfloat16_on_a_cpu_without_it(monkeypatch, tiny_run, dtype, device_type, available, warned):
    monkeypatch.setattr(planning, "cpu_has_bfloat16", lambda: available)
    args = parse_args([*tiny_run, "--batch_size", "1", "--dtype", dtype, "--max_length", "32"])
    plan = make_plan(args, World(), device_type=device_type)
    shown = planning.format_plan(plan, args, "words", DeviceMemory("a device", 2**40, device_type))
    assert ("warning: --dtype bfloat16" in shown) == warned
    assert ("use --dtype float32" in shown) == warned


def test_the_plan_warns_of_bfloat16_arithmetic_under_fsdp_too(monkeypatch, tiny_run):
    monkeypatch.setattr(planning, "cpu_has_bfloat16", lambda: False)
    flags = ["--batch_size", "1", "--dtype", "float32", "--max_length", "32", "--parallel", "fsdp"]
    shown = []
    for more in ([], ["--compute_dtype", "bfloat16"]):
        args = parse_args([*tiny_run, *flags, *more])
        plan = make_plan(args, World(size=2, local_size=2))
        shown.append(planning.format_plan(plan, args, "words", DeviceMemory("a device", 2**40, "cpu")))
    assert ["warning: --compute_dtype bfloat16: this CPU" in text for text in shown] == [False, True]


def test_the_answer_for_this_machine_equals_torchs():
    """If /proc/cpuinfo gives an answer, it equals torch's."""
    answer = device.cpu_has_bfloat16()
    assert answer in (True, False, None)
    if answer is not None and platform.machine() == "x86_64":
        assert answer == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_gpu_that_emulates_bfloat16_gets_float32(monkeypatch):
    """A T4: torch says that bfloat16 is supported unless it is asked to leave emulation out."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_dtype(None, torch.device("cuda")) == "float32"
    assert resolve_dtype("bfloat16", torch.device("cuda")) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_dtype(None, torch.device("cuda")) == "bfloat16"


def test_tf32_is_allowed_in_a_way_that_every_reader_understands():
    """torch.compile reads the older setting, which raises an error if only the newer one was set."""
    before = torch.get_float32_matmul_precision()
    try:
        allow_tf32()
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("free", "available", "named"),
    [
        (79.0 - 0.46, 79.0, ""),  # only this process's context is missing
        (58.0, 58.0 + CUDA_CONTEXT_BYTES / 2**30, ", of whose 79.0 GiB other programs use 20.5,"),
    ],
)
def test_memory_that_other_programs_use_on_a_gpu_is_not_available(monkeypatch, free, available, named):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 79 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    memory = device.device_memory(torch.device("cuda", 0), World())
    assert memory.num_bytes / 2**30 == pytest.approx(available, abs=1e-3)
    assert memory.name == f"NVIDIA H100{named}"


def test_all_processes_plan_with_the_smallest_memory(monkeypatch):
    """Other programs may use some of the GPUs; a process that refused alone would leave the others waiting, without a message."""
    found = [DeviceMemory(name, size, "cuda") for name, size in (("one", 80), ("other", 20), ("third", 20))]
    monkeypatch.setattr(assemble, "gather_objects", lambda own, world: found)
    least = assemble.least_memory(torch.device("cpu"), World(size=3))
    assert (least.num_bytes, least.name) == (20, "other (process 1)")
