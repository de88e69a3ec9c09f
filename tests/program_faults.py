"""Faults for the CPU's programs: linear layers, self-attention, patches, and the interpreter of programs.

Some test of these operations or of frozen models has to catch each.
"""

from __future__ import annotations

from tests.seeded_faults import Fault

_LINEAR = "csrc/linear/tiled.h"
_ATTENTION = "csrc/self_attention/tiled.h"
_WINDOWS = "csrc/patch_embed/windows.h"
_PROGRAM = "csrc/program/cpu.cpp"
_TILES = "csrc/common/tiles.h"

PROGRAM_FAULTS = tuple(
    Fault(what, file, old, new)
    for what, file, old, new in (
        (
            "the columns behind the last whole vector lack the residual",
            _LINEAR,
            "if constexpr (Adds) v += load(residual + i * of_residual + j, rest);",
            "",
        ),
        ("eps is left out of a linear layer's norm", _LINEAR, "variance[i] + eps", "variance[i]"),
        (
            "rows that are left over after fours have the statistics of the first",
            _LINEAR,
            "moments_of<1>(x + r * of_row,",
            "moments_of<1>(x,",
        ),
        ("every panel has the bias of the first", _LINEAR, "step.bias + column,", "step.bias,"),
        (
            "rows of a later chunk are packed from the first",
            _LINEAR,
            "const char* from = x + row * step.x.of_row;",
            "const char* from = x + (row - blocks.first(begin)) * step.x.of_row;",
        ),
        (
            "the activation follows the residual",
            _LINEAR,
            "                if constexpr (Adds) v += load(residual + i * of_residual + j);\n"
            "                store(v, out + i * of_out + j);",
            "                if constexpr (Adds)\n"
            "                    v = finished(load(row + j) + load(bias + j) + "
            "load(residual + i * of_residual + j));\n"
            "                store(v, out + i * of_out + j);",
        ),
        (
            "the last row of a block is normalised as the one before",
            _TILES,
            "const Normal normal = Normalises ? x.normal[r] : Normal{};",
            "const Normal normal = Normalises ? x.normal[r && r + 1 == x.rows ? r - 1 : r] : Normal{};",
        ),
        (
            "the largest score leaves the last token out",
            _ATTENTION,
            "for (int64_t n = 1; n < tokens; ++n) CROSSVIT_UNROLL",
            "for (int64_t n = 1; n < tokens - 1; ++n) CROSSVIT_UNROLL",
        ),
        (
            "the weights are not divided by their sum",
            _ATTENTION,
            "inverse[j] = 1.0f / sum[j];",
            "inverse[j] = Vec{} + 1.0f;",
        ),
        (
            "the channels behind the last whole vector of a head are not stored",
            _ATTENTION,
            "store(turned[i], to + i * out_row, rest);",
            "(void)0;",
        ),
        (
            "the keys of a head serve the next one",
            _ATTENTION,
            "if (head != packed) of_head.pack_head();",
            "if (packed < 0) of_head.pack_head();",
        ),
        (
            "exponents below -126 wrap around",
            _ATTENTION,
            "    x = maximum(x, broadcast(-126.0f));\n"
            "    constexpr float magic = 12582912.0f;  // 1.5 * 2^23",
            "    constexpr float magic = 12582912.0f;  // 1.5 * 2^23",
        ),
        (
            "the last tap of the resizing is left out",
            _WINDOWS,
            "for (int64_t t = 0; t < 4; ++t) {",
            "for (int64_t t = 0; t < 3; ++t) {",
        ),
        (
            "padding keeps the line of before",
            _WINDOWS,
            "for (int64_t i = 0; i < count; ++i) cut[margin + i] = T{};",
            "",
        ),
        ("bytes are not shifted", _WINDOWS, " * factor + shift;", " * factor;"),
        ("bytes are signed", _WINDOWS, "static_cast<uint8_t>(from", "static_cast<int8_t>(from"),
        (
            "images that are left over are not computed",
            _PROGRAM,
            "if (shared < program.images)",
            "if (shared < 0)",
        ),
        (
            "rows of a batch are a row apart",
            _PROGRAM,
            "if (place.base != Place::absent) place.of_row = place.of_image;",
            "",
        ),
        (
            "the first images of a batch are fused again",
            _PROGRAM,
            "run_fusion(team, worker, record.as<FusionStep>(), first + i, count);",
            "run_fusion(team, worker, record.as<FusionStep>(), first, count);",
        ),
        (
            "a thread begins where the one before began",
            _PROGRAM,
            "run_images(Team{0, 1}, alone, program, team.rank * each, each)",
            "run_images(Team{0, 1}, alone, program, team.rank / 2 * each, each)",
        ),
    )
)
