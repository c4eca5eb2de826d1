// text("got ", 3, " of ", name): the parts as a stream writes them, side by side.
#pragma once

#include <sstream>
#include <string>

namespace mla_fp8 {

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace mla_fp8
