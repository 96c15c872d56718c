// Weights of 8 or 4 bits as they lie in memory, and activations of 8. For processors with AVX-512 VNNI.
//
// Weights come in blocks of 64 outputs; a block is a run of records of 128 inputs each. A record holds four quads of 16
// outputs, then (4 bits) their groups, then 64 scales in bfloat16. A quad's lines of 64 bytes hold 4 inputs of 16
// outputs in 8 bits; in 4 bits 8 inputs, the first 4 in the low halves of the bytes. Two records are a span, whose
// scales are those of the first; the last record may be one.
//
// 4 bits: a group of 32, 64 or 128 inputs of an output has a byte that says which 8-bit numbers its 16 are:
// (number - 8) * m + o, m = low half + 1, o = 4 * high half - 26.

#pragma once

#include "numbers.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int BLOCK = 64, SPAN = 256, PART = 128, FEW = 8;  // outputs; inputs of a span, of a record; rows
constexpr size_t AHEAD = 16384;  // bytes that are asked for before they are needed

inline __m512 load(const float* from, __mmask16 these) { return _mm512_maskz_loadu_ps(these, from); }

inline __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

inline __m512 load(const uint16_t* from, __mmask16 these) { return widen(_mm256_maskz_loadu_epi16(these, from)); }

inline void store(float* to, __mmask16 these, __m512 x) { _mm512_mask_storeu_ps(to, these, x); }

inline void store(uint16_t* to, __mmask16 these, __m512 x) {
    _mm256_mask_storeu_epi16(to, these, (__m256i)narrow((Lanes)x));
}

// Past the caches, which need not read first what is written whole; aligned, all sixteen.
inline void stream(float* to, __m512 x) { _mm512_stream_ps(to, x); }
inline void stream(uint16_t* to, __m512 x) { _mm256_stream_si256((__m256i*)to, (__m256i)narrow((Lanes)x)); }

// Quantised activations: of a span 16 tokens together, 64 inputs of one after 64 of the other, as AMX takes them; then
// the next 16 tokens.
struct Tokens {
    int64_t rows, spans, whole;
    int8_t* numbers;
    float* scale;   // [spans, whole]
    int32_t* sums;  // [rows, 8 * spans]: of 32 inputs

    static size_t bytes(int64_t rows, int64_t spans) {
        return size_t((rows + 15) / 16 * 16) * spans * (SPAN + sizeof(float) + SPAN / 32 * sizeof(int32_t));
    }

    Tokens(int64_t rows, int64_t spans, void* memory)
        : rows(rows), spans(spans), whole((rows + 15) / 16 * 16), numbers((int8_t*)memory) {
        scale = (float*)(numbers + whole * spans * SPAN);
        sums = (int32_t*)(scale + whole * spans);
    }

    int8_t* tiles(int64_t row, int64_t span) const {
        return numbers + (span * whole + row / 16 * 16) * SPAN + row % 16 * 64;
    }

    int32_t* sums_of(int64_t row, int64_t span) const { return sums + (row * spans + span) * (SPAN / 32); }

    // The number furthest from 0 becomes -128: a scale is negative where it is above 0.
    template <typename T>
    void quantise(const T* x, int64_t row, int64_t width) {
        for (int64_t span = 0; span < spans; span++) {
            __m512 found[SPAN / 16];
            // The bits of floats above 0 are in the order of the floats, NaN the largest; of those below in the other.
            __m512i top = _mm512_setzero_si512(), bottom = _mm512_setzero_si512();
            for (int i = 0; i < SPAN / 16; i++) {
                const int64_t left = std::min<int64_t>(16, std::max<int64_t>(0, width - span * SPAN - 16 * i));
                found[i] = load(x + span * SPAN + 16 * i, __mmask16((1 << left) - 1));
                top = _mm512_max_epi32(top, _mm512_castps_si512(found[i]));
                bottom = _mm512_max_epu32(bottom, _mm512_castps_si512(found[i]));
            }
            const uint32_t above = uint32_t(_mm512_reduce_max_epi32(top)), below = _mm512_reduce_max_epu32(bottom);
            const uint32_t bits = (below & 0x7fffffff) > above ? below : above;
            float furthest;
            std::memcpy(&furthest, &bits, 4);
            const bool none = std::abs(furthest) < 1e-30f;
            scale[span * whole + row] = none ? 0 : furthest / -128;
            const __m512 up = _mm512_set1_ps(none ? 0 : -128 / furthest);
            for (int tile = 0; tile < SPAN / 64; tile++) {
                __m512i each[4];
                for (int i = 0; i < 4; i++) each[i] = _mm512_cvtps_epi32(_mm512_mul_ps(found[4 * tile + i], up));
                // Packing leaves four bytes of each vector side by side, in the order of the vectors.
                const __m512i mixed = _mm512_packs_epi16(_mm512_packs_epi32(each[0], each[1]),
                                                         _mm512_packs_epi32(each[2], each[3]));
                const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                const __m512i bytes = _mm512_permutexvar_epi32(order, mixed);
                _mm512_store_si512(tiles(row, span) + tile * 1024, bytes);
                __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
                sum = _mm512_add_epi32(sum, _mm512_shuffle_i32x4(sum, sum, _MM_SHUFFLE(2, 3, 0, 1)));
                sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
                sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, _MM_PERM_CDAB));
                int32_t* to = sums_of(row, span) + 2 * tile;
                to[0] = _mm_cvtsi128_si32(_mm512_castsi512_si128(sum));
                to[1] = _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(sum, 2));
            }
        }
    }
};

