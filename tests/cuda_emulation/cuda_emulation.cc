// Fibers, their scheduler, and all that they share. Never compiled with -fsanitize=thread: what fibers do to each other
// here is told to ThreadSanitizer by hand, and only what CUDA promises to kernels.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Present if the program is linked with ThreadSanitizer.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void __tsan_read_range(void* address, long bytes);
[[gnu::weak]] void __tsan_write_range(void* address, long bytes);
[[gnu::weak]] void AnnotateIgnoreReadsBegin(const char* file, int line);
[[gnu::weak]] void AnnotateIgnoreReadsEnd(const char* file, int line);
}

namespace cuda_emulation {

const Identity* current = nullptr;

namespace {

bool races_are_watched() { return __tsan_switch_to_fiber != nullptr; }
void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

void show_copy(void* to, size_t bytes, const void* from, size_t bytes_read) {
  if (!races_are_watched()) return;
  if (bytes_read > 0) __tsan_read_range(const_cast<void*>(from), static_cast<long>(bytes_read));
  __tsan_write_range(to, static_cast<long>(bytes));
}

// While one lives, ThreadSanitizer does not look at what this fiber does: also not at allocations and copies, which it
// sees in code that is compiled without it.
void stop_watching() {
  if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
}
void start_watching() {
  if (AnnotateIgnoreReadsEnd) AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
struct Unwatched {
  Unwatched() { stop_watching(); }
  ~Unwatched() { start_watching(); }
  Unwatched(const Unwatched&) = delete;
};

// NaN as float, bfloat16, half and double; far out of bounds as an index.
constexpr uint16_t kPoison = 0x7ffd;
void poison(void* memory, size_t bytes) {
  auto* bytes_of = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < bytes; ++i) bytes_of[i] = static_cast<unsigned char>(kPoison >> (i % 2 * 8));
}

// Fibers -------------------------------------------------------------------------------------------------------------

struct Context {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* watcher = nullptr;     // ThreadSanitizer's
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

#ifdef __x86_64__
extern "C" void cuda_emulation_switch(void** from, void* to);
asm(R"(
.text
.type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulation_switch, . - cuda_emulation_switch
)");
#endif

Context host;  // where launches are called

void arrived_in([[maybe_unused]] Context& to) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(to.fake_stack, &stack, &bytes);
  if (&to != &host) host.stack = stack, host.stack_bytes = bytes;  // fibers are entered from nowhere else
#endif
}

// Called unwatched; a fiber that is never resumed leaves nothing switched off.
void switch_context(Context& from, Context& to) {
  start_watching();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  if (races_are_watched()) __tsan_switch_to_fiber(to.watcher, 1);  // 1: the switch itself orders nothing
#ifdef __x86_64__
  cuda_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived_in(from);
  stop_watching();
}

// The host after a fiber that will not run again.
void order_after(const Context& fiber) {
  if (!fiber.watcher) return;
  __tsan_switch_to_fiber(fiber.watcher, 1);
  __tsan_switch_to_fiber(host.watcher, 0);  // 0: the switch orders what comes after
}

constexpr int kMapping = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr size_t kGuardBytes = 65536;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // redzones around every variable
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

void fiber_main();

struct Fiber : Context {
  unsigned char* memory;

  Fiber() {
    void* mapped = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, kMapping, -1, 0);
    if (mapped == MAP_FAILED) std::perror("cuda_emulation: stack of a fiber"), std::abort();
    memory = static_cast<unsigned char*>(mapped);
    mprotect(memory, kGuardBytes, PROT_NONE);
    stack = memory + kGuardBytes;
    stack_bytes = kStackBytes;
    enter_at_the_top();
  }
  ~Fiber() {
    forget();
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, stack_bytes);
#endif
    munmap(memory, kGuardBytes + kStackBytes);
  }

