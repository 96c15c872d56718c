// Linear layers with weights of 8 or 4 bits, times activations of 8 bits: sums of integers, which are exact, so that a
// token gets the same numbers alone and in any batch. Every 128 inputs have scales of their own, on both sides.

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#include "integer.h"
#include "scratch.h"
#include "tiles.h"

#include <optional>

namespace {

constexpr int64_t HALF = 1 << 20;   // bytes: of a usual L2 cache
constexpr int64_t LARGE = 1 << 18;  // outputs that do not stay in the caches
constexpr int64_t MANY = 512, WAITING = 1 << 15;  // rows at a time; outputs whose totals may wait: 64 MB of 512 rows

// One block for a few rows.
template <typename F, int ROWS>
void few(const Tokens& tokens, int64_t row, const uint8_t* block, float (*total)[BLOCK]) {
    for (int64_t span = 0; span < tokens.spans; span++) {
        const int8_t* x[ROWS];
        const int32_t* sum[ROWS];
        for (int r = 0; r < ROWS; r++) {
            x[r] = tokens.tiles(row + r) + span * 2048;
            sum[r] = tokens.sums + ((row + r) * tokens.spans + span) * 4;
        }
        const uint8_t* record = block + span * F::RECORD;
        for (int quad = 0; quad < 4; quad++) {
            __m512i found[ROWS];
            F::template sums<ROWS>(record, quad, x, sum, found);
            const __m512 scale = scales<F>(record, quad);
            for (int r = 0; r < ROWS; r++) {
                float* to = total[r] + 16 * quad;
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(found[r]), scale);
                const __m512 step = _mm512_set1_ps(tokens.scale[(row + r) * tokens.spans + span]);
                _mm512_store_ps(to, _mm512_fmadd_ps(part, step, _mm512_load_ps(to)));
            }
        }
    }
}

#ifdef LLAMA_INFER_TILES
// Sums of 16 tokens by 16 outputs, four times: two of tokens by two of outputs.
struct alignas(64) Sums {
    int32_t of[4][16][16];
};

// Adds a span's share of 32 outputs to the totals of up to 16 rows, and asks for so many bytes with each of them.
template <bool ASKS>
inline void add(const Sums& sums, int tile, const __m512* scale, const float* step, int64_t spans, int rows,
                float* total, const uint8_t* asked, int64_t each) {
    const int32_t(*sum)[16] = sums.of[2 * tile];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++, total += BLOCK, step += spans) {
        if (ASKS) {
            _mm_prefetch(asked, _MM_HINT_T1);
            if (each > 64) _mm_prefetch(asked + 64, _MM_HINT_T1);
            asked += each;
        }
        const __m512 by = _mm512_set1_ps(*step);
        const __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum[r])), scale[0]);
        const __m512 b = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sum[r + 16])), scale[1]);
        _mm512_store_ps(total, _mm512_fmadd_ps(a, by, _mm512_load_ps(total)));
        _mm512_store_ps(total + 16, _mm512_fmadd_ps(b, by, _mm512_load_ps(total + 16)));
    }
}

// One block for up to 32 rows. What was multiplied is scaled while the next tiles are multiplied, a half in turn. Of the
// weights that come next a part is asked for: where there is little else to do, a line or two with every row, since a core
// waits for few lines at a time, and more of them would be in the way of the tiles.
template <typename F, bool STEADY>
void tiles(const Tokens& tokens, int64_t row, const uint8_t* block, const uint8_t* next, int8_t* panel,
           float (*total)[BLOCK]) {
    const int64_t spans = tokens.spans, passes = (tokens.rows + 31) / 32;
    const int rows = int(std::min<int64_t>(32, tokens.rows - row));
    const uint8_t* asked = STEADY ? block + AHEAD : next + row / 32 * spans * F::RECORD / passes / 64 * 64;
    const uint8_t* enough = asked;
    const int64_t each = F::RECORD / 2 / rows / 64 * 64;  // line by line, the rest between the units
    Sums sums[2];
    __m512 scale[2];
    for (int64_t unit = 0; unit <= 2 * spans; unit++) {  // 32 outputs of a span, and the scaling of those before
        const int64_t span = unit / 2, before = (unit - 1) / 2;
        const int pair = unit % 2 * 2, other = 2 - pair;
        const bool more = unit < 2 * spans;
        const uint8_t* record = block + span * F::RECORD;
        const float* step = tokens.scale + row * spans + before;
        if (more) {
            if (pair == 0 && row == 0) F::expand(record, panel + span * BLOCK * SPAN);
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            if (!STEADY) enough += F::RECORD / 2 / passes;
            for (; asked < enough; asked += 64) _mm_prefetch(asked, _MM_HINT_T1);
            if (STEADY) enough += F::RECORD / 2;
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            if (more) {
                const int8_t* x = tokens.tiles(row) + span * 2048 + half * 1024;
                const int8_t* w = panel ? panel + span * BLOCK * SPAN : (const int8_t*)record;
                w += pair * 2048 + half * 1024;
                written();
                _tile_loadd(4, x, 64);
                _tile_loadd(6, w, 64);
                _tile_loadd(7, w + 2048, 64);
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                if (rows > 16) {
                    _tile_loadd(5, x + spans * 2048, 64);
                    _tile_dpbssd(2, 5, 6);
                    _tile_dpbssd(3, 5, 7);
                }
            }
            if (unit > 0) {
                const int these = std::min(rows - 16 * half, 16);
                add<STEADY>(sums[other / 2], half, scale, step + 16 * half * spans, spans, these,
                            total[16 * half] + 16 * other, asked, each);
                if (STEADY && these > 0) asked += these * each;
            }
        }
        if (more) {
            Sums& to = sums[pair / 2];
            _tile_stored(0, to.of[0], 64);
            _tile_stored(1, to.of[1], 64);
            _tile_stored(2, to.of[2], 64);
            _tile_stored(3, to.of[3], 64);
            scale[0] = scales<F>(record, pair), scale[1] = scales<F>(record, pair + 1);
        }
    }
}
#endif