inline __m512i bytes4(const void* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
}

// Eight bits.
struct Int8 {
    static constexpr int QUAD = 16 * PART, RECORD = 4 * QUAD + 2 * BLOCK;

    // Adds the sums over a record for ROWS tokens and the 16 outputs of a quad; the processor takes one side without a sign.
    template <int ROWS>
    static inline void add(const uint8_t* record, int quad, const int8_t* const* x, const int32_t* const* sum,
                           __m512i* to) {
        constexpr int CHAINS = ROWS > 4 ? 1 : ROWS > 1 ? 2 : 4;
        __m512i found[CHAINS][ROWS];
        for (int r = 0; r < ROWS; r++) {
            const __m512i less = _mm512_set1_epi32(-128 * (sum[r][0] + sum[r][1] + sum[r][2] + sum[r][3]));
            found[0][r] = _mm512_add_epi32(to[r], less);
            for (int c = 1; c < CHAINS; c++) found[c][r] = _mm512_setzero_si512();
        }
        const uint8_t* lines = record + quad * QUAD;
        for (int tile = 0; tile < PART / 64; tile++)
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const uint8_t* line = lines + (16 * tile + i) * 64;
                _mm_prefetch(line + AHEAD, _MM_HINT_T1);
                const __m512i w = _mm512_xor_si512(_mm512_load_si512(line), _mm512_set1_epi8(-128));
                for (int r = 0; r < ROWS; r++) {
                    __m512i& chain = found[i % CHAINS][r];
                    chain = _mm512_dpbusd_epi32(chain, w, bytes4(x[r] + tile * 1024 + 4 * i));
                }
            }
        for (int r = 0; r < ROWS; r++) {
            to[r] = found[0][r];
            for (int c = 1; c < CHAINS; c++) to[r] = _mm512_add_epi32(to[r], found[c][r]);
        }
    }

    static void expand(const uint8_t*, int8_t*) {}
};

// Four bits: a byte of two numbers below 16 times m is two bytes below 256, so 16-bit products do for both.
template <int GROUP_>
struct Int4 {
    static constexpr int GROUP = GROUP_, QUAD = 8 * PART, META = PART / GROUP * BLOCK;
    static constexpr int RECORD = 4 * QUAD + META + 2 * BLOCK;

    struct Group {
        __m512i m, o;  // m twice in 16 bits, o - 8 m in 32
    };

