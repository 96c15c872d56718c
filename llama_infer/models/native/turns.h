// Work in pieces for threads that take the next as they get ready: cores are not equally fast, neither those of different
// kinds in one processor, nor those that a neighbour uses too.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

class Turns {
  public:
    // Pieces 0 to count (exclusive), `run` neighbours at a time.
    Turns(int64_t count, int64_t run) : count_(count), run_(std::max<int64_t>(1, run)) {}

    // Calls work(piece, the thread's next) until all are taken; the next of the last is -1.
    template <typename Work>
    void each(const Work& work) {
        for (int64_t begin = take(), then; begin < count_; begin = then) {
            then = take();
            const int64_t end = std::min(begin + run_, count_);
            for (int64_t i = begin; i < end; i++) work(i, i + 1 < end ? i + 1 : then < count_ ? then : -1);
        }
    }

  private:
    int64_t take() { return taken_.fetch_add(run_, std::memory_order_relaxed); }

    const int64_t count_, run_;
    std::atomic<int64_t> taken_{0};
};

}  // namespace
