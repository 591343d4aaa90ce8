"""Which checkpoints stay."""

import math

import jax.numpy as jnp
import pytest

from bd3_jax.checkpoints.orbax import Checkpoints, steps

NLLS = {1: 5.0, 2: 2.0, 4: 3.0, 5: 2.5, 7: 4.0}


def validation(step, nll, **other):
    return {"step": step, "eval/split": "validation", "eval/estimator": "exact", "eval/nll": nll, **other}


def save(workdir, session, validations, *keep):
    checkpoints = Checkpoints(workdir, *keep, validations)
    for step in session:
        checkpoints.save(step, {"x": jnp.zeros(2)}, {"rows": step})
    checkpoints.close()


@pytest.mark.parametrize(
    ("keep", "every", "best", "kept"),
    [
        (2, 0, 0, [6, 7]),
        (1, 3, 0, [3, 6, 7]),
        (1, 0, 1, [2, 7]),
        (1, 0, 2, [2, 5, 7]),
        (2, 4, 1, [2, 4, 6, 7]),
    ],
)
def test_the_last_those_of_every_so_many_steps_and_the_best(tmp_path, keep, every, best, kept):
    """Over two sessions."""
    for session in ((1, 2, 3, 4), (5, 6, 7)):
        save(tmp_path, session, [validation(*pair) for pair in NLLS.items()], keep, every, best)
    assert steps(tmp_path) == kept


def test_a_validation_may_come_after_the_checkpoint(tmp_path):
    validations = []
    checkpoints = Checkpoints(tmp_path, 1, 0, 1, validations)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": jnp.zeros(2)}, {"rows": step})
        validations.append(validation(step, float(step)))
    checkpoints.close()
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("nll", [None, math.nan, -math.inf, "2.0"])
def test_what_is_no_nll_is_not_the_best(tmp_path, nll):
    save(tmp_path, (1, 2, 3), [validation(1, 3.0), validation(2, nll), validation(3, 5.0)], 1, 0, 1)
    assert steps(tmp_path) == [1, 3]


@pytest.mark.parametrize(
    "change", [{"eval/split": "test"}, {"eval/estimator": "monte_carlo"}, {"eval/sequences": 8}, {"eval/insert_eos": 0}]
)
def test_validations_of_two_kinds_are_not_ranked_together(tmp_path, change):
    """The best of each stays, however their figures compare."""
    found = [validation(1, 2.0), validation(2, 3.0), validation(3, 8.0, **change), validation(4, 9.0, **change)]
    save(tmp_path, (1, 2, 3, 4, 5), found, 1, 0, 1)
    assert steps(tmp_path) == [1, 3, 5]