  // ThreadSanitizer sees all that one of its fibers does as ordered, and a barrier spreads that order. So it is shown a
  // new one for every thread of every block, on a stack that nobody has used.
  void begin_anew() {
    if (!__tsan_create_fiber) return;
    forget();
    watcher = __tsan_create_fiber(0);
    mmap(memory + kGuardBytes, kStackBytes, PROT_READ | PROT_WRITE, kMapping | MAP_FIXED, -1, 0);
    enter_at_the_top();
  }
  void enter_at_the_top() {
#ifdef __x86_64__
    auto** top = reinterpret_cast<void**>(memory + kGuardBytes + kStackBytes);
    *--top = nullptr;  // where fiber_main would return to
    *--top = reinterpret_cast<void*>(&fiber_main);
    stack_pointer = top - 6;  // six registers, all zero
#else
    getcontext(&context);
    context.uc_stack.ss_sp = memory + kGuardBytes;
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, &fiber_main, 0);
#endif
  }
  void forget() {
    if (watcher) __tsan_destroy_fiber(std::exchange(watcher, nullptr));
  }
};

// Threads, warps, blocks
// -----------------------------------------------------------------------------------------------

struct Block;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t bytes_read;
};

struct Thread : Identity {
  Block* block = nullptr;
  int index = 0;  // in its block
  Fiber* fiber = nullptr;
  bool returned = false;
  // what it waits for, for messages
  const char* waits_at = nullptr;
  Location where;
  uint32_t mask = 0;

  std::vector<Copy> copies;  // since the last commit
  std::deque<std::vector<Copy>> copy_groups;

  unsigned atomics = 0;
  bool has_fenced = false;
  std::vector<const volatile void*> atomics_since_fence;
};

struct Barrier {
  std::vector<Thread*> waiting;
  unsigned generation = 0;
  // of even and odd generations: a thread may come to the next barrier before another has left this one
  Votes votes[2] = {};
  char order[2] = {};
};

// Lanes that call with one mask.
struct LaneGroup {
  uint32_t mask = 0;
  std::vector<Thread*> waiting;
  unsigned generation = 0;
  unsigned char values[2][32 * kLaneBytes];
  size_t bytes = 0;
  char order[2] = {};
};

struct SharedMemory {
  void* memory = nullptr;
  size_t bytes = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::map<int, Barrier> barriers;
  std::vector<std::map<uint32_t, std::unique_ptr<LaneGroup>>> warps;
  std::map<const SharedVariable*, SharedMemory> variables;
  SharedMemory dynamic;
  size_t running = 0;
};

struct Launch {
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  size_t dynamic_bytes = 0;
  uint64_t random = 0;
  std::deque<Thread*> ready;
  std::vector<std::unique_ptr<Block>> alive;
  std::string failure;
  bool may_exceed = false;  // 48 KiB of shared memory, all kinds together
  uint64_t idle_steps = 0;  // since a thread last got past anything that it waited for
  char begin = 0, end = 0;  // what orders the kernel after the host, and the host after the kernel
};

std::mutex one_launch_at_a_time;
Launch* launch_now = nullptr;
Thread* thread_now = nullptr;
thread_local std::string failure_text = "unspecified launch failure";
thread_local cudaError_t last_error_of_thread = cudaSuccess;
std::atomic<int64_t> calls_of_attributes = 0;

std::vector<std::unique_ptr<Fiber>>& all_fibers() {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  return fibers;
}
std::vector<Fiber*>& free_fibers() {
  static std::vector<Fiber*> fibers;
  return fibers;
}
// What host threads share outside of launches.
struct Devices {
  std::mutex mutex;
  std::vector<int64_t> shared_bytes;                          // of each device that there was
  std::map<std::pair<const void*, int>, int> dynamic_limits;  // of a kernel on a device, where one was set
};
Devices& devices() {
  static Devices devices;
  return devices;
}

constexpr int64_t kWithoutAsking = 48 * 1024;

