// Which kernel runs a product, with which blocking and threads: a pure function, the same on every machine, so that the
// choice for any machine can be printed and tested on any other.
#pragma once

#include <cstdint>
#include <string>

#include "isa.h"
#include "kernels.h"

namespace inq::cpu {

enum class Op : int { linear = 0, linear_dx = 1, conv2d = 2 };

struct Description {
  Op op;
  int64_t m, n, k;  // rows, columns and length of the product's sums (linear_dx: k columns, sums over n)
  DType type;
  Isa isa;
  int threads;
};

enum class Kernel : int {
  none = 0,    // nothing to compute
  stream = 1,  // all rows at once, weights decoded in registers: bound by reading the weights
  panels = 2,  // blocks of rows, weights decoded to the first-level cache and used for each of the block's rows
};

struct Plan {
  Kernel kernel;
  Isa isa;           // of the loops; at most the one asked for
  Shape shape;       // of those loops
  int stream_rows;   // stream: rows it is run with, at least m
  int64_t group;     // stream: panels a task
  int64_t m_block;   // panels: rows packed at once
  int64_t k_chunk;   // panels: k decoded at once; stream: k that all of a task's panels use before the next, 0: all
  int64_t n_share;   // panels: blocks of columns a task
  int64_t n_group;   // panels: of these, whose sums go on together from chunk to chunk,
  int64_t k_chunks;  // and the chunks whose packed rows they use before the next
  bool by_rows;      // panels: threads share out the blocks of rows, not the columns of one block after the other
  int threads;
};

Plan plan(const Description& d);

std::string to_string(const Plan& p);
Op op_from_name(const std::string& text);
DType dtype_from_name(const std::string& text);

// The kernels of a plan. Only for an instruction set that this machine has.
const Kernels& kernels_of(const Plan& p);

}  // namespace inq::cpu
