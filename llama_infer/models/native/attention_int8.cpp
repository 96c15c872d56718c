// Attention of single new tokens in bfloat16 and float32, on keys and values in 8 bits.

#include "attention.h"

#define EACH(DIM) ATTEND(bfloat16, int8_t, BFloat16, DIM) ATTEND(float32, int8_t, float, DIM)

EACH(8) EACH(16) EACH(32) EACH(64) EACH(96) EACH(128) EACH(256)
