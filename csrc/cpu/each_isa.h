// Includes a kernel header once per instruction set, in namespaces pyvtk::cpu::{portable,avx2,avx512}:
//
//   #define PYVTK_KERNEL_HEADER "cpu/select.h"
//   #include "cpu/each_isa.h"
//
// The kernel header has no include guard and opens `namespace pyvtk::cpu::PYVTK_ISA`. It finds simd.h's types there
// already. Standard headers come in before the target pragmas: an inline function of the standard library compiled
// for AVX-512 could otherwise be the copy that the linker keeps for everybody.
#ifndef PYVTK_KERNEL_HEADER
#error "define PYVTK_KERNEL_HEADER before including each_isa.h"
#endif

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "common/types.h"

#define PYVTK_ISA portable
#define PYVTK_VECTOR_BYTES 16
#include "cpu/simd.h"
#include PYVTK_KERNEL_HEADER
#undef PYVTK_ISA
#undef PYVTK_VECTOR_BYTES

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#define PYVTK_ISA avx2
#define PYVTK_VECTOR_BYTES 32
#include "cpu/simd.h"
#include PYVTK_KERNEL_HEADER
#undef PYVTK_ISA
#undef PYVTK_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt,prefer-vector-width=512")
#define PYVTK_ISA avx512
#define PYVTK_VECTOR_BYTES 64
#include "cpu/simd.h"
#include PYVTK_KERNEL_HEADER
#undef PYVTK_ISA
#undef PYVTK_VECTOR_BYTES
#pragma GCC pop_options
#endif

#undef PYVTK_KERNEL_HEADER
