// ldmatrix, mma, mma.sp and wgmma as the PTX manual says. Registers are filled here by the manual's own formulas, from
// a lane and the index of an element to its row and column (the emulation goes the other way), and metadata by rows of
// its figures; results are compared with a plain product.
#include <array>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/ptx.cuh"

using namespace pyvtk;
using namespace pyvtk::cuda;

namespace {

struct Registers {
  uint32_t a[4], b[4], metadata;
};
template <class Sum>
struct Sums {
  Sum d[4];
};

template <class T>
__global__ void dense_kernel(const Registers* in, Sums<float>* out) {  // [32] each
  const Registers& mine = in[threadIdx.x];
  mma_m16n8k16<T>(out[threadIdx.x].d, mine.a, {mine.b[0], mine.b[1]});
}
template <class T, int kSelector>
__global__ void sparse_kernel(const Registers* in, Sums<float>* out) {
  const Registers& mine = in[threadIdx.x];
  mma_sp_m16n8k32<T, kSelector>(out[threadIdx.x].d, mine.a, mine.b, mine.metadata);
}
__global__ void sparse_int8_kernel(const Registers* in, Sums<int>* out) {
  const Registers& mine = in[threadIdx.x];
  mma_sp_m16n8k64(out[threadIdx.x].d, mine.a, mine.b, mine.metadata);
}

template <class T>
uint32_t encode(int value) {
  if constexpr (std::is_same_v<T, int8_t>) return static_cast<uint8_t>(value);
  if constexpr (!std::is_same_v<T, int8_t>) return from_float<T>(static_cast<float>(value)).bits;
}

// Whose metadata holds which groups: figures "metadata layout", a line for each row of a, in it the lane and the lowest
// bit of columns 0-15 and 16-31 of 16-bit elements (selector 0), and of columns 0-31 and 32-63 of 8-bit elements.
struct Holder {
  unsigned lane, bit;
};
constexpr Holder kMetadata16[16][2] = {
    {{0, 0}, {1, 0}},     {{4, 0}, {5, 0}},     {{8, 0}, {9, 0}},     {{12, 0}, {13, 0}},
    {{16, 0}, {17, 0}},   {{20, 0}, {21, 0}},   {{24, 0}, {25, 0}},   {{28, 0}, {29, 0}},
    {{0, 16}, {1, 16}},   {{4, 16}, {5, 16}},   {{8, 16}, {9, 16}},   {{12, 16}, {13, 16}},
    {{16, 16}, {17, 16}}, {{20, 16}, {21, 16}}, {{24, 16}, {25, 16}}, {{28, 16}, {29, 16}},
};
constexpr Holder kMetadata8[16][2] = {
    {{0, 0}, {2, 0}},   {{4, 0}, {6, 0}},   {{8, 0}, {10, 0}},  {{12, 0}, {14, 0}},
    {{16, 0}, {18, 0}}, {{20, 0}, {22, 0}}, {{24, 0}, {26, 0}}, {{28, 0}, {30, 0}},
    {{1, 0}, {3, 0}},   {{5, 0}, {7, 0}},   {{9, 0}, {11, 0}},  {{13, 0}, {15, 0}},
    {{17, 0}, {19, 0}}, {{21, 0}, {23, 0}}, {{25, 0}, {27, 0}}, {{29, 0}, {31, 0}},
};

// One product. sparse: a is [16, 2 * columns of a's fragment], two of each four kept. kernel: what multiplies.
template <class T, class Sum>
void product(void (*kernel)(const Registers*, Sums<Sum>*), bool sparse, unsigned selector, std::mt19937& random) {
  constexpr bool kBytes = std::is_same_v<T, int8_t>;
  constexpr unsigned kElements = kBytes ? 16 : 8;  // of a's fragment
  const unsigned depth = (kBytes ? 32u : 16u) * (sparse ? 2 : 1);
  const auto number = [&] { return static_cast<int>(random() % 255) - 127; };
  std::vector<int> a(16 * depth, 0), b(depth * 8);
  std::vector<std::array<unsigned, 2>> kept(16 * depth / 4);
  for (int& value : b) value = number();
  for (unsigned i = 0; i < a.size(); ++i) a[i] = sparse ? 0 : number();
  for (unsigned group = 0; sparse && group < kept.size(); ++group) {
    const unsigned first = random() % 3, second = first + 1 + random() % (3 - first);
    kept[group] = {first, second};
    a[4 * group + first] = number();
    a[4 * group + second] = number();
  }
  std::vector<Registers> in(32);
  std::vector<Sums<Sum>> out(32);
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned group = lane / 4, thread = lane % 4;
    Registers& mine = in[lane];
    for (uint32_t& other : mine.b) other = 0;
    for (uint32_t& other : mine.a) other = 0;
    // lanes that the selector does not name bring anything
    mine.metadata = kBytes || (thread / 2 == selector) ? 0 : static_cast<uint32_t>(random());
    const unsigned in_register = kBytes ? 4 : 2;
    for (unsigned i = 0; i < kElements; ++i) {
      const bool upper = kBytes ? (i < 4 || (8 <= i && i < 12)) : (i < 2 || (4 <= i && i < 6));
      const unsigned row = upper ? group : group + 8;
      unsigned column;
      if (!sparse) {
        column = thread * 2 + (i & 1) + (i < 4 ? 0 : 8);
      } else {
        const unsigned chunk = kBytes ? 8 : 4;  // columns firstcol..lastcol, half of them kept
        const unsigned first = thread * chunk + (i < kElements / 2 ? 0 : chunk * 4);
        const unsigned nth = i % in_register;
        column = first + nth / 2 * 4;
        column += kept[(row * depth + column) / 4][nth % 2];
      }
      mine.a[i / in_register] |= encode<T>(a[row * depth + column]) << (i % in_register * 32 / in_register);
    }
    for (unsigned i = 0; i < depth / 4; ++i) {  // elements of b's fragment
      const unsigned row = kBytes ? thread * 4 + (i & 3) + i / 4 * 16 : thread * 2 + (i & 1) + i / 2 * 8;
      mine.b[i / in_register] |= encode<T>(b[row * 8 + group]) << (i % in_register * 32 / in_register);
    }
    for (Sum& sum : out[lane].d) sum = static_cast<Sum>(lane);
  }
  for (unsigned row = 0; sparse && row < 16; ++row) {
    for (unsigned half = 0; half < 2; ++half) {
      const auto [lane, bit] = kBytes ? kMetadata8[row][half] : kMetadata16[row][half];
      for (unsigned i = 0; i < depth / 8; ++i) {
        const auto& pair = kept[row * depth / 4 + half * depth / 8 + i];
        in[lane + 2 * selector].metadata |= (pair[0] | pair[1] << 2) << (bit + 4 * i);
      }
    }
  }
  const cudaError_t status = launch(kernel, 1, 32, 0, nullptr, in.data(), out.data());
  CHECK(status == cudaSuccess, cudaGetErrorString(status));
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
      int expected = static_cast<int>(lane);
      for (unsigned k = 0; k < depth; ++k) expected += a[row * depth + k] * b[k * 8 + column];
      CHECK(out[lane].d[i] == static_cast<Sum>(expected), lane, i, out[lane].d[i], expected);
    }
  }
}

