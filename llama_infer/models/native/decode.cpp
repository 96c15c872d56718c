// Attention of single new tokens in bfloat16 where the processor multiplies tiles (AMX): scores by tiles, sixteen keys and
// all query heads that share them at a time, the rest by vectors. As attention.cpp, every row reads its own keys and values
// once and nothing else, with sums in float32; its result is the same whatever other rows are in the call.

#include <algorithm>

#include "numbers.h"
#include "tiles.h"
#include "values.h"
#include "vectors.h"

#ifdef LLAMA_INFER_TILES
#include <omp.h>

namespace {

constexpr int64_t SIDE = 16, KEYS = 64;  // of a tile; of a step

struct Call {
    const Half *q, *k, *v;
    Half* out;
    const int64_t* where;
    int64_t rows, heads, group, row_stride, head_stride, window;  // heads: of keys and values; strides: of the cache
    float scale;
};

// One KV head of one row: where its keys and its queries begin, and the positions that it sees.
struct Item {
    int64_t held, asked, first, end;

    template <int DIM>
    static Item of(const Call& call, int64_t i) {
        const int64_t r = i / call.heads, head = i % call.heads, end = call.where[3 * call.rows + r];
        return {call.where[r] * call.row_stride + head * call.head_stride,
                (call.where[call.rows + r] * call.heads + head) * call.group * DIM,
                std::max<int64_t>(0, end - call.window), end};
    }
};

// What a thread works with. HEADS query heads stand side by side: 4, 8 or 16, some of them nobody's.
template <int DIM, int HEADS>
struct Work {
    alignas(64) Half query[DIM / 2][HEADS][2];  // pairs of dimensions
    alignas(64) float weight[KEYS][HEADS];  // scores first
    alignas(64) float sum[HEADS][DIM];  // what the heads have gathered, before it is divided by the total
    alignas(64) Half last[SIDE][DIM];  // keys where the row ends among them
    Lanes most, total;  // sixteen numbers of HEADS heads over and over; the totals are in parts
};

// The scores of `count` keys, and of some behind them: tiles 0 and 1, 16 keys times HEADS, of 2, which is queries, and 3 and
// 4, keys; 32 dimensions at a time. Values that will be needed are asked for.
template <int DIM, int HEADS>
void compare(const Half* keys, int64_t count, const Half* soon, Work<DIM, HEADS>& work) {
    const int64_t whole = count / SIDE * SIDE;
    if (whole < count) {  // the cache may end here, and what lies behind the row may be NaN: weigh drops it
        std::memcpy(work.last, keys + whole * DIM, (count - whole) * DIM * sizeof(Half));
    }
    const auto line = [&](int64_t t) { return t < whole ? keys + t * DIM : work.last[0]; };
    written();
    for (int64_t t = 0; t < count; t += 2 * SIDE) {
        const bool both = t + SIDE < count;
        for (int64_t at = t * DIM; at < std::min(t + 2 * SIDE, count) * DIM; at += 32) __builtin_prefetch(soon + at);
        _tile_zero(0);
        _tile_zero(1);
        for (int d = 0; d < DIM; d += 32) {
            _tile_loadd(2, work.query[d / 2], HEADS * 4);
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

// The scores of `count` keys become weights, and what has been gathered shrinks to the new maximum.
template <int DIM, int HEADS>
void weigh(int64_t count, float scale, Work<DIM, HEADS>& work) {
    constexpr int64_t EACH = SIDE / HEADS;  // keys in a vector
    Lanes scores[KEYS / EACH], top = work.most;
    const int64_t lines = (count + EACH - 1) / EACH;
    for (int64_t i = 0; i < lines; i++) {
        scores[i] = load(work.weight[i * EACH]) * scale;
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
        store(weight, work.weight[i * EACH]);
        added += weight;
    }
    const Lanes shrink = power(work.most - top);  // 0 of what nobody has seen yet
    for (int h = 0; h < HEADS; h++)
        if (shrink[h] != 1.f)
            for (int d = 0; d < DIM; d += SIDE) store(load(work.sum[h] + d) * shrink[h], work.sum[h] + d);
    work.total = work.total * shrink + added;
    work.most = top;
}

// An item's query heads from `g` on, as many as there is room for: KEYS tokens at a time, with a running maximum (Milakov
// and Gimelshein 2018). `next`: the keys that are likely to be the next ones.
template <int DIM, int HEADS>
void attend(const Call& call, const Item& item, int64_t g, const Half* next, Work<DIM, HEADS>& work) {
    const int64_t heads = std::min<int64_t>(HEADS, call.group - g);
    const Half *q = call.q + item.asked + g * DIM, *k = call.k + item.held, *v = call.v + item.held;
    std::memset(work.query, 0, sizeof work.query);
    for (int64_t h = 0; h < heads; h++)
        for (int d = 0; d < DIM; d += 2) std::memcpy(work.query[d / 2][h], q + h * DIM + d, 4);
    std::memset(work.sum, 0, sizeof work.sum);
    work.most = Lanes{} - INFINITY, work.total = Lanes{};
    const float scale = call.scale * 1.44269504f;  // in units of log 2
    for (int64_t start = item.first; start < item.end; start += KEYS) {
        const int64_t count = std::min(KEYS, item.end - start);
        compare(k + start * DIM, count, v + start * DIM, work);
        weigh(count, scale, work);
        const Half* soon = start + KEYS < item.end ? k + (start + KEYS) * DIM : next;
        gather<DIM>(v + start * DIM, count, heads, work.weight[0], 1, HEADS, work.sum, soon);
    }
    Half* out = call.out + item.asked + g * DIM;
    for (int64_t h = 0; h < heads; h++) {
        float total = 0;
        for (int64_t i = h; i < SIDE; i += HEADS) total += work.total[i];
        alignas(64) float found[DIM];
        for (int d = 0; d < DIM; d += SIDE) store(load(work.sum[h] + d) / total, found + d);
        for (int d = 0; d < DIM; d++) out[h * DIM + d] = narrow(found[place(d)]);
    }
}

template <int DIM, int HEADS>
void all(const Call& call) {
#pragma omp parallel
    {
        Work<DIM, HEADS> work;
        constexpr uint16_t WIDE = HEADS * 4;
        const Tiles own({WIDE, WIDE, WIDE, 64, 64, 64, 64, 64});
        const int64_t count = call.rows * call.heads, threads = omp_get_num_threads();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++) {
            const Item item = Item::of<DIM>(call, i), next = Item::of<DIM>(call, std::min(i + threads, count - 1));
            for (int64_t g = 0; g < call.group; g += HEADS)
                attend(call, item, g, call.k + next.held + next.first * DIM, work);
        }
    }
}

template <int DIM>
void all(const Call& call) {
    call.group <= 4 ? all<DIM, 4>(call) : call.group <= 8 ? all<DIM, 8>(call) : all<DIM, 16>(call);
}

}  // namespace
#endif

// As attention.cpp's.
#define DECODE(DIM)                                                                                                   \
    extern "C" void bfloat16_##DIM(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,             \
                                   const int64_t* where, int64_t rows, int64_t heads, int64_t group,                  \
                                   int64_t row_stride, int64_t head_stride, int64_t window, float scale) {            \
        all<DIM>({q, k, v, out, where, rows, heads, group, row_stride, head_stride, window, scale});                  \
    }

#ifdef LLAMA_INFER_TILES
DECODE(32) DECODE(64) DECODE(96) DECODE(128) DECODE(256)
#endif
