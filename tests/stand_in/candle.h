// What the stand-in of the driver asks for candle's own kernels, which it cannot run: their code is for GPUs only.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace candle {

// Whether the kernel of this name is known.
bool knows(const std::string& name);

// The work of a launch with these parameters, which are read at once; `within` says of memory that it is handed out.
// Empty if the parameters are wrong.
std::function<void()> launch(const std::string& name, void** parameters,
                             const std::function<bool(uintptr_t, size_t)>& within);

} // namespace candle
