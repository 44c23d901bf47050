"""The report's figures show the right values, read from matplotlib's objects."""

import matplotlib
import pytest
from run_records import UPDATES, evaluation, rows_of, update, write_rows, write_run

from peft_pretraining.commands.report import bars, curves, scatter
from peft_pretraining.commands.report.drawing import digits, plain_log_ticks
from peft_pretraining.commands.report.groups import group_runs
from peft_pretraining.commands.report.read import read_run

matplotlib.use("Agg")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Returns a function that draws the groups of some runs and returns the figure."""

    def draw(module, name, folders):
        kept = []
        monkeypatch.setattr(module, "save", lambda figure, path: kept.append(figure) or path)
        groups = group_runs([read_run(folder) for folder in folders])
        assert getattr(module, name)(groups, tmp_path / "figure.png") is not None
        kept[0].canvas.draw()
        return kept[0]

    yield draw
    from matplotlib import pyplot

    pyplot.close("all")


def labels_of(axis):
    """Returns the visible tick labels."""
    low, high = axis.get_view_interval()
    ticks = [(value, label.get_text()) for value, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)]
    return [text for value, text in ticks if low <= value <= high]


@pytest.mark.parametrize("view", [(82, 87), (80.1, 80.9), (118, 220), (60, 400), (20, 300), (30, 32_000)])
def test_an_axis_of_perplexities_has_distinct_labels(view):
    """Also without a power of ten in the view, and without exponents."""
    from matplotlib import pyplot

    figure, panel = pyplot.subplots()
    panel.set(yscale="log", ylim=view)
    plain_log_ticks(panel.yaxis)
    figure.canvas.draw()
    found = labels_of(panel.yaxis)
    pyplot.close(figure)
    assert 3 <= len(found) <= 10
    assert len(set(found)) == len(found)
    assert all(view[0] <= float(text.replace(",", "")) <= view[1] for text in found)


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (3.2, "3.20"), (62.41, "62.4"), (1020.4, "1,020"), (0.0, "0.000")]
)
def test_digits_shows_three_significant_digits(value, text):
    assert digits(value) == text


def test_curves_begin_at_the_start_of_training(drawn, tmp_path):
    """Also if the first evaluation is late; a point has the position of its update, tokens and time."""
    folder = write_run(tmp_path / "a")
    rows = [row for row in rows_of(folder) if "loss" in row]
    write_rows(folder, [*rows, evaluation(7, 50.0), evaluation(10, 30.0)])
    figure = drawn(curves, "draw_perplexity", [folder])
    expected = ([7, 10], [7, 10], [14, 20])  # updates, thousands of tokens, seconds at 500 tokens per second
    for panel, positions in zip(figure.axes, expected, strict=True):
        assert panel.get_xlim()[0] == 0
        (line,) = panel.get_lines()
        assert (list(line.get_xdata()), list(line.get_ydata())) == (positions, [50.0, 30.0])
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "update step", "tokens seen, thousands", "training time, seconds",
    ]  # fmt: skip


def test_nearly_equal_bytes_are_drawn_close_together(drawn, tmp_path):
    """The axis is not stretched over a few bytes, and its labels are plain numbers."""
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "--train_scaling", perplexity=31.0)]
    panel = drawn(scatter, "draw_perplexity_memory", folders).axes[1]
    low, high = panel.get_xlim()
    assert high - low >= 0.049 * (high + low) / 2
    assert panel.xaxis.get_offset_text().get_text() == ""
    found = labels_of(panel.xaxis)
    assert 3 <= len(found) == len(set(found))


def test_the_legend_counts_the_seeds_of_the_mean(drawn, tmp_path):
    folders = [write_run(tmp_path / str(seed), seed=seed, reached=10 if seed < 3 else 4) for seed in (1, 2, 3)]
    figure = drawn(scatter, "draw_perplexity_memory", folders)
    assert figure.legends[0].get_texts()[0].get_text() == "SLTrain (2 seeds)"


def test_overlapping_markers_are_drawn_side_by_side(drawn, tmp_path):
    """Only markers with the same memory and nearly the same perplexity are moved."""
    found = {0.001: 30.0, 0.002: 30.2, 0.003: 30.1, 0.004: 60.0}
    folders = [write_run(tmp_path / str(lr), lr=lr, perplexity=value) for lr, value in found.items()]
    panel = drawn(scatter, "draw_perplexity_memory", [*folders, write_run(tmp_path / "f", method="full")]).axes[1]
    markers = [line for line in panel.get_lines() if line.get_linestyle() == "None" and line.get_markersize() == 6]
    shown = [line.get_transform().transform((line.get_xdata()[0], line.get_ydata()[0]))[0] for line in markers]
    true = [panel.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))[0] for line in markers]
    moved = [72 / panel.figure.dpi * (one - other) for one, other in zip(shown, true, strict=True)]
    assert moved == pytest.approx([0, -9, 0, 9, 0], abs=1e-6)  # full-rank first
    assert len({line.get_xdata()[0] for line in markers}) == 2


@pytest.mark.parametrize("name", ["draw_perplexity_memory", "draw_learning_rate"])
def test_whiskers_are_intervals_limited_to_perplexities_above_one(drawn, tmp_path, name):
    """For 20 and 60 the interval is 40 +- 254, but perplexities below 1 are impossible and not drawn."""
    folders = [
        write_run(tmp_path / f"{lr}-{seed}", seed=seed, lr=lr, perplexity=20.0 * seed)
        for lr in (0.001, 0.002) for seed in (1, 3)
    ]  # fmt: skip
    panel = drawn(scatter, name, folders).axes[0]
    ends = [float(point[1]) for bar in panel.collections for path in bar.get_paths() for point in path.vertices]
    whiskers = [end for end in ends if end == pytest.approx(1.0) or end == pytest.approx(40 + 254.1, rel=1e-3)]
    assert len(whiskers) == 4
    low, high = panel.get_ylim()
    assert 0 < low < 1
    assert high > 40 + 254.1  # the ends are in sight


def test_memory_bars_show_predicted_and_measured_classes(drawn, tmp_path):
    folder = write_run(tmp_path / "a")
    rows = rows_of(folder)
    names = ("parameters", "support", "optimizer")
    rows[1] |= {f"memory_{name}_measured": (number + 1) * 2**20 for number, name in enumerate(names)}
    rows[1] |= {f"memory_{name}_predicted": (number + 4) * 2**20 for number, name in enumerate((*names, "peak"))}
    write_rows(folder, [row | {"max_memory": 100 * 2**20} if "loss" in row else row for row in rows])
    change = {"memory_peak_predicted": 50 * 2**20}
    write_rows(folder, [row | change if "memory_peak_predicted" in row else row for row in rows_of(folder)])
    states, peak = drawn(bars, "draw_memory", [folder]).axes
    widths = [round(bar.get_width(), 6) for bar in states.patches]
    assert widths == [4, 5, 6, 1, 2, 3]  # predicted above measured, MiB
    assert [round(bar.get_width(), 6) for bar in peak.patches] == [4, 5, 6, 35, 1, 2, 3, 94]  # the last: up to the peak
    assert [text.get_text() for text in peak.texts] == ["predicted 50.0 MiB", "measured 100 MiB"]


def test_memory_bars_of_a_group_share_a_label_at_their_middle(drawn, tmp_path):
    """A label for each bar would overlap the next one."""
    folders = [write_run(tmp_path / str(lr), lr=lr) for lr in (0.001, 0.002)]
    for folder in folders:
        rows = rows_of(folder)
        sides = {"measured": 2**20, "predicted": 2**20}
        classes = ("parameters", "support", "optimizer")
        rows[1] |= {f"memory_{name}_{side}": value for name in classes for side, value in sides.items()}
        write_rows(folder, rows)
    panel = drawn(bars, "draw_memory", folders).axes[0]
    middles = sorted({bar.get_y() + bar.get_height() / 2 for bar in panel.patches})
    assert len(middles) == 4
    assert list(panel.get_yticks()) == pytest.approx([sum(middles[:2]) / 2, sum(middles[2:]) / 2])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["SLTrain, lr = 0.001", "SLTrain, lr = 0.002"]


def test_throughput_bars_show_the_median_and_the_published_value(drawn, tmp_path):
    flags = ("--rank", "256")
    folders = [write_run(tmp_path / str(seed), *flags, model="llama_350m", seed=seed) for seed in (1, 2)]
    rows = [row | {"throughput_tokens": 700.0} if "loss" in row else row for row in rows_of(folders[1])]
    write_rows(folders[1], rows)
    other = write_run(tmp_path / "other", "--rank", "32", model="llama_350m")
    (panel,) = drawn(bars, "draw_throughput", [*folders, other]).axes
    texts = [text.get_text() for text in panel.texts]
    assert texts == ["600   (published: 30,293 on one A100-80G)", "500"]


@pytest.mark.parametrize("updates", [1, 3, 10])
def test_update_axes_have_whole_numbers_only(drawn, tmp_path, monkeypatch, updates):
    folder = write_run(tmp_path / "a")
    write_rows(folder, [evaluation(0, 32_000.0), *(update(step) for step in range(1, updates + 1)), evaluation(updates, 300.0)])
    panels = [drawn(curves, name, [folder]).axes[0] for name in ("draw_loss", "draw_perplexity")]
    panels += curves_of(folder, monkeypatch).axes
    for panel in panels:
        found = labels_of(panel.xaxis)
        assert found
        assert all(text.isdigit() for text in found)


def test_the_last_perplexity_stands_beside_the_lines(tmp_path, monkeypatch):
    """To the right of where they end; the legend above the panel."""
    folder = write_run(tmp_path / "a")
    steps = range(1, UPDATES + 1)
    write_rows(folder, [evaluation(0, 32_000.0), *map(update, steps), evaluation(UPDATES, 300.0)])
    panel = curves_of(folder, monkeypatch).axes[1]
    (label,) = panel.texts
    last = panel.transData.transform((UPDATES, 300.0))
    assert label.get_text() == "300.0"
    assert label.get_window_extent().x0 > last[0]
    assert panel.get_legend().get_window_extent().y0 >= panel.get_window_extent().y1


def curves_of(folder, monkeypatch):
    kept = []
    monkeypatch.setattr(curves, "save", lambda figure, path: kept.append(figure) or path)
    curves.draw_curves(read_run(folder), folder / "curves.png", "title")
    kept[0].canvas.draw()
    return kept[0]
