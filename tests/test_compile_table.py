"""What GPU kernels compile to for GPUs that are not here: budgets, parsers, table, counts, model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import (
    compile_table,
    compiled_cuda,
    compiled_layers,
    executed,
    layer_model,
    time_model,
    tune_triton,
)
from benchmarks.compiled import (
    ARCHITECTURES,
    Case,
    Layer,
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

compiles_cuda = pytest.mark.skipif(
    compiled_cuda.missing() is not None, reason=f"the CUDA kernels: {compiled_cuda.missing()}"
)
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
    found = Resources("attend", "sm_90", Case((224, 448), 7), 168, 16, 30000, 4, parse_sass(SASS))
    assert (found.local, found.tensor, found.wide, found.instructions) == (1, 1, 2, 8)
    assert time_model.shared_bytes(found.opcodes) == 2 * 512
    assert compile_table.verdict(found) == "local memory"
    with pytest.raises(ValueError, match="no resource usage"):
        parse_resource_usage("")


def test_amds_assembly_is_understood():
    registers, stack, opcodes = parse_amdgcn(AMDGCN)
    found = Resources("attend", "gfx942", Case((224, 448), 7), registers, stack, 30000, 4, opcodes)
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
def test_predictions_of_a_kernel():
    case = Case((224, 448), 7)
    (found,) = compile_case(case, "sm_90", "attend")
    gpu = next(g for g in time_model.GPUS if g.name == "H200")
    run = executed.counted("triton", replace(case, widths=(32, 64), heads=2), "sm_90", 0, (40, 20), "attend")
    predicted = time_model.predict(found, run["attend"], time_model.crossvit_18(), 256, gpu)
    assert set(predicted.limits) == {
        "memory", "tensor cores", "exponentials", "instructions", "shared memory"
    }  # fmt: skip
    # 91 MB of tokens read, 91 MB written, at 4.3 TB/s.
    assert 40 < predicted.limits["memory"] < 50
    assert torch.tensor(list(predicted.limits.values())).isfinite().all()


def test_limits_are_those_computed_by_hand():
    gpu = replace(time_model.GPUS[0], multiprocessors=10, clock=1.0)
    found = Resources("attend", "sm_80", Case((448,), 7), 255, 0, 30000, 4, Counter())
    assert found.blocks == 2
    # 5 blocks on 5 of 10 multiprocessors: one warp a scheduler, which issues in 1 cycle of 2.5.
    few = time_model.Issued(instructions=8000, longest=400, moved=64000, blocks=5).limits(found, gpu)
    assert few == pytest.approx({"instructions": 8000 / (4 / 2.5 * 5) * 1e-3, "shared memory": 0.1})
    # 100 blocks: two at once on each, and one warp is longer than its share.
    many = time_model.Issued(instructions=8000, longest=4000, moved=64000, blocks=100).limits(found, gpu)
    assert many == pytest.approx({"instructions": 4000 * 2.5 * 1e-3, "shared memory": 0.05})


def test_both_backends_stand_side_by_side():
    def predictions(times: dict[str, float]) -> list[time_model.Prediction]:
        return [time_model.Prediction(k, {"memory": v, "exponentials": 0.01}, 1.0) for k, v in times.items()]

    ours, theirs = predictions({"project": 1, "attend": 2}), predictions({"project": 3, "attend": 4})
    gpu, h200 = time_model.GPUS[0], next(g for g in time_model.GPUS if g.name == "H200")
    assert time_model.table(gpu, 256, ours, theirs) == [
        f"| {gpu.name} | 256 | attend | 3.0 | 5.0 | memory 2.0 | memory 4.0 |",
        f"| {gpu.name} | 256 | all of forward | 5.0 | 9.0 | | |",
    ]
    assert len(time_model.table(h200, 256, ours, theirs)) == 3


# The page


def test_the_page_keeps_what_is_not_written():
    empty = compile_table.rewritten("", {})
    assert empty == compile_table.INTRODUCTION + "\n"
    cuda = compile_table.rewritten(empty, {"The CUDA kernels": "nvcc\n\n| a |"})
    both = compile_table.rewritten(cuda, {"The Triton kernels": "Triton", "Predictions": "3 us"})
    assert both.index("Triton\n") < both.index("## The CUDA kernels\n\nnvcc\n\n| a |\n") < both.index("3 us")
    assert compile_table.rewritten(both, {}) == both
    assert compile_table.rewritten(both, {"The CUDA kernels": "new"}) == both.replace("nvcc\n\n| a |", "new")


def test_the_page_is_as_it_would_be_written():
    page = compile_table.PAGE.read_text()
    assert compile_table.rewritten(page, {}) == page
    for title in (
        *compile_table.TITLES.values(),
        compile_table.PREDICTIONS,
        compile_table.PREDICTIONS_OF_LAYERS,
    ):
        assert f"\n## {title}\n" in page


def test_a_machine_without_nvcc_says_so(monkeypatch, capsys):
    monkeypatch.setattr(compiled_cuda.shutil, "which", lambda name: None)
    assert compile_table.main(["--backend", "cuda"]) == 2
    assert capsys.readouterr().err == (
        "cuda kernels cannot be compiled here: nvcc of the CUDA toolkit was not found on PATH\n"
    )


# The CUDA kernels

USAGES = """
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN1aE:
  REG:190 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:2856 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN1bE:
  REG:32 STACK:8 SHARED:23296 LOCAL:0 CONSTANT[0]:2856 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
