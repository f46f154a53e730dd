/* Included before every C++ file of llama.cpp. GCC 12's _tile_loadconfig tells the compiler that 8 of the 64 bytes are read, so
 * the others are never written and the first AMX instruction ends the process. */
#ifdef __AMX_TILE__
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" :: "m"(*(const char (*)[64])(config)))
#endif
