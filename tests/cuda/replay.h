// A program that maps a snapshot of device memory where it was, and runs the launches in it (see tests/cuda_twin.py).
#pragma once

#include <sys/mman.h>

struct Saved {
  u32 which, x, y, z, threads, padding;
  u64 shared, bytes;
};

static void read_all(FILE* file, void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, file) != bytes) std::abort();
}

int main(int, char** argv) {
  FILE* file = std::fopen(argv[1], "rb");
  u64 head[3];
  if (!file) return 2;
  read_all(file, head, sizeof head);
  void* arena =
      mmap((void*)head[0], head[1], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (arena != (void*)head[0]) return 3;
  read_all(file, arena, head[1]);
  for (u64 i = 0; i < head[2]; i++) {
    Saved saved;
    read_all(file, &saved, sizeof saved);
    std::vector<u64> args(saved.bytes / 8 + 1);
    read_all(file, args.data(), saved.bytes);
    FUNCTIONS[saved.which](saved.x, saved.y, saved.z, saved.threads, saved.shared, (u32)i, args.data());
  }
  return 0;
}
