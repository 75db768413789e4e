// pyvtk._C: facts about this build and this machine. Operators live in libpyvtk_cpu.so and libpyvtk_cuda.so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/poison.h"
#include "cpu/isa.h"

namespace py = pybind11;
using pyvtk::cpu::Isa;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = PYVTK_VERSION;
  info["cxx"] = PYVTK_CXX;
  info["date"] = PYVTK_BUILD_DATE;
  info["sanitize"] = PYVTK_SANITIZE;
#ifdef PYVTK_CUDA_ARCHITECTURES
  info["cuda_architectures"] = PYVTK_CUDA_ARCHITECTURES;
  info["cuda_compiler"] = PYVTK_CUDA_COMPILER;
#else
  info["cuda_architectures"] = py::none();
  info["cuda_compiler"] = py::none();
#endif
  return info;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int isa = 0; isa <= static_cast<int>(pyvtk::cpu::best_isa()); ++isa) {
    names.emplace_back(pyvtk::cpu::isa_name(static_cast<Isa>(isa)));
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (name != pyvtk::cpu::isa_name(isa)) continue;
    if (!pyvtk::cpu::use_isa(isa)) throw py::value_error("this machine cannot run " + name);
    return;
  }
  throw py::value_error("instruction set must be portable, avx2 or avx512, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and capability facts of pyvtk.";
  m.def("build_info", &build_info, "What this build of pyvtk was made with.");
  m.def("instruction_sets", &instruction_sets, "Instruction sets that this machine can run, weakest first.");
  m.def(
      "instruction_set", [] { return std::string(pyvtk::cpu::isa_name(pyvtk::cpu::isa())); },
      "The instruction set that CPU kernels use now.");
  m.def("use_instruction_set", &use_instruction_set, py::arg("name"),
        "Choose the instruction set of all CPU kernels in this process (for tests and measurements).");
  m.def(
      "poison_new_memory", [](bool on) { pyvtk::poisons_new_memory() = on; }, py::arg("on"),
      "Fill every new CPU output with NaN (integers: -1) before kernels run (for tests).");
}
