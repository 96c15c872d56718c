// Linear layers in bfloat16: y [rows, out] = x [rows, in] W^T + bias. W lies as oneDNN packs it,
// [out / block][inputs / 2][block][2] with zeros behind both ends. Sums are in float32, in an order that depends on the
// layer alone: a row's result is the same whatever other rows are in the call.

#include <algorithm>

#include "numbers.h"
#include "scratch.h"
#include "turns.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TALL = 16, WIDE = 32;  // of x so many rows and inputs lie next to each other

struct Layer {  // as linear.py fills it
    const Half *weight, *bias;  // bias: or null
    int64_t out, in, block, inputs;  // inputs: in, with the zeros behind

    int64_t sixteen() const { return (inputs + WIDE - 1) / WIDE * WIDE * TALL; }  // what sixteen rows of x take
};

// Asks for weights that are needed soon: the processor's own foresight ends at every page. Into the second cache, since
// requests from the first are few, and x needs them.
inline void fetch(const Half* at) { __builtin_prefetch((const char*)at + 4096, 0, 2); }

// Sixteen of a row's outputs, from `first` on, or those that are left.
inline void store(Lanes sums, const Layer& layer, int64_t first, Half* y) {
    const int64_t count = std::min<int64_t>(16, layer.out - first);
    if (count <= 0) return;
    if (layer.bias) {
        Lanes bias = {};
        for (int64_t n = 0; n < count; n++) bias[n] = widen(layer.bias[first + n]);
        sums += bias;
    }
    const Halves all = narrow(sums);
    if (count == 16)
        std::memcpy(y + first, &all, sizeof all);
    else
        std::memcpy(y + first, &all, count * sizeof(Half));
}

// Sixteen rows of x, WIDE inputs of each next to each other, with zeros behind the ends.
void gather(const Layer& layer, const Half* x, int64_t rows, Half* to) {
    for (int64_t k = 0; k < layer.inputs; k += WIDE)
        for (int64_t r = 0; r < TALL; r++, to += WIDE) {
            const int64_t count = r < rows ? std::clamp<int64_t>(layer.in - k, 0, WIDE) : 0;
            std::memcpy(to, x + r * layer.in + k, count * sizeof(Half));
            std::memset(to + count, 0, (WIDE - count) * sizeof(Half));
        }
}

// The sums of sixteen outputs and of two inputs more.
inline Lanes dot(Lanes sum, Words weights, uint32_t inputs) {
    const Words both = Words{} + inputs;
#ifdef __AVX512BF16__
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)both);
#else
    sum += (Lanes)(weights << 16) * (Lanes)(both << 16);
    return sum + (Lanes)(weights & 0xffff0000u) * (Lanes)(both & 0xffff0000u);
#endif
}

// A block of VECTORS * 16 outputs, for ROWS rows.
template <int VECTORS, int ROWS>
void some(const Layer& layer, const Half* w, const Half* x, Half* y, int64_t first) {
    Lanes sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < layer.inputs; k += 2, w += VECTORS * 32) {
        Words weights[VECTORS];
        std::memcpy(weights, w, sizeof weights);
        for (int v = 0; v < VECTORS; v++) fetch(w + v * 32);
        const Half* at = x + k / WIDE * WIDE * TALL + k % WIDE;
        for (int r = 0; r < ROWS; r++) {
            uint32_t inputs;
            std::memcpy(&inputs, at + r * WIDE, 4);
            for (int v = 0; v < VECTORS; v++) sums[r][v] = dot(sums[r][v], weights[v], inputs);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store(sums[r][v], layer, first + v * 16, y + r * layer.out);
}

// The same for any number of them, as many at a time as the registers hold.
template <int VECTORS>
void vectors(const Layer& layer, const Half* w, const Half* x, Half* y, int64_t rows, int64_t first) {
    constexpr int MOST = VECTORS < 3 ? 8 : 6;
    using Some = void (*)(const Layer&, const Half*, const Half*, Half*, int64_t);
    static constexpr Some runs[] = {some<VECTORS, 1>, some<VECTORS, 2>, some<VECTORS, 3>, some<VECTORS, 4>,
                                    some<VECTORS, 5>, some<VECTORS, 6>, some<VECTORS, 7>, some<VECTORS, 8>};
    const int64_t sixteen = layer.sixteen();
    for (int64_t r = 0; r < rows;) {
        const int64_t count = std::min<int64_t>({MOST, rows - r, TALL - r % TALL});
        runs[count - 1](layer, w, x + r / TALL * sixteen + r % TALL * WIDE, y + r * layer.out, first);
        r += count;
    }
}

}  // namespace

// x [rows, in] and y [rows, out] lie densely. False: there is no memory.
extern "C" bool linear(const Layer* given, const Half* x, Half* y, int64_t rows) {
    const Layer layer = *given;
    const int64_t blocks = (layer.out + layer.block - 1) / layer.block, sixteen = layer.sixteen();
    static thread_local Scratch memory;
    Half* laid = memory.at_least<Half>((rows + TALL - 1) / TALL * sixteen);
    if (!laid) return false;
    Turns turns(blocks);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += TALL)
            gather(layer, x + r * layer.in, rows - r, laid + r / TALL * sixteen);
        turns.each([&](int64_t b, int64_t) {
            const Half* w = layer.weight + b * layer.block * layer.inputs;
            if (layer.block == 16) vectors<1>(layer, w, laid, y, rows, b * layer.block);
            if (layer.block == 32) vectors<2>(layer, w, laid, y, rows, b * layer.block);
            if (layer.block == 48) vectors<3>(layer, w, laid, y, rows, b * layer.block);
            if (layer.block == 64) vectors<4>(layer, w, laid, y, rows, b * layer.block);
        });
    }
    return true;
}
