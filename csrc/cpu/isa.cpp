#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace inq::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"portable", "avx2", "avx512", "amx"};

struct Detection {
  Isa isa = Isa::portable;
  std::string missing;
};

#if defined(__x86_64__)

// XGETBV: which register states the operating system saves. Bits 1, 2: SSE, AVX; 5 to 7: AVX-512; 17, 18: tiles.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives a process the 8 KB of tile state only on request; without it the first tile instruction is a SIGILL.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Detection detect() {
  uint32_t a, b, c, d;
  auto has = [](uint32_t word, int bit) { return (word >> bit & 1) != 0; };
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !has(c, 27)) return {Isa::portable, "no AVX2: no XSAVE"};
  const bool fma = has(c, 12), f16c = has(c, 29);
  const uint64_t states = saved_states();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {Isa::portable, "no AVX2"};
  const uint32_t b7 = b, d7 = d;
  if (!(fma && f16c && has(b7, 5) && has(b7, 8) && (states & 0x6) == 0x6)) return {Isa::portable, "no AVX2 with FMA"};
  const bool avx512 = has(b7, 16) && has(b7, 17) && has(b7, 30) && has(b7, 31) && (states & 0xE6) == 0xE6;
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5);
  if (!(avx512 && bf16)) return {Isa::avx2, avx512 ? "no AVX-512 BF16" : "no AVX-512"};
  if (!(has(d7, 22) && has(d7, 24))) return {Isa::avx512, "no AMX"};
  if ((states & 0x60000) != 0x60000 || !tiles_permitted()) {
    return {Isa::avx512, "the operating system does not permit AMX"};
  }
  return {Isa::amx, ""};
}

#else

Detection detect() { return {Isa::portable, "no kernels for this architecture"}; }

#endif

const Detection& detection() {
  static const Detection once = detect();
  return once;
}

Isa checked(Isa isa, const char* where) {
  if (isa > detected_isa()) {
    throw std::runtime_error(std::string(where) + ": expected at most \"" + name(detected_isa()) +
                             "\" on this machine (" + why_not_better() + "), got \"" + name(isa) + "\"");
  }
  return isa;
}

Isa initial() {
  const char* forced = std::getenv("INQ_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return detected_isa();
  return checked(isa_from_name(forced, "INQ_CPU_ISA"), "INQ_CPU_ISA");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

std::atomic<bool> emulated{false};

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const std::string& text, const char* where) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (text == kNames[i]) return static_cast<Isa>(i);
  }
  throw std::invalid_argument(std::string(where) + ": expected portable, avx2, avx512 or amx, got \"" + text + "\"");
}

Isa detected_isa() { return detection().isa; }

std::string why_not_better() { return detection().missing; }

Isa current_isa() { return current().load(std::memory_order_relaxed); }

bool amx_emulated() { return emulated.load(std::memory_order_relaxed); }

void set_amx_emulated(bool on) {
  if (on) checked(Isa::avx512, "emulate_amx");
  emulated = on;
  current() = on ? Isa::amx : initial();
}

Isa set_isa(Isa isa) {
  if (isa == Isa::amx && amx_emulated()) return current().exchange(isa);
  return current().exchange(checked(isa, "set_isa"));
}

}  // namespace inq::cpu
