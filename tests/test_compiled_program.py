"""Reading the text of compiled programs: snippets as TPUs and GPUs print them, and a program for eight CPU devices counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.evaluation import compiled_program
from llada_jax.evaluation.compiled_program import Collective

SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}
"""


def only(text, devices=4):
    [found] = compiled_program.read(SUM + text, devices).collectives
    return found


def program(line, shape="bf16[8,16]{1,0:T(8,128)(2,1)}"):
    return f"""
ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {{
  %x = {shape} parameter(0)
  {line}
}}
"""


def test_sizes():
    assert compiled_program.size_of("bf16[2,3]{1,0:T(8,128)(2,1)}") == 12
    assert compiled_program.size_of("(f32[4]{0}, /*index=1*/pred[5], s4[3], token[], f8e4m3fn[2])") == 16 + 5 + 2 + 2 - 1 + 1
    with pytest.raises(ValueError, match="unknown element type"):
        compiled_program.size_of("q7[3]")
    with pytest.raises(ValueError, match="no ENTRY"):
        compiled_program.read("HloModule empty", 1)


@pytest.mark.parametrize("attribute, groups", [
    ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
    ("replica_groups={}", ((0, 1, 2, 3),)),
    ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
])  # fmt: skip
def test_groups(attribute, groups):
    line = f"ROOT %all-gather.1 = bf16[32,16] all-gather(%x), channel_id=1, {attribute}, dimensions={{0}}, use_global_device_ids=true"
    found = only(program(line))
    assert found.groups == groups and found.size == 2 * 8 * 16 and not found.asynchronous


def test_axes():
    mesh = {"data": 2, "fsdp": 1, "expert": 4}
    axes = lambda *groups: compiled_program.axes_of(groups, mesh)
    assert axes((0, 1, 2, 3), (4, 5, 6, 7)) == ("expert",)
    assert axes((0, 4), (1, 5)) == ("data",) and axes(tuple(range(8))) == ("data", "expert") and axes((0,), (1,)) == ()
    assert axes((0, 5)) == ("data", "expert") and axes((0, 1), (2, 4, 5)) == ("data", "expert"), "groups of unequal size"


def test_tuples_and_start_and_done():
    found = only("""
ENTRY %main (x: f32[4], y: bf16[6]) -> f32[4] {
  %x = f32[4] parameter(0)
  %y = bf16[6] parameter(1)
  %all-reduce-start.3 = (f32[4], /*index=1*/bf16[6]) all-reduce-start(%x, %y), replica_groups={{0,1,2,3}}, to_apply=%sum, metadata={op_name="f/psum"}
  %all-reduce-done.3 = (f32[4], bf16[6]) all-reduce-done(%all-reduce-start.3)
  ROOT %r = f32[4] get-tuple-element(%all-reduce-done.3), index=0
}
""")
    assert found == Collective("all-reduce", "all-reduce-start.3", 16 + 12, 1, True, ((0, 1, 2, 3),), (), "f32[4] bf16[6]", "f/psum")
    synchronous = 'all-gather-start(%x), replica_groups={}, backend_config={"collective_backend_config":{"is_sync":true}}'
    assert not only(program(f"ROOT %all-gather-start = (bf16[8,16], bf16[32,16]) {synchronous}")).asynchronous


def test_an_asynchronous_wrapper():
    found = only("""
%wrapped (p: bf16[8]) -> bf16[2] {
  %p = bf16[8] parameter(0)
  ROOT %reduce-scatter.1 = bf16[2] reduce-scatter(%p), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%sum
}

ENTRY %main (x: bf16[8]) -> bf16[2] {
  %x = bf16[8] parameter(0)
  %async-start.1 = ((bf16[8]), bf16[2], u32[]) async-start(%x), calls=%wrapped
  ROOT %async-done.1 = bf16[2] async-done(%async-start.1)
}
""")
    assert (found.kind, found.size, found.asynchronous) == ("reduce-scatter", 16, True)


def test_permutations_and_ragged():
    permute = only(program("ROOT %collective-permute.1 = bf16[8,16] collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3}}"))
    assert (permute.kind, permute.groups, permute.size) == ("collective-permute", ((0, 1), (1, 0), (2, 3)), 256)
    ragged = only("""
ENTRY %main (x: bf16[8], out: bf16[12], s: s32[4]) -> bf16[12] {
  %x = bf16[8] parameter(0)
  %out = bf16[12] parameter(1)
  %s = s32[4] parameter(2)
  ROOT %ragged-all-to-all.1 = bf16[12] ragged-all-to-all(%x, %out, %s, %s, %s, %s), replica_groups={{0,1,2,3}}
}
""")
    assert (ragged.kind, ragged.size) == ("ragged-all-to-all", 16)


