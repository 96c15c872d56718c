// Attention of single new tokens in bfloat16 where the processor multiplies tiles (AMX): scores by tiles, sixteen keys and
// all query heads that share them at a time, the rest by vectors. As attention.cpp, every row reads its own keys and values
// once and nothing else, with sums in float32; its result is the same whatever other rows are in the call.
//
// Keys and values in 8 bits are read as they lie, and multiplied as integers: queries and weights are two such parts each,
// 128 * the first + the second. Scales multiply scores and weights, of which there are few.

#include <algorithm>

#include "numbers.h"
#include "tiles.h"
#include "values.h"
#include "vectors.h"

#ifdef LLAMA_INFER_TILES
#include <omp.h>

namespace {

constexpr int64_t SIDE = 16, KEYS = 64;  // of a tile; of a step

// T: of keys and values, Half or int8_t.
template <typename T>
struct Call {
    const Half* q;
    const T *k, *v;
    const Half *k_scale, *v_scale;  // of 8 bits
    Half* out;
    const int64_t* where;
    int64_t rows, heads, group, row_stride, head_stride, window;  // heads: of keys and values; strides: of the cache
    float scale;
};

// One KV head of one row: where its keys and its queries begin, and the positions that it sees.
struct Item {
    int64_t held, asked, first, end;

    template <int DIM, typename T>
    static Item of(const Call<T>& call, int64_t i) {
        const int64_t r = i / call.heads, head = i % call.heads, end = call.where[3 * call.rows + r];
        return {call.where[r] * call.row_stride + head * call.head_stride,
                (call.where[call.rows + r] * call.heads + head) * call.group * DIM,
                std::max<int64_t>(0, end - call.window), end};
    }
};

// How a query stands before keys of a type: in PARTS, PER dimensions a word, of which a tile takes WORDS at once. WIDE: of
// what is gathered.
template <typename T, int DIM>
struct Form {
    static constexpr int PARTS = sizeof(T) == 1 ? 2 : 1, PER = 4 / sizeof(T), WORDS = DIM * sizeof(T) % 64 ? 8 : 16;
    static constexpr int WIDE = sizeof(T) == 1 ? (DIM + 63) / 64 * 64 : DIM;
};

// What a thread works with. HEADS query heads stand side by side: 4, 8 or 16, some of them nobody's.
template <typename T, int DIM, int HEADS>
struct Work : Form<T, DIM> {
    using Form<T, DIM>::PARTS, Form<T, DIM>::PER, Form<T, DIM>::WIDE;
    static constexpr int SOME = std::min(HEADS, 8);
    alignas(64) uint32_t query[PARTS][DIM / PER][HEADS];
    alignas(64) float weight[KEYS][HEADS];  // scores first
    alignas(64) float sum[HEADS][WIDE];  // what the heads have gathered, before it is divided by the total
    alignas(64) T last[SIDE][DIM];  // keys where the row ends among them
    Lanes scale;  // of the scores of HEADS heads over and over, in units of log 2
    Lanes most, total;  // likewise; the totals are in parts
    // Of 8 bits only: scales, scores in parts, weights in parts (of SOME heads together), values of four keys a word, and
    // what a tile of these has gathered.
    alignas(64) float key_scale[KEYS + SIDE], value_scale[KEYS + SIDE];
    alignas(64) int32_t high[KEYS][HEADS], low[KEYS][HEADS];
    alignas(64) int8_t part[HEADS / SOME][2][SOME][KEYS];
    alignas(64) uint32_t word[4][KEYS / 4][SIDE];
    alignas(64) int32_t found[2][SOME][SIDE];
};

// Lays a head's query out for keys in bfloat16.
template <int DIM, int HEADS>
float lay(const Half* q, int64_t h, Work<Half, DIM, HEADS>& work) {
    for (int d = 0; d < DIM; d += 2) std::memcpy(&work.query[0][d / 2][h], q + d, 4);
    return 1;
}

// What the parts of sixteen whole numbers are, of which none is beyond 16,256.
inline void split(__m512i numbers, int8_t* first, int8_t* second) {
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(numbers, _mm512_set1_epi32(64)), 7);
    _mm_storeu_si128((__m128i*)first, _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i*)second, _mm512_cvtepi32_epi8(_mm512_sub_epi32(numbers, _mm512_slli_epi32(high, 7))));
}

// For keys in 8 bits: in steps of a 16,256th of its largest number. Returns a step, which is not finite where a number
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

