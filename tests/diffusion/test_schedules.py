import math

import numpy as np
import pytest

from bd3_jax.config import EPS
from bd3_jax.diffusion.schedules import SCHEDULES, get_schedule

# Where p is not clamped; cosine's loss scale has p + eps in the denominator.
DENOMINATOR = {"cosine": lambda p: p + EPS}


@pytest.mark.parametrize("name", SCHEDULES)
def test_loss_scale_is_the_logarithmic_derivative(name):
    """s = alpha' / (1 - alpha) = -p' / p, by central differences."""
    schedule = get_schedule(name)
    t, h = np.linspace(0.1, 0.95, 18, dtype=np.float32), np.float32(2**-7)
    slope = (np.float64(schedule.move_chance(t + h)) - np.float64(schedule.move_chance(t - h))) / (2 * h)
    expected = -slope / DENOMINATOR.get(name, lambda p: p)(np.float64(schedule.move_chance(t)))
    np.testing.assert_allclose(schedule.loss_scale(t), expected, rtol=2e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_chance_grows_from_about_0_to_about_1(name):
    t = np.linspace(EPS, 1, 1000, dtype=np.float32)
    chance = np.asarray(get_schedule(name).move_chance(t))
    assert (np.diff(chance) >= 0).all()
    assert chance[0] <= math.sqrt(EPS) + 1e-6
    assert 1 - EPS - 1e-6 <= chance[-1] <= 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_total_noise(name):
    """-ln(1 - p), capped at -ln eps also where p = 1."""
    schedule, t = get_schedule(name), np.array([EPS, 0.3, 0.9, 0.9999, 1], np.float32)
    with np.errstate(divide="ignore"):
        expected = np.minimum(-np.log1p(-np.float64(schedule.move_chance(t))), -math.log(EPS))
    np.testing.assert_allclose(schedule.total_noise(t), expected, rtol=1e-3)
    assert schedule.total_noise(t)[-1] == pytest.approx(6.9077554, rel=1e-4)
