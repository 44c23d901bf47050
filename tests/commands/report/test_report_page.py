"""The report's page contains the runs' results, needs no other files, and works in a browser without errors."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from run_records import write_run

from peft_pretraining.__main__ import main as command
from peft_pretraining.commands.report.command import write_report
from peft_pretraining.commands.report.read import read_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Full-rank and SLTrain at two learning rates with two seeds each, and one that was stopped."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        write_run(folder / f"full{seed}", method="full", seed=seed, perplexity=30.0 + seed)
        for lr in (0.001, 0.003):
            write_run(folder / f"s{lr}-{seed}", seed=seed, lr=lr, perplexity=33.0 + seed + 100 * lr)
    write_run(folder / "stopped", seed=3, reached=4)
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """Returns the folder of the report on these runs."""
    out = tmp_path_factory.mktemp("report")
    write_report(sorted(runs.iterdir()), out, "A <title> & more")
    return out


class Elements(HTMLParser):
    """The tags, URLs to fetch and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.open, self.words = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_complete_and_fetches_nothing(report):
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Elements(text)
    assert page.open == []
    assert "script" not in page.tags
    assert page.fetched
    assert all(value.startswith("data:") for value in page.fetched)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "A &lt;title&gt; &amp; more" in text
    figures = {path.stem for path in report.glob("*.png")}
    assert figures == {"loss", "perplexity", "perplexity_memory", "memory", "throughput", "learning_rate"}
    assert page.tags.count("img") == len(figures)
    words = " ".join(page.words)
    for expected in (
        "31.50 ± 6.35 (n = 2)",  # of 31 and 32: 12.706 x 0.7071 / sqrt(2)
        "34.15",  # published
        "arXiv 2406.02214",
        "unfinished after update 4 of 10",
        "--peft_model sltrain --sp_ratio 0.03",
        "torch 2.13.0",
    ):
        assert expected in words


def test_a_report_on_runs_without_results_is_written(tmp_path):
    """Runs without evaluations or updates give a page without the figures that would be empty."""
    first = write_run(tmp_path / "a", perplexity=None, reached=2)
    second = write_run(tmp_path / "b", method="full", reached=0)
    (second / "metrics.jsonl").unlink()
    write_report([first, second], tmp_path / "out", "gaps")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "no update is logged yet" in text
    assert not (tmp_path / "out" / "perplexity_memory.png").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["groups"][0]["perplexity"] is None


def test_figures_of_an_earlier_report_are_removed(runs, tmp_path):
    """One setting gives no figure of the learning rate, so an old one must be removed."""
    (tmp_path / "learning_rate.png").write_bytes(b"old")
    write_report([runs / "full1"], tmp_path, "again")
    assert not (tmp_path / "learning_rate.png").exists()


