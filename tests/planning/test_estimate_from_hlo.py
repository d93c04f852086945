"""A program's text added up: products, kernels, loops, links and what they hold up, by hand.

Excerpts are cut from what libtpu 0.0.42 printed for v5e and v5p; a chip of round figures runs them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from llmjax.core.chips import CHIPS
from llmjax.parallel.collectives import Collective, collectives
from llmjax.parallel.hlo import walk
from llmjax.planning.estimate_from_hlo import estimate_from_hlo, link_s
from tests.reference.hlo_flops import product_flops, program_flops

# A cycle a second, a byte a second on each of four links, half of one between slices.
ROUND = dataclasses.replace(
  CHIPS["v5e"], clock_hz=1.0, links=4, link_rate=1.0, dcn_rate=0.5, flops={"bfloat16": 1e9}
)
MESH = AbstractMesh((2, 4), ("data", "fsdp"))


def _program(*lines: str, others: str = "") -> str:
  body = "\n  ".join(("%x = f32[4,8]{1,0} parameter(0)", *lines))
  return f"HloModule m\n{others}\nENTRY %main (x: f32[4,8]) -> f32[4,8] {{\n  {body}\n}}\n"


def _count(text: str, slices: int = 1, **asked):
  return estimate_from_hlo(text, collectives(text, MESH, slices), ROUND, **asked)


def _product(made: str, code: str, left: str, right: str, attributes: str) -> int:
  text = _program(
    f"%l = {left} constant(0)", f"%r = {right} constant(0)",
    f"%y = {made} {code}(%l, /*index=1*/%r), {attributes}",
  )
  return sum(product_flops(run.op, run.body) for run in walk(text))


@pytest.mark.parametrize(
  ("made", "left", "right", "attributes", "flops"),
  [
    (  # bqhd,bkhd->bhqk
      "bf16[4,8,256,128]{3,2,1,0}", "bf16[4,256,8,64]{1,3,2,0}", "bf16[4,128,8,64]{1,3,2,0}",
      "window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=0b1f_0o1i->01bf",
      2 * 4 * 8 * 256 * 128 * 64,
    ),
    (  # edf,etd->etf
      "bf16[8,128,512]{2,1,0}", "bf16[8,128,256]{2,1,0}", "bf16[8,256,512]{2,1,0}",
      "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf", 2 * 8 * 128 * 512 * 256,
    ),
    (  # btd,dnh->btnh
      "bf16[4,256,8,64]{1,3,2,0}", "bf16[4,256,512,1]{2,1,3,0}", "bf16[512,8,64,1]{0,2,1,3}",
      "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
      2 * 4 * 256 * 512 * 8 * 64,
    ),
    (  # btnh,btd->dnh
      "bf16[512,8,64,1]{0,2,1,3}", "bf16[4,256,512,1]{2,1,3,0}", "bf16[4,256,8,64]{1,3,2,0}",
      "window={size=8x4 pad=7_7x0_0 rhs_reversal=1x0}, dim_labels=1fb0_1i0o->b0f1",
      2 * 4 * 256 * 512 * 8 * 64,
    ),
    (  # btd,btf->df
      "f32[4096,11008,1]{1,0,2}", "bf16[4,2048,4096]{2,1,0}", "bf16[4,2048,11008]{2,1,0}",
      "window={size=4}, dim_labels=0fb_0io->bf0", 2 * 4 * 2048 * 4096 * 11008,
    ),
    (  # bf,fd->bd: no window at all
      "bf16[16,32]{1,0}", "bf16[16,8]{1,0}", "bf16[8,32]{1,0}", "dim_labels=bf_io->bf",
      2 * 16 * 32 * 8,
    ),
    (  # places 0 to 3, window of 3, one of padding at either end: 2 + 3 + 3 + 2 values met
      "f32[1,4,5]{2,1,0}", "f32[1,4,7]{2,1,0}", "f32[3,7,5]{2,1,0}",
      "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 10 * 7 * 5,
    ),
    (  # the same two apart, window's places three apart: 0 and 3, of 2 and 5 there is none
      "f32[1,2,5]{2,1,0}", "f32[1,4,7]{2,1,0}", "f32[2,7,5]{2,1,0}",
      "window={size=2 stride=2 pad=0_2 rhs_dilate=3}, dim_labels=b0f_0io->b0f", 2 * 3 * 7 * 5,
    ),
    (  # four groups of features: a kernel's place reads two of eight
      "f32[1,6,12]{2,1,0}", "f32[1,6,8]{2,1,0}", "f32[1,2,12]{2,1,0}",
      "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=4", 2 * 6 * 12 * 2,
    ),
  ],
)
def test_products_written_as_convolutions(made, left, right, attributes, flops):
  assert _product(made, "convolution", left, right, attributes) == flops


def test_dots_sum_over_what_they_say():
  batched = "lhs_batch_dims={0}, lhs_contracting_dims={2,3}, rhs_batch_dims={0}"
  shapes = "f32[5,3,9]{2,1,0}", "dot", "f32[5,3,2,4]{3,2,1,0}", "f32[5,2,4,9]{3,2,1,0}"
  assert _product(*shapes, batched) == 2 * 5 * 3 * 9 * 8
  outer = "f32[3,9]", "dot", "f32[3]{0}", "f32[9]{0}", "lhs_contracting_dims={}"
  assert _product(*outer) == 2 * 27
  assert _product("f32[3]", "add", "f32[3]{0}", "f32[3]{0}", "") == 0


def test_xla_counts_the_same_where_there_is_no_loop():
  """Its own count of a program of products alone; padding, dilation and groups included."""
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  convolve = jax.lax.conv_general_dilated
  programs = {
    lambda x, y: jnp.einsum("bqhd,bkhd->bhqk", x, y): (f32(2, 16, 3, 8), f32(2, 12, 3, 8)),
    lambda x, y: convolve(x, y, (2, 1), ((1, 2), (0, 3)), (1, 2), (2, 1)): (
      f32(2, 8, 9, 10), f32(6, 8, 3, 2),
    ),
    lambda x, y: convolve(x, y, (1, 1), "SAME", feature_group_count=4): (
      f32(2, 8, 9, 10), f32(12, 2, 3, 3),
    ),
  }
  for program, arrays in programs.items():
    compiled = jax.jit(program).lower(*arrays).compile()
    counted = sum(product_flops(run.op, run.body) for run in walk(compiled.as_text()))
    assert counted == compiled.cost_analysis()["flops"] > 0


LOOP = """
%fused (a: f32[4,8]) -> f32[4,4] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %d = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (s: (f32[4,8])) -> (f32[4,8]) {
  %s = (f32[4,8]{1,0}) parameter(0)
  %v = f32[4,8]{1,0} get-tuple-element(%s), index=0
  %f = f32[4,4] fusion(%v), calls=%fused, backend_config={"estimated_cycles":"5"}
  %g = f32[4,4] fusion(%v), calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %t = (f32[4,8]{1,0}) tuple(%v)
}

