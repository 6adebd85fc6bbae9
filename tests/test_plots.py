"""Figures as SVG: words stay words, and the same numbers give the same file."""

from __future__ import annotations

from fewbits.plots import bars, curves


def test_text_is_text_and_equal_figures_are_equal() -> None:
    series = {"clipped STE#0": [(0.0, 3.0), (1.0, 2.0)], "clipped STE#1": [(0.0, 3.5), (1.0, 2.5)]}
    svg = curves(series, x_label="step", y_label="loss (nats)")
    assert svg.startswith("<svg")
    assert "loss (nats)</text>" in svg
    assert svg.count("clipped STE</text>") == 1  # one entry of the legend for both seeds
    assert curves(series, x_label="step", y_label="loss (nats)") == svg
    assert curves({**series, "other": [(0.0, 1.0)]}, x_label="step", y_label="loss (nats)") != svg


def test_bars_show_their_mean() -> None:
    svg = bars({"a": [1.0, 3.0]}, y_label="perplexity")
    assert ">2</text>" in svg
