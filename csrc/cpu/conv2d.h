// Two-dimensional convolution with packed weights as a product whose rows are gathered from the image (implicit GEMM).
#pragma once

#include "linear.h"

namespace inq::cpu {

struct Conv2dArgs {
  const void* x;  // [batch, height, width, channels], channels innermost
  int64_t batch, height, width, channels;
  DType type;
  Weight weight;  // n rows; k = channels/groups · kernel[0] · kernel[1] in that order
  const float* bias;
  int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
  void* out;  // [batch, out[0], out[1], n], channels innermost
  int64_t out_size[2];
};

void conv2d(const Conv2dArgs& args);

}  // namespace inq::cpu
