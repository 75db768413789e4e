// The select kernels against sorting: random problems, small enough for the sanitizers. test_emulated_select.py
// compares more of them with the reference, in a process that ThreadSanitizer does not watch.
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/select_long.cuh"
#include "problems.h"

using namespace pyvtk;

namespace {

constexpr int64_t kNowhere = -7;  // no kernel writes it

#ifdef __SANITIZE_THREAD__
constexpr int kProblems = 60;
constexpr int kRuns = 0;  // of long rows: a minute each
#else
constexpr int kProblems = 600;
constexpr int kRuns = 10;
#endif

template <class T>
Array<T> scores_of(int64_t size) {
  Array<T> scores(size);
  const float special[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 0.5f, 1.0f, 1.0f, -1.0f, 1e-42f, 3e38f};
  const int64_t kind = any(0, 3);
  for (T& score : scores) {
    const float random = std::ldexp(static_cast<float>(any(-1000, 1000)), static_cast<int>(any(-12, 2)));
    score = from_float<T>(kind == 0   ? special[any(0, 10)]
                          : kind == 1 ? 0.25f
                          : kind == 2 ? random / 2
                                      : std::round(random));
  }
  return scores;
}

Array<uint8_t> mask_of(int64_t size, int percent) {
  Array<uint8_t> mask(size);
  for (uint8_t& bit : mask) bit = chance(percent);
  return mask;
}

template <class T>
struct Oracle {
  const SelectProblem& problem;
  const T* scores;

  bool before(int64_t a, int64_t b) const {
    const float x = to_float(scores[a]), y = to_float(scores[b]);
    if (std::isnan(x) || std::isnan(y)) return std::isnan(x) == std::isnan(y) ? a < b : std::isnan(y);
    return x == y ? a < b : x > y;
  }

  // What share p asks for of these, best first: how many.
  size_t prefix(const std::vector<int64_t>& members, double p) const {
    float largest = 0;
    for (int64_t token : members)
      largest = std::max(largest, std::isnan(to_float(scores[token])) ? 0.0f : to_float(scores[token]));
    const auto weight = [&](int64_t token) -> int64_t {
      const float score = to_float(scores[token]);
      if (!(score > 0)) return 0;
      if (std::isinf(largest)) return std::isinf(score);
      int exponent = 0;
      std::frexp(largest, &exponent);
      return static_cast<int64_t>(std::floor(std::ldexp(static_cast<double>(score), 31 - exponent)));
    };
    int64_t total = 0, mass = 0;
    for (int64_t token : members) total += weight(token);
    const int64_t need = p < 1 ? static_cast<int64_t>(std::ceil(std::max(p, 0.0) * static_cast<double>(total))) : total;
    size_t size = 0;
    for (; size < members.size() && (size == 0 || mass < need); ++size) mass += weight(members[size]);
    return size;
  }