uint64_t next_random() {
  uint64_t z = launch_now->random += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Messages -----------------------------------------------------------------------------------------------------------

template <class... Arguments>
std::string format(const char* text, Arguments... arguments) {
  char buffer[512];
  std::snprintf(buffer, sizeof(buffer), text, arguments...);
  return buffer;
}

std::string place(Location where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return format("%s:%u", slash ? slash + 1 : where.file_name(), static_cast<unsigned>(where.line()));
}

std::string block_name(const Identity& thread) {
  return format("block (%u, %u, %u)", thread.block_index.x, thread.block_index.y, thread.block_index.z);
}

std::string doing(const Thread& thread) {
  if (thread.returned) return "returned";
  if (!thread.waits_at) return "can run";
  std::string text = format("wait at %s (%s)", thread.waits_at, place(thread.where).c_str());
  return thread.mask ? text + format(" with mask 0x%08x", thread.mask) : text;
}

// Every thread of the block, those that do the same on one line.
std::string whereabouts(const Block& block) {
  std::vector<std::pair<std::string, std::string>> lines;
  for (size_t i = 0; i < block.threads.size();) {
    const std::string text = doing(block.threads[i]);
    size_t end = i + 1;
    while (end < block.threads.size() && doing(block.threads[end]) == text) ++end;
    const std::string range = end == i + 1 ? format("%zu", i) : format("%zu-%zu", i, end - 1);
    auto line = std::find_if(lines.begin(), lines.end(), [&](const auto& known) { return known.first == text; });
    if (line == lines.end()) {
      lines.emplace_back(text, range);
    } else {
      line->second += ", " + range;
    }
    i = end;
  }
  std::string all;
  for (const auto& [text, ranges] : lines) all += "\n  threads " + ranges + ": " + text;
  return all;
}

[[noreturn]] void stop(const std::string& message) {
  launch_now->failure = message;
  switch_context(*thread_now->fiber, host);
  std::abort();  // nobody continues a launch that failed
}

[[noreturn]] void stop_here(const std::string& message, Location where) {
  stop(format("%s, thread %d, %s: ", block_name(*thread_now).c_str(), thread_now->index, place(where).c_str()) +
       message);
}

// Scheduling
// -----------------------------------------------------------------------------------------------------------

void fiber_main() {
  arrived_in(*thread_now->fiber);
  while (true) {
    acquire(&launch_now->begin);
    launch_now->body(launch_now->arguments);
    release(&launch_now->end);
    const Unwatched unwatched;
    thread_now->returned = true;
    launch_now->idle_steps = 0;
    switch_context(*thread_now->fiber, host);
  }
}

void wait(const char* name, Location where, uint32_t mask) {
  Thread& me = *thread_now;
  me.waits_at = name;
  me.where = where;
  me.mask = mask;
  switch_context(*me.fiber, host);
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) {
    thread->waits_at = nullptr;
    launch_now->ready.push_back(thread);
  }
  waiting.clear();
  launch_now->idle_steps = 0;
}

void let_others_run() {
  launch_now->ready.push_back(thread_now);
  switch_context(*thread_now->fiber, host);
}

SharedMemory allocate_shared(size_t bytes, size_t alignment) {
  SharedMemory made;
  // exactly as many bytes as were asked for, so that AddressSanitizer sees the first one past them
  if (posix_memalign(&made.memory, alignment < 16 ? 16 : alignment, bytes) != 0) std::abort();
  made.bytes = bytes;
  poison(made.memory, bytes);
  return made;
}

void free_shared(const SharedMemory& shared) {
  if (!shared.memory) return;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(shared.memory, shared.bytes);
#endif
  std::free(shared.memory);
}

