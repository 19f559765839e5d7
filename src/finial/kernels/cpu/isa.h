// Which instruction sets this CPU and this build have.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace finial {

std::vector<std::pair<std::string, bool>> cpu_features();  // name, present and usable under this operating system
std::vector<std::string> isas_available();                 // built and supported here, slowest first

}  // namespace finial
