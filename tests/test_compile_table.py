"""What the Triton kernels compile to for GPUs that are not here: budgets, parsers, table, model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import compile_table, time_model, tune_triton
from benchmarks.compiled import (
    ARCHITECTURES,
    Case,
    Resources,
    calls,
    compile_case,
    compiling,
    cuobjdump,
    parse_amdgcn,
    parse_resource_usage,
    parse_sass,
    prepared,
)
from crossvit_kernels.cross_attention import triton_table
from crossvit_kernels.cross_attention.triton_table import Configuration, configuration

compiles = pytest.mark.skipif(cuobjdump() is None, reason="this Triton has no cuobjdump")

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function attend:
  REG:168 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:1128 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x37c] ;                  /* 0x0000df00ff017b82 */
                                                                            /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P0 LDGSTS.E.BYPASS.128 [R7], desc[UR8][R4.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0040*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0050*/                   STL [R1+0x4], R3 ;
        /*0060*/              @!P1 BRA 0x20 ;
        /*0070*/                   BRA 0x70 ;
        /*0080*/                   NOP ;
"""
AMDGCN = """
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	global_load_dwordx4 v[0:3], v[4:5], off
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	scratch_store_dword off, v1, s32
	s_endpgm
	.section	.rodata,"a",@progbits
    .private_segment_fixed_size: 24
    .vgpr_count:     96
"""


def test_the_output_of_cuobjdump_is_understood():
    assert parse_resource_usage(USAGE) == (168, 16)
    opcodes, loops = parse_sass(SASS)
    case = Case((224, 448), 7)
    found = Resources("attend", "sm_90", case, 168, 16, 30000, 4, opcodes, loops)
    assert (found.local, found.tensor, found.wide, found.instructions) == (1, 1, 2, 8)
    assert [(loop.start, loop.end, sum(loop.opcodes.values())) for loop in loops] == [(0x20, 0x60, 5)]
    assert time_model.shared_bytes(loops[0].opcodes) == 2 * 512
    assert compile_table.verdict(found) == "local memory"
    with pytest.raises(ValueError, match="no resource usage"):
        parse_resource_usage("")


def test_amds_assembly_is_understood():
    registers, stack, opcodes = parse_amdgcn(AMDGCN)
    found = Resources("attend", "gfx942", Case((224, 448), 7), registers, stack, 30000, 4, opcodes, [])
    assert (registers, stack, found.local, found.tensor, found.wide) == (96, 24, 1, 1, 1)


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 129, 0, 8, 1),
        ("sm_90", 168, 0, 4, 3),
        ("sm_90", 255, 0, 4, 2),
        ("sm_90", 32, 0, 4, 16),
        ("sm_80", 32, 80 * 1024, 4, 2),
        ("sm_80", 32, 82 * 1024, 4, 1),
        ("sm_89", 32, 0, 4, 12),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 128, 33 * 1024, 4, 1),
    ],
)
def test_blocks_that_fit(architecture, registers, shared, warps, blocks):
    assert ARCHITECTURES[architecture].fitting_blocks(registers, shared, warps) == blocks


def test_every_variant_has_an_entry_for_every_architecture():
    for architecture in (*ARCHITECTURES, "sm_103", "sm_121", "sm_75", "gfx90a:sramecc+", "gfx1100"):
        for pair, heads in compile_table.widths_of_variants().items():
            for tokens, weights, _ in (*compile_table.DTYPES, *compile_table.FLOAT32):
                for backward in (False, True):
                    directions, _ = calls(Case(pair, heads, tokens, weights))
                    found = configuration(directions, backward, architecture)
                    assert found.tokens in (16, 32, 64)
                    assert found.warps in (4, 8, 16)
                    assert found.head_tile in (8, 16)


def test_a_very_wide_direction_has_an_entry():
    directions, _ = calls(Case((4096,), 32))
    assert configuration(directions, True, "sm_90").warps == 8


@pytest.mark.parametrize(
    ("name", "stands_for"),
    [
        *((name, name) for name in ARCHITECTURES),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_90a", "sm_90"),
        ("sm_75", "sm_80"),
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx90a", "gfx942"),
    ],
)
def test_the_nearest_architecture(name, stands_for):
    assert triton_table.nearest(name) == stands_for


