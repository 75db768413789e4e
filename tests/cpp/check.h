// CHECK(condition, values...): prints the place, the condition and the values, and counts. report() is main's result.
#pragma once
#include <cstdio>
#include <iostream>

inline int failures = 0;

#define CHECK(condition, ...)                                                                     \
  do {                                                                                            \
    if (!(condition) && ++failures <= 20) { /* twenty are enough to see what is wrong */          \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " #condition " does not hold; ";             \
      [](const auto&... value) { ((std::cerr << " " << value), ...) << std::endl; }(__VA_ARGS__); \
    }                                                                                             \
  } while (false)

inline int report() {
  std::printf(failures ? "%d checks failed\n" : "all checks hold\n", failures);
  return failures != 0;
}
