// The processor's tiles (AMX): who may use them, and how they are shaped. Included by the kernels beside it, which have
// them where LLAMA_INFER_TILES is defined.

#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define LLAMA_INFER_TILES

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#endif

namespace {

// Whether the processor multiplies tiles; the system grants them to a process that asks.
inline bool have_tiles() {
#ifdef LLAMA_INFER_TILES
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
#else
    return false;
#endif
}

#ifdef LLAMA_INFER_TILES
// To be called between writing what tiles are loaded from and loading them: the intrinsics do not tell the compiler that
// they read memory, and it might write later, or not at all.
inline void written() { __asm__ volatile("" ::: "memory"); }

// A thread's tiles, of 16 lines, or so many, of so many bytes each; in the end as they were, for oneDNN keeps its own from
// call to call.
class Tiles {
  public:
    Tiles() : Tiles({64, 64, 64, 64, 64, 64, 64, 64}) {}
    explicit Tiles(const uint16_t (&bytes)[8], const uint8_t (&lines)[8] = {16, 16, 16, 16, 16, 16, 16, 16}) {
        Shapes shapes;
        std::copy_n(bytes, 8, shapes.bytes);
        std::copy_n(lines, 8, shapes.lines);
        written();
        _tile_storeconfig(before_);
        _tile_loadconfig(&shapes);
        written();
    }
    ~Tiles() { _tile_loadconfig(before_); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    struct alignas(64) Shapes {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t lines[16] = {};
    };

    alignas(64) char before_[64];
};
#endif

}  // namespace