void start_block(uint64_t number, dim3 grid, dim3 size) {
  auto block = std::make_unique<Block>();
  const size_t count = size_t{size.x} * size.y * size.z;
  block->threads.resize(count);
  block->warps.resize((count + 31) / 32);
  block->running = count;
  block->dynamic = allocate_shared(launch_now->dynamic_bytes, 128);
  auto& fibers = free_fibers();
  while (fibers.size() < count) {
    all_fibers().push_back(std::make_unique<Fiber>());
    fibers.push_back(all_fibers().back().get());
  }
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = block->threads[i];
    thread.index = static_cast<int>(i);
    thread.block = block.get();
    thread.fiber = fibers[i];
    thread.fiber->begin_anew();
    thread.thread_index = {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
                           static_cast<unsigned>(i / size.x / size.y)};
    thread.block_index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                          static_cast<unsigned>(number / grid.x / grid.y)};
    thread.block_size = size;
    thread.grid_size = grid;
    launch_now->ready.push_back(&thread);
  }
  fibers.erase(fibers.begin(), fibers.begin() + static_cast<int64_t>(count));
  launch_now->alive.push_back(std::move(block));
}

void finish_block(Block* block) {
  for (const Thread& thread : block->threads) {
    thread.fiber->forget();
    free_fibers().push_back(thread.fiber);
  }
  for (const auto& [variable, memory] : block->variables) free_shared(memory);
  free_shared(block->dynamic);
  auto& alive = launch_now->alive;
  alive.erase(std::find_if(alive.begin(), alive.end(), [&](const auto& other) { return other.get() == block; }));
}

void resume(Thread& thread) {
  thread_now = &thread;
  current = &thread;
  switch_context(host, *thread.fiber);
  thread_now = nullptr;
  current = nullptr;
}

void run_blocks(dim3 grid, dim3 size) {
  Launch& launch = *launch_now;
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), uint64_t{0});
  const bool random = options().seed != 0;
  if (random) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
  const size_t blocks_alive = static_cast<size_t>(std::max(1, options().blocks_alive));
  for (size_t next = 0; launch.failure.empty();) {
    while (next < order.size() && launch.alive.size() < blocks_alive) start_block(order[next++], grid, size);
    if (launch.alive.empty()) return;
    if (launch.ready.empty()) {
      for (const auto& block : launch.alive) {
        launch.failure += (launch.failure.empty() ? "" : "\n") + block_name(block->threads[0]) +
                          ": deadlock, no thread can run" + whereabouts(*block);
      }
      return;
    }
    constexpr uint64_t kPatience = 3'000'000;
    if (++launch.idle_steps > kPatience) {
      const Block& block = *launch.alive[0];
      launch.failure = block_name(block.threads[0]) +
                       ": no progress, threads go round in circles with atomics (on a block that is not alive yet?)" +
                       whereabouts(block);
      return;
    }
    if (random) std::swap(launch.ready[0], launch.ready[next_random() % launch.ready.size()]);
    Thread& thread = *launch.ready.front();
    launch.ready.pop_front();
    resume(thread);
    if (thread.returned && --thread.block->running == 0) finish_block(thread.block);
  }
}

int number_in_environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoi(text) : otherwise;
}

}  // namespace

// Interface
// ------------------------------------------------------------------------------------------------------------

Options& options() {
  static Options options = [] {
    Options made;
    made.seed = static_cast<uint64_t>(number_in_environment("CUDA_EMULATION_SEED", 0));
    made.blocks_alive = number_in_environment("CUDA_EMULATION_BLOCKS", 1);
    return made;
  }();
  return options;
}

const char* last_failure() { return failure_text.c_str(); }

int64_t attribute_calls() { return calls_of_attributes; }

void fail(const char* what, Location where) {
  const Unwatched unwatched;
  stop_here(what, where);
}

cudaError_t returned(cudaError_t status) {
  if (status != cudaSuccess) last_error_of_thread = status;
  return status;
}

cudaError_t last_error(bool forget) {
  return forget ? std::exchange(last_error_of_thread, cudaSuccess) : last_error_of_thread;
}

