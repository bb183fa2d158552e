#include "isa.h"

#include <algorithm>
#include <stdexcept>

#if defined(NVFP4_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace nvfp4 {
namespace {

#if defined(NVFP4_AVX2VNNI)
// Byte dot products on 256 bits without AVX-512: leaf 7, subleaf 1, EAX bit 4. Compilers name it late.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

#if defined(NVFP4_AMX)
// Tiles of bfloat16: leaf 7, EDX bits 22 (AMX-BF16) and 24 (tiles). Linux lets a process use them once it has asked, and
// refuses where the kernel is too old, was told not to, or a thread's signal stack is too small for eight tiles more. The
// question is for the process's life, whichever variant is taken then: signal stacks must be large enough from here on.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}
#endif

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP of the Linux ABI
  return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__)
  return true;  // since the first of Apple's 64-bit desktop processors
#else
  return false;
#endif
}
#endif

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
    isas.push_back("avx512");
    // vdpbf16ps does twice the work of an FP32 multiply-add. AMD issues both at one rate; Intel's Emerald Rapids issues
    // it at less than a quarter (0.46 against 2 a cycle), so there it is available but not preferred.
    if (__builtin_cpu_supports("avx512bf16"))
      isas.insert(__builtin_cpu_is("amd") ? isas.begin() : isas.end(), "avx512bf16");
#if defined(NVFP4_AMX)
    if (has_amx()) isas.insert(isas.begin(), "amx");  // avx512 to the bit, and faster for several rows
#endif
  }
#if defined(NVFP4_AVX2VNNI)
  if (avx2 && has_avx_vnni()) isas.push_back("avx2vnni");
#endif
  if (avx2) isas.push_back("avx2");
#elif defined(__aarch64__)
  if (has_dot_products()) isas.push_back("dotprod");
  isas.push_back("neon");
#endif
  isas.push_back("portable");
  return isas;
}

bool gains_by_asking() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  __builtin_cpu_init();
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return false;
  constexpr unsigned kZen5 = 26;
  return (a >> 8 & 15) + (a >> 20 & 255) >= kZen5;  // family and extended family
#else
  return false;
#endif
}

const Kernels& find_kernels(const std::string& isa) {
  const auto isas = supported_isas();
  if (std::find(isas.begin(), isas.end(), isa) == isas.end())
    throw std::invalid_argument("this machine cannot run ISA variant '" + isa + "'");
#if defined(__x86_64__)
#if defined(NVFP4_AMX)
  if (isa == "amx") return kernels_amx;
#endif
  if (isa == "avx512bf16") return kernels_avx512bf16;
  if (isa == "avx512") return kernels_avx512;
#if defined(NVFP4_AVX2VNNI)
  if (isa == "avx2vnni") return kernels_avx2vnni;
#endif
  if (isa == "avx2") return kernels_avx2;
#elif defined(__aarch64__)
  if (isa == "dotprod") return kernels_dotprod;
  if (isa == "neon") return kernels_neon;
#endif
  return kernels_portable;
}

}  // namespace nvfp4
