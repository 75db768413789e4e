// Checks of cpu/simd.h, compiled once per instruction set by each_isa.h. No include guard, like a kernel.
namespace pyvtk::cpu::PYVTK_ISA {

// `count` elements of T that end where the memory ends, so that a read beyond them shows under AddressSanitizer.
template <class T>
std::vector<T> ramp(int64_t count) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(from_float<T>(static_cast<float>(i) * 0.5f - 3.0f));
  values.shrink_to_fit();
  return values;
}

template <class T>
void check_loads() {
  // One element of offset: no load may ask for alignment.
  const std::vector<T> values = ramp<T>(kLanes + 1);
  float lanes[kLanes];
  store(lanes, load(values.data() + 1));
  for (int64_t lane = 0; lane < kLanes; ++lane) CHECK(lanes[lane] == to_float(values[lane + 1]), lane, lanes[lane]);

  store(lanes, load_partial(values.data(), 0));
  for (int64_t lane = 0; lane < kLanes; ++lane) CHECK(lanes[lane] == 0.0f, lane, lanes[lane]);
  for (int64_t count = 1; count <= kLanes; ++count) {
    const std::vector<T> some = ramp<T>(count);
    store(lanes, load_partial(some.data(), count));
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      CHECK(lanes[lane] == (lane < count ? to_float(some[lane]) : 0.0f), count, lane, lanes[lane]);
    }
  }
}

// Every pattern through the vector conversion must give what the scalar one gives.
template <class T>
void check_conversion() {
  for (uint32_t first = 0; first < 65536; first += kLanes) {
    T narrow[kLanes];
    float lanes[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) narrow[lane] = T{static_cast<uint16_t>(first + lane)};
    store(lanes, load(narrow));
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float expected = to_float(narrow[lane]);
      CHECK(lanes[lane] == expected || (std::isnan(expected) && std::isnan(lanes[lane])), first + lane, lanes[lane]);
    }
  }
}

inline void check_stores() {
  const std::vector<float> values = ramp<float>(kLanes);
  for (int64_t count = 0; count <= kLanes; ++count) {
    std::vector<float> out(kLanes + 1, -99.0f);
    store_partial(out.data(), load(values.data()), count);
    for (int64_t lane = 0; lane <= kLanes; ++lane) {
      CHECK(out[lane] == (lane < count ? values[lane] : -99.0f), count, lane, out[lane]);
    }
  }
  std::vector<int32_t> whole(kLanes);
  store(whole.data(), splat(int32_t{-7}));
  for (const int32_t lane : whole) CHECK(lane == -7, lane);
}

inline void check_reductions() {
  float lanes[kLanes];
  for (int64_t place = 0; place < kLanes; ++place) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<float>(lane == place ? 3 : -2);
    CHECK(reduce_max(load(lanes)) == 3.0f, place);
    CHECK(reduce_add(load(lanes)) == static_cast<float>(3 - 2 * (kLanes - 1)), place, reduce_add(load(lanes)));
  }
}

inline void check_blends() {
  const std::vector<float> values = ramp<float>(kLanes);
  const vfloat x = load(values.data()), zero = splat(0.0f);
  float larger[kLanes], chosen[kLanes];
  store(larger, vmax(x, zero));
  store(chosen, blend(x < zero, splat(-1.0f), splat(1.0f)));
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    CHECK(larger[lane] == std::max(values[lane], 0.0f), lane, larger[lane]);
    CHECK(chosen[lane] == (values[lane] < 0 ? -1.0f : 1.0f), lane, chosen[lane]);
  }
}

inline void check_signs_and_pairs() {
  vint sign = {}, a = {}, b = {};
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    sign[lane] = lane % 3 == 0 ? std::numeric_limits<int32_t>::min() + int32_t(lane) : int32_t(lane);
    // low half positive or not, high half positive or not, and the largest ones
    const int32_t low = lane % 2 == 0 ? -128 * 127 : 127, high = lane % 4 < 2 ? 32767 : -5;
    a[lane] = (low & 0xffff) | int32_t(uint32_t(high) << 16);
    b[lane] = ((3 - int32_t(lane)) & 0xffff) | int32_t(uint32_t(-2) << 16);
  }
  const vfloat chosen = blend_sign(sign, splat(-1.0f), splat(1.0f));
  const vint sums = multiply_add_pairs(a, b);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    CHECK(chosen[lane] == (lane % 3 == 0 ? -1.0f : 1.0f), lane, chosen[lane]);
    const int32_t low = lane % 2 == 0 ? -128 * 127 : 127, high = lane % 4 < 2 ? 32767 : -5;
    CHECK(sums[lane] == low * (3 - int32_t(lane)) - 2 * high, lane, sums[lane]);
  }
  std::vector<int8_t> bytes(kLanes + 1);
  for (int64_t lane = 0; lane <= kLanes; ++lane) bytes[lane] = static_cast<int8_t>(lane % 2 == 0 ? -128 + lane : lane);
  const vfloat wide = load(bytes.data() + 1);
  for (int64_t lane = 0; lane < kLanes; ++lane) CHECK(wide[lane] == bytes[lane + 1], lane, wide[lane]);
  const Scratch memory = scratch(3);
  CHECK(reinterpret_cast<uintptr_t>(memory.get()) % 64 == 0, 0);
}

inline float vexp_of(float x) {
  float lanes[kLanes];
  store(lanes, vexp(splat(x)));
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    CHECK(lanes[lane] == lanes[0] || (std::isnan(lanes[lane]) && std::isnan(lanes[0])), x, lane);
  }
  return lanes[0];
}

// In units of the last place of the exact result; the bound has a little room for instruction sets without fma.
inline void check_exp() {
  double worst = 0;
  for (int64_t step = 0; step <= 2'000'000; ++step) {
    const float x = -87.2f + static_cast<float>(step) * (175.2f / 2e6f);
    const double exact = std::exp(static_cast<double>(x));
    const float nearest = static_cast<float>(exact);
    const double ulp = static_cast<double>(std::nextafter(nearest, std::numeric_limits<float>::infinity())) - nearest;
    worst = std::max(worst, std::abs(static_cast<double>(vexp_of(x)) - exact) / ulp);
  }
  CHECK(worst < 1.5, worst);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  CHECK(vexp_of(0.0f) == 1.0f && vexp_of(-0.0f) == 1.0f, vexp_of(0.0f));
  CHECK(vexp_of(-infinity) == 0.0f && vexp_of(-1000.0f) == 0.0f && vexp_of(-87.4f) == 0.0f, vexp_of(-87.4f));
  CHECK(vexp_of(infinity) == infinity && vexp_of(1000.0f) == infinity, vexp_of(1000.0f));
  CHECK(std::isnan(vexp_of(std::numeric_limits<float>::quiet_NaN())), "NaN must stay");
}

inline void check_simd() {
  check_loads<float>();
  check_loads<bfloat16>();
  check_loads<float16>();
  check_conversion<bfloat16>();
  check_conversion<float16>();
  check_stores();
  check_reductions();
  check_blends();
  check_signs_and_pairs();
  check_exp();
}

}  // namespace pyvtk::cpu::PYVTK_ISA
