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

// Where results go: a row of the layer's outputs, from the first of a block on, every `stride` numbers.
struct Place {
    Half* at;
    int64_t stride;

    Place row(int64_t r) const { return {at + r * stride, stride}; }
    Place output(int64_t n) const { return {at + n, stride}; }
};

// A row's outputs from `first` on, as many of `most` as the layer has.
inline void store(const float* sums, const Layer& layer, int64_t first, int64_t most, Half* y) {
    const int64_t count = std::min(most, layer.out - first);
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
void some(const Layer& layer, const Half* w, const Half* x, Place y, int64_t first) {
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
    for (int r = 0; r < ROWS; r++) store((const float*)sums[r], layer, first, VECTORS * 16, y.row(r).at);
}

// The same for any number of them, as many at a time as the registers hold.
template <int VECTORS>
void vectors(const Layer& layer, const Half* w, const Half* x, Place y, int64_t rows, int64_t first) {
    constexpr int MOST = VECTORS < 3 ? 8 : 6;
    using Some = void (*)(const Layer&, const Half*, const Half*, Place, int64_t);
    static constexpr Some runs[] = {some<VECTORS, 1>, some<VECTORS, 2>, some<VECTORS, 3>, some<VECTORS, 4>,
                                    some<VECTORS, 5>, some<VECTORS, 6>, some<VECTORS, 7>, some<VECTORS, 8>};
    const int64_t sixteen = layer.tiled() * TALL;
    for (int64_t r = 0; r < rows;) {
        const int64_t count = std::min<int64_t>({MOST, rows - r, TALL - r % TALL});
        runs[count - 1](layer, w, x + r / TALL * sixteen + r % TALL * WIDE, y.row(r), first);
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

inline void store_tile(const float* sums, const Layer& layer, int64_t first, int64_t rows, Place y) {
    for (int64_t r = 0; r < rows; r++) store(sums + r * 16, layer, first, 16, y.row(r).at);
}

// 32 outputs of up to 32 rows; LOWER: of more than 16.
template <bool LOWER>
void products(const Layer& layer, const Half* w, const Half* x, Place y, int64_t rows, int64_t first) {
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
        store_tile(sums[half], layer, first + half * 16, std::min(rows, TALL), y.output(half * 16));
    if constexpr (LOWER) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int half = 0; half < 2; half++)
            store_tile(sums[2 + half], layer, first + half * 16, rows - TALL, y.row(TALL).output(half * 16));
    }
}

// A thread's tiles; in the end as they were, for oneDNN keeps its own from call to call.
class Tiles {
  public:
    explicit Tiles(bool used) : used_(used) {
        if (used_) _tile_storeconfig(before_);
    }
    ~Tiles() {
        if (used_) _tile_loadconfig(before_);
    }

    void block(const Layer& layer, const Half* w, const Half* x, Place y, int64_t rows, int64_t first) {
        for (int64_t r = 0; r < rows; r += 2 * TALL) {
            const int64_t count = std::min(2 * TALL, rows - r), upper = std::min(count, TALL);
            if (upper != upper_) {
                const Shapes shapes(upper);
                _tile_loadconfig(&shapes);
                upper_ = upper;
            }
            const auto run = count > TALL ? products<true> : products<false>;
            for (int64_t n = 0; n < layer.block && first + n < layer.out; n += 32)
                run(layer, w + n * 2, x + r * layer.inputs, y.row(r).output(n), count, first + n);
        }
    }

  private:
    const bool used_;
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

// What a thread computes with: the tiles, where there are some, or vectors.
class Worker {
  public:
#ifdef LLAMA_INFER_TILES
    explicit Worker(bool tiled) : tiled_(tiled), tiles_(tiled) {}
#else
    explicit Worker(bool) {}
#endif

    // Block `b` of a layer's outputs.
    void block(const Layer& layer, const Half* x, Place y, int64_t rows, int64_t b) {
        const Half* w = layer.weight + b * layer.block * layer.inputs;
        const int64_t first = b * layer.block;
#ifdef LLAMA_INFER_TILES
        if (tiled_) return tiles_.block(layer, w, x, y, rows, first);
#endif
        if (layer.block == 16) vectors<1>(layer, w, x, y, rows, first);
        if (layer.block == 32) vectors<2>(layer, w, x, y, rows, first);
        if (layer.block == 48) vectors<3>(layer, w, x, y, rows, first);
        if (layer.block == 64) vectors<4>(layer, w, x, y, rows, first);
    }

#ifdef LLAMA_INFER_TILES
  private:
    const bool tiled_;
    Tiles tiles_;
#endif
};

// Calls work(worker, tiles of x, b) for every block; each thread has a share of neighbours. False: there is no memory.
template <typename Work>
bool share(const Layer& layer, const Half* x, int64_t rows, Work work) {
    const int64_t blocks = (layer.out + layer.block - 1) / layer.block, sixteen = layer.tiled() * TALL;
    Half* tiles = scratch((rows + TALL - 1) / TALL * sixteen);
    const bool tiled = have_tiles() && layer.block % 32 == 0 && layer.inputs % WIDE == 0;
    if (!tiles) return false;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += TALL) gather(layer, x + r * layer.in, rows - r, tiles + r / TALL * sixteen);
        Worker worker(tiled);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) work(worker, tiles, b);
    }
    return true;
}

}  // namespace

// x [rows, in] and y [rows, out] lie densely.
extern "C" bool linear(const Layer* layer, const Half* x, Half* y, int64_t rows) {
    return share(*layer, x, rows, [=](Worker& worker, const Half* tiles, int64_t b) {
        worker.block(*layer, tiles, {y + b * layer->block, layer->out}, rows, b);
    });
}

// silu(gate(x)) * up(x), of two layers of one shape that lie alike; at most MOST rows.
extern "C" bool gated(const Layer* gate, const Layer* up, const Half* x, Half* y, int64_t rows) {
    constexpr int64_t MOST = 32, WIDEST = 64;
    return rows <= MOST && share(*gate, x, rows, [=](Worker& worker, const Half* tiles, int64_t b) {
        alignas(64) Half of_gate[MOST * WIDEST], of_up[MOST * WIDEST];
        const int64_t first = b * gate->block, count = std::min(gate->block, gate->out - first);
        worker.block(*gate, tiles, {of_gate, WIDEST}, rows, b);
        worker.block(*up, tiles, {of_up, WIDEST}, rows, b);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t n = 0; n < count; n += LANES) {
                const int64_t at = r * WIDEST + n;
                silu_times(of_gate + at, of_up + at, y + r * gate->out + first + n, std::min<int64_t>(LANES, count - n));
            }
    });
}
