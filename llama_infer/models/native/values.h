// Values in bfloat16 or in 8 bits, each times its weight, gathered by heads in vectors. Included by the attentions beside
// it.

#pragma once

#include <algorithm>

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// 32 numbers side by side as two vectors: of a pair in bfloat16, which a shift and a mask take apart, the first ones come
// first; of 8 bits as they stand.
inline void load(const Half* at, Lanes& first, Lanes& second) {
    Words pairs;
    std::memcpy(&pairs, at, sizeof pairs);
    first = (Lanes)(pairs << 16), second = (Lanes)(pairs & 0xffff0000u);
}

#ifdef __AVX512F__  // compilers do not find these
inline void load(const int8_t* at, Lanes& first, Lanes& second) {
    first = (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)));
    second = (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at + 1)));
}
#endif

// Where a dimension stands in what is gathered of bfloat16.
constexpr int place(int d) { return d / 32 * 32 + d % 2 * 16 + d % 32 / 2; }

// Asks for so many numbers.
template <int DIM, typename T>
inline void fetch(const T* from) {
    for (size_t at = 0; at < DIM * sizeof(T); at += 64) __builtin_prefetch((const char*)from + at);
}

// Adds the values of `count` tokens to the sums of some heads, which stay in registers. The weights of neighbouring heads
// and tokens are so far apart. Meanwhile as many tokens' keys or values are asked for.
template <int DIM, int HEADS, typename T>
void gather(const T* values, int64_t count, const float* weights, int64_t by_head, int64_t by_token, float (*sum)[DIM],
            const T* soon) {
    Lanes all[HEADS][DIM / 16];
    std::memcpy(all, sum, sizeof all);
    for (int64_t t = 0; t < count; t++, values += DIM, soon += DIM, weights += by_token) {
        fetch<DIM>(soon);
        for (int d = 0; d < DIM; d += 32) {
            Lanes first, second;
            load(values + d, first, second);
            for (int h = 0; h < HEADS; h++) {
                all[h][d / 16] += weights[h * by_head] * first;
                all[h][d / 16 + 1] += weights[h * by_head] * second;
            }
        }
    }
    std::memcpy(sum, all, sizeof all);
}

// The same for any number of heads, as many at a time as there are registers for.
template <int DIM, typename T>
void gather(const T* values, int64_t count, int64_t heads, const float* weights, int64_t by_head, int64_t by_token,
            float (*sum)[DIM], const T* soon) {
    constexpr int64_t MOST = DIM <= 64 ? 4 : DIM <= 128 ? 2 : 1;
    using Some = void (*)(const T*, int64_t, const float*, int64_t, int64_t, float (*)[DIM], const T*);
    static constexpr Some runs[] = {gather<DIM, 1, T>, gather<DIM, 2, T>, gather<DIM, 3, T>, gather<DIM, 4, T>};
    for (int64_t h = 0; h < heads; h += MOST)
        runs[std::min(MOST, heads - h) - 1](values, count, weights + h * by_head, by_head, by_token, sum + h, soon);
}

}  // namespace
