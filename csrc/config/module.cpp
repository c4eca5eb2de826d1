// The Python module mla_fp8._config: the tile table and select_config, without torch and without
// CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "config/fields.h"

namespace py = pybind11;
using namespace mla_fp8;

namespace {

// Calls visit(name, index) for each field of T.
template <typename T, size_t kIndex = 0, typename Visit>
void each_field(const Visit& visit, const char* names = field_names(T{})) {
  const std::string name(names, std::strcspn(names, ","));
  visit(name, std::integral_constant<size_t, kIndex>{});
  if constexpr (kIndex + 1 < std::tuple_size_v<decltype(fields_of(std::declval<T&>()))>) {
    each_field<T, kIndex + 1>(visit, names + name.size() + 2);
  }
}

// A plain struct: read-only attributes and a text of all of them.
template <typename T>
py::class_<T> bind(py::module_& module, const char* name, const char* doc) {
  py::class_<T> bound(module, name, doc);
  py::list names;
  each_field<T>([&](const std::string& field, auto index) {
    bound.def_property_readonly(
        field.c_str(), [](const T& self) -> const auto& { return std::get<decltype(index)::value>(fields_of(self)); });
    names.append(field);
  });
  bound.attr("_fields") = py::tuple(names);
  bound.def("__repr__", [](const py::object& self) {
    py::list parts;
    for (const auto& field : self.attr("_fields")) {
      parts.append(py::str("{}={!r}").format(field, self.attr(field)));
    }
    return py::str("{}({})").format(py::type::of(self).attr("__name__"), py::str(", ").attr("join")(parts));
  });
  return bound;
}

template <typename T>
void set_field(T& made, const std::string& name, const py::handle& value) {
  bool known = false;
  each_field<T>([&](const std::string& field, auto index) {
    if (name != field) return;
    known = true;
    auto& member = std::get<decltype(index)::value>(fields_of(made));
    try {
      member = py::cast<std::decay_t<decltype(member)>>(value);
    } catch (const py::cast_error&) {
      throw py::type_error(name + " must fit its C++ type, got " + std::string(py::str(py::repr(value))));
    }
  });
  if (!known) throw py::type_error("unknown keyword " + name);
}

// One that Python makes too: T(*, name=value, ...), every keyword optional.
template <typename T>
void bind_input(py::module_& module, const char* name, const char* doc) {
  auto bound = bind<T>(module, name, doc);
  bound.def(py::init([](const py::kwargs& values) {
    T made;
    for (const auto& item : values) set_field(made, py::cast<std::string>(item.first), item.second);
    return made;
  }));
  bound.def("__eq__", [](const T& a, const T& b) { return a == b; }, py::is_operator());
  bound.attr("__hash__") = py::none();
}

}  // namespace

PYBIND11_MODULE(_config, module) {
  module.doc() = "Tile tables and select_config of mla_fp8, in C++. Needs neither torch nor CUDA.";
  py::enum_<Op>(module, "Op", "The op that a tile computes.")
      .value("quantize_q_nope", Op::kQuantizeQNope)
      .value("bmm", Op::kBmm)
      .value("absorb_q", Op::kAbsorbQ)
      .value("v_up", Op::kVUp);
  bind_input<Problem>(module, "Problem", "What an op was called with; see csrc/config/config.h.");
  bind_input<Device>(module, "Device", "Limits and speeds of a GPU; the defaults are an H100 SXM's.");
  bind<Tile>(module, "Tile", "A compiled kernel; see csrc/config/tile.h.");
  bind<Config>(module, "Config", "A tile, its grid and its modelled cost; see csrc/config/config.h.");
  bind<Cost>(module, "Cost", "What a modelled time is made of; see csrc/config/cost.h.");
  bind<Candidate>(module, "Candidate", "A tile that was considered, and why it was dropped if it was.");
  module.def(
      "tiles", [] { return std::vector<Tile>(std::begin(kTiles), std::end(kTiles)); },
      "Every compiled tile, in table order.");
  module.def("select_config", &select_config, py::arg("problem"), py::arg("device") = Device{},
             "The least modelled time among the tiles that fit. Raises ValueError with every reason if none does.");
  module.def("candidates", &candidates, py::arg("problem"), py::arg("device") = Device{},
             "Every tile of the op, kept or dropped with its reason, in table order.");
}
