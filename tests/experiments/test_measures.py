"""What experiments share: curves of training; and the picture of schedules."""

import json

import pytest
from etils import epath


def test_a_curve_of_training(script, tmp_path):
    """Of steps that a run did twice the last record counts; validations have no training loss."""
    losses = {50: 9.0, 100: 7.0, 200: 6.0, 250: 5.0}
    records = [{"step": 0, "eval/nll": 8.0}, {"step": 50, "train/loss": 100.0}, {"step": 250, "train/loss": None}]
    records += [{"step": step, "train/loss": loss} for step, loss in losses.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curve = script("measures").loss_curve(epath.Path(tmp_path))
    assert curve == {"step": [200, 400], "loss": pytest.approx([22 / 3, 5], abs=1e-4)}


def test_curves_are_told_from_models(script):
    measures, curve = script("measures"), {"step": [200], "loss": [5.0]}
    cells = [
        {"settings": {"curve": "AR", "seed": 1, "steps": 6}, "figures": curve},
        {"settings": {"model": "AR", "seed": 1, "steps": 6}, "figures": {"rows": [2.0, 4.0], "counted": 2}},
        {"settings": {"curve": "AR", "seed": 1, "steps": 7}, "figures": {}},
    ]
    assert measures.curves(cells, 6) == {"AR": {1: curve}}
    assert measures.by_model(cells, 6)["AR"][1].tolist() == [1, 2]


def test_when_the_plateau_was_left(script):
    curves = {"MDLM": {0: {"step": [200, 400, 600, 800], "loss": [7.0, 6.0, 5.9, 5.5]}}}
    assert script("likelihood").left_plateau(curves)[-1] == "| MDLM | 600 | 6.00 |"


def test_the_picture_of_schedules(script):
    figures = {"nll": 0.0, "block_variance": 3.0, "standard_error": 0.5}
    panels = script("schedules").plot({(4, "log"): figures, (4, "square"): figures, (16, "log"): figures}).axes
    assert [panel.get_title() for panel in panels] == ["B = 4", "B = 16"]
    assert [len(panel.containers) for panel in panels] == [2, 1]
