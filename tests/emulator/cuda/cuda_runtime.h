// CUDA's runtime for csrc/register_cuda*.cpp, which know nothing of the emulator.
#pragma once

#include "emulator.h"
