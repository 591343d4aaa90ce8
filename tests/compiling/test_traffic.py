"""Bytes of a compiled program: by hand, and beside the compiler's own count where the two mean the same."""

import jax
import jax.numpy as jnp
import pytest

from bd3_jax.compiling import programs, traffic
from tests.compiling.test_programs import tiny

MODULE = """\
HloModule jit_step, is_scheduled=true

%slicing (weights: bf16[12,64,64], n: s32[], x: bf16[8,64]) -> bf16[8,64] {
  %weights = bf16[12,64,64]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %x = bf16[8,64]{1,0} parameter(2)
  %part = bf16[1,64,64]{2,1,0} dynamic-slice(%weights, %n, %zero, %zero), dynamic_slice_sizes={1,64,64}
  %square = bf16[64,64]{1,0} bitcast(%part)
  ROOT %product = bf16[8,64]{1,0} convolution(%x, %square), dim_labels=bf_io->bf
}

%storing (ring: f32[100,64], new: f32[4,64], n: s32[]) -> f32[100,64] {
  %ring.1 = f32[100,64]{1,0} parameter(0)
  %new = f32[4,64]{1,0} parameter(1)
  %n.1 = s32[] parameter(2)
  ROOT %stored = f32[100,64]{1,0} dynamic-update-slice(%ring.1, %new, %n.1, %zero)
}

%layers (state: (s32[], bf16[8,64], bf16[12,64,64])) -> (s32[], bf16[8,64], bf16[12,64,64]) {
  %state = (s32[], bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[12,64,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%state), index=1
  %weights.1 = bf16[12,64,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%state), index=2
  %out = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} fusion(%weights.1, %i, %x.1), kind=kOutput, calls=%slicing
  ROOT %next = (s32[], bf16[8,64], bf16[12,64,64]) tuple(%i, %out, %weights.1)
}

%fewer (state.1: (s32[], bf16[8,64], bf16[12,64,64])) -> pred[] {
  %state.1 = (s32[], bf16[8,64], bf16[12,64,64]) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %limit = s32[]{:T(128)} constant(11)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%look (state.2: (pred[], f32[1000])) -> (pred[], f32[1000]) {
  %state.2 = (pred[], f32[1000]) parameter(0)
  %go = pred[] get-tuple-element(%state.2), index=0
  %y = f32[1000]{0} get-tuple-element(%state.2), index=1
  %z = f32[1000]{0} negate(%y)
  ROOT %next.1 = (pred[], f32[1000]) tuple(%go, %z)
}

%going (state.3: (pred[], f32[1000])) -> pred[] {
  %state.3 = (pred[], f32[1000]) parameter(0)
  ROOT %go.1 = pred[] get-tuple-element(%state.3), index=0
}

ENTRY %main (a: f32[100,64], b: f32[4,64], c: bf16[12,64,64]) -> f32[100,64] {
  %a = f32[100,64]{1,0} parameter(0)
  %b = f32[4,64]{1,0} parameter(1)
  %c = bf16[12,64,64]{2,1,0} parameter(2)
  %copy-start = (f32[4,64]{1,0:S(1)}, f32[4,64]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %near = f32[4,64]{1,0:S(1)} copy-done(%copy-start)
  %t = (s32[], bf16[8,64], bf16[12,64,64]) tuple(%zero, %x.2, %c)
  %loop = (s32[], bf16[8,64], bf16[12,64,64]) while(%t), condition=%fewer, body=%layers
  %u = (pred[], f32[1000]) tuple(%yes, %y.1)
  %unknown = (pred[], f32[1000]) while(%u), condition=%going, body=%look
  ROOT %kept = f32[100,64]{1,0} fusion(%a, %near, %zero), kind=kLoop, calls=%storing
}
"""


@pytest.mark.parametrize("turns", [1, 5])
def test_by_hand(turns):
    one_layer, near, stored, look = 2 * 64 * 64, 4 * 4 * 64, 4 * 4 * 64, 2 * 4 * 1000
    # The indices are scalars.
    assert traffic.moved(MODULE, turns) == pytest.approx(11 * one_layer + near + stored + turns * look, abs=11 * 4 + 8)


def test_as_the_compiler_counts_where_nothing_turns():
    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))
    compiled = jax.jit(lambda x, w: jnp.tanh(x @ w) @ w).lower(x, w).compile()
    assert traffic.moved(compiled.as_text(), 1) == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.05)


def test_what_a_network_call_has_to_move():
    program = programs.trace(tiny("bd3lm,block_size=4"), "sample", jax.devices()[:1], "tpu", 300)
    assert (program.calls.number, program.calls.repeated) == (16, 3)
    embedding = 2 * 300 * 16  # bytes of bfloat16, of which a few rows are read
    assert program.calls.floor == program.held["weights for sampling"] - embedding + program.held["context of samples"]
    assert programs.trace(tiny("mdlm"), "sample", jax.devices()[:1], "cpu", 300).calls is None