int device() {
  Devices& known = devices();
  const std::lock_guard<std::mutex> lock(known.mutex);
  auto& amounts = known.shared_bytes;
  const auto found = std::find(amounts.begin(), amounts.end(), options().shared_bytes);
  const auto number = found - amounts.begin();
  if (found == amounts.end()) amounts.push_back(options().shared_bytes);
  return static_cast<int>(number);
}

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int device) {
  ++calls_of_attributes;
  Devices& known = devices();
  const std::lock_guard<std::mutex> lock(known.mutex);
  if (device < 0 || device >= static_cast<int>(known.shared_bytes.size())) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = options().multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(known.shared_bytes[static_cast<size_t>(device)]);
      break;
  }
  return cudaSuccess;
}

cudaError_t kernel_attributes(cudaFuncAttributes* attributes) {
  ++calls_of_attributes;
  attributes->sharedSizeBytes = static_cast<size_t>(options().declared_bytes);
  return cudaSuccess;
}

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes) {
  ++calls_of_attributes;
  const int here = device();
  Devices& known = devices();
  {
    const std::lock_guard<std::mutex> lock(known.mutex);
    if (bytes < 0 || bytes + options().declared_bytes > options().shared_bytes) return cudaErrorInvalidValue;
    known.dynamic_limits[{kernel, here}] = bytes;
  }
  // Time for another host thread to change it before this one launches.
  std::this_thread::sleep_for(std::chrono::microseconds(50));
  return cudaSuccess;
}

// Launches of several host threads come one after another; what they do before is not ordered.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* arguments) {
  const int here = device();
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  if (current) {
    std::fprintf(stderr, "cuda_emulation: a kernel launches a kernel, which is not emulated\n");
    std::abort();
  }
  const dim3 grid = config.grid, block = config.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  // A launch has ended when it returns, so the one attribute that there is, to begin before that end, changes nothing.
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization) return cudaErrorNotSupported;
  }
  int64_t allowed = kWithoutAsking;
  bool may_exceed = false;
  {
    Devices& known = devices();
    const std::lock_guard<std::mutex> lock_devices(known.mutex);
    const auto limit = known.dynamic_limits.find({kernel, here});
    if (limit != known.dynamic_limits.end()) {
      allowed = limit->second;
      may_exceed = true;
    }
  }
  if (static_cast<int64_t>(config.dynamicSmemBytes) > allowed) return cudaErrorInvalidValue;
  if (options().dry) return cudaSuccess;

  if (options().launched) options().launched(kernel);
  const Unwatched unwatched;
  Launch launch;
  release(&launch.begin);
  launch.body = body;
  launch.arguments = arguments;
  launch.dynamic_bytes = config.dynamicSmemBytes;
  launch.may_exceed = may_exceed;
  launch.random = options().seed;
  launch_now = &launch;
  if (__tsan_get_current_fiber) host.watcher = __tsan_get_current_fiber();
  run_blocks(grid, block);
  acquire(&launch.end);
  if (!launch.failure.empty()) {
    for (const auto& left : launch.alive) {
      for (const Thread& thread : left->threads) order_after(*thread.fiber);
      for (const auto& [variable, memory] : left->variables) free_shared(memory);
      free_shared(left->dynamic);
    }
    // Their stacks hold calls that nobody will end.
    free_fibers().clear();
    all_fibers().clear();
    failure_text = launch.failure;
    std::fprintf(stderr, "cuda_emulation: %s\n", failure_text.c_str());
  }
  launch_now = nullptr;
  return launch.failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void may_be_interrupted() {
  const Unwatched unwatched;
  // Without a seed only now and then, so that a thread that spins does not spin for ever.
  const bool now = options().seed != 0 ? next_random() % 4 == 0 : ++thread_now->atomics % 64 == 0;
  if (now) let_others_run();
}

