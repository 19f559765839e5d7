// Cores from the affinity mask and /sys (Linux), sysctl (macOS) or GetLogicalProcessorInformationEx (Windows).
// On Apple's CPUs only performance cores count: a barrier waits for the slowest thread.
#include "topology.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#endif

namespace finial {

#if defined(__linux__)
namespace {

// Whole CPUs that the container may use: cgroup v2 cpu.max "quota period", v1 cpu.cfs_quota_us; 0 when unlimited.
int quota() {
  double limit = -1, period = 0;
  std::ifstream v2("/sys/fs/cgroup/cpu.max");
  std::string word;
  if (v2 >> word >> period) {
    if (word != "max") limit = std::atof(word.c_str());
  } else {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> limit;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  return limit > 0 && period > 0 ? std::max(1, static_cast<int>(limit / period + 0.999)) : 0;
}

// A core's name: the list of its hardware threads, or the CPU's own number where /sys does not say.
std::string core_of(int cpu) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
  std::string siblings;
  return std::getline(file, siblings) && !siblings.empty() ? siblings : "cpu" + std::to_string(cpu);
}

}  // namespace

Topology topology() {
  Topology t{0, 0, {}};
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) != 0) {  // more CPUs than cpu_set_t holds
    t.logical = t.physical = std::max(1u, std::thread::hardware_concurrency());
    return t;
  }
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    ++t.logical;
    if (cores.insert(core_of(cpu)).second) t.cpus.push_back(cpu);
  }
  t.physical = static_cast<int>(t.cpus.size());
  const int limit = quota();
  if (limit > 0 && limit < t.physical) {
    t.physical = limit;
    t.cpus.clear();  // which cores the others use is unknown: leave placement to the kernel
  }
  return t;
}

#elif defined(__APPLE__)

Topology topology() {
  auto ask = [](const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
  };
  Topology t{ask("hw.logicalcpu"), ask("hw.perflevel0.physicalcpu"), {}};
  if (t.physical <= 0) t.physical = ask("hw.physicalcpu");
  if (t.physical <= 0) t.physical = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (t.logical <= 0) t.logical = t.physical;
  return t;
}

#elif defined(_WIN32)

Topology topology() {
  Topology t{static_cast<int>(std::max(1u, std::thread::hardware_concurrency())), 0, {}};
  DWORD size = 0;
  GetLogicalProcessorInformationEx(RelationProcessorCore, nullptr, &size);
  std::vector<char> buffer(size);
  auto* first = reinterpret_cast<SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(buffer.data());
  if (size != 0 && GetLogicalProcessorInformationEx(RelationProcessorCore, first, &size))
    for (DWORD at = 0; at < size; ++t.physical)
      at += reinterpret_cast<SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(buffer.data() + at)->Size;
  if (t.physical == 0) t.physical = t.logical;
  return t;
}

#else

Topology topology() {
  const int n = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return {n, n, {}};
}

#endif

}  // namespace finial
