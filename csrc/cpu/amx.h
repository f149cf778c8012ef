// Which AMX kernels run: those on the processor's tiles, once they have multiplied right, or for tests the emulated
// ones.
#pragma once

#include "kernels.h"

namespace inq::cpu {

// Throws std::runtime_error if the processor's tiles give another product than AVX-512 does: few machines have run these
// kernels, hypervisors emulate and mask instructions, and a wrong product must never go unnoticed. Checked once.
const Kernels& amx_kernels();

// Throws the same if `tiles` multiply wrongly.
void check_tiles(const Kernels& tiles);

// For tests: with `on`, isa amx is in use on emulated tiles, on any machine with avx512; without, the isa from the
// start. `wrong` makes the emulation multiply wrongly, which check_tiles must notice.
void emulate_amx(bool on, bool wrong = false);

const Kernels& amx_hardware_kernels();  // linear_amx.cpp
const Kernels& amx_emulated_kernels();  // linear_emulated_avx512.cpp
void set_emulation_wrong(bool wrong);
int emulated_threads_configured();      // threads whose tiles are configured: none, between calls

}  // namespace inq::cpu
