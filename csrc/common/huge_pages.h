// Fresh memory of large results, in pages of 2 MiB where the system gives them on request. Torch-free.
//
// The allocator of Linux gives blocks beyond 32 MiB back to the system when they are freed, so each new one is paid
// with a page fault per 4 KiB: more than moving tokens into it. Asked for huge pages it is a fault per 2 MiB. Smaller
// blocks stay with the allocator, which hands them out again as they are.
#pragma once
#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pyvtk {

constexpr size_t kMappedBytes = 32 * 1024 * 1024;  // glibc's DEFAULT_MMAP_THRESHOLD_MAX

// An advice: nothing happens where the system has no such pages or is told to give none.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kMappedBytes) return;
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage;  // whole pages only: the rest is others'
  const uintptr_t last = (start + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace pyvtk
