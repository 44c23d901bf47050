"""Starts the program in separate processes quickly, by forking a server process that has loaded torch and transformers."""

import multiprocessing
import os
import resource
import socket
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
# Everything that a run may import, including bitsandbytes and torchao, which takes seconds to load.
SERVER.set_forkserver_preload(
    [
        *("torch", "torch.distributed.checkpoint", "transformers.models.llama.modeling_llama", "sentencepiece", "fsspec"),
        *("transformers.convert_slow_tokenizer", "tokenizers.trainers", "torch.profiler"),
        *("peft_pretraining.run.assemble", "peft_pretraining.run.resume", "peft_pretraining.run.folder"),
        *("peft_pretraining.checkpoint.saver", "peft_pretraining.optim.adam8bit", "peft_pretraining.optim.adam_ao"),
    ]
)


@dataclass(frozen=True)
class Program:
    """A started program: one process, or several that form a process group as under torchrun."""

    processes: list[BaseProcess]
    log: Path

    def wait(self) -> int:
        """Waits for all processes; returns the first exit code that is not 0 (negative: the number of a signal), else 0."""
        for process in self.processes:
            process.join()
        return next((process.exitcode for process in self.processes if process.exitcode), 0)

    def send(self, number: int) -> None:
        """Sends a signal to all processes that still run."""
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL to all processes."""
        for process in self.processes:
            process.kill()

    @property
    def output(self) -> str:
        return self.log.read_text()


def free_port() -> int:
    """Returns a port on which no process listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start(
    argv: list[str],
    log: Path,
    *,
    processes: int = 1,
    environment: dict[str, str] | None = None,
    largest_file: int | None = None,
    sequences: Path | None = None,
) -> Program:
    """Starts torchrun_main.main(argv).

    Args:
        log: file for stdout and stderr of all processes.
        largest_file: limit of a file's bytes; writing more fails.
        sequences: folder in which each process records its training sequences: RANK.txt, one line of ids for each.
    """
    port = free_port()
    log.write_text("")
    started = []
    for rank in range(processes):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {name: str(value) for name, value in world.items()} if processes > 1 else {}
        variables |= {"HF_HUB_OFFLINE": "1"} | (environment or {})
        arguments = (argv, log, variables, largest_file, sequences)
        started.append(SERVER.Process(target=_child, args=arguments))
        started[-1].start()
    return Program(started, log)


def run(argv: list[str], log: Path, **options) -> tuple[int, str]:
    """Runs the program; returns its exit code and its output."""
    program = start(argv, log, **options)
    return program.wait(), program.output


def _child(argv: list[str], log: Path, variables: dict[str, str], largest_file: int | None, sequences: Path | None) -> None:
    # Data workers must be children of this process, which they watch, and not of the server.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(variables)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    import torchrun_main
    from peft_pretraining.record import mfu

    # Measuring the CPU's takes a quarter of a second.
    mfu.device_peak = lambda device, dtype: 1e12
    if sequences is not None:
        _note_sequences(sequences / f"{os.environ.get('RANK', 0)}.txt")
    sys.exit(torchrun_main.main(argv))


def _note_sequences(path: Path) -> None:
    from peft_pretraining.training import update as train

    step = train.train_step

    def noting(module, updates, micro_batches, **options):
        with path.open("a") as file:
            for batch in micro_batches:
                file.writelines(" ".join(map(str, ids)) + "\n" for ids in batch.input_ids.tolist())
        return step(module, updates, micro_batches, **options)

    train.train_step = noting
