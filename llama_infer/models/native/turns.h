// Work in pieces for threads that take the next as they get ready: cores are not equally fast, neither those of different
// kinds in one processor, nor those that a neighbour uses too.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace {

// Pieces 0 to count (exclusive), neighbours together: many in the beginning, one by one in the end.
class Turns {
  public:
    explicit Turns(int64_t count) : count_(count), threads_(omp_get_max_threads()) {}

    // Calls work(piece, the thread's next, or -1) until all are taken. A thread knows its next while others have some, too.
    template <typename Work>
    void each(const Work& work) {
        for (Run now = take(); now.begin < now.end;) {
            const Run ahead = count_ - taken_ > 2 * threads_ ? take() : Run{};
            const int64_t then = ahead.begin < ahead.end ? ahead.begin : -1;
            for (int64_t i = now.begin; i < now.end; i++) work(i, i + 1 < now.end ? i + 1 : then);
            now = then < 0 ? take() : ahead;
        }
    }

  private:
    struct Run {
        int64_t begin = 0, end = 0;
    };

    Run take() {
        int64_t begin = taken_, end;
        do {
            end = std::min(count_, begin + std::max<int64_t>(1, (count_ - begin) / (8 * threads_)));
        } while (!taken_.compare_exchange_weak(begin, std::max(begin, end)));
        return {begin, end};
    }

    const int64_t count_, threads_;
    std::atomic<int64_t> taken_{0};
};

}  // namespace
