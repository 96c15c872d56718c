// Linear layers with weights of 8 or 4 bits, times activations of 8 bits: sums of integers, which are exact, so that a
// token gets the same numbers alone and in any batch. Every 256 inputs have scales of their own, on both sides.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include "integer.h"
#include "scratch.h"
#include "tiles.h"
#include "turns.h"

#include <optional>

namespace {

constexpr int64_t HALF = 1 << 20;   // bytes: of a usual L2 cache
constexpr int64_t LARGE = 1 << 18;  // outputs that do not stay in the caches
constexpr int64_t MANY = 512, WAITING = 1 << 15;  // rows at a time; outputs whose totals may wait: 64 MB of 512 rows
constexpr int64_t PASS = 64;  // rows whose numbers of a span and totals stay in the first cache

// A block's weights of some spans.
struct Weights {
    const uint8_t* at;
    int64_t records;

    int64_t of(int64_t span) const { return std::min<int64_t>(2, records - 2 * span); }
};

// Totals of a block for some rows: 16 outputs of all of them, then the next 16.
struct Totals {
    float* at;
    int64_t rows;

    float* of(int quad, int64_t row) const { return at + (quad * rows + row) * 16; }
};

// One block for a few rows.
template <typename F, int ROWS>
void few(const Tokens& tokens, int64_t row, const Weights& block, const Totals& total) {
    for (int64_t span = 0; span < tokens.spans; span++) {
        const uint8_t* record = block.at + 2 * span * F::RECORD;
        __m512i found[4][ROWS] = {};
        for (int part = 0; part < block.of(span); part++) {
            const int8_t* x[ROWS];
            const int32_t* sum[ROWS];
            for (int r = 0; r < ROWS; r++) {
                x[r] = tokens.tiles(row + r, span) + part * (PART / 64) * 1024;
                sum[r] = tokens.sums_of(row + r, span) + part * (PART / 32);
            }
            for (int quad = 0; quad < 4; quad++)
                F::template add<ROWS>(record + part * F::RECORD, quad, x, sum, found[quad]);
        }
        for (int quad = 0; quad < 4; quad++) {
            const __m512 scale = scales<F>(record, quad);
            const float* step = tokens.scale + span * tokens.whole + row;
            for (int r = 0; r < ROWS; r++) add_scaled(found[quad][r], scale, step[r], total.of(quad, r));
        }
    }
}

#ifdef LLAMA_INFER_TILES
// What becomes of the sums of 16 outputs of up to 16 rows.
struct Part {
    __m512 scale;
    const float* step;
    float* total;
    int64_t rows = 0;
};

// Weights that are asked for ahead of their use, so many bytes at a time.
struct Asked {
    const uint8_t *next, *end;

