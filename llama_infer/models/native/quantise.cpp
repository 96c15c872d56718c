// Weights in 4 bits, found as int4.py's `quantise_plainly` finds them: its operations in its order, in float32, so that
// both find the same. Lanes are 16 spans, each of which has its scale; a group's multiplier and offset are a lane's too.
// Compiled without what changes a sum's order or the rounding of a product.

#include <algorithm>

#include "numbers.h"

namespace {

constexpr int SPAN = 256, LANES = 16;
constexpr float STEP = 4, FIRST = -26, LAST = FIRST + 15 * STEP, TOP = 125, BOTTOM = -122;

inline Lanes all(float x) { return Lanes{} + x; }

inline Lanes least(Lanes a, Lanes b) { return b < a ? b : a; }
inline Lanes most(Lanes a, Lanes b) { return b > a ? b : a; }
inline Lanes within(Lanes x, Lanes low, Lanes high) { return least(most(low, x), high); }  // NaN: the lowest

// To the nearest, ties to even, of less than 2^22.
inline Lanes round(Lanes x) { return (x + 12582912.0f) - 12582912.0f; }

inline Lanes floor(Lanes x) {
    const Lanes near = round(x);
    return near > x ? near - 1 : near;
}

inline Lanes ceil(Lanes x) { return -floor(-x); }

// The bounds of a group's numbers, and what they are multiplied with and added to.
struct Group {
    Lanes m, high, o, inverse, bottom, top;

    Group(Lanes m, Lanes high) : m(m), high(high), o(high * STEP + FIRST), inverse(1 / m) {
        bottom = most(ceil((-128 - o) / m), all(-8));
        top = least(floor((127 - o) / m), all(7));
    }

    // Numbers in the middle of the ends, of which this is the sum.
    static Group between(Lanes ends, Lanes m) {
        return Group(m, round(within(((ends + m) / 2 - FIRST) / STEP, all(0), all(15))));
    }

    Lanes number(Lanes above) const { return round(within(above * inverse, bottom, top)); }
};

// In halves, as the plain version adds them up.
inline Lanes sum(Lanes* x, int count) {
    while (count /= 2)
        for (int i = 0; i < count; i++) x[i] += x[i + count];
    return x[0];
}

template <int GROUP>
inline Lanes error(const Lanes* scaled, const Group& group) {
    Lanes errors[GROUP];
    for (int i = 0; i < GROUP; i++) {
        const Lanes above = scaled[i] - group.o, off = group.number(above) * group.m - above;
        errors[i] = off * off;
    }
    return sum(errors, GROUP);
}

template <int GROUP>
struct Spans {
    static constexpr int GROUPS = SPAN / GROUP;
    Lanes x[SPAN], low[GROUPS], high[GROUPS], m[GROUPS], offset[GROUPS], scale, best;

    // The best multipliers and offsets under one scale; kept, where they are better than what there is.
    void attempt(Lanes by, bool first) {
        const Lanes up = 1 / by;
        Lanes scaled[GROUP], errors[GROUPS], found_m[GROUPS], found_offset[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            for (int i = 0; i < GROUP; i++) scaled[i] = x[g * GROUP + i] * up;
            const Lanes bottom = low[g] * up, top = high[g] * up;
            const Lanes reach = most((top - LAST) / 7, (FIRST - bottom) / 8);
            const Lanes whole = most(round((top - bottom) / 15), ceil(reach));
            const Group one = Group::between(bottom + top, within(whole, all(1), all(16)));
            const Group less = Group::between(bottom + top, within(whole - 1, all(1), all(16)));
            const Lanes a = error<GROUP>(scaled, one), b = error<GROUP>(scaled, less);
            errors[g] = b < a ? b : a;
            found_m[g] = b < a ? less.m : one.m;
            found_offset[g] = b < a ? less.high : one.high;
        }
        const Lanes total = sum(errors, GROUPS) * (by * by);
        const auto better = total < best;
        best = first ? total : better ? total : best;
        scale = first ? by : better ? by : scale;
        for (int g = 0; g < GROUPS; g++) {
            m[g] = first ? found_m[g] : better ? found_m[g] : m[g];
            offset[g] = first ? found_offset[g] : better ? found_offset[g] : offset[g];
        }
    }