def test_a_fused_reduce_scatter():
    text = """
%NAME (input: bf16[8,16]) -> bf16[2,16] {
  %input = bf16[8,16] parameter(0)
  %all-reduce.1 = bf16[8,16] all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%sum
  %partition-id.1 = u32[] partition-id()
  ROOT %dynamic-slice.1 = bf16[2,16] dynamic-slice(%all-reduce.1, %partition-id.1, %partition-id.1), dynamic_slice_sizes={2,16}
}

ENTRY %main (x: bf16[8,16]) -> bf16[2,16] {
  %x = bf16[8,16] parameter(0)
  ROOT %fusion.1 = bf16[2,16] fusion(%x), kind=kCustom, calls=%NAME
}
"""
    assert only(text.replace("NAME", "all-reduce-scatter.2.clone")).kind == "reduce-scatter"
    assert only(text.replace("NAME", "fused_computation")).kind == "all-reduce", "sent whole, then cut"


def test_a_collective_in_pieces_beside_other_work():
    """TPUs: the start, what goes on inside other fusions, and the end all hold the instruction."""
    piece = 'bf16[32,16] all-gather(%p), channel_id=12, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="1"}'
    text = f"""
%begin (p: bf16[8,16]) -> bf16[32,16] {{
  %p = bf16[8,16] parameter(0)
  %all-gather.1 = {piece}
  ROOT %custom-call.1 = (bf16[32,16], u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (p: bf16[8,16]) -> bf16[32,16] {{
  %p = bf16[8,16] parameter(0)
  ROOT %all-gather.2 = {piece}
}}

ENTRY %main (x: bf16[8,16]) -> bf16[32,16] {{
  %x = bf16[8,16] parameter(0)
  %fusion.1 = (bf16[32,16], u32[]) fusion(%x), kind=kCustom, calls=%begin
  ROOT %fusion.2 = bf16[32,16] fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
}}
"""
    assert (only(text).count, only(text).asynchronous) == (1, True)
    twice = text.replace("%all-gather.2 = " + piece, "%all-gather.2 = " + piece.replace('chain_id="1"', 'chain_id="2"').replace("=12", "=13"))
    assert len(compiled_program.read(twice, 4).collectives) == 2


def test_transfers_between_slices():
    found = only("""
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8] parameter(0)
  %after-all.1 = token[] after-all()
  %send.1 = (f32[4,8], u32[], token[]) send(%x, %after-all.1), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[4,8], u32[], token[]) recv(%after-all.1), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %recv-done.1 = (f32[4,8], token[]) recv-done(%recv.1), channel_id=3
}
""")  # noqa: E501
    assert (found.kind, found.size, found.groups, found.asynchronous) == ("all-reduce", 128, ((0, 2), (1, 3)), True)


LOOPS = """
%wrapped_compare (p0: s32[], p1: s32[]) -> pred[] {
  %p0 = s32[] parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %lt.2 = pred[] compare(%p0, %p1), direction=LT
}

%inner_condition (t: (s32[], f32[4], s32[])) -> pred[] {
  %t = (s32[], f32[4], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=2
  ROOT %fused = pred[] fusion(%i, %n), kind=kLoop, calls=%wrapped_compare
}

%inner_body (t: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %t = (s32[], f32[4], s32[]) parameter(0)
  %v = f32[4] get-tuple-element(%t), index=1
  %all-reduce.7 = f32[4] all-reduce(%v), replica_groups={}, to_apply=%sum
  %kernel.3 = f32[4] custom-call(%all-reduce.7), custom_call_target="tpu_custom_call"
  ROOT %tuple.1 = (s32[], f32[4], s32[]) tuple(%t, %kernel.3, %t)
}

%outer_condition (t: (s32[], f32[4])) -> pred[] {
  %t = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer_body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]) parameter(0)
  %v = f32[4] get-tuple-element(%t), index=1
  %begin = s32[] constant(2)
  %begin.copy = s32[] copy(%begin)
  %end = s32[] END
  %tuple.2 = (s32[], f32[4], s32[]) tuple(%begin.copy, %v, %end)
  %while.1 = (s32[], f32[4], s32[]) while(%tuple.2), condition=%inner_condition, body=%inner_body
  ROOT %tuple.3 = (s32[], f32[4]) tuple(%t, %v)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %zero = s32[] constant(0)
  %tuple.4 = (s32[], f32[4]) tuple(%zero, %x)
  ROOT %while.2 = (s32[], f32[4]) while(%tuple.4), condition=%outer_condition, body=%outer_bodyKNOWN
}
"""


