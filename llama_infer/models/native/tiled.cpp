// Linear layers in bfloat16 by the processor's tiles (AMX): y [rows, out] = x [rows, in] W^T + bias, where W [out, in]
// is read as it lies, from wherever it lies. A tile of weights is sixteen outputs of 32 inputs; a tile of x has a line
// for each two of these inputs, and a column for each of sixteen rows. Sums are in float32, in an order that depends on the
// layer alone: a row's result is the same whatever other rows are in the call.

#include "numbers.h"
#include "scratch.h"
#include "tiles.h"
#include "turns.h"
#include "vectors.h"

#ifdef LLAMA_INFER_TILES
#include <algorithm>

namespace {

constexpr int64_t TALL = 16, WIDE = 32;  // a tile's outputs, or rows; its inputs
constexpr int64_t BLOCK = 2 * TALL;  // outputs that are computed together
constexpr int64_t MOST_ROWS = 512, INNER = 1024;  // of a pass over the weights; inputs before sums are put aside
constexpr int64_t CHUNK = 1 << 19;  // inputs, of all rows of a pass, that stay in the second cache
constexpr int64_t MOST_OUTPUTS = 1 << 13;  // whose sums wait between chunks
constexpr int64_t LARGE = 1 << 18;  // outputs that do not stay in the second cache

struct Layer {
    const Half *weight, *bias;  // bias: or null
    int64_t out, in;
};

// Where the s-th 32 inputs begin. The last ones overlap those before where 32 does not divide their number.
inline int64_t begin(const Layer& layer, int64_t s) { return std::min(s * WIDE, layer.in - WIDE); }

// Of up to sixteen rows of x `steps` times 32 inputs, as tiles of that many columns. Zeros stand for rows that are not
// there, and for inputs that were in the tile before.
void gather(const Layer& layer, const Half* x, int64_t rows, int64_t columns, int64_t first, int64_t steps,
            Half* tiles) {
    const __mmask16 held = __mmask16((1u << columns) - 1);
    for (int64_t s = first; s < first + steps; s++, tiles += WIDE * columns) {
        const int64_t k = begin(layer, s);
        const __mmask32 fresh = ~uint32_t(0) << (s * WIDE - k);
        __m512i lines[16];
        for (int64_t r = 0; r < TALL; r++)
            lines[r] = r < rows ? _mm512_maskz_loadu_epi16(fresh, x + r * layer.in + k) : _mm512_setzero_si512();
        if (columns > 1) transpose(lines);
        if (columns > 1)
            for (int64_t p = 0; p < 16; p++) _mm512_mask_storeu_epi32(tiles + p * columns * 2, held, lines[p]);
        else
            _mm512_storeu_si512(tiles, lines[0]);
    }
}

// What is asked for ahead: in each step so many lines, in four parts: the processor's own foresight ends at every page.
struct Ahead {
    const Half* at;
    int64_t line, step;  // from a line to the next, from a step to the next
    int lines;

