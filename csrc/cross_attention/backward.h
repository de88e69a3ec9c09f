// Backward: the gradients of the tokens of a chunk, and the stages around it; docs/cross_attention.md has the
// formulas.
#pragma once

#include "work.h"

namespace crossvit {
namespace CROSSVIT_ISA {
namespace {

// grad, the gradient of GELU(LN(x)), becomes that of x, and grad_norm that of LN(x), from x^ and the factor.
void norm_gelu_backward(const Norm& norm, const float* hat, float factor, int64_t columns, float* grad,
                        float* grad_norm) {
    columns_of(padded(columns), [&](int64_t c) {
        const Vec weight = load(norm.weight + c);
        const Vec inner = load(grad + c) * gelu(load(hat + c) * weight + load(norm.bias + c)).derivative;
        store(inner, grad_norm + c);
        store(inner * weight, grad + c);
    });
    normalise_backward(grad, hat, factor, columns);
}

// D and the sums over channels that the tokens' gradients need, of head h of image b.
void prepare_gradient(const Work& w, int64_t b, int64_t h) {
    scale_query(w, b, h);
    const int64_t H = w.heads;
    const float *z = w.z(b, h), *query = w.query(b) + h * w.width, *grad_o = w.grad_o + b * w.width;
    float* grad_z = w.query(b) + (H + h) * w.width;
    Vec sum_z = {}, sum_query = {}, product = {}, beta = {};
    columns_of(w.width, [&](int64_t c) {
        const Vec values = load(w.grad_values + w.head(b, h) + c);
        const Vec grad = values * load(w.norm.weight + c);
        store(grad, grad_z + c);
        sum_z += grad;
        sum_query += load(query + c);
        product += grad * load(z + c);
        beta += values * load(w.norm.bias + c);
    });
    float* scalars = w.scalars + b * 4 * H + h;
    scalars[0] = sum_of_lanes(sum_z);
    scalars[H] = sum_of_lanes(sum_query);
    float d = sum_of_lanes(product), grad_total = 0.0f;
    if (w.drops()) {  // without, t is the constant 1
        grad_total = sum_of_lanes(beta);
        for (int64_t j = h * w.head_width; j < (h + 1) * w.head_width; ++j) grad_total += grad_o[j] * w.bv[j];
        d += grad_total * w.total(b)[h];
    }
    if (w.d->grad_attention) {
        const int64_t first = (b * H + h) * w.tokens;
        Vec sum = {};
        for (int64_t n = 0; n < w.tokens; n += kLanes) {
            const int64_t rest = smaller(kLanes, w.tokens - n);
            sum += load(w.d->attention + first + n, rest) * load(w.d->grad_attention + first + n, rest);
        }
        d += sum_of_lanes(sum);
    }
    scalars[2 * H] = d;
    scalars[3 * H] = grad_total;
}

// Gradients of the tokens of one chunk of image b, and its part of that of the absorbed query.
void attend_backward(const Work& w, int64_t b, int64_t chunk, Arena scratch) {
    const int64_t H = w.heads, width = w.width;
    float* tile = scratch.take(kTile * width);
    float* grad = scratch.take(kTile * width);
    float* scores = scratch.take(2 * H * kTile);  // qt x^, then its gradient's weight; grad_z x^, then p's
    float* grad_scores = scratch.take(H * kTile);
    float* mask = scratch.take(kTile);
    float* factor = scratch.take(kTile);
    float* mean = scratch.take(kTile);          // of the gradient of x^ over the channels, times C
    float* mean_product = scratch.take(kTile);  // of the gradient of x^ times x^, times C
    float* ones = scratch.take(H);
    for (int64_t h = 0; h < H; ++h) ones[h] = 1.0f;
    const float* scalars = w.scalars + b * 4 * H;
    float* part = w.part + (b * w.chunks + chunk) * H * width;
    const bool wanted = w.d->patches_gradient.data != nullptr;
    const float by_columns = 1.0f / static_cast<float>(w.d->width);
    const int64_t begin = chunk * w.chunk, end = smaller(begin + w.chunk, w.tokens);
    for (int64_t n = begin; n < end; n += kTile) {
        const int64_t count = smaller(kTile, end - n);
        w.load_tile(b, n, count, false, tile, factor);
        dots(Rows<float>{tile, width, count, width}, 2 * H, w.query(b), width, scores, kTile);
        for (int64_t i = 0; i < kTile; i += kLanes) {
            store(Vec{}, mean + i);
            store(Vec{}, mean_product + i);
        }
        for (int64_t h = 0; h < H; ++h) {
            float *of_query = scores + h * kTile, *of_z = scores + (H + h) * kTile;
            if (w.drops()) w.dropout(b, h, n, count, mask);
            for (int64_t i = 0; i < count; i += kLanes) {
                const IntVec valid = first_lanes(count - i);
                const Vec s = load(of_query + i), dz = load(of_z + i);
                const Vec p = select(valid, exp2(s - w.log_sum(b)[h]), Vec{});
                Vec kept = p, dp = dz;
                if (w.drops()) {
                    const Vec m = select(valid, load(mask + i), Vec{});
                    kept = p * m;
                    dp = (dz + scalars[3 * H + h]) * m;
                }
                if (w.d->grad_attention)
                    dp += load(w.d->grad_attention + (b * H + h) * w.tokens + n + i,
                               smaller(kLanes, count - i));
                const Vec ds = select(valid, p * (dp - scalars[2 * H + h]), Vec{});
                const Vec of_qt = ds * kLn2;  // the query carries log2(e)
                store(ds, grad_scores + h * kTile + i);
                store(of_qt, of_query + i);
                store(kept, of_z + i);
                store(load(mean + i) + kept * scalars[h] + of_qt * scalars[H + h], mean + i);
                store(load(mean_product + i) + select(valid, kept * dz + of_qt * s, Vec{}), mean_product + i);
            }
        }
        accumulate(Rows<float>{tile, width, count, width}, H, Weights{grad_scores, kTile, 1},
                   n == begin ? nullptr : ones, part, width);
        const int64_t rows = wanted ? count : n == 0 ? 1 : 0;
        accumulate(Rows<float>{w.query(b), width, 2 * H, width}, rows, Weights{scores, 1, kTile}, nullptr,
                   grad, width);
        for (int64_t i = 0; i < rows; ++i) {
            float* row = grad + i * width;
            if (n + i == 0) {  // its LayerNorm has another user, the query
                copy_floats(row, width, w.grad_hat + b * width);
                continue;
            }
            const float a = mean[i] * by_columns, e = mean_product[i] * by_columns;
            columns_of(width, [&](int64_t c) {
                store((load(row + c) - a - load(tile + i * width + c) * e) * factor[i], row + c);
            });
            if (w.d->grad_patches.data) {
                float* more = tile + i * width;  // x^ of this token is no longer needed
                load_token(w.d->grad_patches, b, n + i - 1, w.d->tokens, w.d->width, more);
                columns_of(width, [&](int64_t c) { store(load(row + c) + load(more + c), row + c); });
            }
            store_token(row, w.d->patches_gradient, b, n + i - 1, w.d->tokens, w.d->width);
        }
    }
}

// The chunks' gradients of qt of head h of image b together, and from it that of Wk^T q.
void merge_gradient(const Work& w, int64_t b, int64_t h) {
    const float* part = w.part + (b * w.chunks * w.heads + h) * w.width;
    float *query = w.grad_query + w.head(b, h), *key_query = w.grad_key_query + w.head(b, h);
    columns_of(w.width, [&](int64_t c) {
        Vec sum = load(part + c);
        for (int64_t k = 1; k < w.chunks; ++k) sum += load(part + k * w.heads * w.width + c);
        sum *= w.query_factor;
        store(sum, query + c);
        store(sum * load(w.norm.weight + c), key_query + c);
    });
}

// gradient[c] = sum over the images of term(b, c), the columns shared by the team.
template <class Term>
CROSSVIT_INLINE void sum_of_images(const Team& team, const Vector& gradient, int64_t columns, int64_t batch,
                                   Term term) {
    if (!gradient.data) return;
    team.share(padded(columns) / kLanes, [&](int64_t block) {
        const int64_t c = block * kLanes;
        Vec sum = {};
        for (int64_t b = 0; b < batch; ++b) sum += term(b, c);
        float row[kLanes];
        store(sum, row);
        store_row(row, smaller(kLanes, columns - c), gradient.dtype,
                  static_cast<char*>(gradient.data) + c * size_of(gradient.dtype), 1);
    });
}

void projection_gradients(const Team& team, const Work& w, const Projection& gradients, const Layer& layer,
                          const float* grad, int64_t grad_stride, const float* input, const float* hat,
                          const float* grad_norm, Arena scratch) {
    const int64_t batch = w.d->batch, stride = padded(layer.columns);
    outer(team, layer, batch, grad, grad_stride, {input, stride, 0}, gradients.weight.data,
          scratch.take(outer_scratch(layer.columns)));
    sum_of_images(team, gradients.bias, layer.rows, batch,
                  [&](int64_t b, int64_t c) { return load(grad + b * grad_stride + c); });
    sum_of_images(team, gradients.norm_weight, layer.columns, batch, [&](int64_t b, int64_t c) {
        return load(grad_norm + b * stride + c) * load(hat + b * stride + c);
    });
    sum_of_images(team, gradients.norm_bias, layer.columns, batch,
                  [&](int64_t b, int64_t c) { return load(grad_norm + b * stride + c); });
}

// Gradients of all parameters: sums over the images, in their order.
void parameter_gradients(const Team& team, const Work& w, Arena scratch) {
    const Parameters& g = w.d->gradients;
    if (!g.wq.data) return;
    const int64_t batch = w.d->batch, width = w.width, all = w.heads * width;
    float* rows = Arena(scratch).take(outer_scratch(w.d->width));
    outer(team, w.wo(), batch, w.grad_output, width, {w.o(0), w.saved_stride(), 0}, g.wo.data, rows);
    outer(team, w.wv(), batch, w.grad_o, width, {w.values, all, width}, g.wv.data, rows);
    outer(team, w.wk(), batch, w.q(0), w.saved_stride(), {w.grad_key_query, all, width}, g.wk.data, rows);
    outer(team, w.wq(), batch, w.grad_q, width, {w.normed, width, 0}, g.wq.data, rows);
    const auto row = [&](const float* of) {
        return [=](int64_t b, int64_t c) { return load(of + b * width + c); };
    };
    sum_of_images(team, g.bo, w.d->width, batch, row(w.grad_output));
    sum_of_images(team, g.bq, w.d->width, batch, row(w.grad_q));
    sum_of_images(team, g.bv, w.d->width, batch, [&](int64_t b, int64_t c) {
        float total[kLanes];
        for (int i = 0; i < kLanes; ++i) total[i] = w.total(b)[smaller((c + i) / w.head_width, w.heads - 1)];
        return load(w.grad_o + b * width + c) * load(total);
    });
    sum_of_images(team, g.norm_weight, w.d->width, batch, [&](int64_t b, int64_t c) {
        Vec sum = load(w.grad_normed + b * width + c) * load(w.hat + b * width + c);
        for (int64_t h = 0; h < w.heads; ++h) {
            const int64_t at = w.head(b, h) + c;
            sum += load(w.grad_values + at) * load(w.z(b, h) + c) +
                   load(w.grad_query + at) * load(w.key_query + at);
        }
        return sum;
    });
    sum_of_images(team, g.norm_bias, w.d->width, batch, [&](int64_t b, int64_t c) {
        Vec sum = load(w.grad_normed + b * width + c);
        for (int64_t h = 0; h < w.heads; ++h) sum += load(w.grad_values + w.head(b, h) + c) * w.total(b)[h];
        return sum;
    });
    if (w.has_project())
        projection_gradients(team, w, g.project, w.wf(), w.grad_c, width, w.project_input, w.project_hat,
                             w.grad_project_norm, scratch);
    if (w.has_back())
        projection_gradients(team, w, g.back, w.wg(), w.grad_back, w.own, w.back_input, w.back_hat,
                             w.grad_back_norm, scratch);
}

void backward(const Team& team, Work* works, int64_t count, Arena scratch) {
    bool any_back = false, any_project = false, any_scale = false;
    each(works, count, [&](Work& w) {
        any_back = any_back || w.has_back();
        any_project = any_project || w.has_project();
        any_scale = any_scale || w.d->scale_gradient;
    });
    if (any_back) {
        images(team, works, count, [&](Work& w, int64_t b) {
            load_token(w.d->grad_cls, b, 0, w.d->tokens, w.d->own_width, w.grad_back + b * w.own);
        });
        team.wait();
        each(works, count, [&](Work& w) {
            transposed(team, w.wg(), w.d->batch, w.grad_back, w.own, w.grad_y, w.width, 0);
        });
        team.wait();
    }
    images(team, works, count, [&](Work& w, int64_t b) {
        float *grad = w.grad_y + b * w.width, *output = w.grad_output + b * w.width;
        if (w.has_back()) {
            float* hat = w.back_hat + b * w.width;
            copy_floats(w.y(b), w.width, hat);
            const float factor =
                norm_gelu(w.back, hat, w.d->width, w.options->eps, w.back_input + b * w.width);
            norm_gelu_backward(w.back, hat, factor, w.d->width, grad, w.grad_back_norm + b * w.width);
        } else {
            load_token(w.d->grad_cls, b, 0, w.d->tokens, w.d->width, grad);
        }
        if (w.d->scale.data) {
            load_token(w.d->scale, b, 0, w.d->tokens, w.d->width, output);
            columns_of(w.width, [&](int64_t c) { store(load(output + c) * load(grad + c), output + c); });
        } else {
            copy_floats(grad, w.width, output);
        }
        float *hat = w.hat + b * w.width, *normed = w.normed + b * w.width;
        copy_floats(w.c(b), w.width, hat);
        normalise(hat, w.d->width, w.options->eps);
        w.norm.affine(hat, w.width, normed);
    });
    team.wait();
    if (any_scale) {
        each(works, count, [&](Work& w) {
            linear(team, w.wo(), w.d->batch, {w.o(0), w.saved_stride(), 0}, w.bo, nullptr, 0, w.raw, w.width);
        });
        team.wait();
        images(team, works, count, [&](Work& w, int64_t b) {
            if (!w.d->scale_gradient) return;
            const float *output = w.raw + b * w.width, *grad = w.grad_y + b * w.width;
            for (int64_t c = 0; c < w.d->width; ++c)
                w.d->scale_gradient[b * w.d->width + c] = output[c] * grad[c];
        });
    }
    each(works, count, [&](Work& w) {
        transposed(team, w.wo(), w.d->batch, w.grad_output, w.width, w.grad_o, w.width, 0);
        transposed(team, w.wk(), w.d->batch, w.q(0), w.saved_stride(), w.key_query, w.heads * w.width,
                   w.width);
    });
    team.wait();
    each(works, count, [&](Work& w) {
        transposed(team, w.wv(), w.d->batch, w.grad_o, w.width, w.grad_values, w.heads * w.width, w.width);
    });
    heads(team, works, count, [&](Work& w, int64_t b, int64_t h) {
        columns_of(w.width, [&](int64_t c) {
            store(load(w.norm.weight + c) * load(w.z(b, h) + c) + load(w.norm.bias + c) * w.total(b)[h],
                  w.values + w.head(b, h) + c);
        });
    });
    team.wait();
    heads(team, works, count, prepare_gradient);
    team.wait();
    each(works, count, [&](Work& w) {
        team.share(w.d->batch * w.chunks,
                   [&](int64_t i) { attend_backward(w, i / w.chunks, i % w.chunks, scratch); });
    });
    team.wait();
    heads(team, works, count, merge_gradient);
    team.wait();
    each(works, count, [&](Work& w) {
        linear(team, w.wk(), w.d->batch, {w.grad_key_query, w.heads * w.width, w.width}, nullptr, nullptr, 0,
               w.grad_q, w.width);
    });
    team.wait();
    each(works, count, [&](Work& w) {
        transposed(team, w.wq(), w.d->batch, w.grad_q, w.width, w.grad_normed, w.width, 0);
    });
    team.wait();
    images(team, works, count, [&](Work& w, int64_t b) {
        float *grad = w.grad_c + b * w.width, *row = Arena(scratch).take(w.width);
        columns_of(w.width, [&](int64_t c) {
            store(load(w.grad_normed + b * w.width + c) * load(w.norm.weight + c) +
                      load(w.grad_hat + b * w.width + c),
                  grad + c);
        });
        copy_floats(w.c(b), w.width, row);
        const float factor = normalise(row, w.d->width, w.options->eps);
        normalise_backward(grad, row, factor, w.d->width);
        columns_of(w.width,
                   [&](int64_t c) { store(load(grad + c) + load(w.grad_y + b * w.width + c), grad + c); });
        if (!w.has_project() && w.d->cls_gradient.data)
            store_token(grad, w.d->cls_gradient, b, 0, w.d->tokens, w.d->width);
    });
    team.wait();
    if (any_project) {
        each(works, count,
             [&](Work& w) { transposed(team, w.wf(), w.d->batch, w.grad_c, w.width, w.raw, w.own, 0); });
        team.wait();
        images(team, works, count, [&](Work& w, int64_t b) {
            float *grad = w.raw + b * w.own, *hat = w.project_hat + b * w.own;
            load_token(w.d->cls, b, 0, w.d->tokens, w.d->own_width, hat);
            const float factor =
                norm_gelu(w.project, hat, w.d->own_width, w.options->eps, w.project_input + b * w.own);
            norm_gelu_backward(w.project, hat, factor, w.d->own_width, grad, w.grad_project_norm + b * w.own);
            if (w.d->cls_gradient.data)
                store_token(grad, w.d->cls_gradient, b, 0, w.d->tokens, w.d->own_width);
        });
        team.wait();
    }
    each(works, count, [&](Work& w) { parameter_gradients(team, w, scratch); });
}

}  // namespace
}  // namespace CROSSVIT_ISA
}  // namespace crossvit
