"""What is advised where memory does not suffice: lines that parse and fit, keep method and batch, and name each flag once."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

import torchrun_main
from peft_pretraining.config.arguments import Arguments
from peft_pretraining.config.command_line import parse_args
from peft_pretraining.config.optimizers import OPTIMIZERS
from peft_pretraining.distributed.device import DeviceMemory
from peft_pretraining.distributed.world import World
from peft_pretraining.plan.advice import Advisor, memory_problems, out_of_memory_problem
from peft_pretraining.plan.checks import notices
from peft_pretraining.plan.plan import GIB, Plan, format_plan, make_plan

ROOT = Path(__file__).resolve().parents[2]
ALONE = World()
FITS = re.compile(r"it would fit with (--.*)$")

# GaLore's README: 7B on one GPU of 24 GB.
GALORE_7B = (
    "--model_config configs/llama_7b.json --lr 0.005 --galore_scale 0.25 --rank 1024 --update_proj_gap 500 --batch_size 16 "
    "--total_batch_size 512 --activation_checkpointing --num_training_steps 150000 --warmup_steps 15000 --weight_decay 0 "
    "--grad_clipping 1.0 --dtype bfloat16 --eval_every 1000 --single_gpu --proj_type std --max_length 1024 "
    "--optimizer galore_adamw8bit_per_layer"
)


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def planned(line: str, world: World = ALONE, device_type: str = "cuda") -> tuple[Arguments, Plan]:
    args = parse_args(line.split())
    return args, make_plan(args, world, "bfloat16" if device_type == "cuda" else "float32", device_type)


def advice(line: str, limit: float, world: World = ALONE, device_type: str = "cuda") -> list[str]:
    args, plan = planned(line, world, device_type)
    return memory_problems(plan, args, DeviceMemory("the device", int(limit), device_type))


def assert_lines_fit(line: str, limit: float, world: World, device_type: str) -> list[tuple[str, str]]:
    """Types what is advised after the line itself; returns (sentence, flags) of each way out."""
    args, plan = planned(line, world, device_type)
    problems = advice(line, limit, world, device_type)
    ways = [(problem, match[1]) for problem in problems if (match := FITS.search(problem))]
    for sentence, flags in ways:
        names = [word for word in flags.split() if word.startswith("--")]
        assert max(Counter(names).values()) == 1, flags
        changed, fitting = planned(f"{line} {flags}", world, device_type)
        assert fitting.bytes["peak"] <= limit, flags
        same_method = "another method" not in sentence
        assert (changed.peft_model == args.peft_model) == same_method
        assert (fitting.total_batch_size == plan.total_batch_size) == ("one micro-batch per update" not in sentence), flags
        assert changed.per_layer or not args.per_layer
    single = problems[-1] if "with one change" in problems[-1] else ""
    for peak, flags in re.findall(r"([\d.]+) with (--[^,]+)", single):
        found = planned(f"{line} {flags}", world, device_type)[1].bytes["peak"]
        assert found < plan.bytes["peak"]
        assert round(found / GIB, 1) == float(peak)
    return ways


def smallest_peak(line: str, world: World, device_type: str) -> int:
    """The lowest peak of the method and the batch, by typing everything that may save memory."""
    args, plan = planned(line, world, device_type)
    optimizers = {
        "adam": ["adamw4bit", "adam8bit", "adam"],
        "adamw": ["adamw4bit", "adam8bit", "adamw"],
        "adam8bit": ["adamw4bit", "adam8bit"],
        "muon": ["muon4bit", "muon8bit", "muon"],
        "muon8bit": ["muon4bit", "muon8bit"],
        "spectron": ["spectron4bit", "spectron8bit", "spectron"],
        "spectron8bit": ["spectron4bit", "spectron8bit"],
    }
    peaks = []
    for optimizer in optimizers.get(args.optimizer, [args.optimizer]):
        for more in (
            "",
            " --parallel fsdp",
            " --accumulate moments",
            " --weight_dtype int8",
            " --accumulate moments --weight_dtype int8",
        ):
            typed = (
                f"{line} --optimizer {optimizer} --peft_model {args.peft_model} --grad_clipping 0 --per_layer {more} "
                "--dtype bfloat16 --embedding_states 8bit --activation_checkpointing layer --async_save false --batch_size 1"
            )
            typed += f" --gradient_accumulation {plan.total_batch_size // world.size} --total_batch_size {plan.total_batch_size}"
            try:
                peaks.append(planned(typed, world, device_type)[1].bytes["peak"])
            except ValueError:  # refused together: another of the lines is the lowest
                continue
    return min(peaks)


def random_line(seed: int) -> tuple[str, float, World, str]:
    choose = random.Random(seed).choice
    size = choose(["60m", "350m", "1b", "7b"])
    words = [f"--model_config configs/llama_{size}.json --rank {choose([64, 256])}"]
    optimizer, suffix = choose([*OPTIMIZERS, "adam", "adamw", "adam8bit"]), choose(["", "", "_per_layer"])
    method = choose(["full", "lowrank", "sltrain", "relora", "galore", "by name"])
    kind = OPTIMIZERS[optimizer]
    if (method == "galore" and (kind.matrix_bytes or kind.reset_every)) or (method == "full" and kind.steps_pairs):
        optimizer = "adamw"
    if method == "by name":
        words.append(
            f"--optimizer {choose(['galore_adamw', 'galore_adafactor', 'galore_adamw8bit', 'GaLore_AdamW8bit_per_layer'])}"
        )
    else:
        words.append(f"--peft_model {method} --optimizer {optimizer}{suffix}")
    if method == "relora":
        words.append(
            choose(
                [
                    "--relora 1000",
                    "--relora 1000 --optimizer_magnitude_pruning 0.9" if OPTIMIZERS[optimizer].prunable else "--relora 9",
                ]
            )
        )
    words.append(choose(["", "--grad_clipping 1.0", "--grad_clipping 0"]))
    words.append(choose(["", "", "--per_layer --grad_clipping 0"]))
    batch, micro_batches, processes = choose([1, 6, 8, 32]), choose([1, 4]), choose([1, 1, 4])
    words.append(f"--batch_size {batch}")
    total = f"--total_batch_size {batch * micro_batches * processes}"
    words.append(
        choose([total, f"--gradient_accumulation {micro_batches}", f"{total} --gradient_accumulation {micro_batches}", ""])
    )
    words.append(choose(["", "--dtype float32", "--dtype bfloat16"]))
    words.append(choose(["", "--activation_checkpointing", "--activation_checkpointing selective", "--async_save"]))
    words.append(choose(["", "--embedding_states 8bit", "--reshard_after_forward false"]))
    return " ".join(words), choose([0.2, 0.5, 0.8, 0.95]), World(size=processes, local_size=processes), choose(["cpu", "cuda"])


@pytest.mark.parametrize("seed", [*range(16), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(16, 40))])
def test_advised_lines_parse_and_fit_and_change_no_more_than_they_must(seed):
    line, share, world, device_type = random_line(seed)
    peak = planned(line, world, device_type)[1].bytes["peak"]
    limit = share * peak
    ways = assert_lines_fit(line, limit, world, device_type)
    lowest = smallest_peak(line, world, device_type)
    if lowest <= limit:
        ((sentence, flags),) = ways
        assert "another" not in sentence
        # No flag of the line is there for nothing.
        parts = re.findall(r"--\w+(?: [^-]\S*)?", flags)
        needs_both = {"--grad_clipping", "--total_batch_size", "--gradient_accumulation", "--peft_model"}
        for part in parts:
            rest = " ".join(other for other in parts if other != part)
            if part.split()[0] in needs_both | {"--batch_size", "--per_layer"}:
                continue
            assert planned(f"{line} {rest}", world, device_type)[1].bytes["peak"] > limit, (part, flags)


def test_galores_published_line_is_told_that_its_batch_is_the_reason():
    """24 GB suffice for GaLore's 7B with one micro-batch per update only: 13.5e9 bytes of gradients stay between 32 of them."""
    ways = assert_lines_fit(GALORE_7B, 24e9, World(), "cuda")
    (batch, flags), (method, other) = ways
    assert f"{2 * 6_738_415_616 / GIB:.1f} GiB of gradients stay between the 32 micro-batches" in batch
    assert "--peft_model" not in flags
    assert "--optimizer" not in flags
    assert other.split()[:2] == ["--peft_model", "sltrain"]
    assert "--optimizer adam8bit_per_layer" in other
    assert "another method" in method


