#define INQ_ISA avx512
#define INQ_LANES 16
#include "masked_step_kernel.h"
