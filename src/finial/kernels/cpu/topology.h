// How many cores this process may use, and which.
#pragma once

#include <vector>

namespace finial {

struct Topology {
  int logical;            // CPUs in the affinity mask
  int physical;           // distinct cores among them, and no more than a container's CPU quota
  std::vector<int> cpus;  // one CPU of each of those cores; empty where threads cannot be pinned
};

Topology topology();

}  // namespace finial