// The products of keys in bfloat16: tiles 0 and 1, 16 keys times HEADS, of 2, which is queries, and 3 and 4, keys.
template <int DIM, int HEADS, typename Line>
void multiply(const Line& line, int64_t t, bool both, Work<Half, DIM, HEADS>& work) {
    _tile_zero(0);
    _tile_zero(1);
    for (int d = 0; d < DIM; d += 32) {
        _tile_loadd(2, work.query[0][d / 2], HEADS * 4);
        _tile_loadd(3, line(t) + d, DIM * sizeof(Half));
        _tile_dpbf16ps(0, 3, 2);
        if (both) {
            _tile_loadd(4, line(t + SIDE) + d, DIM * sizeof(Half));
            _tile_dpbf16ps(1, 4, 2);
        }
    }
    _tile_stored(0, work.weight[t], HEADS * 4);
    if (both) _tile_stored(1, work.weight[t + SIDE], HEADS * 4);
}

// Of keys in 8 bits: tiles 0 and 1, of the queries' parts, which are 2 and 3, and 4, keys.
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

// The products of `count` keys, and of some behind them, with the queries. Values that will be needed are asked for.
template <typename T, int DIM, int HEADS>
void compare(const T* keys, int64_t count, const T* soon, Work<T, DIM, HEADS>& work) {
    const int64_t whole = count / SIDE * SIDE;
    if (whole < count) {  // the cache may end here, and what lies behind the row may be NaN: weigh drops it
        std::memcpy(work.last, keys + whole * DIM, (count - whole) * DIM * sizeof(T));
    }
    const auto line = [&](int64_t t) { return t < whole ? keys + t * DIM : work.last[0]; };
    written();
    for (int64_t t = 0; t < count; t += 2 * SIDE) {
        for (int64_t at = t; at < std::min(t + 2 * SIDE, count); at++) fetch<DIM>(soon + at * DIM);
        multiply(line, t, t + SIDE < count, work);
    }
    written();
}

inline Lanes more(Lanes a, Lanes b) { return a < b ? b : a; }

// The largest of the numbers of each head.
template <int HEADS>
Lanes largest(Lanes x) {
    if (HEADS < 16) x = more(x, (Lanes)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e));
    if (HEADS < 8) x = more(x, (Lanes)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1));
    return x;
}

// Each of the numbers from there on HEADS times, sixteen in all.
template <int HEADS>
Lanes spread(const float* from) {
    Places which;
    for (int i = 0; i < SIDE; i++) which[i] = i / HEADS;
    return (Lanes)_mm512_permutexvar_ps((__m512i)which, (__m512)load(from));
}

// Sixteen scores, from key `t` on, before what is the same for all keys.
template <int DIM, int HEADS>
Lanes score(int64_t t, const Work<Half, DIM, HEADS>& work) {
    return load(work.weight[t]);
}

template <int DIM, int HEADS>
Lanes score(int64_t t, const Work<int8_t, DIM, HEADS>& work) {
    Places high, low;
    std::memcpy(&high, work.high[t], sizeof high);
    std::memcpy(&low, work.low[t], sizeof low);
    return __builtin_convertvector(high * 128 + low, Lanes) * spread<HEADS>(work.key_scale + t);
}

// The scores of `count` keys become weights of their values, and what has been gathered shrinks to the new maximum.
template <typename T, int DIM, int HEADS>
void weigh(int64_t count, Work<T, DIM, HEADS>& work) {
    constexpr int64_t EACH = SIDE / HEADS;  // keys in a vector
    Lanes scores[KEYS / EACH], top = work.most;
    const int64_t lines = (count + EACH - 1) / EACH;
    for (int64_t i = 0; i < lines; i++) {
        scores[i] = score(i * EACH, work) * work.scale;
        const int64_t here = std::min(EACH, count - i * EACH);
        if (here < EACH) {
            const __mmask16 gone = __mmask16(0xffffu << here * HEADS);
            scores[i] = (Lanes)_mm512_mask_blend_ps(gone, (__m512)scores[i], _mm512_set1_ps(-INFINITY));
        }
        top = more(top, scores[i]);
    }
    top = largest<HEADS>(top);
    Lanes added = {};
    for (int64_t i = 0; i < lines; i++) {
        const Lanes weight = power(scores[i] - top);
        added += weight;
        store(sizeof(T) == 1 ? weight * spread<HEADS>(work.value_scale + i * EACH) : weight, work.weight[i * EACH]);
    }
    const Lanes shrink = power(work.most - top);  // 0 of what nobody has seen yet
    for (int h = 0; h < HEADS; h++)
        if (shrink[h] != 1.f)
            for (int d = 0; d < work.WIDE; d += SIDE) store(load(work.sum[h] + d) * shrink[h], work.sum[h] + d);
    work.total = work.total * shrink + added;
    work.most = top;
}