FUNCTIONS = f"""
Fatbin elf code:
\t\tFunction : _ZN1aE
{SASS}
\t\tFunction : _ZN1bE
        /*0000*/                   UBLKCP.S.G [UR8], [UR4], UR6 ;
        /*0010*/                   EXIT ;
"""


def test_several_kernels_of_a_cubin():
    assert compiled_cuda.parse_resource_usages(USAGES) == {"_ZN1aE": (190, 0, 1024), "_ZN1bE": (32, 8, 23296)}
    found = compiled_cuda.parse_functions(FUNCTIONS)
    assert {name: sum(parse_sass(text).values()) for name, text in found.items()} == {
        "_ZN1aE": 8,
        "_ZN1bE": 2,
    }


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        (
            "void crossvit::(anonymous namespace)::attend_kernel<(crossvit::Product)0, true>(crossvit::Call)",
            "attend_kernel<bfloat16, as is>",
        ),
        (
            "void crossvit::attend_kernel<(crossvit::Product)3, false>(crossvit::Call)",
            "attend_kernel<tf32>",
        ),
        ("crossvit::(anonymous namespace)::cls_backward_kernel(crossvit::Call)", "cls_backward_kernel"),
    ],
)
def test_names_of_kernels(signature, name):
    assert compiled_cuda.named(signature) == name


TENSOR, WIDE = "HMMA.16816.F32.BF16", "LDG.E.128"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "ok"),
        ({"stack": 8}, "local memory"),
        ({"opcodes": Counter([TENSOR, WIDE, "STL"])}, "local memory"),
        ({"shared": 200_000}, "shared memory, does not fit"),
        ({"registers": 255, "warps": 8, "shared": 90_000}, "ok"),
        ({"shared": 90_000}, "ok"),
        ({"opcodes": Counter([WIDE])}, "no tensor cores"),
        ({"opcodes": Counter([TENSOR])}, "no 16-byte access"),
        ({"opcodes": Counter([TENSOR, "UBLKCP.S.G"])}, "ok"),
        ({"opcodes": Counter([WIDE]), "case": Case((448,), 7, "fp32", "fp32")}, "ok"),
        ({"opcodes": Counter([WIDE]), "case": Case((448,), 7, "fp32", "fp32", True)}, "no tensor cores"),
        ({"opcodes": Counter(), "case": Case((448,), 7, "fp32", "fp32")}, "no 16-byte access"),
        ({"kernel": "cls_backward", "opcodes": Counter()}, "ok"),
        ({"kernel": "project", "opcodes": Counter([TENSOR])}, "ok"),
    ],
)
def test_the_budget_of_the_cuda_kernels(change, verdict):
    good = Resources(
        "attend", "sm_80", Case((448,), 7), 200, 0, 60_000, 4, Counter([TENSOR, WIDE]), "attend<bfloat16>"
    )
    assert compile_table.verdict(replace(good, **change)) == verdict


def test_fewer_blocks_than_designed():
    found = Resources(
        "attend", "sm_80", Case((448,), 7), 255, 0, 60_000, 4, Counter([TENSOR, WIDE]), "attend<bfloat16>"
    )
    assert (found.blocks, compile_table.designed_blocks(found)) == (2, 2)
    alone = replace(found, registers=300)  # more than a thread can have: as if it were limited elsewhere
    assert compile_table.verdict(alone) == "1 of 2 blocks"
    assert compile_table.designed_blocks(replace(found, warps=8)) == 1
    assert compile_table.designed_blocks(replace(found, shared=100_000)) == 1