// Operands of a wgmma in shared memory, row by row: 1024 bytes of b hold eight rows of 128, 512 of a eight of 64.
constexpr unsigned kColumns = 64, kBytesOfB = kColumns * 128, kBytesOfA = 64 * 64;
// Where the manual's figures of the swizzled layouts have the pieces of 16 bytes of eight rows, a line for each row.
constexpr unsigned kPieces128[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
                                       {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                                       {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};
constexpr unsigned kPieces64[8][4] = {{0, 1, 2, 3}, {0, 1, 2, 3}, {1, 0, 3, 2}, {1, 0, 3, 2},
                                      {2, 3, 0, 1}, {2, 3, 0, 1}, {3, 2, 1, 0}, {3, 2, 1, 0}};

// Two products, of the first and of the second 64 bytes along k; as in a kernel, all that is copied comes in pieces.
template <class T, class Sum>
__global__ void wgmma_kernel(const unsigned char* a, const unsigned char* b,  // as they lie in shared memory
                             const uint32_t* metadata,                        // [2, 128]
                             Sums<Sum>* out) {                                // [128, kColumns / 8]
  unsigned char* shared = dynamic_shared<unsigned char>();
  shared += -shared_address(shared) % 1024;
  for (unsigned i = threadIdx.x * 16; i < kBytesOfB + kBytesOfA; i += blockDim.x * 16) {
    copy_async<16>(shared + i, i < kBytesOfB ? b + i : a + i - kBytesOfB);
  }
  copy_async_commit();
  copy_async_wait<0>();
  wgmma_fence_writes();
  __syncthreads();
  Sum d[kColumns / 2];
  Sums<Sum>* mine = out + threadIdx.x * kColumns / 8;
  for (unsigned i = 0; i < kColumns / 2; ++i) d[i] = mine[i / 4].d[i % 4];
  const uint64_t left = wgmma_matrix<64>(shared + kBytesOfB), right = wgmma_matrix<128>(shared);
  wgmma_begin();
  const uint32_t codes[2] = {metadata[threadIdx.x], metadata[128 + threadIdx.x]};
  wgmma_sp<T, 0, kColumns>(d, left, right, codes[0]);
  wgmma_sp<T, sizeof(T) == 2, kColumns>(d, left + 2, right + 4, codes[1]);
  wgmma_commit();
  wgmma_wait<0>();
  for (unsigned i = 0; i < kColumns / 2; ++i) mine[i / 4].d[i % 4] = d[i];
}

template <class T, class Sum>
void warpgroup(std::mt19937& random) {
  constexpr unsigned kDepth = 64 / sizeof(T), kSize = sizeof(T);  // k of one product
  const auto number = [&] { return static_cast<int>(random() % 255) - 127; };
  std::vector<int> a(2 * kDepth * 64, 0), b(2 * kDepth * kColumns);
  alignas(16) static unsigned char bytes_of_a[kBytesOfA], bytes_of_b[kBytesOfB];
  std::vector<uint32_t> metadata(2 * 128);
  for (uint32_t& word : metadata) word = kSize == 1 ? 0 : static_cast<uint32_t>(random());
  const auto write = [](unsigned char* to, int value) {
    const uint32_t bits = encode<T>(value);
    for (unsigned i = 0; i < kSize; ++i) to[i] = static_cast<unsigned char>(bits >> 8 * i);
  };
  for (unsigned row = 0; row < kColumns; ++row) {
    for (unsigned k = 0; k < 2 * kDepth; ++k) {
      const int value = b[row * 2 * kDepth + k] = number();
      const unsigned byte = k * kSize;
      write(bytes_of_b + row / 8 * 1024 + row % 8 * 128 + kPieces128[row % 8][byte / 16] * 16 + byte % 16, value);
    }
  }
  for (unsigned row = 0; row < 64; ++row) {
    for (unsigned group = 0; group < kDepth / 2; ++group) {
      const unsigned first = random() % 3, second = first + 1 + random() % (3 - first);
      for (unsigned i = 0; i < 2; ++i) {
        const int value = a[row * 2 * kDepth + 4 * group + (i ? second : first)] = number();
        const unsigned byte = (2 * group + i) * kSize;
        write(bytes_of_a + row / 8 * 512 + row % 8 * 64 + kPieces64[row % 8][byte / 16] * 16 + byte % 16, value);
      }
      const unsigned step = group / (kDepth / 4), of_step = group % (kDepth / 4), of_half = kDepth / 8;
      const Holder* holders = kSize == 1 ? kMetadata8[row % 16] : kMetadata16[row % 16];
      const auto [lane, bit] = holders[of_step / of_half];
      // 16 bits: the second product's come from the lanes that its selector names
      uint32_t& word = metadata[step * 128 + row / 16 * 32 + lane + (kSize == 1 ? 0 : 2 * step)];
      const unsigned shift = bit + 4 * (of_step % of_half);
      word = (word & ~(15u << shift)) | (first | second << 2) << shift;
    }
  }
  std::vector<Sums<Sum>> out(128 * kColumns / 8);
  for (size_t i = 0; i < out.size(); ++i) {
    for (Sum& sum : out[i].d) sum = static_cast<Sum>(i);
  }
  const cudaError_t status = launch(wgmma_kernel<T, Sum>, 1, 128, kBytesOfB + kBytesOfA + 1024, nullptr, &bytes_of_a[0],
                                    &bytes_of_b[0], metadata.data(), out.data());
  CHECK(status == cudaSuccess, cudaGetErrorString(status));
  for (unsigned thread = 0; thread < 128; ++thread) {
    for (unsigned i = 0; i < kColumns / 2; ++i) {  // the figure of d: rows of a warp, groups and pairs of columns
      const unsigned lane = thread % 32, at = thread * kColumns / 8 + i / 4;
      const unsigned row = thread / 32 * 16 + lane / 4 + (i % 4 < 2 ? 0 : 8),
                     column = i / 4 * 8 + lane % 4 * 2 + (i & 1);
      int expected = static_cast<int>(at);
      for (unsigned k = 0; k < 2 * kDepth; ++k) expected += a[row * 2 * kDepth + k] * b[column * 2 * kDepth + k];
      CHECK(out[at].d[i % 4] == static_cast<Sum>(expected), thread, i, out[at].d[i % 4], expected);
    }
  }
}

template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(const uint16_t* in, uint32_t* out) {  // [kMatrices, 8, 8], [32, kMatrices]
  PYVTK_SHARED(rows, uint4[32]);
  const unsigned me = threadIdx.x;
  if (me < 8 * kMatrices) rows[me * 5 % 32] = reinterpret_cast<const uint4*>(in)[me];  // rows anywhere
  __syncwarp();
  uint32_t mine[kMatrices];
  const void* row = me < 8 * kMatrices ? &rows[me * 5 % 32] : nullptr;  // the other lanes' addresses do not count
  if constexpr (kTransposed) {
    ldmatrix_transposed(mine, row);
  } else {
    ldmatrix(mine, row);
  }
  for (int i = 0; i < kMatrices; ++i) out[me * kMatrices + i] = mine[i];
}

template <int kMatrices, bool kTransposed>
void loads() {
  alignas(16) uint16_t in[kMatrices * 64];
  for (unsigned i = 0; i < kMatrices * 64; ++i) in[i] = static_cast<uint16_t>(1000 + i);
  uint32_t out[32 * kMatrices];
  const cudaError_t status = launch(ldmatrix_kernel<kMatrices, kTransposed>, 1, 32, 0, nullptr, in, out);
  CHECK(status == cudaSuccess, cudaGetErrorString(status));
  // figure "mma.sync operand as stored by ldmatrix": lanes 0-3 hold row 0, two elements each, 4-7 row 1, ...
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned matrix = 0; matrix < kMatrices; ++matrix) {
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned line = lane / 4, element = lane % 4 * 2 + i;
        const unsigned expected = in[matrix * 64 + (kTransposed ? element * 8 + line : line * 8 + element)];
        CHECK((out[lane * kMatrices + matrix] >> 16 * i & 0xffff) == expected, lane, matrix, i);
      }
    }
  }
}

