// Which instruction set the CPU kernels use. Torch-free.
//
// Every kernel header is compiled once per instruction set (see each_isa.h) and chosen at run time, so one build
// serves every x86-64 machine (and, through the portable variant, every other one).
#pragma once

namespace pyvtk::cpu {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

// The best instruction set that this machine can run.
Isa best_isa();

// The one in use: best_isa() unless use_isa() chose a lower one.
Isa isa();

// Chooses one; false, and no change, if this machine cannot run it. For tests and measurements.
bool use_isa(Isa wanted);

const char* isa_name(Isa isa);

}  // namespace pyvtk::cpu

// The variant of `function` for the instruction set in use: PYVTK_FOR_ISA(select)(arguments...).
#if defined(__x86_64__)
#define PYVTK_FOR_ISA(...)                                                               \
  (::pyvtk::cpu::isa() == ::pyvtk::cpu::Isa::avx512 ? &::pyvtk::cpu::avx512::__VA_ARGS__ \
   : ::pyvtk::cpu::isa() == ::pyvtk::cpu::Isa::avx2 ? &::pyvtk::cpu::avx2::__VA_ARGS__   \
                                                    : &::pyvtk::cpu::portable::__VA_ARGS__)
#else
#define PYVTK_FOR_ISA(...) (&::pyvtk::cpu::portable::__VA_ARGS__)
#endif