// The values of `count` keys, each times its weight, are added to what has been gathered. Keys that will be needed are
// asked for.
template <int DIM, int HEADS>
void gather(const Half* values, int64_t count, int64_t heads, const Half* soon, Work<Half, DIM, HEADS>& work) {
    gather<DIM>(values, count, heads, work.weight[0], 1, HEADS, work.sum, soon);
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

// Where a dimension of values in 8 bits stands when four keys' have been laid side by side.
constexpr int place8(int d) { return d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4 + d % 4; }

// In 8 bits, by tiles: 5, weights, times 6, values, is 7.
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

// An item's query heads from `g` on, as many as there is room for: KEYS tokens at a time, with a running maximum (Milakov
// and Gimelshein 2018). `next`: the keys that are likely to be the next ones.
template <typename T, int DIM, int HEADS>
void attend(const Call<T>& call, const Item& item, int64_t g, const T* next, Work<T, DIM, HEADS>& work) {
    const int64_t heads = std::min<int64_t>(HEADS, call.group - g);
    const Half* q = call.q + item.asked + g * DIM;
    const T *k = call.k + item.held, *v = call.v + item.held;
    std::memset(work.query, 0, sizeof work.query);
    work.scale = Lanes{};
    for (int64_t h = 0; h < heads; h++) {
        const float step = lay(q + h * DIM, h, work) * call.scale * 1.44269504f;
        for (int64_t i = h; i < SIDE; i += HEADS) work.scale[i] = step;
    }
    std::memset(work.sum, 0, sizeof work.sum);
    float odd = 0;
    work.most = Lanes{} - INFINITY, work.total = Lanes{};
    for (int64_t start = item.first; start < item.end; start += KEYS) {
        const int64_t count = std::min(KEYS, item.end - start);
        if (sizeof(T) == 1) {
            take(call.k_scale + item.held / DIM + start, count, work.key_scale);
            odd += take(call.v_scale + item.held / DIM + start, count, work.value_scale);
        }
        compare(k + start * DIM, count, v + start * DIM, work);
        weigh(count, work);
        const T* soon = start + KEYS < item.end ? k + (start + KEYS) * DIM : next;
        gather(v + start * DIM, count, heads, soon, work);
    }
    Half* out = call.out + item.asked + g * DIM;
    for (int64_t h = 0; h < heads; h++) {
        float total = odd;
        for (int64_t i = h; i < SIDE; i += HEADS) total += work.total[i];
        alignas(64) float found[work.WIDE];
        for (int d = 0; d < work.WIDE; d += SIDE) store(load(work.sum[h] + d) / total, found + d);
        for (int d = 0; d < DIM; d++) out[h * DIM + d] = narrow(found[sizeof(T) == 1 ? place8(d) : place(d)]);
    }
}

template <int DIM, int HEADS, typename T>
void all(const Call<T>& call) {
#pragma omp parallel
    {
        Work<T, DIM, HEADS> work;
        constexpr uint16_t WIDE = HEADS * 4, LINE = 4 * Form<T, DIM>::WORDS;
        constexpr uint8_t WORDS = Form<T, DIM>::WORDS, PARTS = 2 * work.SOME;
        const Tiles own = sizeof(T) == 1
            ? Tiles({WIDE, WIDE, WIDE, WIDE, LINE, 64, 64, 64}, {16, 16, WORDS, WORDS, 16, PARTS, 16, PARTS})
            : Tiles({WIDE, WIDE, WIDE, 64, 64, 64, 64, 64});
        const int64_t count = call.rows * call.heads, threads = omp_get_num_threads();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const Item item = Item::of<DIM>(call, i), next = Item::of<DIM>(call, std::min(i + threads, count - 1));
            for (int64_t g = 0; g < call.group; g += HEADS)
                attend(call, item, g, call.k + next.held + next.first * DIM, work);
        }
    }
}

template <int DIM, typename T>
void all(const Call<T>& call) {
    call.group <= 4 ? all<DIM, 4>(call) : call.group <= 8 ? all<DIM, 8>(call) : all<DIM, 16>(call);
}

}  // namespace
#endif

// As attention.cpp's.
#define DECODE(NAME, TYPE, DIM)                                                                                        \
    extern "C" void NAME##_##DIM(const uint16_t* q, const TYPE* k, const TYPE* v, const uint16_t* k_scale,             \
                                 const uint16_t* v_scale, uint16_t* out, const int64_t* where, int64_t rows,           \
                                 int64_t heads, int64_t group, int64_t row_stride, int64_t head_stride,                \
                                 int64_t window, float scale) {                                                        \
        all<DIM>(Call<TYPE>{q, k, v, k_scale, v_scale, out, where, rows, heads, group, row_stride, head_stride,        \
                            window, scale});                                                                           \
    }
#define BOTH(DIM) DECODE(bfloat16, uint16_t, DIM) DECODE(bfloat16_int8, int8_t, DIM)

#ifdef LLAMA_INFER_TILES
BOTH(32) BOTH(64) BOTH(96) BOTH(128) BOTH(256)
#endif
