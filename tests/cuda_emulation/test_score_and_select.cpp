// The kernels of score_and_select against loops: small problems that take every way through them, for the sanitizers.
// test_emulated_score_and_select.py compares more of them with the reference, in a process that ThreadSanitizer does
// not watch.
#include <cmath>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/score_and_select.cuh"
#include "problems.h"

using namespace pyvtk;

namespace {

#ifdef __SANITIZE_THREAD__
constexpr int kRuns = 0;  // of two threads, each: minutes for long rows
#else
constexpr int kRuns = 3;
#endif

// Of the longest sums here, and some more for exp: what a wrong score differs by is far more.
constexpr double kRoundings = 64 * 1.2e-7;

float normal() { return std::normal_distribution<float>()(generator); }

struct Shape {
  int64_t batch, q_heads, kv_heads, queries, keys, dim;
  bool packed = false;
  HeadReduce head_reduce = HeadReduce::mean;
  QueryReduce query_reduce = QueryReduce::mean;
  bool heads_first = false, ranged = false, masked = false;
};

// Scores by the formula, in double.
struct Oracle {
  const ScoreProblem& p;
  const Shape& shape;

  double of(int64_t sample, int64_t out, int64_t key) const {  // key: of the sample
    const int64_t row0 = p.packed() ? p.cu_seqlens_q[sample] : sample * p.queries;
    const int64_t key0 = p.packed() ? p.cu_seqlens_k[sample] : sample * p.keys;
    const int64_t queries = p.packed() ? p.cu_seqlens_q[sample + 1] - row0 : p.queries;
    const int64_t keys = p.packed() ? p.cu_seqlens_k[sample + 1] - key0 : p.keys;
    const auto seen = [&](int64_t query, int64_t j) {
      return (!p.k_mask || p.k_mask[key0 + j]) && j <= query + keys - queries;
    };
    const auto logit = [&](int64_t head, int64_t query, int64_t j) {
      const float* q = static_cast<const float*>(p.q) + p.q_head_stride * head + p.q_row_stride * query +
                       (p.packed() ? p.q_row_stride * row0 : p.q_batch_stride * sample);
      const float* k = static_cast<const float*>(p.k) + p.k_head_stride * (head / p.group()) + p.k_row_stride * j +
                       (p.packed() ? p.k_row_stride * key0 : p.k_batch_stride * sample);
      double sum = 0;
      for (int64_t i = 0; i < p.dim; ++i) sum += double{q[i]} * double{k[i]};
      return sum * double{p.scale};
    };
    const auto value = [&](int64_t head, int64_t query) {
      double total = 0;
      for (int64_t j = 0; j < keys; ++j) total += seen(query, j) ? std::exp(logit(head, query, j)) : 0;
      return seen(query, key) ? std::exp(logit(head, query, key)) / total : 0;
    };
    const int64_t heads = p.heads_per_out();
    const auto reduce = [](bool by_max, double a, double b) { return by_max ? std::max(a, b) : a + b; };
    double result = 0;
    for (int64_t outer = 0; outer < (p.heads_first ? queries : heads); ++outer) {
      double x = 0;  // of the inner reduction; values are not negative
      for (int64_t inner = 0; inner < (p.heads_first ? heads : queries); ++inner) {
        const int64_t head = out * heads + (p.heads_first ? inner : outer);
        x = reduce(p.heads_first ? p.head_max() : p.needs_max(), x, value(head, p.heads_first ? outer : inner));
      }
      result = reduce(p.heads_first ? p.needs_max() : p.head_max(), result, x);
    }
    if (p.has(QueryReduce::mean)) result /= static_cast<double>(std::max<int64_t>(queries, 1));
    return p.head_mean() ? result / static_cast<double>(heads) : result;
  }
};

// One call and its memory.
struct Call {
  Shape shape;
  bool by_score;
  ScoreProblem p{};
  SelectProblem select;
  cuda::ScoreAndSelectPlan plan;
  int64_t samples = shape.packed ? 1 : shape.batch;
  Array<float> q{samples * shape.q_heads * shape.queries * shape.dim};
  Array<float> k{samples * shape.kv_heads * shape.keys * shape.dim};
  Array<int32_t> cu_q{shape.batch + 1}, cu_k{shape.batch + 1};
  Array<bool> k_mask{samples * shape.keys};
  Array<float> scores{0};
  Array<int64_t> indices{0};
  Array<int32_t> counts{0};
  Array<bool> overflow{0};
  Array<unsigned char> workspace{0};