def test_the_models_bytes_are_those_counted_by_hand():
    s, _ = time_model.crossvit_18()
    # 256 images of 196 patches of 448 channels in bf16, read and copied; c, keys and z in float32.
    assert time_model.work("attend", s, 256).bytes == 2 * 44_957_696 + 458_752 + 2 * 3_211_264
    assert time_model.work("attend", s, 256).exponentials == 256 * 196 * 7
    # Tokens and the gradient of their copy read, the gradient written: 135 MB, as the aim has it.
    assert round(time_model.work("attend_backward", s, 256).bytes / 1e6) == round(134.87 + 0.92 + 9.63)
    # CLS tokens in bf16, 448 x 224 weights in bf16, c in float32.
    assert time_model.work("project", s, 256).bytes == 256 * 224 * 2 + 448 * 224 * 2 + 256 * 448 * 4
    assert time_model.work("project", s, 256).flops == 2 * 256 * 448 * 224


def test_the_tuner_rewrites_its_part_of_the_table(tmp_path):
    path = tmp_path / "triton_table.py"
    path.write_text(tune_triton.TABLE.read_text())
    entry = ("sm_90", True, "as they are", 448, 7)
    first, second = Configuration(32, 8, 8, 2, 32, 8), Configuration(16, 8, 4, 3, 16, 4)
    for measured in ({entry: first}, {entry: second}, {}):
        tune_triton.write(measured, path)
        scope: dict = {"__name__": "crossvit_kernels.cross_attention.triton_table"}
        scope["__package__"] = "crossvit_kernels.cross_attention"
        exec(compile(path.read_text(), path, "exec"), scope)
        assert {k: repr(v) for k, v in scope["_MEASURED"].items()} == {
            k: repr(v) for k, v in measured.items()
        }
    assert path.read_text() == tune_triton.TABLE.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_the_tuner_takes_the_fastest_of_what_runs():
    tried = list(tune_triton.candidates(7, 4))
    assert len(tried) == len(set(tried)) > 10

    def measure(case: Case, config: Configuration) -> float:
        if config == tried[1]:
            return 1e-6
        if config == tried[0]:
            raise RuntimeError("out of resources")
        return 2e-6

    case = Case((224, 448), 7, backward=True)
    assert tune_triton.fastest(case, tried, measure) == (tried[1], 1e-6)
    assert tune_triton.fastest(case, tried[:1], measure) is None
    assert tune_triton.key(case, "sm_90") == ("sm_90", True, "as they are", 448, 7)


def test_a_measured_entry_goes_first(monkeypatch):
    directions, _ = calls(Case((224, 448), 7))
    chosen = Configuration(64, 16, 16, 3, 64, 4)
    monkeypatch.setitem(triton_table._MEASURED, ("sm_90", False, "as they are", 448, 7), chosen)
    assert configuration(directions, False, "sm_90") == chosen
    assert configuration(directions, False, "sm_80") != chosen
    assert configuration(directions, True, "sm_90") != chosen


@compiles
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_attentions_kernels_keep_their_budget(architecture):
    for backward in (False, True):
        found = compile_case(Case((224, 448), 7, backward=backward), architecture, compile_table.ATTENTION)
        assert [(r.kernel, compile_table.verdict(r)) for r in found] == [(found[0].kernel, "ok")]
        assert found[0].blocks >= (1 if backward else 2)


@compiles
@pytest.mark.parametrize(("architecture", "has"), [("sm_80", True), ("gfx942", True), ("gfx950", False)])
def test_products_are_of_float32_where_there_is_no_tf32(architecture, has):
    assert triton_table.allows_tf32(architecture) is has
    with compiling(architecture, "attend") as kernels:
        prepared(Case((32,), 2, "fp32", "fp32", tf32=True))()
    assert ("inputPrecision = tf32" in kernels[0].asm["ttir"]) is has


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("widths", list(compile_table.widths_of_variants()))
def test_every_kernel_keeps_its_budget(architecture, widths):
    for case in compile_table.cases([widths], ["bf16/bf16", "fp16/fp16", "fp32/bf16"]):
        found = compile_case(case, architecture)
        assert {r.kernel: v for r in found if (v := compile_table.verdict(r)) != "ok"} == {}


@compiles
def test_predictions_have_all_kernels_of_a_fusion():
    case = Case((224, 448), 7)
    found = compile_case(case, "sm_90", "attend")
    gpu = next(g for g in time_model.GPUS if g.name == "H200")
    predicted = time_model.predict(found[0], time_model.crossvit_18(), 256, gpu, 16)
    assert set(predicted.limits) == {
        "memory", "tensor cores", "exponentials", "instructions", "shared memory"
    }  # fmt: skip
    # 91 MB of tokens read, 91 MB written, at 4.3 TB/s.
    assert 40 < predicted.limits["memory"] < 50
    assert torch.tensor(list(predicted.limits.values())).isfinite().all()
