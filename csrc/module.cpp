// vitq_kernels._C: build information, the CPU's instruction sets, and the index maps that tests walk.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"
#include "common/layout.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, CPU features and index maps of the native kernels.";
  m.def(
      "build_info",
      [] {
        py::dict d;
        d["compiler"] = VITQ_COMPILER;
        d["build_type"] = VITQ_BUILD_TYPE;
        d["isas"] = py::str(VITQ_ISAS).attr("split")(",");
        d["cuda"] = false;
        return d;
      },
      "Compiler, build type, instruction sets compiled in, and whether CUDA kernels are.");
  m.def("cpu_features", &vitq::cpu_features, "Features of this CPU that the choice of kernels rests on.");
  m.def("cpu_isa", [] { return vitq::isa_name(vitq::cpu_isa()); }, "The selected instruction set.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (vitq::Isa isa : vitq::available_isas()) names.emplace_back(vitq::isa_name(isa));
        return names;
      },
      "Instruction sets compiled in that this CPU runs, weakest first.");
  m.def("set_cpu_isa", &vitq::set_cpu_isa, py::arg("name"),
        "Select an instruction set by name, or the best one with 'auto'. ValueError for any other name.");
  m.def("int8_n16k4_offset", &vitq::int8_n16k4_offset, py::arg("n"), py::arg("k"), py::arg("k_total"));
  m.def("int4_n16k4_offset", &vitq::int4_n16k4_offset, py::arg("n"), py::arg("k"), py::arg("k_total"));
  m.def("int4_n16k4_shift", &vitq::int4_n16k4_shift, py::arg("k"));
}
