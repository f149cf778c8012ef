// The least of a test framework: CHECK prints the place and the values and goes on; main returns failures().
#pragma once

#include <cstdio>

namespace inq::test {
inline int& failures() {
  static int count = 0;
  return count;
}
}  // namespace inq::test

#define CHECK(condition, ...)                                          \
  do {                                                                 \
    if (!(condition)) {                                                \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, "" __VA_ARGS__);                            \
      std::fprintf(stderr, "\n");                                      \
      ++inq::test::failures();                                         \
    }                                                                  \
  } while (0)
