// Work in blocks, dealt out to XLA's own threads.

#ifndef SAE_JAX_BLOCKS_H_
#define SAE_JAX_BLOCKS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

// Calls start() once in each thread that takes part, and what it returns with every block from 0 on that the thread takes.
inline void InBlocks(xla::ffi::ThreadPool& pool, int64_t blocks, std::function<std::function<void(int64_t)>()> start) {
  struct Shared {
    std::function<std::function<void(int64_t)>()> start;
    int64_t blocks;
    std::atomic<int64_t> next{0}, done{0};

    void Work() {
      int64_t block = next.fetch_add(1);
      if (block >= blocks) return;
      const auto one = start();
      for (; block < blocks; block = next.fetch_add(1)) {
        one(block);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  // Shared: a thread of the pool that comes late finds no block, and this function may have returned by then.
  auto shared = std::make_shared<Shared>();
  shared->start = std::move(start), shared->blocks = blocks;
  // The pool has a thread for every device, and a machine may pretend to have more of these than it has cores.
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  const int64_t helpers = std::min({pool.num_threads(), cores, blocks}) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->Work(); });
  // This thread works as well, so that it never waits for one of the pool that does not come.
  shared->Work();
  while (shared->done.load(std::memory_order_acquire) < blocks) std::this_thread::yield();
}

#endif  // SAE_JAX_BLOCKS_H_
