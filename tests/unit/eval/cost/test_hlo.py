"""Reading collectives from compiled programs: real ones, and forms that only other backends print."""

import pytest

from eval.cost.hlo import Collective, collectives_in

WHILE = """HloModule jit_run, entry_computation_layout={(f32[2,16]{1,0})->f32[2,16]{1,0}}, num_partitions=4

FileNames
1 "all-gather(while(.py"

%inner (p.0: u8[2,14]) -> u8[4,2,14] {
  %p.0 = u8[2,14]{1,0} parameter(0)
  ROOT %gather = u8[4,2,14]{2,1,0:T(8,128)(4,1)S(1)} all-gather(%p.0), dimensions={0}, metadata={op_name="x"}
}

%body (p: (s32[], u8[2,14], /*index=2*/f32[16])) -> (s32[], u8[2,14], /*index=2*/f32[16]) {
  %p = (s32[], u8[2,14]{1,0}, /*index=2*/f32[16]{0}) parameter(0)
  %got = u8[4,2,14]{2,1,0} call(%codes), to_apply=%inner
  ROOT %t = (s32[], u8[2,14]{1,0}, /*index=2*/f32[16]{0}) tuple(%i, %codes, %x)
}

%condition (p.1: (s32[], u8[2,14], f32[16])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%outer_body (p.2: (s32[])) -> (s32[]) {
  ROOT %w = (s32[], u8[2,14]{1,0}, f32[16]{0}) while(%t.1), condition=%condition, body=%body, BACKEND
}

ENTRY %main.1_spmd (x: f32[2,16]) -> f32[2,16] {
  %x = f32[2,16]{1,0} parameter(0)
  %w.1 = (s32[]) while(%t.2), condition=%condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %sum = f32[2,16]{1,0} all-reduce(%x), channel_id=2, replica_groups={{0,1}}, to_apply=%add
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
"""


def test_collectives_in_loops_and_in_what_loops_call():
    text = WHILE.replace("BACKEND", 'backend_config={"known_init_step":{"init":"0"},"known_trip_count":{"n":"12"}}')
    assert collectives_in(text) == [
        Collective("all-gather", "u8", (4, 2, 14), 112, in_loop=True, trip_count=36),
        Collective("all-reduce", "f32", (2, 16), 128, in_loop=False, trip_count=None),
    ]


def test_an_unknown_trip_count_is_not_guessed():
    gather, _ = collectives_in(WHILE.replace(", BACKEND", ""))
    assert (gather.in_loop, gather.trip_count) == (True, None)


def entry(*lines):
    return "\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *(f"  {line}" for line in lines), "}"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = u16[4,6]{1,0} all-gather(%p), dimensions={0}", [("all-gather", "u16", (4, 6), 48)]),
        (
            "%a = (u8[2,5]{1,0}, u8[8,5]{1,0}) all-gather-start(%p), dimensions={0}",
            [("all-gather", "u8", (8, 5), 40)],
        ),
        (
            "%a = (u8[2]{0}, f32[3]{0}, u8[8]{0}, f32[12]{0}) all-gather-start(u8[2]{0} %p, f32[3]{0} %q)",
            [("all-gather", "u8", (8,), 8), ("all-gather", "f32", (12,), 48)],
        ),
        (
            "ROOT %a = (bf16[2,3]{1,0}, pred[7]{0}) all-reduce(%p, %q), to_apply=%add",
            [("all-reduce", "bf16", (2, 3), 12), ("all-reduce", "pred", (7,), 7)],
        ),
        ("%a = f32[] all-reduce-start(%p), to_apply=%add", [("all-reduce", "f32", (), 4)]),
        (
            "%a = (s8[5]{0}, s8[5]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}",
            [("collective-permute", "s8", (5,), 5)],
        ),
        ("a = u4[3]{0:E(4)} all-to-all(p), dimensions={0}", [("all-to-all", "u4", (3,), 2)]),
        ("%a = f8e4m3fn[4]{0} reduce-scatter(%p), to_apply=%add", [("reduce-scatter", "f8e4m3fn", (4,), 4)]),
        ("%a = u8[8,5]{1,0} all-gather-done(%s)", []),
        ("%all-gather.7 = u8[8,5]{1,0} copy(%all-gather)", []),
    ],
)
def test_forms_of_collectives(line, expected):
    text = "\n".join(["%add (a: f32[], b: f32[]) -> f32[] {", "  ROOT %s = f32[] add(%a, %b)", "}", entry(line)])
    assert collectives_in(text) == [Collective(*fields, in_loop=False, trip_count=None) for fields in expected]


def test_a_wrapped_asynchronous_collective_counts_once():
    text = "\n".join(
        [
            "%wrapped (p: f32[4]) -> f32[8] {",
            "  ROOT %r = f32[8]{0} all-to-all(%p), dimensions={0}",
            "}",
            entry(
                "%s = ((f32[4]{0}), f32[8]{0}, u32[]) async-start(%p), calls=%wrapped",
                "%d = f32[8]{0} async-done(%s)",
            ),
        ]
    )
    assert collectives_in(text) == [Collective("all-to-all", "f32", (8,), 32, in_loop=False, trip_count=None)]
