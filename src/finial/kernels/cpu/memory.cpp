#include "memory.h"

#include <new>

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#endif

namespace finial {

#if defined(_WIN32)

Memory::Memory(size_t bytes, Pages) : size_(bytes) {
  if (bytes == 0) return;
  data_ = static_cast<uint8_t*>(VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
  if (data_ == nullptr) throw std::bad_alloc();
}

Memory::~Memory() {
  if (data_ != nullptr) VirtualFree(data_, 0, MEM_RELEASE);
}

#else

Memory::Memory(size_t bytes, Pages pages) : size_(bytes) {
  if (bytes == 0) return;
  void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(got);
#if defined(MADV_HUGEPAGE) && defined(MADV_NOHUGEPAGE)
  madvise(got, bytes, pages == Pages::Huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
  (void)pages;
#endif
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, size_);
}

#endif

}  // namespace finial
