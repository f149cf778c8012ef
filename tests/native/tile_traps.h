// AMX machine code on a processor without AMX: every tile instruction is an invalid one there, and a signal handler does
// what it says. So the very instructions that the compiler and the assembler made are run, operands and addresses too. On
// a processor with AMX nothing is trapped.
#pragma once

namespace inq::test {
void trap_tile_instructions();
long trapped_tile_instructions();
}  // namespace inq::test
