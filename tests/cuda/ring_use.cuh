// A user of ring.cuh for its test: worker warps add up the bytes of each stage, with delays; see test_mega_ring.py.
#pragma once
#include "ring.cuh"

struct RingUseArgs {
  const u8* data;
  const i32* sizes;  // [stages] of 16 to SLOT_BYTES bytes
  u32* sums;         // [stages, WARPS]
  u32* seen;         // stages that a worker took
  i32 stages, stop;  // workers leave after so many; 0: after all
};

// SLOT_BYTES, STAGES, WARPS, BULK; EARLY: a fault, slots are given back before they are read; LATE: waited for after
// they are read.
template <class C>
FINIAL_DEVICE void ring_use(const RingUseArgs& a) {
  using Use = Ring<C>;
  FINIAL_DYNAMIC_SHARED(memory);
  auto& barriers = *(typename Use::Barriers*)memory;
  u32* left = (u32*)(memory + 1024);
  u8* slots = memory + 2048;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) Use::init(barriers), *left = 0;
  ptx::sync_block();
  if (warp == C::WARPS) {
    if (C::BULK && lane != 0) return;
    typename Use::Producer producer;
    const u8* from = a.data;
    for (int i = 0; i < a.stages; i++) {
      if (!producer.put(slots, barriers, from, a.sizes[i], [&] { return ptx::load_block(left) != 0; })) break;
      from += a.sizes[i];
    }
    producer.drain(barriers, [] { return false; });
    return;
  }
  typename Use::Place at;
  const int count = a.stop ? a.stop : a.stages;
  for (int i = 0; i < count; i++, at.next()) {
    if (!C::LATE) Use::wait(&barriers.full[at.slot], at.parity, [] { return false; });
    ptx::sync_warp();  // all lanes have seen this phase before it can end
    if (C::EARLY && lane == 0) ptx::barrier_arrive(&barriers.empty[at.slot]);
    for (int n = 0; n < (i * 7 + warp * 5) % 4; n++) ptx::pause();
    u32 sum = 0;
    for (int at_byte = warp * 32 + lane; at_byte < a.sizes[i]; at_byte += C::WARPS * 32)
      sum += slots[at.slot * C::SLOT_BYTES + at_byte] * (u32)(at_byte + 1);
    for (int offset = 16; offset > 0; offset /= 2) sum += ptx::shuffle_xor(sum, offset);
    if (lane == 0) a.sums[i * C::WARPS + warp] = sum;
    ptx::sync_warp();
    if (C::LATE) Use::wait(&barriers.full[at.slot], at.parity, [] { return false; });
    ptx::sync_warp();
    if (!C::EARLY && lane == 0) ptx::barrier_arrive(&barriers.empty[at.slot]);
  }
  ptx::sync_some<1>(C::WARPS * 32);
  if (threadIdx.x == 0) ptx::store_block(left, 1), *a.seen = (u32)count;
}
