// Written from Intel's manual, independently of the emulation in csrc/cpu/linear_emulated_avx512.cpp.
#include "tile_traps.h"

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <ucontext.h>

namespace inq::test {
namespace {

std::atomic<long> trapped{0};

struct Tile {
  int rows, bytes;
  unsigned char row[16][64];
};
thread_local bool configured = false;
thread_local Tile tiles[8];

// A VEX instruction of three-byte prefix: C4, RXB and map, W vvvv L pp, opcode, ModRM.
struct Instruction {
  int prefix, opcode, mod, reg, rm, vvvv, length;
  bool indexed;
  uint64_t base, index;  // of the memory operand; the index shifted by its scale
};

uint64_t general_register(const ucontext_t& context, int number) {
  static const int at[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<uint64_t>(context.uc_mcontext.gregs[at[number]]);
}

bool read_instruction(const ucontext_t& context, Instruction& i) {
  const unsigned char* p = reinterpret_cast<const unsigned char*>(context.uc_mcontext.gregs[REG_RIP]);
  if (p[0] != 0xC4 || (p[1] & 0x1F) != 2) return false;  // map 0F38
  const int x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8;
  const int modrm = p[4];
  i = {p[2] & 3, p[3], modrm >> 6, modrm >> 3 & 7, modrm & 7, ~p[2] >> 3 & 15, 5, false, 0, 0};
  if (i.mod == 3) return true;
  const unsigned char* next = p + 5;
  int base = i.rm;
  if (i.rm == 4) {
    const int sib = *next++, index = (sib >> 3 & 7) | x;
    base = sib & 7;
    i.indexed = index != 4;
    i.index = i.indexed ? general_register(context, index) << (sib >> 6) : 0;
  }
  if (i.mod == 0 && base == 5) return false;  // no base: not what these kernels have
  i.base = general_register(context, base | b);
  if (i.mod == 1) i.base += static_cast<int64_t>(static_cast<int8_t>(*next++));
  if (i.mod == 2) {
    int32_t displacement;
    std::memcpy(&displacement, next, 4);
    i.base += static_cast<int64_t>(displacement);
    next += 4;
  }
  i.length = static_cast<int>(next - p);
  return true;
}

bool load_config(const unsigned char* config) {
  if (config[0] != 1 || config[1] != 0) return false;
  for (int t = 0; t < 8; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * t, 2);
    tiles[t] = Tile{config[48 + t], bytes, {}};
    if (tiles[t].rows > 16 || bytes > 64) return false;
  }
  return configured = true;
}

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float bfloat16_at(const unsigned char* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return flush(x);
}

bool dot_products(Tile& c, const Tile& a, const Tile& b) {
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows || c.rows == 0 || b.rows == 0) return false;
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.bytes / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < a.bytes / 4; ++k) {
        even = flush(std::fma(bfloat16_at(&a.row[m][4 * k]), bfloat16_at(&b.row[k][4 * n]), even));
        odd = flush(std::fma(bfloat16_at(&a.row[m][4 * k + 2]), bfloat16_at(&b.row[k][4 * n + 2]), odd));
      }
      std::memcpy(&sum, &c.row[m][4 * n], 4);
      sum = flush(flush(sum) + flush(even + odd));
      std::memcpy(&c.row[m][4 * n], &sum, 4);
    }
  }
  return true;
}

bool move(Tile& tile, const Instruction& i, bool store) {
  if (!i.indexed || tile.rows == 0) return false;
  if (!store) std::memset(tile.row, 0, sizeof tile.row);
  for (int r = 0; r < tile.rows; ++r) {
    void* memory = reinterpret_cast<void*>(i.base + static_cast<uint64_t>(r) * i.index);
    store ? std::memcpy(memory, tile.row[r], tile.bytes) : std::memcpy(tile.row[r], memory, tile.bytes);
  }
  return true;
}

bool carry_out(const Instruction& i) {
  enum { none, x66, xF3, xF2 };
  if (i.opcode == 0x49 && i.prefix == none) {
    if (i.mod != 3) return load_config(reinterpret_cast<const unsigned char*>(i.base));
    std::memset(tiles, 0, sizeof tiles);
    configured = false;
    return true;
  }
  if (!configured) return false;
  if (i.opcode == 0x49 && i.prefix == xF2) {
    if (tiles[i.reg].rows == 0) return false;
    std::memset(tiles[i.reg].row, 0, sizeof tiles[i.reg].row);
    return true;
  }
  if (i.opcode == 0x4B && i.mod != 3 && i.prefix != none) return move(tiles[i.reg], i, i.prefix == xF3);
  if (i.opcode != 0x5C || i.mod != 3 || i.prefix != xF3) return false;
  return dot_products(tiles[i.reg], tiles[i.rm], tiles[i.vvvv & 7]);
}

void on_invalid_instruction(int, siginfo_t*, void* context_pointer) {
  ucontext_t& context = *static_cast<ucontext_t*>(context_pointer);
  Instruction i;
  if (!read_instruction(context, i) || !carry_out(i)) {
    signal(SIGILL, SIG_DFL);  // comes again, and ends the process
    return;
  }
  ++trapped;
  context.uc_mcontext.gregs[REG_RIP] += i.length;
}

}  // namespace

void trap_tile_instructions() {
  struct sigaction action {};
  action.sa_sigaction = on_invalid_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

long trapped_tile_instructions() { return trapped; }

}  // namespace inq::test

#else

namespace inq::test {
void trap_tile_instructions() {}
long trapped_tile_instructions() { return 0; }
}  // namespace inq::test

#endif
