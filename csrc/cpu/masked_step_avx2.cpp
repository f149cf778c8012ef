#define INQ_ISA avx2
#define INQ_LANES 8
#include "masked_step_kernel.h"