    static inline Group group(const uint8_t* record, int quad, int index) {
        const __m512i m = _mm512_set_epi32(16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1);
        const __m128i* meta = (const __m128i*)(record + 4 * QUAD + (quad * (PART / GROUP) + index) * 16);
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_load_si128(meta));
        const __m512i high = _mm512_slli_epi32(_mm512_srli_epi32(byte, 4), 2);
        const __m512i twice = _mm512_or_si512(m, _mm512_slli_epi32(m, 16));
        const __m512i less = _mm512_add_epi32(_mm512_slli_epi32(m, 3), _mm512_set1_epi32(26));  // 8 m + 26
        return {_mm512_permutexvar_epi32(byte, twice), _mm512_sub_epi32(high, _mm512_permutexvar_epi32(byte, less))};
    }

    template <int ROWS>
    static inline void add(const uint8_t* record, int quad, const int8_t* const* x, const int32_t* const* sum,
                           __m512i* to) {
        constexpr int CHAINS = ROWS > 4 ? 1 : 2, EACH = GROUP / 8;
        const __m512i low = _mm512_set1_epi8(15);
        __m512i found[2][ROWS];
        for (int c = 0; c < CHAINS; c++)
            for (int r = 0; r < ROWS; r++) found[c][r] = c ? _mm512_setzero_si512() : to[r];
        const uint8_t* lines = record + quad * QUAD;
#pragma GCC unroll 4
        for (int g = 0; g < PART / GROUP; g++) {
            const Group its = group(record, quad, g);
            for (int r = 0; r < ROWS; r++) {
                int32_t all = 0;
                for (int i = 0; i < GROUP / 32; i++) all += sum[r][g * (GROUP / 32) + i];
                // In 16 bits, which a sum of 128 numbers fits; the upper halves are multiplied by 0.
                found[0][r] = _mm512_dpwssd_epi32(found[0][r], its.o, _mm512_set1_epi32(all & 0xffff));
            }
#pragma GCC unroll 16
            for (int i = 0; i < EACH; i++) {
                const uint8_t* line = lines + (g * EACH + i) * 64;
                const int at = (g * EACH + i) * 8, tile = at / 64 * 1024 + at % 64;
                _mm_prefetch(line + AHEAD, _MM_HINT_T1);
                const __m512i both = _mm512_load_si512(line);
                const __m512i a = _mm512_mullo_epi16(_mm512_and_si512(both, low), its.m);
                const __m512i b = _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), its.m);
                for (int r = 0; r < ROWS; r++) {
                    found[0][r] = _mm512_dpbusd_epi32(found[0][r], a, bytes4(x[r] + tile));
                    found[CHAINS - 1][r] = _mm512_dpbusd_epi32(found[CHAINS - 1][r], b, bytes4(x[r] + tile + 4));
                }
            }
        }
        for (int r = 0; r < ROWS; r++) to[r] = CHAINS > 1 ? _mm512_add_epi32(found[0][r], found[1][r]) : found[0][r];
    }

    // The same numbers in 8 bits, for more rows than a few.
    static void expand(const uint8_t* record, int8_t* to) {
        const __m512i low = _mm512_set1_epi8(15);
        for (int quad = 0; quad < 4; quad++)
            for (int g = 0; g < PART / GROUP; g++) {
                const Group its = group(record, quad, g);
                const __m512i spread = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
                const __m512i o = _mm512_shuffle_epi8(its.o, spread);
                for (int i = 0; i < GROUP / 8; i++) {
                    const int at = quad * (PART / 8) + g * (GROUP / 8) + i;
                    const __m512i both = _mm512_load_si512(record + at * 64);
                    const __m512i a = _mm512_mullo_epi16(_mm512_and_si512(both, low), its.m);
                    const __m512i b = _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16(both, 4), low), its.m);
                    _mm512_store_si512(to + at * 128, _mm512_add_epi8(a, o));
                    _mm512_store_si512(to + at * 128 + 64, _mm512_add_epi8(b, o));
                }
            }
    }
};

template <typename F>
inline __m512 scales(const uint8_t* record, int quad) {
    return widen(_mm256_load_si256((const __m256i*)(record + F::RECORD - 2 * BLOCK + quad * 32)));
}

// total += sum * scale * step, where |sum| <= 2^22. In the low bits of 3 * 2^22 such a number is a float, from which that is
// taken away again in the same operation as it is scaled, exactly, since a scale has 8 bits: a conversion would do, but
// waits for the half of the processor that multiplies tiles.
inline void add_scaled(__m512i sum, __m512 scale, float step, float* total) {
    const __m512 shift = _mm512_set1_ps(12582912.0f);
    const __m512 above = _mm512_castsi512_ps(_mm512_add_epi32(sum, _mm512_castps_si512(shift)));
    const __m512 part = _mm512_fmsub_ps(above, scale, _mm512_mul_ps(scale, shift));
    _mm512_store_ps(total, _mm512_fmadd_ps(part, _mm512_set1_ps(step), _mm512_load_ps(total)));
}

}  // namespace