// What comes of the totals of a block, row by row: whole lines, which is what writing past the caches asks for.
template <bool PAST, typename T>
void finish(const float (*total)[BLOCK], int64_t rows, int64_t first, int64_t outputs, const T* bias, T* y) {
    __m512 more[4];
    __mmask16 these[4];
    for (int quad = 0; quad < 4; quad++) {
        const int64_t at = first + 16 * quad, left = std::clamp<int64_t>(outputs - at, 0, 16);
        these[quad] = __mmask16((1 << left) - 1);
        more[quad] = bias ? load(bias + at, these[quad]) : _mm512_setzero_ps();
    }
    y += first;
    for (int64_t r = 0; r < rows; r++, y += outputs)
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; quad++) {
            const __m512 sum = _mm512_add_ps(_mm512_load_ps(total[r] + 16 * quad), more[quad]);
            if (PAST)
                stream(y + 16 * quad, sum);
            else
                store(y + 16 * quad, these[quad], sum);
        }
}

// What a thread needs for itself.
template <typename F>
struct Own {
    alignas(64) float total[32][BLOCK];
    int8_t* panel = nullptr;
    bool tiled = false;
#ifdef LLAMA_INFER_TILES
    std::optional<Tiles> shaped;

    Own(int64_t rows, int64_t spans) {
        static thread_local Scratch memory;
        if (rows <= FEW || !have_tiles()) return;
        const bool expands = F::QUAD < 16 * SPAN;
        if (expands) panel = memory.at_least<int8_t>(spans * BLOCK * SPAN);
        tiled = panel || !expands;  // else the other way, to the same numbers
        if (tiled) shaped.emplace();
    }
#else
    Own(int64_t, int64_t) {}
#endif

    // Adds to the totals of the rows from `row` on, of a block for all tokens; how many rows that were.
    int64_t add(const Tokens& tokens, int64_t row, const uint8_t* block, const uint8_t* next) {
        const int64_t done = std::min<int64_t>(tiled ? 32 : FEW, tokens.rows - row);
#ifdef LLAMA_INFER_TILES
        if (tiled) {
            (tokens.rows > 32 ? tiles<F, false> : tiles<F, true>)(tokens, row, block, next, panel, total);
            return done;
        }
#endif
        switch (done) {
            case 1: few<F, 1>(tokens, row, block, total); break;
            case 2: few<F, 2>(tokens, row, block, total); break;
            case 3: few<F, 3>(tokens, row, block, total); break;
            case 4: few<F, 4>(tokens, row, block, total); break;
            case 5: few<F, 5>(tokens, row, block, total); break;
            case 6: few<F, 6>(tokens, row, block, total); break;
            case 7: few<F, 7>(tokens, row, block, total); break;
            default: few<F, 8>(tokens, row, block, total);
        }
        return done;
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
    const int64_t spans = (width + SPAN - 1) / SPAN, blocks = (outputs + BLOCK - 1) / BLOCK;
    const Shares most(rows, spans, outputs);
    const bool past = rows * outputs >= LARGE && outputs % BLOCK == 0 && (uintptr_t)y % 64 == 0;
    const auto end = past ? finish<true, T> : finish<false, T>;
    static thread_local Scratch memory, patience;
    for (int64_t begin = 0; begin < rows; begin += most.rows) {
        const int64_t count = std::min(most.rows, rows - begin), held = most.spans < spans ? blocks * count : 0;
        void* place = memory.at_least<char>(Tokens::bytes(count, most.spans));
        auto* waiting = patience.at_least<float[BLOCK]>(held);
        if (!place || (held && !waiting)) return false;
        for (int64_t start = 0; start < spans; start += most.spans) {
            Tokens tokens(count, std::min(most.spans, spans - start), place);
            const T* inputs = x + begin * width + start * SPAN;
#pragma omp parallel for if (count * width > 32768)
            for (int64_t row = 0; row < count; row++)
                tokens.quantise(inputs + row * width, row, std::min(tokens.spans * SPAN, width - start * SPAN));
#pragma omp parallel
            {
                Own<F> own(count, tokens.spans);
#pragma omp for schedule(static)
                for (int64_t b = 0; b < blocks; b++) {
                    const uint8_t* block = weight + (b * spans + start) * F::RECORD;
                    for (int64_t row = 0, done; row < count; row += done) {
                        float(*wait)[BLOCK] = held ? waiting + b * count + row : nullptr;
                        const size_t size = std::min<int64_t>(32, count - row) * sizeof *wait;
                        if (start == 0)
                            std::memset(own.total, 0, size);
                        else
                            std::memcpy(own.total, wait, size);
                        done = own.add(tokens, row, block, block + spans * F::RECORD);
                        if (start + most.spans >= spans)
                            end(own.total, done, b * BLOCK, outputs, bias, y + (begin + row) * outputs);
                        else
                            std::memcpy(wait, own.total, done * sizeof *wait);
                    }
                }
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