def test_the_report_command_takes_several_runs_and_names_problems(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("peft_pretraining.commands.report.figures.draw_all", lambda groups, out: {})
    assert command(["report", str(runs), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["method"] for group in found["groups"]] == ["full", "sltrain", "sltrain"]
    assert command(["report", str(runs)]) == 2
    assert "--out DIR" in capsys.readouterr().err
    assert command(["report", str(runs / "full1"), str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none: no run.json" in capsys.readouterr().err


def test_a_report_folder_that_cannot_be_created_is_named(runs, tmp_path, capsys):
    (tmp_path / "file").touch()
    for named in (runs, runs / "full1"):
        assert command(["report", str(named), "--out", str(tmp_path / "file")]) == 2
        assert f"--out {tmp_path / 'file'}: cannot be created (File exists)" in capsys.readouterr().err


def test_a_report_on_one_run_prints_a_table_and_draws_curves(tmp_path, capsys):
    run = write_run(tmp_path / "run", method="full")
    assert command(["report", str(run)]) == 0
    assert "final perplexity" in capsys.readouterr().out
    assert (run / "curves.png").is_file()
    assert not (run / "report.html").exists()
    assert command(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert {"curves.png", "report.html", "report.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_stopped_run_has_no_final_figure(tmp_path, capsys):
    """Evaluated before training alone, and asked to stop after update 5, one after the last logged one."""
    run = write_run(tmp_path / "run", reached=4)
    (run / "stopped.json").write_text(json.dumps({"signal": "SIGINT", "update_step": 5, "tokens_seen": 5_000}))
    assert command(["report", str(run)]) == 0
    table = capsys.readouterr().out
    assert "stopped at update 5 of 10" in table
    assert "final" not in table
    assert command(["report", str(run), "--json", "--out", str(tmp_path / "out")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["status"] == "stopped at update 5 of 10"
    assert all(value is None for name, value in figures.items() if name.startswith("final_"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "stopped at update 5 of 10: no final perplexity (after update 0 it was 32,000.00)" in page
    assert "<td>32,000.00</td><td>—</td>" in page  # first and final perplexity in the table of runs


def test_a_run_measured_in_tokens_says_at_which_token_it_stopped(tmp_path):
    run = write_run(tmp_path / "run", "--max_train_tokens", "9000", reached=4)
    (run / "stopped.json").write_text("{}")
    assert "stopped at update 4 (4,000 of 9,000 tokens)" in read_run(run).status


def test_wandb_gets_the_reports_table_figures_and_page(runs, tmp_path, monkeypatch, capsys):
    """The real wandb package writes an offline run with table, figures and page in the report's folder."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "of-training")  # the report must not become part of that run
    assert command(["report", str(runs), "--out", str(tmp_path / "out"), "--wandb", "offline"]) == 0
    assert "WANDB_RUN_ID=of-training has no effect" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "wandb").glob("*of-training*"))
    media = [path.name for path in (tmp_path / "out" / "wandb").rglob("media/**/*") if path.is_file()]
    assert {name.split("_")[0] for name in media} >= {"loss", "memory", "methods", "page", "throughput"}


def browse(browser, url, folder, *more):
    """Opens a page in headless Chromium, whose console goes to stderr; returns the finished process."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,2400"]
    log = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([browser, *flags, *log, *more, url], capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def browser():
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)}): apt-get install chromium")
    return found


def test_a_browser_shows_the_page_without_errors(report, tmp_path, browser):
    """Opened from disk, the page gives no message in the console and shows text and figures."""
    page = report / "report.html"
    shot = tmp_path / "shot.png"
    ended = browse(browser, page.as_uri(), tmp_path, f"--screenshot={shot}")
    assert "CONSOLE" not in ended.stderr
    from matplotlib.image import imread

    picture = imread(shot)
    assert picture.shape[:2] == (2400, 1400)
    dark = (picture[..., :3].mean(axis=2) < 0.4).mean(axis=1)  # share of dark pixels by line of the screen
    assert (dark[:1200] > 0.01).sum() > 50  # text and figures, not a blank page
    ended = browse(browser, page.as_uri(), tmp_path, "--dump-dom")
    assert ended.stdout.count("<img") == text_count(page, "<img")
    assert "held-out perplexity" in ended.stdout


def test_on_a_narrow_screen_only_figures_scroll_sideways(report, tmp_path, browser):
    """At 400 pixels the page is as wide as the screen, and figures keep a readable size."""
    measure = (
        "<script>const image = document.querySelector('img').getBoundingClientRect();"
        "document.title = [innerWidth, document.documentElement.scrollWidth, Math.round(image.width)]</script></body>"
    )
    (tmp_path / "page.html").write_text((report / "report.html").read_text().replace("</body>", measure))
    dumped = browse(browser, (tmp_path / "page.html").as_uri(), tmp_path, "--window-size=400,900", "--dump-dom").stdout
    window, page, image = map(int, re.search(r"<title>(\d+),(\d+),(\d+)<", dumped).groups())
    assert page == window < image


def test_printed_pages_contain_the_commands(report, tmp_path, browser):
    """Commands cannot be unfolded on paper, so they must be printed: as many sheets as with all commands unfolded."""
    text = (report / "report.html").read_text()
    unfold = "details::details-content"
    pages = {"as it is": text, "open": text.replace("<details>", "<details open>"), "closed": text.replace(unfold, "x")}
    sheets = {}
    for name, content in pages.items():
        (tmp_path / "page.html").write_text(content)
        browse(browser, (tmp_path / "page.html").as_uri(), tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
        sheets[name] = len(re.findall(rb"/Type /Page\b", (tmp_path / "page.pdf").read_bytes()))
    assert sheets["as it is"] == sheets["open"] > sheets["closed"]


def text_count(path, part):
    return path.read_text(encoding="utf-8").count(part)


def test_the_browser_check_detects_errors(tmp_path, browser):
    """For a page with a failing script and a missing image the console has messages."""
    (tmp_path / "bad.html").write_text("<script>throw new Error('broken')</script><img src='none.png'>")
    assert "CONSOLE" in browse(browser, (tmp_path / "bad.html").as_uri(), tmp_path, "--dump-dom").stderr
