#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FINIAL_ADDRESS_SANITIZER 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define FINIAL_ADDRESS_SANITIZER 1
#endif

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace finial {

#if defined(FINIAL_ADDRESS_SANITIZER)  // which sees only the ends of what it gives out itself

Memory::Memory(size_t bytes, Pages) : size_(bytes) {
  if (bytes == 0) return;
  data_ = static_cast<uint8_t*>(std::calloc(bytes, 1));
  if (data_ == nullptr) throw std::bad_alloc();
}

Memory::~Memory() { std::free(data_); }

void give_back(const uint8_t*, size_t) {}

#elif defined(_WIN32)

Memory::Memory(size_t bytes, Pages) : size_(bytes) {
  if (bytes == 0) return;
  data_ = static_cast<uint8_t*>(VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
  if (data_ == nullptr) throw std::bad_alloc();
}

Memory::~Memory() {
  if (data_ != nullptr) VirtualFree(data_, 0, MEM_RELEASE);
}

void give_back(const uint8_t*, size_t) {}

#else

Memory::Memory(size_t bytes, Pages pages) : size_(bytes) {
  if (bytes == 0) return;
  constexpr size_t LARGE = size_t{2} << 20;
  const size_t spare = pages == Pages::Huge && bytes >= LARGE ? LARGE : 0;
  void* got = mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(got);
  if (spare > 0) {  // keep the part that starts on a boundary
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), kept = (bytes + page - 1) / page * page;
    const size_t before = (LARGE - reinterpret_cast<uintptr_t>(data_) % LARGE) % LARGE;
    const size_t mapped = (bytes + spare + page - 1) / page * page;
    if (before > 0) munmap(data_, before);
    data_ += before;
    got = data_;
    if (mapped > before + kept) munmap(data_ + kept, mapped - before - kept);
  }
#if defined(MADV_HUGEPAGE) && defined(MADV_NOHUGEPAGE)
  madvise(got, bytes, pages == Pages::Huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#else
  (void)pages;
#endif
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, size_);
}

void give_back(const uint8_t* data, size_t bytes) {
#if defined(MADV_DONTNEED)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
#else
  (void)data, (void)bytes;
#endif
}

#endif

void Memory::take(size_t bytes) {
  constexpr size_t SMALLEST_PAGE = 4096;
  volatile uint8_t* at = data_;
  for (size_t i = 0; i < bytes && i < size_; i += SMALLEST_PAGE) at[i] = 0;
}

}  // namespace finial
