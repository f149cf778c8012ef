#define INQ_ISA avx2
#define INQ_LANES 8
#include "keys_kernel.h"