    void more(int64_t bytes) {
        for (end += bytes; next < end; next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
};

// STEADY: with every row a line or two are asked for, `each` bytes.
template <bool STEADY>
inline void add(const int32_t (*sums)[16], const Part& part, Asked& asked, int64_t each) {
#pragma GCC unroll 4
    for (int64_t r = 0; r < part.rows; r++) {
        if (STEADY) {
            _mm_prefetch(asked.next, _MM_HINT_T1);
            if (each > 64) _mm_prefetch(asked.next + 64, _MM_HINT_T1);
            asked.next += each;
        }
        add_scaled(_mm512_load_si512(sums[r]), part.scale, part.step[r], part.total + 16 * r);
    }
}

// One block for some rows. The weights of 16 outputs stay in four tiles while a span of 16 rows after the other passes
// by; what was multiplied is scaled while the next is. Of the weights that come next a part is asked for: where there is
// little else to do, a line or two with every row, since a core waits for few lines at a time, and more of them would be
// in the way of the tiles.
template <typename F, bool STEADY>
void tiles(const Tokens& tokens, int64_t row, const Weights& block, const uint8_t* next, int8_t* panel,
           const Totals& total) {
    const int64_t spans = tokens.spans, rows = total.rows, groups = (rows + 15) / 16, all = tokens.whole / 16;
    const int64_t share = F::RECORD / 2 / (STEADY ? groups : all);  // of the bytes, for 16 outputs of 16 rows
    const int64_t each = STEADY ? share / std::min<int64_t>(rows, 16) / 64 * 64 : 0;
    const uint8_t* first = STEADY ? block.at + AHEAD : next + row / 16 * (2 * spans * F::RECORD / all) / 64 * 64;
    Asked asked = {first, first};
    alignas(64) int32_t sums[16][16];
    Part part;
    for (int64_t unit = 0; unit < 4 * spans; unit++) {
        const int64_t span = unit / 4;
        const int quad = unit % 4;
        const uint8_t* record = block.at + 2 * span * F::RECORD;
        int8_t* expanded = panel ? panel + span * BLOCK * SPAN : nullptr;
        if (panel && quad == 0 && row == 0)
            for (int i = 0; i < block.of(span); i++) F::expand(record + i * F::RECORD, expanded + i * BLOCK * PART);
        const int8_t* w = (panel ? expanded : (const int8_t*)record) + quad * 16 * PART;
        // Where there is no second record the activations are 0, and any weights do.
        const int8_t* more = w + (block.of(span) - 1) * (panel ? BLOCK * PART : F::RECORD);
        written();
        _tile_loadd(4, w, 64);
        _tile_loadd(5, w + 1024, 64);
        _tile_loadd(6, more, 64);
        _tile_loadd(7, more + 1024, 64);
        const int8_t* x = tokens.tiles(row, span);
        for (int64_t g = 0; g < groups; g++, x += 16 * SPAN) {
            written();
            _tile_zero(0);
            _tile_loadd(1, x, 64);
            _tile_dpbssd(0, 1, 4);
            _tile_loadd(2, x + 1024, 64);
            _tile_dpbssd(0, 2, 5);
            _tile_loadd(1, x + 2048, 64);
            _tile_dpbssd(0, 1, 6);
            _tile_loadd(2, x + 3072, 64);
            _tile_dpbssd(0, 2, 7);
            asked.more(share);
            add<STEADY>(sums, part, asked, each);
            _tile_stored(0, sums, 64);
            part = {scales<F>(record, quad), tokens.scale + span * tokens.whole + row + 16 * g, total.of(quad, 16 * g),
                    std::min<int64_t>(16, rows - 16 * g)};
        }
    }
    written();
    add<false>(sums, part, asked, 0);
}
#endif

// What comes of the totals of a block, row by row: whole lines, which is what writing past the caches asks for.
template <bool PAST, typename T>
void finish(const Totals& total, int64_t first, int64_t outputs, const T* bias, T* y) {
    __m512 more[4];
    __mmask16 these[4];
    for (int quad = 0; quad < 4; quad++) {
        const int64_t at = first + 16 * quad, left = std::clamp<int64_t>(outputs - at, 0, 16);
        these[quad] = __mmask16((1 << left) - 1);
        more[quad] = bias ? load(bias + at, these[quad]) : _mm512_setzero_ps();
    }
    y += first;
    for (int64_t r = 0; r < total.rows; r++, y += outputs)
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; quad++) {
            const __m512 sum = _mm512_add_ps(_mm512_load_ps(total.of(quad, r)), more[quad]);
            if (PAST)
                stream(y + 16 * quad, sum);
            else
                store(y + 16 * quad, these[quad], sum);
        }
}

// What a thread needs for itself.
template <typename F>
struct Own {
    alignas(64) float totals[PASS * BLOCK];
    int8_t* panel = nullptr;
    bool tiled = false;
#ifdef LLAMA_INFER_TILES
    std::optional<Tiles> shaped;

    Own(int64_t rows, int64_t spans) {
        static thread_local Scratch memory;
        if (rows <= FEW || !have_tiles()) return;
        const bool expands = F::QUAD < 16 * PART;
        if (expands) panel = memory.at_least<int8_t>(spans * BLOCK * SPAN);
        tiled = panel || !expands;  // else the other way, to the same numbers
        if (tiled) shaped.emplace();
    }
#else
    Own(int64_t, int64_t) {}
#endif

    // How many rows are added at a time, from this one on.
    int64_t some(const Tokens& tokens, int64_t row) const {
        return std::min<int64_t>(tiled ? PASS : FEW, tokens.rows - row);
    }

