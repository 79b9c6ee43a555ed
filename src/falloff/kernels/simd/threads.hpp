// Work shared by threads.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

// Each of `count` items once, by whichever thread comes first; all are done when this returns on any thread.
struct Shared {
  std::atomic<int64_t> next{0}, done{0};
  template <class Body>
  void each(int64_t count, Body body) {
    for (int64_t i; (i = next++) < count; done++) body(i);
    while (done < count) std::this_thread::yield();
  }
};

// OpenMP's way to call a function on threads that it keeps; null where there is no OpenMP. With threads of our own beside
// those of PyTorch, these would wait for their next work at full speed, on the same cores.
using Parallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);
Parallel parallel = nullptr;

// `work()` on so many threads or fewer, this one among them.
template <class Work>
void together(int64_t threads, Work work) {
  if (parallel) return parallel([](void *given) { (*static_cast<Work *>(given))(); }, &work, threads, 0);
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; t++) others.emplace_back(work);
  work();
  for (auto &other : others) other.join();
}

}  // namespace

extern "C" void falloff_use(Parallel found) { parallel = found; }
