#include "library.h"

namespace {

thread_local cudaError_t last_status = cudaSuccess;

}  // namespace

cudaError_t report(cudaError_t status) { return last_status = status; }

// seed, blocks_alive and shared_bytes as in cuda_emulation::Options; shared_bytes 0: as on an H100
EXPORT void emulation_configure(uint64_t seed, int blocks_alive, int64_t shared_bytes) {
  cuda_emulation::Options& options = cuda_emulation::options();
  options = {};
  options.seed = seed;
  options.blocks_alive = blocks_alive;
  if (shared_bytes > 0) options.shared_bytes = shared_bytes;
}

EXPORT const char* emulation_error() { return cudaGetErrorString(last_status); }
