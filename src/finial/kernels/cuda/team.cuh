// Which threads of a block take part in something, and how they meet.
#pragma once
#include "base.cuh"

struct AllThreads {
  FINIAL_DEVICE static void sync() { ptx::sync_block(); }
};
// The first THREADS, where other warps of the block do something else.
template <int THREADS>
struct FirstThreads {
  FINIAL_DEVICE static void sync() { ptx::sync_some<1>(THREADS); }
};
