// Linear layers in bfloat16: y [rows, out] = x [rows, in] W^T + bias. W lies as oneDNN packs it,
// [out / block][inputs / 2][block][2] with zeros behind both ends. Sums are in float32, in an order that depends on the
// layer alone: a row's result is the same whatever other rows are in the call.

#include <algorithm>
#include <cstdlib>

#include "numbers.h"
#include "tiles.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TALL = 16, WIDE = 32;  // a tile of x: so many rows and inputs, next to each other in memory

struct Layer {  // as linear.py fills it
    const Half *weight, *bias;  // bias: or null
    int64_t out, in, block, inputs;  // inputs: in, with the zeros behind

    int64_t tiled() const { return (inputs + WIDE - 1) / WIDE * WIDE; }  // inputs in whole tiles
};

// Memory that a thread keeps from call to call, one of each type; null: there is none.
template <typename T>
T* scratch(size_t count) {
    static thread_local struct Buffer {
        T* at = nullptr;
        size_t count = 0;
        ~Buffer() { std::free(at); }
    } buffer;
    if (buffer.count < count) {
        std::free(buffer.at);
        buffer.at = (T*)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
        buffer.count = buffer.at ? count : 0;
    }
    return buffer.at;
}

// Asks for weights that are needed soon: the processor's own foresight ends at every page. Into the second cache, since
// requests from the first are few, and x needs them.
inline void fetch(const Half* at) { __builtin_prefetch((const char*)at + 4096, 0, 2); }

// Sixteen of a row's outputs, from `first` on, or those that are left. PAST: past the caches, which need not read first
// what is written whole.
template <bool PAST>
inline void store(Lanes sums, const Layer& layer, int64_t first, Half* y) {
    const int64_t count = std::min<int64_t>(16, layer.out - first);
    if (count <= 0) return;
    if (layer.bias) {
        Lanes bias = {};
        for (int64_t n = 0; n < count; n++) bias[n] = widen(layer.bias[first + n]);
        sums += bias;
    }
    const Halves all = narrow(sums);
#ifdef LLAMA_INFER_TILES
    if (PAST && count == 16 && (uintptr_t)(y + first) % sizeof all == 0) {
        _mm256_stream_si256((__m256i*)(y + first), (__m256i)all);
        return;
    }
#endif
    if (count == 16)
        std::memcpy(y + first, &all, sizeof all);
    else
        std::memcpy(y + first, &all, count * sizeof(Half));
}