  // Tokens of a row that stay, best first.
  std::vector<int64_t> row(int64_t number) const {
    const int64_t tokens = problem.tokens;
    const auto bit = [&](const PerToken<uint8_t>& mask, int64_t token, bool otherwise) {
      return mask ? mask.row(number, tokens)[token] != 0 : otherwise;
    };
    const auto segment_of = [&](int64_t token) {
      return problem.segments ? problem.segments.row(number, tokens)[token] : 0;
    };
    const auto order = [&](int64_t a, int64_t b) { return before(a, b); };
    std::vector<int64_t> fixed, stay;
    for (int64_t segment = -1; segment <= problem.num_segments; ++segment) {
      const bool exists = segment >= 0 && segment < problem.num_segments;
      std::vector<int64_t> members, competitors;
      int64_t forced = 0;
      for (int64_t token = 0; token < tokens; ++token) {
        if (segment_of(token) != segment || bit(problem.drop, token, false)) continue;
        const bool keep = bit(problem.keep, token, false), candidate = exists && bit(problem.candidates, token, true);
        forced += keep;
        if (candidate) members.push_back(token);
        if (keep || (problem.keep_others && !candidate)) {
          fixed.push_back(token);
        } else if (candidate) {
          competitors.push_back(token);
        }
      }
      if (!exists) continue;
      std::sort(members.begin(), members.end(), order);
      std::sort(competitors.begin(), competitors.end(), order);
      if (problem.num_keep >= 0 || problem.num_keep_per_row) {
        const int64_t count =
            problem.num_keep_per_row ? problem.num_keep_per_row.at(number, segment) : problem.num_keep;
        competitors.resize(std::min(competitors.size(), static_cast<size_t>(std::max<int64_t>(count - forced, 0))));
      }
      if (problem.threshold) {
        std::erase_if(competitors, [&](int64_t token) {
          return !(to_float(scores[token]) >= problem.threshold.at(number, segment));
        });
      }
      if (problem.top_p) {
        members.resize(prefix(members, problem.top_p.at(number, segment)));
        std::erase_if(competitors,
                      [&](int64_t token) { return std::find(members.begin(), members.end(), token) == members.end(); });
      }
      stay.insert(stay.end(), competitors.begin(), competitors.end());
    }
    std::sort(fixed.begin(), fixed.end(), order);
    std::sort(stay.begin(), stay.end(), order);
    fixed.insert(fixed.end(), stay.begin(), stay.end());
    return fixed;
  }
};

// long_rows: in three launches, as rows are that are far longer; by small blocks
template <class T>
void one_problem(bool long_rows) {
  SelectProblem problem;
  problem.rows = any(0, 3);
  problem.tokens = chance(80) ? any(0, 200) : any(900, 1100);
  const Array<T> scores = scores_of<T>(problem.rows * problem.tokens);
  problem.scores = scores.begin();
  problem.batch_stride = problem.tokens;
  const Array<uint8_t> keep = mask_of(scores.size, 10), drop = mask_of(scores.size, 20),
                       candidates = mask_of(scores.size, 70);
  const bool plain = chance(40);
  if (!long_rows && !plain && chance(60)) problem.keep.data = keep.begin();
  if (!plain && chance(60)) problem.drop.data = drop.begin();
  if (!plain && chance(60)) problem.candidates.data = candidates.begin();
  problem.keep_others = !long_rows && chance(30);
  Array<int32_t> segments(scores.size);
  for (int32_t& segment : segments) segment = static_cast<int32_t>(any(-1, 3));
  if (!long_rows && !plain && chance(40)) {
    problem.segments.data = segments.begin();
    problem.num_segments = 3;
  }
  Array<double> top_p(problem.rows);
  for (double& p : top_p) p = static_cast<double>(any(-1, 11)) / 10;
  if (!long_rows && !plain && chance(40)) problem.top_p.data = top_p.begin();
  Array<int64_t> num_keep(problem.rows);
  for (int64_t& count : num_keep) count = any(-2, problem.tokens + 2);
  Array<float> threshold(problem.rows);
  for (float& value : threshold) value = chance(20) ? NAN : static_cast<float>(any(-2, 2));
  if (chance(70)) problem.num_keep = chance(20) ? 0 : any(0, problem.tokens + 2);
  if (chance(30)) problem.num_keep_per_row.data = num_keep.begin();
  if (chance(20)) problem.threshold.data = threshold.begin();
  problem.capacity = chance(50) ? problem.tokens : any(0, problem.tokens + 3);
  problem.align_right = chance(30);
  problem.by_score = !long_rows && !plain && chance(40);
  Array<int64_t> indices(problem.rows * problem.capacity);
  Array<int32_t> counts(problem.rows);
  Array<bool> overflow(problem.rows);
  std::fill(indices.begin(), indices.end(), kNowhere);
  problem.indices = indices.begin();
  problem.counts = counts.begin();
  problem.overflow = overflow.begin();

  const int threads = static_cast<int>(32 * any(1, 3));
  cuda::SelectPlan plan =
      long_rows ? cuda::plan_long_rows(problem, any(1, chance(50) ? 3 : 12), threads) : cuda::plan_select(problem);
  const Array<unsigned char> workspace(plan.workspace_bytes);
  std::fill(workspace.begin(), workspace.end(), static_cast<unsigned char>(0xff));
  cuda::set_workspace(plan, workspace.begin());
  const cudaError_t status = cuda::select<T>(plan, nullptr);
  CHECK(status == cudaSuccess, cudaGetErrorString(status));
  for (int64_t row = 0; row < problem.rows; ++row) {
    std::vector<int64_t> expected = Oracle<T>{problem, scores.begin() + row * problem.tokens}.row(row);
    CHECK(overflow[row] == (static_cast<int64_t>(expected.size()) > problem.capacity), row);
    expected.resize(std::min(expected.size(), static_cast<size_t>(problem.capacity)));
    CHECK(counts[row] == static_cast<int64_t>(expected.size()), row, counts[row], expected.size());
    if (!problem.by_score) std::sort(expected.begin(), expected.end());
    const size_t padding = static_cast<size_t>(problem.capacity) - expected.size();
    expected.insert(problem.align_right ? expected.begin() : expected.end(), padding, -1);
    const int64_t* actual = indices.begin() + row * problem.capacity;
    for (size_t i = 0; i < expected.size(); ++i) CHECK(actual[i] == expected[i], row, i, actual[i], expected[i]);
  }
}

// Which rows get three launches, and how they are cut.
void decisions() {
  const uint8_t bit = 0;
  const auto with = [](int64_t rows, int64_t tokens) {
    SelectProblem problem;
    problem.rows = rows;
    problem.tokens = tokens;
    return problem;
  };
  const auto is_long = [](const SelectProblem& problem) { return cuda::plan_select(problem).is_long; };
  CHECK(!is_long(with(1, 16384)), "a row of one block");
  CHECK(!is_long(with(129, 131072)), "a block for each of many rows");
  SelectProblem problem = with(1, 131072);
  problem.candidates.data = problem.drop.data = &bit;
  CHECK(is_long(problem), "masks");
  problem.keep_others = true;
  CHECK(!is_long(problem), "what is no candidate stays");
  problem.candidates = {};
  CHECK(is_long(problem), "all are candidates");
  problem.by_score = true;
  CHECK(!is_long(problem), "by score");
  for (const int64_t rows : {1, 8, 100, 128}) {
    for (const int64_t tokens : {16385, 131072, 1000000, 100000000}) {
      const cuda::LongRows cut = cuda::plan_select(with(rows, tokens)).rows;
      CHECK(cut.chunks > 1 && 32 * cut.words_of_chunk < 65536, rows, tokens, cut.chunks, cut.words_of_chunk);
      CHECK(cut.chunks * cut.words_of_chunk >= cut.words && (cut.chunks - 1) * cut.words_of_chunk < cut.words, rows,
            tokens, cut.chunks, cut.words_of_chunk);
    }
  }
}

// The words that a warp may be given at the end of the longest rows: none of their tokens lies outside of the row.
void ends_of_the_longest_rows() {
  for (const int64_t size : {int64_t{1}, int64_t{32}, int64_t{33}, cuda::kMostTokens - 1, cuda::kMostTokens}) {
    const int64_t words = (size + 31) / 32;
    const int64_t past = cuda::kMostWarps * cuda::kWordsOfWarp;  // a round begins inside of the row
    for (int64_t word = std::max<int64_t>(words - 2, 0); word < words + past; ++word) {
      for (int lane = 0; lane < 32; ++lane) {
        const int64_t token = word * 32 + lane;
        CHECK(cuda::token_of(static_cast<int>(word), lane) == token, size, word, lane);
        const int read = cuda::token_or_last(static_cast<int>(word), lane, static_cast<int>(size));
        CHECK(read == std::min(token, size - 1), size, word, lane, read);
      }
    }
  }
}

// Two threads with rows of different lengths, which need different amounts of shared memory: 3000 launches of each are
// checked, and kRuns run.
void two_threads(int64_t shorter, int64_t longer) {
  struct Work {
    Array<float> scores;
    Array<int64_t> indices;
    Array<int32_t> counts;
    Array<bool> overflow;
    cuda::SelectPlan plan;
    Array<unsigned char> workspace;
    int errors = 0;

    explicit Work(int64_t tokens)
        : scores(tokens),
          indices(tokens / 4),
          counts(1),
          overflow(1),
          plan(planned()),
          workspace(plan.workspace_bytes) {
      cuda::set_workspace(plan, workspace.begin());
      for (int64_t i = 0; i < tokens; ++i) scores[i] = static_cast<float>(i * 7919 % tokens);
    }
    cuda::SelectPlan planned() const {
      SelectProblem problem;
      problem.rows = 1;
      problem.tokens = problem.batch_stride = scores.size;
      problem.num_keep = problem.capacity = indices.size;
      problem.scores = scores.begin();
      problem.indices = indices.begin();
      problem.counts = counts.begin();
      problem.overflow = overflow.begin();
      return cuda::plan_select(problem);
    }
    void run(int times) {
      for (int i = 0; i < times; ++i) errors += cuda::select<float>(plan, nullptr) != cudaSuccess;
    }
  } works[] = {Work(shorter), Work(longer)};
  for (const bool dry : {true, false}) {
    cuda_emulation::options() = {};
    cuda_emulation::options().dry = dry;
    std::thread other([&] { works[0].run(dry ? 3000 : kRuns); });
    works[1].run(dry ? 3000 : kRuns);
    other.join();
    for (const Work& work : works) CHECK(work.errors == 0, work.scores.size, dry, work.errors);
  }
  if (kRuns == 0) return;
  for (const Work& work : works) {
    const int64_t tokens = work.scores.size;
    CHECK(work.counts[0] == work.indices.size && !work.overflow[0], tokens, work.counts[0]);
    for (int64_t index : work.indices)
      CHECK(work.scores[index] >= static_cast<float>(tokens - tokens / 4), tokens, index);
    for (int64_t i = 1; i < work.indices.size; ++i) CHECK(work.indices[i - 1] < work.indices[i], tokens, i);
  }
}

}  // namespace

int main() {
  decisions();
  ends_of_the_longest_rows();
  two_threads(8192, 16384);
  two_threads(20000, 40000);
  for (int i = 0; i < kProblems && failures == 0; ++i) {
    cuda_emulation::options() = {};
    cuda_emulation::options().seed = static_cast<uint64_t>(i % 3);
    cuda_emulation::options().blocks_alive = 1 + i % 2;
    const bool long_rows = i % 5 < 2;
    cuda_emulation::Options& options = cuda_emulation::options();
    if (chance(40)) options.shared_bytes = options.declared_bytes + (long_rows ? 64 : 1024);  // no room for ranks
    i % 4 == 0   ? one_problem<bfloat16>(long_rows)
    : i % 4 == 1 ? one_problem<float16>(long_rows)
                 : one_problem<float>(long_rows);
  }
  return report();
}
