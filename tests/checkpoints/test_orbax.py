"""Checkpoints: what comes back, what is kept, and what is refused."""

import contextlib
import dataclasses
import errno
import os
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bd3_jax.checkpoints import run_folder
from bd3_jax.checkpoints.orbax import Checkpoints, latest_step, read_position, restore_params, steps, summarize
from bd3_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    ema: dict
    moments: tuple


@jax.jit
def make(step):
    params = {"a": jnp.arange(6.0).reshape(2, 3) + step, "blocks": {"b": jnp.arange(4.0) * step}}
    return State(step, params, jax.tree.map(lambda p: -p, params), (params, jnp.ones(())))


def equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture
def run(tmp_path, tiny_config):
    """A run with checkpoints 1, 2 and 3, of which the last two are kept."""
    config = tiny_config("bd3lm,block_size=4")
    run_folder.write_config(config, tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make(jnp.int32(step)), {"rows": 10 * step, "losses": [0.1, 1 / 3]})
    checkpoints.close()
    return config, tmp_path


def test_state_and_position_come_back(run):
    _, workdir = run
    checkpoints = Checkpoints(workdir, keep=2)
    _, state, position = checkpoints.restore(3, jax.eval_shape(make, jnp.int32(0)))
    checkpoints.close()
    equal(state, make(jnp.int32(3)))
    assert position == {"rows": 30, "losses": [0.1, 1 / 3]}


def test_the_last_are_kept(run):
    _, workdir = run
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "3"]
    assert latest_step(workdir) == 3


def test_what_is_saved_is_the_state_at_that_time(tmp_path):
    """Its buffers are given away to the next update while the files are being written."""
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {"x": jnp.zeros((512, 1024))}
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(0, state, {})
    for _ in range(5):
        state = jax.tree.map(advance, state)
    _, restored, _ = checkpoints.restore(0, jax.eval_shape(lambda: {"x": jnp.zeros((512, 1024))}))
    checkpoints.close()
    assert (restored["x"] == 0).all()


def test_a_full_disk_is_one_line(run, tmp_path, capfd):
    """Whatever the save or the wait for it finds; what was complete before stays."""
    checkpoints, state = Checkpoints(tmp_path, keep=5), {"x": jax.random.normal(jax.random.key(0), (512, 512))}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # no file may be larger
    try:
        with pytest.raises(UserError, match=r"cannot write a checkpoint in .*: File too large; the last .* is 3, from"):
            [checkpoints.save(step, state, {}, None) for step in (4, 5)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        with contextlib.suppress(UserError):
            checkpoints.close()
    assert latest_step(tmp_path) == 3
    assert "Traceback" not in capfd.readouterr().err


def test_an_unfinished_save_is_not_read(run):
    _, workdir = run
    unfinished = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert latest_step(workdir) == 3
    Checkpoints(workdir, keep=2).close()
    assert latest_step(workdir) == 3


@pytest.mark.parametrize(("weights", "sign"), [("raw", 1), ("ema", -1)])
def test_parameters_alone(run, weights, sign):
    config, workdir = run
    params, step = restore_params(config, workdir, weights)
    assert step == 3
    equal(params, jax.tree.map(lambda p: sign * p, make(jnp.int32(3)).params))


def test_a_checkpoint_by_its_step(run):
    config, workdir = run
    params, step = restore_params(config, workdir, "raw", step=2)
    assert step == 2
    equal(params, make(jnp.int32(2)).params)
    for read in (lambda: restore_params(config, workdir, "raw", step=1), lambda: summarize(workdir, 1)):
        with pytest.raises(UserError, match=r"has no checkpoint of step 1; allowed: 2, 3$"):
            read()


def test_parameters_with_a_sharding(run):
    config, workdir = run
    everywhere = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())
    params, _ = restore_params(config, workdir, "ema", everywhere)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(params))


def test_no_checkpoint(tmp_path, tiny_config):
    with pytest.raises(UserError, match=rf"{tmp_path}/nowhere has no checkpoint"):
        restore_params(tiny_config("ar"), tmp_path / "nowhere", "ema")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("string", "overrides", "message"),
    [
        ("bd3lm,block_size=4", {"model.width": 48}, "config.model.width is 48, but .*/config.json has 32"),
        ("bd3lm,block_size=8", {}, "config.block_size is 8, but .* has 4"),
        ("mdlm", {}, "config.objective is 'mdlm', but .* has 'bd3lm'"),
    ],
)
def test_another_architecture(run, tiny_config, string, overrides, message):
    with pytest.raises(UserError, match=message):
        restore_params(tiny_config(string, **overrides), run[1], "ema")


def test_settings_that_do_not_matter_to_the_parameters(run, tiny_config):
    other = tiny_config("bd3lm,block_size=4", **{"sampling.nucleus": 0.5, "optimizer.learning_rate": 1.0})
    assert restore_params(other, run[1], "ema")[1] == 3


def test_missing_or_damaged_settings(run):
    config, workdir = run
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(workdir / "config.json")
        with pytest.raises(UserError, match=r"config.json, the settings of the run, cannot be read"):
            restore_params(config, workdir, "ema")


def damage_index(checkpoint):
    (checkpoint / "state" / "_METADATA").write_text("{")