@compiles_cuda
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_cuda_kernels_over_the_tokens_keep_their_budget(architecture):
    for case in compile_table.cases([(224, 448)], ["bf16/bf16", "fp16/fp16"], "cuda"):
        (found,) = compiled_cuda.compile_case(case, architecture, compile_table.ATTENTION)
        assert (found.kernel, compile_table.verdict(found)) == (found.kernel, "ok")
        assert found.warps == 4


@compiles_cuda
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", list(compiled_cuda.CODES))
def test_every_cuda_kernel_keeps_its_budget(architecture):
    """Float32 matrices, and float32 tokens beside them, do not fit everywhere: docs/cuda.md."""
    for case in compile_table.cases(list(compile_table.widths_of_variants()), [], "cuda"):
        found = compiled_cuda.compile_case(case, architecture)
        faults = {r.instance: v for r in found if (v := compile_table.verdict(r)) != "ok"}
        if case.tokens == "fp32":
            faults = {k: v for k, v in faults.items() if v != "shared memory, does not fit"}
        assert faults == {}


@compiles_cuda
def test_launches_of_the_cuda_kernels():
    """Of one image on 132 multiprocessors: a cluster of parts forward, and, before 9.0, no cluster."""
    case, launcher = Case((224, 448), 7), compiled_cuda.launcher()
    found = {
        architecture: {
            compiled_cuda.demangled(x.kernel).split("_kernel")[0]: x
            for x in launcher(case, architecture, 1, (400, 196), 132)
        }
        for architecture in ("sm_80", "sm_90")
    }
    assert list(found["sm_80"]) == ["project", "absorb", "attend", "values", "output", "back"]
    assert found["sm_90"]["attend"].cluster == (7, 1, 1)
    assert found["sm_80"]["attend"].cluster is None
    assert found["sm_80"]["attend"].grid == found["sm_90"]["attend"].grid == (7, 2, 1)
    assert [x.dependent for x in found["sm_80"].values()] == [False] * 6
    assert [x.dependent for x in found["sm_90"].values()] == [True] * 6


# What is executed

PTX = """.version 9.0
.visible .entry kernel(
	.param .u64 p
)
.maxntid 256, 1, 1
{
	.reg .b32 	%r<9>;
	.loc	1 44 5
	mov.u32 	%r1, %tid.x;  // one
$L__BB0_1:
	{ mul.lo.s32 %r2, %r1, %r1; add.s32 %r3, %r2, %r1;}
	ld.global.v2.u32 	{%r4, %r5}, [%rd1];
	// begin inline asm
	{
	.reg .pred q;
	setp.ne.s32 q, %r1, 0;
	}
	// end inline asm
	$L_brx_1: .branchtargets
		$L__BB0_1,
		$L__BB0_2;
	brx.idx 	%r2,
		$L_brx_1;
$L__BB0_2: ret;
}
.entry other(
)
{
	ret;
}
"""
LINES = """
.section .text.kernel
	//## File ".nv_debug_ptx_txt", line 9
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_2:
	//## File ".nv_debug_ptx_txt", line 11
        /*0010*/                   IMAD R2, R0, R0, R0 ;
        /*0020*/                   BRA.DIV UR4, `(.L_x_7) ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   NOP ;
        /*0050*/                   EXIT ;
.L_x_7:
        /*0060*/                   WARPSYNC.COLLECTIVE R3, `(.L_x_8) ;
.L_x_8:
        /*0070*/                   SHFL.BFLY PT, R4, R0, 0x1, 0x1f ;
"""


def test_instructions_of_ptx_have_their_lines():
    assert executed.instruction_lines(PTX, "kernel") == [9, 11, 11, 12, 16, 22, 24]
    assert executed.instruction_lines(PTX, "other") == [29]


def test_instructions_of_the_machine_have_their_lines():
    found = executed.parse_lines(LINES)
    assert [(x.opcode, x.line) for x in found] == [
        ("S2R", 9), ("IMAD", 11), ("BRA.DIV", 11), ("BRA", 11), ("EXIT", 11)
    ]  # fmt: skip


def test_what_is_executed_is_counted_by_lines():
    """Two warps, the second in a later part of the grid; what has no line counts as the beginning."""
    of_ptx = [np.array([[1], [3], [3], [1], [0], [0], [1]]), np.array([[1], [5], [5], [1], [0], [0], [1]])]
    code = [executed.Instruction("MOV", 6), executed.Instruction("IMAD", 11), executed.Instruction("X", 16)]
    opcodes, of_warps = executed._executed(of_ptx, PTX, "kernel", code)
    assert opcodes == Counter({"MOV": 2, "IMAD": 8, "X": 0})
    assert list(of_warps) == [4, 6]


