// Attention of single new tokens by tiles, on keys and values in 8 bits. They are read as they lie, and multiplied as
// integers: queries and weights are two such parts each, 128 * the first + the second. Scales multiply scores and weights,
// of which there are few.

#include "decode.h"

#ifdef LLAMA_INFER_TILES
namespace {

// What the parts of sixteen whole numbers are, of which none is beyond 16,256.
inline void split(__m512i numbers, int8_t* first, int8_t* second) {
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(numbers, _mm512_set1_epi32(64)), 7);
    _mm_storeu_si128((__m128i*)first, _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i*)second, _mm512_cvtepi32_epi8(_mm512_sub_epi32(numbers, _mm512_slli_epi32(high, 7))));
}

// Lays a head's query out in steps of a 16,256th of its largest number. Returns a step, which is not finite where a number
// is not, nor are its scores then.
template <int DIM, int HEADS>
float lay(const Half* q, int64_t h, Work<int8_t, DIM, HEADS>& work) {
    Half most = 0;
    for (int d = 0; d < DIM; d++) most = std::max<Half>(most, q[d] & 0x7fff);
    const float step = widen(most) / 16256, up = most < 0x0d00 ? 0 : 1 / step;  // next to nothing is nothing
    int8_t parts[2][DIM];
    for (int d = 0; d < DIM; d += SIDE) {
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(q + d))), 16);
        split(_mm512_cvtps_epi32((__m512)((Lanes)wide * up)), parts[0] + d, parts[1] + d);
    }
    for (int p = 0; p < 2; p++)
        for (int d = 0; d < DIM; d += 4) std::memcpy(&work.query[p][d / 4][h], parts[p] + d, 4);
    return step;
}

// The products of sixteen keys, or twice as many: tiles 0 and 1, of the queries' parts, which are 2 and 3, and 4, keys.
template <int DIM, int HEADS, typename Line>
void multiply(const Line& line, int64_t t, bool both, Work<int8_t, DIM, HEADS>& work) {
    constexpr int STEP = 4 * Form<int8_t, DIM>::WORDS;
    for (int64_t at = t; at <= t + both * SIDE; at += SIDE) {
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < DIM; d += STEP) {
            _tile_loadd(2, work.query[0][d / 4], HEADS * 4);
            _tile_loadd(3, work.query[1][d / 4], HEADS * 4);
            _tile_loadd(4, line(at) + d, DIM);
            _tile_dpbssd(0, 4, 2);
            _tile_dpbssd(1, 4, 3);
        }
        _tile_stored(0, work.high[at], HEADS * 4);
        _tile_stored(1, work.low[at], HEADS * 4);
    }
}

// Sixteen scores, from key `t` on, before what is the same for all keys.
template <int DIM, int HEADS>
Lanes score(int64_t t, const Work<int8_t, DIM, HEADS>& work) {
    Places high, low;
    std::memcpy(&high, work.high[t], sizeof high);
    std::memcpy(&low, work.low[t], sizeof low);
    return __builtin_convertvector(high * 128 + low, Lanes) * spread<HEADS>(work.key_scale + t);
}

// The weights in parts, in steps of a 16,256th of a head's largest; returns the steps. Where HEADS heads of EACH keys are a
// vector, sixteen vectors are turned at once: a head's keys come EACH apart.
template <int DIM, int HEADS>
Lanes part(int64_t count, int64_t heads, Work<int8_t, DIM, HEADS>& work) {
    constexpr int64_t EACH = SIDE / HEADS;
    const int64_t lines = (count + EACH - 1) / EACH;
    Lanes most = {};
    for (int64_t i = 0; i < lines; i++) most = more(most, load(work.weight[i * EACH]));
    most = largest<HEADS>(most);
    const Lanes up = most < 1e-30f ? Lanes{} : 16256 / most;
    for (int64_t first = 0; first < KEYS; first += SIDE * EACH) {
        __m512i numbers[SIDE];
        for (int64_t i = 0; i < SIDE; i++) {
            const Lanes some = first + i * EACH < count ? load(work.weight[first + i * EACH]) * up : Lanes{};
            numbers[i] = _mm512_cvtps_epi32((__m512)some);
        }
        transpose(numbers);
        for (int64_t i = 0; i < SIDE; i++) {
            const int64_t h = i % HEADS, at = first + i / HEADS * SIDE;
            if (h >= heads) continue;
            auto& to = work.part[h / work.SOME];
            split(numbers[i], &to[0][h % work.SOME][at], &to[1][h % work.SOME][at]);
        }
    }
    return most * (1 / 16256.f);
}

