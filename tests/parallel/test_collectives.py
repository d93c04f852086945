"""Collectives read out of program text: group notations, bytes, loops, what TPU programs look like.

The TPU excerpts are cut from what libtpu 0.0.42 printed for small programs on v5e.
"""

import dataclasses

import pytest
from jax.sharding import AbstractMesh

from llmjax.core.errors import UserError
from llmjax.parallel.collectives import Collective, collectives, describe, summary

MESH = AbstractMesh((2, 1, 2, 2), ("data", "context", "fsdp", "tensor"))


def _program(*lines: str, others: str = "") -> str:
  body = "\n  ".join(("%x = f32[4,8]{1,0} parameter(0)", *lines))
  head = f"HloModule m, num_partitions=8\n{others}\nENTRY %main (x: f32[4,8]) -> f32[4,8] {{\n"
  return f"{head}  {body}\n}}\n"


def _read(*lines: str, others: str = "") -> list[tuple]:
  found = collectives(_program(*lines, others=others), MESH)
  return [(one.kind, one.axes, one.bytes, one.count) for one in found]


def _axes(attributes: str, code: str = "all-reduce") -> tuple:
  found = _read(f"%y = f32[4,8]{{1,0}} {code}(%x), channel_id=1, {attributes}, to_apply=%add")
  return found[0][1] if found else ()


@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
    ("{{2,0},{1,3},{4,6},{7,5}}", ("fsdp",)),
    ("{{0,1,4,5},{2,3,6,7}}", ("data", "tensor")),
    ("{{0,1,2,3,4,5,6,7}}", ("data", "fsdp", "tensor")),
    ("{}", ("data", "fsdp", "tensor")),
    ("[4,2]<=[8]", ("tensor",)),
    ("[2,4]<=[8]", ("fsdp", "tensor")),
    ("[4,2]<=[2,4]T(1,0)", ("data",)),
    ("[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
    ("[1,8]<=[8]", ("data", "fsdp", "tensor")),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
    ("mesh['axis_0'=8] {'axis_0':(1)2}", ("data",)),
    ("mesh['axis_0'=8] {'axis_0':(2)2}", ("fsdp",)),
    ("mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}", ("data", "tensor")),
    ("mesh[a=2,b=4] {a,b:(2)2}", ("data", "tensor")),
    ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", ("tensor",)),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("tensor",)),
    ("{{0,3},{1,2},{4,7},{5,6}}", ("?",)),
    ("{{0,1,2},{3},{4,5,6,7}}", ("?",)),
    ("{{0,1}}", ("?",)),
    ("{{0,1,2},{4,5,6}}", ("?",)),
    ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
    ("{{0}}", ()),
    ("[8,1]<=[8]", ()),
    ("mesh['axis_0'=8,'axis_1'=1] {'axis_1'}", ()),
  ],
)
def test_every_notation_of_groups_names_the_axes(groups, axes):
  assert _axes(f"replica_groups={groups}, use_global_device_ids=true") == axes


@pytest.mark.parametrize(
  ("pairs", "axes"),
  [
    ("{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}", ("tensor",)),
    ("{{0,4},{1,5}}", ("data",)),
    ("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", ("fsdp", "tensor")),
    ("{{0,0},{1,1}}", ()),
    ("{}", ()),
  ],
)
def test_a_permute_runs_along_the_axes_its_pairs_cross(pairs, axes):
  assert _axes(f"source_target_pairs={pairs}", "collective-permute") == axes


def test_a_ring_that_wraps_is_one_axis():
  mesh = AbstractMesh((2, 4), ("data", "fsdp"))
  ring = "{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}"
  text = _program(f"%y = f32[4,8] collective-permute(%x), source_target_pairs={{{ring}}}")
  assert collectives(text, mesh)[0].axes == ("fsdp",)


FSDP = "replica_groups={{0,2},{1,3},{4,6},{5,7}}"