@pytest.mark.parametrize("limit", [30, 20, 16])
def test_sltrain_at_7b_fits_where_it_can(limit):
    line = (
        "--model_config configs/llama_7b.json --batch_size 8 --peft_model sltrain --rank 1024 --sp_ratio 0.05 --optimizer adamw"
    )
    ((sentence, _),) = assert_lines_fit(line, limit * GIB, World(), "cpu")
    assert "another" not in sentence


def test_flags_that_leave_the_training_as_it_is_come_first():
    """Smaller micro-batches, before another dtype or another optimizer."""
    line = "--model_config configs/llama_60m.json --batch_size 256 --optimizer adamw --dtype float32"
    peak = planned(line)[1].bytes["peak"]
    ((_, flags),) = assert_lines_fit(line, 0.3 * peak, ALONE, "cuda")
    assert set(re.findall(r"--\w+", flags)) <= {"--activation_checkpointing", "--per_layer", "--batch_size", "--total_batch_size"}


def test_what_cannot_fit_by_any_flag_says_so():
    problems = advice(GALORE_7B, 2 * GIB)
    assert "no flag makes it fit" in problems[0]
    assert not any(FITS.search(problem) for problem in problems)


def test_what_does_not_fit_is_refused_with_the_way_out():
    args, plan = planned(
        "--model_config configs/llama_7b.json --batch_size 1 --optimizer adamw --dtype bfloat16", device_type="cpu"
    )
    device = DeviceMemory("this machine's memory", 24 * GIB, "cpu")
    problem, single = memory_problems(plan, args, device)
    assert "--per_layer" in FITS.search(problem)[1]
    assert "--optimizer adam8bit" in single
    assert "does NOT fit" in format_plan(plan, args, "data", device)
    assert memory_problems(plan, args, DeviceMemory("a large one", 100 * GIB, "cpu")) == []


