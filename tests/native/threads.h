// How many threads the native tests' parallel_for uses.
#pragma once

namespace inq::cpu {
void set_thread_count(int count);
}  // namespace inq::cpu