  Call(const Shape& shape_, bool by_score_) : shape(shape_), by_score(by_score_) {
    p.batch = shape.batch;
    p.q_heads = shape.q_heads;
    p.kv_heads = shape.kv_heads;
    p.queries = p.max_queries = shape.queries;
    p.keys = p.max_keys = shape.keys;
    p.dim = shape.dim;
    for (float& x : q) x = normal();
    for (float& x : k) x = normal();
    p.q = q.begin();
    p.k = k.begin();
    p.q_row_stride = p.k_row_stride = p.dim;
    if (shape.packed) {
      p.q_row_stride = p.q_heads * p.dim;
      p.k_row_stride = p.kv_heads * p.dim;
      p.q_head_stride = p.k_head_stride = p.dim;
    } else {
      p.q_head_stride = p.queries * p.dim;
      p.k_head_stride = p.keys * p.dim;
      p.q_batch_stride = p.q_heads * p.q_head_stride;
      p.k_batch_stride = p.kv_heads * p.k_head_stride;
    }
    for (int64_t b = 0; b <= p.batch; ++b) {
      cu_q[b] = static_cast<int32_t>(p.queries * b * b / (p.batch * p.batch));
      cu_k[b] = static_cast<int32_t>(p.keys * b / p.batch);
    }
    if (shape.packed) p.cu_seqlens_q = cu_q.begin(), p.cu_seqlens_k = cu_k.begin();
    for (bool& bit : k_mask) bit = chance(80);
    if (shape.masked) p.k_mask = k_mask.begin();
    p.causal = true;
    p.key_start = shape.ranged ? p.keys / 5 : 0;
    p.key_stop = shape.ranged ? p.keys - p.keys / 7 : p.keys;
    p.scale = 0.2f;
    p.reducers[0] = shape.query_reduce;
    p.num_reducers = 1;
    p.head_reduce = shape.head_reduce;
    p.heads_first = shape.heads_first;
    scores = Array<float>(samples * p.out_heads() * p.scored());
    p.scores = scores.begin();

    select.rows = p.batch * (shape.packed ? 1 : p.out_heads());
    select.heads = p.out_heads();
    select.tokens = p.keys;
    select.head_stride = p.keys;
    select.batch_stride = p.out_heads() * p.keys;
    select.cu_seqlens = p.cu_seqlens_k;
    select.num_keep = select.capacity = p.keys / 4;
    select.by_score = by_score;
    indices = Array<int64_t>(select.rows * select.capacity);
    counts = Array<int32_t>(select.rows);
    overflow = Array<bool>(select.rows);
    select.indices = indices.begin();
    select.counts = counts.begin();
    select.overflow = overflow.begin();

    const cudaError_t status = cuda::plan_score_and_select(p, select, sizeof(float), plan);
    CHECK(status == cudaSuccess, cudaGetErrorString(status));
    workspace = Array<unsigned char>(plan.workspace_bytes);
    std::fill(workspace.begin(), workspace.end(), static_cast<unsigned char>(0xff));
    cuda::set_workspace(plan, workspace.begin());
  }
  cudaError_t run() const { return cuda::score_and_select<float>(plan, nullptr); }