void* shared(const SharedVariable& variable) {
  const Unwatched unwatched;
  auto& variables = thread_now->block->variables;
  SharedMemory& memory = variables[&variable];
  if (memory.memory) return memory.memory;
  size_t declared = variable.bytes;
  for (const auto& [known, other] : variables) declared += other.bytes;
  const size_t total = declared + launch_now->dynamic_bytes;
  const int64_t most =
      launch_now->may_exceed ? options().shared_bytes : std::min(kWithoutAsking, options().shared_bytes);
  if (static_cast<int64_t>(declared) > kWithoutAsking || static_cast<int64_t>(total) > most) {
    stop(format("%s: %s makes it %zu bytes of declared shared memory, %zu in all; %lld and %lld are the most",
                block_name(*thread_now).c_str(), variable.name, declared, total, static_cast<long long>(kWithoutAsking),
                static_cast<long long>(most)));
  }
  memory = allocate_shared(variable.bytes, variable.alignment);
  return memory.memory;
}

void* dynamic_shared() { return thread_now->block->dynamic.memory; }

Votes barrier(int id, int threads, int value, const char* name, Location where) {
  const Unwatched unwatched;
  Thread& me = *thread_now;
  const int expected = threads == 0 ? static_cast<int>(me.block->threads.size()) : threads;
  if (id < 0 || id > 15 || expected % 32 != 0) {
    if (id != 0)
      stop_here(format("barrier %d of %d threads: ids are 0 to 15, threads whole warps", id, expected), where);
  }
  Barrier& barrier = me.block->barriers[id];
  if (!barrier.waiting.empty() && id == 0) {
    const Thread& first = *barrier.waiting[0];
    if (first.where.line() != where.line() || std::strcmp(first.where.file_name(), where.file_name()) != 0) {
      stop_here(format("comes to %s, but others wait at another one:", name) + whereabouts(*me.block), where);
    }
  }
  const unsigned turn = barrier.generation & 1;
  if (barrier.waiting.empty()) barrier.votes[turn] = {};
  barrier.votes[turn].sum += value;
  ++barrier.votes[turn].arrived;
  release(&barrier.order[turn]);
  if (static_cast<int>(barrier.waiting.size()) + 1 == expected) {
    ++barrier.generation;
    wake(barrier.waiting);
    // The last one waits its turn too: its warp would run ahead of all others every time.
    let_others_run();
  } else {
    barrier.waiting.push_back(&me);
    wait(name, where, 0);
  }
  acquire(&barrier.order[turn]);
  return barrier.votes[turn];
}

const unsigned char* exchange(const char* name, uint32_t mask, const void* value, size_t bytes, bool orders_memory,
                              Location where) {
  const Unwatched unwatched;
  Thread& me = *thread_now;
  const unsigned lane = static_cast<unsigned>(me.index) % 32;
  const int first_thread = me.index - static_cast<int>(lane);
  if (!(mask >> lane & 1))
    stop_here(format("%s with mask 0x%08x, which lacks its own lane %u", name, mask, lane), where);
  auto& groups = me.block->warps[static_cast<size_t>(me.index) / 32];
  auto& group = groups[mask];
  if (!group) {
    group = std::make_unique<LaneGroup>();
    group->mask = mask;
  }
  if (group->waiting.empty()) {
    for (int other = 0; other < 32; ++other) {
      if (!(mask >> other & 1)) continue;
      const size_t index = static_cast<size_t>(first_thread + other);
      const bool exists = index < me.block->threads.size();
      if (exists && !me.block->threads[index].returned) continue;
      stop_here(format("%s with mask 0x%08x, which names lane %d; thread %zu %s", name, mask, other, index,
                       exists ? "has returned" : "does not exist"),
                where);
    }
    group->bytes = bytes;
    poison(group->values[group->generation & 1], 32 * bytes);
  } else {
    const Thread& first = *group->waiting[0];
    const bool same_place = first.where.line() == where.line();
    if (std::strcmp(first.waits_at, name) != 0 || (!same_place && !orders_memory) || group->bytes != bytes) {
      stop_here(format("comes to %s with mask 0x%08x, but other lanes of it wait elsewhere:", name, mask) +
                    whereabouts(*me.block),
                where);
    }
  }
  const unsigned turn = group->generation & 1;
  unsigned char* values = group->values[turn];
  if (bytes > 0) std::memcpy(values + lane * bytes, value, bytes);
  if (orders_memory) release(&group->order[turn]);
  if (static_cast<int>(group->waiting.size()) + 1 == std::popcount(mask)) {
    ++group->generation;
    wake(group->waiting);
    let_others_run();
  } else {
    group->waiting.push_back(&me);
    wait(name, where, mask);
  }
  if (orders_memory) acquire(&group->order[turn]);
  return values;
}

