// The Python module mla_fp8._config: the tile table and select_config, without torch and without CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "config/config.h"

namespace py = pybind11;
using namespace mla_fp8;

namespace {

// A plain struct in Python: each member is named once, for its attribute, its keyword and its place in the repr.
template <typename T>
class Struct {
 public:
  Struct(py::module_& module, const char* name, const char* doc) : bound_(module, name, doc) {}

  template <typename M>
  Struct& field(const char* name, M T::* member) {
    bound_.def_readonly(name, member);
    fields_.push_back({name, {}});
    if constexpr (std::is_arithmetic_v<M> || std::is_enum_v<M>) {
      fields_.back().set = [member](T& made, const py::handle& value) { made.*member = py::cast<M>(value); };
    }
    return *this;
  }

  // T(*, name=value, ...), every keyword optional.
  Struct& keywords() {
    bound_.def(py::init([fields = fields_](const py::kwargs& values) {
      T made;
      for (const auto& item : values) set(fields, made, py::cast<std::string>(item.first), item.second);
      return made;
    }));
    bound_.def("__eq__", [](const T& a, const T& b) { return a == b; }, py::is_operator());
    bound_.attr("__hash__") = py::none();
    return *this;
  }

  void repr() {
    py::list names;
    for (const Field& field : fields_) names.append(field.name);
    bound_.attr("_fields") = py::tuple(names);
    bound_.def("__repr__", [fields = fields_](const py::object& self) {
      py::list parts;
      for (const Field& field : fields) parts.append(py::str("{}={!r}").format(field.name, self.attr(field.name)));
      return py::str("{}({})").format(py::type::of(self).attr("__name__"), py::str(", ").attr("join")(parts));
    });
  }

 private:
  struct Field {
    const char* name;
    std::function<void(T&, const py::handle&)> set;
  };
  static void set(const std::vector<Field>& fields, T& made, const std::string& name, const py::handle& value) {
    for (const Field& field : fields) {
      if (name != field.name) continue;
      try {
        return field.set(made, value);
      } catch (const py::cast_error&) {
        throw py::type_error(name + " must fit its C++ type, got " + std::string(py::str(py::repr(value))));
      }
    }
    throw py::type_error("unknown keyword " + name);
  }

  py::class_<T> bound_;
  std::vector<Field> fields_;
};

void bind_inputs(py::module_& module) {
  py::enum_<Op>(module, "Op", "The op that a tile computes.")
      .value("quantize_q_nope", Op::kQuantizeQNope)
      .value("bmm", Op::kBmm)
      .value("absorb_q", Op::kAbsorbQ)
      .value("v_up", Op::kVUp);
  Struct<Problem>(module, "Problem", "What an op was called with; see csrc/config/config.h.")
      .field("op", &Problem::op)
      .field("s", &Problem::s)
      .field("heads", &Problem::heads)
      .field("n", &Problem::n)
      .field("k", &Problem::k)
      .field("pe", &Problem::pe)
      .field("m", &Problem::m)
      .field("in_bytes", &Problem::in_bytes)
      .field("out_bytes", &Problem::out_bytes)
      .field("align_bytes", &Problem::align_bytes)
      .keywords()
      .repr();
  Struct<Device>(module, "Device", "Limits and speeds of a GPU; the defaults are an H100 SXM's.")
      .field("num_sms", &Device::num_sms)
      .field("smem_bytes_per_cta", &Device::smem_bytes_per_cta)
      .field("smem_bytes_per_sm", &Device::smem_bytes_per_sm)
      .field("smem_bytes_reserved", &Device::smem_bytes_reserved)
      .field("threads_per_sm", &Device::threads_per_sm)
      .field("registers_per_sm", &Device::registers_per_sm)
      .field("ctas_per_sm", &Device::ctas_per_sm)
      .field("dram_gbps", &Device::dram_gbps)
      .field("l2_gbps", &Device::l2_gbps)
      .field("sm_gbps", &Device::sm_gbps)
      .field("l2_bytes", &Device::l2_bytes)
      .field("mma_tflops", &Device::mma_tflops)
      .field("launch_us", &Device::launch_us)
      .field("latency_us", &Device::latency_us)
      .keywords()
      .repr();
}

void bind_outputs(py::module_& module) {
  Struct<Tile>(module, "Tile", "A compiled kernel; see csrc/config/tile.h.")
      .field("symbol", &Tile::symbol)
      .field("op", &Tile::op)
      .field("m", &Tile::m)
      .field("n", &Tile::n)
      .field("k", &Tile::k)
      .field("stages", &Tile::stages)
      .field("threads", &Tile::threads)
      .field("smem_bytes", &Tile::smem_bytes)
      .field("align_bytes", &Tile::align_bytes)
      .field("out_bytes", &Tile::out_bytes)
      .field("ctas_per_sm", &Tile::ctas_per_sm)
      .field("regs", &Tile::regs)
      .field("persistent", &Tile::persistent)
      .field("leaves_room", &Tile::leaves_room)
      .field("phased", &Tile::phased)
      .field("swap_ab", &Tile::swap_ab)
      .field("lane_columns", &Tile::lane_columns)
      .field("start_us", &Tile::start_us)
      .field("serial_us", &Tile::serial_us)
      .repr();
  Struct<Config>(module, "Config", "A tile, its grid and its modelled cost; see csrc/config/config.h.")
      .field("tile", &Config::tile)
      .field("grid_x", &Config::grid_x)
      .field("tiles", &Config::tiles)
      .field("waves", &Config::waves)
      .field("ctas_per_sm", &Config::ctas_per_sm)
      .field("modelled_bytes", &Config::modelled_bytes)
      .field("modelled_us", &Config::modelled_us)
      .repr();
  Struct<Cost>(module, "Cost", "What a modelled time is made of; see csrc/config/cost.h.")
      .field("dram_us", &Cost::dram_us)
      .field("l2_us", &Cost::l2_us)
      .field("sm_us", &Cost::sm_us)
      .field("mma_us", &Cost::mma_us)
      .repr();
  Struct<Candidate>(module, "Candidate", "A tile that was considered, and why it was dropped if it was.")
      .field("config", &Candidate::config)
      .field("cost", &Candidate::cost)
      .field("kept", &Candidate::kept)
      .field("reason", &Candidate::reason)
      .repr();
}

}  // namespace

PYBIND11_MODULE(_config, module) {
  module.doc() = "Tile tables and select_config of mla_fp8, in C++. Needs neither torch nor CUDA.";
  bind_inputs(module);
  bind_outputs(module);
  module.def(
      "tiles", [] { return std::vector<Tile>(std::begin(kTiles), std::end(kTiles)); },
      "Every compiled tile, in table order.");
  module.def("select_config", &select_config, py::arg("problem"), py::arg("device") = Device{},
             "The least modelled time among the tiles that fit. Raises ValueError with every reason if none does.");
  module.def("candidates", &candidates, py::arg("problem"), py::arg("device") = Device{},
             "Every tile of the op, kept or dropped with its reason, in table order.");
}
