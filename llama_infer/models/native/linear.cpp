// Linear layers of few rows in bfloat16: y [rows, out] = x [rows, in] W^T + bias, as fast as W can be read from memory.
// W lies as oneDNN packs it, [out / block][inputs / 2][block][2] with zeros behind both ends. Sums are in float32, in an
// order that depends on the layer alone: a row's result is the same whatever other rows are in the call.

#include <algorithm>
#include <cstdlib>

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define LLAMA_INFER_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t TALL = 16, WIDE = 32;  // a tile of x: so many rows and inputs, next to each other in memory

struct Layer {  // as linear.py fills it
    const Half *weight, *bias;  // bias: or null
    int64_t out, in, block, inputs;  // inputs: in, with the zeros behind

    int64_t tiled() const { return (inputs + WIDE - 1) / WIDE * WIDE; }  // inputs in whole tiles
};

// Asks for weights that are needed soon: the processor's own foresight ends at every page. Into the second cache, since
// requests from the first are few, and x needs them.
inline void fetch(const Half* at) { __builtin_prefetch((const char*)at + 4096, 0, 2); }

// A row's outputs from `first` on, as many of `most` as the layer has.
inline void store(const float* sums, const Layer& layer, int64_t first, int64_t most, Half* y) {
    const int64_t count = std::min(most, layer.out - first);
    y += first;
    if (layer.bias)
        for (int64_t n = 0; n < count; n++) y[n] = narrow(sums[n] + widen(layer.bias[first + n]));
    else
        for (int64_t n = 0; n < count; n++) y[n] = narrow(sums[n]);
}

// Sixteen rows of x as tiles, zeros behind the ends.
void gather(const Layer& layer, const Half* x, int64_t rows, Half* tiles) {
    for (int64_t k = 0; k < layer.inputs; k += WIDE)
        for (int64_t r = 0; r < TALL; r++, tiles += WIDE) {
            const int64_t count = r < rows ? std::clamp<int64_t>(layer.in - k, 0, WIDE) : 0;
            if (count) std::memcpy(tiles, x + r * layer.in + k, count * sizeof(Half));
            if (count < WIDE) std::memset(tiles + count, 0, (WIDE - count) * sizeof(Half));
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
    for (int r = 0; r < ROWS; r++) store((const float*)sums[r], layer, first, VECTORS * 16, y + r * layer.out);
}

// The same for any number of them, as many at a time as the registers hold.
template <int VECTORS>
void vectors(const Layer& layer, const Half* w, const Half* x, Half* y, int64_t rows, int64_t first) {
    constexpr int MOST = VECTORS < 3 ? 8 : 6;
    using Some = void (*)(const Layer&, const Half*, const Half*, Half*, int64_t);
    static constexpr Some runs[] = {some<VECTORS, 1>, some<VECTORS, 2>, some<VECTORS, 3>, some<VECTORS, 4>,
                                    some<VECTORS, 5>, some<VECTORS, 6>, some<VECTORS, 7>, some<VECTORS, 8>};
    const int64_t sixteen = layer.tiled() * TALL;
    for (int64_t r = 0; r < rows;) {
        const int64_t count = std::min<int64_t>({MOST, rows - r, TALL - r % TALL});
        runs[count - 1](layer, w, x + r / TALL * sixteen + r % TALL * WIDE, y + r * layer.out, first);
        r += count;
    }
}

#ifdef LLAMA_INFER_TILES
// The processor's tiles: 0-3 sums, 4-5 inputs, 6-7 weights.
struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    explicit Shapes(int64_t upper) { rows[0] = rows[1] = rows[4] = uint8_t(upper); }
};

inline void store_tile(const float* sums, const Layer& layer, int64_t first, int64_t rows, Half* y) {
    for (int64_t r = 0; r < rows; r++) store(sums + r * 16, layer, first, 16, y + r * layer.out);
}

