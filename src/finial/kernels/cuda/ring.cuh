// A stream of bytes through shared memory: one warp copies stages into a ring of slots, the others use them.
//
// Two barriers a slot: `full`, when a stage has arrived, and `empty`, when every worker warp is done with it.  Stage n
// lies in slot n % STAGES; it is that slot's use n / STAGES, and the parity of a use is that of the barriers' phases. A
// worker warp waits for every stage and gives every stage back, also those in which it has no part: a phase counts
// arrivals, not warps, and who gave back a use that is not there yet would end the use before.
//
// From 9.0 one lane asks for a whole stage (cp.async.bulk) and the copy engine counts bytes; before, 32 lanes copy 16
// bytes each (cp.async) and each lane's copies end with an arrival of theirs.  A slot is read by ordinary loads and
// then written by the engine's own proxy: the reads are over when a warp arrives on `empty`, and the engine is asked
// only after that phase was seen complete.  A proxy fence would order ordinary writes before the engine's reads; the
// slots have no ordinary writes, and the barriers' own are fenced once, when they are made.
#pragma once
#include "base.cuh"

// SLOT_BYTES (a multiple of 16), STAGES, WARPS (that work), BULK.
template <class C>
struct Ring {
  static constexpr int STAGES = C::STAGES, SLOT = C::SLOT_BYTES;
  static_assert(SLOT % 16 == 0, "copies of 16 bytes");
  struct Barriers {
    u64 full[STAGES], empty[STAGES];
  };

  // One thread; a barrier of the block must follow before anything else is done with them.
  FINIAL_DEVICE static void init(Barriers& b) {
    for (int s = 0; s < STAGES; s++) {
      ptx::barrier_init(&b.full[s], C::BULK ? 1 : 32);
      ptx::barrier_init(&b.empty[s], C::WARPS);
    }
    ptx::barrier_fence();
  }

  // Waits for a phase; gives up (false) when `gone()` says so.
  template <class Gone>
  FINIAL_DEVICE static bool wait(u64* barrier, u32 parity, Gone gone) {
    while (!ptx::barrier_test(barrier, parity)) {
      if (gone()) return false;
      ptx::pause();
    }
    return true;
  }

  struct Place {  // of a stage: its slot, and the parity of its use
    int slot = 0;
    u32 parity = 0;
    FINIAL_DEVICE void next() {
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
  };

  // The copying warp.  With BULK one lane calls this, else all 32.
  struct Producer {
    Place at;
    u32 issued = 0;

    // Copies a stage when its slot is free; false if the workers have left instead.
    template <class Gone>
    FINIAL_DEVICE bool put(u8* slots, Barriers& b, const u8* from, int bytes, Gone gone) {
      bool free = true;
      if (issued >= (u32)STAGES && threadIdx.x % 32 == 0) free = wait(&b.empty[at.slot], at.parity ^ 1, gone);
      if (!C::BULK) {  // one lane decides for all
        ptx::sync_warp();
        free = ptx::shuffle(free ? 1.0f : 0.0f, 0) != 0.0f;
      }
      if (!free) return false;
      u8* to = slots + at.slot * SLOT;
      u64* full = &b.full[at.slot];
      if (C::BULK) {
        ptx::barrier_arrive_expecting(full, (u32)bytes);
        ptx::copy_bulk(to, from, (u32)bytes, full);
      } else {
        for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16) ptx::copy_async(to + i, from + i, true);
        ptx::copy_arrive(full);
      }
      at.next(), issued++;
      return true;
    }

    // Before the block ends: no copy may still be on its way into its shared memory.
    template <class Gone>
    FINIAL_DEVICE void drain(Barriers& b, Gone gone) {
      const int last = issued < (u32)STAGES ? (int)issued : STAGES;
      Place place;
      place.slot = at.slot, place.parity = at.parity;
      for (int i = 0; i < STAGES - last; i++) place.next();  // slots never used come first
      for (int i = 0; i < last; i++) {
        wait(&b.full[place.slot], issued < (u32)STAGES ? 0 : place.parity ^ 1, gone);
        place.next();
      }
    }
  };
};
