// What this binary is. The definition is written by the build: tools/build/info.py.
#pragma once

namespace flash_attn {

extern const char* const kBuildInfo;  // JSON

}  // namespace flash_attn
