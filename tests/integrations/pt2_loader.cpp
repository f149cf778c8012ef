// A server without Python: load the library of leaf operators, then the .pt2, and run it.
//   pt2_loader inq_kernels/_cpu.so net.pt2 3 8 8     runs batches of 1, 2 and 7 of ones [B, 3, 8, 8]
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int argc, char** argv) {
  if (argc < 4) return std::fprintf(stderr, "usage: pt2_loader LIBRARY PT2 SIZE...\n"), 2;
  // Registers inq_cpu::*. It must stay loaded as long as the model is.
  if (!dlopen(argv[1], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  for (int64_t batch : {1, 2, 7}) {
    std::vector<int64_t> shape{batch};
    for (int i = 3; i < argc; ++i) shape.push_back(std::atoll(argv[i]));
    const std::vector<at::Tensor> outputs = model.run({at::ones(shape)});
    std::printf("%lld: %.9g\n", static_cast<long long>(batch), outputs[0].sum().item<double>());
  }
  return 0;
}