def test_changes_of_single_flags_lower_the_peak_and_come_in_their_order():
    line = "--model_config configs/llama_1b.json --batch_size 16 --optimizer adamw --peft_model sltrain --rank 512 --async_save"
    args, plan = planned(line, device_type="cpu")
    found = Advisor(args, plan, "cpu").single()
    peaks = [proposal.peak for proposal in found]
    assert peaks == sorted(peaks)
    assert peaks[-1] < plan.bytes["peak"]
    expected = {
        "--activation_checkpointing",
        "--batch_size 8 --total_batch_size 16",
        "--optimizer adam8bit",
        "--async_save false",
    }
    assert expected <= {proposal.text for proposal in found}
    assert all(proposal.text in out_of_memory_problem(plan, args, "cpu", "no more") for proposal in found)


@pytest.mark.parametrize(
    "line",
    [
        "--model_config configs/llama_1b.json --peft_model sltrain --rank 512 --sp_ratio 0.03 --batch_size 8 --optimizer adam",
        "--model_config configs/llama_130m.json --peft_model galore --optimizer sgd --per_layer --activation_checkpointing layer "
        "--batch_size 1 --async_save --dtype bfloat16",
    ],
)
def test_every_single_change_lowers_the_peak_when_it_is_typed(line):
    """On a GPU where the run keeps decoded positions; with a method that only another one is lighter than."""
    args, memory = parse_args(line.split()), DeviceMemory("a large one", 80 * 10**9, "cuda")
    plan = make_plan(args, World(), "bfloat16", "cuda", memory)
    found = Advisor(args, plan, "cuda").single()
    assert found
    method = 0
    for proposal in found:
        # Another method would keep positions too, but only where there is room.
        other = " --linear_cache none" if "--peft_model" in proposal.text else ""
        changed = parse_args(f"{line} {proposal.text}{other}".split())
        typed = make_plan(changed, World(), "bfloat16", "cuda", memory)
        assert typed.bytes["peak"] == proposal.peak < plan.bytes["peak"], proposal.text
        assert not [text for text in notices(changed) if "no effect" in text and text.split()[0] in proposal.text], proposal.text
        method += "--peft_model" in proposal.text
    assert method in (0, len(found))


