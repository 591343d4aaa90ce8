"""Settings that are decided by platform."""

import dataclasses

from bd3_jax.config_dict import from_config_dict
from bd3_jax.configs import owt
from bd3_jax.models.platform import for_sampling, settle

MODEL = from_config_dict(owt.get_config("mdlm")).model


def test_nothing_is_left_open():
    for platform in ("cpu", "gpu", "tpu"):
        model = settle(MODEL, platform)
        assert "auto" not in dataclasses.astuple(model)
        assert model.attention_chunk * model.scan_unroll * model.max_logits > 0
        assert settle(model, platform) == model  # what is settled stays so
    assert settle(MODEL, "cpu").dtype == "float32"
    assert settle(MODEL, "tpu").dtype == settle(MODEL, "gpu").dtype == "bfloat16"


def test_what_is_set_stays():
    chosen = dataclasses.replace(
        MODEL, dtype="float32", attention="dense", attention_chunk=7, scan_unroll=3, max_logits=9
    )
    assert settle(chosen, "tpu") == chosen


def test_layers_are_unrolled_for_sampling_on_a_cpu():
    assert for_sampling(MODEL, "cpu").scan_unroll == MODEL.num_layers
    asked = dataclasses.replace(MODEL, scan_unroll=2)
    assert [for_sampling(*args) for args in ((MODEL, "tpu"), (MODEL, "gpu"), (asked, "cpu"))] == [MODEL, MODEL, asked]


def test_kernels_where_they_can_be():
    assert settle(MODEL, "tpu").attention == "flash"
    assert settle(dataclasses.replace(MODEL, attention="splash"), "tpu").attention == "splash"
    assert settle(dataclasses.replace(MODEL, length=1000), "tpu").attention == "decomposed"
    assert settle(MODEL, "gpu").attention == "decomposed"
    asked = dataclasses.replace(MODEL, attention="triton")
    assert [settle(asked, platform).attention for platform in ("gpu", "cuda", "tpu")] == ["triton"] * 2 + ["decomposed"]
    assert settle(asked, "gpu").attention_chunk == 64
    assert settle(dataclasses.replace(asked, length=1000), "gpu").attention == "decomposed"
    assert settle(dataclasses.replace(asked, num_heads=16), "gpu").attention == "decomposed"  # 48 wide
    for kernel in ("flash", "splash", "triton"):
        taken_to_a_laptop = dataclasses.replace(MODEL, attention=kernel)
        assert settle(taken_to_a_laptop, "cpu").attention == "decomposed"
