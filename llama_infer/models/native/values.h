// Values in bfloat16, each times its weight, gathered by heads in vectors. Included by the attentions beside it.

#pragma once

#include <algorithm>

#include "numbers.h"

namespace {

// Adds the values of `count` tokens to the sums of some heads, which stay in registers. The weights of neighbouring heads
// and tokens are so far apart. Of 32 numbers of a sum those of even place come first: a pair in bfloat16 is taken apart by
// a shift and a mask. Meanwhile as many tokens' keys or values are asked for.
template <int DIM, int HEADS>
void gather(const Half* values, int64_t count, const float* weights, int64_t by_head, int64_t by_token, float (*sum)[DIM],
            const Half* soon) {
    Lanes all[HEADS][DIM / 16];
    std::memcpy(all, sum, sizeof all);
    for (int64_t t = 0; t < count; t++, values += DIM, soon += DIM, weights += by_token) {
        for (int d = 0; d < DIM; d += 32) {
            __builtin_prefetch(soon + d);
            Words pairs;
            std::memcpy(&pairs, values + d, sizeof pairs);
            const Lanes even = (Lanes)(pairs << 16), odd = (Lanes)(pairs & 0xffff0000u);
            for (int h = 0; h < HEADS; h++) {
                all[h][d / 16] += weights[h * by_head] * even;
                all[h][d / 16 + 1] += weights[h * by_head] * odd;
            }
        }
    }
    std::memcpy(sum, all, sizeof all);
}

// The same for any number of heads, as many at a time as there are registers for.
template <int DIM>
void gather(const Half* values, int64_t count, int64_t heads, const float* weights, int64_t by_head, int64_t by_token,
            float (*sum)[DIM], const Half* soon) {
    constexpr int64_t MOST = DIM <= 64 ? 4 : DIM <= 128 ? 2 : 1;
    using Some = void (*)(const Half*, int64_t, const float*, int64_t, int64_t, float (*)[DIM], const Half*);
    static constexpr Some runs[] = {gather<DIM, 1>, gather<DIM, 2>, gather<DIM, 3>, gather<DIM, 4>};
    for (int64_t h = 0; h < heads; h += MOST)
        runs[std::min(MOST, heads - h) - 1](values, count, weights + h * by_head, by_head, by_token, sum + h, soon);
}

// Where a dimension stands in such a sum.
constexpr int place(int d) { return d / 32 * 32 + d % 2 * 16 + d % 32 / 2; }

}  // namespace
