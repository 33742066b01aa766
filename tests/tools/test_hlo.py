"""vit_jax/hlo.py: programs written by hand, in the notations that compilers use. tests/test_plan.py reads compiled ones."""

import pytest

from vit_jax.tools import hlo
from vit_jax.tools.hlo import Collective

PROGRAM = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %ag = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%y), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%outer (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %w2 = (s32[], bf16[16,8]{1,0}) while(%t), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %ar = (f32[100]{0}, /*index=1*/f32[28]{0}) all-reduce(%u, %v), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%less (p: (s32[], f32[2])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %w = (s32[], f32[2]{0}) while(%t), condition=%less, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %rs = f32[8]{0} reduce-scatter(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, to_apply=%add
  %parts = f32[64]{0} all-to-all(%x), replica_groups={}, dimensions={0}
  %half = f32[64]{0} all-reduce(%x), replica_groups=mesh['all'=8] {'all':(1)2}, to_apply=%add
  %cp = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %r = f32[64]{0} copy(%cp)
}
"""


def test_counts_sizes_groups_and_loops():
    assert sorted(hlo.collectives(PROGRAM)) == [
        Collective("all-gather", 4, 15, 3 / 4 * 2 * 16 * 8),
        Collective("all-reduce", 2, 1, 2 * 1 / 2 * 4 * 64),
        Collective("all-reduce", 2, 3, 2 * 1 / 2 * 4 * 128),
        Collective("all-to-all", 8, 1, 7 / 8 * 4 * 64),
        Collective("collective-permute", 2, 1, 4 * 64),
        Collective("reduce-scatter", 4, 1, 3 * 4 * 8),
    ]


def test_sums_by_kind():
    found = hlo.collectives(PROGRAM)
    assert hlo.sent_bytes(found, "all-gather") == 15 * 192
    assert hlo.sent_bytes(found) == 15 * 192 + 256 + 3 * 512 + 224 + 256 + 96


GROUPS = "replica_groups=[1,8]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (f"(f32[8]{{0}}, f32[64]{{0}}) all-gather-start(%x), {GROUPS}", "all-gather", 7 / 8 * 256),
        (f"((f32[8], bf16[8]), (f32[64], bf16[64])) all-gather-start(%x, %y), {GROUPS}", "all-gather", 7 / 8 * 384),
        (f"f32[64]{{0}} all-reduce-start(%x), {GROUPS}, to_apply=%add", "all-reduce", 2 * 7 / 8 * 256),
        (f"((f32[64]), f32[8], u32[]) reduce-scatter-start(%x), {GROUPS}", "reduce-scatter", 7 * 32),
        ("(f32[64], f32[64], u32[], u32[]) collective-permute-start(%x)", "collective-permute", 256),
    ],
)
def test_asynchronous_ones_count_once(line, kind, sent):
    done = f"  %done = f32[64]{{0}} {kind}-done(%start)\n"
    text = f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[8]) -> f32[64] {{\n  %start = {line}\n{done}}}\n"
    ((found_kind, _, times, found_sent),) = hlo.collectives(text)
    assert (found_kind, times, found_sent) == (kind, 1, sent)


def test_loop_of_unknown_length_is_refused_if_it_matters():
    unknown = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    with pytest.raises(ValueError, match="unknown length"):
        hlo.collectives(unknown)
    assert hlo.collectives(unknown.replace("body=%outer", "body=%less")) != []