@pytest.mark.parametrize(
  ("line", "kind", "size"),
  [
    ("f32[4,8]{1,0} all-reduce(%x)", "all-reduce", 128),
    ("f32[8,8]{1,0} all-gather(%x)", "all-gather", 256),
    ("f32[2,8]{1,0} reduce-scatter(%x)", "reduce-scatter", 128),
    ("f32[4,8]{1,0} all-to-all(%x)", "all-to-all", 128),
    ("(f32[4,8]{1,0}, bf16[3]{0:T(128)(2,1)S(1)}) all-reduce(%x, %h)", "all-reduce", 134),
    ("(f32[8,8]{1,0}, bf16[6]{0}) all-gather(%x, /*index=1*/%h)", "all-gather", 268),
    ("(f32[4,8], f32[8,8], u32[]{:S(2)}) all-gather-start(%x)", "all-gather", 256),
    ("((f32[4,8]), f32[2,8], u32[]) reduce-scatter-start(%x)", "reduce-scatter", 128),
    ("s4[3]{0:E(4)} collective-broadcast(%n)", "collective-broadcast", 2),
    ("pred[3]{0} all-reduce(%p)", "all-reduce", 3),
    ("f8e4m3fn[3]{0} all-reduce(%e)", "all-reduce", 3),
    ("f32[4,8]{1,0} all-reduce(f32[4,8]{1,0:T(8,128)} %x)", "all-reduce", 128),
    ("f32[4,8]{1,0} ragged-all-to-all(%x, %o, %i, %i, %i, %i)", "ragged-all-to-all", 128),
  ],
)
def test_bytes_are_those_of_the_whole(line, kind, size):
  operands = (
    "%h = bf16[3]{0:T(128)(2,1)} constant(0)",
    "%n = s4[3]{0:E(4)} constant(0)",
    "%p = pred[3]{0} constant(0)",
    "%e = f8e4m3fn[3]{0} constant(0)",
    "%o = f32[64,8]{1,0} constant(0)",
    "%i = s32[2]{0} constant(0)",
  )
  done = "%z = f32[8,8] all-gather-done(%y)"
  assert _read(*operands, f"%y = {line}, {FSDP}", done) == [(kind, ("fsdp",), size, 1)]


REDUCING = f"""
%reducing (p: f32[4,8]) -> f32[4,8] {{
  %p = f32[4,8]{{1,0}} parameter(0)
  ROOT %r = f32[4,8]{{1,0}} all-reduce(%p), {FSDP}
}}
"""


def test_an_asynchronous_computation_counts_once():
  lines = (
    "%s = ((f32[4,8]), f32[4,8], u32[]) async-start(%x), calls=%reducing",
    "%u = ((f32[4,8]), f32[4,8], u32[]) async-update(%s), calls=%reducing",
    "%d = f32[4,8] async-done(%u), calls=%reducing",
  )
  assert _read(*lines, others=REDUCING) == [("all-reduce", ("fsdp",), 128, 1)]


def test_a_computation_counts_as_often_as_it_is_called():
  lines = (
    "%a = f32[4,8] call(%x), to_apply=%reducing",
    "%b = f32[4,8] call(%a), to_apply=%reducing",
  )
  assert _read(*lines, others=REDUCING) == [("all-reduce", ("fsdp",), 128, 1)] * 2


def test_every_branch_of_a_conditional_counts_once():
  lines = (
    "%a = f32[4,8] conditional(%i, %x, %x), branch_computations={%reducing, %reducing}",
    "%b = f32[4,8] conditional(%i, %x, %x), true_computation=%reducing, false_computation=%other",
  )
  other = REDUCING.replace("%reducing", "%other")
  assert len(_read(*lines, others=REDUCING + other)) == 4


def _loop(compare="compare(%i, %n), direction=LT", step=1, start=0, note=""):
  """A loop around `reducing` and a call of it: state is (x, counter); at most 12."""
  others = f"""{REDUCING}
%body (s: (f32[4,8], u32[])) -> (f32[4,8], u32[]) {{
  %s = (f32[4,8]{{1,0:T(8,128)}}, u32[]{{:T(128)}}) parameter(0)
  %one = u32[]{{:T(128)}} constant({step})
  %v = f32[4,8]{{1,0}} get-tuple-element(%s), index=0
  %i = u32[]{{:T(128)}} get-tuple-element(%s), index=1
  %copy = u32[]{{:T(128)S(6)}} copy(%i)
  %next = u32[]{{:T(128)}} add(%copy, %one)
  %w = f32[4,8]{{1,0}} call(%v), to_apply=%reducing
  ROOT %out = (f32[4,8]{{1,0}}, u32[]{{:T(128)}}) tuple(%w, /*index=1*/%next)
}}

%condition (s.1: (f32[4,8], u32[])) -> pred[] {{
  %s.1 = (f32[4,8]{{1,0:T(8,128)}}, u32[]{{:T(128)}}) parameter(0)
  %n = u32[]{{:T(128)}} constant(12)
  %i = u32[]{{:T(128)}} get-tuple-element(%s.1), index=1
  ROOT %lt = pred[]{{:T(512)}} {compare}
}}
"""
  lines = (
    f"%c = u32[] constant({start})",
    "%t = (f32[4,8], u32[]) tuple(%x, %c)",
    f"%l = (f32[4,8], u32[]) while(%t), condition=%condition, body=%body{note}",
  )
  return [count for *_, count in _read(*lines, others=others)]


