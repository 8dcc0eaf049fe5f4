import pytest

from zamba2_jax.plan.hlo import traffic

# Every case of the reader, in the forms of the CPU's and the TPU's compilers.
MODULE = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (stack: f32[5,100], i: s32[]) -> f32[100] {
  %stack = f32[5,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,100]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,100}
  ROOT %row = f32[100]{0} bitcast(%slice)
}

%all-reduce-scatter.1 (x: bf16[80]) -> bf16[20] {
  %x = bf16[80]{0} parameter(0)
  %all-reduce.1 = bf16[80]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %own = bf16[20]{0} slice(%all-reduce.1), slice={[0:20]}
}

%body (loop: (s32[], f32[5,100], f32[100], bf16[80])) -> (s32[], f32[5,100], f32[100], bf16[80]) {
  %loop = (s32[], f32[5,100]{1,0}, f32[100]{0}, bf16[80]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%loop), index=0
  %stack.1 = f32[5,100]{1,0} get-tuple-element(%loop), index=1
  %x.1 = bf16[80]{0} get-tuple-element(%loop), index=3
  %row.1 = f32[100]{0} fusion(%stack.1, %i.1), kind=kLoop, calls=%sliced
  %kept = f32[100]{0:T(128)S(1)} negate(%row.1)
  %fetch = (f32[100]{0}, f32[100]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%row.1)
  %fetched = f32[100]{0:T(128)S(1)} copy-done(%fetch)
  %cut = ((f32[100]{0}), f32[25]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%row.1), slice={[0:25]}
  %cut.1 = f32[25]{0:T(128)S(1)} slice-done(%cut)
  %return = (f32[100]{0}, f32[100]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%fetched)
  %scattered = bf16[20]{0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], f32[5,100]{1,0}, f32[100]{0}, bf16[80]{0}) tuple(%i.1, %stack.1, %row.1, %x.1)
}

