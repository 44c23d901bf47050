"""README.md and docs/ are correct: links, flags and files exist, and command lines parse."""

import argparse
import ast
import functools
import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import peft_pretraining.__main__
import torchrun_main
from peft_pretraining.__main__ import COMMANDS
from peft_pretraining.commands.report.published import SEVEN_B, TABLE
from peft_pretraining.config.command_line import build_parser, parse_args

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("sparse_lora", "peft_pretraining", "configs", "scripts", "tests", "docs", "benchmarks", ".ci")

FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"python - <<'(\w+)'\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
HEREDOC = re.compile(r"<<'(\w+)'\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]*\]\(([^()\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w-]*)")
REPOSITORY_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, FOLDERS))})/[^\s`'\"(),;:|]*")
# A path below one of the packages, such as data/source.py, or a bare name, such as memory.py.
SOURCE_FILE = re.compile(r"(?<![\w./*<-])\w[\w./-]*\.(?:py|sh)(?![\w*])")
PLACEHOLDER = re.compile(r"[<>{}$…]|\.\.\.")

# Other programs, whose flags are not checked.
OTHER_PROGRAMS = {
    "pip",
    "docker",
    "kubectl",
    "mkdir",
    "cp",
    "rm",
    "for",
    "cat",
    "cd",
    "echo",
    "git",
    "python3",
    "hf",
    "lm_eval",
    "llama-completion",
}
OTHER_FLAGS = {"--model_args", "--tasks", "--include_path", "--output_path", "--outfile", "--temp", "--private"}

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def prose(text: str) -> str:
    """Returns a document without its code blocks."""
    return FENCE.sub("", text)


def code(text: str) -> list[str]:
    """Returns inline code, and code blocks of a shell or without a language (the annotated tree)."""
    blocks = [block for language, block in FENCE.findall(text) if language in ("bash", "")]
    return INLINE_CODE.findall(prose(text)) + blocks


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yields the option strings of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Returns a parser for each `python -m peft_pretraining COMMAND`."""
    parsers = {}
    for name, module in COMMANDS.items():
        parsers[name] = argparse.ArgumentParser(prog=name, allow_abbrev=False)
        module.add_arguments(parsers[name])
    return parsers


def torchrun_options() -> set[str]:
    from torch.distributed.run import get_args_parser

    return set(options(get_args_parser()))


@functools.cache
def known_flags() -> set[str]:
    """Returns the flags of the program, its commands, scripts, benchmarks and torchrun, and those of Slurm used in scripts."""
    flags = set(options(build_parser())) | torchrun_options() | OTHER_FLAGS
    for parser in command_parsers().values():
        flags.update(options(parser))
    for script in (ROOT / "scripts").glob("*.sh"):
        flags.update(re.findall(r'"(--[\w-]+)" \]', script.read_text(encoding="utf-8")))  # [ "$1" = "--full" ]
    for line in (ROOT / "scripts" / "cluster" / "slurm.sh").read_text(encoding="utf-8").splitlines():
        if "sbatch" in line.lower():
            flags.update(re.findall(r"(--[a-z-]+)", line))  # Slurm's own
    for benchmark in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests" / "golden" / "golden.py"]:
        flags.update(re.findall(r'add_argument\(\s*"(--[\w-]+)"', benchmark.read_text(encoding="utf-8")))
    return flags


def heading_anchors(path: Path) -> set[str]:
    """Returns the anchors that a Markdown viewer makes for the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def command_lines(text: str) -> list[list[str]]:
    """Returns the words of every command in shell blocks, with continued lines joined, without comments and redirections."""
    commands = []
    for language, block in FENCE.findall(text):
        if language != "bash":
            continue
        block = HEREDOC.sub("", block)
        for line in block.replace("\\\n", " ").splitlines():
            commands.append([])
            for word in shlex.split(line.replace(";", " ; "), comments=True):
                if word in ("|", "&&", ";"):
                    commands.append([])
                else:
                    commands[-1].append(word)
    # The words of a loop, and what follows a redirection.
    commands = [words[1:] if words[:1] == ["do"] else words for words in commands if words[:1] != ["done"]]
    return [words[: words.index(">")] if ">" in words else words for words in commands]


@every_document
def test_documents_contain_no_placeholders(path):
    assert "@@" not in path.read_text(encoding="utf-8")


@every_document
def test_relative_links_lead_to_files_and_headings(path):
    """A link leads to a file of the repository and, if it has an anchor, to a heading in it."""
    broken = []
    for target in LINK.findall(prose(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in heading_anchors(file)):
            broken.append(target)
    assert not broken


@every_document
def test_every_flag_in_the_documents_exists(path):
    named = {f"--{name}" for name in FLAG.findall(path.read_text(encoding="utf-8"))}
    assert not named - known_flags()


@every_document
def test_every_path_in_the_documents_exists(path):
    missing = []
    for text in code(path.read_text(encoding="utf-8")):
        for name in REPOSITORY_PATH.findall(text):
            if not PLACEHOLDER.search(name) and not any(ROOT.glob(name.rstrip("./"))):
                missing.append(name)
        for name in SOURCE_FILE.findall(text):
            if not (ROOT / name).exists() and not any(any((ROOT / folder).rglob(name)) for folder in FOLDERS):
                missing.append(name)
    assert not missing


def commands_of(text: str) -> list[list[str]]:
    """Returns the commands in shell blocks, and those in inline code that are complete (no placeholder)."""
    inline = [code for code in INLINE_CODE.findall(prose(text)) if code.startswith(("python ", "bash scripts/"))]
    inline = [code for code in inline if not PLACEHOLDER.search(code) and not re.search(r"\b[A-Z]{2,}\b", code)]
    return command_lines(text) + [shlex.split(code) for code in inline]


def without_variables(words: list[str]) -> list[str]:
    """Returns a command without leading assignments of environment variables."""
    return words[next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words)) :]


def unknown_flags(words: list[str]) -> list[str]:
    """Returns the arguments that a command's parser does not know. Fails for a command without a check."""
    words = [word for word in without_variables(words) if word != "--help"]
    if (
        not words
        or words[0] in OTHER_PROGRAMS
        or words == ["python", "-"]
        or words[1:2] == ["../llama.cpp/convert_hf_to_gguf.py"]
    ):
        return []
    if "torchrun_main.py" in words:
        own = words[words.index("torchrun_main.py") + 1 :]
        return list(parse_args(own).refused) if own else []
    if words[1:3] == ["-m", "peft_pretraining"]:
        return command_parsers()[words[3]].parse_known_args(words[4:])[1]
    if words[:3] == ["python", "-m", "pytest"] or (words[0] == "python" and words[1].startswith(("benchmarks/", "tests/"))):
        return [word for word in words if re.fullmatch(FLAG, word) and word not in known_flags()]
    script = next((word for word in words if word.startswith("scripts/")), "")
    own = words[words.index(script) + 1 :] if script else []
    if script.startswith("scripts/llm_pretrain/") or script == "scripts/quickstart.sh":
        return list(parse_args([*own, "--model_config=m", "--batch_size=1"]).refused)
    if script == "scripts/sweep.sh":
        return command_parsers()["sweep"].parse_known_args(own)[1]
    if script == "scripts/finetune/glue.sh":
        return command_parsers()["finetune"].parse_known_args(["--model", "m", "--out", "o", "--task", *own])[1]
    assert script, f"no check covers this command: {shlex.join(words)}"
    return []


@every_document
def test_commands_in_the_documents_parse(path):
    """Tested with the parser of the program that they start; other tests check that files exist."""
    unknown = {
        shlex.join(words): flags for words in commands_of(path.read_text(encoding="utf-8")) if (flags := unknown_flags(words))
    }
    assert not unknown


def quick_commands() -> list[list[str]]:
    """Returns the commands of all documents that need no run, data or network: dry runs, estimates, help."""
    commands = [words for path in DOCUMENTS for words in commands_of(path.read_text(encoding="utf-8"))]
    quick = [words for words in commands if "--dry_run" in words or "--help" in words or "estimate" in words[:4]]
    unique = {shlex.join(words): words for words in quick if words[0] == "python" and "sweep" not in words}
    return list(unique.values())


@pytest.mark.parametrize("words", quick_commands(), ids=shlex.join)
def test_quick_commands_in_the_documents_run(words, tmp_path, monkeypatch, capsys):
    """In a folder with links to configs and scripts, and a folder of text in place of data below runs/."""
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in words:
        if name.startswith("runs/") and words[words.index(name) - 1] == "--dataset":
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "train.jsonl").write_text('{"text": "A document."}\n' * 100, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    program = torchrun_main.main if words[1] == "torchrun_main.py" else peft_pretraining.__main__.main
    own = words[2:] if words[1] == "torchrun_main.py" else words[3:]
    if "--help" in own:
        with pytest.raises(SystemExit) as ended:
            program(own)
        code = ended.value.code
    else:
        code = program(own)
    assert code == 0, capsys.readouterr().err


def python_code(text: str) -> list[str]:
    """Returns blocks of Python, and programs that a shell block passes to `python -`."""
    blocks = FENCE.findall(text)
    programs = [found for language, block in blocks if language == "bash" for found in PROGRAM.findall(block)]
    return [block for language, block in blocks if language == "python"] + [program for _, program in programs]


@every_document
def test_python_code_compiles_and_its_imports_exist(path):
    for code_text in python_code(path.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(code_text)):
            if isinstance(node, ast.ImportFrom) and not node.module.startswith("conversion."):  # llama.cpp's
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


SIZES = ("60m", "130m", "350m", "1b", "7b")
METHODS = {"sltrain": "SLTrain", "full": "full-rank", "lowrank": "low-rank", "relora": "ReLoRA", "galore": "GaLore"}
RECIPE_HEAD = [
    "| size | method | script | parameters | published perplexity | tokens | updates | GPUs x batch | GiB per GPU | status |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def predicted(flags: list[str], processes: int, capsys) -> dict:
    """Returns the output of `python -m peft_pretraining estimate ... --json` for a recipe on GPUs."""
    command = ["estimate", "--json", "--device_type", "cuda", "--world", str(processes), *flags]
    assert peft_pretraining.__main__.main(command) == 0
    return json.loads(capsys.readouterr().out)


def recipe_row(path: Path, words_of_torchrun: Callable[..., list[str]], capsys) -> str:
    """Returns a row of docs/recipes.md's table, made from the script, the estimate and the published table."""
    text, tuned = path.read_text(encoding="utf-8"), path.parent.name == "tuned"
    method, size = re.fullmatch(r"([a-z]+)(\d+[mb])", path.stem).groups()
    words = words_of_torchrun(path)
    program = words.index("torchrun_main.py")
    processes, flags = int(words[program - 1]), words[program + 1 :]
    args = parse_args(flags)
    assert (args.peft_model, args.model_config) == (method, f"configs/llama_{size}.json")
    figures = predicted(flags, processes, capsys)
    rows = [row for row in (*TABLE, *SEVEN_B) if (row.method, row.model) == (method, f"llama_{size}")]
    perplexity, tokens = (f"{rows[0].perplexity:.2f}", rows[0].tokens) if rows and not tuned else ("-", "-")
    status = re.search(r"^# Status: (.+?)(?:, not run yet)?\.", text, re.MULTILINE)[1]
    parameters, gib = f"{figures['parameters']['total']:,}", f"{figures['bytes']['peak'] / 2**30:.1f}"
    assert f"# Predicted, not measured: {parameters} parameters; {gib} GiB at the peak on each GPU." in text.splitlines()
    name = f"{METHODS[method]}, {'tuned' if tuned else 'not tuned'}" if method == "full" or tuned else METHODS[method]
    script = f"`{'tuned/' if tuned else ''}{path.name}`"
    cells = [size, name, script, f"{figures['parameters']['total'] / 1e6:,.1f}M", perplexity, tokens]
    cells += [f"{args.num_training_steps:,}", f"{processes} x {args.batch_size}", gib, status]
    return f"| {' | '.join(cells)} |"


def quickstart_row(capsys) -> str:
    flags = ["--config", "scripts/quickstart.yaml"]
    plan = yaml.safe_load((ROOT / "scripts" / "quickstart.yaml").read_text(encoding="utf-8"))
    figures = predicted(flags, 1, capsys)
    tokens = f"{plan['num_training_steps'] * plan['total_batch_size'] * plan['max_length'] / 1e6:.1f}M"
    parameters = f"{figures['parameters']['total'] / 1e6:,.1f}M"
    cells = ["quickstart", METHODS[plan["peft_model"]], "`quickstart.sh`", parameters, "-", tokens]
    cells += [str(plan["num_training_steps"]), f"1 x {plan['batch_size']}", f"{figures['bytes']['peak'] / 2**30:.1f}"]
    return f"| {' | '.join([*cells, 'run, on a CPU'])} |"


def test_recipe_table_agrees_with_scripts_estimates_and_published_figures(words_of_torchrun, monkeypatch, capsys):
    """To correct a table, paste the expected lines between the two comments. README's has the rows of SLTrain."""
    monkeypatch.chdir(ROOT)
    scripts = ROOT / "scripts" / "llm_pretrain"
    names = [f"{folder}{method}{size}.sh" for size in SIZES for method in METHODS for folder in ("", "tuned/")]
    recipes = [scripts / name for name in names if (scripts / name).exists()]
    assert sorted(recipes) == sorted(scripts.rglob("*[0-9]*.sh"))
    expected = [*RECIPE_HEAD, quickstart_row(capsys), *(recipe_row(path, words_of_torchrun, capsys) for path in recipes)]
    short = [row for row in expected if row in RECIPE_HEAD or "| SLTrain |" in row]
    for page, rows in (("docs/recipes.md", expected), ("README.md", short)):
        text = (ROOT / page).read_text(encoding="utf-8")
        table = re.search(r"<!-- recipes:[^\n]*\n(.*?)\n<!-- end of recipes -->", text, re.DOTALL)[1]
        assert table.splitlines() == rows, f"{page}:\n" + "\n".join(rows)


SHARDED_FLAGS = ["--optimizer", "adamw", "--dtype", "bfloat16", "--batch_size", "16", "--activation_checkpointing"]
SHARDED_RANKS = {"60m": 128, "350m": 256, "1b": 512, "7b": 1024}


def test_table_of_sharded_memory_agrees_with_the_estimates(monkeypatch, capsys):
    """To correct the table, paste the expected lines."""
    monkeypatch.chdir(ROOT)
    expected = []
    for size, rank in SHARDED_RANKS.items():
        for method, title in (("full", "full"), ("sltrain", "SLTrain")):
            model = ["--model_config", f"configs/llama_{size}.json", "--peft_model", method]
            model += [] if method == "full" else ["--rank", str(rank), "--sp_ratio", "0.05" if size == "7b" else "0.03"]
            peaks = [
                predicted([*model, *SHARDED_FLAGS, "--parallel", parallel], processes, capsys)["bytes"]["peak"] / 2**30
                for parallel, processes in (("ddp", 8), ("fsdp", 8), ("fsdp", 64))
            ]
            expected.append(f"| {size} | {title} | {' | '.join(f'{peak:.2f}' for peak in peaks)} |")
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    table = re.search(r"^\| model \| method \| ddp, N = 8 .*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
    assert table.splitlines() == expected, "\n" + "\n".join(expected)


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = set(LINK.findall(prose((ROOT / "README.md").read_text(encoding="utf-8"))))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_the_patterns_match_what_they_search_for(tmp_path):
    """Each pattern matches what it searches for, so that the tests above can fail."""
    text = "See [x](y.md) and `scripts/none.sh --no_such`.\n```bash\npython a.py \\\n  --b  # c\n```\n"
    assert LINK.findall(prose(text)) == ["y.md"]
    assert FLAG.findall(text) == ["no_such", "b"]
    assert [REPOSITORY_PATH.findall(part) for part in code(text)] == [["scripts/none.sh"], []]
    assert command_lines(text) == [["python", "a.py", "--b"]]
    assert "--sp_ratio" in known_flags()
    assert "--max_new_tokens" in known_flags()
    assert "--no_such" not in known_flags()
    (tmp_path / "x.md").write_text("## A look inside: `all`\n")
    assert heading_anchors(tmp_path / "x.md") == {"a-look-inside-all"}


def test_the_sweep_of_the_documentation_plans_all_its_runs(tmp_path, monkeypatch):
    """The two YAML blocks of docs/report.md are one sweep's file."""
    from peft_pretraining.commands.sweep.settings import load_sweep

    monkeypatch.chdir(ROOT)
    blocks = [block for language, block in FENCE.findall((ROOT / "docs/report.md").read_text()) if language == "yaml"]
    assert len(blocks) == 2
    (tmp_path / "sweep.yaml").write_text("".join(blocks))
    sweep = load_sweep(tmp_path / "sweep.yaml")
    assert (len(sweep.runs) > 3, sweep.num_rounds) == (True, 2)