%condition (s.1: (f32[4,8])) -> pred[] {
  %s.1 = (f32[4,8]{1,0}) parameter(0)
  ROOT %p = pred[] constant(true)
}
"""


def test_a_loop_counts_by_its_trips():
  """Two dots of 2 · 4 · 4 · 8 FLOPs; one fusion of five cycles, one without an estimate."""
  trips = 'backend_config={"known_trip_count":{"n":"7"}}'
  lines = (
    "%t = (f32[4,8]) tuple(%x)",
    f"%l = (f32[4,8]) while(%t), condition=%condition, body=%body, {trips}",
    '%c = f32[4,8] copy(%x), backend_config={"estimated_cycles":"3"}',
  )
  text = _program(*lines, others=LOOP)
  found = _count(text)
  assert program_flops(text, 1e-9, ROUND) == 7 * 2 * 256 + 1  # and a kernel's nanosecond
  assert (found.fusions_s, found.exposed_s, found.step_s) == (38, 0, 38)


BRANCHES = """
%short (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %g = f32[4,8] all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %c = f32[4,8] copy(%g), backend_config={"estimated_cycles":"5"}
}

%inner (a.1: f32[4,8]) -> f32[4,8] {
  %a.1 = f32[4,8]{1,0} parameter(0)
  %d = f32[4,4]{1,0} dot(%a.1, %a.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %c = f32[4,8] copy(%a.1), backend_config={"estimated_cycles":"2"}
}

%long (a.2: f32[4,8]) -> f32[4,8] {
  %a.2 = f32[4,8]{1,0} parameter(0)
  %c = f32[4,8] copy(%a.2), backend_config={"estimated_cycles":"4"}
  ROOT %i = f32[4,8] conditional(%p, %c, %c), branch_computations={%inner, %inner}
}
"""


def test_the_longest_branch_is_the_one_that_is_waited_for():
  """5 cycles and a sum over links, against 4 and twice 2 of which one is run; twice in a row."""
  lines = [
    f"%{name} = f32[4,8] conditional(%p, %x, %x), branch_computations={{%short, %long}}"
    for name in "ab"
  ]
  found = _count(_program("%p = pred[] constant(true)", *lines, others=BRANCHES))
  assert (found.fusions_s, found.ici_s, found.exposed_s) == (12, 0, 0)


NOTES = 'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
NOTES += '"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata={op_name="jit(step)/pallas_call"}'


def _kernel(name: str, made: str, *operands: str, **asked):
  operands = [f"%o{i} = {shape} parameter({i})" for i, shape in enumerate(operands)]
  names = ", ".join(f"%o{i}" for i in range(len(operands)))
  return _count(_program(*operands, f"%{name} = {made} custom-call({names}), {NOTES}"), **asked)


QUERY, KEY, VALUE = "bf16[3,8,2048,192]", "bf16[3,2,4096,192]", "bf16[3,2,4096,128]"
PAIRS = 2 * 3 * 8 * 2048 * 4096  # multiply-adds as two, rows, heads, queries, keys


@pytest.mark.parametrize(
  ("name", "made", "width", "block"),
  [
    ("splash_mha_fwd_segmented_residuals.3.clone.1", "bf16[3,8,2048,128]", 192 + 128, 512),
    ("splash_mqa_fwd_no_residuals", "bf16[3,8,2048,128]", 192 + 128, 512),
    # Scores, weights' gradients, values' and keys'.
    ("splash_mha_dkv_no_residuals.1", f"({KEY}, {VALUE})", 2 * 192 + 2 * 128, 1024),
    # And queries', a part for each block of keys.
    ("splash_mha_dkv.2", f"(bf16[4,3,8,2048,192], {KEY}, {VALUE})", 3 * 192 + 2 * 128, 1024),
    ("splash_mha_dq", QUERY, 2 * 192 + 128, 512),
  ],
)
def test_attention_by_formula(name, made, width, block):
  """Half of the blocks are asked to be seen; the table is 4 × 4 with one side cut short."""
  asked = []
  table = "s8[1,2,4]" if "dkv" in name else "s8[1,4,2]"
  operands = (table, table, QUERY, KEY, VALUE, "s32[3,2048,128]", "f32[3,8,8,2048]")
  found = _kernel(name, made, *operands, seen=lambda *given: asked.append(given) or 0.5)
  assert asked == [(4096, block)]
  assert found.kernels_s == found.step_s == PAIRS * width / 2 / 1e9


def test_grouped_products_by_formula():
  """Rows that are of no group are skipped; so is what is not known."""
  integers = ("s32[]", "s32[2]", "s32[32]", "s32[32]", "s32[1]")
  rows, others = "bf16[16384,512]", "bf16[16384,256]"
  flops = 2 * 16384 * 512 * 256
  found = _kernel("gmm.4", others, *integers, rows, "bf16[8,512,256]", filled=0.25)
  assert found.kernels_s == flops / 4 / 1e9
  found = _kernel("tgmm", "f32[8,512,256]", *integers, rows, others)
  assert found.kernels_s == flops / 1e9
  assert _kernel("mine.1", rows, rows).step_s == 0


CHAIN = """
%start (p: f32[2,8]) -> f32[8,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %a = f32[8,8] all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, \
frontend_attributes={chain_id="3"}
}
"""


def test_a_device_waits_for_what_work_does_not_cover():
  """A gather of 256 bytes in fours: 192 pass on two links, 96 s. 60 s of work stand beside it."""
  lines = (
    "%h = f32[2,8]{1,0} constant(0)",
    "%s = f32[8,8] fusion(%h), kind=kCustom, calls=%start",
    '%w = f32[4,8] copy(%x), backend_config={"estimated_cycles":"60"}',
    "%d = f32[8,8] fusion(%s), kind=kCustom, calls=%start",
    '%v = f32[4,8] copy(%x), backend_config={"estimated_cycles":"500"}',
  )
  found = _count(_program(*lines, others=CHAIN))
  assert (found.ici_s, found.exposed_s, found.step_s) == (96, 36, 596)
  ready = _count(_program(*lines[:3], lines[4], lines[3], others=CHAIN))
  assert (ready.ici_s, ready.exposed_s, ready.step_s) == (96, 0, 560)


def test_collectives_take_turns_on_links():
  """Two gathers of 96 s begun at once, waited for after 60 s and 10 s more: 36 s and 86 s."""
  lines = ["%h = f32[2,8]{1,0} constant(0)"]
  groups = "replica_groups={{0,1,2,3},{4,5,6,7}}"
  for name in "ab":
    lines.append(f"%{name} = (f32[2,8], f32[8,8]) all-gather-start(%h), {groups}")
  for name, cycles in (("a", 60), ("b", 10)):
    lines.append(f'%w{name} = f32[4] copy(%x), backend_config={{"estimated_cycles":"{cycles}"}}')
    lines.append(f"%d{name} = f32[8,8] all-gather-done(%{name})")
  found = _count(_program(*lines))
  assert (found.ici_s, found.exposed_s, found.step_s) == (192, 36 + 86, 192)


def test_work_inside_an_asynchronous_computation_is_found_again():
  lines = (
    "%h = f32[2,8]{1,0} constant(0)",
    "%s = ((f32[2,8]), f32[8,8], u32[]) async-start(%h), calls=%start",
    '%w = f32[4,8] copy(%x), backend_config={"estimated_cycles":"60"}',
    "%u = ((f32[2,8]), f32[8,8], u32[]) async-update(%s)",
    "%d = f32[8,8] async-done(%u)",
  )
  others = CHAIN.replace(', frontend_attributes={chain_id="3"}', "")
  assert _count(_program(*lines, others=others)).exposed_s == 36
  copying = others.replace("%start", "%copying").replace("all-gather(", "copy(")
  lines = (
    lines[0],
    lines[1].replace("%start", "%copying"),
    "%g = f32[8,8] all-gather(%h), replica_groups={{0,1,2,3},{4,5,6,7}}",
    *lines[2:],
  )
  assert _count(_program(*lines, others=copying)).exposed_s == 96


SEND = """is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.89_0",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="KIND"}"""


def _sent(kind: str, slices: int = 2):
  noted = SEND.replace("KIND", kind)
  lines = (
    "%t = token[] after-all()",
    f"%s = (f32[4,8]{{1,0}}, u32[], token[]) send(%x, %t), channel_id=8, {noted}",
    f"%r = (f32[4,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=7, {noted}",
    "%g = f32[4,8] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add",
    '%w = f32[4,8] copy(%x), backend_config={"estimated_cycles":"10"}',
    "%e = token[] send-done(%s), channel_id=8, is_host_transfer=true",
    "%d = (f32[4,8]{1,0}, token[]) recv-done(%r), channel_id=7, is_host_transfer=true",
  )
  return _program(*lines).replace("HloModule m", "HloModule m, num_partitions=4")


def test_what_crosses_slices_is_sent_by_hosts():
  """128 bytes in each of two slices: reduced 2 · 64, at half a byte a second 256 s. In the slice
  four devices reduce 128 bytes: 2 · 96 on two links, 96 s, all waited for, which the others see."""
  text = _sent("ALL_REDUCE")
  slow, fast = collectives(text, MESH, 2)
  assert (slow.kind, slow.axes, slow.bytes, slow.shards) == ("all-reduce", ("data",), 128, 2)
  assert (fast.kind, fast.axes, fast.bytes, fast.shards) == ("all-reduce", ("fsdp",), 128, 4)
  assert (slow.dcn, slow.start, slow.done) == (True, 2, 7)
  assert (fast.dcn, fast.start, fast.done) == (False, 4, 4)
  found = _count(text, 2)
  assert (found.ici_s, found.dcn_s, found.exposed_s, found.step_s) == (96, 256, 96 + 150, 256)


def test_every_transfer_has_its_kind():
  assert "all-to-all" in {one.kind for one in collectives(_sent("ALL_TO_ALL"), MESH, 2)}
  for written, kind in (("ONE_TO_ONE", "collective-permute"), ("ALL_GATHER", "all-gather")):
    slow = collectives(_sent(written), MESH, 2)[0]
    assert (slow.kind, slow.bytes) == (kind, 256 if kind == "all-gather" else 128)


def test_links_by_the_compilers_own_strategy():
  """Rings one way or both; where nothing is said, one both ways."""
  noted = '"collective_algorithm_config":{"emitter":"E","strategy":"S","debug":"\\nS{colors:C p'
  groups = "replica_groups={{0,1,2,3},{4,5,6,7}}"

  def links(strategy, colors):
    config = noted.replace("S", strategy).replace("C", str(colors))
    line = f"%g = f32[4,8] all-reduce(%x), {groups}, backend_config={{{config}"
    return collectives(_program(line), MESH)[0].links

  assert links("UniDirectionNDRingStrategy", 4) == 4
  assert links("StrategyND", 3) == 6
  assert links("StrategyRing", 1) == 2
  assert collectives(_program(f"%g = f32[4,8] all-reduce(%x), {groups}"), MESH)[0].links == 2


@pytest.mark.parametrize(
  ("kind", "shards", "seconds"),
  [
    ("all-gather", 4, 75), ("reduce-scatter", 4, 75), ("all-reduce", 4, 150),
    ("all-reduce", 2, 100), ("collective-permute", 4, 100), ("all-to-all", 4, 100),
    ("all-to-all", 16, 400), ("ragged-all-to-all", 2, 50),
  ],
)
def test_seconds_on_links(kind, shards, seconds):
  """100 bytes twice over two links of a byte a second; two devices share a chip's links."""
  one = Collective(kind, ("fsdp",), 100, 2, shards=shards)
  assert link_s(one, ROUND) == seconds
  two = dataclasses.replace(ROUND, devices=2)
  assert link_s(one, two) == 2 * seconds
  assert link_s(dataclasses.replace(one, links=6), ROUND) == seconds / 2
