#define INQ_ISA avx512
#define INQ_LANES 16
#include "quantize_kernel.h"
