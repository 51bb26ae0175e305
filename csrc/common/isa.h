// Which instruction set the CPU kernels run on.
//
// Every csrc/<op>/*_cpu.cpp is compiled once per instruction set with VITQ_ISA naming the namespace, so that
// `vitq::avx2::f` and `vitq::avx512_vnni::f` are one source. A header declares `f` for all of them with
// VITQ_DECLARE_PER_ISA; VITQ_DISPATCH(f) calls the selected one.
#pragma once

#include <string>
#include <vector>

#if defined(_WIN32)
#define VITQ_API
#else
#define VITQ_API __attribute__((visibility("default")))
#endif

namespace vitq {

enum class Isa { portable, avx2, avx_vnni, avx512_vnni, avx512_amx };

VITQ_API const char* isa_name(Isa isa);

// Instruction sets that are compiled in and that this CPU runs, weakest first.
VITQ_API std::vector<Isa> available_isas();

// The selected one: the best available unless VITQ_CPU_ISA or set_cpu_isa() says otherwise.
// Throws std::invalid_argument if VITQ_CPU_ISA names none that is available.
VITQ_API Isa cpu_isa();

// Selects `name`, or the best available for "auto". Throws std::invalid_argument for any other name.
VITQ_API void set_cpu_isa(const std::string& name);

// The CPU features that the choice rests on, e.g. "avx2", that this machine has.
VITQ_API std::vector<std::string> cpu_features();

}  // namespace vitq

#ifdef VITQ_HAS_AVX2
#define VITQ_IF_AVX2(...) __VA_ARGS__
#else
#define VITQ_IF_AVX2(...)
#endif
#ifdef VITQ_HAS_AVX_VNNI
#define VITQ_IF_AVX_VNNI(...) __VA_ARGS__
#else
#define VITQ_IF_AVX_VNNI(...)
#endif
#ifdef VITQ_HAS_AVX512_VNNI
#define VITQ_IF_AVX512_VNNI(...) __VA_ARGS__
#else
#define VITQ_IF_AVX512_VNNI(...)
#endif

#ifdef VITQ_HAS_AVX512_AMX
#define VITQ_IF_AVX512_AMX(...) __VA_ARGS__
#else
#define VITQ_IF_AVX512_AMX(...)
#endif

// VITQ_DECLARE_PER_ISA(void f(const Args& args)); declares vitq::<isa>::f for every instruction set.
#define VITQ_DECLARE_PER_ISA(...)                             \
  namespace portable {                                        \
  __VA_ARGS__;                                                \
  }                                                           \
  VITQ_IF_AVX2(namespace avx2 { __VA_ARGS__; })               \
  VITQ_IF_AVX_VNNI(namespace avx_vnni { __VA_ARGS__; })       \
  VITQ_IF_AVX512_VNNI(namespace avx512_vnni { __VA_ARGS__; }) \
  VITQ_IF_AVX512_AMX(namespace avx512_amx { __VA_ARGS__; })   \
  static_assert(true)

// VITQ_DISPATCH(f)(arguments): f of the selected instruction set; for use in namespace vitq.
#define VITQ_DISPATCH(f)                                                                   \
  ([]() {                                                                                  \
    switch (::vitq::cpu_isa()) {                                                           \
      VITQ_IF_AVX512_AMX(case ::vitq::Isa::avx512_amx : return &::vitq::avx512_amx::f;)    \
      VITQ_IF_AVX512_VNNI(case ::vitq::Isa::avx512_vnni : return &::vitq::avx512_vnni::f;) \
      VITQ_IF_AVX_VNNI(case ::vitq::Isa::avx_vnni : return &::vitq::avx_vnni::f;)          \
      VITQ_IF_AVX2(case ::vitq::Isa::avx2 : return &::vitq::avx2::f;)                      \
      default:                                                                             \
        return &::vitq::portable::f;                                                       \
    }                                                                                      \
  }())