  void check() const {
    for (int64_t row = 0; row < select.rows; ++row) {
      const int64_t sample = row / p.out_heads(), out = row % p.out_heads();
      const int64_t first = shape.packed ? cu_k[row] : 0, keys = shape.packed ? cu_k[row + 1] - first : p.keys;
      const int64_t start = shape.packed ? 0 : p.key_start, stop = shape.packed ? keys : p.key_stop;
      const float* of_row = shape.packed ? scores.begin() + first : scores.begin() + row * p.scored();
      for (int64_t key = start; key < stop; ++key) {
        const double expected = Oracle{p, shape}.of(sample, out, key);
        CHECK(std::abs(double{of_row[key - start]} - expected) < kRoundings * std::max(expected, 1.0), row, key,
              of_row[key - start], expected);
      }
      std::vector<int64_t> right;
      for (int64_t key = start; key < stop; ++key) {
        if (!p.k_mask || p.k_mask[(shape.packed ? 0 : sample * p.keys) + first + key]) right.push_back(key);
      }
      std::stable_sort(right.begin(), right.end(),
                       [&](int64_t a, int64_t b) { return of_row[a - start] > of_row[b - start]; });
      right.resize(std::min(right.size(), static_cast<size_t>(select.capacity)));
      if (!by_score) std::sort(right.begin(), right.end());
      CHECK(counts[row] == static_cast<int32_t>(right.size()), row, counts[row], right.size());
      for (size_t i = 0; i < right.size(); ++i) {
        const int64_t ours = indices[row * select.capacity + static_cast<int64_t>(i)];
        CHECK(ours == first + right[i], row, i, ours, right[i]);
      }
    }
  }
};

// Two threads whose launches need different amounts of shared memory: 2000 of each are checked, and kRuns run.
void two_threads(const Shape& one, const Shape& another) {
  Call calls[] = {{one, false}, {another, false}};
  std::vector<int64_t> alone[2];
  int errors[2] = {};
  for (int i : {0, 1}) {
    if (kRuns > 0) errors[i] += calls[i].run() != cudaSuccess;
    alone[i].assign(calls[i].indices.begin(), calls[i].indices.end());
    std::fill(calls[i].indices.begin(), calls[i].indices.end(), -7);
  }
  for (const bool dry : {true, false}) {
    cuda_emulation::options() = {};
    cuda_emulation::options().dry = dry;
    const auto work = [&](int i) {
      for (int round = 0; round < (dry ? 2000 : kRuns); ++round) errors[i] += calls[i].run() != cudaSuccess;
    };
    std::thread other(work, 0);
    work(1);
    other.join();
  }
  for (int i : {0, 1}) {
    CHECK(errors[i] == 0, i, errors[i]);
    if (kRuns > 0) CHECK(std::equal(alone[i].begin(), alone[i].end(), calls[i].indices.begin()), i);
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {
      {.batch = 1, .q_heads = 2, .kv_heads = 2, .queries = 1, .keys = 150, .dim = 16},
      {.batch = 1, .q_heads = 8, .kv_heads = 1, .queries = 1, .keys = 140, .dim = 128, .ranged = true},
      {.batch = 1,
       .q_heads = 2,
       .kv_heads = 1,
       .queries = 3,
       .keys = 300,
       .dim = 8,
       .head_reduce = HeadReduce::none,
       .masked = true},
      {.batch = 2, .q_heads = 2, .kv_heads = 1, .queries = 4, .keys = 90, .dim = 8, .packed = true},
      {.batch = 2,
       .q_heads = 2,
       .kv_heads = 1,
       .queries = 9,
       .keys = 90,
       .dim = 8,
       .packed = true,
       .query_reduce = QueryReduce::max,
       .masked = true},
      {.batch = 1,
       .q_heads = 2,
       .kv_heads = 2,
       .queries = 9,
       .keys = 60,
       .dim = 8,
       .head_reduce = HeadReduce::max,
       .query_reduce = QueryReduce::sum,
       .heads_first = true},
      {.batch = 1,
       .q_heads = 2,
       .kv_heads = 1,
       .queries = 2,
       .keys = 60,
       .dim = 8,
       .head_reduce = HeadReduce::group_max,
       .query_reduce = QueryReduce::sum,
       .heads_first = true},
  };
  int number = 0;
  for (const Shape& shape : shapes) {
    cuda_emulation::options() = {};
    cuda_emulation::options().seed = static_cast<uint64_t>(number % 4);
    cuda_emulation::options().blocks_alive = 1 + number % 5;
    if (failures == 0) {
      const Call call(shape, number % 2 == 1);
      const cudaError_t status = call.run();
      CHECK(status == cudaSuccess, cudaGetErrorString(status));
      call.check();
    }
    ++number;
  }
  cuda_emulation::options() = {};
  // panels of pairs of score_columns_kernel; what score_finish_kernel chooses from; rows that select chooses from later
  Shape pairs = shapes[5], more_pairs = pairs;
  more_pairs.queries = 40;
  two_threads(pairs, more_pairs);
  two_threads({1, 2, 2, 1, 2000, 8}, {1, 2, 2, 1, 4000, 8});
  two_threads({1, 1, 1, 1, 8192, 8}, {1, 1, 1, 1, 16384, 8});
  return report();
}
