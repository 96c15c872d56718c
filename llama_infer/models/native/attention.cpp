// Attention of single new tokens, on keys and values in bfloat16 and float32.

#include "attention.h"

#define EACH(DIM) ATTEND(bfloat16, BFloat16, BFloat16, DIM) ATTEND(float32, float, float, DIM)

EACH(8) EACH(16) EACH(32) EACH(64) EACH(96) EACH(128) EACH(256)