%condition (loop.1: (s32[], f32[5,100], f32[100], bf16[80])) -> pred[] {
  %loop.1 = (s32[], f32[5,100]{1,0}, f32[100]{0}, bf16[80]{0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[5,100], f32[100], bf16[80]), q: f32[30]) -> f32[100] {
  %p = (s32[], f32[5,100]{1,0}, f32[100]{0}, bf16[80]{0}) parameter(0)
  %q = f32[30]{0} parameter(1)
  %gather-start = (f32[30]{0}, f32[90]{0}) all-gather-start(%q), replica_groups={{0,1,2},{3,4,5}}, dimensions={0}
  %gathered = f32[90]{0} all-gather-done(%gather-start)
  %moved = f32[90]{0} collective-permute(%gathered), source_target_pairs={{0,1},{1,0}}
  %run = (s32[], f32[5,100]{1,0}, f32[100]{0}, bf16[80]{0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %last = f32[100]{0} get-tuple-element(%run), index=2
}
"""  # noqa: E501


@pytest.mark.parametrize(
    "groups", ["[2,3]<=[6]", "mesh['a'=3,'b'=2] {'a'}", "mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'a'}"]
)
def test_groups_in_every_form(groups):
    module = MODULE.replace("{{0,1,2},{3,4,5}}", groups)
    assert traffic(module) == traffic(MODULE)
    with pytest.raises(ValueError, match=r"in a form that is not known here: .*all-gather-start"):
        traffic(MODULE.replace("{{0,1,2},{3,4,5}}", "?"))


def test_traffic_by_hand():
    found = traffic(MODULE)
    assert found.collectives == {"all-gather": 1, "collective-permute": 1, "reduce-scatter": 5}
    # A ring sends all but its own part: of 360 bytes gathered from 3, of 160 reduced by 4, five times.
    assert found.sent == pytest.approx({"all-gather": 240, "collective-permute": 360, "reduce-scatter": 5 * 120})
    row = 400 + 4 + 400  # the slice, its index, the result
    # What is kept on the chip is only read, and copies to it and from it count on one side.
    each = row + 400 + (400 + 100 + 400) + (160 + 40)
    assert found.memory == 5 * each + (120 + 360) + (360 + 360)
    assert found.unknown_loops == 0


def test_of_what_a_fusion_slices_or_updates_only_the_part_counts():
    """Seen through a bitcast too, as the GPU's compiler writes it; any other use takes the whole."""
    row, stack = 4 * 10, 4 * 30
    parts = "%bits, %new, %i, %zero"
    module = """HloModule jit_g

%accumulate (sums: f32[30], i: s32[], x: f32[1,10]) -> f32[3,10] {
  %sums = f32[30]{0} parameter(0)
  %bits = f32[3,10]{1,0} bitcast(%sums)
  %i = s32[] parameter(1)
  %x = f32[1,10]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,10]{1,0} dynamic-slice(%bits, %i, %zero), dynamic_slice_sizes={1,10}
  %new = f32[1,10]{1,0} add(%old, %x)
  ROOT %updated = f32[3,10]{1,0} dynamic-update-slice(PARTS)
}

ENTRY %main (sums.1: f32[30], i.1: s32[], x.1: f32[1,10]) -> f32[3,10] {
  %sums.1 = f32[30]{0} parameter(0)
  %i.1 = s32[] parameter(1)
  %x.1 = f32[1,10]{1,0} parameter(2)
  ROOT %result = f32[3,10]{1,0} fusion(%sums.1, %i.1, %x.1), kind=kLoop, calls=%accumulate
}
"""
    assert traffic(module.replace("PARTS", parts)).memory == (row + row) + 4 + row  # read and written, index, x
    doubled = module.replace("PARTS", "%doubled, %new, %i, %zero").replace(
        "  ROOT %updated", "  %doubled = f32[3,10]{1,0} add(%bits, %bits)\n  ROOT %updated"
    )
    assert traffic(doubled).memory == (stack + row) + 4 + row


PASSED_ON = "%rows = f32[500]{0} bitcast(%table)"


def test_of_what_a_fusion_gathers_or_scatters_only_the_rows_count():
    """As the TPU's compiler writes tokens into a cache, in place, and looks them up."""
    module = """HloModule jit_h

%looked_up (table: f32[50,10], at: s32[2]) -> f32[2,10] {
  %table = f32[50,10]{1,0} parameter(0)
  %at = s32[2]{0} parameter(1)
  ROOT %rows = f32[2,10]{1,0} gather(%table, %at), offset_dims={1}
}

%last (old: f32[], new: f32[]) -> f32[] {
  %old = f32[] parameter(0)
  ROOT %new = f32[] parameter(1)
}

%written (cache: f32[50,10], at.1: s32[2], x: f32[2,10]) -> f32[50,10] {
  %cache = f32[50,10]{1,0} parameter(0)
  %at.1 = s32[2]{0} parameter(1)
  %x = f32[2,10]{1,0} parameter(2)
  ROOT %after = f32[50,10]{1,0} scatter(%cache, %at.1, %x), update_window_dims={1}, to_apply=%last
}

%outer (at.3: s32[2], table.2: f32[50,10]) -> f32[2,10] {
  %at.3 = s32[2]{0} parameter(0)
  %table.2 = f32[50,10]{1,0} parameter(1)
  %rows.1 = f32[2,10]{1,0} fusion(%table.2, %at.3), kind=kLoop, calls=%looked_up
  ROOT %twice = f32[2,10]{1,0} add(%rows.1, %rows.1)
}

ENTRY %main (table.1: f32[50,10], at.2: s32[2], cache.1: f32[50,10]) -> f32[50,10] {
  %table.1 = f32[50,10]{1,0} parameter(0)
  %at.2 = s32[2]{0} parameter(1)
  %cache.1 = f32[50,10]{1,0} parameter(2)
  %row = f32[2,10]{1,0} fusion(%table.1, %at.2), kind=kLoop, calls=%looked_up
  ROOT %result = f32[50,10]{1,0} fusion(%cache.1, %at.2, %row), kind=kCustom, calls=%written
}
"""
    rows, numbers = 4 * 2 * 10, 4 * 2
    assert traffic(module).memory == (rows + numbers + rows) + (numbers + rows + rows)
    in_another = module.replace(
        "fusion(%table.1, %at.2), kind=kLoop, calls=%looked_up", "fusion(%at.2, %table.1), kind=kOutput, calls=%outer"
    )
    assert in_another != module
    assert traffic(in_another) == traffic(module)
    passed_on = in_another.replace("%rows = f32[2,10]{1,0} gather(%table, %at), offset_dims={1}", PASSED_ON)
    assert traffic(passed_on).memory == traffic(module).memory + 4 * 50 * 10 - rows


def test_the_forms_of_the_tpu_compiler():
    """Groups by the axes of a mesh, loops whose condition tells how often they run, one collective in two fusions."""
    condition = """%i.2 = s32[] get-tuple-element(%loop.1), index=0
  %limit = s32[] constant(5)
  ROOT %more = pred[] compare(%i.2, %limit), direction=LT"""
    text = MODULE.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    text = text.replace("replica_groups=[2,4]<=[8]", "replica_groups=mesh['a'=2,'b'=4] {'b'}, channel_id=7")
    scattered = "  %scattered = bf16[20]{0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1\n"
    text = text.replace(scattered, scattered + scattered.replace("scattered =", "again ="))
    found, expected = traffic(text.replace("ROOT %more = pred[] constant(true)", condition)), traffic(MODULE)
    assert (found.sent, found.unknown_loops) == (expected.sent, 0)


def test_collectives_that_share_a_channel_are_all_counted():
    """As those of one `shard_map` do."""
    moved = "  %moved = f32[90]{0} collective-permute(%gathered), channel_id=1, source_target_pairs={{0,1},{1,0}}\n"
    found = traffic(
        MODULE.replace("  %run =", moved.replace("%moved", "%again") + moved.replace("%moved", "%more") + "  %run =")
    )
    assert (found.collectives["collective-permute"], found.sent["collective-permute"]) == (3, 3 * 360)


def test_loops_of_unknown_length_are_counted_as_told_and_named():
    unknown = MODULE.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    found = traffic(unknown)
    assert (found.collectives["reduce-scatter"], found.unknown_loops) == (1, 1)
    assert traffic(unknown, unknown_trips=5) == traffic(MODULE)._replace(unknown_loops=1)


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        traffic("")
