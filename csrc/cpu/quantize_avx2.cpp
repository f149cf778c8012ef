#define INQ_ISA avx2
#define INQ_LANES 8
#include "quantize_kernel.h"
