/* What one thread of this machine reaches at best: multiply-adds from registers, and copies.
   Compiled and loaded by vitq/bench/host.py, which names the kinds. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

enum { STEPS = 100000, LANES = 10 };

/* STEPS rounds over LANES independent accumulators, enough to hide the latency of one. Assembly with
   registers of its own: nothing is hoisted, folded or spilled. */
#define EACH(OP) OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9)
#define LOOP(name, OP)                                                                                       \
  static void name(void) {                                                                                   \
    for (int i = 0; i < STEPS; ++i)                                                                          \
      __asm__ volatile(EACH(OP)::                                                                            \
                           : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
                             "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                          \
  }
#define CLEAR(j) "vpxor %%xmm" #j ", %%xmm" #j ", %%xmm" #j "\n\t"
#define FMA256(j) "vfmadd231ps %%ymm15, %%ymm15, %%ymm" #j "\n\t"
#define FMA512(j) "vfmadd231ps %%zmm15, %%zmm15, %%zmm" #j "\n\t"
#define BYTES256(j) "vpmaddubsw %%ymm15, %%ymm15, %%ymm14\n\tvpaddw %%ymm14, %%ymm" #j ", %%ymm" #j "\n\t"
#define WORDS256(j) "vpmaddwd %%ymm15, %%ymm15, %%ymm14\n\tvpaddd %%ymm14, %%ymm" #j ", %%ymm" #j "\n\t"
#define DOT256(j) "%{vex%} vpdpbusd %%ymm15, %%ymm15, %%ymm" #j "\n\t"
#define DOT512(j) "vpdpbusd %%zmm15, %%zmm15, %%zmm" #j "\n\t"

/* Registers of 0: what was in them before may be slow to add. */
static void clear(void) { __asm__ volatile(EACH(CLEAR) CLEAR(15)::: "memory"); }

LOOP(fma_avx2, FMA256)
LOOP(fma_avx512, FMA512)
LOOP(bytes_avx2, BYTES256)
LOOP(words_avx2, WORDS256)
LOOP(dot_avx2, DOT256)
LOOP(dot_avx512, DOT512)

/* Six tiles of sums, two of operands. Whoever calls has been granted the tiles. */
#define TILE(j) "tdpbssd %%tmm7, %%tmm6, %%tmm" #j "\n\t"
static void dot_amx(void) {
  struct {
    unsigned char palette, start, reserved[14];
    unsigned short row_bytes[16];
    unsigned char rows[16];
  } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  for (int i = 0; i < STEPS; ++i)
    __asm__ volatile(TILE(0) TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(0) TILE(1) TILE(2) TILE(3)::);
  __asm__ volatile("tilerelease");
}

static const struct {
  const char* name;
  void (*run)(void);
  double operations; /* a multiplication and an addition each, per step of a lane */
} kinds[] = {
    {"fma_avx2", fma_avx2, 16},     {"fma_avx512", fma_avx512, 32}, {"bytes_avx2", bytes_avx2, 64},
    {"words_avx2", words_avx2, 32}, {"dot_avx2", dot_avx2, 64},     {"dot_avx512", dot_avx512, 128},
    {"dot_amx", dot_amx, 32768},
};

/* Operations a second, the best of what fits into `seconds`; -1 for a kind that is not known. */
double peak(const char* kind, double seconds) {
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; ++i) {
    if (strcmp(kinds[i].name, kind)) continue;
    double best = 0, end = now() + seconds;
    do {
      clear();
      const double start = now();
      kinds[i].run();
      const double rate = STEPS * LANES * kinds[i].operations / (now() - start);
      if (rate > best) best = rate;
    } while (now() < end);
    return best;
  }
  return -1;
}

/* Bytes a second, read and written, of copies within `bytes` of memory; -1 without that memory. */
double copy(size_t bytes, double seconds) {
  char *from = malloc(bytes / 2), *to = malloc(bytes / 2);
  double best = -1, end = now() + seconds;
  if (from && to) {
    memset(from, 1, bytes / 2);
    memset(to, 2, bytes / 2);
    const int times = bytes < (1 << 24) ? (1 << 24) / bytes : 1;
    do {
      const double start = now();
      for (int i = 0; i < times; ++i) {
        memcpy(to, from, bytes / 2);
        __asm__ volatile("" : : "r"(to) : "memory");
      }
      const double rate = (double)bytes * times / (now() - start);
      if (rate > best) best = rate;
    } while (now() < end);
  }
  free(from);
  free(to);
  return best;
}
