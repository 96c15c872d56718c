// Attention of single new tokens. Every row reads its own keys and values once and nothing else: rows of any lengths
// share a call without padding, and the query heads of a group share what is read. Sums are in float32. The scales of keys
// and values in 8 bits multiply scores and weights, of which there are few.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "../../exponential.h"
#include "numbers.h"
#include "values.h"

namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float widen(BFloat16 x) { return widen(x.bits); }

inline float widen(int8_t x) { return x; }

inline void narrow(float x, BFloat16& to) { to.bits = narrow(x); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LLAMA_INFER_LANES
typedef float Quad __attribute__((vector_size(16)));

// The sums of four vectors' sixteen numbers each, side by side: a third of the instructions of four sums.
inline Quad sums(Lanes a, Lanes b, Lanes c, Lanes d) {
    auto pairs = [](Lanes x, Lanes y) {
        return __builtin_shufflevector(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               __builtin_shufflevector(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    };
    Lanes ab = pairs(a, b), cd = pairs(c, d);
    Lanes all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    Quad quads[4];
    std::memcpy(quads, &all, sizeof all);
    return (quads[0] + quads[1]) + (quads[2] + quads[3]);
}
#endif
#endif

#if defined(__AVX512BF16__) && defined(LLAMA_INFER_LANES)
#define LLAMA_INFER_PAIRS
// Of a query and four keys in bfloat16, pairs of numbers at a time.
template <int DIM>
inline void scores(const BFloat16* query, const BFloat16* const* keys, float scale, float* found) {
    Lanes each[4];
    for (int t = 0; t < 4; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int d = 0; d < DIM; d += 32)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(query + d), (__m512bh)_mm512_loadu_si512(keys[t] + d));
        each[t] = (Lanes)sum;
    }
    Quad quad = sums(each[0], each[1], each[2], each[3]) * scale;
    std::memcpy(found, &quad, sizeof quad);
}

template <typename T, int DIM>
constexpr bool PAIRED = sizeof(T) == 2 && DIM % 32 == 0;
#else
template <typename T, int DIM>
constexpr bool PAIRED = false;
#endif

#ifdef LLAMA_INFER_LANES
// Whether values are gathered in vectors as they lie, and what they are then.
#ifdef __AVX512F__
template <typename S, int DIM>
constexpr bool GATHERED = PAIRED<S, DIM> || (sizeof(S) == 1 && DIM % 32 == 0);
#else
template <typename S, int DIM>
constexpr bool GATHERED = PAIRED<S, DIM>;
#endif

template <typename S>
using Plain = std::conditional_t<sizeof(S) == 1, int8_t, Half>;
#endif

// Of a query and four keys.
template <int DIM>
inline void scores(const float* query, const float* keys, float* found) {
#ifdef LLAMA_INFER_LANES
    if constexpr (DIM % 16 == 0) {
        Lanes each[4];
        for (int t = 0; t < 4; t++) {
            each[t] = load(query) * load(keys + t * DIM);
            for (int d = 16; d < DIM; d += 16) each[t] += load(query + d) * load(keys + t * DIM + d);
        }
        Quad quad = sums(each[0], each[1], each[2], each[3]);
        std::memcpy(found, &quad, sizeof quad);
        return;
    }
#endif
    for (int t = 0; t < 4; t++) {
        float score = 0;
        for (int d = 0; d < DIM; d++) score += query[d] * keys[t * DIM + d];
        found[t] = score;
    }
}

// Four tokens in float32; in place of those behind the end, the last one again.
template <typename T, int DIM>
inline void four(const T* from, int64_t start, int64_t end, float* to) {
    for (int t = 0; t < 4; t++) {
        const T* token = from + std::min(start + t, end - 1) * DIM;
        for (int d = 0; d < DIM; d++) to[t * DIM + d] = widen(token[d]);
    }
}

// Keys or values of type S, and their scales where that is int8_t.
template <typename S, typename T>
struct Held {
    const S* numbers;
    const T* scales;

    template <int DIM>
    Held from(int64_t at) const {
        return {numbers + at, sizeof(S) == 1 ? scales + at / DIM : nullptr};
    }

    // Multiplies what there is one of for each of some tokens.
    void scale(int64_t start, int64_t count, float* of) const {
        if (sizeof(S) == 1)
            for (int64_t t = 0; t < count; t++) of[t] *= widen(scales[start + t]);
    }
};

// One KV head of one row: a tile of tokens at a time, with a running maximum (Milakov and Gimelshein 2018).
template <typename S, typename T, int DIM>
void attend(const T* q, Held<S, T> keys, Held<S, T> values, T* out, int64_t first, int64_t end, int64_t group,
            float scale) {
    constexpr int TILE = 64, HEADS = 8;
    alignas(64) float query[HEADS][DIM], sum[HEADS][DIM], weights[HEADS][TILE], some[4 * DIM];
    float most[HEADS], total[HEADS];
    const S *k = keys.numbers, *v = values.numbers;
    for (int64_t g0 = 0; g0 < group; g0 += HEADS) {
        const int heads = int(std::min<int64_t>(HEADS, group - g0));
        for (int g = 0; g < heads; g++) {
            most[g] = -INFINITY, total[g] = 0;
            for (int d = 0; d < DIM; d++) query[g][d] = widen(q[(g0 + g) * DIM + d]) * scale, sum[g][d] = 0;
        }
        for (int64_t start = first; start < end; start += TILE) {
            const int count = int(std::min<int64_t>(TILE, end - start));
            for (int t = 0; t < count; t += 4) {
                fetch<4 * DIM>(v + (start + t) * DIM);
#ifdef LLAMA_INFER_PAIRS
                if constexpr (PAIRED<S, DIM>) {
                    const BFloat16* each[4];
                    for (int i = 0; i < 4; i++) each[i] = k + std::min(start + t + i, end - 1) * DIM;
                    for (int g = 0; g < heads; g++) scores<DIM>(q + (g0 + g) * DIM, each, scale, weights[g] + t);
                    continue;
                }
#endif
                four<S, DIM>(k, start + t, end, some);
                for (int g = 0; g < heads; g++) scores<DIM>(query[g], some, weights[g] + t);
            }
            for (int g = 0; g < heads; g++) {
                keys.scale(start, count, weights[g]);
                float top = most[g];
                for (int t = 0; t < count; t++) top = top < weights[g][t] ? weights[g][t] : top;
                const float shrink = top == most[g] ? 1.f : most[g] == -INFINITY ? 0.f : exponential(most[g] - top);
                float added = 0;
                for (int t = 0; t < count; t++) {
                    weights[g][t] = exponential(weights[g][t] - top);
                    added += weights[g][t];
                }
                values.scale(start, count, weights[g]);
                for (int t = count; t % 4; t++) weights[g][t] = 0;
                most[g] = top, total[g] = total[g] * shrink + added;
                for (int d = 0; d < DIM; d++) sum[g][d] *= shrink;
            }
#ifdef LLAMA_INFER_LANES
            if constexpr (GATHERED<S, DIM>) {
                gather<DIM>((const Plain<S>*)v + start * DIM, count, heads, weights[0], TILE, 1, sum,
                            (const Plain<S>*)k + (start + TILE) * DIM);
                continue;
            }
#endif
            for (int t = 0; t < count; t += 4) {
                fetch<4 * DIM>(k + (start + TILE + t) * DIM);
                four<S, DIM>(v, start + t, end, some);
                for (int g = 0; g < heads; g++) {
                    const float *w = weights[g] + t, *x = some;
                    for (int d = 0; d < DIM; d++, x++)
                        sum[g][d] += (w[0] * x[0] + w[1] * x[DIM]) + (w[2] * x[2 * DIM] + w[3] * x[3 * DIM]);
                }
            }
        }
        for (int g = 0; g < heads; g++)
            for (int d = 0; d < DIM; d++) {
                const int at = PAIRED<S, DIM> ? place(d) : d;
                narrow(sum[g][at] / total[g], out[(g0 + g) * DIM + d]);
            }
    }
}

template <typename S, typename T, int DIM>
void all(const T* q, Held<S, T> keys, Held<S, T> values, T* out, const int64_t* where, int64_t rows, int64_t heads,
         int64_t group, int64_t row_stride, int64_t head_stride, int64_t window, float scale) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < rows * heads; i++) {
        const int64_t row = where[i / heads], token = where[rows + i / heads], end = where[3 * rows + i / heads];
        const int64_t held = row * row_stride + i % heads * head_stride;
        const int64_t asked = (token * heads + i % heads) * group * DIM;
        attend<S, T, DIM>(q + asked, keys.template from<DIM>(held), values.template from<DIM>(held), out + asked,
                          std::max<int64_t>(0, end - window), end, group, scale);
    }
}

}  // namespace

// q and out [N, heads * group, DIM]; k and v as they lie in the cache, and where they are of 8 bits their scales, one where
// there are DIM of the numbers.
#define ATTEND(NAME, STORED, TYPE, DIM)                                                                                \
    extern "C" void NAME##_##DIM(const void* q, const void* k, const void* v, const void* k_scale,                     \
                                 const void* v_scale, void* out, const int64_t* where, int64_t rows, int64_t heads,    \
                                 int64_t group, int64_t row_stride, int64_t head_stride, int64_t window,               \
                                 float scale) {                                                                        \
        using Each = Held<STORED, TYPE>;                                                                               \
        all<STORED, TYPE, DIM>((const TYPE*)q, Each{(const STORED*)k, (const TYPE*)k_scale},                           \
                               Each{(const STORED*)v, (const TYPE*)v_scale}, (TYPE*)out, where, rows, heads, group,    \
                               row_stride, head_stride, window, scale);                                                \
    }
