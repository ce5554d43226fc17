"""The loss curve as text and as SVG."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from collegium.training.jobs.curve import HEIGHT, WIDTH, plot, svg
from collegium.training.jobs.losses import Loss

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda one: round(one, 6))
SERIES = st.lists(NUMBERS, min_size=1, max_size=200).map(
    lambda values: [Loss("train", 10 * at, value) for at, value in enumerate(values, 1)]
)


def test_a_falling_loss_falls() -> None:
    picture = plot([Loss("train", step, 10 / step) for step in range(1, 241)], width=40, height=4)
    title, *rows, axis, steps = picture.splitlines()
    assert title == "loss by step, train"
    assert len(rows) == 4
    assert rows[0].split("│")[0].strip() > rows[-1].split("│")[0].strip()
    assert rows[0].split("│")[1].startswith("█")
    assert rows[0].split("│")[1].endswith(" ")
    assert axis.endswith("─" * 40)
    assert steps.split() == ["1", "240"]


def test_each_stage_has_a_picture_and_what_is_no_number_has_none() -> None:
    losses = [Loss("train", 1, 2.0), Loss("train", 2, None), Loss("prefer", 1, 0.7)]
    assert plot([]) == plot([Loss("train", 1, None)]) == ""
    assert [line for line in plot(losses).splitlines() if line.startswith("loss")] == [
        "loss by step, train",
        "loss by step, prefer",
    ]
    assert svg(losses, "train law").count("<polyline") == 2


@given(SERIES)
def test_every_series_can_be_drawn(losses: list[Loss]) -> None:
    lines = plot(losses).splitlines()
    assert len({len(line) for line in lines[1:-2]}) == 1
    drawing = ET.fromstring(svg(losses, 'train <law> & "tax"'))
    numbers = [float(one) for one in re.findall(r"[-\d.]+", drawing.findall(".//{*}polyline")[0].get("points", ""))]
    assert all(math.isfinite(one) for one in numbers)
    assert all(0 <= x <= WIDTH for x in numbers[::2])
    assert all(0 <= y <= HEIGHT for y in numbers[1::2])
    texts = [one.text for one in drawing.findall(".//{*}text")]
    assert {"step", "loss (nats a token)", "train", 'train <law> & "tax"'} <= set(texts)
    assert len(texts) >= 6, "both axes have labels"


def test_without_a_loss_the_axes_are_there() -> None:
    drawing = ET.fromstring(svg([], "train law"))
    assert drawing.findall(".//{*}polyline") == []
    assert drawing.findall(".//{*}text")
