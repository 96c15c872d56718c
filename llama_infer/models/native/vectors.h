// What is done with sixteen numbers at a time where the processor has vectors of 512 bits. Included by the kernels beside
// it.

#pragma once

#include "numbers.h"

#ifdef __AVX512F__
#include <immintrin.h>

namespace {

// 2^x for x <= 0; 0 where it is next to nothing.
inline Lanes power(Lanes x) {
    const Lanes whole = (Lanes)_mm512_roundscale_ps((__m512)x, 8), rest = x - whole;
    const Lanes scaled = (Lanes)_mm512_scalef_ps((__m512)part_of_power(rest), (__m512)whole);
    return x < -126.f ? Lanes{} : scaled;  // NaN stays
}

// Sixteen times sixteen words, line i to column i.
inline void transpose(__m512i* lines) {
    __m512i *a = lines, b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            b[i + 8 * j] = _mm512_shuffle_i32x4(a[i + 8 * j], a[i + 8 * j + 4], 0x88);
            b[i + 8 * j + 4] = _mm512_shuffle_i32x4(a[i + 8 * j], a[i + 8 * j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        lines[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        lines[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    }
}

}  // namespace
#endif
