// The interpreter of programs, and all that its steps consist of.
#include "../cross_attention/forward.h"
#include "../cross_attention/planned.h"
#include "../linear/tiled.h"
#include "../patch_embed/windows.h"
#include "../self_attention/tiled.h"
#include "program.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// Images of a fusion that are computed together: their rows share each weight that is read.
constexpr int64_t kFusedImages = 8;

struct Record {
    const int64_t* words;
    Kind kind() const { return static_cast<Kind>(words[0]); }
    template <class T>
    const T& as() const {
        return *reinterpret_cast<const T*>(words + 2);
    }
    Record next() const { return {words + 2 + words[1]}; }
    bool is_mode() const { return kind() == Kind::images || kind() == Kind::batch; }
};

// Floats of a fusion of `images`, apart from what each thread has for a tile.
int64_t fusion_scratch(const FusionStep& step, int64_t images, int64_t* tile) {
    Work works[kMaxDirections];
    Direction directions[2] = {step.directions[0], step.directions[1]};
    int64_t saved = 0;
    for (Direction& d : directions) {
        d.batch = images;
        saved += images * saved_floats(d.width, d.heads);
    }
    Arena arena{nullptr};
    Options options{};
    *tile = plan(works, directions, 2, options, arena, false);
    return arena.used + saved;
}

void run_fusion(const Team& team, const Worker& worker, const FusionStep& step, int64_t first,
                int64_t images) {
    Work works[kMaxDirections];
    Direction directions[2] = {step.directions[0], step.directions[1]};
    float* memory = reinterpret_cast<float*>(worker.scratch);
    for (Direction& d : directions) {
        const auto move = [&](Tokens& tokens) {
            tokens.data = static_cast<char*>(tokens.data) + first * tokens.batch_stride * size_of(d.tokens);
        };
        move(d.cls);
        move(d.patch_tokens);
        move(d.cls_out);
        d.batch = images;
        d.saved = memory;
        memory += images * saved_floats(d.width, d.heads);
    }
    Arena arena{memory};
    Options options{static_cast<float>(step.eps), 0, 1.0f, team.size};
    const int64_t tile = plan(works, directions, 2, options, arena, false);
    forward(team, works, 2, Arena{memory + arena.used + team.rank * tile});
    team.wait();
}

// Rows of the whole batch are an image apart.
Place rows_of_images(Place place) {
    if (place.base != Place::absent) place.of_row = place.of_image;
    return place;
}

void run_on_image(const Team& team, const Worker& worker, const Record& record, int64_t image) {
    switch (record.kind()) {
        case Kind::linear:
            return run_step(team, worker, record.as<LinearStep>(), image);
        case Kind::self_attention:
            return run_step(team, worker, record.as<SelfAttentionStep>(), image);
        case Kind::patches:
            return run_step(team, worker, record.as<PatchStep>(), image);
        case Kind::copy:
            return run_step(team, worker, record.as<CopyStep>(), image);
        case Kind::fusion:
            return run_fusion(team, worker, record.as<FusionStep>(), image, 1);
        case Kind::images:
        case Kind::batch:
            return;
    }
}

void run_on_batch(const Team& team, const Worker& worker, const Record& record, int64_t first,
                  int64_t images) {
    if (record.kind() == Kind::linear) {
        LinearStep step = record.as<LinearStep>();
        step.rows = images;
        step.x = rows_of_images(step.x);
        step.residual = rows_of_images(step.residual);
        step.out = rows_of_images(step.out);
        return run_step(team, worker, step, first);
    }
    for (int64_t i = 0; i < images;) {
        const bool fuses = record.kind() == Kind::fusion;
        const int64_t count = fuses && images - i > kFusedImages ? kFusedImages : fuses ? images - i : 1;
        if (fuses)
            run_fusion(team, worker, record.as<FusionStep>(), first + i, count);
        else
            run_on_image(team, worker, record, first + i);
        i += count;
    }
}

void run_images(const Team& team, const Worker& worker, const Program& program, int64_t first,
                int64_t images) {
    const Record end{program.words + program.count};
    for (Record mode{program.words}; mode.words != end.words;) {
        const Record begin = mode.next();
        Record after = begin;
        while (after.words != end.words && !after.is_mode()) after = after.next();
        const auto each = [&](auto body) {
            for (Record record = begin; record.words != after.words; record = record.next()) body(record);
        };
        if (mode.kind() == Kind::images)
            for (int64_t image = first; image < first + images; ++image)
                each([&](const Record& record) { run_on_image(team, worker, record, image); });
        else
            each([&](const Record& record) { run_on_batch(team, worker, record, first, images); });
        mode = after;
    }
}

}  // namespace

int64_t program_scratch(const Program& program) {
    int64_t most = 0;
    const auto take = [&](int64_t words) { most = words > most ? words : most; };
    const int64_t* end = program.words + program.count;
    for (Record record{program.words}; record.words != end; record = record.next()) {
        int64_t tile = 0;
        if (record.kind() == Kind::linear) take(linear_scratch(record.as<LinearStep>()));
        if (record.kind() == Kind::self_attention)
            take(self_attention_scratch(record.as<SelfAttentionStep>()));
        if (record.kind() == Kind::patches) take(patch_scratch(record.as<PatchStep>()));
        if (record.kind() == Kind::fusion) {
            const int64_t images = program.images < kFusedImages ? program.images : kFusedImages;
            const int64_t shared = fusion_scratch(record.as<FusionStep>(), images, &tile);
            take(shared + tile);
        }
    }
    return rounded_up(most, 16);
}

void run_program(const Program& program, int32_t* scratch) {
    const intptr_t bases[] = {0, 0, program.input, program.output};
    const int64_t words = program_scratch(program);
    run(program.threads, [&](const Team& team) {
        const MatrixUnit unit;
        const int64_t each = program.images / team.size, shared = each * team.size;
        const Worker alone{team.rank, bases, scratch + team.rank * words};
        if (each > 0) run_images(Team{0, 1}, alone, program, team.rank * each, each);
        team.wait();
        if (shared < program.images)
            run_images(team, Worker{0, bases, scratch}, program, shared, program.images - shared);
    });
}

int64_t packed_weight_words(const PackedWeight& weight) { return packed_weight_steps(weight); }

void pack_weight_words(const PackedWeight& weight, int64_t threads, int32_t* out) {
    run(threads, [&](const Team& team) { pack_weight(team, weight, out); });
}

}  // namespace CROSSVIT_ISA
}  // namespace crossvit