def test_loops_are_counted_out():
    count = lambda end, known="": (read := compiled_program.read(SUM + LOOPS.replace("END", end).replace("KNOWN", known), 4)) and (
        read.collectives[0].count, read.kernels["kernel"], read.open_loops)
    assert count("constant(9)") == (3 * (9 - 2), 21, ())
    assert count("get-tuple-element(%t), index=0") == (3, 3, ("while.1",)), "a count that is not constant: once"
    assert count("constant(9)", ', backend_config={"known_trip_count":{"n":"5"}}') == (35, 35, ()), "what XLA notes goes first"


def test_branches_stand_apart():
    text = """
%rare (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  ROOT %all-reduce.1 = f32[64] all-reduce(%p), replica_groups={}, to_apply=%sum
}

%often (p: f32[64]) -> f32[64] {
  %p = f32[64] parameter(0)
  %slice.1 = f32[8] slice(%p), slice={[0:8]}
  %all-reduce.2 = f32[8] all-reduce(%slice.1), replica_groups={}, to_apply=%sum
  ROOT %same = f32[64] copy(%p)
}

%quiet (p: f32[64]) -> f32[64] {
  ROOT %p = f32[64] parameter(0)
}

ENTRY %main (x: f32[64], s: s32[], b: pred[]) -> f32[64] {
  %x = f32[64] parameter(0)
  %s = s32[] parameter(1)
  %b = pred[] parameter(2)
  %all-reduce.3 = f32[64] all-reduce(%x), replica_groups={}, to_apply=%sum
  %conditional.1 = f32[64] conditional(%s, %x, %x), branch_computations={%often, %rare}
  ROOT %conditional.2 = f32[64] conditional(%b, %conditional.1, %x), true_computation=%rare, false_computation=%quiet
}
"""
    found = compiled_program.read(SUM + text, 4).collectives
    assert [(c.name, c.branches) for c in found] == [
        ("all-reduce.3", ()), ("all-reduce.2", (("conditional.1", "false"),)), ("all-reduce.1", (("conditional.1", "true"),)),
        ("all-reduce.1", (("conditional.2", "true"),))]
    assert [c.name for c in compiled_program.usual(found)] == ["all-reduce.3", "all-reduce.2"]


def test_kernels_of_gpus():
    line = 'ROOT %pallas_call.3 = bf16[8,16] custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 1, name = "route"}'
    assert compiled_program.read(program(line), 1).kernels == {"route": 1}


# ---- a program for eight CPU devices ------------------------------------------------------------------------------------


def test_a_real_program_counted_by_hand():
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("a", "b"), devices=jax.devices()[:8], axis_types=automatic)

    def local(x, n):
        def layer(x, _):
            scattered = jax.lax.psum_scatter(2 * jax.lax.all_gather(x, "b", tiled=True), "b", tiled=True)
            return jax.lax.fori_loop(0, 3, lambda i, y: jax.lax.ppermute(y, "b", [(0, 1), (1, 2), (2, 3), (3, 0)]), scattered), None
        x, _ = jax.lax.scan(layer, x, length=5)
        x = jax.lax.fori_loop(0, n, lambda i, x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True) + 1, x)
        large = jax.lax.pmax(jnp.max(x), ("a", "b")) > 3
        return jax.lax.cond(large, lambda x: jax.lax.psum(x, "b"), lambda x: jax.lax.psum(2 * x, ("a", "b")) + 1, x)

    split = PartitionSpec("a")
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split, check_vma=False))
    x = jax.ShapeDtypeStruct((32, 16), np.float32, sharding=NamedSharding(mesh, split))
    read = compiled_program.read(run.lower(x, jax.ShapeDtypeStruct((), np.int32)).compile().as_text(), 8)
    shard = 32 // 2 * 16 * 4  # bytes of x on a device
    found = [(c.kind, c.size, c.count, compiled_program.axes_of(c.groups, {"a": 2, "b": 4}), [label for _, label in c.branches])
             for c in read.collectives]
    assert sorted(found) == sorted([
        ("all-gather", shard, 5, ("b",), []), ("reduce-scatter", 4 * shard, 5, ("b",), []), ("collective-permute", shard, 15, ("b",), []),
        ("all-to-all", shard, 1, ("a",), []), ("all-reduce", 4, 1, ("a", "b"), []),
        ("all-reduce", shard, 1, ("b",), ["true"]), ("all-reduce", shard, 1, ("a", "b"), ["false"])])
    assert len(read.open_loops) == 1 and not read.kernels, "the loop of n rounds"
