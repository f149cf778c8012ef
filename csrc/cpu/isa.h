// Which instruction sets the kernels may use. Files named *_avx2.cpp, *_avx512.cpp and *_amx.cpp are compiled for theirs
// (setup.py) and must not be entered on a machine without it; everything else runs anywhere.
#pragma once

#include <cstdint>
#include <string>

namespace inq::cpu {

// In ascending order: each includes those before it.
enum class Isa : int {
  portable = 0,  // plain C++
  avx2 = 1,      // AVX2, FMA, F16C, BMI2
  avx512 = 2,    // AVX-512 F, BW, DQ, VL and BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later)
  amx = 3,       // the above with AMX tiles and AMX-BF16 (Sapphire Rapids and later), permitted by the kernel
};
constexpr int kIsaCount = 4;

const char* name(Isa isa);

// The Isa of that name; std::invalid_argument, which begins with `where`, for any other text.
Isa isa_from_name(const std::string& text, const char* where);

// The best that this machine, its operating system and this build have.
Isa detected_isa();

// Why `detected_isa` is not better, for people: "" if it is the best there is.
std::string why_not_better();

// The one in use: INQ_CPU_ISA if it is set, else the detected one. Throws std::runtime_error if INQ_CPU_ISA names none,
// or one that cannot run here: a forced one never falls back.
Isa current_isa();

// For tests (amx.h): with true, the one in use is amx whatever the machine has, which needs avx512; with false, the one
// from the start. Throws as above.
void set_amx_emulated(bool on);
bool amx_emulated();

// Use another one from now on, for tests and benchmarks; returns the one before. Throws as above.
Isa set_isa(Isa isa);

}  // namespace inq::cpu

// The function `name` of the instruction set in use, of those in the namespaces portable, avx2 and avx512 (simd.h).
#if defined(__x86_64__)
#define INQ_IN_USE(name)                              \
  (current_isa() >= Isa::avx512 ? avx512::name        \
   : current_isa() >= Isa::avx2 ? avx2::name          \
                                : portable::name)
#else
#define INQ_IN_USE(name) (portable::name)
#endif