// The values of `count` keys, each times its weight, are added to what has been gathered, by tiles: 5, weights, times 6,
// values, is 7. Keys that will be needed are asked for.
template <int DIM, int HEADS>
void gather(const int8_t* values, int64_t count, int64_t heads, const int8_t* soon, Work<int8_t, DIM, HEADS>& work) {
    constexpr int64_t EACH = SIDE / HEADS;
    const Lanes step = part(count, heads, work);
    for (int d = 0; d < DIM; d += 64) {
        const __mmask64 there = DIM - d < 64 ? (1ull << (DIM - d) % 64) - 1 : ~0ull;
        for (int64_t line = 0; line < KEYS / 4; line++) {
            const int64_t begin = line / 4 / EACH * SIDE * EACH + line / 4 % EACH + line % 4 * 4 * EACH;
            __m512i x[4];
            for (int i = 0; i < 4; i++) {
                const int64_t key = std::min(begin + i * EACH, count - 1);  // its weight is 0 behind the end
                x[i] = _mm512_maskz_loadu_epi8(there, values + key * DIM + d);
                if (begin + i * EACH < count) __builtin_prefetch(soon + key * DIM + d);
            }
            const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
            const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), e = _mm512_unpackhi_epi8(x[2], x[3]);
            _mm512_store_si512(work.word[0][line], _mm512_unpacklo_epi16(a, c));
            _mm512_store_si512(work.word[1][line], _mm512_unpackhi_epi16(a, c));
            _mm512_store_si512(work.word[2][line], _mm512_unpacklo_epi16(b, e));
            _mm512_store_si512(work.word[3][line], _mm512_unpackhi_epi16(b, e));
        }
        for (int64_t g = 0; g < heads; g += work.SOME) {
            written();
            _tile_loadd(5, work.part[g / work.SOME], KEYS);
            for (int i = 0; i < 4; i++) {
                _tile_zero(7);
                _tile_loadd(6, work.word[i], 64);
                _tile_dpbssd(7, 5, 6);
                _tile_stored(7, work.found, 64);
                written();
                for (int64_t h = 0; h < std::min<int64_t>(work.SOME, heads - g); h++) {
                    Places high, low;
                    std::memcpy(&high, work.found[0][h], sizeof high);
                    std::memcpy(&low, work.found[1][h], sizeof low);
                    float* to = work.sum[g + h] + d + i * SIDE;
                    store(load(to) + __builtin_convertvector(high * 128 + low, Lanes) * step[g + h], to);
                }
            }
        }
    }
}

// The scales of `count` tokens, with zeros behind them. Returns 0, or NaN where one is not finite.
inline float take(const Half* from, int64_t count, float* to) {
    std::fill(to + count, to + KEYS + SIDE, 0.f);
    for (int64_t t = 0; t < count; t++) to[t] = widen(from[t]);
    return std::any_of(from, from + count, [](Half x) { return (x & 0x7fff) >= 0x7f80; }) ? NAN : 0;
}

// Those of keys and values.
template <int DIM, int HEADS>
float scales(const Call<int8_t>& call, int64_t at, int64_t count, Work<int8_t, DIM, HEADS>& work) {
    take(call.k_scale + at, count, work.key_scale);
    return take(call.v_scale + at, count, work.value_scale);
}

}  // namespace

DECODE(int8_t, 32) DECODE(int8_t, 64) DECODE(int8_t, 96) DECODE(int8_t, 128) DECODE(int8_t, 256)
#endif
