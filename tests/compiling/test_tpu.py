"""With the TPU's compiler, in an environment of its own: `make test-tpu` makes it."""

import importlib.util
import json

import pytest

from bd3_jax import cli
from bd3_jax.compiling.report import Report
from bd3_jax.compiling.targets import GIB
from bd3_jax.configs import text8
from tests.compiling.test_run import TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"),
]


@pytest.fixture
def compile_tiny(tmp_path):
    """Compiles with flags; (exit status, report or None)."""
    path, file = tmp_path / "tiny.py", tmp_path / "figures.json"
    path.write_text(TINY)

    def compile_with(*flags):
        try:
            status = cli.main(["compile", f"--config={path}:bd3lm,block_size=4", f"--json={file}", *flags])
        except SystemExit as exit_info:
            status = exit_info.code
        return status, Report.from_record(json.loads(file.read_text())[0]) if file.exists() else None

    return compile_with


@pytest.mark.parametrize("string", ["ar", "mdlm", "sedd", "bd3lm,block_size=4"])
def test_a_recipe_of_every_objective_fits_its_machine(string):
    """Those of text8; experiments/compile_report.py compiles all."""
    assert cli.main(["compile", f"--config=configs/text8.py:{string}", f"--topology={text8.TOPOLOGY}"]) == 0


def test_two_slices_exchange_gradients_alone(compile_tiny):
    """Within a slice parameters are split over four chips; what goes between slices is among pairs."""
    status, report = compile_tiny(
        "--topology=2xv5e:2x2", "--config.mesh.data=2", "--config.mesh.fsdp=4",
        "--config.training.batch_size=8", "--config.eval.batch_size=8",
    )  # fmt: skip
    assert status == 0
    assert report.chips == 8
    assert {c.group for c in report.collectives} <= {2, 4, 8}
    assert any(c.kind == "all-gather" and c.group == 4 for c in report.collectives)


# Sizes that have kernels; blocks of 12 are divided otherwise than those of a power of 2.
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_attention_compiles_for_every_chip(compile_tiny, topology, copies):
    length, block_size = (128, 4) if copies == 1 else (384, 12)
    status, report = compile_tiny(
        f"--topology={topology}", f"--config.model.length={length}", f"--config.block_size={block_size}",
        f"--config.training.noise_copies={copies}", "--config.model.width=128",
    )  # fmt: skip
    assert status == 0
    assert report.chips == 4
    assert sum(c.count for c in report.collectives) >= 1
    assert report.cycles > 0
    assert report.moved_bytes > 0
    splash = ("splash_mha_fwd_residuals", "splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals")
    ours = ("flash_forward", "flash_backward")
    assert report.kernels == dict.fromkeys(ours if 128 % block_size == 0 else splash, 2)  # of two layers


@pytest.mark.parametrize("batch_size", [1, 64])
def test_drawing_a_token_moves_little_but_weights_and_context(compile_tiny, batch_size):
    """Stored blocks leave the rest of the context where it is."""
    status, report = compile_tiny(
        "--topology=v5e:1x1", "--mode=sample", f"--config.sampling.batch_size={batch_size}",
        "--config.model.length=1024", "--config.model.width=256", "--config.model.num_layers=4",
    )  # fmt: skip
    assert (status, report.chips) == (0, 1)
    assert report.call_bytes < 1.5 * report.call_floor


def test_the_compiler_says_what_does_not_fit(compile_tiny):
    """16,384 rows of 1,024 tokens on a chip: its own error is the verdict."""
    status, report = compile_tiny(
        "--topology=v5e:2x2", "--config.training.batch_size=65536", "--config.model.length=1024"
    )  # fmt: skip
    assert status == 1
    assert not report.fits
    assert report.needed > report.available == int(15.75 * GIB)
    assert report.largest
    assert any("batch_size" in setting for setting in report.advice)


def test_a_shape_that_is_not_built(compile_tiny, capsys):
    status, _ = compile_tiny("--topology=v5e:3x7")
    assert status == 2
    assert "no machine that its compiler knows" in capsys.readouterr().err
