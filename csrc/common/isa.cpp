#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <utility>

namespace vitq {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx_vnni, Isa::avx512_vnni, Isa::avx512_amx};

bool compiled(Isa isa) {
  switch (isa) {
#ifdef VITQ_HAS_AVX2
    case Isa::avx2:
#endif
#ifdef VITQ_HAS_AVX_VNNI
    case Isa::avx_vnni:
#endif
#ifdef VITQ_HAS_AVX512_VNNI
    case Isa::avx512_vnni:
#endif
#ifdef VITQ_HAS_AVX512_AMX
    case Isa::avx512_amx:
#endif
    case Isa::portable:
      return true;
    default:
      return false;
  }
}

struct Features {
  bool avx2 = false, fma = false, f16c = false, avx_vnni = false, avx512 = false, avx512_vnni = false,
       amx_int8 = false;
};

}  // namespace
}  // namespace vitq

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vitq {
namespace {

// Not __builtin_cpu_supports: GCC 11 does not know "avxvnni" there. XCR0 says what the operating system
// saves.
__attribute__((target("xsave"))) unsigned long long xcr0() {
  unsigned eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (static_cast<unsigned long long>(edx) << 32) | eax;
}

// Linux gives a process its tile registers on request, for all of its threads; a refusal means that it has
// none.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return f;
  const unsigned long long saved = xcr0();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
  f.fma = ymm && (c & bit_FMA);
  f.f16c = ymm && (c & bit_F16C);
  unsigned subleaves = 0;
  if (!__get_cpuid_count(7, 0, &subleaves, &b, &c, &d)) return f;
  f.avx2 = ymm && (b & bit_AVX2);
  f.avx512 = zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
  f.avx512_vnni = f.avx512 && (c & (1u << 11));
  const bool tiles = (saved & 0x60000) == 0x60000 && (d & (1u << 24));
  f.amx_int8 = tiles && (d & (1u << 25)) && tiles_granted();
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx_vnni = f.avx2 && (a & (1u << 4));
  return f;
}

}  // namespace
}  // namespace vitq
#else
namespace vitq {
namespace {
Features detect() { return {}; }
}  // namespace
}  // namespace vitq
#endif

namespace vitq {
namespace {

const Features& features() {
  static const Features f = detect();
  return f;
}

bool runs(Isa isa) {
  const Features& f = features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx_vnni:
      return avx2 && f.avx_vnni;
    case Isa::avx512_vnni:
      return avx2 && f.avx512_vnni;
    case Isa::avx512_amx:
      return avx2 && f.avx512_vnni && f.amx_int8;
    default:
      return true;
  }
}

Isa parse(const std::string& name, const char* where) {
  std::string names;
  const auto isas = available_isas();
  if (name == "auto") return isas.back();
  for (Isa isa : isas) {
    if (name == isa_name(isa)) return isa;
    names += std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument(std::string(where) + " is '" + name + "', expected one of auto" + names);
}

std::atomic<Isa>& selected() {
  static std::atomic<Isa> isa = [] {
    const char* name = std::getenv("VITQ_CPU_ISA");
    return parse(name && *name ? name : "auto", "VITQ_CPU_ISA");
  }();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx_vnni:
      return "avx_vnni";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_amx:
      return "avx512_amx";
    default:
      return "portable";
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> out;
  for (Isa isa : kAll)
    if (compiled(isa) && runs(isa)) out.push_back(isa);
  return out;
}

Isa cpu_isa() { return selected().load(std::memory_order_relaxed); }

void set_cpu_isa(const std::string& name) { selected().store(parse(name, "isa")); }

std::vector<std::string> cpu_features() {
  const Features& f = features();
  const std::pair<const char*, bool> all[] = {{"avx2", f.avx2},        {"fma", f.fma},
                                              {"f16c", f.f16c},        {"avx_vnni", f.avx_vnni},
                                              {"avx512", f.avx512},    {"avx512_vnni", f.avx512_vnni},
                                              {"amx_int8", f.amx_int8}};
  std::vector<std::string> out;
  for (const auto& [name, has] : all)
    if (has) out.emplace_back(name);
  return out;
}

}  // namespace vitq
