"""Every command of docs/situations.md makes a plan that fits its card."""

import re
import shlex
from pathlib import Path

import pytest

import torchrun_main

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "situations.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if "torchrun_main.py" in line]


def test_the_page_has_every_situation():
    assert len(COMMANDS) == 10


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: re.search(r"llama_(\w+)", line)[1])
def test_a_command_plans_a_run_that_fits(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    program = words.index("torchrun_main.py")
    if program > 1:  # through torchrun
        processes = words[program - 1]
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        for name, value in (world | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).items():
            monkeypatch.setenv(name, value)
    assert torchrun_main.main(words[program + 1 :]) == 0
    printed = capsys.readouterr()
    assert "GiB" in printed.out
    # The time that a large checkpoint takes is told of every large model.
    warnings = re.findall(r"warning: (.*)", printed.out + printed.err)
    assert [line for line in warnings if not line.startswith("a checkpoint has")] == []