@compiles_cuda
@pytest.mark.parametrize(("width", "products"), [(64, 4), (224, 14)])
def test_products_that_a_width_skips_are_not_counted(width, products):
    """Of eight unrolled ones a warp: for 16 channels of each tile the scores, z, the sums of the tokens, and
    two of eight columns for their squares."""
    for patches in (32, 40):
        run = executed.counted("cuda", Case((width,), 2), "sm_80", 0, patches, "attend")["attend"]
        tiles = -(-patches // 16)
        assert run.opcodes["HMMA.16816.F32.BF16"] == 5 * products * tiles
        assert (run.blocks, len(run.of_warps), run.overlaps) == (1, 4, False)


# Layers of a block

everywhere = pytest.mark.parametrize(
    "architecture",
    [
        "sm_90",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ARCHITECTURES if name != "sm_90"),
    ],
)


@compiles
@everywhere
def test_self_attention_keeps_nothing_in_a_threads_memory(architecture):
    """The models' shapes in bfloat16: no stack, no spills, two blocks a multiprocessor on NVIDIA's GPUs."""
    layers = {
        Layer(f"{tokens} of {channels}"): compiled_layers.self_attention(tokens, 7, channels, torch.bfloat16)
        for tokens, channels in ((197, 64), (401, 32), (577, 64), (1157, 32))
    }
    found = list(compiled_layers.compile_layers(layers, architecture))
    assert {one.kernel for one in found} == {"attend", "to_queries", "to_keys"}
    for one in found:
        assert compile_table.verdict(one) == "ok", one
        assert one.blocks >= (1 if ARCHITECTURES[architecture].is_amd else 2)


def check_layers(layers: dict[Layer, Callable[[], object]], architecture: str) -> Counter[str]:
    """The kernels that were compiled; products are designed for two blocks a multiprocessor."""
    found = list(compiled_layers.compile_layers(layers, architecture))
    for one in found:
        assert compile_table.verdict(one) == "ok", one
        alone = ARCHITECTURES[architecture].is_amd or (architecture == "sm_120" and "gradient" in one.kernel)
        if one.kernel.startswith(("product", "embed")) and one.case.weights == "bf16" and not alone:
            assert one.blocks >= 2, one
    return Counter(one.kernel.split()[0] for one in found)


@compiles
def test_the_mlp_of_crossvit_18_keeps_its_budget():
    of_mlp = ("L fc", "L block")
    layers = {k: v for k, v in compiled_layers.layers_of_crossvit_18().items() if k.label.startswith(of_mlp)}
    assert len(layers) == 4  # the block under autocast as well
    kernels = check_layers(layers, "sm_90")
    assert set(kernels) >= {
        *("fold", "statistics", "normalise", "product", "gradient_of_rows", "weight_gradient", "add_parts"),
        *("merge", "beside"),
    }
    assert kernels["product"] == 17  # one for each epilogue with what it has beside, in both dtypes of tokens


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_layer_of_crossvit_18_keeps_its_budget(architecture, dtype):
    """Of float32 all but self-attention, which spills: docs/triton.md."""
    layers = compiled_layers.layers_of_crossvit_18(dtype)
    if dtype == "fp32":
        layers = {k: v for k, v in layers.items() if "attention" not in k.label}
    check_layers(layers, architecture)


@compiles
@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_linear_layers_of_all_variants_keep_their_budget(architecture):
    shapes = compiled_layers.shapes_of_variants()
    assert len(shapes) >= 36
    check_layers(
        {
            Layer(f"{name} {around[0]} to {around[1]}"): compiled_layers.linear(
                *around[:2], torch.bfloat16, *around[2:]
            )
            for name, around in shapes
        },
        architecture,
    )


def test_the_bytes_of_a_linear_layer():
    """Counted by hand for fc1 of L, 256 images: x, W and y once; every tile its rows and columns."""
    task = next(t for t in layer_model.tasks() if (t.layer, t.kernel) == ("L fc1", "product"))
    rows = 256 * 197
    assert task.bytes == 2 * (rows * 448 + 448 * 1344 + rows * 1344)
    assert task.flops == 2 * rows * 448 * 1344
    assert task.l2 == 394 * 10.5 * 2 * 128 * 448 * 2 + 2 * rows * 1344
