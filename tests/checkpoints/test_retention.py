"""Which checkpoints stay."""

import math

import jax.numpy as jnp
import pytest

from bd3_jax.checkpoints.orbax import Checkpoints, steps

SCORES = {1: 5.0, 2: 2.0, 3: None, 4: 3.0, 5: 2.5, 6: None, 7: 4.0}


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
    """Over two sessions: the scores of the first are remembered."""
    for session in ((1, 2, 3, 4), (5, 6, 7)):
        checkpoints = Checkpoints(tmp_path, keep, every, best)
        for step in session:
            checkpoints.save(step, {"x": jnp.zeros(2)}, {"rows": step}, score=SCORES[step])
        checkpoints.close()
    assert steps(tmp_path) == kept


@pytest.mark.parametrize("content", ["", "{", "[2.0]", '{"score": null}', '{"score": NaN}', '{"score": -Infinity}'])
def test_a_damaged_score_is_none(tmp_path, content):
    """The run begins all the same, and that checkpoint is not the best."""
    scores = {1: 3.0, 2: 2.0, 3: 5.0}
    checkpoints = Checkpoints(tmp_path, keep=3, best=1)
    for step, score in scores.items():
        checkpoints.save(step, {"x": jnp.zeros(2)}, {"rows": step}, score=score)
    checkpoints.close()
    (tmp_path / "checkpoints" / "2" / "score" / "metadata").write_text(content)
    checkpoints = Checkpoints(tmp_path, keep=1, best=1)
    for step, score in {4: math.nan, 5: 4.0}.items():
        checkpoints.save(step, {"x": jnp.zeros(2)}, {"rows": step}, score=score)
    checkpoints.close()
    assert steps(tmp_path) == [1, 5]