def damage_arrays(checkpoint):
    for path in (checkpoint / "state").glob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_position(checkpoint):
    (checkpoint / "position" / "metadata").unlink()


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("damage", [damage_index, damage_arrays, damage_position, empty])
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(run, capsys, files_in, damage):
    _, workdir = run
    damage(workdir / "checkpoints" / "3")
    before = files_in(workdir / "checkpoints" / "3")
    checkpoints = Checkpoints(workdir, keep=2)
    step, state, position = checkpoints.restore(3, jax.eval_shape(make, jnp.int32(0)))
    assert (step, position["rows"]) == (2, 20)
    equal(state, make(jnp.int32(2)))
    (warning,) = capsys.readouterr().err.splitlines()
    assert re.match(r"warning: .*checkpoints: passed over the damaged checkpoint 3 \(.*\); used 2", warning)
    assert files_in(workdir / "checkpoints" / "3.damaged") == before
    checkpoints.save(3, make(jnp.int32(30)), {"rows": 31})
    checkpoints.close()
    assert latest_step(workdir) == 3
    assert Checkpoints(workdir, keep=2).restore(3, jax.eval_shape(make, jnp.int32(0)))[2] == {"rows": 31}


@pytest.mark.parametrize("damage", [damage_index, damage_arrays, empty])
def test_parameters_of_the_checkpoint_before_a_damaged_one(run, capsys, files_in, damage):
    config, workdir = run
    damage(workdir / "checkpoints" / "3")
    before = files_in(workdir)
    params, step = restore_params(config, workdir, "raw")
    assert step == 2
    equal(params, make(jnp.int32(2)).params)
    assert "passed over the damaged checkpoint 3" in capsys.readouterr().err
    assert files_in(workdir) == before
    with pytest.raises(UserError, match=r"no checkpoint can be read, of 3 \("):
        restore_params(config, workdir, "raw", step=3)


class HttpError(Exception):
    """As that of gcsfs."""


HttpError.__module__ = "gcsfs.retry"


def wrapped(message):
    """As Orbax passes on what TensorStore says of one array."""
    try:
        raise ValueError(message)
    except ValueError as error:
        caught = Exception("Encountered error while reading array index")
        caught.__cause__ = error
        return caught


PASSING = {
    "too many open files": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
    "no permission": (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a"), "Permission denied"),
    "a server that is away": (wrapped("UNKNOWN: a [os_error_code='116']"), "Stale file handle"),
    "a bucket that is away": (wrapped("UNAVAILABLE: HTTP 503"), "ValueError: UNAVAILABLE: HTTP 503"),
    "a bucket's files": (HttpError("Service Unavailable, 503"), "HttpError: Service Unavailable, 503"),
    "a bucket without permission": (OSError("Forbidden: b/o"), "Forbidden: b/o"),
    "a bucket that is slow": (TimeoutError(), "TimeoutError"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_no_damage(run, files_in, monkeypatch, name):
    """Of the newest checkpoint: nobody goes on from the one before, and nothing is renamed."""
    config, workdir = run
    error, reason = PASSING[name]

    def fail(*args, **options):
        raise error

    before = files_in(workdir)
    checkpoints = Checkpoints(workdir, keep=2)
    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
    message = f"checkpoints: checkpoint 3 cannot be read now: {re.escape(reason)}; nothing was changed; allowed: the"
    for read in (
        lambda: checkpoints.restore(3, jax.eval_shape(make, jnp.int32(0))),
        lambda: restore_params(config, workdir, "ema"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1
    assert files_in(workdir) == before


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO])
@pytest.mark.parametrize("text", [False, True])
def test_what_the_system_says_of_damage(run, monkeypatch, number, text):
    error = wrapped(f"UNKNOWN: a [os_error_code='{number}']") if text else OSError(number, os.strerror(number))
    real = Checkpoints._restore

    def restore(self, abstract, stream, step):
        if step == 3:
            raise error
        return real(self, abstract, stream, step)

    monkeypatch.setattr(Checkpoints, "_restore", restore)
    assert Checkpoints(run[1], keep=2).restore(3, jax.eval_shape(make, jnp.int32(0)))[0] == 2


def test_a_file_that_cannot_be_opened_is_no_damage(run, files_in):
    """TensorStore itself says so, of a link that leads to itself."""
    _, workdir = run
    for path in (workdir / "checkpoints" / "3" / "state" / "d").iterdir():
        path.unlink()
        path.symlink_to(path.name)
    checkpoints = Checkpoints(workdir, keep=2)
    with pytest.raises(UserError, match="checkpoint 3 cannot be read now: Too many levels of symbolic links; nothing"):
        checkpoints.restore(3, jax.eval_shape(make, jnp.int32(0)))
    assert steps(workdir) == [2, 3]


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[1]", "\xff"])
def test_a_damaged_position_is_none(run, content):
    path = run[1] / "checkpoints" / "3" / "position" / "metadata"
    path.write_text(content, encoding="latin-1")
    assert read_position(run[1], 3) is None
    assert read_position(run[1], 2) == {"rows": 20, "losses": [0.1, 1 / 3]}
    assert read_position(run[1], 1) is None


def test_a_position_that_cannot_be_read_now(run, monkeypatch):
    def fail(*args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.read_text", fail)
    with pytest.raises(UserError, match="checkpoint 3 cannot be read now: Permission denied; nothing was changed"):
        read_position(run[1], 3)


def test_no_checkpoint_that_can_be_read(run):
    config, workdir = run
    for step in "23":
        damage_arrays(workdir / "checkpoints" / step)
    checkpoints = Checkpoints(workdir, keep=2)
    for read in (
        lambda: restore_params(config, workdir, "ema"),
        lambda: summarize(workdir),
        lambda: checkpoints.restore(3, jax.eval_shape(make, jnp.int32(0))),
    ):
        with pytest.raises(UserError, match=r"checkpoints: no checkpoint can be read, of 3 \(.*\); 2 \(.*\); put a"):
            read()
    assert latest_step(workdir) == 3
