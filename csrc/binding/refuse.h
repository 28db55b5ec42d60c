// One form for every refusal: argument, wanted, got, fix. Python sees a ValueError.
#pragma once

#include <stdexcept>
#include <string>

namespace flash_attn {

[[noreturn]] inline void refuse(const std::string& argument, const std::string& wanted, const std::string& got,
                                const std::string& fix) {
  throw std::invalid_argument(argument + ": " + wanted + ", got " + got + " (" + fix + ")");
}

inline void require(bool condition, const char* argument, const char* wanted, int64_t got, const char* fix) {
  if (!condition) refuse(argument, wanted, std::to_string(got), fix);
}

}  // namespace flash_attn
