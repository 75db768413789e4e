// cpu/simd.h at every instruction set that this machine can run.
#include "check.h"

#define PYVTK_KERNEL_HEADER "../tests/cpp/simd_checks.h"
#include "cpu/each_isa.h"

int main() {
  using pyvtk::cpu::Isa;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (!pyvtk::cpu::use_isa(isa)) {
      std::printf("%s: this machine cannot run it\n", pyvtk::cpu::isa_name(isa));
      continue;
    }
    CHECK(pyvtk::cpu::isa() == isa, pyvtk::cpu::isa_name(isa));
    PYVTK_FOR_ISA(check_simd)();
    std::printf("%s: done\n", pyvtk::cpu::isa_name(isa));
  }
  return report();
}