def test_trip_counts_are_read_from_counter_start_step_and_limit():
  known = ', backend_config={"known_init_step":{"init":"0"},"known_trip_count":{"n":"7"}}'
  assert _loop(note=known) == [7]
  assert _loop() == [12]
  assert _loop(step=2) == [6]
  assert _loop(step=5, start=1) == [3]
  assert _loop("compare(%i, %n), direction=GT", step=-1, start=14) == [2]
  assert _loop("custom-call(%i, %n)") == [1]
  assert _loop(step="{...}") == [1]


TPU = """
%add (a: bf16[], b: bf16[]) -> bf16[] {
  %b = bf16[]{:T(256)} parameter(1)
  %a = bf16[]{:T(256)} parameter(0)
  ROOT %sum = bf16[]{:T(256)} add(%a, %b)
}

%all-reduce-scatter.1 (input.4: bf16[16,8]) -> bf16[16,4] {
  %input.4 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.16 = bf16[16,8]{1,0:T(8,128)(2,1)} all-reduce(%input.4), channel_id=12, GROUPS
  %zero = u32[]{:T(128)} constant(0)
  ROOT %slice.59 = bf16[16,4]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.16, %zero, %zero)
}

%start (param_0.84: bf16[16,4]) -> bf16[16,8] {
  %param_0.84 = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(0)
  %gather = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.84), channel_id=1, GROUPS, CHAIN
  ROOT %copy = bf16[16,8]{1,0:T(8,128)(2,1)} copy(%gather)
}
"""


def test_tpu_fusions_are_read():
  """Two overlapped gathers of one channel, each in a start and a done; a scatter as a fusion."""
  text = TPU.replace("GROUPS", FSDP)
  first, second = (
    text.replace("CHAIN", f'frontend_attributes={{chain_id="{chain}"}}') for chain in (0, 1)
  )
  second = second[second.index("%start") :].replace("%start", "%other")
  name = 'metadata={op_name="jit(step)/dot_general" stack_frame_id=17}'
  lines = (
    "%h = bf16[16,4]{1,0:T(8,128)(2,1)} constant(0)",
    "%g = bf16[16,8]{1,0:T(8,128)(2,1)} constant(0)",
    "%s = bf16[16,8] fusion(%h), kind=kCustom, calls=%start",
    "%o = bf16[16,8] fusion(%h), kind=kCustom, calls=%other",
    "%d = bf16[16,8] fusion(%s), kind=kCustom, calls=%start",
    "%e = bf16[16,8] fusion(%o), kind=kCustom, calls=%other",
    f"%f = bf16[16,4] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, {name}",
  )
  found = collectives(_program(*lines, others=first + second), MESH)
  gather = Collective("all-gather", ("fsdp",), 256, shards=2)
  first, second = (dataclasses.replace(gather, start=s, done=d) for s, d in ((5, 13), (9, 17)))
  scatter = Collective("reduce-scatter", ("fsdp",), 256, shards=2)
  assert found == [first, second, dataclasses.replace(scatter, start=21, done=21)]
  assert [one.overlapped for one in found] == [True, True, False]


def test_summary_and_description():
  found = [
    Collective("all-gather", ("fsdp",), 1_000_000, 6),
    Collective("all-gather", ("fsdp",), 1_800_000, 2),
    Collective("all-reduce", ("data", "fsdp"), 300),
  ]
  gather, reduce = ("all-gather", ("fsdp",)), ("all-reduce", ("data", "fsdp"))
  assert summary(found) == {gather: 9_600_000, reduce: 300}
  assert describe(found[::-1]) == "all-gather fsdp 9.16 MiB in 8, all-reduce data+fsdp 0.29 KiB"
  assert describe([]) == "no collectives"


def test_what_cannot_be_read_is_an_error():
  with pytest.raises(UserError, match="8 devices, the mesh has 4"):
    collectives(_program(), AbstractMesh((4,), ("data",)))
  with pytest.raises(UserError, match="ENTRY"):
    collectives("module @jit_f {}", MESH)
  with pytest.raises(UserError, match="form not known"):
    _axes("replica_groups=@groups")
