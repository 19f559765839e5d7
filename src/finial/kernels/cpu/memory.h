// Zeroed memory straight from the operating system: pages cost nothing until they are written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace finial {

// Huge asks for large pages where the system has them and grants them, and starts on the boundary of one.
enum class Pages { Small, Huge };

// The whole pages within [data, data + bytes) of a read-only file mapping need not stay in memory: they come back from
// the file when they are touched. A hint.
void give_back(const uint8_t* data, size_t bytes);

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes, Pages pages = Pages::Small);  // throws std::bad_alloc
  ~Memory();
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  size_t size() const { return size_; }

  // Takes the first `bytes` from the system now, so that whoever writes there later does not wait for it.
  void take(size_t bytes);

 private:
  void swap(Memory& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace finial
