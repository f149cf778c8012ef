// Storage layout ↔ layout "cpu16" (layout.h). Both directions keep every code, canonical or not.
#pragma once

#include <cstdint>

#include "inq_format.h"

namespace inq::cpu {

// storage: [n, ceil(k/8)·bits]; packed: [ceil(n/16), ceil(k/32), 256 or 320], all of it written.
void prepack(const uint8_t* storage, uint8_t* packed, int64_t n, int64_t k, Format format);
void unprepack(const uint8_t* packed, uint8_t* storage, int64_t n, int64_t k, Format format);

}  // namespace inq::cpu
