// Kernels as a shared library with a C interface, for tests in Python: one file per family, and what they share.
#pragma once
#include "cuda/ptx.cuh"

#define EXPORT extern "C" [[gnu::visibility("default")]]

// What the launch returned; emulation_error() says it in words.
cudaError_t report(cudaError_t status);