// Of sixteen rows of x the inputs from `start` on, `depth` of them, as tiles, with zeros behind the ends.
void gather(const Layer& layer, const Half* x, int64_t rows, int64_t start, int64_t depth, Half* tiles) {
    for (int64_t k = start; k < start + depth; k += WIDE)
        for (int64_t r = 0; r < TALL; r++, tiles += WIDE) {
            const int64_t count = r < rows ? std::clamp<int64_t>(layer.in - k, 0, WIDE) : 0;
            if (count == WIDE)
                std::memcpy(tiles, x + r * layer.in + k, WIDE * sizeof(Half));
            else if (count)
                std::memcpy(tiles, x + r * layer.in + k, count * sizeof(Half));
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
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) store<false>(sums[r][v], layer, first + v * 16, y + r * layer.out);
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
constexpr int64_t MOST_ROWS = 256, INNER = 1024;  // of a pass over the weights; inputs before sums are put aside
constexpr int64_t CHUNK = 1 << 19;  // inputs, of all rows of a pass, that stay in the second cache
constexpr int64_t LARGE = 1 << 18;  // outputs that do not

// 32 outputs of up to 32 rows, LOWER: of more than 16: adds `steps` * WIDE products to the sums, four tiles (0 to 3; 4
// and 5 are inputs, 6 and 7 weights). Of weights that are needed soon, LINES of each step's 32 lines are asked for: where
// there are more rows, they share the asking.
template <bool LOWER, int LINES>
void products(const Half* w, int64_t pair, const Half* x, const Half* below, int64_t steps, bool fresh, float* sums,
              const Half* soon) {
    written();
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (LOWER) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        if constexpr (LOWER) {
            _tile_loadd(2, sums + 512, 64);
            _tile_loadd(3, sums + 768, 64);
        }
    }
    for (int64_t s = 0; s < steps; s++, w += pair * 16, x += TALL * WIDE, below += TALL * WIDE) {
        for (int line = 0; line < LINES; line += 2) {
            __builtin_prefetch(soon + line / 2 * pair, 0, 2);
            __builtin_prefetch(soon + line / 2 * pair + 32, 0, 2);
        }
        soon += pair * 16;
        _tile_loadd(6, w, pair * sizeof(Half));
        _tile_loadd(7, w + 32, pair * sizeof(Half));
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (LOWER) {
            _tile_loadd(5, below, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if constexpr (LOWER) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

// What comes of the sums of 32 outputs of up to 32 rows.
template <bool PAST>
void finish(const Layer& layer, int64_t first, const float* sums, int64_t rows, Half* y) {
    for (int64_t r = 0; r < rows; r++, y += layer.out) {
        const float* tile = sums + r / TALL * 512 + r % TALL * 16;
        store<PAST>(load(tile), layer, first, y);
        store<PAST>(load(tile + 256), layer, first + 16, y);
    }
}

// Adds to the sums of 32 outputs from `first` on, of up to MOST_ROWS rows, what `depth` inputs from `start` on give; x:
// those inputs as tiles. With the last inputs y is written, a few lines at a time: each is a miss of the caches, for
// which the next products do not wait.
template <int LINES>
void add(const Layer& layer, int64_t first, const Half* x, int64_t rows, int64_t start, int64_t depth, float* sums,
         Half* y) {
    const int64_t pair = layer.block * 2;
    const Half* w = layer.weight + first / layer.block * layer.block * layer.inputs + first % layer.block * 2;
    const int64_t step = LINES == 32 ? depth : INNER;
    for (int64_t k = 0; k < depth; k += step) {
        const int64_t some = std::min(step, depth - k);
        const Half* here = w + (start + k) / 2 * pair;
        const Half* soon = LINES == 32 ? here + 2048 : here + some / 2 * pair;
        for (int64_t r = 0; r < rows; r += 2 * TALL) {
            const Half* tiles = x + r * depth + k * TALL;
            const auto run = rows - r > TALL ? products<true, LINES> : products<false, LINES>;
            const int64_t share = r / (2 * TALL) * LINES % 32;
            run(here, pair, tiles, tiles + TALL * depth, some / WIDE, start + k == 0, sums + r * 32, soon + share / 2 * pair);
            const auto end = rows * layer.out < LARGE ? finish<false> : finish<true>;
            if (start + k + some == layer.inputs)
                end(layer, first, sums + r * 32, std::min(2 * TALL, rows - r), y + r * layer.out);
        }
    }
}

// Up to MOST_ROWS rows. Inputs are taken a chunk at a time; where there is more than one, the sums wait in between.
bool tiled(const Layer& layer, const Half* x, Half* y, int64_t rows) {
    const int64_t padded = (rows + TALL - 1) / TALL * TALL, size = (padded + TALL) / (2 * TALL) * 1024;
    const int64_t chunk = std::min(layer.inputs, CHUNK / padded / INNER * INNER), blocks = (layer.out + 31) / 32;
    const bool waits = chunk < layer.inputs;
    Half* tiles = scratch<Half>(padded * chunk);
    float* waiting = waits ? scratch<float>(blocks * size) : nullptr;
    if (!tiles || (waits && !waiting)) return false;
#pragma omp parallel
    {
        Tiles own(std::min(rows, TALL));
        alignas(64) float passing[MOST_ROWS * 32];
        for (int64_t start = 0; start < layer.inputs; start += chunk) {
            const int64_t depth = std::min(chunk, layer.inputs - start);
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r += TALL)
                gather(layer, x + r * layer.in, rows - r, start, depth, tiles + r * depth);
#pragma omp for schedule(static)
            for (int64_t b = 0; b < blocks; b++) {
                const auto run = rows <= 32 ? add<32> : rows <= 96 ? add<16> : rows <= 224 ? add<8> : add<4>;
                run(layer, b * 32, tiles, rows, start, depth, waits ? waiting + b * size : passing, y);
            }
        }
        _mm_sfence();  // what was written past the caches is there for all
    }
    return true;
}
#endif

}  // namespace

// How many rows the kernel takes of such a layer: with tiles any number, else few, as many as it is the fastest for.
extern "C" int64_t most_rows(const Layer* layer) {
    return have_tiles() && layer->block % 32 == 0 && layer->inputs % WIDE == 0 ? INT64_MAX : 32;
}

// x [rows, in] and y [rows, out] lie densely. False: there is no memory.
extern "C" bool linear(const Layer* given, const Half* x, Half* y, int64_t rows) {
    const Layer layer = *given;
#ifdef LLAMA_INFER_TILES
    if (most_rows(given) > 32) {
        const int64_t parts = (rows + MOST_ROWS - 1) / MOST_ROWS;  // alike, because each reads all weights
        const int64_t most = (rows + parts * 2 * TALL - 1) / (parts * 2 * TALL) * 2 * TALL;
        for (int64_t r = 0; r < rows; r += most)
            if (!tiled(layer, x + r * layer.in, y + r * layer.out, std::min(most, rows - r))) return false;
        return true;
    }
#endif
    const int64_t blocks = (layer.out + layer.block - 1) / layer.block, sixteen = layer.tiled() * TALL;
    Half* tiles = scratch<Half>((rows + TALL - 1) / TALL * sixteen);
    if (!tiles) return false;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r += TALL)
            gather(layer, x + r * layer.in, rows - r, 0, layer.inputs, tiles + r / TALL * sixteen);
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