__global__ void not_ascending_kernel(Sums<int>* out) {
  mma_sp_m16n8k64(out[threadIdx.x].d, {0, 0, 0, 0}, {0, 0, 0, 0}, 0x44444441u);
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (uint64_t seed = 0; seed < 4; ++seed) {
    cuda_emulation::options().seed = seed;
    product<bfloat16>(dense_kernel<bfloat16>, false, 0, random);
    product<float16>(dense_kernel<float16>, false, 0, random);
    product<bfloat16>(sparse_kernel<bfloat16, 0>, true, 0, random);
    product<bfloat16>(sparse_kernel<bfloat16, 1>, true, 1, random);
    product<float16>(sparse_kernel<float16, 0>, true, 0, random);
    product<float16>(sparse_kernel<float16, 1>, true, 1, random);
    product<int8_t>(sparse_int8_kernel, true, 0, random);
    warpgroup<bfloat16, float>(random);
    warpgroup<float16, float>(random);
    warpgroup<int8_t, int>(random);
    loads<1, false>();
    loads<2, false>();
    loads<4, false>();
    loads<1, true>();
    loads<2, true>();
    loads<4, true>();
  }
  std::fprintf(stderr, "An error about metadata is to follow.\n");
  std::vector<Sums<int>> out(32);
  CHECK(launch(not_ascending_kernel, 1, 32, 0, nullptr, out.data()) == cudaErrorLaunchFailure, "pairs have to ascend");
  return report();
}