void fence() {
  may_be_interrupted();
  const Unwatched unwatched;
  // Fence and atomic, atomic and fence: what was written before the first is seen after the second.
  thread_now->has_fenced = true;
  for (const volatile void* address : thread_now->atomics_since_fence) acquire(const_cast<void*>(address));
  thread_now->atomics_since_fence.clear();
}

void before_atomic(const volatile void* address) {
  may_be_interrupted();
  if (!races_are_watched()) return;
  const Unwatched unwatched;
  if (thread_now->has_fenced) release(const_cast<void*>(address));
  auto& recent = thread_now->atomics_since_fence;
  if (recent.size() == 16) recent.erase(recent.begin());
  recent.push_back(address);
}

void check_aligned(const volatile void* address, size_t alignment, const char* name, Location where) {
  if (reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
  const Unwatched unwatched;
  stop_here(format("%s of an address that is not a multiple of %zu: %p", name, alignment, const_cast<void*>(address)),
            where);
}

void check_shared(const void* address, size_t bytes, const char* name, Location where) {
  const Unwatched unwatched;
  const Block& block = *thread_now->block;
  const auto inside = [&](const SharedMemory& shared) {
    const auto* begin = static_cast<const unsigned char*>(shared.memory);
    const auto* at = static_cast<const unsigned char*>(address);
    return at >= begin && at + bytes <= begin + shared.bytes;
  };
  if (!inside(block.dynamic) && std::none_of(block.variables.begin(), block.variables.end(),
                                             [&](const auto& variable) { return inside(variable.second); })) {
    stop_here(format("%s an address outside of the block's shared memory", name), where);
  }
}

void copy_async(void* to, const void* from, size_t bytes, size_t bytes_read, Location where) {
  check_aligned(to, bytes, "copy_async to", where);
  if (bytes_read > 0) check_aligned(from, bytes, "copy_async from", where);
  // The copy may happen at any time until it is waited for: read and written now, and again then.
  show_copy(to, bytes, from, bytes_read);
  check_shared(to, bytes, "copy_async to", where);
  const Unwatched unwatched;
  unsigned char here[16];
  std::memcpy(here, from, bytes_read);  // out of bounds shows here, where the copy is asked for
  poison(to, bytes);
#ifdef __SANITIZE_ADDRESS__
  if (bytes % 8 == 0) __asan_poison_memory_region(to, bytes);
#endif
  thread_now->copies.push_back({to, from, bytes, bytes_read});
}

void copy_async_commit() {
  const Unwatched unwatched;
  thread_now->copy_groups.push_back(std::exchange(thread_now->copies, {}));
}

void copy_async_wait(int groups_left) {
  auto& groups = thread_now->copy_groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
#ifdef __SANITIZE_ADDRESS__
      __asan_unpoison_memory_region(copy.to, copy.bytes);
#endif
      show_copy(copy.to, copy.bytes, copy.from, copy.bytes_read);
      const Unwatched unwatched;
      std::memset(copy.to, 0, copy.bytes);
      if (copy.bytes_read > 0) std::memcpy(copy.to, copy.from, copy.bytes_read);
    }
    const Unwatched unwatched;
    groups.pop_front();
  }
}

}  // namespace cuda_emulation