    // Adds to the totals of rows, from `row` on, what a block's weights give.
    void add(const Tokens& tokens, int64_t row, const Weights& block, const uint8_t* next, const Totals& total) {
#ifdef LLAMA_INFER_TILES
        if (tiled) {
            const auto run = tokens.rows > 32 ? tiles<F, false> : tiles<F, true>;
            return run(tokens, row, block, next, panel, total);
        }
#endif
        switch (total.rows) {
            case 1: return few<F, 1>(tokens, row, block, total);
            case 2: return few<F, 2>(tokens, row, block, total);
            case 3: return few<F, 3>(tokens, row, block, total);
            case 4: return few<F, 4>(tokens, row, block, total);
            case 5: return few<F, 5>(tokens, row, block, total);
            case 6: return few<F, 6>(tokens, row, block, total);
            case 7: return few<F, 7>(tokens, row, block, total);
            default: return few<F, 8>(tokens, row, block, total);
        }
    }
};

// Tokens leave half of a usual L2 cache to the weights: so many rows at a time, or, where that would read all weights too
// often, so many inputs, between which the totals wait.
struct Shares {
    int64_t rows, spans;

    Shares(int64_t all, int64_t spans, int64_t outputs)
        : rows(std::max<int64_t>(32, HALF / (spans * SPAN) / 32 * 32)), spans(spans) {
        if (all <= rows || rows >= MANY || outputs > WAITING) return;
        rows = std::min(MANY, (all + 31) / 32 * 32);
        this->spans = HALF / (rows * SPAN);
    }
};

// y = x w + bias. x [rows, width] and y [rows, outputs] are dense. False where there is no memory.
template <typename F, typename T>
bool linear(const T* x, const uint8_t* weight, const T* bias, T* y, int64_t rows, int64_t width, int64_t outputs) {
    const int64_t spans = (width + SPAN - 1) / SPAN, records = (width + PART - 1) / PART;
    const int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
    const Shares most(rows, spans, outputs);
    const bool past = rows * outputs >= LARGE && outputs % BLOCK == 0 && (uintptr_t)y % 64 == 0;
    const auto end = past ? finish<true, T> : finish<false, T>;
    static thread_local Scratch memory, patience;
    for (int64_t begin = 0; begin < rows; begin += most.rows) {
        const int64_t count = std::min(most.rows, rows - begin), held = most.spans < spans ? blocks * count * BLOCK : 0;
        void* place = memory.at_least<char>(Tokens::bytes(count, most.spans));
        auto* waiting = patience.at_least<float>(held);
        if (!place || (held && !waiting)) return false;
        for (int64_t start = 0; start < spans; start += most.spans) {
            Tokens tokens(count, std::min(most.spans, spans - start), place);
            const T* inputs = x + begin * width + start * SPAN;
            Turns turns(blocks);
#pragma omp parallel for if (count * width > 32768)
            for (int64_t row = 0; row < count; row++)
                tokens.quantise(inputs + row * width, row, std::min(tokens.spans * SPAN, width - start * SPAN));
#pragma omp parallel
            {
                Own<F> own(count, tokens.spans);
                const auto at = [&](int64_t b) { return weight + (b * records + 2 * start) * F::RECORD; };
                const int64_t held_records = std::min(2 * tokens.spans, records - 2 * start);
                turns.each([&](int64_t b, int64_t next) {
                    for (int64_t row = 0, some; row < count; row += some) {
                        some = own.some(tokens, row);
                        const Totals total = {held ? waiting + (b * count + row) * BLOCK : own.totals, some};
                        if (start == 0) std::memset(total.at, 0, some * BLOCK * sizeof(float));
                        own.add(tokens, row, {at(b), held_records}, at(next < 0 ? b : next), total);
                        if (start + most.spans >= spans)
                            end(total, b * BLOCK, outputs, bias, y + (begin + row) * outputs);
                    }
                });
                _mm_sfence();  // what was written past the caches is there for all
            }
        }
    }
    return true;
}

}  // namespace

#define LINEAR(NAME, FORMAT, TYPE_NAME, TYPE)                                                                       \
    extern "C" int NAME##_##TYPE_NAME(const void* x, const void* weight, const void* bias, void* y, int64_t rows,   \
                                      int64_t width, int64_t outputs) {                                             \
        return linear<FORMAT>((const TYPE*)x, (const uint8_t*)weight, (const TYPE*)bias, (TYPE*)y, rows, width,      \
                              outputs);                                                                             \
    }

LINEAR(int8, Int8, bfloat16, uint16_t)
LINEAR(int8, Int8, float32, float)
LINEAR(int4_32, Int4<32>, bfloat16, uint16_t)
LINEAR(int4_64, Int4<64>, bfloat16, uint16_t)
LINEAR(int4_128, Int4<128>, bfloat16, uint16_t)

#endif
