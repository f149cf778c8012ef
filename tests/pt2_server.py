"""A server's part of tests/test_pt2.py: run a .pt2 with the compiled library alone. LIBRARY PT2 INPUTS OUTPUTS"""

import sys

import torch
from safetensors.torch import load_file, save_file

library, package, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(package)
save_file({name: model(x) for name, x in load_file(inputs).items()}, outputs)
if "inq_kernels" in sys.modules:
    sys.exit("the package was loaded")
if [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("inq::")]:
    sys.exit("the package's operators were registered")
