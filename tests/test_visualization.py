"""A curve is drawn as it is, in a figure and in plain characters."""

import sys

import pytest

from hf_guide.initialization.report import InitializationReport
from hf_guide.visualization import loss_curves, plot_explained_variance, plot_training, text_plot, width_reaching

CURVE = [0.4, 0.7, 0.9, 1.0]


def test_width_reaching_is_the_first_width_with_that_share():
    assert [width_reaching(CURVE, share) for share in (0.1, 0.4, 0.41, 0.9, 0.91, 1.0)] == [1, 1, 2, 3, 4, 4]


def test_figure_shows_the_curve_and_the_chosen_width(tmp_path):
    pytest.importorskip("matplotlib")
    report = InitializationReport(
        "t",
        None,
        "A",
        "A",
        {},
        "0",
        "0",
        1,
        1,
        explained_variance={"embed": CURVE},
        sizes={"embed": [4, 2], "mlp": [9, 3]},
    )
    figure = plot_explained_variance(report, tmp_path / "curve.png")
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [1, 2, 3, 4] and list(line.get_ydata()) == CURVE
    assert [text.get_text() for text in figure.axes[0].texts] == ["2: 70.0%"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_figure_draws_one_line_for_each_axis(tmp_path):
    pytest.importorskip("matplotlib")
    figure = plot_explained_variance({"encoder": CURVE, "decoder": CURVE[1:]})
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["encoder", "decoder"]
    assert len(plot_explained_variance(CURVE).axes[0].lines) == 1


def test_nothing_to_draw_is_an_error():
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no variance curve"):
        plot_explained_variance({})


def test_losses_are_drawn_at_their_steps(tmp_path):
    pytest.importorskip("matplotlib")
    history = [
        {"step": 10, "loss": 3.0, "learning_rate": 1e-3},
        {"step": 10, "eval_loss": 3.5, "eval_runtime": 1.0},
        {"step": 20, "loss": float("nan")},
        {"step": 20, "eval_loss": 2.5},
        {"step": 30, "loss": 2.0},
        {"train_runtime": 9.0, "train_loss": 2.5},
    ]
    figure = plot_training(history, tmp_path / "training.png")
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}
    assert lines == {"training": ([10, 30], [3.0, 2.0]), "evaluation": ([10, 20], [3.5, 2.5])}
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert loss_curves(history[:2]) == {}
    with pytest.raises(ValueError, match="fewer than two steps"):
        plot_training(history[:2])


def test_without_matplotlib_the_error_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_explained_variance(CURVE)


def test_text_plot_rises_to_the_right_and_fits_the_terminal():
    lines = text_plot([(i + 1) / 500 for i in range(500)], columns=50, lines=10).splitlines()
    bars = [line[7:].ljust(50) for line in lines[:10]]
    heights = [sum(row[column] == "#" for row in bars) for column in range(50)]
    assert heights == sorted(heights) and heights[-1] == 10 and heights[0] <= 1
    assert lines[0].startswith(" 100% |") and max(map(len, lines)) == 57
    assert lines[-1].split() == ["1", "250", "500"]


def test_text_plot_of_a_narrow_stream():
    assert len(text_plot([1.0]).splitlines()) == 14