    void part(int64_t s, int quarter) const {
        for (int n = lines * quarter / 4; n < lines * (quarter + 1) / 4; n++)
            __builtin_prefetch(at + s * step + n * line, 0, 2);
    }
};

// Up to INNER inputs of a block's 32 outputs.
struct Chunk {
    const Half* at;
    int64_t first, s, count, last;  // its first output; its first 32 inputs, how many, where the last of them begin
};

// A block's weights, from a first input on.
struct Weights {
    const Half* at;
    int64_t row, step;  // from an output to the next, from 32 inputs to the next
    int64_t last;  // the step to the last 32 inputs, when they are the last of the steps
};

// 32 outputs of up to 32 rows, LOWER: of more than 16: adds `steps` times 32 products to the sums, four tiles (0 to 3;
// 4 and 5 are x, 6 and 7 weights). KEEP: lays the tiles of weights side by side in `kept`. Meanwhile weights that are
// needed soon are fetched, a few lines at a time: a tile's own lines wait when all of the first cache's requests are
// under way.
template <bool LOWER, bool KEEP>
void products(Weights w, const Half* x, const Half* below, int64_t columns, int64_t steps, bool fresh, float* sums,
              Half* kept, Ahead soon) {
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
    for (int64_t s = 0; s < steps; s++, x += columns * WIDE, below += columns * WIDE) {
        _tile_loadd(4, x, columns * 4);
        soon.part(s, 0);
        _tile_loadd(6, w.at, w.row * sizeof(Half));
        soon.part(s, 1);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(7, w.at + TALL * w.row, w.row * sizeof(Half));
        soon.part(s, 2);
        _tile_dpbf16ps(1, 7, 4);
        soon.part(s, 3);
        if constexpr (LOWER) {
            _tile_loadd(5, below, 64);
            _tile_dpbf16ps(2, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
        if constexpr (KEEP) {
            _tile_stored(6, kept + s * BLOCK * WIDE, 64);
            _tile_stored(7, kept + s * BLOCK * WIDE + TALL * WIDE, 64);
        }
        w.at += s + 2 == steps ? w.last : w.step;
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if constexpr (LOWER) {
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
}

// What comes of the sums of 32 outputs of up to 32 rows. PAST: past the caches, which need not read first what is
// written whole.
template <bool PAST>
void finish(const Layer& layer, int64_t first, const float* sums, int64_t rows, Half* y) {
    for (; rows > 0; rows -= TALL, sums += 2 * 256, y += TALL * layer.out) {
        __m512i lines[16];
        for (int64_t p = 0; p < 16; p++) {
            const Half* bias = layer.bias ? layer.bias + first + 2 * p : nullptr;
            const Lanes a = load(sums + 32 * p), b = load(sums + 32 * p + 16);
            const Words one = upper(bias ? a + widen(bias[0]) : a), other = upper(bias ? b + widen(bias[1]) : b);
            lines[p] = (__m512i)(one >> 16 | (other & 0xffff0000u));
        }
        transpose(lines);
        for (int64_t r = 0; r < std::min(rows, TALL); r++) {
            Half* at = y + r * layer.out + first;
            if (PAST && (uintptr_t)at % sizeof lines[r] == 0)
                _mm512_stream_si512((__m512i*)at, lines[r]);
            else
                _mm512_storeu_si512(at, lines[r]);
        }
    }
}

// `steps` times 32 inputs of up to MOST_ROWS rows, the `from`-th 32 inputs first, as tiles.
struct Inputs {
    const Half* tiles;
    int64_t rows, from, steps;
};

// Up to `most` times 32 of these inputs, the s-th first.
Chunk chunk(const Layer& layer, const Inputs& x, int64_t first, int64_t s, int64_t most) {
    const int64_t count = std::min(most, x.steps - s), start = begin(layer, x.from + s);
    return {layer.weight + first * layer.in + start, first, s, count, begin(layer, x.from + s + count - 1) - start};
}

// Adds to the sums of up to 32 rows from r on what a chunk gives, whose weights are w. With the last inputs y is written,
// a few lines at a time: each is a miss of the caches, for which the next products do not wait.
template <bool KEEP>
void add(const Layer& layer, const Inputs& x, int64_t r, const Chunk& now, Weights w, Half* kept, float* sums, Half* y,
         Ahead soon) {
    const int64_t columns = std::min(x.rows, TALL), all = (layer.in + WIDE - 1) / WIDE;
    const Half* tiles = x.tiles + r * x.steps * WIDE + now.s * columns * WIDE;
    const auto run = x.rows - r > TALL ? products<true, KEEP> : products<false, KEEP>;
    run(w, tiles, tiles + columns * x.steps * WIDE, columns, now.count, x.from + now.s == 0, sums + r * 32, kept, soon);
    const auto end = x.rows * layer.out < LARGE ? finish<false> : finish<true>;
    if (x.from + now.s + now.count == all)
        end(layer, now.first, sums + r * 32, std::min(2 * TALL, x.rows - r), y + r * layer.out);
}

// Adds to the sums of a block's 32 outputs, from `first` on, what all these inputs give. The first 32 rows read the
// weights where they lie and leave them side by side for the other rows, a chunk at a time; meanwhile the next chunk is
// asked for, each 32 rows a share of it, after the last chunk that of the block which begins with the output `next`.
void one_block(const Layer& layer, const Inputs& x, int64_t first, int64_t next, float* sums, Half* y) {
    alignas(64) Half kept[BLOCK * INNER];
    const int64_t pairs = (x.rows + 2 * TALL - 1) / (2 * TALL), share = (BLOCK + pairs - 1) / pairs;
    const int64_t most = pairs == 1 ? x.steps : std::min(x.steps, INNER / WIDE);
    const bool whole = most * WIDE == layer.in;  // then they are asked for as they lie, else a line of each output
    for (int64_t s = 0; s < x.steps; s += most) {
        const bool more = s + most < x.steps;
        const Chunk now = chunk(layer, x, first, s, most);
        const Chunk then = more ? chunk(layer, x, first, s + most, most) : chunk(layer, x, next, 0, most);
        const int64_t last = now.count > 1 ? now.last - (now.count - 2) * WIDE : 0;
        const Weights there = {now.at, layer.in, WIDE, last}, here = {kept, WIDE, BLOCK * WIDE, BLOCK * WIDE};
        for (int64_t p = 0; p < pairs; p++) {
            const Ahead soon = whole ? Ahead{then.at + p * share * most * WIDE, WIDE, share * WIDE, int(share)}
                                     : Ahead{then.at + p * share * layer.in, layer.in, WIDE, int(share)};
            const auto run = p == 0 && pairs > 1 ? add<true> : add<false>;
            run(layer, x, p * 2 * TALL, now, p == 0 ? there : here, kept, sums, y, soon);
        }
    }
}

// The outputs `first`..`end` (exclusive) of up to MOST_ROWS rows. Inputs are taken a chunk at a time; where there is
// more than one, the sums wait in between.
bool tiled(const Layer& layer, const Half* x, Half* y, int64_t rows, int64_t first, int64_t end, int64_t chunk) {
    const int64_t padded = (rows + TALL - 1) / TALL * TALL, size = (padded + TALL) / (2 * TALL) * 1024;
    const int64_t columns = std::min(rows, TALL), all = (layer.in + WIDE - 1) / WIDE;
    const int64_t blocks = (end - first + BLOCK - 1) / BLOCK;
    const bool waits = chunk < all;
    static thread_local Scratch memory, patience;
    Half* tiles = memory.at_least<Half>(padded * chunk * WIDE);
    float* waiting = waits ? patience.at_least<float>(blocks * size) : nullptr;
    if (!tiles || (waits && !waiting)) return false;
    // Of a number that 32 does not divide the last block overlaps the one before: the same results, written twice.
    const auto place = [&](int64_t b) { return std::min(first + b * BLOCK, layer.out - BLOCK); };
    for (int64_t from = 0; from < all; from += chunk) {
        const int64_t steps = std::min(chunk, all - from);
        const Inputs inputs = {tiles, rows, from, steps};
        Turns turns(blocks);
#pragma omp parallel
        {
            alignas(64) float passing[MOST_ROWS * BLOCK];
            const uint16_t wide = uint16_t(columns * 4);  // of sums and x
            const Tiles own({wide, wide, wide, wide, wide, wide, 64, 64});
#pragma omp for schedule(static)
            for (int64_t r = 0; r < rows; r += TALL)
                gather(layer, x + r * layer.in, rows - r, columns, from, steps, tiles + r * steps * WIDE);
            turns.each([&](int64_t b, int64_t next) {
                float* sums = waits ? waiting + b * size : passing;
                one_block(layer, inputs, place(b), place(next < 0 ? b : next), sums, y);
            });
            _mm_sfence();  // what was written past the caches is there for all
        }
    }
    return true;
}

}  // namespace
#endif

// Whether there are tiles.
extern "C" bool available() { return have_tiles(); }

// x [rows, in], y [rows, out] and W [out, in] lie densely; at least 32 inputs and 32 outputs; bias: or null. False:
// there is no memory.
extern "C" bool linear(const Half* weight, const Half* bias, const Half* x, Half* y, int64_t rows, int64_t out,
                       int64_t in) {
#ifdef LLAMA_INFER_TILES
    const Layer layer = {weight, bias, out, in};
    const int64_t whole = CHUNK / in / (2 * TALL) * (2 * TALL);  // rows whose inputs all stay in the second cache
    const int64_t limit = whole < MOST_ROWS / 2 ? MOST_ROWS : std::min(whole, MOST_ROWS);
    const int64_t parts = (rows + limit - 1) / limit;  // alike, because each reads all weights
    const int64_t most = (rows + parts * 2 * TALL - 1) / (parts * 2 * TALL) * 2 * TALL;
    for (int64_t r = 0; r < rows; r += most) {
        const int64_t some = std::min(most, rows - r), padded = (some + TALL - 1) / TALL * TALL;
        const int64_t chunk = std::min((in + WIDE - 1) / WIDE, CHUNK / padded / INNER * INNER / WIDE);
        const int64_t outputs = chunk * WIDE < in ? MOST_OUTPUTS : out;
        for (int64_t first = 0; first < out; first += outputs)
            if (!tiled(layer, x + r * in, y + r * out, some, first, std::min(first + outputs, out), chunk)) return false;
    }
    return true;
#else
    return false;
#endif
}