    void search() {
        Lanes bottom = all(0), top = all(0), widest = all(0), odd = all(0);
        for (int g = 0; g < GROUPS; g++) {
            low[g] = high[g] = x[g * GROUP];
            for (int i = 0; i < GROUP; i++) {
                low[g] = least(low[g], x[g * GROUP + i]);
                high[g] = most(high[g], x[g * GROUP + i]);
                odd += x[g * GROUP + i] * 0;  // NaN, should one of them be, or infinity, or their span
            }
            bottom = least(bottom, low[g]);
            top = most(top, high[g]);
            widest = most(widest, high[g] - low[g]);
        }
        odd += widest * 0;
        const Lanes enough = most(most(top / TOP, bottom / BOTTOM), all(1e-30f));
        for (int count = 10; count <= 15; count++) {
            Lanes by = most(widest / float(15 * count), enough);
            for (int lane = 0; lane < LANES; lane++) by[lane] = rounded(by[lane]);
            attempt(by, count == 10);
        }
        scale += odd;
    }

    // Numbers from 0 to 15, in place.
    void number() {
        const Lanes up = 1 / scale;
        for (int g = 0; g < GROUPS; g++) {
            const Group group(m[g], offset[g]);
            for (Lanes* each = x + g * GROUP; each < x + (g + 1) * GROUP; each++)
                *each = group.number(*each * up - group.o) + 8;
        }
    }
};

// weight [rows, width] -> numbers [rows, width / 2], groups [rows, width / GROUP], scale [rows, spans]. Of eight
// neighbours the first four are the low halves of four bytes.
template <int GROUP>
void quantise(const float* weight, uint8_t* numbers, uint8_t* groups, Half* scale, int64_t rows, int64_t width) {
    const int64_t spans = (width + SPAN - 1) / SPAN, count = rows * spans;
#pragma omp parallel for if (count > 4 * LANES)
    for (int64_t first = 0; first < count; first += LANES) {
        static thread_local Spans<GROUP> its;
        const int lanes = int(std::min<int64_t>(LANES, count - first));
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t at = first + std::min(lane, lanes - 1), row = at / spans, begin = at % spans * SPAN;
            const int left = int(std::min<int64_t>(SPAN, width - begin));
            for (int i = 0; i < left; i++) its.x[i][lane] = weight[row * width + begin + i];
            for (int i = left; i < SPAN; i++) its.x[i][lane] = 0;
        }
        its.search();
        its.number();
        for (int lane = 0; lane < lanes; lane++) {
            const int64_t at = first + lane, row = at / spans, begin = at % spans * SPAN;
            const int left = int(std::min<int64_t>(SPAN, width - begin));
            scale[at] = narrow(its.scale[lane]);
            for (int g = 0; g < left / GROUP; g++)
                groups[(row * width + begin) / GROUP + g] = uint8_t(its.offset[g][lane] * 16 + its.m[g][lane] - 1);
            uint8_t* to = numbers + (row * width + begin) / 2;
            for (int i = 0; i < left; i += 8)
                for (int j = i; j < i + 4; j++) *to++ = uint8_t(its.x[j][lane] + 16 * its.x[j + 4][lane]);
        }
    }
}

}  // namespace

#define QUANTISE(GROUP)                                                                                              \
    extern "C" void int4_##GROUP(const void* weight, void* numbers, void* groups, void* scale, int64_t rows,         \
                                 int64_t width) {                                                                    \
        quantise<GROUP>((const float*)weight, (uint8_t*)numbers, (uint8_t*)groups, (Half*)scale, rows, width);       \
    }

QUANTISE(32)
QUANTISE(64)
QUANTISE(128)
