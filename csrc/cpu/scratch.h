// Memory a thread keeps between calls, grown on demand. Callers block their work so that it stays a few megabytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "huge_pages.h"

namespace pykernels::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // Uninitialised, aligned to a cache line, valid until the next call.
  char* get(int64_t bytes) {
    if (bytes > capacity_) {
      release();
      data_ = static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment}));
      capacity_ = bytes;
      advise_huge_pages(data_, bytes);
    }
    return data_;
  }

 private:
  static constexpr size_t kAlignment = 64;

  void release() {
    ::operator delete(data_, std::align_val_t{kAlignment});
    data_ = nullptr;
    capacity_ = 0;
  }

  char* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace pykernels::cpu
