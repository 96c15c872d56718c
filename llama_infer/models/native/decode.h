// Attention of single new tokens in bfloat16 where the processor multiplies tiles (AMX): scores by tiles, sixteen keys and
// all query heads that share them at a time, the rest by vectors. As attention.h, every row reads its own keys and values
// once and nothing else, with sums in float32; its result is the same whatever other rows are in the call.
//
// Who includes it says, for one type of keys and values, how a query is laid out (`lay`), how keys are multiplied
// (`multiply`) and scores made of it (`score`), how values are gathered (`gather`), and reads their scales (`scales`).

#pragma once

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

    // Where a dimension of values stands in what is gathered: those in 8 bits are laid side by side for four keys.
    static constexpr int place(int d) {
        return sizeof(T) == 1 ? d / 64 * 64 + d % 16 / 4 * 16 + d % 64 / 16 * 4 + d % 4 : ::place(d);
    }
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
    float odd = 0;  // NaN where it has to be
    work.most = Lanes{} - INFINITY, work.total = Lanes{};
    for (int64_t start = item.first; start < item.end; start += KEYS) {
        const int64_t count = std::min(KEYS, item.end - start);
        odd += scales(call, item.held / DIM + start, count, work);
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
        for (int d = 0; d < DIM; d++) out[h * DIM + d] = narrow(found[work.place(d)]);
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

// As attention.h's.
#define DECODE(TYPE, DIM)                                                                                              \
    extern "C" void bfloat16_##DIM(const uint16_t* q, const TYPE* k, const TYPE* v, const uint16_t* k_scale,           \
                                 const uint16_t* v_scale, uint16_t* out, const int64_t* where, int64_t rows,           \
                                 int64_t heads, int64_t group, int64_t row_stride, int64_t head_stride,                \
                                 int64_t window, float scale) {                                                        \
        all<DIM>(Call<TYPE>{q, k, v, k_scale, v_scale, out, where, rows, heads, group, row_stride, head_stride,        \
                            window, scale});                                                                           \
    }
