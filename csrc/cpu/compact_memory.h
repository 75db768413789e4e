// Memory of large outputs, used again by later calls.
//
// The allocator gives a large block back to the system when it is freed, so the next call pays a page fault per 4 KiB:
// more than copying the rows into it. Here the blocks of results that nobody holds any more wait for the next result of
// about their size, at most kKeptBytes of them in a process; the longest unused go first.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace pyvtk::cpu {

class KeptMemory {
 public:
  static constexpr size_t kLargeBytes = 128 * 1024;       // smaller blocks stay in the allocator's own hands
  static constexpr size_t kKeptBytes = 64 * 1024 * 1024;  // what waits at most
  static constexpr size_t kAlignment = 64;                // as torch's

  // Uninitialised memory of at least `bytes`, which becomes the block's size: it goes back with give().
  void* take(size_t& bytes) {
    bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = blocks_.size(); i-- > 0;) {  // what was used last may still be cached
        if (blocks_[i].bytes < bytes || blocks_[i].bytes - bytes > bytes / 4) continue;
        const Block block = blocks_[i];
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
        kept_ -= block.bytes;
        bytes = block.bytes;
        return block.data;
      }
    }
    void* data = std::aligned_alloc(kAlignment, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }

  void give(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back({data, bytes});
    kept_ += bytes;
    while (kept_ > kKeptBytes) {
      kept_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;  // those that wait, the longest unused first
  size_t kept_ = 0;
};

// Never destroyed: a result may outlive every static object.
inline KeptMemory& kept_memory() {
  static KeptMemory* memory = new KeptMemory;
  return *memory;
}

}  // namespace pyvtk::cpu