def test_sharding_is_proposed_to_several_processes():
    line = "--model_config configs/llama_1b.json --batch_size 1 --optimizer adamw"
    world = World(size=4, local_size=4)

    def texts(more: str, world: World) -> set[str]:
        args, plan = planned(f"{line} {more}", world)
        return {proposal.text for proposal in Advisor(args, plan, "cuda").single()}

    assert "--parallel fsdp" in texts("", world)
    for more, other in (
        ("", World()),
        ("--optimizer adafactor", world),
        ("--parallel fsdp", world),
        ("--peft_model galore", world),
    ):
        assert "--parallel fsdp" not in texts(more, other)
    assert "--reshard_after_forward" in texts("--parallel fsdp --reshard_after_forward false", world)


@pytest.mark.parametrize(("size", "verdict"), [("24GB", "does NOT fit"), ("24 GiB", "does NOT fit"), ("80GB", "fits")])
def test_a_dry_run_plans_for_a_gpu_that_is_not_here(size, verdict, capsys):
    assert torchrun_main.main([*GALORE_7B.split(), "--dry_run", "--memory", size]) == 0
    printed = capsys.readouterr().out
    assert f"{verdict} in the" in printed
    assert ("it would fit with" in printed) == (verdict != "fits")


def test_an_advised_line_passes_the_dry_run_itself(capsys):
    """The whole way, as a user goes it."""
    ways = assert_lines_fit(GALORE_7B, 24e9, World(), "cuda")
    for _, flags in ways:
        assert torchrun_main.main([*GALORE_7B.split(), *flags.split(), "--dry_run", "--device", "cuda", "--memory", "24GB"]) == 0
        assert "; fits in the 22.4 GiB of the planned GPU" in capsys.readouterr().out


def test_a_dry_run_plans_for_a_cpu_by_its_own_dtype(capsys):
    line = ["--model_config", "configs/llama_60m.json", "--batch_size", "1", "--dry_run", "--memory", "8GB"]
    dtypes = {}
    for device in ("cpu", "cuda", "auto"):
        assert torchrun_main.main([*line, "--device", device]) == 0
        dtypes[device] = re.search(r"full, (\w+)", capsys.readouterr().out)[1]
    assert dtypes == {"cpu": "float32", "cuda": "bfloat16", "auto": "bfloat16"}


@pytest.mark.parametrize("size", ["80", "GB", "0GB", "-5GB", "nanGB", "infGB", "22,5GB", "1e3GB", "", "80 XB", "0.0001kB"])
def test_a_size_that_cannot_be_read_is_refused_once(size, capsys):
    line = ["--model_config", "configs/llama_60m.json", "--batch_size", "1", "--dry_run", "--memory", size]
    assert torchrun_main.main(line) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.endswith(f"--memory {size}: must be a size above 0 with its unit, such as 80GB or 24GiB")


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("80GB", 80 * 10**9),
        ("24GiB", 24 * 2**30),
        ("8 GB", 8 * 10**9),
        ("24g", 24 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512 mib", 2**29),
    ],
)
def test_sizes_are_read_with_their_units(size, num_bytes):
    line = ["--model_config", "configs/llama_60m.json", "--batch_size", "1"]
    assert parse_args([*line, "--memory", size]).memory == parse_args([*line, f"--memory={size}"]).memory == num_bytes
