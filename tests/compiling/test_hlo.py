"""Reading what compilers print."""

from bd3_jax.compiling import hlo
from bd3_jax.compiling.hlo import Buffer, Collective

MODULE = """\
HloModule jit_update, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation (p: f32[1024]) -> f32[1024] {
  %huge = f32[99999,1024]{1,0} broadcast(%p)
  ROOT %r = f32[1024]{0} reduce(%huge)
}

%body (state: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %gathered = bf16[4,64]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={1}
  %product = f32[4,64]{1,0} fusion(%gathered), kind=kOutput, calls=%fused_computation, \
backend_config={"window_config":{"estimated_cycles":"50"}}
  ROOT %next = (s32[], bf16[4,8]) tuple(%i, %y)
}

%condition (state: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (param: f32[256]) -> f32[256] {
  %param = f32[512,512]{1,0} parameter(0)
  %made = f32[256,32]{1,0} fusion(%param), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(update)/mlp/dot_general"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  %loop = (s32[], bf16[4,8]) while(%t), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"11"}}
  %sum = (f32[100]{0}, bf16[50]{0}) all-reduce(%a, %b), replica_groups=mesh['data'=4,'tensor'=2] {'data'}, to_apply=%add
  %start = (f32[16]{0}, f32[128]{0}) all-gather-start(%c), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %done = f32[128]{0} all-gather-done(%start)
  %scattered = f32[10]{0} reduce-scatter(%d), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %moved = f32[256]{0} collective-permute(%e), source_target_pairs={{0,1},{1,0}}
}
"""


def test_every_collective_is_counted_with_its_group_and_its_loop():
    assert {(c.kind, c.group): c for c in hlo.collectives(MODULE, 8, 1)} == {
        ("all-gather", 4): Collective("all-gather", 4, 11, 11 * 512, 11 * 384),
        ("all-reduce", 4): Collective("all-reduce", 4, 1, 500, 750),
        ("all-gather", 8): Collective("all-gather", 8, 1, 512, 448),
        ("reduce-scatter", 2): Collective("reduce-scatter", 2, 1, 40, 40),
        ("collective-permute", 8): Collective("collective-permute", 8, 1, 1024, 1024),
    }


# As the TPU's compiler writes it: no known_trip_count, but a constant in the condition.
COUNTED = """\
%region_1.2_spmd (wide.param.1: (s32[], f32[16,256])) -> pred[] {
  %constant.53.clone.1 = s32[]{:T(128)} constant(12)
  %wide.param.1 = (s32[]{:T(128)}, f32[16,256]{1,0:T(8,128)S(1)}) parameter(0)
  %get-tuple-element.222 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.10 = pred[]{:T(512)} compare(%get-tuple-element.222, %constant.53.clone.1), direction=LT
}"""


def test_a_loop_turns_as_often_as_its_condition_says():
    head, rest = MODULE.split("%condition (state")
    told = rest.split("ENTRY")[1].replace(
        'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"11"}}',
        "condition=%region_1.2_spmd, body=%body",
    )
    module = f"{head}{COUNTED}\n\nENTRY{told}"
    gathered = next(c for c in hlo.collectives(module, 8, 1) if (c.kind, c.group) == ("all-gather", 4))
    assert gathered == Collective("all-gather", 4, 12, 12 * 512, 12 * 384)
    assert hlo.estimated_cycles(module, 5) == 7 + 12 * 50
    unknown = module.replace("constant(12)", "parameter(1)")
    assert hlo.estimated_cycles(unknown, 5) == 7 + 5 * 50
    gathered = next(c for c in hlo.collectives(unknown, 8, 5) if (c.kind, c.group) == ("all-gather", 4))
    assert gathered == Collective("all-gather", 4, 5, 5 * 512, 5 * 384)


def test_largest_arrays_are_those_that_exist_outside_fusions():
    assert hlo.largest_arrays(MODULE, 1) == [Buffer(32768, "f32[256,32]", "jit(update)/mlp/dot_general")]


def test_cycles_count_loops():
    assert hlo.estimated_cycles(MODULE, 1) == 7 + 11 * 50


def test_kernels_count_loops():
    call = '  %flash_forward.3 = bf16[4,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"\n'
    triton = '  %pallas_call.7 = bf16[4,8]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", '
    triton += 'backend_config={grid_x = 8 : i32, ir = "ML\\EFR", name = "triton_forward", num_warps = 4 : i32}\n'
    other = '  %room = u8[8]{0} custom-call(), custom_call_target="AllocateBuffer"\n'
    module = MODULE.replace("  %gathered =", f"{call}{other}{triton}  %gathered =")
    module = module.replace("  %made =", f"{call}  %made =", 1)
    assert hlo.kernels(module, 1) == {"flash_forward": 12, "triton_forward": 11}


def test_bytes_of_shapes():
    assert hlo.array_bytes("(f32[2,3]{1,0:T(8,128)}, s32[], bf16[4]{0})") == [24, 4, 8]


LISTED = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 33.49G of 15.75G hbm. \
Exceeded hbm capacity by 17.74G.

Total hbm usage >= 34.00G:
    reserved        258.00M

  Largest program allocations in hbm:

  1. Size: 768.00M
     Operator: op_name="jit(update)/mlp" source_file="x.py" source_line=3
     Shape: bf16[12,4,2048,4096]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 768.00M
     XLA label: fusion.1
     ==========================

  2. Size: 1.50G
     Shape: f32[4,2048,50258]{2,1,0:T(8,128)}
     XLA label: fusion.2
     ==========================
"""


def test_out_of_memory_messages():
    first, second = hlo.largest_buffers(LISTED)
    assert first == Buffer(3 * 2**29, "f32[4,2048,50258]{2,1,0:T(8,128)}", "")
    assert second == Buffer(768 * 2**20, "bf16[12,4,2048,4096]{3,2,1,0:T(8,128)(2,1)}", "jit(update)/mlp")
    assert hlo.needed(LISTED) == round(33.49 * 2**30)
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.00G) exceeds"
    )
    assert hlo.needed(short) == 40 * 2**30
    assert hlo.largest_buffers(short) == []
    assert hlo.needed("RESOURCE_EXHAUSTED: no figure") is None