// 32 outputs of up to 32 rows; LOWER: of more than 16.
template <bool LOWER>
void products(const Layer& layer, const Half* w, const Half* x, Half* y, int64_t rows, int64_t first) {
    const Half* below = x + layer.inputs * TALL;
    const int64_t pair = layer.block * 2;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (LOWER) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < layer.inputs; k += WIDE, w += pair * 16) {
        for (int p = 0; p < 16; p++) {
            fetch(w + p * pair);
            fetch(w + p * pair + 32);
        }
        _tile_loadd(6, w, pair * sizeof(Half));
        _tile_loadd(7, w + 32, pair * sizeof(Half));
        _tile_loadd(4, x + k * TALL, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (LOWER) {
            _tile_loadd(5, below + k * TALL, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[4][256];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    for (int half = 0; half < 2; half++)
        store_tile(sums[half], layer, first + half * 16, std::min(rows, TALL), y);
    if constexpr (LOWER) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int half = 0; half < 2; half++)
            store_tile(sums[2 + half], layer, first + half * 16, rows - TALL, y + TALL * layer.out);
    }
}

// A thread's tiles; in the end as they were, for oneDNN keeps its own from call to call.
class Tiles {
  public:
    Tiles() { _tile_storeconfig(before_); }
    ~Tiles() { _tile_loadconfig(before_); }

    void block(const Layer& layer, const Half* w, const Half* x, Half* y, int64_t rows, int64_t first) {
        for (int64_t r = 0; r < rows; r += 2 * TALL) {
            const int64_t count = std::min(2 * TALL, rows - r), upper = std::min(count, TALL);
            if (upper != upper_) {
                const Shapes shapes(upper);
                _tile_loadconfig(&shapes);
                upper_ = upper;
            }
            const auto run = count > TALL ? products<true> : products<false>;
            for (int64_t n = 0; n < layer.block && first + n < layer.out; n += 32)
                run(layer, w + n * 2, x + r * layer.inputs, y + r * layer.out, count, first + n);
        }
    }

  private:
    alignas(64) char before_[64];
    int64_t upper_ = 0;
};
#endif

// Whether the processor multiplies tiles; the system grants them to a process that asks.
bool have_tiles() {
#ifdef LLAMA_INFER_TILES
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
#else
    return false;
#endif
}

Half* scratch(size_t count) {
    static thread_local struct Buffer {
        Half* at = nullptr;
        size_t count = 0;
        ~Buffer() { std::free(at); }
    } buffer;
    if (buffer.count < count) {
        std::free(buffer.at);
        buffer.at = (Half*)std::aligned_alloc(64, (count * sizeof(Half) + 63) / 64 * 64);
        buffer.count = buffer.at ? count : 0;
    }
    return buffer.at;
}

}  // namespace

// x [rows, in] and y [rows, out] lie densely. False: there is no memory.
extern "C" bool linear(const Layer* given, const Half* x, Half* y, int64_t rows) {
    const Layer layer = *given;
    const int64_t blocks = (layer.out + layer.block - 1) / layer.block;
    const int64_t sixteen = layer.tiled() * TALL;
    Half* tiles = scratch((rows + TALL - 1) / TALL * sixteen);
    if (!tiles) return false;
    const bool tiled = have_tiles() && layer.block % 32 == 0 && layer.inputs % WIDE == 0;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += TALL) gather(layer, x + r * layer.in, rows - r, tiles + r / TALL * sixteen);
#ifdef LLAMA_INFER_TILES
        if (tiled) {
            Tiles own;
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++)
                own.block(layer, layer.weight + b * layer.block * layer.inputs, tiles, y, rows, b * layer.block);
        } else
#endif
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) {
                const Half* w = layer.weight + b * layer.block * layer.inputs;
                if (layer.block == 16) vectors<1>(layer, w, tiles, y, rows, b * layer.block);
                if (layer.block == 32) vectors<2>(layer, w, tiles, y, rows, b * layer.block);
                if (layer.block == 48) vectors<3>(layer, w, tiles, y, rows, b * layer.block);
                if (layer.block == 64) vectors<4>(layer, w, tiles, y, rows, b * layer.block);
            }
    }
    return true;
}
