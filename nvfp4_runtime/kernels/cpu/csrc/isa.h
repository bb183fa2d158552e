// Which ISA variants this machine can run.
#pragma once
#include <string>
#include <vector>

#include "types.h"

namespace nvfp4 {

std::vector<std::string> supported_isas();        // best first
bool gains_by_asking();  // see LinearNVFP4::ask
const Kernels& find_kernels(const std::string& isa);  // throws std::invalid_argument where the machine lacks it

}  // namespace nvfp4
