from bdlm_jax.run.hlo_costs import collective_bytes

PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%layer (arg: (s32[], f32[4,16])) -> (s32[], f32[4,16]) {
  %gathered = f32[4,16]{1,0} all-gather(%part), dimensions={1}
  %summed = (bf16[8]{0}, f32[2]{0}) all-reduce(%a, %b), to_apply=%add
  %inner = (s32[]) while(%init), condition=%less, body=%twice, backend_config={"known_trip_count":{"n":"2"}}
}

%twice (arg: (s32[])) -> (s32[]) {
  %shifted = s8[10]{0} collective-permute(%x), source_target_pairs={{0,1}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %layers = (s32[], f32[4,16]) while(%init), condition=%less, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  %last = f32[5]{0} all-gather-start(%p), dimensions={0}
  %unknown = (s32[]) while(%init), condition=%less, body=%twice
}
"""


def test_a_loops_body_counts_as_often_as_it_runs():
    assert collective_bytes(PROGRAM) == {
        "all-gather": 3 * 4 * 16 * 4 + 5 * 4,
        "all-reduce": 3 * (8 * 2 + 2 * 4),
        "collective-permute": 3 * 2 * 10 + 10,
    }
